"""How far `hf_compressm.estimate` is from what is measured, at sizes that run here.

    python recipes/bench/estimate.py             # two minutes of one core; writes estimate-cpu.json and .md
    python recipes/bench/estimate.py --quick     # seconds, to try it out

Estimated beside measured: (a) what is counted, which must agree to the byte; (b) the step time after a cut divided by
that before it, against every set of measured times that the estimate knows; (c) the peak of the tensors alive while
states are measured and a cut is planned. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, write_results
from speed import Training, Workload, describe_machine, in_turns, spread
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from hf_compressm import CompreSSMConfig, StateStatistics, compress, find_mixers, plan_compression
from hf_compressm.estimate import Estimate, estimate
from hf_compressm.surgery import optimizer_bytes


@dataclass(frozen=True)
class Case:
    """A cut whose peak memory is measured."""

    architecture: str
    before: int
    after: int
    realization: str
    tokens: int


@dataclass(frozen=True)
class Bench:
    """What is measured, and on which batches."""

    widths: tuple[int, ...] = (64, 192)
    before: int = 128
    after: int = 16
    layers: int = 2
    batch: int = 8
    length: int = 64
    rounds: int = 3
    cases: tuple[Case, ...] = (
        Case("mamba", 128, 12, "stock", 4096),
        Case("mamba", 128, 64, "stock", 8192),
        Case("mamba2", 128, 16, "stock", 4096),
        Case("mamba2", 128, 32, "projected", 4096),
    )

    def workload(self, width: int) -> Workload:
        return Workload(hidden_size=width, layers=self.layers, batch=self.batch, length=self.length)


BENCHES = {
    "cpu": Bench(),
    "quick": Bench(
        widths=(16,), before=32, after=8, rounds=1, batch=4, length=64, cases=(Case("mamba", 32, 8, "stock", 512),)
    ),
}


def estimated(training: Training, bench: Bench, state_size: int, **options: Any) -> Estimate:
    """The estimate for a model in training here: in float32, on one CPU."""
    common = {"dtype": "float32", "sequences": bench.batch, "length": bench.length, "device": "cpu"}
    return estimate(training.model.config, state_size=state_size, **common | options)


def cut(training: Training, bench: Bench, state_size: int, realization: str, tokens: int) -> None:
    config = CompreSSMConfig(state_size=state_size, realization=realization)
    batches = [training.batch] * -(-tokens // (bench.batch * bench.length))
    compress(training.model, batches, config, training.optimizer)


def compare_counts(architecture: str, realization: str, bench: Bench) -> list[dict[str, Any]]:
    """(a) Parameters, optimizer and cache of one model before and after a real cut."""
    training = Training(architecture, bench.before, bench.workload(bench.widths[0]), "cpu")
    result = estimated(training, bench, bench.after, realization=realization)
    rows = []
    for moment, size in (("before", result.before), ("after", result.after)):
        if moment == "after":
            cut(training, bench, bench.after, realization, bench.batch * bench.length)
        training.step()
        output = training.model.eval()(training.batch[:1], use_cache=True)
        training.model.train()
        cached = [
            sum(state.nbytes for layer in output.cache_params.layers for state in getattr(layer, kind).values())
            for kind in ("recurrent_states", "conv_states")
        ]
        for what, expected, found in (
            ("parameters", size.parameters, training.model.num_parameters()),
            ("optimizer, bytes", size.optimizer_bytes, optimizer_bytes(training.optimizer)),
            ("recurrent states, bytes", size.state_bytes, cached[0]),
            ("convolution states, bytes", size.conv_state_bytes, cached[1]),
        ):
            row = {"architecture": architecture, "realization": realization, "moment": moment, "what": what}
            rows.append(row | {"estimated": expected, "measured": found})
    return rows


def compare_step_times(architecture: str, realization: str, width: int, bench: Bench) -> list[dict[str, Any]]:
    """(b) Step time after / before, once for every set of measured times that the estimate knows."""
    work = bench.workload(width)
    trainings = [Training(architecture, bench.before, work, "cpu") for _ in range(2)]
    result = estimated(trainings[0], bench, bench.after, realization=realization)
    trainings[1].step()
    cut(trainings[1], bench, bench.after, realization, bench.batch * bench.length)
    before, after = in_turns(bench.rounds, *(training.step for training in trainings))
    measured = spread([small / large for large, small in zip(before, after, strict=True)])
    return [
        {
            "architecture": architecture,
            "realization": realization,
            "state_size": f"{bench.before} → {bench.after}",
            "hidden_size": width,
            "before_ms": statistics.median(before),
            "estimated": step.ratio,
            "estimated_by_width": step.ratio_by_width,
            "measured": measured,
            "source": step.source,
        }
        for step in result.step_times
    ]


class LiveTensors(TorchDispatchMode):
    """Within this mode, the bytes of the tensors that are alive, and their peak.

    It is what a device's allocator would have to provide: the memory of a CPU process also has what the C library
    keeps in between, which may be as much again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor) and item.untyped_storage()._cdata not in self.sizes:
                storage = item.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._forget, storage._cdata)
        return result

    def _forget(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key, 0)


