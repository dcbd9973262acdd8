"""What the formats share: memory that is kept small, and numbers for the report."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .skeleton import Skeleton

# Bytes that are copied at once.
CHUNK = 2**24


@dataclass
class Work:
    """One rewrite of a checkpoint.

    Attributes:
        skeleton: what becomes of each parameter.
        scratch: a directory on the output's disk, for new tensors that wait to be written.
        recorded: the optimizer's parameters by name, as compressm.json has them.
        advance: called with the number of bytes that were dealt with.
    """

    skeleton: Skeleton
    scratch: Path
    recorded: list[list[str]] | None = None
    advance: Callable[[int], None] = lambda count: None
    optimizer_order: list[list[str]] | None = None
    optimizer_bytes_before: int = 0
    optimizer_bytes_after: int = 0
    peak: int | None = None
    _start: int | None = None

    def __post_init__(self) -> None:
        _give_back_memory()
        self._start = anonymous_memory()

    def watch(self) -> None:
        """Take notice of the memory in use now; called where most of it is."""
        now = anonymous_memory()
        if now is not None:
            self.peak = max(self.peak or 0, now - self._start)
        _give_back_memory()

    def count_state(self, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
        self.optimizer_bytes_before += _bytes(before)
        self.optimizer_bytes_after += _bytes(after)

    def values(self, name: str, old: torch.Tensor) -> torch.Tensor:
        new = self.skeleton.values(name, old)
        self.watch()
        return new

    def state(self, name: str, states: dict[str, dict[str, Any]], start_anew: bool = False) -> dict[str, Any] | None:
        """The optimizer's state of a parameter after the cut, or None if it has none.

        Args:
            name: of any parameter of the model after the cut.
            states: the states before it, by name; of an added parameter its in_proj's, if that has one.
            start_anew: give parameters that start without state the one they have before their first step.
        """
        skeleton, old = self.skeleton, states.get(name)
        if name in skeleton.added:
            beside = states.get(skeleton.added[name])
            return skeleton.fresh_state(name, beside) if start_anew and beside else None
        if name not in skeleton.changes or not old:
            return old
        new = skeleton.state(name, old)
        self.watch()
        return skeleton.fresh_state(name, old) if new is None and start_anew else new

    def spill(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in a file, mapped into memory: the kernel may write them out and forget them."""
        return self.file_backed(tensor.shape, tensor.dtype).copy_(tensor) if tensor.numel() else tensor

    def file_backed(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros in a file that vanishes with it."""
        file = self.scratch / "tensor"
        count = torch.Size(shape).numel()
        with open(file, "wb") as handle:
            # A full disk must raise here: it would kill the process when the mapped pages are written.
            size = max(1, count * dtype.itemsize)
            os.posix_fallocate(handle.fileno(), 0, size) if hasattr(os, "posix_fallocate") else handle.truncate(size)
        tensor = torch.from_file(str(file), shared=True, size=count, dtype=dtype)
        file.unlink()
        return tensor.view(shape)


def anonymous_memory() -> int | None:
    """Bytes of this process that no file stands behind (Linux), or None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


def _give_back_memory() -> None:
    """Let glibc return freed blocks that small ones lie between: they would add up to the size of all new tensors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def copy_file(source: Path, target: Path, advance: Callable[[int], None]) -> None:
    """Copy a file's bytes in chunks."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            advance(len(chunk))


def _bytes(state: dict[str, Any] | None) -> int:
    return sum(value.nbytes for value in (state or {}).values() if isinstance(value, torch.Tensor))
