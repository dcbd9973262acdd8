"""DeepSpeed's ZeRO checkpoints: the parameters of each group lie flat, one behind another, cut up among processes.

ZeRO-1 and -2 cut the flat vector of a group into equal parts; ZeRO-3 cuts each parameter into equal parts, and splits
groups into subgroups. Beside the flat fp32 weights lie the moments, in the same order. The result is for the same
number of processes.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..optimizer_state import SLICED_STATE
from . import torch_files
from .work import Work

logger = logging.get_logger(__name__)

OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
MODEL_FILE = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_00_model_states\.pt")
# DeepSpeed aligns a ZeRO-1 or -2 group to this many numbers for each process.
ALIGNMENT = 2
DEFAULT_SUB_GROUP_SIZE = 1_000_000_000


def is_zero(directory: Path) -> bool:
    return any(file.name.endswith(("_optim_states.pt", "_model_states.pt")) for file in directory.iterdir())


@dataclass(frozen=True)
class _Piece:
    """A part of a parameter in one process's flat vector."""

    name: str
    place: int
    start: int
    count: int


@dataclass(frozen=True)
class _Group:
    """The parameters of a flat group, of which `group` is the number in the optimizer."""

    group: int
    shapes: dict[str, torch.Size]

    def size(self, stage: int, world: int) -> int:
        """The length of each process's flat vector."""
        numbers = [shape.numel() for shape in self.shapes.values()]
        if stage == 3:
            return sum(math.ceil(number / world) for number in numbers)
        return math.ceil(sum(numbers) / (ALIGNMENT * world)) * ALIGNMENT

    def pieces(self, stage: int, world: int, rank: int) -> list[_Piece]:
        """What lies in one process's flat vector."""
        pieces, place, size = [], 0, self.size(stage, world)
        for name, shape in self.shapes.items():
            if stage == 3:
                part = math.ceil(shape.numel() / world)
                start, here = min(rank * part, shape.numel()), place
                count = min(part, shape.numel() - start)
                place += part
            else:
                first, last = max(place, rank * size), min(place + shape.numel(), (rank + 1) * size)
                start, here, count = first - place, first - rank * size, last - first
                place += shape.numel()
            if count > 0:
                pieces.append(_Piece(name, here, start, count))
        return pieces


def rewrite(work: Work, source: Path, target: Path) -> None:
    """Write a ZeRO directory with the cut's parameters and moments.

    Raises:
        ValueError: a file is missing, or the layout is not one of those known here.
        ImportError: DeepSpeed is not installed; its checkpoints hold objects of its own.
    """
    target.mkdir()
    optimizer_files, model_files = _files(source)
    saved = [torch_files.load(file, _classes(file)) for file in optimizer_files]
    models = [torch_files.load(file, _classes(file)) for file in model_files]
    checkpoint = _Saved(work, saved, models, source)
    skeleton = work.skeleton
    if skeleton.added:
        logger.warning(
            f"{source}: the projections that the plan adds share the step count of their group in DeepSpeed's "
            "optimizer, so that their first updates are larger than those of a cut in process"
        )
    after = checkpoint.groups_after()
    for rank, (content, file) in enumerate(zip(saved, optimizer_files, strict=True)):
        checkpoint.put(content["optimizer_state_dict"], after, rank)
        torch_files.save(content, target / file.name, work)
    for content, file in zip(models, model_files, strict=True):
        _put_model(checkpoint, content, after, str(file))
        torch_files.save(content, target / file.name, work)


