# SPDX-License-Identifier: Apache-2.0
"""The position of tokens in the image, including padding: points, numbers, sheet and page agree."""

import base64
import json
import shutil
import subprocess

import numpy as np
import pytest
import timm
import torch

from sola_vision import SolaVision, nano
from sola_vision.analysis.explain import LayerView, effective_area, explain
from sola_vision.analysis.multiscale import energy_shares
from sola_vision.analysis.page import write_page
from sola_vision.analysis.sheet import draw_sheet
from sola_vision.analysis.trace import feature_maps, nearest_token, patches


def build():
    torch.manual_seed(0)
    return SolaVision(nano(dims=(8, 16, 32, 64), num_classes=0)).eval()


@pytest.mark.parametrize(
    ("point", "token"), [((0, 0), (0, 0)), ((47.9, 79.9), (11, 19)), ((24, 40), (6, 10)), ((23.9, 0), (5, 0))]
)
def test_a_point_lies_in_a_token(point, token):
    assert nearest_token(point, (4, 4), (12, 20)) == token


def test_a_point_of_a_padded_image_lies_in_the_patch_of_its_stride():
    size = (300, 222)  # neither is a multiple of 32
    model = build()
    with torch.no_grad():
        maps = feature_maps(model, torch.randn(1, 3, *size))
    found = patches(model, size, maps)
    assert list(dict.fromkeys(found.values())) == [(s, s) for s in (4, 8, 16, 32)]
    grid = tuple(maps["4.2 S"].shape[2:])
    assert grid == (10, 7)
    assert nearest_token((150, 150), found["4.2 S"], grid) == (4, 4)
    assert nearest_token((299.9, 221.9), found["4.2 S"], grid) == (9, 6)
    view = explain(model, torch.randn(3, *size), (150, 150))[-1]
    assert (view.token, view.patch) == ((4, 4), (32, 32))


def test_a_pixel_moves_the_token_that_it_lies_in():
    """With identity layers only stem and merging remain: their response to one pixel shows their geometry."""
    model = build()
    size = (75, 97)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("stages") and ("output" in name or "fc2" in name or "channel_mix.value" in name):
                parameter.zero_()
        image = torch.randn(1, 3, *size)
        still = feature_maps(model, image)
        found = patches(model, size, still)
        for point in ((74, 96), (37, 48), (31, 32), (63, 5), (64, 95)):
            changed = image.clone()
            changed[0, :, point[0], point[1]] += 100
            for name, feature in feature_maps(model, changed).items():
                moved = ((feature - still[name]).abs().amax((0, 1)) > 1e-4).nonzero().tolist()
                assert list(nearest_token(point, found[name], tuple(feature.shape[2:]))) in moved


def test_patches_of_peers_are_those_of_timm_s_reductions_where_these_fit():
    size = (97, 131)
    image = torch.randn(1, 3, *size)
    for name, grids in (("resnet18", [(49, 66), (25, 33), (13, 17), (7, 9), (4, 5)]), ("convnext_atto", [(24, 32)])):
        model = timm.create_model(name, num_classes=0).eval()
        with torch.no_grad():
            maps = feature_maps(model, image)
        assert [tuple(m.shape[2:]) for m in maps.values()][: len(grids)] == grids
        strides = [entry["reduction"] for entry in model.feature_info]
        assert list(patches(model, size, maps).values()) == [(s, s) for s in strides]
    maps = {"map 1": torch.zeros(1, 3, 22, 31), "map 2": torch.zeros(1, 3, 10, 10)}
    model = torch.nn.Identity()
    assert list(patches(model, (300, 300), maps).values()) == [(300 / 22, 300 / 31), (30, 30)]
    model.feature_info = [{"reduction": 4}, {"num_chs": 3}]  # 97 / 4 is no 22: convolutions without padding
    assert list(patches(model, size, maps).values()) == [(97 / 22, 131 / 31), (9.7, 13.1)]


def view(token=(2, 1), patch=(32, 32), **more):
    """A map of 4 x 5 tokens, for an image of 97 x 131 pixels, that is nonzero at one token."""
    hot = np.full((4, 5), 1e-3)
    hot[token] = 1
    return LayerView("1.1 L", hot, hot, token, patch, reads=hot / hot.sum(), **more)


def test_what_lies_beyond_the_image_counts_for_nothing():
    image = (97, 131)
    corner = view((3, 4))
    assert corner.covers(image).sum() == pytest.approx(1)
    assert corner.covers(image)[3, 4] == pytest.approx(1 * 3 / (97 * 131))
    assert effective_area(np.ones((4, 5)), corner.covers(image)) == pytest.approx(1)
    single = np.zeros((4, 5))
    single[3, 4] = 1
    assert effective_area(single, corner.covers(image)) == pytest.approx(3 / (97 * 131))
    # pixels that the network does not cover belong to no token
    assert effective_area(np.ones((3, 4)), view().covers(image)[:3, :4]) == pytest.approx(96 * 128 / (97 * 131))
    # marked within the image
    assert corner.middle(image) == (96.5, 129.5)
    assert view((2, 1)).middle(image) == (80, 48)


def test_distances_are_in_strides():
    reads = np.zeros((4, 5))
    reads[2, 1], reads[0, 4] = 0.5, 0.5
    numbers = LayerView("1.1 L", reads + 1, reads, (2, 1), (32, 32), reads=reads).numbers((97, 131))
    assert numbers["read_rows"] == pytest.approx(2 * 32 / 2**0.5)
    assert numbers["read_columns"] == pytest.approx(3 * 32 / 2**0.5)
    assert numbers["activation_area"] > 85


