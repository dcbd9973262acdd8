"""A Compressor in hand-written loops, in each of four processes: DDP, DDP in two groups at once, and FSDP2.

Started by test_engines.py under torchrun; imported by it for the same loops in one process with all rows.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import TINY, lively, tokens
from launch import leave
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from train_worker import digest
from training import config

import hf_compressm.drive
import hf_compressm.planning
import hf_compressm.projection
import hf_compressm.statistics
from hf_compressm import Compressor
from hf_compressm.distributed.fsdp2 import full_tensor

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STEPS, CUT_AFTER, PROCESSES = 6, 3, 4
Wrap = Callable[[nn.Module], nn.Module]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Loop:
    """A training with a cut. Where it is not wrapped, one process sees the rows of all, part after part.

    Args:
        wrap: makes the wrapper.
        architecture, layers: of the model.
        length: of the rows.
        ragged: the processes' rows are of different lengths.
        forgetful: one process has recorded fewer batches than the others.
        seed: of the rows.
        group: the processes that train this model; None for all of them.
        count: how many processes that are.
        options: of the config.
    """

    def __init__(
        self,
        wrap: Wrap | None = None,
        architecture: str = "mamba",
        layers: int = 2,
        length: int = 12,
        ragged: bool = False,
        forgetful: bool = False,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        count: int = PROCESSES,
        **options: Any,
    ) -> None:
        self.several = wrap is not None and WORLD > 1
        self.length, self.ragged, self.forgetful, self.seed = length, ragged, forgetful, seed
        self.group, self.count = group, count
        self.rank = dist.get_rank(group) if self.several else 0
        self.model = lively(TINY[architecture].build(num_hidden_layers=layers))
        self.wrapped = wrap(self.model) if self.several else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        self.losses: list[float] = []
        self.sharded: list[bool] = []
        rows = CUT_AFTER * sum(part.numel() for part in self.parts(1))
        wanted = rows - (self.parts(1)[1].numel() if forgetful else 0)
        settings = config(**{"calibration_tokens": wanted, "schedule": [CUT_AFTER], "refit_penalty": 3.0} | options)
        self.compressor = Compressor(settings, self.wrapped, self.optimizer, total_steps=STEPS)

    def parts(self, step: int) -> list[torch.Tensor]:
        """The rows of each process."""
        parts = tokens(2 * self.count, self.length, seed=100 * self.seed + step).chunk(self.count)
        return (
            [part[:, : self.length - 2 * number] for number, part in enumerate(parts)] if self.ragged else list(parts)
        )

    def train(self, last: int = STEPS, first: int = 1) -> Loop:
        for step in range(first, last + 1):
            parts, total = self.parts(step), torch.zeros(())
            for part in [parts[self.rank]] if self.several else parts:
                loss = self.wrapped.train()(input_ids=part, labels=part).loss
                (loss if self.several else loss / self.count).backward()
                total += loss.detach() / self.count
            if self.several:
                dist.all_reduce(total, group=self.group)
            self.losses.append(total.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if step == 1 and self.forgetful and (self.rank == 1 or not self.several):
                del self.compressor.recorder.batches[0 if self.several else 1]
            self.compressor.step(step)
            self.sharded.append(all(isinstance(item, DTensor) for item in self.model.parameters()))
        return self

    def result(self, **more: Any) -> dict[str, Any]:
        state = self.optimizer.state
        whole = {name: full_tensor(item) for name, item in self.model.named_parameters()}
        carried = {
            f"{name} {key}": full_tensor(state[item][key])
            for name, item in self.model.named_parameters()
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
        (cut,) = self.compressor.history
        return {
            "losses": self.losses,
            "weights": digest(whole),
            "moments": digest(carried),
            "norms": {name: item.norm().item() for name, item in (whole | carried).items()},
            "cut": [cut["status"], cut["step"], cut["tokens"]],
            "kept": [layer["kept"] for layer in cut["layers"]],
            "errors": [layer["relative_error"] for layer in cut["layers"]],
            "check": [cut[name] for name in ("loss_before", "loss_after", "kl_divergence")],
            "sharded": self.sharded,
            **more,
        }


# Each is run in four processes and in one: the wrapper, and what else the loop is told.
LOOPS: dict[str, tuple[Wrap, dict[str, Any]]] = {
    "DDP": (ddp, {}),
    "DDP, ragged": (ddp, {"ragged": True, "forgetful": True}),
    "DDP, projected": (ddp, {"architecture": "mamba2", "layers": 3, "realization": "projected"}),
    "FSDP2": (fsdp2, {}),
    "FSDP2, ragged": (fsdp2, {"ragged": True}),
    "FSDP2, fewer batches": (fsdp2, {"ragged": True, "forgetful": True}),
    "FSDP2, Mamba-2, fewer batches": (fsdp2, {"architecture": "mamba2", "forgetful": True}),
    "FSDP2, projected": (fsdp2, {"architecture": "mamba2", "layers": 3, "realization": "projected"}),
}

# Two models, each trained by two of the processes, that are cut at different steps to different sizes. Only two
# processes compile, rows of few tokens: each token's step of the scan is compiled.
GROUPS: dict[str, list[dict[str, Any]]] = {
    "DDP": [
        {"seed": 7, "state_size": 4},
        {
            "seed": 2,
            "state_size": 3,
            "architecture": "mamba2",
            "layers": 3,
            "schedule": [2],
            "calibration_tokens": 48,
            "realization": "projected",
        },
    ],
    "FSDP2": [{"seed": 6, "state_size": 4}, {"seed": 5, "state_size": 3, "layers": 3, "forgetful": True}],
    "DDP, compiled": [{"layers": 1, "length": 4, "state_size": 3}],
}


def in_groups(kind: str) -> dict[str, Any] | None:
    """What the model that this process trains with another one became."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number = RANK // 2
    if number >= len(GROUPS[kind]):
        return None

    def wrap(model: nn.Module) -> nn.Module:
        if kind == "FSDP2":
            return fsdp2(model, DeviceMesh.from_group(groups[number], "cpu"))
        wrapped = DistributedDataParallel(model, process_group=groups[number])
        return torch.compile(wrapped, backend="eager") if kind == "DDP, compiled" else wrapped

    return Loop(wrap, group=groups[number], count=2, **GROUPS[kind][number]).train().result()


