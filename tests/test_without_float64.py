# SPDX-License-Identifier: Apache-2.0
"""Networks where a device has no float64, as Apple's GPU (`mps`): simulated on the CPU."""

import contextlib
from unittest import mock

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sola_vision  # noqa: F401 - registers the networks
from sola_vision import ops
from sola_vision.ops import portable


class _WithoutFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{function} returns float64")
        return results


@contextlib.contextmanager
def without_float64():
    """Run on the path for such a device, with an error for each tensor in float64."""
    with mock.patch.object(portable, "_has_float64", return_value=False), ops.use("portable"), _WithoutFloat64():
        yield


def test_the_mode_refuses_float64():
    with without_float64(), pytest.raises(TypeError, match="returns float64"):
        torch.ones(3).double()


def test_a_network_runs_and_learns_without_float64():
    torch.manual_seed(0)
    image, label = torch.randn(2, 3, 64, 96), torch.tensor([1, 3])

    def learn():
        torch.manual_seed(0)
        network = timm.create_model("sola_nano", num_classes=5, bridges="paper", drop_path_rate=0.2)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
        losses = []
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(network(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        with torch.no_grad():
            return torch.stack(losses), network.eval()(image)

    expected = learn()
    with without_float64():
        got = learn()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got[0][2] < got[0][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_needs_no_float64(dtype):
    torch.manual_seed(0)
    network = timm.create_model("sola_nano", num_classes=5).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(image)
        with without_float64():
            got = network.to(dtype)(image.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
