"""hf_compressm: shrink the state dimension of Hugging Face Mamba models, physically, in the middle of training."""

from . import auto_classes
from .callback import CompreSSMCallback, exempt_from_weight_decay
from .checkpoint import resize_while_loading
from .compressor import Compressor
from .config import CompreSSMConfig
from .hub import push_compressed
from .mixers import find_mixers
from .modeling_compressm import projected_class
from .oneshot import compress
from .peft_models import load_compressed_peft
from .plan import CompressionPlan
from .planning import plan_compression
from .record import Record, read_record, write_record
from .report import CompressionReport
from .reshape import ReshapeReport, reshape_checkpoint
from .statistics import NonFiniteError, StateStatistics, measure
from .surgery import compress_

auto_classes.register()

__version__ = "0.1.0"

__all__ = [
    "CompreSSMCallback",
    "CompreSSMConfig",
    "CompressionPlan",
    "CompressionReport",
    "Compressor",
    "NonFiniteError",
    "Record",
    "ReshapeReport",
    "StateStatistics",
    "compress",
    "compress_",
    "exempt_from_weight_decay",
    "find_mixers",
    "load_compressed_peft",
    "measure",
    "plan_compression",
    "projected_class",
    "push_compressed",
    "read_record",
    "reshape_checkpoint",
    "resize_while_loading",
    "write_record",
]
