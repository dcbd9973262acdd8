"""Reads the mixers of models under FSDP1 in the middle of training; started by test_fsdp1.py under torchrun."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import TINY, lively, tokens
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer

from hf_compressm import find_mixers
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
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
