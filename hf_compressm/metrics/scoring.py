"""The one pass over token sequences that all metrics are read from."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..distributed.processes import ALONE, NonFiniteError
from ..distributed.wrappers import processes_of, runner, unwrap
from ..replay import evaluation_mode, replay

NOT_ASKED = -100


@dataclass(frozen=True)
class Scores:
    """How well a model predicts the tokens that it is asked for.

    Attributes:
        tokens: how many are asked for. The first token of a sequence, which nothing precedes, never is.
        loss: mean negative log-likelihood per asked token, in nats.
        accuracy: share of the asked tokens that are the model's likeliest.
        sequence_accuracy: share of the sequences with all asked tokens right, of those that ask for any.
        kl_divergence: mean KL(reference ‖ model) where a token is asked for, in nats; None without a reference.
    """

    tokens: int
    loss: float
    accuracy: float
    sequence_accuracy: float
    kl_divergence: float | None


def score(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    labels: Sequence[Sequence[int]] | None = None,
    reference_model: nn.Module | None = None,
    batch_size: int = 8,
) -> Scores:
    """Run token sequences through a language model and compare its predictions with the tokens that come.

    The model runs in eval mode and without gradients; its modes are put back. Of a model that several processes train
    (as DDP, FSDP or DeepSpeed wrapped it), all of them must call this with the same sequences: they share the work,
    and get the same scores.

    Args:
        model: a language model, bare or wrapped.
        sequences: token ids; sequences may differ in length.
        labels: what is asked, aligned with the tokens as in Transformers; -100 where nothing is. Default: each token.
        reference_model: a model with the same vocabulary, to compare the predictions with.
        batch_size: sequences that run together.

    Raises:
        ValueError: sequences or labels that nothing can be asked with, or a reference with another vocabulary.
        TypeError: not a language model.
        NonFiniteError: a loss or a divergence is not finite.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=4, num_hidden_layers=1))
        >>> score(model, [[1, 2, 3], [4, 5]]).tokens
        3
    """
    models = [model] if reference_model is None else [model, reference_model]
    vocabulary = _common_vocabulary(models)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; give at least 1")
    rows = _checked_rows(sequences, labels, vocabulary)
    processes = processes_of(*unwrap(model)) or ALONE
    own = rows[processes.rank :: processes.size]
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    # A sharded model's forward passes are run by all processes together, so each needs as many batches as the first.
    rounds = math.ceil(len(rows[:: processes.size]) / batch_size)
    unasked = dataclasses.replace(rows[0], labels=torch.full_like(rows[0].labels, NOT_ASKED))
    batches += [[unasked]] * (rounds - len(batches))

    sums = torch.zeros(6, dtype=torch.float64)
    with processes.all_or_none("evaluating the model"), contextlib.ExitStack() as modes:
        for each in models:
            modes.enter_context(evaluation_mode(unwrap(each)[0]))
        for batch in batches:
            sums += _score_batch(models, batch)
    processes.sum([sums])
    tokens, loss, hits, asking, all_right, divergence = sums.tolist()
    return Scores(
        tokens=int(tokens),
        loss=loss / tokens,
        accuracy=hits / tokens,
        sequence_accuracy=all_right / asking,
        # Rounding can bring that of equal predictions below zero.
        kl_divergence=None if reference_model is None else max(divergence / tokens, 0.0),
    )


@dataclass(frozen=True)
class _Row:
    """One sequence: its number among those given, its tokens and what is asked of each."""

    number: int
    ids: torch.Tensor
    labels: torch.Tensor


def _common_vocabulary(models: list[nn.Module]) -> int:
    """The number of tokens that the models know."""
    sizes = []
    for model in models:
        bare = unwrap(model)[0]
        size = getattr(getattr(bare, "config", None), "vocab_size", None)
        if size is None:
            raise TypeError(
                f"{type(bare).__name__} is no language model of Transformers: its config has no vocab_size"
            )
        sizes.append(size)
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the model knows {sizes[0]} tokens and the reference model {sizes[1]}: predictions over different "
            "vocabularies cannot be compared"
        )
    return sizes[0]


def _checked_rows(
    sequences: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None, vocabulary: int
) -> list[_Row]:
    if len(sequences) == 0:
        raise ValueError("there is no sequence to evaluate on; give at least one, of two tokens or more")
    if labels is not None and len(labels) != len(sequences):
        raise ValueError(f"there are {len(sequences)} sequences, but labels for {len(labels)}")
    rows = []
    for number, sequence in enumerate(sequences):
        ids = torch.as_tensor(sequence, dtype=torch.long)
        if len(ids) < 2:
            raise ValueError(
                f"sequence {number} is too short, {len(ids)} of at least 2 tokens: nothing predicts a first token"
            )
        asked = ids if labels is None else torch.as_tensor(labels[number], dtype=torch.long)
        if len(asked) != len(ids):
            raise ValueError(f"sequence {number} has {len(ids)} tokens, but labels for {len(asked)}; give as many")
        for kind, values in (("token", ids), ("label", asked[asked != NOT_ASKED])):
            unknown = values[(values < 0) | (values >= vocabulary)]
            if len(unknown):
                raise ValueError(
                    f"sequence {number} has the {kind} {unknown[0].item()}, but the model's vocabulary is 0 to "
                    f"{vocabulary - 1}; use the model's own tokenizer"
                )
        rows.append(_Row(number, ids, asked))
    if all((row.labels[1:] == NOT_ASKED).all() for row in rows):
        raise ValueError(f"nothing is asked: every label but those of first tokens is {NOT_ASKED}")
    return rows


def _score_batch(models: list[nn.Module], rows: list[_Row]) -> torch.Tensor:
    """Sums over a batch: asked tokens, loss, hits, sequences that ask, those all right, and KL (0 for one model)."""
    labels = pad_sequence([row.labels for row in rows], batch_first=True, padding_value=NOT_ASKED)[:, 1:]
    asked = labels != NOT_ASKED
    inputs = {"input_ids": pad_sequence([row.ids for row in rows], batch_first=True)}
    lengths = torch.tensor([len(row.ids) for row in rows])
    if lengths.min() < lengths.max():
        inputs["attention_mask"] = (torch.arange(lengths.max()) < lengths[:, None]).long()
    predicted, *reference = (_log_probabilities(model, inputs, asked) for model in models)
    targets = labels[asked].to(predicted.device)
    losses = F.nll_loss(predicted, targets, reduction="none").double()
    hits = predicted.argmax(-1) == targets
    divergences = losses.new_zeros(losses.shape)
    if reference:
        divergences = _divergences(reference[0].to(predicted.device), predicted).double()
    which = asked.nonzero()[:, 0].to(predicted.device)
    for kind, values in (("loss", losses), ("KL divergence", divergences)):
        if not values.isfinite().all():
            bad = (~values.isfinite()).nonzero()[0, 0]
            raise NonFiniteError(
                f"the {kind} is {values[bad].item()} in sequence {rows[which[bad]].number}: the model's predictions "
                "are broken there, or give a token no probability at all"
            )
    misses = torch.zeros(len(rows), device=which.device).index_add_(0, which, (~hits).float())
    asking = asked.any(1).to(which.device)
    sums = (asked.sum(), losses.sum(), hits.sum(), asking.sum(), (asking & (misses == 0)).sum(), divergences.sum())
    return torch.stack([value.double().cpu() for value in sums])


def _log_probabilities(model: nn.Module, inputs: dict[str, torch.Tensor], asked: torch.Tensor) -> torch.Tensor:
    """What a model predicts where a token is asked for, shape (asked, vocabulary), in float32."""
    bare, wrapper = unwrap(model)
    logits = getattr(replay(bare, inputs, logits=True, through=runner(bare, wrapper)), "logits", None)
    if logits is None or logits.shape[:-1] != inputs["input_ids"].shape:
        raise TypeError(
            f"{type(bare).__name__} does not predict each next token: give a language model (…ForCausalLM)"
        )
    return logits[:, :-1][asked.to(logits.device)].float().log_softmax(-1)


def _divergences(reference: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ predicted) of log-probabilities, for each token, in nats; 0 · log 0 = 0."""
    probabilities = reference.exp()
    return torch.where(probabilities > 0, probabilities * (reference - predicted), 0).sum(-1)
