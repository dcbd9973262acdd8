"""The Mamba-1 layout: A per channel and state, B_t and C_t linear in the convolved input and shared by all channels.

Shapes: I = intermediate_size, R = time_step_rank, N = ssm_state_size. `A_log` is (I, N); the rows of `x_proj.weight`
are [Δ: R | B: N | C: N]. Because B_t and C_t are linear, a selection of states and any new rows of C fold into these
two parameters: the result is a stock model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .scan import ScanInputs, StateAxis

NAME = "Mamba-1"


def state_axes(mixer: nn.Module) -> list[StateAxis]:
    """The parameters that hold the state, and where in them."""
    return [
        StateAxis(mixer, "A_log", dim=1, blocks=1),
        StateAxis(mixer.x_proj, "weight", dim=0, blocks=2, before=mixer.time_step_rank),
    ]


def readout_axis(mixer: nn.Module) -> tuple[StateAxis, int]:
    """The axis whose rows read the state out (C), and the number of its block: new rows may be put there."""
    return state_axes(mixer)[1], 1


def groups(mixer: nn.Module) -> int:
    return 1


def set_state_size(mixer: nn.Module, state_size: int) -> None:
    """Write the new size into the numbers that the forward reads; the parameters have it already."""
    mixer.ssm_state_size = state_size
    mixer.x_proj.out_features = mixer.x_proj.weight.shape[0]


def decay_rates(mixer: nn.Module) -> torch.Tensor:
    """The negative rates A, shape (groups, channels, N), float32."""
    return -mixer.A_log.detach().float().exp()[None]


def parameter_norms(mixer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the rows of W_B and W_C, each of shape (groups, N), float32."""
    axis, readout = readout_axis(mixer)
    weight = mixer.x_proj.weight.detach().float()
    size = mixer.ssm_state_size
    return tuple(weight[axis.block(block, size)].norm(dim=1)[None] for block in (0, readout))


def scan_inputs(mixer: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> ScanInputs:
    """Recompute the recurrence's inputs from the mixer's input, in float32, by plain torch.

    The fused kernels take the weights raw and call no submodule, so hooks further inside would never fire.

    Args:
        mixer: a mixer of this layout.
        hidden_states: its input, shape (batch, length, hidden).
        attention_mask: 1 for real tokens, shape (batch, length); None if there is no padding.
    """
    mask = token_mask(hidden_states, attention_mask)
    x, z = linear(mixer.in_proj, hidden_states.float() * mask[..., None]).chunk(2, dim=-1)
    x = mixer.act(causal_conv(mixer.conv1d, x)) * mask[..., None]
    rank, size = mixer.time_step_rank, mixer.ssm_state_size
    delta, B, C = linear(mixer.x_proj, x).split([rank, size, size], dim=-1)
    delta = F.softplus(linear(mixer.dt_proj, delta))
    return ScanInputs(
        delta=delta[:, :, None],
        A=decay_rates(mixer),
        x=x[:, :, None],
        B=B[:, :, None],
        C=C[:, :, None],
        gate=F.silu(z)[:, :, None],
        gain=mixer.out_proj.weight.float().norm(dim=0)[None],
        mask=mask,
        D=mixer.D.float()[None],
    )


def token_mask(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return torch.ones(hidden_states.shape[:2], device=hidden_states.device)
    return (attention_mask != 0).to(hidden_states.device, torch.float32)


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())


def causal_conv(conv: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """The depthwise causal convolution over (batch, length, channels)."""
    bias = None if conv.bias is None else conv.bias.float()
    padding = conv.kernel_size[0] - 1
    mixed = F.conv1d(x.transpose(1, 2), conv.weight.float(), bias, padding=padding, groups=conv.groups)
    return mixed[..., : x.shape[1]].transpose(1, 2)
