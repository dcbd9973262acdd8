"""What a saved model is, as far as its state is concerned; its weights are not needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from .mixers import Mixer
from .model_files import SavedModel, build_empty, read_config
from .record import RECORD_FILE, Record


@dataclass(frozen=True)
class MixerFacts:
    """One mixer.

    Attributes:
        state_size: N, or r of a projected mixer: the states of each group.
        feature_size: the features that a projected mixer's states are projected from; None of a stock mixer.
        state_bytes: what the recurrent states of one sequence take; caches hold them in float32.
        realizations: what a smaller model can be.
    """

    name: str
    mixer_class: str
    layout: str
    state_size: int
    groups: int
    feature_size: int | None
    state_bytes: int
    realizations: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """A saved model.

    Attributes:
        name: as the user calls it.
        model_type: of its config.
        model_class: of Transformers, or of this package.
        state_size_field: what the config calls N.
        parameters: how many; shared ones count once.
        mixers: in the model's order.
        quantized: whether its weights are, so that it cannot be cut.
        cuts: those that made it what it is, from its compressm.json: N before and after, step, criterion, ...
    """

    name: str
    model_type: str
    model_class: str
    state_size_field: str
    parameters: int
    mixers: tuple[MixerFacts, ...]
    quantized: bool = False
    cuts: tuple[dict[str, Any], ...] = field(default=())

    @property
    def state_bytes(self) -> int:
        return sum(mixer.state_bytes for mixer in self.mixers)

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON can hold them, with the total of the state bytes."""
        return asdict(self) | {"state_bytes": self.state_bytes}

    def __str__(self) -> str:
        return "\n".join([*self._model_lines(), *self._mixer_lines(), *self._cut_lines()])

    def _model_lines(self) -> list[str]:
        return [
            f"{self.name}: {self.model_class} (model type {self.model_type})",
            f"  parameters        {self.parameters:,}",
            f"  recurrent state   {self.state_bytes:,} bytes per sequence, in float32",
            f"  layers with state {len(self.mixers)}",
        ]

    def _mixer_lines(self) -> list[str]:
        lines = []
        for (_, size, groups, features, _), alike in groupby(self.mixers, key=_kind):
            layers = list(alike)
            names = layers[0].name if len(layers) == 1 else f"{layers[0].name} … {layers[-1].name} ({len(layers)})"
            states = f"N = {size}" if features is None else f"{size} states, projected from {features} features"
            in_groups = "" if groups == 1 else f" in each of {groups} groups"
            lines.append(f"    {names}: {layers[0].mixer_class}, {states}{in_groups}")
        lines.append(f"  N in the config   {self.state_size_field}")
        if self.quantized:
            return [*lines, "  can be cut        no: it is quantized; cut the model that it was made from"]
        realizations = set.intersection(*(set(mixer.realizations) for mixer in self.mixers))
        lines.append("  can be cut        stock: some states are selected; the result loads with Transformers alone")
        if "projected" in realizations:
            lines.append(f"{'':20}projected: states are mixed into fewer, nearly lossless; loads with this package,")
            lines.append(f"{'':20}or with trust_remote_code")
        return lines

    def _cut_lines(self) -> list[str]:
        if not self.cuts:
            return ["  cut so far        no"]
        lines = ["  cut so far"]
        for cut in self.cuts:
            before, after = _sizes(cut["state_size_before"]), _sizes(cut["state_size_after"])
            when = "in one shot" if cut["step"] is None else f"after training step {cut['step']:,}"
            how = f"{cut['realization']}, by {cut['criterion']}"
            error = f"relative error of a layer at most {cut['relative_error']:.2%}"
            lines.append(f"    N {before} → {after} {when} ({how}; {error})")
        return lines


def _kind(mixer: MixerFacts) -> tuple[Any, ...]:
    return mixer.mixer_class, mixer.state_size, mixer.groups, mixer.feature_size, mixer.realizations


def _sizes(sizes: list[int]) -> str:
    return " to ".join(map(str, sorted({min(sizes), max(sizes)})))


def inspect_model(model: SavedModel) -> Inspection:
    """Tell what a saved model is, from its config and its record.

    Args:
        model: from `find_model`.

    Raises:
        ValueError: a config that Transformers does not know, a model without states to cut, or a broken record.
    """
    config = read_config(model)
    empty, mixers = build_empty(config, model.name)
    record = Record.load(model.directory) if (model.directory / RECORD_FILE).is_file() else Record()
    return Inspection(
        name=model.name,
        model_type=config.model_type,
        model_class=type(empty).__name__,
        state_size_field=next(iter(mixers.values())).architecture.state_size_field,
        parameters=empty.num_parameters(),
        mixers=tuple(_facts(mixer) for mixer in mixers.values()),
        quantized=getattr(config, "quantization_config", None) is not None,
        cuts=tuple(_summary(cut) for cut in record.made_cuts),
    )


def _facts(mixer: Mixer) -> MixerFacts:
    return MixerFacts(
        name=mixer.name,
        mixer_class=mixer.class_name,
        layout=mixer.architecture.layout.NAME,
        state_size=mixer.state_size,
        groups=mixer.groups,
        feature_size=mixer.module.feature_size if mixer.is_projected else None,
        state_bytes=mixer.bytes_per_state * mixer.state_size,
        realizations=("stock", "projected") if mixer.can_be_projected else ("stock",),
    )


def _summary(cut: dict[str, Any]) -> dict[str, Any]:
    """What matters of a cut, of all its layers together."""
    layers = cut["layers"]
    changed = [layer for layer in layers if layer["status"] == "cut"] or layers
    return {
        "state_size_before": [layer["state_size_before"] for layer in layers],
        "state_size_after": [layer["state_size_after"] for layer in layers],
        "step": cut.get("step"),
        "tokens": cut.get("tokens"),
        "realization": changed[0].get("realization", "stock"),
        "criterion": changed[0]["criterion"],
        "refit": changed[0]["refit"],
        "relative_error": max(layer["relative_error"] for layer in layers),
    }