def one_fails() -> dict[str, Any]:
    """One process raises while it ranks its layers; all raise the same, and at the next step all cut."""
    loop = Loop(ddp).train(last=CUT_AFTER - 1)
    original, message = hf_compressm.planning.rank_states, None

    def broken(*args: Any) -> Any:
        raise ValueError("the second process stumbled")

    if RANK == 1:
        hf_compressm.planning.rank_states = broken
    try:
        loop.train(first=CUT_AFTER, last=CUT_AFTER)
    except ValueError as error:
        message = str(error)
    hf_compressm.planning.rank_states = original
    loop.compressor.cut()
    return loop.train(first=CUT_AFTER + 1).result(message=message)


@contextmanager
def counted_work() -> Iterator[dict[str, int]]:
    """Within this context, what this process does of a cut: states run through, by purpose, and layers fitted."""
    work = {"statistics": 0, "drive": 0, "projection": 0, "layers": 0}
    patch = []

    def replace(module: Any, name: str, new: Any) -> None:
        patch.append((module, name, getattr(module, name)))
        setattr(module, name, new)

    def counting(purpose: str, stream: Callable) -> Callable:
        def counted(*inputs: Any) -> Iterator[Any]:
            for start, states in stream(*inputs):
                work[purpose] += states.numel()
                yield start, states

        return counted

    def fitted(*args: Any, original: Callable = hf_compressm.planning._plan_layer) -> Any:
        work["layers"] += 1
        return original(*args)

    for purpose in ("statistics", "drive", "projection"):
        module = getattr(hf_compressm, purpose)
        replace(module, "stream_states", counting(purpose, module.stream_states))
    replace(hf_compressm.drive, "run_states", counting("drive", hf_compressm.drive.run_states))
    replace(hf_compressm.planning, "_plan_layer", fitted)
    try:
        yield work
    finally:
        for module, name, original in patch:
            setattr(module, name, original)


# With a number of layers that is no multiple of the processes: somebody has two.
WORK: dict[str, dict[str, Any]] = {
    "selection": {"layers": 5},
    "projection": {"layers": 5, "architecture": "mamba2", "realization": "projected"},
}


def work(name: str, wrap: Wrap | None) -> dict[str, int]:
    """What this process did of a cut after the third step."""
    with counted_work() as counted:
        Loop(wrap, **WORK[name]).train(last=CUT_AFTER)
    return counted


def alone(**options: Any) -> dict[str, Any]:
    """A loop in one process."""
    return Loop(**options).train().result()


def main() -> None:
    output = Path(sys.argv[1])
    dist.init_process_group("gloo")
    results: dict[str, Any] = {name: Loop(wrap, **options).train().result() for name, (wrap, options) in LOOPS.items()}
    results["one fails"] = one_fails()
    results["work"] = {name: work(name, ddp) for name in WORK}
    results["groups"] = {kind: in_groups(kind) for kind in GROUPS}
    (output / f"{RANK}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
