# SPDX-License-Identifier: Apache-2.0
"""Four methods to select a schedule under a budget: learned gates, random search, evolution, and the paper's rule.

All of them select by accuracy on a validation split of the training images; held-out images are never used. The cost of
a search is counted in trainings of one network. Random search and evolution get the cost of the gates' supernet as
their budget, divided among short trainings.
"""

import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sola_vision.analysis.cost import count
from sola_vision.backbone import SolaVision
from sola_vision.config import SolaConfig
from sola_vision.data import ImageConfig
from sola_vision.engine import EvaluationBatches, TrainConfig, distributed, evaluate, fit
from sola_vision.engine.log import write_json
from sola_vision.tasks import Classification

from .costs import Costs, mac_costs
from .supernet import SuperNet

METHODS = ("gates", "random", "evolution", "rule")
_TRIALS = 6  # the number of short trainings in random search and in evolution
_JUDGED = 24  # networks evaluated with shared weights: half ranked best by the gates, half random
_FINALISTS = 4  # of these, the number that is trained further
_FINAL = 0.25  # the length of each such training, as a fraction of a full one
_FORWARD = 1 / 3  # the cost of a forward pass as a fraction of a training step's

Log = Callable[[str], None]


@dataclass(frozen=True)
class Problem:
    """A search problem: the base network, the costs and the budget, the images, one training's settings, the folder."""

    config: SolaConfig
    costs: Costs
    budget: float
    train: TrainConfig
    image: ImageConfig
    train_set: Dataset[Any]
    choose_set: Dataset[Any]
    out: Path

    @property
    def steps(self) -> int:
        """The number of steps of one training."""
        return self.train.epochs * max(1, self.num_train // self.train.batch_size)

    @property
    def num_train(self) -> int:
        """The number of images to train on."""
        return len(self.train_set)  # type: ignore[arg-type]  # torch's Dataset type does not declare __len__

    @property
    def num_choose(self) -> int:
        """The number of images to select by."""
        return len(self.choose_set)  # type: ignore[arg-type]  # torch's Dataset type does not declare __len__


@dataclass(frozen=True)
class Point:
    """An evaluated network: its cost, its accuracy on the validation split, and how its weights were trained."""

    schedule: str
    bridges: str
    cost: float
    top1: float
    how: str


@dataclass(frozen=True)
class Found:
    """The result of a search; `trainings` is the cost of the search in trainings of one network."""

    method: str
    schedule: str
    bridges: str
    cost: float
    trainings: float
    points: tuple[Point, ...]
    gates: tuple[dict[str, float], ...] = ()


def search(problem: Problem, method: str, log: Log) -> Found:
    """Run one of METHODS. An interrupted search reuses every training and evaluation that it had finished."""
    candidates = problem.costs.meeting(problem.budget)
    budget = problem.costs.text(problem.budget)
    log(f"within the budget of {budget}: {len(candidates):,} of {len(list(problem.costs.space)):,} networks")
    if method == "rule":
        return _found(problem, method, rule(problem.costs, problem.budget), 0.0, [])
    if method == "gates":
        return _gates(problem, log)
    return _evolution(problem, log) if method == "evolution" else _random(problem, log)


def rule(costs: Costs, budget: float) -> str:
    """Return the kinds of the paper's schedule: softmax last in a stage and, from there back, in every third layer.

    The first layer of a stage is linear. This gives stages 3 and 4 of Table 7: LLSLLS, LLLSLLSLLSLLSLLS and LS. Only
    open layers follow the rule, so the space decides which stages have softmax layers (the paper's stages 1 and 2 have
    none). Where the schedule costs more than the budget, its earliest layers change first.
    """
    depths = [len(stage) for stage in costs.space.template.split("/")]
    kinds = [
        "S" if place.layer and (depths[place.stage] - 1 - place.layer) % 3 == 0 else "L"
        for place in costs.space.open_layers
    ]
    most = max(costs.of(each) for each in costs.meeting(budget))
    for index, extra in enumerate(costs.extra):
        if costs.of("".join(kinds)) > most:
            kinds[index] = "L" if extra["S"] > 0 else "S"  # softmax is the cheaper kind where there are few tokens
    return "".join(kinds)


def _gates(problem: Problem, log: Log) -> Found:
    steps, costs = problem.steps, problem.costs
    folder = problem.out / "supernet"
    model = SuperNet(problem.config, costs, problem.budget, steps, problem.train.seed)
    task = Classification(problem.config.num_classes, problem.image)
    done = _stored(folder / "points.json")
    fit(
        task,
        model,
        problem.train_set,
        problem.choose_set,
        replace(problem.train, steps=steps, evaluate_every=10**6),
        folder,
        resume=(folder / "metrics.jsonl").exists(),
    )
    gates = ("/".join(f"{letter}{logit:+.2f}" for letter, logit in each.items()) for each in model.logits)
    log("gates " + " ".join(gates) + " (logits relative to L)")
    ranked = model.ranked(model.candidates)
    favourites, others = ranked[: _JUDGED // 2], ranked[_JUDGED // 2 :]
    drawn = random.Random(problem.train.seed).sample(others, min(_JUDGED // 2, len(others)))
    curve = _other_levels(model)
    for kinds in favourites + drawn + curve:
        if kinds not in done:
            model.choose(kinds)
            done[kinds] = _top1(problem, task, model)
            write_json(folder / "points.json", done)
    points = [_point(problem, kinds, done[kinds], "shared weights") for kinds in favourites + drawn + curve]
    best_first = sorted(favourites + drawn, key=lambda kinds: done[kinds], reverse=True)
    shared = {name: value.clone() for name, value in model.state_dict().items()}
    final = {kinds: _finetuned(problem, model, shared, kinds, log) for kinds in best_first[:_FINALISTS]}
    points += [_point(problem, kinds, top1, f"{_FINAL:.2f} of a training more") for kinds, top1 in final.items()]
    best = max(final, key=lambda kinds: final[kinds])
    found = _found(problem, "gates", best, _gates_trainings(problem), points)
    return replace(found, gates=tuple(model.logits))


def _finetuned(problem: Problem, model: SuperNet, shared: dict[str, Tensor], kinds: str, log: Log) -> float:
    """Train one network further from the shared weights and return its accuracy."""
    folder = problem.out / "finalists" / kinds
    done = _stored(folder / "point.json")
    if kinds not in done:
        model.load_state_dict(shared)
        model.settle(kinds)
        done = {kinds: _short(problem, model, _FINAL, folder)}
    log(f"{problem.costs.space.text(kinds)}: {done[kinds]:.2f} after {_FINAL:.2f} of a training more")
    return done[kinds]


def _other_levels(model: SuperNet) -> list[str]:
    """Return the gates' best network for every number of softmax layers that no candidate has; for the curve only."""
    numbers = {_softmax_layers(kinds) for kinds in model.candidates}
    favourites: dict[int, str] = {}
    for kinds in model.ranked([kinds for kinds in model.costs.space if _softmax_layers(kinds) not in numbers]):
        favourites.setdefault(_softmax_layers(kinds), kinds)
    return [kinds for _, kinds in sorted(favourites.items())]


def _softmax_layers(kinds: str) -> int:
    return len(kinds) - kinds.count("L")


def _gates_trainings(problem: Problem) -> float:
    """Return the cost of the gates' search, in trainings of one network.

    Half of the supernet's steps run one path, the other half every alternative of the open layers; the evaluations and
    the finalists' trainings are added. Counted in MACs at the training resolution, whatever the budget counts.
    """
    config, space = problem.config, problem.costs.space
    costs = mac_costs(config, space, (config.img_size, config.img_size))
    candidates = problem.costs.meeting(problem.budget)
    single = statistics.fmean(costs.of(kinds) for kinds in candidates)
    drawn = costs.base + sum(sum(extra.values()) / (1 + len(extra)) for extra in costs.extra)
    # the cost of both kinds together, from the two extremes; the layers that are not open would count twice
    both = costs.of("L" * space.size) + costs.of("S" * space.size) - _rest(problem)
    both += sum(cost - extra["S"] for extra in costs.extra for letter, cost in extra.items() if letter != "S")
    elsewhere = space.size + 1 - len({_softmax_layers(kinds) for kinds in candidates})
    finalists = min(_FINALISTS, len(candidates))
    evaluations = min(_JUDGED, len(candidates)) + elsewhere + finalists
    supernet = 0.5 * drawn / single + 0.5 * both / single
    return supernet + finalists * _FINAL + evaluations * _evaluation(problem)


def _rest(problem: Problem) -> float:
    """Return the MACs of everything except the open layers."""
    config, space = problem.config, problem.costs.space
    model = SolaVision(space.config(config, "L" * space.size), device="meta").eval()
    cost = count(model, (config.img_size, config.img_size))
    places = {f"{place} L" for place in space.open_layers}
    return cost.macs - sum(group.macs for group in cost.layers if group.name in places)


def _random(problem: Problem, log: Log) -> Found:
    draw = random.Random(problem.train.seed)
    candidates = problem.costs.meeting(problem.budget)
    share = _share(problem)
    tried = draw.sample(candidates, min(_TRIALS, len(candidates)))
    return _best_of(problem, "random", share, {kinds: _trial(problem, kinds, share, log) for kinds in tried})


def _evolution(problem: Problem, log: Log) -> Found:
    """Draw half of the trials at random; each later one is the best so far with a layer changed or a pair swapped."""
    draw = random.Random(problem.train.seed)
    candidates = problem.costs.meeting(problem.budget)
    share = _share(problem)
    tried = {k: _trial(problem, k, share, log) for k in draw.sample(candidates, min(_TRIALS // 2, len(candidates)))}
    while len(tried) < min(_TRIALS, len(candidates)):
        best = max(tried, key=lambda kinds: tried[kinds])
        distance = {k: sum(a != b for a, b in zip(k, best, strict=True)) for k in candidates if k not in tried}
        nearest = max(2, min(distance.values()))
        kinds = draw.choice([k for k, far in distance.items() if far <= nearest])
        tried[kinds] = _trial(problem, kinds, share, log)
    return _best_of(problem, "evolution", share, tried)


def _best_of(problem: Problem, method: str, share: float, tried: dict[str, float]) -> Found:
    points = [_point(problem, kinds, top1, f"{share:.2f} of a training") for kinds, top1 in tried.items()]
    trainings = len(tried) * (share + _evaluation(problem))
    return _found(problem, method, max(tried, key=lambda kinds: tried[kinds]), trainings, points)


def _share(problem: Problem) -> float:
    """Return the fraction of a training for each trial with which _TRIALS together cost as much as the gates."""
    return _gates_trainings(problem) / _TRIALS - _evaluation(problem)


def _evaluation(problem: Problem) -> float:
    """Return the cost of one evaluation on the validation split, in trainings."""
    return problem.num_choose * _FORWARD / (problem.steps * problem.train.batch_size)


def _trial(problem: Problem, kinds: str, share: float, log: Log) -> float:
    """Train one network from scratch for a short time and return its accuracy."""
    folder = problem.out / "trials" / kinds
    done = _stored(folder / "point.json")
    if kinds not in done:
        torch.manual_seed(problem.train.seed)
        model = SolaVision(problem.costs.space.config(problem.config, kinds))
        done = {kinds: _short(problem, model, share, folder)}
    log(f"{problem.costs.space.text(kinds)}: {done[kinds]:.2f} after a short training")
    return done[kinds]


def _short(problem: Problem, model: nn.Module, share: float, folder: Path) -> float:
    """Train for a fraction of a training, write the accuracy to point.json in `folder` and return it."""
    steps = max(2, round(problem.steps * share))
    warmup = min(steps // 4, round(problem.train.warmup_epochs * problem.steps / problem.train.epochs))
    task = Classification(problem.config.num_classes, problem.image)
    train = replace(problem.train, steps=steps, warmup_steps=warmup, evaluate_every=10**6)
    begun = (folder / "metrics.jsonl").exists()
    summary = fit(task, model, problem.train_set, problem.choose_set, train, folder, resume=begun)
    top1 = float(summary["top1"])
    write_json(folder / "point.json", {folder.name: top1})
    return top1


def _top1(problem: Problem, task: Classification, model: SuperNet) -> float:
    with distributed(problem.train.device) as world:
        batches = EvaluationBatches(problem.choose_set, world, batch_size=problem.train.batch_size)
        return evaluate(task, model.to(world.device), batches, amp=problem.train.amp)["top1"]


def _point(problem: Problem, kinds: str, top1: float, how: str) -> Point:
    space = problem.costs.space
    return Point(space.schedule(kinds), space.bridges_of(kinds), problem.costs.of(kinds), round(top1, 4), how)


def _found(problem: Problem, method: str, kinds: str, trainings: float, points: list[Point]) -> Found:
    space, cost = problem.costs.space, problem.costs.of(kinds)
    return Found(method, space.schedule(kinds), space.bridges_of(kinds), cost, round(trainings, 3), tuple(points))


def _stored(path: Path) -> dict[str, float]:
    return json.loads(path.read_text()) if path.exists() else {}
