# SPDX-License-Identifier: Apache-2.0
"""A gallery of drawn predictions: one HTML file next to its pictures, with no external resources.

Thumbnails with a text filter (names and predictions) and a large view: arrow keys to browse, Escape to close.
"""

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote


@dataclass(frozen=True)
class Card:
    """An image of the page: its name, the drawn picture (a path relative to the page), its predictions as text."""

    name: str
    picture: str
    facts: Sequence[str] = ()


def write_gallery(out: Path, title: str, cards: Sequence[Card]) -> None:
    """Write the HTML page `out` that shows `cards` in their order."""
    data = [
        {"name": card.name, "picture": quote(os.fsencode(card.picture)), "facts": list(card.facts)} for card in cards
    ]
    # "</" would end the script element that holds the data
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    head, _, tail = _PAGE.partition("__DATA__")
    out.write_text(head.replace("__TITLE__", html.escape(title)) + text + tail, encoding="utf-8", errors="replace")


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>__TITLE__</title>
<style>
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }
body { margin: 1rem auto; max-width: 1500px; padding: 0 1rem }
h1 { font-size: 1.2rem; margin: 0 0 .6rem }
input { font: inherit; padding: .3rem .6rem; width: min(24rem, 100%) }
#grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: .8rem; margin-top: .8rem }
button.card { all: unset; cursor: pointer; border: 1px solid #8886; border-radius: 6px; overflow: hidden }
button.card:focus-visible, button.card:hover { outline: 3px solid #0072B2 }
.card img { width: 100%; height: 160px; object-fit: contain; background: #8882; display: block }
.card div { padding: .3rem .5rem; overflow-wrap: anywhere; font-size: .85rem }
.facts { opacity: .75 }
dialog { width: 96vw; max-width: none; height: 94vh; max-height: none; padding: .6rem; box-sizing: border-box }
dialog img { width: 100%; height: calc(100% - 3.2rem); object-fit: contain }
dialog p { margin: 0 0 .4rem; overflow-wrap: anywhere; max-height: 2.8em; overflow: auto }
</style>
<h1>__TITLE__</h1>
<input id="word" type="search" placeholder="filter by name or prediction" aria-label="filter">
<span id="count"></span>
<div id="grid"></div>
<dialog id="large"><p></p><img alt=""></dialog>
<script>
const cards = __DATA__;
const grid = document.getElementById("grid"), large = document.getElementById("large");
const word = document.getElementById("word"), count = document.getElementById("count");
let shown = [], at = 0;
function text(card) { return card.name + (card.facts.length ? ": " + card.facts.join(", ") : "") }
function show(index) {
  at = (index + shown.length) % shown.length;
  large.querySelector("img").src = shown[at].picture;
  large.querySelector("img").alt = large.querySelector("p").textContent = text(shown[at]);
  if (!large.open) large.showModal();
}
function list() {
  const wanted = word.value.toLowerCase();
  shown = cards.filter(card => text(card).toLowerCase().includes(wanted));
  count.textContent = shown.length + " of " + cards.length + " images";
  grid.replaceChildren(...shown.map((card, index) => {
    const button = document.createElement("button"), image = document.createElement("img");
    const name = document.createElement("div"), facts = document.createElement("div");
    button.className = "card"; image.loading = "lazy"; image.src = card.picture; image.alt = text(card);
    name.textContent = card.name; facts.textContent = card.facts.join(", "); facts.className = "facts";
    button.append(image, name, facts); button.onclick = () => show(index);
    return button;
  }));
}
word.oninput = list;
large.onclick = () => large.close();
addEventListener("keydown", event => {
  if (large.open && event.key === "ArrowRight") show(at + 1);
  if (large.open && event.key === "ArrowLeft") show(at - 1);
});
list();
</script>
</html>
"""
