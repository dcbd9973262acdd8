"""Pictures of cuts, and of the training around them.

Each `draw_...` function returns a Figure, on a white ground, and touches no state of pyplot. `save_figure`,
`figure_svg` and `figure_pixels` make of it what a file, a page or a tracker takes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_file

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Text and axes. Whoever shows an SVG on a dark ground replaces this one colour.
INK = "#1c2127"
# What the data are drawn in is readable on white and on black.
BLUE, ORANGE, VIOLET, GREEN = "#2b7bd0", "#d2691e", "#9a63cf", "#2e8f5b"
LAYER_COLORS = [BLUE, "#8a6fd1", "#c9589b", ORANGE]
LINE_STYLES = ["-", "--", "-.", ":"]
# Above this many layers, a color bar takes the place of the legend.
NAMED_LAYERS = 8
LONGEST_NAME = 32
# Errors and Hankel singular values below these are rounding noise: curves leave the picture at the bottom.
ERROR_FLOOR, HANKEL_FLOOR = 1e-6, 1e-8
# Of the curve of the loss, a close-up shows this share of the training before a cut and after it, and at least so many
# entries of the timeline.
CLOSE_UP, CLOSE_UP_ENTRIES = 0.1, 6
# Drawn narrow, so that letters are still readable where a telephone shows the picture at its width.
WIDTH, HEIGHT = 4.4, 3.5

_STYLE = {
    "text.usetex": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_compressm",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
} | dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK)


def _style() -> AbstractContextManager[None]:
    """The user's own matplotlibrc is for the user's own pictures."""
    # Not at the top: whoever trains without a picture need not wait for matplotlib.
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _styled(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def styled(*args: Any, **kwargs: Any) -> Any:
        with _style():
            return function(*args, **kwargs)

    return styled


def plot_error_curves(cut: Mapping[str, Any], path: str | Path) -> None:
    """Draw the spectrum of a cut, as `draw_spectrum` does, into a file.

    Args:
        cut: an entry of a history (of a Compressor, a callback or `compressm.json`) with status `cut`.
        path: the picture's file; its ending chooses the format.
    """
    save_figure(draw_spectrum(cut), path)


@_styled
def draw_spectrum(cut: Mapping[str, Any]) -> Figure:
    """Draw how many states each layer of a cut needs.

    Each layer's expected error against the number of states kept, with the number chosen and the error measured there;
    where a projection was possible, each layer's Hankel singular values below it.

    Args:
        cut: an entry of a history (of a Compressor, a callback or `compressm.json`) with status `cut`.
    """
    layers = cut["layers"]
    with_hankel = any(layer.get("hankel_values") for layer in layers)
    figure = _figure(2 * HEIGHT if with_hankel else HEIGHT + 0.4)
    panels = figure.subplots(2 if with_hankel else 1, squeeze=False)[:, 0]
    colors = _layer_colors()
    shades = [colors(number / max(1, len(layers) - 1)) for number in range(len(layers))]
    _draw_errors(panels[0], cut, shades)
    if with_hankel:
        _draw_hankel(panels[1], layers, shades)
    if len(layers) > NAMED_LAYERS:
        from matplotlib.cm import ScalarMappable

        bar = figure.colorbar(
            ScalarMappable(cmap=colors), ax=list(panels), ticks=[0, 1], location="bottom", aspect=40, shrink=0.6
        )
        bar.ax.set_xticklabels(["first layer", "last layer"])
        bar.outline.set_visible(False)
    return figure


def _draw_errors(axes: Axes, cut: Mapping[str, Any], shades: Sequence[Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = cut["layers"]
    few = len(layers) <= NAMED_LAYERS
    curves = [_finite(layer.get("error_curve") or []) for layer in layers]
    errors = _finite([layer.get("relative_error") for layer in layers])
    sizes = [layer["state_size_after"] for layer in layers]
    floor = _floor([value for curve in [*curves, errors] for value in curve], ERROR_FLOOR)
    for number, (name, curve) in enumerate(zip(short_names([layer["name"] for layer in layers]), curves, strict=True)):
        style = LINE_STYLES[number % len(LINE_STYLES)] if few else "-"
        axes.plot(
            range(len(curve)),
            [max(value, floor / 10) for value in curve],
            style,
            color=shades[number],
            linewidth=1.6 if few else 0.9,
            label=plain(name) if few else None,
        )
        height = max(errors[number], floor)
        axes.plot(sizes[number], height, "o", color=shades[number], markersize=5 if few else 3.5, clip_on=False)
    largest = max(layer["state_size_before"] for layer in layers)
    if len(set(sizes)) == 1:
        axes.axvline(sizes[0], color="#808080", linestyle=(0, (2, 2)), label=f"kept: {sizes[0]} of {largest} states")
    axes.plot([], [], "o", color="#808080", markersize=5, label="chosen, with its measured error")
    step = "" if cut.get("step") is None else f" (step {cut['step']:,})"
    axes.set(
        yscale="log",
        ylim=(floor, 1.5 * max([1.0, *errors])),
        xlim=(0, largest),
        xlabel="states kept, r",
        ylabel="relative output error",
        title=f"States that each layer needs{step}",
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 4, 5, 8, 10]))
    _legend_below(axes)


def _draw_hankel(axes: Axes, layers: Sequence[Mapping[str, Any]], shades: Sequence[Any]) -> None:
    drawn = []
    for layer, shade in zip(layers, shades, strict=True):
        groups = [_finite(group) for group in layer.get("hankel_values") or []]
        largest = max((value for group in groups for value in group), default=0)
        size = layer["state_size_after"]
        for group in groups if largest > 0 else []:
            values = [value / largest for value in group]
            drawn += values
            axes.plot(
                range(1, len(values) + 1), [max(value, HANKEL_FLOOR / 10) for value in values], color=shade, lw=1
            )
            if 0 < size <= len(values):
                axes.plot(size, max(values[size - 1], HANKEL_FLOOR), "o", color=shade, markersize=5, clip_on=False)
    axes.plot([], [], "o", color="#808080", markersize=5, label="the last one that is kept")
    axes.set(
        yscale="log",
        ylim=(_floor(drawn, HANKEL_FLOOR), 1.5),
        xlim=(0, max(layer["state_size_before"] for layer in layers)),
        xlabel="number of the value, from the largest",
        ylabel="relative to the largest",
        title="Hankel singular values",
    )
    _legend_below(axes)


@_styled
def draw_state_size(timeline: Sequence[Mapping[str, Any]], cuts: Sequence[Mapping[str, Any]] = ()) -> Figure:
    """Draw the state size over the training.

    Args:
        timeline: a record's.
        cuts: the entries of a history to mark.
    """
    figure, axes = _over_training(cuts)
    points = _points(timeline, "state_size")
    # The log may have its entry for the step of a cut from before the cut or from after it.
    changes = {cut["step"]: _largest_sizes(cut) for cut in cuts if cut.get("step") is not None and cut.get("layers")}
    line = [point for point in points if point[0] not in changes]
    line = sorted(
        line + [(step, size) for step, sizes in changes.items() for size in sizes], key=lambda point: point[0]
    )
    axes.plot(*zip(*line, strict=True), color=BLUE, drawstyle="steps-pre", linewidth=2)
    axes.set(ylabel="state size N", title="State size", ylim=_from_zero(line))
    _legend_below(axes)
    return figure


@_styled
def draw_loss(timeline: Sequence[Mapping[str, Any]], cuts: Sequence[Mapping[str, Any]] = ()) -> Figure:
    """Draw the training loss; arguments as in `draw_state_size`."""
    figure, axes = _over_training(cuts)
    axes.plot(*zip(*_points(timeline, "loss"), strict=True), color=BLUE)
    axes.set(ylabel="training loss", title="Training loss")
    _legend_below(axes)
    return figure


@_styled
def draw_loss_around(timeline: Sequence[Mapping[str, Any]], cut: Mapping[str, Any]) -> Figure:
    """Draw the training loss around a cut, and the loss on one batch right before and right after it.

    Args:
        timeline: a record's.
        cut: an entry of a history with a step.
    """
    step = cut["step"]
    figure, axes = _over_training([cut])
    points = close_up(timeline, step)
    axes.plot(*zip(*points, strict=True), color=BLUE, marker=".", label="training loss, as logged")
    before, after = _finite([cut.get("loss_before"), cut.get("loss_after")])
    if not math.isnan(before + after):
        axes.plot(
            step,
            before,
            "D",
            color=GREEN,
            markersize=9,
            fillstyle="none",
            label=f"one batch, right before: {before:.4f}",
        )
        axes.plot(step, after, "X", color=ORANGE, markersize=6, label=f"the same batch, right after: {after:.4f}")
    axes.set(ylabel="training loss", title=f"Loss around the cut at step {step:,}")
    _legend_below(axes)
    return figure


@_styled
def draw_step_time(timeline: Sequence[Mapping[str, Any]], cuts: Sequence[Mapping[str, Any]] = ()) -> Figure:
    """Draw how long a training step takes; arguments as in `draw_state_size`."""
    points = _points(timeline, "step_seconds")
    factor, unit = (1000, "ms") if max(seconds for _, seconds in points) < 10 else (1, "s")
    return _scaled_over_training(points, factor, cuts, f"{unit} per training step", "Time of a training step")


@_styled
def draw_memory(timeline: Sequence[Mapping[str, Any]], cuts: Sequence[Mapping[str, Any]] = ()) -> Figure:
    """Draw the memory; arguments as in `draw_state_size`."""
    points = _points(timeline, "memory_bytes")
    scale, unit = (2**30, "GiB") if max(size for _, size in points) >= 2**30 else (2**20, "MiB")
    return _scaled_over_training(points, 1 / scale, cuts, f"memory, {unit}", "Memory")


def _scaled_over_training(
    points: list[tuple[int, float]], factor: float, cuts: Sequence[Mapping[str, Any]], label: str, title: str
) -> Figure:
    """Values at training steps, in another unit."""
    figure, axes = _over_training(cuts)
    axes.plot([step for step, _ in points], [factor * value for _, value in points], color=BLUE)
    axes.set(ylabel=label, title=title, ylim=_from_zero(points, factor))
    _legend_below(axes)
    return figure


@_styled
def draw_criteria(criteria: Mapping[str, Sequence[float]], kept: int | None = None) -> Figure:
    """Draw the expected errors of several criteria side by side.

    Args:
        criteria: criterion → the expected relative error with 0, 1, …, N states kept, as in a record.
        kept: the number of states chosen.
    """
    from matplotlib import colormaps

    figure = _figure(HEIGHT + 0.6)
    axes = figure.subplots()
    curves = {name: _finite(curve) for name, curve in criteria.items()}
    floor = _floor([value for curve in curves.values() for value in curve], ERROR_FLOOR)
    colors = [BLUE, ORANGE, VIOLET, GREEN] if len(curves) <= 4 else colormaps["tab10"].colors
    for number, (name, curve) in enumerate(curves.items()):
        style = LINE_STYLES[number // len(colors) % len(LINE_STYLES)] if len(curves) > 4 else LINE_STYLES[number]
        color = colors[number % len(colors)]
        values = [max(value, floor / 10) for value in curve]
        axes.plot(range(len(values)), values, style, color=color, label=plain(name))
    if kept is not None:
        axes.axvline(kept, color="#808080", linestyle=(0, (2, 2)), label=f"kept: {kept} states")
    largest = max(len(curve) for curve in curves.values()) - 1
    axes.set(
        yscale="log",
        ylim=(floor, 1.5 * max([1.0, *(value for curve in curves.values() for value in curve if value > 0)])),
        xlim=(0, max(1, largest)),
        xlabel="states kept, r",
        ylabel="expected relative error",
        title="What each criterion would cost",
    )
    _legend_below(axes)
    return figure


@_styled
def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a picture, on white, whole or not at all; the file's ending chooses the format (PNG if it has none)."""
    path, buffer = Path(path), io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower() or "png", dpi=200, facecolor="white")
    write_file(path, buffer.getvalue())
    return path


