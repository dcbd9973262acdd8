"""The callback in the stock Trainer: exactness of a cut, the schedule, the log, refusals, and cuts that never come."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import TINY, lively, tokens
from naive import kept_part
from safetensors.torch import load_file
from torch import nn
from training import (
    KEPT,
    AtStepEnd,
    assert_same_weights,
    build_trainer,
    config,
    examples,
    log_rows,
    moments,
    pad,
    ragged_examples,
    silenced,
    weights,
)
from transformers import Trainer, TrainerCallback
from transformers.optimization import Adafactor

from hf_compressm import CompreSSMCallback, CompreSSMConfig, NonFiniteError, find_mixers
from hf_compressm.callback import find_trainer
from hf_compressm.distributed.wrappers import unwrap
from hf_compressm.modeling_compressm import CompressmMamba2Config, CompressmMamba2ForCausalLM


def random_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def hooks(model: nn.Module) -> dict[str, tuple[int, ...]]:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_load_state_dict_pre_hooks")
    return {name: tuple(len(getattr(module, kind)) for kind in kinds) for name, module in model.named_modules()}


def stop(control, **_) -> None:
    control.should_training_stop = True


def run(model: nn.Module, directory, callbacks=(), **options) -> Trainer:
    trainer = build_trainer(model, directory, callbacks, **options)
    trainer.train()
    return trainer


# A callback that never cuts.

NEVER = {
    "not worth it": config(tolerance=1e-9, schedule=[2, 4]),
    "not worth it by Hankel values": CompreSSMConfig(
        hankel_tolerance=1e-9, max_kept_fraction=0.1, calibration_tokens=48, schedule=[3]
    ),
    "waits for tokens until the end": config(calibration_tokens=10**9),
    "training stops before its step": config(schedule=[7]),
}


@pytest.mark.parametrize("case", NEVER)
def test_a_callback_that_never_cuts_leaves_no_trace(tiny, tmp_path, case):
    def traces(callbacks) -> tuple:
        model = lively(tiny.build())
        before = hooks(model)
        evaluation = {"eval_dataset": examples(4), "eval_strategy": "steps", "eval_steps": 2}
        trainer = run(model, tmp_path, [*callbacks, AtStepEnd(6, stop)], **evaluation)
        assert hooks(model) == before
        modes = {name: module.training for name, module in model.named_modules()}
        return weights(model), moments(model, trainer.optimizer), log_rows(trainer), modes, random_states()

    callback = CompreSSMCallback(NEVER[case])
    ours, theirs = traces([callback]), traces([])
    assert [entry["status"] for entry in callback.history] == ["skipped"] * len(callback.history)
    assert len(callback.history) == (len(NEVER[case].schedule) if "not worth it" in case else 0)
    assert_same_weights(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, state in theirs[1].items():
        assert_same_weights(ours[1][name], state)
    assert len(theirs[2]) == 6
    assert ours[2:] == theirs[2:]


def test_a_skipped_attempt_says_why(tiny, tmp_path):
    callback = CompreSSMCallback(config(tolerance=1e-9))
    run(lively(tiny.build()), tmp_path, [callback])
    (entry,) = callback.history
    assert entry["status"] == "skipped" and entry["step"] == entry["scheduled_step"] == 3
    assert "the rule keeps more than 95% of the states" in entry["reason"]


# Exactness: half of the states do nothing, and a cut to the others changes nothing.


def run_silenced(tiny, directory, *callbacks, **options) -> Trainer:
    return run(silenced(tiny), directory, callbacks, **options)


def groups(model: nn.Module) -> int:
    return getattr(model.config, "n_groups", 1)


def assert_same_training(cut: Trainer, uncut: Trainer, loose: float = 1.0) -> None:
    """The losses, gradient norms and learning rates are the same, and weights and moments are the kept part."""
    ours, theirs = np.array(log_rows(cut)), np.array(log_rows(uncut))
    assert len(ours) == 8
    assert np.array_equal(ours[:, [0, 3]], theirs[:, [0, 3]])
    assert np.allclose(ours[:, 1], theirs[:, 1], rtol=1e-5 * loose)
    assert np.allclose(ours[:, 2], theirs[:, 2], rtol=1e-4 * loose)
    model, full_model = unwrap(cut.model)[0], unwrap(uncut.model)[0]
    assert model.config.state_size == 4 and full_model.config.state_size == 8
    kept, full = [KEPT] * groups(model), weights(full_model)
    for name, value in weights(model).items():
        expected = kept_part(name, full[name], kept)
        assert torch.allclose(value, expected, rtol=0, atol=1e-5 * loose), name
    states, full_states = moments(model, cut.optimizer), moments(full_model, uncut.optimizer)
    assert states.keys() == full_states.keys()
    for name, state in states.items():
        assert state.keys() == full_states[name].keys()
        for key, value in state.items():
            moment = full_states[name][key]
            if moment.shape == full[name].shape:
                expected = kept_part(name, moment, kept)
                assert (value - expected).norm() <= 2e-4 * loose * expected.norm(), (name, key)


AT_STEP_4 = config(calibration_tokens=2 * 48, schedule=[4])
SETTINGS = {
    "plain": {},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "clipping": {"max_grad_norm": 0.05},
    "warm-up and decay": {"warmup_steps": 2, "lr_scheduler_type": "cosine"},
    "weight decay": {"weight_decay": 0.3},
    "several epochs": {"data": examples(14)},
    "attention masks": {"data": ragged_examples(), "data_collator": pad},
    "fused AdamW": {"optim": "adamw_torch_fused"},
    "SGD": {"optim": "sgd", "learning_rate": 0.3},
    "SGD with momentum": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})},
    "RMSprop": {"optim": "rmsprop", "learning_rate": 1e-3},
    "Adagrad": {"optim": "adagrad"},
    # Its clipping goes by the update's root mean square, which depends on how many zeros the update has.
    "Adafactor without clipping": {
        "optimizer_cls_and_kwargs": (
            Adafactor,
            {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "clip_threshold": 1e9},
        )
    },
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("setting", SETTINGS)
def test_cutting_silent_states_does_not_change_training(tiny, tmp_path, setting):
    callback = CompreSSMCallback(AT_STEP_4)
    cut = run_silenced(tiny, tmp_path, callback, **SETTINGS[setting])
    uncut = run_silenced(tiny, tmp_path, **SETTINGS[setting])
    (entry,) = callback.history
    assert (entry["status"], entry["step"]) == ("cut", 4)
    assert all(kept == KEPT for layer in entry["layers"] for kept in layer["kept"])
    assert_same_training(cut, uncut)


def test_cutting_silent_states_does_not_change_training_in_bf16(tiny, tmp_path):
    callback = CompreSSMCallback(AT_STEP_4)
    cut, uncut = run_silenced(tiny, tmp_path, callback, bf16=True), run_silenced(tiny, tmp_path, bf16=True)
    assert all(kept == KEPT for layer in callback.history[0]["layers"] for kept in layer["kept"])
    assert_same_training(cut, uncut, loose=300)


def test_the_trainers_adafactor(tiny, tmp_path):
    cut = run_silenced(tiny, tmp_path, CompreSSMCallback(AT_STEP_4), optim="adafactor")
    uncut = run_silenced(tiny, tmp_path, optim="adafactor")
    assert cut.model.config.state_size == 4
    assert np.allclose(np.array(log_rows(cut))[:, 1], np.array(log_rows(uncut))[:, 1], rtol=0.01)


class GraphCounter(TrainerCallback):
    """The number of graphs that torch.compile has made by the end of each step."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("how", ["torch_compile", "compiled beforehand"])
