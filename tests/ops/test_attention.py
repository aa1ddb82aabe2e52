# SPDX-License-Identifier: Apache-2.0
"""Softmax attention's kernel against torch's in float64: every instruction set, dtype, odd shapes, extreme values."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sola_vision import ops
from sola_vision.layers import SoftmaxMixer
from sola_vision.ops import cpu, multihead, softmax

reason = cpu.load()
pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
# batch, tokens, heads, head_dim
SHAPES = [
    (1, 1, 1, 1),
    (2, 2, 3, 33),
    (2, 49, 3, 32),
    (1, 64, 2, 64),
    (1, 65, 2, 16),
    (1, 197, 2, 33),
    (3, 31, 1, 5),
    (1, 600, 1, 32),
]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=["default", "generic", "avx2", "avx512", "avx512_bf16", "amx"])
def path(request, switch):
    """The operator's default kernel, then every instruction set."""
    if request.param == "default":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops.sola, "attention", _default)
            yield
        return
    yield switch(request.param)


def _default(qkv, head_dim):
    return softmax._attention_and_sums(qkv, head_dim)


def inputs(batch, tokens, heads, head_dim, *, size=1.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim, generator=g) * size
    return qkv.to(dtype), torch.randn(batch, tokens, heads * head_dim, generator=g).to(dtype)


def both(qkv, grad, head_dim, function=None):
    """Result, log-sum-exp (of the operator) and gradient."""
    leaf = qkv.clone().requires_grad_()
    result = (function or torch.ops.sola.attention)(leaf, head_dim)
    out, lse = result if isinstance(result, tuple) else (result, None)
    return out.detach(), lse, torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]


def error(got, expected):
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(path, shape, dtype):
    qkv, grad = inputs(*shape, dtype=dtype)
    out, lse, got = both(qkv, grad, shape[3])
    expected, _, expected_grad = both(qkv.double(), grad, shape[3], softmax.attention)
    assert (out.dtype, got.dtype, lse.dtype) == (dtype, dtype, torch.float32)
    assert error(out, expected) < ROUNDING[dtype]
    assert error(got, expected_grad) < 2 * ROUNDING[dtype]
    query, key, _ = softmax._heads(qkv.double(), shape[3])
    scores = query @ key.transpose(-1, -2) / shape[3] ** 0.5
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size", [0.0, 6.0, 40.0])
def test_scores_of_any_size_are_as_accurate_as_torchs(path, size):
    qkv, grad = inputs(2, 150, 2, 32, size=size)
    exact = both(qkv.double(), grad, 32, softmax.attention)
    torchs = both(qkv, grad, 32, softmax.attention)
    got = both(qkv, grad, 32)
    for part in (0, 2):
        assert error(got[part], exact[part]) <= 4 * error(torchs[part], exact[part]) + 1e-6


def test_scores_that_increase_or_decrease_along_the_keys(path):
    """Each block's maximum replaces the previous one, or the later ones are negligible."""
    qkv, grad = inputs(1, 300, 1, 8)
    qkv[..., :8] = 3.0
    for sign in (1, -1):
        qkv[..., 8:16] = sign * torch.linspace(-30, 30, 300)[:, None]
        exact = both(qkv.double(), grad, 8, softmax.attention)
        got = both(qkv, grad, 8)
        assert error(got[0], exact[0]) < 1e-5
        assert error(got[2], exact[2]) < 1e-4


