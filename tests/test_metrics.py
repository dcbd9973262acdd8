"""The metrics, as `evaluate.load` gives them, against the same numbers written out, of other libraries, or counted."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate
import pytest
import torch
import torch.nn.functional as F
from conftest import MAMBA2_FAMILY, TINY, VOCABULARY, Relative, lively, projection_plan, stir, tokens
from peft import LoraConfig, get_peft_model
from scipy.special import rel_entr
from torch import nn

from hf_compressm import NonFiniteError, compress_
from hf_compressm.distributed.processes import Processes
from hf_compressm.metrics import METRICS, metric_path, scoring

RAGGED = [row[:length].tolist() for row, length in zip(tokens(5, 11), (11, 4, 2, 7, 11), strict=True)]


def compute(name: str, sequences: Any = RAGGED, **arguments: Any) -> dict[str, float]:
    return evaluate.load(metric_path(name)).compute(predictions=sequences, **arguments)


@torch.no_grad()
def one_by_one(model: nn.Module, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of each next token, (length - 1, vocabulary), of each sequence alone and without padding."""
    was_training = model.training
    outputs = [model.eval()(torch.tensor([row]), use_cache=False).logits[0, :-1] for row in sequences]
    model.train(was_training)
    return [logits.double().log_softmax(-1) for logits in outputs]


def written_out(model: nn.Module, sequences: list[list[int]]) -> tuple[float, float]:
    """Mean loss and accuracy over all tokens but the first ones."""
    predicted = torch.cat(one_by_one(model, sequences))
    targets = torch.cat([torch.tensor(row[1:]) for row in sequences])
    return F.cross_entropy(predicted, targets).item(), (predicted.argmax(-1) == targets).double().mean().item()


