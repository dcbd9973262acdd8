"""The demo: a stock Mamba learns to read digits, and loses nine tenths of its state on the way.

scikit-learn's 1,797 handwritten digits become sequences of 64 pixels and a query token; the next token is the digit. A
stock `MambaForCausalLM` starts with state size N = 128. After a tenth of the training the callback cuts N to 12, and
the stock Trainer trains on at a multiple of the speed. It runs on a CPU, in minutes, without a download:

    make demo                                   # or: python recipes/digits.py
    python recipes/digits.py --target_state_size 6 --cut_at 0.2 --output_dir runs/six
    python recipes/digits.py --architecture mamba2 --realization projected --output_dir runs/projected

The last trains a Mamba-2 and projects its 128 features to 12 states: nearly lossless, with an own model class.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import evaluate
import safetensors.torch
import torch
from recall import FRACTIONS, close_step, is_about_to_cut
from recall import table as recall_table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_compressm import CompreSSMCallback, CompreSSMConfig, Record, find_mixers
from hf_compressm.cards import write_card
from hf_compressm.metrics import metric_path
from hf_compressm.provenance import record_of
from hf_compressm.ranks import state_size_of
from hf_compressm.report_page import write_report_page
from hf_compressm.surgery import optimizer_bytes

PIXEL_VALUES = 17
QUERY = PIXEL_VALUES
FIRST_DIGIT = QUERY + 1
VOCABULARY = FIRST_DIGIT + 10
# An image with its query.
LENGTH = 65
# Digits that are asked for later, of the test set: those sequences are long.
ASKED_LATER = 120


@dataclass
class DemoArguments:
    """What the demo does."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Where the model, its card and the plot go."})
    architecture: Literal["mamba", "mamba2"] = field(default="mamba", metadata={"help": "Mamba-1 or Mamba-2."})
    realization: Literal["stock", "projected", "auto"] = field(
        default="auto", metadata={"help": "What the smaller model is; projected needs mamba2."}
    )
    state_size: int = field(default=128, metadata={"help": "N at the start."})
    target_state_size: int = field(default=12, metadata={"help": "N after the cut."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the model."})
    layers: int = field(default=2, metadata={"help": "Number of Mamba layers."})
    steps: int = field(default=1500, metadata={"help": "Training steps."})
    cut_at: float = field(default=0.1, metadata={"help": "The share of training after which the state is cut."})
    batch_size: int = field(default=16, metadata={"help": "Digits per step."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


def build_model(arguments: DemoArguments) -> PreTrainedModel:
    """A stock model with random weights."""
    # Larger time steps than usual suit sequences of 64 pixels: a state forgets within 2 to 100 steps, not 10 to 1000.
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": arguments.hidden_size,
        "state_size": arguments.state_size,
        "num_hidden_layers": arguments.layers,
        "expand": 1,
        "time_step_min": 0.01,
        "time_step_max": 0.5,
    }
    if arguments.architecture == "mamba":
        # use_mambapy: transformers' own loop over time steps is about ten times slower on a CPU.
        return MambaForCausalLM(MambaConfig(**common, use_mambapy=True))
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    heads = {"num_heads": arguments.hidden_size // 16, "head_dim": 16, "n_groups": 1, "chunk_size": 32}
    return Mamba2ForCausalLM(Mamba2Config(**common, **special, **heads))


def digit_sequences(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits as token sequences (64 pixels, the query, the answer), split into training and test."""
    digits = load_digits()
    pixels = torch.tensor(digits.images.reshape(-1, 64), dtype=torch.long)
    query = torch.full((len(pixels), 1), QUERY)
    answer = torch.tensor(digits.target)[:, None] + FIRST_DIGIT
    sequences = torch.cat([pixels, query, answer], dim=1)
    train, test = train_test_split(range(len(sequences)), test_size=0.2, stratify=digits.target, random_state=seed)
    return sequences[train], sequences[test]


def collate(sequences: list[torch.Tensor], noise: bool) -> dict[str, torch.Tensor]:
    """A batch in which only the answer is to be predicted; with noise, inked pixels vary by one grey level."""
    input_ids = torch.stack(sequences)
    if noise:
        pixels = input_ids[:, :64]
        varied = (pixels + torch.randint(-1, 2, pixels.shape)).clamp(0, PIXEL_VALUES - 1)
        input_ids[:, :64] = torch.where(pixels > 0, varied, pixels)
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = input_ids[:, -1]
    return {"input_ids": input_ids, "labels": labels}


def assess(model: PreTrainedModel, sequences: torch.Tensor) -> dict[str, float]:
    """Loss and accuracy of the answers."""
    metric = evaluate.load(metric_path("last_position_accuracy"))
    return metric.compute(predictions=sequences, model=model, batch_size=60)


def assess_later(model: PreTrainedModel, sequences: torch.Tensor) -> dict[str, float]:
    """Accuracy of the answers when the query comes up to four image lengths later, after blank pixels."""
    measured = {"recall_chance": 0.1}
    for blanks in (int(fraction * LENGTH) for fraction in FRACTIONS):
        pause = sequences.new_zeros(len(sequences), blanks)
        later = torch.cat([sequences[:, :64], pause, sequences[:, 64:]], dim=1)[:ASKED_LATER]
        accuracy = assess(model, later)["accuracy"]
        error = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(later))
        measured |= {f"recall_accuracy_after_{blanks}": accuracy, f"recall_accuracy_error_after_{blanks}": error}
    return measured


def kl_divergence(before: PreTrainedModel, after: PreTrainedModel, sequences: torch.Tensor) -> float:
    """Mean KL(before ‖ after) of the answers' probabilities, in nats."""
    labels = collate(list(sequences), noise=False)["labels"]
    given = {"predictions": sequences, "labels": labels, "batch_size": 60}
    metric = evaluate.load(metric_path("kl_divergence"))
    return metric.compute(**given, model=after, reference_model=before)["kl_divergence"]


class BeforeTheCut(TrainerCallback):
    """Times each step, and evaluates right before the cut. Stands before the CompreSSMCallback in the list."""

    def __init__(self, cutter: CompreSSMCallback, test: torch.Tensor) -> None:
        self.cutter, self.test = cutter, test
        self.step_seconds: dict[int, list[float]] = {}
        self.measured: dict[str, Any] = {}
        self.uncut: PreTrainedModel | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        seconds = time.perf_counter() - self.start
        self.step_seconds.setdefault(state_size_of(find_mixers(model)), []).append(seconds)
        if is_about_to_cut(self.cutter.compressor, state.global_step):
            close_step(self.cutter, state.global_step)
            self.measured = assess(model, self.test) | assess_later(model, self.test) | describe(model, optimizer)
            self.uncut = copy.deepcopy(model)


class AfterTheCut(TrainerCallback):
    """Evaluates right after the cut. Stands behind the CompreSSMCallback in the list."""

    def __init__(self, cutter: CompreSSMCallback, before: BeforeTheCut, test: torch.Tensor) -> None:
        self.cutter, self.before, self.test = cutter, before, test
        self.measured: dict[str, Any] = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.cutter.history and not self.measured:
            self.measured = assess(model, self.test) | assess_later(model, self.test) | describe(model, optimizer)
            self.measured["kl_divergence"] = kl_divergence(self.before.uncut, model, self.test)
            self.before.uncut = None


def describe(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Sizes of a model and of its optimizer's state."""
    mixers = find_mixers(model)
    return {
        "state_size": state_size_of(mixers),
        "parameters": model.num_parameters(),
        "state_bytes": sum(mixer.module.intermediate_size * mixer.state_size * 4 for mixer in mixers.values()),
        "optimizer_bytes": optimizer_bytes(optimizer),
    }


def median_ms(step_seconds: list[float]) -> float:
    """The median, without the first steps, which allocate memory."""
    return 1000 * statistics.median(step_seconds[3:] or step_seconds)


def table(before: dict[str, Any], after: dict[str, Any], final: dict[str, Any], ms: dict[int, float]) -> str:
    """The demo's result, in columns."""
    rows = [
        ("state size N", f"{before['state_size']}", f"{after['state_size']}", f"{final['state_size']}"),
        ("parameters", *(f"{column['parameters']:,}" for column in (before, after, final))),
        ("recurrent state, bytes per sequence", *(f"{column['state_bytes']:,}" for column in (before, after, final))),
        ("optimizer state, bytes", *(f"{column['optimizer_bytes']:,}" for column in (before, after, final))),
        ("ms per training step", f"{ms[before['state_size']]:.0f}", f"{ms[after['state_size']]:.0f}", ""),
        ("test loss", *(f"{column['loss']:.4f}" for column in (before, after, final))),
        ("test accuracy", *(f"{column['accuracy']:.4f}" for column in (before, after, final))),
    ]
    header = ("", "right before the cut", "right after the cut", "at the end")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) if not index else cell.rjust(width) for index, (cell, width) in columns)
        for columns in (enumerate(zip(row, widths, strict=True)) for row in (header, *rows))
    ]
    return "\n".join(lines)


def describe_run(record: Record, arguments: DemoArguments, measured: dict[str, dict[str, Any]]) -> None:
    """Put into the model's record what its card is to tell."""
    names = {name: value for name, value in vars(arguments).items() if name != "output_dir"}
    record.run |= {
        "license": "apache-2.0",
        "dataset": "scikit-learn's digits",
        "description": "Input: the 64 pixels of an 8×8 image of scikit-learn's digits, row by row, as tokens 0 to 16, "
        f"then the query token {QUERY}. The next token is the digit plus {FIRST_DIGIT}.",
        "command": "python recipes/digits.py " + " ".join(f"--{name} {value}" for name, value in names.items()),
        "evaluated_on": "the 360 digits of the test set. One run, one seed",
        "recall": f"The digit is asked ½, 1, 2 and 4 image lengths ({LENGTH} tokens) later than in training, after "
        f"blank pixels: the share of the first {ASKED_LATER} test digits that the model then gets right. Guessing "
        "gets 10 %.",
        "recall_length": LENGTH,
        "limits": f"A toy: {measured['at the end']['parameters']:,} parameters, 8×8 images.",
    }
    shown = ("loss", "accuracy", "kl_divergence")
    record.evaluations = {
        stage: {name: value for name, value in values.items() if name in shown or name.startswith("recall_")}
        for stage, values in measured.items()
    }


def main() -> None:
    (arguments,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    # Transformers says for each kernel that it is not installed; on a CPU none could be.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    set_seed(arguments.seed)
    output = Path(arguments.output_dir)
    train, test = digit_sequences(arguments.seed)

    model = build_model(arguments)
    config = CompreSSMConfig(
        state_size=arguments.target_state_size, realization=arguments.realization, schedule=[arguments.cut_at]
    )
    cutter = CompreSSMCallback(config)
    before = BeforeTheCut(cutter, test)
    after = AfterTheCut(cutter, before, test)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.05,
            logging_steps=max(1, arguments.steps // 16),
            save_strategy="no",
            report_to="none",
            seed=arguments.seed,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=list(train),
        data_collator=lambda sequences: collate(sequences, noise=model.training),
        callbacks=[before, cutter, after],
    )
    print(f"{len(train)} digits to learn from, {len(test)} to be tested on; {model.num_parameters():,} parameters")
    start = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - start

    model.eval()
    final = assess(model, test) | assess_later(model, test) | describe(model, trainer.optimizer)
    stages = {"right before the cut": before.measured, "right after the cut": after.measured, "at the end": final}
    describe_run(record_of(model), arguments, stages)
    trainer.save_model(str(output))
    write_card(output)
    write_report_page(output)
    # For hf-compressm analyze: the digits are no text.
    safetensors.torch.save_file(collate(list(test), noise=False), output / "tokens.safetensors")
    reloaded = AutoModelForCausalLM.from_pretrained(output).to(model.device)
    with torch.no_grad():
        difference = (reloaded(test[:60]).logits - model(test[:60]).logits).abs().max().item()

    cut = next(entry for entry in cutter.history if entry["status"] == "cut")
    ms = {state_size: median_ms(seconds) for state_size, seconds in before.step_seconds.items()}
    results = {
        "state_size_before": before.measured["state_size"],
        "state_size_after": after.measured["state_size"],
        "parameters_before": before.measured["parameters"],
        "parameters_after": after.measured["parameters"],
        "step_ms_before": ms[before.measured["state_size"]],
        "step_ms_after": ms[after.measured["state_size"]],
        "step_speedup": ms[before.measured["state_size"]] / ms[after.measured["state_size"]],
        "loss_before_cut": before.measured["loss"],
        "loss_after_cut": after.measured["loss"],
        "accuracy_before_cut": before.measured["accuracy"],
        "accuracy_after_cut": after.measured["accuracy"],
        "final_loss": final["loss"],
        "final_accuracy": final["accuracy"],
        "kl_across_cut": after.measured["kl_divergence"],
        "cut_seconds": sum(cut["seconds"].values()),
        "cut_step": cut["step"],
        "train_seconds": train_seconds,
        "reload_max_abs_logit_diff": difference,
        "model_class": type(reloaded).__name__,
        "projected": any(mixer.is_projected for mixer in find_mixers(reloaded).values()),
    }

    print(f"\n{table(before.measured, after.measured, final, ms)}")
    print(f"\n{recall_table(record_of(model), 'Test accuracy when the digit is asked later, after blank pixels')}")
    print(
        f"\nThe cut at step {cut['step']} of {arguments.steps} took {results['cut_seconds']:.1f} s and changed the "
        f"answers by a mean KL divergence of {results['kl_across_cut']:.1e} nats.\n"
        f"A step took {results['step_ms_before']:.0f} ms before it, and {results['step_ms_after']:.0f} ms after it.\n"
        f"{output}/ holds the model, its card (README.md) and a page with pictures of all this, report.html.\n"
        f"Reloaded as {results['model_class']}: logits differ by at most {difference:.1e}.\n"
    )
    print(json.dumps({name: round(item, 8) if isinstance(item, float) else item for name, item in results.items()}))


if __name__ == "__main__":
    main()
