"""Trains tiny models with a cut, in each of several processes, and writes what each process saw.

Started by test_training.py, under torchrun and, as the run to compare with, in one process.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import TINY, lively
from launch import leave
from torch.nn.parallel import DistributedDataParallel
from trained import state_sizes
from training import build_trainer, config, examples, moments, pad, ragged_examples, weights
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# Options of the Trainer for each scenario; batches are per process.
SCENARIOS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {}),
    "static": ("mamba", {"ddp_find_unused_parameters": False, "gradient_checkpointing": True}),
    "accumulation": ("mamba", {"gradient_accumulation_steps": 2}),
    # The processes pad their halves of a batch to different lengths.
    "ragged": ("mamba2", {"data": ragged_examples(96), "data_collator": pad}),
    "compiled": ("mamba", {"torch_compile": True, "torch_compile_backend": "eager"}),
    "projected": ("mamba2", {"cut": {"realization": "projected"}, "weight_decay": 0.1}),
}


class StaysWrapped(TrainerCallback):
    """The DDP object is the same one all the way: the training loop holds it."""

    def on_step_end(self, args, state, control, **kwargs):
        if WORLD > 1:
            wrapped = getattr(self.trainer.model_wrapped, "_orig_mod", self.trainer.model_wrapped)
            assert isinstance(wrapped, DistributedDataParallel)
            self.seen = getattr(self, "seen", wrapped)
            assert self.seen is wrapped


class PoisonOneRank(TrainerCallback):
    """Before the cut, the states of one process become not a number."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and RANK == WORLD - 1:
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def train(directory: Path, architecture: str = "mamba", resume: str | None = None, extra=(), **options: Any) -> dict:
    """One run; what this process saw of it."""
    model = lively(TINY[architecture].build())
    # On few tokens, the least squares of a refit would magnify what rounding does to gradients and states.
    cut = {"calibration_tokens": 96, "refit_penalty": 3.0} | options.pop("cut", {})
    cutter, wrapped = CompreSSMCallback(config(**cut)), StaysWrapped()
    per_process = 8 // WORLD // options.get("gradient_accumulation_steps", 1)
    defaults = {"per_device_train_batch_size": per_process, "data": examples(96)}
    if WORLD > 1:
        defaults["ddp_backend"] = "gloo"
    trainer = build_trainer(model, directory, [*extra, cutter, wrapped], **(defaults | options))
    wrapped.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    carried = moments(model, trainer.optimizer)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "sizes": state_sizes(model),
        "state_size": model.config.state_size,
        "status": [entry["status"] for entry in cutter.history],
        "kept": [layer["kept"] for entry in cutter.history for layer in entry.get("layers", [])],
        "relative_error": [layer["relative_error"] for entry in cutter.history for layer in entry.get("layers", [])],
        "weights": digest(weights(model)),
        "moments": digest({f"{name} {key}": value for name, state in carried.items() for key, value in state.items()}),
    }


def main() -> None:
    output = Path(sys.argv[1])
    results = {
        name: train(output / name, architecture, **options) for name, (architecture, options) in SCENARIOS.items()
    }
    if WORLD > 1:
        results["poisoned"] = train(output / "poisoned", extra=[PoisonOneRank()], max_steps=4)
        saved = output / "saved"
        results["uninterrupted"] = train(saved, save_strategy="steps", save_steps=2)
        for step in (2, 4):
            results[f"resumed from {step}"] = train(saved, resume=str(saved / f"checkpoint-{step}"))
        saved, cut = output / "saved projected", {"realization": "projected"}
        results["uninterrupted projected"] = train(saved, "mamba2", cut=cut, save_strategy="steps", save_steps=2)
        for step in (2, 4):
            checkpoint = str(saved / f"checkpoint-{step}")
            results[f"resumed projected from {step}"] = train(saved, "mamba2", checkpoint, cut=cut)
    (output / f"{WORLD}-{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    if WORLD > 1:
        leave()
