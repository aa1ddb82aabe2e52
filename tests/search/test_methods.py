# SPDX-License-Identifier: Apache-2.0
"""Every method selects a schedule that meets the budget, reports its cost, and is reproducible."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sola_vision import SolaConfig, SolaVision
from sola_vision.analysis.cost import count
from sola_vision.data import ImageConfig, MemoryImages
from sola_vision.engine import TrainConfig
from sola_vision.search import METHODS, Problem, Space, mac_costs, methods, search
from sola_vision.tasks import Classification

CONFIG = SolaConfig(schedule="L/LLL/L", dims=(8, 16, 16), patch_size=1, img_size=8, head_dim=8, num_classes=2)


def problem(out, seed=0, bridges=False, budget="LSL"):
    space = Space("L/???/L", bridges)
    # at 64 pixels softmax costs so much more that one number of softmax layers meets the budget
    costs = mac_costs(CONFIG, space, (64, 64))
    labels = [index % 2 for index in range(48)]
    noise = torch.randint(0, 90, (48, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = noise + 120 * torch.tensor(labels, dtype=torch.uint8)[:, None, None, None]
    return Problem(
        config=CONFIG,
        costs=costs,
        budget=costs.of(budget),
        train=TrainConfig(
            epochs=2, batch_size=8, lr=2e-3, warmup_epochs=0.2, workers=0, device="cpu", seed=seed, save_steps=3
        ),
        image=ImageConfig(size=8, mixup=0, cutmix=0),
        train_set=MemoryImages(pixels[:32], labels[:32], augment=True),
        choose_set=MemoryImages(pixels[32:], labels[32:], augment=False),
        out=Path(out),
    )


def quiet(_):
    pass


@pytest.mark.parametrize("bridges", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_meets_the_budget_and_says_its_cost(method, bridges, tmp_path):
    given = problem(tmp_path, bridges=bridges)
    found = search(given, method, quiet)
    assert found.schedule.count("S") == 1
    network = SolaVision(CONFIG.with_changes(schedule=found.schedule, bridges=found.bridges), device="meta")
    assert found.cost == count(network.eval(), (64, 64)).macs
    assert abs(found.cost / given.budget - 1) <= 0.02
    assert 0 <= found.trainings <= 5  # evaluations are negligible in longer trainings
    assert all(0 <= point.top1 <= 100 for point in found.points)
    if method in ("random", "evolution"):
        gates = search(problem(tmp_path / "gates", bridges=bridges), "gates", quiet)
        # six trials cost as much as the gates; this space may have fewer networks
        assert found.trainings == pytest.approx(gates.trainings * len(found.points) / 6, abs=2e-3)
    if method == "gates":
        assert {point.how for point in found.points} == {"shared weights", "0.25 of a training more"}


def test_the_curve_of_the_gates_has_other_costs_too(tmp_path):
    found = search(problem(tmp_path), "gates", quiet)
    assert len({point.cost for point in found.points}) == 4
    final = [point for point in found.points if point.how != "shared weights"]
    assert max(final, key=lambda point: point.top1).schedule == found.schedule


def test_a_search_repeats_by_its_seed_and_goes_on_after_a_stop(tmp_path):
    first = search(problem(tmp_path / "a", bridges=True), "gates", quiet)
    assert search(problem(tmp_path / "b", bridges=True), "gates", quiet) == first
    # the state after a kill between the training and the evaluations
    (tmp_path / "b" / "supernet" / "points.json").unlink()
    (tmp_path / "b" / "supernet" / "summary.json").unlink()
    assert search(problem(tmp_path / "b", bridges=True), "gates", quiet) == first


def test_what_a_search_costs_follows_from_the_training_not_from_the_budgets_size():
    def cost(size):
        given = problem("unused")
        costs = mac_costs(CONFIG, given.costs.space, (size, size))
        return methods._gates_trainings(replace(given, costs=costs, budget=costs.of("LSL")))

    # the same number of softmax layers meets the budget at both sizes
    assert cost(64) == pytest.approx(cost(256))
    assert 1.0 < cost(64) - 3 * 0.25 < 4.0


@pytest.mark.parametrize("after", [4, 9])
def test_a_search_that_is_stopped_in_a_training_goes_on(tmp_path, monkeypatch, after):
    expected = search(problem(tmp_path / "a", bridges=True), "gates", quiet)
    loss, left = Classification.loss, [0]

    def stop(self, model, batch):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    monkeypatch.setattr(Classification, "loss", stop)
    stops = 0
    while True:
        left[0] = after
        try:
            found = search(problem(tmp_path / "b", bridges=True), "gates", quiet)
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 20
    assert stops > 0
    assert found == expected


def test_trials_that_are_done_are_not_done_again(tmp_path):
    first = search(problem(tmp_path), "random", quiet)
    for folder in (tmp_path / "trials").iterdir():
        (folder / "last" / "state.safetensors").unlink()  # training one of them again would change its folder
        (folder / "metrics.jsonl").unlink()
    assert search(problem(tmp_path), "random", quiet) == first
    assert not list(tmp_path.glob("trials/*/metrics.jsonl"))
