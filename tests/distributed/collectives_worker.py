"""Each of several processes writes what the collective operations gave it. Started by test_collectives.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_compressm.distributed.collectives import (
    broadcast_bytes,
    broadcast_tensor,
    check_same_everywhere,
    is_distributed,
    is_main_process,
    sum_over_processes,
    world_size,
)


def refusal(digest: str) -> str | None:
    try:
        check_same_everywhere(digest, "the plan", torch.device("cpu"))
    except RuntimeError as error:
        return str(error)
    return None


def main() -> None:
    dist.init_process_group("gloo")
    rank, cpu = dist.get_rank(), torch.device("cpu")
    summed = torch.tensor([rank + 1.0, 10.0])
    result = {
        "is_distributed": is_distributed(),
        "is_main_process": is_main_process(),
        "world_size": world_size(),
        "sum": sum_over_processes(summed).tolist(),
        "sum in place": summed.tolist(),
        "tensor": broadcast_tensor(torch.tensor([rank, rank])).tolist(),
        # Of different lengths.
        "bytes": broadcast_bytes([b"of the \x00 first", b"ignored"][rank], cpu).decode(),
        "same": refusal("ab" * 32),
        "different": refusal(["ab" * 32, "ab" * 31 + "ac"][rank]),
        # The processes are still in step afterwards.
        "afterwards": sum_over_processes(torch.tensor(1)).item(),
    }
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