@_styled
def figure_svg(figure: Figure) -> str:
    """A picture as an `<svg>` element with a transparent ground, for a page; its text is text, escaped."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    # Groups are numbered, alike in each picture, but a page may have an id only once.
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])


@_styled
def figure_pixels(figure: Figure) -> np.ndarray:
    """A picture on white, shape (height, width, 3), uint8."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set(facecolor="white", dpi=150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def close_up(timeline: Sequence[Mapping[str, Any]], step: int) -> list[tuple[int, float]]:
    """Step and loss of the entries of a timeline that are near a step, in order."""
    points = _points(timeline, "loss")
    if not points:
        return []
    reach = CLOSE_UP * (points[-1][0] - points[0][0])
    before = [point for point in points if point[0] <= step]
    after = [point for point in points if point[0] > step]
    near = [max(CLOSE_UP_ENTRIES, sum(abs(point[0] - step) <= reach for point in side)) for side in (before, after)]
    return before[-near[0] :] + after[: near[1]]


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without what they all have in common.

    Example:
        >>> short_names(["backbone.layers.0.mixer", "backbone.layers.11.mixer"])
        ['layer 0', 'layer 11']
        >>> short_names(["encoder.mixer"])
        ['encoder.mixer']
    """
    if len(set(names)) < 2:
        return list(names)
    parts = [name.split(".") for name in names]
    front = _shared(parts)
    back = _shared([part[front:][::-1] for part in parts])
    short = [".".join(part[front : len(part) - back]) for part in parts]
    return [f"layer {name}" if name.isdecimal() else name or full for name, full in zip(short, names, strict=True)]


def _shared(rows: Sequence[Sequence[str]]) -> int:
    """How many items all rows have in common at their start."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*rows, strict=False)))


