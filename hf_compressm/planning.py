"""Decide on a cut: from statistics and a config to a plan. No module is touched.

Layers are shared out over the processes that train a model. Each process gets all recorded inputs of its layers, ranks
their states and fits them; all tell each other what their layers' states are worth, so that all choose the same sizes,
and at the end their parts of the plan.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import nn
from transformers.utils import logging

from .config import CompreSSMConfig
from .criteria import CRITERIA, hankel_singular_values
from .distributed.processes import ALONE, NonFiniteError, Processes
from .distributed.wrappers import unwrap
from .elimination import eliminate
from .mixers import Mixer, find_mixers, layers_by_config
from .mixers.adapters import mixture_of_parameters
from .plan import CompressionPlan, LayerPlan
from .projection import fit_projection, mean_field_error_curve, measured_error_curve, measured_hankel_values
from .ranks import choose_state_sizes, fixed_sizes
from .refit import fewest_tokens, measured_selection_curve, refit_readout, select_readout
from .statistics import StateStatistics

logger = logging.get_logger(__name__)

# `auto` keeps a stock model where no layer's output is expected to change by more than this.
NEARLY_LOSSLESS = 0.05


def plan_compression(
    model: nn.Module,
    statistics: dict[str, StateStatistics],
    config: CompreSSMConfig,
    *,
    processes: Processes = ALONE,
) -> CompressionPlan:
    """Decide which states of each layer stay, how many, and how the kept ones are read out.

    The model is only read.

    Args:
        model: the model that the statistics were measured on.
        statistics: from `measure`, with the recorded inputs.
        config: the rules.
        processes: those that the statistics were measured on; they share the work, and all of them must call this.

    Returns:
        The plan, the same on all processes. A measured rule (tolerance, hankel_tolerance) may find that nothing is
        worth cutting: then `plan.changes` is empty.

    Raises:
        NonFiniteError: statistics or parameters hold NaN or infinity.
        ValueError: statistics of other layers than the model has, or a target that is not below N.
        TypeError: an unsupported mixer.
        What one process raises, all of them raise.
    """
    mixers = find_mixers(unwrap(model)[0])
    _check_statistics(mixers, statistics)
    check_list_of_sizes(config, mixers)
    mine: dict[str, tuple[Mixer, StateStatistics]] = {}
    for number, (name, mixer) in enumerate(mixers.items()):
        layer = statistics[name]
        if _needs_inputs(mixer, config):
            layer = _with_all_inputs(layer, processes, owner=number % processes.size)
        if processes.owns(number):
            mine[name] = (layer.mixer or mixer, layer)
    with processes.all_or_none("ranking states"):
        for name, (mixer, layer) in mine.items():
            _check_parameters(mixer)
            if _needs_inputs(mixer, config) and not layer.inputs:
                raise ValueError(
                    f"layer {name}: the statistics hold no recorded inputs, which this plan needs; measure again"
                )
        ranked = {name: rank_states(*layer, config) for name, layer in mine.items()}
        outlooks = {name: _look_ahead(*layer, ranked[name], config) for name, layer in mine.items()}
    outlooks = _tell_each_other(outlooks, processes)
    sizes: dict[str, int] = {}
    projected: set[str] = set()
    # A budget is shared by all layers; other rules ask for the layers that must, or may, be alike.
    together = [list(mixers)] if config.state_bytes is not None else layers_by_config(mixers)
    for names in together:
        chosen, is_projected = _choose(names, mixers, outlooks, config)
        sizes |= chosen
        projected |= set(names) if is_projected else set()
    tokens = int(next(iter(statistics.values())).tokens)
    with processes.all_or_none("fitting the states that stay"):
        layers = {
            name: _plan_layer(*layer, ranked[name], outlooks[name], sizes[name], name in projected, config)
            for name, layer in mine.items()
        }
        part = CompressionPlan(layers, tokens, config)
        packed = part.to_bytes() if processes.size > 1 else b""
    plan = part if processes.size == 1 else _joined(processes.all_gather(packed), mixers)
    needed = max(fewest_tokens(layer.state_size_after, layer.state_size_before) for layer in plan.layers.values())
    few = tokens < needed and config.refit_steps > 0
    if few and processes.is_main and any(layer.refit == "mean field" for layer in plan.layers.values()):
        logger.warning(
            f"only {tokens} calibration tokens: the readout is refitted in the mean field; from {math.ceil(needed)} "
            "tokens on it would be fitted to the outputs"
        )
    return plan


def _refits(mixer: Mixer, config: CompreSSMConfig) -> bool:
    return config.refit and mixer.layout.CAN_REFIT


def _needs_inputs(mixer: Mixer, config: CompreSSMConfig) -> bool:
    """Whether more than the sums is looked at."""
    projects = may_project(config) and mixer.can_be_projected
    return _refits(mixer, config) or mixer.is_normalized or projects


def _with_all_inputs(layer: StateStatistics, processes: Processes, owner: int) -> StateStatistics:
    """The statistics with the recorded inputs of all processes, on the owner; as they are on the others."""
    if processes.size == 1:
        return layer
    packed = {}
    for number, (hidden_states, mask) in enumerate(layer.inputs):
        packed[f"{number:06}.hidden_states"] = hidden_states.contiguous()
        if mask is not None:
            packed[f"{number:06}.mask"] = mask.contiguous()
    received = processes.gather(safetensors.torch.save(packed), to=owner)
    if processes.rank != owner:
        return layer
    inputs = []
    for data in received:
        tensors = safetensors.torch.load(data)
        for name in sorted(tensors):
            number, kind = name.split(".")
            if kind == "hidden_states":
                inputs.append((tensors[name], tensors.get(f"{number}.mask")))
    return dataclasses.replace(layer, inputs=inputs)


@dataclass(frozen=True)
class _Outlook:
    """What the states of a layer are worth, as it is known before sizes are chosen.

    Attributes:
        curve: the expected relative error of a selection with r = 0 … N states, shape (N + 1,).
        projected_curve: the same of a projection; None if the layer cannot be projected.
        hankel_values, measured_hankel_values: σ of the layer's average system, and as measured on the data, both in
            falling order, shape (groups, N); None if no rule asks for them.
    """

    curve: torch.Tensor
    projected_curve: torch.Tensor | None = None
    hankel_values: torch.Tensor | None = None
    measured_hankel_values: torch.Tensor | None = None


def _look_ahead(mixer: Mixer, statistics: StateStatistics, ranking: Ranking, config: CompreSSMConfig) -> _Outlook:
    projected_curve = hankel = measured_hankel = None
    if mixer.can_be_projected:
        # Measured where a choice depends on it.
        sizes_are_given = isinstance(config.state_size, list) or config.hankel_tolerance is not None
        measures = may_project(config) and not sizes_are_given
        projected_curve = measured_error_curve(mixer, statistics) if measures else mean_field_error_curve(statistics)
    if config.hankel_tolerance is not None:
        hankel, measured_hankel = hankel_singular_values(statistics), measured_hankel_values(statistics)
    return _Outlook(ranking.curve, projected_curve, hankel, measured_hankel)


def _tell_each_other(outlooks: dict[str, _Outlook], processes: Processes) -> dict[str, _Outlook]:
    """Every process's outlooks, on every process."""
    if processes.size == 1:
        return outlooks
    own = {
        f"{name}/{kind}": value.contiguous()
        for name, outlook in outlooks.items()
        for kind, value in vars(outlook).items()
        if value is not None
    }
    values: dict[str, dict[str, torch.Tensor]] = {}
    for data in processes.all_gather(safetensors.torch.save(own)):
        for key, value in safetensors.torch.load(data).items():
            name, kind = key.rsplit("/", 1)
            values.setdefault(name, {})[kind] = value
    return {name: _Outlook(**of_layer) for name, of_layer in values.items()}


