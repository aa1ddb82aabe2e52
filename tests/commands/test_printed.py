# SPDX-License-Identifier: Apache-2.0
"""The numbers and tables that commands print: units, and names that are not cut."""

import re

import pytest
from small import CLASSES, TINY, write_images


@pytest.mark.parametrize(("count", "top5"), [(5, False), (6, True)])
def test_percentages_have_their_unit_and_top5_is_of_more_than_five_classes(sola, tmp_path, count, top5):
    data = write_images(tmp_path / "images", [f"class{i}" for i in range(count)], train=3, val=(1,))
    said = sola(*TINY, "--data", data, "--out", "run")
    assert said.code == 0, said.err
    number = r"[\d.]+(e[+-]\d+)?"
    more = rf"top5 {number} %" if top5 else ""
    assert re.search(rf"^epoch {number}  top1 {number} %  {more and more + '  '}loss {number}$", said.err, re.MULTILINE)
    assert re.match(rf"top1 {number} %, {more and more + ', '}loss {number}; best.safetensors", said.out)
    said = sola("eval", "--checkpoint", "run", "--data", data, "--workers", 0)
    assert re.search(rf"^top-1 {number} %, {'top-5 ' + number + ' %, ' if top5 else ''}loss ", said.out, re.MULTILINE)


def test_names_are_not_broken_where_the_output_is_no_terminal(sola, tmp_path, data, trained):
    name = "a very long name of a file, with spaces, " * 3 + "0.png"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / name).write_bytes((data / "val" / "ant" / "0.png").read_bytes())
    said = sola("predict", "pictures", "--checkpoint", trained, "--top", 99)
    assert said.code == 0, said.err
    (row,) = [line for line in said.out.splitlines() if name in line]
    assert all(f" {each} " in row for each in CLASSES)
    (tmp_path / ("long " * 30)).symlink_to(data)
    said = sola("eval", "--checkpoint", trained, "--data", "long " * 30, "--workers", 0, "--out", "out")
    assert said.code == 0, said.err
    assert f"on {'long ' * 30} (val, 16 images)\n" in said.out
