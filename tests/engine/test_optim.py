# SPDX-License-Identifier: Apache-2.0
"""The schedule is a pure function with known ends; groups follow the model's settings; the average decays."""

import itertools
import math
import re

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from sola_vision.engine import TrainConfig, lr_at
from sola_vision.engine.optim import Ema, count_steps, make_optimizer, set_lr


def config(**changes):
    return TrainConfig(**({"epochs": 10, "warmup_epochs": 2, "lr": 1.0, "min_lr": 0.1, "warmup_lr": 0.2} | changes))


@pytest.mark.parametrize("schedule", ["cosine", "poly"])
def test_lr_at_rises_linearly_then_falls_to_the_minimum(schedule):
    rates = [lr_at(step, config(schedule=schedule), 5, 50) for step in range(51)]
    assert rates[:11] == pytest.approx([0.2 + 0.08 * step for step in range(11)])
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[50] == pytest.approx(0.1)
    # both are symmetric about their middle
    assert rates[30] == pytest.approx(0.55)
    assert rates[20] + rates[40] == pytest.approx(1.1)


def test_lr_at_cosine_is_the_cosine():
    assert lr_at(20, config(), 5, 50) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_lr_at_multistep_drops_at_its_milestones():
    drops = config(schedule="multistep", milestones=(4, 8))
    assert [lr_at(step, drops, 5, 50) for step in (10, 19, 20, 39, 40, 49)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_warmup_steps_and_steps_override_epochs():
    short = config(steps=30, warmup_steps=3)
    assert count_steps(short, 5) == 30
    assert lr_at(2, short, 5, 30) < 1.0 == lr_at(3, short, 5, 30)
    assert count_steps(config(), 5) == 50


def test_a_warmup_longer_than_the_run_is_refused():
    for changes, given in (({}, "warmup_epochs=2 (10 steps)"), ({"warmup_steps": 9}, "warmup_steps=9")):
        with pytest.raises(ValueError, match=f"^{re.escape(given)} must be shorter than the run of 8 steps") as error:
            count_steps(config(steps=8, **changes), 5)
        name, shorter = given.partition("=")[0], float(str(error.value).rsplit(" ", 1)[1])
        assert count_steps(config(steps=8, **changes | {name: shorter}), 5) == 8


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 10, "accumulate": 3}, "multiple of accumulate=3"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"amp": "tf32"}, "amp='tf32'"),
        ({"schedule": "multistep"}, "milestones"),
        ({"schedule": "multistep", "milestones": (0, 8)}, r"milestones=\(0, 8\) must be the epochs, from 1 on"),
        ({"lr": 1e-6}, "min_lr=1e-05, the final learning rate, is above lr=1e-06"),
        ({"lr": float("inf")}, "lr=inf must be above 0 and finite"),
        ({"warmup_epochs": float("inf")}, "warmup_epochs=inf"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"save_seconds": float("nan")}, "save_seconds=nan"),
        ({"max_corrupt": 2}, "max_corrupt=2"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_config_refuses_invalid_values(wrong, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**wrong)


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"position"}

    def group_matcher(self, coarse=False):
        return {"stem": r"^position", "blocks": r"^blocks\.(\d+)"}


def test_make_optimizer_spares_biases_and_no_weight_decay():
    model = Layered()
    decayed = {
        id(parameter)
        for group in make_optimizer(model, config(weight_decay=0.05)).param_groups
        if group["weight_decay"] == 0.05
        for parameter in group["params"]
    }
    expected = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert expected == {"blocks.0.weight", "blocks.1.weight", "blocks.2.weight", "head.weight"}


def test_layer_decay_lowers_the_rate_towards_the_image():
    model = Layered()
    optimizer = make_optimizer(model, config(layer_decay=0.5))
    set_lr(optimizer, 0.8)
    rate = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    rates = [
        rate[id(p)] for p in (model.head.weight, *(block.weight for block in reversed(model.blocks)), model.position)
    ]
    assert rates == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.05])


def test_make_optimizer_refuses_unknown_names_and_layer_decay_without_layers():
    with pytest.raises(ValueError, match="optimizer='adamv'"):
        make_optimizer(Layered(), config(optimizer="adamv"))
    with pytest.raises(ValueError, match="group_matcher"):
        make_optimizer(nn.Linear(2, 2), config(layer_decay=0.5))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", None), ("lamb", None)],
)
def test_adam_updates_all_parameters_by_one_kernel(name, kind):
    """And by the same formula as without it. torch's fused SGD is not safe, others have none."""
    models = Layered(), Layered()
    models[1].load_state_dict(models[0].state_dict())
    optimizer = make_optimizer(models[0], config(optimizer=name, weight_decay=0.1))
    assert bool(optimizer.defaults.get("fused")) == (kind is not None)
    if kind is None:
        return
    plain = create_optimizer_v2(models[1], opt=name, lr=1.0, weight_decay=0.1)
    assert type(optimizer) is type(plain) is kind
    for _ in range(3):
        for model in models:
            for i, parameter in enumerate(model.parameters()):
                parameter.grad = torch.linspace(-1, 2, parameter.numel()).view_as(parameter) + i
        optimizer.step()
        plain.step()
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*opt_einsum")
@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        ("kron", "cannot hold its state Q of type list"),
        ("adahessian", "does not require grad"),
        ("fusedadam", "APEX|CUDA"),
    ],
)
def test_make_optimizer_refuses_what_cannot_train_or_be_saved(optimizer, reason, monkeypatch):
    if optimizer == "kron":
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # compiling its helpers takes seconds
    elif optimizer == "fusedadam" and torch.cuda.is_available():
        pytest.skip("may be available")
    with pytest.raises(ValueError, match=reason) as info:
        make_optimizer(Layered(), config(optimizer=optimizer))
    assert str(info.value).startswith(f"optimizer='{optimizer}' cannot be used here")
    assert "\n" not in str(info.value)


def test_ema_follows_weights_and_statistics_with_its_decay():
    model = nn.BatchNorm1d(3)
    ema = Ema(nn.BatchNorm1d(3), decay=0.75)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(4.0)
        model.num_batches_tracked.fill_(7)
    ema.update(model, step=1000)
    assert ema.module.weight.tolist() == [2.0] * 3
    assert ema.module.running_mean.tolist() == [1.0] * 3
    assert ema.module.num_batches_tracked.item() == 7
    ema.update(model, step=0)  # in early steps the decay is at most 0.1
    assert ema.module.weight.tolist() == pytest.approx([4.7] * 3)
