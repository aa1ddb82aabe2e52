# SPDX-License-Identifier: Apache-2.0
"""What the README shows runs."""

import re
from pathlib import Path

import pytest
import timm
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
PROSE = " ".join(README.split())  # lines are wrapped


def test_the_python_snippet_runs():
    snippet = re.search(r"```python\n(.*?)```", README, re.S)[1]
    names = {}
    exec(snippet, names)
    assert names["logits"].shape == (1, 10)
    assert [tuple(m.shape[-2:]) for m in names["maps"]] == [(64, 80), (32, 40), (16, 20), (8, 10)]


def test_the_arguments_that_it_lists_are_those_that_work(tmp_path):
    text = re.search(r"`create_model` takes (.*?) are errors", PROSE)[1]
    taken, refused = text.split("; arguments")
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("sola_nano").state_dict(), weights)
    values = {
        "num_classes": (0, 5),
        "in_chans": (1,),
        "img_size": (448,),
        "drop_rate": (0.1,),
        "drop_path_rate": (0.1,),
        "global_pool": tuple(name for name in re.findall(r'"(\w*)"', text) if name),
        "features_only": (True,),
        "out_indices": ((1, 3),),
        "checkpoint_path": (str(weights),),
        "device": ("cpu",),
        "dtype": (torch.float32,),
    }
    assert set(re.findall(r"`(\w+)`", taken)) - {"SolaConfig"} == set(values)
    assert len(values["global_pool"]) == 4
    for name, some in values.items():
        for value in some:
            more = {"features_only": True} if name == "out_indices" else {}
            model = timm.create_model("sola_nano", **{name: value}, **more).eval()
            assert len(model(torch.randn(1, 1 if name == "in_chans" else 3, 40, 72)))
    assert timm.create_model("sola_nano", global_pool="", num_classes=0)(torch.randn(1, 3, 64, 96)).shape[-2:] == (2, 3)
    for name in re.findall(r"`(\w+)`", refused):
        with pytest.raises(TypeError, match=name):
            timm.create_model("sola_nano", **{name: 0.1})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
def test_what_compiles_the_networks():
    assert "`torch.jit.trace` take the networks, `torch.jit.script` does not" in PROSE
    model = timm.create_model("sola_nano", num_classes=3).eval()
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(torch.jit.trace(model, image)(image), model(image))
    with pytest.raises(RuntimeError):
        torch.jit.script(model)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)


def test_the_recipes_are_those_that_exist():
    from sola_vision.recipes import RECIPES

    table = README[README.index("| recipe |") : README.index("`sola train RECIPE --print_config`")]
    assert set(re.findall(r"`(\w+)`", table)) == set(RECIPES)
