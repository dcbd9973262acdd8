"""Mamba-2 models whose state is smaller than the features that feed it: stock models plus two matrices per mixer.

In a stock mixer the N features B_t and C_t behind convolution and SiLU are the state's own coordinates. Here two
trained matrices per group stand between, W and V, each of shape (N, r), and the scan runs with r states:

    B̃_t = Wᵀ B_t,   C̃_t = Vᵀ C_t,   h_t = a_t h_{t-1} + Δ_t x_t B̃_t,   y_t = C̃_t · h_t

A is one number per head, so any change of the state's basis commutes with the dynamics, and balanced truncation
(Antoulas, Approximation of Large-Scale Dynamical Systems, 2005, section 7.1) gives W and V of a trained model. The
parameters `B_projection` = [W_1 | W_2 | ...] and `C_projection` = [V_1 | V_2 | ...] hold all groups side by side.

A config of these models is the stock one, with two more fields. `feature_size` is N. `state_size` (under the name
that the architecture has for it) is the state that the scan and the cache hold, r; the layers may differ, then
`state_ranks` lists r mixer by mixer and `state_size` is the smallest, so that no stock class finds the weights' shapes
right. From scratch the two matrices start orthonormal, W = V:

    CompressmMamba2ForCausalLM(CompressmMamba2Config(state_size=8, feature_size=64, ...))

This file needs torch and Transformers, nothing else: a copy of it lies in every saved checkpoint, so that
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads it where hf_compressm is not installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    Mamba2Config,
    NemotronHConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Zamba2Config,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.bamba import modeling_bamba
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.zamba2 import modeling_zamba2

# The names of the two parameters that a projected mixer has on top of a stock one.
PROJECTIONS = ("B_projection", "C_projection")


class ProjectedMixer:
    """What a projected mixer has on top of the stock mixer that it is derived from.

    Attributes:
        functions: the stock mixer's module: its scan and convolution, and with them the kernels that were found there.
        B_projection, C_projection: W and V, shape (N, groups × r).
        ssm_state_size: r.
    """

    functions: ClassVar[ModuleType]
    B_projection: nn.Parameter
    C_projection: nn.Parameter

    @property
    def feature_size(self) -> int:
        """N, the number of features that B_t and C_t have in each group."""
        return self.B_projection.shape[0]

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The stock forward, with the projections between the convolution and the scan.

        The one function that fuses convolution, scan and norm in training cannot serve: it leaves no room in between.
        """
        functions = self.functions
        batch, length, _ = hidden_states.shape
        dtype = hidden_states.dtype
        layer = None
        if cache_params is not None and cache_params.has_previous_state(self.layer_idx):
            layer = cache_params.layers[self.layer_idx]
        one_step = layer is not None and length == 1

        hidden_states = functions.apply_mask_to_padding_states(hidden_states, attention_mask)
        # Falcon-H1 scales the mixer's input and each part of the projected states.
        projected_states = self.in_proj(hidden_states * getattr(self, "ssm_in_multiplier", 1))
        if hasattr(self, "mup_vector"):
            projected_states = projected_states * self.mup_vector
        gate, mixed, dt = projected_states.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)

        mixed = mixed.transpose(1, 2)
        kernel = self.conv1d.weight.squeeze(1)
        if one_step and not getattr(layer, "record_past", False):
            mixed = functions.causal_conv1d_update(
                mixed, layer.conv_states[0], kernel, self.conv1d.bias, activation=self.activation
            )
        else:
            if cache_params is not None:
                mixed = cache_params.update_conv_state(mixed, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            mixed = functions.causal_conv1d_fn(mixed, kernel, self.conv1d.bias, activation=self.activation, **kwargs)[
                ..., -length:
            ]
        mixed = functions.apply_mask_to_padding_states(mixed.transpose(1, 2), attention_mask)

        features = self.n_groups * self.feature_size
        x, B, C = mixed.split([self.intermediate_size, features, features], dim=-1)
        B, C = project(B, self.B_projection, self.n_groups), project(C, self.C_projection, self.n_groups)

        A = -torch.exp(self.A_log.float())
        if one_step:
            y = functions.mamba2_selective_state_update(
                layer.recurrent_states[0],
                x.view(batch, self.num_heads, self.head_dim),
                dt.transpose(1, 2).expand(-1, -1, self.head_dim),
                A[:, None, None].expand(-1, self.head_dim, self.ssm_state_size),
                B[:, 0],
                C[:, 0],
                self.D[:, None].expand(-1, self.head_dim),
                z=None,
                dt_bias=self.dt_bias[:, None].expand(-1, self.head_dim),
                dt_softplus=True,
            )
        else:
            y = functions.mamba2_chunk_scan(
                x.reshape(batch, length, self.num_heads, self.head_dim),
                dt,
                A,
                B,
                C,
                chunk_size=self.chunk_size,
                D=self.D,
                z=None,
                return_final_states=cache_params is not None,
                dt_bias=self.dt_bias,
                dt_softplus=True,
                initial_states=None if layer is None else layer.recurrent_states[0],
                dt_limit=self.time_step_limit,
                **kwargs,
            )
            if cache_params is not None:
                y, final_state = y
                cache_params.update_recurrent_state(final_state, layer_idx=self.layer_idx)
        y = y.reshape(batch, length, -1)
        # Falcon-H1 may have no norm.
        y = y * nn.functional.silu(gate) if isinstance(self.norm, nn.Identity) else self.norm(y, gate)
        return self.out_proj(y.to(dtype))

    def init_projections(self) -> None:
        """Start W = V orthonormal in each group; matrices that were loaded are left as they are."""
        start = torch.empty(self.B_projection.shape, dtype=torch.float32, device=self.B_projection.device)
        for matrix in start.split(self.ssm_state_size, dim=1):
            nn.init.orthogonal_(matrix)
        init.copy_(self.B_projection, start)
        init.copy_(self.C_projection, start)


def project(features: torch.Tensor, projection: torch.Tensor, groups: int) -> torch.Tensor:
    """Take features (batch, length, groups × N) to states (batch, length, groups, r) by a matrix (N, groups × r)."""
    features, matrices = features.unflatten(-1, (groups, -1)), projection.unflatten(-1, (groups, -1))
    return torch.einsum("blgn,ngr->blgr", features, matrices)


class ProjectedModel:
    """What the model classes have on top of the stock classes that they are derived from."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if is_fully_sharded(cls):
            # Saving would copy torch's file for it; this one is saved with the config.
            cls._auto_class = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_config(config)
        config.auto_map = auto_map(type(config))
        with _features_as_states(config):
            super().__init__(config, *args, **kwargs)
        mixers = [module for module in self.modules() if hasattr(module, "ssm_state_size")]
        ranks = config.state_ranks or [getattr(config, config.state_size_field)] * len(mixers)
        if len(ranks) != len(mixers):
            raise ValueError(
                f"{type(config).__name__}.state_ranks has {len(ranks)} numbers, {ranks}, but the model has "
                f"{len(mixers)} mixers; give one number for each, or leave it out to give all of them "
                f"{config.state_size_field} states"
            )
        for mixer, rank in zip(mixers, ranks, strict=True):
            project_mixer(mixer, rank)
            if mixer.B_projection.device.type != "meta":
                mixer.init_projections()
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and module.config is config:
                module.__class__ = projected_class(type(module))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        with _features_as_states(self.config):
            super()._init_weights(module)
        if isinstance(module, ProjectedMixer):
            module.init_projections()
            if hasattr(module, "mup_vector"):
                # Falcon-H1's own code sets it from the model, which Transformers passes over in classes not its own.
                with _features_as_states(self.config):
                    init.copy_(module.mup_vector, modeling_falcon_h1.compute_mup_vector(self.config))


def check_config(config: PreTrainedConfig) -> None:
    """Check the fields that a projected config has of its own.

    Raises:
        ValueError: naming the field, its value and what it may be.
    """
    name, field = type(config).__name__, config.state_size_field
    size, features, ranks = getattr(config, field), config.feature_size, config.state_ranks
    if features is None:
        raise ValueError(f"{name}.feature_size is not set: give the number N of features that feed the {size} states")
    if not 1 <= size <= features:
        raise ValueError(f"{name}.{field} is {size}; with feature_size {features} it must be one of 1..{features}")
    if ranks is not None and (min(ranks, default=0) != size or max(ranks, default=0) > features):
        raise ValueError(
            f"{name}.state_ranks is {ranks}; each must be one of 1..{features}, and the smallest equal to {field}, "
            f"which is {size}"
        )


def auto_map(config_class: type) -> dict[str, str]:
    """What `AutoConfig` and the `AutoModel` classes load by `trust_remote_code`, for the config of a saved model."""
    if config_class._auto_class is None:
        # Of a class that is not this file's.
        return {}
    classes = [config_class, *(cls for cls in MODEL_CLASSES if cls.config_class is config_class)]
    return {cls._auto_class: f"{__name__.rpartition('.')[2]}.{cls.__name__}" for cls in classes}


@contextlib.contextmanager
def _features_as_states(config: PreTrainedConfig) -> Iterator[None]:
    """Within this context the stock code that reads the config builds mixers with N features."""
    field = config.state_size_field
    size = getattr(config, field)
    setattr(config, field, config.feature_size)
    try:
        yield
    finally:
        setattr(config, field, size)


def project_mixer(mixer: nn.Module, rank: int) -> None:
    """Turn a stock mixer into a projected one, in place, with matrices that are yet to be filled.

    Only the class changes and two parameters are added, as torch's own `fully_shard` does it: whoever holds the mixer,
    its hooks or its parameters, still does.
    """
    shape = (mixer.ssm_state_size, mixer.n_groups * rank)
    mixer.__class__ = projected_class(type(mixer))
    weight = mixer.in_proj.weight
    for name in PROJECTIONS:
        # Plain ones, also where the weight is sharded.
        setattr(mixer, name, nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device)))
    mixer.ssm_state_size = rank


def unproject_mixer(mixer: nn.Module) -> None:
    """Turn a projected mixer back into the stock one with all N features for its states, in place."""
    size = mixer.feature_size
    del mixer.B_projection, mixer.C_projection
    mixer.__class__ = stock_class(type(mixer))
    mixer.ssm_state_size = size


def projected_class(stock: type) -> type:
    """The projected class of a stock mixer, model or config; a projected class is its own.

    For your own model class around stock mixers, `projected_class(MyModel).from_pretrained(...)` loads what was saved
    after a projected cut.

    Raises:
        TypeError: a mixer or a config that has no projected form, or a mixer with a forward of its own, which the
            projected one would hide.
    """
    if issubclass(stock, (ProjectedMixer, ProjectedModel, ProjectedConfig)):
        return stock
    if is_fully_sharded(stock):
        return fully_sharded_class(projected_class(stock.__bases__[1]), stock)
    if stock not in PROJECTED_CLASSES:
        content: dict[str, Any] = {"__module__": stock.__module__, "_auto_class": None}
        if issubclass(stock, PreTrainedModel):
            parent, content["config_class"] = ProjectedModel, projected_class(stock.config_class)
        else:
            base = next((base for base in stock.__mro__ if base in PROJECTED_CLASSES), None)
            if base is None or getattr(stock, "forward", None) is not getattr(base, "forward", None):
                mixers = [cls for cls, projected in PROJECTED_CLASSES.items() if issubclass(projected, ProjectedMixer)]
                names = ", ".join(cls.__name__ for cls in mixers)
                raise TypeError(
                    f"{stock.__name__} has no projected form; these mixers have, with their own forward: {names}. A "
                    "model that was loaded with its checkpoint's own code must be loaded anew, after `import "
                    "hf_compressm`"
                )
            parent = PROJECTED_CLASSES[base].__bases__[0]
            if issubclass(stock, PreTrainedConfig):
                content["model_type"] = f"compressm_{stock.model_type}"
                content["state_size_field"] = PROJECTED_CLASSES[base].state_size_field
                content["feature_size"] = content["state_ranks"] = None
                content["__annotations__"] = {"feature_size": int | None, "state_ranks": list[int] | None}
                share_weight_conversions(stock.model_type, content["model_type"])
            else:
                content["functions"] = PROJECTED_CLASSES[base].functions
        PROJECTED_CLASSES[stock] = type(f"Projected{stock.__name__}", (parent, stock), content)
    return PROJECTED_CLASSES[stock]


def share_weight_conversions(stock: str, projected: str) -> None:
    """Save and load weights under the names that the stock model type has in files: Transformers may rename some."""
    conversions = get_checkpoint_conversion_mapping(stock)
    if conversions is not None:
        register_checkpoint_conversion_mapping(projected, conversions, overwrite=True)


def stock_class(projected: type) -> type:
    """The stock class that a projected one is derived from; a stock class is its own."""
    if not issubclass(projected, (ProjectedMixer, ProjectedModel, ProjectedConfig)):
        return projected
    if is_fully_sharded(projected):
        return fully_sharded_class(stock_class(projected.__bases__[1]), projected)
    return projected.__bases__[1]


def is_fully_sharded(cls: type) -> bool:
    """Whether torch's `fully_shard` made a class: each module that it shards gets one, with FSDPModule in front."""
    return cls.__bases__[0].__name__ == "FSDPModule"


def fully_sharded_class(inner: type, like: type) -> type:
    """What `fully_shard` makes of a class; `like` is what it made of another."""
    FULLY_SHARDED_CLASSES.setdefault(like.__bases__[1], like)
    if inner not in FULLY_SHARDED_CLASSES:
        content = {"__deepcopy__": like.__deepcopy__, "__module__": like.__module__}
        FULLY_SHARDED_CLASSES[inner] = type(f"FSDP{inner.__name__}", (like.__bases__[0], inner), content)
    return FULLY_SHARDED_CLASSES[inner]


class ProjectedConfig:
    """What the config classes have on top of the stock ones: `feature_size`, `state_ranks`, and where to load from."""

    state_size_field: ClassVar[str]
    _auto_class = "AutoConfig"


class CompressmMamba2Config(ProjectedConfig, Mamba2Config):
    model_type = "compressm_mamba2"
    state_size_field: ClassVar[str] = "state_size"
    feature_size: int | None = None
    state_ranks: list[int] | None = None


class CompressmZamba2Config(ProjectedConfig, Zamba2Config):
    model_type = "compressm_zamba2"
    state_size_field: ClassVar[str] = "mamba_d_state"
    feature_size: int | None = None
    state_ranks: list[int] | None = None


class CompressmBambaConfig(ProjectedConfig, BambaConfig):
    model_type = "compressm_bamba"
    state_size_field: ClassVar[str] = "mamba_d_state"
    feature_size: int | None = None
    state_ranks: list[int] | None = None


class CompressmFalconH1Config(ProjectedConfig, FalconH1Config):
    model_type = "compressm_falcon_h1"
    state_size_field: ClassVar[str] = "mamba_d_state"
    feature_size: int | None = None
    state_ranks: list[int] | None = None


class CompressmGraniteMoeHybridConfig(ProjectedConfig, GraniteMoeHybridConfig):
    model_type = "compressm_granitemoehybrid"
    state_size_field: ClassVar[str] = "mamba_d_state"
    feature_size: int | None = None
    state_ranks: list[int] | None = None


class CompressmNemotronHConfig(ProjectedConfig, NemotronHConfig):
    model_type = "compressm_nemotron_h"
    state_size_field: ClassVar[str] = "ssm_state_size"
    feature_size: int | None = None
    state_ranks: list[int] | None = None


class CompressmMamba2Mixer(ProjectedMixer, modeling_mamba2.Mamba2Mixer):
    functions = modeling_mamba2


class CompressmZamba2MambaMixer(ProjectedMixer, modeling_zamba2.Zamba2MambaMixer):
    functions = modeling_zamba2


class CompressmBambaMixer(ProjectedMixer, modeling_bamba.BambaMixer):
    functions = modeling_bamba


class CompressmFalconH1Mixer(ProjectedMixer, modeling_falcon_h1.FalconH1Mixer):
    functions = modeling_falcon_h1


class CompressmGraniteMoeHybridMambaLayer(ProjectedMixer, modeling_granitemoehybrid.GraniteMoeHybridMambaLayer):
    functions = modeling_granitemoehybrid


class CompressmNemotronHMamba2Mixer(ProjectedMixer, modeling_nemotron_h.NemotronHMamba2Mixer):
    functions = modeling_nemotron_h


class CompressmMamba2Model(ProjectedModel, modeling_mamba2.Mamba2Model):
    config_class = CompressmMamba2Config
    _auto_class = "AutoModel"


class CompressmMamba2ForCausalLM(ProjectedModel, modeling_mamba2.Mamba2ForCausalLM):
    config_class = CompressmMamba2Config
    _auto_class = "AutoModelForCausalLM"


class CompressmZamba2Model(ProjectedModel, modeling_zamba2.Zamba2Model):
    config_class = CompressmZamba2Config
    _auto_class = "AutoModel"


class CompressmZamba2ForCausalLM(ProjectedModel, modeling_zamba2.Zamba2ForCausalLM):
    config_class = CompressmZamba2Config
    _auto_class = "AutoModelForCausalLM"


class CompressmZamba2ForSequenceClassification(ProjectedModel, modeling_zamba2.Zamba2ForSequenceClassification):
    config_class = CompressmZamba2Config
    _auto_class = "AutoModelForSequenceClassification"


class CompressmBambaModel(ProjectedModel, modeling_bamba.BambaModel):
    config_class = CompressmBambaConfig
    _auto_class = "AutoModel"


class CompressmBambaForCausalLM(ProjectedModel, modeling_bamba.BambaForCausalLM):
    config_class = CompressmBambaConfig
    _auto_class = "AutoModelForCausalLM"


class CompressmFalconH1Model(ProjectedModel, modeling_falcon_h1.FalconH1Model):
    config_class = CompressmFalconH1Config
    _auto_class = "AutoModel"


class CompressmFalconH1ForCausalLM(ProjectedModel, modeling_falcon_h1.FalconH1ForCausalLM):
    config_class = CompressmFalconH1Config
    _auto_class = "AutoModelForCausalLM"


class CompressmGraniteMoeHybridModel(ProjectedModel, modeling_granitemoehybrid.GraniteMoeHybridModel):
    config_class = CompressmGraniteMoeHybridConfig
    _auto_class = "AutoModel"


class CompressmGraniteMoeHybridForCausalLM(ProjectedModel, modeling_granitemoehybrid.GraniteMoeHybridForCausalLM):
    config_class = CompressmGraniteMoeHybridConfig
    _auto_class = "AutoModelForCausalLM"


class CompressmNemotronHModel(ProjectedModel, modeling_nemotron_h.NemotronHModel):
    config_class = CompressmNemotronHConfig
    _auto_class = "AutoModel"


class CompressmNemotronHForCausalLM(ProjectedModel, modeling_nemotron_h.NemotronHForCausalLM):
    config_class = CompressmNemotronHConfig
    _auto_class = "AutoModelForCausalLM"


# Stock class → projected class.
PROJECTED_CLASSES: dict[type, type] = {
    cls.__bases__[1]: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and cls.__name__.startswith("Compressm")
}
# A class, and what `fully_shard` makes of it.
FULLY_SHARDED_CLASSES: dict[type, type] = {}
MODEL_CLASSES = [cls for cls in PROJECTED_CLASSES.values() if issubclass(cls, PreTrainedModel)]
CONFIG_CLASSES = [cls for cls in PROJECTED_CLASSES.values() if issubclass(cls, PreTrainedConfig)]

for cls in CONFIG_CLASSES:
    share_weight_conversions(stock_class(cls).model_type, cls.model_type)
