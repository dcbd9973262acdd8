"""What a cut costs in quality: every way of choosing states, at equal r, on models that were trained to need them.

    python recipes/bench/quality.py                   # under 40 minutes on two cores; `make bench-quality` does this
    python recipes/bench/quality.py --quick           # under 5 minutes, to try it out
    python recipes/bench/quality.py --resume          # go on where a run was stopped; make the tables anew
    python recipes/bench/quality.py --resume --layouts mamba2 --tasks text --seeds 0 1     # a part of it

Stock Transformers models with N = 64 are trained on four tasks (see TASKS), five seeds each. Then every arm cuts the
same trained model on the same calibration batches: the projection of Mamba-2, the refit of Mamba-1, and the selection
by every criterion of `hf_compressm.criteria` alone. Measured on fixed fresh data, at the positions that the task asks
about: the loss, the accuracy, and the KL divergence from the uncut model; in one shot, and after a short recovery on
equal data. After the recovery the uncut model is one that was trained on as long. Learning rates, steps and sizes were
tuned on seed 100, which is not reported. Every finished cell (layout, task, seed) is a line of quality-cpu.jsonl; the
JSON, the tables and the picture are made from these lines. The control of Mamba-2 is a model trained at the small
size from scratch, for as long as the uncut one, stock and projected. The environment is written down with the results.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import math
import multiprocessing
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mambapy.pscan
import torch
from speed import describe_machine
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_compressm import CompreSSMConfig, compress_, find_mixers, measure, plan_compression
from hf_compressm.criteria import CRITERIA
from hf_compressm.modeling_compressm import CompressmMamba2Config, CompressmMamba2ForCausalLM

RESULTS = Path(__file__).with_name("results")
LAYOUTS = ("mamba", "mamba2")
# The arms that each layout is judged by, and what they are judged against.
PROPOSED = {"mamba": ("refit",), "mamba2": ("projected", "shared out")}
REFERENCES = ("ghost", "hankel")
NOT_ASKED = -100

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """Sizes of the models, and how long each is trained; `born_small` names the layouts with that control."""

    state_size: int = 64
    kept: tuple[int, ...] = (8,)
    hidden_size: int = 32
    layers: int = 2
    groups: int = 1
    batch_tokens: tuple[tuple[str, int], ...] = (("mamba", 256), ("mamba2", 512))
    steps: tuple[tuple[str, int], ...] = (("mamba", 2000), ("mamba2", 2000))
    learning_rate: float = 4e-3
    calibration_tokens: int = 16384
    recovery_steps: int = 40
    recovery_learning_rate: float = 5e-4
    evaluation_tokens: int = 16384
    born_small: tuple[str, ...] = ("mamba2",)


WORKS = {
    "cpu": Work(),
    "quick": Work(steps=(("mamba", 600), ("mamba2", 500)), recovery_steps=10, evaluation_tokens=4096),
}
SEEDS = {"cpu": (0, 1, 2, 3, 4), "quick": (0,)}


# ---------------------------------------------------------------------------------------------------------- the tasks


@dataclass(frozen=True)
class Task:
    """A task: `sample(generator, count, held_out)` gives input ids and labels, NOT_ASKED where nothing is asked."""

    vocabulary: int
    length: int
    chance: float
    sample: Callable[[torch.Generator, int, bool], Batch]


def random_choice(generator: torch.Generator, count: int, of: int, size: int) -> torch.Tensor:
    """For each of `count` sequences, `size` different numbers below `of`, in random order."""
    return torch.rand(count, of, generator=generator).argsort(dim=1)[:, :size]


def selective_copying(generator: torch.Generator, count: int, held_out: bool = False) -> Batch:
    """Eight data tokens strewn over 23 places among noise (0); after a mark (1), they are asked for in their order."""
    items, span, symbols = 8, 23, 14
    data = torch.randint(2, 2 + symbols, (count, items), generator=generator)
    places = random_choice(generator, count, span, items).sort(dim=1).values
    context = torch.zeros(count, span, dtype=torch.long).scatter_(1, places, data)
    input_ids = torch.cat([context, torch.ones(count, 1, dtype=torch.long), data], dim=1)
    labels = torch.full_like(input_ids, NOT_ASKED)
    labels[:, span + 1 :] = data
    return {"input_ids": input_ids, "labels": labels}


def recall(generator: torch.Generator, count: int, held_out: bool = False) -> Batch:
    """Multi-query associative recall: six pairs of a key (0-15) and a value (16-31), then ten times a key."""
    pairs, queries, symbols = 6, 10, 16
    keys = random_choice(generator, count, symbols, pairs)
    values = torch.randint(symbols, 2 * symbols, (count, pairs), generator=generator)
    order = torch.randint(pairs, (count, queries), generator=generator)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], dim=2).flatten(1)
    input_ids = torch.cat([torch.stack([keys, values], dim=2).flatten(1), asked], dim=1)
    labels = torch.full_like(input_ids, NOT_ASKED)
    labels[:, 2 * pairs + 1 :: 2] = input_ids[:, 2 * pairs + 1 :: 2]
    return {"input_ids": input_ids, "labels": labels}


def induction(generator: torch.Generator, count: int, held_out: bool = False) -> Batch:
    """Sixteen different tokens of 24, then the same round again from a random place: what followed this token?"""
    half, symbols = 16, 24
    first = random_choice(generator, count, symbols, half)
    start = torch.randint(half, (count, 1), generator=generator)
    second = first.gather(1, (start + torch.arange(half)) % half)
    input_ids = torch.cat([first, second], dim=1)
    labels = input_ids.clone()
    labels[:, : half + 1] = NOT_ASKED
    return {"input_ids": input_ids, "labels": labels}


@cache
def standard_library(held_out: bool) -> torch.Tensor:
    """The bytes of the top-level modules of Python's own standard library; every eighth file is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [file for number, file in enumerate(files) if (number % 8 == 7) == held_out]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in chosen)), dtype=torch.uint8)


