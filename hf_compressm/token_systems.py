"""What a fit of the readout needs of each token: small sums over the channels, made in one pass over the states.

Where B and C are normalized, the states that stay are streamed as they are when the removed ones are missing from B's
norm, and readouts follow what they make of C's norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .drive import KeptRecurrence
from .mixers import Mixer, ScanInputs, stream_states
from .mixers.mamba1_normalized import balance, has_weights, raw_readout, root_mean_square, row_scale
from .statistics import StateStatistics


@dataclass(frozen=True)
class ReadoutNorm:
    """The RMS norm on C of one mixer, and what the one on B does to the states that stay.

    Attributes:
        kept: S, shape (r,), on the CPU.
        weight: g_C, shape (N,).
        raw: c_t, what the norm takes, shape (tokens, N).
        root: √(mean c_t² + ε), shape (tokens,).
        epsilon: ε.
        B_balance, C_balance: α of the rows of B and of C, shape (r,).
    """

    kept: torch.Tensor
    weight: torch.Tensor
    raw: torch.Tensor
    root: torch.Tensor
    epsilon: float
    B_balance: torch.Tensor
    C_balance: torch.Tensor

    def ratio(self, matrix: torch.Tensor) -> torch.Tensor:
        """√(mean c² + ε) / √(mean c'² + ε) with c' = s α M c: how M C_t changes behind the norm, shape (tokens,)."""
        raw_matrix = raw_readout(matrix.to(self.raw.device), self.kept.to(self.raw.device), self.weight)
        scale = row_scale(*raw_matrix.shape)
        rows = scale * self.C_balance * (self.raw @ raw_matrix.to(self.raw).T)
        smaller = root_mean_square(rows, self.epsilon)[:, 0]
        return self.root / smaller


@dataclass(frozen=True)
class TokenSystem:
    """What the fit needs of each token in one group.

    Attributes:
        gram: G = Σ_d w h_S h_Sᵀ, shape (tokens, r, r).
        p: Σ_d w e h_S, shape (tokens, r), with e the error of the readouts `start`.
        C: shape (tokens, N).
        error, energy: Σ_d w e² and Σ_d w y², shape (tokens,).
        start: M₀ C, shape (tokens, r).
        norm: the norm on C, if there is one.
    """

    gram: torch.Tensor
    p: torch.Tensor
    C: torch.Tensor
    error: torch.Tensor
    energy: torch.Tensor
    start: torch.Tensor
    norm: ReadoutNorm | None = None

    def times_gram(self, v: torch.Tensor) -> torch.Tensor:
        return (self.gram @ v[..., None]).squeeze(-1)

    def error_after(self, v: torch.Tensor) -> torch.Tensor:
        """Σ w (y−ŷ)² with the readouts v, shape (tokens, r)."""
        change = v - self.start
        return (self.error + ((self.times_gram(change) - 2 * self.p) * change).sum(-1)).sum()

    def features(self, matrix: torch.Tensor, gain: float) -> torch.Tensor:
        """What M is multiplied with: C_t, behind a norm times what that would do to M C_t; shape (tokens, N)."""
        return self.C if self.norm is None else self.C * (gain * self.norm.ratio(matrix))[:, None]

    def best_gain(self, matrix: torch.Tensor) -> tuple[float, torch.Tensor]:
        """κ for which a readout's error is the least (1 where there is no norm), and that error."""
        v = self.features(matrix, 1.0) @ matrix.to(self.C).T
        if self.norm is None:
            return 1.0, self.error_after(v)
        output = (v * self.times_gram(v)).sum().double()
        product = (v * (self.p + self.times_gram(self.start))).sum().double()
        gain = float(product / output) if output > 0 and product > 0 else 1.0
        return gain, self.error_after(gain * v)


def token_systems(
    mixer: Mixer, statistics: StateStatistics, kept: torch.Tensor, start: torch.Tensor
) -> list[TokenSystem]:
    """Run through a layer's recorded inputs once more, and sum up what a fit needs.

    Args:
        mixer: a mixer that normalizes B and C, which has one group; it is only read.
        statistics: of this layer, with its recorded inputs.
        kept: the states that stay, shape (groups, r).
        start: the readouts that errors are those of, M₀, shape (groups, r, N).

    Returns:
        A list of one, as `systems_of` makes one for each group of other mixers.
    """
    device = statistics.state_gram.device
    kept, start = kept.to(device), start.to(device, torch.float32)
    balances = _balances(mixer, statistics, kept, start)
    parts: list[list[torch.Tensor]] = []
    for inputs in _recomputed(mixer, statistics):
        norm = inputs.normalization
        extended = _with_kept_states(inputs, kept[0], balances)
        for first, states in stream_states(extended):
            time = slice(first, first + len(states))
            C, size = inputs.C[:, time].transpose(0, 1), statistics.state_size
            y = (states[..., :size] @ C[..., None]).squeeze(-1)
            fields = _fields(
                states[:, :, 0, :, size:], C[:, :, 0], y[:, :, 0], inputs.weight(y, first)[:, :, 0], start[0]
            )
            parts.append([tensor.flatten(0, 1) for tensor in (*fields, norm.c[:, time, 0].transpose(0, 1))])
        # The last chunk of states would stay alive while the parts are joined.
        del inputs, extended, states, y, fields
    *fields, raw = (torch.cat(column) for column in zip(*parts, strict=True))
    root = root_mean_square(raw, norm.epsilon)[:, 0]
    return [TokenSystem(*fields, ReadoutNorm(kept[0].cpu(), norm.C_weight, raw, root, norm.epsilon, *balances))]


def systems_of(recurrences: list[KeptRecurrence], drive: torch.Tensor, start: torch.Tensor) -> list[TokenSystem]:
    """What a fit of the readouts needs of kept states that are fed by `drive`; arguments as in `drive.fit_drive`."""
    start = start.to(recurrences[0].y)
    parts: list[list[list[torch.Tensor]]] = [[] for _ in start]
    for run in recurrences:
        for time, states in run.states(drive):
            for group, part in enumerate(parts):
                own = (states[:, :, group], *(field[time, :, group] for field in (run.C, run.y, run.weight)))
                part.append([tensor.flatten(0, 1) for tensor in _fields(*own, start[group])])
    return [TokenSystem(*(torch.cat(column) for column in zip(*part, strict=True))) for part in parts]


def _fields(
    h: torch.Tensor, C: torch.Tensor, y: torch.Tensor, w: torch.Tensor, start: torch.Tensor
) -> list[torch.Tensor]:
    """The fields of one group's system over one chunk of its kept states h, each of shape (steps, batch, ...)."""
    v = C @ start.T
    e = y - (h @ v[..., None]).squeeze(-1)
    wh = (h * w[..., None]).transpose(-1, -2)
    p = (wh @ e[..., None]).squeeze(-1)
    return [wh @ h, p, C, (w * e.square()).sum(-1), (w * y.square()).sum(-1), v]


def _recomputed(mixer: Mixer, statistics: StateStatistics) -> Iterator[ScanInputs]:
    device = statistics.state_gram.device
    for hidden_states, mask in statistics.inputs:
        with torch.autocast(device.type, enabled=False):
            yield mixer.scan_inputs(hidden_states.to(device), mask).sampled()


Balances = tuple[torch.Tensor, torch.Tensor]


def _balances(mixer: Mixer, statistics: StateStatistics, kept: torch.Tensor, start: torch.Tensor) -> Balances | None:
    """α of the rows of B and of C, which norms with weights allow; ones for those without. None without norms."""
    if not mixer.is_normalized:
        return None
    ones = torch.ones(kept.shape[1], device=kept.device)
    if not has_weights(mixer.parts):
        return ones, ones
    squares: list[list[torch.Tensor]] = []
    for inputs in _recomputed(mixer, statistics):
        norm, real = inputs.normalization, inputs.mask.bool()
        b, c = norm.b[:, :, 0][real], norm.c[:, :, 0][real]
        c_kept = c @ raw_readout(start[0], kept[0], norm.C_weight).T
        means = [features.square().mean(-1) + norm.epsilon for features in (b, c)]
        squares.append([b[:, kept[0]].square(), means[0], c_kept.square(), means[1]])
    b_kept, b_mean, c_kept, c_mean = (torch.cat(column) for column in zip(*squares, strict=True))
    size = statistics.state_size
    return balance(b_kept, b_mean, norm.epsilon, size), balance(c_kept, c_mean, norm.epsilon, size)


def _B_ratio(inputs: ScanInputs, kept: torch.Tensor, balances: Balances) -> torch.Tensor:
    """How many times larger B_t of the kept states is without the others, shape (batch, length, 1, 1)."""
    norm = inputs.normalization
    scale = row_scale(len(kept), norm.b.shape[-1])
    smaller = root_mean_square(scale * balances[0] * norm.b[..., kept], norm.epsilon)
    return root_mean_square(norm.b, norm.epsilon) / smaller


def _with_kept_states(inputs: ScanInputs, kept: torch.Tensor, balances: Balances) -> ScanInputs:
    """A recurrence with r states more: the kept ones as they are without the others."""
    B = inputs.B[..., kept] * _B_ratio(inputs, kept, balances)
    return dataclasses.replace(
        inputs, A=torch.cat([inputs.A, inputs.A[..., kept]], dim=-1), B=torch.cat([inputs.B, B], dim=-1)
    )