def peak_memory() -> int:
    """The peak memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands getrusage's maximum down from the process that started this one; VmHWM begins anew.
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_and_plan(training: Training, case: Case, bench: Bench, tokens: int) -> None:
    """What a cut does before it touches the model, on random mixer inputs: no forward pass is needed for them."""
    mixers = find_mixers(training.model)
    layers = {name: StateStatistics.empty(mixer) for name, mixer in mixers.items()}
    for _ in range(tokens // (bench.batch * bench.length)):
        for name, mixer in mixers.items():
            layers[name].update(mixer, torch.randn(bench.batch, bench.length, bench.widths[0]), None)
    plan_compression(training.model, layers, CompreSSMConfig(state_size=case.after, realization=case.realization))


def compare_memory(case: Case, bench: Bench) -> dict[str, Any]:
    """(c) The peak of the tensors alive while states are measured and a cut is planned, on the host and the device."""
    training = Training(case.architecture, case.before, bench.workload(bench.widths[0]), "cpu")
    result = estimated(training, bench, case.after, realization=case.realization, tokens=case.tokens).cut
    with LiveTensors() as live:
        measure_and_plan(training, case, bench, result.tokens)
    # No batch of ids is recorded here.
    expected = result.host_peak - result.host["recorded batches"] + result.device_peak
    return asdict(case) | {"estimated_mib": expected / 2**20, "measured_mib": live.peak / 2**20}


def process_memory(bench: Bench, arguments: argparse.Namespace) -> list[float]:
    """Peaks of processes that make a whole cut, one for each case, above one that only has a model, in MiB."""
    # Settings that let glibc keep freed memory would show in the peak.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    peaks = []
    for number in range(-1, len(bench.cases)):
        command = [sys.executable, __file__, "--case", str(number), *(["--quick"] if arguments.quick else [])]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        peaks.append(int(output.split()[-1]) / 2**20)
    return [peak - peaks[0] for peak in peaks[1:]]


def run_case(number: int, bench: Bench) -> int:
    """The peak memory of this process after one cut; of a model alone with -1."""
    case = bench.cases[max(number, 0)]
    training = Training(case.architecture, case.before, bench.workload(bench.widths[0]), "cpu")
    if number >= 0:
        cut(training, bench, case.after, case.realization, case.tokens)
    return peak_memory()


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    machine, bench = results["machine"], results["bench"]
    wrong = [row for row in results["counts"] if row["estimated"] != row["measured"]]
    lines = [
        f"# Estimates beside measurements, {machine['device']}",
        "",
        f"{machine['threads']} threads, torch {machine['versions']['torch']}, transformers "
        f"{machine['versions']['transformers']}, {machine['date']}. {bench['layers']} layers, {bench['batch']} "
        f"sequences of {bench['length']} tokens, float32.",
        "",
        "## (a) What is counted",
        "",
        f"{len(results['counts'])} numbers, before and after real cuts; {len(wrong)} of them differ.",
        "",
        "| architecture | realization | what | before, estimated | measured | after, estimated | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    pairs: dict[tuple[str, ...], list[int]] = {}
    for row in results["counts"]:
        key = (row["architecture"], row["realization"], row["what"])
        pairs.setdefault(key, []).extend([row["estimated"], row["measured"]])
    lines += [
        f"| {' | '.join(key)} | " + " | ".join(f"{value:,}" for value in row) + " |" for key, row in pairs.items()
    ]
    lines += [
        "",
        "## (b) Step time after / before",
        "",
        "Two readings of each set of measured times: as it is, and with what does not depend on N grown by the width.",
        "",
        "| architecture | realization | N | hidden size | estimated | by width | measured (smallest to largest) "
        "| estimated / measured | from |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['architecture']} | {row['realization']} | {row['state_size']} | {row['hidden_size']} "
            f"| {row['estimated']:.3f} | {row['estimated_by_width']:.3f} | {row['measured']['median']:.3f} "
            f"({row['measured']['min']:.3f} to {row['measured']['max']:.3f}) "
            f"| {row['estimated'] / row['measured']['median']:.2f} | {row['source']} |"
            for row in results["step_times"]
        ),
        "",
        "## (c) Peak memory above the model, MiB",
        "",
        "Estimated and measured: the tensors alive while states are measured and a cut is planned, host and device "
        "together. The last column is what a process takes for a whole cut, which the estimate does not know: with "
        "what the C library keeps of freed tensors, and with the model's forward pass, whose fallback without kernels "
        "holds the states of all tokens of a batch in Mamba-1.",
        "",
        "| architecture | N | realization | tokens | estimated | measured | estimated / measured "
        "| process, whole cut |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['architecture']} | {row['before']} → {row['after']} | {row['realization']} | {row['tokens']:,} "
            f"| {row['estimated_mib']:.0f} | {row['measured_mib']:.0f} "
            f"| {row['estimated_mib'] / row['measured_mib']:.2f} | {row['process_mib']:.0f} |"
            for row in results["memory"]
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, to try it out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON and the Markdown file go")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    name = "quick" if arguments.quick else "cpu"
    bench = BENCHES[name]
    if arguments.case is not None:
        print(run_case(arguments.case, bench))
        return

    kinds = (("mamba", "stock"), ("mamba2", "stock"), ("mamba2", "projected"))
    results: dict[str, Any] = {"machine": describe_machine("cpu"), "bench": asdict(bench)}
    print("counting ...", file=sys.stderr, flush=True)
    results["counts"] = [row for kind in kinds for row in compare_counts(*kind, bench)]
    print("timing steps ...", file=sys.stderr, flush=True)
    results["step_times"] = [
        row for width in bench.widths for kind in kinds for row in compare_step_times(*kind, width, bench)
    ]
    print("measuring memory ...", file=sys.stderr, flush=True)
    processes = process_memory(bench, arguments)
    results["memory"] = [
        compare_memory(case, bench) | {"process_mib": peak} for case, peak in zip(bench.cases, processes, strict=True)
    ]

    write_results(arguments.output, f"estimate-{name}", results, markdown(results))


if __name__ == "__main__":
    main()
