# SPDX-License-Identifier: Apache-2.0
"""`sola export` from the outside: files, output, the examples that use the files, one line for invalid input."""

import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sola_vision import ops
from sola_vision.cli import main
from sola_vision.commands import export as command
from sola_vision.data import EvalTransform, ImageConfig, read_image
from sola_vision.engine import save_weights
from sola_vision.export import Comparison, Report
from sola_vision.tasks import ModelConfig, build_model, load_checkpoint, metadata

EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A classifier of few layers, since tracing takes a second a layer; its head tells the classes apart."""
    torch.manual_seed(0)
    config = ModelConfig(name="sola_nano", schedule="L/S", dims=(8, 32))
    image = ImageConfig(size=48, interpolation="bilinear")
    model = build_model(config, len(CLASSES), image.size)
    torch.nn.init.normal_(model.head.fc.weight)
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    save_weights(path, model, metadata("classification", config, image, CLASSES, model))
    return path


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    said = subprocess.run(
        [sys.executable, "-m", "sola_vision", "export", str(checkpoint), "--format", "onnx", "--out", str(path)],
        capture_output=True,
        text=True,
        check=True,
        # torch 2.11's own use of what it has deprecated
        env={**os.environ, "COLUMNS": "110", "PYTHONWARNINGS": "ignore:`isinstance(treespec:FutureWarning"},
    )
    return path, said


def test_report_names_sizes_errors_and_results(exported):
    path, said = exported
    assert path.exists()
    for size in ("1 x 48x48", "3 x 80x144", "3 x 97x131"):
        assert size in said.stdout
    assert len(re.findall(r"\de-0\d", said.stdout)) == 6
    assert "images [batch, 3, height, width], normalised -> logits [batch, 3]" in said.stdout
    assert "none of another domain" in said.stdout
    first, *comparing = said.stderr.splitlines()
    assert first.startswith("sola: tracing the network and translating it to ONNX")
    assert len(comparing) == 6
    assert comparing[2] == "sola: comparing with PyTorch, 3 of 6: batch 1 of 80x144 images"


def test_example_predicts_what_the_network_predicts(exported, checkpoint, tmp_path):
    spec = importlib.util.spec_from_file_location("onnx_classify", EXAMPLES / "onnx_classify.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    imported = set(re.findall(r"^(?:import|from) (\w+)", (EXAMPLES / "onnx_classify.py").read_text(), re.M))
    assert imported == {"json", "sys", "numpy", "onnxruntime", "PIL"}
    loaded = load_checkpoint(checkpoint)
    transform = EvalTransform(loaded.image)
    random = np.random.default_rng(0)
    for height, width in [(60, 91), (200, 63), (48, 48)]:
        picture = tmp_path / "picture.png"
        coarse = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((width, height))
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise to show
        coarse.save(picture, exif=exif)
        with torch.inference_mode():
            wanted = loaded.model(transform(read_image(picture))[None]).softmax(1)[0]
        found = dict(example.classify(str(exported[0]), Image.open(picture)))
        assert [found[name] for name in CLASSES] == pytest.approx(wanted.tolist(), abs=2e-3)
    ended = subprocess.run(
        [sys.executable, EXAMPLES / "onnx_classify.py", exported[0], picture],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split()[2] == CLASSES[int(wanted.argmax())]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], ""),
        (["MODEL", "text.jpg"], "; UnidentifiedImageError: cannot identify image file 'text.jpg'"),
        (["missing.onnx", "picture.png"], "missing.onnx"),
        (["text.jpg", "picture.png"], "text.jpg"),
    ],
    ids=["no arguments", "text", "missing model", "no model"],
)
def test_example_answers_wrong_arguments_in_one_line(exported, tmp_path, words, reason):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (60, 50)).save(tmp_path / "picture.png")
    words = [str(Path(exported[0]).absolute()) if word == "MODEL" else word for word in words]
    command = [sys.executable, EXAMPLES / "onnx_classify.py", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: python onnx_classify.py model.onnx PICTURE.jpg")
    assert reason in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_features_as_an_archive_and_json(capsys, checkpoint):
    words = ["--format", "torch-export", "--out", "a.pt2", "--features", "--check", "40x72", "--batch", "1", "--json"]
    assert main(["export", str(checkpoint), *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert document["outputs"] == {
        "stride4": "[batch, 8, height/4, width/4]",
        "stride8": "[batch, 32, height/8, width/8]",
    }
    assert [(c["batch"], c["height"], c["width"]) for c in document["comparisons"]] == [(1, 40, 72)]
    about = {"classes": ""}
    program = torch.export.load("a.pt2", extra_files=about)
    assert json.loads(about["classes"]) == CLASSES
    assert any("sola.wkv" in str(node.target) for node in program.graph.nodes)


def test_an_error_that_is_no_number_is_null(sola, checkpoint, monkeypatch):
    report = Report("a.pt2", "aoti", "float32", 9, {}, [Comparison(1, 40, 72, "logits", math.inf)], 1e-4)
    monkeypatch.setattr(command, "export", lambda *arguments, **options: report)
    said = sola("export", checkpoint, "--format", "aoti", "--out", "a.pt2", "--json")
    assert said.code == 1
    assert json.loads(said.out, parse_constant=pytest.fail)["comparisons"][0]["error"] is None


class _Trap:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_files_of_other_programs_are_refused(refused, tmp_path, checkpoint):
    whole = checkpoint.read_bytes()
    for name, content in {
        "trap.pth": pickle.dumps(_Trap(), protocol=2),
        "trap.safetensors": pickle.dumps(_Trap(), protocol=2),
        "short.safetensors": whole[: len(whole) // 2],
        "empty.safetensors": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        refused("export", name, "--format", "onnx", "--out", "a.onnx", names=[name])
    torch.save({"weights": torch.zeros(1)}, tmp_path / "theirs.pt")
    refused("export", "theirs.pt", "--format", "onnx", "--out", "a.onnx", names=["theirs.pt"])
    assert not (tmp_path / "sprung").exists()


WRONG = [
    (["sola_nano", "--format", "tflite", "--out", "a.onnx"], ["--format", "'tflite'", "onnx"]),
    (["sola_nano", "--out", "a.onnx"], ["--format"]),
    (["sola_nano", "--format", "onnx"], ["--out"]),
    (
        ["sola_nano", "--format", "onnx", "--out", "nowhere/a.onnx"],
        ["--out nowhere/a.onnx: its folder does not exist; create it first"],
    ),
    (["sola_nano", "--format", "onnx", "--out", "/proc/a.onnx"], ["--out /proc/a.onnx: no such file"]),
    (["sola_nano", "--format", "onnx", "--out", "a.pt2"], ["a.pt2", "*.onnx"]),
    (["sola_nano", "--format", "aoti", "--out", "a.onnx"], ["a.onnx", "*.pt2"]),
    (["sola_nano", "--format", "aoti", "--out", "a.pt2", "--precision", "int8"], ["int8", "onnx"]),
    (["sola_nano", "--format", "onnx", "--out", "a.onnx", "--precision", "int4"], ["--precision", "'int4'"]),
    (["sola_nano", "--format", "onnx", "--out", "a.onnx", "--check", "12x"], ["--check '12x'", "HEIGHTxWIDTH"]),
    (["sola_nano", "--format", "onnx", "--out", "a.onnx", "--check", "0"], ["--check '0'", "HEIGHTxWIDTH"]),
    (["sola_nano", "--format", "onnx", "--out", "a.onnx", "--batch", "1", "0"], ["--batch 0 must be at least 1"]),
    (["sola_nano", "--format", "onnx", "--out", "a.onnx", "--classes", "0"], ["sola: --classes 0 must be"]),
    (["sola_nano", "--format", "onnx", "--out", "a.onnx", "--schedule", "LX"], ["'X'"]),
    (["sola_huge", "--format", "onnx", "--out", "a.onnx"], ["sola_huge", "sola_tiny"]),
    (["CHECKPOINT", "--format", "onnx", "--out", "a.onnx", "--bridges", "paper"], ["--bridges"]),
]


@pytest.mark.parametrize(("words", "names"), WRONG, ids=lambda value: " ".join(value))
def test_wrong_request_is_one_line(refused, checkpoint, words, names):
    refused("export", *(checkpoint if word == "CHECKPOINT" else word for word in words), names=names)


def test_missing_extra_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused("export", "sola_nano", "--format", "onnx", "--out", "a.onnx", names=["onnxruntime", "sola-vision[export]"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dense_tasks(tmp_path, capsys):
    from sola_vision.data import DetectionConfig, SegmentationConfig
    from sola_vision.tasks import DetectorConfig, UPerNetConfig, detector, segmenter

    config = ModelConfig(name="sola_nano", schedule="L/L/L/S", dims=(8, 16, 16, 32))
    head = UPerNetConfig(channels=16, auxiliary_channels=16)
    image = SegmentationConfig()
    model = segmenter.build_segmenter(config, head, 3, 64)
    source = segmenter.backbone_of(model)
    from dataclasses import asdict

    about = metadata("segmentation", config, image, CLASSES, source, segmenter=asdict(head))
    save_weights(tmp_path / "masks.safetensors", model, about)
    words = ["--format", "onnx", "--check", "192x192", "97x131", "64x96", "--json"]
    assert main(["export", "masks.safetensors", *words, "--out", "masks.onnx"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"] == {"logits": "[batch, 3, height, width]"}

    config, image = ModelConfig(name="sola_nano", schedule="L/L/L/S", dims=(8, 16, 16, 32)), DetectionConfig()
    settings = DetectorConfig(channels=16)
    model = detector.build_detector(config, settings, image, 3)
    more = {"detector": asdict(settings), "category_ids": [1, 2, 3]}
    about = metadata("detection", config, image, CLASSES, detector.backbone_of(model), **more)
    save_weights(tmp_path / "boxes.safetensors", model, about)
    assert main(["export", "boxes.safetensors", *words, "--out", "boxes.onnx"]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert list(outputs) == ["p2", "p3", "p4", "p5", "p6"]
    assert outputs["p6"].endswith(", height/64, width/64]")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_package_runs_without_python(tmp_path, checkpoint):
    if ops.missing_kernel("cpu") is not None:
        pytest.skip("needs the CPU kernel")
    from torch.utils.cpp_extension import include_paths, library_paths

    assert main(["export", str(checkpoint), "--format", "aoti", "--out", "model.pt2", "--check", "40x72"]) == 0
    (libraries,) = library_paths()
    flags = [f"-I{path}" for path in include_paths()]
    command = ["c++", "-std=c++20", str(EXAMPLES / "aoti_classify.cpp"), *flags, f"-L{libraries}"]
    command += [
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
        f"-Wl,-rpath,{libraries}",
        "-o",
        "classify",
    ]
    subprocess.run(command, check=True)
    kernel = Path(ops.__file__).with_name("_kernel.so")
    ended = subprocess.run(["./classify", "model.pt2", str(kernel), "33", "47"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    with torch.inference_mode():
        wanted = load_checkpoint(checkpoint).model(torch.ones(1, 3, 33, 47))[0].tolist()
    assert [float(line) for line in ended.stdout.split()] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
