"""The plan of a cut: what becomes of each layer's states. Pure data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers.utils import logging

from .config import CompreSSMConfig
from .files import write_file
from .modeling_compressm import PROJECTIONS

logger = logging.get_logger(__name__)

FORMAT_VERSION = 2
# Version 1 had no drives.
READABLE_VERSIONS = (1, 2)
# The tensors of a LayerPlan that lie in the safetensors file.
MATRICES = ("readout", "drive", *PROJECTIONS)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        mixer_class: the class name of its mixer.
        state_size_before: N.
        kept: the states that stay, in rising order, shape (groups, r), int64; None if the layer is projected.
        readout: M with new rows W_C' = M W_C, shape (groups, r, N), float32; None if C's rows are only selected.
        drive: M with new rows W_B' = M W_B, of the same shape; None if B's rows are only selected.
        scales: role of a `StateAxis` → the number that all entries of that role are multiplied with, or a list with
            one for each state that stays.
        criterion: the name of the score the states were ranked by; `balanced truncation` if the layer is projected.
        refit: how readout and drive, or the projection, were found: `alternating least squares`, `conjugate gradients`
            (of the readout alone), `mean field`, `balanced` or `none`.
        relative_error: √(Σ w (y−ŷ)² / Σ w y²) of what the layer passes on, measured on the calibration tokens.
        error_curve: the expected relative error with 0, 1, …, N states kept, N + 1 numbers. Where B and C are
            normalized and no tolerance asked for a measured one, too low: sums do not know what the norms lose.
        B_projection, C_projection: [W_1 | ... | W_G] and [V_1 | ... | V_G], from the present N states to the r new
            ones, shape (N, groups × r), float32; None if states are selected.
        hankel_values: the Hankel singular values measured on the data, in falling order, N for each group; only where
            a projection is possible.
        expected_errors: the expected relative error at r of each realization that the layer could have. Of a stock
            layer, the projection's is the mean field's, which is too low where readouts depend on the states.
    """

    mixer_class: str
    state_size_before: int
    kept: torch.Tensor | None
    readout: torch.Tensor | None
    criterion: str
    refit: str
    relative_error: float
    error_curve: list[float]
    B_projection: torch.Tensor | None = None
    C_projection: torch.Tensor | None = None
    hankel_values: list[list[float]] | None = None
    expected_errors: dict[str, float] = field(default_factory=dict)
    groups: int = 1
    scales: dict[str, float | list[float]] = field(default_factory=dict)
    drive: torch.Tensor | None = None

    @property
    def mixtures(self) -> dict[str, torch.Tensor]:
        """Role of a `StateAxis` → M of its new rows, M times the old ones; a role that is missing is only selected."""
        return {role: M for role, M in (("B", self.drive), ("C", self.readout)) if M is not None}

    @property
    def realization(self) -> str:
        """`stock`, or `projected`."""
        return "stock" if self.B_projection is None else "projected"

    @property
    def state_size_after(self) -> int:
        return self.B_projection.shape[1] // self.groups if self.kept is None else self.kept.shape[1]

    @property
    def is_change(self) -> bool:
        return self.realization == "projected" or self.state_size_after < self.state_size_before

    def to_dict(self) -> dict[str, Any]:
        """The layer without its matrices, as JSON can hold it."""
        return {
            "mixer_class": self.mixer_class,
            "state_size_before": self.state_size_before,
            "state_size_after": self.state_size_after,
            "realization": self.realization,
            "groups": self.groups,
            "kept": None if self.kept is None else self.kept.tolist(),
            "criterion": self.criterion,
            "refit": self.refit,
            "relative_error": self.relative_error,
            "error_curve": self.error_curve,
            "hankel_values": self.hankel_values,
            "expected_errors": self.expected_errors,
            "scales": self.scales,
        }


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """The plan of one cut of a model.

    Attributes:
        layers: layer name → what becomes of it. Layers that are left as they are have `state_size_after` equal to
            `state_size_before`; every mixer of the model is listed.
        tokens: the number of calibration tokens it was decided on.
        config: the config it was made with.

    Example:
        >>> import tempfile
        >>> kept = torch.tensor([[0, 2]])
        >>> layer = LayerPlan("MambaMixer", 4, kept, None, "ghost", "none", 0.1, [1.0, 0.5, 0.1, 0.05, 0.0])
        >>> plan = CompressionPlan({"layers.0.mixer": layer}, 4096, CompreSSMConfig(state_size=2))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     plan.save(directory)
        ...     CompressionPlan.load(directory).digest() == plan.digest()
        True
    """

    layers: dict[str, LayerPlan]
    tokens: int
    config: CompreSSMConfig

    @property
    def changes(self) -> dict[str, LayerPlan]:
        """The layers that lose states, or are projected."""
        return {name: layer for name, layer in self.layers.items() if layer.is_change}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the matrices, as JSON can hold it."""
        return {
            "format_version": FORMAT_VERSION,
            "tokens": self.tokens,
            "config": self.config.to_dict(),
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The matrices of all layers, by layer and name."""
        return {
            f"{name}.{matrix}": getattr(layer, matrix)
            for name, layer in self.layers.items()
            for matrix in MATRICES
            if getattr(layer, matrix) is not None
        }

    def digest(self) -> str:
        """SHA-256 of everything in the plan: equal on all processes, and unchanged in a file."""
        return _digest(self.to_dict(), self.tensors())

    def to_bytes(self) -> bytes:
        """The whole plan as the bytes of one safetensors file."""
        content = json.dumps(self.to_dict() | {"digest": self.digest()})
        return safetensors.torch.save(self.tensors() or {"_": torch.zeros(0)}, metadata={"plan": content})

    @classmethod
    def from_bytes(cls, data: bytes) -> CompressionPlan:
        """The plan that `to_bytes` wrote."""
        tensors = safetensors.torch.load(data)
        tensors.pop("_", None)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return cls._from_parts(json.loads(header["__metadata__"]["plan"]), tensors, "the plan's bytes")

    def save(self, path: str | Path) -> None:
        """Write `plan.json`, and `plan.safetensors` with the matrices beside it.

        Args:
            path: a directory (made if missing), or the name of the JSON file.
        """
        json_file = _json_file(path)
        write_file(json_file.with_suffix(".safetensors"), safetensors.torch.save(self.tensors()))
        content = self.to_dict() | {"digest": self.digest()}
        write_file(json_file, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CompressionPlan:
        """Read a plan.

        Args:
            path: as given to `save`.

        Raises:
            FileNotFoundError: one of its two files is missing.
            ValueError: a file is truncated, edited, or not a plan.
        """
        json_file = _json_file(path)
        tensor_file = json_file.with_suffix(".safetensors")
        for file in (json_file, tensor_file):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is missing; a plan is two files, {json_file.name} and {tensor_file.name}"
                )
        try:
            content = json.loads(json_file.read_text(encoding="utf-8"))
            tensors = safetensors.torch.load_file(tensor_file)
        except (json.JSONDecodeError, UnicodeDecodeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{json_file}: the plan is truncated or not a plan ({error}); make it anew") from error
        return cls._from_parts(content, tensors, str(json_file))

    @classmethod
    def _from_parts(cls, content: Any, tensors: dict[str, torch.Tensor], where: str) -> CompressionPlan:
        try:
            if content["format_version"] not in READABLE_VERSIONS:
                raise ValueError(
                    f"{where}: plan format {content['format_version']!r}, but this version reads "
                    f"{' and '.join(map(str, READABLE_VERSIONS))}"
                )
            # Of the file as it is: a later version of the config may have more keys or fewer.
            rest = {key: value for key, value in content.items() if key != "digest"}
            if _digest(rest, tensors) != content["digest"]:
                raise ValueError(
                    f"{where}: its digest does not match its content; it was edited or mixed with another plan"
                )
            layers = {
                name: LayerPlan(
                    mixer_class=layer["mixer_class"],
                    state_size_before=layer["state_size_before"],
                    kept=None if layer["kept"] is None else torch.tensor(layer["kept"], dtype=torch.int64),
                    groups=layer["groups"],
                    criterion=layer["criterion"],
                    refit=layer["refit"],
                    relative_error=layer["relative_error"],
                    error_curve=layer["error_curve"],
                    hankel_values=layer["hankel_values"],
                    expected_errors=layer["expected_errors"],
                    scales=layer.get("scales", {}),
                    **{matrix: tensors.get(f"{name}.{matrix}") for matrix in MATRICES},
                )
                for name, layer in content["layers"].items()
            }
            return cls(layers, content["tokens"], CompreSSMConfig.from_dict(content["config"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: not a plan, or edited ({type(error).__name__}: {error})") from error


def _digest(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    hasher = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _json_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / "plan.json"
