"""How far a model's predictions are from another's: `evaluate.load(metric_path("kl_divergence"))`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from torch import nn

from hf_compressm.metrics.scoring import score

DESCRIPTION = "Mean KL divergence of a language model's predictions from those of a reference model, per token."
INPUTS = """
Args:
    predictions: sequences of token ids.
    model: the language model.
    reference_model: the one that it is compared with, such as the model before a cut.
    labels: where to compare, aligned with the tokens: wherever the label is not -100, the predictions of this token.
        Default: those of every token but the first of a sequence.
    batch_size: sequences that run together.

Returns:
    kl_divergence: mean of KL(reference ‖ model), in nats.
"""


class KLDivergence(evaluate.Metric):
    """Mean KL(reference ‖ model) per token."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(
        self,
        predictions: list[list[int]],
        model: nn.Module,
        reference_model: nn.Module,
        labels: Any = None,
        batch_size: int = 8,
    ) -> dict[str, float]:
        scores = score(model, predictions, labels=labels, reference_model=reference_model, batch_size=batch_size)
        return {"kl_divergence": scores.kl_divergence}
