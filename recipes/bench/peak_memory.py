"""The peak memory of one phase above that of the model, measured in a process of its own.

    python recipes/bench/peak_memory.py step --workload quick --architecture mamba --device cpu

prints bytes. Phases: `step` (one training step) and `cut` (measured on as many tokens as the package asks for; no step
before).
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from scan_kernels import choose_kernels
from transformers import AutoModelForCausalLM
from workloads import WORKLOADS, Training, Workload

from hf_compressm import CompreSSMConfig, compress

PHASES = ("step", "cut")


def peak_bytes(device: str) -> int:
    """The peak memory of this process so far; on a GPU what torch has allocated."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands getrusage's maximum down from the process that started this one; VmHWM begins anew.
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def calibration_batches(training: Training, before: int, after: int) -> list[torch.Tensor]:
    """As many tokens as the package asks for."""
    return [training.batch] * -(-max(4096, 2 * before * after) // training.batch.numel())


def run_phase(phase: str, training: Training, work: Workload) -> int:
    """How far a phase raises the peak memory of this process, in bytes."""
    if training.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = peak_bytes(training.device)
    if phase == "step":
        training.step()
    else:
        before, after = work.cuts[0]
        compress(training.model, calibration_batches(training, before, after), CompreSSMConfig(state_size=after))
    return peak_bytes(training.device) - model


def measure_mib(phase: str, workload: str, architecture: str, device: str, saved: str = "") -> float:
    """The same from a process of its own, in MiB, for the workload's model or for a saved one."""
    command = [sys.executable, __file__, phase, "--workload", workload, "--architecture", architecture]
    command += ["--device", device, "--saved", saved]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"measuring the memory of phase {phase} failed:\n{result.stderr[-2000:]}")
    return int(result.stdout.split()[-1]) / 2**20


def cut_against_step(workload: str, architecture: str, device: str) -> dict[str, Any]:
    """Peaks of a training step and of a cut, above that of the model alone."""
    return {
        "architecture": architecture,
        "state_size": "{} → {}".format(*WORKLOADS[workload].cuts[0]),
        **{f"{phase}_mib": measure_mib(phase, workload, architecture, device) for phase in PHASES},
    }


def step_after_cut(workload: str, architecture: str, realization: str, device: str) -> float:
    """The peak of a training step above that of the model alone, MiB, in a process that loads the cut model."""
    work = WORKLOADS[workload]
    before, after = work.cuts[0]
    training = Training(architecture, before, work, device)
    config = CompreSSMConfig(state_size=after, realization=realization)
    compress(training.model, calibration_batches(training, before, after), config)
    with tempfile.TemporaryDirectory() as directory:
        training.model.save_pretrained(directory)
        return measure_mib("step", workload, architecture, device, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--architecture", choices=("mamba", "mamba2"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--saved", help="a directory with another model than the workload's")
    arguments = parser.parse_args()
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    if arguments.device == "cuda":
        choose_kernels()
    work = WORKLOADS[arguments.workload]
    training = Training(arguments.architecture, 1 if arguments.saved else work.cuts[0][0], work, arguments.device)
    if arguments.saved:
        training.model = AutoModelForCausalLM.from_pretrained(arguments.saved).to(arguments.device).train()
        training.forward = training.model
        training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-4)
    print(run_phase(arguments.phase, training, work))


if __name__ == "__main__":
    main()
