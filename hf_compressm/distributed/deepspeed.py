"""Parameters under DeepSpeed's ZeRO: their whole optimizer state, and an engine that goes on with other parameters.

ZeRO-1 and -2 leave the module's parameters whole. Their optimizer holds, for each parameter group, flat vectors of all
parameters one after another, of which each process has and updates a part: the moments, and the master weights. A
parameter of another size moves everything behind it. So ZeRO's own constructor makes new vectors, and they are filled
from the old ones parameter by parameter: no process ever holds more than one whole parameter's moments.

DeepSpeed's `safe_get_full_optimizer_state` will not do: it links parameters to their moments after the first step of
the first parameter group, when the other groups have no moments yet, and finds none for them ever after. Where it
fails on one process and not on another, the processes are left waiting for each other.

Under ZeRO-3 the module's parameters are in parts themselves: they can be read here, not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..optimizer_state import SLICED_STATE

# DeepSpeed's own types, which cannot be imported where it is not installed.
Engine = Any
ZeroOptimizer = Any

# The name, beside those of the moments, of the weights that the optimizer updates and the module's are roundings of.
MASTER = "master_weights"
# Entries of a parameter that stays which are gathered at a time.
SLICE = 2**26

# What ZeRO's optimizer has learned or was told since it was made.
CARRIED = (
    "loss_scaler",
    "custom_loss_scaler",
    "external_loss_scale",
    "torch_autocast_gradscaler",
    "overflow",
    "clip_grad",
    "_global_grad_norm",
)

# What a new parameter's tensor is, given the name and the whole tensor of the parameter whose place it takes, and the
# names of all that is kept of it.
Smaller = Callable[[str, torch.Tensor, Iterable[str]], torch.Tensor]


class ParameterGroups(Optimizer):
    """The parameters that an engine trains, in their groups with their hyper-parameters, and no state.

    ZeRO's optimizer has flat vectors in its groups; in this one parameters can be exchanged for `rebuild_optimizer`.
    """


@dataclass
class _FlatGroup:
    """A parameter group of ZeRO: parameters one after another, and this process's part of what is kept of them.

    Attributes:
        starts: where in the flat vector each parameter starts.
        begin, size: where this process's part of the flat vector starts, and its length.
        parts: this process's part of each vector: the moments, and the master weights if there are any.
        shared: the optimizer's state of the group as a whole: its step count.
        processes: those that the vectors are divided among.
    """

    starts: dict[nn.Parameter, int]
    begin: int
    size: int
    parts: dict[str, torch.Tensor]
    shared: dict[str, Any]
    processes: dist.ProcessGroup

    def gather(self, key: str, parameter: nn.Parameter, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Entries of a parameter's moment, counted in its flat form. A collective."""
        stop = parameter.numel() if stop is None else stop
        values = self.parts[key].new_zeros(stop - start)
        theirs, ours = self._overlap(parameter, start, stop)
        values[theirs] = self.parts[key][ours]
        dist.all_reduce(values, group=self.processes)
        return values

    def scatter(self, key: str, parameter: nn.Parameter, values: torch.Tensor, start: int = 0) -> None:
        """Take this process's part of values that all processes have."""
        theirs, ours = self._overlap(parameter, start, start + values.numel())
        self.parts[key][ours] = values.flatten()[theirs].to(self.parts[key])

    def _overlap(self, parameter: nn.Parameter, start: int, stop: int) -> tuple[slice, slice]:
        """What of a stretch of a parameter is in this process's part: counted in the stretch, and in the part."""
        first = self.starts[parameter] + start
        low = max(first, self.begin)
        high = max(low, min(first + stop - start, self.begin + self.size))
        return slice(low - first, high - first), slice(low - self.begin, high - self.begin)


