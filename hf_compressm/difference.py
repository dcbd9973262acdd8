"""What changed between two saved models; of their weights, one tensor of each is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from tqdm.auto import tqdm

from .inspection import Inspection, inspect_model
from .model_files import CONFIG_FILE, SAFE_WEIGHTS, SavedModel, check_weights, fetch_weights
from .reshape.safetensors_files import read_header

# Of the parameters whose values differ, those that differ most are shown.
SHOWN = 10
# Config fields that every saving may change, and that say nothing of the model.
IGNORED_FIELDS = ("transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Difference:
    """From a model A to a model B.

    Attributes:
        a, b: what the two are.
        config: field → its two values; None where a config lacks it.
        added, removed: parameters that only B, or only A, has → shape.
        reshaped: parameter → its two shapes.
        values: parameter of one shape → ‖b − a‖ / ‖a‖ where that is not zero, the largest first.
        unchanged: how many parameters are the same, value by value.
        bytes_a, bytes_b: of all weights as they are stored.
    """

    a: Inspection
    b: Inspection
    config: dict[str, tuple[Any, Any]]
    added: dict[str, list[int]]
    removed: dict[str, list[int]]
    reshaped: dict[str, tuple[list[int], list[int]]]
    values: dict[str, float]
    unchanged: int
    bytes_a: int
    bytes_b: int

    @property
    def is_empty(self) -> bool:
        """Whether the two are the same model."""
        return not (self.config or self.added or self.removed or self.reshaped or self.values)

    def to_dict(self) -> dict[str, Any]:
        """The difference as JSON can hold it."""
        return asdict(self) | {"a": self.a.to_dict(), "b": self.b.to_dict(), "is_empty": self.is_empty}

    def __str__(self) -> str:
        if self.is_empty:
            return (
                f"{self.a.name} and {self.b.name} are the same model: one config, and {self.unchanged} equal tensors"
            )
        rows = [
            ("", self.a.name, self.b.name),
            ("class", self.a.model_class, self.b.model_class),
            ("states N", _states(self.a), _states(self.b)),
            ("parameters", f"{self.a.parameters:,}", f"{self.b.parameters:,}"),
            ("recurrent state, bytes per sequence", f"{self.a.state_bytes:,}", f"{self.b.state_bytes:,}"),
            ("weights, bytes", f"{self.bytes_a:,}", f"{self.bytes_b:,}"),
            ("cuts so far", str(len(self.a.cuts)), str(len(self.b.cuts))),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
        lines += _section("config", [f"{name}: {_short(a)} → {_short(b)}" for name, (a, b) in self.config.items()])
        lines += _section("states per layer", self._layers())
        lines += _section("reshaped", [f"{name}: {a} → {b}" for name, (a, b) in self.reshaped.items()])
        lines += _section("added", [f"{name}: {shape}" for name, shape in self.added.items()])
        lines += _section("removed", [f"{name}: {shape}" for name, shape in self.removed.items()])
        changed = [f"{name}: {_percent(value)}" for name, value in list(self.values.items())[:SHOWN]]
        more = [f"and {len(self.values) - SHOWN} more"] if len(self.values) > SHOWN else []
        lines += _section("of the same shape, but with other values (‖B − A‖ / ‖A‖)", changed + more)
        return "\n".join([*lines, "", f"{self.unchanged} tensors are equal, value by value"])

    def _layers(self) -> list[str]:
        """The layers one by one, if a total does not tell it all."""
        sizes = {mixer.name: mixer.state_size for mixer in self.b.mixers}
        before = {mixer.name: mixer.state_size for mixer in self.a.mixers}
        if len(set(sizes.values())) == 1 == len(set(before.values())):
            return []
        names = dict.fromkeys([*before, *sizes])
        return [f"{name}: {before.get(name, '–')} → {sizes.get(name, '–')}" for name in names]


def _states(model: Inspection) -> str:
    sizes = [mixer.state_size for mixer in model.mixers]
    return " to ".join(map(str, sorted({min(sizes), max(sizes)})))


def _short(value: Any) -> str:
    text = "–" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _percent(value: float) -> str:
    return f"{value:.2%}" if value >= 1e-4 else f"{value:.1e}"


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def compare_models(a: SavedModel, b: SavedModel, *, show_progress: bool = False) -> Difference:
    """Tell what changed from one saved model to another.

    Args:
        a, b: from `find_model`, with weights as safetensors.
        show_progress: show a progress bar.

    Raises:
        FileNotFoundError: no weights.
        ValueError: pickled weights, or files that are not whole.
    """
    before, after = _weights(a), _weights(b)
    both = [name for name in before if name in after]
    shapes = {name: (before.shape(name), after.shape(name)) for name in both}
    same = [name for name, (old, new) in shapes.items() if old == new]
    progress = tqdm(same, desc="comparing values", disable=not show_progress)
    distances = {name: _distance(before.values(name), after.values(name)) for name in progress}
    values = {name: value for name, value in distances.items() if value > 0}
    return Difference(
        a=inspect_model(a),
        b=inspect_model(b),
        config=_config_difference(a, b),
        added={name: after.shape(name) for name in after if name not in before},
        removed={name: before.shape(name) for name in before if name not in after},
        reshaped={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        values=dict(sorted(values.items(), key=lambda item: item[1], reverse=True)),
        unchanged=len(same) - len(values),
        bytes_a=before.bytes,
        bytes_b=after.bytes,
    )


def _config_difference(a: SavedModel, b: SavedModel) -> dict[str, tuple[Any, Any]]:
    old, new = (json.loads((model.directory / CONFIG_FILE).read_text(encoding="utf-8")) for model in (a, b))
    names = [name for name in dict.fromkeys([*old, *new]) if name not in IGNORED_FIELDS]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖b − a‖ / ‖a‖; infinite where only a is zero, and where one holds NaN and the other does not."""
    if a.dtype == b.dtype and torch.equal(a, b):
        return 0.0
    difference = torch.linalg.vector_norm(b.double() - a.double())
    norm = torch.linalg.vector_norm(a.double())
    if difference == 0:
        return 0.0
    return float(difference / norm) if norm > 0 and torch.isfinite(difference) else float("inf")


class _Weights:
    """The tensors of a saved model, by name, each read when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._files = {name: file for file in files for name in read_header(file)[0] if name != "__metadata__"}
        self._headers = {file: read_header(file)[0] for file in files}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def bytes(self) -> int:
        """Of all values, as they are stored."""
        places = [self._headers[file][name]["data_offsets"] for name, file in self._files.items()]
        return sum(end - start for start, end in places)

    def shape(self, name: str) -> list[int]:
        return self._headers[self._files[name]][name]["shape"]

    def values(self, name: str) -> torch.Tensor:
        with safetensors.safe_open(self._files[name], "pt") as content:
            return content.get_tensor(name)


def _weights(model: SavedModel) -> _Weights:
    if check_weights(model, allow_pickle=True):
        raise ValueError(f"{model.name} has pickled weights; only safetensors files are compared")
    return _Weights(sorted(fetch_weights(model).glob(SAFE_WEIGHTS)))
