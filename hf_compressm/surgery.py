"""Apply a plan to a model and its optimizer, in place; all is prepared and checked before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers.utils import logging

from .distributed import deepspeed, fsdp2
from .distributed.ddp import rebuild_reducer
from .distributed.processes import ALONE
from .distributed.wrappers import processes_of, unwrap, why_not_in_process, zero_engine
from .mixers import Mixer, StateAxis, check_mixer, find_mixers, layers_by_config
from .mixers.adapters import MagnitudeAxis
from .mixers.resize import project_in_place, update_configs
from .modeling_compressm import PROJECTIONS, projected_class
from .optimizer import (
    add_parameters,
    check_state,
    moment_factors,
    replace_parameter,
    scaled,
    sliced_state,
    sliced_tensor,
    unwrap_optimizer,
)
from .plan import CompressionPlan, LayerPlan
from .provenance import remember_cut
from .report import CompressionReport, LayerReport

logger = logging.get_logger(__name__)


@dataclass
class _Replacement:
    """A parameter, the one that takes its place, and its optimizer state."""

    axis: StateAxis
    old: nn.Parameter
    new: nn.Parameter
    state: dict[str, Any] | None
    # What an optimizer that keeps weights and moments of its own (ZeRO's) makes of them.
    smaller: deepspeed.Smaller | None = None


def compress_(model: nn.Module, plan: CompressionPlan, optimizer: Optimizer | None = None) -> CompressionReport:
    """Cut states out of a model, in place, and carry the optimizer's state along.

    Parameters are replaced by smaller ones, the optimizer's moments are sliced, the config's state size is updated,
    and what DDP, FSDP2 or DeepSpeed know of the parameters follows. A projected layer gets two parameters more, which
    the optimizer takes on without weight decay if it has a group without; model and config become objects of their
    projected classes. Call it where no gradients are alive: after `optimizer.zero_grad()`.

    Where parameters are sharded, one after the other is gathered, cut and sharded again.

    Args:
        model: a model, bare or as torch.compile, DDP, FSDP2, DeepSpeed or Accelerate wrapped it. Where several
            processes train it, all of them must call this with the same plan.
        plan: from `plan_compression`, or loaded.
        optimizer: the optimizer that trains the model, bare or as Accelerate wrapped it; DeepSpeed's engine has its
            own.

    Returns:
        What became of every mixer.

    Raises:
        ValueError: the plan does not fit the model.
        TypeError: a mixer, or an optimizer state, that is not supported.
        RuntimeError: a model that is sharded in a way that is not supported, gradients that are not reduced yet, or
            parameters with gradient hooks or with several owners.
        What one process raises before it changes anything, all of them raise.

    After an error, model and optimizer are as they were.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> from hf_compressm import CompreSSMConfig, compress_, measure, plan_compression
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=8, num_hidden_layers=1))
        >>> statistics = measure(model, [torch.arange(8).repeat(4, 1)])
        >>> report = compress_(model, plan_compression(model, statistics, CompreSSMConfig(state_size=2)))
        >>> model.config.state_size, report.layers[0].status
        (2, 'cut')
    """
    bare, wrapper = unwrap(model)
    reason = why_not_in_process(bare, wrapper)
    if reason is not None:
        raise RuntimeError(
            f"the model cannot be cut while it trains: {reason}. The way out: save a checkpoint, cut it with "
            "reshape_checkpoint (or `hf-compressm reshape`), and go on from there"
        )
    processes, engine = processes_of(bare, wrapper) or ALONE, zero_engine(wrapper)
    fsdp2.reshard(bare)
    with processes.all_or_none("checking the cut"):
        fsdp2.refuse_gradients(bare)
        if engine is not None:
            if any(layer.realization == "projected" for layer in plan.changes.values()):
                deepspeed.refuse_projection(plan.config.realization)
            optimizer = deepspeed.parameter_groups(engine)
        elif optimizer is not None:
            optimizer = unwrap_optimizer(optimizer)
        mixers = find_mixers(bare)
        for mixer in mixers.values():
            check_mixer(mixer)
        validate(plan, mixers)
        _refuse_shared_parameters(bare, mixers, plan)
        own_hooks = set() if engine is None else deepspeed.hooks_of(engine)
        for name, layer in plan.changes.items():
            _check(name, mixers[name], layer, optimizer, own_hooks)
    parameters_before, state_bytes_before = _count_parameters(bare), _state_bytes(mixers)
    bytes_before = optimizer_bytes(optimizer) if engine is None else deepspeed.optimizer_bytes(engine)
    # Sharded parameters are gathered one by one here.
    replacements, roundings = [], {name: Rounding() for name in plan.layers}
    with processes.all_or_none("preparing the cut"):
        for name, layer in plan.changes.items():
            if layer.realization != "projected":
                replacements += _prepare(name, mixers[name], layer, optimizer, roundings[name])
            elif mixers[name].is_projected:
                replacements += _prepare_second_projection(mixers[name], layer, roundings[name])

    # From here on nothing can fail.
    for item in replacements:
        fsdp2.put_parameter(bare, item.axis.module, item.axis.parameter, item.new)
        if optimizer is not None:
            replace_parameter(optimizer, item.old, item.new, item.state)
    changed = [item.new for item in replacements]
    for name, layer in plan.changes.items():
        if layer.realization == "projected" and not mixers[name].is_projected:
            changed += _project(bare, mixers[name], layer, optimizer, roundings[name])
        else:
            mixers[name].set_state_size(layer.state_size_after)
    update_configs(bare)
    if isinstance(wrapper, DistributedDataParallel) and changed:
        rebuild_reducer(wrapper, changed)
    if engine is not None and changed:
        smaller = {item.new: (item.old, item.smaller) for item in replacements if item.smaller is not None}
        deepspeed.rebuild_optimizer(engine, optimizer, smaller)
    report = CompressionReport(
        layers=[layer_report(name, layer, roundings[name].relative_error) for name, layer in plan.layers.items()],
        tokens=plan.tokens,
        parameters_before=parameters_before,
        parameters_after=_count_parameters(bare),
        optimizer_bytes_before=bytes_before,
        optimizer_bytes_after=optimizer_bytes(optimizer) if engine is None else deepspeed.optimizer_bytes(engine),
        state_bytes_before=state_bytes_before,
        state_bytes_after=_state_bytes(find_mixers(bare)),
        config=plan.config.to_dict(),
    )
    remember_cut(bare, plan, {"status": "cut", "scheduled_step": None, **report.to_dict()})
    return report


def validate(plan: CompressionPlan, mixers: dict[str, Mixer]) -> None:
    """Check that a plan fits a model's mixers.

    Raises:
        ValueError: naming the layer, what does not fit, and the bad value.
    """
    missing, unknown = sorted(set(mixers) - set(plan.layers)), sorted(set(plan.layers) - set(mixers))
    if missing or unknown:
        raise ValueError(
            f"plan and model do not match: the plan lacks layers {missing} and has unknown layers {unknown}; the "
            f"model's mixers are {list(mixers)}"
        )
    for name, layer in plan.layers.items():
        _validate_layer(name, layer, mixers[name])
    for names in layers_by_config(mixers):
        layers = [plan.layers[name] for name in names]
        sizes = {name: plan.layers[name].state_size_after for name in names}
        projected = [
            layer.realization == "projected" or mixers[name].is_projected
            for name, layer in zip(names, layers, strict=True)
        ]
        if any(projected) and not all(projected):
            raise ValueError(
                "layers that share one config must all be projected or none, but the plan has "
                f"{ {name: plan.layers[name].realization for name in names} }"
            )
        if len(set(sizes.values())) > 1 and not any(projected):
            raise ValueError(f"layers that share one config must keep one state_size, but the plan has {sizes}")


def _validate_layer(name: str, layer: LayerPlan, mixer: Mixer) -> None:
    before, kept = layer.state_size_before, layer.kept
    if mixer.state_size != before:
        raise ValueError(f"layer {name}: the plan is for state_size {before}, but the model has {mixer.state_size}")
    if layer.realization == "projected":
        _validate_projection(name, layer, mixer)
        return
    if kept is None:
        raise ValueError(f"layer {name}: the plan has neither kept states nor a projection")
    if kept.dim() != 2 or kept.shape[0] != mixer.groups or not 1 <= kept.shape[1] <= before:
        raise ValueError(
            f"layer {name}: kept indices have shape {tuple(kept.shape)}; expected ({mixer.groups}, r) with r in "
            f"1..{before}"
        )
    if kept.min() < 0 or kept.max() >= before:
        raise ValueError(f"layer {name}: kept indices {kept.tolist()} reach outside 0..{before - 1}")
    if any(len(set(row)) != len(row) for row in kept.tolist()):
        raise ValueError(f"layer {name}: kept indices {kept.tolist()} repeat a state")
    # Without them, the norms on B and C would make the outputs larger or smaller.
    scales = mixer.is_normalized and layer.is_change
    roles = {role for axis in mixer.axes for role in (*axis.roles, axis.whole)} - {"A", None} if scales else set()
    numbers = [s if isinstance(s, list) else [s] for s in layer.scales.values()]
    fitting = all(len(s) in (1, kept.shape[1]) and all(math.isfinite(x) and x > 0 for x in s) for s in numbers)
    if set(layer.scales) != roles or not fitting:
        raise ValueError(
            f"layer {name}: the plan scales {layer.scales}; expected a positive number, or one for each of the "
            f"{kept.shape[1]} states that stay, for each of {sorted(roles)}"
        )
    for label, matrix, allowed in (
        ("readout", layer.readout, mixer.layout.CAN_REFIT),
        ("drive", layer.drive, mixer.layout.CAN_REFIT and not mixer.is_normalized),
    ):
        if matrix is None:
            continue
        if not allowed:
            raise ValueError(
                f"layer {name}: the plan refits the {label}, which {mixer.layout.NAME} mixers do not allow"
            )
        expected = (mixer.groups, kept.shape[1], before)
        if tuple(matrix.shape) != expected:
            raise ValueError(f"layer {name}: the {label} matrix has shape {tuple(matrix.shape)}; expected {expected}")
        if not torch.isfinite(matrix).all():
            raise ValueError(f"layer {name}: the {label} matrix holds NaN or infinity")


def _validate_projection(name: str, layer: LayerPlan, mixer: Mixer) -> None:
    if not mixer.can_be_projected:
        raise ValueError(f"layer {name}: the plan projects its states, which {mixer.layout.NAME} mixers do not allow")
    projected_class(type(mixer.module))
    before, after = layer.state_size_before, layer.state_size_after
    for label in PROJECTIONS:
        matrix = getattr(layer, label)
        expected = (before, mixer.groups * after)
        if (
            matrix is None
            or tuple(matrix.shape) != expected
            or not 1 <= after <= before
            or layer.groups != mixer.groups
        ):
            shape = None if matrix is None else tuple(matrix.shape)
            raise ValueError(
                f"layer {name}: {label} has shape {shape}; expected {expected} with {mixer.groups} groups and r in "
                f"1..{before}"
            )
        if not torch.isfinite(matrix).all():
            raise ValueError(f"layer {name}: {label} holds NaN or infinity")


def _check(name: str, mixer: Mixer, layer: LayerPlan, optimizer: Optimizer | None, own_hooks: set[int]) -> None:
    """Raise if a layer's parameters, or their optimizer state, cannot be cut; nothing is communicated."""
    projected = layer.realization == "projected"
    for axis in mixer.axes:
        old, label = axis.tensor, f"{name}: {axis.parameter} of {type(axis.module).__name__}"
        if projected and not mixer.is_projected:
            # Two parameters are added; all others stay.
            continue
        if optimizer is not None and not projected:
            check_state(optimizer, old, label, axis.dim)
        _refuse_hooks(old, f"{name}: {axis.parameter}", own_hooks)
        shape = list(old.shape)
        shape[axis.dim] = axis.length(layer.state_size_after)
        fsdp2.refuse_shape(old, shape, label)


