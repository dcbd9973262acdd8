"""The closed-form refit against the dense normal equations, and its reported error against the real one."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from conftest import TINY, lively, measured, tokens
from naive import NaiveRun, naive

from hf_compressm import CompreSSMConfig, StateStatistics, compress_, find_mixers, measure, plan_compression
from hf_compressm.mixers import Mixer
from hf_compressm.refit import fewest_tokens, mean_field_readout, refit_readout

SIZE, KEPT, PENALTY = 6, [0, 2, 5], 0.01


def layer(
    batch: int = 6, length: int = 24, mask: torch.Tensor | None = None, seed: int = 0
) -> tuple[Mixer, StateStatistics]:
    """A Mamba-1 mixer whose states matter, and its statistics."""
    model = lively(TINY["mamba"].build(seed, state_size=SIZE, num_hidden_layers=1), seed)
    return measured(model, batch, length, mask, seed)


def error_and_energy(run: NaiveRun, M: np.ndarray, kept: list[int]) -> tuple[float, float]:
    """Σ w (y − ŷ)² and Σ w y²."""
    error = energy = 0.0
    for b, t in run.tokens():
        readout = M @ run.C[b, t, 0]
        for d in range(run.y.shape[2]):
            predicted = sum(run.h[b, t, d, state] * readout[row] for row, state in enumerate(kept))
            error += run.weight[b, t, d] * (run.y[b, t, d] - predicted) ** 2
            energy += run.weight[b, t, d] * run.y[b, t, d] ** 2
    return error, energy


def relative_error(run: NaiveRun, M: np.ndarray, kept: list[int]) -> float:
    error, energy = error_and_energy(run, M, kept)
    return (error / energy) ** 0.5


def naive_mean_field(run: NaiveRun, kept: list[int]) -> np.ndarray:
    """(H̄_SS + 1e-4 · mean diag · I)⁻¹ H̄_SR on the removed states, the identity on the kept ones."""
    size = run.h.shape[-1]
    H = np.einsum("btd,btdm,btdn->mn", run.weight, run.h, run.h)
    H_SS = H[np.ix_(kept, kept)]
    M = np.linalg.solve(H_SS + 1e-4 * np.diag(H_SS).mean() * np.eye(len(kept)), H[kept])
    for row, state in enumerate(kept):
        M[:, state] = np.eye(len(kept))[:, row]
    assert M.shape == (len(kept), size)
    return M


def naive_penalty(run: NaiveRun, kept: list[int]) -> np.ndarray:
    """The matrix diag(H̄_SS) ⊗ Ω/T of the penalty, for the entries of M − M₀ row by row."""
    C = run.C[:, :, 0][run.mask > 0]
    H_SS = np.einsum("btd,btdm->m", run.weight, run.h[..., kept] ** 2)
    return np.kron(np.diag(H_SS), C.T @ C / len(C))


def normal_equations(run: NaiveRun, kept: list[int], penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Σ w (y − h_S·M C)² + λ tr(diag(H̄_SS)(M−M₀) Ω/T (M−M₀)ᵀ) as (r N) × (r N) equations in M − M₀, row by row."""
    size, rank = run.h.shape[-1], len(kept)
    M0 = naive_mean_field(run, kept)
    normal, right = penalty * naive_penalty(run, kept), np.zeros(rank * size)
    for b, t in run.tokens():
        C = run.C[b, t, 0]
        for d in range(run.y.shape[2]):
            h, w = run.h[b, t, d, kept], run.weight[b, t, d]
            feature = np.outer(h, C).ravel()
            normal += w * np.outer(feature, feature)
            right += w * (run.y[b, t, d] - h @ M0 @ C) * feature
    return normal, right


def dense_optimum(run: NaiveRun, kept: list[int], penalty: float) -> np.ndarray:
    change = np.linalg.solve(*normal_equations(run, kept, penalty))
    return naive_mean_field(run, kept) + change.reshape(len(kept), -1)


