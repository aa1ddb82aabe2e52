# SPDX-License-Identifier: Apache-2.0
"""Products by convolution are the products by `linear`: values, gradients, and everywhere that only `linear` will do.

The choice is made by hand here, so that both are tested whatever the processor is.
"""

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torch import nn
from torch.nn.functional import linear

import sola_vision  # noqa: F401 - names of the networks
from sola_vision import layers, ops
from sola_vision.layers import dispatch, products
from sola_vision.ops import cpu


@pytest.fixture(params=[1, 2])
def convolutions(request, monkeypatch):
    """A list that grows with every product by convolution, whose processor prefers it; on one thread and on two."""
    made = []
    convolve = products._convolve

    def counting(*args):
        made.append(args)
        return convolve(*args)

    monkeypatch.setattr(products, "_convolution_is_faster", lambda: True)
    monkeypatch.setattr(products, "_convolve", counting)
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)  # the kernel's own products come first
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield made
    torch.set_num_threads(threads)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("rows", "inner", "outer"), [(129, 700, 33), (3136, 96, 384), (3136, 384, 96), (40_000, 1, 1)])
def test_every_product_is_that_of_matrices(convolutions, rows, inner, outer):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
    exact = x.double() @ weight.double().t()
    assert relative(products.product(x, weight), exact) < 1e-6
    into = torch.full((2, rows, outer), 7.0)
    products.product_into(into[1], x, weight)
    assert relative(into[1], exact) < 1e-6
    assert into[0].eq(7).all()
    assert relative(products.weight_gradient(grad, x), grad.double().t() @ x.double()) < 2e-6
    turned = weight.t().contiguous().t()  # as the backward multiplies, by a transposed weight
    assert relative(products.product(x, turned), exact) < 1e-6
    assert len(convolutions) == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 14, 13, 128), (40_000, 5)])
