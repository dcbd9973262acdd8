"""Reads the mixers of models under FSDP1 between steps, and plans a cut of them; started by test_fsdp1.py."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import TINY, lively, tokens
from launch import leave
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from training import config
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer

from hf_compressm import CompressionPlan, Compressor, find_mixers, measure, plan_compression
from hf_compressm.distributed.fsdp1 import readable
from hf_compressm.replay import evaluation_mode


def train(read: bool, wrapped: set[type[nn.Module]], **options) -> dict:
    model = lively(TINY["mamba"].build())
    unwrapped = find_mixers(model)
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=wrapped)
    fsdp = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)
    optimizer = torch.optim.SGD(fsdp.parameters(), lr=0.1)
    losses, mixers = [], {}
    for step in range(4):
        if step == 2 and read:
            with evaluation_mode(fsdp):
                fsdp(input_ids=tokens(2, 9))
            for name, mixer in unwrapped.items():
                with readable(fsdp, mixer.module):
                    mixers[name] = {
                        key.replace("_fsdp_wrapped_module.", ""): item.norm().item()
                        for key, item in mixer.module.named_parameters()
                    }
        mine = tokens(8, 12, seed=step).chunk(dist.get_world_size())[dist.get_rank()]
        loss = fsdp(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "mixers": mixers}


def summary(plan: CompressionPlan) -> dict:
    layers = plan.layers.values()
    return {
        "layers": list(plan.layers),
        "kept": [layer.kept.tolist() for layer in layers],
        "errors": [layer.relative_error for layer in layers],
        "readouts": [layer.readout.flatten().tolist() for layer in layers],
        "drives": [layer.drive.flatten().tolist() for layer in layers],
        "refits": [layer.refit for layer in layers],
        "tokens": plan.tokens,
    }


def due(**options) -> dict:
    """A Compressor whose cut is due after the second step, while training goes on."""
    model = lively(TINY["mamba"].build())
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={MambaBlock})
    fsdp = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)
    optimizer = torch.optim.SGD(fsdp.parameters(), lr=0.1)
    compressor = Compressor(config(schedule=[2], calibration_tokens=192), fsdp, optimizer, total_steps=4)
    losses, reports = [], []
    for step in range(4):
        mine = tokens(8, 12, seed=step).chunk(dist.get_world_size())[dist.get_rank()]
        loss = fsdp.train()(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / dist.get_world_size()
        dist.all_reduce(total)
        losses.append(total.item())
        reports.append(compressor.step())
    return {
        "plan": summary(compressor.plan_for_checkpoint),
        "digest": compressor.plan_for_checkpoint.digest(),
        "reason": compressor.why_not_in_process,
        "reports": reports,
        "history": compressor.history,
        "state_size": model.config.state_size,
        "losses": losses,
    }


def alone() -> dict:
    """The same in one process: the plan, and the losses of a training that is not cut."""
    model = lively(TINY["mamba"].build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, plan = [], None
    for step in range(4):
        ids = tokens(8, 12, seed=step)
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1:
            statistics = measure(model, [tokens(8, 12, seed=0), tokens(8, 12, seed=1)])
            plan = summary(plan_compression(model, statistics, config()))
    return {"plan": plan, "losses": losses}


def main() -> None:
    dist.init_process_group("gloo")
    results = {}
    for name, wrapped in {
        "whole": set(),
        "blocks": {MambaBlock},
        "nested": {MambaBlock, MambaMixer},
    }.items():
        for original in (True, False):
            runs = [train(read, wrapped, use_orig_params=original) for read in (False, True)]
            results[f"{name} {original}"] = {"same": runs[0]["losses"] == runs[1]["losses"], **runs[1]}
    for original in (True, False):
        results[f"due {original}"] = due(use_orig_params=original)
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