class _Saved:
    """The optimizer's state of all processes."""

    def __init__(self, work: Work, contents: list[Any], models: list[Any], source: Path) -> None:
        self.work, self.source, self.world = work, source, len(contents)
        self.parts = [content["optimizer_state_dict"] for content in contents]
        first = self.parts[0]
        if "zero_stage" not in first:
            raise ValueError(
                f"{source}: not ZeRO-1, -2 or -3, but the optimizer that DeepSpeed has for bf16 without it"
            )
        self.stage = int(getattr(first["zero_stage"], "value", first["zero_stage"]))
        self.flat_key, self.base_key = (
            ("fp32_flat_groups", "optimizer_state_dict")
            if self.stage == 3
            else ("single_partition_of_fp32_groups", "base_optimizer_state")
        )
        if not isinstance(first[self.base_key], dict):
            raise ValueError(f"{source}: an elastic ZeRO checkpoint; save with elastic_checkpoint off")
        if any(any(paddings) for paddings in first.get("param_alignment_paddings", [])):
            raise ValueError(f"{source}: parameters are aligned one by one; save with parameter_alignment off")
        self.param_groups = first[self.base_key]["param_groups"]
        settings = contents[0].get("ds_config", {}).get("zero_optimization", {})
        size = settings.get("sub_group_size", DEFAULT_SUB_GROUP_SIZE)
        self.sub_group_size = DEFAULT_SUB_GROUP_SIZE if size == "auto" else int(size)
        shapes = models[0]["param_shapes"]
        of_flat = {flat: number for number, group in enumerate(self.param_groups) for flat in group["params"]}
        if sorted(of_flat) != list(range(len(shapes))):
            raise ValueError(
                f"{source}: the optimizer has flat groups {sorted(of_flat)}, but the model's file lists the "
                f"parameters of {len(shapes)}"
            )
        self.groups = [_Group(of_flat[number], dict(group)) for number, group in enumerate(shapes)]
        # These are copied into each process's file, so they must outlive its rewriting.
        self.flats = [list(part[self.flat_key]) for part in self.parts]
        self.states = [dict(part[self.base_key]["state"]) for part in self.parts]
        self._check()
        self.where = {name: number for number, group in enumerate(self.groups) for name in group.shapes}

    def _check(self) -> None:
        for name in self.work.skeleton.changed:
            found = [group.shapes[name] for group in self.groups if name in group.shapes]
            if not found:
                raise ValueError(f"{self.source}: {name} is in no group of the optimizer; is it frozen?")
            self.work.skeleton.check_shape(name, found[0], str(self.source))
        for rank, (flats, part) in enumerate(zip(self.flats, self.parts, strict=True)):
            for number, group in enumerate(self.groups):
                expected = group.size(self.stage, self.world)
                starts = {
                    piece.name: (piece.place, piece.count) for piece in group.pieces(self.stage, self.world, rank)
                }
                mappings = part.get("param_slice_mappings")
                given = mappings and {name: (item.start, item.numel) for name, item in mappings[number].items()}
                if flats[number].numel() != expected or (given and given != starts):
                    raise ValueError(
                        f"{self.source}: flat group {number} of process {rank} has {flats[number].numel()} numbers, "
                        f"but for {self.world} processes its parameters take {expected}, or lie elsewhere; is a "
                        "process's file missing, or the layout one that this version does not know?"
                    )

    def groups_after(self) -> list[_Group]:
        """The flat groups of the smaller model."""
        skeleton = self.work.skeleton
        names: list[list[str]] = [[] for _ in self.param_groups]
        for group in self.groups:
            names[group.group] += group.shapes
        order = names
        if skeleton.added:
            number = {name: place for place, name in enumerate(skeleton.before)}
            if any(group != sorted(group, key=number.__getitem__) for group in names):
                raise ValueError(
                    f"{self.source}: the groups are not in the model's order, so that the place of a projection is "
                    "not known; save with round_robin_gradients off"
                )
            decays = [group.get("weight_decay", 0.0) for group in self.param_groups]
            order = skeleton.order_after(names, decays)
        self.work.optimizer_order = order
        groups = []
        for number, members in enumerate(order):
            shapes = {name: torch.Size(skeleton.after[name].shape) for name in members}
            groups += [_Group(number, part) for part in self._sub_groups(shapes)]
        return groups

    def _sub_groups(self, shapes: dict[str, torch.Size]) -> list[dict[str, torch.Size]]:
        if self.stage != 3:
            return [shapes]
        parts: list[dict[str, torch.Size]] = [{}]
        size = 0
        for name, shape in shapes.items():
            if size >= self.sub_group_size:
                parts.append({})
                size = 0
            parts[-1][name] = shape
            size += math.ceil(shape.numel() / self.world)
        return parts

    def read(self, name: str, key: str | None) -> torch.Tensor:
        """A parameter's fp32 weights (`key` None) or one of its moments, put together from all processes."""
        number = self.where[name]
        group = self.groups[number]
        flats = [
            self.flats[rank][number] if key is None else self.states[rank][number][key] for rank in range(self.world)
        ]
        whole = torch.empty(group.shapes[name].numel(), dtype=flats[0].dtype)
        for rank, flat in enumerate(flats):
            for piece in group.pieces(self.stage, self.world, rank):
                if piece.name == name:
                    whole[piece.start : piece.start + piece.count] = flat[piece.place : piece.place + piece.count]
        return whole.view(group.shapes[name])

    def after(self, name: str, key: str | None, dtype: torch.dtype) -> torch.Tensor:
        """The same after the cut."""
        work = self.work
        shape = work.skeleton.after[name].shape
        if name in work.skeleton.added:
            return work.values(name, torch.empty(0, dtype=dtype)) if key is None else torch.zeros(shape, dtype=dtype)
        old = self.read(name, key)
        if name not in work.skeleton.changed:
            return old
        if key is None:
            return work.values(name, old)
        new = work.state(name, {name: {key: old}})
        return torch.zeros(shape, dtype=dtype) if new is None else new[key]

    def put(self, part: dict[str, Any], after: list[_Group], rank: int) -> None:
        """Write one process's part of the smaller model into its file's content."""
        flats, states = [], {}
        for number, group in enumerate(after):
            template = next(old for old, item in enumerate(self.groups) if item.group == group.group)
            before = self.flats[rank][template]
            flats.append(self._flat(group, rank, None, before.dtype))
            if template not in self.states[rank]:
                continue
            states[number] = {}
            for key, value in self.states[rank][template].items():
                if not isinstance(value, torch.Tensor):
                    states[number][key] = value
                elif value.numel() == 1:
                    # torch.save keeps what is shared shared: the groups would count each other's steps.
                    states[number][key] = value.clone()
                elif key in SLICED_STATE and value.shape == before.shape:
                    states[number][key] = self._flat(group, rank, key, value.dtype)
                else:
                    raise TypeError(
                        f"{self.source}: the optimizer's state {key!r} of shape {tuple(value.shape)} in a group of "
                        f"{before.numel()} numbers is not known; supported are AdamW and its relatives, SGD, Lion"
                    )
        for old in self.states[rank].values():
            self.work.count_state(old, None)
        for new in states.values():
            self.work.count_state(None, new)
        part[self.flat_key], part[self.base_key]["state"] = flats, states
        for group_number, param_group in enumerate(part[self.base_key]["param_groups"]):
            param_group["params"] = [number for number, group in enumerate(after) if group.group == group_number]
        if self.stage == 3:
            return
        part["group_paddings"] = [self._padding(group, rank) for group in after]
        if "param_alignment_paddings" in part:
            part["param_alignment_paddings"] = [[0] * len(group.shapes) for group in after]
        if "param_slice_mappings" in part:
            part["param_slice_mappings"] = [self._mapping(group, rank) for group in after]

    def _flat(self, group: _Group, rank: int, key: str | None, dtype: torch.dtype) -> torch.Tensor:
        flat = self.work.file_backed((group.size(self.stage, self.world),), dtype)
        for piece in group.pieces(self.stage, self.world, rank):
            values = self.after(piece.name, key, dtype).flatten()
            flat[piece.place : piece.place + piece.count] = values[piece.start : piece.start + piece.count]
        return flat

    def _padding(self, group: _Group, rank: int) -> int:
        size, total = group.size(self.stage, self.world), sum(shape.numel() for shape in group.shapes.values())
        return min(size, max(0, (rank + 1) * size - total))

    def _mapping(self, group: _Group, rank: int) -> OrderedDict[str, Any]:
        from deepspeed.utils.tensor_fragment import fragment_address

        return OrderedDict(
            (piece.name, fragment_address(numel=piece.count, start=piece.place))
            for piece in group.pieces(self.stage, self.world, rank)
        )


