"""The mixers of a model: how they are found, and what the package knows of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..distributed.wrappers import is_kind
from . import mamba1_normalized, projected
from .adapters import adapted_parameters, between, is_plain, parameter_wrappers, set_features, through_adapters
from .architectures import ARCHITECTURES, Architecture, architecture_of
from .scan import ScanInputs, StateAxis


class _Renamed:
    """A mixer under the attribute names that its layout knows."""

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        vars(self).update(_module=module, _names=names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_module", "_names"):
            # Asked for before there is anything to ask, by copy and pickle.
            raise AttributeError(name)
        return getattr(self._module, self._names.get(name, name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, self._names.get(name, name), value)


# What may stand around a mixer, and what it calls the module inside.
WRAPPERS = {
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OptimizedModule": "_orig_mod",
}
# PEFT's modules do, too.
SHOWN_THROUGH = ("PeftModel", "BaseTuner", "BaseTunerLayer", "AuxiliaryTrainingWrapper")


@dataclass(frozen=True)
class Mixer:
    """A mixer found in a model.

    Attributes:
        name: its name in the model, without what PEFT and other wrappers put into it.
        module: the mixer itself.
        architecture: its row of the table.
        config: the config that rules its size.
        wrappers: what PEFT's `target_parameters` put around it, outermost first.
    """

    name: str
    module: nn.Module
    architecture: Architecture
    config: PreTrainedConfig | None
    wrappers: tuple[nn.Module, ...] = ()

    @property
    def layout(self) -> ModuleType:
        return projected if self.is_projected else self.architecture.layout

    @property
    def parts(self) -> nn.Module:
        """The module under the names that the layout knows."""
        names = self.architecture.names
        return _Renamed(self.module, names) if names else self.module

    @property
    def state_size(self) -> int:
        return self.parts.ssm_state_size

    @property
    def axes(self) -> list[StateAxis]:
        """Every parameter that a cut changes, those of adapters included."""
        return self.axes_in(self.layout)

    def axes_in(self, layout: ModuleType) -> list[StateAxis]:
        """The same in another layout than that of the mixer's present realization."""
        axes, names = layout.state_axes(self.parts), self.architecture.names
        if names:
            axes = [
                dataclasses.replace(axis, module=self.module, parameter=names.get(axis.parameter, axis.parameter))
                if isinstance(axis.module, _Renamed)
                else axis
                for axis in axes
            ]
        return [part for axis in axes for part in through_adapters(axis, self.wrappers)]

    @property
    def state_axes(self) -> list[StateAxis]:
        """The parameters whose shapes depend on N."""
        return [axis for axis in self.axes if axis.roles]

    def set_state_size(self, state_size: int) -> None:
        """Write the new size into the numbers that the forward reads; the parameters have it already."""
        self.layout.set_state_size(self.parts, state_size)
        set_features(self.wrappers)

    def scan_inputs(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> ScanInputs:
        """Recompute the recurrence's inputs from the mixer's input, in float32.

        Args:
            hidden_states: shape (batch, length, hidden).
            attention_mask: 1 for real tokens, shape (batch, length); None if there is no padding.
        """
        with adapted_parameters(self.wrappers):
            return self.layout.scan_inputs(self.parts, hidden_states, attention_mask)

    def decay_rates(self) -> torch.Tensor:
        """The negative rates A, shape (groups, channels, N or 1), float32."""
        with adapted_parameters(self.wrappers):
            return self.layout.decay_rates(self.parts)

    def parameter_norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms of the parameter rows that make B and C, each of shape (groups, N), float32."""
        with adapted_parameters(self.wrappers):
            return self.layout.parameter_norms(self.parts)

    def copied(self, copy: Callable[[nn.Module], nn.Module]) -> Mixer:
        """The same mixer with a copy of its module and of what is around it."""
        wrappers, module = parameter_wrappers(copy((*self.wrappers, self.module)[0]))
        return dataclasses.replace(self, module=module, wrappers=tuple(wrappers))

    @property
    def class_name(self) -> str:
        """The name of its class in Transformers; fully_shard makes it an object of a class derived from that."""
        kinds = type(self.module).__mro__
        return next(cls.__name__ for cls in kinds if "FSDPModule" not in {base.__name__ for base in cls.__mro__})

    @property
    def is_projected(self) -> bool:
        """Whether its states are projections of more features."""
        return hasattr(self.module, "B_projection")

    @property
    def can_be_projected(self) -> bool:
        """Whether a change of the state's basis commutes with its dynamics: A is one number per head."""
        return self.architecture.can_be_projected

    @property
    def is_normalized(self) -> bool:
        """Whether B and C are divided by root mean squares over the states, so that a cut has to scale parameters."""
        return self.architecture.layout is mamba1_normalized

    @property
    def bytes_per_state(self) -> int:
        """What one state more takes in the recurrent cache of one sequence: one number per channel."""
        # Transformers caches recurrent states in float32, whatever the weights are.
        return self.parts.intermediate_size * 4

    @property
    def groups(self) -> int:
        return self.layout.groups(self.parts)


def check_mixer(mixer: Mixer) -> None:
    """Check that a mixer has the parameters of its layout, whole and in memory.

    Raises:
        ValueError: a parameter is missing, or has not the shape that the state size gives it.
        RuntimeError: a parameter is on the meta device.
        TypeError: a parameter is quantized: its rows cannot be taken apart.
    """
    for part in getattr(mixer.layout, "PARTS", ()):
        if getattr(mixer.parts, part, None) is None:
            label = f"layer {mixer.name}: {part} of {type(mixer.module).__name__}"
            raise ValueError(f"{label} is missing, which the layout {mixer.layout.NAME!r} has")
    for axis in mixer.axes:
        label, tensor = f"layer {mixer.name}: {axis.parameter} of {type(axis.module).__name__}", axis.tensor
        if tensor is None:
            raise ValueError(f"{label} is missing, which the layout {mixer.layout.NAME!r} has")
        if tensor.is_meta:
            raise RuntimeError(
                f"{label} is on the meta device: not loaded, or offloaded by a device_map. To cut the model, load it "
                "whole, on one device (a CPU will do), or bring offloaded weights back with "
                "accelerate.hooks.remove_hook_from_submodules(model)"
            )
        if not is_plain(tensor):
            raise TypeError(
                f"{label} is a {type(tensor).__name__} of {tensor.dtype}, not a plain floating-point tensor; cut the "
                "model before it is quantized"
            )
        size, expected = tensor.shape[axis.dim], axis.length(mixer.state_size)
        if size != expected:
            raise ValueError(
                f"{label} has size {size} in dimension {axis.dim}, but state_size {mixer.state_size} makes it "
                f"{expected}; has only a part of this mixer been resized, or is its layout another one?"
            )


def find_mixers(model: nn.Module) -> dict[str, Mixer]:
    """Find every mixer of a model, by its name in the model, in the order of `named_modules`.

    Args:
        model: a Transformers model, or any module that holds one or several of them.

    Raises:
        TypeError: a module that carries a state but is in no row of the table.
        ValueError: the model has no mixer at all.

    Example:
        >>> from transformers import MambaConfig, MambaModel
        >>> config = MambaConfig(vocab_size=8, hidden_size=8, state_size=4, num_hidden_layers=2)
        >>> list(find_mixers(MambaModel(config)))
        ['layers.0.mixer', 'layers.1.mixer']
    """
    hidden = between(model)
    modules = [(_own_name(name, hidden), module) for name, module in model.named_modules()]
    models = [(name, module) for name, module in modules if isinstance(module, PreTrainedModel)]
    mixers, wrapped = {}, {}
    for name, module in modules:
        architecture = architecture_of(module)
        if architecture is not None:
            config = _ruling_config(name, architecture, models) or getattr(module, "config", None)
            mixers[name] = Mixer(name, module, architecture, config, wrapped.get(id(module), ()))
        elif is_kind(module, "ParamWrapper"):
            wrappers, inside = parameter_wrappers(module)
            wrapped.setdefault(id(inside), tuple(wrappers))
        elif is_kind(module, "AuxiliaryTrainingWrapper") and architecture_of(module.original_module) is not None:
            raise TypeError(
                f"layer {name}: modules_to_save holds a whole mixer, which cannot be cut; name the layers in it that "
                "should be trained (in_proj, conv1d, ...)"
            )
        elif type(module).__name__ in WRAPPERS or is_kind(module, *SHOWN_THROUGH):
            # Shows its inner module's attributes as its own.
            continue
        elif hasattr(module, "ssm_state_size") or "A_log" in dict(module.named_parameters(recurse=False)):
            raise TypeError(
                f"layer {name or '(the model itself)'}: {type(module).__name__} carries a state, but is not "
                "supported; hf_compressm.mixers.register_mixer can add it. Supported mixers: "
                f"{', '.join(ARCHITECTURES)}"
            )
    if not mixers:
        raise ValueError(
            f"{type(model).__name__} has no mixer whose state could be reduced; "
            f"supported mixers: {', '.join(ARCHITECTURES)}"
        )
    return mixers


def _own_name(name: str, hidden: set[str]) -> str:
    """A module's name without what PEFT, FSDP1, activation checkpointing and torch.compile put into it."""
    parts = name.split(".")
    return ".".join(
        part
        for number, part in enumerate(parts, start=1)
        if part not in WRAPPERS.values() and ".".join(parts[:number]) not in hidden
    )


def _ruling_config(
    name: str, architecture: Architecture, models: list[tuple[str, PreTrainedModel]]
) -> PreTrainedConfig | None:
    """The config of the innermost Transformers model around a mixer that has the architecture's field."""
    around = [
        model.config
        for prefix, model in models
        if (prefix == "" or name.startswith(f"{prefix}.")) and hasattr(model.config, architecture.state_size_field)
    ]
    return around[-1] if around else None


def layers_by_config(mixers: dict[str, Mixer]) -> list[list[str]]:
    """Names of the layers that share one config, and so its state size. Mixers without a config stand alone."""
    together: dict[Any, list[str]] = {}
    for name, mixer in mixers.items():
        together.setdefault(name if mixer.config is None else id(mixer.config), []).append(name)
    return list(together.values())
