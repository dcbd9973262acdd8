"""What a model is wrapped in, whether a cut can be made under it, and how its parameters are read there."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import ddp, deepspeed, fsdp1, fsdp2
from .processes import Processes, all_processes

# Classes with the model in their attribute `module`, by name: their libraries need not be imported.
WRAPPERS = ("DeepSpeedEngine", "FullyShardedDataParallel")


def unwrap(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """Peel wrappers off a model: torch.compile, DataParallel, DDP, FSDP and DeepSpeed's engine.

    Args:
        model: a model as training calls it.

    Returns:
        The bare model, and the wrapper that a cut must mend, if there is one. FSDP2 has none: it changes the class of
        the modules and of their parameters.
    """
    wrapper = None
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel) or is_kind(model, *WRAPPERS):
            wrapper, model = model, model.module
        elif isinstance(model, nn.DataParallel):
            model = model.module
        else:
            return model, wrapper


def is_kind(value: Any, *names: str) -> bool:
    """Whether a class of one of these names is among an object's classes: its library need not be imported."""
    return any(cls.__name__ in names for cls in type(value).__mro__)


def kind_of(bare: nn.Module, wrapper: nn.Module | None) -> str | None:
    """The name of what trains a model on several processes, or None where nothing does.

    Args:
        bare, wrapper: from `unwrap`.
    """
    if isinstance(wrapper, DistributedDataParallel):
        return "DDP"
    if is_kind(wrapper, "DeepSpeedEngine"):
        return f"DeepSpeed ZeRO-{wrapper.zero_optimization_stage()}"
    if is_kind(wrapper, "FullyShardedDataParallel"):
        return "FSDP1"
    modules = list(bare.modules())
    if any(is_kind(module, "FullyShardedDataParallel") for module in modules):
        return "FSDP1"
    if any(is_kind(module, "FSDPModule") for module in modules):
        return "FSDP2"
    for parameter in bare.parameters():
        if hasattr(parameter, "ds_id"):
            return "DeepSpeed ZeRO-3"
        if hasattr(parameter, "_hp_mapping"):
            return "DeepSpeed's module without its engine"
        if is_kind(parameter.data, "DTensor"):
            return "tensor parallelism (DTensor parameters without fully_shard)"
    return None


SHARDING = ("FSDP1", "FSDP2", "DeepSpeed ZeRO-3")


def processes_of(bare: nn.Module, wrapper: nn.Module | None) -> Processes | None:
    """The processes that train a model together; None if nothing says so."""
    kind = kind_of(bare, wrapper)
    if kind is None:
        return None
    if kind == "DDP":
        return Processes(wrapper.process_group)
    return Processes(fsdp2.process_group(bare)) if kind == "FSDP2" else all_processes()


def why_not_in_process(bare: nn.Module, wrapper: nn.Module | None) -> str | None:
    """Why parameters cannot be replaced under a running training, or None if they can.

    Raises:
        RuntimeError: a wrapper under which neither that nor a cut of its checkpoint works.
    """
    kind = kind_of(bare, wrapper)
    if kind == "DDP":
        ddp.refuse_unsupported(wrapper)
    elif kind == "FSDP2":
        fsdp2.refuse_unsupported(bare)
    elif kind == "FSDP1":
        return "FSDP1 flattens parameters into one tensor for each wrapped module"
    elif is_kind(wrapper, "DeepSpeedEngine"):
        return deepspeed.why_not_in_process(wrapper)
    elif kind == "DeepSpeed ZeRO-3":
        return "DeepSpeed ZeRO-3 divides the parameters themselves"
    elif kind is not None:
        raise RuntimeError(
            f"{kind} is not supported: save the whole model, cut it with hf_compressm.compress in one process, and go "
            "on from there"
        )
    return None


def zero_engine(wrapper: nn.Module | None) -> nn.Module | None:
    """The wrapper, if it is DeepSpeed's engine."""
    return wrapper if is_kind(wrapper, "DeepSpeedEngine") else None


def is_sharded(bare: nn.Module, wrapper: nn.Module | None) -> bool:
    """Whether a parameter is whole only within a forward pass, which all processes must run together."""
    return kind_of(bare, wrapper) in SHARDING


def runner(bare: nn.Module, wrapper: nn.Module | None) -> nn.Module:
    """What a forward pass must be called on: FSDP1 makes parameters whole for its outermost wrapper only."""
    return wrapper if kind_of(bare, wrapper) == "FSDP1" else bare


def whole_module(module: nn.Module, bare: nn.Module, wrapper: nn.Module | None) -> nn.Module:
    """A module whose parameters are whole: itself, or in a sharded model a copy without hooks, to read only.

    All processes must call it together, between forward passes.

    Args:
        module: a part of the model.
        bare, wrapper: from `unwrap`.
    """
    kind = kind_of(bare, wrapper)
    if kind == "FSDP2":
        return _plain_copy(module)
    if kind == "FSDP1":
        with fsdp1.readable(wrapper, module):
            return _plain_copy(module)
    if kind == "DeepSpeed ZeRO-3":
        with deepspeed.readable(module):
            return _plain_copy(module)
    return module


@torch.no_grad()
def _plain_copy(module: nn.Module) -> nn.Module:
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if isinstance(value, OrderedDict) and name.endswith("_hooks"):
            copy.__dict__[name] = OrderedDict()
    copy._parameters = {
        name: None if value is None else nn.Parameter(fsdp2.full_tensor(value).detach().clone(), requires_grad=False)
        for name, value in module._parameters.items()
    }
    copy._buffers = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
    copy._modules = {name: None if child is None else _plain_copy(child) for name, child in module._modules.items()}
    return copy


def after_evaluation(bare: nn.Module) -> None:
    """Let go of what a sharded model keeps between a forward pass and the backward pass that will not come."""
    if kind_of(bare, None) == "FSDP2":
        fsdp2.reshard(bare)
