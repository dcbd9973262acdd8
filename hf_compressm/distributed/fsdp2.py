"""Parameters sharded by torch's `fully_shard` (FSDP2): their whole values, and other parameters in their place.

`fully_shard` keeps a manager (`FSDPParam`) for each parameter, in a group (`FSDPParamGroup`) whose parameters are
gathered together. The manager is made for one shape, and torch has no public way to exchange it: `fully_shard` refuses
to be called again, and setting the module's parameter leaves the manager gathering the old one. So this file, and no
other, uses what is inside: it makes a new manager by the constructor of the old one, for an empty parameter on the
meta device, and gives it the sharded values as torch does it for a model that was built on the meta device. That keeps
the mesh, the placement, mixed precision, offloading and whether parameters are resharded after the forward pass.

On models and tensors that are not sharded, everything here does what it would do without sharding, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

# torch's own types of these are internal: a group of parameters, and the manager of one of them.
Group = Any
Manager = Any


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a model or to a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Let every module hold its sharded parameters.

    After a forward pass without a backward pass a module may still hold whole ones, or shards for a smaller mesh.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def process_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that hold the shards of a model and, with two mesh dimensions (HSDP), their replicas.

    The first call for a mesh of two dimensions that are not the whole world makes a group: all processes must call it.

    Returns:
        The group, or None if the model is not sharded.

    Raises:
        RuntimeError: parts of the model are sharded over different processes.
    """
    meshes = list(dict.fromkeys(group.mesh_info.mesh for group in _groups(model)))
    if not meshes:
        return None
    ranks = {tuple(mesh.mesh.flatten().tolist()) for mesh in meshes}
    if len(ranks) > 1:
        raise RuntimeError(f"parts of the model are sharded over different processes: {sorted(ranks)}")
    mesh = meshes[0]
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return mesh._flatten().get_group()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All values of a sharded tensor, on the device that its processes communicate on; a plain one is its own.

    A collective: all processes must call it in the same order.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    # With a CPUOffloadPolicy the shards lie where their processes cannot communicate.
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


