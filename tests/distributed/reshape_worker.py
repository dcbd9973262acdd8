"""Saves sharded checkpoints in each of two processes, cuts them on disk, and goes on from what came out.

Started by test_sharded_reshape.py under torchrun. All processes train on the same batches, so that one process alone
is the run to compare with: `alone`, which is cut in process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    load_fsdp_model,
    load_fsdp_optimizer,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from conftest import projection_plan, selection_plan, tokens
from launch import leave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trained import blocks_of
from trained import build as build_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_compressm import CompressionPlan, CompreSSMConfig, Compressor, compress_, find_mixers, write_record
from hf_compressm.reshape import reshape_checkpoint

BEFORE, AFTER = range(3), range(3, 7)
# Name → architecture, realization, engine and its options.
SCENARIOS: dict[str, tuple[str, str, str, Any]] = {
    "ddp": ("mamba", "refitted", "ddp", None),
    "fsdp2 sharded": ("mamba", "refitted", "fsdp2", "SHARDED_STATE_DICT"),
    "fsdp2 sharded projected": ("mamba2", "projected", "fsdp2", "SHARDED_STATE_DICT"),
    "fsdp2 sharded, scaled": ("falcon_mamba", "refitted", "fsdp2", "SHARDED_STATE_DICT"),
    "fsdp2 full, scaled": ("jamba", "refitted", "fsdp2", "FULL_STATE_DICT"),
    "fsdp2 full": ("mamba2", "stock", "fsdp2", "FULL_STATE_DICT"),
    "fsdp2 full projected": ("mamba2", "projected", "fsdp2", "FULL_STATE_DICT"),
    "zero-1": ("mamba", "refitted", "zero", {"stage": 1}),
    "zero-2": ("mamba2", "stock", "zero", {"stage": 2}),
    "zero-2 projected": ("mamba2", "projected", "zero", {"stage": 2}),
    "zero-1, scaled": ("falcon_mamba", "refitted", "zero", {"stage": 1}),
    "zero-2, in heads": ("zamba", "refitted", "zero", {"stage": 2}),
    "zero-3, scaled": ("jamba", "refitted", "zero", {"stage": 3}),
    "zero-3": ("mamba", "refitted", "zero", {"stage": 3}),
    "zero-3 subgroups projected": ("mamba2", "projected", "zero", {"stage": 3, "sub_group_size": 600}),
}


def build(architecture: str) -> nn.Module:
    return build_model(architecture)


def make_plan(architecture: str, realization: str) -> CompressionPlan:
    """A plan made by hand; a refitted readout mixes all of the old rows."""
    model = build(architecture)
    if realization == "projected":
        return projection_plan(model, 3)
    plan = selection_plan(model, [0, 3, 5])
    if realization == "refitted":
        generator = torch.Generator().manual_seed(1)
        for name, mixer in find_mixers(model).items():
            readout = torch.randn(mixer.groups, 3, 8, generator=generator) / 3
            object.__setattr__(plan.layers[name], "readout", readout)
    return plan


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Two groups, as many training scripts make them."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith("_projection")]
    others = [p for n, p in model.named_parameters() if p.dim() <= 1 or n.endswith("_projection")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=5e-3, eps=1e-3)


def train(model: nn.Module, optimizer: Any, steps: range, backward: Callable | None = None) -> list[float]:
    losses = []
    for step in steps:
        batch = tokens(4, 12, seed=step)
        loss = model(input_ids=batch, labels=batch).loss
        (backward or torch.Tensor.backward)(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def alone(architecture: str, realization: str, shared_steps: bool) -> list[float]:
    """The losses after a cut in process. With shared steps, new parameters count the steps of the old ones."""
    model = build(architecture).train()
    optimizer = adamw(model)
    train(model, optimizer, BEFORE)
    compress_(model, make_plan(architecture, realization), optimizer)
    if shared_steps:
        for name, parameter in model.named_parameters():
            if name.endswith("_projection"):
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(len(BEFORE))),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    return train(model, optimizer, AFTER)


def cut(source: Path, target: Path, plan: CompressionPlan, config: Any) -> nn.Module:
    """Cut a checkpoint in one process; the smaller model, with values that are yet to be loaded."""
    dist.barrier()
    if dist.get_rank() == 0:
        reshape_checkpoint(source, plan, target, config=config)
    dist.barrier()
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target)).train()


def run_ddp(directory: Path, architecture: str, plan: CompressionPlan, _: Any) -> list[float]:
    """Accelerate's save_state and load_state, with a Compressor that is registered for checkpoints."""

    def prepared(model: nn.Module) -> tuple[Accelerator, nn.Module, Any, Compressor]:
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, adamw(model))
        config = CompreSSMConfig(state_size=3, schedule=[3], calibration_tokens=10**6)
        compressor = Compressor(config, model, optimizer, total_steps=7, accelerator=accelerator)
        accelerator.register_for_checkpointing(compressor)
        return accelerator, model, optimizer, compressor

    accelerator, model, optimizer, compressor = prepared(build(architecture).train())
    train(model, optimizer, BEFORE, accelerator.backward)
    compressor.global_step = len(BEFORE)
    accelerator.save_state(str(directory / "full"))
    # These groups are not the Trainer's: the file alone would not tell whose moments are where.
    write_record([], directory / "full", compressor.optimizer_parameters)
    config = accelerator.unwrap_model(model).config
    cut(directory / "full", directory / "small", plan, config)
    # The script builds the full-size model, which takes on the size of what it loads.
    accelerator, model, optimizer, compressor = prepared(build(architecture).train())
    accelerator.load_state(str(directory / "small"))
    assert [entry["status"] for entry in compressor.history] == ["cut"]
    assert compressor.stopped and compressor.global_step == 3 and not compressor.pending
    return train(model, optimizer, AFTER, accelerator.backward)


