"""Pictures of a cut. Needs matplotlib (the `recipes` extra)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot_error_curves(cut: Mapping[str, Any], path: str | Path) -> None:
    """Draw each layer's expected error against the number of states kept, with the number chosen and its real error.

    Args:
        cut: an entry of a history (of a Compressor, a callback or `compressm.json`) with status `cut`.
        path: the picture's file; its ending chooses the format.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    layers = cut["layers"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["viridis"].resampled(max(2, len(layers) + 1))
    floor = min(value for layer in layers for value in layer["error_curve"] if value > 0) / 2
    for number, layer in enumerate(layers):
        curve = [max(value, floor) for value in layer["error_curve"][:-1]]
        axes.plot(range(len(curve)), curve, color=colors(number), label=layer["name"])
        measured = "measured" if number == len(layers) - 1 else None
        axes.plot(
            layer["state_size_after"], max(layer["relative_error"], floor), "x", color=colors(number), label=measured
        )
    before, after = layers[0]["state_size_before"], layers[0]["state_size_after"]
    when = "" if cut["step"] is None else f" (step {cut['step']})"
    axes.axvline(after, color="gray", linestyle=":", label=f"kept: {after} of {before}")
    axes.set(
        yscale="log",
        xlabel="states kept, r",
        ylabel="expected relative output error ε(r)",
        title=f"How many states each layer needs{when}",
    )
    if len(layers) <= 12:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
