"""Start a script in several real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch.distributed as dist


def leave() -> None:
    """End this process of several, once all have come here.

    Without torch's teardown: now and then one of gloo's threads aborts it ("terminate called without an active
    exception"), or it waits for a process that has left.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def torchrun(script: Path, *arguments: str, processes: int = 2, timeout: float = 900) -> subprocess.CompletedProcess:
    """Run a script under torchrun with gloo, and fail with its output if it fails; none is left after a time-out."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
            *(str(script), *arguments),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = launcher.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun's processes have sessions of their own.
        for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
            process.kill()
        stdout, stderr = launcher.communicate()
        raise AssertionError(f"no end after {timeout} s\n{stdout[-4000:]}\n{stderr[-8000:]}") from None
    assert launcher.returncode == 0, f"{stdout[-4000:]}\n{stderr[-8000:]}"
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, stdout, stderr)
