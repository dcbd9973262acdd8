"""What a model remembers of its cuts: its record and its plans. Whoever saves or pushes the model saves them, too.

`compress_` puts them on the model. A base under PEFT's adapters is not saved with them: it needs its plans to be cut
in the same way again. Anybody else can see by them what was cut, and replay it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from .cards import TAGS
from .hub import push_compressed
from .peft_adapters import changes_the_base, is_peft_model
from .plan import CompressionPlan
from .record import RECORD_FILE, Record, library_versions

logger = logging.get_logger(__name__)

PLAN_FILE = "compressm_plan_{number}.json"


def record_of(model: nn.Module) -> Record:
    """What a bare model remembers of its cuts; of a model that was never cut, an empty record.

    Fill in its `run` and `evaluations` before you save the model, and they are saved with it.

    Example:
        >>> import torch
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> from hf_compressm import CompreSSMConfig, compress
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=8, num_hidden_layers=1))
        >>> report = compress(model, [torch.arange(8).repeat(4, 1)], CompreSSMConfig(state_size=2))
        >>> record_of(model).cuts[0]["layers"][0]["state_size_after"]
        2
    """
    return vars(model).get("compressm_record") or Record(versions=library_versions())


def plans_of(model: nn.Module) -> list[CompressionPlan]:
    """The plans of the cuts that made a bare model what it is, in order; not of those taken back."""
    return [plan for cut, plan in vars(model).get("compressm_plans", []) if cut["status"] == "cut"]


def start_record(model: nn.Module) -> Record:
    """Give a bare model a record to be filled in, if it has none; it is saved from its first cut on."""
    return vars(model).setdefault("compressm_record", record_of(model))


def remember_cut(model: nn.Module, plan: CompressionPlan, cut: dict[str, Any]) -> None:
    """Let a bare model keep the record and the plan of a cut.

    Args:
        model: the bare model.
        plan: of the cut.
        cut: its entry in a history; what is changed in it later is remembered.
    """
    recall(model, record_of(model), [*vars(model).get("compressm_plans", []), (cut, plan)])
    record_of(model).cuts.append(cut)
    if is_peft_model(model):
        for adapter, config in model.peft_config.items():
            if changes_the_base(config):
                logger.warning(
                    f"adapter {adapter!r} was made by init_lora_weights={config.init_lora_weights!r}, which took its "
                    "first values out of the base's weights: it cannot be put back on the original base after this "
                    "cut; save the model that merge_and_unload() returns"
                )


def recall(model: nn.Module, record: Record, plans: list[tuple[dict[str, Any], CompressionPlan]]) -> None:
    """Let a bare model remember a record, and each plan with its cut's entry there.

    The base of a PEFT model remembers them, too: `merge_and_unload()` returns that.
    """
    model.compressm_record, model.compressm_plans = record, plans
    if hasattr(model, "save_pretrained"):
        theirs = vars(model).get("save_pretrained")
        if not (isinstance(theirs, functools.partial) and theirs.func is _save_with_record):
            model.save_pretrained = functools.partial(_save_with_record, model, theirs)
        model.push_to_hub = functools.partial(push_compressed, model)
    if hasattr(model, "add_model_tags"):
        model.add_model_tags(TAGS)
    if is_peft_model(model):
        recall(model.get_base_model(), record, plans)


def _save_with_record(
    model: nn.Module, theirs: Callable[..., None] | None, save_directory: str | Path, *args: Any, **kwargs: Any
) -> None:
    """Save a model by its class's method, or by the one that somebody put on the model before."""
    save = functools.partial(type(model).save_pretrained, model) if theirs is None else theirs
    push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
    save(save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True) and record_of(model).made_cuts:
        save_provenance(model, save_directory)
        if push:
            push_compressed(save_directory, repo_id or Path(save_directory).name, token=kwargs.get("token"))


def save_provenance(
    model: nn.Module, directory: str | Path, optimizer_parameters: list[list[str]] | None = None
) -> None:
    """Write a bare model's `compressm.json` and its plans (`compressm_plan_1.json`, ... each with a safetensors file).

    Args:
        model: what it remembers is written; without a cut, a record with no cuts.
        directory: where the model is saved; plans of more cuts, of an earlier save, are removed.
        optimizer_parameters: as in `Record`.
    """
    record, plans = record_of(model), plans_of(model)
    cuts = record.cuts if record.made_cuts else []
    dataclasses.replace(record, cuts=cuts, optimizer_parameters=optimizer_parameters).save(directory)
    for number, plan in enumerate(plans, start=1):
        plan.save(Path(directory) / PLAN_FILE.format(number=number))
    for file in itertools.takewhile(Path.exists, _plan_files(directory, len(plans) + 1)):
        file.unlink()
        file.with_suffix(".safetensors").unlink(missing_ok=True)


def recall_from(model: nn.Module, directory: str | Path, history: list[dict[str, Any]] | None = None) -> None:
    """Let a bare model remember what `save_provenance` wrote into a directory, if there is anything.

    Args:
        model: the model whose weights were loaded from there.
        directory: of a checkpoint.
        history: of the run that goes on; it takes the place of the record's cuts.
    """
    if not (Path(directory) / RECORD_FILE).is_file():
        return
    record = Record.load(directory)
    if history is not None:
        record.cuts = list(history)
    if record.made_cuts:
        # Of a checkpoint without plans (an older one), the record alone is remembered.
        recall(model, record, list(zip(record.made_cuts, load_plans(directory), strict=False)))
    else:
        model.compressm_record = record


def load_plans(directory: str | Path) -> list[CompressionPlan]:
    """The plans that `save_provenance` wrote, in order; none if there are no such files.

    Raises:
        FileNotFoundError: one of a plan's two files is missing.
        ValueError: a file is truncated, edited, or not a plan.
    """
    return [CompressionPlan.load(file) for file in itertools.takewhile(Path.exists, _plan_files(directory, 1))]


def _plan_files(directory: str | Path, first: int) -> Iterator[Path]:
    return (Path(directory) / PLAN_FILE.format(number=number) for number in itertools.count(first))
