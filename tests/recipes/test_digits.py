"""What the demo reports of its answers, against torch."""

from __future__ import annotations

import digits
import pytest
import torch
import torch.nn.functional as F
from conftest import lively


def test_the_answers_are_what_is_measured():
    arguments = digits.DemoArguments(state_size=8, hidden_size=16)
    model, other = (lively(digits.build_model(arguments), seed=seed) for seed in range(2))
    sequences = digits.digit_sequences(seed=0)[1][:70]
    with torch.no_grad():
        # The query, which stands before the answer, predicts it.
        predicted, reference = (each(sequences).logits[:, -2].log_softmax(-1) for each in (model, other))
    measured = digits.assess(model, sequences)
    assert measured["loss"] == pytest.approx(F.nll_loss(predicted, sequences[:, -1]).item(), rel=1e-5)
    assert measured["accuracy"] == pytest.approx((predicted.argmax(-1) == sequences[:, -1]).float().mean().item())
    expected = F.kl_div(predicted, reference, log_target=True, reduction="batchmean").item()
    assert digits.kl_divergence(other, model, sequences) == pytest.approx(expected, rel=1e-4)
