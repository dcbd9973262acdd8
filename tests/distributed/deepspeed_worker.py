"""DeepSpeed engines whose model is cut in the middle of training, in each of several processes.

Started by test_deepspeed.py under torchrun; imported by it for the same steps in one process without DeepSpeed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from conftest import selection_plan, silence_states, tokens
from deepspeed.utils import safe_get_full_optimizer_state
from launch import leave
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from train_worker import digest
from trained import ADAPTED, state_size, sums_of, trained
from trained import build as build_model
from training import KEPT, SILENT, AtStepEnd, build_trainer, config, examples, log_rows
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback

import hf_compressm.callback
from hf_compressm import CompressionPlan, CompreSSMCallback, Compressor, compress_, find_mixers, read_record
from hf_compressm.distributed.deepspeed import (
    MASTER,
    full_state,
    hooks_of,
    optimizer_bytes,
    readable,
    why_not_in_process,
)
from hf_compressm.replay import evaluation_mode, replay

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STEPS, CUT_AFTER = 7, 4
BF16 = {"bf16": {"enabled": True}}


def model_of(architecture: str, silent: bool) -> nn.Module:
    model = build_model(architecture)
    if silent:
        silence_states(model, SILENT)
    return model


def plan_for(model: nn.Module, silent: bool) -> CompressionPlan:
    """Keeps half of the states; where the others are not silent and the mixer allows it, the readout is refitted."""
    plan = selection_plan(model, KEPT)
    for name, mixer in find_mixers(model).items():
        if not silent and mixer.layout.CAN_REFIT:
            generator = torch.Generator().manual_seed(1)
            readout = torch.randn(mixer.groups, len(KEPT), 8, generator=generator, dtype=torch.float64) / 3
            plan.layers[name] = dataclasses.replace(plan.layers[name], readout=readout)
    return plan


def adam(model: nn.Module) -> AdamW:
    """Two groups, as the Trainer makes them. Under ZeRO-3 parameters may be in parts from the start, and flat."""
    dims = {item: len(getattr(item, "ds_shape", item.shape)) for item in trained(model)}
    decayed = [item for item, dim in dims.items() if dim > 1]
    others = [item for item, dim in dims.items() if dim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    # DeepSpeed leaves out a group without parameters, which a schedule would miss.
    return AdamW([group for group in groups if group["params"]], lr=5e-3, eps=1e-3)


def falling(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 / (1 + step / 4))


def engine_of(model: nn.Module, stage: int, micro_batches: int = 1, zero: dict | None = None, **options: Any) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 4 // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **(zero or {})},
    }
    optimizer = adam(model)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=falling(optimizer), config=settings | options
    )[0]


class Loop:
    """A raw DeepSpeed loop."""

    def __init__(self, stage: int, architecture: str = "mamba", silent: bool = False, **options: Any) -> None:
        self.model, self.silent = model_of(architecture, silent), silent
        self.micro_batches, self.like_torch = options.get("micro_batches", 1), options.pop("like_torch", False)
        self.engine = engine_of(self.model, stage, **options)
        self.held = self.engine.optimizer
        self.compressor: Compressor | None = None
        self.losses: list[float] = []
        self.norms: list[float] = []

    def train(self, first: int = 1, last: int = STEPS) -> Loop:
        for step in range(first, last + 1):
            for part in tokens(8, 12, seed=step).chunk(self.micro_batches):
                mine = part.chunk(WORLD)[RANK]
                loss = self.engine(input_ids=mine, labels=mine).loss
                if self.like_torch:
                    loss.backward()
                else:
                    self.engine.backward(loss)
                total = loss.detach().float() / WORLD
                dist.all_reduce(total)
                self.losses.append(total.item())
                self.engine.step()
            self.norms.append(float(self.engine.get_global_grad_norm()))
            if self.compressor is not None:
                self.compressor.step(step)
        return self

    def cut(self) -> Loop:
        compress_(self.engine, plan_for(self.model, self.silent))
        return self

    def result(self, **more: Any) -> dict[str, Any]:
        engine, parameters = self.engine, dict(self.model.named_parameters())
        states = {
            f"{name} {key}": value
            for name, item in parameters.items()
            for key, value in full_state(engine, item).items()
        }
        own_hooks = [set(item._post_accumulate_grad_hooks or ()) for item in trained(self.model)]
        result = {
            "losses": self.losses,
            "norms": self.norms,
            "weights": digest({name: item.detach().float() for name, item in parameters.items()}),
            "states": digest({name: value.float() for name, value in states.items()}),
            "of the kept": of_the_kept(self.model, states),
            "learning_rates": [group["lr"] for group in engine.optimizer.param_groups],
            "state_size": state_size(self.model),
            "same object": self.held is engine.optimizer,
            "one hook each": {len(hooks) for hooks in own_hooks} == {1},
            "its own hooks": set().union(*own_hooks) == hooks_of(engine),
            "bytes": optimizer_bytes(engine),
            **more,
        }
        engine.destroy()
        return result


def of_the_kept(model: nn.Module, states: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Two numbers of every moment and master weight; before a cut, of what it will keep."""
    axes = {}
    for mixer in find_mixers(model).values():
        for axis in mixer.state_axes:
            kept = torch.tensor(KEPT if mixer.state_size == 8 else range(4)).expand(mixer.groups, -1)
            axes[axis.tensor] = (axis, kept, mixer.state_size)
    numbers = {}
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq", MASTER):
            value = states.get(f"{name} {key}")
            if value is not None:
                if parameter in axes and key != "step":
                    axis, *where = axes[parameter]
                    value = axis.take(value, *where)
                numbers[f"{name} {key}"] = value
    return sums_of(numbers)


