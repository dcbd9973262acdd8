"""Apply a plan to a model and its optimizer, in place; all is prepared and checked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging

from .distributed.ddp import rebuild_reducer, unwrap
from .mixers import Mixer, StateAxis, find_mixers, layers_by_config
from .mixers.resize import project_in_place, update_configs
from .modeling_compressm import PROJECTIONS, projected_class
from .optimizer import add_parameters, replace_parameter, sliced_state, unwrap_optimizer
from .plan import CompressionPlan, LayerPlan
from .report import CompressionReport, LayerReport

logger = logging.get_logger(__name__)


@dataclass
class _Replacement:
    """A parameter, the one that takes its place, and its optimizer state."""

    axis: StateAxis
    old: nn.Parameter
    new: nn.Parameter
    state: dict[str, Any] | None


def compress_(model: nn.Module, plan: CompressionPlan, optimizer: Optimizer | None = None) -> CompressionReport:
    """Cut states out of a model, in place, and carry the optimizer's state along.

    Parameters are replaced by smaller ones, the optimizer's moments are sliced, the config's state size is updated,
    and a DDP wrapper's reducer is rebuilt. A projected layer gets two parameters more, which the optimizer takes on
    without weight decay if it has a group without; model and config become objects of their projected classes. Call it
    where no gradients are alive: after `optimizer.zero_grad()`.

    Args:
        model: a model, bare or as torch.compile, DDP or Accelerate wrapped it. Under DDP, all processes must call this
            with the same plan.
        plan: from `plan_compression`, or loaded.
        optimizer: the optimizer that trains the model, bare or as Accelerate wrapped it.

    Returns:
        What became of every mixer.

    Raises:
        ValueError: the plan does not fit the model.
        TypeError: a mixer, or an optimizer state, that is not supported.
        RuntimeError: a sharded model (FSDP, DeepSpeed), or parameters with gradient hooks or with several owners.

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
    bare, ddp = unwrap(model)
    if optimizer is not None:
        optimizer = unwrap_optimizer(optimizer)
    mixers = find_mixers(bare)
    validate(plan, mixers)
    parameters_before, bytes_before = _count_parameters(bare), optimizer_bytes(optimizer)
    _refuse_shared_parameters(bare, mixers, plan)
    replacements, projections = [], {}
    for name, layer in plan.changes.items():
        if layer.realization == "projected":
            projections[name] = _prepare_projection(mixers[name], layer)
        else:
            replacements += _prepare(name, mixers[name], layer, optimizer)

    # From here on nothing can fail.
    for item in replacements:
        setattr(item.axis.module, item.axis.parameter, item.new)
        if optimizer is not None:
            replace_parameter(optimizer, item.old, item.new, item.state)
    changed = [item.new for item in replacements]
    for name, layer in plan.changes.items():
        if name in projections:
            changed += _project(bare, mixers[name], projections[name], layer.state_size_after, optimizer)
        else:
            mixers[name].layout.set_state_size(mixers[name].module, layer.state_size_after)
    update_configs(bare)
    if ddp is not None and changed:
        rebuild_reducer(ddp, changed)
    return CompressionReport(
        layers=[_layer_report(name, layer) for name, layer in plan.layers.items()],
        tokens=plan.tokens,
        parameters_before=parameters_before,
        parameters_after=_count_parameters(bare),
        optimizer_bytes_before=bytes_before,
        optimizer_bytes_after=optimizer_bytes(optimizer),
    )


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
    if layer.readout is None:
        return
    if mixer.layout.readout_axis(mixer.module) is None:
        raise ValueError(f"layer {name}: the plan refits the readout, which {mixer.layout.NAME} mixers do not allow")
    if tuple(layer.readout.shape) != (kept.shape[1], before):
        raise ValueError(
            f"layer {name}: the readout matrix has shape {tuple(layer.readout.shape)}; "
            f"expected {(kept.shape[1], before)}"
        )
    if not torch.isfinite(layer.readout).all():
        raise ValueError(f"layer {name}: the readout matrix holds NaN or infinity")


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


