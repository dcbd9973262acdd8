"""Closed-form refit: new readout rows C' = M C for the kept states, so that they make up for the removed ones.

It minimises the squared error of what the layer passes on, over the calibration tokens t and channels d,

    Σ w_t[d] (y_t[d] − Σ_{s∈S} h_t[d,s] (M C_t)_s)²  +  λ tr(diag(H̄_SS) (M−M₀) Ω/T (M−M₀)ᵀ),

by preconditioned conjugate gradients from the mean-field solution M₀. All that it needs of a token is the Gram matrix
G_t = Σ_d w h_S h_Sᵀ (r×r) and p_t = Σ_d w e h_S, with e the error at M₀: the channels are summed away in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .least_squares import conjugate_gradients, with_ridge
from .mixers import Mixer, stream_states
from .statistics import StateStatistics

MEAN_FIELD_RIDGE = 1e-4
MINIMUM_TOKENS = 4096
PRECONDITIONER_RIDGE = 1e-3


@dataclass(frozen=True)
class Readout:
    """A refit's result.

    Attributes:
        matrix: M with C' = M C, shape (r, N), float32, on the CPU.
        relative_error: √(Σ w (y−ŷ)² / Σ w y²) on the calibration tokens. M has few numbers beside tokens × channels
            outputs, so on fresh tokens it is about the same.
        method: `conjugate gradients` or `mean field`.
    """

    matrix: torch.Tensor
    relative_error: float
    method: str


def mean_field_readout(state_gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """M₀: the identity on the kept states and (H̄_SS + ridge)⁻¹ H̄_SR on the removed ones.

    It is the best readout if C_t is independent of the states, and changes nothing if the removed states are zero.

    Args:
        state_gram: H̄, shape (N, N).
        kept: S, the states that stay, shape (r,).

    Returns:
        M₀, shape (r, N), float64, on the CPU.
    """
    H, kept = state_gram.double().cpu(), kept.cpu()
    removed = torch.ones(len(H), dtype=torch.bool)
    removed[kept] = False
    H_SS = with_ridge(H[kept][:, kept], MEAN_FIELD_RIDGE)
    matrix = torch.zeros(len(kept), len(H), dtype=torch.float64)
    matrix[torch.arange(len(kept)), kept] = 1
    matrix[:, removed] = torch.linalg.solve(H_SS, H[kept][:, removed])
    return matrix


def tokens_for_a_fit(kept: int, state_size: int) -> int:
    """Tokens that a cut is decided on unless it is told otherwise: twice the r N numbers of M, at least 4,096."""
    return max(MINIMUM_TOKENS, 2 * kept * state_size)


def fewest_tokens(kept: int, state_size: int) -> float:
    """The fewest tokens for which r N numbers of M are fitted; with fewer, the mean field is the better guess."""
    return kept * state_size / 4


@torch.no_grad()
def refit_readout(
    mixer: Mixer,
    statistics: StateStatistics,
    kept: torch.Tensor,
    *,
    steps: int,
    penalty: float,
) -> Readout:
    """Find the readout of the kept states that best reproduces a layer's output on its recorded inputs.

    Args:
        mixer: a mixer whose layout has a readout axis; it is only read.
        statistics: of this layer, with its recorded inputs.
        kept: the states that stay, shape (r,).
        steps: the most conjugate-gradient steps; with 0, or with too few tokens, the mean field stays.
        penalty: λ.
    """
    start = mean_field_readout(statistics.state_gram[0], kept)
    system = _token_systems(mixer, statistics, kept, start)
    energy, error = system.energy.sum(), system.error.sum()
    change, method = torch.zeros_like(start), "mean field"
    if steps > 0 and statistics.tokens >= fewest_tokens(len(kept), statistics.state_size) and error > 0:
        tokens = statistics.tokens.double().cpu()
        H_SS = statistics.state_gram[0].double().cpu()[kept][:, kept]
        omega = statistics.readout_gram[0].double().cpu() / tokens
        fitted = _fit(system, H_SS, omega, steps, penalty)
        fitted_error = system.error_after(fitted)
        if fitted_error < error:
            change, error, method = fitted.cpu(), fitted_error, "conjugate gradients"
    relative = (error.clamp_min(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt()
    return Readout((start + change).float(), float(relative), method)


@dataclass(frozen=True)
class _TokenSystems:
    """What the fit needs of each token: G (tokens, r, r), p (tokens, r), C (tokens, N), Σ_d w e² at M₀, Σ_d w y²."""

    gram: torch.Tensor
    p: torch.Tensor
    C: torch.Tensor
    error: torch.Tensor
    energy: torch.Tensor

    def error_after(self, change: torch.Tensor) -> torch.Tensor:
        """Σ w (y−ŷ)² with the readout M₀ + change."""
        v = self.C @ change.float().T
        Gv = (self.gram @ v[..., None]).squeeze(-1)
        return (self.error + ((Gv - 2 * self.p) * v).sum(-1)).sum()


def _token_systems(
    mixer: Mixer, statistics: StateStatistics, kept: torch.Tensor, start: torch.Tensor
) -> _TokenSystems:
    device = statistics.state_gram.device
    kept, start = kept.to(device), start.to(device, torch.float32)
    parts = []
    for hidden_states, mask in statistics.inputs:
        hidden_states = hidden_states.to(device)
        with torch.autocast(device.type, enabled=False):
            inputs = mixer.layout.scan_inputs(mixer.module, hidden_states, mask)
            for first, states in stream_states(inputs):
                C = inputs.C[:, first : first + states.shape[0]].transpose(0, 1)[:, :, 0]
                states = states[:, :, 0]
                y = (states @ C[..., None]).squeeze(-1)
                weight = inputs.weight(y[:, :, None], first)[:, :, 0]
                h = states.index_select(-1, kept)
                e = y - (h @ (C @ start.T)[..., None]).squeeze(-1)
                wh = (h * weight[..., None]).transpose(-1, -2)
                part = (
                    wh @ h,
                    (wh @ e[..., None]).squeeze(-1),
                    C,
                    (weight * e.square()).sum(-1),
                    (weight * y.square()).sum(-1),
                )
                parts.append([tensor.flatten(0, 1) for tensor in part])
    return _TokenSystems(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _fit(system: _TokenSystems, H_SS: torch.Tensor, omega: torch.Tensor, steps: int, penalty: float) -> torch.Tensor:
    """M − M₀ after the given number of steps, shape (r, N), float64, on the system's device.

    Only the products with each token's Gram matrix are in float32. In float32 throughout, the steps would amplify the
    order in which tokens are summed up, and two processes would not find what one finds.
    """
    C, device = system.C.double(), system.C.device
    omega = omega.to(device)
    scale = H_SS.diagonal().to(device)[:, None]
    left = torch.linalg.inv(with_ridge(H_SS, PRECONDITIONER_RIDGE)).to(device)
    right = torch.linalg.inv(with_ridge(omega.cpu(), PRECONDITIONER_RIDGE)).to(device)

    def apply(D: torch.Tensor) -> torch.Tensor:
        v = (C @ D.T).float()
        Gv = (system.gram @ v[..., None]).squeeze(-1)
        return Gv.double().T @ C + penalty * scale * (D @ omega)

    start = torch.zeros(len(left), len(right), dtype=torch.float64, device=device)
    rhs = system.p.double().T @ C
    return conjugate_gradients(apply, rhs, start, lambda residual: left @ residual @ right, steps)
