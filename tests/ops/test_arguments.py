# SPDX-License-Identifier: Apache-2.0
"""Invalid arguments raise errors on every path; transforms and second derivatives equal those of the definition."""

import pytest
import torch
from torch.autograd import forward_ad

from sola_vision import ops
from sola_vision.ops import reference

PATHS = ["reference", "portable", "default"]
DECAY, BONUS = torch.tensor([0.5, 3.0, -1.0]), torch.tensor([0.1, -0.4, 0.0])
KEY, VALUE = torch.randn(2, 2, 21, 3, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(1))
WEIGHT, BIAS, MIXES = X[0, 0, 0], X[0, 0, 1], X[0, 0, :3].sigmoid()


@pytest.fixture(params=PATHS)
def path(request):
    if request.param == "default":
        yield request.param
    else:
        with ops.use(request.param):
            yield request.param


def shift(x, weight=WEIGHT, bias=BIAS, mixes=MIXES, **rows):
    return ops.norm_shift(x, weight, bias, 1e-5, mixes, **rows)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_unsupported_dtypes_raise(path, dtype):
    name = str(dtype).removeprefix("torch.")
    for call in (
        lambda: ops.wkv(DECAY, BONUS, KEY.to(dtype), VALUE),
        lambda: ops.wkv(DECAY, BONUS.to(dtype), KEY, VALUE),
        lambda: shift(X.to(dtype)),
        lambda: shift(X, mixes=MIXES.to(dtype)),
        lambda: ops.gate(X.to(dtype), X),
        lambda: ops.gated_sum(X, X, X.to(dtype)),
        lambda: ops.squared_relu(X.to(dtype)),
    ):
        with pytest.raises(TypeError, match=f"must be float64, float32, bfloat16 or float16, got .*{name}"):
            call()


def test_sparse_and_nested_tensors_raise(path):
    nested = torch.nested.nested_tensor([KEY[0], KEY[1]])
    for wrong in (KEY.to_sparse(), nested):
        with pytest.raises(TypeError, match="wkv: decay, bonus, key and value must be dense"):
            ops.wkv(DECAY, BONUS, wrong, VALUE)
        with pytest.raises(TypeError, match="squared_relu: x must be dense"):
            ops.squared_relu(wrong)


