"""Mamba-1 in heads (Zamba): each head is a Mamba-1 of its own, with its own B and C, in parameters shared by all.

Shapes: H = n_mamba_heads, P = mamba_head_dim, R = time_step_rank, N = ssm_state_size. `A_log` is (H, P, N), and
`x_proj_weight` (H, R + 2 N, P) with rows [Δ: R | B: N | C: N]. Heads are the groups: each keeps states of its own, and
has a readout of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .adapters import effective_weight
from .mamba1 import causal_conv, linear, token_mask
from .scan import ScanInputs, StateAxis

NAME = "Mamba-1, in heads"
CAN_REFIT = True
PARTS = ("A_log", "D", "in_proj", "conv1d", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "out_proj")


def state_axes(mixer: nn.Module) -> list[StateAxis]:
    """The parameters that hold the state, and where in them."""
    return [
        StateAxis(mixer, "A_log", dim=2, roles=("A",), group_dim=0),
        StateAxis(mixer, "x_proj_weight", dim=1, roles=("B", "C"), before=mixer.time_step_rank, group_dim=0),
    ]


def groups(mixer: nn.Module) -> int:
    return mixer.n_mamba_heads


def set_state_size(mixer: nn.Module, state_size: int) -> None:
    """Write the new size into the number that the forward reads; the parameters have it already."""
    mixer.ssm_state_size = state_size


def decay_rates(mixer: nn.Module) -> torch.Tensor:
    """The negative rates A, shape (groups, channels, N), float32."""
    return -effective_weight(mixer, "A_log").detach().exp()


def parameter_norms(mixer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the rows of W_B and W_C, each of shape (groups, N), float32."""
    rows = effective_weight(mixer, "x_proj_weight").detach()[:, mixer.time_step_rank :]
    B, C = rows.unflatten(1, (2, -1)).norm(dim=-1).unbind(1)
    return B, C


def scan_inputs(mixer: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> ScanInputs:
    """Recompute the recurrence's inputs from the mixer's input, in float32; arguments as in the Mamba-1 layout."""
    mask = token_mask(hidden_states, attention_mask)
    heads, size = mixer.n_mamba_heads, mixer.ssm_state_size
    # x and z of a channel lie side by side.
    x, z = linear(mixer.in_proj, hidden_states.float() * mask[..., None]).unflatten(-1, (-1, 2)).unbind(-1)
    x = (mixer.act(causal_conv(mixer.conv1d, x)) * mask[..., None]).unflatten(-1, (heads, -1))
    features = torch.einsum("blhp,hfp->blhf", x, effective_weight(mixer, "x_proj_weight"))
    delta, B, C = features.split([mixer.time_step_rank, size, size], dim=-1)
    delta = torch.einsum("blhr,hpr->blhp", delta, effective_weight(mixer, "dt_proj_weight"))
    return ScanInputs(
        delta=F.softplus(delta + effective_weight(mixer, "dt_proj_bias")),
        A=decay_rates(mixer),
        x=x,
        B=B,
        C=C,
        gate=F.silu(z).unflatten(-1, (heads, -1)),
        gain=effective_weight(mixer.out_proj).norm(dim=0).view(heads, -1),
        mask=mask,
        D=effective_weight(mixer, "D"),
    )
