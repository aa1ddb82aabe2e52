# SPDX-License-Identifier: Apache-2.0
"""The layer norm of stem, merging and softmax layers is torch's: as a module, and as an autograd node, which it is on a
GPU (elsewhere its kernels are the plain forms).
"""

import pytest
import torch
from torch import nn

import sola_vision
from sola_vision import ops
from sola_vision.layers import LayerNorm, LinearLayer, norm

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


@pytest.fixture
def node(monkeypatch):
    """As on a GPU, where norms are nodes; counts them."""
    called = []

    def call(*arguments):
        called.append(arguments)
        return layer_norm(*arguments)

    layer_norm = norm.layer_norm
    monkeypatch.setattr(norm, "layer_norm", call)
    monkeypatch.setattr(norm, "in_eager_mode_on_gpu", lambda x: not torch.compiler.is_compiling())
    return called


def pair(dim, **options):
    """torch's norm and ours with the same random parameters."""
    torch.manual_seed(0)
    expected, own = nn.LayerNorm(dim, **options), LayerNorm(dim, **options)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(torch.randn_like(parameter))
    own.load_state_dict(expected.state_dict())
    return expected, own


def results(module, x, grad, **options):
    x = x.detach().requires_grad_()
    out = module(x)
    return out, *torch.autograd.grad(out, (x, *module.parameters()), grad.to(out.dtype), **options)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 3, 33), (4, 96), (0, 7, 8), (1, 1)])
def test_values_and_gradients_are_those_of_torch(node, device, shape, dtype):
    expected, own = pair(shape[-1], device=device, dtype=dtype)
    x, grad = torch.randn(2, *shape, device=device).to(dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(results(own, x, grad), results(expected, x, grad), **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(own(x), expected(x), **tolerance)
    assert len(node) == 2


@DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_under_autocast_is_float32(node, device, dtype):
    expected, own = pair(24, device=device)
    x, grad = torch.randn(2, 3, 5, 24, device=device)
    with torch.autocast(device, torch.bfloat16):
        found = results(own, x.to(dtype), grad)
    right = results(expected, x.to(dtype).float(), grad)
    assert len(node) == 1
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, torch.float32, torch.float32]
    for tensor, exact in zip(found, right, strict=True):
        torch.testing.assert_close(tensor.float(), exact, rtol=1e-2, atol=1e-2)


@DEVICES
def test_backwards_are_differentiated_again(node, device):
    dtype = torch.float64 if device == "cpu" else torch.float32
    expected, own = pair(8, device=device, dtype=dtype)
    x, grad = torch.randn(2, 3, 4, 8, device=device, dtype=dtype)

    def second(module):
        _, *gradients = results(module, x, grad, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), module.weight)

    torch.testing.assert_close(second(own), second(expected))
    out = own(x.requires_grad_())
    many = torch.autograd.grad(out, x, torch.stack((grad, -2 * grad)), is_grads_batched=True, retain_graph=True)[0]
    (single,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(many, torch.stack((single, -2 * single)))


def test_what_a_kernel_cannot_take_goes_to_torch(node):
    x = torch.randn(2, 3, 8)
    plain, own = pair(8, bias=False)
    assert torch.equal(own(x), plain(x))
    bare, own = pair(8, elementwise_affine=False)
    assert torch.equal(own(x), bare(x))
    of_two, own = pair((3, 8))
    assert torch.equal(own(x), of_two(x))
    with pytest.raises(RuntimeError, match=r"normalized_shape=\[7\]"):
        LayerNorm(7)(x)
    with pytest.raises(RuntimeError):
        LayerNorm(8, dtype=torch.float64)(x)
    assert node == []


@pytest.fixture
def kernel(monkeypatch):
    """Counts the calls of the CPU's operator."""
    called = []

    class Counted:
        @staticmethod
        def layer_norm(*arguments):
            called.append(arguments)
            return operators.layer_norm(*arguments)

    operators = torch.ops.sola
    monkeypatch.setattr(norm.torch.ops, "sola", Counted)
    return called


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 3, 33), (4, 96), (0, 7, 8), (1, 1)])
def test_inference_on_a_cpu_in_half_precision_has_a_kernel(kernel, shape, dtype):
    expected, own = pair(shape[-1], dtype=dtype)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        found = own(x)
    right = expected.double()(x.double())
    assert len(kernel) == 1
    assert found.dtype == dtype
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_everything_else_on_a_cpu_goes_to_torch(kernel):
    expected, own = pair(8, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 8).bfloat16()
    assert torch.equal(own(x), expected(x))  # gradients are needed
    with torch.no_grad():
        with ops.use("portable"):
            assert torch.equal(own(x), expected(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(own(x), expected(x))
        assert torch.equal(torch.vmap(own)(x), torch.vmap(expected)(x))
        assert torch.equal(torch.jit.trace(own, x, check_trace=False)(x), expected(x))
        assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(own))(x), expected(x))
        wide, narrow = pair(8)
        assert torch.equal(narrow(x.float()), wide(x.float()))
        with pytest.raises(RuntimeError, match=r"normalized_shape=\[7\]"):
            LayerNorm(7)(x)
    assert kernel == []


def test_norms_outside_of_linear_layers_are_ours(node):
    """And those of linear layers torch's, which their kernels read."""
    network = sola_vision.SolaVision(sola_vision.nano(num_classes=3)).eval()
    kinds = {name: type(module) for name, module in network.named_modules() if isinstance(module, nn.LayerNorm)}
    linear = tuple(name for name, module in network.named_modules() if isinstance(module, LinearLayer))
    assert all(kind is (nn.LayerNorm if name.startswith(linear) else LayerNorm) for name, kind in kinds.items())
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    assert len(node) == sum(kind is LayerNorm for kind in kinds.values())


def test_a_captured_graph_has_torchs_norm(node):
    program = torch.export.export(LayerNorm(8), (torch.randn(2, 3, 8),))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert called == {"aten.layer_norm.default"}
