"""The recurrence that all layouts share: its inputs, its parameters' axes, and its states, streamed in time order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

# Elements of a chunk of states: 4 MiB in float32. Larger ones fall out of a CPU's cache, and their memory goes back to
# the system each time, so that it has to be asked for, page by page, for the next; smaller ones cost calls.
CHUNK_ELEMENTS = 2**20
# An accelerator works off as many as it gets; few chunks are few kernel launches. 128 MiB.
ACCELERATOR_CHUNK_ELEMENTS = 2**25
# Channels that sums over channels are estimated from; narrower layers are summed up whole.
SAMPLED_CHANNELS = 256


# Role of a `StateAxis` → what a cut multiplies its rows with: one number, or one for each state that stays.
Scales = Mapping[str, float | list[float]]


@dataclass(frozen=True)
class StateAxis:
    """One dimension of one parameter that a change of the state size N changes.

    Along `dim` lie `before` rows that have nothing to do with the state, one run of N rows for each of `roles`, and
    `after` further rows.

    Attributes:
        roles: what the runs of rows hold: `A`, `B` or `C`; with groups, B of each group and then C of each group. Rows
            of `C` read the state out. What a plan multiplies with a number has a name of its own.
        group_dim: the dimension that counts the groups, where each group has a parameter of its own in one tensor.
        whole: the role of all entries of a parameter without any state, which a cut only multiplies with a number.
    """

    module: nn.Module
    parameter: str
    dim: int
    roles: tuple[str, ...]
    before: int = 0
    after: int = 0
    group_dim: int | None = None
    whole: str | None = None

    @property
    def blocks(self) -> int:
        return len(self.roles)

    @property
    def tensor(self) -> nn.Parameter | None:
        return getattr(self.module, self.parameter, None)

    def length(self, state_size: int) -> int:
        return self.before + self.blocks * state_size + self.after

    def state_size_of(self, length: int) -> int | None:
        """The state size at which this dimension has the given length, or None where there is none."""
        if not self.roles:
            return None
        states, rest = divmod(length - self.before - self.after, self.blocks)
        return states if rest == 0 and states >= 1 else None

    def block(self, number: int, state_size: int) -> slice:
        start = self.before + number * state_size
        return slice(start, start + state_size)

    def index(self, kept: torch.Tensor, state_size: int) -> torch.Tensor:
        """Rows that stay along `dim`, in order; with a `group_dim` a row of them for each group.

        Args:
            kept: indices of the states that stay, shape (groups, r); block j belongs to group j modulo groups.
            state_size: the present N.
        """
        if self.group_dim is not None and len(kept) > 1:
            return torch.cat([self.index(group[None], state_size) for group in kept])
        groups = kept.shape[0]
        rows = [torch.arange(self.before)]
        rows += [self.before + number * state_size + kept[number % groups] for number in range(self.blocks)]
        first_after = self.before + self.blocks * state_size
        rows.append(torch.arange(first_after, first_after + self.after))
        index = torch.cat(rows)
        return index if self.group_dim is None else index[None]

    def take(self, values: torch.Tensor, kept: torch.Tensor, state_size: int) -> torch.Tensor:
        """What stays of a tensor of the parameter's shape; arguments as in `index`."""
        return take(values, self.dim, self.index(kept, state_size))

    def mixed(
        self, values: torch.Tensor, matrix: torch.Tensor, kept: torch.Tensor, number: int, state_size: int
    ) -> torch.Tensor:
        """The new entries of run `number`, rows of B or C that are refitted: M times the old ones, in float64.

        Args:
            values: of the parameter's shape.
            matrix: M, shape (groups, r, N).
            kept, state_size: as in `index`.
        """
        rows = values.narrow(self.dim, self.block(number, state_size).start, state_size).double()
        matrix = matrix.to(rows)
        return (matrix[number % len(matrix)] if self.group_dim is None else matrix) @ rows

    def factors(self, scales: Scales, state_size: int) -> torch.Tensor | None:
        """What the entries along `dim` are multiplied with; None if nothing is.

        Args:
            scales: role → a number for all of its rows, or one for each state.
            state_size: N of the parameter.
        """
        if not any(role in scales for role in (*self.roles, self.whole)):
            return None
        factors = torch.full((self.length(state_size),), scales.get(self.whole, 1.0), dtype=torch.float64)
        for number, role in enumerate(self.roles):
            factors[self.block(number, state_size)] = torch.tensor(scales.get(role, 1.0), dtype=torch.float64)
        return factors


