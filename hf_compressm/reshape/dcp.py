"""Sharded checkpoints of torch.distributed.checkpoint (DCP), which FSDP writes: a directory for model or optimizer.

The shards may be of any number of processes; one file is written, which any number of processes can load.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from .work import Work

# Where an entry lies in the nested dictionary that was saved.
Place = tuple[Any, ...]


class _Reader(dcp.FileSystemReader):
    """Reads the metadata once, and only classes that belong there: it is a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if not hasattr(self, "_metadata"):
            with open(Path(self.path) / ".metadata", "rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
        return self._metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        modules = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        plain = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in modules or module.startswith("pathlib") or (module, name) in plain or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata refers to {module}.{name}, which does not belong there")


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _LazySavePlanner(DefaultSavePlanner):
    """Makes each tensor when it is written; the state dictionary holds tensors without values."""

    def __init__(self, make: dict[Place, Callable[[], torch.Tensor]]) -> None:
        super().__init__()
        self.make = make

    def lookup_object(self, index: MetadataIndex) -> Any:
        make = self.make.get(self.mappings[index.fqn])
        return super().lookup_object(index) if make is None else make()


def is_dcp(directory: Path) -> bool:
    return (directory / ".metadata").is_file()


class _Saved:
    """A checkpoint's entries by where they lie in the nested dictionary."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reader = _Reader(directory)
        try:
            self.metadata = self.reader.read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{directory / '.metadata'} cannot be read ({error})") from error
        self.keys = {place: key for key, place in self.metadata.planner_data.items()}

    def empty(self, place: Place) -> torch.Tensor | None:
        """The tensor without values, or None for plain data."""
        entry = self.metadata.state_dict_metadata[self.keys[place]]
        if isinstance(entry, BytesStorageMetadata):
            return None
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def load(self, place: Place) -> Any:
        """Read one entry."""
        key, empty = self.keys[place], self.empty(place)
        content = {key: None if empty is None else torch.empty_like(empty, device="cpu")}
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(content, storage_reader=self.reader, planner=planner, no_dist=True)
        except (OSError, RuntimeError, EOFError, dcp.api.CheckpointException) as error:
            raise ValueError(f"{self.directory}: {key} cannot be read ({str(error).splitlines()[-1]})") from error
        return content[key]


class _Rewrite:
    """The entries of the new directory: plain data, and tensors that are made when they are written."""

    def __init__(self, work: Work, source: Path) -> None:
        self.work, self.saved = work, _Saved(source)
        self.content: dict[Place, Any] = {}
        self.make: dict[Place, Callable[[], torch.Tensor]] = {}
        # Root → parameter → entry → where it lies.
        self.states: dict[Place, dict[str, dict[str, Place]]] = {}
        self.weights: set[str] = set()
        for place in self.saved.keys:
            empty = self.saved.empty(place)
            if empty is None:
                self.content[place] = self.saved.load(place)
            elif len(place) >= 3 and place[-3] == "state":
                self.states.setdefault(place[:-2], {}).setdefault(place[-2], {})[place[-1]] = place
            else:
                self._put_weight(place, empty)

    def _put(self, place: Place, empty: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
        self.content[place], self.make[place] = empty, make

    def _put_weight(self, place: Place, empty: torch.Tensor) -> None:
        work, skeleton, name = self.work, self.work.skeleton, place[-1]
        self._put(place, empty, partial(self.saved.load, place))
        if name not in skeleton.touched:
            return
        self.weights.add(name)
        if name in skeleton.changed:
            skeleton.check_shape(name, empty.shape, str(self.saved.directory))
            new = empty.new_empty(skeleton.after[name].shape)
            self._put(place, new, lambda: work.values(name, self.saved.load(place)))
        beside_it = torch.empty(0, dtype=empty.dtype)
        for added in (added for added, beside in skeleton.added.items() if beside == name):
            new = empty.new_empty(skeleton.after[added].shape)
            self._put((*place[:-1], added), new, partial(work.values, added, beside_it))

    def put_optimizer(self, groups: dict[Place, dict[str, Any]]) -> None:
        """Bring the optimizer's groups and states into the form after the cut.

        Raises:
            ValueError: the optimizer has parameters that the model has not.
        """
        work = self.work
        names = [group["params"] for group in groups.values()]
        unknown = [name for group in names for name in group if name not in work.skeleton.before]
        if unknown:
            raise ValueError(f"{self.saved.directory}: the optimizer has parameters that the model has not: {unknown}")
        decays = [group.get("weight_decay", 0.0) for group in groups.values()]
        work.optimizer_order = work.skeleton.order_after(names, decays)
        for place, present in zip(groups, work.optimizer_order, strict=True):
            self.content[(*place, "params")] = present
        for root, states in self.states.items():
            for name in (name for group in work.optimizer_order for name in group):
                self._put_state(root, name, states)

    def _put_state(self, root: Place, name: str, states: dict[str, dict[str, Place]]) -> None:
        work, places = self.work, states.get(name, {})
        old = {key: self.saved.empty(place) for key, place in places.items()}
        if name not in work.skeleton.changes:
            work.count_state(old, old)
            for key, place in places.items():
                self._put(place, old[key], partial(self.saved.load, place))
            return
        of = work.skeleton.added.get(name, name)

        def new_state() -> dict[str, Any]:
            state = {key: self.saved.load(place) for key, place in states.get(of, {}).items()}
            return work.state(name, {of: state}, start_anew=True) or {}

        # The state of one parameter is worked out several times: here for its shapes, then for each entry's values.
        new = {key: torch.empty_like(value, device="meta") for key, value in new_state().items()}
        work.count_state(old, new)
        for key, empty in new.items():
            self._put((*root, name, key), empty, lambda key=key: new_state()[key])


def rewrite(work: Work, source: Path, target: Path) -> bool:
    """Write a directory with the cut's parameters or their state; False if it holds none of the plan's.

    Raises:
        ValueError: a file is damaged, or parameters are missing.
    """
    new = _Rewrite(work, source)
    groups = _param_groups(new.content)
    missing = [name for name in work.skeleton.touched if name not in new.weights]
    if new.weights and missing:
        raise ValueError(f"{source}: the model's parameters {missing} are missing")
    if groups:
        new.put_optimizer(groups)
    elif not new.weights:
        return False
    nested = unflatten_state_dict(new.content, {place: place for place in new.content})
    writer = dcp.FileSystemWriter(target)
    dcp.save(nested, storage_writer=writer, planner=_LazySavePlanner(new.make), no_dist=True)
    work.advance(sum(file.stat().st_size for file in source.iterdir()))
    return True


def _param_groups(content: dict[Place, Any]) -> dict[Place, dict[str, Any]]:
    """The optimizer's groups by where they lie."""
    groups: dict[Place, dict[str, Any]] = {}
    for place, value in content.items():
        if len(place) >= 3 and place[-3] == "param_groups":
            groups.setdefault(place[:-1], {})[place[-1]] = value
    return groups
