# SPDX-License-Identifier: Apache-2.0
"""What the README shows runs."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_snippet_runs():
    snippet = re.search(r"```python\n(.*?)```", README, re.S)[1]
    names = {}
    exec(snippet, names)
    assert names["logits"].shape == (1, 10)
    assert [tuple(m.shape[-2:]) for m in names["maps"]] == [(64, 80), (32, 40), (16, 20), (8, 10)]
    assert names["y"].shape == (2, 50, 8)


def test_the_recipes_are_those_that_exist():
    from sola_vision.recipes import RECIPES

    table = README[README.index("| recipe |") : README.index("`sola train RECIPE --print_config`")]
    assert set(re.findall(r"`(\w+)`", table)) == set(RECIPES)
