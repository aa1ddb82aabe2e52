# SPDX-License-Identifier: Apache-2.0
"""Labels of points: all present, inside the panel, and without overlaps, even for crowded points."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from sola_vision.analysis.labels import label_points


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_names_keep_clear_of_each_other(scale):
    random = np.random.default_rng(0)
    points = [(f"network {i}", *xy) for i, xy in enumerate(random.uniform(1, 1.2, (12, 2)))]
    points += [("far left", 1e-2, 1.1), ("far right", 1e2, 1.15), ("on the first", *points[0][1:])]
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale(scale)
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], "o")
    label_points(figure, axes, points)
    figure.draw_without_rendering()
    panel = axes.get_window_extent()
    boxes = [Text.get_window_extent(label) for label in axes.texts]
    assert [label.get_text() for label in axes.texts] == [name for name, _, _ in points]
    for number, box in enumerate(boxes):
        assert panel.x0 <= box.x0
        assert box.x1 <= panel.x1
        assert box.count_overlaps(boxes[:number]) == 0
        centres = axes.transData.transform([(x, y) for _, x, y in points])
        assert box.count_overlaps([Bbox.from_bounds(*(centre - 2), 4, 4) for centre in centres]) == 0


def test_no_points_no_names():
    figure = Figure()
    axes = figure.subplots()
    label_points(figure, axes, [])
    assert not axes.texts
