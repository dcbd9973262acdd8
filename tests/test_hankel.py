"""Gramians and balanced truncation, against scipy's Lyapunov solver, the control package and frequency responses."""

from __future__ import annotations

import control
import numpy as np
import pytest
import scipy.linalg
import torch

from hf_compressm.hankel import balance, error_bound, gramians, hankel_values, square_root_factor, truncate

SEEDS = range(3)
KINDS = ["real", "complex"]


def system(kind: str, seed: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stable diagonal system with two inputs and three outputs."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        real, imaginary = generator.normal(size=(2, *shape))
        return real + 1j * imaginary if kind == "complex" else real

    a = normal(size)
    a = a / np.abs(a) * generator.uniform(0.1, 0.97, size)
    return tuple(torch.from_numpy(array) for array in (a, normal(size, 2), normal(3, size)))


def gram(kind: str, rank: int, size: int = 6, seed: int = 0) -> torch.Tensor:
    """A positive semidefinite matrix of a given rank."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if kind == "complex" else torch.float64
    factor = torch.randn(size, rank, generator=generator, dtype=dtype)
    return factor @ factor.mH


def response(A: np.ndarray, B: np.ndarray, C: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """C (z − A)⁻¹ B on the unit circle."""
    identity = np.eye(len(A))
    return np.stack([C @ np.linalg.solve(np.exp(1j * w) * identity - A, B) for w in frequencies])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gramians_solve_the_lyapunov_equations(kind, seed):
    a, B, C = system(kind, seed)
    P, Q = gramians(a, B, C)
    A, B, C = np.diag(a.numpy()), B.numpy(), C.numpy()
    np.testing.assert_allclose(P.numpy(), scipy.linalg.solve_discrete_lyapunov(A, B @ B.conj().T), rtol=1e-9)
    np.testing.assert_allclose(Q.numpy(), scipy.linalg.solve_discrete_lyapunov(A.conj().T, C.conj().T @ C), rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_hankel_values_are_the_roots_of_the_eigenvalues_of_the_product(kind, seed):
    a, B, C = system(kind, seed)
    values = hankel_values(a, B, C)
    P, Q = (gramian.numpy() for gramian in gramians(a, B, C))
    expected = np.sort(np.sqrt(np.abs(scipy.linalg.eigvals(P @ Q))))[::-1]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6, atol=1e-9 * expected[0])
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_hankel_values_are_those_of_the_hankel_operator(kind, seed):
    a, B, C = system(kind, seed)
    # The map from past inputs to future outputs has the blocks C Aⁱ⁺ʲ B.
    markov = [(C * a**t) @ B for t in range(1200)]
    hankel = torch.cat([torch.cat(markov[row : row + 600], dim=1) for row in range(0, 600)])
    expected = torch.linalg.eigvalsh(hankel.mH @ hankel).flip(0)[: len(a)].clamp_min(0).sqrt()
    torch.testing.assert_close(hankel_values(a, B, C), expected, rtol=1e-6, atol=1e-6 * expected[0].item())


def discrete(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> control.StateSpace:
    return control.ss(A.numpy(), B.numpy(), C.numpy(), np.zeros((len(C), B.shape[1])), True)


@pytest.mark.parametrize("seed", SEEDS)
def test_control_package_identifies_the_same_system_from_its_impulse_response(seed):
    a, B, C = system("real", seed)
    full = discrete(a.diag(), B, C)
    # Ho and Kalman's realization of a long impulse response: balanced, and found without any Gramian.
    markov = [np.zeros((3, 2)), *(full.C @ np.diag(a.numpy() ** t) @ full.B for t in range(1000))]
    values = hankel_values(a, B, C)
    for rank in (1, 3):
        realized, singular = control.eigensys_realization(np.stack(markov, -1), rank, m=500, n=500)
        np.testing.assert_allclose(values.numpy(), singular[:6], rtol=1e-6)
        ours = discrete(*truncate(a, B, C, rank))
        grid = np.linspace(0, np.pi, 50)
        np.testing.assert_allclose(
            ours(np.exp(1j * grid)), realized(np.exp(1j * grid)), rtol=1e-6, atol=1e-6 * float(values[0])
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_control_package_finds_the_error_within_the_bound(seed):
    a, B, C = system("real", seed)
    # Its norm is right only for as many outputs as inputs, and for errors that are not tiny beside the system: it
    # compares eigenvalues with an absolute tolerance. The test below takes all ranks, on a grid.
    C = C[:2]
    values = hankel_values(a, B, C)
    for rank in range(1, 5):
        error = discrete(a.diag(), B, C) - discrete(*truncate(a, B, C, rank))
        norm = control.system_norm(error, p="inf", tol=1e-6)
        assert values[rank] * (1 - 1e-4) <= norm <= error_bound(values, rank) * (1 + 1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_frequency_breaks_the_error_bound(kind, seed):
    a, B, C = system(kind, seed)
    values = hankel_values(a, B, C)
    # Poles lie as near as 0.03 to the circle: the grid is ten times as fine.
    grid = np.linspace(-np.pi, np.pi, 2001)
    full = response(np.diag(a.numpy()), B.numpy(), C.numpy(), grid)
    for rank in range(1, len(a) + 1):
        reduced = response(*(matrix.numpy() for matrix in truncate(a, B, C, rank)), grid)
        norm = np.linalg.norm(full - reduced, ord=2, axis=(1, 2)).max()
        assert norm <= float(error_bound(values, rank)) + 1e-9 * float(values[0])
        # No system of this order is nearer than the next Hankel value.
        if rank < len(a):
            assert norm >= float(values[rank]) * 0.99


def test_keeping_all_states_keeps_the_response_and_no_state_bounds_it_all():
    a, B, C = system("complex", 0)
    values = hankel_values(a, B, C)
    assert error_bound(values, 6) == 0
    assert error_bound(values, 0).item() == pytest.approx(2 * values.sum().item())


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_system_is_stable_and_balanced(kind):
    a, B, C = system(kind, 1)
    values = hankel_values(a, B, C)
    # In discrete time, the Gramians of the reduced system are only bounded by the part of σ that stays.
    A, B, C = (matrix.numpy() for matrix in truncate(a, B, C, 6))
    P = scipy.linalg.solve_discrete_lyapunov(A, B @ B.conj().T)
    Q = scipy.linalg.solve_discrete_lyapunov(A.conj().T, C.conj().T @ C)
    for gramian in (P, Q):
        np.testing.assert_allclose(gramian, np.diag(values.numpy()), atol=1e-8 * float(values[0]))
    for rank in range(1, 6):
        A, _, _ = truncate(*system(kind, 1), rank)
        assert torch.linalg.eigvals(A).abs().max() < 1


@pytest.mark.parametrize("ranks", [(6, 6), (4, 6), (6, 3), (2, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_projection_balances_gramians_of_any_rank(kind, ranks):
    P, Q = gram(kind, ranks[0]), gram(kind, ranks[1], seed=1)
    balanced = balance(P, Q)
    values = balanced.singular_values
    found = min(ranks)
    assert balanced.numerical_rank == found
    assert (values[found:] <= 1e-12 * values[0]).all()
    expected = np.sort(np.abs(scipy.linalg.eigvals((P @ Q).numpy())))[::-1]
    np.testing.assert_allclose(values.square().numpy(), expected, rtol=1e-7, atol=1e-10 * expected[0])
    for rank in range(1, found + 1):
        W, V = balanced.projection(rank)
        assert W.shape == V.shape == (6, rank)
        diagonal = values[:rank].diag().to(P.dtype)
        torch.testing.assert_close(W.mH @ V, torch.eye(rank, dtype=P.dtype), rtol=0, atol=1e-9)
        torch.testing.assert_close(W.mH @ P @ W, diagonal, rtol=0, atol=1e-9 * values[0].item())
        torch.testing.assert_close(V.mH @ Q @ V, diagonal, rtol=0, atol=1e-9 * values[0].item())
    assert (balanced.W[:, found:] == 0).all() and (balanced.V[:, found:] == 0).all()


@pytest.mark.parametrize("rank", range(1, 6))
@pytest.mark.parametrize("kind", KINDS)
def test_no_other_matrix_of_that_rank_is_cheaper_in_the_mean_field(kind, rank):
    P, Q = gram(kind, 6), gram(kind, 6, seed=1)
    balanced = balance(P, Q)
    W, V = balanced.projection(rank)
    left = torch.eye(6, dtype=P.dtype) - V @ W.mH
    error = torch.einsum("ij,ji->", left.mH @ Q, left @ P).real
    torch.testing.assert_close(error, balanced.singular_values[rank:].square().sum(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("rank", range(7))
@pytest.mark.parametrize("kind", KINDS)
def test_square_root_factors_survive_a_deficient_rank(kind, rank):
    gramian = gram(kind, rank)
    factor = square_root_factor(gramian)
    torch.testing.assert_close(factor @ factor.mH, gramian, rtol=0, atol=1e-12)
    assert (factor.abs().sum(0) > 0).sum() == rank


def test_batches_are_balanced_one_by_one():
    P, Q = (torch.stack([gram("real", rank, seed=seed + rank) for rank in (6, 3, 0)]) for seed in (0, 10))
    together = balance(P, Q)
    assert together.numerical_rank.tolist() == [6, 3, 0]
    for number in range(3):
        alone = balance(P[number], Q[number])
        torch.testing.assert_close(together.singular_values[number], alone.singular_values, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            together.W[number] @ together.V[number].mH, alone.W @ alone.V.mH, rtol=1e-6, atol=1e-8
        )


def test_gramians_of_float32_are_balanced_in_float64():
    P, Q = gram("real", 6).float(), gram("real", 6, seed=1).float()
    balanced, wide = balance(P, Q), balance(P.double(), Q.double())
    assert balanced.W.dtype == torch.float64
    assert torch.equal(balanced.singular_values, wide.singular_values)
    assert balance(P, Q.to(torch.complex64)).W.dtype == torch.complex128


def test_gramians_are_left_as_they_are():
    P, Q = gram("real", 3), gram("real", 6, seed=1)
    before = P.clone(), Q.clone()
    balance(P, Q)
    assert torch.equal(P, before[0]) and torch.equal(Q, before[1])


@pytest.mark.parametrize("zero", ["P", "Q", "both"])
def test_zero_gramians_have_no_hankel_values(zero):
    P = gram("real", 6) * (zero == "Q")
    Q = gram("real", 6) * (zero == "P")
    balanced = balance(P, Q)
    assert torch.equal(balanced.singular_values, torch.zeros(6, dtype=torch.float64))
    assert balanced.numerical_rank == 0
    assert not balanced.W.any() and not balanced.V.any()
    with pytest.raises(ValueError, match="rank 1 is above the numerical rank 0"):
        balanced.projection(1)


def test_states_that_are_not_read_cost_nothing():
    a, B, C = system("real", 0)
    C[:, [1, 4]] = 0
    assert balance(*gramians(a, B, C)).numerical_rank == 4
    A, B_r, C_r = truncate(a, B, C, 4)
    for t in range(20):
        torch.testing.assert_close(C_r @ torch.linalg.matrix_power(A, t) @ B_r, (C * a**t) @ B, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_ranks_out_of_range_are_refused(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is out of range; choose 1\.\.6"):
        truncate(*system("real", 0), rank)


@pytest.mark.parametrize("rank", [-1, 7])
def test_bounds_of_ranks_out_of_range_are_refused(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is out of range; choose 0\.\.6"):
        error_bound(torch.ones(6), rank)


def test_ranks_above_the_numerical_rank_are_refused():
    with pytest.raises(ValueError, match=r"rank 4 is above the numerical rank 3 of the Gramians; choose 1\.\.3"):
        balance(gram("real", 6), gram("real", 3, seed=1)).projection(4)
    batch = torch.stack([gram("real", 6), gram("real", 2)])
    with pytest.raises(ValueError, match="rank 3 is above the numerical rank 2"):
        balance(batch, batch).projection(3)


@pytest.mark.parametrize("value", [1.0, -1.0, 1.25, float("inf"), float("nan"), 0.6 + 0.8j])
def test_unstable_systems_are_refused(value):
    a = torch.tensor([0.5, value])
    with pytest.raises(ValueError, match=rf"unstable: \|a\[1\]\| = {abs(value):.6g} is not below 1"):
        gramians(a, torch.ones(2, 1), torch.ones(1, 2))


@pytest.mark.parametrize("shapes", [((2, 2), (2, 1), (1, 2)), ((2,), (3, 1), (1, 2)), ((2,), (2, 1), (2, 1))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match=r"must have shapes \(N,\), \(N, m\) and \(p, N\), got"):
        gramians(*(torch.zeros(shape) for shape in shapes))


def test_bad_gramians_are_refused():
    good = torch.eye(3)
    with pytest.raises(ValueError, match=r"P must have shape \(\.\.\., N, N\), got \(3, 2\)"):
        balance(torch.zeros(3, 2), good)
    with pytest.raises(ValueError, match=r"Q must have shape \(\.\.\., N, N\), got \(3,\)"):
        balance(good, torch.zeros(3))
    with pytest.raises(ValueError, match=r"the same shape, got \(3, 3\) and \(2, 2\)"):
        balance(good, torch.eye(2))
    with pytest.raises(ValueError, match="Q holds NaN or infinity"):
        balance(good, good * float("nan"))
    with pytest.raises(ValueError, match="B or C holds NaN or infinity"):
        gramians(torch.zeros(1), torch.full((1, 1), float("inf")), torch.zeros(1, 1))
