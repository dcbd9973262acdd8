"""How many states to keep: every rule, its rounding, its gate and its errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import TINY, projection_plan
from test_criteria import made_up
from torch import nn

from hf_compressm import CompreSSMConfig, compress_, find_mixers
from hf_compressm.criteria import hankel_singular_values
from hf_compressm.ranks import (
    average_state_size,
    choose_state_sizes,
    fixed_state_size,
    round_up,
    state_size_of,
    states_for_budget,
    states_for_energy,
    states_for_tolerance,
    target_is_reached,
)

CURVE = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.0])


def choose(config: CompreSSMConfig, curves: dict[str, torch.Tensor] | None = None) -> int:
    curves = {"layer": CURVE} if curves is None else curves
    sizes = choose_state_sizes(config, curves, {}, together=True)
    assert len(set(sizes.values())) == 1
    return next(iter(sizes.values()))


@pytest.mark.parametrize(
    ("tolerance", "states"), [(0.5, 1), (0.49, 2), (0.1, 3), (0.02, 5), (0.001, 8), (1.0, 1), (2.0, 1)]
)
def test_tolerance_keeps_the_fewest_states_that_meet_it(tolerance, states):
    assert states_for_tolerance(CURVE, tolerance) == states


def test_a_tolerance_that_nothing_meets_keeps_every_state():
    assert states_for_tolerance(torch.tensor([1.0, 0.5, 0.3]), 0.1) == 2


@pytest.mark.parametrize("tolerance", [0.001, 0.05, 0.1, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("seed", range(3))
def test_energy_keeps_the_fewest_states_that_hold_the_share(tolerance, seed):
    values = torch.rand(7, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
    kept = states_for_energy(values, tolerance)
    total = sum(values.tolist())
    assert sum(values[:kept].tolist()) >= (1 - tolerance) * total * (1 - 1e-9)
    assert sum(values[: kept - 1].tolist()) < (1 - tolerance) * total


def test_energy_counts_a_share_that_is_met_exactly():
    assert states_for_energy(torch.tensor([5.0, 3.0, 1.0, 1.0]), 0.2) == 2


def test_energy_of_nothing_keeps_one_state():
    assert states_for_energy(torch.zeros(4), 0.1) == 1


@pytest.mark.parametrize(("target", "states"), [(5, 5), (1, 1), (0.5, 4), (0.1, 1), (0.9, 7), (0.01, 1)])
def test_fixed_targets_are_numbers_or_fractions(target, states):
    assert fixed_state_size(target, 8) == states
    assert choose(CompreSSMConfig(state_size=target)) == states


@pytest.mark.parametrize(("target", "multiple", "states"), [(3, 4, 4), (4, 4, 4), (5, 3, 6), (0.3, 4, 4)])
def test_fixed_targets_are_rounded_up_to_a_multiple(target, multiple, states):
    assert choose(CompreSSMConfig(state_size=target, multiple_of=multiple)) == states


@pytest.mark.parametrize("target", [8, 9, 0.99])
def test_a_target_that_is_not_below_the_present_size(target):
    size = target if target > 1 else 8
    with pytest.raises(
        ValueError, match=rf"layer layer: target state_size {size} is not below the current 8; .*1\.\.7"
    ):
        choose(CompreSSMConfig(state_size=target))


def test_a_target_that_rounding_lifts_to_the_present_size():
    with pytest.raises(ValueError, match=r"target state_size 8 \(rounded up from 5 to a multiple of 8\) is not below"):
        choose(CompreSSMConfig(state_size=5, multiple_of=8))


def test_a_fixed_target_knows_no_gate():
    assert choose(CompreSSMConfig(state_size=7, max_kept_fraction=0.5)) == 7


def test_tolerance_takes_the_most_demanding_layer():
    curves = {"easy": CURVE, "hard": CURVE.sqrt()}
    # Roots of the curve: 1, 0.71, 0.45, 0.32, 0.22, 0.14, 0.1, ...
    assert choose(CompreSSMConfig(tolerance=0.25), curves) == 4
    assert choose(CompreSSMConfig(tolerance=0.25), {"easy": CURVE}) == 2


@pytest.mark.parametrize(("tolerance", "multiple", "states"), [(0.1, 2, 4), (0.1, 5, 5), (0.5, 8, 8), (0.02, 7, 7)])
def test_measured_rules_are_rounded_up_to_a_multiple(tolerance, multiple, states):
    assert choose(CompreSSMConfig(tolerance=tolerance, multiple_of=multiple)) == states


@pytest.mark.parametrize(("fraction", "states"), [(1.0, 7), (0.95, 7), (0.875, 8), (0.5, 8)])
def test_measured_rules_cut_only_below_the_gate(fraction, states):
    """Seven of eight states are wanted: a share of 0.875, which must be less than the gate."""
    assert choose(CompreSSMConfig(tolerance=0.005, max_kept_fraction=fraction)) == states


def test_the_default_gate_is_the_published_one():
    curve = torch.linspace(1, 0, 21)
    # 19 of 20 is 0.95 and not less; 18 is.
    assert choose(CompreSSMConfig(tolerance=0.06), {"layer": curve}) == 20
    assert choose(CompreSSMConfig(tolerance=0.11), {"layer": curve}) == 18


def test_rounding_never_lifts_a_measured_rule_above_the_present_size():
    assert choose(CompreSSMConfig(tolerance=0.1, multiple_of=16)) == 8


def test_hankel_rule_takes_the_most_demanding_layer_and_group():
    values = {name: hankel_singular_values(made_up(groups=2, size=8, seed=seed)) for seed, name in enumerate("abc")}
    config = CompreSSMConfig(hankel_tolerance=0.05, max_kept_fraction=1.0)
    wanted = {name: max(states_for_energy(group, 0.05) for group in layer) for name, layer in values.items()}
    curves = dict.fromkeys("abc", CURVE)
    assert choose_state_sizes(config, curves, values, together=False) == wanted
    assert choose_state_sizes(config, curves, values, together=True) == dict.fromkeys("abc", max(wanted.values()))
    assert max(wanted.values()) < 8


def test_without_one_size_for_all_each_layer_gets_what_it_wants():
    curves = {"easy": CURVE, "hard": CURVE.sqrt()}
    assert choose_state_sizes(CompreSSMConfig(tolerance=0.25), curves, {}, together=False) == {"easy": 2, "hard": 4}
    # The gate is each layer's own.
    config = CompreSSMConfig(tolerance=0.25, max_kept_fraction=0.5)
    assert choose_state_sizes(config, curves, {}, together=False) == {"easy": 2, "hard": 8}


def test_a_fixed_target_leaves_smaller_layers_as_they_are():
    curves = {"large": CURVE, "small": CURVE[-4:]}
    for target, expected in (
        (5, {"large": 5, "small": 3}),
        (2, {"large": 2, "small": 2}),
        (0.5, {"large": 4, "small": 3}),
    ):
        assert choose_state_sizes(CompreSSMConfig(state_size=target), curves, {}, together=False) == expected


def lists(sizes: list[int], curves: dict[str, torch.Tensor]) -> dict[str, int]:
    config = CompreSSMConfig(state_size=sizes, realization="projected")
    return choose_state_sizes(config, curves, {}, together=False, numbers={"a": 0, "b": 2, "c": 1})


def test_lists_go_by_the_layers_numbers():
    curves = {"a": CURVE, "b": CURVE, "c": CURVE}
    assert lists([3, 8, 5], curves) == {"a": 3, "b": 5, "c": 8}
    # Of another config of the same model, only its own layers.
    assert lists([3, 8, 5], {"b": CURVE}) == {"b": 5}
    with pytest.raises(ValueError, match=r"layer c: target state_size 9 is above the current 8; choose 1\.\.8"):
        lists([3, 9, 5], curves)
    with pytest.raises(ValueError, match=r"state_size \[8, 8, 8\] is what the layers already have"):
        lists([8, 8, 8], curves)
    assert fixed_state_size([3, 8, 5], 8) == 8


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [
        *((size, "kernel", 16) for size in (1, 9, 15, 16)),
        *((size, "kernel", 32) for size in (17, 31, 32)),
        (33, "kernel", 64),
        (65, "kernel", 128),
        (128, "kernel", 128),
        (129, "kernel", 256),
        (5, 4, 8),
        (8, 4, 8),
        (1, 1, 1),
    ],
)
def test_sizes_of_the_kernels_are_powers_of_two_from_16_on(size, multiple, expected):
    assert round_up(size, multiple) == expected


@pytest.mark.parametrize(("target", "states"), [(1, 16), (16, 16), (17, 32), (0.3, 32)])
def test_fixed_targets_in_sizes_of_the_kernels(target, states):
    curves = {"layer": torch.linspace(1, 0, 65)}
    assert choose(CompreSSMConfig(state_size=target, multiple_of="kernel"), curves) == states


def test_a_target_that_the_kernels_size_lifts_to_the_present_one():
    with pytest.raises(
        ValueError,
        match=r"target state_size 16 \(rounded up from 3 to a size of the kernels\) is not below the current 8",
    ):
        choose(CompreSSMConfig(state_size=3, multiple_of="kernel"))


# A budget of bytes.


def convex_curves(seed: int, layers: int = 3, size: int = 6) -> dict[str, torch.Tensor]:
    """Squared errors that fall by less with each state, as those of balanced truncation do."""
    generator = torch.Generator().manual_seed(seed)
    curves = {}
    for name in "abc"[:layers]:
        steps = torch.rand(size, generator=generator, dtype=torch.float64).pow(3).sort(descending=True).values
        left = torch.cat([steps.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        curves[name] = (left / left[0]).sqrt()
    return curves


def total(curves: dict[str, torch.Tensor], sizes: dict[str, int]) -> float:
    return sum(float(curves[name][size]) ** 2 for name, size in sizes.items())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [12, 16, 20, 44, 64, 68])
def test_a_budget_is_shared_out_as_well_as_any_other_way(seed, budget):
    """Against all 6³ ways."""
    curves, cost = convex_curves(seed), dict.fromkeys("abc", 4)
    sizes = states_for_budget(curves, cost, budget)
    assert sum(4 * size for size in sizes.values()) == budget
    ways = (dict(zip("abc", way, strict=True)) for way in itertools.product(range(1, 7), repeat=3))
    best = min(total(curves, way) for way in ways if sum(4 * size for size in way.values()) <= budget)
    assert total(curves, sizes) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("convex", [True, False])
def test_states_may_cost_differently_and_curves_may_have_any_shape(seed, convex):
    """Where a curve is not convex, many states may be needed before the first of them helps."""
    curves, cost = convex_curves(seed), {"a": 4, "b": 8, "c": 12}
    if not convex:
        generator = torch.Generator().manual_seed(seed)
        curves = {name: torch.rand(7, generator=generator).sort(descending=True).values for name in "abc"}
        curves["a"][1:6], curves["a"][6] = curves["a"][0], 0
    ways = [dict(zip("abc", way, strict=True)) for way in itertools.product(range(1, 7), repeat=3)]
    for budget in range(24, 144, 7):
        sizes = states_for_budget(curves, cost, budget)
        rivals = [way for way in ways if sum(cost[name] * size for name, size in way.items()) <= budget]
        assert sizes in rivals
        assert total(curves, sizes) == pytest.approx(min(total(curves, way) for way in rivals))


def test_a_budget_in_steps_of_the_allowed_sizes():
    curves = {name: torch.linspace(1, 0, 65) ** power for name, power in (("a", 1), ("b", 4))}
    cost = {"a": 4, "b": 4}
    assert states_for_budget(curves, cost, 4 * 48, "kernel") == {"a": 32, "b": 16}
    assert states_for_budget(curves, cost, 4 * 48 + 3, 16) == {"a": 32, "b": 16}
    assert states_for_budget(curves, cost, 4 * 80, "kernel") == {"a": 64, "b": 16}
    for multiple, allowed in (("kernel", {16, 32, 64}), (24, {24, 48, 64})):
        for budget in range(4 * 48, 4 * 128, 20):
            sizes = states_for_budget(curves, cost, budget, multiple)
            assert set(sizes.values()) <= allowed and 4 * sum(sizes.values()) <= budget


def test_a_budget_by_the_config():
    curves = convex_curves(0)
    config = CompreSSMConfig(state_bytes=40, realization="projected")
    cost = dict.fromkeys("abc", 4)
    sizes = choose_state_sizes(config, curves, {}, together=False, bytes_per_state=cost)
    assert sizes == states_for_budget(curves, cost, 40)


def test_a_budget_that_is_too_small():
    with pytest.raises(
        ValueError,
        match=r"state_bytes is 11, but the smallest sizes, \{'a': 1, .*'c': 1\}, take 12 bytes; give at least 12",
    ):
        states_for_budget(convex_curves(0), dict.fromkeys("abc", 4), 11)
    with pytest.raises(ValueError, match=r"smallest sizes, \{'a': 16\}, take 64 bytes"):
        states_for_budget({"a": torch.linspace(1, 0, 65)}, {"a": 4}, 63, "kernel")


@pytest.mark.parametrize("budget", [72, 1000])
def test_a_budget_that_is_no_limit(budget):
    with pytest.raises(
        ValueError, match=f"state_bytes is {budget}, but the states take 72 bytes as they are; give less"
    ):
        states_for_budget(convex_curves(0), dict.fromkeys("abc", 4), budget)


# A fixed size that projected layers share out.


def shared_out(
    target: int | float | list[int],
    curves: dict[str, torch.Tensor],
    cost: dict[str, int] | None = None,
    **options: Any,
) -> dict[str, int]:
    config = CompreSSMConfig(state_size=target, **options)
    numbers = {name: number for number, name in enumerate(curves)}
    cost = dict.fromkeys(curves, 4) if cost is None else cost
    return choose_state_sizes(config, curves, {}, together=False, numbers=numbers, bytes_per_state=cost)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("target", "states"), [(1, 1), (2, 2), (5, 5), (0.5, 3)])
def test_a_fixed_size_is_an_average_that_is_shared_out_as_well_as_any_other_way(seed, target, states):
    curves = convex_curves(seed)
    sizes = shared_out(target, curves)
    assert sum(sizes.values()) == 3 * states
    ways = (dict(zip("abc", way, strict=True)) for way in itertools.product(range(1, 7), repeat=3))
    best = min(total(curves, way) for way in ways if sum(way.values()) == 3 * states)
    assert total(curves, sizes) == pytest.approx(best)
    assert total(curves, sizes) <= total(curves, dict.fromkeys("abc", states))


def test_what_is_shared_out_are_bytes():
    cost = {"a": 4, "b": 12}
    curves = {"a": torch.linspace(1, 0, 9), "b": torch.tensor([1.0] + [0.0] * 8)}
    # 64 bytes, or 8 states: 12 bytes for the one that b needs leave enough for all of a's eight.
    assert shared_out(4, curves, cost) == {"a": 8, "b": 1}


def test_a_list_is_taken_as_it_is():
    assert shared_out([2, 5, 3], convex_curves(0)) == {"a": 2, "b": 5, "c": 3}


def uneven_curves() -> dict[str, torch.Tensor]:
    """Of layers that an earlier cut left with 2, 6 and 4 states: 4 on average."""
    return {name: CURVE[-size - 1 :] for name, size in (("a", 2), ("b", 6), ("c", 4))}


@pytest.mark.parametrize(("target", "states"), [(3, 3), (1, 1), (0.5, 2)])
def test_the_next_cut_goes_by_the_average(target, states):
    curves = uneven_curves()
    sizes = shared_out(target, curves)
    assert sum(sizes.values()) == 3 * states
    assert all(1 <= size < len(curves[name]) for name, size in sizes.items())


@pytest.mark.parametrize("target", [4, 5, 6])
def test_a_target_that_is_not_below_the_average(target):
    with pytest.raises(ValueError, match=rf"target state_size {target} is not below the current 4; choose 1\.\.3"):
        shared_out(target, uneven_curves())


def test_an_average_that_is_no_whole_number_is_rounded_up():
    """Of 2, 6 and 5 states, 13 in all, 12 may stay."""
    curves = uneven_curves() | {"c": CURVE[-6:]}
    assert sum(shared_out(4, curves).values()) == 12
    with pytest.raises(ValueError, match="target state_size 5 is not below the current 5"):
        shared_out(5, curves)


@pytest.mark.parametrize("multiple", [4, 16, "kernel"])
def test_shared_out_sizes_are_multiples(multiple):
    curves = {name: torch.linspace(1, 0, 65) ** power for name, power in (("a", 1), ("b", 6))}
    sizes = shared_out(15, curves, multiple_of=multiple)
    assert all(round_up(size, multiple) == size for size in sizes.values())
    assert sum(sizes.values()) == 32
    if multiple == 4:
        assert sizes["a"] > sizes["b"]
    with pytest.raises(ValueError, match=r"target state_size 64 \(rounded up from 63 to .*\) is not below"):
        shared_out(63, curves, multiple_of=multiple)


def projected_model(sizes: list[int]) -> nn.Module:
    model = TINY["mamba2"].build(num_hidden_layers=len(sizes))
    compress_(model, projection_plan(model, sizes))
    return model


@pytest.mark.parametrize(("sizes", "average"), [([3, 5], 4), ([3, 4], 4), ([1, 7], 4), ([2, 2], 2)])
def test_the_size_of_a_projected_model_is_its_average_rounded_up(sizes, average):
    mixers = find_mixers(projected_model(sizes))
    assert state_size_of(mixers) == average
    assert average_state_size(dict(zip("ab", sizes, strict=True)), {"a": 4, "b": 4}) == average


def test_the_size_of_a_stock_model_is_its_largest():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = TINY["mamba"].build_base(), TINY["mamba2"].build_base(state_size=4)

    assert state_size_of(find_mixers(Both())) == 8


@pytest.mark.parametrize(
    ("rule", "reached"),
    [
        ({"state_size": 3}, False),
        ({"state_size": 4}, True),
        ({"state_size": 6}, True),
        # Of the 8 states before the first cut.
        ({"state_size": 0.4}, False),
        ({"state_size": 0.5}, True),
        ({"state_size": 3, "multiple_of": 4}, True),
        ({"state_size": [2, 6]}, True),
        ({"state_size": [6, 2]}, False),
        ({"state_bytes": 8 * 128}, True),
        ({"state_bytes": 8 * 128 - 1}, False),
        ({"tolerance": 0.5}, False),
    ],
)
def test_a_fixed_target_is_reached_with_the_average(rule, reached):
    mixers = find_mixers(projected_model([2, 6]))
    history = [{"status": "cut", "layers": [{"state_size_before": 8}, {"state_size_before": 8}]}]
    assert target_is_reached(CompreSSMConfig(**rule), history, mixers) == reached
    assert not target_is_reached(CompreSSMConfig(**rule), [], mixers)
