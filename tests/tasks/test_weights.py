# SPDX-License-Identifier: Apache-2.0
"""save_pretrained writes networks that load and timm restore exactly; every adaptation is reported."""

import errno
import json
import logging
import os
import pickle

import pytest
import timm
import torch
from naive_vrwkv import weights
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from torch.nn.functional import interpolate

import sola_vision
from sola_vision.data import ImageConfig
from sola_vision.engine import log as log_module
from sola_vision.engine import save_weights
from sola_vision.tasks import ModelConfig, load_checkpoint, metadata

SMALL = {"dims": (8, 16, 32, 32), "img_size": 32, "num_classes": 3}
MODELS = {
    "sola": lambda: timm.create_model("sola_nano", **SMALL),
    "bridges": lambda: timm.create_model("sola_nano", bridges="paper", token_shift=False, head_dim=16, **SMALL),
    "isotropic": lambda: sola_vision.SolaVision(
        sola_vision.nano(schedule="LLS", dims=(32,), patch_size=16, img_size=32, num_classes=3)
    ),
    "vrwkv": lambda: timm.create_model("vrwkv_small", dim=16, depth=2, img_size=32, num_classes=3, eq9=True),
    "resnet18": lambda: timm.create_model("resnet18", num_classes=3),
}
IMAGE = torch.randn(2, 3, 32, 32)


def stirred(model):
    with torch.no_grad():
        for parameter in model.parameters():  # heads and bridges may be initialised near zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request):
    return stirred(MODELS[request.param]())


@pytest.fixture
def sola():
    return stirred(MODELS["sola"]())


def says(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "sola_vision"]


def test_a_saved_network_comes_back_to_us_and_to_timm(tmp_path, model, caplog):
    image = ImageConfig(size=32, mean=(0.1, 0.2, 0.3), crop_pct=0.9)
    sola_vision.save_pretrained(model, tmp_path / "f", classes=["é", "b c", "d"], image=image)
    assert sorted(os.listdir(tmp_path / "f")) == ["config.json", "model.safetensors"]
    ours = sola_vision.load(tmp_path / "f")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'f'}", pretrained=True).eval()
    for loaded in (ours, theirs):
        assert torch.equal(loaded(IMAGE), model(IMAGE))
        assert loaded.pretrained_cfg["label_names"] == ["é", "b c", "d"]
        data = timm.data.resolve_model_data_config(loaded)
        assert [*data["input_size"], *data["mean"], data["crop_pct"]] == [3, 32, 32, 0.1, 0.2, 0.3, 0.9]
    assert not ours.training
    assert not ours.load_report
    assert says(caplog) == []
    checkpoint = load_checkpoint(tmp_path / "f")
    assert (checkpoint.classes, checkpoint.image) == (["é", "b c", "d"], image)


def test_saving_what_was_loaded_keeps_everything(tmp_path, model):
    image = ImageConfig(size=48, std=(0.5, 0.5, 0.5), interpolation="bilinear")
    sola_vision.save_pretrained(model, tmp_path / "a", classes=["x", "y", "z"], image=image)
    sola_vision.save_pretrained(sola_vision.load(tmp_path / "a"), tmp_path / "b")
    a, b = (load_checkpoint(tmp_path / name) for name in "ab")
    assert (b.name, b.classes, b.image.size, b.image.std, b.image.interpolation) == (
        *(a.name, a.classes, 48, (0.5, 0.5, 0.5), "bilinear"),
    )
    assert torch.equal(a.model(IMAGE), b.model(IMAGE))
    assert getattr(a.model, "config", None) == getattr(b.model, "config", None)


@pytest.mark.parametrize("name", ["sola", "bridges", "vrwkv", "resnet18"])
def test_what_timm_saves_loads(tmp_path, name):
    model = stirred(MODELS[name]())
    save_for_hf(model, tmp_path / "f", {"label_names": ["a", "b", "c"]}, safe_serialization=True)
    loaded = sola_vision.load(tmp_path / "f")
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]
    save_for_hf(model, tmp_path / "bin")  # timm's default, a pickle
    assert torch.equal(sola_vision.load(tmp_path / "bin")(IMAGE), model(IMAGE))