@pytest.mark.parametrize("score", [sign * size for size in (1e3, 1e6, 4e9, 1e12, 1e15) for sign in (1, -1)])
def test_equal_keys_have_equal_weights(path, score):
    """Below, at and above the largest scores of the fast path; then a third of the keys exceeds the others."""
    root = abs(score) ** 0.5 / 2  # times sqrt(16)
    qkv, _ = inputs(1, 99, 1, 16)
    qkv[..., :32] = 0.0
    qkv[..., 0], qkv[..., 16] = root, 4 * root * (1 if score > 0 else -1)
    out = torch.ops.sola.attention(qkv, 16)[0]
    torch.testing.assert_close(out, qkv[..., 32:].mean(1, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)
    qkv[:, 66:, 16] += root
    out = torch.ops.sola.attention(qkv, 16)[0]
    torch.testing.assert_close(out, qkv[:, 66:, 32:].mean(1, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", [1e5, 3e6, 5e6, 1.5e9, 1e10, 1e11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_scores_far_beyond_those_of_networks(switch, name, score, dtype):
    """Integers near the maximum are not exact in float32."""
    switch(name)
    for size in (score, -score):
        qkv = torch.zeros(1, 1, 3)
        qkv[..., 0], qkv[..., 1], qkv[..., 2] = abs(size) ** 0.5, size / abs(size) ** 0.5, 1.0
        assert torch.ops.sola.attention(qkv.to(dtype), 1)[0].item() == pytest.approx(1.0, abs=1e-6)
    qkv, grad = inputs(1, 70, 1, 8, size=(score / 8) ** 0.5, dtype=dtype)
    qkv[..., 16:] = torch.randn(70, 8, generator=torch.Generator().manual_seed(1))
    out, _, got = both(qkv, grad, 8)
    exact, theirs = (softmax.attention(x, 8) for x in (qkv.double(), qkv))
    # 1e5 is within the bound of the float32 path; from 3e6 on the kernel computes in float64
    assert error(out, exact) <= (ROUNDING[dtype] if score > 1e6 else 2e-2 + 2 * error(theirs, exact))
    assert got.isfinite().all()


def test_laws(path):
    qkv, _ = inputs(2, 77, 3, 32)
    run = torch.ops.sola.attention
    out = run(qkv, 32)[0]
    torch.testing.assert_close(run(qkv.flip(1), 32)[0], out.flip(1), rtol=0, atol=1e-6)  # tokens have no order
    moved = qkv.clone()
    moved[..., 96:192] += torch.randn(96, generator=torch.Generator().manual_seed(1))  # one vector added to all keys
    torch.testing.assert_close(run(moved, 32)[0], out, rtol=0, atol=2e-5)
    constant = qkv.clone()
    constant[..., 192:] = torch.arange(96.0)
    torch.testing.assert_close(run(constant, 32)[0], torch.arange(96.0).expand(2, 77, 96), rtol=1e-6, atol=1e-6)
    alone = qkv.clone()
    alone[0] = 0  # heads and images are independent
    alone[..., :32] = alone[..., 96:128] = alone[..., 192:224] = 0
    assert torch.equal(run(alone, 32)[0][1, :, 32:], out[1, :, 32:])


@pytest.mark.parametrize("head_dim", [32, 5])
def test_constant_values_are_preserved_in_half_precision(path, head_dim):
    """Bitwise, even if weights are rounded before the product: they are divided by the sum of the rounded weights."""
    qkv, _ = inputs(2, 77, 3, head_dim, size=3.0)
    values = torch.arange(3.0 * head_dim) - 8
    qkv[..., 6 * head_dim :] = values
    out = torch.ops.sola.attention(qkv.bfloat16(), head_dim)[0]
    assert torch.equal(out, values.bfloat16().expand_as(out))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("where", [0, 40, 70])
@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512_bf16"])
def test_non_finite_values_in_half_precision_act_as_in_float64(switch, name, where, value):
    switch(name)
    qkv, _ = inputs(2, 70, 2, 16, dtype=torch.bfloat16)
    clean = torch.ops.sola.attention(qkv, 16)[0]
    qkv[0, 5, where] = value
    out = torch.ops.sola.attention(qkv, 16)[0]
    expected = softmax.attention(qkv.double(), 16).bfloat16()
    torch.testing.assert_close(out.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(out[finite], expected[finite], rtol=2e-2, atol=1e-2)
    assert torch.equal(out[1], clean[1])
    if where == 0:
        assert torch.equal(out[0, :, 16:], clean[0, :, 16:])


@needs_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
@pytest.mark.parametrize("where", [0, 40, 70])
def test_non_finite_and_huge_values_act_as_in_torch(where, value):
    """In a query, a key and a value; other images and heads are unaffected."""
    qkv, grad = inputs(2, 70, 2, 16)
    clean = both(qkv, grad, 16)
    qkv[0, 5, where] = value
    out, _, grad_qkv = both(qkv, grad, 16)
    expected, _, expected_grad = both(qkv.double(), grad, 16, softmax.attention)
    for got, right in ((out, expected), (grad_qkv, expected_grad)):
        right = right.float()  # products of 3e38 overflow here as well
        torch.testing.assert_close(got.isfinite(), right.isfinite())
        finite = right.isfinite()
        # if one weight is almost 1, the factor of the large value in the gradient is a rounding error
        rounding = 1e-14 * abs(value) if abs(value) < 4e38 else 0.0
        torch.testing.assert_close(got[finite], right[finite], rtol=1e-4, atol=1e-5 + rounding)
    assert torch.equal(out[1], clean[0][1])
    assert torch.equal(grad_qkv[1], clean[2][1])
    assert torch.equal(out[0, :, 16:], clean[0][0, :, 16:])


@needs_kernel
def test_bits_do_not_depend_on_threads_or_batch():
    qkv, grad = inputs(3, 700, 2, 32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = both(qkv, grad, 32)
        torch.set_num_threads(3)
        three = both(qkv, grad, 32)
    finally:
        torch.set_num_threads(threads)
    alone = both(qkv[1:2], grad[1:2], 32)
    for a, b, c in zip(one, three, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)])
def test_empty_inputs(path, shape):
    qkv, grad = inputs(*shape)
    out, _, got = both(qkv, grad, 8)
    assert (out.shape, got.shape) == (grad.shape, qkv.shape)


@needs_kernel
def test_memory_of_any_layout():
    qkv, grad = inputs(2, 30, 2, 8)
    expected = both(qkv, grad, 8)
    for layout in (qkv.transpose(0, 1).contiguous().transpose(0, 1), qkv.mT.contiguous().mT):
        for grads in (grad, grad.mT.contiguous().mT):
            out, _, got = both(layout, grads, 8)
            assert torch.equal(out, expected[0])
            assert torch.equal(got, expected[2])
    one = grad[:1].expand(2, -1, -1)
    assert torch.equal(both(qkv, one, 8)[2], both(qkv, one.contiguous(), 8)[2])


@needs_kernel
def test_opcheck():
    qkv, grad = inputs(2, 9, 2, 8)
    torch.library.opcheck(torch.ops.sola.attention.default, (qkv.requires_grad_(), 8))
    out, lse = torch.ops.sola.attention(qkv.detach(), 8)
    torch.library.opcheck(torch.ops.sola.attention_backward.default, (qkv.detach(), 8, out, lse, grad))


def test_the_default_kernels():
    """They run on devices without a kernel; double backward differentiates them."""
    qkv, grad = inputs(2, 9, 2, 8)
    out, lse = softmax._attention_and_sums(qkv, 8)
    _, _, expected_grad = both(qkv, grad, 8, softmax.products)
    with torch.inference_mode():
        got = softmax._attention_backward(qkv, 8, out, lse, grad)
    assert error(got, expected_grad.double()) < 1e-5
    for dtype in (torch.bfloat16, torch.float16):
        low = softmax._attention_backward(
            *(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in (qkv, 8, out, lse, grad))
        )
        assert low.dtype == dtype
        assert error(low, expected_grad.double()) < 2e-2


@pytest.mark.parametrize("function", [softmax.attention, softmax.products])
def test_half_precision_with_scores_that_overflow_before_scaling(function):
    qkv = torch.full((1, 3, 96), 60.0, dtype=torch.float16)
    torch.testing.assert_close(function(qkv, 32), torch.full((1, 3, 32), 60.0, dtype=torch.float16))


@needs_kernel
@pytest.mark.parametrize("value", [1e15, 1e25])
def test_large_values_with_zero_weight(path, value):
    """A weight of e^-159 is zero in float32, also times a large value."""
    qkv = torch.ones(1, 5, 24)
    qkv[:, 3, 8:16], qkv[:, 3, 16:] = -55.0, value
    out, _, got = both(qkv, torch.ones(1, 5, 8), 8)
    expected, _, expected_grad = both(qkv.double(), torch.ones(1, 5, 8), 8, softmax.products)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[..., 16:].double(), expected_grad[..., 16:], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not cpu.multiplies(torch.float32), reason="torch's SDPA, used on this CPU, does not support it")
def test_a_backward_can_be_differentiated():
    qkv, grad = inputs(1, 5, 2, 4)
    results = []
    for function in (ops.attention, softmax.products):
        own = qkv.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(own, 4), own, grad, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), own)[0])
    torch.testing.assert_close(*results)


