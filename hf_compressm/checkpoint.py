"""Checkpoints across a cut: load one of either size, and the record and inputs that lie beside the weights."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from .distributed.fsdp2 import shapes_in_checkpoint
from .distributed.processes import all_processes
from .files import write_file
from .mixers import Mixer, find_mixers, layers_by_config, mamba2
from .mixers.resize import ParameterPairs, resize_mixer, update_configs
from .modeling_compressm import PROJECTIONS
from .optimizer import follow_resize, unwrap_optimizer
from .peft_adapters import HOW_TO_LOAD, is_adapter_weight

logger = logging.get_logger(__name__)

INPUTS_FILE = "compressm_inputs_{rank}.safetensors"

# Called with the mixer and the parameters that a resize replaced, added and removed.
OnResize = Callable[[Mixer, ParameterPairs], None]


# One hook per mixer: a later call of resize_while_loading takes the place of an earlier one.
_LOAD_HOOKS: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


def resize_while_loading(model: nn.Module, on_resize: OnResize | None = None) -> None:
    """Let `load_state_dict` of a model take weights of another state size: each mixer then takes on the weights' size.

    A training script builds the full-size model; a checkpoint written after a cut is smaller, and may be projected.
    With this, the one loads the other, in either direction, and the config follows. Weights of the mixer's own size
    and form change nothing.

    Args:
        model: the bare model.
        on_resize: called for each mixer that was resized, with the parameters that were replaced, added and removed.
    """
    stop_resizing_while_loading(model)
    for mixer in find_mixers(model).values():
        # Of what was found here nothing is kept: a copy of the model then has hooks that look at the copy.
        hook = functools.partial(_resize_to_incoming, model, on_resize, set())
        _LOAD_HOOKS[mixer.module] = mixer.module.register_load_state_dict_pre_hook(hook)


def resize_to_checkpoint(model: nn.Module, directory: str | Path) -> None:
    """Give a model the state size that a checkpoint's config tells, before the model is sharded and loaded.

    Args:
        model: the bare model; its weights lose their values where sizes differ.
        directory: of the checkpoint; without a config.json nothing is done.
    """
    if not (Path(directory) / "config.json").is_file():
        return
    saved = AutoConfig.from_pretrained(directory)
    for names in layers_by_config(mixers := find_mixers(model)):
        together = [mixers[name] for name in names]
        if together[0].config is not model.config:
            continue
        size = getattr(saved, together[0].architecture.state_size_field, None)
        sizes = getattr(saved, "state_ranks", None) or [size] * len(together)
        for mixer, size in zip(together, sizes, strict=True):
            if size is not None:
                resize_mixer(mixer, size, getattr(saved, "feature_size", None))
    update_configs(model)


def resize_to_shards(model: nn.Module, directory: str | Path, optimizer: Optimizer | None = None) -> None:
    """Give a model that `fully_shard` was applied to the state sizes of the checkpoint that it is about to load.

    Its weights are loaded into shards of the sizes that it has, and parameters that it lacks would be left out without
    an error. A collective: all processes must call it.

    Args:
        model: the bare model; weights lose their values where sizes differ.
        directory: of a checkpoint that Accelerate or the Trainer saved under FSDP; else nothing is done.
        optimizer: the optimizer that trains the model; it is loaded after this.
    """
    processes = all_processes()
    shapes = shapes_in_checkpoint(directory) if processes.is_main else {}
    shapes = json.loads(processes.all_gather(json.dumps(shapes).encode())[0])
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def follow(mixer: Mixer, pairs: ParameterPairs) -> None:
        if optimizer is not None:
            follow_resize(unwrap_optimizer(optimizer), model, mixer.module, pairs)

    for name, mixer in find_mixers(model).items():
        _resize_to_incoming(model, follow, set(), mixer.module, weights, f"{name}.")


def stop_resizing_while_loading(model: nn.Module) -> None:
    """Undo `resize_while_loading`: weights of another size are an error again."""
    for module in model.modules():
        handle = _LOAD_HOOKS.pop(module, None)
        if handle is not None:
            handle.remove()


def _resize_to_incoming(
    model: nn.Module,
    on_resize: OnResize | None,
    seen: set[str],
    module: nn.Module,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    *_: Any,
) -> None:
    mixer = next(mixer for mixer in find_mixers(model).values() if mixer.module is module)
    # A checkpoint of several files comes in parts, in any order: a projected mixer is only taken for a stock one when
    # all of a stock mixer's parameters came without a projection.
    names = {name for name, _ in module.named_parameters()}.difference(PROJECTIONS)
    incoming = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
    seen |= incoming
    whole = names <= seen
    without_projection = names <= incoming or (whole and not seen.intersection(PROJECTIONS))
    if whole:
        seen.clear()

    projection = next((state_dict[f"{prefix}{name}"] for name in PROJECTIONS if name in incoming), None)
    if projection is not None and projection.dim() == 2 and mixer.can_be_projected:
        features = projection.shape[0]
        size = projection.shape[1] // mixer.groups
        fits = projection.shape[1] % mixer.groups == 0 and features == mamba2.feature_size(module)
        # Of a stock cut that came first, the features are fewer than the model was built with.
        fits = fits or (not mixer.is_projected and _incoming_size(mixer, state_dict, prefix) == features)
    else:
        features, size = None, _incoming_size(mixer, state_dict, prefix)
        if mixer.is_projected:
            size = (size or mamba2.feature_size(module)) if without_projection else None
        fits = size is not None
    # Weights that belong to no one state size are left to load_state_dict's own error.
    if not fits or (size == mixer.state_size and (features is not None) == mixer.is_projected):
        return
    if all(map(is_adapter_weight, incoming)):
        raise RuntimeError(
            f"layer {mixer.name}: the adapters that are to be loaded were saved at state_size {size}, but the base "
            f"model has {mixer.state_size}. {HOW_TO_LOAD}"
        )
    pairs = resize_mixer(mixer, size, features, model)
    update_configs(model)
    if on_resize is not None:
        on_resize(mixer, pairs)


def _incoming_size(mixer: Mixer, state_dict: dict[str, torch.Tensor], prefix: str) -> int | None:
    """The state size (of a projected mixer: the feature size) that a stock mixer's weights were saved with."""
    module = mixer.module
    names = {id(child): f"{name}." if name else "" for name, child in module.named_modules()}
    sizes = set()
    for axis in mixer.axes_in(mixer.architecture.layout):
        if not axis.roles:
            continue
        if id(axis.module) not in names:
            # Of an adapter around the mixer; the parameter itself tells its size.
            continue
        weight = state_dict.get(f"{prefix}{names[id(axis.module)]}{axis.parameter}")
        if weight is not None and weight.dim() == axis.tensor.dim():
            sizes.add(axis.state_size_of(weight.shape[axis.dim]))
    return sizes.pop() if len(sizes) == 1 else None


