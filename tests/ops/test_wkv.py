# SPDX-License-Identifier: Apache-2.0
"""The operator against its definition: values, gradients, laws, contract, the same on every path."""

import contextlib
import warnings
from unittest import mock

import pytest
import torch

from sola_vision import ops
from sola_vision.ops import portable, reference, wkv

# the default is the kernel for this machine: the C++ one if it was built during installation
PATHS = ["reference", "portable", "default"]
SINGLE = "portable in float32"  # the portable path on a device without float64
SIZES = [(1, 1, 3), (2, 49, 1), (1, 196, 5), (2, 197, 33), (1, 64, 8), (3, 65, 2)]


def pinned(path):
    return ops.use("portable" if path == SINGLE else path) if path != "default" else contextlib.nullcontext()


def device(path):
    missing = mock.patch.object(portable, "_has_float64", return_value=False)
    return missing if path == SINGLE else contextlib.nullcontext()


def random_inputs(batch, num_tokens, channels, dtype=torch.float32, seed=0, key_range=50.0):
    """Inputs in the ranges of the accuracy measure: w in [-20, 200], u in [-10, 10], k in [-50, 50]."""
    g = torch.Generator().manual_seed(seed)
    decay = torch.rand(channels, generator=g, dtype=torch.float64) * 220 - 20
    bonus = torch.rand(channels, generator=g, dtype=torch.float64) * 20 - 10
    key = (torch.rand(batch, num_tokens, channels, generator=g, dtype=torch.float64) * 2 - 1) * key_range
    value = torch.randn(batch, num_tokens, channels, generator=g, dtype=torch.float64)
    grad = torch.randn(batch, num_tokens, channels, generator=g, dtype=torch.float64)
    half = dtype in (torch.float16, torch.bfloat16)
    small = torch.float32 if half else dtype
    return decay.to(small), bonus.to(small), key.to(dtype), value.to(dtype), grad.to(dtype)


def run(path, decay, bonus, key, value, grad):
    leaves = [x.clone().requires_grad_() for x in (decay, bonus, key, value)]
    with device(path):
        with pinned(path):
            out = wkv(*leaves)
        return out, torch.autograd.grad(out, leaves, grad)


def truth(decay, bonus, key, value, grad):
    leaves = [x.double().requires_grad_() for x in (decay, bonus, key, value)]
    out = reference.wkv(*leaves)
    return out, torch.autograd.grad(out, leaves, grad.double())


def forward_error(out, expected, value):
    return ((out.double() - expected).abs().max() / value.double().abs().max()).item()


def gradient_error(got, expected, value, grad):
    floor = 0.1 * grad.double().abs().max() * value.double().abs().max()
    return ((got.double() - expected).abs().max() / torch.maximum(expected.abs().max(), floor)).item()


@pytest.mark.parametrize("path", [*PATHS, SINGLE])
@pytest.mark.parametrize("size", SIZES)
def test_wkv_equals_the_definition_in_float32(path, size):
    inputs = random_inputs(*size)
    out, grads = run(path, *inputs)
    expected, expected_grads = truth(*inputs)
    assert forward_error(out.detach(), expected.detach(), inputs[3]) <= 5e-6
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == torch.float32
        assert gradient_error(got, want, inputs[3], inputs[4]) <= 1e-5


@pytest.mark.parametrize("path", ["portable", "default", SINGLE])
def test_wkv_equals_the_definition_at_stage_1_of_224(path):
    inputs = random_inputs(1, 3136, 2)
    out, grads = run(path, *inputs)
    expected, expected_grads = truth(*inputs)
    assert forward_error(out.detach(), expected.detach(), inputs[3]) <= 5e-6
    for got, want in zip(grads, expected_grads, strict=True):
        assert gradient_error(got, want, inputs[3], inputs[4]) <= 1e-5


