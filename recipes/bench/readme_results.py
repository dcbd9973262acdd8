"""The README's tables of results, made from the files in results/; `make readme-tables` puts them there."""

from __future__ import annotations

import json
from typing import Any

from reporting import RESULTS
from study_tables import CHOSEN, REFERENCES, Columns, between, longer_table, percent, pm, table

# Moments of the cuts whose damage the README shows.
MOMENTS = (0.05, 0.2, 0.5, 1.0)
AGAINST = ("small", "small, equal time", "small projected")


CLAIM_1: Columns = {
    "": lambda row: f"{row['architecture']}, {row['realization']}",
    "whole run: full size / cut": lambda row: f"{row['run_ratio']:.2f}",
    "a step: before / after": lambda row: f"{row['step_ratio']:.2f}",
}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def results_text(study: dict[str, Any] | None = None, speed: dict[str, Any] | None = None) -> str:
    """Claims 1 to 3 and recall, as four tables."""
    study, speed = study or read("study-cpu.json"), speed or read("speed-cpu.json")
    work = study["work"]
    counts = {len(seeds) for seeds in study["seeds"].values()}
    seeds = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    parts = []
    if speed.get("runs"):
        parts += [
            "**1. Is training faster?** Whole runs of "
            f"{speed['runs'][0]['steps']} steps, N {speed['runs'][0]['state_size']} at a fifth, the cut included "
            "([speed-cpu.md](recipes/bench/results/speed-cpu.md)):",
            table(speed["runs"], CLAIM_1),
        ]
    parts += [
        f"**2. Is a model that was cut better than one trained small?** Final loss, N {work['state_size']} → "
        f"{work['kept']} at a fifth of {work['steps']} steps; {seeds} seeds, paired; 95 % intervals "
        "([study-cpu.md](recipes/bench/results/study-cpu.md)):",
        table(claim_2_rows(study), claim_2_columns()),
        "**3. What does a cut cost, before any training after it?** Mean KL from the uncut model over all tasks and "
        "seeds, as a share of that of the two published selections at the same r:",
        table(claim_3_rows(study), claim_3_columns()),
    ]
    if study["longer"]:
        parts += [
            "**Recall beyond the trained length.** Accuracy with as many pairs to remember as in training, and with "
            "two and four times as many:",
            longer_table([row for row in study["longer"] if row["task"] == "recall"]),
        ]
    return "\n\n".join(parts)


def claim_2_rows(study: dict[str, Any]) -> list[dict[str, Any]]:
    losses = {(row["layout"], row["task"], row["arm"]): row["loss"] for row in study["arms"]}
    found = {(row["layout"], row["task"], row["arm"], row["against"]): row for row in study["claim 2"]}
    return [
        {
            "place": f"{layout}, {task}",
            "losses": {arm: losses.get((layout, task, arm)) for arm in ("full", CHOSEN, *AGAINST)},
            "claims": {other: found.get((layout, task, CHOSEN, other)) for other in AGAINST},
        }
        for layout, task in dict.fromkeys((row["layout"], row["task"]) for row in study["arms"])
    ]


def claim_2_columns() -> Columns:
    def difference(row: dict[str, Any], other: str) -> str:
        claim = row["claims"][other]
        return "–" if claim is None else f"{between(claim['loss'])}: {claim['verdict']}"

    columns: Columns = {"": lambda row: row["place"]}
    for arm in ("full", CHOSEN, "small"):
        columns[arm] = lambda row, arm=arm: pm(row["losses"][arm])
    for other in AGAINST:
        columns[f"{CHOSEN} − {other}"] = lambda row, other=other: difference(row, other)
    return columns


def claim_3_rows(study: dict[str, Any]) -> list[dict[str, Any]]:
    """Shares by moment: for each layout and reference, and for each task alone against the first reference."""
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, moment: float, share: float) -> None:
        rows.setdefault(name, {"name": name, "shares": {}})["shares"][moment] = share

    first = next(iter(REFERENCES))
    for claim in study["claim 3"]:
        name = f"{claim['layout']}, of {REFERENCES[claim['against']]}'s"
        add(name, claim["moment"], claim["share"])
        if claim["against"] == first and len(claim["by task"]) > 1:
            for task, share in claim["by task"].items():
                add(f"{name}, {task} alone", claim["moment"], share)
    return sorted(rows.values(), key=lambda row: (row["name"].split(",")[0], "alone" in row["name"]))


def claim_3_columns() -> Columns:
    columns: Columns = {"": lambda row: row["name"]}
    for moment in MOMENTS:
        name = "a finished model" if moment == 1 else f"cut at {percent(moment, 0)}"
        columns[name] = lambda row, moment=moment: percent(row["shares"][moment])
    return columns
