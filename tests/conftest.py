"""Tiny models built on the spot, one row per architecture; everything else in the tests is parametrized over them."""

from __future__ import annotations

import os
from collections.abc import Callable
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

from hf_compressm import find_mixers

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


def tokens(batch: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random input ids, shape (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def silence_states(model: torch.nn.Module, states: list[int]) -> None:
    """Make states do nothing, and keep it so under training: their B and C rows, and what follows them, are zero.

    Zeroing C alone would not last: C would get a gradient.
    """
    for mixer in find_mixers(model).values():
        for axis in mixer.layout.state_axes(mixer.module):
            if axis.parameter == "A_log":
                continue
            for block in range(axis.blocks):
                rows = axis.block(block, mixer.state_size).start + torch.tensor(states)
                axis.tensor.index_fill_(axis.dim, rows, 0.0)


@pytest.fixture
def silence() -> Callable[[torch.nn.Module, list[int]], None]:
    return silence_states
