"""Projections against oracles in float64: scipy's decompositions, least squares, and sums over the naive run's states.

The naive run shares no code with the package; E(W, V) = Σ w (y − C·V Wᵀ h)² is summed over its states.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from conftest import TINY, lively, measured, silence_states, tokens
from naive import NaiveRun, naive
from torch import nn

import hf_compressm.projection
from hf_compressm import CompreSSMConfig, StateStatistics, compress_, find_mixers, measure, plan_compression
from hf_compressm.mixers import Mixer
from hf_compressm.projection import (
    LARGEST_ERROR_TO_FIT,
    fit_projection,
    mean_field_error_curve,
    measured_error_curve,
    measured_hankel_values,
)

SIZE = 6


def layer(
    batch: int = 6, length: int = 12, mask: torch.Tensor | None = None, seed: int = 0, **options
) -> tuple[Mixer, StateStatistics]:
    """A Mamba-2 mixer of two groups whose states matter, and its statistics."""
    model = lively(TINY["mamba2"].build(seed, **({"state_size": SIZE, "num_hidden_layers": 1} | options)), seed)
    return measured(model, batch, length, mask, seed)


def gramians(run: NaiveRun) -> list[tuple[np.ndarray, np.ndarray]]:
    """H̄ and Ω of each group."""
    result = []
    for group in range(run.groups):
        own = run.group == group
        C = run.C[:, :, group][run.mask > 0]
        result.append(
            (np.einsum("btd,btdm,btdn->mn", run.weight[..., own], run.h[:, :, own], run.h[:, :, own]), C.T @ C)
        )
    return result


def balanced(H: np.ndarray, omega: np.ndarray, rank: int) -> np.ndarray:
    """V Wᵀ of balanced truncation, by eigenvectors: of H̄ Ω, the dominant ones."""
    values, vectors = scipy.linalg.eig(H @ omega)
    order = np.argsort(-values.real)
    vectors = vectors[:, order].real
    return vectors[:, :rank] @ np.linalg.inv(vectors)[:rank]


def in_groups(matrix: torch.Tensor, groups: int = 2) -> list[np.ndarray]:
    """The matrices of each group, (N, r), of the one that holds them side by side."""
    return [part.double().numpy() for part in matrix.chunk(groups, dim=1)]


def maps(result) -> list[np.ndarray]:
    """V Wᵀ of each group."""
    return [V @ W.T for W, V in zip(in_groups(result.B_projection), in_groups(result.C_projection), strict=True)]


def squared_errors(run: NaiveRun, X: list[np.ndarray]) -> list[float]:
    """E of each group, where C·X h is read instead of y."""
    errors = [0.0] * run.groups
    for b, t in run.tokens():
        for d, group in enumerate(run.group):
            predicted = run.C[b, t, group] @ X[group] @ run.h[b, t, d]
            errors[group] += run.weight[b, t, d] * (run.y[b, t, d] - predicted) ** 2
    return errors


def relative_error(run: NaiveRun, X: list[np.ndarray]) -> float:
    return (sum(squared_errors(run, X)) / (run.weight * run.y**2).sum()) ** 0.5


def mean_field_error(H: np.ndarray, omega: np.ndarray, X: np.ndarray) -> float:
    """Σ w (C·(1 − X) h)² if the C of each token met the h of all."""
    rest = np.eye(len(H)) - X
    return np.trace(omega @ rest @ H @ rest.T)


# The mean field.


@pytest.mark.parametrize("seed", range(3))
def test_hankel_values_are_the_roots_of_the_eigenvalues_of_the_product(seed):
    mixer, statistics = layer(seed=seed)
    for values, (H, omega) in zip(measured_hankel_values(statistics), gramians(naive(mixer, statistics)), strict=True):
        expected = np.sqrt(np.sort(scipy.linalg.eigvals(H @ omega).real)[::-1])
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-3, atol=1e-5 * expected[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_fields_curve_is_that_of_the_values_left_out(seed):
    mixer, statistics = layer(seed=seed)
    squares = sum(
        np.sort(scipy.linalg.eigvals(H @ omega).real)[::-1] for H, omega in gramians(naive(mixer, statistics))
    )
    expected = [np.sqrt(squares[rank:].sum() / squares.sum()) for rank in range(SIZE + 1)]
    curve = mean_field_error_curve(statistics)
    assert curve.shape == (SIZE + 1,) and (curve[0], curve[-1]) == (1, 0)
    np.testing.assert_allclose(curve.numpy(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rank", range(1, SIZE))
def test_balanced_truncation_is_the_best_of_its_rank_in_the_mean_field(rank):
    mixer, statistics = layer()
    generator = np.random.default_rng(0)
    result = fit_projection(mixer, statistics, rank, rounds=0)
    assert result.method == "balanced"
    pairs = zip(gramians(naive(mixer, statistics)), maps(result), strict=True)
    for group, ((H, omega), X) in enumerate(pairs):
        error, whole = mean_field_error(H, omega, X), np.trace(omega @ H)
        # Eckart and Young: no matrix of this rank is nearer to Ω^½ H̄^½.
        left_out = scipy.linalg.svdvals(scipy.linalg.sqrtm(omega).real @ scipy.linalg.sqrtm(H).real)[rank:]
        assert error == pytest.approx((left_out**2).sum(), rel=1e-2, abs=1e-6 * whole)
        assert error == pytest.approx((measured_hankel_values(statistics)[group, rank:] ** 2).sum().item(), rel=1e-2)
        U, S, Z = scipy.linalg.svd(X)
        for size in (1e-3, 1e-2, 0.1, 1.0):
            for _ in range(20):
                # Others of the same rank: moved a little, and far away.
                left = U[:, :rank] * S[:rank] + size * generator.normal(size=(SIZE, rank))
                right = Z[:rank] + size * generator.normal(size=(rank, SIZE))
                assert mean_field_error(H, omega, left @ right) > error - 1e-6 * whole


@pytest.mark.parametrize("rank", range(1, SIZE))
def test_the_balanced_projection_is_scipys(rank):
    mixer, statistics = layer()
    result = fit_projection(mixer, statistics, rank, rounds=0)
    for X, (H, omega) in zip(maps(result), gramians(naive(mixer, statistics)), strict=True):
        np.testing.assert_allclose(X, balanced(H, omega, rank), rtol=0, atol=2e-3 * np.abs(X).max())


def test_states_and_readouts_are_balanced():
    """Wᵀ H̄ W = Vᵀ Ω V = diag σ."""
    mixer, statistics = layer()
    result = fit_projection(mixer, statistics, 3, rounds=0)
    parts = zip(
        in_groups(result.B_projection), in_groups(result.C_projection), gramians(naive(mixer, statistics)), strict=True
    )
    for group, (W, V, (H, omega)) in enumerate(parts):
        expected = np.diag(measured_hankel_values(statistics)[group, :3])
        np.testing.assert_allclose(W.T @ H @ W, expected, atol=2e-3 * expected.max())
        np.testing.assert_allclose(V.T @ omega @ V, expected, atol=2e-3 * expected.max())


# The measured error.


@pytest.mark.parametrize("seed", range(3))
def test_the_measured_curve_is_what_balanced_truncation_costs(seed):
    mixer, statistics = layer(seed=seed)
    run = naive(mixer, statistics)
    expected = [1.0]
    for rank in range(1, SIZE):
        expected.append(relative_error(run, [balanced(H, omega, rank) for H, omega in gramians(run)]))
    expected = np.minimum.accumulate([*expected, 0.0])
    curve = measured_error_curve(mixer, statistics)
    np.testing.assert_allclose(curve.numpy(), expected, rtol=2e-3, atol=1e-3)
    # It is not the mean field's.
    assert (curve - mean_field_error_curve(statistics)).abs().max() > 1e-2
    again = fit_projection(mixer, statistics, 2, rounds=3).error_curve
    torch.testing.assert_close(again, curve, rtol=1e-3, atol=1e-4)


def test_beyond_the_coordinates_looked_at_the_mean_field_goes_on(monkeypatch):
    mixer, statistics = layer()
    whole, expected = measured_error_curve(mixer, statistics), mean_field_error_curve(statistics)
    monkeypatch.setattr(hf_compressm.projection, "COORDINATES_OF_A_CURVE", 3)
    curve = measured_error_curve(mixer, statistics)
    torch.testing.assert_close(curve[:4], whole[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curve[4:], expected[4:] * whole[3] / expected[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("seed", range(2))
def test_the_reported_error_is_the_projections_own(seed, rank, rounds):
    mixer, statistics = layer(seed=seed)
    result = fit_projection(mixer, statistics, rank, rounds=rounds)
    assert result.B_projection.shape == result.C_projection.shape == (SIZE, 2 * rank)
    assert result.B_projection.dtype == result.C_projection.dtype == torch.float32
    assert result.relative_error == pytest.approx(relative_error(naive(mixer, statistics), maps(result)), rel=2e-3)
    fitted = rounds > 0 and result.error_curve[rank] <= LARGEST_ERROR_TO_FIT
    assert result.method == ("alternating least squares" if fitted else "balanced")


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("size", [3, [2, 5]])
def test_the_reported_error_is_that_of_the_layer_after_the_cut(size, rounds):
    model = lively(TINY["mamba2"].build(state_size=SIZE))
    statistics = measure(model, [tokens(6, 12)])
    before = {name: naive(mixer, statistics[name]) for name, mixer in find_mixers(model).items()}
    config = CompreSSMConfig(state_size=size, realization="projected", projection_rounds=rounds)
    plan = plan_compression(model, statistics, config)
    compress_(model, plan)
    for name, run in before.items():
        after = naive(find_mixers(model)[name], statistics[name])
        error, energy = (run.weight * (run.y - after.y) ** 2).sum(), (run.weight * run.y**2).sum()
        assert plan.layers[name].relative_error == pytest.approx((error / energy) ** 0.5, rel=2e-3)


# The fit.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_round_makes_it_worse(seed, rank):
    mixer, statistics = layer(seed=seed)
    run = naive(mixer, statistics)
    errors = [
        squared_errors(run, maps(fit_projection(mixer, statistics, rank, rounds=rounds))) for rounds in (0, 1, 2, 4, 8)
    ]
    energy = (run.weight * run.y**2).sum()
    for early, late in itertools.pairwise(errors):
        assert all(after <= before + 1e-6 * energy for before, after in zip(early, late, strict=True))
    # The balanced start leaves something to gain where readouts depend on the states.
    far_off = (sum(errors[0]) / energy) ** 0.5 > LARGEST_ERROR_TO_FIT
    assert sum(errors[1]) < 0.98 * sum(errors[0]) or far_off


def residuals(run: NaiveRun, group: int, rank: int):
    """√w (y − C·V Wᵀ h) of one group as a function of W and V, flat."""
    own = run.group == group
    h = run.h[:, :, own].reshape(-1, run.h.shape[-1])
    C = np.repeat(run.C[:, :, group].reshape(-1, run.h.shape[-1]), own.sum(), axis=0)
    y, root = run.y[..., own].ravel(), np.sqrt(run.weight[..., own].ravel())

    def residual(parameters: np.ndarray) -> np.ndarray:
        W, V = parameters.reshape(2, -1, rank)
        return root * (y - ((C @ V) * (h @ W)).sum(1))

    return residual


def slope(residual, parameters: np.ndarray) -> np.ndarray:
    """The gradient of the sum of squares."""
    return scipy.optimize.approx_fprime(parameters, lambda p: (residual(p) ** 2).sum(), 1e-7)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rank", [1, 2])
def test_enough_rounds_reach_what_least_squares_reach(seed, rank):
    """scipy's, jointly in W and V, from the balanced start."""
    mixer, statistics = layer(seed=seed, state_size=4)
    run = naive(mixer, statistics)
    start, end = (fit_projection(mixer, statistics, rank, rounds=rounds) for rounds in (0, 60))
    for group in range(2):
        residual = residuals(run, group, rank)
        first, last = (
            np.stack([in_groups(result.B_projection)[group], in_groups(result.C_projection)[group]]).ravel()
            for result in (start, end)
        )
        found = scipy.optimize.least_squares(residual, first, xtol=1e-12, ftol=1e-12)
        errors = [(residual(parameters) ** 2).sum() for parameters in (first, last, found.x)]
        # Most of the way that there is to go.
        assert errors[0] - errors[1] > 0.95 * (errors[0] - errors[2])
        # Where W is fixed, V is a linear least-squares problem, and the other way round: both are solved.
        assert np.linalg.norm(slope(residual, last)) < 0.05 * np.linalg.norm(slope(residual, first))