@pytest.mark.parametrize("path", ["portable", "default", SINGLE])
@pytest.mark.parametrize("keys", ["one outweighs all", "rising"])
def test_gradients_whose_terms_cancel_are_exact_relative_to_the_terms(path, keys):
    """The results are close to one value and the loss is a sum: the gradients of decay and key are almost zero."""
    decay, bonus, _, value, _ = random_inputs(2, 65, 9)
    decay, key, grad = torch.zeros_like(decay), torch.zeros_like(value), torch.ones_like(value)
    if keys == "rising":
        key += torch.linspace(-44, 44, 65)[:, None]
    else:
        key[:, 20] = 44.0
    _, grads = run(path, decay, bonus, key, value, grad)
    _, expected = truth(decay, bonus, key, value, grad)
    for images, got, want in zip((2, 2, 1, 1), grads, expected, strict=True):
        if path == "portable":
            assert gradient_error(got, want, value, grad) <= 1e-5
        assert (got.double() - want).abs().max() <= 5e-7 * 65 * images * value.abs().max()


@pytest.mark.parametrize("path", ["portable", "default", SINGLE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wkv_in_half_precision_adds_little_to_rounding(path, dtype):
    decay, bonus, key, value, grad = random_inputs(2, 197, 9, torch.float64, key_range=5.0)
    exact, _ = truth(decay, bonus, key, value, grad)
    rounded = [x.to(dtype) for x in (key, value, grad)]
    only_rounding, rounding_grads = truth(decay, bonus, *rounded)
    budget = (only_rounding.to(dtype).double() - exact).abs().max()
    out, grads = run(path, decay.float(), bonus.float(), *rounded)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 1.5 * budget
    for got, want in zip(grads, rounding_grads, strict=True):
        assert gradient_error(got, want, value, grad) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("path", [*PATHS, SINGLE])
@pytest.mark.parametrize(
    ("decay", "bonus", "key_scale"),
    [
        (1e6, 0.0, 1.0),
        (-1e6, 0.0, 1.0),
        (1e9, 1.0, 1.0),
        (-1e9, 1.0, 1.0),
        (5.0, 1e4, 1.0),
        (5.0, -1e4, 1.0),
        (5.0, 0.0, 1e4),
        (-300.0, -300.0, 300.0),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 2, 50, 131])
def test_wkv_is_correct_at_extremes(path, decay, bonus, key_scale, num_tokens):
    _, _, key, value, grad = random_inputs(2, num_tokens, 3, key_range=key_scale)
    w, u = torch.full((3,), decay), torch.full((3,), bonus)
    out, grads = run(path, w, u, key, value, grad)
    expected, expected_grads = truth(w, u, key, value, grad)
    assert forward_error(out.detach(), expected.detach(), value) <= 5e-6
    for got, want in zip(grads, expected_grads, strict=True):
        assert torch.isfinite(got).all()
        assert gradient_error(got, want, value, grad) <= 1e-5


@pytest.mark.parametrize("path", [*PATHS, SINGLE])
def test_wkv_laws(path):
    single = path == SINGLE
    decay, bonus, key, value, _ = random_inputs(2, 60, 7, torch.float32 if single else torch.float64)
    close = {"rtol": 1e-5, "atol": 5e-6} if single else {"rtol": 1e-9, "atol": 1e-12}
    with device(path), pinned(path):
        out = wkv(decay, bonus, key, value)
        reversed_ = wkv(decay, bonus, key.flip(1), value.flip(1))
        shifted = wkv(decay, bonus, key + 17.0, value)
        constant = wkv(decay, bonus, key, torch.full_like(value, 3.25))
        scaled = wkv(decay, bonus, key, 2 * value + 1)
    torch.testing.assert_close(reversed_, out.flip(1), **close)
    torch.testing.assert_close(shifted, out, **close)
    torch.testing.assert_close(constant, torch.full_like(value, 3.25))
    torch.testing.assert_close(scaled, 2 * out + 1, **close)
    assert (out <= value.amax(1, keepdim=True) + close["atol"]).all()
    assert (out >= value.amin(1, keepdim=True) - close["atol"]).all()


@pytest.mark.parametrize("path", PATHS)
def test_wkv_without_decay_and_bonus_ignores_the_order(path):
    _, _, key, value, _ = random_inputs(1, 30, 4, torch.float64, key_range=3.0)
    zero = torch.zeros(4, dtype=torch.float64)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    with pinned(path):
        out = wkv(zero, zero, key, value)
        permuted = wkv(zero, zero, key[:, order], value[:, order])
    torch.testing.assert_close(permuted, out[:, order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out[:, 0], out[:, -1])


def test_wkv_one_token_returns_its_value():
    value = torch.randn(2, 1, 3)
    out = wkv(torch.randn(3), torch.full((3,), -1e4), torch.randn(2, 1, 3), value)
    torch.testing.assert_close(out, value)


def test_wkv_weights_are_the_rows_of_the_operator():
    decay, bonus, key, value, _ = random_inputs(1, 20, 3, torch.float64, key_range=3.0)
    rows = reference.weights(decay, bonus, key, slice(4, 6))
    torch.testing.assert_close(rows.sum(2), torch.ones(1, 2, 3, dtype=torch.float64))
    torch.testing.assert_close(torch.einsum("btnc,bnc->btc", rows, value), wkv(decay, bonus, key, value)[:, 4:6])


@pytest.mark.parametrize("path", ["portable", "default"])
def test_wkv_gradcheck(path):
    decay, bonus, key, value, _ = random_inputs(2, 7, 3, torch.float64, key_range=2.0)
    leaves = [x.requires_grad_() for x in (decay / 20, bonus / 5, key, value)]
    with pinned(path):
        assert torch.autograd.gradcheck(wkv, leaves)


@pytest.mark.parametrize("keys", ["random", "equal"])
def test_double_backward_without_float64_is_that_of_the_definition(keys):
    """Of equal keys without decay, sums are equally large: which is kept must not change a derivative."""
    decay, bonus, key, value, grad = random_inputs(2, 21, 3, key_range=3.0)
    if keys == "equal":
        decay, bonus, key = torch.zeros_like(decay), torch.zeros_like(bonus), torch.ones_like(key)

    def penalty(path):
        leaves = [x.clone().requires_grad_() for x in (decay / 20, bonus / 5, key, value)]
        with device(path), pinned(path):
            first = torch.autograd.grad(wkv(*leaves), leaves, grad, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    torch.testing.assert_close(penalty(SINGLE), penalty("reference"), rtol=1e-4, atol=1e-4)


def test_forward_mode_without_float64_is_that_of_the_definition():
    decay, bonus, key, value, grad = random_inputs(2, 21, 3, key_range=3.0)
    inputs = decay / 20, bonus / 5, key, value
    tangents = torch.ones_like(decay), torch.ones_like(bonus), grad, grad.flip(1)
    with device(SINGLE):
        _, got = torch.func.jvp(wkv, inputs, tangents)
    _, expected = torch.func.jvp(reference.wkv, inputs, tangents)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["wkv", "wkv_portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wkv_opcheck(name, dtype):
    decay, bonus, key, value, _ = random_inputs(2, 11, 5, dtype, key_range=2.0)
    leaves = tuple(x.requires_grad_() for x in (decay / 20, bonus, key, value))
    torch.library.opcheck(getattr(torch.ops.sola, name).default, leaves)


def test_wkv_compiles_without_a_graph_break():
    decay, bonus, key, value, grad = random_inputs(2, 33, 4)
    compiled = torch.compile(wkv, fullgraph=True, backend="aot_eager", dynamic=True)
    leaves = [x.requires_grad_() for x in (decay, bonus, key, value)]
    out = compiled(*leaves)
    torch.testing.assert_close(out, wkv(*leaves))
    grads = torch.autograd.grad(out, leaves, grad)
    torch.testing.assert_close(grads, torch.autograd.grad(wkv(*leaves), leaves, grad))


def test_wkv_autocast_keeps_decay_in_float32():
    decay, bonus, key, value, _ = random_inputs(1, 20, 3, key_range=3.0)
    decay = decay + 0.37  # would change in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = wkv(decay, bonus, key, value)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wkv(decay, bonus, key.bfloat16(), value.bfloat16()), rtol=0, atol=0)


@pytest.mark.parametrize("wide", [2, 3])
def test_autocast_does_not_round_float64(wide):
    inputs = list(random_inputs(1, 20, 3, key_range=3.0)[:4])
    inputs[wide] = inputs[wide].double() / 3
    expected = wkv(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(wkv(*inputs), expected, rtol=0, atol=0)


def test_wkv_does_not_depend_on_memory_layout():
    decay, bonus, key, value, grad = random_inputs(2, 50, 6)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value, grad)]
    out, grads = run("default", decay, bonus, *strided)
    expected, expected_grads = run("default", decay, bonus, key, value, grad)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)


@pytest.mark.parametrize("path", [*PATHS, SINGLE])
def test_wkv_of_an_empty_batch_is_empty(path):
    with device(path), pinned(path):
        assert wkv(torch.ones(3), torch.ones(3), torch.ones(0, 5, 3), torch.ones(0, 5, 3)).shape == (0, 5, 3)


def test_wkv_counts_29_macs_a_token_and_channel():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        wkv(torch.ones(3), torch.ones(3), torch.ones(2, 5, 3), torch.ones(2, 5, 3))
    assert counter.get_total_flops() == 2 * 29 * 2 * 5 * 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((3,), (3,), (2, 5, 3), (2, 4, 3)), r"key \[2, 5, 3\] and value \[2, 4, 3\]"),
        (((4,), (3,), (2, 5, 3), (2, 5, 3)), r"decay \[4\] and bonus \[3\].*\[3\]"),
        (((3,), (1, 3), (2, 5, 3), (2, 5, 3)), r"bonus \[1, 3\]"),
        (((3,), (3,), (5, 3), (5, 3)), r"\[B, N, C\]"),
    ],
)
def test_wkv_names_mismatched_shapes(sizes, message):
    with pytest.raises(ValueError, match=message):
        wkv(*(torch.ones(size) for size in sizes))


