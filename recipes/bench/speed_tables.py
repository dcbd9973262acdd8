"""The speed benchmark's goals, judged, and its results as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from workloads import format_spread

# The goals are for this cut; on other machines and sizes the numbers stand as they are.
HEADLINE = "128 → 12"


def judge(results: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Compare results with the goals that were set for them.

    Args:
        results: what the benchmark measured; parts may be missing.
        device: `cpu` or `cuda`; goals for training time are set for the CPU only.

    Returns:
        For each goal that these results can be held against: `goal`, `wanted` (a range as words), `value`, `met`.

    Example:
        >>> rows = [{"architecture": "mamba", "state_size": "128 → 12", "ratio": {"median": 1.05}}]
        >>> [(goal["wanted"], goal["value"], goal["met"]) for goal in judge({"born_small": rows}, "cpu")]
        [('0.97 to 1.03', 1.05, False)]
    """
    goals = []
    for row in results.get("runs", []):
        if row["architecture"] == "mamba" and row["state_size"] == HEADLINE and device == "cpu":
            what = f"mamba, N {HEADLINE} at a fifth of {row['steps']} steps"
            goals.append(_goal(f"{what}: whole run, full size / cut", row["run_ratio"], at_least=2.8))
            goals.append(_goal(f"{what}: step, before / after", row["step_ratio"], at_least=5))
    for row in results.get("born_small", []):
        what = f"{row['architecture']}, N {row['state_size']}: step, cut / born at that size"
        goals.append(_goal(what, row["ratio"]["median"], at_least=0.97, at_most=1.03))
    for row in results.get("large", []):
        what = f"{row['architecture']}, {row['parameters'] / 1e6:.3g}M parameters, N {row['state_size']}: one cut"
        goals.append(_goal(f"{what}, in training steps", row["steps"], at_most=3))
        goals.append(_goal(f"{what}, memory / a step's", row["cut_mib"] / row["step_mib"], at_most=1))
    return goals


def _goal(what: str, value: float, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    if at_least is not None and at_most is not None:
        wanted = f"{at_least} to {at_most}"
    else:
        wanted = f"at least {at_least}" if at_most is None else f"at most {at_most}"
    met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {"goal": what, "wanted": wanted, "value": value, "met": met}


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    header = list(header)
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]


def heading(results: dict[str, Any]) -> list[str]:
    """What was measured on, and the goals."""
    machine, work = results["machine"], results["workload"]
    lines = [
        f"# Speed on {machine['device']}",
        "",
        f"{machine['threads']} threads, torch {machine['versions']['torch']}, transformers "
        f"{machine['versions']['transformers']}, {machine['date']}. Hidden size {work['hidden_size']}, "
        f"{work['layers']} layers, {work['batch']} sequences of {work['length']} tokens. "
        "Median (smallest to largest).",
        "",
    ]
    lines += [f"{kind} computes with: {kernels}.  " for kind, kernels in results["kernels"].items()]
    lines += ["", "## Goals", ""]
    if not results["goals"]:
        return [*lines, "None is set for this machine and these sizes.", ""]
    rows = [(g["goal"], g["wanted"], f"{g['value']:.2f}", "yes" if g["met"] else "**no**") for g in results["goals"]]
    return [*lines, *table(("goal", "wanted", "measured", "met"), rows), ""]