def test_cutting_silent_states_does_not_change_compiled_training(tiny, tmp_path, how):
    def compiled_run(*callbacks) -> Trainer:
        torch._dynamo.reset()
        model, options = silenced(tiny, num_hidden_layers=1), {"data": examples(length=4)}
        if how == "torch_compile":
            options |= {"torch_compile": True, "torch_compile_backend": "eager"}
        else:
            model = torch.compile(model, backend="eager", fullgraph=True)
            # Called before there is a hook.
            model.train()(**pad(examples(4, length=4)))
            options["remove_unused_columns"] = False
        return run(model, tmp_path, callbacks, **options)

    counter, callback = GraphCounter(), CompreSSMCallback(config(calibration_tokens=2 * 16, schedule=[4]))
    cut, uncut = compiled_run(callback, counter), compiled_run()
    torch._dynamo.reset()
    assert callback.history[0]["step"] == 4
    # The recorder compiles nothing, the cut once: the compiled model is the small one from then on.
    first = counter.graphs[0]
    assert counter.graphs == [first] * 4 + [first + 1] * 4
    assert_same_training(cut, uncut)


# Several calls of train().


def test_a_second_call_of_train_goes_on_with_the_small_model(tiny, tmp_path):
    callback = CompreSSMCallback(AT_STEP_4)
    cut, uncut = run_silenced(tiny, tmp_path, callback), run_silenced(tiny, tmp_path)
    assert not unwrap(cut.model)[0]._forward_pre_hooks
    cut.train()
    uncut.train()
    assert len(callback.history) == 1
    assert_same_training(cut, uncut)


