"""Closed-form refit: new readout rows C' = M C for the kept states, so that they make up for the removed ones.

It minimises the squared error of what the layer passes on, over the calibration tokens t and channels d,

    Σ w_t[d] (y_t[d] − Σ_{s∈S} h_t[d,s] (M C_t)_s)²  +  λ tr(diag(H̄_SS) (M−M₀) Ω/T (M−M₀)ᵀ),

by preconditioned conjugate gradients from the mean-field solution M₀. All that it needs of a token is the Gram matrix
G_t = Σ_d w h_S h_Sᵀ (r×r) and p_t = Σ_d w e h_S, with e the error at M₀: the channels are summed away in one pass.
Groups (the heads of Zamba) have a readout each.

Where B and C are normalized, h_S are the states as they are when the removed ones are missing from B's norm, and C'_t
follows what M makes of C's norm: M is fitted with the ratio of the norms that M₀ leads to. What is reported is the
error with the ratio that M itself leads to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from .least_squares import conjugate_gradients, with_ridge
from .mixers import Mixer, ScanInputs, stream_states
from .mixers.mamba1_normalized import raw_readout, root_mean_square, row_scale
from .statistics import StateStatistics

MEAN_FIELD_RIDGE = 1e-4
MINIMUM_TOKENS = 4096
PRECONDITIONER_RIDGE = 1e-3
# Of a measured error curve.
MOST_SIZES = 16


@dataclass(frozen=True)
class Readout:
    """A refit's result.

    Attributes:
        matrix: M with new rows W_C' = M W_C, shape (groups, r, N), float32, on the CPU; None without a refit.
        relative_error: √(Σ w (y−ŷ)² / Σ w y²) on the calibration tokens. M has few numbers beside tokens × channels
            outputs, so on fresh tokens it is about the same.
        method: `conjugate gradients`, `mean field` or `none`.
        scales: role → what its entries are multiplied with; only where B and C are normalized.
    """

    matrix: torch.Tensor | None
    relative_error: float
    method: str
    scales: dict[str, float] = field(default_factory=dict)


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
        mixer: a mixer whose layout can be refitted; it is only read.
        statistics: of this layer, with its recorded inputs.
        kept: the states that stay, shape (groups, r).
        steps: the most conjugate-gradient steps; with 0, or with too few tokens, the mean field stays.
        penalty: λ.
    """
    start = torch.stack([mean_field_readout(H, S) for H, S in zip(statistics.state_gram, kept, strict=True)])
    systems = _token_systems(mixer, statistics, kept, start)
    enough = statistics.tokens >= fewest_tokens(kept.shape[1], statistics.state_size)
    fits = [
        _fit_group(system, group, statistics, group_kept, group_start, steps if enough else 0, penalty)
        for group, (system, group_kept, group_start) in enumerate(zip(systems, kept.cpu(), start, strict=True))
    ]
    return _result(mixer, systems, fits, kept)


@torch.no_grad()
def select_readout(mixer: Mixer, statistics: StateStatistics, kept: torch.Tensor) -> Readout:
    """The same without a refit, for mixers that normalize B and C: what their scales are, and what error is left."""
    start = torch.eye(statistics.state_size, dtype=torch.float64)[kept.cpu()]
    systems = _token_systems(mixer, statistics, kept, start)
    fits = [_Fit(matrix, *system.best_gain(matrix), "none") for system, matrix in zip(systems, start, strict=True)]
    return dataclasses.replace(_result(mixer, systems, fits, kept), matrix=None)


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
    """The readout M of one group, (r, N) float64; the gain κ_C; Σ w (y−ŷ)² with them; and how M was found."""

    matrix: torch.Tensor
    gain: float
    error: torch.Tensor
    method: str


def _fit_group(
    system: _TokenSystem,
    group: int,
    statistics: StateStatistics,
    kept: torch.Tensor,
    start: torch.Tensor,
    steps: int,
    penalty: float,
) -> _Fit:
    mean_field = _Fit(start, *system.best_gain(start), "mean field")
    if steps == 0 or mean_field.error <= 0:
        return mean_field
    H_SS = statistics.state_gram[group].double().cpu()[kept][:, kept]
    omega = statistics.readout_gram[group].double().cpu() / statistics.tokens.double().cpu()
    # Behind a norm the fit takes as given what the mean field makes the norm divide by. To find that anew and to fit
    # again gained nothing on trained models.
    features = system.features(start, mean_field.gain)
    matrix = start + _fit(system, features, start, H_SS, omega, steps, penalty).cpu()
    fitted = _Fit(matrix, *system.best_gain(matrix), "conjugate gradients")
    return fitted if fitted.error < mean_field.error else mean_field


