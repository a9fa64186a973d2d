"""Pictures of maps: rows of panels, and limits that a few pixels do not decide."""

import io

import numpy as np
import pytest

from labn.report.figures import PER_ROW, DetectionRow, color_scale, detection_figure, overlay_figure


@pytest.mark.parametrize(("maps", "rows"), [(1, 1), (PER_ROW - 1, 1), (PER_ROW, 2), (2 * PER_ROW, 3)])
def test_many_maps_go_into_several_rows(maps, rows):
    heats = {f"method {n}": np.full((4, 5), float(n)) for n in range(maps)}
    figure = overlay_figure(np.zeros((4, 5, 3)), heats)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["image", *heats]
    assert panels[0].get_gridspec().nrows == rows
    assert panels[0].get_gridspec().ncols <= PER_ROW


def test_signed_limits_leave_outliers_out():
    heat = np.linspace(-1, 1, 1000).reshape(20, 50)
    heat[0, 0] = -500.0
    low, high, colors = color_scale(heat)
    assert (low, colors) == (-high, "RdBu_r")
    assert 0.98 < high < 1.0
    lonely = np.zeros((20, 50))
    lonely[3, 3] = -2.0
    assert color_scale(lonely)[:2] == (-2.0, 2.0)
    assert color_scale(np.full((2, 2), 3.0)) == (2.5, 3.5, "inferno")


@pytest.mark.parametrize(
    ("low", "step"), [(3.018e-3, 1e-7), (0.0, 0.3), (-2.0, 0.2), (0.5, 1e-6), (1e5, 1.0), (0, 1e-30)]
)
def test_ticks_of_a_colour_bar_are_whole_and_told_apart(low, step):
    figure = overlay_figure(np.zeros((4, 5, 3)), {"map": low + step * np.arange(20.0).reshape(4, 5)})
    figure.savefig(io.BytesIO(), dpi=30, format="png")
    bar = figure.axes[-1].yaxis
    assert bar.get_offset_text().get_text() == ""
    texts = [label.get_text() for label in bar.get_ticklabels()]
    assert len(set(texts)) == len(texts) > 1
    assert max(map(len, texts)) <= 12


@pytest.mark.parametrize("name", ["price_$5_a_b$.jpg: cat", r"$\\nosuch{$", "$x^$"])
def test_titles_are_text_and_no_mathematics(name):
    pixels, buffer = np.zeros((8, 8, 3)), io.BytesIO()
    overlay_figure(pixels, {name: np.ones((8, 8))}, title=name).savefig(buffer, dpi=30, format="png")
    row = DetectionRow(name, [0.0, 0.0, 4.0, 4.0], {"class": np.ones((8, 8))})
    detection_figure(pixels, [row], name).savefig(buffer, dpi=30, format="png")
