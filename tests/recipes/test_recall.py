"""Recall over distances, of models whose memory is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, lively
from recall import (
    AFTER,
    BEFORE,
    END,
    RecallCallback,
    Rereading,
    measure_recall,
    note_recall,
    rereading,
    table,
)
from torch import nn
from training import build_trainer, config, examples

from hf_compressm import CompreSSMCallback, Record
from hf_compressm.provenance import record_of, start_record

VOCABULARY = 50


class Parrot(nn.Module):
    """Predicts, with certainty `sure`, the token that followed the last occurrence of the two tokens just read.

    Args:
        memory: how many tokens back it remembers; 0: nothing.
    """

    def __init__(self, memory: int, sure: float = 10.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.memory, self.sure = memory, sure
        self.weight = nn.Parameter(torch.zeros(1))
        self.lengths: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, **kwargs) -> SimpleNamespace:
        assert not self.training and not torch.is_grad_enabled()
        self.lengths.append(tuple(input_ids.shape))
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, tokens in enumerate(input_ids.tolist()):
            last: dict[tuple[int, int], int] = {}
            for now in range(1, len(tokens)):
                pair = (tokens[now - 1], tokens[now])
                before = last.get(pair)
                if before is not None and now - before <= self.memory:
                    logits[row, now, tokens[before + 1]] = self.sure
                last[pair] = now
        return SimpleNamespace(logits=logits)


@pytest.fixture
def task() -> Rereading:
    text = torch.randint(VOCABULARY, (60, 16), generator=torch.Generator().manual_seed(0))
    return rereading(text, length=16)


def test_the_sequences_are_a_passage_other_text_and_the_passage(task):
    assert (task.length, task.passage) == (16, 8) and list(task.read) == list(task.unread) == [8, 16, 32, 64]
    text = torch.randint(VOCABULARY, (60, 16), generator=torch.Generator().manual_seed(0)).flatten().tolist()
    for distance, read in task.read.items():
        unread = task.unread[distance]
        assert read.shape == unread.shape == (16, distance + 8)
        assert torch.equal(read[:, :8], read[:, distance:]) and torch.equal(read[:, 8:], unread[:, 8:])
        assert (read[:, :8] != unread[:, :8]).any(1).all()
        # As the text goes on from there, and evenly spread over it.
        for number, row in enumerate(read.tolist()):
            assert row[:distance] == (text + text)[number * 60 : number * 60 + distance]


def test_too_little_text_leaves_out_distances():
    assert list(rereading(torch.arange(47), length=16).read) == [8, 16]
    assert list(rereading(torch.arange(48), length=16).read) == [8, 16, 32]
    nothing = rereading(torch.arange(10), length=16)
    assert nothing.read == {} and measure_recall(Parrot(100), nothing) == {}
    model = Parrot(100)
    assert note_recall(model, nothing, "now") == {} and not start_record(model).evaluations
    assert table(start_record(model)).startswith("Recall was not measured")
    with pytest.raises(ValueError, match="have 3 tokens; recall can be measured from 4"):
        rereading(torch.arange(100), length=3)


def test_long_passages_are_32_tokens():
    task = rereading(torch.arange(2000) % VOCABULARY, length=100)
    assert task.passage == 32 and {d: ids.shape[1] for d, ids in task.read.items()} == {
        50: 82,
        100: 132,
        200: 232,
        400: 432,
    }


def test_what_models_of_known_memory_recall(task):
    forgetful, parrot, none = (measure_recall(Parrot(memory), task) for memory in (20, 1000, 0))
    # Of 8 tokens, the pair before the first two is no pair of the passage; the others are known.
    known, guess = math.log(math.exp(10) + VOCABULARY - 1) - 10, math.log(VOCABULARY)
    for distance in (8, 16, 32, 64):
        assert none[f"recall_gain_after_{distance}"] == none[f"recall_gain_error_after_{distance}"] == 0
        gain = parrot[f"recall_gain_after_{distance}"]
        assert gain == pytest.approx(6 / 8 * (guess - known), rel=0.1)
        assert 0.7 < parrot[f"recall_accuracy_after_{distance}"] < 0.85
        remembered = distance <= 20
        assert forgetful[f"recall_gain_after_{distance}"] == pytest.approx(gain if remembered else 0, abs=0.15)


def test_the_interval_is_that_of_a_t_distribution(task):
    """Over the passages, against scipy; each runs alone, and the losses are torch's own."""
    from scipy import stats

    model = lively(TINY["mamba"].build(vocab_size=VOCABULARY))
    model.train()
    measured = measure_recall(model, task)
    assert model.training and all(module.training for module in model.modules())
    losses = []
    with torch.no_grad():
        for ids in (task.read[32], task.unread[32]):
            logits = torch.cat([model.eval()(row[None]).logits[:, 31:-1] for row in ids])
            losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 32:].flatten(), reduction="none").view(16, 8))
    gains = (losses[1] - losses[0]).mean(1).double().numpy()
    assert measured["recall_gain_after_32"] == pytest.approx(gains.mean(), rel=1e-4, abs=1e-7)
    low, high = stats.t.interval(0.95, 15, gains.mean(), stats.sem(gains))
    assert measured["recall_gain_error_after_32"] == pytest.approx((high - low) / 2, rel=1e-3)


