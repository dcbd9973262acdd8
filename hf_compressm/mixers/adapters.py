"""What PEFT puts around a mixer and its layers: every copy and adapter that must be cut with them, and what they do.

A cut is linear in the rows it touches. With LoRA, a layer is W + s B A: cutting the rows of W and of B cuts the rows
of their sum, and multiplying both by M multiplies the sum by M, exactly and for every adapter. With DoRA, row i is
m_i V_i / ‖V_i‖ with V = W + s B A; see `MagnitudeAxis`.

PEFT is not imported here: its classes are known by their names, and where it is not used nothing is asked of it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

from ..distributed.fsdp2 import full_tensor, is_made_of_plain_tensors
from ..distributed.wrappers import is_kind
from .scan import StateAxis

logger = logging.get_logger(__name__)

# Variants of LoRA (besides LoRA itself) in which only B, and a magnitude if there is one, know the layer's rows.
KNOWN_VARIANTS = ("DoraLinearVariant", "ALoraLinearVariant")
# From this relative difference on, an adapter's rows are no longer what was fitted.
NOTABLE_DIFFERENCE = 1e-3
FLOATING_POINT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers are its values: not a quantization library's own, nor integers or 8-bit floats."""
    return is_made_of_plain_tensors(tensor.data) and tensor.dtype in FLOATING_POINT


def between(model: nn.Module) -> set[str]:
    """The paths of a model's modules that stand where PEFT put its own ones: names are given without their last part.

    Example:
        >>> between(nn.Linear(1, 1))
        set()
    """
    inner = {"PeftModel": "base_model", "BaseTuner": "model", "BaseTunerLayer": "base_layer"}
    paths = set()
    for path, module in model.named_modules():
        for kind, attribute in inner.items():
            if is_kind(module, kind):
                paths.add(f"{path}.{attribute}".lstrip("."))
    return paths


