"""The callback's pragmatic mode: a cut is evaluated some steps later, and taken back if the metric fell."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import MAMBA1_FAMILY, TINY, lively
from peft import LoraConfig, get_peft_model
from training import (
    AtStepEnd,
    assert_same_weights,
    build_trainer,
    config,
    examples,
    log_rows,
    moments,
    weights,
)
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback, read_record
from hf_compressm.provenance import load_plans


class Metric:
    """`compute_metrics` that returns what it is told, by the number of the evaluation; `None` is not a number."""

    def __init__(self, *values: float) -> None:
        self.values, self.calls = values, 0

    def __call__(self, prediction) -> dict[str, float]:
        self.calls += 1
        return {"score": self.values[min(self.calls, len(self.values)) - 1]}


def pragmatic_trainer(model, directory, *callbacks, metric, **options):
    options = {"eval_dataset": examples(4), "compute_metrics": metric, "max_steps": 12} | options
    return build_trainer(model, directory, callbacks, **options)


def pragmatic(**options):
    options = {"schedule": [4], "pragmatic": True, "pragmatic_steps": 3, "pragmatic_metric": "score"} | options
    return CompreSSMCallback(config(**options))


class Moments(TrainerCallback):
    """Weights and optimizer as they are at some step's end, or after its evaluation."""

    def __init__(self, step: int, event: str) -> None:
        self.step, self.event, self.weights, self.moments = step, event, None, None

    def _keep(self, event, state, model, optimizer) -> None:
        if event == self.event and state.global_step == self.step:
            self.weights, self.moments = weights(model), moments(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self._keep("step", state, model, optimizer)

    def on_evaluate(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self._keep("evaluation", state, model, optimizer)


OPTIMIZERS = {
    "AdamW": {},
    "fused AdamW": {"optim": "adamw_torch_fused"},
    "SGD with momentum": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})},
    # Its moments have another type than its parameters.
    "Adafactor in bfloat16": {"optim": "adafactor", "learning_rate": 0.1},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_cut_that_hurts_is_taken_back(tiny, tmp_path, caplog, optimizer):
    model = lively(tiny.build())
    if "bfloat16" in optimizer:
        model.to(torch.bfloat16)
    before, after, end = Moments(4, "step"), Moments(7, "evaluation"), Moments(12, "step")
    sizes = []
    watch = AtStepEnd(range(1, 13), lambda model, **_: sizes.append(model.config.state_size))
    callback = pragmatic(schedule=[4, 9])
    trainer = pragmatic_trainer(
        model, tmp_path, before, callback, after, end, watch, metric=Metric(0.9, 0.5), **OPTIMIZERS[optimizer]
    )
    trainer.train()
    # The first of two cuts goes half of the way.
    assert sizes == [8] * 3 + [6] * 4 + [8] * 5
    # Bit for bit the moment before the cut, and on from there at full size.
    assert_same_weights(after.weights, before.weights)
    assert before.moments.keys() == after.moments.keys()
    for name, state in before.moments.items():
        assert_same_weights(after.moments[name], state)
    assert all(not torch.equal(end.weights[name], after.weights[name]) for name in end.weights if "mixer" in name)
    assert {id(parameter) for parameter in model.parameters()} == {
        id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]
    }
    (entry,) = callback.history
    assert entry["status"] == "taken back"
    assert (entry["metric"], entry["metric_before"], entry["metric_after"]) == ("eval_score", 0.9, 0.5)
    assert any("the cut at step 4 is taken back, and none will follow" in record.message for record in caplog.records)
    logged = [(e["step"], e["compressm/state_size"]) for e in trainer.state.log_history if "compressm/state_size" in e]
    assert logged[-1] == (7, 8)
    # The schedule of the learning rate has gone on.
    assert [row[0] for row in log_rows(trainer)] == list(range(1, 13))
    rates = [row[3] for row in log_rows(trainer)]
    assert rates == sorted(set(rates), reverse=True)
    assert not (tmp_path / "compressm.json").exists()


RESCALED_AND_IN_HEADS = ("falcon_mamba", "jamba", "zamba")