def test_a_new_model_in_each_call_of_train_is_cut_anew(tiny, tmp_path):
    callback = CompreSSMCallback(config())
    trainer = build_trainer(None, tmp_path, [callback], model_init=lambda: lively(tiny.build()))
    kept = []
    for statuses in (["cut"], ["undone by loading", "cut"]):
        trainer.train()
        assert trainer.model.config.state_size == 4
        assert [entry["status"] for entry in callback.history] == statuses
        kept.append([layer["kept"] for layer in callback.history[-1]["layers"]])
    assert kept[0] == kept[1]


def scores(best: list[int], of: int) -> Iterator[dict[str, float]]:
    """A metric for each of several evaluations, 1 for some and 0 for the others."""
    return iter([{"score": float(number in best)} for number in range(of)])


@pytest.mark.parametrize("best, size", [(2, 8), (6, 4)], ids=["best before the cut", "best after the cut"])
def test_load_best_model_at_end_and_train_again(tiny, tmp_path, best, size):
    # Evaluations after steps 2, 4, 6 and 8 of each call; the second call is best at its end.
    metric = scores([best // 2 - 1, 7], of=8)
    callback = CompreSSMCallback(AT_STEP_4)
    trainer = build_trainer(
        lively(tiny.build()),
        tmp_path,
        [callback],
        eval_dataset=examples(4),
        compute_metrics=lambda _: next(metric),
        metric_for_best_model="score",
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
    )
    model = trainer.model
    trainer.train()
    assert trainer.state.best_global_step == best
    assert model.config.state_size == size
    loaded = weights(model)
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    assert callback.history[0]["status"] == ("cut" if size == 4 else "undone by loading")
    assert (tmp_path / "compressm.json").exists() == (size == 4)

    trainer.train()
    assert model.config.state_size == 4
    # A target that was reached is not asked for again; one whose cut was undone is.
    assert [entry["step"] for entry in callback.history if entry["status"] == "cut"] == [4]
    assert len(callback.history) == (1 if size == 4 else 2)
    for name, value in weights(model).items():
        assert "mixer" not in name or value.shape != loaded[name].shape or not torch.equal(value, loaded[name]), name
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}


def test_train_again_after_an_interrupt(tiny, tmp_path):
    def interrupt(**_):
        raise KeyboardInterrupt

    counts = []
    callback, interrupting = CompreSSMCallback(config()), AtStepEnd(2, interrupt)
    model = lively(tiny.build())
    counting = AtStepEnd(2, lambda **_: counts.append(hooks(model)))
    trainer = build_trainer(model, tmp_path, [callback, counting, interrupting])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupting)
    trainer.train()
    assert counts[0] == counts[1]
    assert [entry["step"] for entry in callback.history] == [3]
    assert not model._forward_pre_hooks


# When it cuts.


@pytest.mark.parametrize("warmup, step", [(0, 4), (3, 4), (7, 7), (0.5, 10)])
def test_one_cut_at_a_fifth_and_never_in_warm_up(tmp_path, tiny, warmup, step):
    callback = CompreSSMCallback(config(schedule="one_cut"))
    run(lively(tiny.build()), tmp_path, [callback], max_steps=20, warmup_steps=warmup)
    assert [entry["step"] for entry in callback.history] == [step]


@pytest.mark.parametrize(
    "schedule, target, multiple, steps, sizes",
    [
        ([3, 0.5], 4, 1, [3, 10], [6, 4]),
        ("compressm", 2, 1, [1, 2, 3, 4], [6, 4, 3, 2]),
        ([2, 5], 0.25, 1, [2, 5], [4, 2]),
        ([2, 3, 4], 0.4, 1, [2, 3, 4], [6, 4, 3]),
        # Each cut takes a state at least, and what is not needed is not made.
        ("compressm", 6, 1, [1, 2], [7, 6]),
        ("compressm", 0.9, 1, [1], [7]),
        ([2, 5], 3, 4, [2], [4]),
        ([2, 5, 7], 1, 2, [2, 5, 7], [6, 4, 2]),
    ],
)
def test_several_cuts_end_at_the_target(tiny, tmp_path, schedule, target, multiple, steps, sizes):
    callback = CompreSSMCallback(config(schedule=schedule, state_size=target, multiple_of=multiple))
    steps_of_training = 40 if schedule == "compressm" else 20
    model = lively(tiny.build())
    run(model, tmp_path, [callback], max_steps=steps_of_training)
    assert [entry["step"] for entry in callback.history] == steps
    assert [entry["layers"][0]["state_size_after"] for entry in callback.history] == sizes
    assert model.config.state_size == sizes[-1]


