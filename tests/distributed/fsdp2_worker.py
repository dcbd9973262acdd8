"""Loops under `fully_shard` in each of several processes, cut by hand, and the same loops in one process, not sharded.

Started by test_fsdp2.py under torchrun. Every process runs both and writes how far they are apart.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import TINY, lively, projection_plan, selection_plan, silence_states, tokens
from launch import leave
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from train_worker import digest
from trained import ADAPTED, blocks_of, build, state_size, state_sizes, trained
from training import KEPT, SILENT, AtStepEnd, build_trainer, config, examples
from transformers import AutoModelForCausalLM

from hf_compressm import CompressionPlan, CompreSSMCallback, Compressor, compress_, find_mixers, load_compressed_peft
from hf_compressm.distributed import fsdp2
from hf_compressm.surgery import check_optimizer

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ROWS, STEPS, CLIP = 8, 4, 0.5
Shape = Callable[[nn.Module], CompressionPlan]


def selected(model: nn.Module, kept: list[int]) -> CompressionPlan:
    """Each group keeps states of its own. Mamba-1's C is refitted too."""
    mixers = find_mixers(model)
    first = next(iter(mixers.values()))
    rows = [sorted((state + group) % first.state_size for state in kept) for group in range(first.groups)]
    plan = selection_plan(model, rows)
    for name, mixer in mixers.items():
        if mixer.layout.CAN_REFIT:
            identity = torch.eye(mixer.state_size)[torch.tensor(rows)]
            noise = torch.randn(identity.shape, generator=torch.Generator().manual_seed(1))
            plan.layers[name] = dataclasses.replace(plan.layers[name], readout=identity + 0.1 * noise)
    return plan


def keep(*kept: int) -> Shape:
    return functools.partial(selected, kept=list(kept))


def project(size: int, seed: int = 0) -> Shape:
    return functools.partial(projection_plan, sizes=size, seed=seed)


@dataclass
class Loop:
    """A model, what shards it, and after which steps it is cut."""

    architecture: str = "mamba"
    cuts: dict[int, Shape] = field(default_factory=lambda: {2: keep(0, 2, 7)})
    build: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] = functools.partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.1)
    # What gets a group of its own, besides the model: "blocks", "mixers".
    groups: tuple[str, ...] = ("blocks",)
    options: Callable[[], dict[str, Any]] = dict
    micro_batches: int = 1
    checkpointing: bool = False
    evaluates: bool = False

    def run(self, sharded: bool = True) -> Run:
        return Run(self, sharded).train(0, STEPS)


def shard(model: nn.Module, loop: Loop) -> nn.Module:
    options = loop.options()
    if "mixers" in loop.groups:
        for mixer in find_mixers(model).values():
            fully_shard(mixer.module, **options)
    for block in blocks_of(model):
        if "blocks" in loop.groups:
            fully_shard(block, **options)
    return fully_shard(model, **options)


