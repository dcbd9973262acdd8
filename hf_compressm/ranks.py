"""How many states to keep."""

from __future__ import annotations

import math
from typing import Any

import torch

from .config import KERNEL_SIZES, CompreSSMConfig, is_whole
from .mixers import Mixer


def states_for_tolerance(error_curve: torch.Tensor, tolerance: float) -> int:
    """The fewest states whose relative error is at most the tolerance.

    Args:
        error_curve: the relative error ε(r) with r = 0, 1, …, N states kept, shape (N + 1,).
        tolerance: the largest ε allowed.

    Example:
        >>> states_for_tolerance(torch.tensor([1.0, 0.3, 0.05, 0.0]), 0.1)
        2
    """
    allowed = (error_curve <= tolerance).nonzero()
    return max(1, int(allowed[0])) if len(allowed) else len(error_curve) - 1


def states_for_energy(hankel_values: torch.Tensor, tolerance: float) -> int:
    """CompreSSM's rule: the fewest states with Σ_{i≤r} σ_i ≥ (1 − τ) Σ σ_i (arXiv 2510.02823, section 3).

    Args:
        hankel_values: σ in falling order, shape (N,).
        tolerance: τ.

    Example:
        >>> states_for_energy(torch.tensor([6.0, 3.0, 1.0]), 0.1)
        2
    """
    energy = hankel_values.double().cumsum(0)
    enough = energy >= (1 - tolerance) * energy[-1] * (1 - 1e-12)
    return int(enough.nonzero()[0]) + 1


