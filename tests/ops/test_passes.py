# SPDX-License-Identifier: Apache-2.0
"""The fused passes against their plain forms in float64: every instruction set, dtype, odd shapes, NaN, bad input."""

import pytest
import torch

from sola_vision import ops
from sola_vision.ops import cpu, passes

reason = cpu.load()
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 33), (1, 7, 7, 96), (2, 40, 3, 48), (1, 17, 20, 66), (1, 1, 9, 3)]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["plain", "generic", "avx2", "avx512", "avx512_bf16"])
def path(request, switch):
    """The operators' plain form, then every instruction set."""
    if request.param == "plain":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "_use_plain_form", lambda *x: True)
            yield
        return
    yield switch(request.param)


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16"])
def kernel_path(request, switch):
    """Every instruction set, for operators that have no function that could select the plain form."""
    switch(request.param)


def close(actual, expected, dtype, scale=1.0):
    size = max(expected.abs().max().item(), 1.0)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=scale * ROUNDING[dtype] * size)


def shift_inputs(batch, height, width, channels, mixes, dtype):
    g = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, height, width, channels, generator=g) * 3 + 1
    weight, bias = torch.randn(2, channels, generator=g)
    return [t.to(dtype) for t in (x, weight, bias, torch.rand(mixes, channels, generator=g))]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_shift_and_its_gradients(path, shape, dtype):
    for mixes in (1, 3):
        tensors = shift_inputs(*shape, mixes, dtype)
        exact = [t.double().requires_grad_() for t in tensors]
        own = [t.clone().requires_grad_() for t in tensors]
        expected = passes._norm_shift(exact[0], exact[1], exact[2], 1e-5, exact[3], 0, 0)
        out = ops.norm_shift(own[0], own[1], own[2], 1e-5, own[3])
        close(out, expected, dtype, scale=2)
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected_grads = torch.autograd.grad(expected, exact, grad.double())
        for actual, right in zip(torch.autograd.grad(out, own, grad), expected_grads, strict=True):
            close(actual, right, dtype, scale=30)  # one channel's norm divides by sqrt(eps)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [*SHAPES, (49, 1), (197, 33), (2, 300), (768,), (0, 7, 8)])
def test_layer_norm(kernel_path, shape, dtype):
    torch.manual_seed(0)
    x, (weight, bias) = torch.randn(shape) * 3 + 1, torch.randn(2, shape[-1])
    x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
    # eps = 1e-3 bounds how much a token whose few channels hardly vary multiplies the rounding
    exact = [tensor.double() for tensor in (x, weight, bias)]
    expected = torch.nn.functional.layer_norm(exact[0], shape[-1:], *exact[1:], 1e-3)
    found = torch.ops.sola.layer_norm(x, weight, bias, 1e-3)
    assert found.shape == shape
    assert found.is_contiguous()
    if x.numel():
        close(found, expected, dtype, scale=4)
        shifted = x.double().movedim(-1, 0).contiguous().movedim(0, -1).to(dtype)
        assert torch.equal(torch.ops.sola.layer_norm(shifted, weight, bias, 1e-3), found)
    wide = torch.ops.sola.layer_norm(x, weight.double(), bias.float(), 1e-3)
    assert torch.equal(wide, found)


def test_layer_norm_of_nan_and_infinity_is_torchs(kernel_path):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 40), *torch.randn(2, 40)
    x[0, 3], x[5, 39], x[8, 0] = float("nan"), float("inf"), 1e30
    found = torch.ops.sola.layer_norm(x, weight, bias, 1e-5)
    expected = torch.nn.functional.layer_norm(x, (40,), weight, bias)
    finite = [1, 2, 3, 4, 6, 7]
    torch.testing.assert_close(found[finite], expected[finite])
    assert found[[0, 5]].isnan().all()


def test_layer_norm_without_a_kernel_is_torchs():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 3, 24).bfloat16(), *torch.randn(2, 24).bfloat16()
    expected = torch.nn.functional.layer_norm(x, (24,), weight, bias)
    assert torch.equal(passes._layer_norm(x, weight, bias, 1e-5), expected)


