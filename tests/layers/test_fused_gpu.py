# SPDX-License-Identifier: Apache-2.0
"""A half of a linear layer as one node of autograd is the half of the modules: values and every gradient."""

import pytest
import torch

from sola_vision import ops
from sola_vision.layers import LinearLayer, fused_gpu, linear

needs_kernel = pytest.mark.skipif(ops.missing_kernel("cpu") is not None, reason="a node calls kernels")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
SIZES = [(2, 5, 3, 8), (1, 1, 1, 1), (3, 4, 7, 33), (0, 4, 7, 8), (2, 0, 7, 8)]


def layer(dim, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    made = LinearLayer(dim, dtype=dtype, device=device)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 1.0))
    return made


def calls(made):
    """Each half by its modules, and by its node."""
    mixer, mix = made.mixer, made.channel_mix
    first = (mixer.receptance, mixer.key, mixer.value, mixer.output)
    second = (mix.key, mix.receptance, mix.value)
    of_first = (mixer.mix_receptance, mixer.mix_key, mixer.mix_value)
    of_second = (mix.mix_key, mix.mix_receptance)

    def factors(x):
        return torch.arange(len(x), dtype=x.dtype, device=x.device) * 1.5

    def dropped(x, branch):
        return x + branch * factors(x)[:, None, None, None]

    def spatial(x, **options):
        return fused_gpu.spatial_mix(x, made.norm1, mixer.decay, mixer.bonus, of_first, first, **options)

    def channel(x, **options):
        return (fused_gpu.channel_mix(x, made.norm2, of_second, second, **options),)

    return {
        "spatial": (lambda x: mixer(x, made.norm1), lambda x: spatial(x, residual=False)),
        "spatial with residual": (
            lambda x: (x + mixer(x, made.norm1)[0], mixer(x, made.norm1)[1]),
            lambda x: spatial(x, residual=True),
        ),
        "spatial with drop path": (
            lambda x: (dropped(x, mixer(x, made.norm1)[0]), mixer(x, made.norm1)[1]),
            lambda x: spatial(x, residual=True, factors=factors(x)),
        ),
        "channel": (lambda x: (mix(x, made.norm2),), lambda x: channel(x, residual=False)),
        "channel with residual": (lambda x: (x + mix(x, made.norm2),), lambda x: channel(x, residual=True)),
        "channel with drop path": (
            lambda x: (dropped(x, mix(x, made.norm2)),),
            lambda x: channel(x, residual=True, factors=factors(x)),
        ),
    }


HALVES = [
    *("spatial", "spatial with residual", "spatial with drop path"),
    *("channel", "channel with residual", "channel with drop path"),
]


def found(call, x, grads, parameters, **options):
    """Results, and the gradients for x and the parameters that have one."""
    x = x.detach().requires_grad_()
    results = call(x)
    kept = [(result, grad) for result, grad in zip(results, grads, strict=False) if grad is not None]
    outs, of_outs = zip(*((result, grad.to(result.dtype)) for result, grad in kept), strict=True)
    return [*results, *torch.autograd.grad(outs, (x, *parameters), of_outs, allow_unused=True, **options)]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "result", "read-out"])
def test_node_is_the_modules(device, size, half, wanted):
    """Also where nobody asks for the read-out's gradient, or only for it, as at the source of a last bridge."""
    if device == "cpu" and ops.missing_kernel("cpu") is not None:
        pytest.skip("a node calls kernels, and the plain forms of backwards are not all kernels")
    dtype = torch.float64 if device == "cpu" else torch.float32
    made = layer(size[-1], dtype, device)
    x, *grads = torch.randn(3, *size, dtype=dtype, device=device)
    grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    if grads[0] is None and "spatial" not in half:
        pytest.skip("this half has no read-out")
    by_modules, by_node = calls(made)[half]
    with ops.use("portable"):
        expected = found(by_modules, x, grads, list(made.parameters()))
    for got, want in zip(found(by_node, x, grads, list(made.parameters())), expected, strict=True):
        if got is None or want is None:  # a parameter of the other half, or one that nothing wanted depends on
            assert want is None
            assert got is None or not got.any()
            continue
        assert got.shape == want.shape
        if got.numel():
            assert (got - want).abs().max() <= (1e-9 if device == "cpu" else 1e-4) * (1 + want.abs().max())


