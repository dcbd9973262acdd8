"""How much the knobs of the fits matter: calibration tokens, rounds, steps, penalty, channels.

    python recipes/bench/fitting.py                   # twenty minutes on two cores
    python recipes/bench/fitting.py --quick           # a minute, to try it out

Models are trained in full as in study.py, on the same tasks, and copies of each are cut once, when training is over:
by the defaults, and with one knob turned at a time. Shown is the KL from the uncut model on held-out sequences, and
the seconds that planning took on one thread. Seeds differ from those of the study: what is set by these results is
judged by others.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from reporting import RESULTS, write_results
from speed import describe_machine
from study import LAYOUTS, WORKS, Cell, Job, Work, answer, cosine, run_jobs, score, start, train
from study_tables import table

import hf_compressm.drive
from hf_compressm import CompreSSMConfig, compress_, measure, plan_compression

TASKS = ("recall", "text", "digits")
SEEDS = (50, 51)
TOKENS = (512, 1024, 2048, 8192, 16384)
# Knob → the values that it is turned to, beside the defaults'.
KNOBS = {
    "mamba": {
        "refit_rounds": (0, 1, 3, 5),
        "refit_steps": (3, 5, 20),
        "refit_penalty": (1e-4, 1e-2, 1e-1),
        "channels of the fits": (16, 32),
    },
    "mamba2": {"projection_rounds": (0, 1, 6)},
}


def ways(layout: str, work: Work) -> Iterator[tuple[str, Any, CompreSSMConfig, int]]:
    """Knob, value, config, and calibration tokens."""
    default = CompreSSMConfig(state_size=work.kept)
    yield "defaults", "", default, work.calibration_tokens
    for tokens in TOKENS:
        yield "calibration tokens", tokens, default, tokens
    for knob, values in KNOBS[layout].items():
        for value in values:
            config = replace(default, **{knob: value}) if hasattr(default, knob) else default
            yield knob, value, config, work.calibration_tokens


def run_cell(job: Job) -> list[dict[str, Any]]:
    """Train one model, and cut copies of it in every way."""
    layout, task, seed, work = job
    cell = Cell(layout, task, seed, work)
    run = start(cell, work.state_size)
    train(cell, run, work.steps, cosine(work, work.steps))
    uncut = answer(run.model, cell.evaluation)
    rows, measured = [], {}
    for knob, value, config, tokens in ways(layout, work):
        if tokens not in measured:
            calibrated = Cell(layout, task, seed, replace(work, calibration_tokens=tokens))
            measured[tokens] = measure(run.model, calibrated.calibration(run.step))
        channels = value if knob == "channels of the fits" else hf_compressm.drive.FITTED_CHANNELS
        smaller = copy.deepcopy(run.model)
        started = time.process_time()
        with patch.object(hf_compressm.drive, "FITTED_CHANNELS", channels):
            plan = plan_compression(smaller, measured[tokens], config)
        seconds = time.process_time() - started
        compress_(smaller, plan)
        row = {"layout": layout, "task": task, "seed": seed, "knob": knob, "value": value, "seconds": seconds}
        rows.append(row | score(answer(smaller, cell.evaluation), uncut))
    return rows


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each layout, knob and value: by task the mean KL, and over all the geometric mean of its ratios.

    A ratio is the KL over that of the defaults on the same model.
    """
    defaults = {(r["layout"], r["task"], r["seed"]): r["kl"] for r in rows if r["knob"] == "defaults"}
    result = []
    for layout, knob, value in dict.fromkeys((r["layout"], r["knob"], r["value"]) for r in rows):
        own = [r for r in rows if (r["layout"], r["knob"], r["value"]) == (layout, knob, value)]
        ratios = [r["kl"] / defaults[r["layout"], r["task"], r["seed"]] for r in own]
        tasks = dict.fromkeys(r["task"] for r in own)
        row = {"layout": layout, "knob": knob, "value": value, "models": len(own)}
        row["kl"] = {task: statistics.fmean(r["kl"] for r in own if r["task"] == task) for task in tasks}
        row["ratio"] = math.exp(statistics.fmean(math.log(max(ratio, 1e-12)) for ratio in ratios))
        row["smallest"], row["largest"] = min(ratios), max(ratios)
        result.append(row | {"seconds": statistics.fmean(r["seconds"] for r in own)})
    return result


def markdown(results: dict[str, Any]) -> str:
    """The results as one table for each layout."""
    work, machine = results["work"], results["machine"]
    parts = [
        "# The knobs of the fits",
        f"Models of study.py ({work['layers']} layers of width {work['hidden_size']}, N {work['state_size']} → "
        f"{work['kept']}, {work['steps']} steps), cut once, when training is over; seeds "
        f"{', '.join(map(str, results['seeds']))}. KL from the uncut model in nats per asked token, mean over seeds; "
        "against the defaults: geometric mean over models of the KL's ratio (smallest to largest). Planning seconds "
        f"on one thread. {machine['device']}, torch {machine['versions']['torch']}, transformers "
        f"{machine['versions']['transformers']}, {machine['date']}.",
    ]
    for layout in dict.fromkeys(row["layout"] for row in results["summary"]):
        rows = [row for row in results["summary"] if row["layout"] == layout]
        columns: dict[str, Any] = {"knob": lambda row: row["knob"], "value": lambda row: row["value"]}
        for task in rows[0]["kl"]:
            columns[task] = lambda row, task=task: f"{row['kl'][task]:.2g}"
        columns["against the defaults"] = lambda row: (
            f"{row['ratio']:.2f} ({row['smallest']:.2f} to {row['largest']:.2f})"
        )
        columns["seconds"] = lambda row: f"{row['seconds']:.2f}"
        parts += [f"## {layout}", table(rows, columns)]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed of one task and few steps, to try it out")
    parser.add_argument("--processes", type=int, default=2, help="models at a time, each on one thread")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    arguments = parser.parse_args(argv)
    name = "quick" if arguments.quick else "cpu"
    work, seeds, tasks = WORKS[name], SEEDS, TASKS
    if arguments.quick:
        seeds, tasks = SEEDS[:1], TASKS[:1]
    jobs = [(layout, task, seed, work) for seed in seeds for task in tasks for layout in LAYOUTS]
    rows = []
    for cell in run_jobs(run_cell, jobs, arguments.processes):
        rows += cell
        first = cell[0]
        print(f"{first['layout']}, {first['task']}, seed {first['seed']}: done", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (LAYOUTS.index(row["layout"]), row["seed"], TASKS.index(row["task"])))
    results = {"machine": describe_machine("cpu"), "work": vars(work), "seeds": list(seeds)}
    results |= {"summary": summarize(rows), "rows": rows}
    write_results(arguments.output, f"fitting-{name}", results, markdown(results))


if __name__ == "__main__":
    main()
