"""The projection of a Mamba-2 layer's N features to r states: balanced truncation, then least squares on the outputs.

A reduced layer passes on ŷ_t = C_tᵀ V Wᵀ h_t, since the basis change W commutes with the dynamics. Per group, the
matrices W and V (N × r) minimise, over the calibration tokens t and channels d,

    E(W, V) = Σ w_t[d] (y_t[d] − C_tᵀ V Wᵀ h_t[d])².

In the mean field, where C_t is independent of the states, E = tr (I − V Wᵀ)ᵀ Ω (I − V Wᵀ) H̄, and its minimum over
all matrices of rank r is the balanced truncation of the pair (H̄, Ω) (Antoulas, Approximation of Large-Scale Dynamical
Systems, 2005, section 7.1): E = Σ_{i>r} σ_i². From there, W and V take turns: each is the solution of a linear
least-squares problem when the other is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.utils import logging

from .hankel import Balanced, balance
from .least_squares import PRECONDITIONER_RIDGE, conjugate_gradients, with_ridge
from .mixers import Mixer, stream_states
from .statistics import StateStatistics

logger = logging.get_logger(__name__)

# Of the balanced coordinates, the least squares use the first 4 r, but at least this many: what lies beyond hardly
# reaches the output, and what is fitted there is noise.
FEWEST_COORDINATES = 32
# Up to this number of states, a curve is measured before the number of states is chosen by it.
COORDINATES_OF_A_CURVE = 64
# Conjugate-gradient steps each time that W or V is solved for.
STEPS_PER_ROUND = 6
PENALTY = 1e-3
# Where balanced truncation loses more than this, least squares would mend many tokens at the cost of few decisive
# ones: on a recall task that needs more states than are kept, the loss rose by half while the error fell.
LARGEST_ERROR_TO_FIT = 0.5


@dataclass(frozen=True)
class Projection:
    """A projection and what it costs.

    Attributes:
        B_projection, C_projection: [W_1 | ... | W_G] and [V_1 | ... | V_G], shape (N, groups × r), float32, on the
            CPU.
        relative_error: √(E / Σ w y²) on the calibration tokens.
        method: `balanced` or `alternating least squares`; `none` where all states stay, and W and V are the identity.
        error_curve: the relative error of balanced truncation alone with r = 0 … N states, as `measured_error_curve`.
        hankel_values: as `measured_hankel_values`.
    """

    B_projection: torch.Tensor
    C_projection: torch.Tensor
    relative_error: float
    method: str
    error_curve: torch.Tensor
    hankel_values: torch.Tensor


def mean_field_error_curve(statistics: StateStatistics) -> torch.Tensor:
    """The relative error √(Σ_{i>r} σ_i² / Σ σ_i²) expected with r = 0 … N states, shape (N + 1,); groups add up.

    It takes no look at the data beyond the Gramians; where readouts and states depend on each other, the true error is
    several times larger.
    """
    squares = balance(statistics.state_gram, statistics.readout_gram).singular_values.square().sum(0)
    left = squares.flip(0).cumsum(0).flip(0) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    return torch.cat([left, left.new_zeros(1)]).clamp(0, 1).sqrt()


@torch.no_grad()
def measured_error_curve(mixer: Mixer, statistics: StateStatistics) -> torch.Tensor:
    """The relative error of balanced truncation on the recorded inputs with r = 0 … N states, shape (N + 1,).

    It is measured up to the number of balanced coordinates that a fit looks at; from there on the mean field's curve
    goes on, scaled so that it meets what was measured last.
    """
    balanced = balance(statistics.state_gram, statistics.readout_gram)
    coordinates = min(statistics.state_size, COORDINATES_OF_A_CURVE)
    W, V = balanced.W[..., :coordinates], balanced.V[..., :coordinates]
    # Of a small error little is left after the subtraction, so the sums over chunks are taken in float64.
    sums = {"dtype": torch.float64, "device": statistics.state_gram.device}
    cross, contributions = torch.zeros(coordinates, **sums), torch.zeros(coordinates, coordinates, **sums)
    energy = torch.zeros((), **sums)
    for h, c, y, weight in _stream_coordinates(mixer, statistics, W, V):
        root = weight.sqrt()[..., None]
        parts = (h * c[..., None, :] * root).flatten(0, -2)
        cross += parts.T @ (y[..., None] * root).flatten()
        contributions += parts.T @ parts
        energy += (weight * y.square()).sum()
    return _error_curve(cross, contributions, energy, statistics)


def _error_curve(
    cross: torch.Tensor, contributions: torch.Tensor, energy: torch.Tensor, statistics: StateStatistics
) -> torch.Tensor:
    """From Σ w y c_i h'_i, Σ w c_i h'_i c_j h'_j and Σ w y², over tokens, groups and channels."""
    cross, contributions, energy = cross.double(), contributions.double(), energy.double()
    # With the first r coordinates, E(r) = Σ w y² − 2 Σ_{i≤r} Σ w y c_i h'_i + Σ_{i,j≤r} Σ w c_i h'_i c_j h'_j.
    corners = contributions.cumsum(0).cumsum(1).diagonal()
    errors = torch.cat([energy[None], energy - 2 * cross.cumsum(0) + corners]).clamp_min(0).cpu()
    measured = (errors / errors[0].clamp_min(torch.finfo(errors.dtype).tiny)).clamp(max=1).sqrt()
    # One more state can make it a little worse; what is kept then is the better of the two.
    measured = measured.cummin(0).values
    if len(measured) == statistics.state_size + 1:
        measured[-1] = 0
        return measured
    expected = mean_field_error_curve(statistics)
    at_the_last = expected[len(measured) - 1].clamp_min(torch.finfo(expected.dtype).tiny)
    return torch.cat([measured, expected[len(measured) :] / at_the_last * measured[-1]])


