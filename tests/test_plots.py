"""The pictures: what is drawn, for few and many layers, and for numbers that have no logarithm."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
from PIL import Image

from hf_compressm.plots import (
    INK,
    close_up,
    draw_criteria,
    draw_loss,
    draw_loss_around,
    draw_memory,
    draw_spectrum,
    draw_state_size,
    draw_step_time,
    figure_pixels,
    figure_svg,
    plot_error_curves,
    save_figure,
    short_names,
)

NAN = math.nan


def layer(name="layers.0.mixer", before=8, after=4, curve=None, **more):
    curve = [2.0**-kept for kept in range(before)] + [0.0] if curve is None else curve
    return {
        "name": name,
        "state_size_before": before,
        "state_size_after": after,
        "relative_error": 0.05,
        "error_curve": curve,
    } | more


def cut(*layers, **more):
    return {"status": "cut", "step": 100, "layers": list(layers)} | more


def layers(count, before=8, after=(4,)):
    return [layer(f"layers.{number}.mixer", before, after[number % len(after)]) for number in range(count)]


def timeline():
    return [
        {"step": step, "state_size": 8 if step <= 100 else 4, "loss": 3 - step / 100, "step_seconds": 0.2}
        | {"memory_bytes": 2**30}
        for step in range(10, 210, 10)
    ]


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def dots(axes):
    """Where the marks of the choices are."""
    marks = [line for line in axes.get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
    return [(int(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in marks]


def texts(figure):
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_a_spectrum_shows_each_layers_curve_and_its_choice():
    figure = draw_spectrum(cut(layer("layers.0.mixer"), layer("layers.1.mixer", relative_error=0.2)))
    (axes,) = figure.axes
    assert list(lines(axes)["layer 1"].get_ydata())[:3] == [1, 0.5, 0.25]
    assert dots(axes) == [(4, 0.05), (4, 0.2)]
    assert list(lines(axes)["kept: 4 of 8 states"].get_xdata()) == [4, 4]
    assert axes.get_yscale() == "log" and "step 100" in axes.get_title(loc="left")


def test_layers_of_different_sizes_have_marks_of_their_own_and_no_common_line():
    (axes,) = draw_spectrum(cut(*layers(2, after=(2, 6)))).axes
    assert [size for size, _ in dots(axes)] == [2, 6] and "kept" not in " ".join(lines(axes))


@pytest.mark.parametrize("count, bars", [(2, 0), (8, 0), (9, 1), (64, 1)])
def test_many_layers_get_a_color_bar_instead_of_names(count, bars):
    figure = draw_spectrum(cut(*layers(count, before=256, after=(16,))))
    assert len(figure.axes) == 1 + bars
    assert ("layer 1" in lines(figure.axes[0])) == (not bars)
    assert ("last layer" in texts(figure)) == bool(bars)


def test_hankel_values_get_a_panel_relative_to_the_layers_largest():
    values = [[4.0, 2.0, 1.0, 0.0], [3.0, 1.0, 0.5, 0.0]]
    figure = draw_spectrum(cut(layer(before=4, after=2, hankel_values=values), layer("layers.1.mixer", 4, 2)))
    errors, hankel = figure.axes
    assert dots(hankel) == [(2, 0.5), (2, 0.25)]
    assert list(hankel.get_lines()[0].get_ydata())[:3] == [1, 0.5, 0.25]
    assert "Hankel" in hankel.get_title(loc="left") and "Hankel" not in errors.get_title(loc="left")


@pytest.mark.parametrize(
    "odd",
    [
        layer(curve=[0.0] * 9, relative_error=0.0),
        layer(before=1, after=1, curve=[1.0, 0.0]),
        layer(before=1, after=1, curve=[0.0, 0.0], hankel_values=[[0.0]]),
        layer(curve=[]),
        layer(curve=[NAN] * 9, relative_error=NAN),
        layer(curve=[1.0, None, "x", math.inf, 0.1, 0, 0, 0, 0], relative_error=None),
        layer(curve=[1e-300] * 9, hankel_values=[[math.inf, NAN], []]),
        layer(name="$\\frac{x$"),
        layer(name="_hidden"),
    ],
)
def test_odd_numbers_and_names_are_drawn(odd, tmp_path):
    plot_error_curves(cut(odd, step=None), tmp_path / "spectrum.png")
    assert np.asarray(Image.open(tmp_path / "spectrum.png").convert("L")).min() < 128


def test_names_are_written_as_they_are():
    names = ["$a$ and $b$", "_c", "<script>d"]
    legend = texts(draw_spectrum(cut(*[layer(name) for name in names])))
    svg = figure_svg(draw_spectrum(cut(*[layer(name) for name in names])))
    assert "_c" in legend and ">$a$ and $b$</text>" in svg and "&lt;script&gt;d" in svg and "<script" not in svg


@pytest.mark.parametrize(
    "names, short",
    [
        (["a.layers.0.mixer", "a.layers.10.mixer"], ["layer 0", "layer 10"]),
        (["a.x.mixer", "a.y.mixer"], ["x", "y"]),
        (["a.0.x", "a.1.y"], ["0.x", "1.y"]),
        (["a", "a.b"], ["a", "b"]),
        (["same", "same"], ["same", "same"]),
        ([], []),
    ],
)
def test_short_names(names, short):
    assert short_names(names) == short


def test_the_state_size_falls_at_the_cut_wherever_the_log_says_so():
    for logged in (8, 4):
        entries = [entry | ({"state_size": logged} if entry["step"] == 100 else {}) for entry in timeline()]
        (axes,) = draw_state_size(entries, [cut(*layers(1))]).axes
        line = axes.get_lines()[-1]
        points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        assert points[8:12] == [(90, 8), (100, 8), (100, 4), (110, 4)]


@pytest.mark.parametrize("draw, first, unit", [(draw_loss, 2.9, "loss"), (draw_step_time, 200, "ms")])
def test_what_is_drawn_over_the_training(draw, first, unit):
    (axes,) = draw(timeline(), [cut(*layers(1)), cut(*layers(1), status="taken back", step=150)]).axes
    assert axes.get_lines()[-1].get_ydata()[0] == pytest.approx(first) and unit in axes.get_ylabel()
    assert [list(lines(axes)[f"{name}: N 8 → 4"].get_xdata()) for name in ("cut", "taken back")] == [
        [100] * 2,
        [150] * 2,
    ]


@pytest.mark.parametrize("size, unit, value", [(2**30, "GiB", 1), (2**29, "MiB", 512)])
def test_memory_has_a_fitting_unit(size, unit, value):
    (axes,) = draw_memory([{"step": 1, "memory_bytes": size}, {"step": 2, "memory_bytes": size}]).axes
    assert unit in axes.get_ylabel() and axes.get_lines()[0].get_ydata()[0] == value


def test_entries_without_a_number_are_gaps():
    entries = [*timeline(), {"step": 210}, {"step": 220, "loss": NAN}, {"step": 230, "loss": "x"}]
    (axes,) = draw_loss(entries).axes
    assert len(axes.get_lines()[0].get_xdata()) == 20


def test_many_cuts_share_one_line_of_the_legend():
    cuts = [cut(*layers(1), step=step) for step in (10, 20, 30, 40)]
    (axes,) = draw_loss(timeline(), cuts).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["cuts"]


def test_the_close_up_is_near_the_cut_and_shows_one_batch_before_and_after():
    long = [{"step": step, "loss": 1.0} for step in range(1000)]
    assert [point[0] for point in close_up(long, 500)] == list(range(401, 600))
    assert [point[0] for point in close_up(timeline(), 100)] == list(range(50, 170, 10))
    assert close_up([{"step": 1}], 1) == []
    (axes,) = draw_loss_around(timeline(), cut(*layers(1), loss_before=1.25, loss_after=1.5)).axes
    legend = " ".join(lines(axes))
    assert "before: 1.2500" in legend and "after: 1.5000" in legend
    assert "before" not in " ".join(lines(draw_loss_around(timeline(), cut(*layers(1), loss_before=1.25)).axes[0]))


@pytest.mark.parametrize("count", [1, 3, 12])
def test_criteria_side_by_side(count):
    curves = {f"criterion {number}": [1.0, 0.5, 0.1 / (number + 1), 0.0] for number in range(count)}
    (axes,) = draw_criteria(curves, kept=2).axes
    assert all(list(lines(axes)[name].get_ydata())[:3] == curve[:3] for name, curve in curves.items())
    looks = {(lines(axes)[name].get_color(), lines(axes)[name].get_linestyle()) for name in curves}
    assert len(looks) == count and list(lines(axes)["kept: 2 states"].get_xdata()) == [2, 2]


def test_one_figure_for_a_file_a_page_and_a_tracker(tmp_path):
    figure = draw_spectrum(cut(*layers(2)))
    svg = figure_svg(figure)
    assert svg.startswith("<svg") and INK in svg and "layer 1" in svg and "<metadata" not in svg
    saved = np.asarray(Image.open(save_figure(figure, tmp_path / "new" / "spectrum.png")).convert("RGB"))
    pixels = figure_pixels(figure)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    # White, wherever it is looked at.
    assert (saved[0, 0] == 255).all() and (pixels[0, 0] == 255).all()


def test_the_users_own_style_stays_out_and_stays_as_it_is():
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black"}):
        assert figure_svg(draw_loss(timeline())).count("loss") and matplotlib.rcParams["text.usetex"]
    assert figure_svg(draw_loss(timeline())) == figure_svg(draw_loss(timeline()))
