"""What it takes to cut a checkpoint of 2.8 billion parameters on disk: time and memory.

    python recipes/bench/reshape.py --scratch DIRECTORY   # minutes, and 60 GB of disk; writes reshape-cpu.json and .md
    python recipes/bench/reshape.py --quick               # seconds, on a small model, to try it out

Makes a Trainer checkpoint in the shape of mamba-2.8b, with N = 128 states: weights in bfloat16, AdamW's two moments in
float32, random values that are written one tensor at a time. Then another process cuts it to 16 states with a refitted
readout (`reshape_checkpoint`), while this one reads that process's memory from /proc 50 times a second. Anonymous
memory is what no file stands behind: pages of mapped files are the kernel's cache, which it takes back when it wants.
Both checkpoints are deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from reporting import RESULTS, write_results
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MambaConfig, MambaForCausalLM, Trainer

from hf_compressm import CompressionPlan, CompreSSMConfig, find_mixers
from hf_compressm.plan import LayerPlan
from hf_compressm.reshape import reshape_checkpoint


@dataclass(frozen=True)
class Workload:
    """The model, and the cut."""

    hidden_size: int = 2560
    layers: int = 64
    vocabulary: int = 50280
    state_size: int = 128
    kept: int = 16


WORKLOADS = {"cpu": Workload(), "quick": Workload(hidden_size=64, layers=4, vocabulary=512, state_size=32, kept=4)}


def build(work: Workload) -> MambaForCausalLM:
    """The model, without values."""
    config = MambaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden_size,
        state_size=work.state_size,
        num_hidden_layers=work.layers,
        architectures=["MambaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        return MambaForCausalLM(config)


def write_checkpoint(work: Workload, directory: Path) -> None:
    """A checkpoint as the Trainer writes it, of random values, one tensor at a time."""
    model = build(work)
    parameters = dict(model.named_parameters())
    directory.mkdir()
    model.config.save_pretrained(directory)
    state = {"global_step": 1000, "max_steps": 5000, "stateful_callbacks": {}}
    (directory / "trainer_state.json").write_text(json.dumps(state))

    header, place = {}, 0
    for name, parameter in parameters.items():
        size = 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parameter in parameters.values():
            values = torch.randn(parameter.shape, dtype=torch.bfloat16)
            file.write(values.flatten().view(torch.uint8).numpy())

    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups = [[name for name in parameters if (name in decayed) is decay] for decay in (True, False)]
    names = [name for group in groups for name in group]
    with FakeTensorMode():
        moments = {
            number: {"step": torch.empty(()), **{key: torch.empty(parameters[name].shape) for key in MOMENTS}}
            for number, name in enumerate(names)
        }
    first = len(groups[0])
    param_groups = [
        {"lr": 1e-4, "weight_decay": 0.1, "params": list(range(first))},
        {"lr": 1e-4, "weight_decay": 0.0, "params": list(range(first, len(names)))},
    ]
    file = directory / "optimizer.pt"
    # torch writes the file without values; then they are filled in, through a mapping of the file.
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"state": moments, "param_groups": param_groups}, file)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        for values in torch.load(file, mmap=True)["state"].values():
            values["step"].fill_(1000.0)
            for key in MOMENTS:
                values[key].uniform_()


MOMENTS = ("exp_avg", "exp_avg_sq")


def make_plan(work: Workload) -> CompressionPlan:
    """Evenly spaced states, with a random readout."""
    kept = torch.arange(0, work.state_size, work.state_size // work.kept)[None]
    layers = {
        name: LayerPlan(
            mixer_class=type(mixer.module).__name__,
            state_size_before=work.state_size,
            kept=kept,
            readout=torch.randn(1, work.kept, work.state_size),
            criterion="none",
            refit="random",
            relative_error=0.0,
            error_curve=[0.0] * (work.state_size + 1),
        )
        for name, mixer in find_mixers(build(work)).items()
    }
    return CompressionPlan(layers, 1, CompreSSMConfig(state_size=work.kept))


def watch(process: subprocess.Popen) -> dict[str, int]:
    """The largest memory of a process until it ends, by kind, in bytes."""
    largest: dict[str, int] = {}
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines() if status.is_file() else []:
            kind, _, value = line.partition(":")
            if kind in ("RssAnon", "RssFile", "RssShmem"):
                largest[kind] = max(largest.get(kind, 0), int(value.split()[0]) * 1024)
        time.sleep(0.02)
    return largest


def copy_seconds(source: Path, target: Path) -> float:
    """How long the disk takes to copy the checkpoint's largest file: what any rewriting must take at least."""
    file = max(source.iterdir(), key=lambda item: item.stat().st_size)
    start = time.perf_counter()
    shutil.copyfile(file, target)
    with open(target, "rb") as handle:
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def measure(work: Workload, name: str, scratch: Path) -> dict[str, Any]:
    start = time.perf_counter()
    write_checkpoint(work, scratch / "full")
    writing = time.perf_counter() - start
    print(f"written in {writing:.0f} s", file=sys.stderr, flush=True)
    copying = copy_seconds(scratch / "full", scratch / "copy")
    command = [sys.executable, __file__, "--phase", name, "--scratch", str(scratch)]
    process = subprocess.Popen(command)
    largest = watch(process)
    if process.returncode:
        raise RuntimeError(f"cutting the checkpoint failed with code {process.returncode}")
    report = json.loads((scratch / "report.json").read_text())
    return {
        "machine": describe_machine(),
        "workload": asdict(work),
        "parameters": [report["compression"][f"parameters_{when}"] for when in ("before", "after")],
        "bytes": [report["bytes_before"], report["bytes_after"]],
        "seconds": report["seconds"],
        "seconds_to_write_the_source": writing,
        "seconds_to_copy_the_largest_file": copying,
        "anonymous_bytes_before": report["anonymous_bytes_before"],
        "peak_anonymous_bytes": largest["RssAnon"],
        "peak_file_backed_bytes": largest["RssFile"],
        "peak_reported_bytes": report["peak_memory"],
        "largest_tensor_bytes": 4 * max(math.prod(p.shape) for p in build(work).parameters()),
    }


