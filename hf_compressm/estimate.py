"""What a cut costs and what it saves, from a config alone: for models and machines that are not at hand.

Shapes are exact: the model is built on torch's meta device, and made smaller there by the code that resizes real ones.
The rest are formulas. FLOPs count a multiply-add as two, for each token of the forward pass; training takes three
times as many (Kaplan et al., arXiv 2001.08361, section 2.1). With L the length, K the convolution's kernel, I the
mixer's channels, H heads of P channels each, G groups, N states and Q the chunk size:

    linear layer        2 · rows · columns; a routed expert's counts as often as a token goes to one of the experts
    convolution         2 K · channels
    attention           4 L · heads · head size: scores and values of all pairs; causal kernels may do half of it
    scan, Mamba-1       7 I N + 3 I: Δ A, exp, (Δ x) B, a h + b, and C h summed up for each channel and state; Δ x and
                        the skip for each channel. (Equation 2 of arXiv 2312.00752, run step by step; a parallel scan
                        does 9 I N of arithmetic, github.com/state-spaces/mamba/issues/110.)
    scan, Mamba-2       the matrix products of the chunked form (arXiv 2405.21060, section 6), as Mamba's kernels do
                        them: within chunks 2 Q N G for the scores C Bᵀ and 2 Q I for their sums over x, 2 I N for each
                        of the chunks' states and what they give out, 2 I N / Q to pass states on, 2 I for the skip
    projections         2 · N G r for each of the two matrices of a projected mixer

A transformers model without kernels does more: its fallback repeats B and C for every head (scores 2 Q N H).

Training memory follows ZeRO's account (arXiv 1910.02054, section 3.1): weights, gradients and the optimizer. In mixed
precision, DeepSpeed keeps weights and gradients in 16 bits and float32 weights with the optimizer; DDP and FSDP2 keep
float32 weights and gradients, which torch casts on the way. Activations are left out.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from .config import REALIZATIONS, is_whole
from .drive import FITTED_CHANNELS
from .mixers import ARCHITECTURES, Mixer, StateAxis, find_mixers, mamba1, mamba2
from .mixers.architectures import architecture_of
from .mixers.resize import resize_mixer, update_configs
from .mixers.scan import ACCELERATOR_CHUNK_ELEMENTS, CHUNK_ELEMENTS, SAMPLED_CHANNELS
from .modeling_compressm import PROJECTIONS
from .planning import refuse_projection
from .projection import FEWEST_COORDINATES
from .ranks import fixed_state_size
from .refit import tokens_for_a_fit
from .statistics import GRAM_ELEMENTS, StateStatistics

# What each strategy shares out over the ranks; the rest is whole on every rank.
STRATEGIES: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp2": ("weights", "gradients", "optimizer"),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
}
# Float32 numbers that an optimizer keeps for each parameter.
OPTIMIZERS = {"adamw": 2, "lion": 1, "sgd": 0}
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
FLOAT32 = 4
# What a training batch holds of a token: input ids, labels and mask, in int64.
RECORDED_BYTES = 3 * 8
# Triton's kernels compute with the next power of two, but at least this many states.
SMALLEST_KERNEL = 16


@dataclass(frozen=True)
class Benchmark:
    """Measured training times of one model at several state sizes.

    Attributes:
        layout: the mixers' layout.
        device: `cuda` with Mamba's kernels, or `cpu`.
        hidden_size: of the model.
        source: where the numbers are from.
        times: time per step, in any unit, by (features, states); the two differ where a model is projected.
    """

    layout: str
    device: str
    hidden_size: int
    source: str
    times: dict[tuple[int, int], float]


BENCHMARKS = (
    Benchmark(
        mamba2.NAME,
        "cuda",
        # Not told: 53M parameters outside the embeddings, in 16 layers of about 6 · hidden² each.
        768,
        "H100, Mamba-2 of 16 layers with head size 64: 65, 100, 150 and 195 thousand tokens/s, "
        "github.com/state-spaces/mamba/issues/479",
        {(128, 128): 1 / 65, (64, 64): 1 / 100, (32, 32): 1 / 150, (16, 16): 1 / 195},
    ),
    Benchmark(
        mamba1.NAME,
        "cpu",
        64,
        "2 Xeon cores with mambapy, 2 layers of hidden size 64, 32 × 64 tokens, recipes/bench/results/speed-cpu.json",
        {(128, 128): 950.3, (64, 64): 488.3, (32, 32): 252.6, (16, 16): 145.3, (12, 12): 131.8, (8, 8): 105.4},
    ),
    Benchmark(
        mamba2.NAME,
        "cpu",
        64,
        "2 Xeon cores, 2 layers of hidden size 64, 32 × 64 tokens in chunks of 64, "
        "recipes/bench/results/speed-cpu.json",
        {
            **{(128, 128): 68.5, (64, 64): 53.2, (32, 32): 43.3, (16, 16): 38.5, (12, 12): 38.3, (8, 8): 35.7},
            **{(128, 12): 51.3, (64, 16): 44.0},
        },
    ),
    Benchmark(
        mamba2.NAME,
        "cpu",
        128,
        "1 Xeon core, a layer of hidden size 128, 4 × 256 tokens in chunks of 64",
        {(128, 128): 0.042, (64, 64): 0.029, (16, 16): 0.021},
    ),
)


@dataclass(frozen=True)
class Flops:
    """FLOPs per token: what does not depend on the state size, and what does."""

    fixed: float = 0.0
    state: float = 0.0

    @property
    def total(self) -> float:
        return self.fixed + self.state

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.fixed + other.fixed, self.state + other.state)


@dataclass(frozen=True)
class Size:
    """A model at one state size.

    Attributes:
        state_size: N, or r of a projected model; the largest if mixers differ.
        parameters: numbers of parameters, shared ones counted once.
        state_parameters: those among them whose number depends on the state size.
        weight_bytes: the parameters in the training's dtype, as a saved model takes them.
        optimizer_bytes: the optimizer's state, float32 copies of the weights included, of all ranks together.
        state_bytes: the recurrent states of one sequence; Transformers' cache keeps them in float32.
        conv_state_bytes: the convolutions' inputs of one sequence that the cache keeps.
        bytes_per_rank: strategy → weights, gradients and optimizer on the rank that holds most.
        flops: part of the model → forward FLOPs per token.
    """

    state_size: int
    parameters: int
    state_parameters: int
    weight_bytes: int
    optimizer_bytes: int
    state_bytes: int
    conv_state_bytes: int
    bytes_per_rank: dict[str, dict[str, int]]
    flops: dict[str, Flops]

    @property
    def forward_flops(self) -> float:
        return sum(part.total for part in self.flops.values())

    @property
    def training_flops(self) -> float:
        return 3 * self.forward_flops


@dataclass(frozen=True)
class Cut:
    """What one cut takes on the busiest rank, above what training holds anyway; in bytes.

    Attributes:
        tokens: the calibration tokens of all ranks, whole batches.
        layers_per_rank: the mixers whose part of the plan one rank makes.
        host: what lies in the host's memory, all at once.
        device: what lies on the device; measuring, fitting and replacing follow each other. New parameters and moments
            are all made before the first one is put in, so that a failure leaves the model as it was.
        communication: the bytes that collectives carry.
        checkpoint_before, checkpoint_after: weights and optimizer as a checkpoint holds them.
    """

    tokens: int
    layers_per_rank: int
    host: dict[str, int]
    device: dict[str, int]
    communication: dict[str, int]
    checkpoint_before: int
    checkpoint_after: int

    @property
    def host_peak(self) -> int:
        return sum(self.host.values())

    @property
    def device_peak(self) -> int:
        in_turn = ("measuring a batch", "fitting a layer", "replacing parameters")
        always = sum(value for name, value in self.device.items() if name not in in_turn)
        return always + max(self.device[name] for name in in_turn)


@dataclass(frozen=True)
class StepTime:
    """An expected step time after / before.

    Attributes:
        ratio: if the model's steps are made up as those of the measured model are.
        ratio_by_width: if all of a step that does not depend on N grows with the square of the width, as linear layers
            do, and the rest in proportion to it. A much wider model lies between the two.
        mixer_share: the share of a step that these are applied to. In a hybrid, the other layers are taken to cost
            what their FLOPs are.
        source: the measured rows that a line (fixed + slope · N) was fitted to.
        sizes: the smallest and largest N of these rows.
        worst_fit: how far the line is off its own rows at most, as a fraction.
        extrapolated: whether a state size lies outside of the rows.
    """

    ratio: float
    ratio_by_width: float
    mixer_share: float
    source: str
    sizes: tuple[int, int]
    worst_fit: float
    extrapolated: bool


@dataclass(frozen=True)
class Estimate:
    """What a cut of a model costs and saves.

    Attributes:
        model_type: the config's.
        mixers: class name → how many of them the model has.
        settings: what `estimate` was asked for.
        before, after: the model's two sizes.
        cut: memory and communication of the cut itself.
        step_times: expected step-time ratios, that of the most similar measured model first; empty without any.
        assumptions: what the numbers rest on.
    """

    model_type: str
    mixers: dict[str, int]
    settings: dict[str, Any]
    before: Size
    after: Size
    cut: Cut
    step_times: tuple[StepTime, ...]
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON can hold it, with the totals."""
        values = asdict(self)
        for name in ("before", "after"):
            size = getattr(self, name)
            values[name] |= {"forward_flops": size.forward_flops, "training_flops": size.training_flops}
        values["cut"] |= {"host_peak": self.cut.host_peak, "device_peak": self.cut.device_peak}
        return values

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def estimate(
    config: PreTrainedConfig,
    *,
    state_size: int | float,
    tokens: int | None = None,
    world_size: int = 1,
    strategy: str = "ddp",
    dtype: str = "bfloat16",
    optimizer: str = "adamw",
    realization: str = "auto",
    sequences: int = 1,
    length: int = 2048,
    device: str = "cuda",
) -> Estimate:
    """Estimate what a cut costs and saves, without the model's weights and without the machine.

    Args:
        config: of any architecture whose mixers can be cut; it is only read.
        state_size: the states to keep, a number or a fraction of the present number.
        tokens: calibration tokens over all ranks; None: as many as `Compressor` waits for, max(4096, 2 r N).
        world_size: the number of ranks.
        strategy: how training is spread over them: ddp, fsdp2, zero1, zero2 or zero3.
        dtype: what training computes in; bfloat16 and float16 mean mixed precision.
        optimizer: adamw, lion or sgd (without momentum).
        realization: stock or projected; auto is projected where that is possible.
        sequences: sequences in a batch of one rank.
        length: their length, in tokens.
        device: cuda (with Mamba's kernels) or cpu, for the step time.

    Raises:
        ValueError: a config without mixers, a state size that is not below N, a projection of mixers that allow none,
            or a value out of range.
        TypeError: an unsupported mixer, or a value of the wrong type.

    Example:
        >>> from transformers import MambaConfig
        >>> result = estimate(MambaConfig(hidden_size=2560, num_hidden_layers=64), state_size=8, world_size=8)
        >>> f"{result.before.parameters / 1e9:.2f}B, {result.before.state_bytes} -> {result.after.state_bytes} bytes"
        '2.77B, 20971520 -> 10485760 bytes'
    """
    settings = {
        "state_size": state_size,
        "tokens": tokens,
        "world_size": world_size,
        "strategy": strategy,
        "dtype": str(dtype).removeprefix("torch."),
        "optimizer": optimizer,
        "realization": realization,
        "sequences": sequences,
        "length": length,
        "device": device,
    }
    _check_settings(settings)
    model, mixers = _build(config)
    sizes_before = [mixer.state_size for mixer in mixers.values()]
    target = fixed_state_size(state_size, max(sizes_before))
    if target >= min(sizes_before):
        raise ValueError(
            f"state_size is {state_size!r}, that is {target} states, but a mixer of the model has "
            f"{min(sizes_before)}; give fewer"
        )
    refused = [mixer for mixer in mixers.values() if not mixer.can_be_projected]
    if realization == "projected":
        refuse_projection(refused)
    elif realization == "auto":
        # DeepSpeed's ZeRO cannot start the parameters that a projection adds.
        settings["realization"] = "stock" if refused or strategy.startswith("zero") else "projected"
    settings |= {"state_size": target}
    settings |= {"tokens": tokens_for_a_fit(target, max(sizes_before)) if tokens is None else tokens}
    projects = settings["realization"] == "projected"
    kinds = dict(Counter(type(mixer.module).__name__ for mixer in mixers.values()))

    before = _size(model, mixers, settings)
    share = _mixer_share(model, mixers, before)
    points_before = [_point(mixer) for mixer in mixers.values()]
    tokens, host, device_bytes, communication = _cut(model, mixers, settings)
    for mixer in mixers.values():
        features = mixer.module.feature_size if mixer.is_projected else mixer.state_size if projects else None
        resize_mixer(mixer, target, features)
    update_configs(model)
    mixers = find_mixers(model)
    after = _size(model, mixers, settings)
    first = next(iter(mixers.values()))
    step_times = _step_times(
        first.architecture.layout.NAME,
        first.module.in_proj.weight.shape[1],
        share,
        points_before,
        [_point(mixer) for mixer in mixers.values()],
        device,
    )
    return Estimate(
        model_type=config.model_type,
        mixers=kinds,
        settings=settings,
        before=before,
        after=after,
        cut=Cut(
            tokens=tokens,
            layers_per_rank=math.ceil(len(mixers) / world_size),
            host=host,
            device=device_bytes,
            communication=communication,
            checkpoint_before=_checkpoint_bytes(before, settings),
            checkpoint_after=_checkpoint_bytes(after, settings),
        ),
        step_times=step_times,
        assumptions=tuple(_assumptions(model, mixers, settings, step_times)),
    )