def test_wkv_rejects_integers_and_mixed_devices():
    key = torch.ones(1, 4, 3)
    with pytest.raises(TypeError, match="int64"):
        wkv(torch.ones(3, dtype=torch.int64), torch.ones(3), key, key)
    with pytest.raises(ValueError, match="meta"):
        wkv(torch.ones(3, device="meta"), torch.ones(3), key, key)


def test_use_native_runs_the_kernel_or_raises():
    inputs = torch.ones(3), torch.ones(3), torch.ones(1, 4, 3), torch.ones(1, 4, 3)
    reason = ops.missing_kernel("cpu")
    with ops.use("native"):
        if reason is None:
            torch.testing.assert_close(wkv(*inputs), torch.ones(1, 4, 3))
        else:
            with pytest.raises(RuntimeError, match="CPU kernel"):
                wkv(*inputs)
        with pytest.raises(RuntimeError, match="no compiled kernel for meta"):
            wkv(*(x.to("meta") for x in inputs))


def test_a_missing_kernel_warns_once(monkeypatch):
    monkeypatch.setattr(ops, "missing_kernel", lambda device: f"no kernel for {device}")
    ops._warn_once.cache_clear()
    inputs = torch.ones(3), torch.ones(3), torch.ones(1, 4, 3), torch.ones(1, 4, 3)
    with pytest.warns(UserWarning, match="no kernel for cpu; using the portable path"):
        wkv(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wkv(*inputs)
    ops._warn_once.cache_clear()


def test_use_rejects_unknown_paths_and_restores_the_path():
    with pytest.raises(ValueError, match="'fast'"), ops.use("fast"):
        pass
    with pytest.raises(KeyError), ops.use("reference"):
        raise KeyError
    assert ops.pinned() is None


def test_blocks_of_two_threads_may_close_in_any_order():
    first, second = ops.use("portable"), ops.use("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ops.pinned() == "reference"
    second.__exit__(None, None, None)
    assert ops.pinned() is None
