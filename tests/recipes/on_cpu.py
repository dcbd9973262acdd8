"""Runs a recipe that `accelerate launch` started for FSDP2 or DeepSpeed where there is no GPU.

    accelerate launch --config_file recipes/configs/zero2.yaml tests/recipes/on_cpu.py recipes/accelerate_loop.py ...

Accelerate takes both for a matter of GPUs. Here it is told otherwise, and the recipe itself runs as it is.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from accelerate import PartialState


def main() -> None:
    # What is left is the recipe's own command line.
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        use_deepspeed_with_gloo()
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from fsdp2_worker import force_fsdp_on_a_cpu

        PartialState(cpu=True)
        force_fsdp_on_a_cpu()
    runpy.run_path(sys.argv[0], run_name="__main__")


def use_deepspeed_with_gloo() -> None:
    """Without a GPU, Accelerate chooses no backend for DeepSpeed, and then knows of one process only."""
    import deepspeed

    # It would be compiled on the first start, which takes a minute, and is only there to be faster.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState(backend="gloo")


if __name__ == "__main__":
    main()