def run_fsdp2(directory: Path, architecture: str, plan: CompressionPlan, kind: str) -> list[float]:
    """What Accelerate writes and reads for FSDP2, on torch's own fully_shard: on CPU, Accelerate would use DDP."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    rank = dist.get_rank()
    accelerator = SimpleNamespace(
        num_processes=dist.get_world_size(),
        process_index=rank,
        is_fsdp2=True,
        is_main_process=rank == 0,
        wait_for_everyone=dist.barrier,
    )

    def sharded(model: nn.Module) -> tuple[nn.Module, torch.optim.AdamW]:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in blocks_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, adamw(model)

    full = build(architecture).train()
    config = full.config.__class__.from_dict(full.config.to_dict())
    model, optimizer = sharded(full)
    train(model, optimizer, BEFORE)
    folder = str(directory / "full")
    save_fsdp_model(plugin, accelerator, model, folder)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    model, optimizer = sharded(cut(directory / "full", directory / "small", plan, config))
    folder = str(directory / "small")
    load_fsdp_model(plugin, accelerator, model, folder)
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    return train(model, optimizer, AFTER)


def run_zero(directory: Path, architecture: str, plan: CompressionPlan, zero: dict[str, Any]) -> list[float]:
    """DeepSpeed's own engine, which the Trainer and Accelerate use."""
    import deepspeed

    def engine_of(model: nn.Module) -> Any:
        settings = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        return deepspeed.initialize(model=model, optimizer=adamw(model), config=settings)[0]

    def steps(engine: Any, which: range) -> list[float]:
        losses = []
        for step in which:
            batch = tokens(4, 12, seed=step)
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    model = build(architecture).train()
    engine = engine_of(model)
    steps(engine, BEFORE)
    engine.save_checkpoint(str(directory / "full"))
    small = cut(directory / "full", directory / "small", plan, model.config)
    engine = engine_of(small)
    engine.load_checkpoint(str(directory / "small"))
    return steps(engine, AFTER)


def bf16_weights(directory: Path) -> list[str]:
    """The parameters whose fp32 weights, or those in bf16 beside them, are not right; DeepSpeed's tool reads them."""
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model, plan = build("mamba").train(), make_plan("mamba", "refitted")
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = deepspeed.initialize(model=model, optimizer=adamw(model), config=settings)[0]
    batch = tokens(4, 12)
    engine.backward(engine(input_ids=batch, labels=batch).loss)
    engine.step()
    engine.save_checkpoint(str(directory / "full"))
    cut(directory / "full", directory / "small", plan, model.config)
    full, small = (get_fp32_state_dict_from_zero_checkpoint(str(directory / name)) for name in ("full", "small"))
    in_process = build("mamba")
    in_process.load_state_dict(full)
    compress_(in_process, plan)
    (file,) = (directory / "small").glob("*/mp_rank_00_model_states.pt")
    rounded = torch.load(file, weights_only=True)["module"]
    return [
        name
        for name, weight in in_process.state_dict().items()
        if not torch.equal(small[name], weight) or not torch.equal(rounded[name], weight.bfloat16())
    ]


def main() -> None:
    output = Path(sys.argv[1])
    PartialState(cpu=True)
    engines = {"ddp": run_ddp, "fsdp2": run_fsdp2, "zero": run_zero}
    results = {}
    for name, (architecture, realization, engine, options) in SCENARIOS.items():
        directory = output / name
        results[name] = engines[engine](directory, architecture, make_plan(architecture, realization), options)
    results["wrong in bf16"] = bf16_weights(output / "bf16")
    (output / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
    leave()