def test_a_run_loads_as_a_folder_and_as_a_file(tmp_path, sola):
    about = metadata("classification", ModelConfig(name="sola_nano"), ImageConfig(size=32), ["a", "b", "c"], sola)
    save_weights(tmp_path / "best.safetensors", sola, about)
    for path in (tmp_path, tmp_path / "best.safetensors"):
        assert torch.equal(sola_vision.load(path)(IMAGE), sola(IMAGE))


@pytest.mark.parametrize("change", [{"num_classes": 5}, {"classes": ["c", "b", "a"]}, {"classes": list("abcde")}])
def test_other_classes_get_a_fresh_head(tmp_path, model, caplog, change):
    sola_vision.save_pretrained(model, tmp_path / "f", classes=["a", "b", "c"])
    loaded = sola_vision.load(tmp_path / "f", **change)
    count = change.get("num_classes") or len(change["classes"])
    assert loaded(IMAGE).shape == (2, count)
    head = loaded.pretrained_cfg["classifier"]
    for name, value in loaded.state_dict().items():
        same = value.shape == model.state_dict()[name].shape and torch.equal(value, model.state_dict()[name])
        assert same != name.startswith(f"{head}."), name
    assert any(f"{head}.weight" in what and "newly initialised" in what for what in loaded.load_report.adapted)
    assert str(loaded.load_report) in says(caplog)[0]


def test_both_heads_are_fresh_where_a_network_has_two(tmp_path):
    sola_vision.save_pretrained(timm.create_model("pit_ti_distilled_224", num_classes=3), tmp_path / "f")
    adapted = sola_vision.load(tmp_path / "f", num_classes=5).load_report.adapted
    assert [what.split()[0] for what in adapted] == ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]


def test_the_head_is_kept_where_the_names_stay(tmp_path, model):
    sola_vision.save_pretrained(model, tmp_path / "f", classes=["a", "b", "c"])
    for change in ({"classes": ("a", "b", "c")}, {"num_classes": 3}):
        loaded = sola_vision.load(tmp_path / "f", **change)
        assert torch.equal(loaded(IMAGE), model(IMAGE))
        assert loaded.load_report.adapted == ()


def test_no_classes_leave_the_head_out(tmp_path, model):
    sola_vision.save_pretrained(model, tmp_path / "f")
    body = sola_vision.load(tmp_path / "f", num_classes=0)
    assert torch.equal(body(IMAGE), model.forward_head(model.forward_features(IMAGE), pre_logits=True))
    assert any("left out" in what for what in body.load_report.adapted)
    sola_vision.save_pretrained(body, tmp_path / "body")
    assert torch.equal(sola_vision.load(tmp_path / "body")(IMAGE), body(IMAGE))
    assert sola_vision.load(tmp_path / "body", num_classes=4)(IMAGE).shape == (2, 4)
    with pytest.raises(ValueError, match="without a head"):
        load_checkpoint(tmp_path / "body")


def test_one_channel_sees_grey_as_three_did(tmp_path, model):
    sola_vision.save_pretrained(model, tmp_path / "f")
    grey = torch.randn(2, 1, 32, 32)
    loaded = sola_vision.load(tmp_path / "f", in_chans=1)
    assert torch.allclose(loaded(grey), model(grey.expand(-1, 3, -1, -1)), atol=1e-4)
    assert any(what.endswith("from 3 to 1 channel") for what in loaded.load_report.adapted)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_other_channels_have_a_mean_each(tmp_path, channels):
    sola_vision.save_pretrained(timm.create_model("sola_nano", num_classes=3, in_chans=channels), tmp_path / "f")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'f'}", pretrained=True)
    for network in (sola_vision.load(tmp_path / "f"), theirs):
        settings = timm.data.resolve_model_data_config(network)
        assert settings["mean"] == pytest.approx([0.449] * channels)
        assert settings["std"] == pytest.approx([0.226] * channels)
    assert len(sola_vision.load(tmp_path / "f", in_chans=3).pretrained_cfg["mean"]) == 3
    # what transformers' image processor does
    cfg = json.loads((tmp_path / "f" / "config.json").read_text())["pretrained_cfg"]
    assert len(cfg["mean"]) == cfg["input_size"][0] == channels


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_channels_are_adapted_as_timm_does(tmp_path, model, channels):
    sola_vision.save_pretrained(model, tmp_path / "f")
    ours = sola_vision.load(tmp_path / "f", in_chans=channels)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'f'}", pretrained=True, in_chans=channels).eval()
    image = torch.randn(1, channels, 32, 32)
    assert torch.equal(ours(image), theirs(image))
    sola_vision.save_pretrained(ours, tmp_path / "g")
    assert torch.equal(sola_vision.load(tmp_path / "g")(image), ours(image))


