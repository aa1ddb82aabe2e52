# SPDX-License-Identifier: Apache-2.0
"""oneDNN's fused operators give what torch's give one after the other, and step back where something observes these."""

import pytest
import timm
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu
from torch.utils.flop_counter import FlopCounterMode

import sola_vision  # noqa: F401 - names of the networks
from sola_vision import ops
from sola_vision.layers import SoftmaxLayer, onednn

pytestmark = pytest.mark.skipif(not onednn._is_built(torch.bfloat16), reason="torch has no oneDNN for bfloat16 here")
NAMES = "_linear_pointwise", "_convolution_pointwise"


@pytest.fixture
def calls(monkeypatch):
    """The names of the fused operators that were called."""
    made = []

    def counting(name):
        operator = getattr(torch.ops.mkldnn, name)
        return lambda *args: made.append(name) or operator(*args)

    for name in NAMES:
        monkeypatch.setattr(torch.ops.mkldnn, name, counting(name))
    return made


def layer(dim=32, dtype=torch.bfloat16):
    torch.manual_seed(0)
    made = SoftmaxLayer(dim).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.to(dtype), torch.randn(2, 5, 3, dim).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 49, 33), (3, 7, 5, 96), (1, 197, 8), (2, 0, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_with_its_bias_is_that_of_linear(shape, dtype, calls):
    torch.manual_seed(0)
    projection, x = nn.Linear(shape[-1], 48), torch.randn(shape)
    projection, x = projection.to(dtype), x.to(dtype)
    with torch.no_grad():
        found, exact = onednn.project_biased(x, projection), projection.double()(x.double())
    assert calls == ["_linear_pointwise"] * (dtype == torch.bfloat16 and x.numel() > 0)
    assert found.shape == exact.shape
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["strided", "expanded", "one for all"])
def test_a_bias_that_is_not_one_number_after_the_other_is_left_to_torch(kind, calls):
    torch.manual_seed(0)
    projection, x = nn.Linear(32, 48).bfloat16(), torch.randn(5, 32).bfloat16()
    one = torch.ones(1, dtype=torch.bfloat16)
    bias = {"strided": torch.arange(96).bfloat16()[::2], "expanded": one.expand(48), "one for all": one}[kind]
    projection.bias.data = bias
    with torch.no_grad():
        found = onednn.project_biased(x, projection)
        expected = nn.functional.linear(x, projection.weight) + bias
    assert calls == []
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"groups": 16, "padding": 1}, True),
        ({"groups": 1, "padding": (1, 0), "stride": 2}, True),
        ({"groups": 16, "padding": 2, "dilation": 2}, True),
        ({"groups": 16, "padding": "same"}, False),
        ({"groups": 16, "padding": 1, "padding_mode": "reflect"}, False),
        ({"groups": 16, "padding": 1, "bias": False}, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_with_its_gelu_is_both(options, fused, dtype, layout, calls):
    torch.manual_seed(0)
    convolution, x = nn.Conv2d(16, 16, 3, **options).to(dtype), torch.randn(2, 16, 6, 5).to(dtype)
    x = x.to(memory_format=layout)
    with torch.no_grad():
        found, exact = onednn.convolve_gelu(x, convolution), gelu(convolution.double()(x.double()))
    assert calls == ["_convolution_pointwise"] * fused
    assert found.is_contiguous(memory_format=layout)
    tolerance = 1e-5 if dtype == torch.float32 else (2 if fused else 4) * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_network_uses_them_in_inference(calls):
    torch.manual_seed(0)
    network, image = timm.create_model("sola_nano").eval(), torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        network(image)
        assert calls == ["_convolution_pointwise"] * 3
        calls.clear()
        found = network.bfloat16()(image.bfloat16())
        assert sorted(calls) == ["_convolution_pointwise"] * 3 + ["_linear_pointwise"] * 12
        calls.clear()
        with ops.use("portable"):
            expected = network(image.bfloat16())
    assert calls == []
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    "how", ["training", "autocast", "hook", "global hook", "flops", "func", "replaced", "make_fx", "trace"]
)
def test_they_step_back(how, calls):
    module, x = layer(dtype=torch.float32 if how == "autocast" else torch.bfloat16)
    if how == "training":
        module(x)[0].sum().backward()
    elif how == "func":
        torch.func.vmap(lambda y: module(y[None])[0])(x)
    with torch.no_grad():
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                module(x)
        elif how == "hook":
            seen = []
            for name in ("mlp.fc1", "mlp.fc2", "mlp.depthwise", "mixer.qkv", "mixer.output"):
                module.get_submodule(name).register_forward_hook(lambda *args: seen.append(args))
            module(x)
            assert len(seen) == 5
        elif how == "global hook":
            handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
            module(x)
            handle.remove()
        elif how == "flops":
            with FlopCounterMode(display=False) as counter:
                module(x)
            assert counter.get_total_flops() > 2 * x.numel() * 12 * 32  # the products of the five modules
        elif how == "replaced":  # as by quantisation: the products of other classes are called
            module.mlp.depthwise = nn.Sequential(module.mlp.depthwise)
            for name in ("mlp.fc1", "mlp.fc2", "mixer.qkv", "mixer.output"):
                module.set_submodule(name, nn.Sequential(module.get_submodule(name)))
            module(x)
        elif how == "make_fx":
            graph = make_fx(module.mlp, pre_dispatch=True)(x).graph
            assert "mkldnn" not in str(graph)
        elif how == "trace":
            torch.jit.trace(module.mlp, x, check_trace=False)
    assert calls == []


def test_errors_are_torchs():
    module, x = layer()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"same dtype|expected m1 and m2"):
            module.mlp(x.float())
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size"):
            module.mlp(x[..., :31])
        with pytest.raises(RuntimeError, match=r"expected input.* to have 128 channels"):
            onednn.convolve_gelu(torch.ones(1, 64, 5, 5).bfloat16(), module.mlp.depthwise)
