"""The Compressor behind transformers' TrainerCallback: for the stock Trainer, no subclass."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .cards import CARD_FILE, write_card
from .checkpoint import (
    load_inputs,
    resize_to_checkpoint,
    resize_to_shards,
    resize_while_loading,
    save_config,
    save_inputs,
)
from .compressor import Compressor
from .config import CompreSSMConfig
from .continuation import Continuation, command_of_this_run, cut_checkpoint
from .distributed.processes import all_processes, warn
from .distributed.wrappers import kind_of, unwrap
from .mixers import find_mixers
from .modeling_compressm import PROJECTIONS
from .peft_adapters import HOW_TO_LOAD, is_peft_model
from .provenance import recall_from, save_provenance, start_record
from .record import RECORD_FILE, Record, describe_machine, tidy_command
from .report import CompressionReport
from .report_page import write_report_page
from .timeline import Timeline
from .trackers import note_cut

logger = logging.get_logger(__name__)


class CompreSSMCallback(TrainerCallback, ExportableState):
    """Shrinks the state of a Mamba model in the middle of `Trainer.train()`.

    Statistics are taken on the batches that training has just seen; no batch is consumed and no random number drawn.
    What it did goes through the Trainer's log to every tracker (`compressm/state_size`, `compressm/relative_error`,
    `compressm/loss_before_cut`, ...), into `trainer_state.json` and into `compressm.json` in every checkpoint.

    Args:
        config: what to cut, when and how; or its dictionary.

    Attributes:
        history: a dictionary for each cut and each skipped attempt.
        goes_on: where the model cannot be cut while it trains (FSDP1, DeepSpeed ZeRO-3), training stops when a cut is
            due, and a checkpoint is cut: then this is the command that goes on; it is printed, too. None otherwise.

    Example:
        >>> from hf_compressm import CompreSSMCallback, CompreSSMConfig
        >>> callbacks = [CompreSSMCallback(CompreSSMConfig(state_size=12))]   # Trainer(..., callbacks=callbacks)
    """

    def __init__(self, config: CompreSSMConfig | dict[str, Any]) -> None:
        if not isinstance(config, (CompreSSMConfig, dict)):
            raise TypeError(f"config must be a CompreSSMConfig or its dictionary, got {type(config).__name__}")
        self.config = CompreSSMConfig.from_dict(config) if isinstance(config, dict) else config
        self.history: list[dict[str, Any]] = []
        # Where the schedule stands, and what a pragmatic cut will be compared with.
        self.progress: dict[str, Any] = {}
        self.compressor: Compressor | None = None
        self.goes_on: Continuation | None = None
        self.record: Record | None = None
        self.timeline = Timeline()
        self._trainer: Trainer | None = None
        self._save_postponed = False
        # The metrics of the evaluation that was asked for before a pragmatic cut; None while none was.
        self._answers: set[str] | None = None

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps of this callback."""
        if self.compressor is not None:
            self.progress |= self.compressor.state_dict()
        progress = {key: value for key, value in self.progress.items() if key != "history"}
        return {
            "args": {"config": self.config.to_dict()},
            "attributes": {"history": self.history, "progress": progress},
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # The weights of a checkpoint are loaded before any other event, into a model that the script built full-size.
        bare, _ = unwrap(model)
        trainer = find_trainer(self)
        if trainer is not None:
            exempt_from_weight_decay(trainer)
            keep_own_card(trainer)
        if trainer is None or not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            resize_while_loading(bare)
            return
        if trainer.is_fsdp_enabled:
            resize_before_loading(trainer)
        if isinstance(args.resume_from_checkpoint, str):
            # FSDP1 and DeepSpeed flatten parameters before they load, and then cannot change their sizes any more.
            resize_to_checkpoint(bare, args.resume_from_checkpoint)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.compressor is not None:
            # The last call of train() was interrupted.
            self.compressor.remove()
        self._trainer = find_trainer(self)
        if self.config.pragmatic and self._trainer is not None and self._trainer.eval_dataset is None:
            raise ValueError("pragmatic=True evaluates after a cut: give the Trainer an eval_dataset")
        wrapped = self._wrapped_model(model)
        self.progress, self._save_postponed, self._answers = {}, False, None
        if state.global_step > 0:
            self._resume(state)
            self._refuse_uncut_base(unwrap(wrapped)[0])
        # A checkpoint of a run without this callback has no place for it, and the Trainer needs one to save.
        state.stateful_callbacks.setdefault(type(self).__name__, {})
        self.compressor = Compressor(
            self.config,
            wrapped,
            optimizer,
            total_steps=state.max_steps,
            warmup_steps=args.get_warmup_steps(state.max_steps),
            history=self.history,
        )
        if self.compressor.why_not_in_process is not None and args.save_only_model:
            raise ValueError(
                f"save_only_model=True leaves out the optimizer, but here only a checkpoint can be cut "
                f"({self.compressor.why_not_in_process}), and the run that goes on from it needs the optimizer"
            )
        if self.progress:
            self.compressor.load_state_dict(self.progress | {"history": self.history})
            self._load_from_checkpoint(args, state)
        self._start_record(args, state)
        self.progress["output_dir"] = str(Path(args.output_dir).absolute())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.timeline.step_begins()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        compressor = self.compressor
        self.timeline.step_ends()
        if compressor.can_take_back:
            return self._await_verdict(args, state, control)
        if self.config.pragmatic and self._baseline_missing(state):
            self._ask_for_baseline(args, control)
            if state.global_step >= compressor.pending[0]:
                # Cut one step later, when the value to compare with is known.
                return control
        if compressor.pending and state.global_step >= compressor.pending[0]:
            self.timeline.before_cut(state.global_step, compressor.state_size)
        report = compressor.step(state.global_step)
        if report is not None:
            self._announce(report, state)
            if not compressor.can_take_back:
                self._forget_best(state)
        if compressor.plan_for_checkpoint is not None:
            control.should_save = control.should_training_stop = True
        return self._await_verdict(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self._await_verdict(args, state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        compressor = self.compressor
        self.timeline.interrupt()
        if self.record is not None:
            stage = "after the cut" if self._was_cut else "before the cut"
            self.record.evaluations[stage] = {"step": state.global_step} | _results(metrics or {})
        if compressor is None or not self.config.pragmatic:
            return control
        name, greater_is_better = self._metric(args)
        if self._answers is not None:
            self._answers |= set(metrics or {})
        if name not in (metrics or {}):
            # One of several evaluation sets, or an evaluation that somebody else asked for.
            return control
        if compressor.can_take_back:
            if state.global_step < self.history[-1]["step"] + self.config.pragmatic_steps:
                return control
            self._judge(name, metrics[name], greater_is_better, state)
            control.should_save = control.should_save or self._save_postponed or args.load_best_model_at_end
            self._save_postponed = False
        elif compressor.pending:
            self.progress["baseline"] = metrics[name]
            self.progress["baseline_step"] = state.global_step
            self._answers = None
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> TrainerControl:
        self.timeline.interrupt()
        if model is not None:
            self._save_beside(args, state, unwrap(model)[0])
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.compressor is not None and "loss" in (logs or {}):
            self.timeline.add(state.global_step, self.compressor.state_size, float(logs["loss"]))

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """What goes along must lie in the output directory now; the Trainer copies only files that it knows itself."""
        self.timeline.interrupt()
        if not self._was_cut or not state.is_world_process_zero or model is None:
            return
        bare, output = unwrap(model)[0], Path(args.output_dir)
        if (output / f"checkpoint-{state.global_step}").is_dir():
            self._save_beside(args, state, bare)
        if not is_peft_model(bare):
            save_config(bare, output)
        save_provenance(bare, output)
        present(output, getattr(self._trainer, "hub_model_id", None), with_report=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        compressor = self.compressor
        if compressor is None:
            return
        if compressor.can_take_back:
            self._keep_unevaluated(state)
        self.progress = {}
        if compressor.plan_for_checkpoint is not None:
            self.goes_on = self._cut_checkpoint(args, state)
        # load_best_model_at_end may have brought back weights of another size.
        compressor.follow_loaded_weights()
        compressor.remove()
        self.compressor = None
        if self._was_cut and args.should_save and model is not None:
            save_provenance(unwrap(model)[0], args.output_dir)

    def _cut_checkpoint(self, args: TrainingArguments, state: TrainerState) -> Continuation:
        processes, plan = self.compressor.processes, self.compressor.plan_for_checkpoint
        # Each process writes a part of a sharded checkpoint.
        processes.barrier()
        with processes.all_or_none("cutting the checkpoint"):
            if args.should_save:
                cut_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", plan, args.output_dir)
        return Continuation.read(args.output_dir)

    @property
    def _was_cut(self) -> bool:
        return any(entry["status"] == "cut" for entry in self.history)

    def _wrapped_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as training calls it: callbacks are only given the bare one."""
        return model if self._trainer is None else self._trainer.model_wrapped

    def _resume(self, state: TrainerState) -> None:
        """Take up the history and the schedule from the checkpoint's trainer_state.json."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):
            saved = saved[0]
        self.history = [] if saved is None else saved["attributes"]["history"]
        self.progress = {} if saved is None else saved["attributes"]["progress"]

    def _load_from_checkpoint(self, args: TrainingArguments, state: TrainerState) -> None:
        """Callbacks are not told which checkpoint train() was given: look where it was written, unless it is named."""
        named, folders = args.resume_from_checkpoint, (self.progress.get("output_dir"), args.output_dir)
        candidates = [Path(folder) / f"checkpoint-{state.global_step}" for folder in folders if folder]
        candidates = [Path(named), *candidates] if isinstance(named, str) else candidates
        directory = next((folder for folder in candidates if (folder / RECORD_FILE).is_file()), None)
        if directory is not None:
            recall_from(self.compressor.model, directory, self.history)
        for directory in candidates:
            batches = load_inputs(directory, all_processes().rank)
            if batches is not None:
                self.compressor.recorder.batches.extend(batches)
                return

    def _start_record(self, args: TrainingArguments, state: TrainerState) -> None:
        self.record = start_record(self.compressor.model)
        self.record.machine = describe_machine()
        self.record.run |= {
            "seed": args.seed,
            "steps": state.max_steps,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": args.learning_rate,
            "command": tidy_command(command_of_this_run()),
        }
        source = getattr(getattr(self.compressor.model, "config", None), "_name_or_path", "")
        if source and not Path(source).is_absolute():
            self.record.run["base_model"] = source
        # A run that goes on from an earlier checkpoint makes later steps anew.
        self.record.timeline[:] = [entry for entry in self.record.timeline if entry["step"] <= state.global_step]
        self.timeline = Timeline(self.record.timeline)

    def _save_beside(self, args: TrainingArguments, state: TrainerState, bare: torch.nn.Module) -> None:
        """Write what a checkpoint needs of this callback."""
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and not is_peft_model(bare) and not (directory / "config.json").exists():
            # Sharded checkpoints come without it, and nobody could tell their state size.
            save_config(bare, directory)
        if args.should_save:
            save_provenance(bare, directory, self.compressor and self.compressor.optimizer_parameters)
        if self.compressor is not None and self.compressor.recorder.batches:
            save_inputs(self.compressor.recorder.batches, directory, all_processes().rank)

    def _announce(self, report: CompressionReport, state: TrainerState) -> None:
        if state.is_world_process_zero:
            tqdm.write(f"\nCompreSSM, step {report.step}\n{report}\n")
        self._log(report.metrics(), state)
        if self._trainer is not None:
            note_cut(self._trainer.callback_handler.callbacks, report, self.history[-1], report.step)

    def _log(self, metrics: dict[str, float], state: TrainerState) -> None:
        if self._trainer is not None:
            # Whoever logs takes the Trainer's own log of this step off the list.
            control = self._trainer.control
            should_log = control.should_log
            self._trainer.log(dict(metrics))
            control.should_log = should_log
        else:
            state.log_history.append({**metrics, "step": state.global_step})

    def _metric(self, args: TrainingArguments) -> tuple[str, bool]:
        name = self.config.pragmatic_metric or args.metric_for_best_model or "loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        greater = args.greater_is_better
        if self.config.pragmatic_metric is not None or greater is None:
            greater = not name.endswith("loss")
        return name, greater

    def _baseline_missing(self, state: TrainerState) -> bool:
        pending = self.compressor.pending
        soon_due = bool(pending) and state.global_step >= pending[0] - 1
        measured_at = self.progress.get("baseline_step", -self.config.pragmatic_steps - 1)
        return soon_due and state.global_step - measured_at > self.config.pragmatic_steps

    def _ask_for_baseline(self, args: TrainingArguments, control: TrainerControl) -> None:
        if self._answers is not None:
            name, _ = self._metric(args)
            raise ValueError(f"pragmatic_metric {name!r} is not among the evaluation's {sorted(self._answers)}")
        self._answers = set()
        control.should_evaluate = True
        # The Trainer remembers the best metric, so the weights that have it must be saved.
        control.should_save = control.should_save or args.load_best_model_at_end

    def _await_verdict(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> TrainerControl:
        """Between a pragmatic cut and its evaluation nothing is saved: a resume could not take the cut back."""
        if not self.compressor.can_take_back:
            return control
        self._save_postponed = self._save_postponed or control.should_save
        control.should_save = False
        if args.metric_for_best_model is not None:
            # The Trainer would remember the metric of weights that are not saved and may be taken back.
            control.should_evaluate = False
        if state.global_step >= self.history[-1]["step"] + self.config.pragmatic_steps:
            control.should_evaluate = True
        elif control.should_training_stop:
            self._keep_unevaluated(state)
            control.should_save, self._save_postponed = self._save_postponed, False
        return control

    def _keep_unevaluated(self, state: TrainerState) -> None:
        warn(logger, f"training ends before the cut at step {self.history[-1]['step']} is evaluated; it stays")
        self._keep(state)

    def _keep(self, state: TrainerState) -> None:
        self.compressor.keep()
        self._forget_best(state)

    def _forget_best(self, state: TrainerState) -> None:
        """Adapters of before a cut fit the base no more, and `load_best_model_at_end` could not load them."""
        if is_peft_model(self.compressor.model) and state.best_model_checkpoint is not None:
            warn(
                logger,
                f"the best adapters so far ({state.best_model_checkpoint}, {state.best_metric:.4f}) belong to the "
                "base before the cut; from here on the best ones after it are looked for",
            )
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def _refuse_uncut_base(self, model: torch.nn.Module) -> None:
        """A checkpoint of a PEFT model has no base in it, and so cannot bring the cut base back."""
        if not is_peft_model(model) or not self._was_cut:
            return
        cut = next(entry for entry in reversed(self.history) if entry["status"] == "cut")
        saved = {layer["name"]: layer["state_size_after"] for layer in cut["layers"]}
        present = {name: mixer.state_size for name, mixer in find_mixers(model).items()}
        if saved != present:
            raise RuntimeError(
                f"the checkpoint was written after a cut, with state sizes {saved}, but the model has {present}. "
                f"{HOW_TO_LOAD}"
            )

    def _judge(self, name: str, value: float, greater_is_better: bool, state: TrainerState) -> None:
        baseline = self.progress["baseline"]
        worse_by = (baseline - value if greater_is_better else value - baseline) / max(abs(baseline), 1e-12)
        verdict = f"{name} {baseline:.4f} before the cut, {value:.4f} after {self.config.pragmatic_steps} steps"
        self.history[-1] |= {"metric": name, "metric_before": baseline, "metric_after": value}
        # Not a number is worse than any.
        if not worse_by <= self.config.pragmatic_tolerance:
            self.compressor.take_back()
            warn(logger, f"the cut at step {self.history[-1]['step']} is taken back, and none will follow: {verdict}")
        else:
            self._keep(state)
            logger.info(f"the cut at step {self.history[-1]['step']} stays: {verdict}")
        self._log({"compressm/state_size": self.compressor.state_size}, state)


def _results(metrics: dict[str, float]) -> dict[str, float]:
    """An evaluation's results without what it took."""
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.endswith(("runtime", "_per_second", "_time")) and value == value
    }


def present(
    directory: Path, repo_id: str | None = None, training: ModelCard | None = None, with_report: bool = True
) -> None:
    """Write card, spectrum and report. No training is worth less than they: if it fails, it is only said."""
    try:
        write_card(directory, repo_id=repo_id, training=training)
        if with_report:
            write_report_page(directory)
    except Exception as error:
        logger.warning(
            f"the card in {directory} could not be written ({type(error).__name__}: {error}); after the training, "
            f"`hf-compressm card {directory}` tries again"
        )


def keep_own_card(trainer: Trainer) -> None:
    """Let the card of a model that was cut be ours, with what the Trainer's own card tells of the training.

    Args:
        trainer: its `create_model_card` writes README.md anew whenever it pushes.
    """
    write_own = trainer.create_model_card

    def write_both(*args: Any, **kwargs: Any) -> None:
        write_own(*args, **kwargs)
        output = Path(trainer.args.output_dir)
        is_cut = (output / RECORD_FILE).is_file() and Record.load(output).made_cuts
        if is_cut and trainer.is_world_process_zero():
            present(output, getattr(trainer, "hub_model_id", None), ModelCard.load(output / CARD_FILE))

    trainer.create_model_card = write_both


def exempt_from_weight_decay(trainer: Trainer) -> None:
    """Let a Trainer's optimizer decay no projection (`B_projection`, `C_projection`), as it decays no bias or norm.

    The callback does this by itself. Call it before training where a projected model is trained without the callback.

    Args:
        trainer: a Trainer whose optimizer is not built yet.
    """
    usual = trainer.get_decay_parameter_names

    def names_that_decay(model: torch.nn.Module) -> list[str]:
        return [name for name in usual(model) if not name.endswith(PROJECTIONS)]

    trainer.get_decay_parameter_names = names_that_decay


def resize_before_loading(trainer: Trainer) -> None:
    """Let a Trainer under FSDP2 load checkpoints of another state size.

    It loads weights and optimizer into the shards of a model that is sharded already, with no event before.
    """
    load, load_best = trainer._load_from_checkpoint, trainer._load_best_model

    def resize(directory: str) -> None:
        bare, wrapper = unwrap(trainer.model_wrapped)
        if kind_of(bare, wrapper) == "FSDP2":
            resize_to_shards(bare, directory, trainer.optimizer)

    def resize_and_load(directory: str, model: torch.nn.Module | None = None) -> None:
        resize(directory)
        load(directory, model)

    def resize_and_load_best() -> None:
        resize(trainer.state.best_model_checkpoint)
        load_best()

    trainer._load_from_checkpoint, trainer._load_best_model = resize_and_load, resize_and_load_best


def find_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that runs a callback.

    Callbacks are not told: they get neither the Trainer, whose log reaches every tracker, nor the wrapped model, which
    a cut must repair. The garbage collector knows who holds the callback: a handler's list, held by a Trainer.
    """
    for holder in gc.get_referrers(callback):
        if isinstance(holder, list):
            for candidate in _trainers():
                if candidate.callback_handler.callbacks is holder:
                    return candidate
    return None


def _trainers() -> list[Trainer]:
    return [item for item in gc.get_objects() if issubclass(type(item), Trainer) and hasattr(item, "callback_handler")]