def _joined(packed: list[bytes], mixers: dict[str, Mixer]) -> CompressionPlan:
    """The plan of all layers, of every process's part."""
    parts = [CompressionPlan.from_bytes(data) for data in packed]
    layers = {name: layer for part in parts for name, layer in part.layers.items()}
    return dataclasses.replace(parts[0], layers={name: layers[name] for name in mixers})


def check_list_of_sizes(config: CompreSSMConfig, mixers: dict[str, Mixer]) -> None:
    """Raise a ValueError if `state_size` is a list that does not have a number for each mixer."""
    if isinstance(config.state_size, list) and len(config.state_size) != len(mixers):
        raise ValueError(
            f"state_size lists {len(config.state_size)} numbers, {config.state_size}, but the model has {len(mixers)} "
            f"mixers: {', '.join(mixers)}"
        )


def _choose(
    names: list[str], mixers: dict[str, Mixer], outlooks: dict[str, _Outlook], config: CompreSSMConfig
) -> tuple[dict[str, int], bool]:
    """The new sizes of layers that are decided on together, and whether they are projected."""
    refused = [mixers[name] for name in names if not mixers[name].can_be_projected]
    if must_project(config):
        refuse_projection(refused)
    # Only a stock model's config holds one number for all.
    together = not any(mixers[name].is_projected for name in names)
    is_projected = may_project(config) and not refused
    if is_projected:
        sizes = choose_state_sizes(
            config,
            {name: outlooks[name].projected_curve for name in names},
            {name: outlooks[name].measured_hankel_values for name in names},
            together=False,
            numbers={name: number for number, name in enumerate(mixers)},
            bytes_per_state={name: mixers[name].bytes_per_state for name in names},
        )
        shrinks = any(sizes[name] < mixers[name].state_size for name in names)
        if not shrinks:
            return sizes, False
        if must_project(config) or not together:
            return sizes, True
        # A stock config has one size for all: the one that was asked for, or the largest that a layer needs.
        size = max(sizes.values())
        if config.state_size is not None:
            size = max(fixed_sizes(config, {name: mixers[name].state_size for name in names}, {}).values())
        near_lossless = all(float(outlooks[name].curve[size]) <= NEARLY_LOSSLESS for name in names)
        return (dict.fromkeys(names, size), False) if near_lossless else (sizes, True)
    return (
        choose_state_sizes(
            config,
            {name: outlooks[name].curve for name in names},
            {name: outlooks[name].hankel_values for name in names},
            together=together,
        ),
        False,
    )