def test_only_the_first_coordinates_are_fitted(monkeypatch):
    """With r = 1 the first four, though six are there: what is read lies in the span of their rows."""
    mixer, statistics = layer()
    H, omega = gramians(naive(mixer, statistics))[0]
    values, vectors = scipy.linalg.eig(H @ omega)
    rows = np.linalg.inv(vectors[:, np.argsort(-values.real)].real)[:4]

    def share_outside() -> float:
        X = maps(fit_projection(mixer, statistics, 1, rounds=3))[0]
        return np.abs(X - X @ np.linalg.pinv(rows) @ rows).max() / np.abs(X).max()

    assert share_outside() > 1e-2
    monkeypatch.setattr(hf_compressm.projection, "FEWEST_COORDINATES", 4)
    assert share_outside() < 1e-3


def test_all_states_cost_nothing():
    mixer, statistics = layer()
    result = fit_projection(mixer, statistics, SIZE, rounds=3)
    assert (result.relative_error, result.method) == (0, "none")
    assert all(np.array_equal(X, np.eye(SIZE)) for X in maps(result))
    assert torch.equal(result.error_curve, measured_error_curve(mixer, statistics))


def test_all_states_cost_nothing_on_other_inputs_either():
    """One token reaches one direction; a layer that shall keep all of its states keeps all directions."""
    model = lively(TINY["mamba2"].build())
    before = model(tokens()).logits
    config = CompreSSMConfig(state_size=[8, 7], realization="projected")
    plan = plan_compression(model, measure(model, [tokens(1, 1)]), config)
    whole = dict.fromkeys(plan.layers, plan.layers["backbone.layers.0.mixer"])
    compress_(model, dataclasses.replace(plan, layers=whole))
    torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("largest", [0.0, 1.0])