class Run:
    """One training of a loop; not sharded, it sees every process's rows."""

    def __init__(self, loop: Loop, sharded: bool) -> None:
        self.loop, self.sharded = loop, sharded
        self.model = build(loop.architecture, **loop.build)
        if loop.checkpointing:
            self.model.gradient_checkpointing_enable()
        if sharded:
            shard(self.model, loop)
        decayed = [parameter for parameter in trained(self.model) if parameter.dim() > 1]
        others = [parameter for parameter in trained(self.model) if parameter.dim() == 1]
        self.optimizer = loop.optimizer([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.reports = []

    def train(self, first: int, last: int) -> Run:
        for step in range(first, last + 1):
            if step > 0:
                self.step(step)
            if step in self.loop.cuts:
                self.reports.append(compress_(self.model, self.loop.cuts[step](self.model), self.optimizer))
                check_optimizer(self.model, self.optimizer)
        return self

    def step(self, step: int) -> None:
        count = self.loop.micro_batches
        for number, part in enumerate(tokens(ROWS, 12, seed=step).chunk(count), start=1):
            self.losses.append(self.backward(part, synchronize=number == count) / count)
        parameters = trained(self.model)
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        self.norms.append(fsdp2.full_tensor(norm).item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.loop.evaluates:
            with torch.no_grad():
                self.model.eval()(input_ids=tokens(ROWS, 12))

    def backward(self, rows: torch.Tensor, synchronize: bool = True) -> float:
        if self.sharded:
            rows = rows.chunk(WORLD)[RANK]
            self.model.set_requires_gradient_sync(synchronize)
        loss = self.model.train()(input_ids=rows, labels=rows).loss
        (loss / self.loop.micro_batches).backward()
        loss = loss.detach().float()
        if self.sharded:
            dist.all_reduce(loss)
            loss /= WORLD
        return loss.item()

    def model_parameters(self) -> list[nn.Parameter]:
        """In the order of the optimizer's groups."""
        parameters = trained(self.model)
        return [p for p in parameters if p.dim() > 1] + [p for p in parameters if p.dim() == 1]

    def weights(self) -> dict[str, torch.Tensor]:
        fsdp2.reshard(self.model)
        return {name: whole(parameter) for name, parameter in self.model.named_parameters()}

    def moments(self) -> dict[str, torch.Tensor]:
        return {
            f"{name} {key}": whole(value)
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }

    def digest(self) -> str:
        return digest(self.weights()) + digest(self.moments())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return fsdp2.full_tensor(tensor.detach()).clone()


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def compared(loop: Loop) -> dict[str, Any]:
    """How far a sharded run is from the same in one process."""
    run, plain = loop.run(), loop.run(sharded=False)
    return {
        "losses": max(abs(a - b) for a, b in zip(run.losses, plain.losses, strict=True)),
        "norms": max(abs(a - b) for a, b in zip(run.norms, plain.norms, strict=True)),
        "clipped": max(run.norms) > CLIP,
        "weights": apart(run.weights(), plain.weights()),
        "moments": apart(run.moments(), plain.moments()),
        "digest": run.digest(),
        "all_sharded": all(isinstance(parameter, DTensor) for parameter in run.model.parameters()),
        "reports": [strip(report.to_dict()) for report in run.reports],
        "plain_reports": [strip(report.to_dict()) for report in plain.reports],
        "classes": [type(module).__name__ for module in run.model.modules() if isinstance(module, FSDPModule)],
        "config": type(run.model.config).__name__,
        "keeps_more_in_memory": keeps_more_in_memory(run),
        "same_groups": same_groups(run, plain),
    }


def strip(report: dict[str, Any]) -> dict[str, Any]:
    for layer in report["layers"]:
        # Of weights that are equal but for rounding.
        assert layer.pop("rounding_error") < 1e-6
        layer["mixer_class"] = layer["mixer_class"].removeprefix("FSDP")
    return report


def keeps_more_in_memory(run: Run) -> bool:
    """Whether a shard is a view of something larger; fully_shard itself pads shards by a row at most."""
    tensors = [*run.model.parameters(), *(v for s in run.optimizer.state.values() for v in s.values())]
    for tensor in tensors:
        if isinstance(tensor, DTensor) and tensor.numel() > 1:
            local = tensor.to_local()
            row = tensor.numel() // tensor.shape[0] * tensor.element_size()
            if local.untyped_storage().nbytes() > local.nbytes + row:
                return True
    return False


def same_groups(run: Run, plain: Run) -> bool:
    """Whether the groups hold what those of a new model with the same config do, in the same order, and as they do."""
    model = copy.deepcopy(plain.model)
    shard(model, run.loop)
    return groups_of(model) == groups_of(run.model) and settings_of(model) == settings_of(run.model)


def settings_of(model: nn.Module) -> list[list[Any]]:
    names = ("mesh_info", "post_forward_mesh_info", "mp_policy", "offload_to_cpu", "fsdp_placement", "_orig_size")
    return [[getattr(item, name) for item in group.fsdp_params for name in names] for group in fsdp2._groups(model)]


def groups_of(model: nn.Module) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(item.sharded_param)] for item in group.fsdp_params] for group in fsdp2._groups(model)]


def on_columns(parameter: nn.Parameter) -> Shard | None:
    """A_log along its states, everything else along its first dimension."""
    return Shard(1) if tuple(parameter.shape) in ((32, 8), (32, 4)) else None


TWICE = {1: project(5), 3: project(3, seed=1)}
PROJECTED_AND_SELECTED = {1: project(5), 3: keep(0, 3)}

