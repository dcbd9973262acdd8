"""A harness that breaks a training run with a cut at any stage of it, lets the run end, and resumes it.

Processes are forked from the test's own, so that a run takes a second instead of ten: real processes with gloo between
them, and a real SIGKILL. Like torchrun, the harness kills what is left once a process has died.

    make fault-table      # runs the whole matrix, and prints the two tables of recipes/README.md
"""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import TINY, lively
from pretrain_lm import last_checkpoint
from tqdm.auto import tqdm
from train_worker import digest
from training import build_trainer, config, examples, moments, weights
from transformers import Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, read_record
from hf_compressm.record import RECORD_FILE

WORLD = 2
STEPS = 6
# A run takes about a second; processes that wait for one that is gone must not wait for ever.
PATIENCE = 60
FORK = multiprocessing.get_context("fork")

# Stage of a cut → the function in which it is broken, at which of its calls, and in which process if it is only one:
# what only the first one writes, only the first one can fail at. The cut comes after step 3, so calls of the functions
# that write a checkpoint are those for step 2, step 4 and step 6.
STAGES: dict[str, tuple[str, int, int]] = {
    "statistics": ("hf_compressm.statistics:StateStatistics.update", 2, 1),
    "ranking": ("hf_compressm.planning:_rank", 1, 1),
    "fit": ("hf_compressm.planning:_plan_layer", 1, 1),
    "exchange of the plan": ("hf_compressm.planning:_joined", 1, 1),
    "surgery": ("hf_compressm.surgery:smaller_values", 2, 1),
    "optimizer": ("hf_compressm.surgery:replace_parameter", 2, 1),
    "wrapper": ("hf_compressm.surgery:rebuild_reducer", 1, 1),
    "comparison afterwards": ("hf_compressm.compressor:compare_outputs", 2, 1),
    "weights being saved": ("transformers:Trainer._save_optimizer_and_scheduler", 2, 0),
    "inputs being saved": ("hf_compressm.callback:save_inputs", 1, 1),
    "record being saved": ("hf_compressm.callback:save_provenance", 2, 0),
    "inputs": ("hf_compressm.compressor:Compressor.step", 3, 1),
}
WRITING = ("weights being saved", "inputs being saved", "record being saved")


@dataclass
class Fault:
    """What happens at a stage, in one process or in all: kill, raise, disk full, NaN or no tokens."""

    kind: str
    where: str
    stage: str

    def arm(self, rank: int) -> None:
        """Let it happen in this process."""
        path, at_call, victim = STAGES[self.stage]
        if self.where == "one" and rank != victim:
            return
        module, names = path.split(":")
        owner: Any = importlib.import_module(module)
        *parents, name = names.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original, calls = getattr(owner, name), 0

        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at_call:
                self.happen(*args)
            return original(*args, **kwargs)

        setattr(owner, name, broken)

    def happen(self, *args: Any) -> None:
        if self.kind == "NaN":
            args[2].fill_(torch.nan)
            return
        if self.kind == "no tokens":
            args[0].recorder.batches.clear()
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ValueError("this process fails on purpose")


class Watch(TrainerCallback):
    """Notes the state size after each step; a cut that failed must have left nothing behind."""

    def __init__(self) -> None:
        self.model = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.model, self.optimizer = model, optimizer


