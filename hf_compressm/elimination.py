"""Backward elimination: which states to remove when the readout of the others may make up for them."""

from __future__ import annotations

import torch

RIDGE = 1e-8


def eliminate(
    state_gram: torch.Tensor, readout_gram: torch.Tensor, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove states one by one, each time refitting the readout of those left in the mean field.

    In the mean field the readouts C_t are independent of the states. The best readout of the kept states S that makes
    up for the removed ones R is C_S + H̄_SS⁻¹ H̄_SR C_R, and the error that remains grows with every removed state j by

        (T_jᵀ Ω T_j) / R_jj,     then  T_i ← T_i − T_j R_ji / R_jj,   R ← R_{−j,−j} − R_{−j,j} R_{j,−j} / R_jj,

    where R = H̄⁻¹ (of the states left) and C' = T C is their present readout. Greedily, j is the cheapest state left:
    pivoted backward elimination. The increments add up to the error of the joint optimum, step by step.

    Args:
        state_gram: H̄ = Σ w h hᵀ, shape (N, N).
        readout_gram: Ω = Σ_t C_t C_tᵀ, shape (N, N).
        order: remove the states in this order, shape (N,); None: the cheapest first.

    Returns:
        The states in the order of their removal, shape (N,), and the squared error relative to the whole output's
        energy tr(H̄ Ω) after 1, 2, …, N removals, shape (N,). Both float64 or int64, on the CPU.

    Example:
        >>> removed, error = eliminate(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2))
        >>> removed.tolist(), error.round(decimals=4).tolist()
        ([0, 1], [0.25, 1.0])
    """
    H, omega = state_gram.double().cpu(), readout_gram.double().cpu()
    size = len(H)
    energy = (H * omega).sum()
    # A layer that passes nothing on has H̄ = 0: any ridge will do, and no removal is an error.
    ridge = RIDGE * (H.diagonal().mean() or 1.0)
    inverse = torch.linalg.inv(H + ridge * torch.eye(size, dtype=H.dtype))
    readout = torch.eye(size, dtype=H.dtype)
    left = torch.ones(size, dtype=torch.bool)
    removed = torch.empty(size, dtype=torch.int64)
    increments = torch.empty(size, dtype=H.dtype)
    for step in range(size):
        # R's rows and columns of removed states are zero from here on, so the same updates serve all sizes.
        pivots = inverse.diagonal()
        costs = ((readout @ omega) * readout).sum(1) / pivots.where(left, 1.0)
        state = int(costs.where(left, torch.inf).argmin() if order is None else order[step])
        removed[step], increments[step] = state, costs[state]
        column = inverse[:, state] / pivots[state]
        readout -= torch.outer(column, readout[state].clone())
        inverse -= torch.outer(column, inverse[state].clone())
        left[state] = False
        readout[state] = 0
        inverse[state], inverse[:, state] = 0, 0
    # The ridge makes the last sums a little too large or too small; a share of the energy lies between 0 and 1.
    error = increments.clamp_min(0).cumsum(0)
    error = (error / energy).clamp(max=1) if energy > 0 else torch.zeros_like(error)
    error[-1] = 1
    return removed, error
