"""The small files of a checkpoint that tell of the cut: config, record, and the state of callback and Compressor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..config import CompreSSMConfig
from ..mixers import find_mixers
from ..modeling_compressm import MODEL_CLASSES, projected_class
from ..ranks import target_is_reached
from ..record import RECORD_FILE, Record
from ..schedule import cut_steps
from . import torch_files
from .work import Work

CALLBACK = "CompreSSMCallback"
TRAINER_STATE = "trainer_state.json"
# What Compressor.state_dict writes.
COMPRESSOR_KEYS = {"history", "global_step", "done_until", "stopped", "recording"}


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device, of the class that the config names, or else a causal language model.

    Raises:
        ValueError: the config names a class that neither Transformers nor this package has.
    """
    with torch.device("meta"):
        if not config.architectures:
            # A config that was saved without its model; other models' parameters have other names, and are refused.
            # Not by `from_config`: under ZeRO-3 that would shard the model, which takes all processes.
            return AutoModelForCausalLM._model_mapping[type(config)](config)
        (name,) = config.architectures
        classes = {cls.__name__: cls for cls in MODEL_CLASSES}
        cls = classes.get(name) or getattr(transformers, name, None)
        if cls is None and name.startswith("Projected"):
            # Derived on the spot from a stock class that has no projected class of its own.
            stock = getattr(transformers, name.removeprefix("Projected"), None)
            cls = None if stock is None else projected_class(stock)
        if cls is None:
            raise ValueError(
                f"the config's architectures are {config.architectures}, which Transformers has not; give the model "
                "itself as `config`"
            )
        return cls(config)


def load_config(directory: Path) -> PreTrainedConfig:
    """The config in a directory.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} has no config.json; give `config`: the model's config, its directory, or the model"
        )
    return AutoConfig.from_pretrained(directory)


def write_config(model: PreTrainedModel, directory: Path) -> None:
    """Write the config of the cut model as `save_pretrained` does, and beside it the code of a projected one."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)


def read_recorded(checkpoint: Path) -> Record:
    """A checkpoint's record; an empty one if it has none."""
    return Record.load(checkpoint) if (checkpoint / RECORD_FILE).is_file() else Record()


class TrainingState:
    """What a checkpoint knows of the schedule, and what it will say after the cut.

    Args:
        checkpoint: its directory.
        history: what its compressm.json tells.

    Attributes:
        history: the cuts that the checkpoint's model went through, the last entry being the present one.
        step: the training step of the checkpoint, or None.
    """

    def __init__(self, checkpoint: Path, history: list[dict[str, Any]]) -> None:
        self.trainer: dict[str, Any] | None = None
        self.entry: dict[str, Any] | None = None
        self.compressors: dict[str, dict[str, Any]] = {}
        self.history, self.step = history, None
        file = checkpoint / TRAINER_STATE
        if file.is_file():
            self.trainer = json.loads(file.read_text(encoding="utf-8"))
            self.step = self.trainer["global_step"]
            entry = self.trainer.get("stateful_callbacks", {}).get(CALLBACK)
            entry = entry[-1] if isinstance(entry, list) else entry
            if entry:
                self.entry = entry
                self.history = entry["attributes"]["history"]
        for file in sorted(checkpoint.glob("custom_checkpoint_*.pkl")):
            try:
                state = torch_files.load(file)
            except ValueError:
                # Another object's, which may hold anything; it is copied.
                continue
            if isinstance(state, dict) and COMPRESSOR_KEYS.issubset(state):
                self.compressors[file.name] = state
                self.history, self.step = state["history"], state["global_step"]
        self.pending = False

    def cut(self, report: dict[str, Any], work: Work) -> None:
        """Bring the schedule and the history to where a cut in process at this step would leave them."""
        done = (self.entry or {}).get("attributes", {}).get("progress", {}).get("done_until", 0)
        total = (self.trainer or {}).get("max_steps", 0)
        self.progress = {"global_step": self.step, "done_until": self.step or 0, "stopped": True, "recording": False}
        entry = {"status": "cut", "scheduled_step": self.step, **report}
        self.history = [*self.history, entry]
        if self.entry and total:
            config = CompreSSMConfig.from_dict(self.entry["args"]["config"])
            try:
                # Warm-up is not in the checkpoint; it can only move a cut to a later step.
                steps = cut_steps(config.schedule, total)
            except ValueError:
                steps = []
            entry["scheduled_step"] = max((step for step in steps if done < step <= self.step), default=self.step)
            self.progress["stopped"] = target_is_reached(config, self.history, find_mixers(work.skeleton.model_after))
            self.progress["recording"] = not self.progress["stopped"] and any(step > self.step for step in steps)
        self.pending = self.progress["recording"]

    def write(self, directory: Path, work: Work) -> list[str]:
        """Write the files that tell of the schedule; returns their names."""
        written = []
        if self.trainer is not None:
            entry = self.entry or {"args": {"config": work.skeleton.plan.config.to_dict()}, "attributes": {}}
            progress = entry["attributes"].get("progress", {}) | self.progress
            # A baseline to compare a pragmatic cut with belongs to the cut that was made.
            progress = {key: value for key, value in progress.items() if not key.startswith("baseline")}
            entry["attributes"] = {"history": self.history, "progress": progress}
            self.trainer.setdefault("stateful_callbacks", {})[CALLBACK] = entry
            text = json.dumps(self.trainer, indent=2, sort_keys=True) + "\n"
            (directory / TRAINER_STATE).write_text(text, encoding="utf-8")
            written.append(TRAINER_STATE)
        for name, state in self.compressors.items():
            torch_files.save(state | self.progress | {"history": self.history}, directory / name, work)
            written.append(name)
        return written
