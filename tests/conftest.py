"""Tiny models built on the spot, one row per architecture; everything else in the tests is parametrized over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2Model,
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_compressm import CompressionPlan, CompreSSMConfig, find_mixers
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


def selection_plan(model: torch.nn.Module, kept: list[int] | list[list[int]]) -> CompressionPlan:
    """A plan made by hand: every layer keeps these states (the same in each group, or a list for each group)."""
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
        )
    return CompressionPlan(layers, 1, CompreSSMConfig(state_size=rows.shape[1]))


def tokens(batch: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random input ids, shape (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


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
        for axis in mixer.layout.state_axes(mixer.module):
            if axis.parameter == "A_log":
                continue
            for block in range(axis.blocks):
                start = axis.block(block, mixer.state_size).start
                axis.tensor.index_fill_(axis.dim, start + rows[block % mixer.groups], 0.0)


@pytest.fixture
def silence() -> Callable[[torch.nn.Module, list[int]], None]:
    return silence_states
