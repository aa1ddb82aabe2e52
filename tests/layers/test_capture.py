# SPDX-License-Identifier: Apache-2.0
"""Layers under tools that call them otherwise than a plain forward does: captured graphs under autocast, hooks."""

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import sola_vision  # noqa: F401 - registers the names
from sola_vision.layers import LinearLayer

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("sola_nano", dims=(32,), schedule="LLS", img_size=32, num_classes=5).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("capture", [lambda m, x: torch.export.export(m, (x,)).module(), torch.jit.trace])
def test_captured_without_autocast_it_runs_under_autocast(network, capture, grad, dtype):
    image = torch.randn(2, 3, 32, 32)
    captured = capture(network, image)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype):
        expected, output = network(image), captured(image)
    assert output.dtype == expected.dtype == dtype
    torch.testing.assert_close(output.float(), expected.float(), rtol=0, atol=0.02)


def test_captured_under_autocast_it_runs_under_autocast(network):
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        captured = torch.jit.trace(network, image)
        torch.testing.assert_close(captured(image).float(), network(image).float(), rtol=0, atol=0.02)


def test_a_captured_training_step_runs_on_parameters_that_require_gradients(network):
    names, parameters = zip(*network.named_parameters(), strict=True)

    def step(image, *parameters):
        loss = functional_call(network, dict(zip(names, parameters, strict=True)), (image,)).square().sum()
        return loss, *torch.autograd.grad(loss, parameters)

    captured = make_fx(step)(torch.randn(2, 3, 32, 32), *parameters)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(captured(image, *parameters), step(image, *parameters), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixer", "channel_mix"])
@pytest.mark.parametrize("token_shift", [True, False])
def test_hooks_of_a_mix_are_passed_tensors_only(name, token_shift):
    torch.manual_seed(0)
    layer = LinearLayer(8, token_shift=token_shift)
    x = torch.randn(2, 3, 4, 8)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected, expected_read = layer(x)
            inputs = []
            handle = getattr(layer, name).register_forward_pre_hook(lambda _, given, seen=inputs: seen.extend(given))
            output, read = layer(x)
            handle.remove()
        assert [type(given) for given in inputs] == [torch.Tensor]
        assert inputs[0].mean(-1).abs().max() < 1e-5  # normalised
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(read, expected_read)


@pytest.mark.parametrize("name", ["sola_nano", "vrwkv_tiny"])
def test_a_mixer_that_returns_one_tensor_is_refused(name):
    network = timm.create_model(name, num_classes=3).eval()
    layer = next(module for module in network.modules() if hasattr(module, "mixer"))
    layer.mixer = nn.Identity()
    # two images would unpack, and every image would get the first one's branch
    with torch.no_grad(), pytest.raises(TypeError, match="Identity returned one tensor: return two values"):
        network(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_returns_one_tensor_is_refused(images, checkpointing):
    network = timm.create_model("sola_nano", num_classes=3)
    network.set_grad_checkpointing(checkpointing)
    network.stages[1].layers[0] = nn.Identity()
    with pytest.raises(TypeError, match="Identity returned one tensor: return two values"):
        network(torch.randn(images, 3, 32, 32))


def test_a_replaced_mix_is_called_with_the_normalised_input():
    layer = LinearLayer(8)
    layer.channel_mix = nn.Identity()
    x = torch.randn(1, 2, 2, 8)
    output, _ = layer(x)
    mixed, _ = layer.mixer(x, layer.norm1)
    torch.testing.assert_close(output, x + mixed + layer.norm2(x + mixed))
