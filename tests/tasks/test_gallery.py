# SPDX-License-Identifier: Apache-2.0
"""The page of predictions: every card's data, and names that cannot end the script."""

import json
import os
import re

from sola_vision.tasks.gallery import Card, write_gallery


def test_the_page_holds_every_card(tmp_path):
    cards = [Card("a b.jpg", "pictures/a b#1.png", ["Sky 31.2 %"]), Card("</script><b>&", "p/é.png")]
    write_gallery(tmp_path / "index.html", "<2 images> & __DATA__", cards)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 1
    assert "<title>&lt;2 images&gt; &amp; " in page
    data = json.loads(re.search(r"const cards = (\[.*?\]);\n", page)[1])
    assert [card["name"] for card in data] == ["a b.jpg", "</script><b>&"]
    assert [card["picture"] for card in data] == ["pictures/a%20b%231.png", "p/%C3%A9.png"]
    assert data[0]["facts"] == ["Sky 31.2 %"]
    with_byte = os.fsdecode(b"caf\xe9.png")  # file names need not be valid in any encoding
    write_gallery(tmp_path / "other.html", "t", [Card(with_byte, f"p/{with_byte}")])
    assert '"picture":"p/caf%E9.png"' in (tmp_path / "other.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)  # no external resources
