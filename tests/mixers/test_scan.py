"""The recurrence: axes of the parameters, inputs recomputed from a mixer's input, states streamed in chunks."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, lively, projection_plan, stir
from naive import run_mixer
from torch import nn

from hf_compressm import compress_
from hf_compressm.mixers import Mixer, ScanInputs, StateAxis, find_mixers, stream_states

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