def test_a_tolerance_decides_each_time(tiny, tmp_path):
    callback = CompreSSMCallback(config(tolerance=0.5, schedule=[2, 4]))
    model = silenced(tiny)
    run(model, tmp_path, [callback])
    assert [entry["step"] for entry in callback.history] == [2, 4]
    cuts = [entry for entry in callback.history if entry["status"] == "cut"]
    assert cuts[0]["step"] == 2
    for entry in cuts:
        fewest = [
            next(size for size, error in enumerate(layer["error_curve"]) if error <= 0.5) for layer in entry["layers"]
        ]
        assert {layer["state_size_after"] for layer in entry["layers"]} == {max(fewest)}
    # Half of the states do nothing.
    assert model.config.state_size == max(fewest) <= 4


def test_the_cut_waits_for_tokens_and_says_so_once(tiny, tmp_path, caplog):
    callback = CompreSSMCallback(config(schedule=[2], calibration_tokens=5 * 48))
    run(lively(tiny.build()), tmp_path, [callback])
    (entry,) = callback.history
    assert (entry["scheduled_step"], entry["step"], entry["tokens"]) == (2, 5, 5 * 48)
    messages = [record.message for record in caplog.records if "waits" in record.message]
    assert messages == ["the cut due at step 2 waits: 96 of 240 calibration tokens have passed by"]


def test_each_micro_batch_counts(tiny, tmp_path):
    callback = CompreSSMCallback(config(schedule=[2], calibration_tokens=6 * 48))
    run(lively(tiny.build()), tmp_path, [callback], gradient_accumulation_steps=3)
    assert (callback.history[0]["step"], callback.history[0]["tokens"]) == (2, 6 * 48)


def test_inputs_are_kept_only_shortly_before_the_cut(tiny, tmp_path):
    counts = []
    callback = CompreSSMCallback(config(schedule=[6]))
    count = AtStepEnd(range(1, 9), lambda **_: counts.append(len(callback.compressor.recorder.batches)))
    run(lively(tiny.build()), tmp_path, [callback, count])
    # One batch is wanted; the last three steps before the cut are recorded, and older batches dropped.
    assert counts == [0, 0, 0, 1, 1, 0, 0, 0]


# What it refuses, and what it goes on without.


