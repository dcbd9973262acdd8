"""Where the state lives: one module per parameter layout, and the table of architectures that use them."""

from . import mamba2
from .architectures import ARCHITECTURES, Architecture, Mixer, find_mixers, layers_by_config
from .scan import ScanInputs, StateAxis, stream_states

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Mixer",
    "ScanInputs",
    "StateAxis",
    "find_mixers",
    "layers_by_config",
    "mamba2",
    "stream_states",
]
