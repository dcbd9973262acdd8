"""A training loop of one's own with Accelerate, in which the state of a Mamba shrinks on the way.

It learns the source code of Python's standard library byte by byte, on one process or many, on CPUs or GPUs:

    python recipes/accelerate_loop.py
    torchrun --nproc_per_node 2 recipes/accelerate_loop.py --cpu
    accelerate launch --config_file recipes/configs/fsdp2.yaml recipes/accelerate_loop.py

`--resume runs/accelerate_loop/step_100` goes on from a checkpoint, before or after the cut. Take this as a start for a
script of your own: what shrinks the state are the lines with `compressor`.
"""

from __future__ import annotations

import argparse
import sysconfig
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, MambaConfig, default_data_collator, get_cosine_schedule_with_warmup

from hf_compressm import CompreSSMConfig, Compressor, read_record


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/accelerate_loop")
    parser.add_argument("--resume", help="a checkpoint of this script")
    parser.add_argument("--cpu", action="store_true", help="several processes on CPUs")
    parser.add_argument("--report_to", help="a tracker: trackio, tensorboard, wandb, ...")
    parser.add_argument("--state_size", type=int, default=64, help="N at the start")
    parser.add_argument("--target_state_size", type=int, default=8, help="N after the cut, a fifth of the way")
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--accumulation", type=int, default=1, help="batches for each step")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in each process")
    parser.add_argument("--block_size", type=int, default=128, help="bytes per sequence")
    parser.add_argument("--save_every", type=int, default=100, help="steps between checkpoints")
    return parser.parse_args()


def load_blocks(block_size: int):
    """Bytes of text in blocks, one document after the other."""
    files = f"{sysconfig.get_path('stdlib')}/*.py"
    texts = load_dataset("text", data_files=files, split="train", sample_by="document")

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        stream = list(chain.from_iterable(text.encode() for text in batch["text"]))
        blocks = [stream[i : i + block_size] for i in range(0, len(stream) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": blocks}

    return texts.map(pack, batched=True, remove_columns="text")


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(
        cpu=args.cpu,
        gradient_accumulation_steps=args.accumulation,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    accelerator.init_trackers("accelerate_loop", config={k: v for k, v in vars(args).items() if v is not None})
    set_seed(0)
    with accelerator.main_process_first():
        blocks = load_blocks(args.block_size)
    loader = DataLoader(blocks, args.batch_size, shuffle=True, drop_last=True, collate_fn=default_data_collator)
    if args.resume:
        # The checkpoint's own config: the model has its state size before anything is wrapped or loaded.
        config = MambaConfig.from_pretrained(args.resume)
    else:
        sizes = {"vocab_size": 256, "hidden_size": args.hidden_size, "state_size": args.state_size}
        config = MambaConfig(**sizes, num_hidden_layers=2, use_mambapy=True)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warmup, processes = args.steps // 20, accelerator.num_processes
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup * processes, args.steps * processes)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    compressor = Compressor(
        CompreSSMConfig(state_size=args.target_state_size),
        model,
        optimizer,
        accelerator=accelerator,
        total_steps=args.steps,
        warmup_steps=warmup,
        history=read_record(args.resume) if args.resume else None,
    )
    accelerator.register_for_checkpointing(compressor)
    if args.resume:
        accelerator.load_state(args.resume)
    progress = tqdm(total=args.steps, initial=compressor.global_step, disable=not accelerator.is_main_process)

    model.train()
    step, goes_on = compressor.global_step, None
    while step < args.steps and goes_on is None:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            report = compressor.step()
            if report is not None:
                accelerator.print(f"\nstep {report.step}\n{report}")
                accelerator.log(report.metrics(), step=report.step)
            if not accelerator.sync_gradients:
                continue
            step = compressor.global_step
            progress.update()
            accelerator.log({"loss": accelerator.reduce(loss.detach(), "mean").item()}, step=step)
            # FSDP1 and DeepSpeed's ZeRO-3 cannot be cut while they train: their checkpoint is, and this run ends.
            if step % args.save_every == 0 or step == args.steps or compressor.plan_for_checkpoint is not None:
                goes_on = compressor.save_state(Path(args.output_dir) / f"step_{step}")
            if step == args.steps or goes_on is not None:
                break
    accelerator.end_training()


if __name__ == "__main__":
    main()
