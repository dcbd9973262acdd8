"""How a cut's work is shared out: statistics, ranking and fit with 1, 2 and 4 processes, at the same batches in total.

    python recipes/bench/processes.py            # about two minutes; writes recipes/bench/results/processes-cpu.*
    python recipes/bench/processes.py --quick    # a smaller model, in seconds; prints only

Where there are fewer cores than processes, clock times say nothing: what is compared is each process's own work, its
CPU time (user and system) with one thread. Communication over gloo is part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reporting import RESULTS, write_results
from torch.nn.parallel import DistributedDataParallel
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from hf_compressm import CompreSSMConfig, measure, plan_compression
from hf_compressm.distributed.processes import ALONE, Processes, all_processes
from hf_compressm.record import library_versions

WORLDS = (1, 2, 4)
SIZES = {
    "full": {"hidden_size": 64, "num_hidden_layers": 8, "state_size": 128, "target": 12, "batches": 8, "length": 128},
    "quick": {"hidden_size": 16, "num_hidden_layers": 4, "state_size": 32, "target": 4, "batches": 8, "length": 32},
}
CASES = {"Mamba-1, selection and refit": "stock", "Mamba-2, projected": "projected"}


def build(case: str, size: dict[str, int]) -> torch.nn.Module:
    torch.manual_seed(0)
    common = {key: size[key] for key in ("hidden_size", "num_hidden_layers", "state_size")} | {"vocab_size": 256}
    if CASES[case] == "stock":
        return MambaForCausalLM(MambaConfig(**common, use_mambapy=True))
    heads = 2 * size["hidden_size"] // 16
    return Mamba2ForCausalLM(Mamba2Config(**common, num_heads=heads, head_dim=16, n_groups=1, chunk_size=64))


def worker(output: Path, size: dict[str, int]) -> None:
    """One process: its CPU time of each part, for each case."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    processes = all_processes()
    seconds = {case: cut_once(case, size, processes) for case in CASES}
    (output / f"{processes.rank}.json").write_text(json.dumps(seconds))
    if processes != ALONE:
        # A process that leaves first can leave the others waiting for it.
        processes.barrier()
        dist.destroy_process_group()


def cut_once(case: str, size: dict[str, int], processes: Processes) -> dict[str, float]:
    """The CPU seconds of each part of a cut; the model is gone when this returns."""
    model = build(case, size)
    wrapped = DistributedDataParallel(model) if processes.size > 1 else model
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(256, (size["batches"], 4, size["length"]), generator=generator)
    config = CompreSSMConfig(state_size=size["target"], realization=CASES[case])
    parts = {}
    for part in ("warm-up", "statistics", "plan"):
        start = time.process_time()
        if part != "plan":
            # Each process sees its share of the batches.
            statistics = measure(wrapped, list(batches[processes.rank :: processes.size]), processes=processes)
        else:
            plan_compression(wrapped, statistics, config, processes=processes)
        parts[part] = time.process_time() - start
    return parts


def run(world: int, name: str) -> list[dict[str, dict[str, float]]]:
    """The times of all processes."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        command += [__file__, "--worker", output, "--size", name]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return [json.loads((Path(output) / f"{rank}.json").read_text()) for rank in range(world)]


def compare(name: str) -> dict[str, Any]:
    """For each case and number of processes: the work of the process that has the most, and its share of one's."""
    runs = {world: run(world, name) for world in WORLDS}
    rows = []
    for case in CASES:
        alone = sum(runs[1][0][case][part] for part in ("statistics", "plan"))
        for world in WORLDS:
            busiest = max(runs[world], key=lambda own: own[case]["statistics"] + own[case]["plan"])[case]
            total = busiest["statistics"] + busiest["plan"]
            rows.append(
                {"case": case, "processes": world, "statistics": busiest["statistics"], "plan": busiest["plan"]}
                | {"total": total, "share": total / alone}
            )
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {"size": SIZES[name], "rows": rows, "machine": machine, "versions": library_versions()}


def as_table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        f"CPU seconds of the process with the most work. {json.dumps(result['size'])}; four sequences per batch.",
        "",
        "| cut | processes | statistics | ranking and fit | together | share of one process |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['case']} | {row['processes']} | {row['statistics']:.2f} | {row['plan']:.2f} | "
            f"{row['total']:.2f} | {row['share']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model; nothing is written")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, default="full", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker, SIZES[args.size])
        return
    result = compare("quick" if args.quick else "full")
    if args.quick:
        print(as_table(result))
    else:
        write_results(RESULTS, "processes-cpu", result, as_table(result) + "\n")


if __name__ == "__main__":
    main()
