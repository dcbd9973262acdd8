"""Closed-form refit of the drive: new rows B' = M B for the kept states, so that they carry what the others carried.

With decay rates and readouts fixed, a layer's output is linear in M. It minimises the squared error of what the
layer passes on, over the calibration tokens t and channels d,

    Σ w_t[d] (y_t[d] − Σ_{s∈S} v_t[s] h_t[d,s])²  +  λ tr(diag(q) D Ω_B Dᵀ),   h_t = a_t h_{t−1} + Δ_t x_t[d] (M B_t),

by preconditioned conjugate gradients from the drive M₀ that there is, with D = M − M₀ and v_t the readouts. A product
with the Gram matrix of this problem is one run of the r kept states forwards in time and one of their adjoint

    l_t = v_t w_t e_t + a_{t+1} l_{t+1}

backwards. q_s = Σ (Δ_t x_t)² Σ_{τ≥t} w_τ (v_τ[s] a_{t..τ}[s])² is how strongly state s is observed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .least_squares import PRECONDITIONER_RIDGE, conjugate_gradients, with_ridge
from .mixers import Mixer, stream_states
from .mixers.scan import run_states
from .statistics import StateStatistics

# Channels of a wide layer that the fits look at.
FITTED_CHANNELS = 128


@dataclass(frozen=True)
class KeptRecurrence:
    """The recurrence of the kept states over one recorded input of a layer, time first, in float32.

    Of a wide layer, it has some of the channels: they share M, so a sample of them determines it as well.

    Attributes:
        decay: a, shape (length, batch, groups, channels, r).
        decay_back: the adjoint's decay, a_{t+1} at step t, in the adjoint's order, which is from the end to the start.
        input: Δ x, shape (length, batch, groups, channels).
        B, C: of all states, shape (length, batch, groups, N).
        y: what the whole layer's scan put out, and `weight`, how much an error of it counts; shaped as input.
        mask: 1 for a real token, shape (length, batch).
    """

    decay: torch.Tensor
    decay_back: torch.Tensor
    input: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    y: torch.Tensor
    weight: torch.Tensor
    mask: torch.Tensor

    def states(self, drive: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Chunks of time, and the states (steps, batch, groups, channels, r) that B' = drive · B feeds."""
        return run_states(self.decay.__getitem__, self.input, times(self.B, drive))

    def output(self, drive: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What readouts v (length, batch, groups, r) make of these states, shaped as y."""
        return torch.cat([(states @ v[time, ..., None]).squeeze(-1) for time, states in self.states(drive)])

    def backwards(self, errors: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Σ_{t,d} l_t[d,s] Δ_t x_t[d] B_t[n] of the adjoint that weighted errors drive, shape (groups, r, N)."""
        parts, inputs = [], self.input.flip(0)
        for time, adjoint in run_states(self.decay_back.__getitem__, errors.flip(0), v.flip(0)):
            parts.append(adjoint.mul_(inputs[time, ..., None]).sum(-2))
        return torch.einsum("lbgs,lbgn->gsn", torch.cat(parts).flip(0), self.B)

    def observed(self, v: torch.Tensor) -> torch.Tensor:
        """q, shape (groups, r)."""
        squares = self.input.square().flip(0)
        runs = run_states(lambda time: self.decay_back[time].square(), self.weight.flip(0), v.square().flip(0))
        return sum(adjoint.mul_(squares[time, ..., None]).sum((0, 1, 3)) for time, adjoint in runs)


def selection(kept: torch.Tensor, state_size: int) -> torch.Tensor:
    """The drive that leaves the kept states as they are: rows of the identity, shape (groups, r, N), float64."""
    return torch.eye(state_size, dtype=torch.float64)[kept.cpu()]


def times(features: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """M applied to features (length, batch, groups, N), M of shape (groups, r, N)."""
    return torch.einsum("lbgn,gsn->lbgs", features, matrix.to(features))


@torch.no_grad()
def kept_recurrences(mixer: Mixer, statistics: StateStatistics, kept: torch.Tensor) -> list[KeptRecurrence]:
    """Run through a layer's recorded inputs once more, with all states, and keep what its output was.

    Args:
        mixer: a mixer whose B and C are linear in its features; it is only read.
        statistics: of this layer, with its recorded inputs.
        kept: the states that stay, shape (groups, r).
    """
    device = statistics.state_gram.device
    recurrences = []
    for hidden_states, mask in statistics.inputs:
        with torch.autocast(device.type, enabled=False):
            inputs = mixer.scan_inputs(hidden_states.to(device), mask).sampled(FITTED_CHANNELS)
            delta, x, B, C, mask = (
                values.transpose(0, 1) for values in (inputs.delta, inputs.x, inputs.B, inputs.C, inputs.mask)
            )
            y = [
                (states @ C[time : time + len(states), ..., None]).squeeze(-1)
                for time, states in stream_states(inputs)
            ]
            y = torch.cat(y)
            A = torch.stack([rates[:, own] for rates, own in zip(inputs.A, kept.to(device), strict=True)])
            decay = (delta[..., None] * A).exp_()
            # Nothing comes after the last step, so its decay is never looked at.
            back = torch.cat([decay[1:], decay[:1]]).flip(0)
            recurrences.append(KeptRecurrence(decay, back, delta * x, B, C, y, inputs.weight(y, 0), mask))
    return recurrences


@torch.no_grad()
def fit_drive(
    recurrences: list[KeptRecurrence], drive: torch.Tensor, readout: torch.Tensor, *, steps: int, penalty: float
) -> torch.Tensor:
    """Find the drive of the kept states that best reproduces a layer's output, while their readout stays.

    Args:
        recurrences: from `kept_recurrences`.
        drive: M₀, shape (groups, r, N), float64.
        readout: of the kept states, of the same shape.
        steps: conjugate-gradient steps.
        penalty: λ.

    Returns:
        M, as `drive`.
    """
    v = [times(recurrence.C, readout) for recurrence in recurrences]
    pairs = list(zip(recurrences, v, strict=True))
    observed = sum(recurrence.observed(readouts) for recurrence, readouts in pairs).double()[..., None]
    B_gram = sum(torch.einsum("lbgm,lbgn->gmn", *(2 * [r.B * r.mask[..., None, None]])) for r in recurrences).double()
    B_gram = B_gram / sum(r.mask.sum() for r in recurrences).double()
    inverse = torch.stack([torch.linalg.inv(with_ridge(gram.cpu(), PRECONDITIONER_RIDGE)) for gram in B_gram])
    inverse = inverse.to(B_gram)
    row_scale = observed.clamp_min(PRECONDITIONER_RIDGE * float(observed.mean()) or 1.0)

    def apply(D: torch.Tensor) -> torch.Tensor:
        pushed = sum(r.backwards(r.weight * r.output(D, readouts), readouts).double() for r, readouts in pairs)
        return pushed + penalty * observed * (D @ B_gram)

    rhs = sum(r.backwards(r.weight * (r.y - r.output(drive, readouts)), readouts).double() for r, readouts in pairs)
    start = torch.zeros_like(rhs)
    return drive + conjugate_gradients(apply, rhs, start, lambda R: R @ inverse / row_scale, steps).to(drive)
