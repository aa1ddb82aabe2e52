# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel against the definition: every instruction set of this machine, odd shapes, extreme values."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sola_vision import ops
from sola_vision.ops import cpu, portable, reference

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("cpu_driver.cpp")
SETS = ("generic", "avx2", "avx512", "avx512_bf16")
KERNELS = ("wkv", "passes", "attention", "attention_backward", "linear", "linear_backward")

reason = cpu.load()
pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(params=SETS)
def instruction_set(request, switch):
    return switch(request.param)


def inputs(
    batch, num_tokens, channels, *, decay=(-20, 200), bonus=(-10, 10), key=(-50, 50), dtype=torch.float32, seed=0
):
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *size):
        return torch.rand(*size, generator=g) * (high - low) + low

    size = (batch, num_tokens, channels)
    value, grad = torch.randn(size, generator=g).to(dtype), torch.randn(size, generator=g).to(dtype)
    return uniform(*decay, channels), uniform(*bonus, channels), uniform(*key, *size).to(dtype), value, grad


def kernel(decay, bonus, key, value, grad):
    out, states = torch.ops.sola.wkv_with_states(decay, bonus, key, value)
    inferred = torch.ops.sola.wkv(decay, bonus, key, value)
    torch.testing.assert_close(inferred, out, rtol=0, atol=0, equal_nan=True)
    return out, torch.ops.sola.wkv_backward(decay, bonus, key, value, states, grad)


def truth(decay, bonus, key, value, grad):
    """In float64; from the definition if N^2 is small, else from the portable form, which is tested against it."""
    leaves = [x.double().requires_grad_() for x in (decay, bonus, key, value)]
    if key.shape[1] > 512:
        leaves = [x.detach() for x in leaves]
        return portable.wkv(*leaves), portable.wkv_backward(*leaves, grad.double())
    out = reference.wkv(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad.double())


def check(case, forward=5e-6, backward=1e-5):
    out, grads = kernel(*case)
    expected, expected_grads = truth(*case)
    value, grad = case[3].double().abs().max(), case[4].double().abs().max()
    assert out.dtype == case[3].dtype
    assert (out.double() - expected).abs().max() <= forward * value
    for got, want, like in zip(grads, expected_grads, case[:4], strict=True):
        assert got.dtype == like.dtype
        assert (got.double() - want).abs().max() <= backward * max(want.abs().max(), 0.1 * value * grad)


@needs_kernel
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 49, 196, 197, 513])
@pytest.mark.parametrize(("batch", "channels"), [(2, 1), (1, 3), (2, 33), (1, 16), (1, 96)])
@pytest.mark.parametrize("key", [3, 50])
def test_kernel_equals_definition(instruction_set, batch, num_tokens, channels, key):
    check(inputs(batch, num_tokens, channels, key=(-key, key)))


@needs_kernel
@pytest.mark.parametrize("key", [4, 44, 50])
def test_kernel_is_accurate_over_long_rows(instruction_set, key):
    check(inputs(1, 3136, 17, key=(-key, key)))
    # equal keys and constant values: rounding errors of the same sign would accumulate here
    decay, bonus, key, value, grad = inputs(1, 3136, 3, decay=(-1, 1), bonus=(-1, 1), key=(0.1, 0.1))
    value[:], grad[:] = 0.7, 0.3
    value[:, 1000:] = -0.6
    check((decay, bonus, key, value, grad))


@needs_kernel
@pytest.mark.slow
def test_kernel_is_accurate_over_the_longest_rows(instruction_set):
    check(inputs(1, 65536, 5, key=(-40, 40)))
    check(inputs(1, 65536, 5))


EXTREME = {
    "decay": {"decay": (1e6, 1e6)},
    "growth": {"decay": (-1e6, -1e6)},
    "only neighbours": {"decay": (1e30, 1e30)},
    "bonus": {"bonus": (1e4, 1e4)},
    "no bonus": {"bonus": (-1e4, -1e4)},
    "keys": {"key": (-1e4, 1e4)},
    "high keys": {"key": (9e3, 9e3 + 5)},
    "between the bounds": {"decay": (4000, 6000), "key": (-44, 44)},
    "just inside": {"decay": (-20, -20), "bonus": (20, 20), "key": (43, 43.9)},
    "just inside, low": {"decay": (-20, -20), "bonus": (-20, -20), "key": (-44, -43)},
}


