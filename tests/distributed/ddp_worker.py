"""Hand-written loops and Trainers under DDP, in each of several processes; each writes what it saw.

Started by test_ddp.py under torchrun; imported by it for the same loops in one process with the doubled batch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import TINY, lively, tokens
from launch import leave
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from train_worker import digest
from trained import ADAPTED, build, state_size, sums_of, trained
from training import build_trainer, config, examples, moments, weights
from transformers import TrainerCallback

import hf_compressm.compressor
from hf_compressm import CompressionPlan, CompreSSMCallback, Compressor, find_mixers

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STEPS = 7


def counted_hook(calls, bucket):
    """The usual all-reduce, as a communication hook that notes its calls. (DDP rejects annotations that are text.)"""
    calls.append(bucket.index())
    return allreduce_hook(None, bucket)


class Loop:
    """A model of the tiny table, wrapped where there are several processes, with what training it needs."""

    def __init__(
        self,
        architecture: str = "mamba",
        *,
        pragmatic: bool = False,
        wrap: bool = True,
        cut: dict[str, Any] | None = None,
        **ddp: Any,
    ) -> None:
        self.model = build(architecture)
        # Else a step would not depend on a gradient's size, and magnify what rounding does to small ones.
        self.optimizer = torch.optim.AdamW(trained(self.model), lr=5e-3, eps=1e-3)
        several = WORLD > 1 and wrap
        self.wrapped = DistributedDataParallel(self.model, **ddp) if several else self.model
        # On few tokens, the least squares of a refit would magnify what rounding does to gradients and states.
        self.options = {"calibration_tokens": 96, "pragmatic": pragmatic, "refit_penalty": 3.0} | (cut or {})
        self.losses: list[float] = []
        self.compressor: Compressor | None = None

    def train(self, first: int = 1, last: int = STEPS, micro_batches: int = 1) -> Loop:
        if self.compressor is None:
            self.compressor = Compressor(config(**self.options), self.wrapped, self.optimizer, total_steps=STEPS)
        for step in range(first, last + 1):
            rows = tokens(8, 12, seed=step).chunk(micro_batches)
            for number, part in enumerate(rows, start=1):
                mine = part.chunk(WORLD)[RANK]
                accumulate = number < micro_batches and WORLD > 1
                with self.wrapped.no_sync() if accumulate else torch.enable_grad():
                    loss = self.wrapped.train()(input_ids=mine, labels=mine).loss / micro_batches
                    loss.backward()
                total = loss.detach() / WORLD
                if WORLD > 1:
                    dist.all_reduce(total)
                self.losses.append(total.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.compressor.step(step)
        return self

    def result(self, **more: Any) -> dict[str, Any]:
        carried = {
            f"{name} {key}": value
            for name, state in moments(self.model, self.optimizer).items()
            for key, value in state.items()
        }
        return {
            "losses": self.losses,
            "weights": digest(weights(self.model)),
            "moments": digest(carried),
            "sums": sums_of(weights(self.model) | carried),
            "state_size": min(mixer.state_size for mixer in find_mixers(self.model).values()),
            "history": [(entry["status"], entry["step"], entry["tokens"]) for entry in self.compressor.history],
            "kept": [layer["kept"] for entry in self.compressor.history for layer in entry["layers"]],
            "sizes": [mixer.state_size for mixer in find_mixers(self.model).values()],
            "refits": [layer["refit"] for entry in self.compressor.history for layer in entry["layers"]],
            "errors": [layer["relative_error"] for entry in self.compressor.history for layer in entry["layers"]],
            **more,
        }


def plain() -> dict:
    return Loop().train().result()


def mamba2() -> dict:
    return Loop("mamba2").train().result()


def find_unused_parameters() -> dict:
    return Loop(find_unused_parameters=True).train().result()


def static_graph() -> dict:
    return Loop(static_graph=True).train().result()


def views_of_small_buckets() -> dict:
    return Loop(gradient_as_bucket_view=True, bucket_cap_mb=0.002).train().result()


def accumulation() -> dict:
    return Loop().train(micro_batches=2).result()


def static_graph_with_checkpointing() -> dict:
    loop = Loop(static_graph=True)
    loop.model.gradient_checkpointing_enable()
    return loop.train().result()


def communication_hook() -> dict:
    loop, calls, per_step = Loop(), [], []
    if WORLD > 1:
        loop.wrapped.register_comm_hook(calls, counted_hook)
    for step in range(1, STEPS + 1):
        calls.clear()
        loop.train(step, step)
        per_step.append(len(calls))
    return loop.result(calls_per_step=per_step)


def taken_back(**options: Any) -> dict:
    loop = Loop(**options, pragmatic=True).train(last=5)
    small = state_size(loop.model)
    loop.compressor.take_back()
    return loop.train(first=6).result(small=small)


def loaded_from_before_the_cut(**options: Any) -> dict:
    loop = Loop(**options).train(last=2)
    saved = {name: value.clone() for name, value in loop.model.state_dict().items()}
    loop.train(first=3, last=5)
    small = state_size(loop.model)
    loop.model.load_state_dict(saved)
    loop.compressor.follow_loaded_weights()
    return loop.train(first=6).result(small=small)


PROJECTED = {"architecture": "mamba2", "cut": {"realization": "projected"}}


def projected() -> dict:
    return Loop(**PROJECTED).train().result()


def projected_by_default() -> dict:
    return Loop("mamba2", cut={"realization": "auto"}).train().result()


def projected_by_a_budget() -> dict:
    return Loop("mamba2", cut={"realization": "projected", "state_bytes": 8 * 128}).train().result()


def projected_static_graph() -> dict:
    return Loop(**PROJECTED, static_graph=True, bucket_cap_mb=0.002).train().result()


def projected_accumulation() -> dict:
    return Loop(**PROJECTED).train(micro_batches=2).result()


def projected_taken_back() -> dict:
    return taken_back(**PROJECTED)


def projected_loaded_from_before_the_cut() -> dict:
    return loaded_from_before_the_cut(**PROJECTED)


RELATIVES = ("falcon_mamba", "jamba", "zamba")


def named(loop: Callable[..., dict], architecture: str) -> Callable[[], dict]:
    """A loop of one architecture, under a name of its own."""
    of_one = functools.partial(loop, architecture)
    of_one.__name__ = f"{architecture}, {loop.__name__}"
    return of_one


def cut_once(architecture: str) -> dict:
    return Loop(architecture).train().result()


def undone(architecture: str) -> dict:
    return taken_back(architecture=architecture)


def reloaded(architecture: str) -> dict:
    return loaded_from_before_the_cut(architecture=architecture)


# Each is run in two processes and in one.
LOOPS: list[Callable[[], dict]] = [
    plain,
    mamba2,
    find_unused_parameters,
    static_graph,
    views_of_small_buckets,
    accumulation,
    static_graph_with_checkpointing,
    communication_hook,
    taken_back,
    loaded_from_before_the_cut,
    projected,
    projected_by_default,
    projected_by_a_budget,
    projected_static_graph,
    projected_accumulation,
    projected_taken_back,
    projected_loaded_from_before_the_cut,
    *(named(cut_once, name) for name in (*RELATIVES, *ADAPTED)),
    *(named(undone, name) for name in (*RELATIVES, "mamba, DoRA", "mamba2, LoRA")),
    *(named(reloaded, name) for name in ("falcon_mamba", "zamba")),
]


def low_rank_hook() -> dict:
    """PowerSGD remembers tensors of the buckets' sizes, which a cut changes."""
    loop = Loop()
    state = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=0.1)
    loop.wrapped.register_comm_hook(state, powerSGD_hook)
    loop.options["schedule"] = [5]
    loop.train(last=4)
    remembered = [error.numel() for error in state.error_dict.values()]
    loop.train(first=5)
    return loop.result(remembered=[remembered, [error.numel() for error in state.error_dict.values()]])