def save_config(model: PreTrainedModel, directory: str | Path) -> None:
    """Write a model's config.json where only its weights are saved, with the class that it belongs to.

    Args:
        model: the bare model; fully_shard makes it an object of a class of its own, whose name is not the model's.
        directory: of the checkpoint.
    """
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(directory)


def save_inputs(batches: Iterable[dict[str, Any]], directory: str | Path, rank: int) -> None:
    """Save recorded inputs beside a checkpoint, so that a cut that is soon due is the same after a resume."""
    tensors, plain = {}, []
    for number, batch in enumerate(batches):
        plain.append(
            {key: value for key, value in batch.items() if isinstance(value, (bool, int, float, str, type(None)))}
        )
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{key}"] = value.contiguous().clone()
    data = safetensors.torch.save(tensors, metadata={"plain": json.dumps(plain)})
    write_file(Path(directory) / INPUTS_FILE.format(rank=rank), data)


def load_inputs(directory: str | Path, rank: int) -> list[dict[str, Any]] | None:
    """The inputs that `save_inputs` wrote there, or None; also if the process was killed while it wrote them."""
    file = Path(directory) / INPUTS_FILE.format(rank=rank)
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, "pt") as content:
            batches = json.loads(content.metadata()["plain"])
            for name in content.keys():  # noqa: SIM118 (not a dictionary)
                number, key = name.split(".", 1)
                batches[int(number)][key] = content.get_tensor(name)
    except safetensors.SafetensorError as error:
        logger.warning(f"{file} is not complete ({error}); the inputs of the next cut are gathered anew")
        return None
    return batches