@needs_kernel
@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("num_tokens", [1, 2, 50, 131])
def test_kernel_is_correct_for_extreme_parameters(instruction_set, case, num_tokens):
    check(inputs(2, num_tokens, 19, **EXTREME[case]))


@needs_kernel
@pytest.mark.parametrize("num_tokens", [2, 131])
def test_kernel_clamps_decays_like_the_portable_form(instruction_set, num_tokens):
    """Steps of 1e28 would absorb the keys completely, as in the definition; both clamp them."""
    case = inputs(2, num_tokens, 19, decay=(-1e30, 1e30), key=(-1e4, 1e4))
    wide = [x.double() for x in case]
    out, grads = kernel(*case)
    expected = portable.wkv(*wide[:4]), *portable.wkv_backward(*wide)
    for got, want in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))


@needs_kernel
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("which", ["value", "grad"])
@pytest.mark.parametrize("key", [3, 44])
def test_kernel_is_correct_at_every_scale(instruction_set, scale, which, key):
    decay, bonus, key, value, grad = inputs(1, 70, 18, key=(-key, key))
    value, grad = (value * scale, grad) if which == "value" else (value, grad * scale)
    # at 1e-42 float32 has only three digits
    check((decay, bonus, key, value, grad), *((2e-2, 2e-2) if scale == 1e-42 else (5e-6, 1e-5)))


@needs_kernel
def test_one_channel_out_of_range_does_not_affect_the_others(instruction_set):
    decay, bonus, key, value, grad = inputs(2, 100, 40, key=(-3, 3))
    key[1, 50, 7], value[0, 3, 39] = 1e4, 1e7
    check((decay, bonus, key, value, grad))
    value[0, 3, 39] = 1.0
    check((decay, bonus, key, value, grad), forward=1e-6)


@needs_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [2, 3, 4])
def test_non_finite_values_stay_in_their_channel(instruction_set, bad, which):
    case = inputs(2, 65, 21, key=(-3, 3))
    case[which][1, 40, 5] = bad
    out, (_, _, grad_key, grad_value) = kernel(*case)
    others = torch.arange(21) != 5
    assert out[:, :, others].isfinite().all()
    assert out[0].isfinite().all()
    assert grad_key[:, :, others].isfinite().all()
    masked = which == 2 and bad == float("-inf")  # a token with zero weight, whose output is the mean of the others
    assert out[1, :, 5].isfinite().all() == (masked or which == 4)
    assert grad_value[1, :, 5].isfinite().all() == (masked or which == 3)
    if masked:
        expected, _ = truth(*case)
        assert (out - expected).abs().max() <= 5e-6 * case[3].abs().max()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(2, 1, 3), (1, 197, 33), (2, 300, 48)])
def test_half_precision_adds_little_to_rounding(instruction_set, dtype, size):
    decay, bonus, key, value, grad = inputs(*size, decay=(-2, 20), bonus=(-3, 3), key=(-4, 4))
    exact, _ = truth(decay, bonus, key, value, grad)
    rounded = [x.to(dtype) for x in (key, value, grad)]
    rounding, rounding_grads = truth(decay, bonus, *rounded)
    out, grads = kernel(decay, bonus, *rounded)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 1.5 * (rounding.to(dtype).double() - exact).abs().max()
    for got, want in zip(grads, rounding_grads, strict=True):
        assert (got.double() - want).abs().max() <= torch.finfo(got.dtype).eps * want.abs().max() + 1e-6


@needs_kernel
def test_float16_covers_its_whole_range(instruction_set):
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    value = bits[bits.isfinite()].view(1, 1, -1)
    zero = torch.zeros(value.shape[2])
    out = torch.ops.sola.wkv(zero, zero, torch.zeros_like(value), value)
    assert torch.equal(out, value)  # one token returns its own value


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_may_have_any_dtype(dtype):
    decay, bonus, key, value, grad = inputs(1, 40, 6, key=(-3, 3))
    check((decay.to(dtype), bonus.to(dtype), key, value, grad), backward=1e-5 + torch.finfo(dtype).eps)


@needs_kernel
def test_float64_is_computed_in_float64(instruction_set):
    case = [x.double() for x in inputs(2, 150, 11)]
    check(case, forward=1e-12, backward=1e-11)


