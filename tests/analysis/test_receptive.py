# SPDX-License-Identifier: Apache-2.0
"""Receptive fields: against convolutions with known fields, and properties of our networks."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from sola_vision import SolaVision, nano
from sola_vision.analysis.receptive import decay_ranges, effective_receptive_field, field_statistics


class Boxes(nn.Module):
    """Two box filters of 3 x 3, by timm's contract: their receptive fields are 3 and 5 pixels wide triangles."""

    def __init__(self):
        super().__init__()
        self.box = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        nn.init.constant_(self.box.weight, 1 / 9)

    def forward_intermediates(self, x, intermediates_only=True):
        first = self.box(x)
        return [first, self.box(first)]


def test_the_field_of_box_filters_is_their_kernel():
    fields = effective_receptive_field(Boxes(), [torch.randn(3, 11, 11)], (5, 5))
    expected = np.zeros((11, 11))
    expected[4:7, 4:7] = 1 / 9
    np.testing.assert_allclose(fields["map 1"].map, expected, atol=1e-7)
    triangle = np.convolve(np.ones(3), np.ones(3)) / 9
    np.testing.assert_allclose(fields["map 2"].map[3:8, 3:8], np.outer(triangle, triangle), atol=1e-7)
    statistics = field_statistics(fields["map 1"])
    assert statistics.areas[0.99] == pytest.approx(9 / 121)
    assert statistics.rows == pytest.approx(np.sqrt(2 / 3), rel=1e-5)
    assert statistics.columns == pytest.approx(np.sqrt(2 / 3), rel=1e-5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SolaVision(nano(dims=(16, 16, 32, 32), num_classes=0))


def test_fields_of_all_layers_sum_to_one_and_leave_the_model_as_it_was(model):
    model.train()
    fields = effective_receptive_field(model, [torch.randn(3, 64, 96)] * 2)
    assert list(fields)[:2] == ["1.1 L", "1.2 L"]
    assert len(fields) == 12
    for field in fields.values():
        assert field.map.shape == (64, 96)
        assert field.map.sum() == pytest.approx(1)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_softmax_layers_widen_the_field(model):
    """Attention reads uniformly, the linear layers before it do not: it extends the field up and down."""
    images = [torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        for stage in model.stages:
            for layer in stage.layers:
                if hasattr(layer, "mlp"):
                    layer.mixer.output.weight.normal_(std=0.3)
                    layer.mixer.qkv.weight.normal_(std=0.3)
    whole = effective_receptive_field(model, images)
    without = effective_receptive_field(model, images, without_softmax=True)
    np.testing.assert_allclose(whole["3.2 L"].map, without["3.2 L"].map)
    assert field_statistics(whole["3.6 S"]).rows > 1.1 * field_statistics(without["3.6 S"]).rows


class Patches(nn.Module):
    """Patches of 32 x 32 pixels, independent of each other."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 1, 32, 32, bias=False)
        nn.init.ones_(self.patch.weight)

    def forward_intermediates(self, x, intermediates_only=True):
        return [self.patch(x)]


@pytest.mark.parametrize("point", [None, (64.0, 64.0), (70.0, 90.0)])
def test_distances_are_from_the_centre_of_the_token(point):
    field = effective_receptive_field(Patches(), [torch.randn(3, 128, 128)], point)["map 1"]
    assert field.centre == (80, 80)
    # 32 pixels of equal weight
    assert field_statistics(field).rows == pytest.approx(np.sqrt((32**2 - 1) / 12), rel=1e-5)
    assert field_statistics(field).columns == pytest.approx(field_statistics(field).rows)


def test_the_centre_is_that_of_the_patch_also_where_the_network_pads(model):
    image = torch.randn(3, 97, 131)
    fields = effective_receptive_field(model, [image], (60.0, 129.0))
    assert fields["1.1 L"].centre == (62, 130)
    assert fields["4.2 S"].centre == (48, 144)  # the last column of tokens has 3 of its 32 pixels in the image
    peer = effective_receptive_field(timm.create_model("resnet18", num_classes=0), [image], (60.0, 129.0))
    assert peer["map 5"].centre == (48, 144)


def test_a_point_moves_the_field(model):
    image = torch.randn(3, 128, 128)
    top, bottom = (effective_receptive_field(model, [image], (y, 64.0))["1.1 L"].map for y in (20.0, 100.0))
    assert top[:64].sum() > 0.6 > 0.4 > bottom[:64].sum()


def test_peers_have_fields_too():
    model = timm.create_model("resnet18", num_classes=0)
    areas = [
        field_statistics(field).areas[0.9]
        for field in effective_receptive_field(model, [torch.randn(3, 96, 96)]).values()
    ]
    assert areas[0] < areas[-1]
    with pytest.raises(ValueError, match="not a SoLA network"):
        effective_receptive_field(model, [torch.randn(3, 96, 96)], without_softmax=True)


def test_decay_ranges_are_a_share_of_the_image(model):
    small, large = decay_ranges(model, (64, 64)), decay_ranges(model, (256, 256))
    assert [r.layer for r in small] == ["1.1 L", "1.2 L", "2.1 L", "2.2 L", "3.1 L", "3.2 L", "3.4 L", "3.5 L", "4.1 L"]
    assert large[0].tokens[0.5] == pytest.approx(16 * small[0].tokens[0.5])
    assert large[0].pixels(0.5) / 256 == pytest.approx(small[0].pixels(0.5) / 64)
    # the initial decays run from 1 to 64: eq. 5 with w / N
    assert small[0].tokens[0.5] == pytest.approx(256 * np.log(100) / small[0].decays[0.5])
    assert small[0].growing == 0


def test_channels_that_grow_with_distance_have_no_range():
    model = SolaVision(nano(dims=(16, 16, 32, 32), num_classes=0))
    with torch.no_grad():
        model.stages[0].layers[0].mixer.decay[:8] = -1
    first = decay_ranges(model, (64, 64))[0]
    assert first.growing == 0.5
    assert first.tokens[0.1] == float("inf")


@pytest.mark.parametrize(
    ("images", "point", "says"),
    [
        ([], None, "no images"),
        ([torch.randn(3, 32, 32)], (32.0, 0.0), "outside the 32x32 image"),
        ([torch.randn(3, 32, 32), torch.randn(3, 32, 64)], None, "one size"),
    ],
)
def test_impossible_fields_are_refused(model, images, point, says):
    with pytest.raises(ValueError, match=says):
        effective_receptive_field(model.train(), images, point)
    assert model.training