def test_the_sheet_has_every_token_on_its_pixels(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *a, **k: figures.append(figure))
    image = np.zeros((97, 131, 3), np.uint8)
    draw_sheet(image, (90, 50), [("one", [view((3, 4), gates={"1.1>1.2": np.ones((4, 5))})])], tmp_path / "s", "t")
    panels = [axes for axes in figures[0].axes if axes.images and axes.images[0].get_array().shape == (4, 5)]
    assert len(panels) == 4
    for axes in panels:
        assert axes.images[0].get_extent() == [0, 160, 128, 0]
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 131), (97, 0))
    marked = [tuple(float(xy[0]) for xy in line.get_data()) for line in panels[2].lines]
    assert set(marked) == {(129.5, 96.5)}


# the parts of a browser that page.html needs
DOM = """
const made = [];
function element(tag) {
  const e = { tag, style: {}, listeners: {}, addEventListener(what, f) { this.listeners[what] = f; }, append() {},
    getBoundingClientRect: () => ({ left: 10, top: 20, width: 262, height: 194 }),
    getContext: () => ({ drawImage() {}, beginPath() {}, arc() {}, stroke() {}, putImageData() {},
      createImageData: (width, height) => (e.shown = { data: new Uint8ClampedArray(4 * width * height) }) }) };
  made.push(e);
  return e;
}
const byId = { data: { textContent: process.argv[2] } };
const document = { createElement: element, getElementById: id => byId[id] ??= element(id),
  querySelector: () => ({ value: "reads" }), querySelectorAll: () => [] };
class Image {
  naturalWidth = 131; naturalHeight = 97;
  addEventListener(what, f) { this.load = f; }
  set src(_) { this.load(); }
}
"""
CLICK = """
const canvas = made.find(e => e.tag === "canvas"), mark = made.filter(e => e.tag === "div")[2], said = [];
for (const [x, y] of JSON.parse(process.argv[3])) {
  byId.photo.listeners.click({ clientX: 10 + 2 * x, clientY: 20 + 2 * y });
  said.push({ first: canvas.shown.data[0], mark: [mark.style.left, mark.style.top] });
}
byId.photo.listeners.keydown({ key: "ArrowUp", preventDefault() {} });
said.push({ first: canvas.shown.data[0], mark: [mark.style.left, mark.style.top] });
console.log(JSON.stringify({ said, width: canvas.style.width, height: canvas.style.height }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node to run the page's script")
def test_a_click_on_the_page_chooses_the_token_under_the_pointer(tmp_path):
    # the map of token n is n everywhere, and the ramp's red is the value itself
    maps = np.repeat(np.arange(20, dtype=np.uint8), 20).reshape(20, 4, 5)
    one = view(elsewhere=maps, known=((0, 1, 2, 3), (0, 1, 2, 3, 4)))
    write_page(np.zeros((97, 131, 3), np.uint8), (48, 65), [("one", [one])], tmp_path / "p.html", "title")
    page = (tmp_path / "p.html").read_text()
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0].replace("<\\/", "</"))
    data["rising"] = base64.b64encode(bytes(value for n in range(256) for value in (n, 0, 0))).decode()
    script = page.split("<script>")[1].split("</script>")[0]
    (tmp_path / "p.js").write_text(DOM + script + CLICK)
    clicks = [[0, 0], [33, 31], [63, 65], [96, 95], [130.9, 96.9]]
    words = ["node", str(tmp_path / "p.js"), json.dumps(data), json.dumps(clicks)]
    said = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert [one["first"] for one in said["said"]] == [0, 1, 11, 13, 19, 14]
    assert float(said["width"][:-1]) == pytest.approx(100 * 160 / 131)
    assert float(said["height"][:-1]) == pytest.approx(100 * 128 / 97)
    assert [float(part[:-1]) for part in said["said"][4]["mark"]] == pytest.approx([100 * 129.5 / 131, 100 * 96.5 / 97])


def test_a_page_holds_every_token_of_small_layers_and_some_of_large_ones():
    views = explain(build(), torch.randn(3, 97, 131), elsewhere=True)
    first, last = views[0], views[-1]
    assert last.known == ((0, 1, 2, 3), (0, 1, 2, 3, 4))
    assert len(last.elsewhere) == 20
    rows, columns = first.known
    assert len(rows) == len(columns) == 12
    assert len(first.elsewhere) == 144
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (1, 23, 1, 31)  # of 25 x 33


def test_energy_lies_where_the_pixels_of_its_token_are():
    masks = np.zeros((2, 100, 100), bool)
    masks[0, 96:, 96:] = True  # the part of the last patch of 32 pixels within an image of 100
    masks[1, :25, :25] = True
    for share, area in energy_shares(torch.ones(4, 4), masks, (32, 32)):
        assert share == pytest.approx(area)
    energy = torch.zeros(4, 4)
    energy[3, 3] = 1
    assert [share for share, _ in energy_shares(energy, masks, (32, 32))] == [1, 0]
    energy = torch.zeros(4, 4)
    energy[0, 0] = 2
    assert energy_shares(energy, masks, (32, 32))[1] == (pytest.approx((25 / 32) ** 2), 0.0625)
    # patches that are not a whole number of pixels
    assert energy_shares(torch.ones(3, 3), masks, (100 / 3, 100 / 3))[1][0] == pytest.approx(0.0625)