def uneven_tokens() -> dict:
    """One process sees half as many tokens as the other; together they have enough after the third step."""
    loop = Loop()
    settings = config(schedule=[1], calibration_tokens=3 * (48 + 24))
    loop.compressor = Compressor(settings, loop.wrapped, loop.optimizer, total_steps=STEPS)
    for step in range(1, 5):
        ids = tokens(4, 12 if RANK == 0 else 6, seed=step)
        loop.wrapped.train()(input_ids=ids, labels=ids).loss.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.compressor.step(step)
    return loop.result()


def different_plans() -> dict:
    """One process comes to another plan than the others."""
    loop = Loop().train(last=2)
    original = hf_compressm.compressor.plan_compression

    def changed(*args: Any, **kwargs: Any) -> CompressionPlan:
        plan = original(*args, **kwargs)
        return dataclasses.replace(plan, tokens=plan.tokens + RANK)

    hf_compressm.compressor.plan_compression = changed
    message = None
    try:
        loop.train(first=3, last=3)
    except RuntimeError as error:
        message = str(error)
    finally:
        hf_compressm.compressor.plan_compression = original
    return loop.result(message=message)


def refused() -> dict:
    messages = {}
    other_rule = Loop()
    other_rule.options["state_size"] = 3 + RANK
    for name, loop in {"bare": Loop(wrap=False), "other rule": other_rule}.items():
        try:
            loop.train()
        except RuntimeError as error:
            messages[name] = str(error)
    return messages


class Sizes(TrainerCallback):
    """The state size at the end of each step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.sizes.append(model.config.state_size)


def trainer_twice(directory: Path) -> dict:
    """The same Trainer trains, resumes from before the cut with larger weights, and from after it."""
    cutter, sizes = CompreSSMCallback(config(calibration_tokens=96)), Sizes()
    options = {"save_strategy": "steps", "save_steps": 2, "ddp_backend": "gloo", "data": examples(96)}
    trainer = build_trainer(lively(TINY["mamba"].build()), directory, [cutter, sizes], **options)
    digests = []
    for checkpoint in (None, "checkpoint-2", "checkpoint-6"):
        trainer.train(resume_from_checkpoint=checkpoint and str(directory / checkpoint))
        digests.append(digest(weights(trainer.model)))
    return {"weights": digests, "sizes": sizes.sizes}


def pragmatic_trainer(directory: Path) -> dict:
    """The cut makes the loss worse than a tolerance of nothing allows, or so it is told."""
    cutter, sizes = CompreSSMCallback(config(calibration_tokens=96, pragmatic=True, pragmatic_steps=2)), Sizes()
    scores = iter([1.0, 0.0])
    trainer = build_trainer(
        lively(TINY["mamba2"].build()),
        directory,
        [cutter, sizes],
        eval_dataset=examples(8),
        compute_metrics=lambda _: {"score": next(scores)},
        metric_for_best_model="score",
        ddp_backend="gloo",
        data=examples(96),
    )
    trainer.train()
    return {
        "weights": digest(weights(trainer.model)),
        "sizes": sizes.sizes,
        "status": [entry["status"] for entry in cutter.history],
    }


def main() -> None:
    output = Path(sys.argv[1])
    dist.init_process_group("gloo")
    results = {loop.__name__: loop() for loop in [*LOOPS, low_rank_hook, uneven_tokens, different_plans]}
    results["refused"] = refused()
    results["trainer_twice"] = trainer_twice(output / "twice")
    results["pragmatic_trainer"] = pragmatic_trainer(output / "pragmatic")
    (output / f"{RANK}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