def why_not_in_process(engine: Engine) -> str | None:
    """Why parameters cannot be replaced under a DeepSpeed engine, or None if they can (ZeRO-1 and -2)."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage not in (1, 2):
        return f"DeepSpeed ZeRO-{stage} " + ("divides the parameters themselves" if stage else "is not supported")
    reasons = {
        "pipeline parallelism": engine.pipeline_parallelism,
        "experts (MoE layers)": engine.has_moe_layers,
        "tensor parallelism": engine.mp_world_size > 1,
        "DeepCompile": getattr(engine, "_deepcompile_active", False),
        "an offloaded optimizer": engine.zero_cpu_offload(),
        # Subclasses and relatives: ZenFlow, BF16_Optimizer (bf16 with ZeRO-1 and fp32 gradient accumulation).
        f"its {type(zero).__name__}": type(zero).__name__ != "DeepSpeedZeroOptimizer",
    }
    for what, is_so in reasons.items():
        if is_so:
            return f"DeepSpeed ZeRO-{stage} with {what} keeps optimizer state in a form that is not supported"
    if any(group.get("use_muon") for group in zero.optimizer.param_groups):
        return f"DeepSpeed ZeRO-{stage} with Muon divides whole matrices"
    for number, partition in enumerate(zero.single_partition_of_fp32_groups):
        for key, value in zero.optimizer.state.get(partition, {}).items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            if key not in SLICED_STATE or value.shape != partition.shape:
                return (
                    f"{type(zero.optimizer).__name__}'s state {key!r} of parameter group {number} under DeepSpeed "
                    f"ZeRO-{stage} has shape {tuple(value.shape)} and is not known to be one number for each parameter"
                )
    return None


def refuse_projection(realization: str) -> None:
    """Raise a ValueError if a realization may add parameters: ZeRO-1 and -2 cannot start them anew.

    ZeRO counts the steps of a parameter group as one. Adam's moments of a new parameter would start at zero without
    the correction that belongs to the first steps, and its first steps would be several times too large.
    """
    if realization != "stock":
        raise ValueError(
            f"realization={realization!r} adds parameters, which DeepSpeed's ZeRO cannot start with a step count of "
            "their own; use realization='stock' there, or train with DDP or FSDP2"
        )


def parameter_groups(engine: Engine) -> ParameterGroups:
    """The parameters that an engine trains with ZeRO-1 or -2, in the form of an optimizer without state.

    Raises:
        RuntimeError: gradients are alive, which belong to the present parameters.
    """
    zero = engine.optimizer
    _refuse_gradients(zero)
    groups = ParameterGroups([{"params": list(group)} for group in zero.bit16_groups], {})
    for ours, theirs in zip(groups.param_groups, zero.optimizer.param_groups, strict=True):
        ours.update({key: value for key, value in theirs.items() if key != "params"})
    return groups


def full_state(engine: Engine, parameter: nn.Parameter) -> dict[str, Any]:
    """What the optimizer of ZeRO-1 or -2 keeps of a parameter: its whole moments, step count and `MASTER` weights.

    A collective: all processes must call it in the same order. There are master weights of their own only where the
    module's are of another type, and nothing at all before the first step and of parameters that are not trained.
    """
    for group in _flat_groups(engine.optimizer):
        if parameter in group.starts:
            return {key: group.gather(key, parameter).view_as(parameter) for key in group.parts} | group.shared
    return {}


@torch.no_grad()
def rebuild_optimizer(
    engine: Engine, groups: ParameterGroups, replaced: Mapping[nn.Parameter, tuple[nn.Parameter, Smaller]]
) -> None:
    """Let an engine train the parameters that its module has now.

    ZeRO's constructor is run again, around the same basic optimizer, which learning-rate schedulers hold. ZeRO's
    optimizer stays the same object too, since the training loop and Accelerate hold it. What `replaced` does not name
    goes on as it was, or, if it is new, without moments, under the step count that all parameters of its group share.

    All processes must call it. While it runs, each has its part of the moments twice.

    Args:
        engine: an engine for which `why_not_in_process` knows no reason.
        groups: from `parameter_groups`, with the new parameters where they shall be.
        replaced: new parameter → the old one, and what makes the new one's tensors of the old one's: its moments, and
            its `MASTER` weights, of which the new parameter then becomes the rounding.

    Example:
        >>> groups = parameter_groups(engine)                                                    # doctest: +SKIP
        >>> replace_parameter(groups, old, new, None)                                            # doctest: +SKIP
        >>> rebuild_optimizer(engine, groups, {new: (old, lambda name, whole, _: whole[:12])})   # doctest: +SKIP
    """
    zero = engine.optimizer
    basic, before = zero.optimizer, _flat_groups(zero)
    for old, group in zip(before, groups.param_groups, strict=True):
        for parameter in group["params"]:
            if parameter not in old.starts:
                dist.broadcast(parameter, group=old.processes, group_src=0)
    zero.destroy()
    # The flat weights are let go: parameters that stay hold theirs until the constructor moves them, group by group.
    zero.bit16_groups_flat.clear()
    zero.parallel_partitioned_bit16_groups.clear()
    for ours, theirs in zip(groups.param_groups, basic.param_groups, strict=True):
        theirs["params"] = list(ours["params"])
    basic.state.clear()
    engine.param_names = {parameter: name for name, parameter in engine.module.named_parameters()}
    new = engine._configure_zero_optimizer(basic)
    for name in CARRIED:
        if hasattr(zero, name):
            setattr(new, name, getattr(zero, name))
    if engine._support_torch_style_backward:
        new.register_grad_acc_post_hook(engine._backward_post_hook)
    for old, partition in zip(before, new.single_partition_of_fp32_groups, strict=True):
        moments = {key: torch.zeros_like(partition) for key in old.parts if key != MASTER}
        if moments or old.shared:
            basic.state[partition] = old.shared | moments
    for old, group in zip(before, _flat_groups(new), strict=True):
        for parameter in group.starts:
            _carry(parameter, old, group, replaced)
    if replaced and any(MASTER in old.parts for old in before):
        new.update_lp_params()
    _link_moments(new)
    # Two objects of one state: the gradient hooks hold the new optimizer, everybody else the old one.
    zero.__dict__ = new.__dict__


def hooks_of(engine: Engine) -> set[int]:
    """The ids of the gradient hooks that ZeRO put on the module's parameters itself, and puts on new ones."""
    return {handle.id for handle in engine.optimizer._grad_acc_hooks}