def markdown(results: dict[str, Any]) -> str:
    """All results but those of the large model, as tables."""
    work = results["workload"]
    lines = [
        *heading(results),
        "## (a) Training step against N",
        "",
        *table(
            ("architecture", "N", "ms per step"),
            ((row["architecture"], row["state_size"], format_spread(row["step_ms"], 1)) for row in results["steps"]),
        ),
        "",
        "## (b) After a cut, against a model born at that size",
        "",
        *table(
            ("architecture", "N", "cut, ms", "born, ms", "ratio"),
            (
                (
                    row["architecture"],
                    row["state_size"],
                    f"{row['cut_ms']['median']:.1f}",
                    f"{row['born_ms']['median']:.1f}",
                    format_spread(row["ratio"], 3),
                )
                for row in results["born_small"]
            ),
        ),
        "",
        *cut_table("## (c) What one cut costs", results["cuts"]),
        "",
        *cut_memory_table("## (d) Peak memory above the model, MiB", results["memory"]),
        "",
        "## (e) Mamba-2, by realization",
        "",
        *table(
            ("realization", "N", "parameters", "ms per training step", "ms per decoded token of each sequence"),
            (
                (
                    row["realization"],
                    row["state_size"],
                    f"{row['parameters']:,}",
                    format_spread(row["step_ms"], 1),
                    format_spread(row["token_ms"], 2),
                )
                for row in results["realizations"]
            ),
        ),
        "",
        f"## (f) A whole run of {work['run_steps']} steps, cut at a fifth, against one at full size",
        "",
        "Both run from end to end, in turns; the cut's own time is in its run's seconds.",
        "",
        *table(
            (
                "architecture",
                "smaller model",
                "N",
                "full size, s",
                "cut, s",
                "of it the cut itself, s",
                "whole run, full / cut",
                "step, before / after",
            ),
            (
                (
                    row["architecture"],
                    row["realization"],
                    row["state_size"],
                    f"{row['full_s']:.1f}",
                    f"{row['cut_run_s']:.1f}",
                    f"{row['cut_s']:.2f}",
                    f"{row['run_ratio']:.2f}",
                    f"{row['step_ratio']:.2f}",
                )
                for row in results["runs"]
            ),
        ),
        "",
        "## (g) The limit: a step without states",
        "",
        "With N = 1, what is left is the time that does not depend on N. Of what a cut could save at most, going down "
        "to N saves the share given.",
        "",
        *table(
            ("architecture", "N", "ms per step", "ms with N = 1", "speed-up", "at most", "share of the possible gain"),
            (
                (
                    row["architecture"],
                    f"{row['largest']} → {row['state_size']}",
                    f"{row['step_ms']:.1f}",
                    f"{row['limit_ms']:.1f}",
                    f"{row['speed_up']:.2f}",
                    f"{row['largest_speed_up']:.2f}",
                    f"{row['share']:.0%}",
                )
                for row in results["limit"]
            ),
        ),
        "",
        "## (h) Decoding against N",
        "",
        f"Greedy generation with a cache, batches of 1 and of {work['batch']} sequences with a prompt of 8 tokens, "
        f"and one sequence with a prompt of {work['prompt']:,}. State bytes are what the cache holds.",
        "",
        *table(
            (
                "architecture",
                "model",
                "N",
                "state bytes per sequence",
                "ms per token, 1 sequence",
                f"tokens/s, {work['batch']} sequences",
                "long prompt, ms",
                "ms per token after it",
            ),
            (
                (
                    row["architecture"],
                    row["realization"],
                    row["state_size"],
                    f"{row['state_bytes']:,}",
                    format_spread(row["one"]["token_ms"], 2),
                    f"{row['batch']['tokens_per_second']:,.0f}",
                    format_spread(row["long"]["prefill_ms"], 0),
                    format_spread(row["long"]["token_ms"], 2),
                )
                for row in results["decoding"]
            ),
        ),
        "",
        "## (i) Peak memory of a training step above the model, MiB",
        "",
        *table(
            ("architecture", "smaller model", "N", "before the cut", "after it"),
            (
                (
                    row["architecture"],
                    row["realization"],
                    row["state_size"],
                    f"{row['before_mib']:.0f}",
                    f"{row['after_mib']:.0f}",
                )
                for row in results["training_memory"]
            ),
        ),
    ]
    return "\n".join(lines) + "\n"


def large_markdown(results: dict[str, Any]) -> str:
    """What one cut of the large model costs, as tables."""
    lines = [
        *heading(results),
        *cut_table("## (j) What one cut costs", results["large"]),
        "",
        *cut_memory_table("## Peak memory above the model, MiB", results["large"]),
    ]
    return "\n".join(lines) + "\n"


def cut_table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    parts = ("measure", "plan", "check", "apply")
    return [
        title,
        "",
        *table(
            ("architecture", "N", "tokens", "step, ms", *(f"{part}, ms" for part in parts), "in steps"),
            (
                (
                    row["architecture"],
                    row["state_size"],
                    f"{row['tokens']:,}",
                    f"{row['step_ms']:.0f}",
                    *(f"{row['parts_ms'][part]:.0f}" for part in parts),
                    f"{row['steps']:.2f}",
                )
                for row in rows
            ),
        ),
    ]


def cut_memory_table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    cells = (
        (row["architecture"], row["state_size"], f"{row['step_mib']:.0f}", f"{row['cut_mib']:.0f}") for row in rows
    )
    return [title, "", *table(("architecture", "N", "training step", "cut"), cells)]
