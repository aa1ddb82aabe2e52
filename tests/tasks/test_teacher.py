# SPDX-License-Identifier: Apache-2.0
"""Sources of teachers: runs, weights of timm in every form, folders for the hub; and what is refused."""

import argparse
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.models import save_for_hf

from sola_vision.data import ImageConfig
from sola_vision.engine import save_weights
from sola_vision.tasks import ModelConfig, TeacherConfig, build_model, metadata
from sola_vision.tasks.teacher import load_teacher

IMAGE = ImageConfig(size=32)
NAME = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=3).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose images have another normalisation."""
    folder = tmp_path_factory.mktemp("run")
    config = ModelConfig(name="sola_nano", schedule="L/S", dims=(8, 32))
    image = ImageConfig(size=48, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    model = build_model(config, 2, image.size)
    save_weights(folder / "best.safetensors", model, metadata("classification", config, image, ["ant", "bee"], model))
    return folder, model.eval()


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _load(shown=IMAGE, **fields):
    return load_teacher(TeacherConfig(**{name: str(value) for name, value in fields.items()}), shown)


def test_a_run_says_everything_itself(run):
    folder, model = run
    for path in (folder, folder / "best.safetensors"):
        teacher = _load(checkpoint=path)
        assert (teacher.name, teacher.classes, teacher.size) == ("sola_nano", ["ant", "bee"], None)
        pixels = torch.rand(2, 3, 32, 32)
        shown = (pixels - torch.tensor(IMAGE.mean).view(3, 1, 1)) / torch.tensor(IMAGE.std).view(3, 1, 1)
        with torch.no_grad():
            assert torch.allclose(teacher(shown)[0], model((pixels - 0.5) / 0.25), atol=1e-4)
        assert not teacher.network.training
        assert not any(p.requires_grad for p in teacher.parameters())


def test_weights_of_timm_in_every_form_are_one_teacher(network, tmp_path):
    state = network.state_dict()
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "plain.pth")
    # a checkpoint of timm's train.py: the moving average is the teacher, not the raw weights
    raw = {f"module.{name}": torch.zeros_like(value) for name, value in state.items()}
    training = {"arch": NAME, "args": argparse.Namespace(model=NAME), "state_dict": raw, "state_dict_ema": state}
    torch.save(training, tmp_path / "model_best.pth.tar")
    digests = set()
    for file in ("plain.safetensors", "plain.pth", "model_best.pth.tar"):
        teacher = _load(name=NAME, checkpoint=tmp_path / file)
        assert (teacher.name, teacher.classes, teacher.network.num_classes) == (NAME, None, 3)
        digests.add(teacher.sha256)
    assert len(digests) == 1
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(teacher(images)[0], network(images), atol=1e-5)
    with torch.no_grad():
        next(teacher.network.parameters()).view(-1)[0] += 1e-3
    assert teacher.sha256 not in digests


def test_a_folder_for_the_hub_says_its_classes(network, tmp_path):
    save_for_hf(network, tmp_path, model_config={"label_names": ["x", "y", "z"]}, safe_serialization=True)
    teacher = _load(name=f"local-dir:{tmp_path}")
    assert teacher.classes == ["x", "y", "z"]
    with torch.no_grad():
        assert torch.equal(teacher(images := torch.randn(1, 3, 32, 32))[0], network(images))


def test_a_thousand_outputs_are_imagenets_folders(tmp_path):
    save_file(timm.create_model(NAME).state_dict(), tmp_path / "it.safetensors")
    assert _load(name=NAME, checkpoint=tmp_path / "it.safetensors").classes == ImageNetInfo().label_names()
    assert ImageNetInfo().label_names()[0] == "n01440764"


def test_weights_without_a_head_have_maps_only(tmp_path):
    save_file(timm.create_model(NAME, num_classes=0).state_dict(), tmp_path / "it.safetensors")
    assert _load(name=NAME, checkpoint=tmp_path / "it.safetensors").network.num_classes == 0


def test_a_network_of_one_size_gets_it(tmp_path):
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), tmp_path / "it.safetensors")
    teacher = _load(name="vit_tiny_patch16_224", checkpoint=tmp_path / "it.safetensors")
    assert teacher.size == 224
    logits, maps = teacher(torch.randn(1, 3, 32, 32), [11])
    assert logits.shape == (1, 3)
    assert maps[0].shape == (1, 192, 14, 14)
    with pytest.raises(ValueError, match="takes images of 224 pixels only"):
        load_teacher(
            TeacherConfig(name="vit_tiny_patch16_224", checkpoint=str(tmp_path / "it.safetensors"), size=96), IMAGE
        )


# refusals ------------------------------------------------------------------------------------------------------------
class _Code:
    def __reduce__(self):
        return os.mkdir, ("opened",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"state_dict": _Code()}))
    torch.save({"state_dict": {"w": torch.ones(1)}, "more": _Code()}, tmp_path / "worse.pth")
    for file in ("bad.pth", "worse.pth"):
        with pytest.raises(ValueError, match=rf"{file} holds .* and is not opened") as refusal:
            _load(name=NAME, checkpoint=file)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "opened").exists()


def test_what_does_not_fit_is_listed(network, tmp_path):
    state = network.state_dict()
    del state["conv_stem.weight"]
    save_file({**state, "extra.weight": torch.ones(1)}, tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(conv_stem.weight\), 1 unexpected \(extra.weight\)"):
        _load(name=NAME, checkpoint=tmp_path / "it.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth holds nothing|list.pth holds no state_dict"):
        _load(name=NAME, checkpoint=tmp_path / "list.pth")


def test_weights_that_are_no_numbers_are_refused_before_training(network, tmp_path):
    state = {**network.state_dict(), "conv_stem.weight": torch.full_like(network.conv_stem.weight, float("nan"))}
    save_file(state, tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match="returns nan or inf"):
        _load(name=NAME, checkpoint=tmp_path / "it.safetensors")


def test_a_teacher_must_be_named_and_exist(run, network, tmp_path):
    with pytest.raises(ValueError, match="unknown teacher name 'resnet17'"):
        TeacherConfig(name="resnet17")
    with pytest.raises(ValueError, match="distillation needs a teacher"):
        _load()
    save_file(network.state_dict(), tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match="does not name its network"):
        _load(checkpoint=tmp_path / "it.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        _load(name=NAME, checkpoint="nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"best\.safetensors"):
        _load(checkpoint=tmp_path)
    with pytest.raises(ValueError, match="local-dir:here includes its weights"):
        _load(name="local-dir:here", checkpoint=tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match="is a checkpoint of sola_nano, not of resnet18"):
        _load(checkpoint=run[0], name="resnet18")


@pytest.mark.parametrize("name", ["sola_nano", "hf-hub:nobody/nothing", "local-dir:nowhere"])
def test_weights_that_could_not_be_loaded_are_one_line(name):
    with pytest.raises(ValueError, match=f"the teacher {name} could not be loaded") as refusal:
        _load(name=name)
    assert "\n" not in str(refusal.value)


def test_other_weights_than_the_recorded_ones_are_refused(run):
    with pytest.raises(ValueError, match=r"not those that the run was started with .*0123456789ab"):
        _load(checkpoint=run[0], sha256="0123456789abcdef")
    assert _load(checkpoint=run[0], sha256=_load(checkpoint=run[0]).sha256).name == "sola_nano"
