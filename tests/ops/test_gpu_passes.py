# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the passes against their plain forms in float64: values, gradients, odd shapes, every dtype.

Without a CUDA device Triton's interpreter runs them on the CPU; with one the same tests run on it and carry the mark
`gpu`, like those that need a device at all.
"""

import subprocess
import sys

import pytest
import torch

from sola_vision import ops
from sola_vision.layers.linear import LinearLayer
from sola_vision.ops import gpu_passes, passes
from sola_vision.ops.autocast import KernelsOnly

pytest.importorskip("triton")
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_device = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

# triton.jit reads the variable at decoration; it must not be set for other modules of this process
with pytest.MonkeyPatch.context() as patch:
    if INTERPRETED:
        patch.setenv("TRITON_INTERPRET", "1")
    from sola_vision.ops import triton_passes

SHAPES = [(1, 1, 1, 1), (2, 5, 3, 33), (1, 7, 7, 96), (2, 40, 3, 48), (1, 17, 20, 66), (1, 1, 9, 3)]
# a store in bfloat16 rounds to 2^-9, but Triton's interpreter truncates
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
WIDE, HALF = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _quick(monkeypatch, kernels_scratch):
    if INTERPRETED:  # the interpreter vectorizes a reduction with this function only
        monkeypatch.setattr(triton_passes, "add", triton_passes.tl.standard._sum_combine)


def close(actual, expected, dtype, scale=1.0):
    size = max(expected.abs().max().item(), 1.0)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=scale * ROUNDING[dtype] * size)


def shift_inputs(batch, height, width, channels, mixes, dtype, parameters=None):
    g = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, height, width, channels, generator=g) * 3 + 1
    weight, bias = torch.randn(2, channels, generator=g)
    mix = torch.rand(mixes, channels, generator=g)
    return [x.to(DEVICE, dtype), *(t.to(DEVICE, parameters or dtype) for t in (weight, bias, mix))]


def shift_and_gradients(x, weight, bias, mixes, grad, top=0, bottom=0):
    """Result and gradients of the definition in float64."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, mixes)]
    out = passes._norm_shift(*leaves[:3], 1e-5, leaves[3], top, bottom)
    return out.detach(), torch.autograd.grad(out, leaves, grad.double())


def random_like(x, dtype=None, seed=1):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype or x.dtype)