def uncut(stage: int, **options: Any) -> dict[str, Any]:
    return Loop(stage, silent=True, **options).train().result()


def cut(stage: int, **options: Any) -> dict[str, Any]:
    loop = Loop(stage, **options).train(last=CUT_AFTER).cut()
    # DeepSpeed's own way to the moments fails for all groups but the first, until an engine is rebuilt.
    found = all(
        torch.equal(safe_get_full_optimizer_state(item, "exp_avg"), full_state(loop.engine, item)["exp_avg"])
        for item in trained(loop.model)
    )
    return loop.train(first=CUT_AFTER + 1).result(found=found)


def cut_before_training(stage: int) -> dict[str, Any]:
    """There are no moments yet."""
    return Loop(stage, silent=True).cut().train().result()


def taken_back(stage: int, **options: Any) -> dict[str, Any]:
    """A cut is undone after two steps; those steps are forgotten."""
    loop = Loop(stage, **options)
    settings = config(pragmatic=True, schedule=[CUT_AFTER], calibration_tokens=96)
    loop.compressor = Compressor(settings, loop.engine, total_steps=STEPS)
    loop.train(last=CUT_AFTER)
    losses = list(loop.losses)
    loop.train(first=1, last=2)
    small = state_size(loop.model)
    loop.compressor.take_back()
    loop.losses = losses
    for group, rate in zip(loop.engine.optimizer.param_groups, (2.5e-3, 2.5e-3), strict=True):
        group["lr"] = rate
    loop.engine.lr_scheduler.last_epoch = CUT_AFTER
    return loop.train(first=CUT_AFTER + 1).result(small=small)