def test_names_go_with_the_head_that_they_are_of(tmp_path, sola):
    sola_vision.save_pretrained(sola, tmp_path / "f", classes=["a", "b", "c"])
    loaded = sola_vision.load(tmp_path / "f")
    loaded.reset_classifier(2)
    sola_vision.save_pretrained(loaded, tmp_path / "g")
    assert sola_vision.load(tmp_path / "g").pretrained_cfg["label_names"] == ["0", "1"]


@pytest.mark.parametrize("name", ["sola", "vrwkv"])
def test_another_size_is_what_the_network_would_interpolate(tmp_path, name):
    model = stirred(MODELS[name]())
    sola_vision.save_pretrained(model, tmp_path / "f")
    loaded = sola_vision.load(tmp_path / "f", img_size=64)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'f'}", pretrained=True, img_size=64).eval()
    grid = loaded.position.weight.shape[-2:]
    assert grid != model.position.weight.shape[-2:]
    assert torch.equal(loaded.position.weight, interpolate(model.position.weight, grid, mode="bicubic"))
    image = torch.randn(1, 3, 64, 64)
    assert torch.allclose(loaded(image), model(image), atol=1e-5)
    assert torch.equal(loaded(image), theirs(image))
    assert any("interpolated" in what for what in loaded.load_report.adapted)
    assert loaded.pretrained_cfg["input_size"] == (3, 64, 64)


def test_a_partial_load_has_to_be_asked_for(tmp_path, sola, caplog):
    sola_vision.save_pretrained(sola, tmp_path / "f")
    with pytest.raises(ValueError, match=r"missing \(stages.2.bridges.0") as info:
        sola_vision.load(tmp_path / "f", bridges="1.2>3.3")
    assert "\n" not in str(info.value)
    bridged = sola_vision.load(tmp_path / "f", bridges="1.2>3.3", partial=True)
    assert bridged.load_report.missing == tuple(n for n in bridged.state_dict() if ".bridges." in n)
    assert str(bridged.load_report) in says(caplog)[-1]
    assert torch.equal(bridged.head.fc.weight, sola.head.fc.weight)


