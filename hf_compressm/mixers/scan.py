"""The recurrence that all layouts share: its inputs, its parameters' axes, and its states, streamed in time order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

# Elements of a chunk of states: 16 MiB in float32. Larger chunks fall out of a CPU's cache, smaller ones cost calls.
CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class StateAxis:
    """One dimension of one parameter whose length depends on the state size N.

    Along `dim` lie `before` rows that have nothing to do with the state, `blocks` runs of N rows (for example B, then
    C; with groups: B of each group, then C of each group), and `after` further rows.
    """

    module: nn.Module
    parameter: str
    dim: int
    blocks: int
    before: int = 0
    after: int = 0

    @property
    def tensor(self) -> nn.Parameter | None:
        return getattr(self.module, self.parameter)

    def length(self, state_size: int) -> int:
        return self.before + self.blocks * state_size + self.after

    def state_size_of(self, length: int) -> int | None:
        """The state size at which this dimension has the given length, or None where there is none."""
        states, rest = divmod(length - self.before - self.after, self.blocks)
        return states if rest == 0 and states >= 1 else None

    def block(self, number: int, state_size: int) -> slice:
        start = self.before + number * state_size
        return slice(start, start + state_size)

    def index(self, kept: torch.Tensor, state_size: int) -> torch.Tensor:
        """Rows that stay along `dim`, in order.

        Args:
            kept: indices of the states that stay, shape (groups, r); block j belongs to group j modulo groups.
            state_size: the present N.
        """
        groups = kept.shape[0]
        rows = [torch.arange(self.before)]
        rows += [self.before + number * state_size + kept[number % groups] for number in range(self.blocks)]
        first_after = self.before + self.blocks * state_size
        rows.append(torch.arange(first_after, first_after + self.after))
        return torch.cat(rows)


@dataclass(frozen=True)
class ScanInputs:
    """Everything that one mixer's recurrence needs, recomputed from the mixer's input.

    With g a group, d a channel of the group and n a state (Mamba, arXiv 2312.00752, equation 2, discretized):

        h_t[g,d,n] = exp(Δ_t[g,d] A[g,d,n]) h_{t-1}[g,d,n] + Δ_t[g,d] x_t[g,d] B_t[g,n]
        y_t[g,d]   = Σ_n C_t[g,n] h_t[g,d,n]                                (the skip D x_t is left out)

    Attributes:
        delta, x, gate: Δ, the scan's input and silu(z), shape (batch, length, groups, channels), float32.
        A: the negative decay rates, shape (groups, channels, N), or (groups, channels, 1) where all states share one.
        B, C: shape (batch, length, groups, N).
        gain: what the layer multiplies channel d with on its way out, shape (groups, channels).
        mask: 1 for a real token and 0 for padding, shape (batch, length).
        D: the skip's weight, shape (groups, channels).
        norm_epsilon: of the gated RMS norm behind the scan (Mamba-2); None where there is none.
        norm_size: how many neighbouring channels the norm divides by one root mean square.
        norm_before_gate: whether the norm takes its mean square before the gate is multiplied in.
    """

    delta: torch.Tensor
    A: torch.Tensor
    x: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    gate: torch.Tensor
    gain: torch.Tensor
    mask: torch.Tensor
    D: torch.Tensor
    norm_epsilon: float | None = None
    norm_size: int | None = None
    norm_before_gate: bool = False

    def weight(self, y: torch.Tensor, start: int) -> torch.Tensor:
        """How much a squared error of y_t[g,d] counts in what the layer passes on: silu(z)² ‖W_out[:,d]‖².

        Behind a gated norm the squared gain is divided by the mean square that the norm divides by. Padding counts 0.

        Args:
            y: the scan's output, shape (steps, batch, groups, channels), time first.
            start: the time of its first row.

        Returns:
            The weights, shaped as y.
        """
        time = slice(start, start + y.shape[0])
        gate = self.gate[:, time].transpose(0, 1)
        weight = (gate * self.gain) ** 2
        if self.norm_epsilon is not None:
            normed = y + self.D * self.x[:, time].transpose(0, 1)
            if not self.norm_before_gate:
                normed = normed * gate
            together = normed.square().flatten(-2).unflatten(-1, (-1, self.norm_size))
            mean_square = together.mean(-1, keepdim=True).expand_as(together).reshape(y.shape)
            weight = weight / (mean_square + self.norm_epsilon)
        return weight * self.mask[:, time].transpose(0, 1)[..., None, None]


def stream_states(inputs: ScanInputs, chunk_elements: int = CHUNK_ELEMENTS) -> Iterator[tuple[int, torch.Tensor]]:
    """Run the recurrence and yield its states chunk by chunk, so that never all of them are in memory.

    Args:
        inputs: the recurrence.
        chunk_elements: the most elements that one chunk of states may have (at least one time step is yielded).

    Yields:
        The time of the chunk's first step, and the states, shape (steps, batch, groups, channels, N), time first.
        The tensor is only valid until the next chunk is asked for.
    """
    batch, length, groups, channels = inputs.delta.shape
    state_size = inputs.B.shape[-1]
    steps = max(1, chunk_elements // (batch * groups * channels * state_size))
    state = inputs.B.new_zeros(batch, groups, channels, state_size)
    for start in range(0, length, steps):
        time = slice(start, start + steps)
        delta = inputs.delta[:, time].transpose(0, 1)
        decay = (delta[..., None] * inputs.A).exp_()
        drive = (delta * inputs.x[:, time].transpose(0, 1))[..., None]
        states = drive * inputs.B[:, time].transpose(0, 1)[:, :, :, None, :]
        for step in range(states.shape[0]):
            state = states[step].addcmul_(decay[step], state)
        state = state.clone()
        yield start, states
