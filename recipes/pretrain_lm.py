"""Pretrain a Mamba language model on text files, and shrink its state on the way.

A stock Transformers model starts with state size N = 128; after a fifth of the training the callback cuts N to 16, and
the stock Trainer goes on with the smaller and faster model. Without options it learns the source code of Python's own
standard library, byte by byte, on a CPU, in minutes and without a download. One process:

    python recipes/pretrain_lm.py
    python recipes/pretrain_lm.py --train_files 'books/**/*.txt' --tokenizer bpe --architecture mamba2
    python recipes/pretrain_lm.py --architecture mamba2 --realization projected

Two processes on a CPU:

    torchrun --nproc_per_node 2 recipes/pretrain_lm.py --use_cpu --ddp_backend gloo

All GPUs of a machine, with a tracker (mamba-ssm's kernels are used if they are installed: hf-compressm[cuda]):

    accelerate launch recipes/pretrain_lm.py --bf16 --report_to trackio --hidden_size 768 --layers 24 \
        --block_size 1024 --per_device_train_batch_size 16 --max_steps 20000 --learning_rate 6e-4 --save_steps 1000

For FSDP and DeepSpeed see recipes/README.md. Where the model cannot be cut while it trains (FSDP1, ZeRO-3), the run
ends at the cut with a smaller checkpoint; the same command goes on from it (recipes/until_done.py does both).

The same command goes on where it was stopped: from --resume_from_checkpoint, else from the last checkpoint in
--output_dir. Every option of transformers.TrainingArguments can be given; --help lists this recipe's own at its end.

On a CPU with Linux, most of a step at large N is spent on getting memory from the system. Set in the shell,
MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=67108864 let the process keep it.
"""

from __future__ import annotations

import glob
import json
import logging
import math
import statistics
import sysconfig
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import evaluate
import torch
import transformers
from datasets import Dataset, DatasetDict, load_dataset
from recall import END, RecallCallback, rereading, table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_pt_utils import get_model_param_count

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.cards import write_card
from hf_compressm.distributed.wrappers import unwrap
from hf_compressm.metrics import metric_path
from hf_compressm.provenance import record_of, save_provenance
from hf_compressm.texts import byte_tokenizer

logger = logging.getLogger("pretrain_lm")

