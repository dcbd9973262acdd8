"""Carry optimizer state through a change of shape.

Gradients of kept rows do not change to first order when removed states are made up for by the others: row s of C has
the gradient Σ_t δ_t h_t[s] u_t, whatever the values of C. So the moments of kept entries are kept, entry by entry.
A projection's two matrices start without moments, also when a second cut changes the basis: second moments of another
basis are not those of the entries that are there now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from .distributed.fsdp2 import full_tensor, is_made_of_plain_tensors, shard_like
from .mixers.scan import take
from .optimizer_state import POWERS, SLICED_STATE, WHOLE_STATE


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside Accelerate's wrapper.

    Raises:
        TypeError: not a torch optimizer, or one whose parameters live in flat or sharded buffers.
    """
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer LBFGS cannot be carried through a cut: its state is flat vectors over all parameters, and it "
            "would go on updating the old ones"
        )
    return optimizer


def check_state(optimizer: Optimizer, old: nn.Parameter, name: str, dim: int) -> None:
    """Check that `sliced_state` can carry what an optimizer keeps for a parameter; nothing is communicated.

    Args:
        optimizer, old, name, dim: as in `sliced_state`.

    Raises:
        TypeError: an entry that is not known to be sliceable.
    """
    for key, value in (optimizer.state.get(old) or {}).items():
        _how_to_slice(optimizer, key, value, old, name, dim)


@torch.no_grad()
def sliced_state(
    optimizer: Optimizer,
    old: nn.Parameter,
    name: str,
    dim: int,
    index: torch.Tensor,
    factors: torch.Tensor | None = None,
) -> dict[str, Any] | None:
    """The optimizer's state of a parameter for the rows that stay; the optimizer is only read.

    Where the entries are sharded, this is a collective: one after the other is gathered, sliced and sharded again.

    Args:
        optimizer: an unwrapped torch optimizer.
        old: the parameter as the optimizer holds it.
        name: its name, for errors.
        dim: the dimension that shrinks.
        index: the rows that stay along it; with two dimensions, a row of them for each entry of the first dimension.
        factors: what the rows that stay are multiplied with, shape (rows,); None if nothing is. Gradients are divided
            by it, so that moments are, too (see `POWERS`).

    Returns:
        The new state, or None if the optimizer holds none for this parameter yet.

    Raises:
        TypeError: an entry that is not known to be sliceable.
    """
    state = optimizer.state.get(old)
    if not state:
        return None
    check_state(optimizer, old, name, dim)
    sliced = {}
    for key, value in state.items():
        how = _how_to_slice(optimizer, key, value, old, name, dim)
        if how is None:
            sliced[key] = value
        elif how == "averaged over":
            sliced[key] = shard_like(value, _factor_of_the_kept(key, value, state, index, factors))
        else:
            sliced[key] = sliced_tensor(value, how, index, moment_factors(key, factors, state))
    return sliced


def moment_factors(key: str, factors: torch.Tensor | None, keys: Iterable[str] = ()) -> torch.Tensor | None:
    """What a moment's rows are multiplied with when the parameter's are multiplied with `factors`.

    Args:
        key: the moment's name.
        factors: as in `sliced_state`.
        keys: the names of all that the optimizer keeps of the parameter.
    """
    # RMSprop's buffer is of steps, which its division by the mean square makes independent of the gradient's size.
    unchanged = key == "momentum_buffer" and "square_avg" in keys
    return None if factors is None or unchanged or key not in POWERS else factors ** POWERS[key]


def sliced_tensor(
    tensor: torch.Tensor, dim: int, index: torch.Tensor, factors: torch.Tensor | None = None
) -> torch.Tensor:
    """`take`, and the rows multiplied with factors; of a sharded tensor, sharded in the same way."""
    return shard_like(tensor, scaled(take(full_tensor(tensor), dim, index), dim, factors))


def scaled(values: torch.Tensor, dim: int, factors: torch.Tensor | None) -> torch.Tensor:
    """The entries along a dimension multiplied with factors."""
    if factors is None:
        return values
    shape = [1] * values.dim()
    shape[dim] = -1
    return values * factors.to(values).view(shape)


def _how_to_slice(
    optimizer: Optimizer, key: str, value: Any, old: nn.Parameter, name: str, dim: int
) -> int | str | None:
    """The dimension of a state entry that shrinks, or "averaged over"; None for an entry that stays as it is."""
    if value is None or isinstance(value, (bool, int, float)):
        return None
    if not isinstance(value, torch.Tensor) or not is_made_of_plain_tensors(value):
        problem = f"is a {type(value).__name__}"
    elif key in WHOLE_STATE and value.numel() == 1:
        return None
    elif key not in SLICED_STATE:
        problem = f"is an unknown tensor of shape {tuple(value.shape)}"
    else:
        state_dim = dimension_in_state(key, value, old, dim)
        if state_dim is not None:
            return state_dim
        problem = f"has shape {tuple(value.shape)}, which does not fit the parameter's {tuple(old.shape)}"
    raise TypeError(
        f"optimizer {type(optimizer).__name__} cannot be carried through a cut: its state {key!r} of parameter {name} "
        f"{problem}; supported: AdamW and its relatives, SGD, RMSprop, Adagrad, Adafactor, Lion. If the state is "
        "elementwise, add its key to hf_compressm.optimizer_state.SLICED_STATE"
    )


