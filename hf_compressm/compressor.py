"""Cuts in the middle of a training loop: the schedule, the recorded inputs, one cut, the history, the way back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging

from .checkpoint import (
    load_inputs,
    resize_while_loading,
    save_config,
    save_inputs,
    stop_resizing_while_loading,
)
from .config import CompreSSMConfig
from .continuation import Continuation, cut_checkpoint
from .distributed import deepspeed, fsdp2
from .distributed.ddp import rebuild_reducer, reducer_is_stale
from .distributed.processes import ALONE, NonFiniteError, all_processes
from .distributed.wrappers import is_sharded, kind_of, processes_of, unwrap, why_not_in_process, zero_engine
from .mixers import Mixer, find_mixers
from .mixers.adapters import bypassed_adapters
from .mixers.resize import ParameterPairs, resize_mixer, update_configs
from .mixers.streamed_forward import streamed_forward
from .optimizer import check_state, follow_resize, unwrap_optimizer
from .peft_adapters import is_peft_model
from .plan import CompressionPlan
from .planning import (
    check_list_of_sizes,
    must_project,
    plan_compression,
    refuse_projection,
)
from .provenance import recall_from, record_of, save_provenance
from .ranks import (
    fixed_sizes,
    fixed_state_size,
    largest_before_cuts,
    round_up,
    state_size_of,
    states_for_budget,
    target_is_reached,
)
from .refit import tokens_for_a_fit
from .replay import InputRecorder, compare_outputs, first_rows
from .report import CompressionReport
from .schedule import cut_steps
from .statistics import measure
from .surgery import check_optimizer, compress_

logger = logging.get_logger(__name__)

# Loss and KL across a cut are measured on this many tokens of the last batch: logits of a large vocabulary are big.
CHECK_TOKENS = 2048


class Compressor:
    """Shrinks a model's state in the middle of a training loop.

    Args:
        config: what to cut, when and how.
        model: the model, bare or as torch.compile, DDP, FSDP, DeepSpeed or Accelerate wrapped it.
        optimizer: the optimizer that trains it, bare or as Accelerate wrapped it.
        total_steps: optimizer steps of the whole training; the schedule's fractions refer to it.
        warmup_steps: steps of learning-rate warm-up, in which the default schedule does not cut.
        accelerator: the loop's Accelerator; with it, steps that only accumulate gradients are not counted.
        history: what earlier runs did to this model, from `history` or `read_record`; a fixed target that they
            reached is not asked for again.

    Attributes:
        history: a dictionary for each cut and each skipped attempt, as JSON can hold it; `write_record` saves it.
        global_step: optimizer steps seen.
        why_not_in_process: why the model cannot be cut while it trains; None if it can. If not, a cut that is due
            leaves its plan in `plan_for_checkpoint`: save a checkpoint then, stop, `reshape_checkpoint` it and go on.
        plan_for_checkpoint: a plan that waits for a checkpoint.

    Raises:
        ValueError: no mixer, a target that is not below N, a schedule without a cut, or adapters where only a
            checkpoint can be cut.
        TypeError: an unsupported mixer or optimizer.
        RuntimeError: a wrapper that is not supported, or processes with different configs.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=16, num_hidden_layers=1))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> config = CompreSSMConfig(state_size=4, calibration_tokens=64)
        >>> compressor = Compressor(config, model, optimizer, total_steps=10)
        >>> for _ in range(10):
        ...     input_ids = torch.randint(8, (4, 16))
        ...     model(input_ids, labels=input_ids).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     _ = compressor.step()
        >>> model.config.state_size, compressor.history[0]["step"]
        (4, 2)
    """

    def __init__(
        self,
        config: CompreSSMConfig,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        total_steps: int,
        warmup_steps: int = 0,
        accelerator: Accelerator | None = None,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        self.config = config
        self.wrapped = model
        self.model, self.wrapper = unwrap(model)
        self.processes = processes_of(self.model, self.wrapper) or ALONE
        if kind_of(self.model, self.wrapper) is None and all_processes().size > 1:
            raise RuntimeError(
                "several processes train this model, but nothing wraps it (DistributedDataParallel, FSDP, DeepSpeed); "
                "give the Compressor the model that accelerator.prepare or DDP returned"
            )
        self.why_not_in_process = why_not_in_process(self.model, self.wrapper)
        self.plan_for_checkpoint: CompressionPlan | None = None
        self._refuse_adapters()
        if self.why_not_in_process is not None and config.pragmatic:
            raise ValueError(
                f"pragmatic=True cannot take a cut back here: {self.why_not_in_process}, so only a checkpoint of it "
                "can be cut"
            )
        # DeepSpeed's engine has an optimizer of its own.
        self.engine = zero_engine(self.wrapper)
        if self.engine is not None:
            if config.realization == "auto" and not must_project(config):
                self.config = config = dataclasses.replace(config, realization="stock")
            deepspeed.refuse_projection(config.realization)
        follows = optimizer is not None and self.why_not_in_process is None and self.engine is None
        self.optimizer = unwrap_optimizer(optimizer) if follows else None
        self.accelerator = accelerator
        settings = json.dumps(config.to_dict(), sort_keys=True).encode()
        self.processes.check_same(hashlib.sha256(settings).hexdigest(), "the config")
        self.state_size = state_size_of(find_mixers(self.model))
        self.steps = cut_steps(config.schedule, total_steps, warmup_steps)
        self.history: list[dict[str, Any]] = [] if history is None else history
        self._loaded_from: str | Path | None = None
        self._cut_earlier = [cut for cut in record_of(self.model).cuts if cut not in self.history]
        self.global_step = 0
        # A second run of the same script on the same model has nothing left to cut.
        self.stopped = self._target_is_reached()
        if not self.stopped:
            self._check_target()
        self._warn_of_untrained_states()
        for message in bypassed_adapters({name: mixer.module for name, mixer in find_mixers(self.model).items()}):
            self._warn(message)
        self._done_until = 0
        self._announced_wait = False
        self._optimizer_checked = False
        self._snapshot: dict[str, Any] | None = None
        self.recorder = InputRecorder(self.model, self.wanted_tokens, self.processes.size)
        if not is_sharded(self.model, self.wrapper) and self.engine is None:
            resize_while_loading(self.model, self._follow_resize)
        if accelerator is not None:
            # What it pickles of registered objects is of the first process only, and here each has inputs of its own.
            accelerator.register_save_state_pre_hook(self._save_inputs)
            accelerator.register_load_state_pre_hook(self._load_inputs)
        self.follow_loaded_weights()

    @property
    def pending(self) -> list[int]:
        """The steps after which cuts are still to come."""
        return [] if self.stopped else [step for step in self.steps if step > self._done_until]

    @property
    def wanted_tokens(self) -> int:
        """Calibration tokens that a cut waits for, over all processes."""
        if self.config.calibration_tokens is not None:
            return self.config.calibration_tokens
        target = self.config.state_size
        kept = self.state_size // 4 if target is None else fixed_state_size(target, self.state_size)
        return tokens_for_a_fit(kept, self.state_size)

    def step(self, global_step: int | None = None) -> CompressionReport | None:
        """Call this once after each optimizer step, when the gradients are zeroed; it cuts when a cut is due.

        Args:
            global_step: optimizer steps made so far; None counts the calls.

        Returns:
            The report of a cut that was just made, else None. See `plan_for_checkpoint` where the model cannot be cut
            while it trains.
        """
        if self.accelerator is not None and not self.accelerator.sync_gradients:
            return None
        self.global_step = self.global_step + 1 if global_step is None else global_step
        self._record_if_soon_due()
        if not self.pending:
            return None
        self._check_optimizer_early()
        if self.global_step < self.pending[0]:
            return None
        # It may have changed: an optimizer has no state before its first step, and DDP's join() is a context.
        self.why_not_in_process = why_not_in_process(self.model, self.wrapper)
        self._refuse_adapters()
        gathered = self._gathered_tokens()
        if gathered < self.wanted_tokens:
            if not self._announced_wait:
                self._announced_wait = True
                self._warn(
                    f"the cut due at step {self.pending[0]} waits: {gathered} of {self.wanted_tokens} calibration "
                    "tokens have passed by"
                )
            return None
        return self._cut(remaining=len([step for step in self.pending if step > self.global_step]) + 1)

    def cut(self) -> CompressionReport | None:
        """Cut now, all the way to the target, on the inputs recorded so far.

        Returns:
            The report, or None if the cut was skipped; `history` says why.

        Raises:
            NonFiniteError: non-finite statistics or parameters, if the config says so.
            ValueError: nothing was recorded yet.
        """
        return self._cut(remaining=1)

    def _cut(self, remaining: int) -> CompressionReport | None:
        """Cut now, and leave the rest of the way to the other `remaining` - 1 cuts."""
        if self.processes.total(len(self.recorder.batches)) == 0:
            raise ValueError("no input has been recorded yet; run at least one training step before the cut")
        scheduled = max((step for step in self.pending if step <= self.global_step), default=self.global_step)
        seconds: dict[str, float] = {}
        try:
            with _timed(seconds, "measure"):
                statistics = measure(self.wrapped, self.recorder.batches, processes=self.processes)
            with _timed(seconds, "plan"):
                plan = self._plan(statistics, remaining)
        except NonFiniteError as error:
            if self.config.on_non_finite == "raise":
                raise
            self._warn(f"the cut at step {self.global_step} is skipped: {error}")
            self._skip(str(error), scheduled)
            return None
        if not plan.changes:
            kept = self.config.max_kept_fraction
            reason = f"the rule keeps more than {kept:.0%} of the states, or all of them"
            logger.info(f"the cut at step {self.global_step} is skipped: {reason}")
            self._skip(reason, scheduled)
            return None
        if self.why_not_in_process is not None:
            logger.info(f"the cut at step {self.global_step} waits for a checkpoint: {self.why_not_in_process}")
            self.plan_for_checkpoint, self.stopped = plan, True
            self._record_if_soon_due()
            return None
        report = self._apply(plan, seconds)
        self._done_until = max(scheduled, self.global_step)
        # The model remembers this entry: it must stay one object.
        entry = record_of(self.model).cuts[-1]
        entry |= {"scheduled_step": scheduled, **report.to_dict()}
        self.history.append(entry)
        self._tell_the_model()
        self._announced_wait = False
        self.state_size = state_size_of(find_mixers(self.model))
        self.stopped = self._target_is_reached()
        self.recorder.wanted_tokens = self.wanted_tokens
        self._record_if_soon_due()
        return report

    def take_back(self) -> None:
        """Undo the last cut: weights and optimizer are those of the moment before it. No further cut is made.

        Raises:
            RuntimeError: there is nothing to go back to; only `pragmatic` cuts keep the way back.
        """
        if self._snapshot is None:
            raise RuntimeError("there is no cut to take back; set pragmatic=True to keep weights before a cut")
        snapshot, self._snapshot = self._snapshot, None
        mixers = find_mixers(self.model)
        groups = self.optimizer if self.engine is None else deepspeed.parameter_groups(self.engine)
        for name, (state_size, feature_size) in snapshot["sizes"].items():
            pairs = resize_mixer(mixers[name], state_size, feature_size, self.model)
            if groups is not None:
                follow_resize(groups, self.model, mixers[name].module, pairs)
        update_configs(self.model)
        if self.engine is not None:
            deepspeed.rebuild_optimizer(self.engine, groups, {})
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                fsdp2.local_part(tensor).copy_(snapshot["model"][name])
        if self.engine is not None:
            deepspeed.restore_parts(self.engine, snapshot["optimizer"])
        if self.optimizer is not None:
            # Only the moments go back: the learning rate has moved on with the schedule.
            for parameter, state in zip(_parameters(self.optimizer), snapshot["optimizer"], strict=True):
                self.optimizer.state[parameter] = {key: give_back() for key, give_back in state.items()}
            check_optimizer(self.model, self.optimizer)
        self._repair_wrapper()
        self.state_size = state_size_of(find_mixers(self.model))
        self.history[-1]["status"] = "taken back"
        self.stopped = True

    def keep(self) -> None:
        """Let go of the weights that `take_back` would restore."""
        self._snapshot = None

    @property
    def can_take_back(self) -> bool:
        return self._snapshot is not None

    @property
    def optimizer_parameters(self) -> list[list[str]] | None:
        """The names of the parameters in each group of the optimizer, for `write_record`; None without one."""
        if self.optimizer is None:
            return None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [
            [names.get(id(parameter), "") for parameter in group["params"]] for group in self.optimizer.param_groups
        ]

    def save_state(self, directory: str | Path) -> Continuation | None:
        """`accelerator.save_state`, with the config and `compressm.json` beside it. Call it on every process.

        If a plan waits for a checkpoint, this one is cut, and the command that goes on is printed.

        Args:
            directory: where to save; the cut checkpoint is put beside it, as `cut-` and its name.

        Returns:
            How to go on from the cut checkpoint, on every process; None if none was made: then just train on.

        Raises:
            RuntimeError: the Compressor was made without an Accelerator.
        """
        if self.accelerator is None:
            raise RuntimeError("save_state needs the loop's Accelerator: Compressor(..., accelerator=accelerator)")
        directory = Path(directory)
        self.accelerator.save_state(directory)
        self.processes.barrier()
        with self.processes.all_or_none("writing the checkpoint"):
            if self.processes.is_main:
                save_config(self.model, directory)
                save_provenance(self.model, directory, self.optimizer_parameters)
                if self.plan_for_checkpoint is not None:
                    cut_checkpoint(directory, self.plan_for_checkpoint, directory.parent, "--resume")
        return Continuation.read(directory.parent) if self.plan_for_checkpoint is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands; for `accelerator.register_for_checkpointing(compressor)`."""
        return {
            "history": self.history,
            "global_step": self.global_step,
            "done_until": self._done_until,
            # A cut that waits for a checkpoint is still to come in the checkpoint that is not cut.
            "stopped": self.stopped and self.plan_for_checkpoint is None,
            "recording": self.recorder.active,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run that `state_dict` describes stopped; load the weights first, on every process."""
        self.history, self.global_step = state["history"], state["global_step"]
        self._done_until, self.stopped = state["done_until"], state["stopped"]
        self.recorder.active = state["recording"]
        if self._loaded_from is not None:
            recall_from(self.model, self._loaded_from, self.history)
        self.follow_loaded_weights()

    def follow_loaded_weights(self) -> None:
        """Call this on every process after weights of another state size were loaded into the model.

        The optimizer has the new parameters by then; this makes DDP reduce them, and marks cuts of the history that
        the weights do not have as undone.
        """
        self._repair_wrapper()
        self.state_size = state_size_of(find_mixers(self.model))
        self.recorder.wanted_tokens = self.wanted_tokens
        for entry in self.history:
            pairs = zip(entry.get("layers", []), find_mixers(self.model).values(), strict=False)
            larger = any(layer["state_size_after"] < mixer.state_size for layer, mixer in pairs)
            if entry["status"] == "cut" and larger:
                entry["status"] = "undone by loading"

    def remove(self) -> None:
        """Take every hook off the model. If a cut was made, it can still load checkpoints of either size."""
        self.recorder.remove()
        if all(entry["status"] == "skipped" for entry in self.history):
            stop_resizing_while_loading(self.model)

    def _repair_wrapper(self) -> None:
        if kind_of(self.model, self.wrapper) == "DDP" and reducer_is_stale(self.wrapper):
            rebuild_reducer(self.wrapper, [])

    @property
    def _size_at_first(self) -> int:
        """The state size before the first cut: what a target given as a fraction refers to."""
        return largest_before_cuts(self.history) or self.state_size

    @property
    def _cuts(self) -> list[dict[str, Any]]:
        return [entry for entry in self.history if entry["status"] == "cut"]

    def _check_target(self) -> None:
        """Refuse a target that no cut could reach at the start, not hours later."""
        config, mixers = self.config, find_mixers(self.model)
        check_list_of_sizes(config, mixers)
        if must_project(config):
            refuse_projection([mixer for mixer in mixers.values() if not mixer.can_be_projected])
        if config.state_size is not None:
            present = {name: mixer.state_size for name, mixer in mixers.items()}
            fixed_sizes(config, present, {name: number for number, name in enumerate(mixers)})
        if config.state_bytes is not None:
            # What the states are worth plays no part in whether they fit.
            worth = {name: torch.zeros(mixer.state_size + 1) for name, mixer in mixers.items()}
            costs = {name: mixer.bytes_per_state for name, mixer in mixers.items()}
            states_for_budget(worth, costs, config.state_bytes, config.multiple_of)

    def _target(self) -> int:
        size = fixed_state_size(self.config.state_size, self._size_at_first)
        return round_up(size, self.config.multiple_of)

    def _target_is_reached(self) -> bool:
        return target_is_reached(self.config, self.history, find_mixers(self.model))

    def _next_size(self, remaining: int) -> int | list[int]:
        """Several cuts approach the target geometrically; each takes at least one state, or `multiple_of` of them."""
        multiple = self.config.multiple_of
        present = [mixer.state_size for mixer in find_mixers(self.model).values()]
        if isinstance(self.config.state_size, list):
            return [
                max(target, min(size - 1, round(size * (target / size) ** (1 / remaining))))
                for size, target in zip(present, self.config.state_size, strict=True)
            ]
        size = round_up(round(self.state_size * (self._target() / self.state_size) ** (1 / remaining)), multiple)
        most = self.state_size - 1
        largest = most // multiple * multiple if isinstance(multiple, int) else 1 << (most.bit_length() - 1)
        return max(self._target(), min(size, largest))

    def _refuse_adapters(self) -> None:
        """The way by a checkpoint is closed to PEFT models, whose checkpoints hold adapters only."""
        if self.why_not_in_process is not None and is_peft_model(self.model):
            raise ValueError(
                f"a PEFT model cannot be cut here: {self.why_not_in_process}, so only a checkpoint could be cut, "
                "and one of adapters does not hold their base. Train with DDP, FSDP2 or DeepSpeed ZeRO-1 or -2, or "
                "cut the base (hf_compressm.compress) before adapters are put on it"
            )

    def _warn_of_untrained_states(self) -> None:
        """An optimizer that was built before the model was resized would silently leave layers as they are."""
        if self.optimizer is None:
            return
        held = {id(parameter) for parameter in _parameters(self.optimizer)}
        for name, mixer in find_mixers(self.model).items():
            for axis in mixer.axes:
                if axis.tensor.requires_grad and id(axis.tensor) not in held:
                    self._warn(
                        f"layer {name}: {axis.parameter} of {type(axis.module).__name__} requires gradients, but the "
                        "optimizer does not update it; if that is not meant, build the optimizer anew"
                    )

    def _plan(self, statistics: dict, remaining: int) -> CompressionPlan:
        config = self.config
        if config.state_size is not None and (remaining > 1 or self._cuts):
            config = dataclasses.replace(config, state_size=self._next_size(remaining))
        plan = plan_compression(self.wrapped, statistics, config, processes=self.processes)
        self.processes.check_same(plan.digest(), "the plan")
        return plan

    def _apply(self, plan: CompressionPlan, seconds: dict[str, float]) -> CompressionReport:
        # In a data-parallel run, a process may have seen no batch of late.
        batch = first_rows(self.recorder.batches[-1], CHECK_TOKENS) if self.recorder.batches else None
        with _timed(seconds, "check"), self.processes.all_or_none("comparing the outputs before and after the cut"):
            sharded = is_sharded(self.model, self.wrapper)
            with nullcontext() if sharded else streamed_forward(find_mixers(self.model)):
                before = (None, None) if batch is None else compare_outputs(self.model, batch)
        snapshot = None
        if self.config.pragmatic:
            with _timed(seconds, "snapshot"):
                snapshot = self._take_snapshot()
        with _timed(seconds, "apply"):
            report = compress_(self.wrapped, plan, self.optimizer)
            if self.optimizer is not None:
                check_optimizer(self.model, self.optimizer)
        self._snapshot = snapshot
        with _timed(seconds, "check"), self.processes.all_or_none("comparing the outputs before and after the cut"):
            loss_after, divergence = (None, None) if batch is None else compare_outputs(self.model, batch, before)
        report.step, report.config = self.global_step, self.config.to_dict()
        report.seconds = seconds
        report.loss_before, report.loss_after = self._mean(before[0]), self._mean(loss_after)
        report.kl_divergence = self._mean(divergence)
        return report

    def _mean(self, value: torch.Tensor | None) -> float | None:
        """The mean over the processes that have a value."""
        total = self.processes.total(0.0 if value is None else float(value))
        count = self.processes.total(0.0 if value is None else 1.0)
        return total / count if count else None

    def _take_snapshot(self) -> dict[str, Any]:
        return {
            "sizes": {
                name: (mixer.state_size, mixer.module.feature_size if mixer.is_projected else None)
                for name, mixer in find_mixers(self.model).items()
            },
            "model": {
                name: fsdp2.local_part(tensor).detach().to("cpu", copy=True)
                for name, tensor in self.model.state_dict().items()
            },
            "optimizer": deepspeed.parts_on_host(self.engine)
            if self.engine is not None
            else self.optimizer
            and [
                {key: fsdp2.keep_on_host(value) for key, value in self.optimizer.state.get(parameter, {}).items()}
                for parameter in _parameters(self.optimizer)
            ],
        }

    def _warn(self, message: str) -> None:
        """Once, not once on each process."""
        if self.processes.is_main:
            logger.warning(message)

    def _tell_the_model(self) -> None:
        """What the model saves with itself is what happened before this Compressor, and this history."""
        if self._cuts:
            record_of(self.model).cuts = [*self._cut_earlier, *self.history]

    def _skip(self, reason: str, scheduled: int) -> None:
        self._done_until = max(scheduled, self.global_step)
        self.history.append(
            {"status": "skipped", "step": self.global_step, "scheduled_step": scheduled, "reason": reason}
        )
        self._tell_the_model()

    def _gathered_tokens(self) -> int:
        """Tokens recorded on all processes. A collective: every process must come to the same decision."""
        return int(self.processes.total(self.recorder.tokens // self.processes.size))

    def _record_if_soon_due(self) -> None:
        """Record inputs only over the last steps before a cut: a copy to the host makes a GPU wait."""
        recorder = self.recorder
        if not self.pending:
            recorder.active = False
        elif recorder.tokens_per_forward > 0:
            # Two steps more than needed: the last batch of an epoch may be a small one.
            window = math.ceil(self.wanted_tokens / recorder.tokens_per_forward) + 2
            recorder.active = self.pending[0] - self.global_step <= window
        if not recorder.active:
            recorder.batches.clear()

    def _check_optimizer_early(self) -> None:
        """Refuse an optimizer that cannot be carried at the first step that it has state, not hours later."""
        if self._optimizer_checked or self.optimizer is None:
            return
        self._optimizer_checked = True
        for name, mixer in find_mixers(self.model).items():
            for axis in mixer.axes:
                label = f"{name}: {axis.parameter}"
                check_state(self.optimizer, axis.tensor, label, axis.dim)

    def _save_inputs(self, models: list[nn.Module], weights: list[dict], directory: str | Path) -> None:
        if self.recorder.batches:
            save_inputs(self.recorder.batches, directory, all_processes().rank)

    def _load_inputs(self, models: list[nn.Module], directory: str | Path) -> None:
        self.recorder.batches.clear()
        self.recorder.batches.extend(load_inputs(directory, all_processes().rank) or [])
        self._loaded_from = directory
        recall_from(self.model, directory, self.history)

    def _follow_resize(self, mixer: Mixer, pairs: ParameterPairs) -> None:
        """Weights of another size were loaded: the optimizer takes the new parameters, without moments."""
        if self.optimizer is not None:
            follow_resize(self.optimizer, self.model, mixer.module, pairs)


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
