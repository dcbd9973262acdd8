"""Tiny models built on the spot, one row per architecture; everything else in the tests is parametrized over them."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Else DeepSpeed says on stdout that it found no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BambaModel,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconH1Model,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    FalconMambaModel,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    GraniteMoeHybridModel,
    JambaConfig,
    JambaForCausalLM,
    JambaModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2Model,
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
    NemotronHConfig,
    NemotronHForCausalLM,
    NemotronHModel,
    PreTrainedConfig,
    PreTrainedModel,
    Zamba2Config,
    Zamba2ForCausalLM,
    Zamba2Model,
    ZambaConfig,
    ZambaForCausalLM,
    ZambaModel,
)

from hf_compressm import CompressionPlan, CompreSSMConfig, StateStatistics, find_mixers, measure
from hf_compressm.mixers import Mixer
from hf_compressm.plan import LayerPlan

VOCABULARY = 16


@dataclass(frozen=True)
class Tiny:
    """How to build a tiny model of one architecture."""

    config_class: type[PreTrainedConfig]
    language_model: type[PreTrainedModel]
    base_model: type[PreTrainedModel]
    options: dict = field(default_factory=dict)

    def config(self, **options) -> PreTrainedConfig:
        common = {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 2}
        special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
        return self.config_class(**(common | special | self.options | options))

    def build(self, seed: int = 0, **options) -> PreTrainedModel:
        """The language model, with random weights."""
        torch.manual_seed(seed)
        return self.language_model(self.config(**options))

    def build_base(self, seed: int = 0, **options) -> PreTrainedModel:
        """The model without a head."""
        torch.manual_seed(seed)
        return self.base_model(self.config(**options))


TINY = {
    "mamba": Tiny(MambaConfig, MambaForCausalLM, MambaModel, {"use_mambapy": False}),
    "mamba2": Tiny(
        Mamba2Config,
        Mamba2ForCausalLM,
        Mamba2Model,
        {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
}


@pytest.fixture(params=list(TINY))
def tiny(request) -> Tiny:
    """Each architecture in turn."""
    return TINY[request.param]


@dataclass(frozen=True)
class Relative(Tiny):
    """A tiny model with 8 states in each layer, or in each group of one, whatever its config calls their number."""

    def config(self, **options) -> PreTrainedConfig:
        common = {"vocab_size": VOCABULARY, "hidden_size": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
        return self.config_class(**copy.deepcopy(common | self.options | options))

    def but(self, **options) -> Relative:
        """The same with other options."""
        return dataclasses.replace(self, options=self.options | options)


_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
_MAMBA = {"mamba_d_state": 8, "mamba_n_groups": 2, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 8}
_FALCON = {
    "num_hidden_layers": 2,
    "mamba_d_ssm": 32,
    "ssm_multipliers": [0.5, 0.7, 1.3, 1.1, 0.9],
    "ssm_in_multiplier": 1.5,
}

# Every architecture with Mamba-1 mixers, one group each but for Zamba: there each of two heads has states of its own.
MAMBA1_FAMILY = {
    "mamba": Relative(
        MambaConfig,
        MambaForCausalLM,
        MambaModel,
        {"num_hidden_layers": 2, "state_size": 8, "use_mambapy": False},
    ),
    "falcon_mamba": Relative(
        FalconMambaConfig, FalconMambaForCausalLM, FalconMambaModel, {"num_hidden_layers": 2, "state_size": 8}
    ),
    "jamba": Relative(
        JambaConfig,
        JambaForCausalLM,
        JambaModel,
        _ATTENTION
        | {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
    ),
    "zamba": Relative(
        ZambaConfig,
        ZambaForCausalLM,
        ZambaModel,
        _ATTENTION
        | {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
        | {"num_key_value_heads": 2, "mamba_d_state": 8, "n_mamba_heads": 2},
    ),
}

# Every architecture with Mamba-2 mixers, two groups each; Falcon-H1 without its norm, and with it before the gate.
MAMBA2_FAMILY = {
    "mamba2": Relative(
        Mamba2Config,
        Mamba2ForCausalLM,
        Mamba2Model,
        {"num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "zamba2": Relative(
        Zamba2Config,
        Zamba2ForCausalLM,
        Zamba2Model,
        _ATTENTION
        | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "num_key_value_heads": 2}
        | {"mamba_d_state": 8, "mamba_ngroups": 2, "n_mamba_heads": 4, "mamba_expand": 2, "chunk_size": 8}
        | {"num_mem_blocks": 1, "adapter_rank": 4, "attention_head_dim": 16},
    ),
    "bamba": Relative(
        BambaConfig,
        BambaForCausalLM,
        BambaModel,
        _ATTENTION | _MAMBA | {"num_hidden_layers": 2, "mamba_expand": 2, "attn_layer_indices": [1]},
    ),
    "falcon_h1": Relative(
        FalconH1Config, FalconH1ForCausalLM, FalconH1Model, _ATTENTION | _MAMBA | _FALCON | {"mamba_rms_norm": False}
    ),
    "falcon_h1 with a norm": Relative(
        FalconH1Config,
        FalconH1ForCausalLM,
        FalconH1Model,
        _ATTENTION | _MAMBA | _FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": True},
    ),
    "granitemoehybrid": Relative(
        GraniteMoeHybridConfig,
        GraniteMoeHybridForCausalLM,
        GraniteMoeHybridModel,
        _ATTENTION
        | _MAMBA
        | {"num_hidden_layers": 2, "mamba_expand": 2, "layer_types": ["mamba", "attention"]}
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16}
        | {"position_embedding_type": "rope"},
    ),
    "nemotron_h": Relative(
        NemotronHConfig,
        NemotronHForCausalLM,
        NemotronHModel,
        _ATTENTION
        | {"layers_block_type": ["mamba", "attention", "moe"], "head_dim": 8}
        | {"ssm_state_size": 8, "n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 8, "chunk_size": 8}
        | {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    ),
}


@pytest.fixture(params=list(MAMBA2_FAMILY))
def relative(request) -> Relative:
    """Each architecture with Mamba-2 mixers in turn."""
    return MAMBA2_FAMILY[request.param]


_ALL_TEN = MAMBA1_FAMILY | MAMBA2_FAMILY
# Every architecture, and what else their configs allow where it concerns a cut.
WHOLE_MODELS = _ALL_TEN | {
    "mamba with untied embeddings": _ALL_TEN["mamba"].but(tie_word_embeddings=False),
    "falcon_mamba with biases": _ALL_TEN["falcon_mamba"].but(use_bias=True),
    "jamba with tied embeddings": _ALL_TEN["jamba"].but(tie_word_embeddings=True),
    "zamba with four heads": _ALL_TEN["zamba"].but(n_mamba_heads=4),
    "mamba2 with one group": _ALL_TEN["mamba2"].but(n_groups=1),
    "mamba2 with four groups": _ALL_TEN["mamba2"].but(n_groups=4),
    "bamba with biases": _ALL_TEN["bamba"].but(mamba_proj_bias=True),
    "granitemoehybrid with tied embeddings": _ALL_TEN["granitemoehybrid"].but(tie_word_embeddings=True),
}


@pytest.fixture(params=list(WHOLE_MODELS))
def architecture(request) -> Relative:
    """Each architecture, and each variant, in turn."""
    return WHOLE_MODELS[request.param]


@pytest.fixture(autouse=True)
def _one_thread():
    """Several test processes share two cores."""
    torch.set_num_threads(1)


@torch.no_grad()
def roughen(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every bias, norm weight, skip and decay rate a value of its own; fresh models have zeros and ones there."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("A_log"):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def lively(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Roughen a model and make its output depend on its states; that of a freshly initialised one hardly does."""
    for name, parameter in roughen(model, seed).named_parameters():
        if name.endswith("proj.weight"):
            parameter *= 3
    return model


