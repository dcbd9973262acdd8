"""Backward elimination against brute force: the best readout of the states left, solved anew by scipy each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import lstsq

from hf_compressm.elimination import eliminate


def random_grams(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two Gram matrices of correlated data."""
    generator = np.random.default_rng(seed)
    grams = []
    for _ in range(2):
        data = generator.normal(size=(3 * size, size)) @ generator.normal(size=(size, size))
        grams.append(data.T @ data)
    return grams[0], grams[1]


def best_mean_field_error(H: np.ndarray, omega: np.ndarray, kept: list[int]) -> float:
    """min over M of E[(Σ_n C_n h_n − Σ_s (M C)_s h_s)²], for C and h independent with second moments Ω and H̄.

    It is ‖Lᵀ (I − P M) Q‖² with H̄ = L Lᵀ, Ω = Q Qᵀ and P the columns of the identity that are kept: linear least
    squares in the entries of M.
    """
    size = len(H)
    L, Q = np.linalg.cholesky(H), np.linalg.cholesky(omega)
    target = (L.T @ Q).ravel()
    if not kept:
        return float(target @ target)
    system = np.kron(L.T @ np.eye(size)[:, kept], Q.T)
    M = lstsq(system, target)[0]
    return float(((target - system @ M) ** 2).sum())


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_each_step_removes_the_cheapest_state_at_the_optimal_cost(size, seed):
    H, omega = random_grams(size, seed)
    energy = np.trace(H @ omega)
    removed, error = eliminate(torch.tensor(H), torch.tensor(omega))
    left = list(range(size))
    for step in range(size):
        costs = {state: best_mean_field_error(H, omega, [other for other in left if other != state]) for state in left}
        assert removed[step] == min(costs, key=costs.get)
        assert error[step].item() == pytest.approx(min(costs.values()) / energy, rel=1e-5, abs=1e-7)
        left.remove(int(removed[step]))


@pytest.mark.parametrize("seed", range(3))
def test_a_given_order_is_followed_at_the_optimal_cost(seed):
    H, omega = random_grams(5, seed)
    order = np.random.default_rng(seed).permutation(5)
    removed, error = eliminate(torch.tensor(H), torch.tensor(omega), torch.tensor(order))
    assert removed.tolist() == order.tolist()
    for step in range(5):
        kept = sorted(order[step + 1 :].tolist())
        optimum = best_mean_field_error(H, omega, kept) / np.trace(H @ omega)
        assert error[step].item() == pytest.approx(optimum, rel=1e-5, abs=1e-7)


def test_zero_states_go_first_and_cost_nothing():
    H, omega = random_grams(6, 0)
    zero = [1, 4]
    H[zero], H[:, zero] = 0, 0
    removed, error = eliminate(torch.tensor(H), torch.tensor(omega))
    assert sorted(removed[:2].tolist()) == zero
    assert error[1] < 1e-7 < error[2]


def test_states_that_nobody_reads_cost_nothing():
    H, omega = random_grams(6, 0)
    silent = [0, 3]
    omega[silent], omega[:, silent] = 0, 0
    _, error = eliminate(torch.tensor(H), torch.tensor(omega), torch.tensor([0, 3, 1, 2, 4, 5]))
    assert error[1] < 1e-12 < error[2]


def test_a_copy_of_a_state_costs_nothing():
    generator = np.random.default_rng(0)
    data = generator.normal(size=(30, 4))
    data = np.concatenate([data, 2 * data[:, :1]], axis=1)
    _, omega = random_grams(5, 0)
    removed, error = eliminate(torch.tensor(data.T @ data), torch.tensor(omega))
    assert removed[0] in (0, 4)
    assert error[0] < 1e-7 < error[1]


def test_error_rises_from_a_share_to_the_whole():
    H, omega = random_grams(8, 1)
    _, error = eliminate(torch.tensor(H), torch.tensor(omega))
    assert (error.diff() >= 0).all() and error[0] > 0 and error[-1] == 1


@pytest.mark.parametrize("silent", ["states", "readouts", "both"])
def test_a_layer_that_passes_nothing_on_loses_nothing(silent):
    H, omega = (torch.tensor(gram) for gram in random_grams(4, 0))
    if silent != "readouts":
        H.zero_()
    if silent != "states":
        omega.zero_()
    removed, error = eliminate(H, omega)
    assert sorted(removed.tolist()) == [0, 1, 2, 3]
    assert error.tolist() == [0, 0, 0, 1]


def test_float32_grams_are_factored_in_float64():
    H, omega = (torch.tensor(gram) for gram in random_grams(6, 3))
    removed, error = eliminate(H.float(), omega.float())
    assert removed.dtype == torch.int64 and error.dtype == torch.float64
    torch.testing.assert_close(error, eliminate(H, omega)[1], rtol=1e-3, atol=1e-6)


def test_inputs_are_not_written_to():
    H, omega = (torch.tensor(gram) for gram in random_grams(4, 2))
    before = H.clone(), omega.clone()
    eliminate(H, omega)
    assert torch.equal(H, before[0]) and torch.equal(omega, before[1])
