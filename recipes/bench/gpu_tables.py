"""The GPU benchmark's results as Markdown tables."""

from __future__ import annotations

import itertools
from typing import Any

from speed_tables import table
from workloads import format_spread

GIB = 2**30


def markdown(results: dict[str, Any]) -> str:
    """All parts that were measured; those that were not are named."""
    machine, bench = results["machine"], results["bench"]
    versions = {name: version for name, version in machine["versions"].items() if version is not None}
    lines = [
        f"# State size on {machine['device']}",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + f", Python {machine['python']}, {machine['date']}. "
        + ("Mixed precision with bfloat16." if bench["training"]["bf16"] else "float32."),
        "",
    ]
    for kind, kernels in results["kernels"].items():
        lines.append(f"- {kind} computes with: {', '.join(f'{part} {package}' for part, package in kernels.items())}")
    lines += [f"- {note}" for note in results["notes"]]
    lines += [f"- the process that measured {part} failed" for part in results.get("failed", [])]
    sections = {"training": training, "cut": cuts, "decoding": decoding, "language": language}
    for part, section in sections.items():
        lines += ["", *(section(results[part], bench) if part in results else [f"{part} was not measured."])]
    return "\n".join(lines) + "\n"


def training(rows: list[dict[str, Any]], bench: dict[str, Any]) -> list[str]:
    work = bench["training"]
    sizes = work["sizes"]
    lines = [
        "## Training: tokens per second against N",
        "",
        f"{work['layers']} layers, {work['batch']} sequences of {work['length']} tokens. In brackets: times as fast "
        f"as at N = {sizes[0]}; peak memory, GiB.",
        "",
    ]
    cells = []
    for key, group in itertools.groupby(
        rows, lambda row: (row["architecture"], row.get("hidden_size", "–"), row.get("compiled"))
    ):
        group = list(group)
        by_size = {row.get("state_size"): row for row in group}
        full = by_size.get(sizes[0], {}).get("tokens_per_second")
        values = [_speed(by_size[size], full) if size in by_size else "–" for size in sizes]
        cells.append((key[0], key[1], "yes" if key[2] else "no", *values))
    return [
        *lines,
        *table(("architecture", "width", "compiled", *(f"N = {size}" for size in sizes)), cells),
        *_errors(rows),
    ]


def _speed(row: dict[str, Any], full: float | None) -> str:
    if "error" in row:
        return "error"
    notes = [] if full is None else [f"{row['tokens_per_second'] / full:.2f}×"]
    notes += [] if row["peak_bytes"] is None else [f"{row['peak_bytes'] / GIB:.1f}"]
    return f"{row['tokens_per_second']:,.0f}" + (f" ({'; '.join(notes)})" if notes else "")


def cuts(rows: list[dict[str, Any]], bench: dict[str, Any]) -> list[str]:
    work, parts = bench["large"], ("measure", "plan", "check", "apply")
    lines = [
        "## What one cut costs",
        "",
        f"Hidden size {work['hidden_size']}, {work['layers']} layers, {work['batch']} sequences of {work['length']} "
        "tokens. Peaks are of a training step, and of the steps before the cut together with it.",
        "",
    ]
    header = ["architecture", "smaller model", "N", "parameters", "step, ms", *(f"{part}, ms" for part in parts)]
    header += ["in steps", "step after, ms", "peak of a step, GiB", "with the cut, GiB"]
    cells = (
        (
            row["architecture"],
            row["realization"],
            row["state_size"],
            f"{row['parameters']:,}",
            f"{row['step_ms']:.1f}",
            *(f"{row['parts_ms'][part]:.0f}" for part in parts),
            f"{row['steps']:.1f}",
            format_spread(row["after_ms"], 1),
            _gib(row["step_peak_bytes"]),
            _gib(row["cut_peak_bytes"]),
        )
        for row in rows
        if "error" not in row
    )
    return [*lines, *table(header, cells), *_errors(rows)]


