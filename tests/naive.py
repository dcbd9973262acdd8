"""The oracle of the tests: one mixer's equations, written out with loops over numbers in float64, and its layout.

It is taken from the papers' equations, shares no code with the package, and is only fast enough for tiny mixers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from hf_compressm import StateStatistics
    from hf_compressm.mixers import Mixer


@dataclass
class NaiveRun:
    """One run of a mixer; b, t, d, g, n count sequences, times, channels, groups and states.

    Attributes:
        h: states, [b, t, d, n].
        B, C: [b, t, g, n].
        x, delta, weight, y: the scan's input, Δ, the error's weight and the scan's output without the skip, [b, t, d].
        output: what the mixer returns, [b, t, hidden].
        mask: [b, t].
        group: the group of each channel, [d].
    """

    h: np.ndarray
    B: np.ndarray
    C: np.ndarray
    x: np.ndarray
    delta: np.ndarray
    weight: np.ndarray
    y: np.ndarray
    output: np.ndarray
    mask: np.ndarray
    group: np.ndarray

    @property
    def groups(self) -> int:
        return self.B.shape[2]

    def tokens(self):
        """Every (sequence, time) that is not padding."""
        return zip(*np.nonzero(self.mask), strict=True)


def run_mixer(mixer: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> NaiveRun:
    """Run a mixer of either kind on inputs of shape (batch, length, hidden); Mamba-2's may be projected."""
    P = {name: parameter.detach().double().numpy() for name, parameter in mixer.named_parameters()}
    u = hidden_states.detach().double().numpy()
    batch, length, _ = u.shape
    mask = np.ones((batch, length)) if attention_mask is None else attention_mask.double().numpy()
    inner, size = mixer.intermediate_size, mixer.ssm_state_size
    second = hasattr(mixer, "n_groups")
    projections = [P.get(name) for name in ("B_projection", "C_projection")]
    features = size if projections[0] is None else projections[0].shape[0]
    # Falcon-H1's, and the norm it may lack or take before the gate.
    scale, scales = getattr(mixer, "ssm_in_multiplier", 1), falcon_scales(mixer)
    has_norm = "norm.weight" in P
    norm_first = has_norm and getattr(mixer.norm, "norm_before_gate", False)
    groups = mixer.n_groups if second else 1
    per_group = inner // groups
    shape = (batch, length, inner)
    run = NaiveRun(
        h=np.zeros((*shape, size)),
        B=np.zeros((batch, length, groups, size)),
        C=np.zeros((batch, length, groups, size)),
        x=np.zeros(shape),
        delta=np.zeros(shape),
        weight=np.zeros(shape),
        y=np.zeros(shape),
        output=np.zeros_like(u),
        mask=mask,
        group=np.arange(inner) // per_group,
    )
    for b in range(batch):
        projected = [linear(P, "in_proj", u[b, t] * mask[b, t] * scale) * scales for t in range(length)]
        for t in range(length):
            # The convolution sees the channels behind z in Mamba-2, and those before z in Mamba-1.
            first = inner if second else 0
            channels = P["conv1d.weight"].shape[0]
            convolved = np.array(
                [silu(convolution(P, projected, t, first, c)) * mask[b, t] for c in range(channels)],
            )
            x = run.x[b, t] = convolved[:inner]
            if second:
                z = projected[t][:inner]
                both = convolved[inner:].reshape(2, groups, features)
                for rows, out, matrix in zip(both, (run.B, run.C), projections, strict=True):
                    for g in range(groups):
                        part = np.eye(size) if matrix is None else matrix[:, g * size : (g + 1) * size]
                        out[b, t, g] = part.T @ rows[g]
                low, high = mixer.time_step_limit
                for d in range(inner):
                    head = d // mixer.head_dim
                    raw = projected[t][inner + channels + head] + P["dt_bias"][head]
                    run.delta[b, t, d] = min(max(softplus(raw), low), high)
            else:
                z = projected[t][inner:]
                rank = mixer.time_step_rank
                row = P["x_proj.weight"] @ x
                run.B[b, t, 0], run.C[b, t, 0] = row[rank : rank + size], row[rank + size :]
                delta = linear(P, "dt_proj", row[:rank])
                run.delta[b, t] = [softplus(value) for value in delta]
            passed_on = np.zeros(inner)
            for d in range(inner):
                g, head = run.group[d], d // mixer.head_dim if second else d
                for n in range(size):
                    A = -math.exp(P["A_log"][head] if second else P["A_log"][d, n])
                    before = run.h[b, t - 1, d, n] if t else 0.0
                    step = run.delta[b, t, d]
                    run.h[b, t, d, n] = math.exp(step * A) * before + step * run.B[b, t, g, n] * x[d]
                    run.y[b, t, d] += run.C[b, t, g, n] * run.h[b, t, d, n]
                passed_on[d] = run.y[b, t, d] + P["D"][head] * x[d]
            gate = np.array([silu(value) for value in z])
            if not norm_first:
                passed_on = passed_on * gate
            gain = gate**2 * (P["out_proj.weight"] ** 2).sum(0)
            if has_norm:
                together = norm_size(mixer)
                squares = np.repeat((passed_on.reshape(-1, together) ** 2).mean(1), together)
                squares += mixer.norm.variance_epsilon
                gain *= P["norm.weight"] ** 2 / squares
                passed_on = P["norm.weight"] * passed_on / np.sqrt(squares)
            if norm_first:
                passed_on = passed_on * gate
            run.weight[b, t] = gain * mask[b, t]
            run.output[b, t] = linear(P, "out_proj", passed_on)
    return run


