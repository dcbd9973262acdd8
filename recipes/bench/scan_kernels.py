"""Which functions Mamba models compute with: CUDA or Triton kernels, mambapy's parallel scan, or plain torch.

Transformers takes the kernels of mamba-ssm and causal-conv1d where both can be imported. Two halfway houses need help:
mamba-ssm without causal-conv1d, where its fused training functions fail, and mamba-ssm without its CUDA extension,
where nothing of it can be imported although Mamba-2's kernels, in Triton, need no compiler.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

# What each function does → its name in Transformers' module.
FUNCTIONS: dict[str, tuple[ModuleType, dict[str, str]]] = {
    "mamba": (
        modeling_mamba,
        {
            "fused training": "mamba_inner_fn",
            "scan": "mamba_selective_scan",
            "decoding": "mamba_selective_state_update",
            "convolution": "causal_conv1d_fn",
        },
    ),
    "mamba2": (
        modeling_mamba2,
        {
            "fused training": "mamba2_split_conv1d_scan_combined",
            "scan": "mamba2_chunk_scan",
            "decoding": "mamba2_selective_state_update",
            "convolution": "causal_conv1d_fn",
        },
    ),
}


def choose_kernels() -> list[str]:
    """Make the most of the kernels that are installed.

    Returns:
        What had to be done beyond what Transformers does, and what could not be: sentences for the results.
    """
    if importlib.util.find_spec("mamba_ssm") is None:
        return ["mamba-ssm is not installed"]
    notes = []
    if importlib.util.find_spec("selective_scan_cuda") is None:
        notes.append(_use_triton_for_mamba2())
    if importlib.util.find_spec("causal_conv1d") is None:
        notes.append("causal-conv1d is not installed: the fused training functions are off")
        for module, names in FUNCTIONS.values():
            setattr(module, names["fused training"], fused_function_is_off)
    return notes


def kernels_in_use(architecture: str) -> dict[str, str]:
    """What each part of a stock model is computed with.

    Args:
        architecture: `mamba` or `mamba2`.

    Returns:
        Part → the package of its kernel, `mambapy`, `torch`, or `none` for what only a kernel can do.

    Example:
        >>> sorted(kernels_in_use("mamba2"))
        ['convolution', 'decoding', 'fused training', 'scan']
    """
    module, names = FUNCTIONS[architecture]
    result = {}
    for part, name in names.items():
        # Transformers' wrapper holds the function that it chose when it was imported.
        with contextlib.suppress(TypeError):
            function = getattr(module, name)
            function = inspect.getclosurevars(function).nonlocals.get("implementation", function)
            package = function.__module__.partition(".")[0]
            is_kernel = package not in ("transformers", __name__)
            result[part] = package if is_kernel else "none" if part == "fused training" else "torch"
    has_mambapy = importlib.util.find_spec("mambapy") is not None
    if architecture == "mamba" and result.get("scan") == "torch" and has_mambapy:
        result["scan"] = "mambapy"
    return result


def describe_kernels(architecture: str) -> str:
    """The same as words for a table: `scan mambapy, decoding torch`."""
    return ", ".join(f"{part} {package}" for part, package in kernels_in_use(architecture).items())


def fused_function_is_off(*args: Any, **kwargs: Any) -> None:
    """What Transformers takes for "there is no fused function": it then computes part by part."""


def _use_triton_for_mamba2() -> str:
    """Let Mamba-2 take mamba-ssm's Triton kernels, although the CUDA extension is missing."""
    # mamba_ssm's first line imports the extension; nothing of Mamba-2 calls it.
    sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception as error:  # whatever another version's imports may raise: plain torch does it then
        return f"mamba-ssm has no CUDA extension, and its Triton kernels cannot be imported: {error!r}"
    finally:
        del sys.modules["selective_scan_cuda"]
    modeling_mamba2.mamba2_chunk_scan = _with_known_arguments(mamba_chunk_scan_combined)
    modeling_mamba2.mamba2_selective_state_update = _with_known_arguments(selective_state_update)
    return "mamba-ssm has no CUDA extension: its Triton kernels serve Mamba-2, and Mamba has none"


def _with_known_arguments(implementation: Callable) -> Callable:
    """A function that drops the arguments that another one does not know, as Transformers' own wrapper does."""
    known = inspect.signature(implementation).parameters

    def call(*args: Any, **kwargs: Any) -> Any:
        return implementation(*args, **{name: value for name, value in kwargs.items() if name in known})

    return call