def refit(mixer: Mixer, statistics: StateStatistics, steps: int = 10, kept: list[int] = KEPT, **options):
    result = refit_readout(mixer, statistics, torch.tensor([kept]), steps=steps, **{"penalty": PENALTY} | options)
    return dataclasses.replace(result, matrix=result.matrix[0])


def test_mean_field_equals_its_formula():
    mixer, statistics = layer()
    expected = torch.from_numpy(naive_mean_field(naive(mixer, statistics), KEPT))
    torch.testing.assert_close(
        mean_field_readout(statistics.state_gram[0], torch.tensor(KEPT)), expected, rtol=1e-3, atol=1e-4
    )


def test_mean_field_is_exact_for_zero_states(silence):
    model = lively(TINY["mamba"].build(state_size=SIZE))
    silence(model, [1, 3, 4])
    for statistics in measure(model, [tokens()]).values():
        matrix = mean_field_readout(statistics.state_gram[0], torch.tensor(KEPT))
        assert torch.equal(matrix, torch.eye(SIZE, dtype=torch.float64)[KEPT])


def test_refit_is_exact_for_zero_states(silence):
    model = lively(TINY["mamba"].build(state_size=SIZE))
    silence(model, [1, 3, 4])
    for name, statistics in measure(model, [tokens(8, 24)]).items():
        result = refit(find_mixers(model)[name], statistics)
        # What is put on the columns of silent states is multiplied by zero rows; the others must be the identity.
        torch.testing.assert_close(result.matrix[:, KEPT], torch.eye(3), rtol=0.0, atol=1e-5)
        assert result.relative_error < 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_enough_steps_reach_the_dense_optimum(seed, penalty):
    mixer, statistics = layer(seed=seed)
    run = naive(mixer, statistics)
    result = refit(mixer, statistics, steps=60, penalty=penalty)
    assert result.method == "conjugate gradients"
    expected = dense_optimum(run, KEPT, penalty)
    np.testing.assert_allclose(result.matrix.numpy(), expected, rtol=1e-2, atol=1e-2)
    assert result.relative_error == pytest.approx(relative_error(run, expected, KEPT), rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_steps_are_those_of_preconditioned_conjugate_gradients(steps):
    """scipy's, on the dense equations, with the preconditioner (H̄_SS + ridge)⁻¹ ⊗ (Ω/T + ridge)⁻¹."""
    mixer, statistics = layer()
    run = naive(mixer, statistics)
    normal, right = normal_equations(run, KEPT, PENALTY)
    H = np.einsum("btd,btdm,btdn->mn", run.weight, run.h, run.h)[np.ix_(KEPT, KEPT)]
    C = run.C[:, :, 0][run.mask > 0]
    inverses = [
        np.linalg.inv(matrix + 1e-3 * np.diag(matrix).mean() * np.eye(len(matrix))) for matrix in (H, C.T @ C / len(C))
    ]
    change, _ = scipy.sparse.linalg.cg(normal, right, rtol=0.0, maxiter=steps, M=np.kron(*inverses))
    expected = naive_mean_field(run, KEPT) + change.reshape(len(KEPT), SIZE)
    np.testing.assert_allclose(refit(mixer, statistics, steps=steps).matrix.numpy(), expected, rtol=1e-2, atol=1e-3)


def test_every_step_lowers_what_is_minimised():
    mixer, statistics = layer()
    run, objectives = naive(mixer, statistics), []
    start, weight = naive_mean_field(run, KEPT), naive_penalty(naive(mixer, statistics), KEPT)
    for steps in (0, 1, 2, 4, 8):
        M = refit(mixer, statistics, steps=steps).matrix.double().numpy()
        change = (M - start).ravel()
        objectives.append(error_and_energy(run, M, KEPT)[0] + PENALTY * change @ weight @ change)
    assert all(late < early for early, late in itertools.pairwise(objectives))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kept", [[3], [0, 5], [0, 2, 5], [0, 1, 2, 4]])
def test_the_error_falls_and_is_reported_as_it_is(seed, kept):
    mixer, statistics = layer(seed=seed)
    run = naive(mixer, statistics)
    start, result = refit(mixer, statistics, kept=kept, steps=0), refit(mixer, statistics, kept=kept)
    mean_field = naive_mean_field(run, kept)
    assert (start.method, result.method) == ("mean field", "conjugate gradients")
    np.testing.assert_allclose(start.matrix.numpy(), mean_field, rtol=1e-3, atol=1e-4)
    assert start.relative_error == pytest.approx(relative_error(run, mean_field, kept), rel=1e-3)
    assert result.relative_error == pytest.approx(relative_error(run, result.matrix.double().numpy(), kept), rel=1e-3)
    assert result.relative_error < start.relative_error


def test_a_fit_that_does_not_help_leaves_the_mean_field():
    """An iteration that ran away, as it may where a system is singular to float precision."""
    mixer, statistics = layer()
    start = refit(mixer, statistics, steps=0)
    result = refit(mixer, statistics, penalty=-1e6)
    assert result.method == "mean field"
    assert torch.equal(result.matrix, start.matrix) and result.relative_error == start.relative_error


def test_few_tokens_keep_the_mean_field():
    assert fewest_tokens(3, SIZE) == 4.5
    mixer, statistics = layer(1, 4)
    assert refit(mixer, statistics).method == "mean field"
    mixer, statistics = layer(1, 5)
    assert refit(mixer, statistics).method == "conjugate gradients"


def test_padding_counts_as_no_token():
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[:, 1:] = 0
    mixer, statistics = layer(4, 12, mask)
    assert statistics.tokens == 4
    assert refit(mixer, statistics).method == "mean field"


def test_padding_does_not_enter_the_fit():
    """The same sequences, once padded on the right with rubbish."""
    mixer, statistics = layer(6, 15)
    model_input, _ = statistics.inputs[0]
    longer = torch.cat([model_input, 100 * torch.randn(6, 5, 16)], dim=1)
    mask = torch.cat([torch.ones(6, 15), torch.zeros(6, 5)], dim=1)
    padded = StateStatistics.empty(mixer)
    padded.update(mixer, longer, mask)
    expected, ours = refit(mixer, statistics), refit(mixer, padded)
    assert expected.method == ours.method
    torch.testing.assert_close(ours.matrix, expected.matrix, rtol=1e-3, atol=1e-4)
    assert ours.relative_error == pytest.approx(expected.relative_error, rel=1e-3)


@pytest.mark.parametrize("steps", [0, 10])
@pytest.mark.parametrize("seed", range(3))
def test_the_reported_error_is_that_of_the_layer_after_the_cut(steps, seed):
    model = lively(TINY["mamba"].build(seed, state_size=SIZE), seed)
    statistics = measure(model, [tokens(6, 24, seed)])
    before = {name: naive(mixer, statistics[name]) for name, mixer in find_mixers(model).items()}
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=3, refit_steps=steps))
    compress_(model, plan)
    for name, run in before.items():
        after = naive(find_mixers(model)[name], statistics[name])
        error = (run.weight * (run.y - after.y) ** 2).sum()
        energy = (run.weight * run.y**2).sum()
        assert plan.layers[name].relative_error == pytest.approx((error / energy) ** 0.5, rel=1e-3)


def test_the_penalty_draws_the_fit_to_the_mean_field():
    mixer, statistics = layer()
    start = refit(mixer, statistics, steps=0).matrix
    near, far = ((refit(mixer, statistics, steps=1, penalty=penalty).matrix - start).norm() for penalty in (1e6, 1e-6))
    assert near < 1e-3 * far


def test_the_refit_touches_nothing():
    mixer, statistics = layer()
    weights = {name: value.clone() for name, value in mixer.module.state_dict().items()}
    sums, state = [tensor.clone() for tensor in statistics.sums], torch.get_rng_state()
    refit(mixer, statistics)
    assert all(torch.equal(value, weights[name]) for name, value in mixer.module.state_dict().items())
    assert all(torch.equal(tensor, before) for tensor, before in zip(statistics.sums, sums, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