def may_project(config: CompreSSMConfig) -> bool:
    """Whether a config allows a projection; one that names a criterion asks for a selection by it."""
    return must_project(config) or (config.realization == "auto" and config.criterion == "auto")


def must_project(config: CompreSSMConfig) -> bool:
    """Whether a config leaves no choice: only projected layers may have sizes of their own."""
    return config.realization == "projected" or config.state_bytes is not None or isinstance(config.state_size, list)


def refuse_projection(mixers: list[Mixer]) -> None:
    """Raise a ValueError if there are any: these cannot be projected."""
    for mixer in mixers:
        if not mixer.layout.CAN_REFIT:
            raise ValueError(
                f"layer {mixer.name}: {type(mixer.module).__name__} cannot be projected: there is no projected class "
                "for mixers from outside Transformers. Use realization='stock', or the model's class in Transformers"
            )
        raise ValueError(
            f"layer {mixer.name}: {type(mixer.module).__name__} cannot be projected. In its layout "
            f"({mixer.layout.NAME}), each channel's states decay at rates of their own, so a change of the state's "
            "basis does not commute with the dynamics, and channels share B and C. Use realization='stock' with one "
            "state_size: selection with the refit of C loses little there"
        )


@dataclass(frozen=True)
class Ranking:
    """States of a layer from the least to the most important, shape (groups, N); ε(r), shape (N + 1,)."""

    criterion: str
    order: torch.Tensor
    curve: torch.Tensor


def rank_states(mixer: Mixer, statistics: StateStatistics, config: CompreSSMConfig) -> Ranking:
    """The order in which a layer's states go, by the config's criterion, and the error that is expected on the way."""
    refits, name = _refits(mixer, config), config.criterion
    if name == "auto":
        name = "refit" if refits else "ghost"
    order = CRITERIA[name](statistics, config.seed).argsort(dim=-1, stable=True)
    if refits:
        squared = _refit_error(statistics, order)
    else:
        squared = _selection_error(statistics.contribution_gram.double().cpu(), order)
    curve = torch.cat([torch.zeros(1, dtype=torch.float64), squared]).sqrt().flip(0)
    if mixer.is_normalized and config.tolerance is not None:
        # The sums do not know what the norms on B and C lose.
        curve = measured_selection_curve(mixer, statistics, order, refit=refits)
    return Ranking(name, order, curve)