@torch.no_grad()
def stir(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter of any architecture random values with which each part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in roughen(model, seed).parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def selection_plan(model: torch.nn.Module, kept: list[int] | list[list[int]]) -> CompressionPlan:
    """A plan made by hand: every layer keeps these states (the same in each group, or a list for each group).

    Where B and C are normalised, it is right for a model whose other states are silent.
    """
    layers = {}
    for name, mixer in find_mixers(model).items():
        rows = torch.tensor(kept)
        rows = rows.expand(mixer.groups, -1) if rows.dim() == 1 else rows
        layers[name] = LayerPlan(
            mixer_class=type(mixer.module).__name__,
            state_size_before=mixer.state_size,
            kept=rows.clone(),
            readout=None,
            criterion="by hand",
            refit="none",
            relative_error=0.0,
            error_curve=[1.0] + [0.0] * mixer.state_size,
            scales=_scales(mixer, rows.shape[1] / mixer.state_size),
        )
    return CompressionPlan(layers, 1, CompreSSMConfig(state_size=rows.shape[1]))


def _scales(mixer: Mixer, share: float) -> dict[str, float]:
    """What keeps the root mean squares of B and C, and then their products, when a share of the states stays."""
    if not hasattr(mixer.module, "b_layernorm") or share == 1:
        return {}
    rows = {"B": share**0.5, "C": share**0.5}
    if isinstance(mixer.module.b_layernorm.weight, torch.nn.Parameter):
        return rows | {"B norm": share**-0.5, "C norm": share**-0.5}
    return rows | {"D": share, "out": 1 / share}


def projection_plan(model: torch.nn.Module, sizes: int | list[int], seed: int = 0) -> CompressionPlan:
    """A plan made by hand: random projections to this many states, of all layers or of each.

    With all states, they are a change of the basis: W Vᵀ = I.
    """
    generator, mixers, layers = torch.Generator().manual_seed(seed), find_mixers(model), {}
    sizes = [sizes] * len(mixers) if isinstance(sizes, int) else sizes
    for (name, mixer), size in zip(mixers.items(), sizes, strict=True):
        shape = (2, mixer.groups, mixer.state_size, mixer.state_size)
        left, right = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
        scales = 0.5 + torch.rand(mixer.state_size, generator=generator, dtype=torch.float64)
        W, V = ((left * scale @ right)[..., :size].transpose(0, 1).flatten(1) for scale in (scales, 1 / scales))
        layers[name] = LayerPlan(
            mixer_class=type(mixer.module).__name__,
            state_size_before=mixer.state_size,
            kept=None,
            readout=None,
            criterion="by hand",
            refit="none",
            relative_error=0.0,
            error_curve=[1.0] + [0.0] * mixer.state_size,
            B_projection=W.float(),
            C_projection=V.float(),
            groups=mixer.groups,
        )
    return CompressionPlan(layers, 1, CompreSSMConfig(state_size=sizes, realization="projected"))


def tokens(batch: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random input ids, shape (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def measured(
    model: torch.nn.Module, batch: int = 6, length: int = 12, mask: torch.Tensor | None = None, seed: int = 0
) -> tuple[Mixer, StateStatistics]:
    """The mixer of a model of one layer, and its statistics on random tokens."""
    inputs = {"input_ids": tokens(batch, length, seed)} | ({} if mask is None else {"attention_mask": mask})
    ((name, statistics),) = measure(model, [inputs]).items()
    return find_mixers(model)[name], statistics


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]
) -> tuple[list[float], list[float]]:
    """A plain training loop over numbered batches.

    Returns:
        The losses and the gradient norms.
    """
    losses, norms = [], []
    for step in steps:
        batch = tokens(4, 12, seed=step)
        loss = model.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@torch.no_grad()
def silence_states(model: torch.nn.Module, states: list[int] | list[list[int]]) -> None:
    """Make states do nothing, and keep it so under training: their B and C rows, and what follows them, are zero.

    Zeroing C alone would not last: C would get a gradient. The states are those of every group, or a list for each.
    """
    for mixer in find_mixers(model).values():
        rows = torch.tensor(states)
        rows = rows.expand(mixer.groups, -1) if rows.dim() == 1 else rows
        for axis in mixer.axes:
            in_groups = axis.group_dim is not None
            # From the end, since each group's part has one dimension less in front.
            dim = axis.dim - axis.tensor.dim()
            for group, part in enumerate(axis.tensor.unbind(axis.group_dim) if in_groups else [axis.tensor]):
                for block, role in enumerate(axis.roles):
                    if role in ("B", "C"):
                        first = axis.block(block, mixer.state_size).start
                        part.index_fill_(dim, first + rows[group if in_groups else block % mixer.groups], 0.0)


@pytest.fixture
def silence() -> Callable[[torch.nn.Module, list[int]], None]:
    return silence_states
