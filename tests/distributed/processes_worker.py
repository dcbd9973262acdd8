"""Each of several processes writes what the others told it. Started by test_processes.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import leave

from hf_compressm.distributed.processes import NonFiniteError, Processes, all_processes


class Strange(Exception):
    """An error that this package does not know."""


def refusal(processes: Processes, digest: str) -> str | None:
    try:
        processes.check_same(digest, "the plan")
    except RuntimeError as error:
        return str(error)
    return None


def failure(processes: Processes, errors: dict[int, Exception]) -> list[str] | None:
    """What every process raises when some of them raise these within a block."""
    try:
        with processes.all_or_none("counting"):
            if processes.rank in errors:
                raise errors[processes.rank]
    except Exception as error:
        return [type(error).__name__, str(error), type(error.__cause__).__name__]
    return None


def exchange(processes: Processes) -> dict[str, Any]:
    rank = processes.rank
    summed, whole = torch.tensor([rank + 1.0, 10.0]), torch.full((2, 3), rank + 1.0)
    processes.sum([summed, whole.T])
    shared = torch.tensor([rank, rank])
    processes.broadcast(shared)
    # Of different lengths, and one of length zero.
    messages = [b"", b"of the \x00 first", b"another"][rank]
    return {
        "size": processes.size,
        "rank": rank,
        "is_main": processes.is_main,
        "owns": [processes.owns(number) for number in range(4)],
        "sum": summed.tolist(),
        "transposed": whole.tolist(),
        "total": processes.total(rank + 0.5),
        "broadcast": shared.tolist(),
        "all_gather": [data.decode() for data in processes.all_gather(messages)],
        "gather": [data.decode() for data in processes.gather(messages, to=1)],
        "same": refusal(processes, "ab" * 32),
        "different": refusal(processes, ["ab" * 32, "ab" * 31 + "ac", "ab" * 32][rank]),
        "no failure": failure(processes, {}),
        "one fails": failure(processes, {1: ValueError("bad number 7")}),
        "all fail": failure(processes, {rank: NonFiniteError(f"NaN on {rank}") for rank in range(3)}),
        "unknown": failure(processes, {1: Strange("what?")}),
        # The processes are still in step afterwards.
        "afterwards": processes.total(1.0),
    }


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # The last two of three: what is written there for ranks 0 and 1 is theirs.
    pair = dist.new_group([1, 2])
    result = {"all": exchange(all_processes())}
    if rank > 0:
        result["pair"] = exchange(Processes(pair))
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main()