def _result(mixer: Mixer, systems: list[_TokenSystem], fits: list[_Fit], kept: torch.Tensor) -> Readout:
    energy = sum(system.energy.sum() for system in systems)
    error = sum(fit.error.clamp_min(0) for fit in fits)
    matrices, scales = [fit.matrix for fit in fits], {}
    if systems[0].norm is not None:
        norm, layout = systems[0].norm, mixer.layout
        matrices = [layout.raw_readout(matrices[0], norm.kept, norm.weight)]
        scales = layout.scales(mixer.parts, norm.B_gain, fits[0].gain, kept.shape[1])
    methods = {fit.method for fit in fits}
    return Readout(
        matrix=torch.stack(matrices).float(),
        relative_error=float((error / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt()),
        method="conjugate gradients" if "conjugate gradients" in methods else methods.pop(),
        scales=scales,
    )


@dataclass(frozen=True)
class _Norm:
    """The RMS norm on C of one mixer, and what the one on B does to the states that stay.

    Attributes:
        kept: S, shape (r,), on the CPU.
        weight: g_C, shape (N,).
        raw: c_t, what the norm takes, shape (tokens, N).
        root: √(mean c_t² + ε), shape (tokens,).
        epsilon: ε.
        B_gain: κ_B.
    """

    kept: torch.Tensor
    weight: torch.Tensor
    raw: torch.Tensor
    root: torch.Tensor
    epsilon: float
    B_gain: float

    def ratio(self, matrix: torch.Tensor) -> torch.Tensor:
        """s √(mean c² + ε) / √(mean c'² + ε) with c' = s M c, of which κ_C is the average's inverse; (tokens,)."""
        raw_matrix = raw_readout(matrix.to(self.raw.device), self.kept.to(self.raw.device), self.weight)
        scale = row_scale(*raw_matrix.shape)
        smaller = root_mean_square(scale * (self.raw @ raw_matrix.to(self.raw).T), self.epsilon)[:, 0]
        return scale * self.root / smaller


@dataclass(frozen=True)
class _TokenSystem:
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
    norm: _Norm | None = None

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
        """κ_C for which a readout's error is the least (1 where there is no norm), and that error."""
        v = self.features(matrix, 1.0) @ matrix.to(self.C).T
        if self.norm is None:
            return 1.0, self.error_after(v)
        output = (v * self.times_gram(v)).sum().double()
        product = (v * (self.p + self.times_gram(self.start))).sum().double()
        gain = float(product / output) if output > 0 and product > 0 else 1.0
        return gain, self.error_after(gain * v)


def _token_systems(
    mixer: Mixer, statistics: StateStatistics, kept: torch.Tensor, start: torch.Tensor
) -> list[_TokenSystem]:
    """One for each group."""
    device = statistics.state_gram.device
    kept, start = kept.to(device), start.to(device, torch.float32)
    B_gain = _average_B_gain(mixer, statistics, kept)
    parts: list[list[list[torch.Tensor]]] = [[] for _ in kept]
    norm = None
    for inputs in _recomputed(mixer, statistics):
        norm = inputs.normalization
        extended = inputs if norm is None else _with_kept_states(inputs, kept[0], B_gain)
        for first, states in stream_states(extended):
            for group, part in enumerate(_parts(inputs, first, states, kept, start)):
                parts[group].append([tensor.flatten(0, 1) for tensor in part])
        # The last chunk of states would stay alive while the parts are joined.
        del inputs, extended, states, part
    systems = []
    for columns in parts:
        gram, p, C, error, energy, v, *raw = (torch.cat(column) for column in zip(*columns, strict=True))
        own_norm = None
        if norm is not None:
            root = root_mean_square(raw[0], norm.epsilon)[:, 0]
            own_norm = _Norm(kept[0].cpu(), norm.C_weight, raw[0], root, norm.epsilon, B_gain)
        systems.append(_TokenSystem(gram, p, C, error, energy, v, own_norm))
    return systems


def _parts(
    inputs: ScanInputs, first: int, states: torch.Tensor, kept: torch.Tensor, start: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """The fields of each group's system over one chunk of states, each of shape (steps, batch, ...)."""
    time, size, norm = slice(first, first + states.shape[0]), inputs.C.shape[-1], inputs.normalization
    C = inputs.C[:, time].transpose(0, 1)
    y = (states[..., :size] @ C[..., None]).squeeze(-1)
    weight = inputs.weight(y, first)
    for group in range(len(kept)):
        own, w = states[:, :, group], weight[:, :, group]
        h = own.index_select(-1, kept[group]) if norm is None else own[..., size:]
        v = C[:, :, group] @ start[group].T
        e = y[:, :, group] - (h @ v[..., None]).squeeze(-1)
        wh = (h * w[..., None]).transpose(-1, -2)
        part = [wh @ h, (wh @ e[..., None]).squeeze(-1), C[:, :, group], (w * e.square()).sum(-1)]
        part += [(w * y[:, :, group].square()).sum(-1), v]
        yield part if norm is None else [*part, norm.c[:, time, group].transpose(0, 1)]


def _recomputed(mixer: Mixer, statistics: StateStatistics) -> Iterator[ScanInputs]:
    device = statistics.state_gram.device
    for hidden_states, mask in statistics.inputs:
        with torch.autocast(device.type, enabled=False):
            yield mixer.scan_inputs(hidden_states.to(device), mask)


def _B_ratio(inputs: ScanInputs, kept: torch.Tensor) -> torch.Tensor:
    """How many times larger, up to κ_B, B_t of the kept states is without the others, (batch, length, 1, 1)."""
    norm = inputs.normalization
    scale = row_scale(len(kept), norm.b.shape[-1])
    smaller = root_mean_square(scale * norm.b[..., kept], norm.epsilon)
    return scale * root_mean_square(norm.b, norm.epsilon) / smaller


def _average_B_gain(mixer: Mixer, statistics: StateStatistics, kept: torch.Tensor) -> float:
    """κ_B, with which B_t of the kept states is as large as before on average."""
    total = tokens = 0.0
    for inputs in _recomputed(mixer, statistics):
        if inputs.normalization is None:
            return 1.0
        total += float((_B_ratio(inputs, kept[0])[..., 0, 0] * inputs.mask).double().sum())
        tokens += float(inputs.mask.double().sum())
    return tokens / total


def _with_kept_states(inputs: ScanInputs, kept: torch.Tensor, B_gain: float) -> ScanInputs:
    """A recurrence with r states more: the kept ones as they are without the others."""
    B = inputs.B[..., kept] * (B_gain * _B_ratio(inputs, kept))
    return dataclasses.replace(
        inputs, A=torch.cat([inputs.A, inputs.A[..., kept]], dim=-1), B=torch.cat([inputs.B, B], dim=-1)
    )


def _fit(
    system: _TokenSystem,
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