def refitted_master_weights() -> dict[str, Any]:
    """With 16-bit weights, the refit is made of the master weights, and the module's are its roundings."""
    loop = Loop(2, **BF16).train(last=CUT_AFTER)
    ((name, mixer), *_) = find_mixers(loop.model).items()
    readout = next(axis for axis in mixer.axes if "C" in axis.roles)
    rows = full_state(loop.engine, readout.tensor)[MASTER][readout.block(1, 8)].double()
    plan = plan_for(loop.model, silent=False)
    loop.engine.optimizer.overflow, loop.engine.optimizer.clip_grad = True, 0.25
    names = ("overflow", "clip_grad", "loss_scaler", "_global_grad_norm")
    told = [getattr(loop.engine.optimizer, key) for key in names]
    loop.cut()
    carried = told == [getattr(loop.engine.optimizer, key) for key in names]
    master = full_state(loop.engine, readout.tensor)[MASTER]
    expected = (plan.layers[name].readout[0] @ rows).float()
    rounded = all(
        torch.equal(full_state(loop.engine, item)[MASTER].to(item.dtype), item) for item in loop.model.parameters()
    )
    loop.engine.destroy()
    return {
        "refitted": torch.equal(master[readout.block(1, 4)], expected),
        "rounded": rounded,
        "carried": carried,
    }


def dora_master_weights() -> dict[str, Any]:
    """The magnitudes follow the norms of rows that are cut before ZeRO's own weights are."""
    loop = Loop(2, "mamba, DoRA", **BF16).train(last=CUT_AFTER)
    ((name, mixer), *_) = find_mixers(loop.model).items()
    layer = mixer.module.x_proj
    magnitudes, B, A = (part["default"].weight for part in (layer.lora_magnitude_vector, layer.lora_B, layer.lora_A))
    V = layer.base_layer.weight.double() + layer.scaling["default"] * B.double() @ A.double()
    ratios = (full_state(loop.engine, magnitudes)[MASTER].double() / V.norm(dim=1))[-8:]
    readout = plan_for(loop.model, silent=False).layers[name].readout[0]
    loop.cut()
    master = full_state(loop.engine, layer.lora_magnitude_vector["default"].weight)[MASTER]
    expected = ratios[KEPT] * (readout @ V[-8:]).norm(dim=1)
    loop.train(first=CUT_AFTER + 1)
    loop.engine.destroy()
    return {"difference": ((master[-4:] - expected) / expected).abs().max().item()}


def refusals() -> dict[str, Any]:
    """What `why_not_in_process` and `compress_` say, by what is wrong, and the Compressor of what it cannot do."""
    messages = {}
    options = {"offload": {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}}
    options["16-bit ZeRO-1"] = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
    for name, given in options.items():
        loop = Loop(1, **given)
        messages[name] = why_not_in_process(loop.engine)
        loop.engine.destroy()
    for stage in (0, 2, 3):
        loop = Loop(stage)
        messages[f"ZeRO-{stage}"] = why_not_in_process(loop.engine)
        if stage == 3:
            messages["compress_"] = refusal(loop.cut)
            messages["pragmatic"] = refusal_of_a_compressor(loop.engine, pragmatic=True)
            adapters = Loop(stage, "mamba, LoRA")
            messages["adapters"] = refusal_of_a_compressor(adapters.engine)
            adapters.engine.destroy()
        if stage == 2:
            basic = loop.engine.optimizer.optimizer
            loop.engine.optimizer.optimizer = SGD(basic.param_groups[0]["params"])
            partition = loop.engine.optimizer.single_partition_of_fp32_groups[0]
            loop.engine.optimizer.optimizer.state[partition] = {"noise": torch.zeros_like(partition)}
            messages["optimizer"] = why_not_in_process(loop.engine)
        loop.engine.destroy()
    loop = Loop(2, micro_batches=2)
    ids = tokens(2, 12)
    loop.engine.backward(loop.engine(input_ids=ids, labels=ids).loss)
    loop.engine.step()
    messages["accumulating"] = refusal(loop.cut)
    messages["projected"] = refusal_of_a_compressor(loop.engine, realization="projected")
    loop.engine.destroy()
    return messages


def refusal_of_a_compressor(engine: Any, **options: Any) -> str:
    return refusal(lambda: Compressor(config(**options), engine, total_steps=STEPS))


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was refused"