def dimension_in_state(key: str, value: torch.Tensor, old: nn.Parameter, dim: int) -> int | str | None:
    """The dimension of a state entry that belongs to dimension `dim` of the parameter; None if nothing fits."""
    shape, last = old.shape, old.dim() - 1
    if value.shape == shape:
        return dim
    factors = {
        "row_var": (*shape[:-1], 1),
        "col_var": (*shape[:-2], 1, shape[-1]),
        "exp_avg_sq_row": shape[:-1],
        "exp_avg_sq_col": (*shape[:-2], shape[-1]),
    }
    if tuple(value.shape) != tuple(factors.get(key, ())):
        return None
    averaged_over = last if key in ("row_var", "exp_avg_sq_row") else last - 1
    if dim == averaged_over:
        return "averaged over"
    keeps_dims = key in ("row_var", "col_var")
    return dim if keeps_dims or dim < averaged_over else dim - 1


# Adafactor's second moment is row_i col_j / mean(row), the one averaged over columns and the other over rows.
OTHER_FACTOR = {
    "row_var": ("col_var", -1),
    "col_var": ("row_var", -2),
    "exp_avg_sq_row": ("exp_avg_sq_col", -1),
    "exp_avg_sq_col": ("exp_avg_sq_row", -1),
}


def _factor_of_the_kept(
    key: str, value: torch.Tensor, state: dict[str, Any], index: torch.Tensor, factors: torch.Tensor | None
) -> torch.Tensor:
    """A factor averaged over the dimension that shrinks: the average of the second moments that stay."""
    name, dim = OTHER_FACTOR[key]
    value, other = full_tensor(value), full_tensor(state[name])
    kept = scaled(take(other, dim, index), dim, moment_factors(name, factors))
    mean, mean_of_kept = (factor.mean(dim, keepdim=True) for factor in (other, kept))
    return torch.where(mean > 0, value * (mean_of_kept / mean), value)


def replace_parameter(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, state: dict[str, Any] | None
) -> None:
    """Put a parameter into the place of another, in its group and with its new state. Nothing here can fail."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = state


def add_parameters(optimizer: Optimizer, model: nn.Module, mixer: nn.Module, new: list[nn.Parameter]) -> None:
    """Let an optimizer train the parameters that a projection adds to a mixer, without weight decay if it can.

    They go into the last group without weight decay that holds other parameters of the mixer; if there is none, into
    the group of its in_proj. No group is added, since learning-rate schedulers would not know it. Within the group
    they take the place that the model's own order gives them, so that an optimizer which a resumed run builds matches.

    Args:
        optimizer: an unwrapped torch optimizer.
        model: the bare model, with the new parameters in it.
        mixer: the module that they were added to.
        new: the parameters; those that need no gradient are left out.
    """
    own = {id(parameter) for parameter in mixer.parameters()}
    holding = [group for group in optimizer.param_groups if any(id(item) in own for item in group["params"])]
    if not holding:
        return
    undecayed = [group for group in holding if not group.get("weight_decay")]
    of_in_proj = [group for group in holding if any(item is mixer.in_proj.weight for item in group["params"])]
    parameters = (undecayed or of_in_proj or holding)[-1]["params"]
    order = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    for parameter in new:
        if parameter.requires_grad:
            later = (i for i, item in enumerate(parameters) if order.get(id(item), -1) > order[id(parameter)])
            parameters.insert(next(later, len(parameters)), parameter)


def remove_parameter(optimizer: Optimizer, old: nn.Parameter) -> None:
    """Take a parameter and its state out of an optimizer."""
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not old]
    optimizer.state.pop(old, None)


def follow_resize(
    optimizer: Optimizer,
    model: nn.Module,
    mixer: nn.Module,
    pairs: list[tuple[nn.Parameter | None, nn.Parameter | None]],
) -> None:
    """Let an optimizer train a mixer that was given another size; what is new starts without moments.

    Args:
        optimizer: an unwrapped torch optimizer.
        model: the bare model.
        mixer: the module whose parameters were replaced, added and removed.
        pairs: from `resize_mixer`.
    """
    for old, new in pairs:
        if new is None:
            remove_parameter(optimizer, old)
        elif old is not None:
            replace_parameter(optimizer, old, new, None)
    add_parameters(optimizer, model, mixer, [new for old, new in pairs if old is None])
