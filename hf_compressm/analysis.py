"""How many states a model needs: expected errors against the number of states, a recommendation, and a test of it.

What is expected is the error of each layer's output. What that does to the loss is measured on a copy that is cut.
"""

from __future__ import annotations

import copy
import math
import statistics as stdlib_statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from tqdm.auto import tqdm

from .config import CompreSSMConfig
from .metrics.scoring import score
from .mixers import Mixer, find_mixers, layers_by_config
from .mixers.resize import resize_mixer, update_configs
from .plan import CompressionPlan
from .planning import plan_compression, rank_states
from .plots import BLUE, GREEN, INK, ORANGE, VIOLET, save_figure
from .projection import measured_error_curve, measured_hankel_values
from .ranks import choose_state_sizes
from .statistics import StateStatistics, measure
from .surgery import compress_

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Percents below this are drawn, and told, as this.
SMALLEST_ERROR = 1e-4
# A loss that rises by less than this share hardly changes; by less than the second, training makes up for it.
UNHARMED, MENDABLE = 0.01, 0.05


@dataclass(frozen=True)
class Choice:
    """What one realization asks for.

    Attributes:
        realization: `stock` or `projected`.
        state_sizes: layer → states to keep; those it has if nothing is worth cutting.
        curves: layer → the expected relative error with r = 0, 1, …, N states kept.
    """

    realization: str
    state_sizes: dict[str, int]
    curves: dict[str, list[float]]

    def error(self, name: str, states: int) -> float:
        """The expected relative error of a layer that keeps so many states, or all if it has no more."""
        curve = self.curves[name]
        return 0.0 if states >= len(curve) - 1 else curve[states]

    def errors(self, states: int) -> list[float]:
        return [self.error(name, states) for name in self.curves]

    @property
    def chosen_errors(self) -> list[float]:
        return [self.error(name, states) for name, states in self.state_sizes.items()]


