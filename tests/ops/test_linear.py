# SPDX-License-Identifier: Apache-2.0
"""Products fused with passes against their plain forms in float64: every instruction set, odd shapes, dtypes, strides,
non-finite values, bad input.
"""

import contextlib
import threading
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sola_vision.ops import cpu, linear

reason = cpu.load()
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
sola = torch.ops.sola

# images, height, width, channels, outputs: one token, one channel, odd numbers, more than a tile and a panel, tiles of
# twice the tokens
SHAPES = [
    (1, 1, 1, 1, 4),
    (2, 7, 7, 33, 132),
    (1, 9, 13, 4, 1),
    (3, 14, 5, 96, 384),
    (2, 20, 120, 8, 31),
    (2, 3, 3, 400, 900),
    (1, 19, 21, 400, 1600),
]
SETS = {
    torch.float32: ("generic", "avx2", "avx512", "amx"),
    torch.bfloat16: ("avx512_bf16", "amx"),
}
CASES = [(name, dtype) for dtype, names in SETS.items() for name in names]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 8e-3}


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1]).removeprefix('torch.')}")
def dtype(request, switch, poisoned_memory):
    switch(request.param[0])
    return request.param[1]


@pytest.fixture(params=SETS[torch.float32])
def in_float32(request, switch, poisoned_memory):
    return switch(request.param)


