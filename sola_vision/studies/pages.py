# SPDX-License-Identifier: Apache-2.0
"""The page of a study, as Markdown and as one HTML file: the table next to the paper's, the figure, and the verdicts.

A page is a list of blocks, which are rendered as Markdown and as HTML; all content comes from results.json.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..wording import amount
from .figures import draw_study
from .outcome import Judged, Outcome, gather

PLOT = "accuracy.png"
_MEASURES = {"top1": "Top-1", "miou": "Mean IoU over the classes that occur,"}


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Listing:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    file: str
    text: str


@dataclass(frozen=True)
class Code:
    text: str


Block = Heading | Text | Listing | Table | Picture | Code


def write_report(folder: Path, name: str) -> Outcome:
    """Write FOLDER/NAME/report.md, report.html and accuracy.png from the results in the folder."""
    outcome = gather(folder, name)
    place = folder / name
    draw_study(outcome, place / PLOT)
    write_page(place, outcome.study.title, _blocks(outcome))
    return outcome


def write_page(place: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write report.md and report.html to the folder `place`, which already contains the pictures."""
    blocks = [Heading(1, title), *blocks]
    (place / "report.md").write_text("\n\n".join(_markdown(block) for block in blocks) + "\n", encoding="utf-8")
    body = "\n".join(_html(block, place) for block in blocks)
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>{_STYLE}{body}'
    (place / "report.html").write_text(page + "</html>\n", encoding="utf-8")


def _blocks(outcome: Outcome) -> list[Block]:
    study, plan = outcome.study, outcome.plan
    total = len(plan["keys"])
    data = plan["data"]
    blocks: list[Block] = []
    if outcome.missing:
        blocks.append(Text(f"**Unfinished: {len(outcome.results)} of {amount(total, 'run')} done.**"))
    if outcome.without_number:
        how = f"**Excluded: {amount(outcome.without_number, 'finished run')} without {study.measure}.**"
        blocks.append(Text(f"{how} Training diverged, or no held-out pixel counts."))
    blocks += [
        Listing(
            [
                f"Varies: {study.varies}.",
                f"Fixed: {study.fixed}.",
                *([f"In the paper: {study.data}, {_epochs(study.epochs, study.task)}."] if study.data else []),
                f"Here, scale `{plan['scale']}`: {plan['what']}.",
                f"Images: {data['name']}, {data['train']:,} for training and {data['val']:,} held out, "
                f"{data['classes']} classes, {_pixels(plan)} (fingerprint {data['fingerprint']}).",
                f"Training: {amount(plan['epochs'], 'epoch')}, {amount(plan['steps'], 'step')} of "
                f"{amount(plan['batch_size'], 'image')}, learning rate {plan['lr']:g}; the network after the last "
                f"epoch is evaluated. {amount(plan['seeds'], 'seed')} per arm.",
                *study.notes,
            ]
        ),
        Heading(2, "Table"),
        _table(outcome),
        Text(
            f"{_MEASURES[study.metric]} on the held-out images in per cent, mean ± standard error over (n) seeds. "
            f"{_paper_remark(outcome)}MACs are those of one image of {plan['cost_size']} x {plan['cost_size']} pixels, "
            "without the head; parameters include it. Images per second are the median during training; other programs "
            "may have been running."
        ),
        Picture(PLOT, "accuracy against depth and cost" if study.over == "depth" else "accuracy against cost"),
        Heading(2, "Does the order hold here?"),
        *_claims(outcome),
        Heading(2, "Every run"),
        _every_run(outcome),
        Heading(2, "How it was run"),
        *_provenance(outcome),
    ]
    return blocks


def _pixels(plan: dict[str, Any]) -> str:
    rule = plan["data"].get("rule")
    return f"crops of {plan['size']} pixels; {rule}" if rule else f"{plan['size']} pixels"


def _paper_remark(outcome: Outcome) -> str:
    if all(row.paper is None for row in outcome.rows):
        return ""
    if outcome.plan["scale"] == "paper":
        subset = "subset" in outcome.study.data
        return "The paper's classes are not published, so its numbers are for other images. " if subset else ""
    return "The paper used other images, larger networks and longer training: only the order of arms is comparable. "


def _table(outcome: Outcome) -> Table:
    with_paper = any(row.paper is not None for row in outcome.rows)
    costs = _paper_costs(outcome)
    header = ["arm", "schedule", *(["paper"] if with_paper else []), "here"]
    header += ["parameters", "MMACs", *costs, "images/s"]
    rows = []
    for row in outcome.rows:
        schedule = f"`{row.schedule}`" + (f" `{row.bridges}`" if row.bridges else "")
        paper = [_number(row.paper, 2)] if with_paper else []
        counted = [f"{row.parameters:,}", f"{row.macs / 1e6:,.1f}"]
        printed = [_number(cost, 1) for cost in (column[row.name] for column in costs.values())]
        rows.append([row.name, schedule, *paper, row.text, *counted, *printed, _number(row.images_per_second, 0)])
    return Table(header, rows)


def _paper_costs(outcome: Outcome) -> dict[str, dict[str, float | None]]:
    """Return the paper's columns of costs by arm; none at smaller scales, whose networks and images are others."""
    if outcome.plan["scale"] != "paper":
        return {}
    columns: dict[str, dict[str, float | None]] = {
        "paper: M parameters": {row.name: row.paper_params for row in outcome.rows},
        "paper: GMACs": {row.name: row.paper_gmacs for row in outcome.rows},
    }
    return {name: column for name, column in columns.items() if any(column.values())}