def test_a_projection_and_its_gradients(convolutions, bias, shape):
    torch.manual_seed(0)
    x = torch.randn(shape).transpose(0, -2).requires_grad_()
    projection = nn.Linear(shape[-1], 24, bias=bias)
    made, expected = products.project(x, projection), projection(x)
    assert len(convolutions) == 1
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(made)
    leaves = (x, *projection.parameters())
    for found, right in zip(
        torch.autograd.grad(made, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert relative(found, right) < 1e-5  # sums of 40,000 terms, in two orders


def test_only_large_float32_products_on_a_cpu_are_convolutions(monkeypatch, convolutions):
    x, weight = torch.randn(400, 96), torch.randn(8, 96)
    products.product(x, weight)
    products.product(x[:8], weight)
    products.product(torch.randn(100, 4096), torch.randn(8, 4096))  # few rows, though many values
    assert products.product(x, weight[:0]).shape == (400, 0)
    products.product(x.double(), weight.double())
    products.product(x.bfloat16(), weight.bfloat16())
    assert products.product(x.to("meta"), weight.to("meta")).shape == (400, 8)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    products.product(x, weight)
    assert len(convolutions) == 1


def test_modules_are_called_where_more_than_their_weight_is_asked_for(convolutions):
    x, projection = torch.randn(400, 96), nn.Linear(96, 8)
    with ops.use("portable"):
        assert products.project(x, projection).equal(linear(x, projection.weight, projection.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert products.project(x, projection).dtype == torch.bfloat16
        assert products.weight_gradient(x, x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        products.project(x[:, :64].repeat(4, 1), projection)
    torch.func.vmap(lambda row: products.project(row, projection))(x)
    torch.compile(lambda x: products.project(x, projection), backend="eager", fullgraph=True)(x)
    assert not convolutions
    seen = []

    def hook(module, inputs, output):
        seen.append(output.shape)

    for register in (projection.register_forward_hook, nn.modules.module.register_module_forward_hook):
        handle = register(hook)
        products.project(x, projection)
        handle.remove()
    projection.forward = lambda x: seen.append(x.shape)  # as accelerate replaces it
    products.project(x, projection)
    assert seen == [(400, 8), (400, 8), (400, 96)]
    assert not convolutions


class Quantised(torch.Tensor):
    """As torchao's: a weight that knows a few operators."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is linear:
            return torch.full((len(args[0]), 8), 7.0)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_wrapper_without_a_weight_of_its_own_is_called(convolutions):
    projection, x = nn.Linear(96, 64), torch.randn(400, 96)
    assert torch.equal(products.project(x, nn.Sequential(projection)), projection(x))


def test_a_weight_of_another_kind_multiplies_itself(convolutions):
    projection = nn.Linear(96, 8)
    projection.weight = nn.Parameter(torch.randn(8, 96).as_subclass(Quantised))
    assert products.project(torch.randn(400, 96), projection).eq(7).all()
    assert not convolutions


def test_what_is_traced_holds_matrix_products(convolutions):
    layer = layers.SoftmaxLayer(96).eval()
    x = torch.randn(1, 20, 20, 96)
    traced = torch.jit.trace(layer.mlp, x)
    assert str(traced.inlined_graph).count("aten::_convolution") == 1  # the depth-wise one
    torch.testing.assert_close(traced(x), layer.mlp(x), atol=1e-5, rtol=1e-5)
    graph = torch.fx.symbolic_trace(layer).graph
    assert {"mixer.qkv", "mlp.fc1"} <= {node.target for node in graph.nodes if node.op == "call_module"}


def test_results_may_be_changed_in_place(convolutions):
    x = torch.randn(1, 20, 20, 96, requires_grad=True)
    layer = layers.LinearLayer(96)
    mixed, _ = layer.mixer(x, layer.norm1)
    mixed.mul_(2)
    mixed.sum().backward()
    assert convolutions


@pytest.mark.parametrize("grad", [True, False])
def test_a_network_computes_the_same(monkeypatch, convolutions, grad):
    torch.manual_seed(0)
    network = timm.create_model("sola_nano", num_classes=10)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    images = torch.randn(2, 3, 224, 224)

    def run():
        with torch.set_grad_enabled(grad):
            logits = network(images)
        return logits, torch.autograd.grad(logits.square().sum(), network.parameters()) if grad else ()

    logits, gradients = run()
    assert len(convolutions) > 60
    monkeypatch.setattr(products, "_convolution_is_faster", lambda: False)
    expected, right = run()
    assert relative(logits, expected) < 1e-5
    assert all(relative(*pair) < 1e-4 for pair in zip(gradients, right, strict=True))


def test_timm_extracts_features_by_torch_fx(convolutions):
    network = timm.create_model("sola_nano").eval()
    features = create_feature_extractor(network, {"stages.2": "c4", "stages.3.layers.1.mlp.fc1": "hidden"})
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found = features(images)["c4"]
        assert features(images)["hidden"].shape == (1, 7, 7, 512)
        torch.testing.assert_close(found, network.forward_intermediates(images)[1][2].permute(0, 2, 3, 1))
    assert convolutions


@pytest.mark.parametrize(
    ("vendor", "family", "capability", "faster", "narrow"),
    [
        ("AuthenticAMD", 26, "AVX512", True, False),
        ("AuthenticAMD", 27, "AVX512", True, False),
        ("AuthenticAMD", 25, "AVX512", False, True),
        ("AuthenticAMD", 26, "AVX2", False, False),
        ("GenuineIntel", 26, "AVX512", False, False),
        ("", 0, "AVX512", False, False),
    ],
)
def test_the_processor_decides(monkeypatch, vendor, family, capability, faster, narrow):
    monkeypatch.setattr(products, "_processor", lambda: (vendor, family))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert products._convolution_is_faster.__wrapped__() is (faster and built)
    monkeypatch.setattr(products, "_convolution_is_faster", lambda: faster)
    assert products.matrices_stay_narrow() is (narrow and torch.backends.mkl.is_available())


@pytest.mark.parametrize(
    ("used", "narrow", "float32", "bfloat16"),
    [
        ("avx2", True, 1 / 350, None),
        ("avx512", False, 1 / 350, None),
        ("avx512_bf16", True, 1 / 3100, 1 / 600),
        ("amx", False, 1 / 350, 1 / 1400),
    ],
)
def test_from_how_many_tokens_on_there_are_tiles(monkeypatch, used, narrow, float32, bfloat16):
    monkeypatch.setattr(dispatch.cpu, "instruction_set", lambda: used)
    monkeypatch.setattr(dispatch, "matrices_stay_narrow", lambda: narrow)
    assert dispatch._tokens_per_square(torch.float32) == float32
    if bfloat16 is not None:
        assert dispatch._tokens_per_square(torch.bfloat16) == bfloat16
