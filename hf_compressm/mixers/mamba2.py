"""The Mamba-2 layout: A is one number per head, B_t and C_t pass a convolution and an activation, in groups of heads.

Shapes: I = intermediate_size, G = n_groups, H = num_heads, N = ssm_state_size. The rows of `in_proj` are
[z: I | x: I | B: G N | C: G N | Δ: H], the channels of `conv1d` are [x: I | B: G N | C: G N]. B and C pass SiLU
behind the convolution, so only a selection of states folds into a stock model, the same number in every group. The
rows of the convolution's weight and bias go with the rows of in_proj, since SiLU(bias) is not zero.

Six architectures of Transformers share this layout and its names. Falcon-H1 scales the mixer's input and, by
`mup_vector`, the rows of in_proj's output; its norm may be missing, or come before the gate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .adapters import copies_of, effective_weight
from .mamba1 import causal_conv, epsilon_of, linear, token_mask
from .scan import ScanInputs, StateAxis

NAME = "Mamba-2"
CAN_REFIT = False
PARTS = ("A_log", "D", "dt_bias", "in_proj", "conv1d", "out_proj")


def state_axes(mixer: nn.Module) -> list[StateAxis]:
    """The parameters that hold the state, and where in them."""
    inner, roles = mixer.intermediate_size, ("B",) * mixer.n_groups + ("C",) * mixer.n_groups
    axes = []
    for module, before, after in ((mixer.in_proj, 2 * inner, mixer.num_heads), (mixer.conv1d, inner, 0)):
        for parameter in ("weight", "bias"):
            if getattr(module, parameter) is not None:
                axes.append(StateAxis(module, parameter, dim=0, roles=roles, before=before, after=after))
    return axes


def groups(mixer: nn.Module) -> int:
    return mixer.n_groups


def set_state_size(mixer: nn.Module, state_size: int) -> None:
    """Write the new size into the numbers that the forward reads; the parameters have it already."""
    if hasattr(mixer, "mup_vector"):
        # Each part of in_proj's output has one multiplier, so any N' of a part's N entries are right.
        axis = state_axes(mixer)[0]
        kept = torch.arange(state_size).expand(mixer.n_groups, -1)
        size = axis.state_size_of(mixer.mup_vector.shape[-1])
        mixer.mup_vector = mixer.mup_vector[..., axis.index(kept, size).to(mixer.mup_vector.device)]
        mixer.groups_time_state_size = mixer.n_groups * state_size
    mixer.ssm_state_size = state_size
    channels = mixer.intermediate_size + 2 * mixer.n_groups * state_size
    if hasattr(mixer, "conv_dim"):
        mixer.conv_dim = channels
    for conv in copies_of(mixer.conv1d):
        conv.in_channels = conv.out_channels = conv.groups = channels
    for in_proj in copies_of(mixer.in_proj):
        in_proj.out_features = mixer.intermediate_size + channels + mixer.num_heads


def decay_rates(mixer: nn.Module) -> torch.Tensor:
    """The negative rates A, shape (groups, channels, 1), float32: one number per head, for all of its channels."""
    return _per_channel(mixer, -effective_weight(mixer, "A_log").detach().exp())[..., None]


def feature_size(mixer: nn.Module) -> int:
    """The number of features that B_t and C_t have in each group: N, also where a projection leaves fewer states."""
    return getattr(mixer, "feature_size", mixer.ssm_state_size)


def feature_rows(mixer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The in_proj rows of B and of C, each of shape (groups, N, hidden), float32."""
    start, size = 2 * mixer.intermediate_size, feature_size(mixer)
    rows = effective_weight(mixer.in_proj).detach()[start : start + 2 * mixer.n_groups * size]
    B, C = rows.view(2, mixer.n_groups, size, -1)
    return B, C


def parameter_norms(mixer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the in_proj rows of B and of C, each of shape (groups, N), float32."""
    B, C = feature_rows(mixer)
    return B.norm(dim=-1), C.norm(dim=-1)


def scan_inputs(mixer: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> ScanInputs:
    """Recompute the recurrence's inputs from the mixer's input, in float32; arguments as in the Mamba-1 layout."""
    mask = token_mask(hidden_states, attention_mask)
    batch, length = mask.shape
    inner, size, n_groups = mixer.intermediate_size, feature_size(mixer), mixer.n_groups
    scale = getattr(mixer, "ssm_in_multiplier", 1)
    projected = linear(mixer.in_proj, hidden_states.float() * mask[..., None] * scale)
    if hasattr(mixer, "mup_vector"):
        projected = projected * mixer.mup_vector.float()
    z, mixed, delta = projected.split([inner, inner + 2 * n_groups * size, mixer.num_heads], dim=-1)
    mixed = mixer.act(causal_conv(mixer.conv1d, mixed)) * mask[..., None]
    x, B, C = mixed.split([inner, n_groups * size, n_groups * size], dim=-1)
    delta = F.softplus(delta + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)
    norm, gain = getattr(mixer, "norm", None), effective_weight(mixer.out_proj).norm(dim=0)
    if norm is None or isinstance(norm, nn.Identity):
        epsilon = norm_size = None
    else:
        gain, epsilon = gain * norm.weight.float(), epsilon_of(norm)
        # Before Transformers 5.18 or so, Mamba-2's norm took all channels together.
        norm_size = getattr(norm, "group_size", inner // getattr(norm, "n_groups", 1))
    return ScanInputs(
        delta=_per_channel(mixer, delta),
        A=decay_rates(mixer),
        x=x.reshape(batch, length, n_groups, -1),
        B=B.reshape(batch, length, n_groups, size),
        C=C.reshape(batch, length, n_groups, size),
        gate=F.silu(z).reshape(batch, length, n_groups, -1),
        gain=gain.view(n_groups, -1),
        mask=mask,
        D=mixer.D.float().view(n_groups, -1) if len(mixer.D) == inner else _per_channel(mixer, mixer.D.float()),
        norm_epsilon=epsilon,
        norm_size=norm_size,
        norm_before_gate=getattr(norm, "norm_before_gate", False),
    )


def _per_channel(mixer: nn.Module, per_head: torch.Tensor) -> torch.Tensor:
    """From (..., heads) to (..., groups, channels): a head's number holds for each of its channels."""
    spread = per_head[..., None].expand(*per_head.shape, mixer.head_dim)
    return spread.reshape(*per_head.shape[:-1], mixer.n_groups, -1)