def naive(mixer: Mixer, statistics: StateStatistics) -> NaiveRun:
    """The run of a mixer on the one input that its statistics were measured on."""
    ((hidden_states, mask),) = statistics.inputs
    return run_mixer(mixer.module, hidden_states, mask)


def norm_size(mixer: nn.Module) -> int:
    """How many channels the gated norm takes together: those of a group, of Mamba-2's own mixer once all."""
    groups = getattr(mixer.norm, "n_groups", 1)
    return getattr(mixer.norm, "group_size", mixer.intermediate_size // groups)


def falcon_scales(mixer: nn.Module) -> np.ndarray | float:
    """Falcon-H1's factors of z, x, B, C and Δ, one for each row of in_proj."""
    return mixer.mup_vector.double().numpy().reshape(-1) if hasattr(mixer, "mup_vector") else 1.0


def kept_part(name: str, tensor: torch.Tensor, kept: list[list[int]], size: int = 8) -> torch.Tensor:
    """What a cut leaves of a parameter of conftest's tiny models, or of a moment of its shape.

    Args:
        name: the parameter's name in the model.
        tensor: before the cut.
        kept: the states of each group that stay; one list for Mamba-1, two for Mamba-2.
        size: the number of states before the cut.
    """
    first = len(kept) == 1
    if name.endswith("A_log"):
        return tensor[:, kept[0]] if first else tensor
    if name.endswith("x_proj.weight"):
        # One row of Δ, then B and C.
        before, after = 1, 0
    elif not first and name.endswith(("in_proj.weight", "in_proj.bias")):
        # z and x with 32 rows each, then B and C of each group, and Δ of the four heads.
        before, after = 64, 4
    elif not first and name.endswith(("conv1d.weight", "conv1d.bias")):
        before, after = 32, 0
    else:
        return tensor
    blocks = 2 * len(kept)
    assert len(tensor) == before + blocks * size + after
    rows = [before + block * size + state for block in range(blocks) for state in kept[block % len(kept)]]
    return tensor[[*range(before), *rows, *range(len(tensor) - after, len(tensor))]]


def convolution(P: dict[str, np.ndarray], projected: list[np.ndarray], t: int, first: int, c: int) -> float:
    """Channel c of the causal convolution at time t."""
    kernel = P["conv1d.weight"].shape[-1]
    total = P["conv1d.bias"][c] if "conv1d.bias" in P else 0.0
    for back in range(min(kernel, t + 1)):
        total += P["conv1d.weight"][c, 0, kernel - 1 - back] * projected[t - back][first + c]
    return total


def linear(P: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return P[f"{name}.weight"] @ x + P.get(f"{name}.bias", 0.0)


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))