def text(generator: torch.Generator, count: int, held_out: bool = False) -> Batch:
    """64 bytes from a random place of the standard library's source; each byte but the first is asked for."""
    length, source = 64, standard_library(held_out)
    starts = torch.randint(len(source) - length, (count, 1), generator=generator)
    input_ids = source[starts + torch.arange(length)].long()
    labels = input_ids.clone()
    labels[:, 0] = NOT_ASKED
    return {"input_ids": input_ids, "labels": labels}


TASKS = {
    "copying": Task(16, 32, math.log(14), selective_copying),
    "recall": Task(32, 32, math.log(16), recall),
    "induction": Task(24, 32, math.log(24), induction),
    "text": Task(256, 64, math.log(256), text),
}


# ------------------------------------------------------------------------------------------------------------ one cell


class SequentialScan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + x_t over dimension 1: what `mambapy.pscan.pscan` computes, faster on one thread.

    A parallel scan touches all of its memory in each of 2 log2(L) rounds; here each step fits the cache.
    """

    @staticmethod
    def forward(ctx: Any, A: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        H = torch.empty_like(X.transpose(0, 1), memory_format=torch.contiguous_format)
        H[0] = X[:, 0]
        for t in range(1, len(H)):
            torch.addcmul(X[:, t], A[:, t], H[t - 1], out=H[t])
        ctx.save_for_backward(A, H)
        return H.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        A, H = ctx.saved_tensors
        grad_X = torch.empty_like(H)
        grad_X[-1] = grad[:, -1]
        for t in range(len(H) - 1, 0, -1):
            torch.addcmul(grad[:, t - 1], A[:, t], grad_X[t], out=grad_X[t - 1])
        grad_A = torch.zeros_like(H)
        torch.mul(grad_X[1:], H[:-1], out=grad_A[1:])
        return grad_A.transpose(0, 1), grad_X.transpose(0, 1)


def build(layout: str, task: Task, work: Work, state_size: int, *, projected: bool = False) -> PreTrainedModel:
    """A model with random weights: a stock one, or a projected one whose states are fed by `work.state_size` features.

    Mamba-1 gets larger Δ than by default, as its sequences are short, and like Mamba-2 a readout of its own.
    """
    common = {
        "vocab_size": task.vocabulary,
        "hidden_size": work.hidden_size,
        "state_size": state_size,
        "num_hidden_layers": work.layers,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if layout == "mamba":
        return MambaForCausalLM(MambaConfig(**common, time_step_min=0.01, time_step_max=0.3, use_mambapy=True))
    heads = 4
    common |= {
        "num_heads": heads,
        "head_dim": 2 * work.hidden_size // heads,
        "n_groups": work.groups,
        "chunk_size": 32,
    }
    if projected:
        return CompressmMamba2ForCausalLM(CompressmMamba2Config(**common, feature_size=work.state_size))
    return Mamba2ForCausalLM(Mamba2Config(**common))


def train(
    model: PreTrainedModel, batches: Iterator[Batch], steps: int, rate: float, *, constant: bool = False
) -> None:
    """Adam; warm-up over a fifth and a cosine to zero, or a constant rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        warm, done = min(1.0, (step + 1) / max(1, steps // 5)), step / steps
        optimizer.param_groups[0]["lr"] = rate if constant else rate * warm * (1 + math.cos(math.pi * done)) / 2
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def answer(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (asked, vocabulary) and the right tokens (asked,), at the positions that are asked about."""
    model.eval()
    asked = batch["labels"][:, 1:] != NOT_ASKED
    parts = [
        model(input_ids=ids, use_cache=False).logits[:, :-1][mask].float().log_softmax(-1)
        for ids, mask in zip(batch["input_ids"].split(64), asked.split(64), strict=True)
    ]
    return torch.cat(parts), batch["labels"][:, 1:][asked]


def score(answers: tuple[torch.Tensor, torch.Tensor], uncut: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Loss, accuracy, and KL(uncut ‖ this), each per asked token, the first and last in nats."""
    log_probabilities, targets = answers
    return {
        "loss": -log_probabilities.gather(1, targets[:, None]).mean().item(),
        "accuracy": (log_probabilities.argmax(1) == targets).float().mean().item(),
        "kl": (uncut[0].exp() * (uncut[0] - log_probabilities)).sum(1).mean().item(),
    }


def arms(layout: str, kept: int, seed: int, state_bytes: int) -> dict[str, CompreSSMConfig]:
    """The ways to cut: the one proposed for this layout, and the selection by each criterion alone.

    `shared out` is the projection with the same state bytes in all layers together, not the same r in each; `balanced`
    the projection before it is fitted to the outputs; `elimination` the refit's selection without the refit.
    """
    if layout == "mamba2":
        proposed = {
            "projected": CompreSSMConfig(state_size=kept, realization="projected"),
            "shared out": CompreSSMConfig(state_bytes=state_bytes, realization="projected"),
            "balanced": CompreSSMConfig(state_size=kept, realization="projected", projection_rounds=0),
        }
    else:
        proposed = {"refit": CompreSSMConfig(state_size=kept, realization="stock")}
    return proposed | {
        ("elimination" if name == "refit" else name): CompreSSMConfig(
            state_size=kept, criterion=name, refit=False, realization="stock", seed=seed
        )
        for name in CRITERIA
    }


def run_cell(layout: str, task_name: str, seed: int, work: Work) -> dict[str, Any]:
    """Train one model, cut it in every way, measure, recover and measure again."""
    task, steps = TASKS[task_name], dict(work.steps)[layout]
    batch_tokens = dict(work.batch_tokens)[layout]
    started = time.process_time()

    def trained(state_size: int, *, projected: bool = False) -> tuple[PreTrainedModel, Iterator[Batch]]:
        """A model after training, and the rest of the batches; each model sees the same."""
        torch.manual_seed(seed)
        model = build(layout, task, work, state_size, projected=projected)
        generator = torch.Generator().manual_seed(seed)
        stream = (task.sample(generator, batch_tokens // task.length, False) for _ in itertools.count())
        train(model, stream, steps, work.learning_rate)
        return model, stream

    model, stream = trained(work.state_size)
    training_seconds = time.process_time() - started
    calibration = [{"input_ids": next(stream)["input_ids"]} for _ in range(work.calibration_tokens // batch_tokens)]
    recovery = [next(stream) for _ in range(work.recovery_steps)]
    evaluation = task.sample(torch.Generator().manual_seed(2**32), work.evaluation_tokens // task.length, True)

    def recover(model: PreTrainedModel) -> None:
        train(model, iter(recovery), len(recovery), work.recovery_learning_rate, constant=True)

    uncut = answer(model, evaluation)
    trained_on = copy.deepcopy(model)
    recover(trained_on)
    uncut_trained_on = answer(trained_on, evaluation)
    rows = []
    measured = measure(model, calibration)
    for kept in work.kept:
        state_bytes = kept * sum(mixer.bytes_per_state for mixer in find_mixers(model).values())
        for name, config in arms(layout, kept, seed, state_bytes).items():
            start = time.process_time()
            cut = copy.deepcopy(model)
            report = compress_(cut, plan_compression(cut, measured, config))
            row = {"arm": name, "kept": kept, "one_shot": score(answer(cut, evaluation), uncut)}
            row["state_sizes"] = [layer.state_size_after for layer in report.layers]
            row["relative_errors"] = [layer.relative_error for layer in report.layers]
            recover(cut)
            row["recovered"] = score(answer(cut, evaluation), uncut_trained_on)
            rows.append(row | {"seconds": time.process_time() - start})
    born_small = []
    for kept in work.kept if layout in work.born_small else ():
        for projected in (False, True) if layout == "mamba2" else (False,):
            small, _ = trained(kept, projected=projected)
            born = {"arm": "projected" if projected else "stock", "kept": kept}
            born_small.append(born | score(answer(small, evaluation), uncut))
    return {
        "layout": layout,
        "task": task_name,
        "seed": seed,
        "work": json.loads(json.dumps(asdict(work))),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "chance": task.chance,
        "uncut": {"one_shot": score(uncut, uncut), "recovered": score(uncut_trained_on, uncut_trained_on)},
        "arms": rows,
        "born_small": born_small,
        "seconds": {"training": training_seconds, "all": time.process_time() - started},
    }


# --------------------------------------------------------------------------------------------------------- the tables


def summarize(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each layout, task, arm and r: means and spreads over seeds, and shares of the references.

    A share is Σ added loss of the arm / Σ added loss of the reference over the same seeds; None if the reference adds
    nothing. The KL's share likewise.
    """
    rows = []
    for layout, task in sorted({(cell["layout"], cell["task"]) for cell in cells}, key=_place):
        chosen = sorted((c for c in cells if (c["layout"], c["task"]) == (layout, task)), key=lambda c: c["seed"])
        for kept, arm in dict.fromkeys((row["kept"], row["arm"]) for row in chosen[0]["arms"]):
            summary: dict[str, Any] = {"layout": layout, "task": task, "arm": arm, "kept": kept, "seeds": len(chosen)}
            for when in ("one_shot", "recovered"):
                values = {key: _values(chosen, arm, kept, when, key) for key in ("loss", "accuracy", "kl")}
                values["added"] = _added(chosen, arm, kept, when)
                shares = {}
                for reference in REFERENCES:
                    shares[reference] = _share(values["added"], _added(chosen, reference, kept, when))
                    shares[f"{reference}_kl"] = _share(values["kl"], _values(chosen, reference, kept, when, "kl"))
                summary[when] = {key: spread(column) for key, column in values.items()} | {"shares": shares}
            rows.append(summary)
    return rows


def spread(values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "min": min(values), "max": max(values)}


def _values(cells: list[dict[str, Any]], arm: str, kept: int, when: str, key: str) -> list[float]:
    return [row[when][key] for c in cells for row in c["arms"] if (row["arm"], row["kept"]) == (arm, kept)]


def _added(cells: list[dict[str, Any]], arm: str, kept: int, when: str) -> list[float]:
    losses = _values(cells, arm, kept, when, "loss")
    return [loss - cell["uncut"][when]["loss"] for loss, cell in zip(losses, cells, strict=True)]


def _share(values: list[float], reference: list[float]) -> float | None:
    return sum(values) / sum(reference) if sum(reference) > 0 else None


def _place(pair: tuple[str, str]) -> tuple[int, int]:
    return LAYOUTS.index(pair[0]), list(TASKS).index(pair[1])


def judge(summary: list[dict[str, Any]], kept: int) -> list[dict[str, Any]]:
    """The goals, without training after the cut: what they ask for, what came out, and whether that is enough."""
    goals = [("mamba2", task, "ghost", 0.05) for task in ("copying", "recall")]
    goals += [("mamba2", task, "ghost_kl", 0.02) for task in ("copying", "recall")]
    goals += [("mamba2", "text", "ghost", 0.5)]
    goals += [("mamba", task, reference, 0.15) for task in TASKS for reference in REFERENCES]
    rows = {(row["layout"], row["task"], row["arm"]): row for row in summary if row["kept"] == kept}
    results = []
    for layout, task, reference, most in goals:
        for arm in PROPOSED[layout]:
            row = rows.get((layout, task, arm))
            if row is None:
                continue
            share = row["one_shot"]["shares"][reference]
            verdict = "undefined" if share is None else "met" if share <= most else "MISSED"
            goal = {"layout": layout, "task": task, "arm": arm, "kept": kept, "seeds": row["seeds"]}
            results.append(goal | {"against": reference, "goal": most, "share": share, "verdict": verdict})
    return results


def goal_table(goals: list[dict[str, Any]]) -> str:
    """The goals as a table."""
    lines = [
        "| layout | task | arm | r | seeds | share of | at most | is | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for goal in goals:
        against = (
            f"{goal['against'].removesuffix('_kl')}'s {'KL' if goal['against'].endswith('_kl') else 'added loss'}"
        )
        lines.append(
            f"| {goal['layout']} | {goal['task']} | {goal['arm']} | {goal['kept']} | {goal['seeds']} | {against} "
            f"| {goal['goal']:.0%} | {_percent(goal['share'])} | {goal['verdict']} |"
        )
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    machine, work = results["machine"], results["work"]
    batches = dict(work["batch_tokens"])
    steps = " and ".join(f"{count} steps of {batches[layout]} tokens ({layout})" for layout, count in work["steps"])
    lines = [
        "# Quality after a cut",
        "",
        f"Stock models, {work['layers']} layers of width {work['hidden_size']}, N = {work['state_size']}, trained for "
        f"{steps}. Measured at the asked positions of "
        f"{work['evaluation_tokens']:,} fresh tokens; nats per asked token. Mean ± standard deviation over seeds. "
        f"Recovered: {work['recovery_steps']} training steps after the cut, on equal data; the uncut model was then "
        "trained on as long, and differences are to that. Shares: added loss over that of ghost or of hankel "
        "(the mean-LTI rule), as ratios of the means over seeds; – where the reference adds nothing. "
        f"{machine['device']}, torch {machine['versions']['torch']}, transformers "
        f"{machine['versions']['transformers']}, {machine['date']}.",
        "",
        "## Goals, without training after the cut",
        "",
        goal_table(results["goals"]),
    ]
    for layout, task in sorted({(row["layout"], row["task"]) for row in results["summary"]}, key=_place):
        cells = [cell for cell in results["cells"] if (cell["layout"], cell["task"]) == (layout, task)]
        uncut = {when: spread([cell["uncut"][when]["loss"] for cell in cells]) for when in ("one_shot", "recovered")}
        accuracy = spread([cell["uncut"]["one_shot"]["accuracy"] for cell in cells])
        lines += [
            "",
            f"## {layout}, {task}",
            "",
            f"Seeds: {len(cells)}. Uncut: loss {_pm(uncut['one_shot'], 3)} (chance {cells[0]['chance']:.3f}), "
            f"accuracy {_pm(accuracy, 3)}; trained on: loss {_pm(uncut['recovered'], 3)}.{_born_small(cells)}",
            "",
            "| arm | r | added loss | accuracy | KL | of ghost | of hankel "
            "| recovered: added loss | accuracy | KL | of ghost | of hankel |",
            "|" + "---|" * 12,
        ]
        for row in results["summary"]:
            if (row["layout"], row["task"]) == (layout, task):
                cut, recovered = row["one_shot"], row["recovered"]
                lines.append(f"| {row['arm']} | {row['kept']} | {_columns(cut)} | {_columns(recovered)} |")
    return "\n".join(lines) + "\n"


def _born_small(cells: list[dict[str, Any]]) -> str:
    sentences = []
    for number, born in enumerate(cells[0]["born_small"]):
        loss = spread([cell["born_small"][number]["loss"] for cell in cells])
        sentences.append(f" Trained from scratch at r = {born['kept']}, {born['arm']}: loss {_pm(loss, 3)}.")
    return "".join(sentences)


def _columns(values: dict[str, Any]) -> str:
    shares = (_percent(values["shares"][reference]) for reference in REFERENCES)
    return " | ".join([_pm(values["added"], 4), _pm(values["accuracy"], 3), _pm(values["kl"], 4), *shares])


def _pm(values: dict[str, float], digits: int) -> str:
    return f"{values['mean']:.{digits}f} ± {values['sd']:.{digits}f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def plot(summary: list[dict[str, Any]], kept: int, path: Path) -> None:
    """One panel for each layout and task: each arm's added loss, in one shot and recovered, mean and range."""
    from matplotlib.figure import Figure

    panels = sorted({(row["layout"], row["task"]) for row in summary}, key=_place)
    layouts, tasks = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    arms_shown = max(len([row for row in summary if (row["layout"], row["task"]) == pair]) for pair in panels)
    figure = Figure(figsize=(1.5 + 3.6 * len(tasks), (1.4 + 0.24 * arms_shown) * len(layouts)), layout="constrained")
    grid = figure.subplots(len(layouts), len(tasks), squeeze=False, sharey="row")
    for layout, task in panels:
        axes = grid[layouts.index(layout)][tasks.index(task)]
        rows = [row for row in summary if (row["layout"], row["task"], row["kept"]) == (layout, task, kept)][::-1]
        # Linear around zero: a recovered model may be better than the uncut one.
        axes.set_xscale("symlog", linthresh=0.01)
        for when, marker, color, shift in (("one_shot", "o", "tab:red", 0.14), ("recovered", "D", "tab:blue", -0.14)):
            added = [row[when]["added"] for row in rows]
            heights = [number + shift for number in range(len(rows))]
            means = [values["mean"] for values in added]
            ranges = [[v["mean"] - v["min"] for v in added], [v["max"] - v["mean"] for v in added]]
            axes.errorbar(means, heights, xerr=ranges, fmt=marker, color=color, markersize=4, lw=1, label=when)
        axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
        axes.axvline(0, color="gray", lw=0.8)
        axes.set_title(f"{layout}, {task}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_xlabel("added loss, nats")
    handles, _ = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, ["one shot", "recovered"], loc="outside upper right", ncols=2, fontsize="small")
    figure.suptitle(f"Loss that a cut to r = {kept} adds (mean and range over seeds)", fontsize=11)
    figure.savefig(path, dpi=130)


# ----------------------------------------------------------------------------------------------------------- the run


def finished_cells(file: Path, work: Work) -> list[dict[str, Any]]:
    """The cells of an earlier run with the same sizes; the last line may have been cut short."""
    cells = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:
            continue
        if cell["work"] == json.loads(json.dumps(asdict(work))):
            cells.append(cell)
    return cells


def run_cells(todo: list[tuple[str, str, int]], work: Work, processes: int) -> Iterator[dict[str, Any]]:
    """Run cells in so many processes of one thread each; yields them as they finish."""
    jobs = [(*cell, work) for cell in todo]
    if processes == 1 or len(jobs) == 1:
        prepare_process()
        yield from map(_run_job, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes, initializer=prepare_process) as pool:
        yield from pool.imap_unordered(_run_job, jobs)


def prepare_process() -> None:
    """One thread, the faster scan, and no remarks about kernels that a CPU does not have."""
    torch.set_num_threads(1)
    mambapy.pscan.pscan = SequentialScan.apply
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)


def _run_job(job: tuple[str, str, int, Work]) -> dict[str, Any]:
    return run_cell(*job)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to try it out")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4, with --quick 0")
    parser.add_argument("--kept", nargs="+", type=int, help="the r to cut to; the goals are judged at the first")
    parser.add_argument("--resume", action="store_true", help="keep the finished cells, run the others")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time, each on one thread")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    arguments = parser.parse_args(argv)
    name = "quick" if arguments.quick else "cpu"
    work, seeds = WORKS[name], arguments.seeds or SEEDS[name]
    if arguments.kept:
        work = replace(work, kept=tuple(arguments.kept))

    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"quality-{name}.json"
    journal = file.with_suffix(".jsonl")
    if not arguments.resume:
        journal.unlink(missing_ok=True)
    cells = finished_cells(journal, work)
    done = {(cell["layout"], cell["task"], cell["seed"]) for cell in cells}
    wanted = [(layout, task, seed) for seed in seeds for layout in arguments.layouts for task in arguments.tasks]
    todo = [cell for cell in wanted if cell not in done]
    started = time.perf_counter()
    for cell in run_cells(todo, work, arguments.processes):
        with journal.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(cell) + "\n")
        cells.append(cell)
        print(
            f"{cell['layout']}, {cell['task']}, seed {cell['seed']}: loss {cell['uncut']['one_shot']['loss']:.3f}, "
            f"{cell['seconds']['training']:.0f} s of training, {cell['seconds']['all']:.0f} s in all "
            f"({time.perf_counter() - started:.0f} s on the clock)",
            file=sys.stderr,
            flush=True,
        )

    cells.sort(key=lambda cell: (_place((cell["layout"], cell["task"])), cell["seed"]))
    summary = summarize(cells)
    goals = judge(summary, work.kept[0])
    results = {"machine": describe_machine("cpu"), "work": cells[0]["work"], "goals": goals, "summary": summary}
    results["cells"] = cells
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    plot(summary, work.kept[0], file.with_suffix(".png"))
    print(goal_table(goals))
    print(f"written to {file}, {file.with_suffix('.md').name} and {file.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
