"""The Mamba-1 layout: A per channel and state, B_t and C_t linear in the convolved input and shared by all channels.

Shapes: I = intermediate_size, R = time_step_rank, N = ssm_state_size. `A_log` is (I, N); the rows of `x_proj.weight`
are [Δ: R | B: N | C: N]. Because B_t and C_t are linear, a selection of states and any new rows of C fold into these
two parameters: the result is a stock model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .adapters import copies_of, effective_weight, weight_and_bias
from .scan import Normalization, ScanInputs, StateAxis

NAME = "Mamba-1"
CAN_REFIT = True
# What a mixer cannot be without.
PARTS = ("A_log", "D", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


def state_axes(mixer: nn.Module) -> list[StateAxis]:
    """The parameters that hold the state, and where in them."""
    return [
        StateAxis(mixer, "A_log", dim=1, roles=("A",)),
        StateAxis(mixer.x_proj, "weight", dim=0, roles=("B", "C"), before=mixer.time_step_rank),
    ]


def groups(mixer: nn.Module) -> int:
    return 1


def set_state_size(mixer: nn.Module, state_size: int) -> None:
    """Write the new size into the numbers that the forward reads; the parameters have it already."""
    mixer.ssm_state_size = state_size
    for x_proj in copies_of(mixer.x_proj):
        x_proj.out_features = mixer.time_step_rank + 2 * state_size


def decay_rates(mixer: nn.Module) -> torch.Tensor:
    """The negative rates A, shape (groups, channels, N), float32."""
    return -effective_weight(mixer, "A_log").detach().exp()[None]


def parameter_norms(mixer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the rows of W_B and W_C, each of shape (groups, N), float32."""
    weight = effective_weight(mixer.x_proj).detach()
    B, C = weight[mixer.time_step_rank :].unflatten(0, (2, -1)).norm(dim=2)
    return B[None], C[None]


def scan_inputs(mixer: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> ScanInputs:
    """Recompute the recurrence's inputs from the mixer's input, in float32, by plain torch.

    The fused kernels take the weights raw and call no submodule, so hooks further inside would never fire.

    Args:
        mixer: a mixer of this layout.
        hidden_states: its input, shape (batch, length, hidden).
        attention_mask: 1 for real tokens, shape (batch, length); None if there is no padding.
    """
    mask = token_mask(hidden_states, attention_mask)
    x, gate = convolved(mixer, hidden_states, mask)
    delta, B, C = features(mixer, x)
    return with_delta(mixer, delta, x, gate, B, C, mask)


def convolved(mixer: nn.Module, hidden_states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the scan, and silu(z), both of shape (batch, length, I)."""
    x, z = linear(mixer.in_proj, hidden_states.float() * mask[..., None]).chunk(2, dim=-1)
    return mixer.act(causal_conv(mixer.conv1d, x)) * mask[..., None], F.silu(z)


def features(mixer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What x_proj makes of the scan's input: the low-rank Δ (batch, length, R), B and C (batch, length, N)."""
    size = mixer.ssm_state_size
    return linear(mixer.x_proj, x).split([mixer.time_step_rank, size, size], dim=-1)


def with_delta(
    mixer: nn.Module,
    delta: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    mask: torch.Tensor,
    normalization: Normalization | None = None,
) -> ScanInputs:
    """The recurrence, from the low-rank Δ, the scan's input, silu(z), B and C; each (batch, length, ...)."""
    # The forward reads dt_proj's weight raw: an adapter around that layer does nothing.
    delta = F.softplus(F.linear(delta, mixer.dt_proj.weight.float(), mixer.dt_proj.bias.float()))
    return ScanInputs(
        delta=delta[:, :, None],
        A=decay_rates(mixer),
        x=x[:, :, None],
        B=B[:, :, None],
        C=C[:, :, None],
        gate=gate[:, :, None],
        gain=effective_weight(mixer.out_proj).norm(dim=0)[None],
        mask=mask,
        D=mixer.D.float()[None],
        normalization=normalization,
    )


def epsilon_of(norm: nn.Module) -> float:
    """The ε of an RMS norm, which goes by two names."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def token_mask(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return torch.ones(hidden_states.shape[:2], device=hidden_states.device)
    return (attention_mask != 0).to(hidden_states.device, torch.float32)


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A linear layer in float32, with what adapters add to it."""
    return F.linear(x, *weight_and_bias(layer))


def causal_conv(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The depthwise causal convolution over (batch, length, channels)."""
    weight, bias = weight_and_bias(conv)
    channels, _, width = weight.shape
    mixed = F.conv1d(x.transpose(1, 2), weight, bias, padding=width - 1, groups=channels)
    return mixed[..., : x.shape[1]].transpose(1, 2)
