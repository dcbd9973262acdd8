"""How many states to keep."""

from __future__ import annotations

import math

import torch

from .config import CompreSSMConfig, is_whole
from .criteria import hankel_singular_values
from .statistics import StateStatistics


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


def choose_state_size(
    config: CompreSSMConfig, statistics: dict[str, StateStatistics], error_curves: dict[str, torch.Tensor]
) -> int:
    """Choose the one state size of the layers that share a Transformers config.

    A stock config holds one N, so a measured rule takes the largest number that any of the layers asks for.

    Args:
        config: its state_size, tolerance or hankel_tolerance decides; then multiple_of and max_kept_fraction.
        statistics: of these layers, by name.
        error_curves: ε(r) with r = 0 … N states kept, shape (N + 1,), by name.

    Returns:
        The new state size; the present one if a measured rule finds that the cut is not worth it.

    Raises:
        ValueError: a fixed state_size that is not below the present one.
    """
    name, first = next(iter(statistics.items()))
    present = first.state_size
    if config.state_size is not None:
        return fixed_target(config, name, present)
    if config.tolerance is not None:
        wanted = max(states_for_tolerance(error_curves[layer], config.tolerance) for layer in statistics)
    else:
        wanted = max(
            states_for_energy(values, config.hankel_tolerance)
            for layer in statistics.values()
            for values in hankel_singular_values(layer)
        )
    kept = round_up(wanted, config.multiple_of)
    return kept if kept < config.max_kept_fraction * present else present


def fixed_target(config: CompreSSMConfig, layer: str, present: int) -> int:
    """The number of states that a fixed `state_size` leaves a layer, rounded up to a multiple of `multiple_of`.

    Raises:
        ValueError: it is not below the present number.
    """
    size = fixed_state_size(config.state_size, present)
    kept = round_up(size, config.multiple_of)
    if kept >= present:
        rounded = "" if kept == size else f" (rounded up from {size} to a multiple of {config.multiple_of})"
        raise ValueError(
            f"layer {layer}: target state_size {kept}{rounded} is not below the current {present}; "
            f"choose 1..{present - 1}"
        )
    return kept


def fixed_state_size(target: int | float, present: int) -> int:
    """A target given as a number or as a fraction of the present state size, as a number."""
    return target if is_whole(target) else max(1, round(target * present))


def round_up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
