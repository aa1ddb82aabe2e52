# SPDX-License-Identifier: Apache-2.0
"""The task of detection: masks pasted into images, results in COCO's format, the same numbers from two processes."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sola_vision.data import (
    CocoFolder,
    DetectionConfig,
    DetectionEvalTransform,
    collate_lists,
    encode_mask,
    mask_library,
)
from sola_vision.data.scenes import write_coco
from sola_vision.engine import EvaluationBatches, distributed
from sola_vision.tasks import ModelConfig
from sola_vision.tasks.box_pictures import Shape, counted
from sola_vision.tasks.detection import Detection, Findings, metrics, paste_mask, to_results
from sola_vision.tasks.detector import DetectorConfig, build_detector

pytest.importorskip("faster_coco_eval", reason="needs the extra [det]")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_coco(root, train=1, val=7, size=(64, 80))
    return root


@pytest.mark.parametrize(
    "box", [(3.2, 5.1, 30.7, 22.9), (-4.0, -3.0, 9.5, 12.0), (40.3, 50.2, 70.0, 66.0), (7, 7, 7.4, 7.3)]
)
def test_masks_are_pasted_as_a_bilinear_sampler_would(box):
    size = (60, 50)
    mask = torch.rand(28, 28, generator=torch.Generator().manual_seed(0))
    x0, y0, x1, y1 = box
    y = (torch.arange(size[0], dtype=torch.float64) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(size[1], dtype=torch.float64) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack((x[None].expand(size), y[:, None].expand(size)), -1)
    whole = F.grid_sample(mask[None, None].double(), grid[None], align_corners=False)[0, 0]
    clear = (whole - 0.5).abs() > 1e-6
    pasted = torch.from_numpy(paste_mask(mask.numpy(), np.array(box), size)).bool()
    assert torch.equal(pasted[clear], (whole >= 0.5)[clear])


def test_a_full_mask_fills_its_box():
    pasted = paste_mask(np.ones((28, 28)), np.array([5.0, 8.0, 25.0, 38.0]), (50, 40))
    assert pasted.sum() == 20 * 30
    assert pasted[8:38, 5:25].all()


def test_results_are_those_of_cocos_format():
    found = {
        "boxes": torch.tensor([[1.0, 2.0, 11.0, 22.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.75]),
        "masks": torch.ones(1, 28, 28),
    }
    (result,) = to_results(found, 42, (30, 40), [5, 90])
    assert (result["image_id"], result["category_id"], result["score"]) == (42, 90, 0.75)
    assert result["bbox"] == [1, 2, 10, 20]
    assert mask_library().decode(json.loads(json.dumps(result["segmentation"]))).sum() == 200
    findings = Findings([result], [42])
    assert set(findings.of("bbox")[0]) == {"image_id", "category_id", "score", "bbox"}
    assert set(findings.of("segm")[0]) == {"image_id", "category_id", "score", "segmentation"}


def test_what_lies_on_a_crowd_is_not_wrong_among_the_worst_images():
    truth, crowd = [Shape((0, 0, 10, 10), 1)], Shape((0, 0, 100, 50), 1)
    hit, on, beside = (Shape(box, 1, 0.9) for box in ((0, 0, 10, 10), (50, 10, 60, 60), (90, 10, 130, 60)))
    other = Shape((50, 10, 60, 20), 0, 0.9)
    kept, right = counted(truth, [on, hit, beside, other], [crowd])
    assert (kept, right) == ([hit, beside, other], 1)
    assert counted(truth, [on, hit], []) == ([on, hit], 1)


def test_the_truth_as_results_has_a_hundred_percent(scenes):
    held_out = CocoFolder(scenes, "val")
    task = Detection(held_out, 100, masks=True)
    assert task.metric == "mask_ap"
    results = []
    for index, number in enumerate(held_out.image_ids):
        objects = held_out.objects(index)
        found = {
            "boxes": torch.from_numpy(objects.boxes),
            "labels": torch.from_numpy(objects.labels),
            "scores": torch.linspace(0.9, 0.5, len(objects.labels)),
        }
        whole = to_results(found, number, objects.size, held_out.category_ids)
        results += [{**r, "segmentation": encode_mask(objects.mask(i))} for i, r in enumerate(whole)]
    numbers = {
        name: v for one in task.scores(Findings(results, held_out.image_ids)) for name, v in metrics(one).items()
    }
    assert numbers["box_ap"] == pytest.approx(100)
    assert numbers["mask_ap"] == pytest.approx(100)
    # half of the images are not evaluated and do not count
    seen = held_out.image_ids[:3]
    some = [result for result in results if result["image_id"] in seen]
    assert metrics(task.scores(Findings(some, seen))[0])["box_ap"] == pytest.approx(100)


def detector():
    torch.manual_seed(0)
    settings = DetectorConfig(
        channels=16, box_channels=32, group_norm=True, anchor_scale=4, proposals=50, samples=16, score_threshold=0.0
    )
    return build_detector(
        ModelConfig(name="sola_nano", dims=(8, 16, 32, 32)), settings, DetectionConfig(size=None, longest=96), 4
    ).eval()


def evaluated(root, batch_size):
    """Print every bit of the results of an untrained network, and its metrics."""
    with distributed("cpu") as world, torch.no_grad():
        held_out = CocoFolder(root, "val", DetectionEvalTransform())
        task = Detection(held_out, 100, masks=True)
        model = detector()
        batches = EvaluationBatches(held_out, world, batch_size=batch_size, collate=collate_lists)
        findings = task.find(model, batches)
        return [task.evaluate(model, batches), findings.results, findings.image_ids]


def test_without_an_image_that_can_be_read_the_metric_is_no_number(scenes):
    dataset = CocoFolder(scenes, "val", DetectionEvalTransform(), masks=True)
    task = Detection(dataset, 100, masks=True)
    found = task.evaluate(detector(), [])
    assert math.isnan(found[task.metric])


def test_two_processes_and_any_batch_give_the_numbers_of_one(scenes, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    ended = subprocess.run([*words, __file__, str(scenes), str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = json.loads(json.dumps(evaluated(scenes, 3)))
    torch.set_num_threads(threads)
    assert len(alone[1]) > 100
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone


def test_training_lowers_the_loss(scenes):
    from sola_vision.data import DetectionTrainTransform

    data = CocoFolder(scenes, "val", DetectionTrainTransform(DetectionConfig(size=64, longest=96)))
    model, task = detector().train(), Detection(CocoFolder(scenes, "val"), 100, masks=True)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    batch = collate_lists([data[index] for index in range(4)])
    losses = []
    for step in range(25):
        torch.manual_seed(step)
        loss, parts = task.loss(model, batch)
        assert loss.item() == pytest.approx(sum(value.item() for value in parts.values()), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


if __name__ == "__main__":
    torch.set_num_threads(1)
    # a file for each process: long lines of two would mix in one pipe
    (Path(sys.argv[2]) / f"{os.environ['RANK']}.json").write_text(json.dumps(evaluated(sys.argv[1], 2)))