def optimizer_bytes(engine: Engine) -> int:
    """The size of the state tensors (moments) of ZeRO's optimizer on all processes, in bytes."""
    zero = engine.optimizer
    return sum(
        sum(value.nbytes for value in zero.optimizer.state.get(partition, {}).values() if torch.is_tensor(value))
        * dist.get_world_size(zero.real_dp_process_group[number])
        for number, partition in enumerate(zero.single_partition_of_fp32_groups)
    )


def parts_on_host(engine: Engine) -> list[dict[str, Any]]:
    """Copies of this process's parts of what ZeRO's optimizer keeps, for `restore_parts`."""
    zero = engine.optimizer
    return [
        {MASTER: partition.detach().to("cpu", copy=True)}
        | {
            key: value.to("cpu", copy=True) if torch.is_tensor(value) else value
            for key, value in zero.optimizer.state.get(partition, {}).items()
        }
        for partition in zero.single_partition_of_fp32_groups
    ]


@torch.no_grad()
def restore_parts(engine: Engine, parts: list[dict[str, Any]]) -> None:
    """Give ZeRO's optimizer, and the module, what they had; the parameters have the shapes of that time again.

    All processes must call it.

    Args:
        engine: the engine.
        parts: from `parts_on_host`.
    """
    zero = engine.optimizer
    for partition, saved in zip(zero.single_partition_of_fp32_groups, parts, strict=True):
        partition.copy_(saved[MASTER])
        zero.optimizer.state[partition] = {
            # A step count lies where the optimizer put it, which is not always with the parameters.
            key: value.to(partition.device) if torch.is_tensor(value) and value.dim() > 0 else value
            for key, value in saved.items()
            if key != MASTER
        }
    zero.update_lp_params()
    _link_moments(zero)


def readable(module: nn.Module) -> AbstractContextManager:
    """Within this context the parameters of a module under ZeRO-3 are whole. All processes must enter it together.

    Best between forward passes. Within one, DeepSpeed makes whole what is touched, until the module is done with, and
    fetches ahead what it expects to come next.

    Raises:
        RuntimeError: parameters that are just being fetched ahead; their values are not there yet.
    """
    import deepspeed

    parameters = list(module.parameters())
    status = {parameter: parameter.ds_status.name for parameter in parameters if hasattr(parameter, "ds_id")}
    if "INFLIGHT" in status.values():
        raise RuntimeError("DeepSpeed is just fetching parameters; read them between forward passes")
    return deepspeed.zero.GatheredParameters([item for item in status if status[item] == "NOT_AVAILABLE"])


def _flat_groups(zero: ZeroOptimizer) -> list[_FlatGroup]:
    groups = []
    for number, partition in enumerate(zero.single_partition_of_fp32_groups):
        parameters, processes = zero.round_robin_bit16_groups[number], zero.real_dp_process_group[number]
        starts, start = {}, 0
        for parameter, padding in zip(parameters, zero.round_robin_bit16_padding[number], strict=True):
            starts[parameter] = start
            start += parameter.numel() + padding
        state = zero.optimizer.state.get(partition, {})
        parts = {key: value for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0}
        shared = {key: value for key, value in state.items() if key not in parts}
        if partition.dtype != parameters[0].dtype:
            parts[MASTER] = partition.detach()
        begin = dist.get_rank(processes) * partition.numel()
        groups.append(_FlatGroup(starts, begin, partition.numel(), parts, shared, processes))
    return groups


def _refuse_gradients(zero: ZeroOptimizer) -> None:
    partitions = [*zero.averaged_gradients.values(), *zero.all_grad_tensors.values()]
    parameters = [parameter for group in zero.bit16_groups for parameter in group]
    if any(item is not None for item in partitions) or any(parameter.grad is not None for parameter in parameters):
        raise RuntimeError(
            "DeepSpeed holds gradients of the present parameters, which a cut would lose; cut after the engine.step() "
            "that applies them"
        )


def _link_moments(zero: ZeroOptimizer) -> None:
    """Let DeepSpeed's `safe_get_full_optimizer_state` find the moments; before the first step there are none."""
    zero._hp_optimizer_states_linked = False
    if any(zero.optimizer.state.get(partition) for partition in zero.single_partition_of_fp32_groups):
        zero._lazy_init_hp_params_optimizer_state()


def _carry(
    parameter: nn.Parameter,
    old: _FlatGroup,
    new: _FlatGroup,
    replaced: Mapping[nn.Parameter, tuple[nn.Parameter, Smaller]],
) -> None:
    """Fill this process's part of the new vectors, as far as it is this parameter's."""
    for key in new.parts:
        if parameter in old.starts:
            for start in range(0, parameter.numel(), SLICE):
                stop = min(start + SLICE, parameter.numel())
                new.scatter(key, parameter, old.gather(key, parameter, start, stop), start)
        elif parameter in replaced:
            origin, smaller = replaced[parameter]
            new.scatter(key, parameter, smaller(key, old.gather(key, origin).view_as(origin), old.parts))
