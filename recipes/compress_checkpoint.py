"""Shrink the state of a finished language model, heal it, and save what came out, with its card.

Any causal language model with Mamba mixers, from a directory or from the Hub, is measured on some text and cut in one
shot; then it may be trained for some steps to heal. Held-out text tells what that cost and what healing brought back:
loss, next-token accuracy, and the KL divergence from the uncut model. Without --model it trains a tiny model first, on
the source code of Python's standard library: on a CPU, in minutes, without a download.

    python recipes/compress_checkpoint.py
    python recipes/compress_checkpoint.py --architecture mamba2 --realization projected --output_dir runs/projected

A model of your own. It is cut only, healed by training all of it, or healed with LoRA, which is merged at the end:

    python recipes/compress_checkpoint.py --model my/model --train_files 'texts/*.txt' --state_size 8 --heal none
    python recipes/compress_checkpoint.py --model my/model --train_files 'texts/*.txt' --tolerance 0.05
    python recipes/compress_checkpoint.py --model state-spaces/mamba-130m-hf --dataset Salesforce/wikitext \
        --dataset_config wikitext-103-raw-v1 --dataset_split 'train[:1%]' --block_size 512 --heal lora --bf16

Healing learns from the text and from the uncut model: --distillation says in which parts (0: the text alone, 1: the
uncut model's predictions alone). Every option of transformers.TrainingArguments can be given, --max_steps and
--learning_rate first of all; --help lists this recipe's own at its end.

A quantized model cannot be cut: cut first, quantize then. --quantize int8 saves such a copy too (needs torchao).
--push_to_hub uploads everything to --hub_model_id.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import evaluate
import pretrain_lm
import torch
from datasets import Dataset, DatasetDict, load_dataset
from pretrain_lm import build_config, count_or_fraction, load_texts, pack
from recall import measure_recall, rereading
from recall import table as recall_table
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import is_torchao_available

from hf_compressm import CompreSSMConfig, compress_, measure, plan_compression, push_compressed
from hf_compressm.cards import license_of, write_card
from hf_compressm.metrics import metric_path
from hf_compressm.model_files import check_cut, find_model
from hf_compressm.provenance import record_of
from hf_compressm.ranks import fixed_state_size
from hf_compressm.record import describe_machine
from hf_compressm.refit import tokens_for_a_fit
from hf_compressm.report_page import write_report_page
from hf_compressm.saved_models import describe
from hf_compressm.texts import BYTES, byte_tokenizer
from hf_compressm.texts import load_tokenizer as saved_tokenizer

logger = logging.getLogger("compress_checkpoint")

TRAINING_DEFAULTS = {
    "output_dir": "runs/compressed",
    "max_steps": 200,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model: str | None = field(
        default=None, metadata={"help": "A directory, or a name on the Hub. Default: train a tiny model first."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "A directory or a name, or 'bytes': each byte a token. Default: the model's; else bytes."},
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the weights; auto: as saved. To heal 16-bit weights: float32, and --bf16."},
    )
    architecture: Literal["mamba", "mamba2"] = field(default="mamba", metadata={"help": "Of the tiny model."})
    tiny_state_size: int = field(default=32, metadata={"help": "N of the tiny model."})
    tiny_steps: int = field(default=600, metadata={"help": "Steps in which the tiny model is trained."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write where files are already."})


@dataclass
class CutArguments:
    _argument_group_name = "cut and healing"

    state_size: float | None = field(
        default=None, metadata={"help": "N after the cut: a number, or a fraction of N. Default: an eighth of N."}
    )
    tolerance: float | None = field(
        default=None,
        metadata={"help": "Instead: the fewest states whose measured relative output error is at most this (0.05)."},
    )
    realization: Literal["stock", "projected", "auto"] = field(
        default="auto", metadata={"help": "What the smaller model is; projected is for Mamba-2, and nearly lossless."}
    )
    cut_options: str = field(
        default="{}", metadata={"help": "More fields of CompreSSMConfig, as JSON: '{\"multiple_of\": 8}'."}
    )
    calibration_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that the states are measured on. Default: 16,384, or more for large N."},
    )
    heal: Literal["full", "lora", "none"] = field(
        default="full",
        metadata={"help": "Train all weights after the cut, LoRA adapters that are merged, or nothing."},
    )
    distillation: float = field(
        default=0.5, metadata={"help": "Share of the loss that is KL from the uncut model's predictions, 0 to 1."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_targets: list[str] = field(
        default_factory=lambda: ["in_proj", "x_proj"], metadata={"help": "Names of the layers that get adapters."}
    )
    quantize: Literal["no", "int8"] = field(
        default="no", metadata={"help": "Also save a copy with 8-bit weights, in int8/ (needs torchao)."}
    )

    def config(self) -> CompreSSMConfig:
        """The rules of the cut."""
        if self.state_size is not None and self.tolerance is not None:
            raise ValueError("--state_size and --tolerance exclude each other: a fixed N, or a measured one")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"--distillation is a share of the loss, from 0 to 1, not {self.distillation}")
        try:
            options = json.loads(self.cut_options) | {"realization": self.realization}
        except json.JSONDecodeError as error:
            raise ValueError(f"--cut_options is not JSON ({error}): {self.cut_options}") from error
        if self.tolerance is not None:
            options["tolerance"] = self.tolerance
        else:
            options["state_size"] = count_or_fraction(0.125 if self.state_size is None else self.state_size)
        return CompreSSMConfig(**options)


@dataclass
class DataArguments(pretrain_lm.TextArguments):
    dataset: str | None = field(
        default=None, metadata={"help": "Instead of files: a data set, as load_dataset takes."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str = field(default="train", metadata={"help": "Its split, or a part: 'train[:1%%]'."})
    text_column: str = field(default="text", metadata={"help": "Its column with the text."})
    eval_blocks: int = field(default=100, metadata={"help": "Sequences of held-out text to evaluate on, at most."})


class HealingTrainer(Trainer):
    """The stock Trainer; a share of its loss is KL(uncut ‖ model), per token."""

    def __init__(self, *, uncut: PreTrainedModel, distillation: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.uncut, self.distillation = uncut, distillation
        # The loss is a mean over this batch: the Trainer divides it by the number of accumulated ones.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = (1 - self.distillation) * outputs.loss
        if self.distillation:
            with torch.no_grad():
                expected = log_probabilities(self.uncut, inputs["input_ids"])
            loss = loss + self.distillation * divergence(expected, outputs.logits.float().log_softmax(-1)).mean()
        return (loss, outputs) if return_outputs else loss


def log_probabilities(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, use_cache=False).logits.float().log_softmax(-1)


def divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """KL(before ‖ after) of log-probabilities, for each token, in nats."""
    return (before.exp() * (before - after)).sum(-1)


def assess(model: PreTrainedModel, uncut: PreTrainedModel, blocks: torch.Tensor, batch_size: int) -> dict[str, Any]:
    """What a model is, and how well it predicts held-out text."""
    given = {"predictions": blocks, "model": model, "batch_size": batch_size}
    predicted = evaluate.load(metric_path("perplexity")).compute(**given)
    return {
        **describe(model),
        "loss": predicted["loss"],
        "accuracy": predicted["accuracy"],
        **evaluate.load(metric_path("kl_divergence")).compute(**given, reference_model=uncut),
    }


def table(columns: dict[str, dict[str, Any]]) -> str:
    """What was measured, a column for each stage."""
    rows = [
        ("", list(columns)),
        ("state size N", [column["state_size"] for column in columns.values()]),
        ("parameters", [f"{column['parameters']:,}" for column in columns.values()]),
        ("recurrent state, bytes per sequence", [f"{column['state_bytes']:,}" for column in columns.values()]),
        ("held-out loss, nats per token", [f"{column['loss']:.4f}" for column in columns.values()]),
        ("next-token accuracy", [f"{column['accuracy']:.2%}" for column in columns.values()]),
        ("KL from the uncut model, nats per token", [f"{column['kl_divergence']:.4f}" for column in columns.values()]),
    ]
    width = max(len(cell) for _, cells in rows for cell in cells)
    return "\n".join(f"{label:41}" + "".join(f"{cell:>{width + 2}}" for cell in cells) for label, cells in rows)


def load_tokenizer(model: str, tokenizer: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for, or else the model's own; of a directory without one, bytes."""
    found = saved_tokenizer(find_model(model), tokenizer)
    if found is None and not Path(model).is_dir():
        raise ValueError(f"{model} has no tokenizer; name one with --tokenizer, or give --tokenizer {BYTES}")
    if found is None:
        logger.info(f"{model} has no tokenizer: each byte of the text is a token (--tokenizer names another)")
    return byte_tokenizer() if found is None else found


