"""What DistributedDataParallel needs after parameters were replaced under it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from .processes import Processes

logger = logging.get_logger(__name__)


@torch.no_grad()
def rebuild_reducer(ddp: DistributedDataParallel, replaced: list[nn.Parameter]) -> None:
    """Make a DDP wrapper work with the parameters that its module has now.

    The wrapper object stays, since the training loop holds it. Its reducer is built anew: the old one would go on
    reducing the old parameters and let the ranks drift apart without an error. torch has no public call for this, so
    the wrapper is taken through the same steps as when it is unpickled, but for the process group, which unpickling
    would replace by the default one. Must be called on every process.

    Args:
        ddp: the wrapper.
        replaced: the new parameters; the first process's values are given to all, whatever rounding did elsewhere.
    """
    processes = Processes(ddp.process_group)
    for parameter in replaced:
        processes.broadcast(parameter)
    ddp._module_parameters = _parameters_of(ddp)
    parameters, sparse = ddp._build_params_for_reducer()
    ddp._ddp_init_helper(parameters, sparse, ddp._build_debug_param_to_name_mapping(parameters), ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
        ddp._static_graph_delay_allreduce_enqueued = False
    hooks, ddp._comm_hooks = list(ddp._comm_hooks), []
    for hook, state in hooks:
        _forget_tensors(state, tell=processes.is_main)
        ddp.register_comm_hook(state, hook)


def refuse_unsupported(ddp: DistributedDataParallel) -> None:
    """Raise a RuntimeError that names the option of a DDP wrapper under which parameters cannot be replaced."""
    options = {
        "mixed_precision": getattr(ddp, "mixed_precision", None) is not None,
        "delay_all_reduce_named_params": bool(getattr(ddp, "_delay_all_reduce_params", ())),
        "join() (uneven inputs: a process that has run out of them takes no part in a cut)": ddp._join_config.enable,
    }
    for option, is_set in options.items():
        if is_set:
            raise RuntimeError(
                f"DistributedDataParallel with {option} is not supported: what it keeps of the parameters would not "
                "follow a cut; train without it"
            )


def reducer_is_stale(ddp: DistributedDataParallel) -> bool:
    """Whether a DDP wrapper still reduces parameters that its module no longer has."""
    return {id(parameter) for parameter in ddp._module_parameters} != {id(item) for item in _parameters_of(ddp)}


def _parameters_of(ddp: DistributedDataParallel) -> list[nn.Parameter]:
    return [item for name, item in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore]


def _forget_tensors(state: object, tell: bool) -> None:
    """Empty what a communication hook remembers per bucket (PowerSGD's errors and factors): the buckets changed."""
    for name in ("error_dict", "p_memory_dict", "q_memory_dict"):
        remembered = getattr(state, name, None)
        if remembered:
            remembered.clear()
            if not tell:
                continue
            logger.warning(f"{type(state).__name__}.{name} was emptied: gradients are bucketed anew after the cut")
