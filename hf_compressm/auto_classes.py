"""Make Transformers' auto classes know the projected models, as if they were its own."""

from __future__ import annotations

import transformers

from .modeling_compressm import CONFIG_CLASSES, MODEL_CLASSES


def register() -> None:
    """Register every projected config and model; `AutoModelForCausalLM.from_pretrained` then needs no remote code."""
    for config_class in CONFIG_CLASSES:
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for model_class in MODEL_CLASSES:
        auto_class = getattr(transformers, model_class._auto_class)
        auto_class.register(model_class.config_class, model_class, exist_ok=True)
