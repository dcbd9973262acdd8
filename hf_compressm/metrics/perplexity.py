"""How well a language model predicts a stream of tokens: `evaluate.load(metric_path("perplexity"))`."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
from torch import nn

from hf_compressm.metrics.scoring import score

DESCRIPTION = "Perplexity of a language model on token sequences, with its loss and its next-token accuracy."
INPUTS = """
Args:
    predictions: sequences of token ids.
    model: the language model.
    labels: what is asked, aligned with the tokens; -100 where nothing is. Default: every token.
    text_bytes: how many bytes of text all tokens of the sequences stand for, if bits per byte are wanted.
    batch_size: sequences that run together.

Returns:
    perplexity: the exponential of the loss.
    loss: mean negative log-likelihood per asked token, in nats.
    accuracy: share of the asked tokens that are the model's likeliest.
    tokens: how many were asked for; the first of a sequence, which nothing precedes, never is.
    bits_per_byte: with text_bytes; tokens that were not asked for count as those that were.
"""
# Beyond it, the exponential is no float.
LARGEST_LOSS = 700.0


class Perplexity(evaluate.Metric):
    """Perplexity, loss, next-token accuracy and bits per byte."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(
        self,
        predictions: list[list[int]],
        model: nn.Module,
        labels: Any = None,
        text_bytes: float | None = None,
        batch_size: int = 8,
    ) -> dict[str, float]:
        if text_bytes is not None and not text_bytes > 0:
            raise ValueError(f"text_bytes is {text_bytes!r}; give the number of bytes that the tokens stand for")
        scores = score(model, predictions, labels=labels, batch_size=batch_size)
        results = {
            "perplexity": math.exp(min(scores.loss, LARGEST_LOSS)),
            "loss": scores.loss,
            "accuracy": scores.accuracy,
            "tokens": scores.tokens,
        }
        if text_bytes is not None:
            results["bits_per_byte"] = scores.loss / math.log(2) * sum(map(len, predictions)) / text_bytes
        return results