def test_quad_shift_moves_each_quarter_one_pixel():
    x = torch.arange(2 * 3 * 4 * 9, dtype=torch.float32).reshape(2, 3, 4, 9) + 1
    out = ops.quad_shift(x)
    torch.testing.assert_close(out[:, :, 1:, 0:2], x[:, :, :-1, 0:2])  # from the left
    torch.testing.assert_close(out[:, :, :-1, 2:4], x[:, :, 1:, 2:4])  # from the right
    torch.testing.assert_close(out[:, 1:, :, 4:6], x[:, :-1, :, 4:6])  # from above
    torch.testing.assert_close(out[:, :-1, :, 6:8], x[:, 1:, :, 6:8])  # from below
    torch.testing.assert_close(out[..., 8], x[..., 8])
    outside = (out[:, :, 0, 0:2], out[:, :, -1, 2:4], out[:, 0, :, 4:6], out[:, -1, :, 6:8])
    assert all((edge == 0).all() for edge in outside)


@pytest.mark.parametrize("channels", [1, 3, 4, 33])
def test_norm_shift_blends_between_neighbour_and_token(path, channels):
    x = torch.randn(1, 5, 2, channels, dtype=torch.float64)
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    mixes = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)[:, None].expand(3, channels)
    n = torch.nn.functional.layer_norm(x, (channels,), weight, bias)
    neighbour, token, blend = ops.norm_shift(x, weight, bias, 1e-5, mixes)
    torch.testing.assert_close(neighbour, ops.quad_shift(n))
    torch.testing.assert_close(token, n)
    torch.testing.assert_close(blend, 0.25 * n + 0.75 * ops.quad_shift(n))


@pytest.mark.parametrize(("top", "bottom"), [(0, 0), (1, 0), (0, 2), (1, 1), (3, 2)])
def test_top_and_bottom_rows_are_left_out_of_the_result(path, top, bottom):
    x, weight, bias, mixes = shift_inputs(2, 5, 4, 24, 2, torch.float32)
    x.requires_grad_()
    whole = ops.norm_shift(x, weight, bias, 1e-5, mixes)[:, :, top : 5 - bottom]
    part = ops.norm_shift(x, weight, bias, 1e-5, mixes, top=top, bottom=bottom)
    assert torch.equal(part, whole)
    grad = torch.randn(part.shape)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (part, whole)))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("count", [0, 1, 49, 197])
