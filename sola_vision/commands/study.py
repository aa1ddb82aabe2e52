# SPDX-License-Identifier: Apache-2.0
"""`sola study NAME --data FOLDER`: the paper's tables and figures as runs, and their pages.

Runs go into --out. Stop and repeat the command as often as you like: what is finished is kept, what was interrupted
goes on, and any number of processes may work on one folder at once. `--report` only writes the pages again; with the
name `all`, those of every study in the folder.
"""

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sola_vision.commands.arguments import Arguments
from sola_vision.engine.log import json_text
from sola_vision.studies import SCALES, STUDIES, Study, custom, get_study, plan, run_plan, write_report
from sola_vision.studies.fig1a import write_fig1a
from sola_vision.studies.outcome import RESULTS, Outcome, begin


def run(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    folder = Path(options.out)
    if options.name == "fig1a":
        write_fig1a(folder)
        print(f"{folder / 'fig1a' / 'report.html'}")
        return 0
    if options.report:
        return _reports(options, folder)
    if options.name == "all":
        raise ValueError("all belongs to --report: name one study to run, or add --report to write all pages again")
    return _run(options, folder)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Arguments("sola study", __doc__)
    parser.formatter_class = RawDescriptionHelpFormatter
    _add(parser)
    options = parser.parse_args(list(arguments))
    for name in ("seeds", "epochs", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    segmentation = options.name in STUDIES and STUDIES[options.name].task == "segmentation"
    if not segmentation and (options.ignore is not None or options.init):
        raise ValueError(f"--ignore and --init belong to table8: {options.name} is on classification; leave them out")
    if segmentation and options.classes:
        raise ValueError(
            f"--classes chooses folders of images: {options.name} has a class for every pixel; leave it out"
        )
    if options.name != "custom" and options.schedules:
        raise ValueError(f"--schedules belongs to custom: {options.name} has its own; leave it out")
    return options


def _add(parser: ArgumentParser) -> None:
    names = ", ".join((*STUDIES, "fig1a", "custom", "all"))
    parser.add_argument("name", metavar="NAME", help=names)
    parser.add_argument(
        "--data",
        help="folder or .tar with train/CLASS/ and val/CLASS/ images, or the word digits; for table8 a folder with "
        "images/SPLIT and annotations/SPLIT",
    )
    parser.add_argument("--out", default="runs/studies", help="folder of runs and pages (default: %(default)s)")
    parser.add_argument("--scale", choices=tuple(SCALES), default="small", help="network, images, length of training")
    parser.add_argument("--classes", metavar="FILE", help="names of the classes to use, one a line (ImageNet-100)")
    parser.add_argument("--ignore", type=int, help="table8: the label that counts nowhere (default: the scale's)")
    parser.add_argument("--init", nargs="+", default=[], metavar="CHECKPOINT", help="table8: weights to start from")
    parser.add_argument("--seeds", type=int, help="runs of each arm; more extend a study (default: the scale's)")
    parser.add_argument("--epochs", type=int, help="passes over the training images (default: the scale's)")
    parser.add_argument("--limit", type=int, help="training images, evenly spread (default: the scale's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)")
    parser.add_argument(
        "--schedules",
        nargs="+",
        default=[],
        metavar="SCHEDULE",
        help='with custom: what to compare; bridges stand behind, as in "LL/LL/LLSLLS/LL 1.2>3.3"',
    )
    parser.add_argument("--list", action="store_true", help="say which runs there would be, and do nothing")
    parser.add_argument("--report", action="store_true", help="write the page again and run nothing")
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
        for each in planned.runs:
            done = (folder / "results" / f"{each.key}.json").exists()
            print(f"{each.key}  seed {each.seed}  {each.arm}{'  finished' if done else ''}")
        return 0
    main = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, which train together
    if main:
        begin(folder, planned.description)
    busy = run_plan(planned, folder, lambda text: print(text, file=sys.stderr))
    if not main:
        return 0
    outcome = write_report(folder, study.name)
    if busy:
        print(f"{busy} runs are being done by other processes; repeat the command when they are", file=sys.stderr)
    _tell([outcome], folder, options.json)
    return 0


def _reports(options: Namespace, folder: Path) -> int:
    if options.name == "all":
        names = sorted(path.parent.name for path in folder.glob(f"*/{RESULTS}"))
        if not names:
            raise FileNotFoundError(f"{folder} holds no study: run one with --out {folder} first")
        write_fig1a(folder)
    else:
        names = [options.name]
    _tell([write_report(folder, name) for name in names], folder, options.json)
    return 0


def _tell(outcomes: Sequence[Outcome], folder: Path, as_json: bool) -> None:
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
        for row in outcome.rows:
            print(f"{row.name:<24} {row.text or 'no result'}")
        print(f"{folder / outcome.study.name / 'report.html'}")
