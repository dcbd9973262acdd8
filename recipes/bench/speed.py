"""How fast a training step is against N, and what a cut costs: time, in training steps, and memory.

    python recipes/bench/speed.py                    # ten minutes; writes speed-cpu.json and .md to results/
    python recipes/bench/speed.py --quick            # about a minute, to try it out
    python recipes/bench/speed.py --large            # one cut of 24 layers, 768 wide: 20 minutes, 23 GB of memory
    python recipes/bench/speed.py --device cuda      # wider and longer; Mamba's CUDA kernels if they are installed

Measured on stock Transformers models with random weights and random data: (a) milliseconds per training step against
N; (b) the step of a cut model against one born at that size, in turns, as a ratio; (c) one cut, split into its parts,
in training steps of the same batch; (d) the peak memory of a cut against that of a training step; (e) training step
and decoding of Mamba-2 uncut, cut to a stock model, and projected; (f) a whole run with a cut against one without;
(g) what is left of a step without states, and so how much a cut could save at most; (h) decoding and long prompts
against N; (i) the peak memory of a training step before and after a cut; and, with --large, (j) what a cut of a
model of 24 layers, 768 wide, costs (130M parameters, but for a smaller vocabulary). Medians with the smallest and
largest value; nothing here is a test, but goals are judged. On a CPU set glibc's malloc to keep memory (`make bench`
does): page faults dominate otherwise. The environment is written down with the results. `make bench-gpu` measures more
on a GPU (gpu.py).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from decoding import generation_ms, state_bytes, time_decoding
from peak_memory import cut_against_step, step_after_cut
from reporting import RESULTS, write_results
from scan_kernels import choose_kernels, describe_kernels
from speed_tables import judge, large_markdown, markdown
from transformers.utils import logging as transformers_logging
from workloads import WORKLOADS, Training, Workload, describe_machine, in_turns, random_batches, spread

from hf_compressm import CompreSSMConfig, Compressor, compress

ARCHITECTURES = ("mamba", "mamba2")
# What a model of each architecture can be cut to.
REALIZATIONS = {"mamba": ("stock",), "mamba2": ("stock", "projected")}
# A whole run's two sides take turns so often.
TURNS = 10


def time_steps(architecture: str, work: Workload, device: str) -> list[dict[str, Any]]:
    """(a) Milliseconds per step against N; the last row is N = 1, for (g)."""
    sizes = (*work.sizes, 1)
    trainings = [Training(architecture, size, work, device) for size in sizes]
    columns = in_turns(work.rounds, *(training.step for training in trainings))
    return [
        {"architecture": architecture, "state_size": size, "step_ms": spread(column)}
        for size, column in zip(sizes, columns, strict=True)
    ]


def compare_with_limit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """(g) Amdahl's law: what share of the time that depends on N a smaller N saves.

    Args:
        rows: one architecture's step times, the largest N first and N = 1 last.
    """
    step_ms = [row["step_ms"]["median"] for row in rows]
    full, limit = step_ms[0], step_ms[-1]
    return [
        {
            "architecture": row["architecture"],
            "largest": rows[0]["state_size"],
            "state_size": row["state_size"],
            "step_ms": value,
            "limit_ms": limit,
            "speed_up": full / value,
            "largest_speed_up": full / limit,
            "share": (full - value) / (full - limit),
        }
        for row, value in zip(rows[1:-1], step_ms[1:-1], strict=True)
    ]


def compare_with_born_small(architecture: str, work: Workload, device: str) -> list[dict[str, Any]]:
    """(b) Step time after a cut / step time of a model born at that size."""
    results = []
    for before, after in work.cuts:
        cut, born = Training(architecture, before, work, device), Training(architecture, after, work, device)
        cut.step()
        compress(cut.model, [cut.batch], CompreSSMConfig(state_size=after, realization="stock"), cut.optimizer)
        ours, theirs = in_turns(4 * work.rounds, cut.step, born.step)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        results.append(
            {
                "architecture": architecture,
                "state_size": f"{before} → {after}",
                "cut_ms": spread(ours),
                "born_ms": spread(theirs),
                "ratio": spread(ratios),
            }
        )
    return results


def time_cuts(architecture: str, work: Workload, device: str) -> list[dict[str, Any]]:
    """(c) One cut, split into its parts, in training steps of the same batch."""
    results = []
    for before, after in work.cuts:
        original = Training(architecture, before, work, device)
        cuts = []
        for _ in range(max(1, work.rounds // 3) + 1):
            training = copy.deepcopy(original)
            # AdamW must hold the copy's parameters.
            training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-4)
            cuts.append(cut_once(training, CompreSSMConfig(state_size=after, schedule=[999])))
        # The first round warms up.
        parts = {part: statistics.median(cut["parts_ms"][part] for cut in cuts[1:]) for part in cuts[0]["parts_ms"]}
        step_ms = [value for cut in cuts for value in cut["step_ms"]]
        results.append(cut_row(architecture, before, after, cuts[0]["tokens"], step_ms[len(step_ms) // 4 :], parts))
    return results


def time_large_cut(name: str, device: str) -> dict[str, Any]:
    """(j) One cut of a large model: time in training steps, and memory."""
    work, architecture = WORKLOADS[name], "mamba"
    before, after = work.cuts[0]
    # Before this process takes memory: glibc may not give it back.
    memory = cut_against_step(name, architecture, device)
    training = Training(architecture, before, work, device)
    parameters = training.model.num_parameters()
    # The first step warms up.
    training.step()
    step_ms = [training.step() for _ in range(work.rounds)]
    cut = cut_once(training, CompreSSMConfig(state_size=after, schedule=[999]))
    row = cut_row(architecture, before, after, cut["tokens"], step_ms + cut["step_ms"], cut["parts_ms"])
    return {"parameters": parameters} | row | memory


def cut_once(training: Training, config: CompreSSMConfig) -> dict[str, Any]:
    """Train until the package has seen the tokens that it asks for, and cut.

    Args:
        config: what to cut; its schedule is later than these steps.

    Returns:
        `step_ms` of these steps, the cut's `parts_ms`, and the `tokens` that it was decided on.
    """
    compressor = Compressor(config, training.model, training.optimizer, total_steps=1000)
    step_ms = []
    while compressor.recorder.tokens < compressor.wanted_tokens:
        step_ms.append(training.step())
    tokens = compressor.recorder.tokens
    parts_ms = {part: 1000 * seconds for part, seconds in compressor.cut().seconds.items()}
    return {"step_ms": step_ms, "parts_ms": parts_ms, "tokens": tokens}


def cut_row(
    architecture: str, before: int, after: int, tokens: int, step_ms: list[float], parts_ms: dict[str, float]
) -> dict[str, Any]:
    step = statistics.median(step_ms)
    return {
        "architecture": architecture,
        "state_size": f"{before} → {after}",
        "tokens": tokens,
        "step_ms": step,
        "parts_ms": parts_ms,
        "steps": sum(parts_ms.values()) / step,
    }


def compare_realizations(work: Workload, device: str) -> list[dict[str, Any]]:
    """(e) Mamba-2 uncut, cut to a stock model and projected: training step, and decoding of one token."""
    results = []
    for before, after in work.cuts:
        trainings = {name: Training("mamba2", before, work, device) for name in ("uncut", "stock", "projected")}
        for name, training in trainings.items():
            training.step()
            if name != "uncut":
                config = CompreSSMConfig(state_size=after, realization=name)
                compress(training.model, [training.batch] * 2, config, training.optimizer)
        steps = in_turns(2 * work.rounds, *(training.step for training in trainings.values()))
        tokens = in_turns(
            work.rounds,
            *(
                lambda training=training: (
                    generation_ms(training.model, training.batch[:, :8], work.new_tokens) / work.new_tokens
                )
                for training in trainings.values()
            ),
        )
        for (name, training), step_ms, token_ms in zip(trainings.items(), steps, tokens, strict=True):
            results.append(
                {
                    "realization": name,
                    "state_size": f"{before} → {before if name == 'uncut' else after}",
                    "parameters": training.model.num_parameters(),
                    "step_ms": spread(step_ms),
                    "token_ms": spread(token_ms),
                }
            )
    return results


def time_runs(architecture: str, work: Workload, device: str) -> list[dict[str, Any]]:
    """(f) A run cut at a fifth and one at full size, from end to end, on the same data and in turns."""
    return [compare_runs(architecture, realization, work, device) for realization in REALIZATIONS[architecture]]


def compare_runs(architecture: str, realization: str, work: Workload, device: str) -> dict[str, Any]:
    """One row of (f)."""
    before, after = work.cuts[0]
    full, cut = Training(architecture, before, work, device), Training(architecture, before, work, device)
    config = CompreSSMConfig(state_size=after, realization=realization)
    compressor = Compressor(config, cut.model, cut.optimizer, total_steps=work.run_steps)
    batches = list(random_batches(work, device, work.run_steps))
    full_s = cut_run_s = 0.0
    full_ms: list[float] = []
    cut_ms: list[float] = []
    for turn in range(TURNS):
        part = batches[turn * work.run_steps // TURNS : (turn + 1) * work.run_steps // TURNS]
        start = time.perf_counter()
        full_ms += [full.step(batch) for batch in part]
        middle = time.perf_counter()
        for batch in part:
            step_ms = cut.step(batch)
            if compressor.history:
                cut_ms.append(step_ms)
            compressor.step()
        end = time.perf_counter()
        full_s, cut_run_s = full_s + middle - start, cut_run_s + end - middle
    if not compressor.history or compressor.history[0]["status"] != "cut":
        raise RuntimeError(f"the run of {architecture} was to be cut, but its history is {compressor.history}")
    return {
        "architecture": architecture,
        "realization": realization,
        "state_size": f"{before} → {after}",
        "steps": work.run_steps,
        "cut_at_step": compressor.history[0]["step"],
        "full_s": full_s,
        "cut_run_s": cut_run_s,
        "cut_s": sum(compressor.history[0]["seconds"].values()),
        "full_step_ms": spread(full_ms),
        "cut_step_ms": spread(cut_ms),
        "run_ratio": full_s / cut_run_s,
        "step_ratio": statistics.median(full_ms) / statistics.median(cut_ms),
    }


def compare_decoding(architecture: str, work: Workload, device: str) -> list[dict[str, Any]]:
    """(h) Generation by models of every N: state, one sequence, a batch of them, and a long prompt."""
    rows = []
    for realization, size in itertools.product(REALIZATIONS[architecture], work.sizes):
        if realization == "projected":
            if size == work.sizes[0]:
                continue
            training = Training(architecture, work.sizes[0], work, device)
            # Equal sizes in every layer: how they are shared out is no matter of speed.
            config = CompreSSMConfig(state_size=[size] * work.layers, realization="projected")
            compress(training.model, [training.batch] * 2, config)
        else:
            training = Training(architecture, size, work, device)
        row = {"architecture": architecture, "realization": realization, "state_size": size}
        rows.append((row | {"state_bytes": state_bytes(training.model)}, training.model))
    models = [model for _, model in rows]
    timed = {
        "one": time_decoding(models, 1, 8, work.new_tokens, work.rounds),
        "batch": time_decoding(models, work.batch, 8, work.new_tokens, work.rounds),
        "long": time_decoding(models, 1, work.prompt, work.new_tokens, work.rounds),
    }
    return [row | {key: values[i] for key, values in timed.items()} for i, (row, _) in enumerate(rows)]


def measure_all(name: str, work: Workload, device: str) -> dict[str, Any]:
    """Parts (a) to (i)."""

    def say(part: str) -> None:
        print(f"measuring {part} ...", file=sys.stderr, flush=True)

    results: dict[str, Any] = {}
    say("steps")
    steps = [time_steps(kind, work, device) for kind in ARCHITECTURES]
    results["steps"] = [row for rows in steps for row in rows[:-1]]
    results["limit"] = [row for rows in steps for row in compare_with_limit(rows)]
    parts = {
        "born_small": compare_with_born_small,
        "cuts": time_cuts,
        "runs": time_runs,
        "decoding": compare_decoding,
    }
    for key, measure in parts.items():
        say(key)
        results[key] = [row for kind in ARCHITECTURES for row in measure(kind, work, device)]
    say("memory")
    results["memory"] = [cut_against_step(name, kind, device) for kind in ARCHITECTURES]
    results["training_memory"] = [
        {
            "architecture": row["architecture"],
            "realization": realization,
            "state_size": row["state_size"],
            "before_mib": row["step_mib"],
            "after_mib": step_after_cut(name, row["architecture"], realization, device),
        }
        for row in results["memory"]
        for realization in REALIZATIONS[row["architecture"]]
    ]
    say("realizations")
    results["realizations"] = compare_realizations(work, device)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try it out")
    parser.add_argument("--large", action="store_true", help="only (j), one cut of 24 layers, 768 wide")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON and the Markdown file go")
    arguments = parser.parse_args()
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    device = arguments.device
    name = ("large-quick" if arguments.quick else "large") if arguments.large else "quick"
    if not arguments.quick and not arguments.large:
        name = device
    work = WORKLOADS[name]
    if device == "cuda":
        for note in choose_kernels():
            print(note, file=sys.stderr)
    kernels = {kind: describe_kernels(kind) for kind in ARCHITECTURES}
    for kind, text in kernels.items():
        print(f"{kind} computes with: {text}", file=sys.stderr)
    results: dict[str, Any] = {"machine": describe_machine(device), "workload": asdict(work), "kernels": kernels}
    results |= {"large": [time_large_cut(name, device)]} if arguments.large else measure_all(name, work, device)
    results["goals"] = judge(results, device)
    file = f"speed-large-{device}" if name == "large" else f"speed-{name}"
    write_results(arguments.output, file, results, (large_markdown if arguments.large else markdown)(results))


if __name__ == "__main__":
    main()
