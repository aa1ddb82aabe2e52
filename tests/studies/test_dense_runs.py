# SPDX-License-Identifier: Apache-2.0
"""Table 8's runs: segmentation with UPerNet, and initial weights."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from little import CLASSES, LITTLE, run, write_images, write_masks
from PIL import Image

from sola_vision import SolaVision
from sola_vision.data import ImageConfig
from sola_vision.engine import read_weights, save_weights
from sola_vision.recipes import get_recipe
from sola_vision.studies import SCALES, get_study, plan, write_report
from sola_vision.studies.outcome import gather
from sola_vision.tasks import ModelConfig, metadata
from sola_vision.tasks.segmentation import Segmentation
from sola_vision.tasks.segmenter import backbone_of, load_segmenter

TABLE_8 = get_study("table8")
ARMS = ["SoLA", "SoLA + bridges"]
ONE_SIZE = LITTLE.segmentation.networks["tiny"]


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("masks"))


@pytest.fixture(scope="module")
def segmented(tmp_path_factory, masks):
    """The folder of a study that ran without interruption; read-only for tests."""
    out = tmp_path_factory.mktemp("studies")
    assert run(planned(masks), out) == 0
    return out


def planned(masks, scale=LITTLE, **options):
    return plan(TABLE_8, scale, masks, device="cpu", **{"seeds": 1, **options})


def classifier(folder, bridges="", network=ONE_SIZE):
    """A checkpoint of an ImageNet-like classifier."""
    folder.mkdir()
    torch.manual_seed(5)
    model = SolaVision(network.with_changes(schedule=TABLE_8.arms[0].schedule, bridges=bridges, num_classes=4))
    said = metadata("classification", ModelConfig(name="sola_tiny"), ImageConfig(), list("abcd"), model)
    save_weights(folder / "best.safetensors", model, said)
    return str(folder)


def results(folder):
    found = [json.loads(path.read_text()) for path in (Path(folder) / "results").iterdir()]
    return sorted((each["key"], each["miou"], each["mean_accuracy"], each["pixel_accuracy"]) for each in found)


def test_both_arms_run_and_the_page_tells_of_miou(segmented, masks, tmp_path):
    shutil.copytree(segmented, tmp_path / "copy")
    outcome = write_report(tmp_path / "copy", "table8")
    assert [row.name for row in outcome.rows] == ARMS
    assert (outcome.missing, len(outcome.judged)) == (0, 1)
    for row, arm in zip(outcome.rows, TABLE_8.arms[:2], strict=True):
        assert 0 < row.by_seed[0] <= 100
        assert row.bridges == arm.bridges
    page = (tmp_path / "copy" / "table8" / "report.md").read_text()
    for text in ("44.7", "Mean IoU", "points of mIoU", "bridges > none", "255 is ignored", "crops of 32 pixels"):
        assert text in page
    assert "SoLA-B" not in page  # this scale has one size
    assert masks not in page


def test_a_run_is_a_checkpoint_of_sola(segmented):
    for result in gather(segmented, "table8").results:
        loaded = load_segmenter(segmented / "runs" / result["key"])
        assert loaded.classes == list(CLASSES)
        assert (loaded.image.crop, loaded.rule.ignore) == (32, 255)
        network = backbone_of(loaded.model).config
        assert (network.schedule, network.bridges) == (result["network"]["schedule"], result["network"]["bridges"])


def test_an_interrupted_run_goes_on_and_ends_the_same(segmented, masks, tmp_path, monkeypatch):
    loss, left = Segmentation.loss, [4]

    def interrupted(self, model, batch):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    monkeypatch.setattr(Segmentation, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(planned(masks), tmp_path)
    assert not (tmp_path / "results").exists()
    run(planned(masks), tmp_path)
    assert left[0] == 4 - 4 - 2 - 4  # two steps of the first run were saved
    assert results(tmp_path) == results(segmented)


def test_seeds_begin_with_other_weights(masks):
    made = planned(masks, seeds=2)
    first, _, second, _ = (each.prepare(made.images).model.state_dict()["head.classifier.weight"] for each in made.runs)
    assert not torch.equal(first, second)
    assert [each.seed for each in made.runs] == [0, 0, 1, 1]


@pytest.mark.parametrize("changes", [{"epochs": 3}, {"limit": 4}, {"ignore": 254}], ids=["epochs", "limit", "ignore"])
def test_what_changes_a_result_changes_the_key(masks, tmp_path, changes):
    copy = shutil.copytree(masks, tmp_path / "copy")
    for label in copy.glob("annotations/*/*.png"):
        Image.open(label).point(lambda value: min(value, 2)).save(label)  # no pixel is ignored
    keys = {each.key for each in planned(copy).runs}
    assert not keys & {each.key for each in planned(copy, **changes).runs}


def test_the_labels_are_part_of_the_key_and_the_folder_is_not(masks, tmp_path):
    keys = [each.key for each in planned(masks).runs]
    copy = shutil.copytree(masks, tmp_path / "moved")
    assert [each.key for each in planned(str(copy)).runs] == keys
    shutil.copy(copy / "annotations/train/0.png", copy / "annotations/train/1.png")
    assert not {*keys} & {each.key for each in planned(str(copy)).runs}


def test_arms_start_from_the_checkpoint_that_fits(masks, tmp_path):
    bridges = TABLE_8.arms[1].bridges
    with_bridges = classifier(tmp_path / "with", bridges)
    # given alone, it also serves the arm without bridges
    made = planned(masks, init=[with_bridges])
    assert [each.weights.drop_bridges for each in made.runs] == [True, False]
    stored = read_weights(Path(with_bridges) / "best.safetensors")
    for each in made.runs:
        body = backbone_of(each.prepare(made.images).model).state_dict()
        same = [name for name in body if name in stored and body[name].shape == stored[name].shape]
        assert all(torch.equal(body[name], stored[name]) for name in same)
        assert any(".bridges." in name for name in same) == (each.arm == "SoLA + bridges")
    without = classifier(tmp_path / "without")
    both = planned(masks, init=[with_bridges, without])
    assert [each.weights.path for each in both.runs] == [without, with_bridges]
    assert not any(each.weights.drop_bridges for each in both.runs)
    assert len({each.key for each in (*made.runs, *both.runs, *planned(masks).runs)}) == 5
    with pytest.raises(ValueError, match=r"no weights for SoLA \+ bridges: .* does not fit"):
        planned(masks, init=[without])


def test_sizes_without_weights_are_left_out(masks, tmp_path):
    networks = {"tiny": ONE_SIZE, "small": ONE_SIZE.with_changes(dims=(8, 16, 16, 16))}
    scale = replace(LITTLE, segmentation=replace(LITTLE.segmentation, networks=networks, pretrained=True))
    weights = classifier(tmp_path / "small", TABLE_8.arms[1].bridges, networks["small"])
    assert [each.arm for each in planned(masks, scale, init=[weights]).runs] == ["SoLA-S", "SoLA-S + bridges"]
    with pytest.raises(ValueError, match="give --init CHECKPOINT"):
        planned(masks, scale)
    other = classifier(tmp_path / "other", network=ONE_SIZE.with_changes(dims=(16, 16, 16, 16)))
    with pytest.raises(ValueError, match="no weights for SoLA: "):
        planned(masks, scale, init=[other])


def planned_at(name, masks):
    """A scale's plan on few images, without weights."""
    scale = SCALES[name].segmentation
    images = replace(scale.images, ignore=255)
    scale = replace(scale, images=images, pretrained=False, train=replace(scale.train, batch_size=4))
    return planned(masks, replace(SCALES[name], segmentation=scale))


