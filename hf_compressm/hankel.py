"""Gramians, Hankel singular values and balanced truncation.

The systems are diagonal, linear, time-invariant, in discrete time, real or complex:

    x_{t+1} = diag(a) x_t + B u_t,   y_t = C x_t,   |a_i| < 1,   a of shape (N,), B (N, m), C (p, N).

`balance` takes any pair of Gramians, also measured ones. After A. C. Antoulas, Approximation of Large-Scale Dynamical
Systems, SIAM 2005, chapter 7; CompreSSM (arXiv 2510.02823), section 2, truncates state space layers in this way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Balanced:
    """A pair of Gramians (P, Q), in balanced coordinates: Wᴴ P W = Vᴴ Q V = diag σ, and Wᴴ V is a unit matrix.

    Attributes:
        singular_values: the Hankel singular values σ in falling order, shape (..., N).
        W, V: all columns of the projections, shape (..., N, N); those beyond the numerical rank are zero.
    """

    singular_values: torch.Tensor
    W: torch.Tensor
    V: torch.Tensor

    @property
    def numerical_rank(self) -> torch.Tensor:
        """The number of σ that rounding does not explain, shape (...): σ_i > N ε σ_1."""
        return (self.singular_values > _rounding(self.singular_values)).sum(-1)

    def projection(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """W_r and V_r, each of shape (..., N, r): the states W_rᴴ x stay, and x is read back as V_r W_rᴴ x.

        Raises:
            ValueError: rank is not in 1..N, or above the numerical rank, where no such projection exists.

        Example:
            >>> W, V = balance(torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2)).projection(1)
            >>> (W.mH @ V).round(decimals=6).tolist()
            [[1.0]]
        """
        size, found = self.singular_values.shape[-1], int(self.numerical_rank.min())
        if not 1 <= rank <= size:
            raise ValueError(f"rank {rank} is out of range; choose 1..{size}")
        if rank > found:
            raise ValueError(f"rank {rank} is above the numerical rank {found} of the Gramians; choose 1..{found}")
        return self.W[..., :rank], self.V[..., :rank]


def balance(P: torch.Tensor, Q: torch.Tensor) -> Balanced:
    """Balance a pair of Gramians by the square-root method (Antoulas 2005, section 7.4).

    With P = L_p L_pᴴ, Q = L_q L_qᴴ and the singular value decomposition L_qᴴ L_p = U Σ Zᴴ,

        W = L_q U Σ^{-1/2},   V = L_p Z Σ^{-1/2}.

    Args:
        P, Q: hermitian and positive semidefinite, of any rank, shape (..., N, N).

    Returns:
        The balanced coordinates, float64 or complex128, on the CPU.

    Raises:
        ValueError: matrices that are not square, not finite or not of the same shape.

    Example:
        >>> balance(torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2)).singular_values.tolist()
        [2.0, 1.0]
    """
    P, Q = _wide(P), _wide(Q)
    for name, gramian in (("P", P), ("Q", Q)):
        if gramian.dim() < 2 or gramian.shape[-1] != gramian.shape[-2] or gramian.shape[-1] == 0:
            raise ValueError(f"{name} must have shape (..., N, N), got {tuple(gramian.shape)}")
        if not torch.isfinite(gramian).all():
            raise ValueError(f"{name} holds NaN or infinity")
    if P.shape != Q.shape:
        raise ValueError(f"P and Q must have the same shape, got {tuple(P.shape)} and {tuple(Q.shape)}")
    dtype = torch.promote_types(P.dtype, Q.dtype)
    left, right = square_root_factor(P.to(dtype)), square_root_factor(Q.to(dtype))
    U, values, Zh = torch.linalg.svd(right.mH @ left)
    # Where σ is zero to rounding, its inverse root would blow rounding errors up.
    scale = torch.where(values > _rounding(values), values.rsqrt(), 0)[..., None, :]
    return Balanced(values, right @ U * scale, left @ Zh.mH * scale)


def square_root_factor(gramian: torch.Tensor) -> torch.Tensor:
    """L with L Lᴴ = the Gramian, by its eigenvalues: unlike Cholesky's factor, it exists for any rank.

    Example:
        >>> square_root_factor(torch.zeros(2, 2)).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """
    eigenvalues, vectors = torch.linalg.eigh(gramian)
    # The root of a rounding error ε is √ε: it would hide that the rank is deficient.
    eigenvalues = torch.where(eigenvalues > _rounding(eigenvalues.flip(-1)), eigenvalues, 0)
    return vectors * eigenvalues.sqrt()[..., None, :]


def gramians(a: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P_ij = (B Bᴴ)_ij / (1 − a_i a_j*) and Q_ij = (Cᴴ C)_ij / (1 − a_i* a_j), each of shape (N, N).

    They solve A P Aᴴ − P + B Bᴴ = 0 and Aᴴ Q A − Q + Cᴴ C = 0 with A = diag(a) (Antoulas 2005, section 4.3).

    Raises:
        ValueError: shapes that do not fit, or an unstable system.

    Example:
        >>> P, Q = gramians(torch.tensor([0.5]), torch.tensor([[3.0]]), torch.tensor([[1.0]]))
        >>> P.item(), round(Q.item(), 4)
        (12.0, 1.3333)
    """
    a, B, C = _wide(a), _wide(B), _wide(C)
    if a.dim() != 1 or B.dim() != 2 or C.dim() != 2 or B.shape[0] != len(a) or C.shape[1] != len(a):
        raise ValueError(
            f"a, B and C must have shapes (N,), (N, m) and (p, N), got {tuple(a.shape)}, {tuple(B.shape)} and "
            f"{tuple(C.shape)}"
        )
    unstable = ~(a.abs() < 1)
    if unstable.any():
        state = int(unstable.nonzero()[0])
        raise ValueError(f"the system is unstable: |a[{state}]| = {a[state].abs():.6g} is not below 1")
    if not (torch.isfinite(B).all() and torch.isfinite(C).all()):
        raise ValueError("B or C holds NaN or infinity")
    gap = 1 - a[:, None] * a.conj()[None, :]
    return B @ B.mH / gap, C.mH @ C / gap.conj()


