# SPDX-License-Identifier: Apache-2.0
"""Exported files against the network: any batch and size, their contents, and files that differ."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from few_layers import build
from torch import nn

from sola_vision import export as exports
from sola_vision import ops

SIZES = [(64, 64), (97, 131), (32, 32), (8, 8), (20, 64)]


def has(*packages):
    for package in packages:
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def small():
    return build()


@pytest.fixture(scope="module")
def onnx_file(small, tmp_path_factory):
    has("onnx", "onnxscript", "onnxruntime")
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    report = exports.export(exports.classifier(small), path, "onnx", sizes=SIZES, metadata={"classes": '["a"]'})
    return path, report


def test_onnx_is_the_network_at_any_size(onnx_file, small):
    path, report = onnx_file
    assert report.ok
    assert len(report.comparisons) == 10
    assert max(c.error for c in report.comparisons) < 1e-5
    # the comparison detects a different network
    run = exports.graph.session(path)
    with torch.no_grad():
        small.head.fc.bias += 1
        other = exports.check.compare(exports.classifier(small), run, 1, (64, 64))
        small.head.fc.bias -= 1
    assert other.error > 1e-2


def test_onnx_has_standard_operators_and_named_sizes(onnx_file):
    import onnx

    model = onnx.load(onnx_file[0])
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert not model.functions
    images = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in images] == ["batch", 3, "height", "width"]
    logits = model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in logits] == ["batch", 5]
    assert {p.key: p.value for p in model.metadata_props} == {"classes": '["a"]'}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert any(name.startswith("stages.1.layers.0.mixer") for name in names)


def test_onnx_has_no_square_of_the_tokens_outside_softmax_layers(onnx_file):
    import onnx
    import onnxruntime

    model = onnx.load(onnx_file[0])
    attention = {name for node in model.graph.node if node.op_type == "Softmax" for name in (*node.input, *node.output)}
    del model.graph.value_info[:]
    names = [name for node in model.graph.node for name in node.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != "logits")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sizes = {}
    for side in (256, 512):
        results = session.run(names, {"images": np.zeros((1, 3, side, side), np.float32)})
        sizes[side] = dict(zip(names, (x.size for x in results), strict=True))
    grows = {name for name in names if sizes[512][name] > 5 * sizes[256][name] and sizes[512][name] > 16384}
    assert grows  # the softmax layer's scores
    before = {name for node in model.graph.node for name in node.input if set(node.output) & attention}
    assert grows <= attention | before


def test_a_draft_that_differs_is_not_kept(onnx_file, small, tmp_path, monkeypatch):
    path = tmp_path / "kept.onnx"
    path.write_text("older")
    source, _ = onnx_file

    def write(network, draft, precision, metadata):
        draft.write_bytes(source.read_bytes())
        return {}

    monkeypatch.setattr(exports.graph, "write", write)
    other = build()
    nn.init.normal_(other.head.fc.weight)
    report = exports.export(exports.classifier(other), path, sizes=[(64, 64)], batches=[1])
    assert not report.ok
    assert path.read_text() == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.onnx"]
    assert exports.export(exports.classifier(small), path, sizes=[(64, 64)], batches=[1]).ok
    assert path.read_bytes() == source.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("precision", "limit"), [("float16", 5e-3), ("int8", 5e-2)])
def test_lower_precision(small, tmp_path, precision, limit, onnx_file):
    path = tmp_path / "low.onnx"
    report = exports.export(exports.classifier(small), path, precision=precision, sizes=SIZES)
    assert report.ok
    assert 1e-6 < max(c.error for c in report.comparisons) < limit
    assert report.bytes < 0.8 * onnx_file[1].bytes
    assert ("MatMulInteger" in report.operators) == (precision == "int8")


def test_int8_is_right_on_processors_whose_signed_products_overflow(tmp_path):
    has("onnx", "onnxruntime")
    import onnx
    import onnxruntime
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

    weight = np.full((64, 8), 127, np.float32)  # all of the largest size and one sign: what overflows first
    rows = [make_tensor_value_info(name, 1, [1, size]) for name, size in (("x", 64), ("y", 8))]
    stored = [onnx.numpy_helper.from_array(weight, "weight")]
    graph = make_graph([make_node("MatMul", ["x", "weight"], ["y"])], "product", rows[:1], rows[1:], stored)
    path = tmp_path / "product.onnx"
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", exports.graph.OPSET)], ir_version=10), path)
    exports.graph.quantise(path)
    # this processor may not have such a product, so the data type is checked too
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert kinds["weight_quantized"] == onnx.TensorProto.UINT8
    x = np.ones((1, 64), np.float32)
    (y,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ weight, rtol=0.01)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_archive_is_the_network_and_calls_the_operator(tmp_path):
    path = tmp_path / "small.pt2"
    small = build(schedule="L/S", bridges="")
    network = exports.features(small)
    report = exports.export(network, path, "torch-export", sizes=SIZES, metadata={"a": "b"})
    assert report.ok
    assert report.outputs == {"stride4": "[batch, 8, height/4, width/4]", "stride8": "[batch, 32, height/8, width/8]"}
    extra = {"a": ""}
    program = torch.export.load(path, extra_files=extra)
    assert extra == {"a": "b"}
    assert any("sola.wkv" in str(node.target) for node in program.graph.nodes)
    image = torch.randn(2, 3, 40, 72)
    for found, wanted in zip(
        program.module()(image), small.forward_intermediates(image, intermediates_only=True), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_an_archive_of_four_stages_takes_small_images(tmp_path):
    network = exports.classifier(build(schedule="L/L/L/L", dims=(8, 8, 8, 8), bridges=""))
    sizes = [(32, 32), (8, 8), (5, 7), (1, 1), (33, 300)]
    assert exports.export(network, tmp_path / "small.pt2", "torch-export", sizes=sizes).ok


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_package_runs_the_kernel(tmp_path):
    network = exports.classifier(build(schedule="L", dims=(8,), bridges=""))
    path = tmp_path / "small.pt2"
    report = exports.export(network, path, "aoti", sizes=SIZES, metadata={"classes": "[1]"})
    assert report.ok
    with zipfile.ZipFile(path) as file:
        stored = [file.read(name) for name in file.namelist() if name.endswith(".json")]
    assert any(b"sola" in text and b"wkv" in text for text in stored)
    loaded = torch._inductor.aoti_load_package(str(path))
    assert loaded.loader.get_metadata()["classes"] == "[1]"
    if ops.missing_kernel("cpu") is not None:
        return
    # the package runs the compiled kernel, not the form in Python
    code = (
        "import sys, torch, sola_vision; sola_vision.ops.portable.wkv = None\n"
        "print(torch._inductor.aoti_load_package(sys.argv[1])(torch.ones(1, 3, 40, 40))[0].sum().item())"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert float(said.stdout) == pytest.approx(network(torch.ones(1, 3, 40, 40))[0].sum().item(), abs=1e-4)


def test_only_a_package_needs_contiguous_images(monkeypatch):
    monkeypatch.setattr(ops, "missing_kernel", lambda device: "no kernel here")
    assert exports.archive.needs("aoti").startswith(
        "torch and `import sola_vision` (no kernel here); contiguous float32"
    )
    monkeypatch.setattr(ops, "missing_kernel", lambda device: None)
    assert "sola_load(1); contiguous float32 images, which the package does not check" in exports.archive.needs("aoti")
    assert "contiguous" not in exports.archive.needs("torch-export")


def test_wrong_requests_are_refused_before_the_work(small, tmp_path):
    network = exports.classifier(small)
    for format, name, precision, says in [
        ("tflite", "a.onnx", "float32", "'tflite' is unknown"),
        ("onnx", "a.pt2", "float32", "named \\*.onnx"),
        ("aoti", "a.onnx", "float32", "named \\*.pt2"),
        ("aoti", "a.pt2", "int8", "float32 only"),
        ("onnx", "a.onnx", "int4", "'int4' is unknown"),
    ]:
        with pytest.raises(ValueError, match=says):
            exports.export(network, tmp_path / name, format, precision=precision)
    with pytest.raises(OSError, match=r"No such file.*nowhere/a\.onnx'$"):
        exports.export(network, tmp_path / "nowhere" / "a.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(OSError, match=r"Is a directory.*folder\.onnx"):
        exports.export(network, tmp_path / "folder.onnx")
    with pytest.raises(ValueError, match="no feature maps"):
        exports.features(nn.Linear(1, 1))


def test_missing_extra_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs onnxscript.*sola-vision\[export\]"):
        exports.export(exports.classifier(small), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_exported_stays_as_it_is():
    model = build(schedule="L", dims=(8,), bridges="").train().bfloat16()
    (logits,) = exports.classifier(model)(torch.randn(1, 3, 32, 32))
    assert logits.dtype == torch.float32
    assert model.training
    assert next(model.parameters()).dtype == torch.bfloat16


def test_a_result_of_zeros_is_compared_too(small):
    zeros = exports.Exportable(small, ["logits"], lambda network, images: [torch.zeros(1, 5)])
    assert exports.check.compare(zeros, lambda images: [torch.zeros(1, 5)], 1, (64, 64)).error == 0
    assert exports.check.compare(zeros, lambda images: [torch.full((1, 5), 1e-9)], 1, (64, 64)).error == float("inf")


def test_average_pool_is_torchs():
    pool = nn.AdaptiveAvgPool2d((3, 6))
    own = exports.networks._AveragePool(pool.output_size)
    for size in [(7, 5), (1, 1), (2, 9), (6, 12), (30, 41)]:
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(own(x), pool(x))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("bridges", ["", "paper"])
@pytest.mark.parametrize("name", ["sola_nano", "sola_tiny", "sola_small"])
def test_family(name, bridges, tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, bridges=bridges)
    sizes = [(224, 224), (256, 320), (512, 512), (97, 131)]
    report = exports.export(exports.classifier(model), tmp_path / "a.onnx", sizes=sizes)
    print(name, bridges, json.dumps([c.error for c in report.comparisons]))
    assert report.ok


_PEAK = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.enable_cpu_mem_arena = False
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for side in (64, 512, 1024):
    session.run(None, {"images": numpy.zeros((1, 3, side, side), numpy.float32)})
    lines = open('/proc/self/status').read().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_of_a_linear_schedule_is_linear(tmp_path):
    has("onnx", "onnxscript", "onnxruntime")
    path = tmp_path / "linear.onnx"
    linear = build(schedule="LL/LL", dims=(48, 64), bridges="")
    assert exports.export(exports.classifier(linear), path, sizes=[(64, 96)], batches=[1]).ok
    said = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
    assert "mismatch" not in said.stderr
    before, at_512, at_1024 = map(int, said.stdout.split())
    # quadratic would be 16
    assert 3 < (at_1024 - before) / (at_512 - before) < 4.4
