# SPDX-License-Identifier: Apache-2.0
"""A residual sum with drop path, as a kernel computes it, is the formula: values, gradients, the images dropped."""

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from timm.layers import DropPath
from torch import nn

from sola_vision.layers import LinearLayer, SoftmaxLayer, fused_gpu, residual

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def operands(*size, device="cpu", dtype=torch.float64):
    torch.manual_seed(0)
    x, branch = torch.randn(2, *size, dtype=dtype, device=device)
    return x.requires_grad_(), branch.requires_grad_(), torch.arange(size[0], dtype=dtype, device=device) - 0.5


def by_hand(x, branch, factors):
    return x + (branch if factors is None else branch * factors.view(-1, *[1] * (x.ndim - 1)))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("size", [(3, 2, 5, 7), (1, 1, 1, 1), (4, 6), (0, 2, 3, 4), (2, 0, 3, 4)])
@pytest.mark.parametrize("dropped", [True, False])
def test_node_is_the_formula(device, size, dropped):
    x, branch, factors = operands(*size, device=device)
    factors = factors if dropped else None
    grad = torch.randn_like(x)
    expected = by_hand(x, branch, factors)
    right = torch.autograd.grad(expected, (x, branch), grad)
    out = fused_gpu.residual_sum(x, branch, factors)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, (x, branch), grad), right)
    with torch.no_grad():
        torch.testing.assert_close(fused_gpu.residual_sum(x, branch, factors), expected)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_dtypes_and_batched_and_second_gradients(device):
    x, branch, factors = operands(3, 4, 8, device=device, dtype=torch.float32)
    half = branch.detach().bfloat16().requires_grad_()
    out = fused_gpu.residual_sum(x, half, factors)
    assert out.dtype == torch.float32
    gradients = torch.autograd.grad(out.square().sum(), (x, half))
    assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16]
    out = fused_gpu.residual_sum(x, branch, factors)
    grads = torch.randn(2, *x.shape, device=device)
    batched = torch.autograd.grad(out, branch, grads, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched, grads * factors[None, :, None, None])
    (first,) = torch.autograd.grad(out.pow(3).sum(), branch, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * out.detach() * factors[:, None, None])


def test_factors_are_those_of_a_sum():
    made, x = LinearLayer(8).double(), operands(2, 3, 2, 8)[0]
    mix, mixer, factors = made.channel_mix, made.mixer, torch.ones(2).double()
    parts, projections = (mix.mix_key, mix.mix_receptance), (mix.key, mix.receptance, mix.value)
    with pytest.raises(AssertionError):
        fused_gpu.channel_mix(x, made.norm2, parts, projections, residual=False, factors=factors)
    parts = (mixer.mix_receptance, mixer.mix_key, mixer.mix_value)
    projections = (mixer.receptance, mixer.key, mixer.value, mixer.output)
    with pytest.raises(AssertionError):
        fused_gpu.spatial_mix(
            x, made.norm1, mixer.decay, mixer.bonus, parts, projections, residual=False, factors=factors
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", [LinearLayer, SoftmaxLayer])
def test_a_mode_that_sees_operators_sees_the_layer(kind):
    """Launches would be missing from the graph."""
    torch.manual_seed(0)
    layer, x = kind(32).cuda(), torch.randn(2, 3, 4, 32, device="cuda")
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: layer(x)[0], tracing_mode="real")(x)
        torch.testing.assert_close(graph(x + 1), layer(x + 1)[0], rtol=1e-4, atol=1e-4)


def test_the_same_seed_drops_the_same_images():
    drop, x = DropPath(0.4), torch.randn(50, 3, 2, 4)
    torch.manual_seed(3)
    expected = drop(torch.ones_like(x))
    torch.manual_seed(3)
    factors = residual.drop_factors(drop, x)
    assert 0 < (factors == 0).sum() < 50
    assert torch.equal(factors[:, None, None, None].expand_as(x), expected)
    torch.manual_seed(3)
    unscaled = residual.drop_factors(DropPath(0.4, scale_by_keep=False), x)
    assert torch.equal(unscaled, (factors != 0).float())
    for nothing in (DropPath(0.0), DropPath(0.4).eval(), nn.Identity()):
        assert residual.drop_factors(nothing, x) is None
    assert not residual.drop_factors(DropPath(1.0), x).any()


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_softmax_layer_of_nodes_is_the_layer(monkeypatch, drop_path):
    """As on a GPU in eager mode; a drop path that a hook observes is called."""
    torch.manual_seed(0)
    layer, x = SoftmaxLayer(32, drop_path=drop_path).double(), torch.randn(5, 3, 2, 32, dtype=torch.float64)

    def trained():
        torch.manual_seed(1)
        layer.zero_grad()
        out, _ = layer(x)
        out.square().sum().backward()
        return out, [parameter.grad for parameter in layer.parameters()]

    expected = trained()
    called = []

    def node(*arguments):
        called.append(arguments)
        return fused_gpu.residual_sum(*arguments)

    monkeypatch.setattr(residual, "in_eager_mode_on_gpu", lambda _: True)
    monkeypatch.setattr(residual, "residual_sum", node)
    torch.testing.assert_close(trained(), expected)
    assert len(called) == 2
    observed = layer.drop_path.register_forward_hook(lambda *_: called.append(None))
    torch.testing.assert_close(trained(), expected)
    observed.remove()
    assert called[2:] == [None, None]
