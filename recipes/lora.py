"""Fine-tune with LoRA, shrink the state on the way, and put the adapter back on the original model.

A small byte-level Mamba learns Python's standard library. Then adapters alone learn another kind of text, its tables
of character encodings, and half-way the callback cuts the frozen model's state, together with the adapters around it,
from N = 64 to 8. The adapter is saved with the plan of the cut: from the original model, plan and adapter the small
model comes back. Merged, it is a stock Transformers model. It runs on a CPU, in minutes, without a download:

    python recipes/lora.py
    python recipes/lora.py --base my/mamba --adapter_files 'poems/*.txt' --targets in_proj x_proj --dora

All options of transformers.TrainingArguments can be given, for the adapters' training; --help lists this recipe's own.
"""

from __future__ import annotations

import glob
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
from peft import LoraConfig, get_peft_model
from recall import RecallCallback, rereading, table
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_compressm import CompreSSMCallback, CompreSSMConfig, load_compressed_peft
from hf_compressm.cards import write_card
from hf_compressm.metrics import metric_path
from hf_compressm.provenance import record_of

STANDARD_LIBRARY = glob.escape(sysconfig.get_path("stdlib"))
TRAINING_DEFAULTS = {
    "output_dir": "runs/lora",
    "max_steps": 200,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-3,
    "logging_steps": 20,
    "save_steps": 100,
    "save_total_limit": 2,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class LoraArguments:
    base: str | None = field(default=None, metadata={"help": "A byte-level model to adapt; else one is trained."})
    base_steps: int = field(default=300, metadata={"help": "Steps of the base model's own training."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the base model."})
    state_size: int = field(default=64, metadata={"help": "N of the base model."})
    target_state_size: int = field(default=8, metadata={"help": "N after the cut."})
    cut_at: float = field(default=0.5, metadata={"help": "When the cut comes, as a fraction of the training."})
    targets: list[str] = field(
        default_factory=lambda: ["in_proj", "x_proj"], metadata={"help": "Layers that get adapters."}
    )
    rank: int = field(default=8, metadata={"help": "LoRA's rank."})
    dora: bool = field(default=False, metadata={"help": "Train DoRA's magnitudes, too."})
    base_files: str = field(default=f"{STANDARD_LIBRARY}/*.py", metadata={"help": "Texts of the base model."})
    adapter_files: str = field(
        default=f"{STANDARD_LIBRARY}/encodings/cp*.py", metadata={"help": "Texts of the adapters."}
    )
    block_size: int = field(default=64, metadata={"help": "Bytes per sequence."})


def byte_blocks(pattern: str, block_size: int) -> list[dict[str, torch.Tensor]]:
    """All texts one after the other as bytes, cut into blocks."""
    text = b"".join(Path(name).read_bytes() for name in sorted(glob.glob(pattern, recursive=True)))
    if len(text) < 20 * block_size:
        raise ValueError(f"{pattern!r} matches {len(text)} bytes of text; give at least {20 * block_size}")
    count = len(text) // block_size
    blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8, count=count * block_size).long().view(count, -1)
    return [{"input_ids": block, "labels": block} for block in blocks]


def train_base(recipe: LoraArguments, training: TrainingArguments) -> str:
    """Train a stock model, and return where it is saved."""
    config = MambaConfig(
        vocab_size=256,
        hidden_size=recipe.hidden_size,
        state_size=recipe.state_size,
        num_hidden_layers=2,
        use_mambapy=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    options = {name: getattr(training, name) for name in (*TRAINING_DEFAULTS, "use_cpu", "disable_tqdm")}
    options |= {"max_steps": recipe.base_steps, "output_dir": f"{training.output_dir}/base", "save_strategy": "no"}
    trainer = Trainer(
        MambaForCausalLM(config),
        TrainingArguments(**options, report_to="none"),
        train_dataset=byte_blocks(recipe.base_files, recipe.block_size),
    )
    trainer.train()
    trainer.save_model()
    return trainer.args.output_dir


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module, blocks: list[dict[str, torch.Tensor]]) -> float:
    """Between two models' logits."""
    ids = torch.stack([block["input_ids"] for block in blocks[:8]])
    first, second = (model.eval()(ids.to(next(model.parameters()).device)).logits.cpu() for model in (one, other))
    return (first - second).abs().max().item()


def main(arguments: list[str] | None = None) -> Trainer:
    parser = HfArgumentParser((LoraArguments, TrainingArguments))
    parser.set_defaults(**TRAINING_DEFAULTS)
    recipe, training = parser.parse_args_into_dataclasses(arguments)
    set_seed(training.seed)
    base, output = recipe.base or train_base(recipe, training), Path(training.output_dir)
    blocks = byte_blocks(recipe.adapter_files, recipe.block_size)
    held_out = torch.stack([block["input_ids"] for block in blocks[::10]])

    lora = LoraConfig(r=recipe.rank, target_modules=recipe.targets, use_dora=recipe.dora, task_type="CAUSAL_LM")
    cutter = CompreSSMCallback(CompreSSMConfig(state_size=recipe.target_state_size, schedule=[recipe.cut_at]))
    recall = RecallCallback(cutter, rereading(held_out, recipe.block_size))
    trainer = Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora),
        args=training,
        train_dataset=[block for number, block in enumerate(blocks) if number % 10],
        callbacks=[recall, cutter],
    )
    perplexity = evaluate.load(metric_path("perplexity"))
    before = perplexity.compute(predictions=held_out, model=trainer.model)
    print(f"held-out loss of the base model: {before['loss']:.4f} nats per byte")
    trainer.train()
    after = perplexity.compute(predictions=held_out, model=trainer.model)
    print(f"held-out loss with adapters and a smaller state: {after['loss']:.4f} nats per byte")

    print(f"\n{table(record_of(trainer.model))}\n")

    # The adapter alone is saved, with the plan of the cut.
    trainer.save_model(str(output / "adapter"))
    write_card(output / "adapter")
    original = AutoModelForCausalLM.from_pretrained(base)
    back = load_compressed_peft(original, output / "adapter")
    print(f"put back on the original model: logits differ by {largest_difference(back, trainer.model, blocks):.1e}")

    back.merge_and_unload().save_pretrained(output / "merged")
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    print(f"merged: logits differ by {largest_difference(merged, trainer.model, blocks):.1e}")
    print(f"{output}/merged holds a stock {type(merged).__name__} with N = {merged.config.state_size}")
    return trainer


if __name__ == "__main__":
    main()