def parameter_wrappers(module: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """The wrappers that `target_parameters` puts around a module, outermost first, and the module inside them."""
    wrappers = []
    while is_kind(module, "ParamWrapper"):
        wrappers.append(module)
        module = module.base_layer
    return wrappers, module


def copies_of(layer: nn.Module) -> list[nn.Module]:
    """The modules that carry a layer's sizes: itself, or all that PEFT made of it."""
    if is_kind(layer, "AuxiliaryTrainingWrapper"):
        return [layer.original_module, *layer.modules_to_save.values()]
    if is_kind(layer, "LoraLayer"):
        return [layer.get_base_layer(), layer, *layer.lora_B.values()]
    return [layer]


def set_features(wrappers: Iterable[nn.Module]) -> None:
    """Write the sizes that adapters of a mixer's own parameters now have into their modules."""
    for wrapper in wrappers:
        for columns, rows in zip(wrapper.lora_A.values(), wrapper.lora_B.values(), strict=True):
            wrapper.in_features = columns.in_features = columns.weight.shape[1]
            wrapper.out_features = rows.out_features = rows.weight.shape[0]


def through_adapters(axis: StateAxis, wrappers: Iterable[nn.Module] = ()) -> list[StateAxis]:
    """Every parameter that must be cut along with one axis of a layout.

    Args:
        axis: of a layer that PEFT may have wrapped.
        wrappers: those that `target_parameters` put around the mixer.

    Raises:
        TypeError: an adapter that is not known to be cut by rows.
    """
    layer = axis.module
    if is_kind(layer, "AuxiliaryTrainingWrapper"):
        return [dataclasses.replace(axis, module=module) for module in copies_of(layer)]
    if is_kind(layer, "BaseTunerLayer"):
        base = dataclasses.replace(axis, module=layer.get_base_layer())
        return [base, *_adapters_of_a_layer(axis)] if axis.parameter == "weight" else [base]
    return [axis, *(item for wrapper in wrappers for item in _adapters_of_a_parameter(axis, wrapper))]


def _adapters_of_a_layer(axis: StateAxis) -> list[StateAxis]:
    layer, axes = axis.module, []
    _refuse_unknown(layer, is_kind(layer, "LoraLayer") and isinstance(layer.get_base_layer(), nn.Linear))
    if any(name in layer.lora_magnitude_vector for name in layer.merged_adapters):
        raise RuntimeError(
            f"the DoRA adapters {layer.merged_adapters} are merged into the weights, and PEFT could not take them out "
            "again after a cut; call unmerge_adapter() before it"
        )
    for name, rows in layer.lora_B.items():
        variant = getattr(layer, "lora_variant", {}).get(name)
        whole = isinstance(rows, nn.Linear) and rows.weight.shape[0] == axis.tensor.shape[0]
        _refuse_unknown(layer, whole and (variant is None or is_kind(variant, *KNOWN_VARIANTS)), variant)
        axes.append(dataclasses.replace(axis, module=rows))
        # A number that multiplies a layer's weight leaves its bias.
        if rows.bias is not None and axis.roles:
            axes.append(dataclasses.replace(axis, module=rows, parameter="bias"))
        if name in layer.lora_magnitude_vector:
            fields = {field.name: getattr(axis, field.name) for field in dataclasses.fields(axis)}
            fields["module"] = layer.lora_magnitude_vector[name]
            axes.append(MagnitudeAxis(**fields, layer=layer, adapter=name))
    return axes


def _refuse_unknown(layer: nn.Module, known: bool, variant: object = None) -> None:
    if not known:
        what = f"the variant {type(variant).__name__} of" if variant is not None else "the adapter"
        raise TypeError(
            f"{what} {type(layer).__module__}.{type(layer).__name__} around a layer that a cut changes cannot be cut; "
            "supported there: LoRA, rsLoRA and DoRA on linear layers, modules_to_save and target_parameters. Merge it "
            "into the model first (merge_and_unload), or leave this layer out of target_modules"
        )


def _adapters_of_a_parameter(axis: StateAxis, wrapper: nn.Module) -> list[StateAxis]:
    """Where `target_parameters` adds s B A to a parameter: its columns, the states of A_log, are those of A."""
    if wrapper.parameter_name != axis.parameter:
        return []
    if axis.tensor.dim() != 2 or axis.dim != 1:
        # PEFT has one B for all heads, which keep different states; and it cannot call Zamba's mixers anyway.
        raise TypeError(
            f"target_parameters: an adapter of {axis.parameter!r} with shape {tuple(axis.tensor.shape)} cannot be "
            "cut; merge it into the model first (merge_and_unload)"
        )
    return [dataclasses.replace(axis, module=columns, parameter="weight") for columns in wrapper.lora_A.values()]


@dataclass(frozen=True)
class MagnitudeAxis(StateAxis):
    """The magnitudes m of a DoRA adapter: row i of the layer is ρ_i V_i, with V = W + s B A and ρ_i = m_i / ‖V_i‖.

    A refit multiplies the rows of C in W and in B, and so in V, by the plan's M, and those that make the state's B by
    another. Each new row keeps the ρ_i of the state that it belongs to: m'_i = ρ_i ‖(M V)_i‖. See
    `mixture_of_parameters` for the M that makes this exact.
    """

    layer: nn.Module | None = None
    adapter: str = ""
    norms: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)

    def remembering(self, mixtures: Mapping[str, torch.Tensor], state_size: int) -> MagnitudeAxis:
        """The same with ‖V_i‖ and ‖(M V)_i‖ as they are now: ZeRO's weights are cut when the layer is already.

        Args:
            mixtures: role → M.
            state_size: N.
        """
        runs = [(number, role) for number, role in enumerate(self.roles) if role in mixtures]
        norms = {number: self._norms(mixtures[role], number, state_size) for number, role in runs}
        return dataclasses.replace(self, norms=norms)

    def _norms(self, matrix: torch.Tensor, number: int, state_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        V = directions(self.layer, self.adapter)[self.block(number, state_size)]
        return V.norm(dim=1), (matrix[number % len(matrix)].to(V) @ V).norm(dim=1)

    def mixed(
        self, values: torch.Tensor, matrix: torch.Tensor, kept: torch.Tensor, number: int, state_size: int
    ) -> torch.Tensor:
        norms, new_norms = self.norms.get(number) or self._norms(matrix, number, state_size)
        ratios = _ratios(values[self.block(number, state_size)].to(norms), norms)
        return ratios[kept[number % len(kept)].to(norms.device)] * new_norms


@torch.no_grad()
def directions(layer: nn.Module, adapter: str) -> torch.Tensor:
    """V = W + s B A of one adapter around a linear layer, in float64; a collective where parameters are sharded."""
    W, B, A = (
        full_tensor(part.weight.detach()).double()
        for part in (layer.get_base_layer(), layer.lora_B[adapter], layer.lora_A[adapter])
    )
    return W + layer.scaling[adapter] * B @ A


def _ratios(magnitudes: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """ρ = m / ‖V‖ of each row; 1 for a row that is zero, which has no direction."""
    return torch.where(norms > 0, magnitudes / norms, 1.0)


@torch.no_grad()
def mixture_of_parameters(
    name: str, axes: list[StateAxis], matrix: torch.Tensor, kept: torch.Tensor, role: str
) -> torch.Tensor:
    """From a refit of what the layer does, C' = M₀ C, to that of its parameters, W' = M W and B' = M B of adapters.

    With LoRA they are the same. With DoRA, C = diag(ρ) V, and the active adapter's new rows are exactly M₀ C if
    M = diag(ρ_S)⁻¹ M₀ diag(ρ): then M V = diag(ρ_S)⁻¹ M₀ C, and each row keeps its ρ_i (`MagnitudeAxis`). A plan has
    one M for the base and all its adapters; of others the rows are mixed in with somewhat different weights.

    Args:
        name: the layer's name, for the warning.
        axes: of the mixer.
        matrix: M₀, shape (groups, r, N).
        kept: S, shape (groups, r).
        role: `B` or `C`: whose rows are refitted.

    Returns:
        M, of the same shape and dtype.
    """
    magnitudes = [axis for axis in axes if isinstance(axis, MagnitudeAxis) and role in axis.roles]
    if not magnitudes:
        return matrix
    layer, size = magnitudes[0].layer, matrix.shape[-1]
    at = magnitudes[0].block(magnitudes[0].roles.index(role), size)
    own, V, ratios = kept[0].cpu(), {}, {}
    for adapter in layer.lora_B:
        V[adapter] = directions(layer, adapter)[at].cpu()
        ratios[adapter] = torch.ones(size, dtype=torch.float64)
    for axis in magnitudes:
        ratios[axis.adapter] = _ratios(axis.tensor[at].double().cpu(), V[axis.adapter].norm(dim=1))
    active = [] if layer.disable_adapters or layer.merged else [item for item in layer.active_adapters if item in V]
    fitted = next((ratios[item] for item in active), torch.ones(size, dtype=torch.float64))
    M0 = matrix[0].double()
    M = M0 * fitted / fitted[own, None]
    for adapter, ratio in ratios.items():
        wanted = M0 @ (ratio[:, None] * V[adapter])
        difference = float((ratio[own, None] * (M @ V[adapter]) - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if difference > NOTABLE_DIFFERENCE:
            logger.warning(
                f"layer {name}: the refit was made for {', '.join(active) or 'the base model'}; of the adapter "
                f"{adapter!r} it changes the rows of {role} by a further {difference:.2g} of their size (DoRA's "
                "magnitudes do not mix as rows do)"
            )
    return M.to(matrix)[None]


def effective_weight(layer: nn.Module, name: str = "weight") -> torch.Tensor:
    """A parameter in float32, as the layer's forward uses it: with what active adapters add, DoRA's magnitudes, ...

    Of quantized weights it is what they stand for. Where a model reads a layer's parameter past the layer's forward,
    adapters do nothing: there, read `layer.weight`.
    """
    values = getattr(layer, name)
    if name == "weight" and (is_kind(layer, "BaseTunerLayer") or not is_plain(values)):
        return _linear_map(layer)[0]
    return values.float()


def weight_and_bias(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both in float32, as the layer's forward uses them; no bias is None."""
    if is_kind(layer, "BaseTunerLayer"):
        return _linear_map(layer)
    return effective_weight(layer), None if layer.bias is None else layer.bias.float()


@torch.no_grad()
def _linear_map(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a linear layer, with adapters or quantized: what it makes of unit vectors, and of zero."""
    layer = copy.deepcopy(layer).eval()
    dtype = torch.float32
    if is_plain(layer.weight):
        layer.float()
    elif layer.weight.dtype in FLOATING_POINT:
        # torchao's tensors show the type that their layer calculates in.
        dtype = layer.weight.dtype
    unit_vectors = torch.eye(layer.in_features, dtype=dtype, device=layer.weight.device)
    bias = layer(torch.zeros_like(unit_vectors[:1]))[0]
    has_bias = layer.bias is not None or any(getattr(layer, "lora_bias", {}).values())
    return (layer(unit_vectors) - bias).T.float(), bias.float() if has_bias else None


@contextlib.contextmanager
def adapted_parameters(wrappers: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context, parameters that `target_parameters` adapts have their effective values, as in a forward."""
    originals = []
    try:
        for wrapper in wrappers:
            active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
            if wrapper.disable_adapters or wrapper.merged or not active:
                continue
            module, name = wrapper.get_base_layer(), wrapper.parameter_name
            original = getattr(module, name)
            with torch.no_grad():
                values = original + sum(wrapper.get_delta_weight(adapter) for adapter in active)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
            originals.append((module, name, original))
        yield
    finally:
        for module, name, original in reversed(originals):
            setattr(module, name, original)


def bypassed_adapters(mixers: Mapping[str, nn.Module]) -> list[str]:
    """What to warn of: adapters of mixers, by their names, that a forward goes past: it reads the weight itself."""
    reasons = {
        "dt_proj": "the forward reads dt_proj.weight itself: it has no effect and is not trained",
        "x_proj": "mamba_ssm's fused kernel reads x_proj.weight itself: it is not trained, but has its effect in "
        "evaluation",
    }
    bypassed: dict[str, list[str]] = {}
    for name, mixer in mixers.items():
        for layer in reasons:
            if is_kind(getattr(mixer, layer, None), "BaseTunerLayer") and (
                layer == "dt_proj" or _has_fused_kernel(mixer)
            ):
                bypassed.setdefault(layer, []).append(f"{name}.{layer}")
    return [f"the adapter of {', '.join(names)} is bypassed: {reasons[layer]}" for layer, names in bypassed.items()]


def _has_fused_kernel(mixer: nn.Module) -> bool:
    """Whether training goes through `mamba_inner_fn`: transformers takes it from mamba_ssm, or from the Hub."""
    sources = [sys.modules.get(cls.__module__) for cls in type(mixer).__mro__]
    on_gpu = mixer.x_proj.weight.device.type == "cuda"
    return any(hasattr(source, "mamba_inner_fn") for source in sources) and (
        on_gpu or sys.modules.get("mamba_ssm") is not None
    )
