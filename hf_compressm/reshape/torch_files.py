"""Files that `torch.save` wrote: an optimizer's state, by number or by name, and weights by name."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .work import Work


def load(file: Path, allowed: list[Any] | None = None) -> Any:
    """Read a file lazily: its tensors are mapped, and nothing in it is executed.

    Args:
        file: what `torch.save` wrote.
        allowed: classes that may be in it beside tensors and plain data.

    Raises:
        ValueError: the file is cut off, or holds other classes.
    """
    try:
        with torch.serialization.safe_globals(allowed or []):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{file} cannot be read ({reason}); was it cut off, or written by another version?"
        ) from error


def save(content: Any, file: Path, work: Work) -> None:
    """Write a file; tensors that are mapped pass through without staying in memory."""
    try:
        with open(file, "wb") as handle:
            torch.save(content, handle)
    except RuntimeError as error:
        # torch hides the system's error behind its own.
        cause = error.__context__
        if isinstance(cause, OSError):
            raise cause from error
        raise OSError(f"{file} could not be written: {str(error).splitlines()[0]}; is the disk full?") from error
    work.advance(file.stat().st_size)


def rewrite_weights(work: Work, source: Path, target: Path) -> bool:
    """Rewrite weights by name; False if the file holds none of the plan's parameters."""
    content = load(source)
    if not _is_weights(content) or not any(name in content for name in work.skeleton.touched):
        return False
    save(new_weights(work, content, work.values, str(source)), target, work)
    return True


def new_weights(
    work: Work,
    weights: dict[str, torch.Tensor],
    values: Callable[[str, torch.Tensor], torch.Tensor],
    where: str,
) -> dict[str, torch.Tensor]:
    """The weights after the cut, those that changed in scratch files.

    Args:
        work: the rewrite.
        weights: the weights before it, by name.
        values: gives a parameter's new values from its old ones; of an added parameter, from those beside it.
        where: the file, for errors.

    Raises:
        ValueError: a parameter is missing, or has another shape.
    """
    skeleton = work.skeleton
    missing = [name for name in skeleton.touched if name not in weights]
    if missing:
        raise ValueError(f"{where}: the model's parameters {missing} are missing")
    result = dict(weights)
    for name in skeleton.changed:
        skeleton.check_shape(name, weights[name].shape, where)
        result[name] = work.spill(values(name, weights[name]))
    for name, beside in skeleton.added.items():
        result[name] = work.spill(values(name, weights[beside]))
    return type(weights)(sorted(result.items(), key=skeleton.place))


def rewrite_optimizer(work: Work, source: Path, target: Path) -> None:
    """Rewrite the state of an optimizer, whose parameters go by numbers, or by names as FSDP writes them.

    Raises:
        ValueError: the numbers' names cannot be told.
        TypeError: a state that is not known to be sliceable.
    """
    content = load(source)
    if not isinstance(content, dict) or not {"state", "param_groups"} <= content.keys():
        raise ValueError(f"{source} is not an optimizer's state: it has {_keys(content)}, not state and param_groups")
    groups, states = content["param_groups"], content["state"]
    members = [list(group["params"]) for group in groups]
    by_name = any(isinstance(member, str) for group in members for member in group)
    if by_name:
        names = members
        unknown = [name for group in names for name in group if name not in work.skeleton.before]
        if unknown:
            raise ValueError(f"{source}: the optimizer has parameters that the model has not: {unknown}")
        named = dict(states)
    else:
        numbers = [number for group in members for number in group]
        counted = {place: states[number] for place, number in enumerate(numbers) if number in states}
        names = work.skeleton.optimizer_groups([len(group) for group in members], counted, work.recorded, str(source))
        flat = [name for group in names for name in group]
        named = {flat[place]: state for place, state in counted.items()}
    order = work.skeleton.order_after(names, [group.get("weight_decay", 0.0) for group in groups])
    named = new_states(work, named, order, start_anew=by_name)
    work.optimizer_order = order
    if by_name:
        content["state"] = named
    else:
        numbers = {name: number for number, name in enumerate(name for group in order for name in group)}
        content["state"] = {numbers[name]: state for name, state in named.items()}
    for group, present in zip(groups, order, strict=True):
        group["params"] = present if by_name else [numbers[name] for name in present]
        if "param_names" in group:
            group["param_names"] = present
    save(content, target, work)


def new_states(
    work: Work, states: dict[str, dict[str, Any]], order: list[list[str]], start_anew: bool
) -> dict[str, dict[str, Any]]:
    """The optimizer's states after the cut, by name, in the order of the parameters; new ones in scratch files."""
    result = {}
    for name in (name for group in order for name in group):
        old, new = states.get(name), work.state(name, states, start_anew)
        if new is not None and new is not old:
            new = {key: work.spill(item) if isinstance(item, torch.Tensor) else item for key, item in new.items()}
        work.count_state(old, new)
        if new is not None:
            result[name] = new
    return result


def _is_weights(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(value, torch.Tensor) for value in content.values())


def _keys(content: Any) -> str:
    return f"the keys {list(content)[:8]}" if isinstance(content, dict) else f"a {type(content).__name__}"