# Its steps depend on the size of small gradients, and do not magnify what rounding does to them.
SMOOTH = functools.partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.1, eps=1e-3)
LOOPS: dict[int, dict[str, Loop]] = {
    2: {
        "mamba": Loop(),
        "mamba, before the first step": Loop(cuts={0: keep(0, 2, 7)}),
        "mamba, one group": Loop(groups=(), micro_batches=2),
        "mamba, groups in groups": Loop(groups=("mixers", "blocks"), micro_batches=2, checkpointing=True),
        "mamba, resharded after forward": Loop(options=lambda: {"reshard_after_forward": True}, evaluates=True),
        "mamba, columns": Loop(cuts={2: keep(0, 2, 3, 7)}, options=lambda: {"shard_placement_fn": on_columns}),
        "mamba, SGD": Loop(optimizer=functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
        "mamba2, not resharded": Loop("mamba2", options=lambda: {"reshard_after_forward": False}, evaluates=True),
        "mamba2, projected twice": Loop(
            "mamba2",
            cuts=TWICE,
            groups=("mixers", "blocks"),
            options=lambda: {"reshard_after_forward": False},
            evaluates=True,
        ),
        "mamba2, projected and selected": Loop("mamba2", cuts=PROJECTED_AND_SELECTED, groups=(), micro_batches=2),
        "mamba2, offloaded": Loop(
            "mamba2",
            cuts=TWICE,
            options=lambda: {
                "offload_policy": CPUOffloadPolicy(pin_memory=False),
                "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
            },
        ),
        "falcon_mamba": Loop("falcon_mamba", optimizer=SMOOTH, groups=("mixers", "blocks"), evaluates=True),
        "jamba": Loop("jamba", optimizer=SMOOTH),
        # Its attention blocks are shared between layers, and fully_shard wants them all in one group.
        "zamba": Loop("zamba", optimizer=SMOOTH, groups=("mixers",)),
        **{name: Loop(name) for name in ADAPTED},
    },
    4: {
        "mamba, to one state": Loop(cuts={2: keep(3)}),
        "mamba, replicated and sharded": Loop(
            options=lambda: {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))}
        ),
        "mamba, resharded to two": Loop(options=lambda: {"reshard_after_forward": 2}, evaluates=True),
        "mamba2, projected twice from three states": Loop(
            "mamba2", build={"state_size": 3}, cuts={1: project(2), 3: project(1)}, groups=("mixers", "blocks")
        ),
        "mamba2, replicated and sharded, projected twice": Loop(
            "mamba2",
            cuts=TWICE,
            options=lambda: {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))},
        ),
    },
}


