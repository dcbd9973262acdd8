"""The processes that train one model together, and the few things that a cut makes them tell each other."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


class NonFiniteError(RuntimeError):
    """Statistics or parameters hold NaN or infinity: nothing can be decided on them."""


# What a failure of one process is raised as on the others; any other class becomes a RuntimeError.
ERRORS = {error.__name__: error for error in (NonFiniteError, ValueError, TypeError, RuntimeError)}


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together. Every method but `owns` is a collective: all of them must call it.

    Attributes:
        group: torch's process group; None if this process trains the model alone.
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether the layer of this number is this process's share of the work."""
        return number % self.size == self.rank

    @property
    def _device(self) -> torch.device:
        """Where the group takes tensors from: the host if it can, else its accelerator."""
        kinds = {device.type for device in self.group._device_types}
        return torch.device("cpu" if "cpu" in kinds else min(kinds))

    @torch.no_grad()
    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum tensors of one type over the processes, in place."""
        if self.size == 1:
            return
        flat = _flatten_dense_tensors([tensor.contiguous() for tensor in tensors]).to(self._device)
        dist.all_reduce(flat, group=self.group)
        for tensor, total in zip(tensors, _unflatten_dense_tensors(flat, tensors), strict=True):
            tensor.copy_(total)

    def total(self, value: float) -> float:
        """The sum of a number over the processes."""
        number = torch.tensor([value], dtype=torch.float64)
        self.sum([number])
        return number.item()

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.total(0.0)

    @torch.no_grad()
    def broadcast(self, tensor: torch.Tensor) -> None:
        """Give every process the first one's tensor, in place."""
        if self.size > 1:
            buffer = tensor.detach().to(self._device).contiguous()
            dist.broadcast(buffer, group=self.group, group_src=0)
            tensor.copy_(buffer)

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every process's bytes, in order of rank."""
        if self.size == 1:
            return [data]
        lengths, own = self._padded(data)
        received = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(received, own, group=self.group)
        return _cut_to(received, lengths)

    def gather(self, data: bytes, to: int) -> list[bytes]:
        """Every process's bytes, in order of rank, on one of them; the others get nothing."""
        if self.size == 1:
            return [data]
        lengths, own = self._padded(data)
        received = [torch.empty_like(own) for _ in lengths] if self.rank == to else None
        dist.gather(own, received, group=self.group, group_dst=to)
        return [] if received is None else _cut_to(received, lengths)

    def _padded(self, data: bytes) -> tuple[list[int], torch.Tensor]:
        """All processes' lengths, and the own bytes filled up to the longest."""
        lengths = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)], device=self._device), group=self.group)
        buffer = torch.zeros(max(1, *(int(length) for length in lengths)), dtype=torch.uint8)
        if data:
            buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [int(length) for length in lengths], buffer.to(self._device)

    def check_same(self, digest: str, what: str) -> None:
        """Check that every process holds the same thing.

        Args:
            digest: a hash of it.
            what: its name, for the error.

        Raises:
            RuntimeError: on every process, if the hashes differ.
        """
        digests = [data.decode() for data in self.all_gather(digest.encode())]
        if len(set(digests)) > 1:
            held = ", ".join(f"process {rank}: {digest[:12]}" for rank, digest in enumerate(digests))
            raise RuntimeError(f"the processes hold different versions of {what} ({held}); nothing was cut")

    @contextmanager
    def all_or_none(self, doing: str) -> Iterator[None]:
        """If a process raises within this block, all of them raise at its end; none is left waiting for the others.

        Nothing in the block may communicate.

        Args:
            doing: what the block does, for the error: "measuring the states".

        Raises:
            NonFiniteError, ValueError, TypeError, RuntimeError: of the class that the first failing process raised,
                with the same message everywhere.
        """
        if self.size == 1:
            yield
            return
        cause, report = None, b""
        try:
            yield
        except Exception as error:
            cause, report = error, json.dumps([type(error).__name__, str(error)]).encode()
        for rank, failure in enumerate(self.all_gather(report)):
            if failure:
                name, message = json.loads(failure)
                where = f"process {rank} of {self.size}, {doing}"
                if name in ERRORS:
                    raise ERRORS[name](f"{where}: {message}") from cause
                raise RuntimeError(f"{where}: {name}: {message}") from cause


ALONE = Processes()


def all_processes() -> Processes:
    """All processes of torch.distributed, or this one alone if there are no others."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Processes(dist.group.WORLD) if several else ALONE


def warn(logger: logging.Logger, message: str) -> None:
    """Log a warning once, not once in each process."""
    if all_processes().is_main:
        logger.warning(message)


def _cut_to(buffers: list[torch.Tensor], lengths: list[int]) -> list[bytes]:
    return [buffer[:length].cpu().numpy().tobytes() for buffer, length in zip(buffers, lengths, strict=True)]
