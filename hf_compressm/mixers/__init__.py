"""Where the state lives: one module per parameter layout, and the table of architectures that use them."""

from . import mamba1, mamba2
from .architectures import (
    ARCHITECTURES,
    Architecture,
    Mixer,
    check_mixer,
    find_mixers,
    layers_by_config,
    register_mixer,
)
from .scan import ScanInputs, StateAxis, stream_states, take

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Mixer",
    "ScanInputs",
    "StateAxis",
    "check_mixer",
    "find_mixers",
    "layers_by_config",
    "mamba1",
    "mamba2",
    "register_mixer",
    "stream_states",
    "take",
]
