# SPDX-License-Identifier: Apache-2.0
"""Four ways to a schedule under a budget: learned gates, random search, evolution, and the paper's rule.

All of them choose by a part of the training images that they do not train on; held-out images stay untouched. Cost is
counted in trainings of one network: the gates' comes from their supernet, random search and evolution get the same,
divided among short trainings.
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
_TRIALS = 6  # short trainings of random search and of evolution
_JUDGED = 24  # networks that the supernet is evaluated on: the gates' favourites, and as many at random
_FINALISTS = 4  # of these that are trained on
_FINAL = 0.25  # of a training, each
_FORWARD = 1 / 3  # of a training step's cost

Say = Callable[[str], None]


@dataclass(frozen=True)
class Problem:
    """What is searched, on which images, how long one training is, and where files go."""

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
        """Of one training."""
        return self.train.epochs * max(1, self.num_train // self.train.batch_size)

    @property
    def num_train(self) -> int:
        return len(self.train_set)  # type: ignore[arg-type]  # torch does not promise a length

    @property
    def num_choose(self) -> int:
        return len(self.choose_set)  # type: ignore[arg-type]  # torch does not promise a length


@dataclass(frozen=True)
class Point:
    """A network that was tried: its cost, its accuracy on the images to choose by, and how that was found."""

    schedule: str
    bridges: str
    cost: float
    top1: float
    how: str


@dataclass(frozen=True)
class Found:
    """What a search ends with; `trainings` is what it cost, in trainings of one network."""

    method: str
    schedule: str
    bridges: str
    cost: float
    trainings: float
    points: tuple[Point, ...]
    gates: tuple[dict[str, float], ...] = ()


def search(problem: Problem, method: str, say: Say) -> Found:
    """Runs one of METHODS; what an interrupted search had finished is not done again."""
    candidates = problem.costs.meeting(problem.budget)
    budget = problem.costs.text(problem.budget)
    say(f"{len(candidates):,} of {len(list(problem.costs.space)):,} networks meet the budget of {budget}")
    if method == "rule":
        return _found(problem, method, rule(problem.costs, problem.budget), 0.0, [])
    if method == "gates":
        return _gates(problem, say)
    return _evolution(problem, say) if method == "evolution" else _random(problem, say)


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


def _gates(problem: Problem, say: Say) -> Found:
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
    say("gates " + " ".join(gates) + " (beside L at 0)")
    ranked = model.ranked(model.candidates)
    favourites, others = ranked[: _JUDGED // 2], ranked[_JUDGED // 2 :]
    drawn = random.Random(problem.train.seed).sample(others, min(_JUDGED // 2, len(others)))
    elsewhere = _elsewhere(model)
    for kinds in favourites + drawn + elsewhere:
        if kinds not in done:
            model.choose(kinds)
            done[kinds] = _top1(problem, task, model)
            write_json(folder / "points.json", done)
    points = [_point(problem, kinds, done[kinds], "shared weights") for kinds in favourites + drawn + elsewhere]
    best_first = sorted(favourites + drawn, key=lambda kinds: done[kinds], reverse=True)
    shared = {name: value.clone() for name, value in model.state_dict().items()}
    final = {kinds: _trained_on(problem, model, shared, kinds, say) for kinds in best_first[:_FINALISTS]}
    points += [_point(problem, kinds, top1, f"{_FINAL:.2f} of a training more") for kinds, top1 in final.items()]
    best = max(final, key=lambda kinds: final[kinds])
    found = _found(problem, "gates", best, _gates_trainings(problem), points)
    return replace(found, gates=tuple(model.logits))


def _trained_on(problem: Problem, model: SuperNet, shared: dict[str, Tensor], kinds: str, say: Say) -> float:
    """Accuracy of one network that goes on from the shared weights, by itself."""
    folder = problem.out / "finalists" / kinds
    done = _stored(folder / "point.json")
    if kinds not in done:
        model.load_state_dict(shared)
        model.settle(kinds)
        done = {kinds: _short(problem, model, _FINAL, folder)}
    say(f"{problem.costs.space.text(kinds)}: {done[kinds]:.2f} after {_FINAL:.2f} of a training more")
    return done[kinds]


def _elsewhere(model: SuperNet) -> list[str]:
    """The gates' favourite with each number of softmax layers that costs something else: for the curve."""
    numbers = {_softmax_layers(kinds) for kinds in model.candidates}
    favourites: dict[int, str] = {}
    for kinds in model.ranked([kinds for kinds in model.costs.space if _softmax_layers(kinds) not in numbers]):
        favourites.setdefault(_softmax_layers(kinds), kinds)
    return [kinds for _, kinds in sorted(favourites.items())]


