"""How many states to keep: every rule, its rounding, its gate and its errors."""

from __future__ import annotations

import pytest
import torch
from test_criteria import made_up

from hf_compressm import CompreSSMConfig
from hf_compressm.criteria import hankel_singular_values
from hf_compressm.ranks import choose_state_sizes, fixed_state_size, states_for_energy, states_for_tolerance

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
