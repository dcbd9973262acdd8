"""Is the last token of each sequence predicted: `evaluate.load(metric_path("last_position_accuracy"))`."""

from __future__ import annotations

import datasets
import evaluate
from torch import nn

from hf_compressm.metrics.scoring import NOT_ASKED, score

DESCRIPTION = "Accuracy of a language model on the last token of each sequence, such as a class or an answer."
INPUTS = """
Args:
    predictions: sequences of token ids, each with its answer at the end.
    model: the language model.
    batch_size: sequences that run together.

Returns:
    accuracy: share of the sequences whose last token is the model's likeliest, among all tokens.
    loss: mean negative log-likelihood of the last token, in nats.
"""


class LastPositionAccuracy(evaluate.Metric):
    """Accuracy and loss of the last token."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions: list[list[int]], model: nn.Module, batch_size: int = 8) -> dict[str, float]:
        labels = [[NOT_ASKED] * (len(sequence) - 1) + sequence[-1:] for sequence in predictions]
        scores = score(model, predictions, labels=labels, batch_size=batch_size)
        return {"accuracy": scores.accuracy, "loss": scores.loss}
