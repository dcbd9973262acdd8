"""What DistributedDataParallel needs after parameters were replaced under it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from .collectives import broadcast_tensor

logger = logging.get_logger(__name__)


def unwrap(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """Peel torch.compile and DDP off a model.

    Args:
        model: a model as training calls it.

    Returns:
        The bare model, and the DDP wrapper if there is one.

    Raises:
        RuntimeError: a wrapper that shards parameters (FSDP, DeepSpeed); the message names the way out.
    """
    ddp = None
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            ddp, model = model, model.module
        elif isinstance(model, nn.DataParallel):
            model = model.module
        else:
            break
    refuse_sharding(model)
    return model, ddp


def refuse_sharding(model: nn.Module) -> None:
    """Raise if a model's parameters are flattened or sharded: replacing them would silently freeze the layers."""
    wrapper = None
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("FullyShardedDataParallel", "DeepSpeedEngine") or kind.startswith("FSDP"):
            wrapper = kind
    if wrapper is None:
        for parameter in model.parameters():
            if hasattr(parameter, "ds_id"):
                wrapper = "DeepSpeed ZeRO-3"
            elif type(parameter.data).__name__ == "DTensor":
                wrapper = "FSDP2 or tensor parallelism (DTensor parameters)"
    if wrapper is not None:
        raise RuntimeError(sharding_message(wrapper))


def sharding_message(wrapper: str) -> str:
    return (
        f"{wrapper} shards or flattens parameters, so a state cannot be cut out of them in process. The way out: save "
        "a full checkpoint at this step, load it in one process with from_pretrained, cut it with "
        "hf_compressm.compress, save it, and go on from there; or train with DDP, which is supported"
    )


@torch.no_grad()
def rebuild_reducer(ddp: DistributedDataParallel, replaced: list[nn.Parameter]) -> None:
    """Make a DDP wrapper work with the parameters that its module has now.

    The wrapper object stays, since the training loop holds it. Its reducer is built anew: the old one would go on
    reducing the old parameters and let the ranks drift apart without an error. torch has no public call for this, so
    the wrapper is taken through the same steps as when it is unpickled. Must be called on every process.

    Args:
        ddp: the wrapper.
        replaced: the new parameters; rank 0's values are given to all, whatever rounding did elsewhere.
    """
    for parameter in replaced:
        broadcast_tensor(parameter.data)
    ddp._module_parameters = _parameters_of(ddp)
    hooks = list(ddp._comm_hooks)
    ddp.__setstate__(ddp.__getstate__())
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
    ddp._comm_hooks = []
    for hook, state in hooks:
        _forget_tensors(state)
        ddp.register_comm_hook(state, hook)


def reducer_is_stale(ddp: DistributedDataParallel) -> bool:
    """Whether a DDP wrapper still reduces parameters that its module no longer has."""
    return {id(parameter) for parameter in ddp._module_parameters} != {id(item) for item in _parameters_of(ddp)}


def _parameters_of(ddp: DistributedDataParallel) -> list[nn.Parameter]:
    return [item for name, item in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore]


def _forget_tensors(state: object) -> None:
    """Empty what a communication hook remembers per bucket (PowerSGD's errors and factors): the buckets changed."""
    for name in ("error_dict", "p_memory_dict", "q_memory_dict"):
        remembered = getattr(state, name, None)
        if remembered:
            remembered.clear()
            logger.warning(f"{type(state).__name__}.{name} was emptied: gradients are bucketed anew after the cut")