def _check_settings(settings: dict[str, Any]) -> None:
    for name, choices in (
        ("strategy", STRATEGIES),
        ("dtype", DTYPES),
        ("optimizer", OPTIMIZERS),
        ("realization", REALIZATIONS),
        ("device", ("cuda", "cpu")),
    ):
        if settings[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {settings[name]!r}")
    for name in ("world_size", "sequences", "length", "tokens"):
        value = settings[name]
        if name == "tokens" and value is None:
            continue
        if not is_whole(value):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    size = settings["state_size"]
    if isinstance(size, bool) or not isinstance(size, (int, float)):
        raise TypeError(f"state_size must be an int or a float, got {size!r} ({type(size).__name__})")
    if not (size >= 1 if is_whole(size) else 0 < size < 1):
        raise ValueError(f"state_size must be an int of at least 1 or a float between 0 and 1, got {size!r}")


def _build(config: PreTrainedConfig) -> tuple[nn.Module, dict[str, Mixer]]:
    """The config's language model, or its bare model where there is none, without memory; and its mixers."""
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config must be a Transformers config, got {type(config).__name__}")
    config = copy.deepcopy(config)
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    supported = ", ".join(sorted({row.model_type for row in ARCHITECTURES.values() if row.model_type}))
    try:
        with torch.device("meta"):
            model = auto.from_config(config)
        return model, find_mixers(model)
    except (ValueError, TypeError) as error:
        raise type(error)(
            f"no estimate for {type(config).__name__} (model_type {config.model_type!r}): {error}; supported model "
            f"types: {supported}"
        ) from error


def _size(model: nn.Module, mixers: dict[str, Mixer], settings: dict[str, Any]) -> Size:
    parameters = list(model.parameters())
    count, element = sum(map(torch.Tensor.numel, parameters)), DTYPES[settings["dtype"]]
    axes = [(mixer, axis) for mixer in mixers.values() for axis in mixer.state_axes]
    per_rank = {
        name: _bytes_per_rank(parameters, name, settings["world_size"], settings["dtype"], settings["optimizer"])
        for name in STRATEGIES
    }
    alone = _bytes_per_rank(parameters, settings["strategy"], 1, settings["dtype"], settings["optimizer"])
    return Size(
        state_size=max(mixer.state_size for mixer in mixers.values()),
        parameters=count,
        state_parameters=sum(_state_numbers(axis, mixer.state_size) for mixer, axis in axes),
        weight_bytes=count * element,
        optimizer_bytes=alone["optimizer"],
        state_bytes=sum(FLOAT32 * mixer.module.intermediate_size * mixer.state_size for mixer in mixers.values()),
        conv_state_bytes=sum(element * mixer.module.conv1d.weight.numel() for mixer in mixers.values()),
        bytes_per_rank=per_rank,
        flops=_flops(model, mixers, settings["length"]),
    )


def _state_numbers(axis: StateAxis, state_size: int) -> int:
    """How many of a parameter's numbers belong to the states."""
    return axis.tensor.numel() // axis.length(state_size) * axis.blocks * state_size


def _bytes_per_rank(
    parameters: list[nn.Parameter], strategy: str, world_size: int, dtype: str, optimizer: str
) -> dict[str, int]:
    """Weights, gradients and optimizer of the first rank, which holds at least as much as any other.

    FSDP2 shards each parameter along its first dimension, ZeRO-3 each one flattened, ZeRO-1 and -2 all of them as one.
    """
    moments, deepspeed = OPTIMIZERS[optimizer], strategy.startswith("zero")
    element = DTYPES[dtype] if deepspeed else FLOAT32
    whole = sum(parameter.numel() for parameter in parameters)
    if strategy == "fsdp2":
        share = sum(math.ceil(item.shape[0] / world_size) * (item.numel() // item.shape[0]) for item in parameters)
    elif strategy == "zero3":
        share = sum(math.ceil(parameter.numel() / world_size) for parameter in parameters)
    else:
        share = math.ceil(whole / world_size)
    held = {name: share if name in STRATEGIES[strategy] else whole for name in ("weights", "gradients", "optimizer")}
    # torch's AdamW counts each parameter's steps in a float32 tensor; ZeRO optimizes one flat tensor per group.
    counters = 0 if deepspeed or optimizer != "adamw" else FLOAT32 * len(parameters)
    return {
        "weights": held["weights"] * element,
        "gradients": held["gradients"] * element,
        "optimizer": held["optimizer"] * FLOAT32 * (moments + deepspeed) + counters,
    }


def _flops(model: nn.Module, mixers: dict[str, Mixer], length: int) -> dict[str, Flops]:
    """Forward FLOPs per token of each part of a model, by the formulas of this module's docstring."""
    flops = {name: Flops() for name in ("linear", "experts", "convolution", "scan", "projections", "attention")}
    of_states = {
        (id(axis.module), axis.parameter): _state_numbers(axis, mixer.state_size)
        for mixer in mixers.values()
        for axis in mixer.axes
    }
    for part, module, name, used in _matrices(model):
        numbers, state = module.get_parameter(name).numel(), of_states.get((id(module), name), 0)
        flops[part] += Flops(2 * used * (numbers - state), 2 * used * state)
    for mixer in mixers.values():
        flops["scan"] += _scan_flops(mixer, length)
    for module in model.modules():
        if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
            flops["attention"] += Flops(fixed=4 * length * module.q_proj.weight.shape[0])
    return flops


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, float]]:
    """Every parameter that a token is multiplied with: its part, module and name, and how much of it is used."""
    used_experts = getattr(model.config, "num_experts_per_tok", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield "linear", module, "weight", 1 / _alternatives(model, path)
        elif isinstance(module, nn.Conv1d):
            yield "convolution", module, "weight", 1.0
        elif not isinstance(module, nn.Embedding):
            for name, parameter in module.named_parameters(recurse=False):
                if name in PROJECTIONS:
                    yield "projections", module, name, 1.0
                elif name in ("x_proj_weight", "dt_proj_weight"):
                    # Zamba's heads.
                    yield "linear", module, name, 1.0
                elif architecture_of(module) is not None:
                    continue
                elif parameter.dim() == 3:
                    # Routed experts lie in one parameter, one after another.
                    yield "experts", module, name, used_experts / parameter.shape[0]
                elif parameter.dim() == 2:
                    # A router.
                    yield "linear", module, name, 1.0


def _alternatives(model: nn.Module, path: str) -> int:
    """Of how many modules a token passes one: Zamba-2's shared layers have an adapter for each place they stand at."""
    found = re.match(r"(.*adapter_list)\.\d+\.", path)
    if found is None:
        return 1
    return sum(not isinstance(item, nn.Identity) for item in model.get_submodule(found[1]))


def _scan_flops(mixer: Mixer, length: int) -> Flops:
    module, states = mixer.module, mixer.state_size
    channels = module.intermediate_size
    if not mixer.can_be_projected:
        return Flops(fixed=3 * channels, state=7 * channels * states)
    chunk = min(module.chunk_size, length)
    products = 2 * chunk * states * module.n_groups + 2 * 2 * channels * states + 2 * channels * states / chunk
    return Flops(fixed=2 * chunk * channels + 2 * channels, state=products)


def _cut(
    model: nn.Module, mixers: dict[str, Mixer], settings: dict[str, Any]
) -> tuple[int, dict[str, int], dict[str, int], dict[str, int]]:
    """Calibration tokens; bytes on the host and on the device of the first rank; bytes that collectives carry.

    Layer i is planned by rank i modulo the number of ranks, so the first rank has as many as any.
    """
    world_size, strategy, target = settings["world_size"], settings["strategy"], settings["state_size"]
    projects, moments = settings["realization"] == "projected", OPTIMIZERS[settings["optimizer"]]
    element, several = DTYPES[settings["dtype"]], world_size > 1
    batch = settings["sequences"] * settings["length"]
    own_tokens = math.ceil(math.ceil(settings["tokens"] / world_size) / batch) * batch
    tokens = own_tokens * world_size

    # Under torch's autocast alone, what a norm of float32 weights hands on is float32.
    width = {
        name: mixer.module.in_proj.weight.shape[1] * (FLOAT32 if strategy == "ddp" else element)
        for name, mixer in mixers.items()
    }
    looked_at = [name for name, mixer in mixers.items() if projects or mixer.layout.CAN_REFIT]
    owned = list(mixers)[::world_size]
    fitted = [name for name in owned if name in looked_at]

    empty = [StateStatistics.empty(mixer) for mixer in mixers.values()]
    sums = sum(tensor.nbytes for layer in empty for tensor in layer.sums)
    constants = sum(tensor.nbytes for layer in empty for tensor in (layer.A, layer.B_norm, layer.C_norm))

    pairs = [pair for mixer in mixers.values() for pair in _replaced(mixer, target, projects)]
    old, new = (sum(column) for column in zip(*pairs, strict=True))
    largest = max(before for before, _ in pairs)
    whole = sum(parameter.numel() for parameter in model.parameters())
    # ZeRO's optimizer has weights of its own where the model's are of another type.
    kept_by_zero = FLOAT32 * (moments + (element < FLOAT32))
    replacing, collected, moved = {
        "ddp": (FLOAT32 * (1 + moments) * new, 0, 0),
        "fsdp2": (
            FLOAT32 * (1 + moments) * (math.ceil(new / world_size) + (largest if several else 0)),
            FLOAT32 * (1 + moments) * old,
            0,
        ),
        "zero1": (
            element * new + kept_by_zero * (old + new + math.ceil(whole / world_size)),
            kept_by_zero * old,
            kept_by_zero * (whole - old),
        ),
        "zero3": (0, 0, 0),
    }["zero1" if strategy == "zero2" else strategy]
    shards = several and "weights" in STRATEGIES[strategy]
    copies = sum(parameter.numel() for name in owned for parameter in mixers[name].module.parameters())
    # Two for each layer; norms on B allow no refit of it.
    matrices = sum(
        FLOAT32 * mixers[name].state_size * target * mixers[name].groups * (1 if mixers[name].is_normalized else 2)
        for name in looked_at
    )
    host = {
        "recorded batches": own_tokens * RECORDED_BYTES,
        "mixer inputs": own_tokens * sum(width.values()),
        "inputs of own layers from all ranks": tokens * sum(width[name] for name in fitted) if several else 0,
    }
    device = {
        "statistics": sums + constants,
        "whole copies of own mixers": element * copies if shards else 0,
        "gathered parameters": element * _gathered_numbers(model, mixers) if shards else 0,
        "measuring a batch": max(_measuring_bytes(mixer, settings) for mixer in mixers.values()),
        "fitting a layer": max((_fitting_bytes(mixers[name], tokens, settings) for name in fitted), default=0),
        "replacing parameters": replacing,
    }
    communication = {
        "sums, all-reduced": sums,
        "mixer inputs, gathered by the layers' owners": tokens * sum(width[name] for name in looked_at),
        "matrices of the plan, all-gathered": matrices,
        "new parameters, broadcast": 0 if "weights" in STRATEGIES[strategy] else FLOAT32 * new,
        "replaced parameters and their moments, gathered": collected,
        "moments of other parameters, moved to their new owners": moved,
    }
    return tokens, host, device, communication if several else dict.fromkeys(communication, 0)


def _replaced(mixer: Mixer, target: int, projects: bool) -> list[tuple[int, int]]:
    """How many numbers each parameter that a cut replaces has before and after; a first projection adds two."""
    if projects and not mixer.is_projected:
        return 2 * [(0, mixer.state_size * mixer.groups * target)]
    return [
        (axis.tensor.numel(), axis.tensor.numel() // axis.length(mixer.state_size) * axis.length(target))
        for axis in mixer.axes
    ]


def _chunk_bytes(mixer: Mixer, settings: dict[str, Any]) -> int:
    step = settings["sequences"] * _channels(mixer) * mixer.state_size
    elements = CHUNK_ELEMENTS if settings["device"] == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    return FLOAT32 * step * min(settings["length"], max(1, elements // step))


def _channels(mixer: Mixer) -> int:
    return min(mixer.module.intermediate_size, SAMPLED_CHANNELS)


def _streaming_bytes(mixer: Mixer, settings: dict[str, Any]) -> int:
    """The working memory of running one batch's recurrence, in float32.

    Δ, x and the gate of every channel, B and C; and chunks: the states, a product of theirs, and, in Mamba-1, decays.
    Combined in rounds, both are there once more.
    """
    width = 3 * mixer.module.intermediate_size + 2 * mixer.groups * mixer.state_size
    chunks = (2 if mixer.can_be_projected else 3) + (0 if settings["device"] == "cpu" else 2)
    tokens = settings["sequences"] * settings["length"]
    return FLOAT32 * tokens * width + chunks * _chunk_bytes(mixer, settings)


def _measuring_bytes(mixer: Mixer, settings: dict[str, Any]) -> int:
    """The working memory of one batch's sums.

    It is needed to recompute the recurrence's inputs, or then to run it, with one more chunk or the Gram matrices of
    as many tokens as are taken at a time.
    """
    module, tokens = mixer.module, settings["sequences"] * settings["length"]
    rows, channels = module.in_proj.weight.shape[0], module.conv1d.weight.shape[0]
    recomputing = FLOAT32 * tokens * (rows + channels + 2 * module.intermediate_size)
    per_token = mixer.groups * mixer.state_size**2
    grams = FLOAT32 * per_token * min(tokens, max(1, GRAM_ELEMENTS // per_token))
    return max(recomputing, _streaming_bytes(mixer, settings) + max(grams, _chunk_bytes(mixer, settings)))


def token_system_bytes(state_size: int, kept: int, groups: int, tokens: int, projected: bool) -> int:
    """Bytes of what a fit keeps of every token, float32.

    The refit of a readout keeps G (r × r), p and the readouts it starts from (r), C (N) and two sums for
    each group; a projection, in k balanced coordinates, G (k × k), p, c (k) and one sum for each group.
    """
    if not projected:
        return FLOAT32 * tokens * groups * (kept * kept + 2 * kept + state_size + 2)
    coordinates = min(state_size, max(FEWEST_COORDINATES, 4 * kept))
    return FLOAT32 * tokens * groups * (coordinates * coordinates + 2 * coordinates + 1)


def _fitting_bytes(mixer: Mixer, tokens: int, settings: dict[str, Any]) -> int:
    """The working memory of one layer's fit: its token systems, twice while the batches' parts are joined.

    A refit keeps decays, forwards and backwards, of the states that stay, Δ x, y and its weight of every channel that
    it looks at, and B and C, of all tokens.
    """
    projected = settings["realization"] == "projected"
    systems = token_system_bytes(mixer.state_size, settings["state_size"], mixer.groups, tokens, projected)
    channels = min(mixer.module.intermediate_size, FITTED_CHANNELS)
    numbers = channels * (2 * settings["state_size"] + 3) + 2 * mixer.groups * mixer.state_size
    kept = 0 if projected else FLOAT32 * tokens * numbers
    # A projection's coordinates, plain and weighted.
    coordinates = 2 * _chunk_bytes(mixer, settings) if projected else 0
    return 2 * systems + kept + coordinates + _streaming_bytes(mixer, settings)


def _gathered_numbers(model: nn.Module, mixers: dict[str, Mixer]) -> int:
    """The most parameters that a sharded forward pass holds whole: a block, and what lies outside of the blocks."""
    stacks = {re.split(r"\.\d+\.", f".{name}", maxsplit=1)[0].strip(".") for name in mixers}
    blocks = [block for stack in stacks for block in model.get_submodule(stack).children()]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return outside + max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)


def _checkpoint_bytes(size: Size, settings: dict[str, Any]) -> int:
    alone = size.parameters * (DTYPES[settings["dtype"]] if settings["strategy"].startswith("zero") else FLOAT32)
    return alone + size.optimizer_bytes


def _point(mixer: Mixer) -> tuple[int, int]:
    """Where a mixer lies in a benchmark: its features and its states."""
    return (mixer.module.feature_size if mixer.is_projected else mixer.state_size, mixer.state_size)


def kernel_size(states: int) -> int:
    """The number of states that Mamba-2's Triton kernels compute with: a power of two, at least 16.

    Example:
        >>> [kernel_size(states) for states in (12, 16, 17, 96)]
        [16, 16, 32, 128]
    """
    return max(SMALLEST_KERNEL, 1 << (states - 1).bit_length())


def fitted_times(benchmark: Benchmark) -> tuple[Callable[..., float], float]:
    """A line through a benchmark's times, fixed + slope · states, or with two slopes if it has projected models.

    Args:
        benchmark: with times at two sizes at least.

    Returns:
        The time at (features, states), by a function that also takes a factor of what does not depend on them; and the
        largest relative deviation from the measured times.
    """
    both = _has_projected(benchmark.times)

    def row(point: tuple[int, int]) -> list[float]:
        features, states = map(kernel_size, point) if _is_padded(benchmark) else point
        return [1.0, float(states), float(features)] if both else [1.0, float(states)]

    measured = np.array(list(benchmark.times.values()))
    rows = np.array([row(point) for point in benchmark.times])
    # Relative errors count, or the slowest row would decide alone.
    coefficients, *_ = np.linalg.lstsq(rows / measured[:, None], np.ones(len(measured)), rcond=None)
    worst = float(np.abs(rows @ coefficients / measured - 1).max())

    def time(point: tuple[int, int], fixed_factor: float = 1.0) -> float:
        return float(np.dot(row(point), coefficients) + (fixed_factor - 1) * coefficients[0])

    return time, worst


def _step_times(
    layout: str,
    hidden_size: int,
    mixer_share: float,
    points_before: list[tuple[int, int]],
    points_after: list[tuple[int, int]],
    device: str,
) -> tuple[StepTime, ...]:
    """Ratios from every benchmark that fits, the most similar width first."""
    points = points_before + points_after
    found = []
    for benchmark in BENCHMARKS:
        if (benchmark.layout, benchmark.device) != (layout, device):
            continue
        if _has_projected(points) and not _has_projected(benchmark.times):
            continue
        time, worst = fitted_times(benchmark)
        wider = hidden_size / benchmark.hidden_size
        ratios = [
            sum(time(point, factor) for point in points_after) / sum(time(point, factor) for point in points_before)
            for factor in (1.0, wider)
        ]
        measured = [states for _, states in benchmark.times]
        states = [kernel_size(size) if _is_padded(benchmark) else size for _, size in points]
        step = StepTime(
            *(1 - mixer_share * (1 - ratio) for ratio in ratios),
            mixer_share=mixer_share,
            source=benchmark.source,
            sizes=(min(measured), max(measured)),
            worst_fit=worst,
            extrapolated=min(states) < min(measured) or max(states) > max(measured),
        )
        found.append((abs(math.log(wider)), step))
    return tuple(step for _, step in sorted(found, key=lambda item: item[0]))


def _has_projected(points: Iterable[tuple[int, int]]) -> bool:
    return any(features != states for features, states in points)


def _is_padded(benchmark: Benchmark) -> bool:
    return benchmark.device == "cuda" and benchmark.layout == mamba2.NAME


def _mixer_share(model: nn.Module, mixers: dict[str, Mixer], before: Size) -> float:
    """The mixers' share of the FLOPs; the output head counts as theirs, since the measured models have one."""
    inside = {id(module) for mixer in mixers.values() for module in mixer.module.modules()}
    inside |= {id(model.get_output_embeddings())}
    others = before.flops["attention"].total
    others += sum(
        2 * used * module.get_parameter(name).numel()
        for _, module, name, used in _matrices(model)
        if id(module) not in inside
    )
    return 1 - others / before.forward_flops


def _assumptions(
    model: nn.Module, mixers: dict[str, Mixer], settings: dict[str, Any], step_times: tuple[StepTime, ...]
) -> Iterator[str]:
    strategy, mixed = settings["strategy"], settings["dtype"] != "float32"
    yield "all parameters are trained; activations, gradient buckets and the allocator's slack are not counted"
    if strategy.startswith("zero"):
        yield f"DeepSpeed holds weights and gradients in {settings['dtype']}, float32 weights with the optimizer"
    elif mixed:
        yield f"weights and gradients are float32, computed with in {settings['dtype']} by torch's mixed precision"
    yield "training takes three forward passes' FLOPs; recomputation of checkpointed activations comes on top"
    yield "attention counts all pairs of tokens; elementwise operations other than Mamba-1's scan count nothing"
    if getattr(model.config, "num_experts_per_tok", None) and any(part == "experts" for part, *_ in _matrices(model)):
        yield f"each token goes to {model.config.num_experts_per_tok} routed experts"
    yield "recurrent states are cached in float32, as Transformers does in every dtype; attention caches do not count"
    yield "batches hold input ids, labels and mask in int64; whole batches are recorded, as many as the tokens need"
    if strategy == "ddp":
        yield "mixer inputs are float32: autocast leaves what a norm of float32 weights hands on"
    yield "a collective's bytes are what it carries; what a network moves for it depends on the algorithm"
    yield "layer i is planned by rank i modulo world size, which keeps the inputs of all its layers at once"
    if strategy == "zero3":
        yield "ZeRO-3: weights and optimizer are cut in a saved checkpoint, which is not counted as communication"
    if not step_times:
        kind = "projected" if any(mixer.is_projected for mixer in mixers.values()) else "stock"
        layout = next(iter(mixers.values())).architecture.layout.NAME
        yield f"no step time: nobody's times of {kind} {layout} models on {settings['device']} are known here"
        return
    yield (
        "step times are of small models; 'by width' lets all of a step that does not depend on N grow with the square "
        "of the width, and what lies between the two is not known"
    )
    if settings["device"] == "cuda":
        yield "Triton kernels pad the states to a power of two, at least 16"
    if step_times[0].mixer_share < 1:
        yield f"layers other than mixers take what they have of the FLOPs, {1 - step_times[0].mixer_share:.0%}"


def _lines(result: Estimate) -> Iterator[str]:
    settings, before, after, cut = result.settings, result.before, result.after, result.cut
    mixers = ", ".join(f"{count} {kind}" for kind, count in result.mixers.items())
    yield (
        f"{result.model_type} ({mixers}), N {before.state_size} → {after.state_size} ({settings['realization']}), "
        f"{settings['world_size']} × {settings['strategy']}, {settings['dtype']}, {settings['optimizer']}"
    )
    yield ""
    width = 48
    yield f"{'':{width}} {'before':>12} {'after':>12} {'ratio':>7}"
    rows = [
        ("parameters", before.parameters, after.parameters, _count),
        ("  whose number depends on N", before.state_parameters, after.state_parameters, _count),
        (f"weights, {settings['dtype']}", before.weight_bytes, after.weight_bytes, _bytes),
        ("optimizer", before.optimizer_bytes, after.optimizer_bytes, _bytes),
        ("recurrent state of a sequence", before.state_bytes, after.state_bytes, _bytes),
        ("convolution state of a sequence", before.conv_state_bytes, after.conv_state_bytes, _bytes),
    ]
    for name in STRATEGIES:
        held = [sum(size.bytes_per_rank[name].values()) for size in (before, after)]
        rows.append((f"weights, gradients, optimizer per rank, {name}", *held, _bytes))
    rows.append(("checkpoint: weights and optimizer", cut.checkpoint_before, cut.checkpoint_after, _bytes))
    rows.append(("FLOPs per token, forward", before.forward_flops, after.forward_flops, _count))
    for part, flops in before.flops.items():
        for label in ("fixed", "state"):
            values = getattr(flops, label), getattr(after.flops[part], label)
            if any(values):
                rows.append((f"  {part}{', of the states' if label == 'state' else ''}", *values, _count))
    rows.append(("FLOPs per token, training", before.training_flops, after.training_flops, _count))
    for name, first, second, shown in rows:
        ratio = f"{second / first:7.3f}" if first else f"{'':7}"
        yield f"{name:{width}} {shown(first):>12} {shown(second):>12} {ratio}"
    yield ""
    yield (
        f"a cut on {cut.tokens:,} tokens, {cut.layers_per_rank} of {sum(result.mixers.values())} layers planned by a "
        "rank:"
    )
    for where, parts, total in (("host", cut.host, cut.host_peak), ("device", cut.device, cut.device_peak)):
        yield f"{f'memory above training, {where}':{width}} {_bytes(total):>12}"
        for name, value in parts.items():
            if value:
                yield f"  {name:{width - 2}} {_bytes(value):>12}"
    yield f"{'communication':{width}} {_bytes(sum(cut.communication.values())):>12}"
    for name, value in cut.communication.items():
        if value:
            yield f"  {name:{width - 2}} {_bytes(value):>12}"
    yield ""
    for step in result.step_times:
        low, high = step.sizes
        yield (
            f"expected step time after / before: {step.ratio:.2f}, by width {step.ratio_by_width:.2f}"
            + (", EXTRAPOLATED" if step.extrapolated else "")
        )
        yield f"  from {step.source}; N {low} to {high}, the line fits them to {step.worst_fit:.0%}"
    yield "assumptions:"
    for assumption in result.assumptions:
        yield f"  - {assumption}"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.2f} {unit}"
        value /= 1024
    return f"{value:,.2f} TiB"


def _count(value: float) -> str:
    for unit in ("", " k", " M", " G"):
        if value < 1000:
            return f"{value:,.0f}" if not unit else f"{value:,.2f}{unit}"
        value /= 1000
    return f"{value:,.2f} T"
