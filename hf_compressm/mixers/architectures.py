"""The table of architectures: which mixer has which layout, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

from torch import nn

from . import mamba1, mamba1_heads, mamba1_normalized, mamba2


@dataclass(frozen=True)
class Architecture:
    """How one model family carries its state.

    Attributes:
        model_type: `config.model_type`; None for a mixer that is in no model of Transformers.
        layout: the module that knows the parameters' layout: one of this package, or your own with the same functions.
        state_size_field: the config's name for N.
        groups_field: the config's name for the number of groups, each with states of its own; None: one group.
        can_be_projected: whether there is a projected model class.
        names: the layout's name of an attribute → the mixer's, where they differ.
        note: what a user should know of it, one sentence for the table in the README.
    """

    model_type: str | None
    layout: ModuleType
    state_size_field: str = "state_size"
    groups_field: str | None = None
    can_be_projected: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


# Class name of the mixer → its architecture; outside of Transformers, the name with its module. Subclasses of these
# classes are found too.
ARCHITECTURES: dict[str, Architecture] = {
    "MambaMixer": Architecture("mamba", mamba1),
    "FalconMambaMixer": Architecture(
        "falcon_mamba",
        mamba1_normalized,
        note="B and C are divided by their root mean square, which loses the removed states: exact where those are "
        "zero, else the refit makes up for part of it; D and out_proj are scaled along.",
    ),
    "JambaMambaMixer": Architecture(
        "jamba",
        mamba1_normalized,
        "mamba_d_state",
        note="As Falcon-Mamba, but the norms' own weights are scaled along, which leaves less to make up for.",
    ),
    "ZambaMambaMixer": Architecture(
        "zamba",
        mamba1_heads,
        "mamba_d_state",
        "n_mamba_heads",
        note="Each head keeps states of its own, and has a readout of its own to be refitted.",
    ),
    "Mamba2Mixer": Architecture("mamba2", mamba2, "state_size", "n_groups", True),
    "Zamba2MambaMixer": Architecture("zamba2", mamba2, "mamba_d_state", "mamba_ngroups", True),
    "BambaMixer": Architecture("bamba", mamba2, "mamba_d_state", "mamba_n_groups", True),
    "FalconH1Mixer": Architecture(
        "falcon_h1",
        mamba2,
        "mamba_d_state",
        "mamba_n_groups",
        True,
        note="`mup_vector`, which is in no checkpoint, follows the new size.",
    ),
    "GraniteMoeHybridMambaLayer": Architecture("granitemoehybrid", mamba2, "mamba_d_state", "mamba_n_groups", True),
    "NemotronHMamba2Mixer": Architecture("nemotron_h", mamba2, "ssm_state_size", "n_groups", True),
    "mamba_ssm.modules.mamba_simple.Mamba": Architecture(
        None,
        mamba1,
        names={"ssm_state_size": "d_state", "intermediate_size": "d_inner", "time_step_rank": "dt_rank"},
        note="Has no Transformers config: write the new size into the one that you build it from.",
    ),
    "mamba_ssm.modules.mamba2.Mamba2": Architecture(
        None,
        mamba2,
        names={
            "ssm_state_size": "d_state",
            "intermediate_size": "d_ssm",
            "n_groups": "ngroups",
            "num_heads": "nheads",
            "head_dim": "headdim",
            "time_step_limit": "dt_limit",
        },
        note="As mamba_ssm's Mamba. Without d_mlp and process groups.",
    ),
}


def register_mixer(mixer_class: type[nn.Module], architecture: Architecture) -> None:
    """Let mixers of a class from outside Transformers be cut; subclasses of a known mixer need no registration.

    Args:
        mixer_class: the class of your mixer.
        architecture: with one of this package's layouts, if your mixer has its parameters (under other names of its
            attributes, if need be: `names`), or a module of your own that has the functions of `mamba1`.

    Raises:
        TypeError: not a class of modules, or not an Architecture.
        ValueError: a layout that lacks a function, or a projected class that does not exist.

    Example:
        >>> from hf_compressm.mixers import Architecture, mamba1, register_mixer
        >>> class MyMixer(nn.Module):
        ...     "As in Mamba, but its state size is called d_state."
        >>> register_mixer(MyMixer, Architecture("my_model", mamba1, "d_state", names={"ssm_state_size": "d_state"}))
        >>> unregister_mixer(MyMixer)
    """
    if not (isinstance(mixer_class, type) and issubclass(mixer_class, nn.Module)):
        raise TypeError(f"mixer_class must be a class of torch modules, got {mixer_class!r}")
    if not isinstance(architecture, Architecture):
        raise TypeError(f"architecture must be an Architecture, got {architecture!r}")
    if architecture.can_be_projected:
        raise ValueError(
            f"{mixer_class.__name__}: only Transformers' own mixers have projected classes; leave can_be_projected out"
        )
    missing = [name for name in LAYOUT_NAMES if not hasattr(architecture.layout, name)]
    if missing:
        raise ValueError(
            f"{mixer_class.__name__}: the layout {architecture.layout!r} lacks {', '.join(missing)}; "
            "hf_compressm.mixers.mamba1 shows what they do"
        )
    ARCHITECTURES[_full_name(mixer_class)] = architecture


def unregister_mixer(mixer_class: type[nn.Module]) -> None:
    """Forget what `register_mixer` was told of a class."""
    ARCHITECTURES.pop(_full_name(mixer_class), None)


# What a layout is made of.
LAYOUT_NAMES = (
    "NAME",
    "CAN_REFIT",
    "state_axes",
    "groups",
    "set_state_size",
    "decay_rates",
    "parameter_norms",
    "scan_inputs",
)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def architecture_of(module: nn.Module) -> Architecture | None:
    """The row of the table that a module belongs to, or None."""
    for cls in type(module).__mro__:
        for name in (_full_name(cls), cls.__name__):
            if name in ARCHITECTURES:
                return ARCHITECTURES[name]
    return None
