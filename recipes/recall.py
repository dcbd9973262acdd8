"""How far back a language model recalls, at distances up to four times the length that it was trained on.

A passage of held-out text is read, other text follows, and the passage is read again. How much better is its second
reading predicted than in the same place after the same text, where another passage had been read in its stead? That
gain, in nats per token, is 0 for a model that recalls nothing. It needs no labels, and any text will do.

The recipes measure it right before and right after a cut and at the end, and `hf_compressm.cards` makes the table.
"""

from __future__ import annotations

import logging
import math
import statistics
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback, Compressor, Record
from hf_compressm.distributed.processes import NonFiniteError
from hf_compressm.distributed.wrappers import runner, unwrap
from hf_compressm.provenance import start_record
from hf_compressm.recall_table import recall_table
from hf_compressm.replay import evaluation_mode, replay

logger = logging.getLogger("recall")

# Of the length of the training sequences.
FRACTIONS = (0.5, 1, 2, 4)
LONGEST_PASSAGE = 32
PASSAGES = 16
# Student's t with 15 degrees of freedom lies within, in 95 of 100 cases.
T_95 = 2.131
# Tokens that run together, or one sequence.
BATCH_TOKENS = 2048
BEFORE, AFTER, END = "right before the cut", "right after the cut", "at the end of training"


@dataclass(frozen=True)
class Rereading:
    """Passages that are read again.

    Attributes:
        length: of the training sequences, in tokens.
        passage: tokens of a passage.
        read: distance between the two readings → token ids, shape (passages, distance + passage).
        unread: the same, with another passage in the place of the first reading.
    """

    length: int
    passage: int
    read: dict[int, torch.Tensor]
    unread: dict[int, torch.Tensor]

    @property
    def description(self) -> str:
        """What is measured, for a card."""
        return (
            f"A passage of {self.passage} held-out tokens is read, other held-out text follows, and the passage is "
            f"read again: {PASSAGES} passages, at distances of ½, 1, 2 and 4 times the length of the "
            f"training sequences ({self.length:,} tokens), as far as the held-out text suffices. Gain: by how many "
            "nats per token the second reading is predicted better than in the same place after another passage; "
            "a model that recalls nothing gains 0. In brackets: the share of its tokens that the model predicts right."
        )


