"""Mamba-1 with RMS norms on Δ, B and C (Jamba, Falcon-Mamba).

Parameters are those of the Mamba-1 layout, and in Jamba the norms' weights. With b_t = W_B u_t, and C_t likewise,

    B_t = g_B b_t / √(mean_n b_t[n]² + ε)

(in Falcon-Mamba g_B = 1: its weight is a buffer of ones, which only the fused kernels read).

A selection S of r states takes others out of the mean. Rows scaled by s = √(r/N) leave the mean as it was where the
removed b_t are zero, ε included, and make B_t smaller by s; elsewhere B_t also follows the ratio of the two root mean
squares, which no stock parameter can absorb:

    B'_t = g'_B s b_t[S] / √(mean_{n∈S} (s b_t[n])² + ε),       the same for C, with its readout refitted.

The weights of the norms make up for s where there are any: g'_B = g_B / s, g'_C = κ g_C / s, with the κ for which the
layer's error is the least (1, for states that do nothing). Where there are none, the scan's output becomes κ / s²
times too small, so out_proj is multiplied by that, and the skip D divided by it. So the removal of states with zero
b_t and c_t is exact, and a stock checkpoint says all there is to say: neither ε nor the config has to change.

Weights behind the norms (Jamba) allow more: rows multiplied by α_n > 0, and the weights divided by it, leave the
numerators as they are and change the mean to that of (s α_n b_t[n])². The α are chosen so that it is, for as many
tokens as possible, what it was with all states (`balance`).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from . import mamba1
from .mamba1 import decay_rates, epsilon_of, groups, token_mask
from .scan import Normalization, ScanInputs, StateAxis

__all__ = ["decay_rates", "groups"]

NAME = "Mamba-1, B and C normalized"
CAN_REFIT = True
PARTS = (*mamba1.PARTS, "dt_layernorm", "b_layernorm", "c_layernorm")

# A norm's weight below this share of the largest one is not divided by.
SMALLEST_WEIGHT = 1e-3
# The least α beside the largest, and the number of updates that find them.
SMALLEST_BALANCE = 0.1
BALANCE_STEPS = 500


def has_weights(mixer: nn.Module) -> bool:
    """Whether the norms on B and C have weights that the forward reads."""
    return isinstance(mixer.b_layernorm.weight, nn.Parameter)


def state_axes(mixer: nn.Module) -> list[StateAxis]:
    """The parameters that hold the state, and where in them; and those that are scaled along."""
    axes = mamba1.state_axes(mixer)
    if has_weights(mixer):
        axes += [
            StateAxis(norm, "weight", dim=0, roles=(role,))
            for norm, role in ((mixer.b_layernorm, "B norm"), (mixer.c_layernorm, "C norm"))
        ]
    else:
        axes += [
            StateAxis(mixer, "D", dim=0, roles=(), before=mixer.intermediate_size, whole="D"),
            StateAxis(mixer.out_proj, "weight", dim=0, roles=(), before=mixer.hidden_size, whole="out"),
        ]
    return axes


def set_state_size(mixer: nn.Module, state_size: int) -> None:
    """Write the new size into the numbers that the forward reads; the parameters have it already."""
    mamba1.set_state_size(mixer, state_size)
    if not has_weights(mixer):
        for norm in (mixer.b_layernorm, mixer.c_layernorm):
            norm.weight = norm.weight.new_ones(state_size)


def parameter_norms(mixer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the rows of W_B and W_C times the norms' weights, each of shape (groups, N), float32."""
    weights = (mixer.b_layernorm.weight, mixer.c_layernorm.weight)
    return tuple(
        rows * weight.detach().float().abs()
        for rows, weight in zip(mamba1.parameter_norms(mixer), weights, strict=True)
    )