def take(values: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """`index_select`; an index of two dimensions has a row for each entry of the values' first dimension."""
    index = index.to(values.device)
    if index.dim() == 1:
        return values.index_select(dim, index)
    # From the end, since each part has one dimension less in front.
    dim = dim % values.dim() - values.dim()
    return torch.stack([part.index_select(dim, rows) for part, rows in zip(values, index, strict=True)])


@dataclass(frozen=True)
class Normalization:
    """The RMS norms that some mixers put on B and C: B_t = g_B b_t / √(mean_n b_t[n]² + ε), with b_t = W_B u_t.

    Attributes:
        B_weight, C_weight: g_B and g_C, shape (N,); of norms without weights, ones.
        epsilon: ε.
        b, c: what the norms take, shape (batch, length, groups, N).
    """

    B_weight: torch.Tensor
    C_weight: torch.Tensor
    epsilon: float
    b: torch.Tensor
    c: torch.Tensor


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
        normalization: the norms on B and C, where there are any.
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
    normalization: Normalization | None = None

    def sampled(self, most: int = SAMPLED_CHANNELS) -> ScanInputs:
        """The recurrence of some channels only, to estimate sums over all of them; B, C and the tokens stay.

        Each channel has a recurrence of its own. Those taken are spread evenly over every group, and so over its
        heads; no random number is drawn. Behind a gated norm they are spread evenly over what it divides by one root
        mean square too, which is estimated from them. Sums are not scaled up: what they are used for is relative.

        Args:
            most: how many channels may be left, over all groups (at least one of each is).

        Returns:
            These inputs themselves where they have no more channels than that.
        """
        groups, channels = self.gain.shape
        # Within such a block all channels are in one group and under one norm.
        block = channels if self.norm_size is None else math.gcd(channels, self.norm_size)
        taken = max(1, most * block // (groups * channels))
        if taken >= block:
            return self
        # The middle of each of as many equal parts, block by block.
        middles = (2 * torch.arange(taken, device=self.gain.device) + 1) * block // (2 * taken)
        starts = torch.arange(0, channels, block, device=self.gain.device)
        index = (starts[:, None] + middles).flatten()
        per_channel = {name: getattr(self, name)[..., index] for name in ("delta", "x", "gate", "gain", "D")}
        norm_size = None if self.norm_size is None else self.norm_size // block * taken
        return dataclasses.replace(self, A=self.A[:, index], norm_size=norm_size, **per_channel)

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


def stream_states(inputs: ScanInputs, chunk_elements: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
    """Run the recurrence and yield its states chunk by chunk, so that never all of them are in memory.

    Args:
        inputs: the recurrence.
        chunk_elements: as in `run_states`.

    Yields:
        The time of the chunk's first step, and the states, shape (steps, batch, groups, channels, N), time first.
        The tensor is only valid until the next chunk is asked for.
    """
    delta, x, B = (values.transpose(0, 1) for values in (inputs.delta, inputs.x, inputs.B))

    def decay(time: slice) -> torch.Tensor:
        return (delta[time, ..., None] * inputs.A).exp_()

    for time, states in run_states(decay, delta * x, B, chunk_elements):
        yield time.start, states


def run_states(
    decay: Callable[[slice], torch.Tensor], drive: torch.Tensor, B: torch.Tensor, chunk_elements: int | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """h_t[g,d,n] = decay_t[g,d,n] h_{t−1}[g,d,n] + drive_t[g,d] B_t[g,n], chunk by chunk, time first.

    On a CPU the steps of a chunk, which fits its cache, follow each other; elsewhere, where each of them would be a
    kernel launch, they are combined in log₂(steps) rounds.

    Args:
        decay: a slice of time → shape (steps, batch, groups, channels, N or 1).
        drive: shape (length, batch, groups, channels).
        B: shape (length, batch, groups, N).
        chunk_elements: the most elements that one chunk of states may have (at least one time step is yielded); None:
            what suits the device.

    Yields:
        The chunk's time, and its states, shape (steps, batch, groups, channels, N).
    """
    on_cpu = drive.device.type == "cpu"
    if chunk_elements is None:
        chunk_elements = CHUNK_ELEMENTS if on_cpu else ACCELERATOR_CHUNK_ELEMENTS
    combine = recur if on_cpu else recur_by_doubling
    steps = max(1, chunk_elements // (drive[0].numel() * B.shape[-1]))
    state = B.new_zeros(*drive.shape[1:], B.shape[-1])
    for start in range(0, len(drive), steps):
        time = slice(start, min(start + steps, len(drive)))
        decays = decay(time)
        states = drive[time, ..., None] * B[time, :, :, None, :]
        states[0].addcmul_(decays[0], state)
        combine(decays, states)
        # The reader may change the chunk.
        state = states[-1].clone()
        yield time, states


def recur(decay: torch.Tensor, states: torch.Tensor) -> None:
    """Turn what drives each step into its state, in place: h_t = decay_t h_{t−1} + drive_t.

    Args:
        decay: shape (steps, ...).
        states: the drives, shape (steps, ...); that of the first step is its state already.
    """
    for step in range(1, len(states)):
        states[step].addcmul_(decay[step], states[step - 1])


def recur_by_doubling(decay: torch.Tensor, states: torch.Tensor) -> None:
    """The same without a loop over steps, by a prefix scan (Hillis and Steele, 1986).

    After each round, a step has taken up what twice as many steps before it have left.
    """
    decay, reach = decay.clone(), 1
    while reach < len(states):
        # Both sides overlap, so nothing may be written before all of it is read.
        states[reach:] = torch.addcmul(states[reach:], decay[reach:], states[:-reach])
        decay[reach:] = decay[reach:] * decay[:-reach]
        reach *= 2


def scan_output(inputs: ScanInputs) -> torch.Tensor:
    """What the recurrence and the skip put out, y_t + D x_t, shape (batch, length, groups, channels)."""
    parts = []
    for start, states in stream_states(inputs):
        C = inputs.C[:, start : start + len(states)].transpose(0, 1)
        parts.append((states @ C[..., None]).squeeze(-1))
    return torch.cat(parts).transpose(0, 1) + inputs.D * inputs.x
