"""Does it pay to shrink the state in training, and what does a cut cost? Arms × tasks × seeds × layouts, paired.

    python recipes/bench/study.py                     # five seeds of four tasks: hours on two cores
    python recipes/bench/study.py --quick             # minutes, to try it out
    python recipes/bench/study.py --resume            # go on where a run was stopped
    python recipes/bench/study.py --resume --layouts mamba2 --tasks text --seeds 0 1     # a part of it
    python recipes/bench/study.py --tables            # only make the tables and pictures anew

One cell is a layout, a task and a seed: a stock Transformers model with N = 64 is trained in full, and every arm goes
on from a copy of it (weights, optimizer, place in the data) at the step of its first cut, with the same batches in the
same order, to the same number of steps. So arms of a cell differ by the cut alone. Models trained at the small size
from scratch see the same batches, too. Beside the arms, a cell measures what a cut alone does to the model at several
moments of training (KL to the uncut model, added loss), without training after it. Steps, sizes and the learning rate
were tried out on seed 100, which is not reported. Each finished cell is a line of study-cpu.jsonl. Seconds are the
process's own on one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mambapy.pscan
import torch
from reporting import RESULTS
from speed import describe_machine
from study_tables import write_tables
from tasks import NOT_ASKED, TASKS, Batch, Task
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_compressm import CompressionPlan, CompreSSMConfig, compress_, find_mixers, measure, plan_compression
from hf_compressm.criteria import CRITERIA
from hf_compressm.modeling_compressm import CompressmMamba2Config, CompressmMamba2ForCausalLM
from hf_compressm.schedule import PUBLISHED_FRACTIONS

LAYOUTS = ("mamba", "mamba2")
DEFAULT_TASKS = ("digits", "copying", "recall", "text")
# Seeds of batches are this far apart.
MOST_STEPS = 1_000_000
# The arms that are also tried on longer sequences than they were trained on, and how much longer.
TRIED_ON_LONGER = ("full", "small", "cut 20 %", "cut after")
LONGER = (1, 2, 4)


@dataclass(frozen=True)
class Work:
    """Sizes of the models, and how long each is trained; shares are of all steps."""

    state_size: int = 64
    kept: int = 8
    other_kept: tuple[int, ...] = (4, 16, 32)
    hidden_size: int = 32
    layers: int = 2
    batch_tokens: tuple[tuple[str, int], ...] = (("mamba", 256), ("mamba2", 512))
    least_sequences: int = 4
    steps: int = 1500
    learning_rate: float = 4e-3
    warmup: float = 0.05
    moments: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    # Moments at which all criteria and several r are compared.
    thorough_moments: tuple[float, ...] = (0.2, 1.0)
    rewarmed: float = 0.02
    distilled: float = 0.1
    distillation_rate: float = 1e-3
    calibration_tokens: int = 4096
    evaluation_tokens: int = 16384
    evaluation_sequences: int = 360
    trace: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)


# Layout, task, seed, sizes.
Job = tuple[str, str, int, Work]

WORKS = {"cpu": Work(), "quick": Work(steps=160, evaluation_tokens=4096, evaluation_sequences=64)}
SEEDS = {"cpu": (0, 1, 2, 3, 4), "quick": (0,)}


# ----------------------------------------------------------------------------------------------- models and their data


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
    common |= {"num_heads": heads, "head_dim": 2 * work.hidden_size // heads, "n_groups": 1, "chunk_size": 32}
    if projected:
        return CompressmMamba2ForCausalLM(CompressmMamba2Config(**common, feature_size=work.state_size))
    return Mamba2ForCausalLM(Mamba2Config(**common))


@torch.no_grad()
def answer(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (asked, vocabulary) and the right tokens (asked,), at the positions that are asked about."""
    model.eval()
    asked = batch["labels"][:, 1:] != NOT_ASKED
    rows = max(1, 4096 // batch["input_ids"].shape[1])
    parts = [
        model(input_ids=ids, use_cache=False).logits[:, :-1][mask].float().log_softmax(-1)
        for ids, mask in zip(batch["input_ids"].split(rows), asked.split(rows), strict=True)
    ]
    return torch.cat(parts), batch["labels"][:, 1:][asked]


def score(
    answers: tuple[torch.Tensor, torch.Tensor], uncut: tuple[torch.Tensor, torch.Tensor] | None = None
) -> dict[str, float]:
    """Loss, accuracy, and KL(uncut ‖ this) if there is something to compare with, each per asked token, in nats."""
    log_probabilities, targets = answers
    scores = {
        "loss": -log_probabilities.gather(1, targets[:, None]).mean().item(),
        "accuracy": (log_probabilities.argmax(1) == targets).float().mean().item(),
    }
    if uncut is not None:
        scores["kl"] = (uncut[0].exp() * (uncut[0] - log_probabilities)).sum(1).mean().item()
    return scores


@dataclass(frozen=True)
class Cell:
    """A layout, a task and a seed, and all data that its models see."""

    layout: str
    task_name: str
    seed: int
    work: Work

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    @property
    def sequences(self) -> int:
        """Sequences of a batch."""
        return max(self.work.least_sequences, dict(self.work.batch_tokens)[self.layout] // self.task.length)

    def batch(self, step: int) -> Batch:
        """The batch of a training step: the same for all arms."""
        # torch's generator on the CPU takes the last 32 bits of a seed only.
        generator = torch.Generator().manual_seed(self.seed * MOST_STEPS + step)
        return self.task.sample(generator, self.sequences, False)

    def calibration(self, step: int) -> list[Batch]:
        """The last inputs before a step."""
        count = math.ceil(self.work.calibration_tokens / (self.sequences * self.task.length))
        return [{"input_ids": self.batch(earlier)["input_ids"]} for earlier in range(max(0, step - count), step)]

    @cached_property
    def evaluation(self) -> Batch:
        return self.evaluate_on(self.task, self.work.evaluation_tokens)

    def evaluate_on(self, task: Task, tokens: int) -> Batch:
        """Fresh sequences, the same for all seeds; of long ones, more tokens than asked for."""
        count = max(self.work.evaluation_sequences, tokens // task.length)
        return task.sample(torch.Generator().manual_seed(2**32 - 1), count, True)

    def step_of(self, share: float) -> int:
        return max(1, round(share * self.work.steps))


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Run:
    """A training that can be copied at any step, and what it took so far.

    Attributes:
        step_seconds: of each step.
        cuts: of each cut, its step, seconds, the sizes that it left and their measured errors.
        trace: step, training seconds so far, loss and accuracy.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step_seconds: list[float] = field(default_factory=list)
    cuts: list[dict[str, Any]] = field(default_factory=list)
    trace: list[tuple[int, float, float, float]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.step_seconds)

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds) + sum(cut["seconds"] for cut in self.cuts)

    def copy(self) -> Run:
        """Weights, moments and times; nothing is shared with this one."""
        return copy.deepcopy(self)


def start(cell: Cell, state_size: int, *, projected: bool = False) -> Run:
    """A model before its first step; all of a cell are drawn from the same seed."""
    torch.manual_seed(cell.seed)
    model = build(cell.layout, cell.task, cell.work, state_size, projected=projected)
    return Run(model, torch.optim.AdamW(model.parameters(), lr=cell.work.learning_rate, weight_decay=0.0))


def cosine(work: Work, steps: int) -> Callable[[int], float]:
    """The learning rate at a step: a linear warm-up and a cosine to zero."""
    warmup = max(1, round(work.warmup * steps))
    return lambda step: work.learning_rate * min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def plain_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def train(
    cell: Cell,
    run: Run,
    until: int,
    rate: Callable[[int], float],
    loss: Callable[[PreTrainedModel, Batch], torch.Tensor] = plain_loss,
    trace_steps: tuple[int, ...] = (),
) -> None:
    """Train up to a step, and look at the held-out loss at some."""
    for step in range(run.step, until):
        run.model.train()
        batch = cell.batch(step)
        started = time.process_time()
        for group in run.optimizer.param_groups:
            group["lr"] = rate(step)
        loss(run.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step_seconds.append(time.process_time() - started)
        if run.step in trace_steps:
            look(cell, run)


def look(cell: Cell, run: Run) -> None:
    """Add a point to the trace."""
    scores = score(answer(run.model, cell.evaluation))
    run.trace.append((run.step, run.seconds, scores["loss"], scores["accuracy"]))


def trace_steps(cell: Cell) -> tuple[int, ...]:
    return tuple(cell.step_of(share) for share in cell.work.trace)


def cut(cell: Cell, run: Run, config: CompreSSMConfig, *, fresh_moments: bool = False) -> None:
    """Cut a run in place, by its last inputs; its optimizer follows."""
    calibration = cell.calibration(run.step)
    before = list(run.model.parameters())
    started = time.process_time()
    plan = plan_compression(run.model, measure(run.model, calibration), config)
    if plan.changes:
        compress_(run.model, plan, run.optimizer)
    seconds = time.process_time() - started
    run.cuts.append({"step": run.step, "seconds": seconds, "changed": bool(plan.changes), **outcome(plan)})
    if fresh_moments:
        known = {id(parameter) for parameter in before}
        for parameter in run.model.parameters():
            if id(parameter) not in known:
                run.optimizer.state.pop(parameter, None)
    look(cell, run)


def outcome(plan: CompressionPlan) -> dict[str, Any]:
    layers = plan.layers.values()
    return {
        "state_sizes": [layer.state_size_after for layer in layers],
        "realization": sorted({layer.realization for layer in layers}),
        "relative_errors": [layer.relative_error for layer in layers],
    }


# ---------------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """When a run is cut (share of all steps), how, and what is done about the optimizer."""

    cuts: tuple[tuple[float, CompreSSMConfig], ...]
    fresh_moments: bool = False
    rewarmed: bool = False


def selection(work: Work, criterion: str, seed: int = 0) -> CompreSSMConfig:
    """States are chosen by a criterion, and nothing is done to make up for those that go."""
    return CompreSSMConfig(state_size=work.kept, criterion=criterion, refit=False, realization="stock", seed=seed)


def arms(layout: str, work: Work) -> dict[str, Arm]:
    """The ways to cut in the middle of training."""
    default = CompreSSMConfig(state_size=work.kept)
    published = CompreSSMConfig(hankel_tolerance=0.05, criterion="hankel", refit=False, realization="stock")
    stages = [moment for moment in work.moments if moment <= 0.3]
    shares = [(number + 1) / len(stages) for number in range(len(stages))]
    sizes = [round(work.state_size * (work.kept / work.state_size) ** share) for share in shares]
    chosen = {
        **{f"cut {moment:.0%}".replace("%", " %"): Arm(((moment, default),)) for moment in work.moments if moment < 1},
        "stages": Arm(
            tuple((moment, CompreSSMConfig(state_size=size)) for moment, size in zip(stages, sizes, strict=True))
        ),
        "ghost 20 %": Arm(((0.2, selection(work, "ghost")),)),
        "mean-LTI 20 %": Arm(((0.2, selection(work, "hankel")),)),
        "compressm": Arm(tuple((share, published) for share in PUBLISHED_FRACTIONS)),
        "fresh moments 20 %": Arm(((0.2, default),), fresh_moments=True),
        "rewarmed 20 %": Arm(((0.2, default),), rewarmed=True),
    }
    if layout == "mamba2":
        chosen["stock 20 %"] = Arm(((0.2, CompreSSMConfig(state_size=work.kept, realization="stock")),))
    return chosen


def run_arm(cell: Cell, snapshots: dict[int, Run], arm: Arm) -> Run:
    """Go on from the full run at the first cut, and train to the end."""
    work = cell.work
    steps = [cell.step_of(share) for share, _ in arm.cuts]
    run, usual = snapshots[steps[0]].copy(), cosine(work, work.steps)
    rewarming = max(1, round(work.rewarmed * work.steps))

    def rate(step: int) -> float:
        again = min(1.0, (step - steps[-1] + 1) / rewarming) if arm.rewarmed and step >= steps[-1] else 1.0
        return usual(step) * again

    for step, (_, config) in zip(steps, arm.cuts, strict=True):
        train(cell, run, step, rate, trace_steps=trace_steps(cell))
        cut(cell, run, config, fresh_moments=arm.fresh_moments)
    train(cell, run, work.steps, rate, trace_steps=trace_steps(cell))
    return run


def distill(cell: Cell, run: Run, teacher: PreTrainedModel) -> None:
    """Some more steps in which the model learns the uncut one's answers, at the asked positions."""
    work = cell.work
    first, more = run.step, round(cell.work.distilled * cell.work.steps)

    def rate(step: int) -> float:
        return work.distillation_rate * (1 + math.cos(math.pi * (step - first) / more)) / 2

    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        asked = batch["labels"][:, 1:] != NOT_ASKED
        with torch.no_grad():
            wanted = teacher(input_ids=batch["input_ids"]).logits[:, :-1][asked].log_softmax(-1)
        given = model(input_ids=batch["input_ids"]).logits[:, :-1][asked].log_softmax(-1)
        return torch.nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean")

    train(cell, run, first + more, rate, loss)
    look(cell, run)


def row_of(cell: Cell, name: str, run: Run) -> dict[str, Any]:
    """What became of an arm."""
    made = [item for item in run.cuts if item["changed"]]
    first, last = (made[0]["step"], made[-1]["step"]) if made else (0, 0)
    before, after = run.step_seconds[:first], run.step_seconds[last:]
    return {
        "arm": name,
        "loss": run.trace[-1][2],
        "accuracy": run.trace[-1][3],
        "steps": run.step,
        "state_sizes": [mixer.state_size for mixer in find_mixers(run.model).values()],
        "model": type(run.model).__name__,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "seconds": {
            "training": run.seconds,
            "before": sum(before),
            "after": sum(run.step_seconds[first:]),
            "cuts": sum(item["seconds"] for item in run.cuts),
        },
        "ms_per_step": {
            "before": 1000 * statistics.median(before) if before else None,
            "after": 1000 * statistics.median(after) if after else None,
        },
        "cuts": run.cuts,
        "trace": run.trace,
    }


# -------------------------------------------------------------------------------------------------------------- damage


def ways_to_cut(cell: Cell, thorough: bool) -> list[tuple[str, CompreSSMConfig]]:
    """The cuts whose damage is measured: the default and what it is compared with."""
    work = cell.work
    ways = [
        ("default", CompreSSMConfig(state_size=work.kept)),
        ("ghost", selection(work, "ghost")),
        ("hankel", selection(work, "hankel")),
    ]
    if cell.layout == "mamba2":
        ways += [
            ("stock", CompreSSMConfig(state_size=work.kept, realization="stock")),
            ("projected, equal r", CompreSSMConfig(state_size=[work.kept] * work.layers, realization="projected")),
        ]
    if thorough:
        ways += [(name, selection(work, name, cell.seed)) for name in CRITERIA if name not in ("ghost", "hankel")]
        ways += [("default", CompreSSMConfig(state_size=kept)) for kept in work.other_kept]
    return [("elimination" if name == "refit" else name, config) for name, config in ways]


def damage(cell: Cell, run: Run, share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What each cut alone does to a model, and each layer's error against r (spectra)."""
    thorough = share in cell.work.thorough_moments
    uncut = answer(run.model, cell.evaluation)
    started = time.process_time()
    measured = measure(run.model, cell.calibration(run.step))
    measuring = time.process_time() - started
    base, rows, spectra = score(uncut), [], []
    for name, config in ways_to_cut(cell, thorough):
        smaller = copy.deepcopy(run.model)
        started = time.process_time()
        plan = plan_compression(smaller, measured, config)
        compress_(smaller, plan)
        seconds = time.process_time() - started
        scores = score(answer(smaller, cell.evaluation), uncut)
        kept = max(config.state_size) if isinstance(config.state_size, list) else config.state_size
        rows.append(
            {"moment": share, "step": run.step, "arm": name, "kept": kept, **scores}
            | {"added": scores["loss"] - base["loss"], **outcome(plan)}
            | {"seconds": {"measure": measuring, "plan and apply": seconds}}
        )
        if (name, kept) == ("default", cell.work.kept):
            spectra += [
                {
                    "moment": share,
                    "layer": number,
                    "error_curve": layer.error_curve,
                    "hankel_values": layer.hankel_values,
                }
                for number, layer in enumerate(plan.layers.values())
            ]
    rows.append({"moment": share, "step": run.step, "arm": "uncut", "kept": cell.work.state_size, **base})
    return rows, spectra


# ------------------------------------------------------------------------------------------------------------ one cell


def run_cell(layout: str, task_name: str, seed: int, work: Work) -> dict[str, Any]:
    """Train all arms of a cell, and measure the damage of cuts on the way."""
    cell = Cell(layout, task_name, seed, work)
    started = time.process_time()
    looks, usual = trace_steps(cell), cosine(work, work.steps)
    full = start(cell, work.state_size)
    snapshots, damages, spectra = {}, [], []
    for share in sorted({*work.moments, PUBLISHED_FRACTIONS[0]}):
        train(cell, full, cell.step_of(share), usual, trace_steps=looks)
        snapshots[full.step] = full.copy()
        if share in work.moments:
            rows, curves = damage(cell, full, share)
            damages += rows
            spectra += curves

    runs = {"full": full, "small": start(cell, work.kept)}
    train(cell, runs["small"], work.steps, usual, trace_steps=looks)
    for name, arm in arms(layout, work).items():
        runs[name] = run_arm(cell, snapshots, arm)
    longer = max(1, round(runs["cut 20 %"].seconds / statistics.fmean(runs["small"].step_seconds)))
    runs["small, equal time"] = start(cell, work.kept)
    shares = tuple(max(1, round(share * longer)) for share in work.trace)
    train(cell, runs["small, equal time"], longer, cosine(work, longer), trace_steps=shares)
    if layout == "mamba2":
        runs["small projected"] = start(cell, work.kept, projected=True)
        train(cell, runs["small projected"], work.steps, usual, trace_steps=looks)
    runs["cut after"] = full.copy()
    cut(cell, runs["cut after"], CompreSSMConfig(state_size=work.kept))
    runs["cut after + distillation"] = runs["cut after"].copy()
    distill(cell, runs["cut after + distillation"], full.model)

    lengths = []
    for factor in LONGER if cell.task.longer is not None else ():
        task = cell.task.longer(factor)
        held_out = cell.evaluate_on(task, 0)
        lengths += [
            {"arm": name, "times": factor, "length": task.length, **score(answer(runs[name].model, held_out))}
            for name in TRIED_ON_LONGER
        ]
    return {
        "layout": layout,
        "task": task_name,
        "seed": seed,
        "work": json.loads(json.dumps(asdict(work))),
        "machine": describe_machine("cpu"),
        "chance": cell.task.chance,
        "arms": [row_of(cell, name, run) for name, run in runs.items()],
        "damage": damages,
        "spectra": spectra,
        "longer": lengths,
        "seconds": time.process_time() - started,
    }


# ------------------------------------------------------------------------------------------------------------- the run


def read_cells(journal: Path, work: Work | None = None) -> list[dict[str, Any]]:
    """The cells of a journal, all or those with these sizes; the last line may have been cut short."""
    cells = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:
            continue
        if work is None or cell["work"] == json.loads(json.dumps(asdict(work))):
            cells.append(cell)
    return cells


def run_jobs(run: Callable[[Job], Any], jobs: list[Job], processes: int) -> Iterator[Any]:
    """Run jobs in so many processes of one thread each; yields their results as they finish."""
    if processes == 1 or len(jobs) <= 1:
        prepare_process()
        yield from map(run, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes, initializer=prepare_process) as pool:
        yield from pool.imap_unordered(run, jobs)


def rounded(value: Any) -> Any:
    """All numbers to six digits, so that a journal stays small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def prepare_process() -> None:
    """One thread, the faster scan, and no remarks about kernels that a CPU does not have."""
    torch.set_num_threads(1)
    mambapy.pscan.pscan = SequentialScan.apply
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)


def _run_job(job: Job) -> dict[str, Any]:
    """A finished cell; or what went wrong, so that a run of hours does not end by one cell."""
    try:
        return rounded(run_cell(*job))
    except Exception:
        layout, task, seed, _ = job
        return {"layout": layout, "task": task, "seed": seed, "failed": traceback.format_exc()}


def told(cell: dict[str, Any]) -> str:
    """One line about a finished cell."""
    rows = {row["arm"]: row for row in cell["arms"]}
    losses = ", ".join(f"{name} {rows[name]['loss']:.3f}" for name in ("full", "small", "cut 20 %", "cut after"))
    return (
        f"{cell['layout']}, {cell['task']}, seed {cell['seed']}: loss {losses} (chance {cell['chance']:.3f}); "
        f"{cell['seconds']:.0f} s"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to try it out")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument(
        "--tasks", nargs="+", choices=tuple(TASKS), default=DEFAULT_TASKS, help=f"default: {' '.join(DEFAULT_TASKS)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4, with --quick 0")
    parser.add_argument("--resume", action="store_true", help="keep the finished cells, run the others")
    parser.add_argument("--tables", action="store_true", help="run nothing; make tables and pictures of the journal")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time, each on one thread")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    arguments = parser.parse_args(argv)
    name = "quick" if arguments.quick else "cpu"
    work, seeds = WORKS[name], arguments.seeds or SEEDS[name]

    arguments.output.mkdir(parents=True, exist_ok=True)
    journal = arguments.output / f"study-{name}.jsonl"
    if not arguments.tables:
        if not arguments.resume:
            journal.unlink(missing_ok=True)
        done = {(cell["layout"], cell["task"], cell["seed"]) for cell in read_cells(journal, work)}
        wanted = [(layout, task, seed) for seed in seeds for task in arguments.tasks for layout in arguments.layouts]
        started, failed = time.perf_counter(), []
        todo = [(*cell, work) for cell in wanted if cell not in done]
        for cell in run_jobs(_run_job, todo, arguments.processes):
            if "failed" in cell:
                failed.append(f"{cell['layout']}, {cell['task']}, seed {cell['seed']}")
                print(f"{failed[-1]} failed:\n{cell['failed']}", file=sys.stderr, flush=True)
                continue
            with journal.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(cell) + "\n")
            print(f"{told(cell)} ({time.perf_counter() - started:.0f} s on the clock)", file=sys.stderr, flush=True)
        if failed:
            raise SystemExit(f"{len(failed)} cells failed ({'; '.join(failed)}); --resume runs them again")
    cells = read_cells(journal, work)
    if not cells:
        raise SystemExit(f"{journal} holds no finished cell of these sizes; run the study first, without --tables")
    write_tables(cells, arguments.output, journal.stem)


if __name__ == "__main__":
    main()