@needs_kernel
def test_strides_do_not_matter():
    decay, bonus, key, value, grad = inputs(2, 70, 24, key=(-3, 3))
    expected = kernel(decay, bonus, key, value, grad)
    packed = torch.cat((key, value, grad), dim=2)
    views = [x.clone().transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value, grad)]
    wide = [torch.stack((x, x), dim=1)[:, 0] for x in (decay, bonus)]
    for given in (
        packed.split(24, dim=2),
        views,
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (key, value, grad)],
    ):
        out, grads = kernel(*wide, *given)
        assert out.is_contiguous()
        for got, want in zip((out, *grads), (expected[0], *expected[1]), strict=True):
            assert torch.equal(got, want)
    constant = torch.ones(()).expand(2, 70, 24)  # the gradient of sum().backward()
    _, got = kernel(decay, bonus, key, value, constant)
    _, want = kernel(decay, bonus, key, value, constant.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    _, states = torch.ops.sola.wkv_with_states(decay, bonus, key, value)
    given = states.transpose(1, 3).contiguous().transpose(1, 3)
    actual = torch.ops.sola.wkv_backward(decay, bonus, key, value, given, grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected[1], strict=True))


@needs_kernel
@pytest.mark.parametrize("size", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_inputs(size):
    decay, bonus, key, value, grad = inputs(*size)
    out, grads = kernel(decay, bonus, key, value, grad)
    assert out.shape == size
    assert [x.shape for x in grads] == [decay.shape, bonus.shape, key.shape, value.shape]
    assert all((x == 0).all() for x in grads)


@needs_kernel
@pytest.mark.parametrize(
    "size", [(1, 700, 5), (3, 257, 40), (1, 1500, 16), (1, 2200, 100), (1, 800, 200), (1, 1900, 70)]
)
@pytest.mark.parametrize("key", [3, 60])
def test_bits_do_not_depend_on_the_number_of_threads(instruction_set, size, key):
    case = inputs(*size, key=(-key, key))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            out, grads = kernel(*case)
            results.append((out, *grads))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_kernel
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_without_weights_is_nan(instruction_set, num_tokens, dtype):
    decay, bonus, key, value, grad = inputs(2, num_tokens, 5, key=(-3, 3), dtype=dtype)
    key[0, :, 2] = -torch.inf
    out, (*_, grad_key, grad_value) = kernel(decay, bonus, key, value, grad)
    for x in (out, grad_key, grad_value):
        assert x[0, :, 2].isnan().all()
        x[0, :, 2] = 0
        assert x.isfinite().all()


@needs_kernel
def test_the_gradient_of_a_decay_that_leaves_only_neighbours(instruction_set):
    """With a third token between a heavy and a light one, the factor of lam is outside the range of float32."""
    g = torch.Generator().manual_seed(0)
    for num_tokens, step in ((3, 79.0), (3, 141.0), (25, 79.0), (32, 79.0), (40, 141.0)):
        decay = torch.full((5,), step * num_tokens)
        key = (torch.rand(1, num_tokens, 5, generator=g).round() * 2 - 1) * 43.5
        value, grad = (torch.randn(1, num_tokens, 5, generator=g) * 300 for _ in range(2))
        check((decay, torch.zeros(5), key, value, grad))


@needs_kernel
def test_gradients_that_overflow_with_large_values(instruction_set):
    """h = g / D is in the range of float32, h y is not."""
    tensors = (torch.zeros(1), torch.full((1,), -20.0), torch.full((1, 3, 1), -44.0))
    value, grad = torch.tensor([1000.0, 900.0, 1000.0]).view(1, 3, 1), torch.full((1, 3, 1), 1e17)
    _, actual = kernel(*tensors, value, grad)
    _, exact = kernel(*(x.double() for x in (*tensors, value, grad)))
    for got, right in zip(actual, exact, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e13)


@needs_kernel
def test_conversions_in_hardware_round_as_those_in_software(switch):
    case = inputs(2, 130, 33, bonus=(-3, 3), key=(-3, 3), dtype=torch.bfloat16)
    found = []
    for name in ("avx512", "avx512_bf16"):
        switch(name)
        out, grads = kernel(*case)
        found.append((out, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernel
def test_instruction_sets_agree():
    before, case = cpu.instruction_set(), inputs(2, 130, 20, key=(-3, 3))
    results = []
    for name in SETS:
        try:
            cpu.instruction_set(name)
        except ValueError:
            continue
        results.append(torch.ops.sola.wkv(*case[:4]))
    cpu.instruction_set(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=3e-6)
    with pytest.raises(ValueError, match="sse9"):
        cpu.instruction_set("sse9")


@needs_kernel
def test_invalid_tensors_raise():
    decay, bonus, key, value, grad = inputs(1, 4, 6)
    forward, backward = torch.ops.sola.wkv, torch.ops.sola.wkv_backward
    for wrong, message in (
        ((decay, bonus, key[0], value), r"key is \[4, 6\], expected \[batch, tokens, channels\]"),
        ((decay[:5], bonus, key, value), r"decay is \[5\]"),
        ((decay, bonus[None], key, value), r"bonus is \[1, 6\]"),
        ((decay, bonus, key, value[:, :3]), r"value is \[1, 3, 6\]"),
        ((decay, bonus, key.int(), value), "key must be float64, float32, bfloat16 or float16"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            forward(*wrong)
    _, states = torch.ops.sola.wkv_with_states(decay, bonus, key, value)
    with pytest.raises((ValueError, RuntimeError), match=r"grad is \[1, 3, 6\]"):
        backward(decay, bonus, key, value, states, grad[:, :3])
    with pytest.raises((ValueError, RuntimeError), match=r"states is \[1, 0, 4, 6\], expected .* \[1, 1, 4, 6\]"):
        backward(decay, bonus, key, value, states[:, :0], grad)
    with pytest.raises((ValueError, RuntimeError), match="states must be float32"):
        backward(decay, bonus, key, value, states.double(), grad)
    torch.testing.assert_close(forward(decay, bonus, key, value), truth(decay, bonus, key, value, grad)[0].float())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    decay, bonus, key, value, grad = inputs(2, 37, 5, key=(-3, 3), dtype=dtype)
    leaves = [x.requires_grad_() for x in (decay, bonus, key, value)]
    torch.library.opcheck(torch.ops.sola.wkv.default, tuple(leaves))
    plain = tuple(x.detach() for x in leaves)
    _, states = torch.ops.sola.wkv_with_states(*plain)
    torch.library.opcheck(torch.ops.sola.wkv_backward.default, (*plain, states, grad))
    # registers computed by the robust path have NaN states, which compare unequal
    calm = (decay / 10, bonus, key, value)
    torch.library.opcheck(torch.ops.sola.wkv_with_states.default, tuple(x.detach().requires_grad_() for x in calm))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(2, 1, 3), (1, 33, 16), (2, 197, 33)])
def test_states_are_the_scans_at_the_chunk_boundaries(instruction_set, size, dtype):
    decay, bonus, key, value, _ = inputs(*size, decay=(-2, 40), bonus=(-1, 1), key=(-3, 3), dtype=dtype)
    out, states = torch.ops.sola.wkv_with_states(decay, bonus, key, value)
    assert torch.equal(out, torch.ops.sola.wkv(decay, bonus, key, value))
    batch, num_tokens, channels = size
    assert states.shape == (batch, -(-num_tokens // 32), 4, channels)
    weight = key.double().exp()
    position = torch.arange(num_tokens)
    for chunk, actual in enumerate(states.double().unbind(1)):
        first, last = 32 * chunk, min(32 * (chunk + 1), num_tokens) - 1
        for side, distance in enumerate((first - 1 - position, position - last - 1)):
            seen = torch.exp(-distance[:, None] * decay.double() / num_tokens) * (distance >= 0)[:, None]
            expected = torch.stack(((seen * weight * value).sum(1), (seen * weight).sum(1)), dim=1)
            size_of = (seen * weight * value.abs()).sum(1).max()
            torch.testing.assert_close(actual[:, 2 * side : 2 * side + 2], expected, rtol=2e-5, atol=2e-5 * size_of)


@needs_kernel
@pytest.mark.parametrize("forward", [*SETS, "portable"])
def test_a_backward_accepts_states_of_another_path(instruction_set, switch, forward):
    """Instruction sets differ in register width, and a channel on the robust path takes its whole register along; the
    portable form has no states.
    """
    case = inputs(2, 70, 40, decay=(-2, 40), bonus=(-1, 1), key=(-3, 3))
    case[0][5], case[2][1, 3, 20], case[3][0, 60, 33] = -1e4, 300.0, 1e6
    if forward == "portable":
        _, states = torch.ops.sola.wkv_portable_with_states(*case[:4])
    else:
        switch(forward)
        _, states = torch.ops.sola.wkv_with_states(*case[:4])
    switch(instruction_set)
    actual = torch.ops.sola.wkv_backward(*case[:4], states, case[4])
    for got, want in zip(actual, truth(*case)[1], strict=True):
        scale = want.abs().amax(tuple(range(want.ndim - 1)))  # of a channel
        torch.testing.assert_close(got.double() / (1 + scale), want / (1 + scale), rtol=0, atol=1e-5)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function._schema.name)
        return function(*arguments, **(options or {}))


def test_states_are_saved_only_if_gradients_are_required():
    decay, bonus, key, value, _ = inputs(1, 40, 6, key=(-3, 3))
    with _Operators() as seen:
        ops.wkv(decay, bonus, key, value)
    assert "sola::wkv" in seen.names
    assert "sola::wkv_with_states" not in seen.names
    with _Operators() as seen:
        ops.wkv(decay, bonus, key, value.requires_grad_()).sum().backward()
    assert "sola::wkv" not in seen.names
    assert seen.names.count("sola::wkv_with_states") == seen.names.count("sola::wkv_backward") == 1
    assert not any("zeros" in name for name in seen.names)  # gradients of the states


@needs_kernel
def test_the_floating_point_mode_is_restored():
    case = inputs(1, 64, 16, key=(-3, 3))
    kernel(*case)
    tiny = torch.tensor(1e-40)
    assert (tiny * 0.5).item() > 0.0
    if torch.set_flush_denormal(True):
        try:
            kernel(*case)
            assert (tiny * 0.5).item() == 0.0
        finally:
            torch.set_flush_denormal(False)


@needs_kernel
def test_the_library_works_without_the_package():
    """As in a program that runs an exported graph without Python, the library defines the operators itself."""
    code = (
        "import ctypes, torch; library = ctypes.CDLL({!r}); assert library.sola_load(1) == 0;"
        "x = torch.ones(1, 3, 4); z = torch.zeros(4); assert torch.equal(torch.ops.sola.wkv(z, z, x, x), x)"
    ).format(str(Path(cpu.__file__).with_name("_kernel.so")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SHORT_OF_MEMORY = """
import resource, sys, torch
from sola_vision import ops
torch.set_num_threads(int(sys.argv[1]))
key, zero = torch.ones(1, 4 << 20, 1), torch.zeros(1)  # a register with one channel: scratch exceeds the result
few = key[:, :3]
ops.wkv(zero, zero, few, few)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (40 << 20), resource.RLIM_INFINITY))
try:
    ops.wkv(zero, zero, key, key)
except RuntimeError as error:
    print(error)
assert torch.equal(ops.wkv(zero, zero, few, few), few)
"""


@needs_kernel
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read the size of the process")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer reserves the address space")
@pytest.mark.parametrize("threads", [1, 2])
def test_running_out_of_memory_is_an_error_of_the_call(threads):
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sola: could not allocate " in done.stdout


def build(folder, **environment):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_a_missing_compiler_is_an_error_only_if_the_kernel_is_required(tmp_path):
    pytest.importorskip("setuptools")
    tolerant = build(tmp_path, CXX="/bin/false", SOLA_REQUIRE_KERNEL="0")
    assert tolerant.returncode == 0, tolerant.stderr
    assert "without the CPU kernel" in tolerant.stdout + tolerant.stderr
    assert not list(tmp_path.rglob("*.so"))
    assert build(tmp_path, CXX="/bin/false", SOLA_REQUIRE_KERNEL="1").returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-mavx2 -mfma -mf16c", "native", ""])
def test_sanitizers_report_no_errors(tmp_path, flags):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = str(tmp_path / "driver")
    options = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-ffp-contract=fast",
    ]
    # the driver is built for one instruction set; products in bfloat16 need a second one
    native = ["-march=native", "-mno-avx512bf16", "-mno-amx-tile", "-mno-amx-bf16"]
    options += native if flags == "native" else flags.split()
    kernels = [str(ROOT / f"csrc/{name}.cpp") for name in KERNELS]
    options += ["-DSOLA_ISA=generic", "-w", "-I", str(ROOT / "csrc")]
    subprocess.run([compiler, *options, *kernels, str(DRIVER), "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cases" in done.stdout
