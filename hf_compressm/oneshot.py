"""One cut of a finished model, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .config import CompreSSMConfig
from .planning import plan_compression
from .report import CompressionReport
from .statistics import measure
from .surgery import compress_


def compress(
    model: nn.Module, batches: Iterable[Any], config: CompreSSMConfig, optimizer: Optimizer | None = None
) -> CompressionReport:
    """Measure, plan and cut: `measure`, `plan_compression` and `compress_` in one call.

    Args:
        model: the model, bare or wrapped; it is changed in place.
        batches: calibration inputs, as `measure` takes them.
        config: what to keep; its schedule plays no part.
        optimizer: the optimizer that trains the model, if there is one.

    Returns:
        What became of every mixer.

    Raises:
        ValueError, TypeError, RuntimeError: as the three functions; the model is then as it was.

    Example:
        >>> import torch
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> from hf_compressm import CompreSSMConfig, compress
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=8, num_hidden_layers=1))
        >>> report = compress(model, [torch.arange(8).repeat(4, 1)], CompreSSMConfig(state_size=0.5))
        >>> report.state_size_before, report.state_size_after
        (8, 4)
    """
    statistics = measure(model, batches)
    return compress_(model, plan_compression(model, statistics, config), optimizer)