def _refit_error(statistics: StateStatistics, order: torch.Tensor) -> torch.Tensor:
    """The mean field's error after 1, …, N removals with a refit, relative to all groups' energy, shape (N,)."""
    grams = list(zip(statistics.state_gram.double().cpu(), statistics.readout_gram.double().cpu(), strict=True))
    energies = torch.stack([(H * omega).sum() for H, omega in grams])
    errors = torch.stack([eliminate(H, omega, rows)[1] for (H, omega), rows in zip(grams, order, strict=True)])
    if energies.sum() <= 0:
        return errors.mean(0)
    return (energies[:, None] * errors).sum(0) / energies.sum()


def _selection_error(contribution_gram: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Σ_{i,j removed} K_ij / Σ K after 1, …, N removals (without a refit), shape (N,); groups add up."""
    sorted_gram = torch.stack([gram[rows][:, rows] for gram, rows in zip(contribution_gram, order, strict=True)])
    removed = sorted_gram.cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1).sum(0)
    return (removed / removed[-1].clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)


def _plan_layer(
    mixer: Mixer,
    statistics: StateStatistics,
    ranking: Ranking,
    outlook: _Outlook,
    size: int,
    is_projected: bool,
    config: CompreSSMConfig,
) -> LayerPlan:
    projected_curve = outlook.projected_curve
    if is_projected and (size < mixer.state_size or not mixer.is_projected):
        plan = _plan_projection(mixer, statistics, size, config)
        projected_curve = plan.error_curve
    else:
        plan = _plan_selection(mixer, statistics, ranking, size, config)
    expected = {"stock": float(ranking.curve[size])}
    if projected_curve is not None:
        expected["projected"] = float(projected_curve[size])
    return dataclasses.replace(plan, expected_errors=expected)


def _plan_selection(
    mixer: Mixer, statistics: StateStatistics, ranking: Ranking, size: int, config: CompreSSMConfig
) -> LayerPlan:
    kept = ranking.order[:, statistics.state_size - size :].sort(dim=-1).values
    readout, drive, method, error, scales = None, None, "none", float(ranking.curve[size]), {}
    if size == statistics.state_size:
        error = 0.0
    elif _refits(mixer, config):
        result = refit_readout(
            mixer,
            statistics,
            kept,
            steps=config.refit_steps,
            penalty=config.refit_penalty,
            rounds=config.refit_rounds,
        )
        method, error, scales = result.method, result.relative_error, result.scales
        readout = mixture_of_parameters(mixer.name, mixer.axes, result.matrix, kept, "C")
        if result.drive is not None:
            drive = mixture_of_parameters(mixer.name, mixer.axes, result.drive, kept, "B")
    elif mixer.is_normalized:
        result = select_readout(mixer, statistics, kept)
        error, scales = result.relative_error, result.scales
    return LayerPlan(
        mixer_class=mixer.class_name,
        state_size_before=statistics.state_size,
        kept=kept,
        readout=readout,
        drive=drive,
        criterion=ranking.criterion,
        refit=method,
        relative_error=error,
        error_curve=[round(value, 8) for value in ranking.curve.tolist()],
        groups=mixer.groups,
        scales=scales,
    )


def _plan_projection(mixer: Mixer, statistics: StateStatistics, size: int, config: CompreSSMConfig) -> LayerPlan:
    result = fit_projection(mixer, statistics, size, rounds=config.projection_rounds)
    return LayerPlan(
        mixer_class=mixer.class_name,
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
        if layer.state_size != mixers[name].state_size:
            raise ValueError(
                f"layer {name}: statistics were measured at state_size {layer.state_size}, "
                f"but the model has {mixers[name].state_size}; measure again"
            )
        if layer.tokens == 0:
            raise ValueError(f"layer {name}: the statistics hold no real token")
        if not layer.is_finite():
            raise NonFiniteError(
                f"layer {name}: the statistics hold NaN or infinity; nothing was cut. Look for a diverged run or for "
                "overflow in float16"
            )


@torch.no_grad()
def _check_parameters(mixer: Mixer) -> None:
    for axis in mixer.axes:
        if not torch.isfinite(axis.tensor).all():
            raise NonFiniteError(
                f"layer {mixer.name}: parameter {axis.parameter} holds NaN or infinity; nothing was cut"
            )