def test_other_fields_change_the_network(tmp_path, sola):
    sola_vision.save_pretrained(sola, tmp_path / "f")
    assert sola_vision.load(tmp_path / "f", drop_path_rate=0.3).config.drop_path_rate == 0.3
    for change in ({"features_only": True}, {"checkpoint_path": "x.pth"}, {"drop_path": 0.1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            sola_vision.load(tmp_path / "f", **change)


def test_drop_path_is_restored(tmp_path):
    for model in (
        timm.create_model("sola_nano", num_classes=2, drop_path_rate=0.3),
        sola_vision.SolaVision(sola_vision.nano(num_classes=2, drop_path_rate=0.3)),
    ):
        sola_vision.save_pretrained(model, tmp_path / "f")
        assert sola_vision.load(tmp_path / "f").config.drop_path_rate == 0.3


def test_a_compiled_network_is_saved_as_the_network(tmp_path, sola):
    sola_vision.save_pretrained(torch.compile(sola), tmp_path / "f")
    loaded = sola_vision.load(tmp_path / "f")
    assert not loaded.load_report
    assert torch.equal(loaded.head.fc.weight, sola.head.fc.weight)


def test_a_network_inside_another_module_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FeatureGetterNet wraps sola_nano"):
        sola_vision.save_pretrained(timm.create_model("sola_nano", features_only=True), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_changed_setting_is_refused(tmp_path, sola):
    sola.stages[0].layers[0].norm1.eps = 0.1
    with pytest.raises(ValueError, match=r"1 part does not match .*\(stages.0.layers.0.norm1 first\)"):
        sola_vision.save_pretrained(sola, tmp_path / "f")


def test_requests_that_contradict_themselves(tmp_path, sola):
    sola_vision.save_pretrained(sola, tmp_path / "f")
    with pytest.raises(ValueError, match="num_classes=2 does not match 1 class: "):
        sola_vision.load(tmp_path / "f", num_classes=2, classes=["a"])
    with pytest.raises(ValueError, match="classes='a' must be a list of names"):
        sola_vision.load(tmp_path / "f", classes="a")
    with pytest.raises(ValueError, match=r"img_size=\(64, 64\) must be one number"):
        sola_vision.load(tmp_path / "f", img_size=(64, 64))
    with pytest.raises(ValueError, match="num_classes=-1"):
        sola_vision.load(tmp_path / "f", num_classes=-1)
    with pytest.raises(ValueError, match=r"size=0 must be at least 1"):
        sola_vision.load(tmp_path / "f", img_size=0)


class Trap:
    """Run a command when unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_pickle_with_code_is_refused_and_its_code_not_run(tmp_path, monkeypatch, sola):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {**weights(), "trap": Trap()}}, "vrwkv_t.pth")
    sola_vision.save_pretrained(sola, "f")
    os.remove("f/model.safetensors")
    (tmp_path / "f" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(), protocol=2))
    for path in ("vrwkv_t.pth", "f"):
        with pytest.raises(ValueError, match="holds code or objects") as info:
            sola_vision.load(path)
        assert "\n" not in str(info.value)
    assert not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / "f" / "pytorch_model.bin").read_bytes())  # the trap works
    assert (tmp_path / "sprung").exists()


def test_damaged_files_are_one_clear_line(tmp_path, sola):
    sola_vision.save_pretrained(sola, tmp_path / "f")
    file = tmp_path / "f" / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", b"\xff" * 64, whole[:-1]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file") as info:
            sola_vision.load(tmp_path / "f")
        assert "\n" not in str(info.value)
    with pytest.raises(FileNotFoundError, match="none"):
        sola_vision.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds none of"):
        sola_vision.load(tmp_path / "empty")


CONFIGS = {
    "no JSON": "{",
    "no object": "[]",
    "no architecture": "{}",
    "fetches": {"architecture": "hf-hub:some/body"},
    "opens": {"model_args": {"checkpoint_path": "trap.pth"}},
    "few names": {"label_names": ["a"]},
    "no mean": {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": "grey"}},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_foreign_config_is_checked(tmp_path, sola, case):
    sola_vision.save_pretrained(sola, tmp_path / "f")
    save_file(load_file(tmp_path / "f" / "model.safetensors"), tmp_path / "f" / "model.safetensors")  # no metadata
    config, change = tmp_path / "f" / "config.json", CONFIGS[case]
    sola_vision.load(tmp_path / "f")  # timm's file suffices
    old = json.loads(config.read_text())
    config.write_text(change if isinstance(change, str) else json.dumps(old | change))
    with pytest.raises(ValueError, match=str(tmp_path)) as info:
        sola_vision.load(tmp_path / "f")
    assert "\n" not in str(info.value)


def test_an_unsupported_crop_of_timm_is_logged_once(tmp_path, caplog):
    network = timm.create_model("resnet18", num_classes=3, pretrained_cfg_overlay={"crop_mode": "squash"})
    save_for_hf(network, tmp_path / "f", safe_serialization=True)
    load_checkpoint(tmp_path / "f")
    load_checkpoint(tmp_path / "f")
    said = [record.getMessage() for record in caplog.records if "crop_mode" in record.getMessage()]
    assert len(said) == 1
    assert "config.json: crop_mode squash is not supported" in said[0]


def test_bare_weights_name_the_way(tmp_path, sola):
    torch.save(sola.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="checkpoint_path="):
        sola_vision.load(tmp_path / "bare.pth")
    created = timm.create_model("sola_nano", checkpoint_path=tmp_path / "bare.pth", **SMALL).eval()
    assert torch.equal(created(IMAGE), sola(IMAGE))


def test_save_pretrained_refuses_what_it_could_not_bring_back(tmp_path, sola):
    with pytest.raises(ValueError, match="3 different names"):
        sola_vision.save_pretrained(sola, tmp_path / "f", classes=["a", "b"])
    for wrong in (["a", "b", "a"], "abc", ["a", "b", 3]):
        with pytest.raises(ValueError, match="a list of 3 different names"):
            sola_vision.save_pretrained(sola, tmp_path / "f", classes=wrong)
    with pytest.raises(ValueError, match="give the path of a folder"):
        sola_vision.save_pretrained(sola, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="Linear is not in timm's registry"):
        sola_vision.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "f")
    with pytest.raises(ValueError, match="output_stride"):
        sola_vision.save_pretrained(timm.create_model("resnet18", output_stride=16), tmp_path / "f")
    assert os.listdir(tmp_path) == []
    (tmp_path / "best.safetensors").touch()
    with pytest.raises(ValueError, match="folder of a run"):
        sola_vision.save_pretrained(sola, tmp_path)


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning", "ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", ["sola_nano", "resnet18"])
def test_a_quantised_network_is_refused_in_one_line(tmp_path, name):
    quantised = torch.ao.quantization.quantize_dynamic(timm.create_model(name, num_classes=3), {torch.nn.Linear})
    with pytest.raises(ValueError, match=r"is not a tensor: a quantised network cannot be saved; save the one that"):
        sola_vision.save_pretrained(quantised, tmp_path / "quantised")
    assert not (tmp_path / "quantised").exists()


def test_a_pruned_network_is_not_saved_as_a_whole_one(tmp_path, sola):
    sola.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match=r"140 parts do not match .* \(norm\.bias first\): it was pruned or changed"):
        sola_vision.save_pretrained(sola, tmp_path / "f")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_the_way_of_pooling_is_saved(tmp_path, model, pool):
    if pool == "avgmax" and not isinstance(model, sola_vision.SolaVision):
        pytest.skip("one other way will do")
    model.reset_classifier(3, pool)
    stirred(model)
    sola_vision.save_pretrained(model, tmp_path / "f")
    assert torch.equal(sola_vision.load(tmp_path / "f")(IMAGE), model(IMAGE))
    again = timm.create_model(f"local-dir:{tmp_path / 'f'}", pretrained=True).eval()
    assert torch.equal(again(IMAGE), model(IMAGE))


def test_the_way_of_pooling_is_saved_of_a_network_without_a_name(tmp_path):
    model = stirred(sola_vision.SolaVision(sola_vision.nano(num_classes=3), global_pool="max"))
    sola_vision.save_pretrained(model, tmp_path / "f")
    assert torch.equal(sola_vision.load(tmp_path / "f")(IMAGE), model(IMAGE))


def test_a_failure_leaves_the_old_folder(tmp_path, sola, monkeypatch):
    sola_vision.save_pretrained(sola, tmp_path / "f", classes=["a", "b", "c"])
    wanted = sola(IMAGE)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            sola_vision.save_pretrained(stirred(sola), tmp_path / "f", classes=["x", "y", "z"])
    loaded = sola_vision.load(tmp_path / "f")
    assert torch.equal(loaded(IMAGE), wanted)
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_the_log_is_silent_where_nothing_differs(tmp_path, sola, caplog):
    caplog.set_level(logging.INFO, "sola_vision")
    sola_vision.save_pretrained(sola, tmp_path / "f")
    sola_vision.load(tmp_path / "f")
    assert says(caplog) == []
