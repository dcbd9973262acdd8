"""The tiny models that several processes train: of both layouts, with norms on B and C, in heads, and under PEFT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from conftest import MAMBA1_FAMILY, TINY, lively
from torch import nn

from hf_compressm import find_mixers

# Where B and C are divided by next to nothing, rounding would be magnified.
FAMILY = MAMBA1_FAMILY | {"falcon_mamba": MAMBA1_FAMILY["falcon_mamba"].but(mixer_rms_eps=0.1)}
# Name → the base, and what PEFT is told; the base is frozen.
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba, LoRA": ("mamba", {"target_modules": ["in_proj", "x_proj"]}),
    "mamba, DoRA": ("mamba", {"target_modules": ["in_proj", "x_proj"], "use_dora": True}),
    "mamba2, LoRA": ("mamba2", {"target_modules": ["in_proj"], "modules_to_save": ["conv1d"]}),
    "mamba2, DoRA": ("mamba2", {"target_modules": ["in_proj"], "use_dora": True}),
}


def build(name: str, **options: Any) -> nn.Module:
    """A model whose output depends on its states."""
    if name not in ADAPTED:
        return lively((FAMILY | TINY)[name].build(**options))
    # An optional dependency, that most workers do not need.
    from peft import LoraConfig, get_peft_model

    base, adapter = ADAPTED[name]
    model = build(base, **options)
    # Else both factors would not be trained from the first step on.
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **adapter))


def base_of(model: nn.Module) -> nn.Module:
    """The Transformers model inside PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def blocks_of(model: nn.Module) -> Iterable[nn.Module]:
    """The layers of the stack."""
    base = base_of(model)
    return getattr(base, "backbone", getattr(base, "model", None)).layers


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def state_size(model: nn.Module) -> int:
    """The one state size of a model whose layers all have the same; whatever the config calls it."""
    (size,) = {mixer.state_size for mixer in find_mixers(model).values()}
    return size


def state_sizes(model: nn.Module) -> list[int]:
    """One for each layer: a projected cut shares its states out over them."""
    return [mixer.state_size for mixer in find_mixers(model).values()]


def sums_of(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Two numbers of every tensor, for a comparison with those of another run."""
    ramps = {name: torch.linspace(1, 2, tensor.numel(), dtype=torch.float64) for name, tensor in tensors.items()}
    return {
        name: [tensor.double().norm().item(), (tensor.double().flatten() @ ramps[name]).item()]
        for name, tensor in tensors.items()
    }
