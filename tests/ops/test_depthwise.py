# SPDX-License-Identifier: Apache-2.0
"""The middle of the softmax layer's MLP against its plain form in float64: every instruction set, ugly shapes, dtypes,
strides, what is not finite, bad input; and which layers take it.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sola_vision.layers.softmax import ConvMlp
from sola_vision.ops import cpu, depthwise, use

reason = cpu.load()
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
run = torch.ops.sola.depthwise_gelu

# one token, one channel, odd numbers, one row and one column, beyond a task's rows and channels
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 33), (1, 1, 9, 16), (3, 9, 1, 20), (2, 2, 2, 300), (1, 13, 7, 1551), (1, 4, 4, 3072)]
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["generic", "avx2", "avx512"])
def path(request, switch, poisoned_memory):
    return switch(request.param)


def inputs(shape, dtype=torch.float32, size=2.0):
    g = torch.Generator().manual_seed(0)
    channels = shape[-1]
    made = [torch.randn(*each, generator=g) for each in (shape, (channels,), (channels, 1, 3, 3), (channels,))]
    return [(made[0] * size).to(dtype), *(each.to(dtype) for each in made[1:])]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(path, shape, dtype):
    given = inputs(shape, dtype)
    found = run(*given)
    exact = depthwise._depthwise_gelu(*(each.double() for each in given))
    assert (found.dtype, found.shape, found.is_contiguous()) == (dtype, torch.Size(shape), True)
    assert (found - exact).abs().max() <= ROUNDING[dtype] * exact.abs().max().clamp(min=1)


def test_gelu_over_its_whole_range(path):
    """A convolution that passes its middle on."""
    x = torch.linspace(-60, 60, 48_000).view(1, 40, 75, 16)
    middle = torch.zeros(16, 1, 3, 3)
    middle[:, 0, 1, 1] = 1.0
    nothing = torch.zeros(16)
    found = run(x, nothing, middle, nothing)
    exact = x.double() / 2 * torch.erfc(-x.double() / 2**0.5)  # torch's own, 1 + erf, cancels on the negative side
    torch.testing.assert_close(found.double(), exact, rtol=2e-7, atol=2e-7)
    tail = (x > -9) & (x < 0)
    assert ((found - exact) / exact)[tail].abs().max() < 1e-5
    extreme = torch.full((1, 1, 1, 16), 3e38)
    assert torch.equal(run(extreme, nothing, middle, nothing), extreme)
    assert run(-extreme, nothing, middle, nothing).abs().max() < 1e-18


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_neighbours_only(path, bad):
    given = inputs((1, 7, 7, 20))
    clean = run(*given)
    given[0][0, 3, 3, 5] = bad
    found = run(*given)
    touched = torch.zeros(1, 7, 7, 20, dtype=torch.bool)
    touched[0, 2:5, 2:5, 5] = True
    assert torch.equal(found[~touched], clean[~touched])
    reached = found[touched]
    assert (reached.isnan() if bad != bad else (reached == bad) | (reached.abs() < 1e-18)).all()


def test_offset_counts_inside_of_the_image_only(path):
    x, offset, weight, bias = inputs((2, 6, 5, 24))
    moved = run(x + offset, torch.zeros_like(offset), weight, bias)
    torch.testing.assert_close(run(x, offset, weight, bias), moved, rtol=1e-5, atol=2e-6)


@needs_kernel
def test_bits_do_not_depend_on_threads_or_batch():
    given = inputs((3, 9, 11, 40))
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(run(*given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert torch.equal(found[0][1:2], run(given[0][1:2], *given[1:]))


@needs_kernel
def test_inputs_of_any_strides():
    given = inputs((2, 6, 5, 24))
    strided = [torch.stack([each, each], -1)[..., 0] for each in given]
    assert torch.equal(run(*strided), run(*given))


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 3, 3, 4), (2, 0, 3, 4), (2, 3, 3, 0)])
def test_nothing(shape):
    assert run(*inputs(shape)).shape == torch.Size(shape)


def test_the_operator_is_registered_correctly():
    torch.library.opcheck(run.default, inputs((2, 4, 3, 8)), test_utils=("test_schema", "test_faketensor"))


@needs_kernel
def test_the_kernel_refuses_what_does_not_fit():
    x, offset, weight, bias = inputs((1, 4, 3, 8))
    for given, says in (
        ((x[0], offset, weight, bias), r"x is \[4, 3, 8\], expected \[batch, height, width, channels\]"),
        ((x, offset[:7], weight, bias), r"offset is \[7\], expected \[channels\] = \[8\]"),
        ((x, offset, weight[:, :, :2], bias), r"weight is \[8, 1, 2, 3\], expected"),
        ((x, offset, weight, bias[:1]), r"bias is \[1\], expected"),
        ((x.double(), offset, weight, bias), "float64 has no kernel"),
    ):
        with pytest.raises(ValueError, match=says):
            run(*given)


def test_it_counts_as_the_convolution_does():
    given = inputs((2, 4, 3, 8))
    counts = []
    for function in (run, depthwise._depthwise_gelu):
        with FlopCounterMode(display=False) as counter:
            function(*given)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- the layer


def taken(layer, x):
    """The layer's result, and whether it came through the operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        made = layer(x)
    return made, any(event.key == "sola::depthwise_gelu" for event in profile.key_averages())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_takes_it_where_only_values_are_wanted(dtype):
    if not cpu.multiplies(torch.float32):
        pytest.skip("only with fused multiply-adds")
    torch.manual_seed(0)
    layer, x = ConvMlp(24).to(dtype), torch.randn(2, 7, 5, 24).to(dtype)
    plain, there = taken(layer, x)  # its weights want gradients
    assert not there
    with torch.inference_mode():
        made, there = taken(layer, x)
        assert there
        rounding = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(made, plain, **rounding)
        with use("portable"):
            assert not taken(layer, x)[1]
        with torch.autocast("cpu", torch.bfloat16):
            assert not taken(layer, x)[1]
        assert not taken(layer.double(), x.double())[1]


@needs_kernel
@pytest.mark.parametrize("part", ["fc1", "depthwise"])
def test_a_part_that_is_hooked_or_replaced_is_called(part):
    layer, x = ConvMlp(8).eval(), torch.randn(1, 4, 4, 8)
    calls = []
    getattr(layer, part).register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        assert not taken(layer, x)[1]
    assert calls == [1]
    layer = ConvMlp(8).eval()
    setattr(layer, part, torch.nn.Sequential(getattr(layer, part)))  # which has no weight of its own
    with torch.inference_mode():
        assert not taken(layer, x)[1]


@needs_kernel
def test_another_convolution_is_called():
    layer, x = ConvMlp(8).eval(), torch.randn(1, 6, 6, 8)
    for other in ({"kernel_size": 5, "padding": 2}, {"kernel_size": 3, "padding": 2, "dilation": 2}):
        layer.depthwise = torch.nn.Conv2d(32, 32, groups=32, **other)
        with torch.inference_mode():
            assert not taken(layer, x)[1]


def test_what_is_compiled_holds_it_and_what_is_exported_does_not():
    layer, x = ConvMlp(8).eval().requires_grad_(False), torch.randn(1, 4, 4, 8)
    exported = torch.export.export(layer, (x,))
    assert "depthwise_gelu" not in str(exported.graph)
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(layer, backend=keep, fullgraph=True)(x)
        torch.testing.assert_close(compiled, layer(x))
    if cpu.multiplies(torch.float32):
        assert "depthwise_gelu" in graphs[0]