def read_under_zero3() -> dict[str, Any]:
    """Each mixer's whole parameters between two steps, and in a replay there, which change nothing of the training."""
    model = model_of("mamba", silent=False)
    engine, seen, losses = engine_of(model, 3, zero={"stage3_param_persistence_threshold": 0}), {}, []

    def look(name: str, module: nn.Module) -> None:
        with readable(module):
            seen.setdefault(name, []).append({key: item.norm().item() for key, item in module.named_parameters()})

    for step in range(1, STEPS + 1):
        mine = tokens(8, 12, seed=step).chunk(WORLD)[RANK]
        loss = engine(input_ids=mine, labels=mine).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach() / WORLD
        dist.all_reduce(total)
        losses.append(total.item())
        if step == CUT_AFTER:
            mixers = find_mixers(model)
            for name, mixer in mixers.items():
                look(name, mixer.module)
                seen[name].append(sum(item.numel() for item in mixer.module.parameters()))
            handles = [
                mixer.module.register_forward_pre_hook(lambda module, _, name=name: look(name, module))
                for name, mixer in mixers.items()
            ]
            with evaluation_mode(model):
                replay(model, {"input_ids": tokens(2, 9, seed=40)}, logits=False)
            for handle in handles:
                handle.remove()
    engine.destroy()
    return {"losses": losses, "seen": seen}


