"""A mixer's forward on a CPU, many times faster than that of Transformers where no gradient is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .adapters import is_plain
from .architectures import ARCHITECTURES
from .mamba1 import linear
from .mixer import Mixer
from .scan import scan_output


@contextlib.contextmanager
def streamed_forward(mixers: Mapping[str, Mixer]) -> Iterator[None]:
    """Within this context, Mamba-1 mixers on a CPU run their recurrence chunk by chunk.

    There Transformers, with mambapy or without, makes several tensors (batch, channels, length, N) for a forward: as
    long as the memory for them has to be asked for, that takes many times longer than the arithmetic. The outputs
    are the same to rounding. Mixers of which we cannot be sure of that keep their forward: those of other classes than
    Transformers' own, with something around them, or with quantized layers, which may round their inputs, too.

    Args:
        mixers: from `find_mixers`; none of them may be sharded.
    """
    changed = [mixer for mixer in mixers.values() if _can_be_streamed(mixer)]
    for mixer in changed:
        mixer.module.forward = _forward_of(mixer)
    try:
        yield
    finally:
        for mixer in changed:
            del mixer.module.forward


def _can_be_streamed(mixer: Mixer) -> bool:
    module = mixer.module
    # Gated norms are Mamba-2's, whose forward is fast on a CPU as well.
    return (
        mixer.layout.CAN_REFIT
        and ARCHITECTURES.get(type(module).__name__) is mixer.architecture
        and type(module).__module__.startswith("transformers.")
        and "forward" not in vars(module)
        and not mixer.wrappers
        and all(parameter.device.type == "cpu" and is_plain(parameter) for parameter in module.parameters())
    )


def _forward_of(mixer: Mixer) -> Callable[..., torch.Tensor]:
    out_proj: nn.Module = mixer.module.out_proj

    def forward(
        hidden_states: torch.Tensor, *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            inputs = mixer.scan_inputs(hidden_states, attention_mask)
            output = linear(out_proj, (scan_output(inputs) * inputs.gate).flatten(-2))
        return output.to(hidden_states.dtype)

    return forward
