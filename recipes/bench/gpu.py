"""What state size costs on a GPU: training, a cut, decoding, and language models trained with and without a cut.

    make bench-gpu                                       # builds the kernels, then everything, in about half an hour
    python recipes/bench/gpu.py --parts training decoding --architectures mamba2
    python recipes/bench/gpu.py --device cpu --quick     # a minute, to try it out without a GPU

Stock Transformers models in bfloat16 (autocast in training), on bytes:

- training: tokens per second against N and width, with and without torch.compile;
- cut: what one cut of a model of about 130M parameters costs, split into its parts, in training steps of the same
  batch, its peak memory beside a step's, and the step after it;
- decoding: tokens per second and memory of cached generation against N, in ever larger batches until memory ends;
- language: a model trained on the source code of Python's standard library at full size, cut at a fifth, and born at
  the smaller size; same data, same steps; one seed, so small differences in the loss mean nothing.

Each part runs in a process of its own and adds its rows to gpu-NAME.json, NAME being the GPU's; what fails stands
there as an error, and the rest goes on. A part, or an architecture of it, that is run again replaces its rows only.
Kernels are mamba-ssm's and causal-conv1d's where they are installed (recipes/bench/build_kernels.sh), else Mamba-2's
Triton kernels alone, else plain torch: the results say which.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import re
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from decoding import state_bytes, time_decoding
from gpu_tables import markdown
from reporting import RESULTS, write_results
from scan_kernels import choose_kernels, kernels_in_use
from speed import REALIZATIONS, cut_once, cut_row
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging
from workloads import Training, Workload, autocast, build_model, describe_machine, spread, synchronize

from hf_compressm import CompreSSMConfig, Compressor, compress

ARCHITECTURES = ("mamba", "mamba2")


@dataclass(frozen=True)
class Bench:
    """Sizes of everything.

    Attributes:
        training, large, language: the models and batches of the parts; `large` is for cuts and decoding.
        widths: hidden sizes that are trained.
        compiled_widths: those of them that are trained with torch.compile, too.
        batches: sequences that are decoded at a time; larger ones are tried until memory ends.
        steps: training steps of a language model.
        evaluations: how often it is evaluated on the way.
    """

    training: Workload = Workload(layers=4, batch=8, length=1024, rounds=15, bf16=True)
    large: Workload = Workload(
        hidden_size=768, layers=24, batch=8, length=1024, rounds=10, cuts=((128, 12), (128, 16)), bf16=True
    )
    language: Workload = Workload(hidden_size=768, layers=12, batch=16, length=1024, cuts=((128, 16),), bf16=True)
    widths: tuple[int, ...] = (768, 1536, 2560)
    compiled_widths: tuple[int, ...] = (768,)
    batches: tuple[int, ...] = (1, 8, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    steps: int = 600
    learning_rate: float = 1e-3
    evaluations: int = 12
    held_out_batches: int = 16


_TINY = Workload(
    hidden_size=16, layers=1, batch=8, length=64, rounds=1, sizes=(16, 4), cuts=((16, 4),), new_tokens=2, bf16=True
)
QUICK = Bench(
    training=_TINY,
    large=_TINY,
    language=_TINY,
    widths=(16, 32),
    compiled_widths=(16,),
    batches=(1, 2),
    steps=40,
    evaluations=2,
    held_out_batches=1,
)


def measure_training(architecture: str, bench: Bench, device: str) -> Iterator[dict[str, Any]]:
    """Tokens per second of training steps."""
    for width in bench.widths:
        work = replace(bench.training, hidden_size=width)
        for compiled in (False, True)[: 1 + (width in bench.compiled_widths)]:
            for size in work.sizes:
                row = {"hidden_size": width, "state_size": size, "compiled": compiled}
                yield row | attempt(time_training, architecture, size, work, device, compiled)


def time_training(architecture: str, size: int, work: Workload, device: str, compiled: bool) -> dict[str, Any]:
    """One row of it."""
    training = Training(architecture, size, work, device)
    if compiled:
        # Each model anew: the compiler gives up on a function that it has compiled for too many of them.
        torch._dynamo.reset()
        # On a CPU this is to try the benchmark out, not to compile.
        training.forward = torch.compile(training.model, backend="inductor" if device == "cuda" else "eager")
    start = time.perf_counter()
    for _ in range(3):
        training.step()
    warm_up = time.perf_counter() - start
    start_peak(device)
    step_ms = spread([training.step() for _ in range(work.rounds)])
    return {
        "warm_up_s": warm_up,
        "step_ms": step_ms,
        "tokens_per_second": 1000 * training.batch.numel() / step_ms["median"],
        "peak_bytes": peak(device),
    }


def measure_cuts(architecture: str, bench: Bench, device: str) -> Iterator[dict[str, Any]]:
    """What one cut costs."""
    for before, after in bench.large.cuts:
        for realization in REALIZATIONS[architecture]:
            row = {"realization": realization, "state_size": f"{before} → {after}"}
            yield row | attempt(time_cut, architecture, realization, before, after, bench.large, device)


def time_cut(
    architecture: str, realization: str, before: int, after: int, work: Workload, device: str
) -> dict[str, Any]:
    """One row of it. The first cut of a process also loads libraries and kernels, so it is made twice."""
    config = CompreSSMConfig(state_size=after, realization=realization, schedule=[999])
    for _ in range(2):
        training = Training(architecture, before, work, device)
        parameters = training.model.num_parameters()
        training.step()
        start_peak(device)
        step_ms = [training.step() for _ in range(work.rounds)]
        step_peak = peak(device)
        start_peak(device)
        cut = cut_once(training, config)
        both_peak = peak(device)
        training.step()
        after_ms = [training.step() for _ in range(work.rounds)]
    row = cut_row(architecture, before, after, cut["tokens"], step_ms + cut["step_ms"], cut["parts_ms"])
    return row | {
        "parameters": parameters,
        "after_ms": spread(after_ms),
        "step_peak_bytes": step_peak,
        # Training goes on until the cut has its tokens: more than a step's peak is the cut's.
        "cut_peak_bytes": both_peak,
    }


def measure_decoding(architecture: str, bench: Bench, device: str) -> Iterator[dict[str, Any]]:
    """Tokens per second and memory of decoding, batch by batch."""
    largest = bench.large.sizes[0]
    for realization in REALIZATIONS[architecture]:
        for size in bench.large.sizes[1:] if realization == "projected" else bench.large.sizes:
            row = {"realization": realization, "state_size": size}
            built = attempt(decodable, architecture, realization, largest, size, bench.large, device)
            if "error" in built:
                yield row | built
                continue
            model, bf16 = built["model"], built["autocast"]
            row |= {"weights": str(model.dtype).removeprefix("torch."), "state_bytes": state_bytes(model)}
            for batch in bench.batches:
                result = attempt(time_batch, model, batch, bench.large, device, bf16)
                yield row | {"batch": batch} | result
                if "error" in result:
                    break
            del model, built


def decodable(
    architecture: str, realization: str, largest: int, size: int, work: Workload, device: str
) -> dict[str, Any]:
    """A model for decoding, in bfloat16 where every one of its functions takes that, else under autocast."""
    if realization == "projected":
        training = Training(architecture, largest, work, device)
        # Equal sizes in every layer: how they are shared out is no matter of speed.
        config = CompreSSMConfig(state_size=[size] * work.layers, realization="projected")
        compress(training.model, [training.batch], config)
        model: PreTrainedModel = training.model
    else:
        model = build_model(architecture, size, work, device).to(device)
    model = model.eval().requires_grad_(False)
    if not work.bf16:
        return {"model": model, "autocast": False}
    half = copy.deepcopy(model).bfloat16()
    try:
        state_bytes(half)
    except RuntimeError:
        # mambapy's scan takes no mixture of types.
        return {"model": model, "autocast": True}
    return {"model": half, "autocast": False}


def time_batch(model: PreTrainedModel, batch: int, work: Workload, device: str, bf16: bool) -> dict[str, Any]:
    """One row of decoding."""
    start_peak(device)
    result = time_decoding([model], batch, 8, work.new_tokens, 3, bf16)[0]
    return result | {"peak_bytes": peak(device)}


def measure_language(architecture: str, bench: Bench, device: str) -> Iterator[dict[str, Any]]:
    """A language model at full size, cut, and born small: speed and held-out loss."""
    train, held_out = standard_library()
    (before, after), *_ = bench.language.cuts
    arms = {"full size": None, "born small": None}
    arms |= {f"cut, {realization}": realization for realization in REALIZATIONS[architecture]}
    for arm, realization in arms.items():
        size = after if arm == "born small" else before
        row = {"arm": arm, "state_size": f"{before} → {after}" if realization else f"{size}"}
        yield row | attempt(
            train_language_model,
            architecture,
            size,
            realization and after,
            realization,
            train,
            held_out,
            bench,
            device,
        )


def train_language_model(
    architecture: str,
    size: int,
    after: int | None,
    realization: str | None,
    train: torch.Tensor,
    held_out: torch.Tensor,
    bench: Bench,
    device: str,
) -> dict[str, Any]:
    """One arm; the time of evaluations is not counted, that of the cut is."""
    work = bench.language
    training = Training(architecture, size, work, device)
    parameters = training.model.num_parameters()
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=bench.learning_rate, weight_decay=0.1)
    warmup = bench.steps // 20
    scheduler = get_cosine_schedule_with_warmup(training.optimizer, warmup, bench.steps)
    compressor = None
    if after is not None:
        config = CompreSSMConfig(state_size=after, realization=realization)
        compressor = Compressor(
            config, training.model, training.optimizer, total_steps=bench.steps, warmup_steps=warmup
        )
    generator = torch.Generator().manual_seed(0)
    curve, seconds, step_ms = [], 0.0, []
    for step in range(1, bench.steps + 1):
        start = time.perf_counter()
        batch = sample(train, generator, work).to(device)
        with autocast(device, work.bf16):
            loss = training.model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        training.optimizer.step()
        scheduler.step()
        training.optimizer.zero_grad()
        synchronize(device)
        step_ms.append(1000 * (time.perf_counter() - start))
        if compressor is not None:
            compressor.step()
            synchronize(device)
        seconds += time.perf_counter() - start
        if step % (bench.steps // bench.evaluations) == 0:
            curve.append({"step": step, "seconds": seconds, "loss": evaluate(training.model, held_out, bench, device)})
    cuts = [] if compressor is None else compressor.history
    if compressor is not None and [cut["status"] for cut in cuts] != ["cut"]:
        raise RuntimeError(f"the model was to be cut once, but the history is {cuts}")
    tokens = work.batch * work.length
    return {
        "parameters": parameters,
        "steps": bench.steps,
        "seconds": seconds,
        "tokens_per_second": tokens * bench.steps / seconds,
        # The last half of the run is after any cut.
        "final_tokens_per_second": 1000 * tokens / spread(step_ms[bench.steps // 2 :])["median"],
        "cut_seconds": sum(sum(cut["seconds"].values()) for cut in cuts),
        "loss": curve[-1]["loss"],
        "curve": curve,
    }


def standard_library() -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of Python's standard library; every twentieth file is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if "site-packages" not in file.parts)
    held_out = set(files[::20])
    parts = [b"".join(file.read_bytes() for file in files if (file in held_out) == held) for held in (False, True)]
    train, test = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, test


def sample(text: torch.Tensor, generator: torch.Generator, work: Workload) -> torch.Tensor:
    """A batch of windows from random places."""
    starts = torch.randint(len(text) - work.length, (work.batch, 1), generator=generator)
    return text[starts + torch.arange(work.length)].long()


@torch.no_grad()
def evaluate(model: PreTrainedModel, held_out: torch.Tensor, bench: Bench, device: str) -> float:
    """Mean loss over the same held-out windows in every call, in nats per byte."""
    generator, work, losses = torch.Generator().manual_seed(1), bench.language, []
    model.eval()
    for _ in range(bench.held_out_batches):
        batch = sample(held_out, generator, work).to(device)
        with autocast(device, work.bf16):
            losses.append(model(batch, labels=batch, use_cache=False).loss.item())
    model.train()
    return sum(losses) / len(losses)


def attempt(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What the function returns, or the error that it raised as `error`; then the GPU's memory is free again."""
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # a benchmark of many parts must not end with one of them
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def start_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int | None:
    """The most memory allocated since `start_peak`; None where torch does not count it."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


PARTS = {
    "training": measure_training,
    "cut": measure_cuts,
    "decoding": measure_decoding,
    "language": measure_language,
}


def run_part(part: str, architectures: list[str], bench: Bench, device: str, output: Path, name: str) -> None:
    """Measure one part and put its rows into the results, after each of them: a run that is stopped keeps those."""
    notes = choose_kernels() if device == "cuda" else []
    file = output / f"{name}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    machine = describe_machine(device)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {"memory_bytes": properties.total_memory, "capability": f"{properties.major}.{properties.minor}"}
        machine["cuda"] = torch.version.cuda
    results |= {"machine": machine, "notes": notes, "bench": asdict(bench)}
    results["kernels"] = {kind: kernels_in_use(kind) for kind in ARCHITECTURES}
    kept = [row for row in results.get(part, []) if row["architecture"] not in architectures]
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for architecture in architectures:
        if device == "cuda" and architecture == "mamba" and results["kernels"]["mamba"].get("scan") == "torch":
            reason = "Mamba's scan has neither a kernel nor mambapy here: Transformers' loop would take hours"
            measured: Iterator[dict[str, Any]] = iter([{"error": reason}])
        else:
            measured = PARTS[part](architecture, bench, device)
        for row in measured:
            rows.append({"architecture": architecture} | row)
            results[part] = kept + rows
            results.setdefault("seconds", {})[part] = time.perf_counter() - started
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(in_words(rows[-1]), file=sys.stderr, flush=True)


def in_words(row: dict[str, Any]) -> str:
    """A row's plain values.

    >>> in_words({"architecture": "mamba", "step_ms": {"median": 1.0}, "seconds": 1.23456, "peak_bytes": None})
    'architecture mamba, seconds 1.235'
    """
    words = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if isinstance(value, str | int | float)
    )
    return ", ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try it out")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--compiled_widths", nargs="*", type=int, help="widths that are trained with torch.compile")
    parser.add_argument("--steps", type=int, help="training steps of a language model")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON and the Markdown file go")
    parser.add_argument("--one_part", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu --quick tries the benchmark out without one")
    bench = QUICK if arguments.quick else Bench()
    if arguments.compiled_widths is not None:
        bench = replace(bench, compiled_widths=tuple(arguments.compiled_widths))
    if arguments.steps is not None:
        bench = replace(bench, steps=arguments.steps)
    if arguments.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        parts = {name: replace(getattr(bench, name), bf16=False) for name in ("training", "large", "language")}
        bench = replace(bench, **parts)
    name = "quick"
    if not arguments.quick:
        machine = describe_machine(arguments.device)["device"]
        name = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.one_part:
        transformers_logging.disable_progress_bar()
        warnings.filterwarnings("ignore", module="torch._dynamo")
        logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
        run_part(arguments.parts[0], arguments.architectures, bench, arguments.device, arguments.output, f"gpu-{name}")
        return
    failed = []
    for part in arguments.parts:
        print(f"measuring {part} ...", file=sys.stderr, flush=True)
        # A fault of a kernel takes all that its process does afterwards with it.
        command = [sys.executable, __file__, *sys.argv[1:], "--parts", part, "--one_part"]
        if subprocess.run(command).returncode != 0:
            failed.append(part)
    file = arguments.output / f"gpu-{name}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    if "machine" not in results:
        sys.exit("no part gave a result; the errors are above")
    results["failed"] = failed
    write_results(arguments.output, f"gpu-{name}", results, markdown(results))


if __name__ == "__main__":
    main()
