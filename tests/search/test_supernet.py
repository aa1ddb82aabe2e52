# SPDX-License-Identifier: Apache-2.0
"""The supernet is each of its schedules in turn, and its gates learn what is rewarded."""

import pytest
import torch

from sola_vision import SolaConfig
from sola_vision.search import Space, mac_costs
from sola_vision.search.supernet import SuperNet

CONFIG = SolaConfig(schedule="L/LLL/L", dims=(8, 16, 16), patch_size=1, img_size=8, head_dim=8, num_classes=3)
SPACE = Space("L/???/L")
COSTS = mac_costs(CONFIG, SPACE, (64, 64))


def supernet(steps=20, bridges=False, seed=0, budget="LSL"):
    return SuperNet(CONFIG, COSTS, COSTS.of(budget), steps, bridges, seed)


def images(count=2):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_chosen_schedule_is_the_network_of_that_schedule():
    model = supernet().eval()
    outputs = {}
    for kinds in SPACE:
        model.choose(kinds)
        x, states = model.network.position(model.network.stem(images())), {}
        for index, stage in enumerate(model.network.stages):
            x = stage.merge(x)
            layers = list(stage.layers)
            if index == 1:
                layers = [m.softmax if kind == "S" else m.linear for m, kind in zip(model.mixed, kinds, strict=True)]
            for layer in layers:
                x, _ = layer(x)
        outputs[kinds] = model(images())
        assert not states
        torch.testing.assert_close(outputs[kinds], model.network.head(model.network.norm(x).permute(0, 3, 1, 2)))
    assert len({tuple(out.flatten().tolist()) for out in outputs.values()}) == 8


def test_the_first_half_takes_one_path_and_the_second_blends():
    model = supernet(steps=20).train()
    seen = set()
    for step in range(20):
        model(images())
        shares = [mixed.share for mixed in model.mixed]
        assert all(isinstance(share, float) for share in shares) == (step < 10)
        if step < 10:
            seen.add(tuple(shares))
            assert float(model.penalty()) == 0.0
    assert len(seen) > 2


def test_all_parameters_learn():
    model = supernet(steps=2, bridges=True).train()
    model.step += 1  # in the second half
    for ends in model.bridges:
        model.bridges[ends].bridge.gate.weight.data.normal_()
    (model(images()).square().sum() + model.penalty()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_cost_term_draws_the_gates_to_the_budget():
    for budget in ("LLL", "LSL", "SSS"):
        model = supernet(budget=budget)
        gates = [mixed.gate for mixed in model.mixed]
        optimizer = torch.optim.Adam(gates, 0.02)
        for _ in range(300):
            for mixed in model.mixed:
                mixed.share = torch.tensor(0.5)
            optimizer.zero_grad()
            model.penalty().backward()
            optimizer.step()
        softmax = sum(torch.sigmoid(torch.tensor(logit)).item() for logit in model.logits)
        assert softmax == pytest.approx(budget.count("S"), abs=0.35)


def test_gates_find_the_layer_that_pays():
    """Only softmax in the middle is rewarded; the gates have to put it there and nowhere else."""
    model = supernet(steps=400)
    model.step += 200
    optimizer = torch.optim.Adam([mixed.gate for mixed in model.mixed], 0.01)
    torch.manual_seed(0)
    for _ in range(150):
        model._draw()
        model.step += 1
        reward = model.mixed[1].share - 0.2 * model.mixed[0].share - 0.2 * model.mixed[2].share
        optimizer.zero_grad()
        (model.penalty() - reward).backward()
        optimizer.step()
    assert model.ranked(model.candidates)[0] == "LSL"


def test_both_halves_run_in_bfloat16():
    model = supernet(steps=4, bridges=True).train()
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images())
        (out.float().square().sum() + model.penalty()).backward()
        assert out.isfinite().all()


def test_the_same_seed_draws_the_same():
    draws = []
    for _ in range(2):
        model = supernet(seed=3).train()
        torch.manual_seed(5)
        model.step += 10
        model(images())
        draws.append((model.mixed[0].share.item(), model.mixed[0].linear.mixer.key.weight[0, 0].item()))
    assert draws[0] == draws[1]


def test_bridges_come_from_linear_layers_before():
    model = supernet(bridges=True)
    assert {f"{s}>{t}" for s, t in model.bridges} == {"1.1>2.1", "1.1>2.2", "1.1>2.3"}
    gates = dict(zip(("2.1", "2.2", "2.3"), (0.5, -0.5, 0.5), strict=True))
    for (_, target), gated in model.bridges.items():
        gated.gate.data.fill_(gates[str(target)])
    assert model.chosen_bridges("SSL") == "1.1>2.1"


@torch.no_grad()
def test_a_bridge_to_a_linear_layer_is_silent():
    model = supernet(bridges=True).eval()
    on, off = dict.fromkeys(model.bridges, True), dict.fromkeys(model.bridges, False)
    outputs = {}
    for kinds in ("LLL", "LSL"):
        for name, which in (("on", on), ("off", off)):
            model.choose(kinds, which)
            outputs[kinds, name] = model(images())
    assert torch.equal(outputs["LLL", "on"], outputs["LLL", "off"])
    assert not torch.equal(outputs["LSL", "on"], outputs["LSL", "off"])
