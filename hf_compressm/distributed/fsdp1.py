"""Parameters under FullyShardedDataParallel (FSDP1): they can be read, not replaced.

FSDP1 flattens the parameters of each wrapped module into one tensor. They are whole within a forward pass of the
outermost wrapper, and of that only: a call of the model inside it fails. With `use_orig_params=False` they are plain
tensors there, which no `parameters()` lists. So they are read between forward passes, where torch makes them whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


@contextmanager
def readable(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Within this context a module's parameters are whole, and listed by its `parameters()`.

    All processes must enter it together, between forward passes. What is changed there is lost.

    Args:
        model: the outermost wrapper.
        module: a module inside it.
    """
    wrappers = [item for item in model.modules() if isinstance(item, FullyShardedDataParallel)]
    around = [item for item in wrappers if any(part is module for part in item.modules())]
    inside = [item for item in module.modules() if isinstance(item, FullyShardedDataParallel)]
    with ExitStack() as stack:
        # Of the wrappers around it, only the innermost has its parameters.
        for wrapper in dict.fromkeys([*around[-1:], *inside]):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(wrapper, recurse=False, writeback=False))
        yield
