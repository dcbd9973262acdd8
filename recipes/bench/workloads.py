"""What the speed benchmarks measure: models, batches and steps, timed in turns, and what the numbers depend on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

VOCABULARY = 256


@dataclass(frozen=True)
class Workload:
    """Sizes of the models and of a batch, and how often a step is timed.

    Attributes:
        cuts: N before and after.
        run_steps: training steps of a whole run, with and without a cut.
        prompt: tokens of a long prompt.
        new_tokens: tokens that are generated.
        checkpointing: whether the backward pass computes each layer anew, to save memory.
        bf16: whether steps run under autocast to bfloat16.
    """

    hidden_size: int = 64
    layers: int = 2
    batch: int = 32
    length: int = 64
    rounds: int = 9
    sizes: tuple[int, ...] = (128, 64, 32, 16, 12, 8)
    cuts: tuple[tuple[int, int], ...] = ((128, 12), (64, 16))
    run_steps: int = 100
    prompt: int = 512
    new_tokens: int = 24
    checkpointing: bool = False
    bf16: bool = False


WORKLOADS = {
    "cpu": Workload(),
    "quick": Workload(
        hidden_size=16, layers=1, rounds=1, sizes=(32, 8), cuts=((32, 8),), run_steps=10, prompt=16, new_tokens=2
    ),
    "cuda": Workload(hidden_size=768, layers=4, batch=8, length=1024, rounds=25, prompt=4096),
    # 130M parameters, but for the vocabulary.
    "large": Workload(
        hidden_size=768, layers=24, batch=1, length=512, rounds=1, cuts=((128, 16),), checkpointing=True
    ),
    "large-quick": Workload(
        hidden_size=16, layers=1, batch=8, length=128, rounds=1, cuts=((32, 8),), checkpointing=True
    ),
}


class Training:
    """A model, its optimizer and one batch."""

    def __init__(self, architecture: str, state_size: int, work: Workload, device: str) -> None:
        torch.manual_seed(0)
        self.device, self.bf16 = device, work.bf16
        self.model = build_model(architecture, state_size, work, device).to(device).train()
        # What a step calls; torch.compile gives another callable around the same model.
        self.forward: Callable = self.model
        if work.checkpointing:
            # Transformers 5.23 has another name for it, and warns of the old one.
            old_name = self.model.gradient_checkpointing_enable
            getattr(self.model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randint(VOCABULARY, (work.batch, work.length), device=device)

    def step(self, batch: torch.Tensor | None = None) -> float:
        """One training step, in milliseconds."""
        batch = self.batch if batch is None else batch
        start = time.perf_counter()
        with autocast(self.device, self.bf16):
            loss = self.forward(batch, labels=batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        return 1000 * (time.perf_counter() - start)


def build_model(architecture: str, state_size: int, work: Workload, device: str) -> PreTrainedModel:
    """A stock language model with random weights, on the host."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": work.hidden_size,
        "state_size": state_size,
        "num_hidden_layers": work.layers,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if architecture == "mamba":
        # mambapy's scan where there are no kernels: Transformers' own loop over time steps is many times slower.
        return MambaForCausalLM(MambaConfig(**common, use_mambapy=True))
    head_dim = min(64, work.hidden_size)
    heads = 2 * work.hidden_size // head_dim
    # Without CUDA kernels, short chunks are faster.
    chunk_size = 256 if device == "cuda" else 64
    return Mamba2ForCausalLM(
        Mamba2Config(**common, num_heads=heads, head_dim=head_dim, n_groups=1, chunk_size=chunk_size)
    )


def autocast(device: str, bf16: bool) -> AbstractContextManager:
    """Mixed precision, as Trainer's `bf16=True` sets it up."""
    return torch.autocast(device, dtype=torch.bfloat16) if bf16 else nullcontext()


def synchronize(device: str) -> None:
    """Wait until the GPU has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def format_spread(values: dict[str, float], digits: int) -> str:
    """A spread in words.

    >>> format_spread({"median": 2.0, "min": 1.0, "max": 4.0, "count": 3}, 1)
    '2.0 (1.0 to 4.0)'
    """
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def in_turns(rounds: int, *actions: Callable[[], float]) -> list[list[float]]:
    """Values of each action, all called once a round, so that a drift of the machine meets them alike."""
    for _ in range(2):
        for action in actions:
            action()
    values = [[action() for action in actions] for _ in range(rounds)]
    return [list(column) for column in zip(*values, strict=True)]


def random_batches(work: Workload, device: str, count: int) -> Iterator[torch.Tensor]:
    """Batches of random tokens, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randint(VOCABULARY, (work.batch, work.length), generator=generator).to(device)


def describe_machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
        commit = git.stdout.strip() or None
    except OSError:
        commit = None
    installed = {}
    for name in ("torch", "transformers", "triton", "mambapy", "mamba-ssm", "causal-conv1d", "hf-compressm"):
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
        "commit": commit,
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "OMP_"))},
    }