@torch.no_grad()
def _prepare_second_projection(mixer: Mixer, layer: LayerPlan, rounding: Rounding) -> list[_Replacement]:
    """The products of a projected layer's projections with those of the plan; nothing is touched."""
    replacements = []
    for axis in mixer.axes:
        old = axis.tensor
        values = projected_further(fsdp2.full_tensor(old), getattr(layer, axis.parameter), mixer.groups)
        rounding.add(values, values.to(old.dtype))
        replacements.append(_Replacement(axis, old, _like(old, values.to(old.dtype)), None))
    return replacements


def projected_further(first: torch.Tensor, second: torch.Tensor, groups: int) -> torch.Tensor:
    """One projection after another, group by group: [first_1 second_1 | ... | first_G second_G], in float64."""
    left, right = (matrix.double().cpu().unflatten(1, (groups, -1)) for matrix in (first, second))
    # fully_shard takes contiguous parameters only.
    return torch.einsum("ngm,mgr->ngr", left, right).flatten(1).contiguous()


@torch.no_grad()
def _project(
    model: nn.Module, mixer: Mixer, layer: LayerPlan, optimizer: Optimizer | None, rounding: Rounding
) -> list[nn.Parameter]:
    """Put a projection into a stock mixer and its optimizer; returns the two parameters that this adds."""
    module = mixer.module
    project_in_place(mixer, layer.state_size_after, model)
    added = [getattr(module, name) for name in PROJECTIONS]
    for name, parameter in zip(PROJECTIONS, added, strict=True):
        matrix = getattr(layer, name)
        rounding.add(matrix.double(), matrix.to(parameter.dtype))
        parameter.copy_(fsdp2.shard_like(parameter, matrix))
    if optimizer is not None:
        add_parameters(optimizer, model, module, added)
    return added


