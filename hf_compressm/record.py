"""`compressm.json`: everything that is known of the cuts that made a model what it is, beside its weights."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .files import write_file

RECORD_FILE = "compressm.json"
RECORD_VERSION = 1
# Parts of the names of options whose values are nobody's business.
SECRETS = ("token", "key", "secret", "password")

# Metrics of recall over a distance in tokens, which have a table of their own; an error is half of a 95 % interval.
RECALL = re.compile(r"recall_(?:gain|accuracy)(?:_error)?_after_(\d+)")

# Names of metrics as a reader wants them; others are shown by their own.
LABELS = {
    "state_size": "state size N",
    "step": "training step",
    "state_bytes": "recurrent state, bytes per sequence",
    "loss": "loss, nats",
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "kl_divergence": "KL from the uncut model, nats per token",
}


@dataclass
class Record:
    """What a `compressm.json` holds.

    Attributes:
        cuts: the history of a Compressor or a callback: a dictionary for each cut (a report's, with `status`) and for
            each attempt that was skipped.
        versions: of the libraries that the result depends on.
        optimizer_parameters: the names of the parameters in each group of the optimizer that is saved there; an
            optimizer's file knows them by their position only.
        run: how the model came about, as far as it is known: `base_model`, `dataset`, `license`, `seed`, `steps`,
            `command`, ...
        machine: what step times and memory were measured on.
        timeline: of the training, in order: `step`, `state_size`, `loss`, `step_seconds` (mean since the entry
            before), `memory_bytes` (on a GPU the peak, the cut left out; else the process's), as far as measured.
        evaluations: stage (`uncut`, `cut`, `healed`, ...) → metric → value, in order.
        criteria: criterion → the expected relative error with 0, 1, …, N states kept, the largest over the layers;
            where several were compared.
    """

    cuts: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    optimizer_parameters: list[list[str]] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    machine: str = ""
    timeline: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    criteria: dict[str, list[float]] = field(default_factory=dict)

    @property
    def made_cuts(self) -> list[dict[str, Any]]:
        """The cuts that the model still has: not those skipped, taken back, or undone by loading."""
        return [cut for cut in self.cuts if cut["status"] == "cut"]

    def save(self, directory: str | Path) -> Path:
        """Write `compressm.json` into a directory; returns the file."""
        content = {"format_version": RECORD_VERSION} | dataclasses.asdict(self)
        content = {name: value for name, value in content.items() if name == "cuts" or value not in (None, "", [], {})}
        file = Path(directory) / RECORD_FILE
        write_file(file, json.dumps(content, indent=1) + "\n")
        return file

    @classmethod
    def load(cls, directory: str | Path) -> Record:
        """Read the `compressm.json` in a directory.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a record that this version reads.
        """
        file = Path(directory) / RECORD_FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version, cuts = content["format_version"], content["cuts"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a record of cuts ({type(error).__name__}: {error})") from error
        if version != RECORD_VERSION:
            raise ValueError(f"{file}: record format {version!r}, but this version reads {RECORD_VERSION}")
        if not isinstance(cuts, list) or not all(isinstance(cut, dict) and "status" in cut for cut in cuts):
            raise ValueError(f"{file} is not a record of cuts: {RECORD_FILE} lists cuts, each with its status")
        known = {item.name for item in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})


def write_record(
    history: list[dict[str, Any]], directory: str | Path, optimizer_parameters: list[list[str]] | None = None
) -> Path:
    """Write a `compressm.json` that holds a history and nothing else.

    Args:
        history: of a Compressor or a CompreSSMCallback.
        directory: where the model is saved.
        optimizer_parameters: as in `Record`.
    """
    return Record(history, library_versions(), optimizer_parameters).save(directory)


def read_record(directory: str | Path) -> list[dict[str, Any]]:
    """The history in a `compressm.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a record that this version reads.
    """
    return Record.load(directory).cuts


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    names = ("hf-compressm", "torch", "transformers", "accelerate")
    return {name: importlib.metadata.version(name) for name in names}


def tidy_command(words: list[str]) -> str:
    """A command as others can type it: without the values of options that may be secret, and without this machine's
    path to Python.

    Example:
        >>> tidy_command(["/opt/env/bin/python", "train.py", "--hub_token", "hf_x", "--steps", "9"])
        'python train.py --steps 9'
    """
    folder, kept, rest = f"{Path(sys.executable).parent}/", [], iter(words)
    for word in rest:
        option = word.split("=")[0].lower()
        # `--hub_token x`, `--hub_token=x`, and of a launcher (`sudo`, `timeout`) also `HF_TOKEN=x`.
        if (option.startswith("-") or "=" in word) and any(part in option for part in SECRETS):
            if "=" not in word:
                next(rest, None)
            continue
        kept.append(word)
    if kept and (kept[0].startswith(folder) or Path(kept[0]).name.startswith("python")):
        kept[0] = Path(kept[0]).name
    return shlex.join(word.removeprefix(folder) for word in kept)


def describe_machine() -> str:
    """The GPU, or else the processor, that this process runs on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def size_range(sizes: Iterable[int]) -> str:
    """The state size of all layers, or from the smallest to the largest.

    Example:
        >>> size_range([8, 16, 12]), size_range([8, 8])
        ('8–16', '8')
    """
    sizes = sorted(sizes)
    return "–".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