def test_transforms_and_forward_mode_use_torchs_operators():
    qkv, _ = inputs(3, 6, 2, 4)
    batched = torch.func.vmap(lambda x: ops.attention(x[None], 4)[0])(qkv)
    torch.testing.assert_close(batched, softmax.attention(qkv, 4))
    _, tangent = torch.func.jvp(lambda x: ops.attention(x, 4), (qkv,), (torch.ones_like(qkv),))
    _, expected = torch.func.jvp(lambda x: softmax.products(x, 4), (qkv,), (torch.ones_like(qkv),))
    torch.testing.assert_close(tangent, expected)

    @torch.compile(backend="eager")
    def compiled(x):
        return torch.func.jvp(lambda y: ops.attention(y, 4), (x,), (torch.ones_like(x),))[1]

    torch.testing.assert_close(compiled(qkv), expected)


@pytest.mark.parametrize(
    ("shape", "head_dim", "message"),
    [((2, 3), 1, "must be"), ((1, 3, 12), 5, "multiple of head_dim=5"), ((1, 3, 12), 0, "head_dim=0")],
)
def test_invalid_shapes_and_dtypes_raise(shape, head_dim, message):
    with pytest.raises(ValueError, match=rf"attention: qkv \[.*{message}"):
        ops.attention(torch.zeros(shape), head_dim)
    with pytest.raises(TypeError, match="must be float64"):
        ops.attention(torch.zeros(1, 3, 12, dtype=torch.int32), 4)


