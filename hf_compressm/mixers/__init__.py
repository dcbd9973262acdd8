"""Where the state lives: one module per parameter layout, and the table of architectures that use them."""

from .architectures import ARCHITECTURES, Architecture, Mixer, find_mixers
from .scan import ScanInputs, StateAxis, stream_states

__all__ = ["ARCHITECTURES", "Architecture", "Mixer", "ScanInputs", "StateAxis", "find_mixers", "stream_states"]
