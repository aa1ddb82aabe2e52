# SPDX-License-Identifier: Apache-2.0
"""The page in Gradio: the predictions and layer maps of a network for a picture; a schedule as tiles and its cost."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from sola_vision.app.subject import Subject, load, names
from sola_vision.app.tiles import SIZES, Price, price, toggled
from sola_vision.schedule import parse_schedule

CSS = """
.tile { min-width: 5.2rem !important; max-width: 5.2rem; font-variant-numeric: tabular-nums; white-space: pre-line }
.stage { flex: 0 0 9rem !important; min-width: 9rem !important }
.linear { background: #0072B2 !important; color: white !important }
.softmax { background: #D55E00 !important; color: white !important }
.refused { color: #D55E00; font-weight: 600 }
"""
_MAX_SIDE = 4096


def build(sources: list[str]) -> gr.Blocks:
    """Build the page; `sources` are the checkpoints to choose from, before those of runs/ and the names."""
    choices = names(sources)

    @lru_cache(maxsize=4)
    def loaded(source: str) -> Subject:
        # Gradio rejects values that are not among the choices, so remote users of a page cannot name files
        return load(source)

    def show(source: str, picture: Image.Image | None, longest: float) -> tuple[Any, ...]:
        subject = loaded(source)
        if picture is None:
            return f"{subject.label}. Drop a picture.", {}, None, [], []
        picture = ImageOps.exif_transpose(picture).convert("RGB")
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
        prediction = subject.predict(picture)
        layers = subject.layer_maps(picture, int(longest))
        cams = [(cam, name) for name, cam, _ in layers]
        activations = [(activation, name) for name, _, activation in layers]
        drawn = gr.update(value=prediction.picture, visible=prediction.picture is not None)
        return subject.label, prediction.shares, drawn, cams, activations

    with gr.Blocks(title="SoLA-Vision") as page:
        gr.Markdown("# SoLA-Vision\nA backbone whose every layer is **L**inear or **S**oftmax attention.")
        with gr.Tab("Look"):
            with gr.Row():
                with gr.Column(scale=1):
                    source = gr.Dropdown(choices, value=choices[0], label="Network", elem_id="source")
                    picture = gr.Image(type="pil", label="Picture", sources=["upload", "clipboard"], elem_id="picture")
                    longest = gr.Slider(
                        64, 1024, 224, step=32, label="Longer side in pixels, for the maps", elem_id="longest"
                    )
                with gr.Column(scale=1):
                    label = gr.Markdown(elem_id="label")
                    shares = gr.Label(label="Classes", num_top_classes=5, elem_id="classes")
                    drawn = gr.Image(label="What it found", visible=False, elem_id="drawn")
            gallery: dict[str, Any] = {"columns": 6, "height": "auto", "object_fit": "contain"}
            cams = gr.Gallery(label="EigenCAM of each layer", elem_id="cams", **gallery)
            activations = gr.Gallery(label="Activation of each layer", elem_id="activations", **gallery)
            inputs, outputs = [source, picture, longest], [label, shares, drawn, cams, activations]
            for event in (page.load, source.change, picture.change, longest.release):
                event(_with_errors_shown(show), inputs, outputs)
        with gr.Tab("Schedule"):
            _schedule_tab()
    return page


def _schedule_tab() -> None:
    with gr.Row():
        name = gr.Dropdown(list(SIZES), value="sola_tiny", label="Network", elem_id="name")
        size = gr.Slider(64, 2048, 224, step=32, label="Image side in pixels", elem_id="size")
        text = gr.Textbox(SIZES["sola_tiny"]().schedule, label="Schedule", elem_id="schedule")
    gr.Markdown("Press a tile to change its layer; the number is its GMACs.")

    def default_schedule(chosen: str) -> str:
        return SIZES[chosen]().schedule

    # gr.render runs again whenever one of the three changes
    @gr.render(inputs=[name, text, size])
    @_with_errors_shown
    def draw(chosen: str, schedule: str, side: float) -> None:
        try:
            parse_schedule(schedule)
        except ValueError as error:
            gr.Markdown(str(error), elem_id="cost", elem_classes="refused")
            return
        priced: Price = price(chosen, schedule, int(side))
        for number, tiles in enumerate(priced.stages):
            with gr.Row():
                gr.Markdown(f"stage {number + 1}, stride {4 * 2**number}", elem_classes="stage")
                for tile in tiles:
                    kind = "linear" if tile.kind == "L" else "softmax"
                    place = f"tile-{tile.stage + 1}-{tile.layer + 1}"
                    button = gr.Button(tile.text, size="sm", scale=0, elem_id=place, elem_classes=["tile", kind])
                    button.click(_toggle_on_press(schedule, tile.stage, tile.layer), None, text)
        gr.Markdown(priced.error or priced.summary, elem_id="cost", elem_classes="refused" if priced.error else None)

    name.change(default_schedule, name, text)


def _toggle_on_press(schedule: str, stage: int, layer: int) -> Callable[[], str]:
    return lambda: toggled(schedule, stage, layer)


def _with_errors_shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with input errors shown as a message on the page, in one line."""

    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except (ValueError, OSError, ImportError) as error:
            raise gr.Error(" ".join(str(error).split())) from None

    return call