@needs_kernel
def test_the_kernel_rejects_invalid_shapes(kernel_error):
    for shape, head_dim in (((2, 3), 1), ((1, 3, 12), 5)):
        with pytest.raises(kernel_error, match="sola::attention: qkv is"):
            torch.ops.sola.attention(torch.zeros(shape), head_dim)
    qkv, grad = inputs(1, 4, 1, 4)
    out, lse = torch.ops.sola.attention(qkv, 4)
    with pytest.raises(kernel_error, match="lse is"):
        torch.ops.sola.attention_backward(qkv, 4, out, lse[:, :, :2], grad)


@needs_kernel
def test_when_the_kernel_is_used(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: True)
    qkv, _ = inputs(1, 4, 1, 4)
    assert not multihead._use_sdpa(qkv)
    assert not multihead._use_sdpa(qkv.bfloat16())
    assert multihead._use_sdpa(qkv.double())
    assert multihead._use_sdpa(qkv.to("meta"))
    for name in ("reference", "portable"):
        with ops.use(name):
            assert multihead._use_sdpa(qkv)
            assert torch.equal(ops.attention(qkv, 4), softmax.attention(qkv, 4))


def test_the_current_instruction_set_decides(switch):
    qkv, _ = inputs(1, 4, 1, 4)
    switch("generic")
    assert multihead._use_sdpa(qkv)
    switch("avx2")
    assert not multihead._use_sdpa(qkv)


def test_exported_graphs_contain_torchs_sdpa():
    mixer = SoftmaxMixer(8, head_dim=4).eval()
    program = torch.export.export(mixer, (torch.zeros(1, 3, 3, 8),))
    assert "sola" not in str(program.graph)
    assert "scaled_dot_product_attention" in str(program.graph)


def test_compiled_graphs_call_the_kernel_for_any_number_of_tokens():
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 70):
        qkv, grad = inputs(2, tokens, 2, 8)
        out, _, got = both(qkv, grad, 8, compiled)
        expected, _, expected_grad = both(qkv, grad, 8, ops.attention)
        assert torch.equal(out, expected)
        assert torch.equal(got, expected_grad)


@needs_kernel
def test_flops_equal_those_of_the_products():
    qkv, grad = inputs(2, 10, 2, 8)
    counted = {}
    for name, function in (("kernel", lambda x, d: torch.ops.sola.attention(x, d)[0]), ("products", softmax.products)):
        own = qkv.clone().requires_grad_()
        with FlopCounterMode(display=False) as forward:
            out = function(own, 8)
        with FlopCounterMode(display=False) as backward:
            out.backward(grad)
        counted[name] = forward.get_total_flops(), backward.get_total_flops()
    assert counted["kernel"][0] == counted["products"][0] == 2 * 2 * 2 * 10 * 10 * 16
    # autograd saves the weights, the kernel recomputes them with one more product
    assert counted["kernel"][1] == counted["products"][1] + 2 * 2 * 10 * 10 * 16


def test_a_layer_under_autocast_gives_the_same_result():
    mixer = SoftmaxMixer(16, head_dim=8).eval()
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mixer(x)
        with ops.use("portable"):
            torch.testing.assert_close(mixer(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(mixer(x).float(), expected, rtol=0.05, atol=0.02)
            qkv, _ = inputs(1, 4, 1, 4)
            for path in (None, "portable"):
                with ops.use(path) if path else contextlib.nullcontext():
                    assert ops.attention(qkv, 4).dtype == torch.bfloat16