def cut(work: Workload, scratch: Path) -> None:
    """What is measured, in a process of its own."""
    plan = make_plan(work)
    status = Path("/proc/self/status").read_text().splitlines()
    before = next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))
    report = reshape_checkpoint(scratch / "full", plan, scratch / "small")
    (scratch / "report.json").write_text(json.dumps(report.to_dict() | {"anonymous_bytes_before": before}))


def describe_machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def markdown(results: dict[str, Any]) -> str:
    work, machine = results["workload"], results["machine"]
    before, after = results["parameters"]
    gib, mib = 2**30, 2**20
    sizes = " → ".join(f"{size / gib:.2f}" for size in results["bytes"])
    rows = [
        ("parameters", f"{before:,} → {after:,}"),
        ("checkpoint, weights in bf16 and AdamW's moments in fp32, GiB", sizes),
        ("seconds", f"{results['seconds']:.0f}"),
        ("seconds to only copy the larger file, optimizer.pt", f"{results['seconds_to_copy_the_largest_file']:.0f}"),
        ("anonymous memory before, MiB", f"{results['anonymous_bytes_before'] / mib:.0f}"),
        ("peak anonymous memory, MiB", f"{results['peak_anonymous_bytes'] / mib:.0f}"),
        ("peak of mapped files in memory (the kernel's cache), MiB", f"{results['peak_file_backed_bytes'] / mib:.0f}"),
        ("the largest parameter in fp32, MiB", f"{results['largest_tensor_bytes'] / mib:.0f}"),
    ]
    return "\n".join(
        [
            "# Cutting a checkpoint on disk",
            "",
            f"`python recipes/bench/reshape.py` on {machine['cores']} CPU cores with {machine['memory_gib']} GiB of "
            f"memory, torch {machine['torch']}, transformers {machine['transformers']}. A Mamba of {work['layers']} "
            f"layers, hidden size {work['hidden_size']} and a vocabulary of {work['vocabulary']:,} is cut from "
            f"{work['state_size']} to {work['kept']} states, with a refitted readout.",
            "",
            "| what | measured |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to try it out")
    parser.add_argument("--scratch", type=Path, help="where the checkpoints are made (a temporary directory)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON and the Markdown file go")
    parser.add_argument("--phase", choices=WORKLOADS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase is not None:
        cut(WORKLOADS[arguments.phase], arguments.scratch)
        return
    name = "quick" if arguments.quick else "cpu"
    scratch = Path(tempfile.mkdtemp(prefix="reshape-", dir=arguments.scratch))
    try:
        results = measure(WORKLOADS[name], name, scratch)
    finally:
        shutil.rmtree(scratch)
    write_results(arguments.output, f"reshape-{name}", results, markdown(results))


if __name__ == "__main__":
    main()
