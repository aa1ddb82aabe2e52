# SPDX-License-Identifier: Apache-2.0
"""Softmax attention's kernel against torch's in float64: every instruction set, dtype, ugly shapes, hostile values."""

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


@pytest.fixture(params=["default", "generic", "avx2", "avx512", "avx512_bf16"])
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
    own = qkv.clone().requires_grad_()
    found = (function or torch.ops.sola.attention)(own, head_dim)
    out, sums = found if isinstance(found, tuple) else (found, None)
    return out.detach(), sums, torch.autograd.grad(out, own, grad.to(out.dtype))[0]


def error(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(path, shape, dtype):
    qkv, grad = inputs(*shape, dtype=dtype)
    out, sums, found = both(qkv, grad, shape[3])
    expected, _, wanted = both(qkv.double(), grad, shape[3], softmax.attention)
    assert (out.dtype, found.dtype, sums.dtype) == (dtype, dtype, torch.float32)
    assert error(out, expected) < ROUNDING[dtype]
    assert error(found, wanted) < 2 * ROUNDING[dtype]
    query, key, _ = softmax._heads(qkv.double(), shape[3])
    scores = query @ key.transpose(-1, -2) / shape[3] ** 0.5
    torch.testing.assert_close(sums.double(), torch.logsumexp(scores, -1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size", [0.0, 6.0, 40.0])
def test_scores_of_any_size_are_as_exact_as_torchs(path, size):
    qkv, grad = inputs(2, 150, 2, 32, size=size)
    exact = both(qkv.double(), grad, 32, softmax.attention)
    torchs = both(qkv, grad, 32, softmax.attention)
    found = both(qkv, grad, 32)
    for part in (0, 2):
        assert error(found[part], exact[part]) <= 4 * error(torchs[part], exact[part]) + 1e-6


def test_scores_that_grow_along_the_keys_and_ones_that_fall(path):
    """Each block's maximum replaces the one before, or none of the later ones counts."""
    qkv, grad = inputs(1, 300, 1, 8)
    qkv[..., :8] = 3.0
    for sign in (1, -1):
        qkv[..., 8:16] = sign * torch.linspace(-30, 30, 300)[:, None]
        exact = both(qkv.double(), grad, 8, softmax.attention)
        found = both(qkv, grad, 8)
        assert error(found[0], exact[0]) < 1e-5
        assert error(found[2], exact[2]) < 1e-4


@pytest.mark.parametrize("score", [sign * size for size in (1e3, 1e6, 4e9, 1e12, 1e15) for sign in (1, -1)])
def test_keys_that_are_all_the_same_weigh_the_same(path, score):
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
def test_scores_far_beyond_any_networks(switch, name, score, dtype):
    """Where an integer near the maximum is no longer exact in float32."""
    switch(name)
    for size in (score, -score):
        qkv = torch.zeros(1, 1, 3)
        qkv[..., 0], qkv[..., 1], qkv[..., 2] = abs(size) ** 0.5, size / abs(size) ** 0.5, 1.0
        assert torch.ops.sola.attention(qkv.to(dtype), 1)[0].item() == pytest.approx(1.0, abs=1e-6)
    qkv, grad = inputs(1, 70, 1, 8, size=(score / 8) ** 0.5, dtype=dtype)
    qkv[..., 16:] = torch.randn(70, 8, generator=torch.Generator().manual_seed(1))
    out, _, found = both(qkv, grad, 8)
    exact, theirs = (softmax.attention(x, 8) for x in (qkv.double(), qkv))
    # 1e5 is within the bound of float32; from 3e6 on products of the largest numbers are not, and float64 has no error
    assert error(out, exact) <= (ROUNDING[dtype] if score > 1e6 else 2e-2 + 2 * error(theirs, exact))
    assert found.isfinite().all()


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
    alone[0] = 0  # neither heads nor images see each other
    alone[..., :32] = alone[..., 96:128] = alone[..., 192:224] = 0
    assert torch.equal(run(alone, 32)[0][1, :, 32:], out[1, :, 32:])


@pytest.mark.parametrize("head_dim", [32, 5])
def test_constant_values_come_back_in_half_precision(path, head_dim):
    """To the bit, though weights may have been rounded before they are multiplied: their sum is that of the rounded."""
    qkv, _ = inputs(2, 77, 3, head_dim, size=3.0)
    values = torch.arange(3.0 * head_dim) - 8
    qkv[..., 6 * head_dim :] = values
    out = torch.ops.sola.attention(qkv.bfloat16(), head_dim)[0]
    assert torch.equal(out, values.bfloat16().expand_as(out))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("where", [0, 40, 70])
@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512_bf16"])
def test_what_is_no_number_in_half_precision_does_as_in_float64(switch, name, where, value):
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
def test_what_is_no_number_or_too_large_does_as_in_torch(where, value):
    """In a query, a key and a value; the other images and heads do not see it."""
    qkv, grad = inputs(2, 70, 2, 16)
    clean = both(qkv, grad, 16)
    qkv[0, 5, where] = value
    out, _, found = both(qkv, grad, 16)
    expected, _, wanted = both(qkv.double(), grad, 16, softmax.attention)
    for got, right in ((out, expected), (found, wanted)):
        right = right.float()  # 3e38 times something overflows there as well
        torch.testing.assert_close(got.isfinite(), right.isfinite())
        finite = right.isfinite()
        # where one weight is all but 1, what multiplies the large number in the gradient is rounding
        rounding = 1e-14 * abs(value) if abs(value) < 4e38 else 0.0
        torch.testing.assert_close(got[finite], right[finite], rtol=1e-4, atol=1e-5 + rounding)
    assert torch.equal(out[1], clean[0][1])
    assert torch.equal(found[1], clean[2][1])
    assert torch.equal(out[0, :, 16:], clean[0][0, :, 16:])


@needs_kernel
def test_neither_threads_nor_batch_change_a_bit():
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
def test_nothing_gives_nothing(path, shape):
    qkv, grad = inputs(*shape)
    out, _, found = both(qkv, grad, 8)
    assert (out.shape, found.shape) == (grad.shape, qkv.shape)


@needs_kernel
def test_memory_of_any_layout():
    qkv, grad = inputs(2, 30, 2, 8)
    expected = both(qkv, grad, 8)
    for layout in (qkv.transpose(0, 1).contiguous().transpose(0, 1), qkv.mT.contiguous().mT):
        for grads in (grad, grad.mT.contiguous().mT):
            out, _, found = both(layout, grads, 8)
            assert torch.equal(out, expected[0])
            assert torch.equal(found, expected[2])
    one = grad[:1].expand(2, -1, -1)
    assert torch.equal(both(qkv, one, 8)[2], both(qkv, one.contiguous(), 8)[2])


@needs_kernel
def test_opcheck():
    qkv, grad = inputs(2, 9, 2, 8)
    torch.library.opcheck(torch.ops.sola.attention.default, (qkv.requires_grad_(), 8))
    out, sums = torch.ops.sola.attention(qkv.detach(), 8)
    torch.library.opcheck(torch.ops.sola.attention_backward.default, (qkv.detach(), 8, out, sums, grad))


def test_the_default_kernels():
    """What runs where there is no other kernel, and what a second derivative differentiates."""
    qkv, grad = inputs(2, 9, 2, 8)
    out, sums = softmax._attention_and_sums(qkv, 8)
    _, _, wanted = both(qkv, grad, 8, softmax.products)
    with torch.inference_mode():
        found = softmax._attention_backward(qkv, 8, out, sums, grad)
    assert error(found, wanted.double()) < 1e-5
    for dtype in (torch.bfloat16, torch.float16):
        low = softmax._attention_backward(
            *(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in (qkv, 8, out, sums, grad))
        )
        assert low.dtype == dtype
        assert error(low, wanted.double()) < 2e-2


@pytest.mark.parametrize("function", [softmax.attention, softmax.products])
def test_half_precision_holds_scores_that_are_too_large_before_they_are_scaled(function):
    qkv = torch.full((1, 3, 96), 60.0, dtype=torch.float16)
    torch.testing.assert_close(function(qkv, 32), torch.full((1, 3, 32), 60.0, dtype=torch.float16))


@needs_kernel
@pytest.mark.parametrize("value", [1e15, 1e25])
def test_large_values_of_keys_that_count_nothing(path, value):
    """A weight of e^-159 is zero in float32, whatever it is multiplied by."""
    qkv = torch.ones(1, 5, 24)
    qkv[:, 3, 8:16], qkv[:, 3, 16:] = -55.0, value
    out, _, found = both(qkv, torch.ones(1, 5, 8), 8)
    expected, _, wanted = both(qkv.double(), torch.ones(1, 5, 8), 8, softmax.products)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[..., 16:].double(), wanted[..., 16:], rtol=1e-5, atol=1e-5)


@needs_kernel  # without it is torch's own that runs, which cannot
def test_a_backward_can_be_differentiated():
    qkv, grad = inputs(1, 5, 2, 4)
    results = []
    for function in (ops.attention, softmax.products):
        own = qkv.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(own, 4), own, grad, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), own)[0])
    torch.testing.assert_close(*results)


