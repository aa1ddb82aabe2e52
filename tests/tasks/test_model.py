# SPDX-License-Identifier: Apache-2.0
"""A checkpoint restores the network, its classes and its image settings; initialising from one reports changes."""

import pytest
import torch

from sola_vision.data import ImageConfig
from sola_vision.engine import save_weights
from sola_vision.tasks import ModelConfig, build_model, initialise, load_checkpoint, metadata

IMAGE = ImageConfig(size=32, mean=(0.1, 0.2, 0.3), crop_pct=0.9)
CHANGED = {"schedule": "L/LL/LSS/S", "bridges": "1.1>3.2 2.2>4.1", "dims": (8, 16, 32, 64), "token_shift": False}
MODELS = [
    ModelConfig(name="sola_nano", dims=(8, 16, 32, 32)),
    ModelConfig(name="sola_nano", dims=(8, 16, 32, 32), bridges="paper", drop_path_rate=0.3),
    ModelConfig(name="sola_nano", head_dim=16, patch_size=2, **CHANGED),
    ModelConfig(name="sola_nano", schedule="LLS", bridges="1.1>1.3", dims=(32,), patch_size=16),
    ModelConfig(name="resnet18", drop_path_rate=0.1),
    ModelConfig(name="vit_tiny_patch16_224"),
]


def _saved(path, config, classes, image=IMAGE):
    model = build_model(config, len(classes), image.size)
    with torch.no_grad():
        for parameter in model.parameters():  # heads and bridges may be initialised to zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_weights(path, model, metadata("classification", config, image, classes, model))
    return model.eval()


@pytest.mark.parametrize("config", MODELS, ids=lambda config: f"{config.name} {config.schedule} {config.bridges}")
def test_load_checkpoint_gives_the_network_back(tmp_path, config):
    model = _saved(tmp_path / "best.safetensors", config, ["é", "b c"])
    for path in (tmp_path, tmp_path / "best.safetensors"):
        loaded = load_checkpoint(path)
        assert (loaded.task, loaded.name, loaded.classes) == ("classification", config.name, ["é", "b c"])
        assert loaded.image == IMAGE
        assert not loaded.model.training
        image = torch.randn(2, 3, 32, 32)
        assert torch.equal(loaded.model(image), model(image))


def test_initialise_takes_everything_that_fits(tmp_path):
    config = MODELS[2]
    source = _saved(tmp_path / "best.safetensors", config, ["a", "b"])
    same = build_model(config, 2, 32)
    assert initialise(same, tmp_path, ["a", "b"]) == f"weights from {tmp_path / 'best.safetensors'}"
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in same.state_dict().items())


@pytest.mark.parametrize("config", [MODELS[0], MODELS[4]], ids=["sola", "timm"])
def test_initialise_with_other_classes_replaces_the_head_only(tmp_path, config):
    source = _saved(tmp_path / "best.safetensors", config, ["a", "b"]).state_dict()
    for classes in (["a", "b", "c"], ["a", "z"]):
        model = build_model(config, len(classes), 32)
        fresh = {name: value.clone() for name, value in model.state_dict().items()}
        said = initialise(model, tmp_path, classes)
        head = model.pretrained_cfg["classifier"]
        assert f"{head}.weight" in said
        for name, value in model.state_dict().items():
            assert torch.equal(value, (fresh if name.startswith(head) else source)[name])


def test_initialise_at_another_size_keeps_the_position_embedding(tmp_path):
    source = _saved(tmp_path / "best.safetensors", MODELS[0], ["a", "b"])
    with torch.no_grad():
        source.position.weight.fill_(0.25)
    save_weights(tmp_path / "best.safetensors", source)
    model = build_model(MODELS[0], 2, 96)
    assert "interpolated" in initialise(model, tmp_path)
    assert model.position.weight.shape != source.position.weight.shape
    assert torch.allclose(model.position.weight, torch.tensor(0.25))


def test_initialise_refuses_another_network(tmp_path):
    _saved(tmp_path / "best.safetensors", MODELS[0], ["a", "b"])
    for other in (MODELS[2], MODELS[4], ModelConfig(name="sola_nano", dims=(16, 16, 32, 32))):
        model = build_model(other, 2, 32)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="does not fit"):
            initialise(model, tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_options_of_sola_do_not_reach_other_networks():
    with pytest.raises(ValueError, match="resnet18 has no dims, schedule"):
        build_model(ModelConfig(name="resnet18", schedule="LL", dims=(8,)), 2, 32)
    with pytest.raises(ValueError, match="vgg11"):
        build_model(ModelConfig(name="vgg11", drop_path_rate=0.1), 2, 32)
    with pytest.raises(ValueError, match="'sola_giant'"):
        ModelConfig(name="sola_giant")


def test_a_network_without_stochastic_depth_names_the_way():
    with pytest.raises(ValueError, match=r"--model\.drop_path_rate null leaves it out"):
        build_model(ModelConfig(name="densenet121", drop_path_rate=0.05), num_classes=3, image_size=32)
