# SPDX-License-Identifier: Apache-2.0
"""Each change of a built network has the documented effect and no other."""

import pytest
import torch

from sola_vision import SolaConfig, SolaVision
from sola_vision.layers import ConvMlp
from sola_vision.studies.changes import CHANGES

CONFIG = SolaConfig(
    schedule="LL/LSL",
    dims=(16, 32),
    patch_size=2,
    img_size=16,
    num_classes=5,
    head_dim=16,
    bridges="1.2>2.2",
    drop_path_rate=0.1,
)


def build(change="", seed=0):
    torch.manual_seed(seed)
    model = SolaVision(CONFIG).eval()
    if change:
        CHANGES[change](model)
    return model.eval()


def image(height=16, width=16):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_trains_all_its_parameters_and_changes_the_function(change):
    model = build(change).train()
    model(image()).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []
    with torch.no_grad():
        assert not torch.allclose(build(change)(image()), build()(image()))


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_counts_on_meta_tensors(change):
    model = SolaVision(CONFIG, device="meta")
    CHANGES[change](model)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_same_ffn_leaves_no_channel_mix():
    model = build("same_ffn")
    assert not any("channel_mix" in name for name, _ in model.named_parameters())
    assert sum(isinstance(module, ConvMlp) for module in model.modules()) == 5


def test_same_ffn_keeps_the_attention_halves():
    changed = {name.replace(".layer.", "."): p for name, p in build("same_ffn").named_parameters()}
    kept = {name: p for name, p in build().named_parameters() if "channel_mix" not in name}
    assert any(".mixer.decay" in name for name in kept)
    for name, parameter in kept.items():
        assert torch.equal(changed[name], parameter)


def test_columns_are_rows_of_the_transposed_image_without_shift():
    # without the shift and with symmetric weights elsewhere, only the linear layer depends on the order
    config = SolaConfig(schedule="L", dims=(16,), patch_size=1, img_size=8, num_classes=0, token_shift=False)
    torch.manual_seed(0)
    model = SolaVision(config).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.nn.init.zeros_(model.position.weight)
        rows = model.forward_features(x.mT.contiguous()).mT
        CHANGES["order_columns"](model)
        torch.testing.assert_close(model.forward_features(x), rows)


def test_in_turn_changes_every_second_linear_layer():
    names = [name for name, module in build("order_in_turn").named_modules() if type(module).__name__ == "_Transposed"]
    assert names == ["stages.0.layers.1", "stages.1.layers.2"]


def test_decays_have_the_signs_that_their_names_say():
    signs = {}
    for change in ("", "decay_negative", "decay_zero", "decay_vision_rwkv"):
        decays = torch.cat([p for name, p in build(change).named_parameters() if name.endswith("decay")])
        signs[change] = (bool((decays > 0).any()), bool((decays < 0).any()))
    assert signs == {
        "": (True, False),
        "decay_negative": (False, True),
        "decay_zero": (False, False),
        "decay_vision_rwkv": (True, True),
    }


def test_bridges_of_outputs_carry_the_layers_output():
    model = build("bridge_outputs")
    x = torch.randn(1, 8, 8, 16)
    with torch.no_grad():
        out, states = model.stages[0](x, {})
    (state,) = states.values()
    assert torch.equal(out, state)