def hankel_values(a: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """The Hankel singular values σ = √eig(P Q) of a diagonal system, in falling order, shape (N,).

    Example:
        >>> round(hankel_values(torch.tensor([0.5]), torch.tensor([[3.0]]), torch.tensor([[1.0]])).item(), 6)
        4.0
    """
    return balance(*gramians(a, B, C)).singular_values


def truncate(
    a: torch.Tensor, B: torch.Tensor, C: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balanced truncation: A_r = Wᴴ diag(a) V of shape (r, r), B_r = Wᴴ B, C_r = C V (Antoulas 2005, section 7.2).

    Raises:
        ValueError: as `gramians`, or a rank that is not in 1..N or above the numerical rank.

    Example:
        >>> A, B, C = truncate(torch.tensor([0.9, 0.1]), torch.ones(2, 1), torch.tensor([[1.0, 0.0]]), rank=1)
        >>> round(A.item(), 4), round((C @ B).item(), 4)
        (0.9, 1.0)
    """
    W, V = balance(*gramians(a, B, C)).projection(rank)
    a, B, C = (_wide(tensor).to(W.dtype) for tensor in (a, B, C))
    return W.mH @ (a[:, None] * V), W.mH @ B, C @ V


def error_bound(singular_values: torch.Tensor, rank: int) -> torch.Tensor:
    """‖G − G_r‖∞ ≤ 2 Σ_{i>r} σ_i, the bound on what balanced truncation costs at any frequency, shape (...).

    For discrete time see Antoulas 2005, section 7.2.2.

    Example:
        >>> error_bound(torch.tensor([4.0, 1.0, 0.5]), 1).item()
        3.0
    """
    size = singular_values.shape[-1]
    if not 0 <= rank <= size:
        raise ValueError(f"rank {rank} is out of range; choose 0..{size}")
    return 2 * singular_values[..., rank:].sum(-1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _rounding(falling: torch.Tensor) -> torch.Tensor:
    """How large a value may be by rounding alone: N ε times the largest."""
    return falling.shape[-1] * torch.finfo(falling.dtype).eps * falling[..., :1]