def shard_like(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Shard values as another tensor is; where that is a plain one, they come back as they are, on its device.

    Args:
        old: the tensor whose mesh, placements and device count; its shape may be another.
        values: all values, the same on every process: nothing is communicated.
    """
    if not isinstance(old, DTensor):
        return values.to(old.device)
    return _sharded(values, old.device_mesh, old.placements, old.to_local().device)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, in the same memory; a plain one is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def keep_on_host(value: Any) -> Callable[[], Any]:
    """Copy this process's part of an optimizer's state entry to the host; what is returned gives the entry back."""
    if not isinstance(value, torch.Tensor):
        return lambda: value
    local = local_part(value)
    copy, device = local.detach().to("cpu", copy=True), local.device
    if not isinstance(value, DTensor):
        return lambda: copy.to(device)
    layout = {"shape": value.shape, "stride": value.stride(), "run_check": False}
    mesh, placements = value.device_mesh, value.placements
    return lambda: DTensor.from_local(copy.to(device), mesh, placements, **layout)


def is_made_of_plain_tensors(tensor: torch.Tensor) -> bool:
    """Whether a tensor, or each shard of it, is of torch's own type, not of a subclass such as quantized ones."""
    return type(local_part(tensor)) is torch.Tensor


def refuse_unsupported(model: nn.Module) -> None:
    """Raise if a model is sharded in a way in which its parameters cannot be exchanged.

    Raises:
        RuntimeError: naming the parameter and what is not supported.
    """
    names, managed = {id(parameter): name for name, parameter in model.named_parameters()}, set()
    for group in _groups(model):
        for manager in group.fsdp_params:
            held = [manager.sharded_param]
            held += [getattr(manager, name, None) for name in ("_unsharded_param", "_sharded_post_forward_param")]
            managed |= {id(parameter) for parameter in held}
            name = next((names[id(parameter)] for parameter in held if id(parameter) in names), str(manager))
            local, placements = manager.sharded_param.to_local(), manager.sharded_param.placements
            if manager.is_dtensor or any(type(item) not in (Shard, Replicate) for item in placements):
                problem = f"combines fully_shard with tensor, expert or context parallelism ({placements})"
            elif not any(isinstance(item, Shard) for item in placements):
                problem = "is replicated by torch's replicate(), not sharded; use DistributedDataParallel instead"
            elif hasattr(local, "fsdp_pre_all_gather"):
                problem = f"is gathered by an extension of its own (fsdp_pre_all_gather of {type(local).__name__})"
            else:
                continue
            raise RuntimeError(f"{name} cannot be cut: it {problem}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in managed:
            raise RuntimeError(
                f"{name} cannot be cut: it is a DTensor ({parameter.placements}) that fully_shard does not manage, as "
                "of tensor parallelism"
            )


def refuse_gradients(model: nn.Module) -> None:
    """Raise if gradients wait to be reduced: they have the present shapes, and nobody could reach them.

    Raises:
        RuntimeError: the last backward pass only accumulated.
    """
    for group in _groups(model):
        waiting = getattr(group, "_partial_reduce_output", None) is not None
        for manager in group.fsdp_params:
            unsharded = getattr(manager, "_unsharded_param", None)
            waiting |= manager.unsharded_accumulated_grad is not None
            waiting |= unsharded is not None and unsharded.grad is not None
        if waiting:
            raise RuntimeError(
                "fully_shard holds gradients that are not reduced yet (set_requires_gradient_sync(False) or "
                "set_requires_all_reduce(False)); cut after the optimizer step that they belong to"
            )


def refuse_shape(old: torch.Tensor, shape: tuple[int, ...], label: str) -> None:
    """Raise if a parameter of another shape cannot be sharded as the old one is.

    Args:
        old: the parameter.
        shape: the shape of the one that takes its place.
        label: its name, for the error.

    Raises:
        RuntimeError: `fully_shard` divides dimensions other than the first only evenly.
    """
    if not isinstance(old, DTensor):
        return
    for mesh_dim, placement in enumerate(old.placements):
        processes = old.device_mesh.size(mesh_dim)
        if isinstance(placement, Shard) and placement.dim % old.dim() > 0 and shape[placement.dim] % processes:
            raise RuntimeError(
                f"layer {label} is sharded along dimension {placement.dim}, which fully_shard divides only evenly, "
                f"but its new length {shape[placement.dim]} is no multiple of {processes} processes; choose another "
                "state size, or shard it along dimension 0"
            )


def put_parameter(model: nn.Module, module: nn.Module, name: str, new: nn.Parameter) -> None:
    """Put a parameter into the place of another of the same type.

    Args:
        model: the model that `fully_shard` was applied to, or any model that is not sharded.
        module: one of its modules; where it is sharded, `reshard` came before.
        name: the parameter's name in the module.
        new: the parameter; in the place of a sharded one, it is sharded as `shard_like` does it.
    """
    old = getattr(module, name)
    if not isinstance(old, DTensor):
        setattr(module, name, new)
        return
    group, manager = _manager(model, old)
    place = group.fsdp_params.index(manager)
    manager._post_load_hook_handle.remove()
    group.fsdp_params[place] = _new_manager(group, manager, manager._module_info, new, manager._param_fqn)


def shard_added_parameter(model: nn.Module, module: nn.Module, name: str) -> None:
    """Shard a plain parameter that was added to a module, along its first dimension, as the module's others are.

    It joins their group, since they are gathered when the module's own forward needs them. Where the module's others
    are not sharded, nothing is done.

    Args:
        model: the model that `fully_shard` was applied to, or any model that is not sharded.
        module: one of its modules; where it is sharded, `reshard` came before.
        name: the parameter's name in the module; every process holds the same values.
    """
    parameter = getattr(module, name)
    others = [item for item in module._parameters.values() if isinstance(item, DTensor)]
    if not others:
        return
    like = others[-1]
    group, manager = _manager(model, like)
    placements = [Shard(0) if isinstance(item, Shard) else item for item in like.placements]
    values = _sharded(parameter, like.device_mesh, placements, like.to_local().device)
    new = nn.Parameter(values, requires_grad=parameter.requires_grad)
    # Of the manager's own type: torch may move it to another file.
    module_info = type(manager._module_info)(module, name)
    path = manager._param_fqn and f"{manager._param_fqn.rpartition('.')[0]}.{name}"
    place = group.fsdp_params.index(manager) + 1
    group.fsdp_params.insert(place, _new_manager(group, manager, module_info, new, path))


def release_parameter(model: nn.Module, module: nn.Module, name: str) -> None:
    """Let `fully_shard` no longer manage a parameter, which the module is about to lose."""
    parameter = getattr(module, name)
    if isinstance(parameter, DTensor):
        group, manager = _manager(model, parameter)
        manager._post_load_hook_handle.remove()
        group.fsdp_params.remove(manager)


def shapes_in_checkpoint(directory: str | Path) -> dict[str, list[int]]:
    """The shapes of the weights in a checkpoint that Accelerate saved under FSDP; nothing else is read.

    Args:
        directory: of the checkpoint. Where it has no such weights, there are no shapes.
    """
    whole, shards = (Path(directory) / name for name in (f"{FSDP_MODEL_NAME}.bin", f"{FSDP_MODEL_NAME}_0"))
    if whole.is_file():
        weights = torch.load(whole, map_location="meta", weights_only=True, mmap=True)
        return {name: list(tensor.shape) for name, tensor in weights.items()}
    if not shards.is_dir():
        return {}
    entries = FileSystemReader(shards).read_metadata().state_dict_metadata
    return {
        name.removeprefix("model."): list(entry.size)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _sharded(values: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Any], device: torch.device) -> DTensor:
    values = values.detach().to(mesh.device_type)
    sharded = distribute_tensor(values, mesh, placements, src_data_rank=None)
    # A copy: in torch 2.9 the shard is a view that keeps all the values in memory.
    return sharded.to(device).clone(memory_format=torch.contiguous_format)


def _new_manager(group: Group, like: Manager, module_info: Any, new: nn.Parameter, path: str | None) -> Manager:
    """A manager for a sharded parameter, with another one's settings; the parameter is then the module's."""
    empty = torch.empty(new.shape, dtype=new.dtype, device="meta")
    placement = next(item for item in new.placements if isinstance(item, Shard))
    manager = type(like)(
        nn.Parameter(empty, requires_grad=new.requires_grad),
        module_info,
        like.mesh_info,
        like.post_forward_mesh_info,
        like.device,
        lambda _: placement,
        like.mp_policy,
        group.offload_policy,
    )
    manager._param_fqn = path
    manager.sharded_param = new
    manager._setattr_on_modules(new)
    # Pads the shard, and pins its memory where that is the policy.
    manager.reset_sharded_param()
    if hasattr(like, "orig_dtype"):
        # The model has run; what its first forward pass sets up is not done again.
        manager.init_dtype_attrs(like.mp_policy)
    return manager


def _groups(model: nn.Module) -> Iterator[Group]:
    seen = set()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        # Before torch 2.12 or so a module had one group at most.
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
        for group in groups:
            if id(group) not in seen:
                seen.add(id(group))
                yield group


def _manager(model: nn.Module, parameter: nn.Parameter) -> tuple[Group, Manager]:
    for group in _groups(model):
        for manager in group.fsdp_params:
            if manager.sharded_param is parameter:
                return group, manager
    raise RuntimeError(
        f"a sharded parameter of shape {tuple(parameter.shape)} is in no group of fully_shard in "
        f"{type(model).__name__}; give the whole model that fully_shard was applied to"
    )
