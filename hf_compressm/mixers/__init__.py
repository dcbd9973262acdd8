"""Where the state lives: one module per parameter layout, the table of architectures that use them, and the search."""

from . import mamba1, mamba2
from .architectures import ARCHITECTURES, Architecture, register_mixer
from .mixer import Mixer, check_mixer, find_mixers, layers_by_config
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
