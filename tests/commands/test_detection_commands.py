# SPDX-License-Identifier: Apache-2.0
"""Detection from the command line: files of a run, resuming after a kill, numbers, pictures, invalid input."""

import csv
import json
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small import python

from sola_vision.cli import main
from sola_vision.commands.evaluate_detection import image_at
from sola_vision.data import DetectionConfig
from sola_vision.data.scenes import write_coco

pytest.importorskip("faster_coco_eval", reason="needs the extra [det]")

CLASSES = ["disc", "square", "triangle", "cross"]
TINY = [
    *("train", "few_objects", "--model.dims", "[8,16,24,32]", "--model.head_dim", 8, "--detector.channels", 16),
    *("--detector.box_channels", 16, "--detector.proposals", 60, "--detector.samples", 16, "--image.size", 48),
    *("--detector.score_threshold", 0, "--image.longest", 64, "--image.crop", 48, "--train.steps", 6),
    *("--train.batch_size", 4, "--train.warmup_steps", 1, "--train.warmup_epochs", 0, "--train.log_every", 1),
    *("--train.evaluate_every", 2, "--train.save_steps", 2, "--train.device", "cpu", "--train.workers", 0),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_coco(root, 8, 5, (48, 64))
    return root


@pytest.fixture(scope="module")
def detector(tmp_path_factory, scenes):
    """The folder of a finished run; tests must not write there."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main([str(word) for word in (*TINY, "--data", scenes, "--out", folder)]) == 0
    return folder


def _records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clocks = {"seconds", "images_per_second"}
    return [{name: value for name, value in json.loads(line).items() if name not in clocks} for line in lines]


def _best(folder):
    return {name: value.numpy().tobytes() for name, value in load_file(folder / "best.safetensors").items()}


def _torchrun(*words):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return python("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port, *words)


def _only_boxes(scenes, root, all_but_first=False):
    """The same images with boxes only."""
    shutil.copytree(scenes, root)
    for file in (root / "annotations").iterdir():
        document = json.loads(file.read_text())
        for annotation in document["annotations"][1 if all_but_first else 0 :]:
            annotation["segmentation"] = []
        file.write_text(json.dumps(document))
    return root


# train ---------------------------------------------------------------------------------------------------------------
def test_train_leaves_a_whole_folder(detector):
    summary = json.loads((detector / "summary.json").read_text())
    assert {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "best"} <= summary.keys()
    assert [record["kind"] for record in _records(detector)] == [*["train"] * 4, "eval", *["train"] * 2, "eval"]
    assert {"loss", "loss_objectness", "loss_rpn_box_reg", "box_class", "box_l1", "mask"} <= _records(detector)[
        0
    ].keys()
    assert Image.open(detector / "curve.png").size[0] > 300
    config = yaml.safe_load((detector / "config.yaml").read_text())
    assert (config["detector"]["channels"], config["image"]["size"], config["image"]["masks"]) == (16, 48, None)
    with safe_open(detector / "best.safetensors", "pt") as file:
        said = {name: json.loads(value) for name, value in file.metadata().items() if name != "format"}
    assert (said["task"], said["classes"], said["category_ids"]) == ("detection", CLASSES, [1, 2, 3, 4])
    assert said["image"]["masks"] is True


def test_killed_run_ends_with_the_same_bits(sola, tmp_path, scenes, detector):
    ended = python(Path(__file__).with_name("killed.py"), 4, *TINY, "--data", scenes, "--out", "killed")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert sola("train", "--resume", "--out", "killed").code == 0
    assert _best(tmp_path / "killed") == _best(detector)
    assert _records(tmp_path / "killed") == _records(detector)


@pytest.mark.slow
def test_two_killed_processes_end_with_the_same_bits(tmp_path, scenes):
    words = [*TINY, "--data", scenes]
    assert _torchrun("-m", "sola_vision", *words, "--out", "whole").returncode == 0
    assert _torchrun(Path(__file__).with_name("killed.py"), 4, *words, "--out", "killed").returncode != 0
    assert _torchrun("-m", "sola_vision", "train", "--resume", "--out", "killed").returncode == 0
    assert _best(tmp_path / "killed") == _best(tmp_path / "whole")
    assert _records(tmp_path / "killed") == _records(tmp_path / "whole")


def test_boxes_alone_train_by_the_same_command(sola, tmp_path, scenes, detector):
    data = _only_boxes(scenes, tmp_path / "boxes")
    said = sola(*TINY, "--data", data, "--train.steps", 2, "--out", "run")
    assert said.code == 0, said.err
    assert "Faster R-CNN" in said.err
    assert "boxes only" in said.err
    assert "mask_ap" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sola("eval", "--checkpoint", "run", "--data", data).code == 0
    assert not (tmp_path / "run" / "eval" / "results.segm.json").exists()
    # a detector with masks is scored by boxes if an object of the data has no mask
    some = _only_boxes(scenes, tmp_path / "some", all_but_first=True)
    said = sola("eval", "--checkpoint", detector, "--data", some, "--out", "some_eval")
    assert said.code == 0, said.err
    assert "no mask for " in said.err
    assert "only boxes are scored" in said.err
    # a detector of boxes can be evaluated on data with masks
    assert sola("eval", "--checkpoint", "run", "--data", scenes).code == 0


# eval ----------------------------------------------------------------------------------------------------------------
def test_eval_has_the_numbers_of_the_run_and_its_results_score_the_same(sola, tmp_path, scenes, detector):
    said = sola("eval", "--checkpoint", detector, "--data", scenes, "--out", "eval", "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result == json.loads((tmp_path / "eval" / "eval.json").read_text())
    printed = sola("eval", "--checkpoint", detector, "--data", scenes, "--out", "eval").out
    assert re.search(r"boxes % +┃ +masks %", printed)
    best = json.loads((detector / "summary.json").read_text())["best"]
    assert result["bbox"]["AP"] == pytest.approx(best["box_ap"], abs=1e-6)
    assert result["segm"]["AP"] == pytest.approx(best["mask_ap"], abs=1e-6)
    assert (result["images"], result["max_dets"]) == (5, 100)
    for name in ("precision_recall.png", "worst.png"):
        assert min(Image.open(tmp_path / "eval" / name).size) > 300
    rows = list(csv.DictReader((tmp_path / "eval" / "classes.csv").open()))
    assert [row["class"] for row in rows] == CLASSES
    assert sum(int(row["objects"]) for row in rows) > 4
    for kind in ("bbox", "segm"):
        results = tmp_path / "eval" / f"results.{kind}.json"
        assert json.loads(results.read_text())
        truth = scenes / "annotations" / "instances_val.json"
        again = sola("eval", "--results", results, "--annotations", truth, "--type", kind, "--out", "again", "--json")
        assert again.code == 0, again.err
        assert json.loads(again.out)[kind] == result[kind]


def test_results_hold_no_class_that_the_annotations_lack(sola, tmp_path, scenes, detector):
    shutil.copytree(scenes, tmp_path / "fewer")
    file = tmp_path / "fewer" / "annotations" / "instances_val.json"
    document = json.loads(file.read_text())
    (square,) = [category["id"] for category in document["categories"] if category["name"] == "square"]
    for part, field in (("categories", "id"), ("annotations", "category_id")):
        document[part] = [entry for entry in document[part] if entry[field] != square]
    file.write_text(json.dumps(document))
    said = sola("eval", "--checkpoint", detector, "--data", "fewer", "--out", "eval", "--json")
    assert said.code == 0, said.err
    results = tmp_path / "eval" / "results.bbox.json"
    known = {category["id"] for category in document["categories"]}
    assert {result["category_id"] for result in json.loads(results.read_text())} == known
    again = sola("eval", "--results", results, "--annotations", file, "--out", "again", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["bbox"] == json.loads(said.out)["bbox"]


def test_masks_that_are_unusable_are_said_and_cost_boxes_nothing(sola, caplog, tmp_path, scenes, detector):
    assert sola("eval", "--checkpoint", detector, "--data", scenes, "--out", "eval").code == 0
    document = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    document["annotations"][2]["segmentation"] = [[1, 1, 9, 9]]
    (tmp_path / "truth.json").write_text(json.dumps(document))
    (tmp_path / "both.json").write_text((tmp_path / "eval" / "results.segm.json").read_text())
    boxes = json.loads((tmp_path / "eval" / "results.bbox.json").read_text())
    results = json.loads((tmp_path / "both.json").read_text())
    (tmp_path / "both.json").write_text(json.dumps([a | b for a, b in zip(boxes, results, strict=True)]))
    said = sola("eval", "--results", "both.json", "--annotations", "truth.json", "--out", "again", "--json")
    assert said.code == 0, said.err
    assert "scoring skips 1 of" in caplog.text
    result = json.loads(said.out)
    assert result["bbox"] == json.loads((tmp_path / "eval" / "eval.json").read_text())["bbox"]
    assert "segm" in result


def test_another_size_is_not_undone_by_the_limit_of_the_longer_side(sola, tmp_path, scenes, detector):
    # 48x64 images, trained with at most 64 pixels; the size asked for is that of the network's input
    for words, size in (([], (48, 64)), (["--size", 96], (96, 128))):
        said = sola("eval", "--checkpoint", detector, "--data", scenes, *words, "--out", "eval", "--json")
        assert said.code == 0, said.err
        assert (json.loads(said.out)["size"], json.loads(said.out)["longest"]) == size
    image = DetectionConfig(size=48, longest=64)
    assert image_at(image, 96).resized(48, 64) == (96, 128)
    assert image_at(DetectionConfig(size=None, longest=64, zoom=1.5), 96).resized(48, 48) == (96, 96)


def test_max_dets_limits_what_is_reported_and_is_said(sola, tmp_path, scenes, detector):
    said = sola("eval", "--checkpoint", detector, "--data", scenes, "--max-dets", 2, "--out", "few")
    assert "maxDets 2" in said.out
    results = json.loads((tmp_path / "few" / "results.bbox.json").read_text())
    assert len(results) == 2 * 5


@pytest.mark.slow  # the same within a task: tests/tasks/test_detection.py
def test_two_processes_evaluate_to_the_same_bits(tmp_path, scenes, detector):
    words = ["-m", "sola_vision", "eval", "--checkpoint", detector, "--data", scenes, "--workers", 0, "--json", "--out"]
    one, two = python(*words, "one"), _torchrun(*words, "two")
    assert two.returncode == 0, two.stderr
    numbers = [{k: v for k, v in json.loads(ended.stdout).items() if k != "seconds"} for ended in (one, two)]
    assert numbers[0] == numbers[1]
    files = [(tmp_path / folder / "results.segm.json").read_text() for folder in ("one", "two")]
    assert files[0] == files[1]


# predict -------------------------------------------------------------------------------------------------------------
def test_predict_draws_and_writes_results(sola, tmp_path, scenes, detector):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(scenes / "val" / "000001.png", tmp_path / "in")
    shutil.copy(scenes / "val" / "000002.png", tmp_path / "in" / "deep" / "[b].png")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    words = ["predict", "in", "--checkpoint", detector, "--threshold", 0, "--max-dets", 3]
    said = sola(*words, "--out", "found", "--json")
    assert said.code == 0, said.err
    assert "broken.jpg" in said.err
    document = json.loads(said.out)
    assert [image["image"] for image in document["images"]] == ["000001.png", "deep/[b].png"]
    for _ in range(2):  # the output of a call among the images is not an input of the next
        again = json.loads(sola(*words, "--out", "in/found", "--json").out)
        assert [image["image"] for image in again["images"]] == ["000001.png", "deep/[b].png"]
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    assert len(results) == 6
    assert {result["image_id"] for result in results} == {1, 2}
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    images = json.loads((tmp_path / "found" / "images.json").read_text())["images"]
    assert images[1] == {"id": 2, "file_name": "deep/[b].png", "height": 48, "width": 64}
    page = (tmp_path / "found" / "index.html").read_text()
    for image in document["images"]:
        drawn = Image.open(tmp_path / "found" / image["picture"])
        assert min(drawn.size) >= 480  # small images are enlarged, or labels could not be read
        assert image["image"] in page
    said = sola("predict", scenes / "val" / "000001.png", "--checkpoint", detector, "--out", "one")
    assert said.code == 0
    assert "000001.png" in said.out
    assert not (tmp_path / "one" / "index.html").exists()


def test_predict_does_not_mix_the_pictures_of_two_calls(refused, scenes, detector):
    old = Path("found/pictures/deep/000001.png.jpg")
    old.parent.mkdir(parents=True)
    old.write_text("of other images")
    words = [f"--out found: {old} would be mixed", "use another folder"]
    refused("predict", scenes / "val", "--checkpoint", detector, "--out", "found", names=words)


def test_eval_refuses_predictions_whose_ids_are_of_other_images(sola, refused, tmp_path, scenes, detector):
    assert sola("predict", scenes / "val", "--checkpoint", detector, "--threshold", 0, "--out", "found").code == 0
    truth = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    numbers = {image["id"]: image["file_name"] for image in json.loads(Path("found/images.json").read_text())["images"]}
    assert names == numbers  # by chance: sorted, from 1
    words = ["eval", "--results", "found/results.json", "--annotations", "truth.json"]
    Path("truth.json").write_text(json.dumps(truth))
    assert sola(*words).code == 0
    for image in truth["images"]:  # the same ids in another order
        image["file_name"] = "val/" + names[6 - image["id"]]
    Path("truth.json").write_text(json.dumps(truth))
    message = f"image_id 1 is {numbers[1]} there, but val/{numbers[5]} in truth.json"
    refused(*words, names=["--results found/results.json", message, "sola eval --checkpoint"])
    Path("found/images.json").unlink()  # results of another program
    assert sola(*words).code == 0


def test_eval_of_other_data_is_announced_and_leaves_no_file_of_the_earlier_one(sola, tmp_path, scenes, detector):
    words = ["eval", "--checkpoint", detector, "--out", "e", "--data"]
    for _ in range(2):
        said = sola(*words, scenes)
        assert (said.code, said.err) == (0, "")
    assert (tmp_path / "e" / "results.segm.json").exists()
    said = sola(*words, _only_boxes(scenes, tmp_path / "boxes"))
    replaced = f"sola: the evaluation in e will be replaced: --checkpoint {detector} --data {scenes} --split val"
    assert said.err.splitlines()[-1] == f"{replaced}; another --out keeps it"
    assert (tmp_path / "e" / "results.bbox.json").exists()
    assert not (tmp_path / "e" / "results.segm.json").exists()
    said = sola("eval", "--results", "e/results.bbox.json", "--annotations", "boxes/annotations/instances_val.json",
                "--out", "e")  # fmt: skip
    assert (said.code, "will be replaced" in said.err) == (0, True)
    assert not (tmp_path / "e" / "worst.png").exists()
    assert (tmp_path / "e" / "results.bbox.json").exists()  # the input


# wrong input ---------------------------------------------------------------------------------------------------------
def test_wrong_options_are_one_line(refused, scenes, detector):
    truth = scenes / "annotations" / "instances_val.json"
    refused("train", "few_objects", names=["--data", "instances_SPLIT.json"])
    refused("train", "few_objects", "--data", scenes, "--detector.channel", 8, names=["detector.channel"])
    refused("train", "few_objects", "--data", scenes, "--detector.max_detections", 0, names=["max_detections=0"])
    refused("train", "few_objects", "--data", scenes / "train", names=["instances_SPLIT.json"])
    refused("train", "few_images", "--data", scenes, names=["class"])
    refused("eval", "--checkpoint", detector, names=["--data", "detector"])
    refused("eval", "--checkpoint", detector, "--data", scenes, "--split", "dev", names=["split dev"])
    refused("eval", "--checkpoint", detector, "--data", scenes, "--max-dets", 0, names=["--max-dets 0"])
    refused("eval", "--checkpoint", detector, "--data", scenes, "--size", 0, names=["size=0", "at least 32"])
    refused("predict", scenes / "val", "--checkpoint", detector, "--size", 0, names=["size=0", "at least 32"])
    refused("eval", "--checkpoint", detector, "--data", scenes, "--type", "segm", names=["--type", "--results"])
    refused("eval", "--results", "nowhere.json", names=["--annotations"])
    refused("eval", "--results", "nowhere.json", "--annotations", truth, names=["nowhere.json"])
    refused("eval", "--results", truth, "--annotations", truth, names=["list of results"])
    for words in (["--checkpoint", detector], ["--data", scenes], ["--size", 96]):
        refused(
            "eval", "--results", truth, "--annotations", truth, *words, names=[*words, "--results", "leave one out"]
        )
    refused("eval", "--results", truth, "--annotations", truth, "--type", "keypoints", names=["keypoints"])
    refused("predict", scenes / "val", "--checkpoint", detector, "--threshold", 2, names=["--threshold 2"])
    Path("taken").write_text("mine")
    refused(
        "predict", scenes / "val", "--checkpoint", detector, "--out", "taken", names=["--out taken: taken is a file"]
    )
    refused("explain", scenes / "val" / "000001.png", "--checkpoint", detector, names=["detection", "classifier"])


def test_data_with_other_classes_is_refused(refused, tmp_path, scenes, detector):
    shutil.copytree(scenes, tmp_path / "other")
    file = tmp_path / "other" / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace('"cross"', '"star"'))
    refused("eval", "--checkpoint", detector, "--data", tmp_path / "other", names=["'star'", "disc"])
    refused(*TINY, "--data", tmp_path / "other", "--out", "run", names=["'star'"])


def test_missing_images_are_named_and_counted(sola, tmp_path, scenes, detector):
    shutil.copytree(scenes, tmp_path / "holes")
    (tmp_path / "holes" / "train" / "000003.png").unlink()
    (tmp_path / "holes" / "val" / "000002.png").unlink()
    said = sola(*TINY, "--data", "holes", "--out", "run")
    assert said.code == 0, said.err
    assert "000003.png" in said.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images_skipped"] == {"training": 1, "evaluation": 1}
    said = sola("eval", "--checkpoint", detector, "--data", "holes", "--out", "eval", "--json")
    assert said.code == 0
    assert (json.loads(said.out)["images"], json.loads(said.out)["images_skipped"]) == (4, 1)
    assert "000002.png" in said.err
    for name in ("000004.png", "000005.png"):
        (tmp_path / "holes" / "train" / name).unlink()
    said = sola(*TINY, "--data", "holes", "--out", "again")
    assert said.code == 2
    assert "of the 8 training images cannot be read" in said.err.splitlines()[-1]


def test_a_missing_package_is_named_with_its_extra(refused, scenes, detector, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    refused(*TINY, "--data", scenes, "--out", "run", names=["sola-vision[det]"])
    refused("eval", "--checkpoint", detector, "--data", scenes, names=["sola-vision[det]"])
    refused("predict", scenes / "val", "--checkpoint", detector, names=["sola-vision[det]"])
