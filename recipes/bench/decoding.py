"""Cached generation: the time of a prompt and of each further token, and the bytes that a sequence's state takes."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel
from workloads import VOCABULARY, autocast, in_turns, spread, synchronize


def generation_ms(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, bf16: bool = False) -> float:
    """Greedy generation with a cache, in milliseconds; the model stays in the mode that it was in."""
    was_training = model.training
    model.eval()
    device = prompt.device.type
    synchronize(device)
    start = time.perf_counter()
    with autocast(device, bf16):
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
    synchronize(device)
    elapsed = 1000 * (time.perf_counter() - start)
    model.train(was_training)
    return elapsed


def time_decoding(
    models: list[PreTrainedModel], batch: int, prompt_length: int, new_tokens: int, rounds: int, bf16: bool = False
) -> list[dict[str, Any]]:
    """Time generation of several models, in turns.

    Args:
        batch: sequences at a time.
        new_tokens: tokens that are generated after the first, which the prompt's pass gives.
        bf16: whether to generate under autocast to bfloat16.

    Returns:
        For each model `prefill_ms` (the prompt and the first token), `token_ms` (each further one, of all sequences
        together), both as spreads, and `tokens_per_second`, at the median.
    """
    prompt = torch.randint(VOCABULARY, (batch, prompt_length)).to(models[0].device)
    actions = []
    for model in models:
        actions += [lambda model=model: generation_ms(model, prompt, 1, bf16)]
        actions += [lambda model=model: generation_ms(model, prompt, 1 + new_tokens, bf16)]
    columns = in_turns(rounds, *actions)
    results = []
    for prefill, whole in zip(columns[::2], columns[1::2], strict=True):
        token_ms = spread([(b - a) / new_tokens for a, b in zip(prefill, whole, strict=True)])
        results.append(
            {
                "prefill_ms": spread(prefill),
                "token_ms": token_ms,
                "tokens_per_second": 1000 * batch / token_ms["median"],
            }
        )
    return results


@torch.no_grad()
def state_bytes(model: PreTrainedModel) -> int:
    """What the recurrent states of one sequence take in the model's cache, convolutions aside."""
    cache = model(torch.zeros(1, 4, dtype=torch.long, device=model.device), use_cache=True).cache_params
    states = [layer.recurrent_states[0] for layer in cache.layers]
    return sum(state.numel() * state.element_size() for state in states)
