"""How fast a training step is against N, and what a cut costs: time, in training steps, and memory.

    python recipes/bench/speed.py                    # minutes; writes speed-cpu.json and .md to recipes/bench/results/
    python recipes/bench/speed.py --quick            # about a minute, to try it out
    python recipes/bench/speed.py --device cuda      # wider and longer; Mamba's CUDA kernels if they are installed

Measured on stock Transformers models with random weights and random data: (a) milliseconds per training step against
N; (b) the step of a cut model against one born at that size, in turns, as a ratio; (c) one cut, split into its parts,
in training steps of the same batch; (d) the peak memory of a cut against that of a training step; (e) training step
and decoding of Mamba-2 uncut, cut to a stock model, and projected. Medians with the smallest and largest value;
nothing here is a test. On a CPU set glibc's malloc to keep memory (`make bench` does): page faults dominate otherwise.
The environment is written down with the results.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, write_results
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from hf_compressm import CompreSSMConfig, Compressor, compress


@dataclass(frozen=True)
class Workload:
    """Sizes of the models and of a batch, and how often a step is timed."""

    hidden_size: int = 64
    layers: int = 2
    batch: int = 32
    length: int = 64
    rounds: int = 9
    sizes: tuple[int, ...] = (128, 64, 32, 16, 12, 8)
    cuts: tuple[tuple[int, int], ...] = ((128, 12), (64, 16))


WORKLOADS = {
    "cpu": Workload(),
    "quick": Workload(hidden_size=16, batch=32, length=64, rounds=2, sizes=(32, 8), cuts=((32, 8),)),
    "cuda": Workload(hidden_size=768, layers=4, batch=8, length=1024, rounds=25),
}


class Training:
    """A model, its optimizer and one batch."""

    def __init__(self, architecture: str, state_size: int, work: Workload, device: str) -> None:
        torch.manual_seed(0)
        common = {
            "vocab_size": 256,
            "hidden_size": work.hidden_size,
            "state_size": state_size,
            "num_hidden_layers": work.layers,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        if architecture == "mamba":
            model: PreTrainedModel = MambaForCausalLM(MambaConfig(**common, use_mambapy=True))
        else:
            head_dim = min(64, work.hidden_size)
            heads = 2 * work.hidden_size // head_dim
            config = Mamba2Config(**common, num_heads=heads, head_dim=head_dim, n_groups=1, chunk_size=64)
            model = Mamba2ForCausalLM(config)
        self.device = device
        self.model = model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randint(256, (work.batch, work.length), device=device)

    def decode(self, new_tokens: int = 24) -> float:
        """One token of cached greedy generation, in milliseconds."""
        self.model.eval()
        start = time.perf_counter()
        self.model.generate(
            self.batch[:, :8],
            attention_mask=torch.ones_like(self.batch[:, :8]),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.model.train()
        return 1000 * (time.perf_counter() - start) / new_tokens

    def step(self) -> float:
        """One training step, in milliseconds."""
        start = time.perf_counter()
        self.model(self.batch, labels=self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def in_turns(rounds: int, *actions: Callable[[], float]) -> list[list[float]]:
    """Values of each action, all called once a round, so that a drift of the machine meets them alike."""
    for _ in range(2):
        for action in actions:
            action()
    values = [[action() for action in actions] for _ in range(rounds)]
    return [list(column) for column in zip(*values, strict=True)]


def time_steps(architecture: str, work: Workload, device: str) -> list[dict[str, Any]]:
    """(a) Milliseconds per step against N."""
    trainings = [Training(architecture, size, work, device) for size in work.sizes]
    columns = in_turns(work.rounds, *(training.step for training in trainings))
    return [
        {"architecture": architecture, "state_size": size, "step_ms": spread(column)}
        for size, column in zip(work.sizes, columns, strict=True)
    ]


def compare_with_born_small(architecture: str, work: Workload, device: str) -> list[dict[str, Any]]:
    """(b) Step time after a cut / step time of a model born at that size."""
    results = []
    for before, after in work.cuts:
        cut, born = Training(architecture, before, work, device), Training(architecture, after, work, device)
        cut.step()
        compress(cut.model, [cut.batch], CompreSSMConfig(state_size=after), cut.optimizer)
        ours, theirs = in_turns(3 * work.rounds, cut.step, born.step)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        results.append(
            {
                "architecture": architecture,
                "state_size": f"{before} → {after}",
                "cut_ms": spread(ours),
                "born_ms": spread(theirs),
                "ratio": spread(ratios),
            }
        )
    return results


def time_cuts(architecture: str, work: Workload, device: str) -> list[dict[str, Any]]:
    """(c) One cut, split into its parts, in training steps of the same batch."""
    results = []
    for before, after in work.cuts:
        original = Training(architecture, before, work, device)
        seconds: dict[str, list[float]] = {}
        step_ms: list[float] = []
        for _ in range(max(3, work.rounds // 3) + 1):
            training = copy.deepcopy(original)
            # AdamW must hold the copy's parameters.
            training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-4)
            compressor = Compressor(
                CompreSSMConfig(state_size=after, schedule=[999]), training.model, training.optimizer, total_steps=1000
            )
            while compressor.recorder.tokens < compressor.wanted_tokens:
                step_ms.append(training.step())
            tokens = compressor.recorder.tokens
            for part, value in compressor.cut().seconds.items():
                seconds.setdefault(part, []).append(value)
        # The first round warms up.
        parts = {part: statistics.median(values[1:]) for part, values in seconds.items()}
        step = statistics.median(step_ms[len(step_ms) // 4 :])
        results.append(
            {
                "architecture": architecture,
                "state_size": f"{before} → {after}",
                "tokens": tokens,
                "step_ms": step,
                "parts_ms": {part: 1000 * value for part, value in parts.items()},
                "steps": 1000 * sum(parts.values()) / step,
            }
        )
    return results


def compare_realizations(work: Workload, device: str) -> list[dict[str, Any]]:
    """(e) Mamba-2 uncut, cut to a stock model and projected: training step, and decoding of one token."""
    results = []
    for before, after in work.cuts:
        trainings = {name: Training("mamba2", before, work, device) for name in ("uncut", "stock", "projected")}
        for name, training in trainings.items():
            training.step()
            if name != "uncut":
                config = CompreSSMConfig(state_size=after, realization=name)
                compress(training.model, [training.batch] * 2, config, training.optimizer)
        steps = in_turns(2 * work.rounds, *(training.step for training in trainings.values()))
        tokens = in_turns(work.rounds, *(training.decode for training in trainings.values()))
        for (name, training), step_ms, token_ms in zip(trainings.items(), steps, tokens, strict=True):
            results.append(
                {
                    "realization": name,
                    "state_size": f"{before} → {training.model.config.state_size}",
                    "parameters": training.model.num_parameters(),
                    "step_ms": spread(step_ms),
                    "token_ms": spread(token_ms),
                }
            )
    return results


def peak_bytes(phase: str, architecture: str, work: Workload, device: str) -> int:
    """The peak memory of this process after one phase: `model`, `step` or `cut` (without a step before)."""
    before, after = work.cuts[0]
    training = Training(architecture, before, work, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if phase == "step":
        training.step()
    elif phase == "cut":
        count = -(-max(4096, 2 * before * after) // training.batch.numel())
        compress(training.model, [training.batch] * count, CompreSSMConfig(state_size=after))
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands getrusage's maximum down from the process that started this one; VmHWM begins anew.
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_memory(architecture: str, arguments: argparse.Namespace, work: Workload) -> dict[str, Any]:
    """(d) Peaks of separate processes, above that of the model alone."""
    peaks = {}
    for phase in ("model", "step", "cut"):
        command = [sys.executable, __file__, "--phase", phase, "--architecture", architecture]
        command += ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[phase] = int(output.split()[-1])
    return {
        "architecture": architecture,
        "state_size": "{} → {}".format(*work.cuts[0]),
        "step_mib": (peaks["step"] - peaks["model"]) / 2**20,
        "cut_mib": (peaks["cut"] - peaks["model"]) / 2**20,
    }


def describe_machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout
    installed = {}
    for name in ("torch", "transformers", "mambapy", "mamba-ssm", "hf-compressm"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": installed,
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip() or None,
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "OMP_"))},
    }


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    machine, work = results["machine"], results["workload"]
    lines = [
        f"# Speed on {machine['device']}",
        "",
        f"{machine['threads']} threads, torch {machine['versions']['torch']}, transformers "
        f"{machine['versions']['transformers']}, {machine['date']}. Hidden size {work['hidden_size']}, "
        f"{work['layers']} layers, {work['batch']} sequences of {work['length']} tokens. "
        "Median (smallest to largest).",
        "",
        "## (a) Training step against N",
        "",
        "| architecture | N | ms per step |",
        "|---|---|---|",
        *(
            f"| {row['architecture']} | {row['state_size']} | {_spread(row['step_ms'], 1)} |"
            for row in results["steps"]
        ),
        "",
        "## (b) After a cut, against a model born at that size",
        "",
        "| architecture | N | cut, ms | born, ms | ratio |",
        "|---|---|---|---|---|",
        *(
            f"| {row['architecture']} | {row['state_size']} | {row['cut_ms']['median']:.1f} "
            f"| {row['born_ms']['median']:.1f} | {_spread(row['ratio'], 3)} |"
            for row in results["born_small"]
        ),
        "",
        "## (c) What one cut costs",
        "",
        "| architecture | N | tokens | step, ms | measure, ms | plan, ms | check, ms | apply, ms | in steps |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['architecture']} | {row['state_size']} | {row['tokens']:,} | {row['step_ms']:.0f} | "
            + " | ".join(f"{row['parts_ms'][part]:.0f}" for part in ("measure", "plan", "check", "apply"))
            + f" | {row['steps']:.2f} |"
            for row in results["cuts"]
        ),
        "",
        "## (d) Peak memory above the model, MiB",
        "",
        "| architecture | N | training step | cut |",
        "|---|---|---|---|",
        *(
            f"| {row['architecture']} | {row['state_size']} | {row['step_mib']:.0f} | {row['cut_mib']:.0f} |"
            for row in results["memory"]
        ),
        "",
        "## (e) Mamba-2, by realization",
        "",
        "| realization | N | parameters | ms per training step | ms per decoded token of each sequence |",
        "|---|---|---|---|---|",
        *(
            f"| {row['realization']} | {row['state_size']} | {row['parameters']:,} | {_spread(row['step_ms'], 1)} "
            f"| {_spread(row['token_ms'], 2)} |"
            for row in results["realizations"]
        ),
    ]
    return "\n".join(lines) + "\n"


def _spread(values: dict[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try it out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON and the Markdown file go")
    parser.add_argument("--phase", choices=("model", "step", "cut"), help=argparse.SUPPRESS)
    parser.add_argument("--architecture", choices=("mamba", "mamba2"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    name = "quick" if arguments.quick else arguments.device
    work = WORKLOADS[name]
    if arguments.phase is not None:
        print(peak_bytes(arguments.phase, arguments.architecture, work, arguments.device))
        return

    results: dict[str, Any] = {"machine": describe_machine(arguments.device), "workload": asdict(work)}
    architectures = ("mamba", "mamba2")
    for key, measure in (("steps", time_steps), ("born_small", compare_with_born_small), ("cuts", time_cuts)):
        print(f"measuring {key} ...", file=sys.stderr, flush=True)
        results[key] = [row for kind in architectures for row in measure(kind, work, arguments.device)]
    print("measuring memory ...", file=sys.stderr, flush=True)
    results["memory"] = [measure_memory(kind, arguments, work) for kind in architectures]

    print("measuring realizations ...", file=sys.stderr, flush=True)
    results["realizations"] = compare_realizations(work, arguments.device)

    write_results(arguments.output, f"speed-{name}", results, markdown(results))


if __name__ == "__main__":
    main()