@torch.no_grad()
def _prepare(
    name: str, mixer: Mixer, layer: LayerPlan, optimizer: Optimizer | None, rounding: Rounding
) -> list[_Replacement]:
    """The new parameters of one layer and their optimizer state; nothing is touched."""
    replacements = []
    for axis in mixer.axes:
        old, label = axis.tensor, f"{name}: {axis.parameter} of {type(axis.module).__name__}"
        if isinstance(axis, MagnitudeAxis):
            axis = axis.remembering(layer.mixtures, layer.state_size_before)
        index = axis.index(layer.kept, layer.state_size_before)
        factors = axis.factors(layer.scales, layer.state_size_after)
        values = smaller_values(axis, layer, fsdp2.full_tensor(old.detach()), rounding)
        new = _like(old, values)
        if old.grad is not None:
            new.grad = sliced_tensor(old.grad, axis.dim, index, None if factors is None else 1 / factors)
        state = None
        if optimizer is not None:
            state = sliced_state(optimizer, old, label, axis.dim, index, factors)
            check_state_shapes(label, new, state or {})
        replacements.append(_Replacement(axis, old, new, state, _smaller(axis, layer)))
    return replacements


def _smaller(axis: StateAxis, layer: LayerPlan) -> deepspeed.Smaller:
    """What becomes of a parameter's master weights, and of its moments, of which the kept states' entries stay."""
    index = axis.index(layer.kept, layer.state_size_before)
    factors = axis.factors(layer.scales, layer.state_size_after)

    def smaller(name: str, whole: torch.Tensor, names: Iterable[str]) -> torch.Tensor:
        if name == deepspeed.MASTER:
            return smaller_values(axis, layer, whole)
        return sliced_tensor(whole, axis.dim, index, moment_factors(name, factors, names))

    return smaller