def numbers(*sizes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    # weights are scaled so that outputs have unit variance
    return [(torch.randn(size, generator=g) / (size[1] ** 0.5 if len(size) == 2 else 1)).to(dtype) for size in sizes]


def shift_arguments(shape, mixes, dtype):
    *size, channels, outputs = shape
    x, weight, bias = numbers((*size, channels), (channels,), (channels,), dtype=dtype, seed=1)
    ramps = torch.rand(mixes, channels, generator=torch.Generator().manual_seed(2)).to(dtype)
    return x * 2 + 1, weight, bias, 1e-5, ramps, numbers(*[(outputs + m, channels) for m in range(mixes)], dtype=dtype)


def exact(value):
    if isinstance(value, list):
        return [exact(each) for each in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def close(actual, expected, rounding):
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for each in zip(actual, expected, strict=True):
            close(*each, rounding)
        return
    assert actual.shape == expected.shape
    size = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=rounding * size)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_shifted_tokens(dtype, shape):
    for mixes in (1, 2, 3):
        arguments = shift_arguments(shape, mixes, dtype)
        actual = sola.norm_shift_linear(*arguments)
        assert all(each.dtype == dtype and each.is_contiguous() for each in actual)
        close(actual, linear._norm_shift_linear(*map(exact, arguments)), ROUNDING[dtype])


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_gated_and_squared_tokens(dtype, shape):
    *size, outputs, inputs = shape
    arguments = numbers((*size, inputs), (*size, inputs), (outputs, inputs), dtype=dtype)
    for name, some in (("gate_linear", arguments), ("squared_relu_linear", arguments[1:])):
        actual = getattr(sola, name)(*some)
        assert actual.dtype == dtype
        close(actual, getattr(linear, f"_{name}")(*map(exact, some)), ROUNDING[dtype])


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_spatial_and_channel_mix(dtype, shape):
    channels, hidden = shape[3:]
    *arguments, _ = shift_arguments(shape, 1, dtype)
    arguments += numbers((channels, channels), (channels, channels), shape[:4], dtype=dtype)
    actual = sola.spatial_mix(*arguments)
    assert actual.dtype == dtype
    close(actual, linear._spatial_mix(*map(exact, arguments)), ROUNDING[dtype])
    *arguments, _ = shift_arguments(shape, 2, dtype)
    arguments += numbers((hidden, channels), (channels, channels), (channels, hidden), dtype=dtype)
    actual = sola.channel_mix(*arguments)
    assert actual.dtype == dtype
    close(actual, linear._channel_mix(*map(exact, arguments)), ROUNDING[dtype])


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(in_float32, shape):
    *size, channels, outputs = shape
    for mixes in (1, 2, 3):
        arguments = shift_arguments(shape, mixes, torch.float32)
        grads = numbers(*[(*size, outputs + m) for m in range(mixes)], seed=3)
        actual = sola.norm_shift_linear_backward(*arguments, grads)
        expected = linear._norm_shift_linear_backward(*map(exact, (*arguments, grads)))
        close(actual[1:], expected[1:], 1e-5)
        close(actual[0], expected[0], 1e-4)  # one channel's norm divides by sqrt(eps)
    receptance, value, weight, grad = numbers(
        (*size, outputs), (*size, outputs), (channels, outputs), (*size, channels)
    )
    for name, some in (
        ("gate_linear_backward", (receptance, value, weight, grad)),
        ("squared_relu_linear_backward", (value, weight, grad)),
    ):
        close(getattr(sola, name)(*some), getattr(linear, f"_{name}")(*map(exact, some)), 1e-5)


def test_plain_gradients_equal_those_of_autograd():
    """The plain forms of the backwards are the references for the kernels."""
    x, weight, bias, eps, mixes, projections = map(exact, shift_arguments((2, 4, 3, 6, 5), 3, torch.float32))
    leaves = [x, weight, bias, mixes, *projections]
    for leaf in leaves:
        leaf.requires_grad_()
    grads = [each.double() for each in numbers(*[(2, 4, 3, 5 + m) for m in range(3)])]
    expected = torch.autograd.grad(linear._norm_shift_linear(x, weight, bias, eps, mixes, projections), leaves, grads)
    with torch.no_grad():
        *actual, grad_projections = linear._norm_shift_linear_backward(x, weight, bias, eps, mixes, projections, grads)
    torch.testing.assert_close([*actual, *grad_projections], list(expected))
    value, receptance, projection = leaves = [t.double().requires_grad_() for t in numbers((7, 6), (7, 6), (5, 6))]
    grad = torch.randn(7, 5, dtype=torch.float64)
    expected = torch.autograd.grad(
        linear._gate_linear(receptance, value, projection), [receptance, value, projection], grad
    )
    with torch.no_grad():
        torch.testing.assert_close(linear._gate_linear_backward(receptance, value, projection, grad), expected)
    expected = torch.autograd.grad(linear._squared_relu_linear(value, projection), [value, projection], grad)
    with torch.no_grad():
        torch.testing.assert_close(linear._squared_relu_linear_backward(value, projection, grad), expected)


@needs_kernel
def test_large_results_are_complete(dtype):
    """They are written with non-temporal stores."""
    x, weight, bias, eps, mixes, _ = shift_arguments((3, 60, 60, 48, 1), 2, dtype)
    wide = numbers((1600, 48), (48, 48), (48, 1600), dtype=dtype)
    actual = sola.norm_shift_linear(x, weight, bias, eps, mixes, wide[:2])
    assert sum(each.numel() * each.element_size() for each in actual) > 32 << 20
    close(actual, linear._norm_shift_linear(*map(exact, (x, weight, bias, eps, mixes, wide[:2]))), ROUNDING[dtype])
    if dtype == torch.float32:
        value, grad = actual[0], numbers(x.shape, seed=4)[0]
        actual = sola.squared_relu_linear_backward(value, wide[2], grad)
        close(actual, linear._squared_relu_linear_backward(*map(exact, (value, wide[2], grad))), 1e-5)


@needs_kernel
def test_bits_do_not_depend_on_threads_or_batch(dtype):
    arguments = shift_arguments((3, 11, 17, 48, 100), 2, dtype)
    *mix, _ = arguments
    mix += numbers((192, 48), (48, 48), (48, 192), dtype=dtype)
    threads, actual = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            actual.append([*sola.norm_shift_linear(*arguments), sola.channel_mix(*mix)])
    finally:
        torch.set_num_threads(threads)
    for other in actual[1:]:
        assert all(torch.equal(a, b) for a, b in zip(actual[0], other, strict=True))
    alone = sola.channel_mix(mix[0][1:2], *mix[1:])
    assert torch.equal(alone, actual[0][-1][1:2])


@needs_kernel
def test_gradients_are_deterministic(in_float32):
    arguments = (*shift_arguments((3, 21, 17, 48, 100), 2, torch.float32), numbers((3, 21, 17, 100), (3, 21, 17, 101)))
    once, again = (sola.norm_shift_linear_backward(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip([*once[:4], *once[4]], [*again[:4], *again[4]], strict=True))


@needs_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_with_their_token(dtype, bad):
    receptance, value, projection = numbers((150, 70), (150, 70), (40, 70), dtype=dtype)
    value[3, 5] = bad
    for actual in (sola.gate_linear(receptance, value, projection), sola.squared_relu_linear(value, projection)):
        assert not actual[3].isfinite().any()
        assert actual[:3].isfinite().all()
        assert actual[4:].isfinite().all()
    x, weight, bias, eps, mixes, projections = shift_arguments((1, 9, 9, 40, 50), 1, dtype)
    x[0, 4, 4, 7] = bad
    actual = sola.norm_shift_linear(x, weight, bias, eps, mixes, projections)[0].isfinite().all(-1)
    assert [tuple(at) for at in (~actual[0]).nonzero().tolist()] == [(3, 4), (4, 3), (4, 4), (4, 5), (5, 4)]


@needs_kernel
def test_inputs_of_any_strides(dtype):
    receptance, value, projection = numbers((6, 5, 24), (6, 5, 24), (40, 24), dtype=dtype)
    expected = sola.gate_linear(receptance, value, projection)
    permuted = value.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(sola.gate_linear(receptance, permuted, projection.t().contiguous().t()), expected)
    x, *others, projections = shift_arguments((2, 5, 4, 24, 40), 2, dtype)
    expected = sola.norm_shift_linear(x, *others, projections)
    actual = sola.norm_shift_linear(
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), *others, [p.t().contiguous().t() for p in projections]
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@needs_kernel
@pytest.mark.parametrize("size", [(0, 3, 3, 8), (2, 0, 3, 8), (2, 3, 3, 0)])
def test_empty_inputs(dtype, size):
    channels = size[-1]
    x, residual = torch.zeros(size, dtype=dtype), torch.ones(*size[:3], 5, dtype=dtype)
    ones = [torch.ones(n, dtype=dtype) for n in (channels, channels)]
    mixes, weights = torch.ones(2, channels, dtype=dtype), [torch.ones(n, channels, dtype=dtype) for n in (5, 6)]
    for actual, outputs in zip(sola.norm_shift_linear(x, *ones, 1e-5, mixes, weights), (5, 6), strict=True):
        assert actual.shape == (*size[:3], outputs)
        assert actual.eq(0).all()
    assert sola.gate_linear(x, x, weights[0]).eq(0).all()
    assert sola.gate_linear(residual, residual, torch.ones(0, 5, dtype=dtype)).shape == (*size[:3], 0)
    if channels:
        square = torch.ones(channels, channels, dtype=dtype)
        assert sola.spatial_mix(x, *ones, 1e-5, mixes[:1], square, square, x).shape == x.shape
        no_units = torch.zeros(0, channels, dtype=dtype)
        assert torch.equal(sola.channel_mix(x, *ones, 1e-5, mixes, no_units, square, no_units.t()), x)
    if dtype == torch.float32:
        grads = [torch.ones(*size[:3], n) for n in (5, 6)]
        actual = sola.norm_shift_linear_backward(x, *ones, 1e-5, mixes, weights, grads)
        assert actual[0].shape == x.shape
        assert all(each.eq(0).all() for each in actual[4])
        assert sola.squared_relu_linear_backward(x, weights[0], grads[0])[1].eq(0).all()


def test_another_thread_may_switch_the_instruction_set(switch, kernel_error):
    """A call uses one instruction set from its checks to its products; some sets do not support bfloat16."""
    switch("avx512_bf16")
    *first, weights = shift_arguments((1, 32, 32, 128, 128), 1, torch.bfloat16)
    readout = torch.randn(1, 32, 32, 128).bfloat16()
    expected = sola.spatial_mix(*first, weights[0], weights[0], readout)
    ended = time.monotonic() + 0.5

    def switching():
        while time.monotonic() < ended:
            cpu.instruction_set("avx2")
            cpu.instruction_set("avx512_bf16")

    thread = threading.Thread(target=switching)
    thread.start()
    computed = 0
    while time.monotonic() < ended:
        with contextlib.suppress(kernel_error):
            assert torch.equal(sola.spatial_mix(*first, weights[0], weights[0], readout), expected)
            computed += 1
    thread.join()
    assert computed


def test_operators_are_registered_correctly():
    x, weight, bias, eps, mixes, projections = shift_arguments((1, 4, 3, 8, 12), 2, torch.float32)
    tests = ("test_schema", "test_faketensor")  # the operators have no autograd formula
    arguments = (x, weight, bias, eps, mixes)
    key, receptance, value, grad = numbers((32, 8), (8, 8), (8, 32), (1, 4, 3, 8))
    grads = numbers((1, 4, 3, 12), (1, 4, 3, 13))
    for operator, some in (
        (sola.norm_shift_linear, (*arguments, projections)),
        (sola.channel_mix, (*arguments, key, receptance, value)),
        (sola.gate_linear, (x, x, receptance)),
        (sola.spatial_mix, (*arguments[:4], mixes[:1], receptance, receptance, x)),
        (sola.squared_relu_linear, (x, receptance)),
        (sola.norm_shift_linear_backward, (*arguments, projections, grads)),
        (sola.gate_linear_backward, (x, x, receptance, grad)),
        (sola.squared_relu_linear_backward, (x, receptance, grad)),
    ):
        if operator is sola.norm_shift_linear_backward and reason is not None:
            continue  # its plain form calls autograd, which these checks do not allow
        torch.library.opcheck(operator.default, some, test_utils=tests)


@needs_kernel
def test_the_kernels_reject_invalid_arguments(switch):
    switch("generic")
    errors = (RuntimeError, ValueError)
    x, weight, bias, eps, mixes, projections = shift_arguments((1, 4, 3, 8, 12), 2, torch.float32)
    shift = (x, weight, bias, eps, mixes)
    grads = numbers((1, 4, 3, 12), (1, 4, 3, 13))
    square, half = torch.ones(8, 8), x.bfloat16()
    for call, message in (
        (
            lambda: sola.norm_shift_linear(*shift, projections[:1]),
            "got 2 mixes and 1 projections, expected equal numbers from 1 to 3",
        ),
        (lambda: sola.norm_shift_linear(*shift, [projections[0], square[1:, 1:]]), r"projection is \[7, 7\], expected"),
        (lambda: sola.norm_shift_linear(*shift, [p.double() for p in projections]), "must have the dtype"),
        (lambda: sola.norm_shift_linear(x[0], *shift[1:], projections), r"x is \[4, 3, 8\], expected"),
        (lambda: sola.gate_linear(half, half, square.bfloat16()), "value must be float32; no kernel exists"),
        (lambda: sola.gate_linear(x[0], x, square), r"receptance is \[4, 3, 8\], expected"),
        (lambda: sola.gate_linear(half, x, square), "receptance must have the dtype"),
        (lambda: sola.spatial_mix(*shift[:4], mixes[:1], square, square, x[..., 1:]), r"readout is \[1, 4, 3, 7\]"),
        (lambda: sola.spatial_mix(*shift, square, square, x), "2 mixes, expected 1"),
        (lambda: sola.squared_relu_linear(x, square[:, 0]), r"projection is \[8\], expected"),
        (lambda: sola.channel_mix(*shift[:4], mixes[:1], square, square, square), "1 mixes, expected 2"),
        (lambda: sola.channel_mix(*shift, square[1:], square, square), r"value is \[8, 8\], expected"),
        (
            lambda: sola.norm_shift_linear_backward(*shift, projections, grads[:1]),
            "equal numbers of mixes, projections and grads",
        ),
        (
            lambda: sola.norm_shift_linear_backward(*shift, projections, grads[::-1]),
            r"grad is \[1, 4, 3, 13\], expected",
        ),
        (lambda: sola.squared_relu_linear_backward(x, square, x.double()), "grad must be float32"),
        (lambda: sola.gate_linear_backward(x[0], x, square, x), r"receptance is \[4, 3, 8\], expected"),
    ):
        with pytest.raises(errors, match=message):
            call()


@needs_kernel
def test_flops_equal_those_of_the_plain_form():
    x, weight, bias, eps, mixes, projections = shift_arguments((2, 4, 3, 8, 12), 2, torch.float32)
    arguments = (x, weight, bias, eps, mixes)
    key, receptance, value, grad = numbers((32, 8), (8, 8), (8, 32), (2, 4, 3, 8))
    grads = numbers((2, 4, 3, 12), (2, 4, 3, 13))
    hidden = numbers((2, 4, 3, 32))[0]
    for name, some in (
        ("norm_shift_linear", (*arguments, projections)),
        ("gate_linear", (hidden, hidden, value)),
        ("squared_relu_linear", (hidden, value)),
        ("spatial_mix", (*arguments[:4], mixes[:1], receptance, receptance, x)),
        ("channel_mix", (*arguments, key, receptance, value)),
        ("norm_shift_linear_backward", (*arguments, projections, grads)),
        ("gate_linear_backward", (hidden, hidden, value, grad)),
        ("squared_relu_linear_backward", (hidden, value, grad)),
    ):
        counts = []
        for call in (getattr(sola, name), getattr(linear, f"_{name}")):
            with FlopCounterMode(display=False) as counter:
                call(*some)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0, name