def _deepspeed_on_cpu() -> None:
    """Accelerate knows DeepSpeed only with GPUs: without one it is to be told of gloo, and of the processes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]


def build(
    stage: int, directory: Path, model: nn.Module, callbacks: Iterable[TrainerCallback] = (), **options: Any
) -> Trainer:
    """The stock Trainer."""
    if stage > 0:
        _deepspeed_on_cpu()
        options |= {
            "use_cpu": False,
            "accelerator_config": {"use_configured_state": True},
            "deepspeed": {
                "zero_optimization": {
                    "stage": stage,
                    "stage3_gather_16bit_weights_on_model_save": True,
                    # Else the parameters of a model this small are kept whole.
                    "stage3_param_persistence_threshold": 0,
                },
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
            },
        }
    fixed = {"data": examples(96), "weight_decay": 0.1, "warmup_steps": 2, "max_grad_norm": 0.5}
    return build_trainer(model, directory, callbacks, **(fixed | options))


def cutter(**options: Any) -> CompreSSMCallback:
    return CompreSSMCallback(config(**{"calibration_tokens": 96, "schedule": [CUT_AFTER]} | options))


def trainer(stage: int, directory: Path, cutting: bool = True, resume: Path | None = None, **options: Any) -> dict:
    """With the callback; the script always builds the full-size model."""
    callback, held = cutter(), []
    resume = resume and str(resume)
    trainer = build(
        stage,
        directory,
        model_of("mamba", silent=True),
        [callback] if cutting else [],
        resume_from_checkpoint=resume,
        **options,
    )

    def look(optimizer: Any, **others: Any) -> None:
        held.append(optimizer.optimizer is trainer.model_wrapped.optimizer)

    trainer.add_callback(AtStepEnd(CUT_AFTER + 1, look))
    trainer.train(resume_from_checkpoint=resume)
    return {
        "rows": log_rows(trainer),
        "weights": digest({name: item.detach() for name, item in trainer.model.named_parameters()}),
        "state_size": trainer.model.config.state_size,
        "held": held,
        "processes": trainer.args.world_size,
        "history": [(entry["status"], entry["step"]) for entry in callback.history],
        "kept": kept_states(callback),
    }


def kept_states(callback: CompreSSMCallback) -> list[list[list[int]]]:
    return [layer["kept"] for entry in callback.history for layer in entry.get("layers", [])]


def by_a_checkpoint(directory: Path) -> dict[str, Any]:
    """ZeRO-3 in the stock Trainer: the run stops when a cut is due, another one goes on from the cut checkpoint."""
    calls = []
    original = hf_compressm.callback.cut_checkpoint

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    hf_compressm.callback.cut_checkpoint = counted
    # On few tokens, the least squares of a refit would magnify what rounding does to gradients and states.
    callback = cutter(refit_penalty=3.0)
    first = build(3, directory, model_of("mamba", silent=False), [callback])
    first.train()
    hf_compressm.callback.cut_checkpoint = original
    written = [None] * WORLD
    dist.all_gather_object(written, len(calls))
    goes_on = callback.goes_on
    checkpoint = Path(goes_on.checkpoint)
    again = cutter(refit_penalty=3.0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    size = model.config.state_size
    second = build(3, directory / "second", model, [again])
    second.train(resume_from_checkpoint=str(checkpoint))
    return {
        "first": log_rows(first),
        "rows": log_rows(second),
        "built": size,
        "history": [(entry["status"], entry["step"]) for entry in again.history],
        "kept": kept_states(again),
        "goes_on": dataclasses.asdict(goes_on),
        "goes_on_again": again.goes_on,
        "written": written,
        "checkpoints": sorted(item.name for item in directory.glob("*checkpoint-*") if item.is_dir()),
        "file": json.loads((directory / "compressm_continue.json").read_text()),
        "save_only_model": refusal(
            build(3, directory / "refused", model_of("mamba", silent=False), [cutter()], save_only_model=True).train
        ),
        "pragmatic": refusal(
            build(
                3,
                directory / "refused",
                model_of("mamba", silent=False),
                [cutter(pragmatic=True)],
                eval_dataset=examples(8),
            ).train
        ),
    }


def in_process(directory: Path) -> dict[str, Any]:
    """What `by_a_checkpoint` trains, in one process without DeepSpeed."""
    callback = cutter(refit_penalty=3.0)
    trainer = build(0, directory, model_of("mamba", silent=False), [callback], per_device_train_batch_size=8)
    trainer.train()
    return {"rows": log_rows(trainer), "kept": kept_states(callback)}


def accelerate_loop(stage: int, cut_after: int, directory: Path, resume: str | None = None) -> dict[str, Any]:
    """A hand-written loop, as Accelerate prepares it. It ends where a cut waits for a checkpoint."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=1, gradient_clipping=0.5)
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    model = model_of("mamba2", silent=True)
    if resume is not None:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resume))
    optimizer = adam(model)
    rows = torch.cat([tokens(8, 12, seed=step) for step in range(1, STEPS + 1)])
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    engine, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, falling(optimizer))
    settings = config(schedule=[cut_after], calibration_tokens=96)
    compressor = Compressor(
        settings,
        engine,
        optimizer,
        accelerator=accelerator,
        total_steps=STEPS + 2,
        history=None if resume is None else read_record(resume),
    )
    accelerator.register_for_checkpointing(compressor)
    if resume is not None:
        accelerator.load_state(resume)
    losses, goes_on = [], None
    for batch in accelerator.skip_first_batches(loader, compressor.global_step):
        with accelerator.accumulate(engine):
            loss = engine(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        compressor.step()
        if compressor.plan_for_checkpoint is not None:
            goes_on = compressor.save_state(directory / f"step_{compressor.global_step}")
            break
    rates = [group["lr"] for group in optimizer.param_groups]
    engine.destroy()
    return {
        "losses": losses,
        "learning_rates": rates,
        "state_size": model.config.state_size,
        "history": [(entry["status"], entry["step"]) for entry in compressor.history],
        "goes_on": goes_on and dataclasses.asdict(goes_on),
    }


# What is run, and what it is compared with: `alone` with these options, or another entry.
SILENCED = {
    f"{what}, ZeRO-{stage}": (stage, options)
    for stage in (1, 2)
    for what, options in {"fp32": {}, "bf16": BF16}.items()
}
SMALL_BUCKETS = {"zero": {"reduce_bucket_size": 600, "contiguous_gradients": False, "round_robin_gradients": True}}
LIKE_ONE_PROCESS: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO-1": (1, {}),
    "ZeRO-2": (2, {}),
    "ZeRO-1, accumulation": (1, {"micro_batches": 2}),
    "ZeRO-2, accumulation": (2, {"micro_batches": 2}),
    "ZeRO-2, Mamba-2": (2, {"architecture": "mamba2"}),
    "ZeRO-2, torch's backward": (2, {"like_torch": True}),
    "ZeRO-2, small buckets, shuffled": (2, SMALL_BUCKETS),
    "ZeRO-1, overlapping, all-reduced": (1, {"zero": {"overlap_comm": True, "reduce_scatter": False}}),
    "ZeRO-1, falcon_mamba": (1, {"architecture": "falcon_mamba"}),
    "ZeRO-2, falcon_mamba": (2, {"architecture": "falcon_mamba"}),
    "ZeRO-2, jamba": (2, {"architecture": "jamba"}),
    "ZeRO-1, zamba": (1, {"architecture": "zamba"}),
    "ZeRO-2, zamba": (2, {"architecture": "zamba"}),
    **{f"ZeRO-2, {name}": (2, {"architecture": name}) for name in ADAPTED},
}