def _softmax_layers(kinds: str) -> int:
    return len(kinds) - kinds.count("L")


def _gates_trainings(problem: Problem) -> float:
    """Half of the supernet's steps take one path, the other half everything that open layers may be; then the
    evaluations, and the finalists' trainings. In MACs at the size that is trained at, whatever the budget counts.
    """
    config, space = problem.config, problem.costs.space
    costs = mac_costs(config, space, (config.img_size, config.img_size))
    candidates = problem.costs.meeting(problem.budget)
    single = statistics.fmean(costs.of(kinds) for kinds in candidates)
    drawn = costs.base + sum(sum(extra.values()) / (1 + len(extra)) for extra in costs.extra)
    # what both kinds cost together follows from the two extremes and what lies outside of the open layers
    both = costs.of("L" * space.size) + costs.of("S" * space.size) - _rest(problem)
    both += sum(cost - extra["S"] for extra in costs.extra for letter, cost in extra.items() if letter != "S")
    elsewhere = space.size + 1 - len({_softmax_layers(kinds) for kinds in candidates})
    finalists = min(_FINALISTS, len(candidates))
    evaluations = min(_JUDGED, len(candidates)) + elsewhere + finalists
    supernet = 0.5 * drawn / single + 0.5 * both / single
    return supernet + finalists * _FINAL + evaluations * _evaluation(problem)


def _rest(problem: Problem) -> float:
    """MACs of everything but the open layers."""
    config, space = problem.config, problem.costs.space
    model = SolaVision(space.config(config, "L" * space.size), device="meta").eval()
    cost = count(model, (config.img_size, config.img_size))
    places = {f"{place} L" for place in space.open_layers}
    return cost.macs - sum(group.macs for group in cost.layers if group.name in places)


def _random(problem: Problem, say: Say) -> Found:
    draw = random.Random(problem.train.seed)
    candidates = problem.costs.meeting(problem.budget)
    share = _share(problem)
    tried = draw.sample(candidates, min(_TRIALS, len(candidates)))
    return _best_of(problem, "random", share, {kinds: _trial(problem, kinds, share, say) for kinds in tried})


def _evolution(problem: Problem, say: Say) -> Found:
    """Half of the trials at random; then each is the best so far with one layer changed, or a pair exchanged."""
    draw = random.Random(problem.train.seed)
    candidates = problem.costs.meeting(problem.budget)
    share = _share(problem)
    tried = {k: _trial(problem, k, share, say) for k in draw.sample(candidates, min(_TRIALS // 2, len(candidates)))}
    while len(tried) < min(_TRIALS, len(candidates)):
        best = max(tried, key=lambda kinds: tried[kinds])
        distance = {k: sum(a != b for a, b in zip(k, best, strict=True)) for k in candidates if k not in tried}
        nearest = max(2, min(distance.values()))
        kinds = draw.choice([k for k, far in distance.items() if far <= nearest])
        tried[kinds] = _trial(problem, kinds, share, say)
    return _best_of(problem, "evolution", share, tried)


def _best_of(problem: Problem, method: str, share: float, tried: dict[str, float]) -> Found:
    points = [_point(problem, kinds, top1, f"{share:.2f} of a training") for kinds, top1 in tried.items()]
    trainings = len(tried) * (share + _evaluation(problem))
    return _found(problem, method, max(tried, key=lambda kinds: tried[kinds]), trainings, points)


def _share(problem: Problem) -> float:
    """Of a training, for each of the trials, so that all of them with their evaluations cost what the gates do."""
    return _gates_trainings(problem) / _TRIALS - _evaluation(problem)


def _evaluation(problem: Problem) -> float:
    """One look at the images to choose by, in trainings."""
    return problem.num_choose * _FORWARD / (problem.steps * problem.train.batch_size)


def _trial(problem: Problem, kinds: str, share: float, say: Say) -> float:
    """Accuracy after a short training of its own."""
    folder = problem.out / "trials" / kinds
    done = _stored(folder / "point.json")
    if kinds not in done:
        torch.manual_seed(problem.train.seed)
        model = SolaVision(problem.costs.space.config(problem.config, kinds))
        done = {kinds: _short(problem, model, share, folder)}
    say(f"{problem.costs.space.text(kinds)}: {done[kinds]:.2f} after a short training")
    return done[kinds]


def _short(problem: Problem, model: nn.Module, share: float, folder: Path) -> float:
    """Trains for a share of a training; leaves the accuracy in the folder too."""
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
