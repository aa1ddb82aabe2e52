# SPDX-License-Identifier: Apache-2.0
"""The supernet equals each of its networks when that one is selected, and its gates learn what lowers the loss."""

import re

import pytest
import torch

from sola_vision import SolaConfig, SolaVision
from sola_vision.search import Space, mac_costs
from sola_vision.search.supernet import SuperNet

CONFIG = SolaConfig(schedule="L/LLL/L", dims=(8, 16, 16), patch_size=1, img_size=8, head_dim=8, num_classes=3)
SPACE = Space("L/???/L")
COSTS = mac_costs(CONFIG, SPACE, (64, 64))
BRIDGED = mac_costs(CONFIG, Space("L/???/L", bridges=True), (64, 64))


def supernet(steps=20, bridges=False, seed=0, budget="LSL"):
    costs = BRIDGED if bridges else COSTS
    return SuperNet(CONFIG, costs, costs.of(budget), steps, seed)


def images(count=2):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_chosen_schedule_is_the_network_of_that_schedule():
    model = supernet().eval()
    outputs = {}
    for kinds in SPACE:
        model.choose(kinds)
        x = model.network.position(model.network.stem(images()))
        for index, stage in enumerate(model.network.stages):
            x = stage.merge(x)
            layers = list(stage.layers)
            if index == 1:
                layers = [m.softmax if kind == "S" else m.linear for m, kind in zip(model.mixed, kinds, strict=True)]
            for layer in layers:
                x, _ = layer(x)
        outputs[kinds] = model(images())
        torch.testing.assert_close(outputs[kinds], model.network.head(model.network.norm(x).permute(0, 3, 1, 2)))
    assert len({tuple(out.flatten().tolist()) for out in outputs.values()}) == 8


def test_each_step_trains_one_network_and_the_second_half_its_gates_too():
    model = supernet(steps=20, bridges=True).train()
    seen = set()
    for step in range(20):
        model(images()).sum().backward()
        chosen = "".join(mixed.chosen for mixed in model.mixed)
        seen.add(chosen)
        learning = [mixed.gate.grad is not None for mixed in model.mixed]
        assert learning == [step >= 10] * 3
        if step >= 10:
            for mixed in model.mixed:
                hard = [1.0 if letter == mixed.chosen else 0.0 for letter in mixed.letters]
                assert mixed.shares.tolist() == pytest.approx(hard)
        model.zero_grad(set_to_none=True)
    assert len(seen) > 4


def test_what_is_drawn_by_the_gates_is_the_network_of_that_choice():
    model = supernet(bridges=True).train()
    for _ in range(5):
        model.step.fill_(15)
        drawn = model(images())
        model.choose("".join(mixed.chosen for mixed in model.mixed))
        with torch.no_grad():
            torch.testing.assert_close(model.network(images()), drawn.detach())


def test_a_settled_network_draws_no_more():
    model = supernet(steps=4).train()
    model.settle("LSL")
    for _ in range(6):
        model(images())
        assert "".join(mixed.chosen for mixed in model.mixed) == "LSL"


def test_all_parameters_learn():
    model = supernet(steps=2, bridges=True).train()
    model.step += 1  # in the second half
    model(images()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("bridges", [False, True])
def test_the_price_holds_the_gates_at_the_budget_whatever_they_prefer(bridges):
    for budget in ("LSL", "LSS"):
        model = supernet(budget=budget, bridges=bridges)
        torch.manual_seed(0)
        for _ in range(5):
            for mixed in model.mixed:
                mixed.gate.data.normal_()
            assert model._expected_cost(model.logits, model.price()) == pytest.approx(model.budget)
            assert model._expected_cost(model.logits, 2 * abs(model.price()) + 1e-6) < model.budget
    cheapest = supernet(budget="LLL", bridges=bridges)
    assert cheapest._expected_cost(cheapest.logits, cheapest.price()) == pytest.approx(cheapest.budget, rel=1e-6)


def test_layers_of_one_cost_keep_the_order_of_their_gates():
    model = supernet(budget="LSL")
    for mixed, preference in zip(model.mixed, (0.1, -0.2, 0.3), strict=True):
        mixed.gate.data[1] = preference
    assert model.ranked(["SLL", "LSL", "LLS"]) == ["LLS", "SLL", "LSL"]


def test_gates_find_the_layer_that_pays():
    """Only softmax in the middle is rewarded; the gates have to put it there and nowhere else."""
    model = supernet(steps=400)
    model.step += 200
    optimizer = torch.optim.Adam([mixed.gate for mixed in model.mixed], 0.01)
    torch.manual_seed(0)
    for _ in range(150):
        model._draw()
        model.step += 1
        first, middle, last = (mixed.share("S") for mixed in model.mixed)
        reward = middle - 0.2 * first - 0.2 * last
        optimizer.zero_grad()
        (-reward).backward()
        optimizer.step()
    assert model.ranked(model.candidates)[0] == "LSL"


def test_both_halves_run_in_bfloat16():
    model = supernet(steps=4, bridges=True).train()
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images())
        out.float().square().sum().backward()
        assert out.isfinite().all()


def test_the_same_seed_draws_the_same():
    draws = []
    for _ in range(2):
        model = supernet(seed=3).train()
        torch.manual_seed(5)
        model.step += 10
        model(images())
        draws.append((model.mixed[0].share("S").item(), model.mixed[0].linear.mixer.key.weight[0, 0].item()))
    assert draws[0] == draws[1]


def test_gates_find_the_bridge_that_pays():
    model = supernet(steps=400, bridges=True, budget="L1L")
    model.step += 200
    optimizer = torch.optim.Adam([mixed.gate for mixed in model.mixed], 0.01)
    torch.manual_seed(0)
    for _ in range(150):
        model._draw()
        model.step += 1
        first, middle, last = model.mixed
        reward = middle.share("1") - 0.2 * middle.share("S") - 0.2 * first.share("1") - 0.2 * last.share("1")
        optimizer.zero_grad()
        (-reward).backward()
        optimizer.step()
    assert model.ranked(model.candidates)[0] == "L1L"
    assert model.logits[1]["1"] > max(model.logits[1]["S"], 0)


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["LLL", "LSL", "S1L", "11S"])
def test_a_network_with_bridges_is_that_network(kinds):
    model = supernet(bridges=True).eval()
    model.choose(kinds)
    network = SolaVision(BRIDGED.space.config(CONFIG, kinds)).eval()
    own = network.state_dict()
    theirs = {
        re.sub(r"^(stages\.\d+\.layers\.\d+)\.(linear|softmax)", r"\1", name).replace(".bridge.", "."): value
        for name, value in model.network.state_dict().items()
        if ".gate" not in name or "bridges" in name
        if not (place := re.match(r"stages\.1\.layers\.(\d)\.(linear|softmax)", name))
        or (place[2] == "linear") == (kinds[int(place[1])] == "L")
    }
    # the supernet has a bridge for each layer, in their order; the network only those that are chosen
    bridged = [index for index, kind in enumerate(kinds) if kind == "1"]
    numbers = {f"stages.1.bridges.{new}.": f"stages.1.bridges.{old}." for new, old in enumerate(bridged)}
    for name in own:
        prefix = name[: len("stages.1.bridges.0.")]
        own[name] = theirs[numbers.get(prefix, prefix) + name[len(prefix) :]]
    network.load_state_dict(own)
    torch.testing.assert_close(model(images()), network(images()))


def test_the_position_embedding_does_not_decay():
    model = supernet()
    names = model.no_weight_decay()
    assert "network.position.weight" in names
    assert names <= {name for name, _ in model.named_parameters()}