def rereading(blocks: torch.Tensor | Iterable[Iterable[int]], length: int) -> Rereading:
    """Choose passages, evenly spread over a text; nothing is drawn at random.

    Args:
        blocks: held-out text as token ids, in rows that follow one another.
        length: of the training sequences, in tokens.

    Returns:
        What to measure; distances for which there is too little text are left out.

    Raises:
        ValueError: training sequences of less than 4 tokens.

    Example:
        >>> task = rereading(torch.arange(60).view(6, 10), length=10)
        >>> task.read[5][0].tolist()
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
        >>> task.unread[5][0].tolist()
        [30, 31, 32, 33, 34, 0, 1, 2, 3, 4]
    """
    if length < 4:
        raise ValueError(f"the training sequences have {length} tokens; recall can be measured from 4 tokens on")
    text = torch.as_tensor(blocks, dtype=torch.long).flatten()
    passage, count = min(LONGEST_PASSAGE, length // 2), PASSAGES
    starts = torch.arange(count) * len(text) // count
    read, unread = {}, {}
    for distance in (int(fraction * length) for fraction in FRACTIONS):
        # The text goes round, and must not come by the passage in between, nor the other one overlap with it.
        if len(text) < distance + 2 * passage:
            continue
        between = _slices(text, starts + passage, distance - passage)
        first, other = (_slices(text, begin, passage) for begin in (starts, starts + len(text) // 2))
        read[distance] = torch.cat([first, between, first], dim=1)
        unread[distance] = torch.cat([other, between, first], dim=1)
    return Rereading(length, passage, read, unread)


def _slices(text: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """A piece of the text from each start on; behind its end, the text begins again."""
    return text[(starts[:, None] + torch.arange(length)) % len(text)]


def measure_recall(model: nn.Module, task: Rereading) -> dict[str, float]:
    """Let a model read passages again.

    The model runs in eval mode, and its modes are put back. Of a model that several processes train, all of them must
    call this, and all get the same.

    Args:
        model: a language model, bare or wrapped.
        task: from `rereading`.

    Returns:
        For each distance d: `recall_gain_after_d`, `recall_gain_error_after_d` (half of its 95 % interval) and
        `recall_accuracy_after_d`, of the second reading.

    Raises:
        NonFiniteError: the model's predictions are broken.
    """
    measured = {}
    with evaluation_mode(unwrap(model)[0]):
        for distance in task.read:
            read, right = _second_readings(model, task.read[distance], task.passage)
            unread, _ = _second_readings(model, task.unread[distance], task.passage)
            gains = (unread - read).tolist()
            if not all(map(math.isfinite, gains)):
                raise NonFiniteError("the model's predictions are not finite")
            measured |= {
                f"recall_gain_after_{distance}": statistics.mean(gains),
                f"recall_gain_error_after_{distance}": T_95 * statistics.stdev(gains) / math.sqrt(len(gains)),
                f"recall_accuracy_after_{distance}": right.mean().item(),
            }
    return measured


def _second_readings(model: nn.Module, sequences: torch.Tensor, passage: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss in each sequence's last tokens, and the share of them that the model predicts right."""
    bare, wrapper = unwrap(model)
    losses, right = [], []
    for batch in sequences.split(max(1, BATCH_TOKENS // sequences.shape[1])):
        outputs = replay(bare, {"input_ids": batch}, logits=True, through=runner(bare, wrapper))
        predicted, asked = outputs.logits[:, -passage - 1 : -1].float().cpu(), batch[:, -passage:]
        losses.append(F.cross_entropy(predicted.mT, asked, reduction="none").double().mean(1))
        right.append((predicted.argmax(-1) == asked).double().mean(1))
    return torch.cat(losses), torch.cat(right)


def note_recall(model: nn.Module, task: Rereading, stage: str) -> dict[str, float]:
    """Measure recall, and put it into the model's record, from which its card is made.

    Args:
        model: as in `measure_recall`.
        task: from `rereading`.
        stage: of the record's evaluations.

    Returns:
        What was measured; nothing where the model's predictions are broken, which is no reason to end a training.
    """
    try:
        measured = measure_recall(model, task)
    except NonFiniteError as error:
        logger.warning(f"recall could not be measured {stage}: {error}")
        return {}
    if measured:
        record = start_record(unwrap(model)[0])
        # Stages stand in the order in which they were measured last.
        record.evaluations[stage] = record.evaluations.pop(stage, {}) | measured
        record.run |= {"recall": task.description, "recall_length": task.length}
    return measured


def is_about_to_cut(compressor: Compressor, step: int) -> bool:
    """Whether the compressor makes the first cut of a training when its `step` is called now. Ask on every process.

    Args:
        compressor: of this training.
        step: optimizer steps made so far.
    """
    if cuts_of(compressor) or not compressor.pending or step < compressor.pending[0]:
        return False
    processes = compressor.processes
    return processes.total(compressor.recorder.tokens) / processes.size >= compressor.wanted_tokens


def note_recall_after_cut(compressor: Compressor, task: Rereading) -> None:
    """Measure recall if a cut was made at this very step, in this run or in one that this one goes on from."""
    cuts = cuts_of(compressor)
    stage = AFTER if len(cuts) < 2 else f"right after cut {len(cuts)}"
    at_this_step = cuts and cuts[-1]["step"] == compressor.global_step
    if at_this_step and stage not in start_record(compressor.model).evaluations:
        note_recall(compressor.wrapped, task, stage)


def close_step(cutter: CompreSSMCallback, step: int) -> None:
    """Tell the callback's timeline that a step is over: what is measured before its cut is no part of it."""
    cutter.timeline.step_ends()
    cutter.timeline.before_cut(step, cutter.compressor.state_size)


def cuts_of(compressor: Compressor) -> list[dict]:
    """The entries of the cuts that were made, in its history."""
    return [entry for entry in compressor.history if entry["status"] == "cut"]


def table(record: Record, heading: str = "Recall: nats per token gained by an earlier reading (and accuracy)") -> str:
    """What was measured, as text: a line for each distance."""
    measured = recall_table(record)
    if measured is None:
        return "Recall was not measured: there is too little held-out text for passages that are read again."
    rows = [["distance", *measured["stages"]], *measured["rows"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    reading = textwrap.fill(measured["reading"], 100)
    return "\n".join([heading, *lines, reading])


class RecallCallback(TrainerCallback):
    """Measures recall right before and after a cut and at the end. Stands before CompreSSMCallback in the list.

    Args:
        cutter: the CompreSSMCallback.
        task: from `rereading`.
    """

    def __init__(self, cutter: CompreSSMCallback, task: Rereading) -> None:
        self.cutter, self.task = cutter, task

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # Nothing has changed the model since the cut at the end of the step before.
        note_recall_after_cut(self.cutter.compressor, self.task)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        compressor = self.cutter.compressor
        if is_about_to_cut(compressor, state.global_step):
            close_step(self.cutter, state.global_step)
            note_recall(compressor.wrapped, self.task, BEFORE)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        compressor = self.cutter.compressor
        if compressor is not None and cuts_of(compressor):
            note_recall_after_cut(compressor, self.task)
            note_recall(compressor.wrapped, self.task, END)