@pytest.mark.parametrize("name", RESCALED_AND_IN_HEADS)
@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor in bfloat16"])
def test_what_was_scaled_comes_back(tmp_path, name, optimizer):
    model = lively(MAMBA1_FAMILY[name].build())
    if "bfloat16" in optimizer:
        model.to(torch.bfloat16)
    before, cut, after = Moments(4, "step"), Moments(4, "step"), Moments(7, "evaluation")
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    callback, options = pragmatic(), OPTIMIZERS[optimizer]
    trainer = pragmatic_trainer(model, tmp_path, before, callback, cut, after, metric=Metric(0.9, 0.5), **options)
    trainer.train()
    assert [entry["status"] for entry in callback.history] == ["taken back"]
    # Parameters of the same shape that the cut changed, as it scaled them.
    scaled = {
        key.split(".", 4)[-1]
        for key, value in cut.weights.items()
        if value.shape == before.weights[key].shape and not torch.equal(value, before.weights[key])
    }
    assert scaled == ({"D", "out_proj.weight"} if name == "falcon_mamba" else set())
    assert sum(value.shape != cut.weights[key].shape for key, value in before.weights.items()) >= 4
    assert_same_weights(after.weights, before.weights)
    for key, state in before.moments.items():
        assert_same_weights(after.moments[key], state)
    assert before.moments.keys() == after.moments.keys()
    assert_same_weights(dict(model.named_buffers()), buffers)
    assert {id(parameter) for parameter in model.parameters()} == {
        id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]
    }


@pytest.mark.parametrize("score", [0.9, 0.5], ids=["the cut stays", "it is taken back"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_verdict_on_a_cut_under_adapters(tmp_path, score, dora):
    base = lively(TINY["mamba"].build())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj", "x_proj"], use_dora=dora))
    before, after = Moments(4, "step"), Moments(7, "evaluation")
    callback, metric = pragmatic(), Metric(0.9, score)
    options = {"save_strategy": "steps", "save_steps": 1}
    pragmatic_trainer(model, tmp_path, before, callback, after, metric=metric, **options).train()
    small = score == 0.9
    assert [entry["status"] for entry in callback.history] == ["cut" if small else "taken back"]
    assert checkpoints(tmp_path) == [1, 2, 3, *range(7, 13)]
    assert [len(load_plans(tmp_path / f"checkpoint-{step}")) for step in (3, 7, 12)] == [0, small, small]
    if not small:
        # The base, too, whose optimizer knows nothing of it.
        assert_same_weights(after.weights, before.weights)
        assert before.moments.keys() == after.moments.keys() != after.weights.keys()
        for key, state in before.moments.items():
            assert_same_weights(after.moments[key], state)


@pytest.mark.parametrize(
    "scores, options, status",
    [
        ((0.9, 0.89), {}, "cut"),
        ((0.9, 0.87), {}, "taken back"),
        ((0.9, 0.5), {"pragmatic_tolerance": 0.5}, "cut"),
        ((0.9, float("nan")), {}, "taken back"),
        ((-1.0, -1.01), {}, "cut"),
        ((-1.0, -1.03), {}, "taken back"),
    ],
)
def test_the_tolerance_is_relative(tmp_path, tiny, scores, options, status):
    callback = pragmatic(**options)
    trainer = pragmatic_trainer(lively(tiny.build()), tmp_path, callback, metric=Metric(*scores))
    trainer.train()
    assert [entry["status"] for entry in callback.history] == [status]
    assert trainer.model.config.state_size == (4 if status == "cut" else 8)
    assert trainer.state.global_step == 12


@pytest.mark.parametrize(
    "by_config, by_arguments, losses, status",
    [
        (None, {}, (2.0, 2.5), "taken back"),
        (None, {}, (2.0, 1.5), "cut"),
        (None, {"metric_for_best_model": "score"}, (0.5, 0.7), "cut"),
        (None, {"metric_for_best_model": "score"}, (0.7, 0.5), "taken back"),
        (None, {"metric_for_best_model": "score", "greater_is_better": False}, (0.5, 0.7), "taken back"),
        ("eval_loss", {"metric_for_best_model": "score"}, (2.0, 2.5), "taken back"),
    ],
)
def test_which_metric_and_which_way(tmp_path, tiny, monkeypatch, by_config, by_arguments, losses, status):
    metric = Metric(*losses)
    trainer = pragmatic_trainer(
        lively(tiny.build()), tmp_path, pragmatic(pragmatic_metric=by_config), metric=metric, **by_arguments
    )
    callback = next(item for item in trainer.callback_handler.callbacks if isinstance(item, CompreSSMCallback))
    if "metric_for_best_model" not in by_arguments or by_config is not None:
        # The scripted values are the loss instead.
        evaluation_loop = trainer.evaluation_loop

        def with_scripted_loss(*args, **kwargs):
            output = evaluation_loop(*args, **kwargs)
            output.metrics["eval_loss"] = output.metrics["eval_score"]
            return output

        monkeypatch.setattr(trainer, "evaluation_loop", with_scripted_loss)
    trainer.train()
    (entry,) = callback.history
    assert entry["status"] == status
    assert (entry["metric_before"], entry["metric_after"]) == losses


def checkpoints(directory) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in directory.glob("checkpoint-*"))


@pytest.mark.parametrize("score", [0.9, 0.5], ids=["the cut stays", "it is taken back"])
@pytest.mark.parametrize(
    "options, expected",
    [
        ({"save_strategy": "steps", "save_steps": 1}, [1, 2, 3, 7, 8, 9, 10, 11, 12]),
        # Due at 5, made at 7.
        ({"save_strategy": "steps", "save_steps": 5}, [7, 10, 12]),
        ({"save_strategy": "steps", "save_steps": 3}, [3, 7, 9, 12]),
        # Epochs of 6 steps: the first ends between the cut and its verdict.
        ({"save_strategy": "epoch", "data": examples(24)}, [7, 12]),
        # Every evaluation is better than the one before, and would be saved.
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1}, None),
    ],
)
def test_nothing_is_saved_between_a_cut_and_its_verdict(tiny, tmp_path, options, expected, score):
    callback = pragmatic()
    metric = Metric(0.9, score)
    if expected is None:
        metric = Metric(0.1, 0.2, 0.9, score, 0.95, 0.96, 0.97, 0.98, 0.99)
        options = options | {"metric_for_best_model": "score"}
        expected = [1, 2, 3, 8, 9, 10, 11, 12]
    trainer = pragmatic_trainer(lively(tiny.build()), tmp_path, callback, metric=metric, **options)
    trainer.train()
    assert callback.history[0]["step"] == 4
    assert callback.history[0]["status"] == ("cut" if score == 0.9 else "taken back")
    assert checkpoints(tmp_path) == expected
    for step in expected:
        folder = tmp_path / f"checkpoint-{step}"
        small = step > 4 and score == 0.9
        assert json.loads((folder / "config.json").read_text())["state_size"] == (4 if small else 8)
        assert bool(read_record(folder)) == small
        saved = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["CompreSSMCallback"]
        assert saved["attributes"]["history"] == (callback.history if step > 4 else [])