# Held-out text that passages are chosen from, at most.
RECALL_BLOCKS = 200
STANDARD_LIBRARY = f"{glob.escape(sysconfig.get_path('stdlib'))}/*.py"
TRAINING_DEFAULTS = {
    "output_dir": "runs/pretrain_lm",
    "max_steps": 300,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
    "logging_steps": 20,
    "save_steps": 100,
    "save_total_limit": 2,
    "log_level_replica": "error",
    "dataloader_pin_memory": torch.cuda.is_available(),
    "ddp_find_unused_parameters": False,
}


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    architecture: Literal["mamba", "mamba2"] = field(default="mamba", metadata={"help": "Which stock model."})
    state_size: int = field(default=128, metadata={"help": "N at the start."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    layers: int = field(default=2, metadata={"help": "Number of layers."})


@dataclass
class CutArguments:
    _argument_group_name = "cut"

    cut: bool = field(default=True, metadata={"help": "Shrink the state; --no_cut trains a control."})
    target_state_size: float | None = field(
        default=None,
        metadata={"help": "N after the cut: a number, or a fraction of N. 16, if there is no --tolerance either."},
    )
    tolerance: float | None = field(
        default=None,
        metadata={"help": "Instead: the fewest states whose measured relative output error is at most this (0.05)."},
    )
    cut_at: list[float] | None = field(
        default=None,
        metadata={"help": "Fractions of training (0.2) or steps (100). Default: a fifth, but after warm-up."},
    )
    criterion: str = field(default="auto", metadata={"help": "How states are ranked: see hf_compressm.criteria."})
    realization: Literal["stock", "projected", "auto"] = field(
        default="auto", metadata={"help": "What the smaller model is; projected is for mamba2, and nearly lossless."}
    )
    cut_options: str = field(
        default="{}", metadata={"help": "More fields of CompreSSMConfig, as JSON: '{\"multiple_of\": 8}'."}
    )

    def config(self) -> CompreSSMConfig:
        """The callback's config."""
        if self.target_state_size is not None and self.tolerance is not None:
            raise ValueError("--target_state_size and --tolerance exclude each other: a fixed N, or a measured one")
        try:
            options = json.loads(self.cut_options)
        except json.JSONDecodeError as error:
            raise ValueError(f"--cut_options is not JSON ({error}): {self.cut_options}") from error
        if self.tolerance is not None:
            options["tolerance"] = self.tolerance
        elif self.target_state_size is not None or not {"hankel_tolerance", "state_bytes"} & set(options):
            options["state_size"] = count_or_fraction(16 if self.target_state_size is None else self.target_state_size)
        if self.cut_at is not None:
            options["schedule"] = [count_or_fraction(moment) for moment in self.cut_at]
        return CompreSSMConfig(**{"criterion": self.criterion, "realization": self.realization} | options)


@dataclass
class TextArguments:
    _argument_group_name = "data"

    train_files: list[str] = field(
        default_factory=lambda: [STANDARD_LIBRARY], metadata={"help": "Text files, UTF-8; ** matches folders."}
    )
    sample_by: Literal["document", "paragraph", "line"] = field(
        default="document", metadata={"help": "What of a file is one text, ended by an end-of-text token."}
    )
    held_out: float = field(default=0.05, metadata={"help": "Share of the texts that is only evaluated on."})
    block_size: int = field(default=128, metadata={"help": "Tokens per sequence."})


@dataclass
class DataArguments(TextArguments):
    tokenizer: Literal["bytes", "bpe"] = field(
        default="bytes", metadata={"help": "One token per byte, or a BPE trained on the texts."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Number of tokens of the BPE."})


class StepTimer(TrainerCallback):
    """Times training steps by state size. Stands before CompreSSMCallback, whose cut is no part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.seconds.setdefault(model.config.state_size, []).append(time.perf_counter() - self.start)

    def milliseconds(self, state_size: int) -> float | None:
        """The median step, without the first three, which allocate memory."""
        seconds = self.seconds.get(state_size, [])
        return 1000 * statistics.median(seconds[3:] or seconds) if seconds else None


def count_or_fraction(value: float) -> int | float:
    """A command line's 16.0 as 16, and 0.2 as it is."""
    return int(value) if value >= 1 and value == int(value) else value


def load_texts(data: TextArguments, seed: int) -> DatasetDict:
    """The texts, split into `train` and `test`."""
    files = set()
    for pattern in data.train_files:
        matches = {name for name in glob.glob(pattern, recursive=True) if Path(name).is_file()}
        if not matches:
            raise FileNotFoundError(f"--train_files: no file matches {pattern!r}")
        files |= matches
    texts = load_dataset(
        "text",
        data_files=sorted(files),
        split="train",
        sample_by=data.sample_by,
        keep_linebreaks=True,
        encoding_errors="replace",
    )
    if len(texts) < 2:
        raise ValueError(
            f"there is only one {data.sample_by}, and a part must be held out; give more --train_files, or split with "
            "--sample_by paragraph"
        )
    return texts.train_test_split(test_size=data.held_out, seed=seed)


def build_tokenizer(data: DataArguments, texts: Dataset) -> PreTrainedTokenizerFast:
    """Bytes are tokens 0 to 255 and the end of a text is 256; a BPE learns longer ones."""
    if data.tokenizer == "bytes":
        return byte_tokenizer()
    return byte_tokenizer().train_new_from_iterator(texts["text"], data.vocab_size, show_progress=False)


def tokenize(batch: dict[str, list], tokenizer: PreTrainedTokenizerFast) -> dict[str, list]:
    """Each text as token ids with the end-of-text token, and its length in bytes."""
    ids = tokenizer(batch["text"])["input_ids"]
    return {
        "input_ids": [[*text, tokenizer.eos_token_id] for text in ids],
        "bytes": [len(text.encode()) for text in batch["text"]],
    }


def pack(batch: dict[str, list], block_size: int) -> dict[str, list]:
    """Texts one after the other, cut into blocks; what is left at the end is dropped."""
    stream = list(chain.from_iterable(batch["input_ids"]))
    blocks = [stream[start : start + block_size] for start in range(0, len(stream) - block_size + 1, block_size)]
    return {"input_ids": blocks, "labels": blocks}


def build_config(model: ModelArguments, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The config of a stock model."""
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": model.hidden_size,
        "state_size": model.state_size,
        "num_hidden_layers": model.layers,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if model.architecture == "mamba":
        # Without CUDA kernels, Transformers loops over time steps; mambapy's parallel scan is many times faster.
        # Where mamba-ssm's kernels are installed, they are used and this has no effect.
        return MambaConfig(**common, use_mambapy=True)
    head_dim = math.gcd(2 * model.hidden_size, 64)
    # Without CUDA kernels, short chunks are faster.
    chunk_size = 256 if torch.cuda.is_available() else 64
    heads = 2 * model.hidden_size // head_dim
    return Mamba2Config(**common, num_heads=heads, head_dim=head_dim, n_groups=1, chunk_size=chunk_size)


def last_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint that was written to its end: the Trainer writes trainer_state.json after the weights.

    Of two of the same step, one is cut, and it is the later one.
    """
    files = Path(output_dir).glob("*checkpoint-*/trainer_state.json")
    complete = [file.parent for file in files if file.stat().st_size and not file.parent.name.startswith(".")]
    newest = max(
        complete, key=lambda folder: (int(folder.name.split("-")[-1]), folder.name.startswith("cut-")), default=None
    )
    return None if newest is None else str(newest)


def summary(trainer: Trainer, timer: StepTimer, history: list[dict[str, Any]], metrics: dict[str, float]) -> str:
    """What became of the model, one line for each state size it had."""
    parameters = {}
    for entry in history:
        if entry["status"] == "cut":
            parameters[entry["layers"][0]["state_size_before"]] = entry["parameters_before"]
    parameters[trainer.model.config.state_size] = get_model_param_count(trainer.model)
    lines = [f"{'state size N':>12}  {'parameters':>13}  {'ms per step':>11}"]
    for state_size, number in parameters.items():
        milliseconds = timer.milliseconds(state_size)
        step = "–" if milliseconds is None else f"{milliseconds:.1f}"
        lines.append(f"{state_size:12}  {number:13,}  {step:>11}")
    lines.append(
        f"held-out loss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.3f}, "
        f"{metrics['eval_bits_per_byte']:.4f} bits per byte, after {trainer.state.global_step} steps"
    )
    return "\n".join(lines)


def describe_run(trainer: Trainer, held_out: dict[str, float], data: DataArguments) -> None:
    """Write the card of a model that was cut, and print what it recalls."""
    model = unwrap(trainer.model)[0]
    record = record_of(model)
    if not record.made_cuts:
        return
    record.run["evaluated_on"] = f"{held_out.pop('tokens'):,} held-out tokens, in blocks of {data.block_size}"
    record.evaluations[END] = held_out | record.evaluations.get(END, {})
    save_provenance(model, trainer.args.output_dir)
    print(f"\n{table(record)}\n\n{write_card(trainer.args.output_dir)} is its card")


def main(arguments: list[str] | None = None) -> Trainer:
    parser = HfArgumentParser((ModelArguments, CutArguments, DataArguments, TrainingArguments))
    parser.set_defaults(**TRAINING_DEFAULTS)
    model_args, cut_args, data_args, training_args = parser.parse_args_into_dataclasses(arguments)
    callback = CompreSSMCallback(cut_args.config())
    is_main = training_args.process_index == 0
    logging.basicConfig(format="%(message)s")
    for name in ("pretrain_lm", "hf_compressm"):
        logging.getLogger(name).setLevel(logging.INFO if is_main else logging.ERROR)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)
    checkpoint = training_args.resume_from_checkpoint or last_checkpoint(training_args.output_dir)
    if checkpoint is not None:
        logger.info(f"going on from {checkpoint}; to start anew, choose another --output_dir")

    with training_args.main_process_first(desc="preparing the data"):
        texts = load_texts(data_args, training_args.seed)
        if checkpoint is None and training_args.local_process_index == 0:
            build_tokenizer(data_args, texts["train"]).save_pretrained(training_args.output_dir)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint or training_args.output_dir)
        tokens = texts.map(tokenize, batched=True, remove_columns="text", fn_kwargs={"tokenizer": tokenizer})
        columns = tokens["train"].column_names
        blocks = tokens.map(pack, batched=True, remove_columns=columns, fn_kwargs={"block_size": data_args.block_size})
    for split, name in (("train", "training"), ("test", "held-out")):
        if not len(blocks[split]):
            raise ValueError(
                f"the {name} texts hold fewer than --block_size {data_args.block_size} tokens; give more text"
            )

    # A checkpoint's own config has its state size. Where weights are sharded, the model must have it before they are.
    config = AutoConfig.from_pretrained(checkpoint) if checkpoint else build_config(model_args, tokenizer)
    timer = StepTimer()
    recall = RecallCallback(callback, rereading(blocks["test"][:RECALL_BLOCKS]["input_ids"], data_args.block_size))
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=training_args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["test"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[timer, recall, callback] if cut_args.cut else [timer],
    )
    logger.info(
        f"{model_args.architecture} with {get_model_param_count(trainer.model):,} parameters, {len(tokenizer):,} "
        f"tokens in the vocabulary; {len(blocks['train']):,} blocks of {data_args.block_size} tokens to learn from, "
        f"{len(blocks['test']):,} held out"
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if callback.goes_on is not None:
        return trainer
    trainer.save_metrics("train", metrics)

    if trainer.is_fsdp_enabled:
        # Checkpoints may be sharded, but of shards the Trainer saves no model.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    # Blocks leave out the end of the text.
    share = len(blocks["test"]) * data_args.block_size / sum(map(len, tokens["test"]["input_ids"]))
    held_out = evaluate.load(metric_path("perplexity")).compute(
        predictions=blocks["test"]["input_ids"],
        model=trainer.model_wrapped,
        text_bytes=share * sum(tokens["test"]["bytes"]),
        batch_size=training_args.per_device_eval_batch_size,
    )
    metrics = {f"eval_{name}": value for name, value in held_out.items()}
    trainer.log(metrics)
    trainer.save_metrics("eval", metrics)
    if is_main:
        print(f"\n{summary(trainer, timer, callback.history, metrics)}\n{training_args.output_dir}/ holds the model")
        describe_run(trainer, held_out, data_args)
    return trainer


if __name__ == "__main__":
    accelerator = main().accelerator
    # A process that leaves first can make the others' end an abort.
    accelerator.wait_for_everyone()
    accelerator.end_training()