def _put_model(checkpoint: _Saved, content: dict[str, Any], after: list[_Group], where: str) -> None:
    module, skeleton = content["module"], checkpoint.work.skeleton

    def rounded(name: str, old: torch.Tensor) -> torch.Tensor:
        """What the engine makes of the fp32 weights."""
        return checkpoint.after(name, None, torch.float32).to(old.dtype)

    if checkpoint.stage == 3:
        # Nothing but names: the weights are those of the optimizer.
        for name, beside in skeleton.added.items():
            module[name] = torch.empty_like(module[beside])
        content["module"] = type(module)(sorted(module.items(), key=skeleton.place))
    else:
        content["module"] = torch_files.new_weights(checkpoint.work, module, rounded, where)
    content["param_shapes"] = [OrderedDict(group.shapes) for group in after]


def _files(source: Path) -> tuple[list[Path], list[Path]]:
    files = sorted(file for file in source.iterdir() if file.suffix == ".pt")
    ranks = {int(match[1]): file for file in files if (match := OPTIMIZER_FILE.fullmatch(file.name))}
    models = [file for file in files if MODEL_FILE.fullmatch(file.name)]
    foreign = sorted({file.name for file in files} - {file.name for file in [*ranks.values(), *models]})
    if foreign:
        raise ValueError(
            f"{source} holds {foreign}: only plain ZeRO-1, -2 and -3 are supported, without model or expert "
            "parallelism and pipelines"
        )
    if not ranks:
        raise ValueError(f"{source} has no file of an optimizer of ZeRO-1, -2 or -3")
    missing = [rank for rank in range(max(ranks) + 1) if rank not in ranks]
    if missing or not models:
        raise FileNotFoundError(
            f"{source} lacks the optimizer's states of processes {missing}" if missing else f"{source} lacks its model"
        )
    return [ranks[rank] for rank in sorted(ranks)], models


def _classes(file: Path) -> list[Any]:
    """DeepSpeed's own classes in its checkpoints."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError as error:
        raise ImportError(f"{file} holds objects of DeepSpeed's: install deepspeed to rewrite it") from error
    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