@pytest.mark.parametrize("schedule", [[11], [12 - 3]], ids=["too late for a verdict", "just in time"])
def test_the_last_checkpoint_is_saved(tiny, tmp_path, caplog, schedule):
    callback = pragmatic(schedule=schedule)
    trainer = pragmatic_trainer(
        lively(tiny.build()), tmp_path, callback, metric=Metric(0.9, 0.5), save_strategy="steps", save_steps=50
    )
    trainer.train()
    assert checkpoints(tmp_path) == [12]
    late = schedule == [11]
    assert callback.history[0]["status"] == ("cut" if late else "taken back")
    assert trainer.model.config.state_size == (4 if late else 8)
    warned = any("training ends before the cut at step 11 is evaluated" in record.message for record in caplog.records)
    assert warned == late


@pytest.mark.parametrize("score", [0.9, 0.5], ids=["the cut stays", "it is taken back"])
def test_resume_after_the_verdict(tiny, tmp_path, score):
    def trainer_of(model):
        callback = pragmatic(schedule=[4, 9])
        options = {"save_strategy": "steps", "save_steps": 8, "max_steps": 16}
        return pragmatic_trainer(model, tmp_path, callback, metric=Metric(0.9, score, 0.9), **options), callback

    whole, callback = trainer_of(lively(tiny.build()))
    whole.train()
    statuses = [entry["status"] for entry in callback.history]
    assert statuses == (["cut", "cut"] if score == 0.9 else ["taken back"])
    resumed, again = trainer_of(lively(tiny.build(seed=1)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert [entry["status"] for entry in again.history] == statuses
    assert_same_weights(weights(resumed.model), weights(whole.model))


def test_resume_before_a_cut_that_is_taken_back(tiny, tmp_path):
    def run(model, metric, checkpoint=None):
        callback = pragmatic()
        trainer = pragmatic_trainer(model, tmp_path, callback, metric=metric, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(model), callback.history[0]

    whole, _ = run(lively(tiny.build()), Metric(0.9, 0.5))
    # The metric to compare with was measured at step 3, and saved with it.
    resumed, entry = run(lively(tiny.build(seed=1)), Metric(0.5), str(tmp_path / "checkpoint-3"))
    assert (entry["status"], entry["metric_before"], entry["metric_after"]) == ("taken back", 0.9, 0.5)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize(
    "scores, best, size",
    [
        ((0.95, 0.94, 0.1), 3, 8),
        ((0.9, 0.95, 0.1), 7, 4),
        ((0.9, 0.95, 0.99), 10, 4),
        ((0.9, 0.5, 0.1), 3, 8),
    ],
)
def test_the_best_model_is_one_that_was_saved(tiny, tmp_path, scores, best, size):
    trainer = pragmatic_trainer(
        lively(tiny.build()),
        tmp_path,
        pragmatic(),
        metric=Metric(*scores),
        metric_for_best_model="score",
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=5,
        save_steps=10,
    )
    trainer.train()
    # Before the cut and at its verdict it was asked for; the one due between is not made.
    assert [entry["step"] for entry in trainer.state.log_history if "eval_score" in entry] == [3, 7, 10, 12]
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.model.config.state_size == size


def test_several_evaluation_sets(tiny, tmp_path):
    callback = pragmatic(pragmatic_metric="b_loss")
    sets = {"a": examples(4), "b": examples(4)}
    trainer = build_trainer(lively(tiny.build()), tmp_path, [callback], eval_dataset=sets, max_steps=12)
    trainer.train()
    (entry,) = callback.history
    assert entry["metric"] == "eval_b_loss" and entry["metric_after"] > 0


def test_a_metric_that_no_evaluation_has_is_an_error(tiny, tmp_path):
    callback = pragmatic(pragmatic_metric="accuracy")
    trainer = pragmatic_trainer(lively(tiny.build()), tmp_path, callback, metric=Metric(1.0))
    with pytest.raises(ValueError, match=r"'eval_accuracy' is not among the evaluation's.*eval_score"):
        trainer.train()
    assert trainer.state.global_step <= 4 and trainer.model.config.state_size == 8


def test_an_evaluation_set_is_needed(tiny, tmp_path):
    trainer = build_trainer(lively(tiny.build()), tmp_path, [pragmatic()])
    with pytest.raises(ValueError, match="pragmatic=True evaluates after a cut: give the Trainer an eval_dataset"):
        trainer.train()


def test_the_metric_is_that_of_the_small_model(tiny, tmp_path):
    # Not scripted: the evaluation's own loss, recomputed here from the weights of that moment.
    callback = pragmatic(pragmatic_metric=None, pragmatic_tolerance=10.0)
    data = examples(4)
    losses = {}

    def evaluate(model, state, **_) -> None:
        model.eval()
        with torch.no_grad():
            losses[state.global_step] = model(**{key: torch.stack([x[key] for x in data]) for key in data[0]}).loss
        model.train()

    trainer = build_trainer(
        lively(tiny.build()), tmp_path, [AtStepEnd([3, 7], evaluate), callback], eval_dataset=data, max_steps=12
    )
    trainer.train()
    (entry,) = callback.history
    assert entry["status"] == "cut"
    assert entry["metric_before"] == pytest.approx(losses[3].item(), rel=1e-5)
    assert entry["metric_after"] == pytest.approx(losses[7].item(), rel=1e-5)


@pytest.mark.parametrize("target", [4, [3, 8]], ids=["one size", "a size for each layer"])
@pytest.mark.parametrize("verdict", ["taken back", "cut"])
def test_the_verdict_on_a_projected_cut(tmp_path, verdict, target):
    tiny = TINY["mamba2"]
    model, stock = lively(tiny.build()), tiny.build().config.to_dict()
    before, after, end = Moments(4, "step"), Moments(7, "evaluation"), Moments(12, "step")
    callback = pragmatic(state_size=target, realization="projected")
    metric = Metric(0.9, 0.5 if verdict == "taken back" else 0.9)
    options = {"weight_decay": 0.1, "save_strategy": "steps", "save_steps": 2}
    trainer = pragmatic_trainer(model, tmp_path, before, callback, after, end, metric=metric, **options)
    trainer.train()
    assert [entry["status"] for entry in callback.history] == [verdict]
    assert [row[0] for row in log_rows(trainer)] == list(range(1, 13))
    held = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    if verdict == "taken back":
        assert_same_weights(after.weights, before.weights)
        assert before.moments.keys() == after.moments.keys()
        for name, state in before.moments.items():
            assert_same_weights(after.moments[name], state)
        assert type(model) is tiny.language_model and model.config.to_dict().keys() == stock.keys()
    else:
        assert end.weights.keys() - before.weights.keys() == {
            f"backbone.layers.{layer}.mixer.{name}_projection" for layer in (0, 1) for name in "BC"
        }
    resumed = pragmatic_trainer(
        tiny.build(seed=1),
        tmp_path,
        pragmatic(state_size=target, realization="projected"),
        metric=Metric(0.9, 0.5 if verdict == "taken back" else 0.9),
        **options,
    )
    # Between the cut and its verdict nothing was saved.
    assert not (tmp_path / "checkpoint-6").exists()
    for step in (2, 8):
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_weights(weights(resumed.model), weights(model))