class Counter(nn.Module):
    """Predicts after each token the next number, modulo the vocabulary, with a margin in the logits."""

    def __init__(self, vocabulary: int = 10, margin: float = 5.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.margin = nn.Parameter(torch.tensor(margin))

    def forward(self, input_ids, attention_mask=None, use_cache=True):
        size = self.config.vocab_size
        return SimpleNamespace(logits=self.margin * F.one_hot((input_ids + 1) % size, size))


def test_every_architecture_and_padding(architecture: Relative):
    model, other = stir(architecture.build()).train(), stir(architecture.build(), seed=1)
    loss, accuracy = written_out(model, RAGGED)
    measured = compute("perplexity", model=model, batch_size=3)
    assert measured["loss"] == pytest.approx(loss, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(accuracy) and measured["tokens"] == sum(map(len, RAGGED)) - 5
    before, after = (torch.cat(one_by_one(each, RAGGED)).exp().numpy() for each in (other, model))
    divergence = compute("kl_divergence", model=model, reference_model=other, batch_size=3)["kl_divergence"]
    assert divergence == pytest.approx(rel_entr(before, after).sum(-1).mean(), rel=1e-4)


def test_a_projected_model_and_adapters():
    model = stir(MAMBA2_FAMILY["mamba2"].build())
    compress_(model, projection_plan(model, 4))
    assert compute("perplexity", model=model)["loss"] == pytest.approx(written_out(model, RAGGED)[0], rel=1e-5)
    adapted = stir(get_peft_model(TINY["mamba"].build(), LoraConfig(r=2, target_modules=["in_proj"])))
    assert compute("perplexity", model=adapted)["loss"] == pytest.approx(written_out(adapted, RAGGED)[0], rel=1e-5)


def test_the_loss_is_that_of_transformers(tiny):
    model, blocks = lively(tiny.build()).eval(), tokens(5, 24)
    labels = blocks.masked_fill(torch.rand(blocks.shape) < 0.5, -100)
    with torch.no_grad():
        everywhere, somewhere = (model(blocks, labels=each).loss.item() for each in (blocks, labels))
    assert compute("perplexity", blocks, model=model, batch_size=5)["loss"] == pytest.approx(everywhere, rel=1e-6)
    assert compute("perplexity", blocks, model=model, labels=labels)["loss"] == pytest.approx(somewhere, rel=1e-6)
    assert compute("recall_accuracy", blocks, model=model, references=labels)["loss"] == pytest.approx(somewhere)


def test_bits_per_byte_are_those_of_all_tokens():
    measured = compute("perplexity", [[1, 2, 3, 4], [5, 6]], model=Counter(margin=0.0), text_bytes=12)
    # Six tokens of log2(10) bits each, two of which could not be asked for.
    assert measured["bits_per_byte"] == pytest.approx(6 * math.log2(10) / 12)
    with pytest.raises(ValueError, match="text_bytes is 0"):
        compute("perplexity", model=TINY["mamba"].build(), text_bytes=0)


def test_a_huge_loss_has_a_perplexity():
    measured = compute("perplexity", [[1, 5]], model=Counter(margin=2000.0))
    assert measured["loss"] == pytest.approx(2000) and math.isfinite(measured["perplexity"])


def test_accuracy_of_the_last_position_is_counted():
    measured = compute("last_position_accuracy", [[7, 1, 2], [3, 4], [1, 2, 3, 9], [9, 0]], model=Counter())
    assert measured["accuracy"] == 3 / 4
    # The right answers' probability, and that of any other token.
    right, wrong = (math.exp(margin) / (math.exp(5) + 9) for margin in (5, 0))
    assert measured["loss"] == pytest.approx(-(3 * math.log(right) + math.log(wrong)) / 4, rel=1e-6)


def test_recall_is_counted():
    sequences = [[1, 2, 3, 9, 0], [4, 5, 5, 6], [1, 1, 1], [2, 4, 5]]
    asked = [[-100, 2, -100, -100, 0], [-100, -100, 5, 6], [-100, -100, -100], [2, -100, 5]]
    measured = compute("recall_accuracy", sequences, model=Counter(), references=asked, batch_size=3)
    # 2 of 2; 1 of 2; nothing is asked; 1 of 1, as no first token is.
    assert (measured["accuracy"], measured["sequence_accuracy"]) == (4 / 5, 2 / 3)


def test_kl_counts_where_labels_say_and_zero_probabilities_count_nothing():
    model, reference = Counter(margin=1.0), Counter(margin=3.0)
    probabilities = [(torch.tensor([margin] + [0.0] * 9).double().softmax(0)).numpy() for margin in (3.0, 1.0)]
    expected = rel_entr(*probabilities).sum()
    given = {"model": model, "reference_model": reference}
    assert compute("kl_divergence", [[1, 2, 3]], **given)["kl_divergence"] == pytest.approx(expected, rel=1e-6)
    model, reference = (lively(TINY["mamba"].build(), seed=seed) for seed in range(2))
    labels = [[-100] * (len(row) - 1) + row[-1:] for row in RAGGED]
    last = [[each[-1] for each in one_by_one(one, RAGGED)] for one in (reference, model)]
    expected = rel_entr(*(torch.stack(rows).exp().numpy() for rows in last)).sum(-1).mean()
    given = {"model": model, "reference_model": reference, "labels": labels}
    assert compute("kl_divergence", **given)["kl_divergence"] == pytest.approx(expected, rel=1e-4)
    # That of a model from itself is zero, whatever rounding says; also where a token has no probability.
    excluding = Counter(margin=math.inf)
    excluding.forward = lambda input_ids, **_: SimpleNamespace(
        logits=torch.zeros(*input_ids.shape, 10).index_fill(-1, torch.tensor([0]), -math.inf)
    )
    given = {"model": excluding, "reference_model": excluding}
    assert compute("kl_divergence", [[1, 2, 3]], **given)["kl_divergence"] == 0


def test_nothing_of_the_model_changes():
    model = lively(TINY["mamba"].build()).train()
    model.backbone.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state, seen = torch.get_rng_state(), []
    model.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    compute("perplexity", model=model)
    assert seen == [(False, False)] and modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="nothing is asked"):
        compute("perplexity", [[1, 2]], model=model, labels=[[-100, -100]])
    assert modes == [module.training for module in model.modules()]


def breaks_on_15() -> nn.Module:
    """A model that makes NaN once it has seen token 15."""
    model = Counter(VOCABULARY)
    forward = model.forward
    model.forward = lambda input_ids, **_: SimpleNamespace(
        logits=forward(input_ids).logits.masked_fill((input_ids == 15).any(1)[:, None, None], math.nan)
    )
    return model


BAD: dict[str, tuple[str, Any, Callable[[], dict[str, Any]], type[Exception], str]] = {
    "no sequence": ("perplexity", [], dict, ValueError, "there is no sequence to evaluate on"),
    "one token": ("perplexity", [[1, 2], [3]], dict, ValueError, "sequence 1 is too short, 1 of at least 2 tokens"),
    "unknown token": (
        "last_position_accuracy",
        [[1, 2], [3, 16]],
        dict,
        ValueError,
        "sequence 1 has the token 16, but the model's vocabulary is 0 to 15; use the model's own tokenizer",
    ),
    "negative token": ("perplexity", [[-1, 2]], dict, ValueError, "sequence 0 has the token -1"),
    "unknown label": (
        "recall_accuracy",
        [[1, 2]],
        lambda: {"references": [[1, 99]]},
        ValueError,
        "sequence 0 has the label 99",
    ),
    "labels of another length": (
        "recall_accuracy",
        [[1, 2], [3, 4]],
        lambda: {"references": [[1, 2], [3]]},
        ValueError,
        "sequence 1 has 2 tokens, but labels for 1",
    ),
    "labels for others": (
        "perplexity",
        [[1, 2], [3, 4]],
        lambda: {"labels": [[1, 2]]},
        ValueError,
        "2 sequences, but labels for 1",
    ),
    "nothing asked": (
        "recall_accuracy",
        [[1, 2]],
        lambda: {"references": [[1, -100]]},
        ValueError,
        "nothing is asked",
    ),
    "another vocabulary": (
        "kl_divergence",
        RAGGED,
        lambda: {"reference_model": TINY["mamba"].build(vocab_size=20)},
        ValueError,
        "the model knows 16 tokens and the reference model 20",
    ),
    "not a number": (
        "perplexity",
        [[1, 2], [3, 15, 4]],
        lambda: {"model": breaks_on_15()},
        NonFiniteError,
        "the loss is nan in sequence 1",
    ),
    "no head": ("perplexity", RAGGED, lambda: {"model": TINY["mamba"].build_base()}, TypeError, "does not predict"),
    "not a model of Transformers": (
        "perplexity",
        RAGGED,
        lambda: {"model": nn.Linear(2, 2)},
        TypeError,
        "Linear is no language model",
    ),
    "no batch": ("perplexity", RAGGED, lambda: {"batch_size": 0}, ValueError, "batch_size is 0"),
}


@pytest.mark.parametrize(("name", "sequences", "more", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(name, sequences, more, kind, message):
    # In memory, as an error leaves a file locked for which the next metric waits a second.
    metric = evaluate.load(metric_path(name), keep_in_memory=True)
    with pytest.raises(kind, match=message):
        metric.compute(predictions=sequences, **{"model": TINY["mamba"].build()} | more())


def test_an_infinite_divergence_is_an_error():
    excluding = Counter()
    excluding.forward = lambda input_ids, **_: SimpleNamespace(
        logits=torch.zeros(*input_ids.shape, 10).index_fill(-1, torch.tensor([0]), -math.inf)
    )
    with pytest.raises(NonFiniteError, match="the KL divergence is inf in sequence 0"):
        compute("kl_divergence", [[1, 2]], model=excluding, reference_model=Counter())


class OneOf(Processes):
    """One of several processes, which run one after the other here; the sums of the others are in `told`."""

    def __init__(self, rank: int, size: int, told: list[torch.Tensor]) -> None:
        super().__init__()
        self.__dict__.update(told=told, numbers=(rank, size))

    rank = property(lambda self: self.numbers[0])
    size = property(lambda self: self.numbers[1])

    def sum(self, tensors):
        self.told.append(tensors[0].clone())
        tensors[0].copy_(sum(self.told))

    def all_or_none(self, doing):
        return Processes().all_or_none(doing)


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 2), (3, 1), (7, 4)])
def test_processes_share_the_work_and_keep_step(monkeypatch, processes, batch_size):
    model, reference = (lively(TINY["mamba2"].build(), seed=seed) for seed in range(2))
    alone = scoring.score(model, RAGGED, reference_model=reference)
    told, calls = [], []
    model.register_forward_hook(lambda *_: calls.append(len(told)))
    for rank in range(processes):
        monkeypatch.setattr(scoring, "processes_of", lambda *_, rank=rank: OneOf(rank, processes, told))
        together = scoring.score(model, RAGGED, reference_model=reference, batch_size=batch_size)
    assert vars(together) == pytest.approx(vars(alone), rel=1e-6)
    # Under FSDP, one that runs fewer forward passes leaves the others waiting.
    rounds = math.ceil(math.ceil(len(RAGGED) / processes) / batch_size)
    assert [calls.count(rank) for rank in range(processes)] == [rounds] * processes


def test_the_modules_are_all_there_is():
    with pytest.raises(ValueError, match="no metric 'accuracy'; choose one of kl_divergence, last_position_accuracy"):
        metric_path("accuracy")
    folder = Path(metric_path("perplexity")).parent
    assert {file.stem for file in folder.glob("*.py")} == {*METRICS, "__init__", "scoring"}


ELSEWHERE = """
import os, sys
import hf_compressm
assert "evaluate" not in sys.modules
from hf_compressm.metrics import METRICS, metric_path
import evaluate
other = os.fork()
for name in METRICS:
    assert evaluate.load(metric_path(name)).compute.__doc__.count("batch_size")
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


def test_two_processes_load_them_at_once_offline_and_from_elsewhere(tmp_path):
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        cwd=tmp_path,
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=900,
    )