def scan_inputs(mixer: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> ScanInputs:
    """Recompute the recurrence's inputs from the mixer's input, in float32; arguments as in the Mamba-1 layout."""
    mask = token_mask(hidden_states, attention_mask)
    x, gate = mamba1.convolved(mixer, hidden_states, mask)
    delta, b, c = mamba1.features(mixer, x)
    epsilon = epsilon_of(mixer.b_layernorm)
    B_weight, C_weight = (norm.weight.float() for norm in (mixer.b_layernorm, mixer.c_layernorm))
    delta_weight = mixer.dt_layernorm.weight.float() if has_weights(mixer) else 1.0
    delta = delta_weight * delta / root_mean_square(delta, epsilon_of(mixer.dt_layernorm))
    B = B_weight * b / root_mean_square(b, epsilon)
    C = C_weight * c / root_mean_square(c, epsilon)
    normalization = Normalization(B_weight, C_weight, epsilon, b[:, :, None], c[:, :, None])
    return mamba1.with_delta(mixer, delta, x, gate, B, C, mask, normalization)


def root_mean_square(features: torch.Tensor, epsilon: float) -> torch.Tensor:
    return (features.square().mean(-1, keepdim=True) + epsilon).sqrt()


def row_scale(kept: int, state_size: int) -> float:
    """s = √(r/N), which keeps a sum's mean over N entries when it becomes a mean over r."""
    return math.sqrt(kept / state_size)


def raw_readout(readout: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """From C'_t = M C_t to the new rows of W_C, diag(1/g_S) M diag(g): M acts behind the norm's weight, they before.

    Args:
        readout: M, shape (r, N).
        kept: S, shape (r,).
        weight: g, shape (N,).
    """
    weight = weight.to(readout)
    smallest = (SMALLEST_WEIGHT * weight.abs().max()).clamp_min(torch.finfo(weight.dtype).tiny)
    divisor = torch.where(weight.abs() < smallest, smallest.copysign(weight), weight)[kept]
    return readout * weight / divisor[:, None]


def balance(squares: torch.Tensor, mean_squares: torch.Tensor, epsilon: float, state_size: int) -> torch.Tensor:
    """α with Σ_n α_n² b_t[n]² / N as close as possible to the mean of all states' b_t², relative to that.

    Non-negative least squares for α², by multiplicative updates (Lee and Seung, NIPS 2000) from α = 1, which is the
    solution where the removed states are zero.

    Args:
        squares: b_t² of the states that stay, shape (tokens, r).
        mean_squares: mean_n b_t[n]² + ε of all states, shape (tokens,).
        epsilon: ε.
        state_size: N.

    Returns:
        α, shape (r,), float32, on the device of the squares.
    """
    mean_squares = mean_squares.double().clamp_min(torch.finfo(torch.float32).tiny)
    shares = squares.double() / state_size / mean_squares[:, None]
    wanted = shares.T @ (1 - epsilon / mean_squares)
    products = shares.T @ shares
    alpha_squared = torch.ones_like(wanted)
    for _ in range(BALANCE_STEPS):
        alpha_squared = alpha_squared * wanted / (products @ alpha_squared).clamp_min(torch.finfo(wanted.dtype).tiny)
    alpha = alpha_squared.clamp_min(0).sqrt()
    largest = float(alpha.max())
    if not 0 < largest < math.inf:
        # All are zero: whatever they are multiplied with.
        return torch.ones_like(alpha).float()
    # A state that is hardly ever written keeps rows of a size that can be trained.
    return alpha.clamp_min(SMALLEST_BALANCE * largest).float()


def scales(
    mixer: nn.Module, gain: float, B_balance: torch.Tensor, C_balance: torch.Tensor
) -> dict[str, float | list[float]]:
    """What rows of each role are multiplied with: role → numbers; κ and α as in the module's docstring."""
    scale = row_scale(len(B_balance), mixer.ssm_state_size)
    if not has_weights(mixer):
        return {"B": scale, "C": scale, "D": scale**2 / gain, "out": gain / scale**2}
    B_rows, C_rows = scale * B_balance, scale * C_balance
    return {
        "B": B_rows.tolist(),
        "C": C_rows.tolist(),
        "B norm": (1 / B_rows).tolist(),
        "C norm": (gain / C_rows).tolist(),
    }
