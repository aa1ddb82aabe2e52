# SPDX-License-Identifier: Apache-2.0
"""The wrapping of a network for several processes."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sola_vision.engine import World
from sola_vision.engine.distributed import parallel


@pytest.fixture
def _group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # a warning of torch's C++ comes once per process otherwise
    yield
    torch.set_warn_always(before)
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group_of_one")
def test_gradients_of_depthwise_convolutions_have_the_strides_of_their_weights():
    images = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    alone = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    alone(images).square().sum().backward()
    assert alone.weight.grad.stride() != alone.weight.stride()  # what DDP warns about
    model = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    model.load_state_dict(alone.state_dict())
    trained = parallel(model, "ddp", World(0, 2, torch.device("cpu")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(images).square().sum().backward()
    assert model.weight.grad.stride() == model.weight.stride()
    assert torch.equal(model.weight.grad, alone.weight.grad)
