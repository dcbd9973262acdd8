"""Does a model recall what it was told: `evaluate.load(metric_path("recall_accuracy"))`."""

from __future__ import annotations

import datasets
import evaluate
from torch import nn

from hf_compressm.metrics.scoring import score

DESCRIPTION = (
    "Accuracy of a language model where it is asked for something that came earlier in the sequence, as in "
    "associative recall."
)
INPUTS = """
Args:
    predictions: sequences of token ids.
    references: labels as in Transformers, aligned with the tokens: the right token where it is asked for, else -100.
    model: the language model.
    batch_size: sequences that run together.

Returns:
    accuracy: share of the asked tokens that are the model's likeliest.
    sequence_accuracy: share of the sequences in which all of them are, of those that ask for any.
    loss: mean negative log-likelihood per asked token, in nats.
"""


class RecallAccuracy(evaluate.Metric):
    """Accuracy over the positions that are asked for."""

    def _info(self) -> evaluate.MetricInfo:
        sequence = datasets.Sequence(datasets.Value("int64"))
        features = datasets.Features({"predictions": sequence, "references": sequence})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(
        self, predictions: list[list[int]], references: list[list[int]], model: nn.Module, batch_size: int = 8
    ) -> dict[str, float]:
        scores = score(model, predictions, labels=references, batch_size=batch_size)
        return {
            "accuracy": scores.accuracy,
            "sequence_accuracy": scores.sequence_accuracy,
            "loss": scores.loss,
        }