@pytest.mark.parametrize(
    ("dtype", "parameters", "out_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_shift_and_its_gradients(shape, dtype, parameters, out_dtype):
    mixes = 2 if out_dtype == dtype else 3
    tensors = shift_inputs(*shape, mixes, dtype, parameters)
    out = gpu_passes.norm_shift(*tensors[:3], 1e-5, tensors[3], 0, 0, out_dtype)
    grad = random_like(out)
    expected, expected_grads = shift_and_gradients(*tensors, grad)
    close(out, expected, out_dtype, scale=2)
    actual = gpu_passes.norm_shift_backward(*tensors[:3], 1e-5, tensors[3], grad)
    for tensor, gradient, right in zip(tensors, actual, expected_grads, strict=True):
        close(gradient, right, tensor.dtype, scale=30)  # one channel's norm divides by sqrt(eps)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [(WIDE, WIDE), (HALF, WIDE), (HALF, HALF), (torch.float16, torch.float16)]
)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 7, 96), (40, 3, 48), (3, 2, 3, 1500)])
def test_layer_norm_and_its_gradients(monkeypatch, shape, dtype, out_dtype):
    monkeypatch.setattr(gpu_passes, "_PROGRAMS", 3)
    g = torch.Generator().manual_seed(shape[-1])
    x = (torch.randn(shape, generator=g) * 3 + 1).to(DEVICE, dtype)
    weight, bias = torch.randn(2, shape[-1], generator=g).to(DEVICE, out_dtype)
    out = gpu_passes.layer_norm(x, weight, bias, 1e-5, out_dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.nn.functional.layer_norm(leaves[0], shape[-1:], *leaves[1:], 1e-5)
    grad = random_like(out)
    close(out, expected.detach(), out_dtype, scale=2)
    actual = gpu_passes.layer_norm_backward(x, weight, bias, 1e-5, grad)
    for tensor, gradient, right in zip(
        (x, weight, bias), actual, torch.autograd.grad(expected, leaves, grad.double()), strict=True
    ):
        close(gradient, right, tensor.dtype, scale=5)


def test_layer_norm_of_constant_strided_empty_and_large_values():
    """Without eps a masked row of a tile divides by zero, and must not contribute."""
    x, weight, bias, _ = shift_inputs(2, 5, 4, 24, 1, WIDE)
    constant = gpu_passes.layer_norm_backward(torch.randn(3, 5).to(DEVICE), weight[:5], bias[:5], 0.0, x[0, 0, :3, :5])
    assert all(gradient.isfinite().all() for gradient in constant)
    permuted, grad = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), random_like(x)
    expected = gpu_passes.layer_norm(x, weight, bias, 1e-5, WIDE)
    assert torch.equal(gpu_passes.layer_norm(permuted, weight, bias, 1e-5, WIDE), expected)
    pairs = zip(
        gpu_passes.layer_norm_backward(permuted, weight, bias, 1e-5, grad.mT.contiguous().mT),
        gpu_passes.layer_norm_backward(x, weight, bias, 1e-5, grad),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    for shape in ((0, 24), (2, 0)):
        empty = x.new_zeros(shape)
        some = weight[: shape[1]]
        assert gpu_passes.layer_norm(empty, some, some, 1e-5, HALF).shape == shape
        actual = gpu_passes.layer_norm_backward(empty, some, some, 1e-5, empty)
        assert [(g.shape, g.any().item()) for g in actual] == [(t.shape, False) for t in (empty, some, some)]
    large = gpu_passes.layer_norm(x + 1e4, weight, bias, 1e-5, WIDE)
    torch.testing.assert_close(large, torch.nn.functional.layer_norm(x + 1e4, (24,), weight, bias), rtol=0, atol=0.01)


@pytest.mark.parametrize("mixes", [1, 3, 4])
def test_any_number_of_mixes(mixes):
    tensors = shift_inputs(1, 3, 4, 12, mixes, torch.float32)
    out = gpu_passes.norm_shift(*tensors[:3], 1e-5, tensors[3], 0, 0)
    grad = random_like(out)
    expected, expected_grads = shift_and_gradients(*tensors, grad)
    close(out, expected, torch.float32, scale=2)
    for gradient, right in zip(
        gpu_passes.norm_shift_backward(*tensors[:3], 1e-5, tensors[3], grad), expected_grads, strict=True
    ):
        close(gradient, right, torch.float32, scale=5)


def test_norm_shift_in_wide_and_in_many_tiles(monkeypatch):
    monkeypatch.setattr(gpu_passes, "_PROGRAMS", 3)
    for shape in ((1, 2, 3, 1500), (3, 11, 5, 200)):
        tensors = shift_inputs(*shape, 2, torch.float32)
        out = gpu_passes.norm_shift(*tensors[:3], 1e-5, tensors[3], 0, 0)
        grad = random_like(out)
        expected, expected_grads = shift_and_gradients(*tensors, grad)
        close(out, expected, torch.float32, scale=2)
        actual = gpu_passes.norm_shift_backward(*tensors[:3], 1e-5, tensors[3], grad)
        for gradient, right in zip(actual, expected_grads, strict=True):
            close(gradient, right, torch.float32, scale=5)


@pytest.mark.parametrize(("top", "bottom"), [(1, 0), (0, 2), (1, 1), (3, 2)])
def test_top_and_bottom_rows_are_left_out_of_the_result(top, bottom):
    x, weight, bias, mixes = shift_inputs(2, 5, 4, 24, 2, torch.float32)
    whole = gpu_passes.norm_shift(x, weight, bias, 1e-5, mixes, 0, 0)[:, :, top : 5 - bottom]
    part = gpu_passes.norm_shift(x, weight, bias, 1e-5, mixes, top, bottom)
    assert torch.equal(part, whole)


def test_norm_shift_of_constant_tokens_without_eps():
    """A masked row of a tile divides by zero, and must not contribute."""
    x, weight, bias, mixes = shift_inputs(1, 1, 3, 5, 2, torch.float32)
    actual = gpu_passes.norm_shift_backward(x, weight, bias, 0.0, mixes, torch.ones(2, *x.shape, device=DEVICE))
    assert all(gradient.isfinite().all() for gradient in actual)


def test_inputs_of_any_strides():
    x, weight, bias, mixes = shift_inputs(2, 5, 4, 24, 2, torch.float32)
    permuted = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    expected = gpu_passes.norm_shift(x, weight, bias, 1e-5, mixes, 0, 0)
    mixes_permuted = mixes.t().contiguous().t()
    assert torch.equal(gpu_passes.norm_shift(permuted, weight, bias, 1e-5, mixes_permuted, 0, 0), expected)
    grad = random_like(expected)
    grad_permuted = grad.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    pairs = zip(
        gpu_passes.norm_shift_backward(permuted, weight, bias, 1e-5, mixes_permuted, grad_permuted),
        gpu_passes.norm_shift_backward(x, weight, bias, 1e-5, mixes, grad),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(gpu_passes.gate(permuted, x), gpu_passes.gate(x, x))
    one = grad[:1, :, :1].expand(2, 2, 5, 4, 24)[0]
    actual, right = gpu_passes.gate_backward(permuted, x, one), gpu_passes.gate_backward(x, x, one.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(actual, right, strict=True))


@pytest.mark.parametrize(
    "dtypes",
    [[WIDE] * 3, [torch.float16] * 3, [HALF] * 3, [WIDE, HALF, HALF], [HALF, WIDE, HALF], [HALF, HALF, torch.float16]],
)
@pytest.mark.parametrize("count", [1, 197, 2048, 4100])
def test_gates_and_squared_relu(count, dtypes):
    g = torch.Generator().manual_seed(count)
    own = [(torch.randn(count, generator=g) * 9).to(DEVICE, dtype) for dtype in dtypes]
    exact = [t.double().requires_grad_() for t in own]
    residual, receptance, value = exact
    grad = torch.randn(count, generator=g).to(DEVICE, dtypes[0])
    gated = torch.sigmoid(receptance) * value
    sum_dtype = torch.promote_types(torch.promote_types(*dtypes[:2]), dtypes[2])
    total = gpu_passes.gated_sum(*own)
    close(total, (residual + gated).detach(), sum_dtype)
    out = torch.full_like(total, 7)
    gpu_passes.gated_sum_(*own, out)
    assert torch.equal(out, total)
    close(gpu_passes.gate(*own[1:]), gated.detach(), torch.promote_types(*dtypes[1:]))
    actual, expected_grads = (
        gpu_passes.gate_backward(*own[1:], grad),
        torch.autograd.grad(gated, exact[1:], grad.double()),
    )
    for gradient, right, dtype in zip(actual, expected_grads, dtypes[1:], strict=True):
        close(gradient, right, dtype, scale=2)
    squared = value.clamp(min=0) ** 2
    close(gpu_passes.squared_relu(own[2]), squared.detach(), dtypes[2])
    (right,) = torch.autograd.grad(squared, value, grad.double())
    close(gpu_passes.squared_relu_backward(own[2], grad), right, dtypes[2], scale=2)


@pytest.mark.parametrize("dtypes", [[WIDE] * 4, [HALF] * 4, [WIDE, HALF, HALF, WIDE], [HALF, WIDE, HALF, HALF]])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 4100), (3, 16, 48)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_residual_sum_of_images_with_factors(shape, dtypes, gated, dropped):
    g = torch.Generator().manual_seed(shape[-1])
    own = [(torch.randn(shape, generator=g) * 5).to(DEVICE, dtype) for dtype in dtypes[:3]]
    factors = torch.randn(shape[0], generator=g).to(DEVICE, dtypes[3]) if dropped else None
    residual, receptance, value = (t.double().requires_grad_() for t in own)
    wide = None if factors is None else factors.double()
    exact = passes._residual_sum(residual, receptance if gated else None, value, wide)
    branch = torch.sigmoid(receptance) * value if gated else value
    by_hand = residual + (branch if wide is None else branch * wide.view(-1, *[1] * (len(shape) - 1)))
    torch.testing.assert_close(exact, by_hand)
    used = own if gated else (own[0], own[2])
    dtype = torch.promote_types(used[0].dtype, torch.promote_types(used[1].dtype, used[-1].dtype))
    actual = gpu_passes.residual_sum(own[0], own[1] if gated else None, own[2], factors)
    close(actual, exact.detach(), dtype)
    plain = passes._residual_sum(own[0], own[1] if gated else None, own[2], factors)
    assert (plain.dtype, plain.shape) == (dtype, actual.shape)
    grad = torch.randn(shape, generator=g).to(DEVICE, dtypes[0])
    if not gated and dropped:
        (right,) = torch.autograd.grad(exact, value, grad.double())
        close(gpu_passes.scaled(grad, factors, dtypes[2]), right, dtypes[2])
    if gated and dropped:
        found = gpu_passes.gate_backward(own[1], own[2], grad, factors)
        right = torch.autograd.grad(exact, (receptance, value), grad.double())
        for gradient, wanted, of in zip(found, right, dtypes[1:3], strict=True):
            close(gradient, wanted, of, scale=2)


@pytest.mark.parametrize("dtype", [WIDE, HALF])
@pytest.mark.parametrize("mixes", [0, 2, 4])
def test_norm_shift_backward_adds_another_gradient(dtype, mixes):
    tensors = shift_inputs(2, 5, 3, 24, mixes, dtype, WIDE)
    grad, residual = random_like(torch.empty(mixes, 2, 5, 3, 24)), random_like(tensors[0], WIDE, seed=2)
    alone, *others = gpu_passes.norm_shift_backward(*tensors[:3], 1e-5, tensors[3], grad)
    both, *same = gpu_passes.norm_shift_backward(*tensors[:3], 1e-5, tensors[3], grad, residual)
    close(both, alone.double() + residual.double(), dtype, scale=2)
    assert all(torch.equal(a, b) for a, b in zip(others, same, strict=True))


def test_extremes_and_nan():
    nan, inf = float("nan"), float("inf")
    receptance = torch.tensor([nan, 1e4, -1e4, inf, -inf, 45.0, -45.0], device=DEVICE)
    ones = torch.ones(7, device=DEVICE)
    torch.testing.assert_close(
        gpu_passes.gate(receptance, ones), torch.sigmoid(receptance), equal_nan=True, rtol=1e-6, atol=1e-18
    )
    torch.testing.assert_close(gpu_passes.squared_relu(receptance), torch.relu(receptance) ** 2, equal_nan=True)
    actual = gpu_passes.gate_backward(receptance, ones, ones)
    for a, b in zip(actual, passes._gate_backward(receptance, ones, ones), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-7)
    x = torch.zeros(1, 3, 3, 4, device=DEVICE)
    x[0, 1, 1, 2] = nan
    half = torch.full((1, 4), 0.5, device=DEVICE)
    out = gpu_passes.norm_shift(x, ones[:4], ones[:4], 1e-5, half, 0, 0)
    assert out[0, 0, 1, 1].isnan().all()
    assert not out[0, 0, 0, 0].isnan().any()


def test_results_are_bitwise_deterministic():
    tensors = shift_inputs(2, 21, 9, 48, 2, torch.float32)
    grad = random_like(torch.empty(2, 2, 21, 9, 48))
    first, second = (gpu_passes.norm_shift_backward(*tensors[:3], 1e-5, tensors[3], grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
def test_empty_inputs(shape):
    x, weight, bias, mixes = shift_inputs(*shape, 2, torch.float32)
    out = gpu_passes.norm_shift(x, weight, bias, 1e-5, mixes, 0, 0, torch.float16)
    assert (out.shape, out.dtype) == ((2, *shape), torch.float16)
    actual = gpu_passes.norm_shift_backward(x, weight, bias, 1e-5, mixes, out)
    assert [g.shape for g in actual] == [x.shape, weight.shape, bias.shape, mixes.shape]
    assert not any(g.any() for g in actual)
    assert gpu_passes.gated_sum(x, x, x).shape == shape
    factors = torch.ones(shape[0], device=DEVICE)
    assert gpu_passes.residual_sum(x, x, x, factors).shape == gpu_passes.scaled(x, factors, HALF).shape == shape
    assert [passes._scaled(x, factors, HALF).shape, passes._residual_sum(x, x, x, factors).shape] == [shape] * 2
    actual = gpu_passes.norm_shift_backward(x, weight, bias, 1e-5, mixes, out, x)
    assert actual[0].shape == shape
    gpu_passes.gated_sum_(x, x, x, torch.empty_like(x))


def test_no_output_rows_and_no_mixes():
    x, weight, bias, mixes = shift_inputs(2, 5, 3, 4, 2, torch.float32)
    assert gpu_passes.norm_shift(x, weight, bias, 1e-5, mixes, 2, 3).shape == (2, 2, 0, 3, 4)
    assert gpu_passes.norm_shift(x, weight, bias, 1e-5, mixes[:0], 0, 0).shape == (0, 2, 5, 3, 4)
    actual = gpu_passes.norm_shift_backward(x, weight, bias, 1e-5, mixes[:0], x[None][:0])
    assert not any(g.any() for g in actual)


def test_unsupported_inputs_use_the_plain_form(monkeypatch):
    monkeypatch.setattr(gpu_passes, "_kernels", None)
    tensors = shift_inputs(2, 5, 3, 4, 2, torch.float64)
    x, grad = tensors[0], torch.ones(2, 2, 5, 3, 4, dtype=torch.float64, device=DEVICE)
    out = gpu_passes.norm_shift(*tensors[:3], 1e-5, tensors[3], 1, 0)
    assert torch.equal(out, passes._norm_shift(*tensors[:3], 1e-5, tensors[3], 1, 0))
    actual = gpu_passes.norm_shift_backward(*tensors[:3], 1e-5, tensors[3], grad)
    right = passes._norm_shift_backward(*tensors[:3], 1e-5, tensors[3], grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, right, strict=True))
    with KernelsOnly():  # as in an autograd node, where autograd does not record
        below = gpu_passes.norm_shift_backward(*tensors[:3], 1e-5, tensors[3], grad)
    assert all(torch.equal(a, b) for a, b in zip(below, right, strict=True))
    norm = (x, *tensors[1:3], 1e-5)
    assert torch.equal(gpu_passes.layer_norm(*norm, torch.float64), passes._layer_norm(*norm, torch.float64))
    actual, right = (of(*norm, x) for of in (gpu_passes.layer_norm_backward, passes._layer_norm_backward))
    assert all(torch.equal(a, b) for a, b in zip(actual, right, strict=True))
    assert torch.equal(gpu_passes.gate(x, x), passes._gate(x, x))
    assert torch.equal(gpu_passes.gated_sum(x, x, x), passes._gated_sum(x, x, x))
    factors = x[:, 0, 0, 0]
    assert torch.equal(gpu_passes.residual_sum(x, x, x, factors), passes._residual_sum(x, x, x, factors))
    assert torch.equal(gpu_passes.scaled(x, factors, torch.float32), passes._scaled(x, factors, torch.float32))
    actual, right = (of(x, x, x, factors) for of in (gpu_passes.gate_backward, passes._gate_backward))
    assert all(torch.equal(a, b) for a, b in zip(actual, right, strict=True))
    assert torch.equal(gpu_passes.squared_relu(x), passes._squared_relu(x))
    assert torch.equal(gpu_passes.squared_relu_backward(x, x), passes._squared_relu_backward(x, x))
    monkeypatch.setattr(gpu_passes, "_MAX_CHANNELS", 3)
    wide = shift_inputs(2, 5, 3, 4, 2, torch.float32)
    assert gpu_passes.norm_shift(*wide[:3], 1e-5, wide[3], 0, 0, torch.bfloat16).dtype == torch.bfloat16
    actual = gpu_passes.norm_shift_backward(*wide[:3], 1e-5, wide[3], grad.bfloat16())
    assert [g.dtype for g in actual] == [torch.float32] * 4


def test_register_registers_cuda_kernels():
    names = [
        *("norm_shift", "norm_shift.dtype", "norm_shift_backward", "gate", "gate_backward", "gated_sum", "gated_sum_"),
        *("squared_relu", "squared_relu_backward"),
    ]
    with torch.library._scoped_library("sola_gpu_passes_test", "DEF") as defined:  # ONNX export reads all that remain
        for name in names:
            schema = str(torch._C._get_schema(f"sola::{name.partition('.')[0]}", name.partition(".")[2]))
            defined.define(schema.removeprefix("sola::"))
        gpu_passes.register(defined)
        for name in names:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sola_gpu_passes_test::{name}", "CUDA")


# the interpreter accepts code that the compiler rejects; Triton includes ptxas, so that compiling needs no device
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sola_vision.ops import gpu_passes, triton_passes as kernels

wide, half = "*fp32", "*bf16"
tile, shift_tile = gpu_passes._tile(96), gpu_passes._shift_grid(3136, 96, 2)[1]
flat = dict(BLOCK=gpu_passes._TILE_SIZE)
for name, types, constants in [
    ("statistics", [half, wide, "fp32", "i32"], dict(C=96, **tile)),
    ("layer_norm", [half, wide, wide, wide, "fp32", "i32"], dict(C=96, **tile)),
    ("layer_norm_backward", [half, wide, wide, half, wide, "fp32", "i32", "i32"], dict(C=96, **tile)),
    ("norm_shift", [wide, wide, wide, wide, wide, half, *["i32"] * 3], dict(C=96, M=3, **shift_tile)),
    (
        "norm_shift_backward",
        [wide, wide, wide, wide, half, wide, wide, wide, "fp32", *["i32"] * 4],
        dict(C=96, M=3, **tile, RESIDUAL=True),
    ),
    ("gate", [half, half, half, "i32"], flat),
    ("gate_backward", [half, half, wide, wide, half, half, "i64"], dict(**flat, SCALED=False)),
    ("gate_backward", [half, half, wide, wide, half, half, "i32"], dict(**flat, SCALED=True)),
    ("residual_sum", [wide, half, half, wide, wide, "i32"], dict(**flat, GATED=True, SCALED=True)),
    ("residual_sum", [wide, half, half, wide, wide, "i32"], dict(**flat, GATED=False, SCALED=False)),
    ("scaled", [wide, wide, half, "i32"], flat),
    ("squared_relu", [half, half, "i32"], flat),
    ("squared_relu_backward", [half, half, half, "i32"], flat),
]:
    kernel = getattr(kernels, name)
    backward = "norm" in name and "backward" in name
    options = gpu_passes._backward_options(constants["BLOCK"], constants["T"]) if backward else gpu_passes._OPTIONS
    signature = {arg: "constexpr" if arg in constants else types.pop(0) for arg in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    assert compiled.asm["cubin"]
    assert "atom" not in compiled.asm["ptx"]
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_device_and_use_no_atomics(capability, tmp_path):
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(script), str(capability)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("autocast", [pytest.param(x, marks=needs_device) for x in (False, True)])
@pytest.mark.parametrize("dim", [33, 96])
def test_a_layer_equals_its_portable_form_on_a_device(dim, autocast):
    torch.manual_seed(0)
    layer = LinearLayer(dim).to(DEVICE)
    x = torch.randn(2, 9, 7, dim, device=DEVICE)
    grad = torch.randn(x.shape, device=DEVICE)

    def run(path):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with ops.use(path), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out, _ = layer(leaf)
            with torch.no_grad():
                inference, _ = layer(x)
        out.backward(grad)
        return out.detach(), inference, leaf.grad, *(p.grad for p in layer.parameters())

    native, portable = run("native"), run("portable")
    for actual, right in zip(native, portable, strict=True):
        assert actual.dtype == right.dtype
        error = (actual.double() - right.double()).norm() / right.double().norm()
        assert error < (3e-2 if autocast else 1e-4), error


@pytest.mark.parametrize("operator", [pytest.param("operators", marks=needs_device)])
def test_operators_are_registered_correctly_on_a_device(operator):
    x, weight, bias, mixes = (t.requires_grad_() for t in shift_inputs(1, 4, 3, 8, 2, torch.float32))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    sola, half = torch.ops.sola, x.detach().bfloat16().requires_grad_()
    shift = (x, weight, bias, 1e-5, mixes, 1, 0)
    torch.library.opcheck(sola.norm_shift.default, shift, test_utils=tests)
    torch.library.opcheck(sola.norm_shift.dtype, (*shift, torch.bfloat16), test_utils=tests)
    torch.library.opcheck(sola.gate.default, (half, half * 2), test_utils=tests)
    torch.library.opcheck(sola.gated_sum.default, (x, half, half * 2), test_utils=tests)
    torch.library.opcheck(sola.squared_relu.default, (half,), test_utils=tests)
