"""The plan of a cut: what becomes of each layer's states. Pure data; making one touches no module."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers.utils import logging

from .config import CompreSSMConfig
from .criteria import CRITERIA, hankel_singular_values
from .distributed.ddp import unwrap
from .elimination import eliminate
from .mixers import Mixer, find_mixers, layers_by_config
from .modeling_compressm import PROJECTIONS
from .projection import fit_projection, mean_field_error_curve, measured_error_curve, measured_hankel_values
from .ranks import choose_state_sizes
from .refit import fewest_tokens, refit_readout
from .statistics import NonFiniteError, StateStatistics

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
# `auto` keeps a stock model where no layer's output is expected to change by more than this.
NEARLY_LOSSLESS = 0.05
# The tensors of a LayerPlan that lie in the safetensors file.
MATRICES = ("readout", *PROJECTIONS)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        mixer_class: the class name of its mixer.
        state_size_before: N.
        kept: the states that stay, in rising order, shape (groups, r), int64; None if the layer is projected.
        readout: M with C' = M C, shape (r, N), float32; None if C's rows are only selected.
        criterion: the name of the score the states were ranked by; `balanced truncation` if the layer is projected.
        refit: how the readout or the projection was found: `conjugate gradients`, `mean field`, `balanced`,
            `alternating least squares` or `none`.
        relative_error: √(Σ w (y−ŷ)² / Σ w y²) of what the layer passes on, measured on the calibration tokens.
        error_curve: the expected relative error with 0, 1, …, N states kept, N + 1 numbers.
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
        json_file.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(self.tensors(), json_file.with_suffix(".safetensors"))
        content = self.to_dict() | {"digest": self.digest()}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

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
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"{where}: plan format {content['format_version']!r}, but this version reads {FORMAT_VERSION}"
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


def plan_compression(
    model: nn.Module,
    statistics: dict[str, StateStatistics],
    config: CompreSSMConfig,
    *,
    across_processes: bool = False,
) -> CompressionPlan:
    """Decide which states of each layer stay, how many, and how the kept ones are read out.

    The model is only read.

    Args:
        model: the model that the statistics were measured on.
        statistics: from `measure`, with the recorded inputs.
        config: the rules.
        across_processes: refit on the inputs of all processes; all of them must call this.

    Returns:
        The plan. A measured rule (tolerance, hankel_tolerance) may find that nothing is worth cutting: then
        `plan.changes` is empty.

    Raises:
        NonFiniteError: statistics or parameters hold NaN or infinity.
        ValueError: statistics of other layers than the model has, or a target that is not below N.
        TypeError: an unsupported mixer.
    """
    mixers = find_mixers(unwrap(model)[0])
    _check_statistics(mixers, statistics)
    check_list_of_sizes(config, mixers)
    ranked = {name: _rank(mixers[name], layer, config) for name, layer in statistics.items()}
    projected_curves = {
        name: _projected_curve(mixers[name], layer, config, across_processes)
        for name, layer in statistics.items()
        if mixers[name].can_be_projected
    }
    sizes: dict[str, int] = {}
    projected: set[str] = set()
    # A budget is shared by all layers; other rules ask for the layers that must, or may, be alike.
    together = [list(mixers)] if config.state_bytes is not None else layers_by_config(mixers)
    for names in together:
        chosen, is_projected = _choose(names, mixers, statistics, ranked, projected_curves, config)
        sizes |= chosen
        projected |= set(names) if is_projected else set()
    layers = {}
    for name, layer in statistics.items():
        mixer, size = mixers[name], sizes[name]
        if name in projected and (size < mixer.state_size or not mixer.is_projected):
            plan = _plan_projection(mixer, layer, size, config, across_processes)
            projected_curves[name] = plan.error_curve
        else:
            plan = _plan_selection(mixer, layer, ranked[name], size, config, across_processes)
        expected = {"stock": float(ranked[name].curve[size])}
        if name in projected_curves:
            expected["projected"] = float(projected_curves[name][size])
        layers[name] = dataclasses.replace(plan, expected_errors=expected)
    tokens = int(next(iter(statistics.values())).tokens)
    needed = max(fewest_tokens(layer.state_size_after, layer.state_size_before) for layer in layers.values())
    if tokens < needed and config.refit_steps > 0 and any(layer.refit == "mean field" for layer in layers.values()):
        logger.warning(
            f"only {tokens} calibration tokens: the readout is refitted in the mean field; from {math.ceil(needed)} "
            "tokens on it would be fitted to the outputs"
        )
    return CompressionPlan(layers, tokens, config)


def _projected_curve(
    mixer: Mixer, statistics: StateStatistics, config: CompreSSMConfig, across_processes: bool
) -> torch.Tensor:
    """What a projection is expected to cost; measured where a choice depends on it."""
    chooses_a_size = config.tolerance is not None or config.state_bytes is not None
    if config.realization != "stock" and chooses_a_size:
        return measured_error_curve(mixer, statistics, across_processes=across_processes)
    return mean_field_error_curve(statistics)


def check_list_of_sizes(config: CompreSSMConfig, mixers: dict[str, Mixer]) -> None:
    """Raise a ValueError if `state_size` is a list that does not have a number for each mixer."""
    if isinstance(config.state_size, list) and len(config.state_size) != len(mixers):
        raise ValueError(
            f"state_size lists {len(config.state_size)} numbers, {config.state_size}, but the model has {len(mixers)} "
            f"mixers: {', '.join(mixers)}"
        )


def _choose(
    names: list[str],
    mixers: dict[str, Mixer],
    statistics: dict[str, StateStatistics],
    ranked: dict[str, _Ranking],
    projected_curves: dict[str, torch.Tensor],
    config: CompreSSMConfig,
) -> tuple[dict[str, int], bool]:
    """The new sizes of layers that are decided on together, and whether they are projected."""
    refused = [mixers[name] for name in names if not mixers[name].can_be_projected]
    if must_project(config):
        refuse_projection(refused)
    numbers = {name: number for number, name in enumerate(mixers)}
    # Only a stock model's config holds one number for all.
    together = not any(mixers[name].is_projected for name in names)
    is_projected = config.realization != "stock" and not refused
    if is_projected:
        sizes = choose_state_sizes(
            config,
            {name: projected_curves[name] for name in names},
            {name: measured_hankel_values(statistics[name]) for name in names} if config.hankel_tolerance else {},
            together=False,
            numbers=numbers,
            bytes_per_state={name: mixers[name].bytes_per_state for name in names},
        )
        shrinks = any(sizes[name] < mixers[name].state_size for name in names)
        if not shrinks:
            return sizes, False
        largest = max(sizes.values())
        near_lossless = together and all(float(ranked[name].curve[largest]) <= NEARLY_LOSSLESS for name in names)
        if must_project(config) or not near_lossless:
            return sizes, True
        return dict.fromkeys(names, largest), False
    return (
        choose_state_sizes(
            config,
            {name: ranked[name].curve for name in names},
            {name: hankel_singular_values(statistics[name]) for name in names} if config.hankel_tolerance else {},
            together=together,
        ),
        False,
    )


def must_project(config: CompreSSMConfig) -> bool:
    """Whether a config leaves no choice: only projected layers may have sizes of their own."""
    return config.realization == "projected" or config.state_bytes is not None or isinstance(config.state_size, list)


def refuse_projection(mixers: list[Mixer]) -> None:
    """Raise a ValueError if there are any: these cannot be projected."""
    for mixer in mixers:
        raise ValueError(
            f"layer {mixer.name}: {type(mixer.module).__name__} cannot be projected. In {mixer.layout.NAME}, each "
            "channel's states decay at rates of their own, so a change of the state's basis does not commute with the "
            "dynamics, and all channels share B and C. Use realization='stock' with one state_size: selection with "
            "the refit of C loses little there"
        )


@dataclass(frozen=True)
class _Ranking:
    """States of a layer from the least to the most important, shape (groups, N); ε(r), shape (N + 1,)."""

    criterion: str
    refits: bool
    order: torch.Tensor
    curve: torch.Tensor


def _rank(mixer: Mixer, statistics: StateStatistics, config: CompreSSMConfig) -> _Ranking:
    refits = config.refit and mixer.layout.readout_axis(mixer.module) is not None
    name = config.criterion
    if name == "auto":
        name = "refit" if refits else "ghost"
    order = CRITERIA[name](statistics, config.seed).argsort(dim=-1, stable=True)
    if refits:
        _, squared = eliminate(statistics.state_gram[0], statistics.readout_gram[0], order[0])
    else:
        squared = _selection_error(statistics.contribution_gram.double().cpu(), order)
    curve = torch.cat([torch.zeros(1, dtype=torch.float64), squared]).sqrt().flip(0)
    return _Ranking(name, refits, order, curve)


def _selection_error(contribution_gram: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Σ_{i,j removed} K_ij / Σ K after 1, …, N removals (without a refit), shape (N,); groups add up."""
    sorted_gram = torch.stack([gram[rows][:, rows] for gram, rows in zip(contribution_gram, order, strict=True)])
    removed = sorted_gram.cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1).sum(0)
    return (removed / removed[-1].clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)


