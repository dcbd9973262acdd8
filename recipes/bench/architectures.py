"""What a cut costs in each architecture: small models trained on bytes of text, cut once, with no training afterwards.

    python recipes/bench/architectures.py                 # 5 minutes on two cores; writes architectures-cpu.json, .md
    python recipes/bench/architectures.py --quick         # half a minute, to try it out

Each of the ten architectures of Transformers with Mamba mixers, hybrids with their attention and expert layers, is
trained at N = 32 and cut to 8: stock as the package does it by default, by GHOST's selection, and, with Mamba-2
mixers, projected. Measured on held-out text: the loss, and the KL divergence from the uncut model. One seed: the
differences between the ways of cutting are large, those between architectures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, write_results
from speed import describe_machine
from tasks import TASKS, Batch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_compressm import CompreSSMConfig, compress_, find_mixers, measure, plan_compression
from hf_compressm.replay import compare_outputs

ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 32}
# model_type → its options; the state size is set in the field that the architecture has for it.
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 32, "num_hidden_layers": 2, "use_mambapy": True},
    "falcon_mamba": {"state_size": 32, "num_hidden_layers": 2, "use_mambapy": True},
    "jamba": {
        **ATTENTION,
        **{"mamba_d_state": 32, "num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1},
        **{"num_experts": 2, "num_experts_per_tok": 1, "use_mambapy": True},
    },
    "zamba": {
        **ATTENTION,
        **{"mamba_d_state": 32, "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
        **{"n_mamba_heads": 2},
    },
    "mamba2": {
        "state_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 32,
    },
    "zamba2": {
        **ATTENTION,
        **{"mamba_d_state": 32, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
        **{"n_mamba_heads": 4, "mamba_ngroups": 1, "mamba_expand": 2, "chunk_size": 32},
        **{"num_mem_blocks": 1, "adapter_rank": 4, "attention_head_dim": 32},
    },
    "bamba": {**ATTENTION, **HEADS, "mamba_d_state": 32, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "falcon_h1": {**ATTENTION, **HEADS, "mamba_d_state": 32, "mamba_d_ssm": 64, "num_hidden_layers": 2},
    "granitemoehybrid": {
        **ATTENTION,
        **HEADS,
        **{"mamba_d_state": 32, "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
        **{"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 32},
    },
    "nemotron_h": {
        **ATTENTION,
        **{"ssm_state_size": 32, "layers_block_type": ["mamba", "attention", "mamba", "moe"], "head_dim": 16},
        **{"n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "chunk_size": 32, "n_routed_experts": 2},
        **{"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32},
        **{"moe_shared_expert_intermediate_size": 32},
    },
}
WAYS = {
    "default": {},
    "GHOST's selection": {"criterion": "ghost", "refit": False},
    "projected": {"realization": "projected"},
}


@dataclass(frozen=True)
class Bench:
    """How long models are trained, and on what cuts are decided and judged."""

    steps: int = 500
    sequences: int = 8
    learning_rate: float = 4e-3
    kept: int = 8
    calibration_sequences: int = 128
    evaluation_sequences: int = 128


def train(model: PreTrainedModel, batches: Iterator[Batch], steps: int, rate: float) -> None:
    """AdamW; warm-up over a fifth of the steps, and a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, steps // 5))
        optimizer.param_groups[0]["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def run(model_type: str, bench: Bench, seed: int = 0) -> dict[str, Any]:
    """Train one architecture, and cut copies of it in every way that it allows."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=256, hidden_size=32, **special, **MODELS[model_type])
    model, started = AutoModelForCausalLM.from_config(config), time.perf_counter()
    task, generator = TASKS["text"], torch.Generator().manual_seed(seed)
    batches = (task.sample(generator, bench.sequences, False) for _ in itertools.count())
    train(model, batches, bench.steps, bench.learning_rate)
    calibration = task.sample(generator, bench.calibration_sequences, False)
    held_out = task.sample(generator, bench.evaluation_sequences, True)
    before = compare_outputs(model, held_out)
    statistics = measure(model, [{"input_ids": calibration["input_ids"]}])
    result = {"model_type": model_type, "loss": float(before[0]), "ways": {}}
    for way, options in WAYS.items():
        if way == "projected" and not all(mixer.can_be_projected for mixer in find_mixers(model).values()):
            continue
        cut = copy.deepcopy(model)
        report = compress_(cut, plan_compression(cut, statistics, CompreSSMConfig(state_size=bench.kept, **options)))
        loss, divergence = compare_outputs(cut, held_out, before)
        result["ways"][way] = {
            "loss_added": float(loss - before[0]),
            "kl_divergence": float(divergence),
            "relative_errors": [layer.relative_error for layer in report.layers],
        }
    result["seconds"] = time.perf_counter() - started
    return result


def table(results: list[dict[str, Any]], bench: Bench) -> str:
    """Loss and KL divergence that each way of cutting adds, in Markdown."""
    lines = [
        f"# One cut of every architecture, N 32 → {bench.kept}, on bytes of text",
        "",
        "Loss of the uncut model on held-out text, in nats per byte; then what a cut adds to it, and in brackets the "
        "KL divergence from the uncut model's answers. No training after the cut; one seed.",
        "",
        f"| architecture | uncut | {' | '.join(WAYS)} |",
        f"|---|---|{'---|' * len(WAYS)}",
    ]
    for result in results:
        cells = [
            f"{result['ways'][way]['loss_added']:+.4f} ({result['ways'][way]['kl_divergence']:.4f})"
            if way in result["ways"]
            else "–"
            for way in WAYS
        ]
        lines.append(f"| {result['model_type']} | {result['loss']:.3f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{bench.steps} training steps. {describe_machine('cpu')['device']}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="train for a few steps only")
    parser.add_argument("--architectures", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--processes", type=int, default=2, help="models that are trained at a time")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    bench = Bench(steps=20, calibration_sequences=16, evaluation_sequences=16) if arguments.quick else Bench()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        results = []
        for result in pool.imap(partial(run, bench=bench), arguments.architectures):
            print(f"{result['model_type']}: {result['seconds']:.0f} s")
            results.append(result)
    content = {"machine": describe_machine("cpu"), "bench": vars(bench), "results": results}
    name = f"architectures-{'quick' if arguments.quick else 'cpu'}"
    write_results(arguments.output_dir, name, content, table(results, bench))


if __name__ == "__main__":
    main()
