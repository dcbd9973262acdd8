"""The scores that states are ranked by: each a few lines, with its formula and source. The largest are kept.

Add your own with the decorator; its name can then be used in `CompreSSMConfig(criterion=...)`:

    >>> @criterion("slowest")
    ... def slowest(statistics, seed):
    ...     return statistics.A.mean(dim=1)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .elimination import eliminate
from .hankel import balance
from .statistics import StateStatistics

Criterion = Callable[[StateStatistics, int], torch.Tensor]
CRITERIA: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a function (statistics, seed) → scores of shape (groups, N) under a name."""

    def register(function: Criterion) -> Criterion:
        CRITERIA[name] = function
        return function

    return register


@criterion("refit")
def refit(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """Pivoted backward elimination: the score is the step at which a state is removed. Made for the refit of C."""
    scores = torch.empty(statistics.groups, statistics.state_size, dtype=torch.float64)
    for group, (H, omega) in enumerate(zip(statistics.state_gram, statistics.readout_gram, strict=True)):
        removed, _ = eliminate(H, omega)
        scores[group, removed] = torch.arange(len(removed), dtype=torch.float64)
    return scores


@criterion("ghost")
def ghost(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """GHOST (arXiv 2602.11408): the energy that a state alone puts into the output, K_nn = Σ w (C_n h_n)²."""
    return statistics.contribution_gram.diagonal(dim1=-2, dim2=-1).double().cpu()


@criterion("hankel")
def hankel(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """CompreSSM's mean-LTI surrogate (arXiv 2510.02823, section 4): the Hankel value of each state on its own.

    With a = exp(Δ̄ A), b = Δ̄ B̄, c = C̄ averaged over tokens, σ_n = √(P_nn Q_nn) = |b_n c_n| / (1 − a_n²).
    """
    P, Q = mean_lti_gramians(statistics)
    return (P.diagonal(dim1=-2, dim2=-1) * Q.diagonal(dim1=-2, dim2=-1)).sqrt()


@criterion("empirical")
def empirical(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """The Hankel value of each state on its own, of the empirical, time-varying Gramians: √(H̄_nn Ω_nn).

    H̄ = Σ w h hᵀ is what the inputs reach, Ω = Σ C Cᵀ what the same tokens read out. Empirical Gramians are due to
    Lall, Marsden and Glavaški (IFAC 1999). Unlike `ghost`, it takes states and readouts as independent.
    """
    H, omega = (gram.diagonal(dim1=-2, dim2=-1) for gram in (statistics.state_gram, statistics.readout_gram))
    return (H.double() * omega.double()).sqrt().cpu()


@criterion("last")
def last(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """LAST (arXiv 2411.02824): the squared H∞ norm of each state alone, b² c² / (1 − |a|)², of the mean-LTI surrogate.

    Averaged over channels, then divided by the sum of it and all larger ones.
    """
    delta, B, C, rates = _mean_inputs(statistics)
    gap = -torch.expm1(delta[..., None] * rates)
    return _share_of_prefix((delta[..., None] / gap).square().mean(1) * (B * C).square())


@criterion("aire")
def aire(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """AIRE-Prune (arXiv 2602.00534): the energy of each state's impulse response, b² c² / (1 − |a|²).

    Of the mean-LTI surrogate, averaged over channels, and normalised as in `last`.
    """
    delta, B, C, rates = _mean_inputs(statistics)
    gap = -torch.expm1(2 * delta[..., None] * rates)
    return _share_of_prefix((delta[..., None].square() / gap).mean(1) * (B * C).square())


@criterion("sparsessm")
def sparsessm(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """SparseSSM (arXiv 2506.09613, theorem 1): the second-order importance of A_log, Σ_d A_log[d,n]² Σ_t h_t[d,n]².

    Where A is one number per head (Mamba-2), it stands for each of the head's states.
    """
    A_log = (-statistics.A.double().cpu()).log()
    return (A_log.square() * statistics.state_energy.double().cpu()).sum(1)


@criterion("taylor")
def taylor(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """First-order Taylor importance (arXiv 1906.10771), |m ∂E/∂m| of a gate m_n = 1 on each state: |Σ_m K_nm|.

    No gradient of the training loss is at hand: E = Σ w (Σ_n m_n C_n h_n)² / 2, the energy that the layer passes on.
    """
    return statistics.contribution_gram.double().sum(-1).abs().cpu()


@criterion("magnitude")
def magnitude(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """‖W_B[n]‖ ‖W_C[n]‖: the size of the parameters that write a state and read it; no data."""
    return (statistics.B_norm * statistics.C_norm).double().cpu()


@criterion("random")
def random(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """A random choice: the control that any criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(statistics.groups, statistics.state_size, generator=generator, dtype=torch.float64)


@criterion("smallest")
def smallest(statistics: StateStatistics, seed: int) -> torch.Tensor:
    """Keeps what `hankel` would remove: the control of CompreSSM's ablation that shows that the ranking matters."""
    return -hankel(statistics, seed)


def mean_lti_gramians(statistics: StateStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Gramians of the time-invariant system that a layer is on average, averaged over its channels.

    P_ij = b_i b_j / (1 − a_i a_j) and Q_ij = c_i c_j / (1 − a_i a_j), with a = exp(Δ̄ A), b = Δ̄ B̄, c = C̄
    (CompreSSM, arXiv 2510.02823, sections 2 and 4, for diagonal systems in discrete time).

    Returns:
        P and Q, shape (groups, N, N), float64, on the CPU.
    """
    delta, B, C, rates = _mean_inputs(statistics)
    P = torch.einsum("gm,gn->gmn", B, B)
    Q = torch.einsum("gm,gn->gmn", C, C)
    for group, (group_delta, group_rates) in enumerate(zip(delta, rates, strict=True)):
        mean_gap, mean_driven_gap = torch.zeros_like(P[group]), torch.zeros_like(P[group])
        # Channel by channel: all at once would be (channels, N, N).
        for channel_delta, channel_rates in zip(group_delta, group_rates, strict=True):
            exponent = channel_delta * channel_rates
            inverse_gap = -1 / torch.expm1(exponent[:, None] + exponent[None, :])
            mean_gap += inverse_gap / len(group_delta)
            mean_driven_gap += channel_delta.square() * inverse_gap / len(group_delta)
        P[group] *= mean_driven_gap
        Q[group] *= mean_gap
    return P, Q


def hankel_singular_values(statistics: StateStatistics) -> torch.Tensor:
    """σ = √eig(P Q) of the mean-LTI surrogate, in falling order, shape (groups, N), float64."""
    return balance(*mean_lti_gramians(statistics)).singular_values


def _mean_inputs(statistics: StateStatistics) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Δ̄ of shape (groups, channels), B̄ and C̄ of shape (groups, N), and A of shape (groups, channels, N)."""
    tokens = statistics.tokens.double().cpu()
    delta, B, C = (
        total.double().cpu() / tokens for total in (statistics.delta_sum, statistics.B_sum, statistics.C_sum)
    )
    return delta, B, C, statistics.A.double().cpu().expand(-1, -1, statistics.state_size)


def _share_of_prefix(scores: torch.Tensor) -> torch.Tensor:
    """Each score over the sum of it and all larger ones: keeps a layer's order, and makes layers comparable."""
    falling, order = scores.sort(dim=-1, descending=True, stable=True)
    shares = falling / falling.cumsum(-1).clamp_min(torch.finfo(scores.dtype).tiny)
    return torch.empty_like(scores).scatter_(-1, order, shares)
