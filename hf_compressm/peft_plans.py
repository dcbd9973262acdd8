"""The plans of the cuts that a PEFT model went through: an adapter fits its base only after the same cuts.

PEFT saves adapters, not the base. So a `PeftModel` that is cut keeps the plan, and whoever saves it (the Trainer,
`save_pretrained`, `push_to_hub`) saves its plans, too. Where the model is not PEFT's, nothing here does anything.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from .distributed.wrappers import is_kind
from .plan import CompressionPlan

logger = logging.get_logger(__name__)

PLAN_FILE = "compressm_plan_{number}.json"
HOW_TO_LOAD = (
    "Adapters that were trained across a cut go with a base that was cut in the same way: build the model by "
    "hf_compressm.load_compressed_peft(base, checkpoint, is_trainable=True), with the original base, and go on then"
)
# Initialisations of LoRA that take the adapter's first values out of the base's weights.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_peft_model(model: nn.Module) -> bool:
    """Whether a bare model is one of PEFT's."""
    return is_kind(model, "PeftModel")


def is_adapter_weight(name: str) -> bool:
    """Whether a name in a state dictionary is that of an adapter's weight, not of the base's."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def plans_of(model: nn.Module) -> list[CompressionPlan]:
    """The plans that made a PEFT model's base what it is, in order."""
    return vars(model).get("compressm_plans", [])


def remember_plan(model: nn.Module, plan: CompressionPlan) -> None:
    """Let a PEFT model keep the plan of a cut, and save it with its adapters."""
    if not is_peft_model(model):
        return
    if "compressm_plans" not in vars(model):
        model.compressm_plans = []
        model.save_pretrained = functools.partial(_save_with_plans, model)
        for adapter, config in model.peft_config.items():
            if changes_the_base(config):
                logger.warning(
                    f"adapter {adapter!r} was made by init_lora_weights={config.init_lora_weights!r}, which took its "
                    "first values out of the base's weights: it cannot be put back on the original base after this "
                    "cut; save the model that merge_and_unload() returns"
                )
    model.compressm_plans.append(plan)


def forget_plan(model: nn.Module) -> None:
    """Let a PEFT model forget the plan of the last cut, which was taken back."""
    if plans_of(model):
        model.compressm_plans.pop()


def changes_the_base(config: Any) -> bool:
    """Whether an adapter with this PEFT config was made at the cost of the base's weights."""
    return str(getattr(config, "init_lora_weights", "")).lower().startswith(CHANGES_THE_BASE)


def _save_with_plans(model: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        save_plans(model, save_directory)


def save_plans(model: nn.Module, directory: str | Path) -> None:
    """Write a PEFT model's plans as `compressm_plan_1.json`, ... each with its safetensors file beside it."""
    plans = plans_of(model)
    for number, plan in enumerate(plans, start=1):
        plan.save(Path(directory) / PLAN_FILE.format(number=number))
    for file in itertools.takewhile(Path.exists, _files(directory, len(plans) + 1)):
        file.unlink()
        file.with_suffix(".safetensors").unlink(missing_ok=True)


def load_plans(directory: str | Path) -> list[CompressionPlan]:
    """The plans that `save_plans` wrote, in order; none if there are no such files.

    Raises:
        FileNotFoundError: one of a plan's two files is missing.
        ValueError: a file is truncated, edited, or not a plan.
    """
    return [CompressionPlan.load(file) for file in itertools.takewhile(Path.exists, _files(directory, 1))]


def _files(directory: str | Path, first: int) -> Any:
    return (Path(directory) / PLAN_FILE.format(number=number) for number in itertools.count(first))