def test_mixed_devices_raise(path):
    """If one tensor is on meta, torch calls the fake kernel, which returns uninitialized memory."""
    for call in (
        lambda: ops.wkv(DECAY, BONUS, KEY, VALUE.to("meta")),
        lambda: shift(X, weight=WEIGHT.to("meta")),
        lambda: shift(X.to("meta")),
        lambda: ops.gate(X, X.to("meta")),
        lambda: ops.gated_sum(X, X, X, out=X.to("meta")),
    ):
        with pytest.raises(ValueError, match=r"must be on one device, got .*meta"):
            call()
    assert shift(*(t.to("meta") for t in (X, WEIGHT, BIAS, MIXES))).shape == (3, 2, 5, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x \[5, 4, 8\] must be \[B, H, W, C\]"),
        ({"weight": WEIGHT[:1]}, r"weight \[1\] and bias \[8\] must be \[C\] = \[8\]"),
        ({"bias": BIAS[None]}, r"bias \[1, 8\]"),
        ({"mixes": MIXES[0]}, r"mixes \[8\] \[M, C\]"),
        ({"mixes": MIXES[:, :1]}, r"mixes \[3, 1\]"),
        ({"top": -1}, "top -1 and bottom 0 must be >= 0 and sum to at most the height 5 of x"),
        ({"top": 3, "bottom": 7}, "top 3 and bottom 7"),
    ],
)
def test_norm_shift_names_invalid_arguments(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        shift(**{"x": X} | arguments)


def test_gates_do_not_broadcast(path):
    with pytest.raises(
        ValueError,
        match=r"gate: all arguments must have the same shape, got receptance \[2, 5, 4, 8\], value \[5, 4, 8\]",
    ):
        ops.gate(X, X[0])
    with pytest.raises(ValueError, match=r"gated_sum: .* out \[2, 5, 4\]"):
        ops.gated_sum(X, X, X, out=X[..., 0])


def test_gated_sum_into_out(path):
    memory = torch.randn(101)
    for wrong in (X.double(), X.transpose(1, 2).contiguous().transpose(1, 2), X[:1].expand(2, 5, 4, 8)):
        with pytest.raises(ValueError, match=r"gated_sum: out must be contiguous and torch\.float32"):
            ops.gated_sum(X, X, X, out=wrong)
    for leaf in (True, False):
        given = [X.clone().requires_grad_(leaf), X.clone().requires_grad_(not leaf)]
        with pytest.raises(RuntimeError, match="a result written to out has no gradient"):
            ops.gated_sum(X, given[0], X, out=given[1])
    # out overlaps the arguments, exactly and shifted by one element
    for a, b in ((memory[1:], memory[1:]), (memory[:-1], memory[1:]), (memory[1:], memory[:-1])):
        copy = a.clone()
        torch.testing.assert_close(ops.gated_sum(a, copy, a, out=b), copy + copy.sigmoid() * copy)


def test_a_backward_detects_tensors_overwritten_by_gated_sum(path):
    kept, weight = X.clone(), X.clone().requires_grad_()
    product = (kept * weight).sum()
    ops.gated_sum(X, X, X, out=kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        ops.gated_sum(X, X, X, out=torch.empty_like(X))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_empty_inputs_have_zero_gradients(path, shape):
    leaves = [torch.ones(s, requires_grad=True) for s in (shape[2:], shape[2:], shape, shape)]
    out = ops.wkv(*leaves)
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in grads] == [x.shape for x in leaves]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("shape", [(0, 5, 4, 8), (2, 0, 4, 8), (2, 5, 0, 8), (2, 5, 4, 0), (2, 3, 2, 5)])
@pytest.mark.parametrize("count", [0, 2])
def test_norm_shift_without_pixels_or_mixes(path, shape, count):
    leaves = [torch.ones(s, requires_grad=True) for s in (shape, shape[3:], shape[3:], (count, shape[3]))]
    torch.use_deterministic_algorithms(True)  # uninitialized memory is NaN
    try:
        out = shift(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.shape == (count, *shape)
    assert [g.shape for g in grads] == [x.shape for x in leaves]
    assert all(g.isfinite().all() for g in grads)
    if out.numel() == 0:
        assert not any(g.any() for g in grads)


def test_passes_of_a_scalar(path):
    x = torch.tensor(1.5, requires_grad=True)
    out = ops.gated_sum(x, x, x) + ops.gate(x, x) + ops.squared_relu(x)
    torch.testing.assert_close(out, x + 2 * x.sigmoid() * x + x**2)
    (got,) = torch.autograd.grad(out, x)
    torch.testing.assert_close(got, torch.func.grad(lambda x: x + 2 * x.sigmoid() * x + x**2)(x.detach()))


# ---- derivatives


def penalty(call, *tensors):
    """The gradient of the squared gradient, as in a gradient penalty."""
    leaves = [t.double().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


CALLS = {
    "wkv": (ops.wkv, DECAY, BONUS, KEY, VALUE),
    "norm_shift": (shift, X, WEIGHT, BIAS, MIXES),
    "gate": (ops.gate, X, X + 1),
    "gated_sum": (ops.gated_sum, X, X + 1, X + 2),
    "squared_relu": (ops.squared_relu, X),
}


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_equal_the_definition(path, name):
    got = penalty(*CALLS[name])
    with ops.use("reference"):
        expected = penalty(*CALLS[name])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_equals_the_definition(name):
    call, *tensors = CALLS[name]
    tensors = [t.double() for t in tensors]
    tangents = [t.cos() for t in tensors]
    with ops.use("reference"):
        _, expected = torch.func.jvp(call, tuple(tensors), tuple(tangents))
    _, got = torch.func.jvp(call, tuple(tensors), tuple(tangents))
    torch.testing.assert_close(got, expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(call(*duals)).tangent, expected)
    for requires_grad in (False, True):
        _, linear = torch.func.linearize(call, *(t.clone().requires_grad_(requires_grad) for t in tensors))
        for _ in range(2):  # the graph must not change its constants
            torch.testing.assert_close(linear(*tangents), expected)


@pytest.mark.parametrize("name", CALLS)
def test_torch_func_transforms(name):
    call, *tensors = CALLS[name]
    tensors = [t.double() for t in tensors]

    def loss(*tensors):
        return call(*tensors).sin().sum()

    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors), expected)
    twice = [torch.stack((t, t + 0.1)) for t in tensors]
    singly = torch.stack([call(*(t[i] for t in twice)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(call)(*twice), singly)


@pytest.mark.parametrize("which", range(4))
def test_vmap_over_one_argument(which):
    tensors = [DECAY, BONUS, KEY, VALUE]
    many = torch.stack((tensors[which], tensors[which] + 1))
    expected = [reference.wkv(*tensors[:which], one, *tensors[which + 1 :]) for one in many]
    places = [0 if i == which else None for i in range(4)]
    got = torch.func.vmap(ops.wkv, tuple(places))(*tensors[:which], many, *tensors[which + 1 :])
    torch.testing.assert_close(got, torch.stack(expected))
