"""Keep the inputs that training has just seen, and run them through the model once more."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .distributed.wrappers import after_evaluation, is_kind

# What only a loss needs. They are left out when a batch is replayed for its states, if the model can do without.
LOSS_ARGUMENTS = ("labels", "shift_labels", "return_loss")
# What changes how a loss is calculated, or divided: TRL's fused head makes no logits.
LOSS_SETTINGS = ("num_items_in_batch", "fused_lm_head")


class InputRecorder:
    """Keeps the last inputs of a model's training forward passes, on the host.

    A forward pre-hook on the outermost model sees every training batch once: gradient checkpointing recomputes only
    blocks, and a compiled or DDP-wrapped model calls the same hook. Evaluation is not recorded.

    Args:
        model: the bare model.
        tokens: how many tokens (batch × length, over all processes) are wanted; older batches are dropped.
        processes: how many processes train the model; each is taken to see as many tokens as this one.
    """

    def __init__(self, model: nn.Module, tokens: int, processes: int = 1) -> None:
        self.wanted_tokens = tokens
        self.processes = processes
        self.active = True
        self.tokens_per_forward = 0
        self.batches: deque[dict[str, Any]] = deque()
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = _parameters(model).values()
        self._names = [parameter.name for parameter in parameters if parameter.kind in by_position]
        record = self._record
        if _compiler_is_loaded():
            # A traced hook would be compiled anew for every number of batches kept, up to the recompile limit.
            record = torch.compiler.disable(record)
        self._handle = model.register_forward_pre_hook(record, with_kwargs=True)

    def _record(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        if len(args) > len(self._names):
            raise TypeError(
                f"{type(model).__name__}.forward was given {len(args)} inputs by position, which have no names to "
                "record them by; pass them by keyword"
            )
        batch = dict(zip(self._names, args, strict=False)) | kwargs
        self.tokens_per_forward = count_tokens(batch) * self.processes
        if not self.active:
            return
        self.batches.append(to_device(batch, torch.device("cpu")))
        while self.tokens - count_tokens(self.batches[0]) * self.processes >= self.wanted_tokens:
            self.batches.popleft()

    @property
    def tokens(self) -> int:
        """Tokens kept at present, over all processes."""
        return sum(map(count_tokens, self.batches)) * self.processes

    def remove(self) -> None:
        self._handle.remove()
        self.batches.clear()


def count_tokens(batch: Any) -> int:
    """Batch × length of a batch: of `input_ids` or `inputs_embeds`, else of its first tensor with two dimensions."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] * batch.shape[1] if batch.dim() >= 2 else 0
    if isinstance(batch, Mapping):
        batch = [batch.get("input_ids"), batch.get("inputs_embeds"), *batch.values()]
    if isinstance(batch, (list, tuple)):
        return next(filter(None, map(count_tokens, batch)), 0)
    return 0


def to_device(value: Any, device: torch.device) -> Any:
    """Copy the tensors of a batch to a device; the copies stay what they are when the loop reuses its buffers."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and no compiled code; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _without_compiled_code():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        after_evaluation(model)


def _without_compiled_code() -> contextlib.AbstractContextManager:
    return torch.compiler.set_stance("force_eager") if _compiler_is_loaded() else contextlib.nullcontext()


def _compiler_is_loaded() -> bool:
    # Importing torch's compiler takes seconds; where nobody has, nothing is compiled.
    return "torch._dynamo" in sys.modules


def replay(model: nn.Module, batch: Any, *, logits: bool, through: nn.Module | None = None) -> Any:
    """Run one batch through a model.

    Args:
        model: the bare model.
        batch: a dictionary of keyword arguments, a tuple of positional ones, or one tensor.
        logits: whether the outputs are wanted. If not, labels are left out and language models make one logit only.
        through: the wrapper to call in the model's place, if it cannot be called itself.

    Returns:
        The model's output.
    """
    device = next(model.parameters()).device
    batch = to_device(batch, device)
    parameters = _parameters(model)
    if isinstance(batch, torch.Tensor):
        batch = (batch,)
    if not isinstance(batch, Mapping):
        return (through or model)(*batch)
    arguments = dict(batch)
    optional = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    if "use_cache" in optional:
        arguments["use_cache"] = False
    for name in LOSS_SETTINGS:
        arguments.pop(name, None)
    if not logits:
        for name in LOSS_ARGUMENTS:
            if name in optional or name not in parameters:
                arguments.pop(name, None)
        if "logits_to_keep" in optional:
            arguments["logits_to_keep"] = 1
    return (through or model)(**arguments)


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a model's forward; of a PEFT model, also those that it hands on to the model inside."""
    parameters = dict(inspect.signature(model.forward).parameters)
    if is_kind(model, "PeftModel"):
        inside = inspect.signature(model.get_base_model().forward).parameters
        parameters |= {name: parameter for name, parameter in inside.items() if name not in parameters}
    return parameters


@torch.no_grad()
def compare_outputs(
    model: nn.Module, batch: dict[str, Any], before: tuple[torch.Tensor | None, torch.Tensor | None] | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The loss and the log-probabilities of a model on a batch, or, given those of before, the loss and the KL.

    Args:
        model: the bare model.
        batch: keyword arguments, with labels if the loss is wanted.
        before: what this returned before a change of the model.

    Returns:
        The model's own loss, shape (); and log-probabilities (tokens, vocabulary), or with `before` the mean over real
        tokens of KL(before ‖ after) in nats, shape (). None where the model gives no loss or no logits.
    """
    with evaluation_mode(model):
        output = replay(model, batch, logits=True)
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    log_probabilities = None
    if isinstance(logits, torch.Tensor):
        log_probabilities = logits.float().log_softmax(-1).flatten(0, -2)
        mask = batch.get("attention_mask")
        if mask is not None and mask.numel() == len(log_probabilities):
            log_probabilities = log_probabilities[mask.flatten().to(logits.device) != 0]
    if before is None or log_probabilities is None or before[1] is None:
        return loss, log_probabilities
    divergence = (before[1].exp() * (before[1] - log_probabilities)).sum(-1).mean()
    # Rounding can bring that of equal outputs below zero.
    return loss, divergence.clamp_min(0)


def first_rows(batch: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The first sequences of a batch, as many as have at most this many tokens (at least one)."""
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim() >= 2]
    if not tensors:
        return batch
    size = tensors[0].shape[0]
    rows = max(1, size * tokens // max(1, count_tokens(batch)))
    return {
        key: value[:rows] if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == size else value
        for key, value in batch.items()
    }
