"""A training loop of one's own with Accelerate, in which the state of a Mamba shrinks on the way.

It learns the source code of Python's standard library byte by byte, on one process or many, on CPUs or GPUs:

    python recipes/accelerate_loop.py
    torchrun --nproc_per_node 2 recipes/accelerate_loop.py --cpu
    accelerate launch --config_file recipes/configs/fsdp2.yaml recipes/accelerate_loop.py

`--resume runs/accelerate_loop/step_100` goes on from a checkpoint, before or after the cut. Take this as a start for a
script of your own: what shrinks the state are the lines with `compressor`.
"""

import argparse
import logging
import math
import sysconfig
from pathlib import Path

import evaluate
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from recall import BEFORE, END, is_about_to_cut, note_recall, note_recall_after_cut, rereading, table
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, MambaConfig, get_cosine_schedule_with_warmup

from hf_compressm import CompreSSMConfig, Compressor, read_record
from hf_compressm.cards import write_card
from hf_compressm.metrics import metric_path
from hf_compressm.provenance import record_of, save_provenance


def load_blocks(files: list[Path], block_size: int) -> torch.Tensor:
    """The bytes of all files, one file after the other, in rows."""
    stream = torch.frombuffer(bytearray().join(file.read_bytes() for file in files), dtype=torch.uint8).long()
    return stream[: len(stream) // block_size * block_size].view(-1, block_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", type=Path, help="what to learn; default: Python's standard library")
    parser.add_argument("--output_dir", type=Path, default="runs/accelerate_loop")
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
    args = parser.parse_args()

    # The order of an epoch follows from its number: a resumed run sees what the unbroken one would have seen.
    order = DataLoaderConfiguration(use_seedable_sampler=True)
    options = {"gradient_accumulation_steps": args.accumulation, "dataloader_config": order}
    accelerator = Accelerator(cpu=args.cpu, log_with=args.report_to, project_dir=args.output_dir, **options)
    accelerator.init_trackers("accelerate_loop")
    if not accelerator.is_main_process:
        logging.disable(logging.WARNING)
    set_seed(0)
    blocks = load_blocks(args.files or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), args.block_size)
    # The end of the text is held out, to be evaluated on.
    held_out = blocks[-min(200, max(1, len(blocks) // 20)) :]
    loader = DataLoader(blocks[: -len(held_out)], args.batch_size, shuffle=True, drop_last=True)
    sizes = {"vocab_size": 256, "hidden_size": args.hidden_size, "num_hidden_layers": 2}
    config = MambaConfig(**sizes, state_size=args.state_size, tie_word_embeddings=False, use_mambapy=True)
    if args.resume:
        # It tells the state size, which the model must have before anything is wrapped or loaded.
        config = MambaConfig.from_pretrained(args.resume)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # Accelerate's scheduler makes a step for every process.
    warmup, processes = args.steps // 20, accelerator.num_processes
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup * processes, args.steps * processes)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if len(loader) == 0:
        raise ValueError(f"--files have {len(blocks)} blocks of --block_size: fewer than --batch_size on each process")
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

    passages = rereading(held_out, args.block_size)
    # A run that stopped at the cut did not see the smaller model.
    note_recall_after_cut(compressor, passages)
    model.train()
    is_main, accumulation, goes_on = accelerator.is_main_process, accelerator.gradient_accumulation_steps, None
    progress = tqdm(total=args.steps, initial=compressor.global_step, disable=not is_main, delay=1)
    while compressor.global_step < args.steps and goes_on is None:
        epoch, done = divmod(compressor.global_step, math.ceil(len(loader) / accumulation))
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, done * accumulation):
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            if is_about_to_cut(compressor, compressor.global_step + 1):
                note_recall(model, passages, BEFORE)
            report, step = compressor.step(), compressor.global_step
            note_recall_after_cut(compressor, passages)
            metrics = {"loss": accelerator.reduce(loss.detach(), "mean").item(), "lr": scheduler.get_last_lr()[0]}
            if report is not None:
                metrics |= report.metrics()
                if is_main:
                    tqdm.write(f"\nCompreSSM, step {step}\n{report}\n")
            accelerator.log(metrics, step=step)
            progress.set_postfix({"loss": f"{metrics['loss']:.3f}", "N": compressor.state_size}, refresh=False)
            progress.update()
            # FSDP1 and DeepSpeed's ZeRO-3 cannot be cut while they train: their checkpoint is, and this run ends.
            if step % args.save_every == 0 or step == args.steps or compressor.plan_for_checkpoint is not None:
                goes_on = compressor.save_state(args.output_dir / f"step_{step}")
            if step == args.steps or goes_on is not None:
                break
    progress.close()
    if goes_on is None:
        perplexity = evaluate.load(metric_path("perplexity"))
        # Every process evaluates its share.
        measured = perplexity.compute(predictions=held_out, model=model, batch_size=args.batch_size)
        accelerator.log({"held_out_loss": measured["loss"]}, step=compressor.global_step)
        accelerator.print(
            f"held-out loss {measured['loss']:.4f} nats per byte, next-byte accuracy {measured['accuracy']:.2%}"
        )
        note_recall(model, passages, END)
        record, last = record_of(compressor.model), args.output_dir / f"step_{compressor.global_step}"
        if is_main and record.made_cuts and last.exists():
            record.run["evaluated_on"] = f"{measured.pop('tokens'):,} held-out bytes, in blocks of {args.block_size}"
            record.evaluations[END] = measured | record.evaluations.get(END, {})
            save_provenance(compressor.model, last, compressor.optimizer_parameters)
            print(f"\n{table(record)}\n\n{write_card(last)} is the model's card")
    accelerator.print(f"checkpoints are in {args.output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
