# SPDX-License-Identifier: Apache-2.0
"""`sola study NAME --data FOLDER`: run the paper's tables and figures, and write their pages.

Runs are stored in --out. The command can be interrupted and repeated at any time: finished runs are kept, interrupted
ones are resumed, and several processes can work on one folder at once. `--report` only rewrites the pages; with the
name `all`, those of every study in the folder.
"""

import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sola_vision.commands.arguments import Arguments, check_minimum
from sola_vision.engine.log import json_text
from sola_vision.studies import SCALES, STUDIES, Study, custom, get_study, plan, run_plan, write_report
from sola_vision.studies.fig1a import write_fig1a
from sola_vision.studies.outcome import RESULTS, Outcome, write_plan
from sola_vision.studies.runner import result_file
from sola_vision.wording import amount


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = _parse(arguments)
    folder = Path(options.out)
    if options.name == "fig1a":
        if options.json or options.list:
            raise ValueError("fig1a writes a figure and runs nothing: leave out --json and --list")
        write_fig1a(folder)
        print(f"{folder / 'fig1a' / 'report.html'}")
        return 0
    if options.report:
        return _rewrite_pages(options, folder)
    if options.name == "all":
        raise ValueError("the name all needs --report: name one study to run, or add --report to rewrite all pages")
    return _run(options, folder)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Arguments("sola study", __doc__, formatter_class=RawDescriptionHelpFormatter)
    _add_arguments(parser)
    options = parser.parse_args(list(arguments))
    check_minimum(options, seeds=1, epochs=1, limit=1)
    segmentation = options.name in STUDIES and STUDIES[options.name].task == "segmentation"
    if not segmentation and (options.ignore is not None or options.init):
        raise ValueError(f"--ignore and --init need table8: {options.name} is a classification study; leave them out")
    if segmentation and options.classes:
        raise ValueError(f"--classes needs a classification study: {options.name} is on segmentation; leave it out")
    if options.name != "custom" and options.schedules:
        raise ValueError(f"--schedules needs custom: {options.name} defines its own; leave it out")
    return options


def _add_arguments(parser: ArgumentParser) -> None:
    names = ", ".join((*STUDIES, "fig1a", "custom", "all"))
    parser.add_argument("name", metavar="NAME", help=names)
    parser.add_argument(
        "--data",
        help="folder or .tar with train/CLASS/ and val/CLASS/ images, or the word digits; for table8 a folder with "
        "images/SPLIT and annotations/SPLIT",
    )
    parser.add_argument("--out", default="runs/studies", help="folder of runs and pages (default: %(default)s)")
    parser.add_argument(
        "--scale", choices=tuple(SCALES), default="small", help="network, images and length of training"
    )
    parser.add_argument("--classes", metavar="FILE", help="names of the classes to use, one per line (ImageNet-100)")
    parser.add_argument("--ignore", type=int, help="table8: the ignored label (default: the scale's)")
    parser.add_argument(
        "--init", nargs="+", default=[], metavar="CHECKPOINT", help="table8: checkpoints to initialise from"
    )
    parser.add_argument(
        "--seeds", type=int, help="runs of each arm; a larger number extends a study (default: the scale's)"
    )
    parser.add_argument("--epochs", type=int, help="epochs of training (default: the scale's)")
    parser.add_argument("--limit", type=int, help="number of training images, evenly spread (default: the scale's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: CUDA if available)")
    parser.add_argument(
        "--schedules",
        nargs="+",
        default=[],
        metavar="SCHEDULE",
        help='with custom: schedules to compare, followed by their bridges, as in "LL/LL/LLSLLS/LL 1.2>3.3"',
    )
    parser.add_argument("--list", action="store_true", help="list the runs, and run nothing")
    parser.add_argument("--report", action="store_true", help="rewrite the page, and run nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")


def _run(options: Namespace, folder: Path) -> int:
    study: Study = custom(options.schedules) if options.name == "custom" else get_study(options.name)
    if options.data is None:
        layout = (
            "a folder with images/SPLIT and annotations/SPLIT"
            if study.task == "segmentation"
            else "a folder with train/ and val/, or a .tar of them"
        )
        raise ValueError(f"sola study {study.name} needs --data: {layout}")
    planned = plan(
        study,
        SCALES[options.scale],
        options.data,
        class_file=options.classes,
        ignore=options.ignore,
        init=options.init,
        seeds=options.seeds,
        epochs=options.epochs,
        limit=options.limit,
        device=options.device,
    )
    if options.list:
        listed = [
            {"key": run.key, "seed": run.seed, "arm": run.arm, "finished": result_file(folder, run.key).exists()}
            for run in planned.runs
        ]
        if options.json:
            print(json.dumps(listed, indent=2))
        else:
            for each in listed:
                print(f"{each['key']}  seed {each['seed']}  {each['arm']}{'  finished' if each['finished'] else ''}")
        return 0
    main = os.environ.get("RANK", "0") == "0"  # one of torchrun's processes, which train together, reports
    if main:
        write_plan(folder, planned.description)
    busy = run_plan(planned, folder, lambda text: print(text, file=sys.stderr))
    if not main:
        return 0
    outcome = write_report(folder, study.name)
    if busy:
        print(
            f"{amount(busy, 'run is', 'runs are')} in progress in other processes; repeat the command when finished",
            file=sys.stderr,
        )
    _print([outcome], folder, options.json)
    return 0


def _rewrite_pages(options: Namespace, folder: Path) -> int:
    if options.name == "all":
        names = sorted(path.parent.name for path in folder.glob(f"*/{RESULTS}"))
        if not names:
            raise FileNotFoundError(f"{folder} contains no study: run one with --out {folder} first")
        write_fig1a(folder)
    else:
        names = [options.name]
    _print([write_report(folder, name) for name in names], folder, options.json)
    return 0


def _print(outcomes: Sequence[Outcome], folder: Path, as_json: bool) -> None:
    if as_json:
        document = [
            {
                "study": outcome.study.name,
                "missing": outcome.missing,
                "without_number": outcome.without_number,
                "rows": [asdict(row) | {"mean": row.mean, "standard_error": row.error} for row in outcome.rows],
                "claims": [
                    {
                        "text": j.claim.text,
                        "paper": j.paper,
                        **(asdict(j.ours) | {"verdict": j.ours.verdict} if j.ours else {}),
                    }
                    for j in outcome.judged
                ],
            }
            for outcome in outcomes
        ]
        print(json_text(document))
        return
    for outcome in outcomes:
        print(f"{outcome.study.measure} in %, ± the standard error of several seeds (number of seeds)")
        for row in outcome.rows:
            print(f"{row.name:<24} {row.text or 'no result'}")
        print(f"{folder / outcome.study.name / 'report.html'}")