def test_transforms_and_forward_mode_see_torchs_own():
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
    ("shape", "head_dim", "says"),
    [((2, 3), 1, "must be"), ((1, 3, 12), 5, "multiple of head_dim=5"), ((1, 3, 12), 0, "head_dim=0")],
)
def test_shapes_that_do_not_fit(shape, head_dim, says):
    with pytest.raises(ValueError, match=rf"attention: qkv \[.*{says}"):
        ops.attention(torch.zeros(shape), head_dim)
    with pytest.raises(TypeError, match="must be float64"):
        ops.attention(torch.zeros(1, 3, 12, dtype=torch.int32), 4)


@needs_kernel
def test_the_kernel_itself_refuses_them_too():
    for shape, head_dim in (((2, 3), 1), ((1, 3, 12), 5)):
        with pytest.raises(ValueError, match="sola::attention: qkv is"):
            torch.ops.sola.attention(torch.zeros(shape), head_dim)
    qkv, grad = inputs(1, 4, 1, 4)
    out, sums = torch.ops.sola.attention(qkv, 4)
    with pytest.raises(ValueError, match="lse is"):
        torch.ops.sola.attention_backward(qkv, 4, out, sums[:, :, :2], grad)


@needs_kernel
def test_who_takes_the_kernel(monkeypatch):
    monkeypatch.setattr(multihead, "_KERNEL", True)
    monkeypatch.setattr(multihead, "_MATRIX_UNIT", False)
    qkv, _ = inputs(1, 4, 1, 4)
    assert not multihead._torchs_own(qkv)
    assert not multihead._torchs_own(qkv.bfloat16())
    assert multihead._torchs_own(qkv.double())
    assert multihead._torchs_own(qkv.to("meta"))
    for name in ("reference", "portable"):
        with ops.use(name):
            assert multihead._torchs_own(qkv)
            assert torch.equal(ops.attention(qkv, 4), softmax.attention(qkv, 4))
    monkeypatch.setattr(multihead, "_MATRIX_UNIT", True)
    long = qkv.detach().repeat(1, 64, 1)
    assert multihead._torchs_own(long.bfloat16())
    assert not multihead._torchs_own(long.bfloat16()[:, :-1])
    assert not multihead._torchs_own(long.half())
    assert not multihead._torchs_own(long)
    trained = long.bfloat16().requires_grad_()
    assert not multihead._torchs_own(trained)
    with torch.no_grad():
        assert multihead._torchs_own(trained)


def test_graphs_that_are_exported_hold_torchs_own():
    mixer = SoftmaxMixer(8, head_dim=4).eval()
    program = torch.export.export(mixer, (torch.zeros(1, 3, 3, 8),))
    assert "sola" not in str(program.graph)
    assert "scaled_dot_product_attention" in str(program.graph)


def test_compiled_graphs_call_the_kernel_for_any_number_of_tokens():
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 70):
        qkv, grad = inputs(2, tokens, 2, 8)
        out, _, found = both(qkv, grad, 8, compiled)
        expected, _, wanted = both(qkv, grad, 8, ops.attention)
        assert torch.equal(out, expected)
        assert torch.equal(found, wanted)


@needs_kernel
def test_it_counts_as_the_products_do():
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
    # autograd has kept the weights, the kernel multiplies once more to have them again
    assert counted["kernel"][1] == counted["products"][1] + 2 * 2 * 10 * 10 * 16


def test_a_layer_under_autocast_gives_the_same():
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
