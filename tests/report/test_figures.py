"""Pictures of maps: rows of panels, and limits that a few pixels do not decide."""

import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from labn.postprocess.overlay import PER_ROW, color_scale, overlay_figure
from labn.report.figures import DetectionRow, detection_figure


@pytest.mark.parametrize(("maps", "rows"), [(1, 1), (PER_ROW - 1, 1), (PER_ROW, 2), (2 * PER_ROW, 3)])
def test_many_maps_go_into_several_rows(maps, rows):
    heats = {f"method {n}": np.full((4, 5), float(n)) for n in range(maps)}
    figure = overlay_figure(np.zeros((4, 5, 3)), heats)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["image", *heats]
    places = [axis.get_position() for axis in panels]
    assert len({round(place.y0, 6) for place in places}) == rows
    assert len({round(place.x0, 6) for place in places}) <= PER_ROW
    assert all(0 <= place.x0 < place.x1 <= 1 and 0 <= place.y0 < place.y1 <= 1 for place in places)


def test_texts_of_a_figure_lie_inside_it_and_do_not_touch_the_next_picture():
    heats = {f"method {n}": 3.018e-3 + 1e-7 * np.arange(20.0).reshape(4, 5) for n in range(3)}
    figure = overlay_figure(np.zeros((4, 5, 3)), heats, title="a title")
    figure.savefig(io.BytesIO(), format="png")
    renderer, width = FigureCanvasAgg(figure).get_renderer(), figure.bbox.width
    boxes = [axis.get_tightbbox(renderer) for axis in figure.axes]
    assert all(box.x1 <= width for box in boxes)
    pictures = [axis for axis in figure.axes if axis.get_title()]
    bars = [axis for axis in figure.axes if not axis.get_title()]
    for bar, after in zip(bars, pictures[2:]):
        assert bar.get_tightbbox(renderer).x1 <= after.get_tightbbox(renderer).x0


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
    low, high, _ = color_scale(np.full((2, 2), 1e20, np.float32))
    assert low < 1e20 < high


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
