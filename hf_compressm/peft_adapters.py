"""What a cut must know of PEFT: which models are its, which weights are adapters', which adapters change a base."""

from __future__ import annotations

from typing import Any

from torch import nn

from .distributed.wrappers import is_kind

HOW_TO_LOAD = (
    "Adapters that were trained across a cut go with a base that was cut in the same way: build the model by "
    "hf_compressm.load_compressed_peft(base, checkpoint, is_trainable=True), with the original base, and go on then"
)
# Initialisations of LoRA that take the adapter's first values out of the base's weights.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_peft_model(model: nn.Module) -> bool:
    """Whether a bare model is one of PEFT's."""
    return is_kind(model, "PeftModel")


def is_adapter_weight(name: str) -> bool:
    """Whether a name in a state dictionary is that of an adapter's weight, not of the base's."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def changes_the_base(config: Any) -> bool:
    """Whether an adapter with this PEFT config was made at the cost of the base's weights."""
    return str(getattr(config, "init_lora_weights", "")).lower().startswith(CHANGES_THE_BASE)
