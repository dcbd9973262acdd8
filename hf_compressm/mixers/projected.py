"""The projected Mamba-2 layout: two matrices per group take N features to the r states of the scan.

G = n_groups, N = feature_size, r = ssm_state_size. `B_projection` is [W_1 | ... | W_G] and `C_projection`
[V_1 | ... | V_G], both of shape (N, G r); everything else is Mamba-2 with N features in the place of the states. A
change of the state's basis multiplies into the two matrices; a selection of states takes columns of them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..modeling_compressm import PROJECTIONS, project
from . import mamba2
from .mamba2 import PARTS, decay_rates, groups
from .scan import ScanInputs, StateAxis

__all__ = ["PARTS", "decay_rates", "groups"]

NAME = "projected Mamba-2"
CAN_REFIT = False


def state_axes(mixer: nn.Module) -> list[StateAxis]:
    """The parameters that hold the state, and where in them."""
    return [
        StateAxis(mixer, name, dim=1, roles=(role,) * mixer.n_groups)
        for name, role in zip(PROJECTIONS, ("B", "C"), strict=True)
    ]


def set_state_size(mixer: nn.Module, state_size: int) -> None:
    """Write the new size into the number that the forward reads; the parameters have it already."""
    mixer.ssm_state_size = state_size


def parameter_norms(mixer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the rows that make B̃ and C̃ before the convolution, each of shape (groups, r), float32."""
    rows = mamba2.feature_rows(mixer)
    matrices = (mixer.B_projection, mixer.C_projection)
    return tuple(
        torch.einsum("gnd,ngr->grd", part, matrix.detach().float().unflatten(1, (mixer.n_groups, -1))).norm(dim=-1)
        for part, matrix in zip(rows, matrices, strict=True)
    )


def scan_inputs(mixer: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> ScanInputs:
    """Recompute the recurrence's inputs from the mixer's input, in float32; arguments as in the Mamba-1 layout."""
    inputs = mamba2.scan_inputs(mixer, hidden_states, attention_mask)
    B, C = (
        project(features.flatten(2), matrix.float(), mixer.n_groups)
        for features, matrix in ((inputs.B, mixer.B_projection), (inputs.C, mixer.C_projection))
    )
    return dataclasses.replace(inputs, B=B, C=C)