def alone(
    architecture: str = "mamba", micro_batches: int = 1, cutting: bool = True, last: int = STEPS, **_: Any
) -> dict[str, Any]:
    """The same steps in one process, with torch's own optimizer."""
    model = model_of(architecture, silent=False)
    optimizer = adam(model)
    schedule, losses, norms = falling(optimizer), [], []
    for step in range(1, last + 1):
        for part in tokens(8, 12, seed=step).chunk(micro_batches):
            loss = model.train()(input_ids=part, labels=part).loss
            (loss / micro_batches).backward()
            losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(trained(model), 0.5).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if cutting and step == CUT_AFTER:
            compress_(model, plan_for(model, silent=False), optimizer)
    states = {
        f"{name} {key}": value
        for name, item in model.named_parameters()
        for key, value in optimizer.state.get(item, {}).items()
    }
    return {
        "losses": losses,
        "norms": norms,
        "learning_rates": [group["lr"] for group in optimizer.param_groups],
        "of the kept": of_the_kept(model, states),
        "mixers": {
            name: {key: item.norm().item() for key, item in mixer.module.named_parameters()}
            for name, mixer in find_mixers(model).items()
        },
    }


def main() -> None:
    output = Path(sys.argv[1])
    # It would be compiled on the first start, which takes a minute, and is only there to be faster.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results = {}
    for name, (stage, options) in SILENCED.items():
        results[f"{name}, uncut"] = uncut(stage, **options)
        results[name] = cut(stage, silent=True, **options)
    for name, (stage, options) in LIKE_ONE_PROCESS.items():
        results[name] = cut(stage, **options)
    results["before training"] = cut_before_training(2)
    results["taken back"] = taken_back(2)
    for name in ("falcon_mamba", "mamba, DoRA"):
        results[f"taken back, {name}"] = taken_back(2, architecture=name)
    results["taken back, bf16"] = taken_back(1, silent=True, **BF16)
    results["refitted"] = refitted_master_weights()
    results["refitted, DoRA"] = dora_master_weights()
    results["refusals"] = refusals()
    results["ZeRO-3"] = read_under_zero3()
    for stage in (1, 2):
        saved = output / f"saved-{stage}"
        results[f"Trainer, ZeRO-{stage}, uncut"] = trainer(stage, output / "uncut", cutting=False)
        results[f"Trainer, ZeRO-{stage}"] = trainer(stage, saved, save_strategy="steps", save_steps=6)
        resumed = trainer(stage, output / f"resumed-{stage}", resume=saved / "checkpoint-6")
        results[f"Trainer, ZeRO-{stage}, resumed"] = resumed
    results["Trainer, ZeRO-3"] = by_a_checkpoint(output / "zero3")
    results["Accelerate, uncut"] = accelerate_loop(2, STEPS + 1, output)
    results["Accelerate, ZeRO-2"] = accelerate_loop(2, CUT_AFTER, output)
    first = accelerate_loop(3, CUT_AFTER, output)
    second = accelerate_loop(3, CUT_AFTER, output, resume=first["goes_on"]["checkpoint"])
    results["Accelerate, ZeRO-3"] = second | {"losses": first["losses"] + second["losses"], "first": first}
    (output / f"{RANK}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
