"""Closed-form refit: new rows of C, and of B, for the kept states, so that they make up for the removed ones.

It minimises the squared error of what the layer passes on, over the calibration tokens t and channels d,

    Σ w_t[d] (y_t[d] − Σ_{s∈S} h_t[d,s] (M C_t)_s)²  +  λ tr(diag(H̄_SS) (M−M₀) Ω/T (M−M₀)ᵀ),

by preconditioned conjugate gradients from the mean-field solution M₀. All that it needs of a token is the Gram matrix
G_t = Σ_d w h_S h_Sᵀ (r×r) and p_t = Σ_d w e h_S, with e the error at M₀: the channels are summed away in one pass.
Groups (the heads of Zamba) have a readout each.

Then the drive B of the kept states is fitted while their readout stays (`drive.py`), the readout anew to the states
that come of it, and so on, in turns: alternating least squares on the outputs, in which no step raises the error.

Where B and C are normalized, h_S are the states as they are when the removed ones are missing from B's norm, and C'_t
follows what M makes of C's norm: M is fitted with the ratio of the norms that M₀ leads to. What is reported is the
error with the ratio that M itself leads to.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch

from .drive import KeptRecurrence, fit_drive, kept_recurrences, selection
from .least_squares import PRECONDITIONER_RIDGE, conjugate_gradients, with_ridge
from .mixers import Mixer
from .statistics import StateStatistics
from .token_systems import TokenSystem, systems_of, token_systems

MEAN_FIELD_RIDGE = 1e-4
MINIMUM_TOKENS = 4096
# Of a measured error curve.
MOST_SIZES = 16


@dataclass(frozen=True)
class Readout:
    """A refit's result.

    Attributes:
        matrix: M with new rows W_C' = M W_C, shape (groups, r, N), float32, on the CPU; None without a refit.
        drive: the same for the rows of B; None if they are only selected.
        relative_error: √(Σ w (y−ŷ)² / Σ w y²) on the calibration tokens. M has few numbers beside tokens × channels
            outputs, so on fresh tokens it is about the same.
        method: `alternating least squares`, `conjugate gradients` (of the readout alone), `mean field` or `none`.
        scales: role → what its rows are multiplied with; only where B and C are normalized.
    """

    matrix: torch.Tensor | None
    relative_error: float
    method: str
    scales: dict[str, float | list[float]] = field(default_factory=dict)
    drive: torch.Tensor | None = None


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
    rounds: int = 0,
) -> Readout:
    """Find the readout, and the drive, of the kept states that best reproduce a layer's output on its recorded inputs.

    Args:
        mixer: a mixer whose layout can be refitted; it is only read.
        statistics: of this layer, with its recorded inputs.
        kept: the states that stay, shape (groups, r).
        steps: the most conjugate-gradient steps; with 0, or with too few tokens, the mean field stays.
        penalty: λ.
        rounds: how often drive and readout take turns after the first fit of the readout. Where B and C are
            normalized, the drive stays.
    """
    start = torch.stack([mean_field_readout(H, S) for H, S in zip(statistics.state_gram, kept, strict=True)])
    enough = statistics.tokens >= fewest_tokens(kept.shape[1], statistics.state_size)
    steps = steps if enough else 0
    if mixer.is_normalized:
        systems = token_systems(mixer, statistics, kept, start)
        return _result(mixer, systems, _fit_groups(systems, statistics, kept, start, steps, penalty))
    recurrences = kept_recurrences(mixer, statistics, kept)
    systems = systems_of(recurrences, selection(kept, statistics.state_size), start)
    fits = _fit_groups(systems, statistics, kept, start, steps, penalty)
    readout = _result(mixer, systems, fits)
    return _take_turns(readout, recurrences, statistics, kept, steps, penalty, rounds) if steps else readout


@torch.no_grad()
def select_readout(mixer: Mixer, statistics: StateStatistics, kept: torch.Tensor) -> Readout:
    """The same without a refit, for mixers that normalize B and C: what their scales are, and what error is left."""
    start = torch.eye(statistics.state_size, dtype=torch.float64)[kept.cpu()]
    systems = token_systems(mixer, statistics, kept, start)
    fits = [_Fit(matrix, *system.best_gain(matrix), "none") for system, matrix in zip(systems, start, strict=True)]
    return dataclasses.replace(_result(mixer, systems, fits), matrix=None)


def measured_selection_curve(
    mixer: Mixer, statistics: StateStatistics, order: torch.Tensor, *, refit: bool
) -> torch.Tensor:
    """The relative error with r = 0 … N states, measured: of the mean field's readouts, or of a selection alone.

    At most 16 sizes are tried; the error is interpolated between them, and does not fall with fewer states.

    Args:
        mixer: a mixer that normalizes B and C.
        statistics: of this layer, with its recorded inputs.
        order: states from the least to the most important, shape (groups, N).
        refit: whether the readout is refitted.

    Returns:
        Shape (N + 1,), float64.
    """
    size = statistics.state_size
    step = -(-size // MOST_SIZES)
    tried = [*range(step, size, step), size]
    errors = []
    for kept in tried[:-1]:
        states = order[:, size - kept :].sort(dim=-1).values
        result = (
            refit_readout(mixer, statistics, states, steps=0, penalty=0.0)
            if refit
            else select_readout(mixer, statistics, states)
        )
        errors.append(result.relative_error)
    curve = np.interp(np.arange(size + 1), [0, *tried], [1.0, *errors, 0.0])
    return torch.from_numpy(np.maximum.accumulate(curve[::-1])[::-1].copy())


@dataclass(frozen=True)
class _Fit:
    """The readout M of one group, (r, N) float64; the gain κ; Σ w (y−ŷ)² with them; and how M was found."""

    matrix: torch.Tensor
    gain: float
    error: torch.Tensor
    method: str


def _fit_groups(
    systems: list[TokenSystem],
    statistics: StateStatistics,
    kept: torch.Tensor,
    start: torch.Tensor,
    steps: int,
    penalty: float,
) -> list[_Fit]:
    H = statistics.state_gram.double().cpu()
    omega = statistics.readout_gram.double().cpu() / statistics.tokens.double().cpu()
    return [
        _fit_group(system, group_start, group_H[own][:, own], group_omega, steps, penalty)
        for system, own, group_start, group_H, group_omega in zip(systems, kept.cpu(), start, H, omega, strict=True)
    ]


def _fit_group(
    system: TokenSystem, start: torch.Tensor, H_SS: torch.Tensor, omega: torch.Tensor, steps: int, penalty: float
) -> _Fit:
    mean_field = _Fit(start, *system.best_gain(start), "mean field")
    if steps == 0 or mean_field.error <= 0:
        return mean_field
    # Behind a norm the fit takes as given what the mean field makes the norm divide by. To find that anew and to fit
    # again gained nothing on trained models.
    features = system.features(start, mean_field.gain)
    matrix = start + _fit(system, features, start, H_SS, omega, steps, penalty).cpu()
    fitted = _Fit(matrix, *system.best_gain(matrix), "conjugate gradients")
    return fitted if fitted.error < mean_field.error else mean_field


def _take_turns(
    readout: Readout,
    recurrences: list[KeptRecurrence],
    statistics: StateStatistics,
    kept: torch.Tensor,
    steps: int,
    penalty: float,
    rounds: int,
) -> Readout:
    """Fit the drive, and the readout anew, so many times; a round that does not lower the error is the last."""
    drive = selection(kept, statistics.state_size)
    omega = statistics.readout_gram.double().cpu() / statistics.tokens.double().cpu()
    for _ in range(rounds):
        matrix = readout.matrix.double()
        new_drive = fit_drive(recurrences, drive, matrix, steps=steps, penalty=penalty)
        systems = systems_of(recurrences, new_drive, matrix)
        fits = [
            _fit_group(system, start, system.gram.sum(0).double().cpu(), group_omega, steps, penalty)
            for system, start, group_omega in zip(systems, matrix, omega, strict=True)
        ]
        relative_error = _relative_error(systems, fits)
        if not relative_error < readout.relative_error:
            break
        drive = new_drive
        readout = Readout(
            matrix=torch.stack([fit.matrix for fit in fits]).float(),
            relative_error=relative_error,
            method="alternating least squares",
            drive=drive.float(),
        )
    return readout


def _relative_error(systems: list[TokenSystem], fits: list[_Fit]) -> float:
    energy = sum(system.energy.sum() for system in systems)
    error = sum(fit.error.clamp_min(0) for fit in fits)
    return float((error / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt())


def _result(mixer: Mixer, systems: list[TokenSystem], fits: list[_Fit]) -> Readout:
    matrices, scales = [fit.matrix for fit in fits], {}
    if systems[0].norm is not None:
        norm, layout = systems[0].norm, mixer.layout
        matrices = [layout.raw_readout(matrices[0], norm.kept, norm.weight)]
        scales = layout.scales(mixer.parts, fits[0].gain, norm.B_balance, norm.C_balance)
    methods = {fit.method for fit in fits}
    return Readout(
        matrix=torch.stack(matrices).float(),
        relative_error=_relative_error(systems, fits),
        method="conjugate gradients" if "conjugate gradients" in methods else methods.pop(),
        scales=scales,
    )


def _fit(
    system: TokenSystem,
    features: torch.Tensor,
    start: torch.Tensor,
    H_SS: torch.Tensor,
    omega: torch.Tensor,
    steps: int,
    penalty: float,
) -> torch.Tensor:
    """M − M₀ after the given number of steps, shape (r, N), float64, on the system's device.

    Only the products with each token's Gram matrix are in float32. In float32 throughout, the steps would amplify the
    order in which tokens are summed up, and two processes would not find what one finds.
    """
    C, device = features.double(), features.device
    omega = omega.to(device)
    scale = H_SS.diagonal().to(device)[:, None]
    left = torch.linalg.inv(with_ridge(H_SS, PRECONDITIONER_RIDGE)).to(device)
    right = torch.linalg.inv(with_ridge(omega.cpu(), PRECONDITIONER_RIDGE)).to(device)

    def apply(D: torch.Tensor) -> torch.Tensor:
        return system.times_gram((C @ D.T).float()).double().T @ C + penalty * scale * (D @ omega)

    rhs = system.p.double().T @ C
    if system.norm is not None:
        # The error at M₀ with these features, not with C itself.
        rhs += system.times_gram(system.start - (C @ start.to(C).T).float()).double().T @ C
    begin = torch.zeros(len(left), len(right), dtype=torch.float64, device=device)
    return conjugate_gradients(apply, rhs, begin, lambda residual: left @ residual @ right, steps)