def mixed_precision() -> dict[str, Any]:
    """Half of the states do nothing: a cut to the others changes nothing, and the forward pass stays in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = {}
    for name, cuts in {"cut": {2: functools.partial(selection_plan, kept=KEPT)}, "whole": {}}.items():
        run = Run(Loop("mamba", cuts, options=lambda: {"mp_policy": policy}), sharded=False)
        silence_states(run.model, SILENT)
        run.sharded, seen = True, []
        shard(run.model, run.loop)
        run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=5e-3)
        mixer = run.model.backbone.layers[0].mixer
        mixer.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(str(module.A_log.dtype)))
        run.train(1, STEPS)
        kinds = {str(value.dtype) for value in run.optimizer.state[mixer.A_log].values()}
        results[name] = {"losses": run.losses, "forward": seen, "kept": str(mixer.A_log.dtype), "moments": list(kinds)}
    return results


def taken_back(architecture: str, realization: str) -> dict[str, Any]:
    """Cut, trained, given back the old size and weights: it goes on as if nothing had been cut."""
    loop = Loop(architecture, {}, groups=("mixers", "blocks"), optimizer=SMOOTH)
    run, plain = Run(loop, sharded=True), Run(loop, sharded=False)
    settings = config(realization=realization, calibration_tokens=96, schedule=[2], pragmatic=True)
    compressor = Compressor(settings, run.model, run.optimizer, total_steps=STEPS + 1)
    before = groups_of(run.model), [type(module).__name__ for module in run.model.modules()]
    for step in (1, 2):
        run.step(step)
        compressor.step(step)
    small = sum(state_sizes(run.model))
    run.step(3)
    compressor.take_back()
    after = groups_of(run.model), [type(module).__name__ for module in run.model.modules()]
    run.losses.clear()
    run.train(3, STEPS)
    plain.train(1, 2).losses.clear()
    plain.train(3, STEPS)
    return {
        "losses": max(abs(a - b) for a, b in zip(run.losses, plain.losses, strict=True)),
        "weights": apart(run.weights(), plain.weights()),
        "moments": apart(run.moments(), plain.moments()),
        "as_before": before == after and small == 4 + 4,
        "digest": run.digest(),
    }


def failures() -> dict[str, Any]:
    """Cuts that cannot be made leave everything as it was."""

    def unknown_state(run: Run) -> None:
        parameter = find_mixers(run.model)["backbone.layers.1.mixer"].module.x_proj.weight
        run.optimizer.state[parameter]["strange"] = parameter.detach().clone()

    def waiting_gradients(run: Run) -> None:
        run.backward(tokens(ROWS, 12), synchronize=False)

    def hooked(run: Run) -> None:
        run.model.backbone.layers[1].mixer.A_log.register_post_accumulate_grad_hook(lambda _: None)

    columns = {"shard_placement_fn": on_columns}
    cases = {
        "unknown state": (Loop(), unknown_state),
        "waiting gradients": (Loop(), waiting_gradients),
        "hooks": (Loop(), hooked),
        "uneven columns": (Loop(options=lambda: columns), lambda _: None),
        "another model": (Loop(cuts={2: functools.partial(selection_plan, kept=[0, 9])}), lambda _: None),
    }
    messages = {}
    for name, (loop, prepare) in cases.items():
        run = Run(loop, sharded=True).train(1, 1)
        prepare(run)
        before, groups = run.digest(), groups_of(run.model)
        held = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
        try:
            compress_(run.model, loop.cuts[2](run.model), run.optimizer)
        except (RuntimeError, TypeError, ValueError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
        same = run.digest() == before and groups_of(run.model) == groups
        same &= all(a is b for a, b in zip(held, run.model_parameters(), strict=True))
        messages[name] += "" if same else " (and something was changed)"
    return messages


class Extension(torch.Tensor):
    """A tensor that gathers itself, as quantized ones do."""

    def fsdp_pre_all_gather(self, mesh):
        return (self,), None

    def fsdp_post_all_gather(self, outputs, metadata, dtype, *, out=None):
        return outputs[0], outputs


def refusals() -> dict[str, str]:
    """Layouts that are refused by name."""
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))

    def tensor_parallel(model: nn.Module) -> None:
        projection = model.backbone.layers[0].mixer.in_proj
        projection.weight = nn.Parameter(distribute_tensor(projection.weight.detach(), mesh["tensor"], [Shard(0)]))

    def both(model: nn.Module) -> None:
        tensor_parallel(model)
        fully_shard(model, mesh=mesh["data"])

    def extended(model: nn.Module) -> None:
        fully_shard(model)
        parameter = model.backbone.layers[0].mixer.in_proj.weight
        parameter._local_tensor = parameter._local_tensor.as_subclass(Extension)

    def replicated(model: nn.Module) -> None:
        replicate(model, mesh=init_device_mesh("cpu", (WORLD,)))

    messages = {}
    for prepare in (tensor_parallel, both, extended, replicated):
        model = lively(TINY["mamba"].build())
        prepare(model)
        try:
            compress_(model, keep(0, 2, 7)(model))
        except RuntimeError as error:
            messages[prepare.__name__] = str(error)
    return messages


def process_groups() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def sharded(*meshes: Any) -> nn.Module:
        model = lively(TINY["mamba"].build())
        for block, own in zip(model.backbone.layers, meshes, strict=False):
            fully_shard(block, mesh=own)
        return fully_shard(model, mesh=meshes[-1])

    sizes = {
        name: fsdp2.process_group(sharded(part)).size() for name, part in {"both": mesh, "one": mesh["shard"]}.items()
    }
    try:
        fsdp2.process_group(sharded(mesh["shard"], mesh))
    except RuntimeError as error:
        sizes["different"] = str(error)
    return sizes


TRAINERS = {
    "full, selected": ("FULL_STATE_DICT", "mamba", "stock"),
    "full, projected": ("FULL_STATE_DICT", "mamba2", "projected"),
    "sharded, projected": ("SHARDED_STATE_DICT", "mamba2", "projected"),
}


def force_fsdp_on_a_cpu() -> None:
    """Accelerate trains by DDP on a CPU, whatever it is asked for; FSDP2 itself runs there."""
    original = AcceleratorState.__init__

    def forced(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = forced


def under_the_trainer(directory: Path, kind: str, architecture: str, realization: str) -> dict[str, Any]:
    """Trained in one go, and from checkpoints before and after the cut; and with the best model before the cut."""
    block = type(TINY[architecture].build().backbone.layers[0]).__name__
    wrapping = {"transformer_layer_cls_to_wrap": [block], "state_dict_type": kind, "activation_checkpointing": True}
    result: dict[str, Any] = {}
    for name in ("whole", "checkpoint-2", "checkpoint-6", "best"):
        sizes: list[list[int]] = []
        seen = AtStepEnd(range(1, 9), lambda model, sizes=sizes, **_: sizes.append(state_sizes(model)))
        options: dict[str, Any] = {}
        if name == "best":
            scores = iter([1.0, 0.0, 0.0, 0.0])
            options = {
                **{"eval_dataset": examples(8), "eval_strategy": "steps", "eval_steps": 2},
                **{"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True},
                "compute_metrics": lambda _, scores=scores: {"score": next(scores)},
            }
        trainer = build_trainer(
            lively(TINY[architecture].build()),
            directory / name,
            [CompreSSMCallback(config(calibration_tokens=96, realization=realization)), seen],
            data=examples(96),
            **{"fsdp": True, "fsdp_config": {"version": 2, **wrapping}, "save_strategy": "steps", "save_steps": 2},
            **options,
        )
        trainer.train(resume_from_checkpoint=str(directory / "whole" / name) if name.startswith("check") else None)
        weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
        moments = [
            whole(trainer.optimizer.state[parameter]["exp_avg"])
            for parameter in trainer.model.parameters()
            if parameter in trainer.optimizer.state
        ]
        result[name] = {
            "kind": type(trainer.model).__name__,
            "sizes": [*sizes, state_sizes(trainer.model)],
            "state_size": trainer.model.config.state_size,
            "weights": digest(weights),
            "moments": digest({str(number): moment for number, moment in enumerate(moments)}),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }
        if kind == "FULL_STATE_DICT":
            trainer.save_model(str(directory / name / "final"))
            dist.barrier()
            saved = json.loads((directory / name / "final" / "config.json").read_text())
            result[name]["saved_as"] = saved["architectures"], saved.get("auto_map")
            loaded = AutoModelForCausalLM.from_pretrained(directory / name / "final")
            theirs = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in weights.items()}
            result[name]["loaded"] = apart(dict(loaded.named_parameters()), theirs)
    return result


def adapters_under_the_trainer(directory: Path) -> dict[str, Any]:
    """Adapters are cut, saved with their plan, and put back on the uncut base without sharding."""
    name, sizes = "mamba, DoRA", []
    seen = AtStepEnd(range(1, 9), lambda model, **_: sizes.append(state_size(model)))
    wrapping = {"transformer_layer_cls_to_wrap": ["MambaBlock"], "state_dict_type": "FULL_STATE_DICT"}
    trainer = build_trainer(
        build(name),
        directory,
        [CompreSSMCallback(config(calibration_tokens=96)), seen],
        data=examples(96),
        **{"fsdp": True, "fsdp_config": {"version": 2, **wrapping}, "save_strategy": "steps", "save_steps": 8},
    )
    trainer.train()
    dist.barrier()
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=tokens()).logits
    again = load_compressed_peft(build(ADAPTED[name][0]), directory / "checkpoint-8").eval()
    with torch.no_grad():
        difference = (again(input_ids=tokens()).logits - logits).abs().max().item()
    return {"sizes": sizes, "difference": difference}


def main() -> None:
    output = Path(sys.argv[1])
    dist.init_process_group("gloo")
    results: dict[str, Any] = {name: compared(loop) for name, loop in LOOPS[WORLD].items()}
    if WORLD == 2:
        results["mixed precision"] = mixed_precision()
        results["taken back"] = taken_back("mamba", "stock")
        results["taken back, projected"] = taken_back("mamba2", "projected")
        results["taken back, scaled"] = taken_back("falcon_mamba", "stock")
        results["taken back, DoRA"] = taken_back("mamba, DoRA", "stock")
        results["failures"] = failures()
        results["refusals"] = refusals()
        force_fsdp_on_a_cpu()
        for name, arguments in TRAINERS.items():
            results[name] = under_the_trainer(output / name, *arguments)
        results["adapters"] = adapters_under_the_trainer(output / "adapters")
    else:
        results["process groups"] = process_groups()
    (output / f"{RANK}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