@dataclass(frozen=True)
class Analysis:
    """How many states a model needs.

    Attributes:
        tolerance: the largest relative error of a layer's output that is accepted.
        tokens: how many were measured on.
        sequence_length: of the sequences.
        state_sizes: layer → the states that it has.
        choices: realization → what it asks for.
        recommended: the realization that is recommended.
        hankel_values: layer → group → σ in falling order, where layers can be projected.
        criteria: criterion → the expected relative error of the worst layer, with r = 0, 1, …, N states kept.
        state_bytes, parameters: of the model before and after the recommended cut.
        verification: what the recommended cut does to a copy of the model (see `evaluate`); None if it was not tried.
        not_verified: why it was not.
        plan: of the recommended cut.
    """

    tolerance: float
    tokens: int
    sequence_length: int
    state_sizes: dict[str, int]
    choices: dict[str, Choice]
    recommended: str
    hankel_values: dict[str, list[list[float]]]
    criteria: dict[str, list[float]]
    state_bytes: tuple[int, int]
    parameters: tuple[int, int]
    verification: dict[str, dict[str, float]] | None = None
    not_verified: str = ""
    plan: CompressionPlan | None = field(default=None, repr=False)

    @property
    def choice(self) -> Choice:
        """The recommended one."""
        return self.choices[self.recommended]

    @property
    def used_criterion(self) -> str | None:
        """How a selection chooses states where nothing else is asked for."""
        return None if self.plan is None else next(iter(self.plan.layers.values())).criterion

    @property
    def is_worth_it(self) -> bool:
        """Whether any layer can do with fewer states."""
        return self.choice.state_sizes != self.state_sizes

    def to_dict(self) -> dict[str, Any]:
        """The analysis as JSON can hold it, without the plan."""
        values = {name: value for name, value in vars(self).items() if name != "plan"}
        return values | {"choices": {name: asdict(choice) for name, choice in self.choices.items()}}

    def __str__(self) -> str:
        return "\n".join([*self._table(), "", *self._recommendation(), *self._grounds()])

    def _table(self) -> list[str]:
        names = {"stock": "some states selected (stock)", "projected": "states projected"}
        largest = max(self.state_sizes.values())
        rows = {largest >> power for power in range(largest.bit_length())}
        chosen = max(self.choice.state_sizes.values())
        rows.add(chosen)
        if len(self.state_sizes) == 1:
            kinds, titles = {"the layer": max}, "the layer"
        else:
            kinds, titles = {"worst layer": max, "median": stdlib_statistics.median}, "worst layer      median"
        width = len(titles) + 2
        lines = [
            "How much a layer's output is expected to change if only some of its states stay (relative error, right",
            "after the cut, before any further training):",
            "",
        ]
        if len(self.choices) > 1:
            headings = "".join(f"   {names[name]:>{max(width, len(names[name]))}}" for name in self.choices)
            lines.append(f"{'':13}{headings}")
        columns = "".join(
            f"   {titles:>{max(width, len(names[name]) if len(self.choices) > 1 else width)}}" for name in self.choices
        )
        lines.append(f"{'states kept':>13}{columns}")
        for states in sorted(rows, reverse=True):
            line = f"{states:>13}"
            for name, choice in self.choices.items():
                cells = "".join(f"{_percent(kind(choice.errors(states))):>12}" for kind in kinds.values())
                line += f"   {cells:>{max(width, len(names[name]) if len(self.choices) > 1 else width)}}"
            mark = "   ← recommended" if self.is_worth_it and states == chosen else ""
            lines.append(line + mark)
        return lines

    def _recommendation(self) -> list[str]:
        most, choice = max(self.state_sizes.values()), self.choice
        if not self.is_worth_it:
            half = _percent(max(choice.errors(most // 2)))
            return [
                f"Recommendation: leave the state as it is, N = {most}.",
                f"  For a tolerance of {100 * self.tolerance:g} %, nearly all states have to stay; half of them,",
                f"  {most // 2}, would change the worst layer's output by {half}.",
                "  Accept more with --tolerance, or name a size:",
                "  hf-compressm compress ... --state-size N",
            ]
        sizes = sorted(set(choice.state_sizes.values()))
        keep = f"{sizes[0]} of {most} states"
        if len(sizes) > 1:
            keep = f"{sizes[0]} to {sizes[-1]} of {most} states, a number for each layer"
        worst = max(choice.chosen_errors)
        lines = [
            f"Recommendation: keep {keep} (realization {self.recommended!r}).",
            f"  The worst layer's output is then expected to change by {_percent(worst)}; the tolerance is "
            f"{100 * self.tolerance:g} %.",
            f"  Recurrent state: {self._saving(self.state_bytes, 'bytes per sequence')}",
            f"  Parameters:      {self._saving(self.parameters, '')}",
        ]
        if self.parameters[1] > self.parameters[0]:
            lines[-1] += ": a projection adds two small matrices to each layer"
        others = [other for name, other in self.choices.items() if name != self.recommended]
        for other in others:
            needed = max(other.state_sizes.values())
            instead = f"{needed} states" if needed < most else "all states"
            lines.append(f"  Realization {other.realization!r} would need {instead} for the same tolerance.")
        kernel = max(16, 1 << (sizes[-1] - 1).bit_length())
        if "projected" in self.choices and sizes[-1] != kernel < most:
            lines.append(
                f"  On a GPU, Mamba-2's kernels compute with {kernel} states anyway: {kernel} would cost no more time."
            )
        return lines

    @staticmethod
    def _saving(pair: tuple[int, int], unit: str) -> str:
        before, after = pair
        change = f"{100 * after / before - 100:+.0f} %".replace("-", "−")
        return f"{before:,} → {after:,}{unit and ' ' + unit} ({change})"

    def _grounds(self) -> list[str]:
        lines = []
        if self.verification is not None:
            lines += ["", *_verdict(self.verification)]
        elif self.not_verified and self.is_worth_it:
            lines += ["", f"Not tried out: {self.not_verified}."]
        return [
            *lines,
            "",
            f"What this is based on: {self.tokens:,} tokens in sequences of {self.sequence_length}. States that "
            "remember what lies further",
            "  back than that cannot show their worth here. The errors are those of single layers, not of the loss.",
            "  And early in training they ask for fewer states than the trained model will need: if the model is to",
            "  learn much more, keep more.",
        ]


def _percent(error: float) -> str:
    if error == 0:
        return "0 %"
    if error < SMALLEST_ERROR:
        return "< 0.01 %"
    return f"{100 * error:.2g} %" if error < 0.1 else f"{100 * error:.0f} %"


def _verdict(verification: dict[str, dict[str, float]]) -> list[str]:
    before, after = verification["uncut"], verification["cut"]
    rise = after["loss"] / before["loss"] - 1 if before["loss"] > 0 else 0.0
    if rise < UNHARMED:
        words = "The loss hardly changes."
    elif rise < MENDABLE:
        words = "A little is lost; some training after the cut should bring it back."
    else:
        words = "That is a lot: choose a smaller --tolerance, or train on after the cut."
    return [
        f"Tried out on a copy of the model, by {after['tokens']:,} predictions on data that were held back:",
        f"  loss {before['loss']:.4f} → {after['loss']:.4f} ({round(100 * rise, 1) + 0.0:+.1f} %), accuracy "
        f"{100 * before['accuracy']:.1f} → {100 * after['accuracy']:.1f} %, KL divergence "
        f"{after['kl_divergence']:.1e} nats.",
        f"  {words}",
    ]


def analyze(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    tolerance: float = 0.05,
    criteria: Sequence[str] | None = None,
    batch_size: int = 8,
    held_out: tuple[torch.Tensor, torch.Tensor] | None = None,
    show_progress: bool = False,
) -> Analysis:
    """Measure what a language model's states are worth, and recommend how many to keep.

    Args:
        model: it is only read.
        input_ids: sequences to measure on, shape (number, length).
        tolerance: the largest relative error of a layer's output that is accepted.
        criteria: ways to choose states that are compared (see `hf_compressm.criteria`); None: the usual ones.
        batch_size: sequences that are run at once.
        held_out: other sequences and their labels, to try the recommended cut out on a copy of the model; None: it is
            not tried.
        show_progress: show progress bars.

    Returns:
        Curves, a recommendation and, with `held_out`, what it does to the loss.

    Raises:
        ValueError: a tolerance out of range, an unknown criterion, or no mixer.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=8, num_hidden_layers=1))
        >>> analysis = analyze(model, torch.arange(8).repeat(4, 1), tolerance=0.5)
        >>> analysis.recommended, analysis.choice.state_sizes["backbone.layers.0.mixer"] < 8
        ('stock', True)
    """
    mixers = find_mixers(model)
    projects = all(mixer.can_be_projected for mixer in mixers.values())
    if criteria is None:
        normalized = any(mixer.is_normalized for mixer in mixers.values())
        # Behind norms, each curve is measured, which takes a while.
        criteria = () if normalized else ("ghost", "hankel") if projects else ("refit", "ghost", "hankel")
    stock = CompreSSMConfig(tolerance=tolerance)
    others = {name: CompreSSMConfig(tolerance=tolerance, criterion=name) for name in criteria}
    projected = CompreSSMConfig(tolerance=tolerance, realization="projected")
    statistics = measure(model, input_ids.split(batch_size), show_progress=show_progress)
    steps = len(mixers) * (1 + projects + len(others)) + 1
    progress = tqdm(total=steps, desc="ranking states", disable=not show_progress)

    def curves(curve: Callable[[Mixer, StateStatistics], torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, mixer in mixers.items():
            found[name] = curve(mixer, statistics[name])
            progress.update()
        return found

    choices = {"stock": _choice("stock", stock, mixers, curves(lambda *layer: rank_states(*layer, stock).curve))}
    hankel_values = {}
    if projects:
        choices["projected"] = _choice("projected", projected, mixers, curves(measured_error_curve))
        hankel_values = {name: measured_hankel_values(layer).tolist() for name, layer in statistics.items()}
    worst = {}
    for name, config in others.items():
        worst[name] = _worst_curve(curves(lambda *layer, config=config: rank_states(*layer, config).curve))
    best = plan_compression(
        model, statistics, CompreSSMConfig(tolerance=tolerance, realization="auto" if projects else "stock")
    )
    progress.update()
    progress.close()
    is_projected = any(layer.realization == "projected" for layer in best.changes.values())
    recommended = "projected" if is_projected else "stock"
    sizes = {name: layer.state_size_after for name, layer in best.layers.items()}
    # `auto` may select as many states as a projection would need.
    choices[recommended] = Choice(recommended, sizes, choices[recommended].curves)
    verification, reason = None, "--no-verify was given"
    if held_out is not None and best.changes:
        reason = why_not_copied(model)
        if not reason:
            verification = verify(model, best, *held_out, batch_size=batch_size)
    parameters, state_bytes = _sizes_after(model, sizes, is_projected)
    return Analysis(
        tolerance=tolerance,
        tokens=input_ids.numel(),
        sequence_length=input_ids.shape[1],
        state_sizes={name: mixer.state_size for name, mixer in mixers.items()},
        choices=choices,
        recommended=recommended,
        hankel_values=hankel_values,
        criteria=worst,
        state_bytes=(sum(mixer.bytes_per_state * mixer.state_size for mixer in mixers.values()), state_bytes),
        parameters=(sum(parameter.numel() for parameter in model.parameters()), parameters),
        verification=verification,
        not_verified="" if verification is not None or not best.changes else reason,
        plan=best,
    )


def _choice(
    realization: str, config: CompreSSMConfig, mixers: dict[str, Mixer], curves: dict[str, torch.Tensor]
) -> Choice:
    sizes: dict[str, int] = {}
    for names in layers_by_config(mixers):
        # Only projected layers of one config may differ.
        together = realization == "stock" and not any(mixers[name].is_projected for name in names)
        sizes |= choose_state_sizes(config, {name: curves[name] for name in names}, {}, together=together)
    in_order = {name: sizes[name] for name in mixers}
    return Choice(realization, in_order, {name: [round(x, 8) for x in curves[name].tolist()] for name in mixers})


def _worst_curve(curves: dict[str, torch.Tensor]) -> list[float]:
    lists = [curve.tolist() for curve in curves.values()]
    return [
        round(max(curve[states] if states < len(curve) else 0.0 for curve in lists), 8)
        for states in range(max(map(len, lists)))
    ]


def _sizes_after(model: nn.Module, sizes: dict[str, int], is_projected: bool) -> tuple[int, int]:
    """Parameters and state bytes of a model that is cut to these sizes."""
    with torch.device("meta"):
        smaller = type(model)(copy.deepcopy(model.config))
    for name, mixer in find_mixers(smaller).items():
        features = mixer.module.feature_size if mixer.is_projected else mixer.state_size if is_projected else None
        resize_mixer(mixer, sizes[name], features)
    update_configs(smaller)
    mixers = find_mixers(smaller).values()
    parameters = sum(parameter.numel() for parameter in smaller.parameters())
    return parameters, sum(mixer.bytes_per_state * mixer.state_size for mixer in mixers)


def why_not_copied(model: nn.Module) -> str:
    """Why a copy of a model cannot be made beside it: too little memory; empty if it can."""
    needed = sum(parameter.nbytes for parameter in model.parameters())
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    # Its activations need room, too.
    if 1.2 * needed < free:
        return ""
    return f"a copy of the model takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free"


def verify(
    model: nn.Module,
    plan: CompressionPlan,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """What a cut does to a model's predictions, measured on a copy.

    Args:
        model: it is only read.
        plan: of the cut.
        input_ids, labels, batch_size: as in `evaluate`.

    Returns:
        `uncut` and `cut` → metric → value.
    """
    smaller = copy.deepcopy(model)
    compress_(smaller, plan)
    return evaluate({"uncut": model, "cut": smaller}, input_ids, labels, batch_size)


def evaluate(
    models: dict[str, nn.Module], input_ids: torch.Tensor, labels: torch.Tensor, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """How well models predict the next tokens, and how far their predictions are from the first one's.

    Args:
        models: name → language model.
        input_ids: sequences, shape (number, length).
        labels: what is to be predicted, at the same places; -100 is not asked for.
        batch_size: sequences that are run at once.

    Returns:
        Name → `loss` (nats per token), `perplexity`, `accuracy`, `tokens` (those asked for), and of all but the first
        `kl_divergence` (first ‖ other, nats per token).
    """
    results, first = {}, None
    for name, model in models.items():
        scores = score(model, input_ids, labels=labels, reference_model=first, batch_size=batch_size)
        results[name] = {
            "loss": scores.loss,
            "perplexity": math.exp(min(scores.loss, 700)),
            "accuracy": scores.accuracy,
            "tokens": scores.tokens,
        }
        if first is not None:
            results[name]["kl_divergence"] = scores.kl_divergence
        first = model if first is None else first
    return results


def plot_analysis(analysis: Analysis, path: str | Path, title: str = "") -> Path:
    """Draw the expected error against the number of states, the tolerance, and what is recommended.

    Args:
        analysis: from `analyze`.
        path: the picture's file; its ending chooses the format.
        title: what was analysed.
    """
    from matplotlib.figure import Figure

    # Two panels side by side, where there is anything to compare.
    panels = 1 + (bool(analysis.hankel_values) or len(analysis.criteria) > 1)
    figure = Figure(figsize=(6.4 * panels, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_choices(axes[0], analysis)
    if analysis.hankel_values:
        _draw_hankel_values(axes[1], analysis)
    elif panels > 1:
        _draw_criteria(axes[1], analysis)
    if title:
        figure.suptitle(title, color=INK, fontsize="medium")
    return save_figure(figure, path)


def _states_axis(axes: Axes, largest: int, label: str) -> None:
    ticks = [2**power for power in range(largest.bit_length())]
    ticks = [*ticks, largest] if ticks[-1] < 0.75 * largest else ticks
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _percent_axis(axes: Axes, lowest: float) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("log")
    axes.set_ylim(lowest, 1.3)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _draw_choices(axes: Axes, analysis: Analysis) -> None:
    names = {"stock": "states selected (stock)", "projected": "states projected"}
    colors, largest = {"stock": BLUE, "projected": ORANGE}, max(analysis.state_sizes.values())
    sizes = range(1, largest)
    lowest = analysis.tolerance / 3
    for name, choice in analysis.choices.items():
        worst = [max(choice.errors(states)) for states in sizes]
        middle = [stdlib_statistics.median(choice.errors(states)) for states in sizes]
        label = names[name] if len(analysis.choices) > 1 else "worst layer"
        several = len(analysis.state_sizes) > 1
        suffix = ": worst layer" if len(analysis.choices) > 1 and several else ""
        axes.plot(sizes, worst, color=colors[name], label=label + suffix, linewidth=2)
        if several:
            label = f"{names[name]}: median layer" if len(analysis.choices) > 1 else "median layer"
            axes.plot(sizes, middle, color=colors[name], linestyle="--", linewidth=1.3, label=label)
        lowest = min([lowest, *(error / 2 for error in worst if error > 0)])
    _percent_axis(axes, max(lowest, SMALLEST_ERROR))
    axes.axhspan(analysis.tolerance, 1.3, color="#d04040", alpha=0.07, linewidth=0)
    axes.axhline(
        analysis.tolerance, color="#b03030", linewidth=1.2, label=f"tolerance: {100 * analysis.tolerance:g} %"
    )
    axes.text(0.99, 0.98, "changes too much", color="#b03030", transform=axes.transAxes, ha="right", va="top")
    if analysis.is_worth_it:
        chosen = sorted(set(analysis.choice.state_sizes.values()))
        error = max(max(analysis.choice.chosen_errors), SMALLEST_ERROR)
        keep = f"keep {chosen[0]}" if len(chosen) == 1 else f"keep {chosen[0]} to {chosen[-1]}"
        if len(chosen) == 1:
            axes.axvline(chosen[0], color=GREEN, linestyle=":", linewidth=1.5)
        else:
            axes.axvspan(chosen[0], chosen[-1], color=GREEN, alpha=0.15, linewidth=0)
        axes.plot(chosen[-1], error, "o", color=GREEN, markersize=9, label=f"recommended: {keep} of {largest}")
    _states_axis(axes, largest, f"states kept in a layer, of {largest}")
    axes.set_ylabel("expected change of the layer's output")
    axes.set_title("How many states does a layer need?", loc="left", fontweight="bold", color=INK)
    axes.legend(fontsize="small", framealpha=0.9)


def _draw_hankel_values(axes: Axes, analysis: Analysis) -> None:
    largest = 0
    for number, (name, groups) in enumerate(analysis.hankel_values.items()):
        for values in groups:
            top = max(max(values), torch.finfo(torch.float64).tiny)
            shown = [value / top for value in values if value / top > 1e-6]
            largest = max(largest, len(values))
            color = (BLUE, ORANGE, VIOLET, GREEN)[number % 4]
            label = name if values is groups[0] and len(analysis.hankel_values) <= 8 else None
            axes.plot(range(1, len(shown) + 1), shown, color=color, linewidth=1.3, alpha=0.9, label=label)
    _percent_axis(axes, 1e-6)
    _states_axis(axes, largest, "direction of the state, the strongest first")
    axes.set_ylabel("Hankel singular value, of the largest")
    axes.set_title("How fast do the directions' strengths fall?", loc="left", fontweight="bold", color=INK)
    if len(analysis.hankel_values) <= 8:
        axes.legend(fontsize="small", framealpha=0.9)


def _draw_criteria(axes: Axes, analysis: Analysis) -> None:
    largest = max(analysis.state_sizes.values())
    lowest = analysis.tolerance / 3
    for color, (name, curve) in zip((BLUE, ORANGE, VIOLET, GREEN) * 3, analysis.criteria.items(), strict=False):
        label = f"{name} (used here)" if name == analysis.used_criterion else name
        axes.plot(range(1, len(curve) - 1), curve[1:-1], color=color, linewidth=1.6, label=label)
        lowest = min([lowest, *(error / 2 for error in curve[1:-1] if error > 0)])
    _percent_axis(axes, max(lowest, SMALLEST_ERROR))
    axes.axhline(
        analysis.tolerance, color="#b03030", linewidth=1.2, label=f"tolerance: {100 * analysis.tolerance:g} %"
    )
    _states_axis(axes, largest, f"states kept in a layer, of {largest}")
    axes.set_ylabel("expected change of the worst layer's output")
    axes.set_title("Ways to choose the states: lower is better", loc="left", fontweight="bold", color=INK)
    axes.legend(fontsize="small", framealpha=0.9)
