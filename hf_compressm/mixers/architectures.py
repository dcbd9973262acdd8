"""The table of architectures, and the search for their mixers in a model."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import mamba1, mamba2, projected


@dataclass(frozen=True)
class Architecture:
    """How one model family of Transformers carries its state.

    Attributes:
        model_type: `config.model_type`.
        layout: the module of this package that knows the parameters' layout.
        state_size_field: the config's name for N.
    """

    model_type: str
    layout: ModuleType
    state_size_field: str


# Class name of the mixer → its architecture. Subclasses of these classes are found too.
ARCHITECTURES: dict[str, Architecture] = {
    "MambaMixer": Architecture("mamba", mamba1, "state_size"),
    "Mamba2Mixer": Architecture("mamba2", mamba2, "state_size"),
    "Zamba2MambaMixer": Architecture("zamba2", mamba2, "mamba_d_state"),
    "BambaMixer": Architecture("bamba", mamba2, "mamba_d_state"),
    "FalconH1Mixer": Architecture("falcon_h1", mamba2, "mamba_d_state"),
    "GraniteMoeHybridMambaLayer": Architecture("granitemoehybrid", mamba2, "mamba_d_state"),
    "NemotronHMamba2Mixer": Architecture("nemotron_h", mamba2, "ssm_state_size"),
}


# What may stand around a mixer, and what it calls the module inside.
WRAPPERS = {
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OptimizedModule": "_orig_mod",
}


@dataclass(frozen=True)
class Mixer:
    """A mixer found in a model: its name there, the module, its architecture and the config that rules its size."""

    name: str
    module: nn.Module
    architecture: Architecture
    config: PreTrainedConfig | None

    @property
    def layout(self) -> ModuleType:
        return projected if self.is_projected else self.architecture.layout

    @property
    def state_size(self) -> int:
        return self.module.ssm_state_size

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
        return self.architecture.layout is mamba2

    @property
    def bytes_per_state(self) -> int:
        """What one state more takes in the recurrent cache of one sequence: one number per channel."""
        # Transformers caches recurrent states in float32, whatever the weights are.
        return self.module.intermediate_size * 4

    @property
    def groups(self) -> int:
        return self.layout.groups(self.module)


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
    modules = [(_own_name(name), module) for name, module in model.named_modules()]
    models = [(name, module) for name, module in modules if isinstance(module, PreTrainedModel)]
    mixers = {}
    for name, module in modules:
        architecture = next(
            (ARCHITECTURES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in ARCHITECTURES), None
        )
        if architecture is not None:
            config = _ruling_config(name, architecture, models) or getattr(module, "config", None)
            mixers[name] = Mixer(name, module, architecture, config)
        elif type(module).__name__ in WRAPPERS:
            # Shows its inner module's attributes as its own.
            continue
        elif hasattr(module, "ssm_state_size") or "A_log" in dict(module.named_parameters(recurse=False)):
            raise TypeError(
                f"layer {name or '(the model itself)'}: {type(module).__name__} carries a state, but is not "
                f"supported; supported mixers: {', '.join(ARCHITECTURES)}"
            )
    if not mixers:
        raise ValueError(
            f"{type(model).__name__} has no mixer whose state could be reduced; "
            f"supported mixers: {', '.join(ARCHITECTURES)}"
        )
    return mixers


def _own_name(name: str) -> str:
    """A module's name without what FSDP1, activation checkpointing and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS.values())


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
