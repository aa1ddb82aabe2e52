# SPDX-License-Identifier: Apache-2.0
"""The commands on folders of save_pretrained and of timm, and on Vision-RWKV's file."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from naive_vrwkv import weights
from small import CLASSES
from timm.models._hub import save_for_hf

import sola_vision
from sola_vision.data import ImageConfig


@pytest.fixture
def saved(trained, tmp_path):
    """The same network as in `trained`, in a folder of its own."""
    sola_vision.save_pretrained(sola_vision.load(trained), tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_folder_predicts_and_evaluates_as_its_run(sola, data, trained, saved):
    for words in (("predict", data / "val", "--json"), ("eval", "--data", data, "--json", "--out", "pictures")):
        of_run, of_folder = (sola(*words, "--checkpoint", path) for path in (trained, saved))
        assert (of_run.code, of_folder.code) == (0, 0), of_folder.err
        of_run, of_folder = (json.loads(said.out) for said in (of_run, of_folder))
        differing = {key for key in of_run if of_run[key] != of_folder[key]}
        assert differing <= {"checkpoint", "seconds", "images_per_second"}


def test_a_saved_folder_is_explained(sola, data, saved):
    picture = next((data / "val" / CLASSES[1]).iterdir())
    assert sola("explain", picture, "--checkpoint", saved, "--no-page", "--out", "seen").code == 0
    names = {name.partition("/")[0] for name in np.load(next(Path("seen").rglob("*.npz"))).files}
    assert {"1.1 L", "3.3 S"} <= names


def test_a_saved_folder_begins_a_run(sola, data, saved):
    words = ("train", "digits", "--data", data, "--model.dims", "[8,16,32,32]", "--train.epochs", 1, "--image.mixup", 0)
    said = sola(*words, "--train.batch_size", 7, "--train.warmup_epochs", 0, "--train.device", "cpu", "--init", saved)
    assert said.code == 0, said.err
    assert f"weights from {saved / 'model.safetensors'}\n" in said.err


def test_a_folder_of_timms_predicts(sola, data, tmp_path):
    model = timm.create_model("sola_nano", dims=(8, 16, 32, 32), num_classes=2)
    save_for_hf(model, tmp_path / "hub", {"label_names": ["no", "yes"]}, safe_serialization=True)
    said = sola("predict", data / "val" / "ant", "--checkpoint", "hub", "--json")
    document = json.loads(said.out)
    assert document["model"] == "sola_nano"
    assert {guess["class"] for image in document["images"] for guess in image["classes"]} == {"no", "yes"}


def test_a_file_of_vision_rwkv_predicts_and_is_looked_into(sola, data):
    torch.save({"state_dict": weights(dim=16, depth=2, side=14, patch=16, classes=1000)}, "vrwkv_t_in1k_224.pth")
    picture = next((data / "val" / "ant").iterdir())
    said = sola("predict", picture, "--checkpoint", "vrwkv_t_in1k_224.pth", "--json")
    document = json.loads(said.out)
    assert document["model"] == "vrwkv_tiny"
    assert all(guess["class"].startswith("n0") for guess in document["images"][0]["classes"])  # ImageNet's own names
    assert sola("explain", picture, "--checkpoint", "vrwkv_t_in1k_224.pth", "--no-page", "--out", "seen").code == 0


EXPORT = ("--format", "torch-export", "--out", "model.pt2", "--check", 64, "--batch", 2)


@pytest.mark.slow
def test_vision_rwkv_is_exported_with_eq9_only(refused, tmp_path):
    model = timm.create_model("vrwkv_tiny", dim=16, depth=1, num_classes=3, img_size=64)
    sola_vision.save_pretrained(model, tmp_path / "published", image=ImageConfig(size=64))
    refused("export", "published", *EXPORT, names=["eq9=True"])


@pytest.mark.slow
def test_saved_folders_are_exported(sola, saved):
    model = timm.create_model("vrwkv_tiny", dim=16, depth=1, num_classes=3, img_size=64, eq9=True)
    sola_vision.save_pretrained(model, "vrwkv", image=ImageConfig(size=64))
    for folder in (saved, "vrwkv"):
        said = sola("export", folder, *EXPORT)
        assert said.code == 0, said.err


def test_a_network_of_other_channels_is_no_matter_of_pictures(refused, data, saved):
    sola_vision.save_pretrained(sola_vision.load(saved, in_chans=4), "four")
    refused("predict", data, "--checkpoint", "four", names=["four", "4 channels"])


def test_a_folder_without_weights_is_refused(refused, data, saved):
    (saved / "model.safetensors").unlink()
    refused("predict", data, "--checkpoint", saved, names=[saved, "model.safetensors"])
