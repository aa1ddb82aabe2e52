# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the definition: values, gradients, extremes, chunking, contract.

Without a CUDA device Triton's interpreter runs them on the CPU, one operation at a time: the default sizes are small.
With a device the same tests run on it and carry the mark `gpu`, like those that need a device at all.
"""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sola_vision.ops import gpu, portable, reference

pytest.importorskip("triton")
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_device = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

# triton.jit reads the variable at decoration; it must not be set for other modules of this process
with pytest.MonkeyPatch.context() as patch:
    if INTERPRETED:
        patch.setenv("TRITON_INTERPRET", "1")
    from sola_vision.ops import triton_kernels

pytestmark += [pytest.mark.usefixtures("kernels_scratch")]


def random_inputs(batch, num_tokens, channels, dtype=torch.float32, seed=0, calm=False):
    """Inputs in the ranges of the accuracy measure, or of a trained network (calm), where chunks are narrow."""
    g = torch.Generator().manual_seed(seed)
    size = (batch, num_tokens, channels)
    decay = torch.rand(channels, generator=g, dtype=torch.float64) * 220 - 20
    bonus = torch.rand(channels, generator=g, dtype=torch.float64) * 20 - 10
    key = (torch.rand(size, generator=g, dtype=torch.float64) * 2 - 1) * 50
    value, grad = (torch.randn(size, generator=g, dtype=torch.float64) for _ in range(2))
    if calm:
        decay, bonus, key = decay.clamp(max=0.3 * num_tokens) / 2, bonus / 2, key / 10
    small = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return tuple(
        x.to(y).to(DEVICE) for x, y in zip((decay, bonus, key, value, grad), (small,) * 2 + (dtype,) * 3, strict=True)
    )


def truth(decay, bonus, key, value, grad):
    leaves = [x.double().requires_grad_() for x in (decay, bonus, key, value)]
    out = reference.wkv(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad.double())


def run(decay, bonus, key, value, grad):
    _, states = gpu.wkv_with_states(decay, bonus, key, value)
    return gpu.wkv(decay, bonus, key, value), gpu.wkv_backward(decay, bonus, key, value, states, grad)


def gradient_error(got, expected, value, grad):
    floor = 0.1 * grad.double().abs().max() * value.double().abs().max()
    return ((got.double() - expected).abs().max() / torch.maximum(expected.abs().max(), floor)).item()


def stored(x, dtype):
    """x as a kernel stores it: rounded, except that Triton's interpreter truncates bfloat16."""
    if INTERPRETED and dtype == torch.bfloat16:
        return (x.float().view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def check(inputs, out, grads):
    value, grad = inputs[3:]
    expected, expected_grads = truth(*inputs)
    assert (out.double() - expected).abs().max() <= 5e-6 * value.double().abs().max()
    for name, like, got, want in zip("wukv", inputs, grads, expected_grads, strict=False):
        assert got.dtype == like.dtype
        assert got.shape == like.shape
        assert gradient_error(got, want, value, grad) <= 1e-5, name


@pytest.mark.parametrize(
    ("size", "calm"),
    [
        ((2, 1, 1), False),
        ((1, 2, 33), False),
        ((1, 31, 96), False),
        ((1, 33, 1), False),
        ((1, 49, 96), False),
        ((2, 17, 33), True),
        ((18, 2, 3), False),
        ((1, 197, 33), True),
        pytest.param((1, 197, 96), False, marks=pytest.mark.slow),
        pytest.param((2, 300, 33), False, marks=pytest.mark.slow),
        pytest.param((1, 300, 1), True, marks=pytest.mark.slow),
        pytest.param((1, 3136, 5), False, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_gpu_equals_the_definition_in_float32(size, calm):
    inputs = random_inputs(*size, calm=calm)
    check(inputs, *run(*inputs))


@pytest.mark.parametrize(
    ("size", "calm"), [((2, 1, 1), False), ((1, 31, 96), False), ((2, 17, 33), True), ((1, 49, 33), False)]
)
def test_gpu_computes_the_same_with_states(size, calm):
    inputs = random_inputs(*size, calm=calm)
    out, states = gpu.wkv_with_states(*inputs[:4])
    assert (out.double() - truth(*inputs)[0]).abs().max() <= 5e-6 * inputs[3].double().abs().max()
    assert states.shape == (gpu.states_size(*size),)
    with FakeTensorMode() as mode:  # as in a compiler, on a GPU
        fakes = [mode.from_tensor(x).to("cuda") for x in inputs[:4]]
        fake_out, fake_states = torch.ops.sola.wkv_with_states(*fakes)
    assert (fake_out.shape, fake_states.shape) == (out.shape, states.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_in_half_precision_adds_little_to_rounding(dtype):
    decay, bonus, key, value, grad = random_inputs(1, 49, 9, torch.float64, calm=True)
    rounded = [x.to(dtype) for x in (key, value, grad)]
    out, grads = run(decay.float(), bonus.float(), *rounded)
    assert out.dtype == grads[2].dtype == grads[3].dtype == dtype
    assert grads[0].dtype == grads[1].dtype == torch.float32
    exact, exact_grads = truth(decay, bonus, key, value, grad)
    only_rounding, rounding_grads = truth(decay, bonus, *rounded)
    pairs = zip((out, *grads), (exact, *exact_grads), (only_rounding, *rounding_grads), strict=True)
    for got, want, from_rounded in pairs:
        budget = (stored(from_rounded, got.dtype).double() - want).abs().max()
        assert (got.double() - want).abs().max() <= 1.5 * budget


@pytest.mark.parametrize("num_tokens", [1, 2, 50, pytest.param(131, marks=pytest.mark.slow)])
def test_gpu_is_correct_at_extremes(num_tokens):
    # decay, bonus, range of the keys: three channels each
    cases = [
        (1e6, 0.0, 1.0),
        (-1e6, 0.0, 1.0),
        (1e9, 1.0, 1.0),
        (-1e9, 1.0, 1.0),
        (5.0, 1e4, 1.0),
        (5.0, -1e4, 1.0),
        (5.0, 0.0, 1e4),
        (1e6, 1e4, 1e4),
        (-300.0, -300.0, 300.0),
    ]
    decay, bonus, scale = torch.tensor(cases).repeat_interleave(3, 0).to(DEVICE).unbind(1)
    _, _, key, value, grad = random_inputs(1, num_tokens, len(decay))
    inputs = (decay, bonus, key / 50 * scale, value, grad)
    out, grads = run(*inputs)
    assert all(torch.isfinite(x).all() for x in (out, *grads))
    for c in range(0, len(decay), 3):
        pick = slice(c, c + 3)
        some = tuple(x[..., pick] for x in inputs)
        check(some, out[..., pick], [x[..., pick] for x in grads])


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("size", [1e7, -1e7])
def test_gpu_with_keys_beyond_the_limit(num_tokens, size):
    decay, bonus, key, value, grad = random_inputs(1, num_tokens, 3, calm=True)
    inputs = (decay, bonus, torch.full_like(key, size), value, grad)
    check(inputs, *run(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gpu_does_not_depend_on_the_default_dtype(dtype):
    inputs = random_inputs(2, 40, 5)
    expected = run(*inputs)
    torch.set_default_dtype(dtype)
    try:
        actual = run(*inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(actual[1], expected[1], strict=True))


def test_gpu_chooses_the_path_chunk_by_chunk():
    """One outlier makes its chunk wide; its narrow neighbours receive states far above and below their own keys."""
    decay, bonus, key, value, grad = random_inputs(1, 100, 4, calm=True)
    key[0, 40] = torch.tensor([90.0, -90.0, 900.0, -900.0])
    inputs = (decay, bonus, key, value, grad)
    check(inputs, *run(*inputs))


def test_gpu_a_constant_added_to_all_keys_changes_nothing():
    """Also if a wide chunk, which has one exponent per token, has narrow neighbours."""
    decay, bonus, key, value, grad = random_inputs(1, 100, 4, calm=True)
    key = (key * 2**10).round() / 2**10  # exact in float32 with the constant, too
    key[0, 40] = torch.tensor([6.0, 12.0, -24.0, -30.0])
    out, grads = run(decay, bonus, key, value, grad)
    far_out, far_grads = run(decay, bonus, key + 2**12, value, grad)
    assert (far_out - out).abs().max() <= 1e-6 * value.abs().max()
    for a, b in zip(grads, far_grads, strict=True):
        assert gradient_error(a, b.double(), value, grad) <= 2e-6


def test_gpu_narrow_and_wide_agree(monkeypatch):
    inputs = random_inputs(1, 40, 6, calm=True)
    narrow = run(*inputs)
    if INTERPRETED:  # in a compiled kernel the limit is a constant
        monkeypatch.setattr(triton_kernels.scans, "NARROW", triton_kernels.tl.constexpr(-1.0))
    wide = run(*inputs)
    torch.testing.assert_close(narrow[0], wide[0], rtol=0, atol=2e-6)
    for a, b in zip(narrow[1], wide[1], strict=True):
        assert gradient_error(a, b.double(), inputs[3], inputs[4]) <= 5e-6


@pytest.mark.parametrize("calm", [True, False])
def test_gpu_scans_long_rows_in_groups(monkeypatch, calm):
    monkeypatch.setattr(gpu, "_FORWARD_CHUNK", 2)
    monkeypatch.setattr(gpu, "_BACKWARD_CHUNK", 2)
    monkeypatch.setattr(gpu, "_LONG", 4)
    monkeypatch.setattr(gpu, "_GROUP", 3)
    inputs = random_inputs(1, 27, 5, calm=calm)
    check(inputs, *run(*inputs))


def test_gpu_is_bitwise_deterministic():
    inputs = random_inputs(2, 9, 7)
    (out, grads), (out2, grads2) = run(*inputs), run(*inputs)
    assert torch.equal(out, out2)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True))


def test_gpu_does_not_depend_on_memory_layout():
    decay, bonus, key, value, grad = random_inputs(2, 9, 6)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value, grad)]
    for got, want in zip(run(decay, bonus, *strided)[1], run(decay, bonus, key, value, grad)[1], strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, want)


def test_gpu_with_a_key_and_a_value_of_different_dtypes():
    decay, bonus, key, value, grad = random_inputs(1, 9, 3, calm=True)
    inputs = (decay.half(), bonus.double(), key.bfloat16(), value, grad)
    check_dtypes = [x.dtype for x in run(*inputs)[1]]
    assert check_dtypes == [torch.float16, torch.float64, torch.bfloat16, torch.float32]
    expected, _ = truth(*inputs)
    torch.testing.assert_close(gpu.wkv(*inputs[:4]).double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_gpu_with_empty_inputs(shape):
    decay, bonus = torch.ones(2, shape[2], device=DEVICE)
    nothing = torch.ones(shape, device=DEVICE)
    out, grads = run(decay, bonus, nothing, nothing, nothing)
    assert [x.shape for x in (out, *grads)] == [shape, decay.shape, bonus.shape, shape, shape]
    assert not grads[0].any()
    assert not grads[1].any()


def test_gpu_falls_back_to_the_portable_form_in_float64():
    inputs = random_inputs(1, 12, 3, torch.float64)
    out, grads = run(*inputs)
    assert torch.equal(out, portable.wkv(*inputs[:4]))
    for got, want in zip(grads, portable.wkv_backward(*inputs), strict=True):
        assert torch.equal(got, want)


def test_gpu_nan_in_a_key_stays_in_its_row():
    decay, bonus, key, value, _ = random_inputs(2, 20, 3, calm=True)
    key[1, 7, 2] = float("nan")
    out = gpu.wkv(decay, bonus, key, value)
    assert out[1, :, 2].isnan().all()
    assert out.isnan().sum() == 20


def test_register_registers_cuda_kernels():
    results = "(Tensor, Tensor, Tensor, Tensor)"
    with torch.library._scoped_library("sola_gpu_test", "DEF") as library:  # ONNX export reads all that remain
        library.define("wkv(Tensor decay, Tensor bonus, Tensor key, Tensor value) -> Tensor")
        library.define("wkv_with_states(Tensor decay, Tensor bonus, Tensor key, Tensor value) -> (Tensor, Tensor)")
        library.define(f"wkv_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor s, Tensor g) -> {results}")
        gpu.register(library)
        for name in ("wkv", "wkv_with_states", "wkv_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sola_gpu_test::{name}", "CUDA")


def test_the_package_works_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sola_vision.ops import gpu, wkv\n"
        "gpu.register(torch.library.Library('sola_without_triton', 'DEF'))\n"
        "wkv(torch.ones(3), torch.ones(3), torch.ones(1, 4, 3), torch.ones(1, 4, 3))\n"
        "print(gpu.missing())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Triton is not installed" in done.stdout


# the interpreter accepts code that the compiler rejects; Triton includes ptxas, so that compiling needs no device
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sola_vision.ops import gpu, triton_kernels as kernels

capability, half = int(sys.argv[1]), "*bf16"
flags = dict(C=96, BLOCK=32, MASKED=False)
state, step = "*fp32", "*fp32"
for name, types, options in [
    ("chunk_sums", ["*fp32", half, half, step, state], dict(L=32)),
    ("chunk_sums", ["*fp32", half, half, step, state], dict(L=32, MASKED=True)),
    ("chunk_sums", ["*fp32", half, half, step, state], dict(L=16, MASKED=True)),
    ("scan_states", ["*fp32", *[state] * 3, *["i32"] * 3], dict(CARRY=False, TOTALS=False, BY_B=True, AHEAD=16)),
    ("scan_states", ["*fp32", *[state] * 3, *["i32"] * 3], dict(CARRY=True, TOTALS=True, BY_B=False, AHEAD=16)),
    ("outputs", [step, "*fp32", half, half, half, state], dict(L=32)),
    ("outputs", [step, "*fp32", half, half, half, state], dict(L=16)),
    ("backward", [step, "*fp32", *[half] * 5, "*fp32", state, state], dict(L=16, WRITE=False)),
    ("backward", [step, "*fp32", *[half] * 5, "*fp32", state, state], dict(L=16, WRITE=True, MASKED=True)),
    ("sum_partials", ["*fp32", "*fp64"], dict(AHEAD=16)),
]:
    kernel = getattr(kernels, name)
    constants = {k: v for k, v in {**flags, **options}.items() if k in kernel.arg_names}
    types = [*types, *["i32"] * 3]
    signature = {arg: "constexpr" if arg in constants else types.pop(0) for arg in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=gpu._OPTIONS)
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


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=needs_device)])
def test_gpu_in_a_cuda_graph(dtype):
    inputs = random_inputs(2, 300, 96, dtype, calm=True)
    expected = run(*inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = run(*inputs)
    for x in (out, *grads):
        x.zero_()
    graph.replay()
    assert torch.equal(out, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))