@dataclass
class Rounding:
    """How far numbers are from what they were calculated to be, since the model's dtype holds no more digits."""

    squared_error: float = 0.0
    squared_norm: float = 0.0

    def add(self, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        self.squared_error += float((rounded.double().cpu() - exact.cpu()).square().sum())
        self.squared_norm += float(exact.square().sum())

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def smaller_values(
    axis: StateAxis, layer: LayerPlan, values: torch.Tensor, rounding: Rounding | None = None
) -> torch.Tensor:
    """What a selection of states leaves of one parameter: the kept states' entries, B and C refitted, and scaled.

    Args:
        axis: the parameter, and where its states are.
        layer: the layer's plan, which selects states.
        values: the parameter's values, whole, or something that is made and read out as they are.
        rounding: takes in how exactly new numbers are held in the values' dtype.
    """
    size = layer.state_size_after
    smaller = axis.take(values, layer.kept, layer.state_size_before)
    factors = axis.factors(layer.scales, size)
    mixtures = layer.mixtures
    if factors is None and not any(role in mixtures for role in axis.roles):
        return smaller
    exact = smaller.double()
    for number, role in enumerate(axis.roles):
        if role not in mixtures:
            continue
        new = axis.mixed(values, mixtures[role], layer.kept, number, layer.state_size_before)
        exact.narrow(axis.dim, axis.block(number, size).start, size).copy_(new)
    exact = scaled(exact, axis.dim, factors)
    rounded = exact.to(smaller.dtype)
    if rounding is not None:
        new = exact != smaller.double()
        rounding.add(exact[new], rounded[new])
    return rounded


def _like(old: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """A parameter with new values and what else the old one has: its shards, whether it trains, its marks."""
    new = nn.Parameter(fsdp2.shard_like(old, values), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def _refuse_hooks(parameter: nn.Parameter, label: str, own_hooks: set[int]) -> None:
    """Raise if a parameter has gradient hooks that would be lost with it; `own_hooks` come again by themselves."""
    after_accumulation = set(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
    if parameter._backward_hooks or after_accumulation - own_hooks:
        raise RuntimeError(
            f"layer {label} has gradient hooks, which a new parameter would lose; remove them before the cut and "
            "register them again after it"
        )


def _refuse_shared_parameters(model: nn.Module, mixers: dict[str, Mixer], plan: CompressionPlan) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{own_name}")
    for layer in plan.changes:
        for axis in mixers[layer].axes:
            shared = owners[id(axis.tensor)]
            if len(shared) > 1:
                raise RuntimeError(f"layer {layer}: one parameter has several owners ({', '.join(shared)}); untie it")


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Check that the moments an optimizer keeps for a model's parameters have the parameters' shapes.

    Raises:
        RuntimeError: one does not; fused optimizers would read past its end without an error.
    """
    optimizer = unwrap_optimizer(optimizer)
    for name, parameter in model.named_parameters():
        check_state_shapes(name, parameter, optimizer.state.get(parameter) or {})


def check_state_shapes(name: str, parameter: torch.Tensor, state: dict[str, Any]) -> None:
    """Raise a RuntimeError if a moment does not fit its parameter; fused optimizers would not notice."""
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.numel() == 1 or value.dim() != parameter.dim():
            continue
        pairs = [(value, parameter)]
        if isinstance(value, DTensor) and isinstance(parameter, DTensor):
            pairs.append((value.to_local(), parameter.to_local()))
        for kept, whole in pairs:
            if any(size not in (1, expected) for size, expected in zip(kept.shape, whole.shape, strict=True)):
                raise RuntimeError(
                    f"optimizer state {key!r} of {name} has shape {tuple(kept.shape)}, but the parameter has "
                    f"{tuple(whole.shape)}"
                )


def optimizer_bytes(optimizer: Optimizer | None) -> int:
    """The size of an optimizer's state tensors, in bytes."""
    if optimizer is None:
        return 0
    states = unwrap_optimizer(optimizer).state.values()
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _state_bytes(mixers: dict[str, Mixer]) -> int:
    return sum(mixer.bytes_per_state * mixer.state_size for mixer in mixers.values())


def layer_report(name: str, layer: LayerPlan, rounding_error: float = 0.0) -> LayerReport:
    return LayerReport(
        name=name,
        mixer_class=layer.mixer_class,
        status="cut" if layer.is_change else "unchanged",
        realization=layer.realization,
        state_size_before=layer.state_size_before,
        state_size_after=layer.state_size_after,
        criterion=layer.criterion,
        refit=layer.refit,
        relative_error=layer.relative_error,
        expected_errors=layer.expected_errors,
        kept=None if layer.kept is None else layer.kept.tolist(),
        error_curve=layer.error_curve,
        hankel_values=layer.hankel_values,
        rounding_error=rounding_error,
    )
