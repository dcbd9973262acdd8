"""Run a training command, and what it says goes on from its cut checkpoint, until there is nothing left to do.

Where a model cannot be cut while it trains (FSDP1, DeepSpeed's ZeRO-3), the run ends at the cut, and its output folder
names the command that goes on from the smaller checkpoint. This runs both halves unattended:

    python recipes/until_done.py runs/lm -- accelerate launch --config_file recipes/configs/zero3.yaml \
        recipes/pretrain_lm.py --output_dir runs/lm
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from hf_compressm.continuation import CONTINUE_FILE, Continuation, going_on


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="the folder that the command writes its run to")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args(arguments)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("give the command after --")
    while True:
        before = written_at(args.output_dir)
        print(f"until_done: {shlex.join(command)}", flush=True)
        code = subprocess.run(command).returncode
        if code != 0:
            return code
        # Only a file that this command wrote is news.
        if written_at(args.output_dir) == before:
            break
        option, checkpoint = Continuation.read(args.output_dir).command[-2:]
        command = going_on(command, option, checkpoint)
    return 0


def written_at(directory: Path) -> int | None:
    """When the file that tells how to go on was written, in nanoseconds; None if it is not there."""
    file = directory / CONTINUE_FILE
    return file.stat().st_mtime_ns if file.exists() else None


if __name__ == "__main__":
    sys.exit(main())
