"""The recurrence: axes of the parameters, inputs recomputed from a mixer's input, states streamed in chunks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import TINY, lively, projection_plan, stir
from naive import run_mixer
from torch import nn

from hf_compressm import compress_
from hf_compressm.mixers import Mixer, ScanInputs, StateAxis, find_mixers, scan, stream_states
from hf_compressm.mixers.scan import recur, recur_by_doubling

BATCH, LENGTH = 3, 10
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10, [0] + [1] * 9])
MASKS = {"none": None, "left": LEFT, "right": LEFT.flip(1)}
# States that the mixers of the Mamba-2 family are projected to.
RANKS = {"stock": None, "projected": 3}
OPTIONS = {"plain": {}, "biases": {"use_bias": True}, "no conv bias": {"use_conv_bias": False}}


def mixer_and_input(tiny, **options) -> tuple[nn.Module, torch.Tensor]:
    model = lively(tiny.build(**options))
    hidden_states = torch.randn(BATCH, LENGTH, 16, generator=torch.Generator().manual_seed(3))
    return next(iter(find_mixers(model).values())), hidden_states


def relative_and_input(relative, rank: int | None) -> tuple[Mixer, torch.Tensor]:
    """The last mixer of one of the Mamba-2 family, projected to some states or stock."""
    model = stir(relative.build())
    if rank is not None:
        compress_(model, projection_plan(model, rank))
    hidden_states = torch.randn(BATCH, LENGTH, 16, generator=torch.Generator().manual_seed(3))
    return list(find_mixers(model).values())[-1], hidden_states


@torch.no_grad()
def scan_inputs(mixer, hidden_states, mask) -> ScanInputs:
    return mixer.layout.scan_inputs(mixer.module, hidden_states, mask)


def all_states(inputs: ScanInputs, **options) -> torch.Tensor:
    """Every state, shape (batch, length, groups, channels, N)."""
    return torch.cat([states.clone() for _, states in stream_states(inputs, **options)]).transpose(0, 1)


class TestStateAxis:
    def axis(self, rows: int = 19) -> StateAxis:
        """Two rows before, four blocks of N = 4 (B and C of two groups), one row after."""
        return StateAxis(nn.Linear(3, rows), "weight", dim=0, roles=("B", "B", "C", "C"), before=2, after=1)

    def test_finds_the_parameter_and_its_length(self):
        axis = self.axis()
        assert axis.tensor is axis.module.weight
        assert axis.length(4) == 19
        assert axis.block(2, 4) == slice(10, 14)

    @pytest.mark.parametrize(("length", "state_size"), [(19, 4), (7, 1), (3, None), (18, None), (1, None)])
    def test_state_size_of_a_length(self, length, state_size):
        assert self.axis().state_size_of(length) == state_size

    def test_index_lists_the_rows_that_stay(self):
        kept = torch.tensor([[0, 3], [1, 2]])
        # Rows: two before; B of group 0 at 2..5, B of group 1 at 6..9, C at 10..13 and 14..17; the last at 18.
        assert self.axis().index(kept, 4).tolist() == [0, 1, 2, 5, 7, 8, 10, 13, 15, 16, 18]

    def test_axes_have_the_length_they_say(self, tiny):
        mixer, _ = mixer_and_input(tiny, use_bias=True)
        axes = mixer.layout.state_axes(mixer.module)
        assert len(axes) == {"mamba": 2, "mamba2": 4}[mixer.architecture.model_type]
        for axis in axes:
            assert axis.tensor.shape[axis.dim] == axis.length(mixer.state_size)

    def test_axes_leave_out_missing_biases(self, tiny):
        mixer, _ = mixer_and_input(tiny, use_bias=False, use_conv_bias=False)
        assert all(axis.tensor is not None for axis in mixer.layout.state_axes(mixer.module))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_scan_inputs_rebuild_the_mixers_output(tiny, options, mask):
    mixer, hidden_states = mixer_and_input(tiny, **options)
    module, inputs = mixer.module, scan_inputs(mixer, hidden_states, mask)
    states = all_states(inputs)
    with torch.no_grad():
        y = (states @ inputs.C[..., None]).squeeze(-1) + inputs.D * inputs.x
        gated = y * inputs.gate
        gated = gated.flatten(2)
        if inputs.norm_epsilon is not None:
            gated = module.norm(gated)
        rebuilt = module.out_proj(gated)
        expected = module.eval()(hidden_states, attention_mask=mask)
    torch.testing.assert_close(rebuilt, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_scan_inputs_rebuild_the_output_of_the_mamba2_family(relative, mask, rank):
    mixer, hidden_states = relative_and_input(relative, rank)
    module, inputs = mixer.module, scan_inputs(mixer, hidden_states, mask)
    assert inputs.B.shape == inputs.C.shape == (BATCH, LENGTH, 2, rank or 8)
    with torch.no_grad():
        y = (all_states(inputs) @ inputs.C[..., None]).squeeze(-1) + inputs.D * inputs.x
        y, gate = y.flatten(2), inputs.gate.flatten(2)
        # Without a gate of its own, the norm only norms.
        passed_on = module.norm(y) * gate if inputs.norm_before_gate else module.norm(y * gate)
        rebuilt, expected = module.out_proj(passed_on), module.eval()(hidden_states, attention_mask=mask)
    torch.testing.assert_close(rebuilt, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_scan_inputs_states_and_weights_equal_the_naive_loop(tiny, mask):
    assert_equal_to_the_naive_loop(*mixer_and_input(tiny, use_bias=True), mask)


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS.keys())
def test_states_and_weights_of_the_mamba2_family_equal_the_naive_loop(relative, rank):
    assert_equal_to_the_naive_loop(*relative_and_input(relative, rank), LEFT)


def assert_equal_to_the_naive_loop(mixer: Mixer, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> None:
    inputs, naive = scan_inputs(mixer, hidden_states, mask), run_mixer(mixer.module, hidden_states, mask)
    states = all_states(inputs)
    y = (states @ inputs.C[..., None]).squeeze(-1)
    weight = inputs.weight(y.transpose(0, 1), 0).transpose(0, 1)
    # Channels lie group by group, so flattening the two restores their order.
    for ours, oracle in [
        (inputs.B, naive.B),
        (inputs.C, naive.C),
        (inputs.delta.flatten(2), naive.delta),
        (states.flatten(2, 3), naive.h),
        (y.flatten(2), naive.y),
        (weight.flatten(2), naive.weight),
        (inputs.mask, naive.mask),
    ]:
        torch.testing.assert_close(ours.double(), torch.from_numpy(oracle), rtol=1e-4, atol=1e-5)


def test_naive_loop_equals_the_mixer(tiny):
    """The oracle itself, against Transformers."""
    mixer, hidden_states = mixer_and_input(tiny, use_bias=True)
    with torch.no_grad():
        expected = mixer.module.eval()(hidden_states, attention_mask=LEFT)
    oracle = torch.from_numpy(run_mixer(mixer.module, hidden_states, LEFT).output).float()
    torch.testing.assert_close(oracle, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS.keys())
def test_naive_loop_equals_the_mixers_of_the_mamba2_family(relative, rank):
    mixer, hidden_states = relative_and_input(relative, rank)
    with torch.no_grad():
        expected = mixer.module.eval()(hidden_states, attention_mask=LEFT)
    oracle = torch.from_numpy(run_mixer(mixer.module, hidden_states, LEFT).output).float()
    torch.testing.assert_close(oracle, expected, rtol=1e-4, atol=1e-5)


def test_time_step_limits_are_kept():
    mixer, hidden_states = mixer_and_input(TINY["mamba2"], time_step_limit=(0.02, 0.03))
    delta = scan_inputs(mixer, hidden_states, None).delta
    assert delta.min() == pytest.approx(0.02) and delta.max() == pytest.approx(0.03)
    naive = torch.from_numpy(run_mixer(mixer.module, hidden_states).delta)
    torch.testing.assert_close(delta.flatten(2).double(), naive, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_chunks_of_any_size_give_the_same_states(tiny, steps):
    mixer, hidden_states = mixer_and_input(tiny)
    inputs = scan_inputs(mixer, hidden_states, None)
    whole = list(stream_states(inputs))
    assert [(start, len(states)) for start, states in whole] == [(0, LENGTH)]
    per_step = whole[0][1][0].numel()
    chunks = [(start, states.clone()) for start, states in stream_states(inputs, chunk_elements=steps * per_step)]
    assert [start for start, _ in chunks] == list(range(0, LENGTH, steps))
    assert max(len(states) for _, states in chunks) == steps
    torch.testing.assert_close(torch.cat([states for _, states in chunks]), all_states(inputs).transpose(0, 1))


def test_a_chunk_has_at_least_one_step(tiny):
    mixer, hidden_states = mixer_and_input(tiny)
    chunks = list(stream_states(scan_inputs(mixer, hidden_states, None), chunk_elements=1))
    assert len(chunks) == LENGTH


def test_weights_of_a_chunk_belong_to_its_times(tiny):
    mixer, hidden_states = mixer_and_input(tiny)
    inputs = scan_inputs(mixer, hidden_states, LEFT)
    y = (all_states(inputs) @ inputs.C[..., None]).squeeze(-1).transpose(0, 1)
    torch.testing.assert_close(inputs.weight(y[4:7], 4), inputs.weight(y, 0)[4:7])


def test_weight_is_what_an_error_of_the_scan_costs_in_the_output():
    """Without a norm, the output is linear in y, so the cost of an error is exact."""
    mixer, hidden_states = mixer_and_input(TINY["mamba"])
    inputs = scan_inputs(mixer, hidden_states, None)
    y = torch.zeros(LENGTH, BATCH, 1, mixer.module.intermediate_size)
    error, channel = 0.7, 5
    passed_on = error * inputs.gate[:, :, 0, channel, None] * mixer.module.out_proj.weight[:, channel]
    weight = inputs.weight(y, 0)[:, :, 0, channel].T
    torch.testing.assert_close(passed_on.square().sum(-1), weight * error**2)


def wide_inputs(
    groups: int, channels: int, norm_size: int | None = None, *, shared_rate: bool = False, steps: int = 21
) -> ScanInputs:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    per_channel = (BATCH, steps, groups, channels)
    return ScanInputs(
        delta=random(*per_channel),
        A=-random(groups, channels, 1 if shared_rate else 4),
        x=random(*per_channel) - 0.5,
        B=random(BATCH, steps, groups, 4),
        C=random(BATCH, steps, groups, 4) - 0.5,
        gate=random(*per_channel),
        gain=random(groups, channels),
        mask=torch.ones(BATCH, steps),
        D=random(groups, channels),
        norm_epsilon=None if norm_size is None else 1e-5,
        norm_size=norm_size,
    )


class TestSampled:
    @pytest.mark.parametrize("most", [256, 24, 25])
    def test_narrow_layers_are_taken_whole(self, most):
        inputs = wide_inputs(2, 12)
        assert inputs.sampled(most) is inputs

    def test_channels_have_the_states_and_weights_that_they_have_among_all(self):
        inputs = wide_inputs(2, 12)
        some = inputs.sampled(8)
        # The middles of four equal parts of each group.
        index = [1, 4, 7, 10]
        assert torch.equal(some.gain, inputs.gain[:, index])
        torch.testing.assert_close(all_states(some), all_states(inputs)[:, :, :, index])
        y = torch.randn(21, BATCH, 2, 12, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(some.weight(y[..., index], 0), inputs.weight(y, 0)[..., index])

    @pytest.mark.parametrize(("heads", "most"), [(8, 8), (8, 20), (3, 16), (5, 7)])
    def test_every_head_is_represented(self, heads, most):
        inputs = wide_inputs(1, heads * 8)
        of_heads = torch.arange(heads).repeat_interleave(8)[None].float()
        inputs = dataclasses.replace(inputs, gain=of_heads)
        assert set(inputs.sampled(most).gain.flatten().tolist()) == set(range(heads))

    @pytest.mark.parametrize(
        ("norm_size", "index"),
        [
            pytest.param(24, [1, 4, 7, 10], id="over both groups"),
            pytest.param(12, [1, 4, 7, 10], id="over a group"),
            pytest.param(6, [1, 4, 7, 10], id="over half a group"),
            pytest.param(4, [2, 6, 10], id="over less than are left"),
        ],
    )
    def test_a_gated_norm_is_estimated_from_the_channels_it_divides(self, norm_size, index):
        inputs = wide_inputs(2, 12, norm_size)
        some = inputs.sampled(8)
        y = torch.randn(21, BATCH, 2, 12, generator=torch.Generator().manual_seed(1))
        normed = ((y + inputs.D * inputs.x.transpose(0, 1)) * inputs.gate.transpose(0, 1))[..., index].square()
        # Index 0 … of the sampled channels, counted through the groups, to the channel's norm.
        norms = torch.tensor([(group * 12 + channel) // norm_size for group in range(2) for channel in index])
        flat = normed.flatten(-2)
        means = torch.stack([flat[..., norms == norm].mean(-1) for norm in norms], dim=-1).view(normed.shape)
        expected = (inputs.gate.transpose(0, 1) * inputs.gain)[..., index] ** 2 / (means + 1e-5)
        torch.testing.assert_close(some.weight(y[..., index], 0), expected)


@pytest.mark.parametrize("shared_rate", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7, 8, 21])
def test_a_scan_by_doubling_equals_the_loop(shared_rate, steps):
    inputs = wide_inputs(2, 3, shared_rate=shared_rate, steps=steps)
    time_first = inputs.delta.transpose(0, 1)
    decay = (time_first[..., None] * inputs.A).exp()
    drive = (time_first * inputs.x.transpose(0, 1))[..., None] * inputs.B.transpose(0, 1)[:, :, :, None]
    naive, state = [], torch.zeros(drive.shape[1:], dtype=torch.float64)
    for one_decay, one_drive in zip(decay.double(), drive.double(), strict=True):
        state = one_decay * state + one_drive
        naive.append(state)
    for combine in (recur, recur_by_doubling):
        states = drive.clone()
        combine(decay.clone(), states)
        torch.testing.assert_close(states, torch.stack(naive).float())


def test_doubling_goes_on_from_chunk_to_chunk(monkeypatch):
    inputs = wide_inputs(1, 3)
    loop = all_states(inputs)
    monkeypatch.setattr(scan, "recur", scan.recur_by_doubling)
    torch.testing.assert_close(all_states(inputs, chunk_elements=BATCH * 3 * 4 * 5), loop)


def test_a_reader_may_overwrite_its_chunk():
    inputs, chunks = wide_inputs(1, 3), []
    for _, states in stream_states(inputs, chunk_elements=BATCH * 3 * 4 * 5):
        chunks.append(states.clone())
        states.fill_(torch.nan)
    torch.testing.assert_close(torch.cat(chunks).transpose(0, 1), all_states(inputs))