def tokenize(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Each text as token ids, with the end-of-text token where there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {"input_ids": [[*ids, *end] for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]]}


def load_documents(data: DataArguments, seed: int) -> DatasetDict:
    """The texts of files or of a data set, split into `train` and `test`."""
    if data.dataset is None:
        return load_texts(data, seed)
    texts = load_dataset(data.dataset, data.dataset_config, split=data.dataset_split)
    texts = texts.select_columns(data.text_column).rename_columns({data.text_column: "text"})
    return texts.train_test_split(test_size=data.held_out, seed=seed)


def load_blocks(data: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> DatasetDict:
    """Sequences of --block_size tokens, split into `train`, in random order, and `test`."""
    texts = load_documents(data, seed)
    tokens = texts.map(tokenize, batched=True, remove_columns="text", fn_kwargs={"tokenizer": tokenizer})
    blocks = tokens.map(pack, batched=True, remove_columns="input_ids", fn_kwargs={"block_size": data.block_size})
    if not len(blocks["test"]):
        raise ValueError(f"the held-out texts hold fewer than --block_size {data.block_size} tokens; give more text")
    blocks["train"] = blocks["train"].shuffle(seed=seed)
    return blocks


def train_tiny_model(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> str:
    """Train a tiny model on the text, unless an earlier run did; returns its directory."""
    output = Path(f"runs/tiny_{model.architecture}_{model.tiny_state_size}_{model.tiny_steps}")
    if (output / "config.json").exists():
        logger.info(f"{output} holds a tiny model of an earlier run")
        return str(output)
    tokenizer = byte_tokenizer()
    shape = pretrain_lm.ModelArguments(model.architecture, model.tiny_state_size, hidden_size=64, layers=2)
    tiny = AutoModelForCausalLM.from_config(build_config(shape, tokenizer))
    logger.info(
        f"training a tiny {model.architecture}, {tiny.num_parameters():,} parameters, {model.tiny_steps} steps"
    )
    arguments = TRAINING_DEFAULTS | {"max_steps": model.tiny_steps, "learning_rate": 1e-2, "use_cpu": training.use_cpu}
    arguments |= {"output_dir": str(output), "disable_tqdm": training.disable_tqdm, "seed": training.seed}
    blocks = load_blocks(data, tokenizer, training.seed)["train"]
    trainer = Trainer(
        tiny, TrainingArguments(**arguments), default_data_collator, train_dataset=blocks, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    return str(output)


def heal(
    model: PreTrainedModel, uncut: PreTrainedModel, blocks: Dataset, cut: CutArguments, training: TrainingArguments
) -> PreTrainedModel:
    """Train the cut model for some steps; adapters are merged into it."""
    if cut.heal == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=cut.lora_rank, lora_alpha=2 * cut.lora_rank, target_modules=cut.lora_targets)
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            # The projections are small, and no adapter fits them: they are trained themselves.
            parameter.requires_grad_(parameter.requires_grad or name.endswith("_projection"))
    model.train()
    HealingTrainer(
        model=model,
        args=training,
        train_dataset=blocks,
        data_collator=default_data_collator,
        uncut=uncut,
        distillation=cut.distillation,
    ).train()
    if cut.heal == "lora":
        model = model.merge_and_unload().requires_grad_(True)
    return model


def save_quantized(output: Path) -> PreTrainedModel:
    """Save a copy with 8-bit weights in int8/, from what was saved before."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(output)
    # Mamba-1's forward multiplies with the weight of dt_proj itself, which 8-bit tensors cannot do.
    raw = [name for name, _ in model.named_modules() if name.endswith(".dt_proj")]
    how = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=raw or None)
    quantized = AutoModelForCausalLM.from_pretrained(output, quantization_config=how)
    quantized.save_pretrained(output / "int8")
    return quantized


def command(training: TrainingArguments, *groups: Any) -> str:
    """What to type for the same again. Not what was typed: that may hold a token."""
    given = {}
    for group in groups:
        defaults = vars(type(group)())
        given |= {name: value for name, value in vars(group).items() if value != defaults[name]}
    given.pop("overwrite_output_dir", None)
    for name in ("max_steps", "learning_rate", "per_device_train_batch_size", "seed"):
        given[name] = getattr(training, name)
    words = ["python", "recipes/compress_checkpoint.py"]
    for name, value in given.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def healing(cut: CutArguments, training: TrainingArguments) -> str:
    """What was done after the cut, for the card."""
    if cut.heal == "none":
        return "It was not trained afterwards."
    targets = ", ".join(cut.lora_targets)
    lora = f"LoRA of rank {cut.lora_rank} on {targets}, merged into the weights"
    how = lora if cut.heal == "lora" else "all weights"
    return (
        f"Healing: {how}, {training.max_steps} steps at a peak learning rate of {training.learning_rate}; "
        f"{cut.distillation:.0%} of the loss was the KL divergence from the uncut model's predictions, the rest the "
        "loss on the text."
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError("this recipe runs in one process; cut with --heal none, and heal with a script of your own")
    parser = HfArgumentParser((ModelArguments, CutArguments, DataArguments, TrainingArguments))
    parser.set_defaults(**TRAINING_DEFAULTS)
    model_args, cut_args, data_args, training_args = parser.parse_args_into_dataclasses(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("compress_checkpoint").setLevel(logging.INFO)
    # Transformers says for each kernel that it is not installed; on a CPU none could be.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    config, output = cut_args.config(), Path(training_args.output_dir)
    if output.exists() and any(output.iterdir()) and not model_args.overwrite_output_dir:
        raise FileExistsError(f"{output}/ is not empty; give another --output_dir, or --overwrite_output_dir")
    if cut_args.quantize != "no" and not is_torchao_available():
        raise ImportError("--quantize needs torchao: pip install torchao")
    push, training_args.push_to_hub = training_args.push_to_hub, False
    set_seed(training_args.seed)

    source = model_args.model or train_tiny_model(model_args, data_args, training_args)
    largest = max(mixer.state_size for mixer in check_cut(find_model(source), config).values())
    tokenizer = load_tokenizer(source, model_args.tokenizer)
    blocks = load_blocks(data_args, tokenizer, training_args.seed)
    kept = largest // 4 if config.state_size is None else fixed_state_size(config.state_size, largest)
    wanted = cut_args.calibration_tokens or max(16384, tokens_for_a_fit(kept, largest))
    needed = -(-wanted // data_args.block_size)
    if needed > len(blocks["train"]):
        raise ValueError(
            f"too little text: {wanted:,} calibration tokens are wanted, but the training texts make "
            f"{len(blocks['train'])} sequences of {data_args.block_size}; give more, or fewer --calibration_tokens"
        )
    calibration = torch.tensor(blocks["train"][:needed]["input_ids"])
    held_out = torch.tensor(blocks["test"][: data_args.eval_blocks]["input_ids"])

    model = AutoModelForCausalLM.from_pretrained(source, dtype=model_args.dtype).to(training_args.device)
    vocabulary = model.get_input_embeddings().num_embeddings
    if max(calibration.max(), held_out.max()) >= vocabulary:
        raise ValueError(
            f"the tokenizer makes tokens that the model does not know: it knows 0 to {vocabulary - 1}; give the "
            "model's own --tokenizer"
        )
    uncut = copy.deepcopy(model).requires_grad_(False).eval()
    batch_size = training_args.per_device_eval_batch_size
    passages = rereading(held_out, data_args.block_size)
    columns = {"uncut": assess(model, uncut, held_out, batch_size)}
    recalled = {"uncut": measure_recall(model, passages)}
    statistics = measure(model, calibration.split(batch_size), show_progress=True)
    report = compress_(model, plan_compression(model, statistics, config))
    del statistics
    if not report.changed:
        raise ValueError(f"nothing was cut: the rule keeps more than {config.max_kept_fraction:.0%} of the states")
    columns["cut"] = assess(model, uncut, held_out, batch_size)
    recalled["cut"] = measure_recall(model, passages)
    report.loss_before, report.loss_after = columns["uncut"]["loss"], columns["cut"]["loss"]
    report.kl_divergence = columns["cut"]["kl_divergence"]
    print(f"\n{report}\n")
    if cut_args.heal != "none":
        model = heal(model, uncut, blocks["train"], cut_args, training_args)
        columns["healed"] = assess(model, uncut, held_out, batch_size)
        recalled["healed"] = measure_recall(model, passages)

    record = record_of(model)
    record.cuts[-1] |= report.to_dict()
    record.evaluations = {stage: column | recalled[stage] for stage, column in columns.items()}
    record.machine = describe_machine()
    text = data_args.dataset or "text files"
    record.run = {
        "base_model": source,
        "license": license_of(source),
        "dataset": data_args.dataset,
        "seed": training_args.seed,
        "command": command(training_args, model_args, cut_args, data_args),
        "evaluated_on": f"{held_out.numel():,} held-out tokens of {text}, which the cut and the healing did not see",
        "healing": healing(cut_args, training_args),
        "recall": passages.description,
        "recall_length": passages.length,
    }
    if cut_args.quantize == "int8":
        record.run["description"] = "`int8/` holds a copy with 8-bit weights, which needs torchao."
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    if cut_args.quantize == "int8":
        columns["int8 copy"] = assess(save_quantized(output).to(uncut.device), uncut, held_out, batch_size)
        tokenizer.save_pretrained(output / "int8")
    write_card(output)
    write_report_page(output)
    print(f"\n{table(columns)}\n\n{recall_table(record)}\n")
    print(f"{output}/ holds the model, its tokenizer, its card (README.md) and report.html")
    if push:
        name, token = training_args.hub_model_id or output.name, training_args.hub_token
        print(push_compressed(output, name, token=token, private=training_args.hub_private_repo))
    return columns


if __name__ == "__main__":
    main()