def test_gates_and_squared_relu(path, count, dtype):
    g = torch.Generator().manual_seed(count)
    tensors = [(torch.randn(count, generator=g) * 9).to(dtype) for _ in range(4)]
    exact, own = ([t.to(kind).requires_grad_() for t in tensors[:3]] for kind in (torch.float64, dtype))
    residual, receptance, value = exact
    pairs = [
        (ops.gate(own[1], own[2]), torch.sigmoid(receptance) * value),
        (ops.gated_sum(*own), residual + torch.sigmoid(receptance) * value),
        (ops.squared_relu(own[2]), value.clamp(min=0) ** 2),
    ]
    for out, expected in pairs:
        assert out.shape == (count,)
        if count:
            close(out, expected, dtype)
            actual = torch.autograd.grad(out, own, tensors[3], allow_unused=True)
            expected_grads = torch.autograd.grad(expected, exact, tensors[3].double(), allow_unused=True)
            for a, b in zip(actual, expected_grads, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    close(a, b, dtype, scale=2)
    out = torch.full_like(tensors[0], 7)
    with torch.no_grad():
        assert ops.gated_sum(*tensors[:3], out=out) is out
    assert torch.equal(out, pairs[1][0])


def test_extremes_and_nan(path):
    nan, inf = float("nan"), float("inf")
    receptance = torch.tensor([nan, 1e4, -1e4, inf, -inf, 45.0, -45.0])
    ones = torch.ones(7)
    torch.testing.assert_close(
        ops.gate(receptance, ones), torch.sigmoid(receptance), equal_nan=True, rtol=1e-6, atol=1e-18
    )
    torch.testing.assert_close(ops.squared_relu(receptance), torch.relu(receptance) ** 2, equal_nan=True)
    x = torch.zeros(1, 3, 3, 4)
    x[0, 1, 1, 2] = nan
    out = ops.norm_shift(x, ones[:4], ones[:4], 1e-5, torch.full((1, 4), 0.5))
    assert out[0, 0, 1, 1].isnan().all()
    assert not out[0, 0, 0, 0].isnan().any()


@needs_kernel
def test_gradients_do_not_depend_on_the_number_of_threads():
    x, weight, bias, mixes = shift_inputs(2, 40, 9, 48, 2, torch.float32)
    grad = torch.randn(2, 2, 40, 9, 48)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.sola.norm_shift_backward(x, weight, bias, 1e-5, mixes, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_operators_are_registered_correctly():
    x, weight, bias, mixes = shift_inputs(1, 4, 3, 8, 2, torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for tensor in (x, weight, bias, mixes):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.sola.norm_shift.default, (x, weight, bias, 1e-5, mixes, 1, 0), test_utils=tests)
    torch.library.opcheck(torch.ops.sola.gate.default, (x, x * 2), test_utils=tests)
    torch.library.opcheck(torch.ops.sola.gated_sum.default, (x, x * 2, x * 3), test_utils=tests)
    torch.library.opcheck(torch.ops.sola.squared_relu.default, (x,), test_utils=tests)
    inference = [tensor.detach() for tensor in (x, weight, bias)]
    torch.library.opcheck(torch.ops.sola.layer_norm.default, (*inference, 1e-5), test_utils=tests)
    plain = [t.detach() for t in (x, x, x, x)]
    torch.library.opcheck(torch.ops.sola.gated_sum_.default, (*plain[:3], plain[3].clone()), test_utils=tests)


def test_inputs_of_any_strides():
    x, weight, bias, mixes = shift_inputs(2, 5, 4, 24, 2, torch.float32)
    permuted = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    expected = ops.norm_shift(x, weight, bias, 1e-5, mixes)
    assert torch.equal(ops.norm_shift(permuted, weight, bias, 1e-5, mixes.t().contiguous().t()), expected)
    assert torch.equal(ops.gate(permuted, x), ops.gate(x, x))
    half = mixes.half()
    torch.testing.assert_close(ops.norm_shift(x, weight, bias, 1e-5, half), expected, rtol=0, atol=0.01)
    assert ops.gate(x.half(), x).dtype == torch.float32  # as torch promotes


@needs_kernel
def test_the_kernels_reject_invalid_arguments():
    errors = (RuntimeError, ValueError)  # a kernel's error arrives as a ValueError in torch 2.11
    x, weight, bias, mixes = shift_inputs(2, 5, 4, 24, 2, torch.float32)
    sola = torch.ops.sola
    for wrong, message in (
        ((x[0, 0], weight, bias, 1e-5, mixes, 0, 0), r"x is \[4, 24\], expected \[batch, height, width, channels\]"),
        ((x, weight[1:], bias, 1e-5, mixes, 0, 0), r"weight is \[23\], expected"),
        ((x, weight, bias, 1e-5, mixes[:, 1:], 0, 0), r"mixes is \[2, 23\], expected"),
        ((x, weight, bias, 1e-5, mixes, 3, 3), "do not fit a height of 5"),
    ):
        with pytest.raises(errors, match=message):
            sola.norm_shift(*wrong)
    with pytest.raises(errors, match=r"weight is \[23\], expected \[channels\] = \[24\]"):
        sola.layer_norm(x, weight[1:], bias, 1e-5)
    with pytest.raises(errors, match="x is a number"):
        sola.layer_norm(torch.tensor(1.0), weight, bias, 1e-5)
    with pytest.raises(errors, match=r"value is \[5, 4, 24\], expected"):
        sola.gate(x, x[0])
    with pytest.raises(errors, match="out must be contiguous"):
        sola.gated_sum_(x, x, x, torch.empty(2, 5, 24, 4).transpose(2, 3))
    with pytest.raises(errors, match="must be float64, float32, bfloat16 or float16"):
        sola.squared_relu(torch.ones(3, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_plain_norm_shift_takes_wide_parameters(dtype):
    """As under autocast, where parameters are wide; CUDA's layer norm takes tensors of one dtype only."""
    torch.manual_seed(0)
    x, mixes = torch.randn(2, 3, 4, 8), torch.rand(2, 8)
    weight, bias = torch.randn(2, 8)
    half = x.bfloat16().requires_grad_()
    out = passes._norm_shift(half, weight, bias, 1e-5, mixes, 0, 0, dtype)
    exact = passes._norm_shift(half.detach().float(), weight, bias, 1e-5, mixes, 0, 0)
    assert out.dtype == (dtype or torch.bfloat16)
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=1e-6 if dtype else 0.02)
    (first,) = torch.autograd.grad(out.float().pow(3).sum(), half, create_graph=True)
    assert torch.autograd.grad(first.float().sum(), half)[0].isfinite().all()