def _claims(outcome: Outcome) -> list[Block]:
    header = ["statement", "source", "paper", "here", "95 % interval", "seeds", "p", "verdict"]
    rows = [_claim(judged) for judged in outcome.judged]
    n = max((judged.ours.n for judged in outcome.judged if judged.ours), default=0)
    how = (
        f"Differences are in points of {outcome.study.measure}, means over seeds of paired differences: the runs of a "
        "seed share the order of images and their augmentation. The interval is Student's t for paired runs, which "
        "assumes normally distributed differences; p is that of the exact one-sided sign-flip test, which does not"
        + (f", and which cannot be below {0.5**n:.3g} with {amount(n, 'seed')}" if n else "")
        + ". A statement holds, or is reversed, if the interval excludes zero; otherwise these runs do not decide it. "
        + (f"The {len(rows)} intervals are not corrected for their number. " if len(rows) > 1 else "")
        + "Intervals cover the randomness of training on these images; other images, sizes or longer training may "
        "order the arms differently."
    )
    held = [f"{judged.claim.text}: **{_verdict(judged)}**" for judged in outcome.judged]
    return [Table(header, rows), Text(how), Listing(held)]


def _claim(judged: Judged) -> list[str]:
    ours = judged.ours
    start = [judged.claim.text, judged.claim.source or "ours", _signed(judged.paper)]
    if ours is None:
        return [*start, "", "", "0", "", "no result"]
    interval = "" if ours.low is None or ours.high is None else f"{ours.low:+.2f} to {ours.high:+.2f}"
    return [*start, _signed(ours.mean), interval, str(ours.n), f"{ours.p:.3f}", ours.verdict]


def _verdict(judged: Judged) -> str:
    ours = judged.ours
    if ours is None:
        return "no seed has results of all its arms"
    if ours.low is None or ours.high is None:
        return f"not decided: one seed, {ours.mean:+.2f}"
    if ours.equal:
        return f"not decided: {ours.mean:+.2f} in each of {ours.n} seeds, which gives no estimate of chance"
    if ours.verdict == "undecided":
        reach = (ours.high - ours.low) / 2
        return f"not decided by {ours.n} seeds: {ours.mean:+.2f} ± {reach:.2f}"
    words = {"holds": "holds here", "reversed": "does not hold here, the reverse does"}
    return f"{words[ours.verdict]}: {ours.mean:+.2f}, at least {min(abs(ours.low), abs(ours.high)):.2f} in size"


def _every_run(outcome: Outcome) -> Table:
    seeds = sorted({result["seed"] for result in outcome.results})
    rows = [[row.name, *(_number(row.by_seed.get(seed), 2) for seed in seeds)] for row in outcome.rows]
    return Table(["arm", *(f"seed {seed}" for seed in seeds)], rows)


def _provenance(outcome: Outcome) -> list[Block]:
    if not outcome.results:
        return [Text("No run has finished yet.")]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(result.get(name) or "unknown") for result in outcome.results}))

    hours = sum(result["seconds"] for result in outcome.results) / 3600
    facts = [
        f"Hardware: {all_of('hardware')}; threads per run: {all_of('threads')}; processes per run: "
        f"{all_of('processes')}.",
        f"torch {all_of('torch')}, timm {all_of('timm')}, Python {all_of('python')}.",
        f"Commit of this project: {all_of('commit')}.",
        f"The {amount(len(outcome.results), 'run')} took {hours:.2f} hours in total.",
        "Raw results: [results.json](results.json). To write this page again: `sola study "
        f"{outcome.study.name} --report --out FOLDER`.",
    ]
    commands = sorted({str(result.get("command")) for result in outcome.results})
    return [Code("\n".join(commands)), Listing(facts)]


def _epochs(epochs: int, task: str) -> str:
    return f"{epochs} epochs" if task == "classification" else "160,000 iterations"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Listing):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Table):
        lines = [block.header, ["---"] * len(block.header), *block.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    if isinstance(block, Picture):
        return f"![{block.text}]({block.file})"
    if isinstance(block, Code):
        return f"```sh\n{block.text}\n```"
    return block.text


def _html(block: Block, place: Path) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Listing):
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Table):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
        body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
        return f"<table><tr>{head}</tr>{body}</table>"
    if isinstance(block, Picture):
        data = base64.b64encode((place / block.file).read_bytes()).decode()
        return f'<p><img alt="{html.escape(block.text)}" src="data:image/png;base64,{data}"></p>'
    if isinstance(block, Code):
        return f"<pre>{html.escape(block.text)}</pre>"
    return f"<p>{_inline(block.text)}</p>"


def _inline(text: str) -> str:
    """Render the three inline marks used in blocks: `code`, **strong** and [link](target)."""
    escaped = html.escape(text, quote=False)
    for mark, tag in (("`", "code"), ("**", "b")):
        parts = escaped.split(mark)
        if len(parts) % 2:
            escaped = "".join(p if i % 2 == 0 else f"<{tag}>{p}</{tag}>" for i, p in enumerate(parts))
    before, bracket, rest = escaped.partition("](")
    if bracket and "[" in before and ")" in rest:
        start, _, label = before.rpartition("[")
        target, _, after = rest.partition(")")
        escaped = f'{start}<a href="{html.escape(target)}">{label}</a>{after}'
    return escaped


_STYLE = """<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .7rem; text-align: left; white-space: nowrap }
td:first-child { white-space: normal }
img { max-width: 100% } pre { background: #f4f4f4; padding: .7rem; overflow-x: auto } code { background: #f4f4f4 }
</style>
"""