def train(directory: Path, calibration_tokens: int = 96) -> dict[str, Any]:
    """The script that a user would start again: it goes on from the last complete checkpoint."""
    cutter, watch = CompreSSMCallback(config(calibration_tokens=calibration_tokens)), Watch()
    trainer: Trainer = build_trainer(
        lively(TINY["mamba"].build()),
        directory,
        [cutter, watch],
        data=examples(64),
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=2,
        ddp_backend="gloo",
    )
    checkpoint = last_checkpoint(str(directory))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        size = None if watch.model is None else watch.model.config.state_size
        (directory / f"size-{os.environ['RANK']}.json").write_text(json.dumps(size))
    carried = moments(trainer.model, trainer.optimizer)
    return {
        "resumed from": checkpoint and Path(checkpoint).name,
        "weights": digest(weights(trainer.model)),
        "moments": digest({f"{n} {key}": v for n, state in carried.items() for key, v in state.items()}),
        "history": [(entry["status"], entry["step"]) for entry in cutter.history],
        "log": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def _process(rank: int, port: int, target: Callable[[], dict], fault: Fault | None, output: Path) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ |= {key: str(value) for key, value in environment.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = (output / f"printed-{rank}.txt").open("w")
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    try:
        if fault is not None:
            fault.arm(rank)
        result = target()
    except Exception as error:
        result = {"error": [type(error).__name__, str(error)]}
        traceback.print_exc()
    (output / f"result-{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    # No clean-up: a process group with a dead member could wait.
    os._exit(1 if "error" in result else 0)


@dataclass
class Ended:
    """How a run of all processes ended.

    Attributes:
        results: what each process returned, {"error": [class, message]} if it raised, None if it was killed.
        by_themselves: whether all processes ended without being killed by the harness.
        seconds: until the last one had ended.
    """

    results: list[dict[str, Any] | None]
    by_themselves: bool
    seconds: float

    @property
    def errors(self) -> list[list[str] | None]:
        return [(result or {}).get("error") for result in self.results]


def run(target: Callable[[], dict], output: Path, fault: Fault | None = None) -> Ended:
    """Run a function in all processes, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for file in output.glob("result-*.json"):
        file.unlink()
    start = time.monotonic()
    processes = [
        FORK.Process(target=_process, args=(rank, port, target, fault, output), daemon=True) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.1, PATIENCE - (time.monotonic() - start)))
    waiting = [process for process in processes if process.is_alive()]
    for process in waiting:
        process.kill()
        process.join()
    files = [output / f"result-{rank}.json" for rank in range(WORLD)]
    results = [json.loads(file.read_text()) if file.is_file() else None for file in files]
    return Ended(results, not waiting, time.monotonic() - start)


@dataclass
class Outcome:
    """What became of a broken run and of the run that went on from it; a row of the table."""

    stage: str
    fault: str
    ended: Ended
    state_sizes: list[int | None]
    left: list[str]
    resumed: Ended
    equal: bool

    def row(self) -> list[str]:
        first = next((error for error in self.ended.errors if error), None)
        if not self.ended.by_themselves:
            end = "HANGS"
        elif self.fault.startswith("raise") and len({str(error) for error in self.ended.errors}) == 1:
            end = "all processes raise the same error"
        elif first is None:
            end = "killed"
        else:
            end = "the others raise" if None in self.ended.results else "all processes raise"
        unchanged = {8: "uncut", 4: "cut"}
        sizes = {unchanged[size] for size in self.state_sizes if size is not None} or {"gone"}
        after = f"resumes from {self.resumed.results[0].get('resumed from')}" if self.resumed.results[0] else "FAILS"
        return [self.stage, self.fault, end, " and ".join(sorted(sizes)), after, "equal" if self.equal else "DIFFERS"]


HEADER = [
    "stage",
    "fault",
    "how the run ends",
    "model in memory",
    "the same command again",
    "against the unbroken run",
]


ODD_HEADER = ["one process of two is odd", "what becomes of the cut after step 3"]


def unbroken(directory: Path) -> Ended:
    return run(lambda: train(directory), directory)


def break_and_resume(fault: Fault, directory: Path, expected: Ended) -> Outcome:
    """One cell of the matrix."""
    ended = run(lambda: train(directory), directory, fault)
    sizes = []
    for rank in range(WORLD):
        file = directory / f"size-{rank}.json"
        sizes.append(json.loads(file.read_text()) if file.is_file() else None)
    left = unreadable(directory)
    resumed = run(lambda: train(directory), directory)
    same = ("weights", "moments", "history")
    equal = all(
        result is not None and all(result.get(key) == whole[key] for key in same)
        for result, whole in zip(resumed.results, expected.results, strict=True)
    )
    return Outcome(fault.stage, f"{fault.kind} {fault.where}", ended, sizes, left, resumed, equal)


def unreadable(directory: Path) -> list[str]:
    """Files of this package in checkpoints that are half-written, or were left behind."""
    bad = [str(file) for file in directory.rglob("*.tmp*")]
    for checkpoint in directory.glob("checkpoint-*"):
        if (checkpoint / RECORD_FILE).exists():
            try:
                read_record(checkpoint)
            except ValueError as error:
                bad.append(str(error))
    return bad


def matrix() -> list[Fault]:
    """Every stage with every fault that it can have."""
    faults = []
    for stage in STAGES:
        if stage != "inputs":
            faults += [Fault("kill", "one", stage), Fault("kill", "all", stage), Fault("raise", "one", stage)]
        if stage in WRITING:
            faults.append(Fault("disk full", "one", stage))
    return faults


ODDITIES = {
    "states of one process are not a number": (Fault("NaN", "one", "statistics"), 96),
    "one process has no tokens in the window, the other has too few": (Fault("no tokens", "one", "inputs"), 96),
    "one process has no tokens in the window, the other has enough": (Fault("no tokens", "one", "inputs"), 24),
}


def odd_row(name: str, ended: Ended) -> list[str]:
    """What becomes of a run in which one process is unlike the others; nothing breaks there."""
    first, second = ended.results
    if "error" in first or "error" in second:
        return [name, f"FAILS: {ended.errors}"]
    outcome = " and ".join(f"{status} at step {step}" for status, step in first["history"]) or "nothing is cut"
    same = all(first[key] == second[key] for key in ("weights", "moments", "history"))
    return [name, f"{outcome}, {'the same on both' if same else 'DIFFERENT ON THE TWO'}"]


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (whole := Path(folder) / "whole").mkdir()
        expected = unbroken(whole)
        rows, odd_rows = [], []
        for number, fault in enumerate(tqdm(matrix())):
            (directory := Path(folder) / str(number)).mkdir()
            rows.append(break_and_resume(fault, directory, expected).row())
        for number, (name, (fault, tokens)) in enumerate(ODDITIES.items()):
            (directory := Path(folder) / f"odd-{number}").mkdir()
            odd_rows.append(odd_row(name, run(lambda: train(directory, tokens), directory, fault)))  # noqa: B023
    print(table(HEADER, rows), table(ODD_HEADER, odd_rows), sep="\n\n")


if __name__ == "__main__":
    main()