def _plan_selection(
    mixer: Mixer,
    statistics: StateStatistics,
    ranking: _Ranking,
    size: int,
    config: CompreSSMConfig,
    across_processes: bool,
) -> LayerPlan:
    kept = ranking.order[:, statistics.state_size - size :].sort(dim=-1).values
    readout, method, error = None, "none", float(ranking.curve[size])
    if size == statistics.state_size:
        error = 0.0
    elif ranking.refits:
        result = refit_readout(
            mixer,
            statistics,
            kept[0],
            steps=config.refit_steps,
            penalty=config.refit_penalty,
            across_processes=across_processes,
        )
        readout, method, error = result.matrix, result.method, result.relative_error
    return LayerPlan(
        mixer_class=type(mixer.module).__name__,
        state_size_before=statistics.state_size,
        kept=kept,
        readout=readout,
        criterion=ranking.criterion,
        refit=method,
        relative_error=error,
        error_curve=[round(value, 8) for value in ranking.curve.tolist()],
        groups=mixer.groups,
    )


def _plan_projection(
    mixer: Mixer,
    statistics: StateStatistics,
    size: int,
    config: CompreSSMConfig,
    across_processes: bool,
) -> LayerPlan:
    result = fit_projection(
        mixer, statistics, size, rounds=config.projection_rounds, across_processes=across_processes
    )
    return LayerPlan(
        mixer_class=type(mixer.module).__name__,
        state_size_before=statistics.state_size,
        kept=None,
        readout=None,
        criterion="balanced truncation",
        refit=result.method,
        relative_error=result.relative_error,
        error_curve=[round(value, 8) for value in result.error_curve.tolist()],
        B_projection=result.B_projection,
        C_projection=result.C_projection,
        hankel_values=result.hankel_values.tolist(),
        groups=mixer.groups,
    )


def _check_statistics(mixers: dict[str, Mixer], statistics: dict[str, StateStatistics]) -> None:
    missing, unknown = sorted(set(mixers) - set(statistics)), sorted(set(statistics) - set(mixers))
    if missing or unknown:
        raise ValueError(
            f"statistics and model do not match: layers without statistics {missing}, statistics without a layer "
            f"{unknown}"
        )
    for name, layer in statistics.items():
        mixer = mixers[name]
        if layer.state_size != mixer.state_size:
            raise ValueError(
                f"layer {name}: statistics were measured at state_size {layer.state_size}, "
                f"but the model has {mixer.state_size}; measure again"
            )
        if layer.tokens == 0:
            raise ValueError(f"layer {name}: the statistics hold no real token")
        for axis in mixer.layout.state_axes(mixer.module):
            if not torch.isfinite(axis.tensor).all():
                raise NonFiniteError(
                    f"layer {name}: parameter {axis.parameter} holds NaN or infinity; nothing was cut"
                )
        if not layer.is_finite():
            raise NonFiniteError(
                f"layer {name}: the statistics hold NaN or infinity; nothing was cut. Look for a diverged run or for "
                "overflow in float16"
            )
