"""Metrics of language models as modules that `evaluate.load` takes, without the Hub."""

from __future__ import annotations

from importlib import resources

METRICS = ("kl_divergence", "last_position_accuracy", "perplexity", "recall_accuracy")


def metric_path(name: str) -> str:
    """Where a metric of this package lies, for `evaluate.load`.

    All of them take token sequences as `predictions`, and the language model as `model`. Sequences may differ in
    length; they are padded on the right, and padding counts for nothing. Wherever `labels` can be given, they choose
    what is asked, as in Transformers: a label for each token, -100 where nothing is asked.

    Args:
        name: `perplexity` (with loss, next-token accuracy and bits per byte), `last_position_accuracy`,
            `recall_accuracy` or `kl_divergence`.

    Raises:
        ValueError: there is no metric of this name.

    Example:
        >>> import evaluate
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=4, num_hidden_layers=1))
        >>> metric = evaluate.load(metric_path("perplexity"))
        >>> sorted(metric.compute(predictions=[[1, 2, 3], [4, 5]], model=model))
        ['accuracy', 'loss', 'perplexity', 'tokens']
    """
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; choose one of {', '.join(METRICS)}")
    return str(resources.files(__name__) / f"{name}.py")