def measured_hankel_values(statistics: StateStatistics) -> torch.Tensor:
    """σ, the Hankel singular values measured on the data, in falling order, shape (groups, N), float64."""
    return balance(statistics.state_gram, statistics.readout_gram).singular_values


@torch.no_grad()
def fit_projection(mixer: Mixer, statistics: StateStatistics, rank: int, *, rounds: int) -> Projection:
    """Find the projection to `rank` states that best reproduces a layer's output on its recorded inputs.

    Args:
        mixer: a mixer of a Mamba-2 layout; it is only read.
        statistics: of this layer, with its recorded inputs.
        rank: r, the states that each group keeps.
        rounds: how often W and V take turns; 0 keeps the balanced truncation, as does an error of it that is too large
            to be mended.
    """
    size, groups = statistics.state_size, statistics.groups
    balanced = balance(statistics.state_gram, statistics.readout_gram)
    if rank == size:
        # Exact, also in directions that these inputs did not reach.
        unit = torch.eye(size).repeat(1, groups)
        curve = measured_error_curve(mixer, statistics)
        return Projection(unit, unit.clone(), 0.0, "none", curve, balanced.singular_values)
    W, V = _fill_up(mixer.name, balanced, rank)
    coordinates = min(size, max(FEWEST_COORDINATES, 4 * rank))
    W, V = W[..., :coordinates], V[..., :coordinates]
    tokens = _token_sums(mixer, statistics, W, V)
    curve = _error_curve(
        (tokens.c * tokens.p).sum((0, 1), dtype=torch.float64),
        torch.einsum("tgi,tgij,tgj->ij", tokens.c, tokens.gram, tokens.c),
        tokens.energy.sum(dtype=torch.float64),
        statistics,
    )
    if curve[rank] > LARGEST_ERROR_TO_FIT:
        rounds = 0
    energy, error, columns = tokens.energy.sum(dtype=torch.float64), 0.0, []
    for group in range(groups):
        part = tokens.of_group(group)
        left = right = torch.eye(coordinates, rank, dtype=torch.float64)
        fits = [(part.error(left, right), left, right)]
        # A group that passes nothing on has nothing to fit.
        if balanced.numerical_rank[group] > 0:
            for _ in range(rounds):
                right = _solve(part, left, right, balanced.singular_values[group], solve_for="right")
                left = _solve(part, left, right, balanced.singular_values[group], solve_for="left")
                fits.append((part.error(left, right), left, right))
        best, left, right = min(fits, key=lambda fit: float(fit[0]))
        error = error + best
        columns.append((W[group] @ left, V[group] @ right))
    relative = (error.clamp_min(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt()
    return Projection(
        B_projection=torch.cat([W for W, _ in columns], dim=1).float(),
        C_projection=torch.cat([V for _, V in columns], dim=1).float(),
        relative_error=float(relative),
        method="alternating least squares" if rounds > 0 else "balanced",
        error_curve=curve,
        hankel_values=balanced.singular_values,
    )


def _fill_up(layer: str, balanced: Balanced, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W and V with all N columns; where the Gramians have less than `rank` directions, further states start unread.

    Such states cost nothing in what the layer passes on: their column of W is orthonormal to the others, that of V is
    zero, and training may find a use for them.
    """
    W, V = balanced.W.clone(), balanced.V
    for group, found in enumerate(balanced.numerical_rank.tolist()):
        if found >= rank:
            continue
        logger.warning(
            f"layer {layer}: only {found} directions of its {W.shape[-1]} states carry anything (group {group}); "
            f"{rank - found} of the {rank} states kept start unread"
        )
        basis, _ = torch.linalg.qr(torch.cat([W[group][:, :found], torch.eye(len(W[group]), dtype=W.dtype)], dim=1))
        W[group][:, found:rank] = basis[:, found:rank]
    return W, V


@dataclass(frozen=True)
class _TokenSums:
    """What the fit needs of each token and group, in k balanced coordinates h' = Wᵀ h and c = Vᵀ C.

    Attributes:
        gram: Σ_d w h' h'ᵀ, shape (tokens, groups, k, k).
        p: Σ_d w y h', shape (tokens, groups, k).
        c: shape (tokens, groups, k).
        energy: Σ_d w y², shape (tokens, groups).
    """

    gram: torch.Tensor
    p: torch.Tensor
    c: torch.Tensor
    energy: torch.Tensor

    def of_group(self, group: int) -> _TokenSums:
        return _TokenSums(self.gram[:, group], self.p[:, group], self.c[:, group], self.energy[:, group])

    def error(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """E of one group with W = W_k · left and V = V_k · right, both of shape (k, r)."""
        v = (self.c.double() @ (right @ left.T).to(self.c.device)).float()
        return (self.energy + ((self.times_gram(v) - 2 * self.p) * v).sum(-1)).sum(dtype=torch.float64)

    def times_gram(self, v: torch.Tensor) -> torch.Tensor:
        return (self.gram @ v[..., None]).squeeze(-1)


def _stream_coordinates(
    mixer: Mixer, statistics: StateStatistics, W: torch.Tensor, V: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield h' (tokens, groups, channels, k), c (tokens, groups, k), y and its weight (tokens, groups, channels)."""
    device = statistics.state_gram.device
    W, V = W.to(device, torch.float32), V.to(device, torch.float32)
    for hidden_states, mask in statistics.inputs:
        with torch.autocast(device.type, enabled=False):
            inputs = mixer.scan_inputs(hidden_states.to(device), mask).sampled()
            for first, states in stream_states(inputs):
                C = inputs.C[:, first : first + states.shape[0]].transpose(0, 1)
                y = (states @ C[..., None]).squeeze(-1)
                c = torch.einsum("tbgn,gnk->tbgk", C, V)
                yield tuple(item.flatten(0, 1) for item in (states @ W, c, y, inputs.weight(y, first)))


def _token_sums(mixer: Mixer, statistics: StateStatistics, W: torch.Tensor, V: torch.Tensor) -> _TokenSums:
    parts = []
    for h, c, y, weight in _stream_coordinates(mixer, statistics, W, V):
        wh = (h * weight[..., None]).transpose(-1, -2)
        parts.append((wh @ h, (wh @ y[..., None]).squeeze(-1), c, (weight * y.square()).sum(-1)))
    return _TokenSums(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _solve(
    tokens: _TokenSums,
    left: torch.Tensor,
    right: torch.Tensor,
    singular_values: torch.Tensor,
    solve_for: str,
) -> torch.Tensor:
    """The better right (V) for a fixed left (W), or the other way round, by preconditioned conjugate gradients.

    With W fixed, x_t = leftᵀ h' are the states that are read, and what is solved for is right in c_tᵀ right x_t; with
    V fixed, z_t = rightᵀ c_t are the readouts, and it is left in h'ᵀ left z_t. Both are (k × r), and in both the k
    rows have the mean-field Gram diag σ. The penalty λ draws the solution to where it starts from.
    """
    c, gram, p = tokens.c.double(), tokens.gram, tokens.p.double()
    left, right = left.to(c.device), right.to(c.device)
    rows = singular_values[: c.shape[1]].to(c.device)[:, None]
    if solve_for == "right":
        start = right
        L = left.float()
        grams, rhs = L.T @ gram @ L, c.T @ (p @ left)
        small = grams.sum(0).double()

        def apply(X: torch.Tensor) -> torch.Tensor:
            return c.T @ (grams @ (c @ X).float()[..., None]).squeeze(-1).double()
    else:
        start = left
        z = c @ right
        rhs, small = p.T @ z, z.T @ z

        def apply(X: torch.Tensor) -> torch.Tensor:
            return tokens.times_gram((z @ X.T).float()).double().T @ z

    small = small / len(c)
    scale = PENALTY * rows * small.diagonal()
    inverse = torch.linalg.inv(with_ridge(small, PRECONDITIONER_RIDGE))
    row_scale = rows + PRECONDITIONER_RIDGE * rows.mean()

    def operator(X: torch.Tensor) -> torch.Tensor:
        return apply(X) + scale * X

    residual = rhs + scale * start - operator(start)
    return conjugate_gradients(
        operator, residual, start, lambda residual: residual @ inverse / row_scale, STEPS_PER_ROUND
    ).cpu()