def test_broken_predictions_are_said_and_end_nothing(task, caplog):
    model = lively(TINY["mamba"].build(vocab_size=VOCABULARY))
    model.backbone.layers[0].mixer.D.data.fill_(math.nan)
    assert note_recall(model, task, "now") == {}
    assert "recall could not be measured now: " in caplog.text and not record_of(model).evaluations


def short() -> Rereading:
    """Text of as many tokens as the tiny models know, and enough of it for short distances only."""
    return rereading(torch.randint(1, 16, (24,), generator=torch.Generator().manual_seed(1)), length=12)


def test_a_training_is_measured_around_its_cut_and_goes_on_as_without(tmp_path):
    """The cut comes after step 3 of 8; the values are those of the models of these moments."""
    task, kept = short(), {}

    class Keeper(RecallCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                kept[3] = measure_recall(model, task), model.config.state_size
                # The step was over before its end was measured.
                assert self.cutter.timeline.entries[-1]["step"] == 3

    def train(name: str, recall: bool):
        torch.manual_seed(0)
        cutter = CompreSSMCallback(config())
        around = [RecallCallback(cutter, task), Keeper(cutter, task), cutter] if recall else [cutter]
        trainer = build_trainer(lively(TINY["mamba"].build()), tmp_path / name, around, eval_dataset=examples()[:2])
        trainer.train()
        return trainer

    trainer, plain = train("measured", True), train("plain", False)
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    evaluations = record_of(trainer.model).evaluations
    assert list(evaluations) == [BEFORE, AFTER, END]
    assert evaluations[BEFORE] == kept[3][0] and kept[3][1] == 8 and evaluations[AFTER] != evaluations[BEFORE]
    assert evaluations[END] == measure_recall(trainer.model, task)
    saved = Record.load(tmp_path / "measured")
    assert saved.evaluations == evaluations and saved.run["recall_length"] == 12


@pytest.mark.parametrize("checkpoint", [2, 3, 4])
def test_a_resumed_training_keeps_the_table(tmp_path, checkpoint):
    """From before the cut it is measured anew; from the step of the cut, and from after it, kept."""
    task = short()

    def trainer():
        cutter = CompreSSMCallback(config())
        options = {"save_strategy": "steps", "save_steps": 1}
        return build_trainer(
            lively(TINY["mamba"].build()), tmp_path, [RecallCallback(cutter, task), cutter], **options
        )

    first = trainer()
    first.train()
    evaluations = record_of(first.model).evaluations
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert list(record_of(second.model).evaluations) == [BEFORE, AFTER, END]
    for stage, values in record_of(second.model).evaluations.items():
        assert values == pytest.approx(evaluations[stage], abs=1e-5), stage