@pytest.mark.parametrize("name", SCALES)
def test_table_8_fits_every_scale(name, masks):
    made = planned_at(name, masks)
    networks = SCALES[name].segmentation.networks
    assert [each.arm for each in made.runs] == [arm.name for arm in TABLE_8.arms if arm.size in networks]
    for each in made.runs:
        each.build("meta")


def test_scales_train_as_the_recipes_do():
    paper, medium, few = SCALES["paper"].segmentation, SCALES["medium"].segmentation, get_recipe("few_masks")
    for size, network in paper.networks.items():
        recipe = get_recipe(f"ade20k_{size}")
        assert network.drop_path_rate == recipe.model.drop_path_rate
        assert replace(paper.train, workers=recipe.train.workers) == recipe.train
        assert (replace(paper.images, num_classes=150), paper.head) == (recipe.image, recipe.segmenter)
    assert medium.networks["tiny"].drop_path_rate == few.model.drop_path_rate
    free = {"evaluate_every": 20, "log_every": 20, "workers": 1}
    assert replace(medium.train, **free) == few.train
    assert (medium.images, medium.head) == (few.image, few.segmenter)


def test_the_papers_scale_costs_what_table_8_says(masks):
    first, *_ = planned_at("paper", masks).runs
    assert first.cost(TABLE_8.cost_size)["macs"] / 1e9 == pytest.approx(10.9, rel=0.05)


def test_images_that_do_not_suit(masks, tmp_path):
    with pytest.raises(ValueError, match=r"needs images/SPLIT and annotations/SPLIT .* not folders of classes"):
        planned(write_images(tmp_path / "classes"))
    with pytest.raises(ValueError, match="3 training images, fewer than one batch of 4"):
        planned(masks, limit=3)
    with pytest.raises(
        ValueError, match=r"label 255 in .* pixels is not valid: labels 0\.\.2 are classes, 9 is ignored"
    ):
        planned(masks, ignore=9)
    with pytest.raises(ValueError, match="no train/"):
        plan(get_study("table2"), LITTLE, masks)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_names_of_images_need_not_be_utf8(tmp_path, masks):
    folder = Path(shutil.copytree(masks, tmp_path / "masks"))
    names = {path.stem for path in folder.glob("images/*/*")}
    for path in folder.glob("*/*/*"):
        if path.stem == min(names):
            path.rename(path.with_name(f"\udce9{path.name}"))
    assert planned(folder)
