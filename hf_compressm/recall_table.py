"""What a model recalls over distances up to several training lengths: a table, and what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .record import RECALL, Record

# Nats per token, or a share of the answers: what is less is nothing, however sure it is.
LEAST_RECALL = 0.01


def recall_table(record: Record) -> dict[str, Any] | None:
    """The table of recall over distances, as a card shows it.

    Args:
        record: its evaluations have, for a distance of 64 tokens, `recall_accuracy_after_64`, and either
            `recall_gain_after_64` and `recall_gain_error_after_64` (half of a 95 % interval), or
            `recall_accuracy_error_after_64` and `recall_chance`, the share that guessing gets right. `run["recall"]`
            says what was measured, and `run["recall_length"]` the length of the training sequences.

    Returns:
        `description`, `stages`, `rows` of cells, and `reading`: what the numbers say. None if it was not measured.
    """
    stages = {stage: recall_by_distance(values) for stage, values in record.evaluations.items()}
    stages = {stage: recalled for stage, recalled in stages.items() if recalled}
    if not stages:
        return None
    length = record.run.get("recall_length")
    distances = sorted({distance for values in stages.values() for distance in values})
    return {
        "description": record.run.get("recall", ""),
        "stages": list(stages),
        "rows": [
            [
                f"{distance:,} tokens" + (f" ({_multiple(distance, length)} ×)" if length else ""),
                *(str(values.get(distance, "–")) for values in stages.values()),
            ]
            for distance in distances
        ],
        "reading": _reading(stages),
    }


@dataclass(frozen=True)
class _Recalled:
    """What a model recalls over one distance.

    Attributes:
        value: 0 where it recalls nothing.
        error: half of the value's 95 % interval.
        shown: as the table shows it.
    """

    value: float
    error: float
    shown: str

    def __str__(self) -> str:
        return self.shown


def recall_by_distance(values: dict[str, float]) -> dict[int, _Recalled]:
    """Distance → what is recalled over it, where value and error are known."""
    found = {}
    for distance in sorted({int(match[1]) for match in map(RECALL.fullmatch, values) if match}):
        accuracy, accuracy_error, gain, gain_error = (
            values.get(f"recall_{name}_after_{distance}")
            for name in ("accuracy", "accuracy_error", "gain", "gain_error")
        )
        if None not in (gain, gain_error, accuracy):
            found[distance] = _Recalled(gain, gain_error, f"{gain:.3f} ± {gain_error:.3f} ({accuracy:.1%})")
        elif None not in (accuracy, accuracy_error):
            above_chance = accuracy - values.get("recall_chance", 0.0)
            found[distance] = _Recalled(above_chance, accuracy_error, f"{accuracy:.1%} ± {100 * accuracy_error:.1f}")
    return found


def _reading(stages: dict[str, dict[int, _Recalled]]) -> str:
    """What a table of recall says, and what it does not."""
    known = {
        stage: [distance for distance, one in recalled.items() if one.value > max(one.error, LEAST_RECALL)]
        for stage, recalled in stages.items()
    }
    if not any(known.values()):
        return (
            "No value stands out of the noise: the model recalls nothing over these distances, before the cut or "
            "after it, so they cannot tell what a smaller state costs a model that does."
        )
    listed = "; ".join(f"{stage} over {_tokens(distances)}" for stage, distances in known.items())
    sentences = [f"Recall stands out of the noise {listed}."]
    first, *later = stages
    for stage in dict.fromkeys([*later[:1], *later[-1:]]):
        pairs = [(d, one, stages[stage][d]) for d, one in stages[first].items() if d in stages[stage]]
        # Measured on the same passages, the difference is surer than this.
        noise = {d: max(math.hypot(one.error, other.error), LEAST_RECALL) for d, one, other in pairs}
        lost, won = ([d for d, one, other in pairs if sign * (other.value - one.value) > noise[d]] for sign in (-1, 1))
        verdicts = [f"fell over {_tokens(lost)}"] * bool(lost) + [f"rose over {_tokens(won)}"] * bool(won)
        changed = " and ".join(verdicts) or "changed no more than the noise over any distance"
        sentences.append(f'From "{first}" to "{stage}" it {changed}.')
    return " ".join(sentences)


def _tokens(distances: list[int]) -> str:
    *head, last = [f"{distance:,}" for distance in distances] or ["none"]
    return (f"{', '.join(head)} and {last}" if head else last) + (" tokens" if distances else "")


def _multiple(distance: int, length: int) -> str:
    """A distance in lengths, as ½ or 2."""
    return {0.5: "½"}.get(round(distance / length, 1), f"{distance / length:.3g}")