@torch.no_grad()
def _prepare_projection(mixer: Mixer, layer: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of `B_projection` and `C_projection`; of a layer that is projected already, the products."""
    for axis in mixer.layout.state_axes(mixer.module):
        _refuse_quantized(axis.tensor, f"{mixer.name}: {axis.parameter} of {type(axis.module).__name__}")
    if not mixer.is_projected:
        return layer.B_projection, layer.C_projection
    module = mixer.module
    for name in PROJECTIONS:
        _refuse_hooks(getattr(module, name), f"{mixer.name}: {name}")
    return (
        projected_further(module.B_projection, layer.B_projection, mixer.groups),
        projected_further(module.C_projection, layer.C_projection, mixer.groups),
    )


def projected_further(first: torch.Tensor, second: torch.Tensor, groups: int) -> torch.Tensor:
    """One projection after another, group by group: [first_1 second_1 | ... | first_G second_G], in float64."""
    left, right = (matrix.double().cpu().unflatten(1, (groups, -1)) for matrix in (first, second))
    return torch.einsum("ngm,mgr->ngr", left, right).flatten(1)


@torch.no_grad()
def _project(
    model: nn.Module, mixer: Mixer, values: tuple[torch.Tensor, torch.Tensor], size: int, optimizer: Optimizer | None
) -> list[nn.Parameter]:
    """Put a projection into a mixer and its optimizer; returns the new parameters."""
    module = mixer.module
    if mixer.is_projected:
        for name, value in zip(PROJECTIONS, values, strict=True):
            old = getattr(module, name)
            new = nn.Parameter(value.to(old), requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            setattr(module, name, new)
            if optimizer is not None:
                replace_parameter(optimizer, old, new, None)
        module.ssm_state_size = size
    else:
        project_in_place(mixer, size)
        for parameter, value in zip((module.B_projection, module.C_projection), values, strict=True):
            parameter.copy_(value)
        if optimizer is not None:
            add_parameters(optimizer, model, module, [module.B_projection, module.C_projection])
    return [module.B_projection, module.C_projection]


@torch.no_grad()
def _prepare(name: str, mixer: Mixer, layer: LayerPlan, optimizer: Optimizer | None) -> list[_Replacement]:
    """The new parameters of one layer and their optimizer state; nothing is touched."""
    replacements = []
    for axis in mixer.layout.state_axes(mixer.module):
        old, label = axis.tensor, f"{name}: {axis.parameter} of {type(axis.module).__name__}"
        _refuse_quantized(old, label)
        index = axis.index(layer.kept, layer.state_size_before)
        values = smaller_values(mixer, axis, layer, old.detach())
        state = None
        if optimizer is not None:
            state = sliced_state(optimizer, old, label, axis.dim, index)
            check_state_shapes(label, values, state or {})
        replacements.append(_Replacement(axis, old, _like(old, values, axis.dim, index), state))
    for item in replacements:
        _refuse_hooks(item.old, f"{name}: {item.axis.parameter}")
    return replacements


def smaller_values(mixer: Mixer, axis: StateAxis, layer: LayerPlan, values: torch.Tensor) -> torch.Tensor:
    """What a selection of states leaves of one parameter's values: the kept states' entries, C's rows refitted."""
    index = axis.index(layer.kept, layer.state_size_before)
    smaller = values.index_select(axis.dim, index.to(values.device))
    readout = mixer.layout.readout_axis(mixer.module) if layer.readout is not None else None
    if readout is not None and axis == readout[0]:
        _, block = readout
        rows = values[axis.block(block, layer.state_size_before)].double().cpu()
        smaller[axis.block(block, layer.state_size_after)] = (layer.readout.double() @ rows).to(smaller)
    return smaller


def _like(old: nn.Parameter, values: torch.Tensor, dim: int, index: torch.Tensor) -> nn.Parameter:
    """A parameter with new values and everything else of the old one: whether it trains, its marks, its gradient."""
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    if old.grad is not None:
        new.grad = old.grad.index_select(dim, index.to(old.device))
    return new


def _refuse_quantized(parameter: nn.Parameter, label: str) -> None:
    if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point():
        raise TypeError(
            f"layer {label} is a {type(parameter.data).__name__} of {parameter.dtype}, not a plain floating-point "
            "tensor; cut the model before it is quantized"
        )


def _refuse_hooks(parameter: nn.Parameter, label: str) -> None:
    """Raise if a parameter has gradient hooks: they would be lost with it."""
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
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
        for axis in mixers[layer].layout.state_axes(mixers[layer].module):
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
        if any(size not in (1, whole) for size, whole in zip(value.shape, parameter.shape, strict=True)):
            raise RuntimeError(
                f"optimizer state {key!r} of {name} has shape {tuple(value.shape)}, but the parameter has "
                f"{tuple(parameter.shape)}"
            )


def optimizer_bytes(optimizer: Optimizer | None) -> int:
    """The size of an optimizer's state tensors, in bytes."""
    if optimizer is None:
        return 0
    states = unwrap_optimizer(optimizer).state.values()
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _layer_report(name: str, layer: LayerPlan) -> LayerReport:
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
    )