def plain(text: str) -> str:
    """Text in which matplotlib sees no formula, which a legend does not leave out, and for which it has room."""
    text = text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _layer_colors() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("layers", LAYER_COLORS)


def _over_training(cuts: Sequence[Mapping[str, Any]]) -> tuple[Figure, Axes]:
    """Axes over the training steps, with the cuts marked."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(HEIGHT)
    axes = figure.subplots()
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda step, position: f"{step:,.0f}")
    marked = [cut for cut in cuts if cut.get("step") is not None and cut.get("layers")]
    for cut in marked:
        stays = cut["status"] == "cut"
        before, after = _largest_sizes(cut)
        label = f"{'cut' if stays else cut['status']}: N {before} → {after}"
        if len(marked) > 3:
            label = "cuts" if stays else "cuts that did not stay"
        axes.axvline(cut["step"], color=ORANGE, linestyle="--" if stays else ":", linewidth=1.2, label=plain(label))
    return figure, axes


def _largest_sizes(cut: Mapping[str, Any]) -> tuple[int, int]:
    """The largest state size of any layer, before a cut and after it."""
    before, after = (max(layer[f"state_size_{when}"] for layer in cut["layers"]) for when in ("before", "after"))
    return before, after


def _from_zero(points: Sequence[tuple[int, float]], factor: float = 1) -> tuple[float, float]:
    """Limits of an axis on which lengths may be compared."""
    return 0, 1.08 * factor * max(1e-12, *(value for _, value in points))


def _legend_below(axes: Axes) -> None:
    """A legend under the axes hides no data."""
    from matplotlib.transforms import ScaledTranslation

    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    by_label = dict(zip(labels, handles, strict=True))
    labels = list(by_label)
    longest = max(map(len, labels))
    columns = 1 if longest > 26 or len(labels) < 3 else 2 if longest > 10 else 3
    # A distance in points leaves room for the axis's own label, however high the axes are.
    below = axes.transAxes + ScaledTranslation(0, -38 / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        by_label.values(),
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=below,
        ncols=columns,
        borderaxespad=0,
    )


def _points(timeline: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Step and value of the entries that have a finite one."""
    values = zip(timeline, _finite([entry.get(name) for entry in timeline]), strict=True)
    return [(entry["step"], value) for entry, value in values if not math.isnan(value)]


def _finite(values: Sequence[Any]) -> list[float]:
    """Numbers, with NaN for all that is none: a gap in a curve."""
    numbers = [float(value) if isinstance(value, (int, float)) else math.nan for value in values]
    return [value if math.isfinite(value) else math.nan for value in numbers]


def _floor(values: Sequence[float], least: float) -> float:
    """The lower end of a logarithmic axis."""
    return max(least, min((value for value in values if value > 0), default=least) / 2)
