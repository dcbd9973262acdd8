"""Short runs of the stock Trainer on tiny models, and what the tests read off them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from conftest import Tiny, lively, silence_states, tokens
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compressm import CompreSSMConfig
from hf_compressm.distributed.wrappers import unwrap

# Every call of train() collects garbage, and would go through all that the libraries made when they were imported.
gc.freeze()

SILENT, KEPT = [1, 3, 4, 6], [0, 2, 5, 7]


def config(**options: Any) -> CompreSSMConfig:
    """A selection, from 8 states to 4 after step 3, decided on one batch, unless told otherwise."""
    if not options.keys() & {"tolerance", "hankel_tolerance", "state_bytes"}:
        options = {"state_size": 4} | options
    if "state_bytes" not in options and not isinstance(options.get("state_size"), list):
        options = {"realization": "stock"} | options
    return CompreSSMConfig(**({"calibration_tokens": 48, "schedule": [3]} | options))


def examples(count: int = 48, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Sequences whose second half repeats the first."""
    ids = tokens(count, length)
    ids[:, length // 2 :] = ids[:, : length // 2]
    return [{"input_ids": row, "labels": row} for row in ids]


def ragged_examples(count: int = 48) -> list[dict[str, torch.Tensor]]:
    """Sequences of 5 to 14 tokens, for `pad`."""
    return [{"input_ids": row[: 5 + 7 * number % 10]} for number, row in enumerate(tokens(count, 14))]


def pad(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad a batch on the right to its longest sequence."""
    rows = [item["input_ids"] for item in batch]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def build_trainer(
    model: nn.Module | None,
    directory: Path,
    callbacks: Iterable[TrainerCallback] = (),
    *,
    data: list[dict[str, torch.Tensor]] | None = None,
    **options: Any,
) -> Trainer:
    """A stock Trainer: 8 steps of 4 sequences, every step logged. Options are the Trainer's and TrainingArguments'."""
    names = ("eval_dataset", "data_collator", "compute_metrics", "optimizer_cls_and_kwargs", "model_init")
    of_the_trainer = {name: options.pop(name) for name in names if name in options}
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model,
        TrainingArguments(output_dir=str(directory), **(defaults | options)),
        train_dataset=examples() if data is None else data,
        callbacks=list(callbacks),
        **of_the_trainer,
    )


def silenced(tiny: Tiny, **options: Any) -> nn.Module:
    """A tiny model half of whose states do nothing: a cut to the other half changes nothing."""
    model = lively(tiny.build(**options))
    silence_states(model, SILENT)
    return model


class AtStepEnd(TrainerCallback):
    """Calls `action(model=..., optimizer=..., control=..., state=...)` at the end of some steps."""

    def __init__(self, steps: int | Iterable[int], action: Callable[..., Any]) -> None:
        self.steps, self.action = [steps] if isinstance(steps, int) else list(steps), action

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in self.steps:
            self.action(state=state, control=control, **kwargs)


def log_rows(trainer: Trainer) -> list[tuple[int, float, float, float]]:
    """Step, loss, gradient norm and learning rate of every logged step."""
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "loss" in entry]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, by their names in the bare model."""
    return {name: parameter.detach().clone() for name, parameter in unwrap(model)[0].named_parameters()}


def moments(model: nn.Module, optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of the optimizer's state tensors, by the parameters' names."""
    state = optimizer.state
    return {
        name: {key: value.clone() for key, value in state[parameter].items() if isinstance(value, torch.Tensor)}
        for name, parameter in unwrap(model)[0].named_parameters()
        if parameter in state
    }


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