@needs_kernel
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_layer_of_nodes_is_the_layer(monkeypatch, drop_path):
    """The layer gives its nodes what belongs to them, in training and in inference; as on a GPU, where it has them."""
    made = layer(16)
    made.drop_path.drop_prob = drop_path
    x = torch.randn(3, 4, 5, 16, dtype=torch.float64)

    def trained():
        torch.manual_seed(1)  # the same images are dropped
        made.train()
        results = made(x)
        sum(result.square().sum() for result in results).backward()
        gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
        made.zero_grad()
        return results, gradients

    def inferred():
        with torch.no_grad():
            return made.eval()(x)

    expected, right, values = *trained(), inferred()
    called = []
    for name in ("spatial_mix", "channel_mix"):
        node = getattr(linear, name)

        def call(*args, name=name, node=node, **options):
            called.append(name)
            return node(*args, **options)

        monkeypatch.setattr(linear, name, call)
    monkeypatch.setattr(linear, "in_one_node", lambda *_: True)
    results, gradients = trained()
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(gradients, right)
    torch.testing.assert_close(inferred(), values)
    assert called == 2 * ["spatial_mix", "channel_mix"]


@needs_kernel
def test_results_may_be_changed_in_place():
    """Not where the backward needs them: who changes the read-out is told."""
    made, x = layer(8), torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    for half in calls(made).values():
        half[1](x)[0].mul_(2).sum().backward()
    mixed, read = calls(made)["spatial"][1](x)
    read.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mixed.sum().backward()


def test_a_graph_that_wants_nothing_of_a_node_goes_on():
    made, x = layer(8), torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            return given[0].sum()

        @staticmethod
        def backward(ctx, grad):
            return None, None

    total = Nothing.apply(*calls(made)["spatial"][1](x)) + x.square().sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    torch.testing.assert_close(gradient, 2 * x)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", HALVES)
def test_node_under_autocast(device, half, dtype):
    """Products and read-out in half precision, the gradients of the wide parameters wide."""
    if device == "cpu" and ops.missing_kernel("cpu") is not None:
        pytest.skip("a node calls kernels")
    made = layer(32, torch.float32, device)
    x, *grads = torch.randn(3, 2, 6, 5, 32, device=device)
    by_modules, by_node = calls(made)[half]
    with torch.autocast(device, dtype), ops.use("portable"):
        expected = found(by_modules, x, grads, list(made.parameters()))
    with torch.autocast(device, dtype):
        made_by_node = found(by_node, x, grads, list(made.parameters()))
    for got, want in zip(made_by_node, expected, strict=True):
        if want is None:
            assert got is None
            continue
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= 0.03 * want.abs().max()
    with torch.autocast(device, dtype), torch.no_grad():  # the products of inference are in half precision, too
        inference = by_node(x)
    for got, want in zip(inference if isinstance(inference, tuple) else (inference,), made_by_node, strict=False):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_kernel), CUDA])
@pytest.mark.parametrize("half", HALVES)
def test_many_gradients_come_as_one(device, half):
    made = layer(8, torch.float32, device)
    x, *grads = torch.randn(3, 2, 3, 4, 8, device=device)
    results = calls(made)[half][1](x.requires_grad_())
    results = results if isinstance(results, tuple) else (results,)
    grads = grads[: len(results)]
    at_once = torch.autograd.grad(
        results, x, [torch.stack((g, -2 * g)) for g in grads], is_grads_batched=True, retain_graph=True
    )
    single = torch.autograd.grad(results, x, grads)[0]
    torch.testing.assert_close(at_once[0], torch.stack((single, -2 * single)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("by", [0, 1], ids=["modules", "node"])
def test_backwards_are_differentiated_again(device, half, by):
    """Nobody is told half of a second derivative: `torch.autograd.grad` asks no node that has none."""
    dtype = torch.float64 if device == "cpu" else torch.float32
    made = layer(8, dtype, device)
    x, *grads = torch.randn(3, 2, 3, 4, 8, dtype=dtype, device=device)

    def second(call):
        first = found(call, x, grads, list(made.parameters()), create_graph=True)
        inputs = [leaf for leaf in made.parameters() if leaf.requires_grad]
        penalty = sum(gradient.square().sum() for gradient in first[-1 - len(inputs) :] if gradient is not None)
        return torch.autograd.grad(penalty, inputs, allow_unused=True)

    with ops.use("portable"):
        expected = second(calls(made)[half][0])
    for got, want in zip(second(calls(made)[half][by]), expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert (got - want).abs().max() <= (1e-9 if device == "cpu" else 1e-3) * (1 + want.abs().max())
