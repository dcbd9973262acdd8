"""The few collective operations a cut needs. With one process each of them does nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main_process() -> bool:
    return not is_distributed() or dist.get_rank() == 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def summation(across_processes: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a sum over this process's tokens becomes one over all tokens: `sum_over_processes`, or nothing to do."""
    return sum_over_processes if across_processes else lambda tensor: tensor


def broadcast_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Give every process the main process's tensor, in place."""
    if is_distributed():
        dist.broadcast(tensor, src=0)
    return tensor


def broadcast_bytes(data: bytes, device: torch.device) -> bytes:
    """Give every process the main process's bytes; what the others pass in is ignored."""
    if not is_distributed():
        return data
    length = broadcast_tensor(torch.tensor(len(data), device=device))
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if is_main_process():
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return broadcast_tensor(buffer).cpu().numpy().tobytes()


def check_same_everywhere(digest: str, what: str, device: torch.device) -> None:
    """Check that every process holds the same thing.

    Args:
        digest: a hexadecimal hash of it.
        what: its name, for the error.
        device: a device that the process group can communicate on.

    Raises:
        RuntimeError: on every process, if the hashes differ.
    """
    if not is_distributed():
        return
    own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.int64, device=device)
    low, high = own.clone(), own.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise RuntimeError(
            f"the processes hold different versions of {what} (this one: {digest[:12]}); nothing was cut"
        )