def states_for_budget(
    error_curves: dict[str, torch.Tensor], bytes_per_state: dict[str, int], budget: int, multiple_of: int | str = 1
) -> dict[str, int]:
    """Share a budget of state bytes out over layers so that the sum of their squared errors is the least.

    By dynamic programming over the layers. A greedy choice, the state that lowers the error most per byte next, gets
    stuck where a curve is not convex: a layer that looks things up may need eight states before the first one helps.

    Args:
        error_curves: the relative error ε(r) with r = 0, 1, …, N states kept, shape (N + 1,), by layer.
        bytes_per_state: what one more state of a layer takes.
        budget: the most bytes in all layers together.
        multiple_of: sizes that a layer may have; as in CompreSSMConfig.

    Raises:
        ValueError: the smallest sizes already take more, or the present ones no more.

    Example:
        >>> curves = {"a": torch.tensor([1.0, 0.1, 0.0]), "b": torch.tensor([1.0, 0.9, 0.0])}
        >>> states_for_budget(curves, {"a": 4, "b": 4}, budget=12)
        {'a': 1, 'b': 2}
    """
    allowed = {layer: _allowed_sizes(len(curve) - 1, multiple_of) for layer, curve in error_curves.items()}
    smallest = {layer: sizes[0] for layer, sizes in allowed.items()}
    least = sum(smallest[layer] * bytes_per_state[layer] for layer in smallest)
    if least > budget:
        raise ValueError(
            f"state_bytes is {budget}, but the smallest sizes, {smallest}, take {least} bytes; give at least {least}"
        )
    whole = sum(sizes[-1] * bytes_per_state[layer] for layer, sizes in allowed.items())
    if whole <= budget:
        raise ValueError(f"state_bytes is {budget}, but the states take {whole} bytes as they are; give less")
    unit = math.gcd(*bytes_per_state.values())
    units = budget // unit
    # After each layer: the least error that the layers so far can have within 0, 1, … units, and their sizes for it.
    error = torch.zeros(units + 1, dtype=torch.float64)
    choices = []
    for layer, sizes in allowed.items():
        step = bytes_per_state[layer] // unit
        candidates = torch.full((len(sizes), units + 1), torch.inf, dtype=torch.float64)
        for row, size in zip(candidates, sizes, strict=True):
            if size * step <= units:
                row[size * step :] = error[: units + 1 - size * step] + float(error_curves[layer][size]) ** 2
        error, choice = candidates.min(0)
        choices.append(choice)
    chosen, left = {}, units
    for layer, choice in zip(reversed(allowed), reversed(choices), strict=True):
        chosen[layer] = allowed[layer][int(choice[left])]
        left -= chosen[layer] * (bytes_per_state[layer] // unit)
    return {layer: chosen[layer] for layer in allowed}


def _allowed_sizes(present: int, multiple_of: int | str) -> list[int]:
    """The sizes up to the present one, in rising order; the present one is always among them."""
    return sorted({min(round_up(size, multiple_of), present) for size in range(1, present + 1)})


def choose_state_sizes(
    config: CompreSSMConfig,
    error_curves: dict[str, torch.Tensor],
    hankel_values: dict[str, torch.Tensor],
    *,
    together: bool,
    numbers: dict[str, int] | None = None,
    bytes_per_state: dict[str, int] | None = None,
) -> dict[str, int]:
    """Choose the state sizes of the layers that share a Transformers config.

    Args:
        config: its state_size, tolerance, hankel_tolerance or state_bytes decides; then multiple_of and
            max_kept_fraction.
        error_curves: ε(r) with r = 0 … N states kept, shape (N + 1,), by name.
        hankel_values: σ in falling order, shape (groups, N), by name; only for `hankel_tolerance`.
        together: whether all layers keep the same number, as a stock config demands: a measured rule then takes the
            largest that any of them asks for.
        numbers: each layer's place among all mixers of the model, for a list of state sizes.
        bytes_per_state: as in `states_for_budget`, for `state_bytes`; with it, a fixed `state_size` is shared out,
            too.

    Returns:
        The new sizes by name; the present ones where a measured rule finds that the cut is not worth it.

    Raises:
        ValueError: a fixed state_size that is not below the present one, or a budget that is too small.
    """
    present = {name: len(curve) - 1 for name, curve in error_curves.items()}
    if config.state_size is not None and (bytes_per_state is None or isinstance(config.state_size, list)):
        return fixed_sizes(config, present, numbers or {})
    if config.state_size is not None:
        average = average_state_size(present, bytes_per_state)
        target = fixed_target(config, max(present, key=present.__getitem__), average)
        budget = target * sum(bytes_per_state.values())
        return states_for_budget(error_curves, bytes_per_state, budget, config.multiple_of)
    if config.state_bytes is not None:
        return states_for_budget(error_curves, bytes_per_state, config.state_bytes, config.multiple_of)
    if config.tolerance is not None:
        wanted = {name: states_for_tolerance(curve, config.tolerance) for name, curve in error_curves.items()}
    else:
        wanted = {
            name: max(states_for_energy(group, config.hankel_tolerance) for group in values)
            for name, values in hankel_values.items()
        }
    if together:
        wanted = dict.fromkeys(wanted, max(wanted.values()))
    kept = {name: round_up(size, config.multiple_of) for name, size in wanted.items()}
    return {
        name: kept[name] if kept[name] < config.max_kept_fraction * present[name] else present[name] for name in kept
    }


def average_state_size(sizes: dict[str, int], bytes_per_state: dict[str, int]) -> int:
    """The size that would take as many bytes if all layers had it, rounded up.

    Example:
        >>> average_state_size({"a": 3, "b": 20}, {"a": 4, "b": 4})
        12
    """
    total = sum(size * bytes_per_state[layer] for layer, size in sizes.items())
    return -(-total // sum(bytes_per_state.values()))


def state_size_of(mixers: dict[str, Mixer]) -> int:
    """The largest size of any mixer; of projected ones, which share their states out, the average."""
    sizes = {name: mixer.state_size for name, mixer in mixers.items()}
    if any(mixer.is_projected for mixer in mixers.values()):
        return average_state_size(sizes, {name: mixer.bytes_per_state for name, mixer in mixers.items()})
    return max(sizes.values())


def fixed_sizes(config: CompreSSMConfig, present: dict[str, int], numbers: dict[str, int]) -> dict[str, int]:
    """What a fixed `state_size` leaves each layer of its present size; arguments as in `choose_state_sizes`."""
    if isinstance(config.state_size, list):
        sizes = {name: config.state_size[numbers[name]] for name in present}
        for name, size in sizes.items():
            if size > present[name]:
                raise ValueError(
                    f"layer {name}: target state_size {size} is above the current {present[name]}; choose "
                    f"1..{present[name]}"
                )
        if sizes == present:
            raise ValueError(
                f"state_size {list(sizes.values())} is what the layers already have; choose a smaller one"
            )
        return sizes
    # Layers that an earlier cut left with fewer states than the others may already be where those shall come.
    largest = max(present, key=present.__getitem__)
    target = fixed_target(config, largest, present[largest])
    return {name: min(target, size) for name, size in present.items()}


def fixed_target(config: CompreSSMConfig, layer: str, present: int) -> int:
    """The number of states that a fixed `state_size` leaves a layer, rounded up to a multiple of `multiple_of`.

    Raises:
        ValueError: it is not below the present number.
    """
    size = fixed_state_size(config.state_size, present)
    kept = round_up(size, config.multiple_of)
    if kept >= present:
        multiple = config.multiple_of
        to = "a size of the kernels" if multiple == KERNEL_SIZES else f"a multiple of {multiple}"
        rounded = "" if kept == size else f" (rounded up from {size} to {to})"
        raise ValueError(
            f"layer {layer}: target state_size {kept}{rounded} is not below the current {present}; "
            f"choose 1..{present - 1}"
        )
    return kept


def fixed_state_size(target: int | float | list[int], present: int) -> int:
    """A target given as a number, a fraction of the present state size or a list (its largest), as a number."""
    if isinstance(target, list):
        return max(target)
    return target if is_whole(target) else max(1, round(target * present))


def target_is_reached(config: CompreSSMConfig, history: list[dict[str, Any]], mixers: dict[str, Mixer]) -> bool:
    """Whether the cuts of a history left mixers as few states as a fixed target asks for; never for measured rules."""
    sizes, before = [mixer.state_size for mixer in mixers.values()], largest_before_cuts(history)
    if before is None:
        return False
    if config.state_bytes is not None:
        return sum(mixer.state_size * mixer.bytes_per_state for mixer in mixers.values()) <= config.state_bytes
    if config.state_size is None or isinstance(config.state_size, list):
        return sizes == config.state_size
    return state_size_of(mixers) <= round_up(fixed_state_size(config.state_size, before), config.multiple_of)


def largest_before_cuts(history: list[dict[str, Any]]) -> int | None:
    """The largest state size before the first cut, which a target given as a fraction refers to; None without cuts."""
    cuts = [entry["layers"] for entry in history if entry["status"] == "cut"]
    return max((layer["state_size_before"] for layers in cuts for layer in layers), default=None)


def round_up(size: int, multiple: int | str) -> int:
    """The next multiple; `kernel`: the next power of two, at least 16."""
    if multiple == KERNEL_SIZES:
        return max(16, 1 << (size - 1).bit_length())
    return math.ceil(size / multiple) * multiple