def test_what_is_too_far_off_is_not_fitted(monkeypatch, largest):
    mixer, statistics = layer()
    monkeypatch.setattr(hf_compressm.projection, "LARGEST_ERROR_TO_FIT", largest)
    start, result = (fit_projection(mixer, statistics, 2, rounds=rounds) for rounds in (0, 3))
    assert (result.method == "balanced") == torch.equal(result.B_projection, start.B_projection) == (largest == 0)


def test_several_inputs_are_fitted_together():
    mixer, statistics = layer(6, 12)
    (hidden_states, _), apart = statistics.inputs[0], StateStatistics.empty(mixer)
    for part in (hidden_states[:1], hidden_states[1:4], hidden_states[4:]):
        apart.update(mixer, part, None)
    expected, ours = (fit_projection(mixer, item, 2, rounds=3) for item in (statistics, apart))
    assert ours.relative_error == pytest.approx(expected.relative_error, rel=1e-3)
    for X, Y in zip(maps(ours), maps(expected), strict=True):
        np.testing.assert_allclose(X, Y, atol=1e-2)


def test_padding_does_not_enter_the_fit():
    """The same sequences, once padded on the right with rubbish."""
    mixer, statistics = layer(6, 12)
    model_input, _ = statistics.inputs[0]
    longer = torch.cat([model_input, 100 * torch.randn(6, 5, 16)], dim=1)
    mask = torch.cat([torch.ones(6, 12), torch.zeros(6, 5)], dim=1)
    padded = StateStatistics.empty(mixer)
    padded.update(mixer, longer, mask)
    expected, ours = (fit_projection(mixer, item, 2, rounds=3) for item in (statistics, padded))
    torch.testing.assert_close(ours.B_projection, expected.B_projection, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(ours.C_projection, expected.C_projection, rtol=1e-2, atol=1e-3)
    assert ours.relative_error == pytest.approx(expected.relative_error, rel=1e-3)
    torch.testing.assert_close(
        measured_error_curve(mixer, padded), measured_error_curve(mixer, statistics), rtol=1e-3, atol=1e-4
    )


def test_padding_on_the_left():
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[0, :7], mask[3, :2] = 0, 0
    mixer, statistics = layer(6, 12, mask)
    result = fit_projection(mixer, statistics, 2, rounds=3)
    assert result.relative_error == pytest.approx(relative_error(naive(mixer, statistics), maps(result)), rel=2e-3)


def test_the_fit_touches_nothing():
    mixer, statistics = layer()
    weights = {name: value.clone() for name, value in mixer.module.state_dict().items()}
    sums, state = [tensor.clone() for tensor in statistics.sums], torch.get_rng_state()
    fit_projection(mixer, statistics, 2, rounds=3)
    measured_error_curve(mixer, statistics)
    assert all(torch.equal(value, weights[name]) for name, value in mixer.module.state_dict().items())
    assert all(torch.equal(tensor, before) for tensor, before in zip(statistics.sums, sums, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_projected_layer_is_projected_further(rounds):
    model = lively(TINY["mamba2"].build(state_size=SIZE, num_hidden_layers=1))
    mixer, statistics = measured(model)
    compress_(
        model,
        plan_compression(model, {mixer.name: statistics}, CompreSSMConfig(state_size=5, realization="projected")),
    )
    mixer, statistics = measured(model)
    assert statistics.state_size == 5
    result = fit_projection(mixer, statistics, 2, rounds=rounds)
    assert result.B_projection.shape == (5, 4)
    run = naive(mixer, statistics)
    assert run.h.shape[-1] == 5
    assert result.relative_error == pytest.approx(relative_error(run, maps(result)), rel=2e-3)


# Fewer directions than states are kept.


@pytest.mark.parametrize("rounds", [0, 3])
def test_states_that_nothing_is_left_for_start_unread(caplog, rounds):
    """Of eight states, four are silent; six are kept."""
    model = lively(TINY["mamba2"].build(num_hidden_layers=1))
    silence_states(model, [[1, 3, 4, 6], [0, 1, 2, 3]])
    before = model(tokens()).logits
    mixer, statistics = measured(model)
    # A list is taken as it is; a number would leave out what nothing is left for.
    config = CompreSSMConfig(state_size=[6], realization="projected", projection_rounds=rounds)
    plan = plan_compression(model, {mixer.name: statistics}, config)
    for group in (0, 1):
        warning = rf"only 4 directions of its 8 states carry anything \(group {group}\); 2 of the 6 states kept"
        assert any(warning.replace("\\", "") in record.message for record in caplog.records)
    compress_(model, plan)
    torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-4, atol=1e-5)
    module = model.backbone.layers[0].mixer
    for W, V in zip(in_groups(module.B_projection.detach()), in_groups(module.C_projection.detach()), strict=True):
        assert np.abs(V[:, 4:]).max() < 1e-4 * np.abs(V).max()
        assert np.linalg.norm(W[:, 4:], axis=0) == pytest.approx(1, abs=1e-2)
    # Training may find a use for them.
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradient = module.C_projection.grad.unflatten(1, (2, 6))[:, :, 4:]
    assert gradient.abs().amax(0).min() > 0


def kill(module: nn.Module, part: str) -> None:
    """C_t of one group, of all, or what the layer passes on, is zero."""
    with torch.no_grad():
        if part == "what is passed on":
            module.out_proj.weight.zero_()
            return
        inner, size = module.intermediate_size, module.ssm_state_size
        groups = slice(0, 1) if "one group" in part else slice(0, 2)
        block = 2 * inner + (2 * size if "C" in part else 0)
        for first, tensor in (
            (block, module.in_proj.weight),
            (block - inner, module.conv1d.weight),
            (block - inner, module.conv1d.bias),
        ):
            tensor[first : first + 2 * size].unflatten(0, (2, size))[groups] = 0


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("part", ["C", "B", "C of one group", "B of one group", "what is passed on"])
def test_a_dead_layer_or_group_does_not_fail(part, rounds):
    model = lively(TINY["mamba2"].build(num_hidden_layers=1))
    kill(model.backbone.layers[0].mixer, part)
    before = model(tokens()).logits
    mixer, statistics = measured(model)
    dead = "one group" not in part
    assert bool((naive(mixer, statistics).y == 0).all()) == (dead and part != "what is passed on")
    curve = measured_error_curve(mixer, statistics)
    assert torch.isfinite(curve).all() and torch.isfinite(mean_field_error_curve(statistics)).all()
    result = fit_projection(mixer, statistics, 3, rounds=rounds)
    assert torch.isfinite(result.B_projection).all() and torch.isfinite(result.C_projection).all()
    if dead:
        assert result.relative_error == 0
        config = CompreSSMConfig(state_size=3, realization="projected", projection_rounds=rounds)
        compress_(model, plan_compression(model, {mixer.name: statistics}, config))
        torch.testing.assert_close(model(tokens()).logits, before)
    else:
        run = naive(mixer, statistics)
        assert result.relative_error == pytest.approx(relative_error(run, maps(result)), rel=2e-3)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_fewer_tokens_than_states(length):
    mixer, statistics = layer(1, length, state_size=8)
    result = fit_projection(mixer, statistics, 5, rounds=3)
    assert torch.isfinite(result.B_projection).all() and torch.isfinite(result.C_projection).all()
    # Three readouts span three directions: five states hold all of them.
    assert relative_error(naive(mixer, statistics), maps(result)) < 1e-2
    assert result.relative_error < 1e-2


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_what_is_passed_on_does_not_matter(factor):
    mixer, statistics = layer()
    expected = fit_projection(mixer, statistics, 2, rounds=3)
    with torch.no_grad():
        mixer.module.out_proj.weight *= factor
    scaled = StateStatistics.empty(mixer)
    scaled.update(mixer, statistics.inputs[0][0], None)
    ours = fit_projection(mixer, scaled, 2, rounds=3)
    assert ours.relative_error == pytest.approx(expected.relative_error, rel=1e-2)
