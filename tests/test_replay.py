"""Recording what training sees, running it once more, and comparing outputs across a change."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import lively, tokens
from torch import nn
from transformers import BatchEncoding

from hf_compressm.replay import (
    InputRecorder,
    compare_outputs,
    count_tokens,
    evaluation_mode,
    first_rows,
    replay,
    to_device,
)


@pytest.fixture
def model(tiny):
    return tiny.build().train()


def recorded_ids(recorder: InputRecorder) -> list[torch.Tensor]:
    return [batch["input_ids"] for batch in recorder.batches]


class TestInputRecorder:
    def test_keeps_every_argument_of_training_batches(self, model):
        recorder = InputRecorder(model, tokens=1000)
        mask = torch.ones(4, 12, dtype=torch.long)
        model(input_ids=tokens(), labels=tokens(), attention_mask=mask)
        (batch,) = recorder.batches
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
        assert torch.equal(batch["input_ids"], tokens()) and torch.equal(batch["attention_mask"], mask)

    def test_names_arguments_given_by_position(self, model):
        recorder = InputRecorder(model, tokens=1000)
        model(tokens())
        assert torch.equal(recorded_ids(recorder)[0], tokens())

    def test_more_positions_than_names_are_refused(self):
        class Open(nn.Module):
            def forward(self, *inputs):
                return inputs[0]

        model = Open()
        InputRecorder(model, tokens=10)
        with pytest.raises(TypeError, match=r"Open\.forward was given 2 inputs by position.*pass them by keyword"):
            model(tokens(), tokens())

    def test_drops_old_batches_that_are_not_needed(self, model):
        recorder = InputRecorder(model, tokens=100)
        kept = []
        for seed in range(5):
            model(input_ids=tokens(4, 12, seed))
            kept.append(len(recorder.batches))
        # 48 tokens a batch: three are needed for 100.
        assert kept == [1, 2, 3, 3, 3]
        assert recorder.tokens == 3 * 48
        assert all(
            torch.equal(ids, tokens(4, 12, seed)) for ids, seed in zip(recorded_ids(recorder), (2, 3, 4), strict=True)
        )

    def test_keeps_a_batch_that_is_larger_than_wanted(self, model):
        recorder = InputRecorder(model, tokens=10)
        for seed in range(2):
            model(input_ids=tokens(4, 12, seed))
        (ids,) = recorded_ids(recorder)
        assert torch.equal(ids, tokens(4, 12, 1))

    def test_does_not_record_evaluation(self, model):
        recorder = InputRecorder(model, tokens=1000)
        with torch.no_grad():
            model(input_ids=tokens())
        model.eval()(input_ids=tokens())
        assert not recorder.batches and recorder.tokens == 0

    def test_copies_are_independent_of_the_loops_buffers(self, model):
        recorder = InputRecorder(model, tokens=1000)
        buffer = tokens()
        model(input_ids=buffer)
        buffer.zero_()
        assert torch.equal(recorded_ids(recorder)[0], tokens())

    def test_copies_hold_no_graph(self, model):
        recorder = InputRecorder(model, tokens=1000)
        model(inputs_embeds=model.get_input_embeddings()(tokens()))
        (batch,) = recorder.batches
        assert not batch["inputs_embeds"].requires_grad
        assert recorder.tokens == 48

    def test_gradient_checkpointing_records_each_batch_once(self, model):
        model.gradient_checkpointing_enable()
        recorder = InputRecorder(model, tokens=1000)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert len(recorder.batches) == 1

    def test_while_inactive_it_only_counts(self, model):
        recorder = InputRecorder(model, tokens=1000)
        recorder.active = False
        model(input_ids=tokens())
        assert not recorder.batches and recorder.tokens_per_forward == 48

    def test_changes_no_output_and_draws_no_random_number(self, model):
        plain, state = model(input_ids=tokens()).logits, torch.get_rng_state()
        InputRecorder(model, tokens=1000)
        assert torch.equal(model(input_ids=tokens()).logits, plain)
        assert torch.equal(torch.get_rng_state(), state)

    def test_remove_takes_the_hook_off(self, model):
        recorder = InputRecorder(model, tokens=1000)
        model(input_ids=tokens())
        recorder.remove()
        model(input_ids=tokens())
        assert not recorder.batches and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (tokens(3, 5), 15),
        ({"labels": torch.zeros(3), "input_ids": tokens(3, 5)}, 15),
        ({"other": tokens(9, 9), "input_ids": tokens(3, 5)}, 15),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 4, 16)}, 8),
        ({"labels": torch.zeros(3), "pixels": torch.zeros(3, 64, 1)}, 192),
        ((tokens(2, 6), tokens(3, 5)), 12),
        ([torch.zeros(3), tokens(2, 6)], 12),
        (BatchEncoding({"input_ids": tokens(3, 5)}), 15),
        ({"labels": torch.zeros(3)}, 0),
        ({}, 0),
        (None, 0),
    ],
)
def test_tokens_of_a_batch(batch, count):
    assert count_tokens(batch) == count


def test_to_device_copies_nested_tensors_and_passes_the_rest():
    inner = torch.ones(2, requires_grad=True)
    nested = {"a": inner, "b": [inner, (inner, "text")], "c": 3, "d": None}
    copy = to_device(nested, torch.device("cpu"))
    assert copy["a"] is not inner and not copy["a"].requires_grad
    assert copy["b"][0].data_ptr() != inner.data_ptr() and copy["b"][1][1] == "text"
    assert copy["c"] == 3 and copy["d"] is None and isinstance(copy["b"][1], tuple)


def test_evaluation_mode_gives_every_module_its_own_mode_back(model):
    model.backbone.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


class TestReplay:
    def test_without_logits_it_makes_one_logit_and_no_loss(self, model):
        output = replay(model.eval(), {"input_ids": tokens(), "labels": tokens()}, logits=False)
        assert output.logits.shape[1] == 1 and output.loss is None and output.cache_params is None

    def test_with_logits_it_is_the_models_own_output(self, model):
        output = replay(model.eval(), {"input_ids": tokens(), "labels": tokens()}, logits=True)
        expected = model(input_ids=tokens(), labels=tokens(), use_cache=False)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)

    def test_keeps_arguments_that_the_model_cannot_do_without(self):
        class Strict(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(1))

            def forward(self, input_ids, labels, extra=None):
                return input_ids, labels, extra

        batch = {"input_ids": tokens(), "labels": tokens(seed=1), "num_items_in_batch": 3, "return_loss": True}
        _, labels, extra = replay(Strict(), batch, logits=False)
        assert torch.equal(labels, tokens(seed=1)) and extra is None

    def test_does_not_write_to_the_batch(self, model):
        batch = {"input_ids": tokens(), "labels": tokens()}
        replay(model.eval(), batch, logits=False)
        assert set(batch) == {"input_ids", "labels"}


class TestCompareOutputs:
    def mask(self) -> torch.Tensor:
        mask = torch.ones(4, 12, dtype=torch.long)
        mask[0, :5] = 0
        mask[2, :2] = 0
        return mask

    def naive_divergence(self, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> float:
        total = 0.0
        for b, t in mask.nonzero().tolist():
            p, q = (logits[b, t].double().softmax(-1) for logits in (before, after))
            total += sum(pi * math.log(pi / qi) for pi, qi in zip(p.tolist(), q.tolist(), strict=True))
        return total / int(mask.sum())

    @pytest.mark.parametrize("padded", [False, True])
    def test_loss_and_divergence_across_a_change(self, tiny, padded):
        model, other = lively(tiny.build()), lively(tiny.build(), seed=1)
        mask = self.mask() if padded else torch.ones(4, 12, dtype=torch.long)
        batch = {"input_ids": tokens(), "labels": tokens()} | ({"attention_mask": mask} if padded else {})
        before = compare_outputs(model, batch)
        loss, divergence = compare_outputs(other, batch, before)
        with torch.no_grad():
            first, second = model.eval()(**batch), other.eval()(**batch)
        assert before[0].item() == pytest.approx(first.loss.item())
        assert loss.item() == pytest.approx(second.loss.item())
        expected = self.naive_divergence(first.logits, second.logits, mask)
        assert divergence.item() == pytest.approx(expected, rel=1e-3)
        assert expected > 1e-3

    def test_no_change_means_no_divergence(self, model):
        batch = {"input_ids": tokens()}
        before = compare_outputs(model, batch)
        loss, divergence = compare_outputs(model, batch, before)
        assert loss is None and divergence.item() == 0
        assert model.training

    def test_a_model_without_a_head_has_neither(self, tiny):
        batch = {"input_ids": tokens()}
        before = compare_outputs(tiny.build_base(), batch)
        assert before == (None, None)
        assert compare_outputs(tiny.build_base(), batch, before) == (None, None)


@pytest.mark.parametrize(("limit", "rows"), [(1000, 4), (48, 4), (47, 3), (25, 2), (12, 1), (3, 1)])
def test_first_rows_hold_at_most_so_many_tokens(limit, rows):
    batch = {
        "input_ids": tokens(),
        "labels": tokens(),
        "weights": torch.arange(4),
        "num_items_in_batch": torch.tensor(48),
        "name": "x",
    }
    part = first_rows(batch, limit)
    assert torch.equal(part["input_ids"], tokens()[:rows]) and torch.equal(part["labels"], tokens()[:rows])
    assert torch.equal(part["weights"], torch.arange(rows))
    assert part["num_items_in_batch"] == 48 and part["name"] == "x"


def test_first_rows_of_a_batch_without_sequences():
    batch = {"values": torch.arange(3)}
    assert first_rows(batch, 1) == batch
