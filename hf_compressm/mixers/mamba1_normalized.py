"""Mamba-1 with RMS norms on Δ, B and C (Jamba, Falcon-Mamba).

Parameters are those of the Mamba-1 layout, and in Jamba the norms' weights. With b_t = W_B u_t, and C_t likewise,

    B_t = g_B b_t / √(mean_n b_t[n]² + ε)        (Falcon-Mamba: g_B = 1, and its weight is a buffer that nobody reads).

A selection S of r states takes others out of the mean. Rows scaled by s = √(r/N) leave the mean as it was where the
removed b_t are zero, ε included, and B_t smaller by s; elsewhere B_t also follows the ratio of the two root mean
squares, which no stock parameter can absorb:

    B'_t = κ_B s g_B b_t[S] / √(mean_{n∈S} (s b_t[n])² + ε),       the same for C, with its readout refitted.

What the constants κ_B and κ_C make up for on average (1/s each, for states that do nothing) is multiplied into the
weights of the norms where there are any. Where not, the scan's output becomes κ_B κ_C times too small, so out_proj is
multiplied by that, and the skip D divided by it. So the removal of states with zero b_t and c_t is exact, and a stock
checkpoint says all there is to say: neither ε nor the config has to change.

Weights behind the norms (Jamba) allow more: rows multiplied by α_n > 0, and the weights divided by it, leave the
numerators as they are and change the mean to that of (s α_n b_t[n])². The α are chosen so that it is, for as many
tokens as possible, what it was with all states (`balance`).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from . import mamba1
from .mamba1 import PARTS, decay_rates, epsilon_of, groups, token_mask
from .scan import Normalization, ScanInputs, StateAxis

__all__ = ["PARTS", "decay_rates", "groups"]

NAME = "Mamba-1, B and C normalized"
CAN_REFIT = True

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
    smallest = SMALLEST_WEIGHT * weight.abs().max()
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
    shares = (squares / state_size / mean_squares[:, None]).double()
    wanted = shares.T @ (1 - epsilon / mean_squares.double())
    products = shares.T @ shares
    alpha_squared = torch.ones_like(wanted)
    for _ in range(BALANCE_STEPS):
        alpha_squared = alpha_squared * wanted / (products @ alpha_squared).clamp_min(torch.finfo(wanted.dtype).tiny)
    # A state that is hardly ever written keeps rows of a size that can be trained.
    alpha = alpha_squared.clamp_min(0).sqrt()
    return alpha.clamp_min(SMALLEST_BALANCE * float(alpha.max())).float()


def scales(
    mixer: nn.Module, B_gain: float, C_gain: float, B_balance: torch.Tensor, C_balance: torch.Tensor
) -> dict[str, float | list[float]]:
    """What rows of each role are multiplied with: role → numbers; κ_B, κ_C and α as in the module's docstring."""
    scale = row_scale(len(B_balance), mixer.ssm_state_size)
    if not has_weights(mixer):
        gain = B_gain * C_gain
        return {"B": scale, "C": scale, "D": 1 / gain, "out": gain}
    return {
        "B": (scale * B_balance).tolist(),
        "C": (scale * C_balance).tolist(),
        "B norm": (B_gain / B_balance).tolist(),
        "C norm": (C_gain / C_balance).tolist(),
    }