def decoding(rows: list[dict[str, Any]], bench: dict[str, Any]) -> list[str]:
    work = bench["large"]
    lines = [
        "## Decoding",
        "",
        f"Hidden size {work['hidden_size']}, {work['layers']} layers, random weights; greedy generation with a cache "
        "after a prompt of 8 tokens. The largest batch is the last of those tried that ran.",
        "",
    ]
    header = ["architecture", "model", "N", "weights", "state bytes per sequence", "ms per token, 1 sequence"]
    header += ["most tokens/s", "at batch", "its memory, GiB", "largest batch", "tokens/s there", "ended by"]
    cells = []
    measured = [row for row in rows if "state_size" in row]
    for key, group in itertools.groupby(
        measured, lambda row: (row["architecture"], row["realization"], row["state_size"])
    ):
        group = list(group)
        good = [row for row in group if "error" not in row]
        if not good:
            continue
        best, last = max(good, key=lambda row: row["tokens_per_second"]), good[-1]
        ended = "" if group[-1] is last else group[-1]["error"]
        cells.append(
            (
                *key,
                best["weights"],
                f"{best['state_bytes']:,}",
                f"{good[0]['token_ms']['median']:.2f}",
                f"{best['tokens_per_second']:,.0f}",
                best["batch"],
                _gib(best["peak_bytes"]),
                last["batch"],
                f"{last['tokens_per_second']:,.0f}",
                ended,
            )
        )
    expected = [row for row in rows if row.get("error") != "out of memory"]
    return [*lines, *table(header, cells), *_errors(expected)]


def language(rows: list[dict[str, Any]], bench: dict[str, Any]) -> list[str]:
    work = bench["language"]
    lines = [
        "## Language models",
        "",
        f"Bytes of Python's standard library, {bench['steps']} steps of {work['batch']} × {work['length']}, hidden "
        f"size {work['hidden_size']}, {work['layers']} layers; one seed. Loss on held-out files, in nats per byte. "
        "The last column is the loss of the full-size model after as many seconds as the row's whole run took, but in "
        "the middle of its own learning-rate schedule.",
        "",
    ]
    full = {row["architecture"]: row for row in rows if row.get("arm") == "full size" and "error" not in row}
    cells = []
    for row in rows:
        if "error" in row:
            continue
        other = full.get(row["architecture"])
        ratio = "–" if other is None else f"{other['seconds'] / row['seconds']:.2f}"
        then = None if other in (None, row) else loss_at(other["curve"], row["seconds"])
        cells.append(
            (
                row["architecture"],
                row["arm"],
                row["state_size"],
                f"{row['parameters']:,}",
                f"{row['seconds']:.1f}",
                f"{row['cut_seconds']:.2f}" if row["cut_seconds"] else "–",
                ratio,
                f"{row['tokens_per_second']:,.0f}",
                f"{row['final_tokens_per_second']:,.0f}",
                f"{row['loss']:.4f}",
                "–" if then is None else f"{then:.4f}",
            )
        )
    header = ["architecture", "arm", "N", "parameters at the start", "seconds", "of it the cut", "full / this"]
    header += ["tokens/s", "tokens/s, second half", "loss", "full size, equal time"]
    return [*lines, *table(header, cells), *_errors(rows)]


def loss_at(curve: list[dict[str, float]], seconds: float) -> float | None:
    """The loss of a run at a time, between two evaluations in proportion; None where it was not yet evaluated.

    >>> curve = [{"seconds": 10, "loss": 3.0}, {"seconds": 20, "loss": 2.0}]
    >>> loss_at(curve, 15), loss_at(curve, 30), loss_at(curve, 5)
    (2.5, 2.0, None)
    """
    if seconds < curve[0]["seconds"]:
        return None
    for left, right in itertools.pairwise(curve):
        if seconds <= right["seconds"]:
            share = (seconds - left["seconds"]) / (right["seconds"] - left["seconds"])
            return left["loss"] + share * (right["loss"] - left["loss"])
    return curve[-1]["loss"]


def _gib(value: int | None) -> str:
    return "–" if value is None else f"{value / GIB:.1f}"


def _errors(rows: list[dict[str, Any]]) -> list[str]:
    """The rows that failed, as a list: what they are, and their error."""
    lines = [
        f"- {', '.join(f'{key} {value}' for key, value in row.items() if key != 'error')}: {row['error']}"
        for row in rows
        if "error" in row
    ]
    return ["", "Failed:", "", *lines] if lines else []
