# SPDX-License-Identifier: Apache-2.0
"""A backbone of ours in the decoders of others: segmentation_models_pytorch and Hugging Face's UperNet."""

import pytest
import torch

import sola_vision  # noqa: F401 - registers the names


@pytest.mark.parametrize("decoder", ["UPerNet", "FPN", "Unet", "Segformer"])
def test_encoder_of_segmentation_models_pytorch(decoder):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation_models_pytorch")
    torch.manual_seed(0)
    model = getattr(smp, decoder)("tu-sola_nano", encoder_weights=None, classes=5)
    image = torch.randn(2, 3, 64, 96)
    logits = model(image)
    assert logits.shape == (2, 5, 64, 96)
    logits.square().mean().backward()
    # its timm encoders keep the classifier's norm, which no map passes through
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


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
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    model.save_pretrained(tmp_path)
    again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(image).logits, model.eval()(image).logits)