@pytest.mark.parametrize(
    "options, target",
    [
        ({"state_size": 8}, "8"),
        ({"state_size": 9}, "9"),
        ({"state_size": 0.99}, "8"),
        ({"state_size": 5, "multiple_of": 4}, r"8 \(rounded up from 5 to a multiple of 4\)"),
    ],
)
def test_a_target_that_is_not_below_n_is_refused_when_training_begins(tiny, tmp_path, options, target):
    trainer = build_trainer(lively(tiny.build()), tmp_path, [CompreSSMCallback(config(**options))])
    with pytest.raises(ValueError, match=rf"layers\.0\.mixer: target state_size {target} is not below the current 8"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_schedule_without_a_cut_is_refused(tiny, tmp_path):
    trainer = build_trainer(lively(tiny.build()), tmp_path, [CompreSSMCallback(config(schedule=[8]))])
    with pytest.raises(ValueError, match=r"no cut would be made.*\[8\] of 8"):
        trainer.train()


def test_a_model_without_mixers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Linear has no mixer whose state could be reduced"):
        build_trainer(nn.Linear(2, 2), tmp_path, [CompreSSMCallback(config())])


def test_a_config_must_be_a_config():
    with pytest.raises(TypeError, match="config must be a CompreSSMConfig or its dictionary, got int"):
        CompreSSMCallback(12)
    assert CompreSSMCallback({"state_size": 12}).config == CompreSSMConfig(state_size=12)


def break_first_layer(model, **_) -> None:
    next(module for name, module in model.named_modules() if name.endswith("0.mixer")).A_log.data[0] += torch.inf


def test_a_cut_of_a_diverged_model_is_skipped_and_training_goes_on(tiny, tmp_path, caplog):
    healthy = {}
    breaking = AtStepEnd(3, lambda model, **_: (healthy.update(weights(model)), break_first_layer(model)))
    healing = AtStepEnd(3, lambda model, **_: model.load_state_dict(healthy, strict=False))
    callback = CompreSSMCallback(config(schedule=[3, 5]))
    model = lively(tiny.build())
    trainer = run(model, tmp_path, [breaking, callback, healing])
    skipped, cut = callback.history
    assert (skipped["status"], skipped["step"]) == ("skipped", 3) and "NaN or infinity" in skipped["reason"]
    assert any("the cut at step 3 is skipped" in record.message for record in caplog.records)
    assert (cut["status"], cut["step"]) == ("cut", 5)
    assert model.config.state_size == 4 and trainer.state.global_step == 8


def test_a_cut_of_a_diverged_model_raises_if_the_config_says_so(tiny, tmp_path):
    callback = CompreSSMCallback(config(on_non_finite="raise"))
    trainer = build_trainer(lively(tiny.build()), tmp_path, [AtStepEnd(3, break_first_layer), callback])
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mixer.*holds? NaN or infinity"):
        trainer.train()
    assert trainer.model.config.state_size == 8


# What it tells.


class Tracker(TrainerCallback):
    """What a tracker would receive."""

    def __init__(self) -> None:
        self.received: list[tuple[int, dict]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.received.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("tracker_first", [True, False])
def test_the_cut_is_logged(tiny, tmp_path, capsys, tracker_first):
    four = examples(4)
    before = {}

    def keep_loss(model, **_) -> None:
        batch = {key: torch.stack([item[key] for item in four]) for key in four[0]}
        model.eval()
        with torch.no_grad():
            before["loss"] = model(**batch).loss.item()
        model.train()

    tracker, callback = Tracker(), CompreSSMCallback(config())
    order = [tracker, callback] if tracker_first else [callback, tracker]
    trainer = run(
        lively(tiny.build()),
        tmp_path,
        [AtStepEnd(3, keep_loss), *order],
        data=four,
        save_strategy="steps",
        save_steps=4,
    )
    logged = [entry for entry in trainer.state.log_history if "compressm/state_size" in entry]
    received = [(step, logs) for step, logs in tracker.received if "compressm/state_size" in logs]
    assert [entry["step"] for entry in logged] == [step for step, _ in received] == [3]
    (entry,), (_, logs) = logged, received[0]
    assert {name: value for name, value in entry.items() if name.startswith("compressm/")} == {
        name: value for name, value in logs.items() if name.startswith("compressm/")
    }
    (cut,) = callback.history
    assert entry["compressm/state_size"] == 4
    assert entry["compressm/relative_error"] == max(layer["relative_error"] for layer in cut["layers"]) > 0
    # The last batch was all four sequences.
    assert entry["compressm/loss_before_cut"] == pytest.approx(before["loss"], rel=1e-5)
    assert entry["compressm/loss_after_cut"] == cut["loss_after"] != cut["loss_before"]
    assert entry["compressm/kl_divergence"] > 0
    assert entry["compressm/cut_seconds"] == pytest.approx(sum(cut["seconds"].values()))
    # The Trainer's own log of that step is still there.
    assert [row[0] for row in log_rows(trainer)] == list(range(1, 9))

    printed = capsys.readouterr().out
    assert printed.count("CompreSSM, step 3") == 1
    assert printed.count("backbone.layers.0.mixer") == printed.count("backbone.layers.1.mixer") == 1
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["history"] == callback.history


def test_each_of_two_trainers_gets_its_own_log(tiny, tmp_path):
    callbacks = [CompreSSMCallback(config()), CompreSSMCallback(config(schedule=[5]))]
    trainers = [
        build_trainer(lively(tiny.build()), tmp_path / str(i), [callback]) for i, callback in enumerate(callbacks)
    ]
    assert [find_trainer(callback) for callback in callbacks] == trainers
    assert find_trainer(CompreSSMCallback(config())) is None
    for trainer in reversed(trainers):
        trainer.train()
    steps = [
        [entry["step"] for entry in trainer.state.log_history if "compressm/state_size" in entry]
        for trainer in trainers
    ]
    assert steps == [[3], [5]]


# Projected cuts of Mamba-2.

MAMBA2 = TINY["mamba2"]
PROJECTIONS = ("B_projection", "C_projection")


def projections(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(PROJECTIONS)}


def test_a_projected_cut_in_the_trainer(tmp_path):
    callback, after = CompreSSMCallback(config(state_size=3, realization="projected")), {}
    keep = AtStepEnd(3, lambda model, **_: after.update(weights(model)))
    trainer = run(lively(MAMBA2.build()), tmp_path, [callback, keep])
    model = trainer.model
    assert type(model) is CompressmMamba2ForCausalLM and type(model.config) is CompressmMamba2Config
    assert (model.config.state_size, model.config.feature_size, model.config.state_ranks) == (3, 8, None)
    assert {mixer.state_size for mixer in find_mixers(model).values()} == {3}
    (cut,) = callback.history
    assert (cut["status"], cut["step"]) == ("cut", 3)
    assert all(layer["realization"] == "projected" and layer["kept"] is None for layer in cut["layers"])
    # All eight steps were logged, those after the cut from the model that the cut left.
    assert [row[0] for row in log_rows(trainer)] == list(range(1, 9))
    assert np.isfinite(np.array(log_rows(trainer))).all()
    assert {name: tuple(value.shape) for name, value in projections(model).items()} == {
        f"backbone.layers.{layer}.mixer.{name}": (8, 6) for layer in (0, 1) for name in PROJECTIONS
    }
    # Every parameter is trained on, also the new ones.
    assert all(not torch.equal(value, after[name]) for name, value in weights(model).items())
    held = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_a_projected_cut_loses_less_than_a_selection(tmp_path):
    losses = {}
    for realization in ("stock", "projected"):
        callback = CompreSSMCallback(config(realization=realization))
        run(lively(MAMBA2.build()), tmp_path, [callback])
        losses[realization] = callback.history[0]
    stock, projected = losses["stock"], losses["projected"]
    assert projected["loss_before"] == stock["loss_before"]
    assert projected["kl_divergence"] < 0.5 * stock["kl_divergence"]
    for ours, theirs in zip(projected["layers"], stock["layers"], strict=True):
        assert ours["relative_error"] < theirs["relative_error"]


def freeze_projections(model: nn.Module, **_) -> None:
    for parameter in projections(unwrap(model)[0]).values():
        parameter.requires_grad_(False)


PROJECTED_SETTINGS = (
    "plain",
    "gradient accumulation",
    "gradient checkpointing",
    "clipping",
    "weight decay",
    "several epochs",
    "attention masks",
    "fused AdamW",
    "SGD with momentum",
)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("setting", PROJECTED_SETTINGS)
def test_projecting_silent_states_away_does_not_change_training(tmp_path, setting):
    """The projections are frozen: that they can learn is the one thing that the uncut run does not have."""
    callback = CompreSSMCallback(config(realization="projected", calibration_tokens=96, schedule=[4]))
    freeze = AtStepEnd(4, freeze_projections)
    cut = run_silenced(MAMBA2, tmp_path, callback, freeze, **SETTINGS[setting])
    uncut = run_silenced(MAMBA2, tmp_path, **SETTINGS[setting])
    (entry,) = callback.history
    assert (entry["status"], entry["step"]) == ("cut", 4)
    assert all(layer["relative_error"] < 1e-3 for layer in entry["layers"])
    ours, theirs = np.array(log_rows(cut)), np.array(log_rows(uncut))
    assert len(ours) == 8 and np.array_equal(ours[:, [0, 3]], theirs[:, [0, 3]])
    assert np.allclose(ours[:, 1], theirs[:, 1], rtol=1e-5)
    assert np.allclose(ours[:, 2], theirs[:, 2], rtol=1e-4)
    assert cut.model.config.state_size == 4
    small, full = weights(cut.model), weights(uncut.model)
    assert small.keys() - full.keys() == projections(cut.model).keys()
    for name, value in full.items():
        assert torch.allclose(small[name], value, rtol=0, atol=1e-5), name
    states, full_states = moments(cut.model, cut.optimizer), moments(uncut.model, uncut.optimizer)
    assert states.keys() == full_states.keys()
    for name, state in full_states.items():
        for key, moment in state.items():
            assert (states[name][key] - moment).norm() <= 2e-4 * moment.norm() + 1e-12, (name, key)


def test_the_loss_goes_on_where_it_was_when_the_projections_are_trained(tmp_path):
    callback = CompreSSMCallback(config(realization="projected"))
    cut, uncut = run_silenced(MAMBA2, tmp_path, callback), run_silenced(MAMBA2, tmp_path)
    ours, theirs = np.array(log_rows(cut)), np.array(log_rows(uncut))
    # The step after the cut is computed with the new model, and the last one no longer with the same weights.
    assert np.allclose(ours[:4, 1], theirs[:4, 1], rtol=1e-5)
    assert ours[7, 1] != theirs[7, 1] and np.allclose(ours[4:, 1], theirs[4:, 1], rtol=0.1)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_projected_cut_of_a_compiled_model(tmp_path):
    def compiled_run(*callbacks) -> Trainer:
        torch._dynamo.reset()
        options = {"data": examples(length=4), "torch_compile": True, "torch_compile_backend": "eager"}
        return run(silenced(MAMBA2, num_hidden_layers=1), tmp_path, callbacks, **options)

    settings = config(realization="projected", calibration_tokens=2 * 16, schedule=[4])
    counter, callback = GraphCounter(), CompreSSMCallback(settings)
    cut = compiled_run(callback, AtStepEnd(4, freeze_projections), counter)
    uncut = compiled_run()
    torch._dynamo.reset()
    assert callback.history[0]["step"] == 4 and unwrap(cut.model)[0].config.state_size == 4
    first = counter.graphs[0]
    assert counter.graphs == [first] * 4 + [first + 1] * 4
    ours, theirs = np.array(log_rows(cut)), np.array(log_rows(uncut))
    assert np.allclose(ours[:, 1], theirs[:, 1], rtol=1e-5)


def decay_of_projections(trainer: Trainer) -> list[float]:
    wanted = {id(parameter) for parameter in projections(unwrap(trainer.model)[0]).values()}
    return [
        group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in wanted
    ]


def test_projections_are_not_decayed(tmp_path):
    callback = CompreSSMCallback(config(realization="projected"))
    options = {"weight_decay": 0.1, "save_strategy": "steps", "save_steps": 4}
    trainer = run(lively(MAMBA2.build()), tmp_path, [callback], **options)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert decay_of_projections(trainer) == [0.0] * 4
    # A second Trainer builds its optimizer for a model that is projected already; so does a resumed run.
    again = build_trainer(trainer.model, tmp_path, [CompreSSMCallback(config(state_size=2))], **options)
    again.create_optimizer()
    assert decay_of_projections(again) == [0.0] * 4
    resumed = build_trainer(MAMBA2.build(), tmp_path, [CompreSSMCallback(callback.config)], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert decay_of_projections(resumed) == [0.0] * 4
    # Without anyone's word they would be.
    plain = build_trainer(trainer.model, tmp_path, **options)
    plain.create_optimizer()
    assert decay_of_projections(plain) == [0.1] * 4


@pytest.mark.parametrize(
    "schedule, target, multiple, steps, sizes",
    [
        # A number is an average, which the two layers share out.
        ([3, 0.5], 4, 1, [3, 10], [6, 4]),
        ([3, 6, 9], 1, 2, [3, 6, 9], [6, 4, 2]),
        ([3, 6], [2, 8], 1, [3, 6], [[4, 8], [2, 8]]),
        ([3, 6], [2, 5], 1, [3, 6], [[4, 6], [2, 5]]),
        # What is reached is not asked for again, and each cut takes a state at least.
        ([3, 6], [7, 8], 1, [3], [[7, 8]]),
        ([3, 6, 9], [7, 8], 1, [3], [[7, 8]]),
    ],
)
def test_several_projected_cuts_end_at_the_target(tmp_path, schedule, target, multiple, steps, sizes):
    settings = {"schedule": schedule, "state_size": target, "multiple_of": multiple, "realization": "projected"}
    callback = CompreSSMCallback(config(**settings))
    trainer = run(lively(MAMBA2.build()), tmp_path, [callback], max_steps=20)
    assert [entry["step"] for entry in callback.history] == steps
    reached = [[layer["state_size_after"] for layer in entry["layers"]] for entry in callback.history]
    assert all(size % multiple == 0 for layers in reached for size in layers)
    assert sizes == (reached if isinstance(target, list) else [sum(layers) / 2 for layers in reached])
    last, model = reached[-1], trainer.model
    assert [mixer.state_size for mixer in find_mixers(model).values()] == last
    assert (model.config.state_size, model.config.feature_size) == (min(last), 8)
    assert model.config.state_ranks == (None if last[0] == last[1] else last)
    held = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_a_budget_of_state_bytes(tmp_path):
    # 32 channels of four bytes: 128 bytes for each state of a layer; 9 states in all.
    callback = CompreSSMCallback(config(state_bytes=9 * 128 + 5, realization="projected", schedule=[3, 6]))
    trainer = run(lively(MAMBA2.build()), tmp_path, [callback])
    sizes = [mixer.state_size for mixer in find_mixers(trainer.model).values()]
    assert sum(sizes) == 9
    # The second cut is already where the budget wants it.
    assert [entry["step"] for entry in callback.history] == [3]


@pytest.mark.parametrize("target", [4, [3, 8]], ids=["one size", "a size for each layer"])
@pytest.mark.parametrize("best", [2, 6], ids=["best before the cut", "best after the cut"])
def test_load_best_model_of_a_projected_run_and_train_again(tmp_path, best, target):
    cut = best == 6
    metric = scores([best // 2 - 1, 7], of=8)
    settings = config(realization="projected", state_size=target, calibration_tokens=96, schedule=[4])
    callback = CompreSSMCallback(settings)
    trainer = build_trainer(
        lively(MAMBA2.build()),
        tmp_path,
        [callback],
        eval_dataset=examples(4),
        compute_metrics=lambda _: next(metric),
        metric_for_best_model="score",
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        weight_decay=0.1,
    )
    model = trainer.model
    trainer.train()
    assert trainer.state.best_global_step == best
    assert type(model) is (CompressmMamba2ForCausalLM if cut else MAMBA2.language_model)
    small = target if isinstance(target, list) else [target, target]
    assert [mixer.state_size for mixer in find_mixers(model).values()] == (small if cut else [8, 8])
    assert len(projections(model)) == (4 if cut else 0)
    saved, loaded = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"), weights(model)
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    assert ("feature_size" in model.config.to_dict()) == cut
    assert callback.history[0]["status"] == ("cut" if cut else "undone by loading")
    held = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())

    trainer.train()
    assert type(model) is CompressmMamba2ForCausalLM
    assert [mixer.state_size for mixer in find_mixers(model).values()] == small
    assert [entry["step"] for entry in callback.history if entry["status"] == "cut"] == [4]
    for name, value in weights(model).items():
        assert "mixer" not in name or name not in loaded or not torch.equal(value, loaded[name]), name
    held = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert decay_of_projections(trainer) == [0.0] * 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"state_size": 8}, r"layers\.0\.mixer: target state_size 8 is not below the current 8"),
        ({"state_size": [4, 9]}, r"layers\.1\.mixer: target state_size 9 is above the current 8; choose 1\.\.8"),
        ({"state_size": [4]}, r"state_size lists 1 numbers, \[4\], but the model has 2 mixers"),
        ({"state_size": [4, 4, 4]}, "state_size lists 3 numbers"),
        ({"state_size": [8, 8]}, r"state_size \[8, 8\] is what the layers already have"),
        ({"state_bytes": 2 * 128 - 1}, "state_bytes is 255, but the smallest sizes.* take 256 bytes"),
        ({"state_bytes": 16 * 128}, "state_bytes is 2048, but the states take 2048 bytes as they are; give less"),
    ],
)
def test_a_projected_target_that_cannot_be_reached_is_refused_when_training_begins(tmp_path, options, message):
    settings = config(realization="projected", **options)
    trainer = build_trainer(lively(MAMBA2.build()), tmp_path, [CompreSSMCallback(settings)])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "options",
    [{"realization": "projected"}, {"realization": "auto", "state_bytes": 999}],
    ids=["asked for", "asked for by the rule"],
)
def test_projecting_mamba1_is_refused_when_training_begins(tmp_path, options):
    settings = config(**options)
    trainer = build_trainer(lively(TINY["mamba"].build()), tmp_path, [CompreSSMCallback(settings)])
    with pytest.raises(ValueError, match=r"layers\.0\.mixer: MambaMixer cannot be projected.*realization='stock'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_generation_after_a_projected_cut_is_the_same_with_and_without_cache(tmp_path):
    settings = config(state_size=[3, 5], realization="projected")
    model = run(lively(MAMBA2.build()), tmp_path, [CompreSSMCallback(settings)]).model.eval()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache, without = (model.generate(tokens(3, 5), use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache, without) and with_cache.shape == (3, 13)
