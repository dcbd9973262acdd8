"""Give mixers another size or form, and tell all who must know: the configs that rule them, and the models' classes.

Parameters are replaced, added and removed; the values of new ones are zero, there to be loaded or copied over.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..distributed import fsdp2
from ..modeling_compressm import (
    PROJECTIONS,
    auto_map,
    project_mixer,
    projected_class,
    stock_class,
    unproject_mixer,
)
from .adapters import copies_of
from .mixer import Mixer, find_mixers, layers_by_config
from .scan import StateAxis

logger = logging.get_logger(__name__)

# (old, new): replaced; (None, new): added; (old, None): removed.
ParameterPairs = list[tuple[nn.Parameter | None, nn.Parameter | None]]


@torch.no_grad()
def resize_mixer(
    mixer: Mixer, state_size: int, feature_size: int | None = None, model: nn.Module | None = None
) -> ParameterPairs:
    """Give a mixer parameters of another state size, in place. `update_configs` must follow.

    Args:
        mixer: the mixer.
        state_size: its new state size, N of a stock mixer and r of a projected one.
        feature_size: N of a projected mixer; None makes it, or leaves it, a stock one.
        model: the whole model, if `fully_shard` was applied to it.

    Returns:
        What became of parameters.

    Raises:
        ValueError: a projected mixer of another feature size.
    """
    module, pairs = mixer.module, []
    model = module if model is None else model
    fsdp2.reshard(model)
    if mixer.is_projected and feature_size is None:
        for name in PROJECTIONS:
            pairs.append((getattr(module, name), None))
            fsdp2.release_parameter(model, module, name)
        unproject_mixer(module)
    elif mixer.is_projected and feature_size != module.feature_size:
        raise ValueError(
            f"layer {mixer.name}: its states are projections of {module.feature_size} features; it cannot take on "
            f"{feature_size}"
        )
    elif feature_size is not None and not mixer.is_projected:
        if mixer.state_size != feature_size:
            pairs += _resize_axes(mixer, feature_size, model)
        pairs += project_in_place(mixer, state_size, model)
    if mixer.state_size != state_size:
        pairs += _resize_axes(mixer, state_size, model)
    return pairs


@torch.no_grad()
def project_in_place(mixer: Mixer, state_size: int, model: nn.Module) -> ParameterPairs:
    """Make a stock mixer a projected one with the given number of states; its two new parameters are zero."""
    module = mixer.module
    project_mixer(module, state_size)
    for name in PROJECTIONS:
        # PEFT saves nothing of the base: what is added to a frozen one is frozen, too.
        trains = copies_of(module.in_proj)[0].weight.requires_grad
        getattr(module, name).zero_().requires_grad_(trains)
        fsdp2.shard_added_parameter(model, module, name)
    return [(None, getattr(module, name)) for name in PROJECTIONS]


def _resize_axes(mixer: Mixer, state_size: int, model: nn.Module) -> ParameterPairs:
    before, pairs = mixer.state_size, []
    for axis in mixer.state_axes:
        old = axis.tensor
        new = nn.Parameter(fsdp2.shard_like(old, _zeros(axis, state_size)), requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
        fsdp2.put_parameter(model, axis.module, axis.parameter, new)
        pairs.append((old, new))
    mixer.set_state_size(state_size)
    logger.info(f"{mixer.name}: state_size {before} -> {state_size}")
    return pairs


def _zeros(axis: StateAxis, state_size: int) -> torch.Tensor:
    old = axis.tensor
    shape = list(old.shape)
    shape[axis.dim] = axis.length(state_size)
    return torch.zeros(shape, dtype=old.dtype, device=old.device)


def update_configs(model: nn.Module) -> None:
    """Write the mixers' sizes into the configs that rule them, so that checkpoints load.

    Where mixers are projected, the config and the models that it belongs to change their class, and so what they are
    saved as; where they no longer are, they change back.
    """
    mixers = find_mixers(model)
    for names in layers_by_config(mixers):
        together = [mixers[name] for name in names]
        config, field = together[0].config, together[0].architecture.state_size_field
        if config is None:
            continue
        sizes = [mixer.state_size for mixer in together]
        before, after = getattr(config, field, None), min(sizes)
        if before != after:
            setattr(config, field, after)
            logger.info(f"{type(config).__name__}.{field}: {before} -> {after}")
        projected = any(mixer.is_projected for mixer in together)
        change = projected_class if projected else stock_class
        config.__class__ = change(type(config))
        if projected:
            config.feature_size = next(mixer.module.feature_size for mixer in together if mixer.is_projected)
            config.state_ranks = sizes if len(set(sizes)) > 1 else None
            config.auto_map = auto_map(type(config))
        else:
            for name in ("feature_size", "state_ranks", "auto_map"):
                if name in vars(config):
                    delattr(config, name)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.config is config:
                module.__class__ = change(type(module))
