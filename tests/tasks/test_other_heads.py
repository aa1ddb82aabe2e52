# SPDX-License-Identifier: Apache-2.0
"""SoLA networks in other libraries: timm's folders, torchvision, Hugging Face, segmentation_models_pytorch."""

from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import load_file
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import sola_vision  # noqa: F401 - registers the names


def untrained(model):
    """Return the parameters without a gradient after the last backward pass."""
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("decoder", ["UPerNet", "FPN", "Unet", "Segformer"])
def test_encoder_of_segmentation_models_pytorch(decoder):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation_models_pytorch")
    torch.manual_seed(0)
    model = getattr(smp, decoder)("tu-sola_nano", encoder_weights=None, classes=5)
    image = torch.randn(2, 3, 64, 96)
    logits = model(image)
    assert logits.shape == (2, 5, 64, 96)
    logits.square().mean().backward()
    # its timm encoders keep the classifier's norm, which is not applied to the maps
    assert untrained(model) == []


def test_backbone_of_hugging_faces_upernet(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.UperNetConfig(
        backbone_config=transformers.TimmBackboneConfig(
            backbone="sola_nano", use_pretrained_backbone=False, out_indices=(0, 1, 2, 3)
        ),
        hidden_size=16,
        auxiliary_channels=8,
        auxiliary_in_channels=96,
        num_labels=5,
    )
    torch.manual_seed(0)
    model = transformers.UperNetForSemanticSegmentation(config)
    image = torch.randn(2, 3, 97, 131)
    out = model(image, labels=torch.randint(0, 5, (2, 97, 131)))
    assert out.logits.shape == (2, 5, 97, 131)
    out.loss.backward()
    assert untrained(model) == []
    model.save_pretrained(tmp_path)
    again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    torch.testing.assert_close(again.eval()(image).logits, model.eval()(image).logits, rtol=1e-4, atol=1e-6)


def test_classifier_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model_args = {"schedule": "L/S", "dims": [8, 32], "bridges": "1.1>2.1"}
    config = transformers.TimmWrapperConfig(architecture="sola_nano", num_labels=3, model_args=model_args)
    torch.manual_seed(0)
    model = transformers.TimmWrapperForImageClassification(config)
    image = torch.randn(2, 3, 97, 131)
    out = model(pixel_values=image, labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3)
    out.loss.backward()
    assert untrained(model) == []
    model.save_pretrained(tmp_path)
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again.eval()(pixel_values=image).logits, model.eval()(pixel_values=image).logits, rtol=1e-4, atol=1e-6
    )


def test_backbone_of_hugging_faces_mask2former(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("scipy", reason="its loss needs scipy")
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.TimmBackboneConfig(
            backbone="sola_nano", use_pretrained_backbone=False, out_indices=(0, 1, 2, 3)
        ),
        **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim"), 32),
        **{"dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2},
        **{"num_queries": 4, "num_labels": 3, "train_num_points": 64},
    )
    torch.manual_seed(0)
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    image = torch.randn(1, 3, 64, 96)
    masks = torch.zeros(2, 64, 96)
    masks[0, :32], masks[1, 32:] = 1, 1
    out = model(image, mask_labels=[masks], class_labels=[torch.tensor([0, 2])])
    assert out.masks_queries_logits.shape == (1, 4, 16, 24)
    out.loss.backward()
    assert untrained(model.model.pixel_level_module.encoder) == []
    model.save_pretrained(tmp_path)
    again = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again.eval()(image).class_queries_logits, model.eval()(image).class_queries_logits, rtol=1e-4, atol=1e-6
    )


class Maps(torch.nn.Module):
    """A backbone in the form torchvision's detectors expect: a dictionary of maps and their number of channels."""

    def __init__(self):
        super().__init__()
        self.body = timm.create_model("sola_nano", features_only=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 16)
        self.out_channels = 16

    def forward(self, image):
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(image))))


def test_backbone_of_torchvisions_mask_rcnn():
    names = ["0", "1", "2", "3"]
    torch.manual_seed(0)
    model = MaskRCNN(
        Maps(),
        num_classes=3,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
    )
    masks = torch.zeros(1, 64, 80, dtype=torch.uint8)
    masks[:, 10:50, 10:60] = 1
    boxes = torch.tensor([[10.0, 10.0, 60.0, 50.0]])
    truth = {"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}
    losses = model([torch.rand(3, 64, 80)], [truth])
    assert set(losses) >= {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert untrained(model.backbone.body) == []
    (found,) = model.eval()([torch.rand(3, 70, 90)])
    assert found["masks"].shape[1:] == (1, 70, 90)


def test_folder_of_timm(tmp_path):
    torch.manual_seed(0)
    changes = {"schedule": "L/S", "dims": (8, 32), "bridges": "1.1>2.1"}
    model = timm.create_model("sola_nano", num_classes=3, **changes).eval()
    timm.models.save_for_hf(model, tmp_path, model_config={"model_args": changes}, safe_serialization="both")
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    name, image = f"local-dir:{tmp_path}", torch.randn(2, 3, 97, 131)
    again = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(again(image), model(image))
    maps = timm.create_model(name, pretrained=True, features_only=True).eval()(image)
    assert all(torch.equal(a, b) for a, b in zip(maps, model.forward_intermediates(image)[1], strict=True))
    other = timm.create_model(name, pretrained=True, num_classes=5, in_chans=1).eval()
    assert other(image[:, :1]).shape == (2, 5)
    kept = model.stages.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in other.stages.state_dict().items())
