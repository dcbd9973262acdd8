"""Checkpoints across a cut: what is saved, who can load it, and resuming on either side of the cut."""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MAMBA1_FAMILY, TINY, lively, selection_plan, tokens
from torch import nn
from training import (
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
from transformers import AutoModelForCausalLM, Trainer

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    compress,
    compress_,
    find_mixers,
    read_record,
    resize_while_loading,
    write_record,
)
from hf_compressm.checkpoint import load_inputs, save_inputs, stop_resizing_while_loading
from hf_compressm.mixers.resize import resize_mixer, update_configs

TESTS = Path(__file__).parent


def small_and_full(tiny) -> tuple[nn.Module, nn.Module]:
    """A model that was cut from 8 states to 3, and one of the script that still builds 8."""
    small = lively(tiny.build())
    compress_(small, selection_plan(small, [0, 2, 7]))
    return small, tiny.build(seed=1)


# Loading weights of another size.


@pytest.mark.parametrize("direction", ["smaller", "larger"])
def test_weights_of_another_size_are_loaded(tiny, direction):
    source, target = small_and_full(tiny)
    if direction == "larger":
        source, target = lively(tiny.build(2)), source
    resized = []
    resize_while_loading(target, lambda mixer, pairs: resized.extend(pairs))
    assert target.load_state_dict(source.state_dict()).missing_keys == []
    assert_same_weights(weights(target), weights(source))
    assert target.config.state_size == source.config.state_size == (3 if direction == "smaller" else 8)
    assert torch.equal(target.eval()(tokens()).logits, source.eval()(tokens()).logits)
    # The attributes that the forward pass and torch read followed.
    for ours, theirs in zip(target.modules(), source.modules(), strict=True):
        for name in ("ssm_state_size", "conv_dim", "in_features", "out_features", "in_channels", "groups"):
            assert getattr(ours, name, None) == getattr(theirs, name, None)
    axes = [axis for mixer in find_mixers(target).values() for axis in mixer.layout.state_axes(mixer.module)]
    assert [id(new) for _, new in resized] == [id(axis.tensor) for axis in axes]


def test_weights_of_the_same_size_change_nothing_else(tiny):
    model = tiny.build()
    before = list(model.parameters())
    resize_while_loading(model, lambda mixer, pairs: pytest.fail("nothing had to be resized"))
    model.load_state_dict(lively(tiny.build(1)).state_dict())
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))


def test_weights_may_come_in_parts(tiny):
    small, full = small_and_full(tiny)
    resize_while_loading(full)
    state = list(small.state_dict().items())
    for part in (state[0::3], state[1::3], state[2::3]):
        full.load_state_dict(dict(part), strict=False)
    assert_same_weights(weights(full), weights(small))


def test_marks_and_frozenness_of_parameters_survive(tiny):
    small, full = small_and_full(tiny)
    mixer = next(iter(find_mixers(full).values()))
    axis = mixer.layout.state_axes(mixer.module)[0]
    axis.tensor.requires_grad_(False)
    axis.tensor._no_weight_decay = True
    resize_while_loading(full)
    full.load_state_dict(small.state_dict())
    assert axis.tensor.shape[axis.dim] < axis.length(8)
    assert not axis.tensor.requires_grad and axis.tensor._no_weight_decay


def test_foreign_weights_are_left_to_torchs_own_error(tiny):
    model = tiny.build()
    resize_while_loading(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wider = tiny.build(**({"hidden_size": 32} | ({"num_heads": 8} if "num_heads" in tiny.options else {})))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(wider.state_dict())
    # Parameters of one mixer that mean different state sizes: no mixer has them.
    state = lively(tiny.build()).state_dict()
    name = next(name for name in state if "0.mixer" in name and name.endswith(("x_proj.weight", "conv1d.weight")))
    state[name] = state[name][:-4]
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict(state)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == shapes
    assert model.config.state_size == 8


def test_without_the_hooks_another_size_is_an_error_again(tiny):
    small, full = small_and_full(tiny)

    def hooks() -> list[int]:
        return [len(module._load_state_dict_pre_hooks) for module in full.modules()]

    before = hooks()
    resize_while_loading(full)
    resize_while_loading(full)
    assert sum(hooks()) == sum(before) + 2
    stop_resizing_while_loading(full)
    assert hooks() == before
    with pytest.raises(RuntimeError, match="size mismatch"):
        full.load_state_dict(small.state_dict())


def test_a_copy_of_a_model_resizes_itself(tiny):
    small, full = small_and_full(tiny)
    resize_while_loading(full)
    twin = copy.deepcopy(full)
    twin.load_state_dict(small.state_dict())
    assert_same_weights(weights(twin), weights(small))
    assert (twin.config.state_size, full.config.state_size) == (3, 8)
    assert {mixer.state_size for mixer in find_mixers(full).values()} == {8}


def test_resize_mixer_round_trip(tiny):
    model = tiny.build()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for mixer in find_mixers(model).values():
        resize_mixer(mixer, 3)
    update_configs(model)
    assert model.config.state_size == 3
    model(tokens())
    for mixer in find_mixers(model).values():
        resize_mixer(mixer, 8)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == shapes


# Architectures whose B and C are normalised, or that have heads. Without experts: the Trainer does not find those that
# it saved, since Transformers renames them.
RELATIVES = {name: MAMBA1_FAMILY[name] for name in ("falcon_mamba", "jamba", "zamba")}
RELATIVES["jamba"] = RELATIVES["jamba"].but(num_experts=1)


@pytest.fixture(params=list(RELATIVES))
def relative(request):
    """Each of them in turn."""
    return RELATIVES[request.param]


def numbers(model: nn.Module) -> list[dict[str, float]]:
    """Every number that is an attribute of a module."""
    return [
        {key: value for key, value in vars(module).items() if isinstance(value, (int, float))}
        for module in model.modules()
    ]


@pytest.mark.parametrize("direction", ["smaller", "larger"])
def test_relatives_load_weights_of_another_size(relative, direction):
    small, full = lively(relative.build()), lively(relative.build(seed=1))
    compress(small, [tokens(8, 24)], CompreSSMConfig(state_size=3))
    source, target = (small, full) if direction == "smaller" else (full, small)
    other = {name: value.clone() for name, value in target.state_dict().items()}
    resize_while_loading(target)
    state = list(source.state_dict().items())
    for parts in ([state], [state[0::3], state[1::3], state[2::3]]):
        for part in parts:
            target.load_state_dict(dict(part), strict=False)
        assert_same_weights(weights(target), weights(source))
        # Falcon-Mamba's norms have buffers of N ones that are in no checkpoint.
        assert_same_weights(dict(target.named_buffers()), dict(source.named_buffers()))
        assert numbers(target.eval()) == numbers(source.eval())
        assert torch.equal(target(tokens()).logits, source(tokens()).logits)
        assert target.config.to_dict() == source.config.to_dict()
        # From another size again.
        target.load_state_dict(other)


# The record.


def test_record_round_trip(tmp_path):
    history = [{"status": "skipped", "step": 3, "reason": "of ε"}, {"status": "cut", "step": 5, "layers": []}]
    file = write_record(history, tmp_path / "new")
    assert file == tmp_path / "new" / "compressm.json"
    assert read_record(tmp_path / "new") == history
    content = json.loads(file.read_text())
    assert content["format_version"] == 1
    assert content["versions"]["torch"] == torch.__version__
    assert set(content["versions"]) == {"hf-compressm", "torch", "transformers", "accelerate"}


@pytest.mark.parametrize(
    "content, match",
    [
        (b'{"format_version": 1, "cuts": [', "not a record of cuts.*JSONDecodeError"),
        (b"\xff\xfe\x00", "not a record of cuts.*UnicodeDecodeError"),
        (b"", "not a record of cuts"),
        (b"[]", "not a record of cuts.*TypeError"),
        (b'{"cuts": []}', "not a record of cuts.*KeyError.*format_version"),
        (b'{"format_version": 1}', "not a record of cuts.*KeyError.*cuts"),
        (b'{"format_version": 2, "cuts": []}', "record format 2, but this version reads 1"),
        (b'{"format_version": 1, "cuts": 3}', "lists cuts, each with its status"),
        (b'{"format_version": 1, "cuts": [{"step": 3}]}', "lists cuts, each with its status"),
    ],
)
def test_broken_records(tmp_path, content, match):
    (tmp_path / "compressm.json").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_record(tmp_path)


def test_a_missing_record(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"compressm\.json"):
        read_record(tmp_path)


# Recorded inputs.


def test_inputs_round_trip(tmp_path):
    batches = [
        {"input_ids": tokens(), "use_cache": False, "num_items_in_batch": torch.tensor(7), "nothing": None},
        {"inputs_embeds": torch.randn(2, 3, 4).to(torch.bfloat16).transpose(0, 1), "name.with.dots": tokens(seed=1)},
    ]
    for rank in (0, 1):
        save_inputs(batches[rank:], tmp_path, rank)
    for rank in (0, 1):
        loaded = load_inputs(tmp_path, rank)
        assert len(loaded) == 2 - rank
        for ours, theirs in zip(loaded, batches[rank:], strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                same = torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value
                assert same, key
    assert load_inputs(tmp_path, 2) is None


def test_a_truncated_file_of_inputs_is_left_alone(tmp_path, caplog):
    save_inputs([{"input_ids": tokens()}], tmp_path, 0)
    file = tmp_path / "compressm_inputs_0.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert load_inputs(tmp_path, 0) is None
    assert any("is not complete" in record.message for record in caplog.records)


# What a Trainer saves.


def with_shards(model: nn.Module) -> nn.Module:
    """The Trainer has no argument for it: the model saves itself in many small files."""
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="4KB")
    return model


# The cut is due at step 8 and wants three batches: inputs are recorded from step 4 on.
CUT, STEPS = 8, 12


def saving_trainer(
    model: nn.Module, directory: Path, *callbacks, cut: dict | None = None, **options
) -> tuple[Trainer, CompreSSMCallback]:
    callback = CompreSSMCallback(config(**({"schedule": [CUT], "calibration_tokens": 3 * 48} | (cut or {}))))
    defaults = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "warmup_steps": 2}
    return build_trainer(model, directory, [callback, *callbacks], **(defaults | options)), callback


LOAD_WITHOUT_US = """
import json, sys, torch
from transformers import AutoModelForCausalLM
logits = []
for directory in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    logits.append([model.config.state_size, model.eval()(torch.arange(1, 13)[None]).logits.tolist()])
assert not any(name.startswith("hf_compressm") for name in sys.modules)
print(json.dumps(logits))
"""


def test_every_checkpoint_loads_in_plain_transformers(tmp_path):
    expected, folders = [], []
    for name, tiny in TINY.items():
        for kind in ("whole", "sharded"):
            directory = tmp_path / f"{name}-{kind}"
            model = lively(tiny.build())
            logits = {}

            def look(model, state, logits=logits, **_) -> None:
                with torch.no_grad():
                    output = model.eval()(torch.arange(1, 13)[None]).logits
                logits[state.global_step] = (model.config.state_size, output)

            steps = [CUT - 1, CUT, STEPS]
            if kind == "sharded":
                with_shards(model)
            trainer, _ = saving_trainer(model, directory, AtStepEnd(steps, look))
            trainer.train()
            for step in steps:
                folders.append(directory / f"checkpoint-{step}")
                expected.append(logits[step])
                assert (folders[-1] / "model.safetensors.index.json").exists() == (kind == "sharded")
    output = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_US, *map(str, folders)], capture_output=True, text=True, check=True
    )
    loaded = json.loads(output.stdout.splitlines()[-1])
    assert [size for size, _ in loaded] == [size for size, _ in expected] == [8, 4, 4] * 4
    for (_, ours), (_, theirs) in zip(loaded, expected, strict=True):
        assert torch.allclose(torch.tensor(ours), theirs, atol=1e-6)


def test_what_lies_beside_the_weights(tiny, tmp_path):
    trainer, callback = saving_trainer(lively(tiny.build()), tmp_path)
    trainer.train()
    for step in range(1, STEPS + 1):
        folder = tmp_path / f"checkpoint-{step}"
        small = step >= CUT
        assert json.loads((folder / "config.json").read_text())["state_size"] == (4 if small else 8)
        # Before the cut, the record only tells which parameters the optimizer's positions belong to.
        assert read_record(folder) == (callback.history if small else [])
        groups = json.loads((folder / "compressm.json").read_text())["optimizer_parameters"]
        named = dict(trainer.model.named_parameters())
        assert sorted(name for group in groups for name in group) == sorted(named) and len(groups) == 2
        # Inputs are only there while a cut is soon due.
        assert (folder / "compressm_inputs_0.safetensors").exists() == (4 <= step < CUT)
    (cut,) = read_record(tmp_path)
    assert (cut["status"], cut["step"], cut["scheduled_step"], cut["tokens"]) == ("cut", CUT, CUT, 3 * 48)
    assert [layer["name"] for layer in cut["layers"]] == list(find_mixers(trainer.model))
    for layer in cut["layers"]:
        assert (layer["state_size_before"], layer["state_size_after"], layer["status"]) == (8, 4, "cut")
        assert all(len(set(row)) == 4 and set(row) < set(range(8)) for row in layer["kept"])
        assert layer["criterion"] in ("refit", "ghost") and layer["refit"] and layer["relative_error"] > 0
    trainer.save_model(str(tmp_path / "final"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").config.state_size == 4


# Resuming, with the script that builds the full-size model.


def kept_states(callback: CompreSSMCallback) -> list:
    return [(entry["step"], [layer["kept"] for layer in entry["layers"]]) for entry in callback.history]


def assert_same_run(ours: tuple[Trainer, CompreSSMCallback], theirs: tuple[Trainer, CompreSSMCallback]) -> None:
    """Bit for bit: weights, moments, the log, the config, and what the cut was decided to be."""
    assert kept_states(ours[1]) == kept_states(theirs[1]) != []
    assert_same_weights(weights(ours[0].model), weights(theirs[0].model))
    expected = moments(theirs[0].model, theirs[0].optimizer)
    for name, state in moments(ours[0].model, ours[0].optimizer).items():
        assert_same_weights(state, expected[name])
    assert log_rows(ours[0]) == log_rows(theirs[0])
    for name in ("model_type", "state_size", "feature_size", "state_ranks", "auto_map"):
        assert getattr(ours[0].model.config, name, None) == getattr(theirs[0].model.config, name, None)
    assert type(ours[0].model) is type(theirs[0].model)
    assert min(mixer.state_size for mixer in find_mixers(ours[0].model).values()) < 8


RESUMED_RUNS = {
    "plain": {},
    "SGD with momentum": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})},
    "Adafactor": {"optim": "adafactor"},
    "accumulation over epochs": {"gradient_accumulation_steps": 2, "data": examples(38)},
    "ragged": {"data": ragged_examples(), "data_collator": pad},
    "callback states restored": {"restore_callback_states_from_checkpoint": True},
}


@pytest.mark.parametrize("kind", RESUMED_RUNS)
def test_resume_on_either_side_of_the_cut(tiny, tmp_path, kind):
    options = RESUMED_RUNS[kind]
    whole = saving_trainer(lively(tiny.build()), tmp_path, **options)
    whole[0].train()
    # Before the inputs are recorded, and the last step of that; while they are; just before, after and long after.
    for step in (1, 3, 6, CUT - 1, CUT, STEPS - 1):
        trainer, callback = saving_trainer(tiny.build(seed=1), tmp_path / "resumed", save_strategy="no", **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        if kind == "callback states restored":
            # The Trainer has put a new instance into the callback's place.
            (callback,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, CompreSSMCallback))
        assert trainer._initial_global_step == step
        assert_same_run((trainer, callback), whole)


def test_resume_from_the_last_checkpoint_in_the_same_folder(tiny, tmp_path):
    whole = saving_trainer(lively(tiny.build()), tmp_path / "whole", save_strategy="no")
    whole[0].train()

    def stop(control, **_) -> None:
        control.should_training_stop = True

    for step in (6, 9):
        directory = tmp_path / str(step)
        saving_trainer(lively(tiny.build()), directory, AtStepEnd(step, stop), save_steps=3)[0].train()
        resumed = saving_trainer(tiny.build(seed=1), directory)
        resumed[0].train(resume_from_checkpoint=True)
        assert resumed[0]._initial_global_step == step
        assert_same_run(resumed, whole)


@pytest.mark.parametrize("where", ["named", "in the output folder"])
def test_resume_from_a_checkpoint_that_was_moved(tiny, tmp_path, where):
    whole = saving_trainer(lively(tiny.build()), tmp_path / "old", save_steps=6)
    whole[0].train()
    (tmp_path / "old").rename(tmp_path / "moved")
    checkpoint = str(tmp_path / "moved" / "checkpoint-6")
    options = {"resume_from_checkpoint": checkpoint} if where == "named" else {}
    directory = tmp_path / ("new" if where == "named" else "moved")
    resumed = saving_trainer(tiny.build(seed=1), directory, save_strategy="no", **options)
    resumed[0].train(resume_from_checkpoint=checkpoint)
    assert_same_run(resumed, whole)


def test_resume_in_the_same_trainer(tiny, tmp_path):
    whole = saving_trainer(lively(tiny.build()), tmp_path)
    whole[0].train()
    expected = weights(whole[0].model), kept_states(whole[1])
    held = whole[0].optimizer
    # Its model is small by now: larger weights, smaller ones, and larger ones again.
    for step in (6, CUT, 2, STEPS - 1):
        whole[0].train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_weights(weights(whole[0].model), expected[0])
        assert kept_states(whole[1]) == expected[1]
        assert whole[0].optimizer is held
        parameters = {id(parameter) for group in held.param_groups for parameter in group["params"]}
        assert parameters == {id(parameter) for parameter in whole[0].model.parameters()}


def test_resume_from_shards(tiny, tmp_path):
    whole = saving_trainer(with_shards(lively(tiny.build())), tmp_path)
    whole[0].train()
    for step in (6, CUT):
        assert len(list((tmp_path / f"checkpoint-{step}").glob("model-*.safetensors"))) > 2
        resumed = saving_trainer(tiny.build(seed=1), tmp_path, save_strategy="no")
        resumed[0].train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)


def test_resume_between_two_cuts(tiny, tmp_path):
    def trainer_of(model, **options):
        callback = CompreSSMCallback(config(schedule=[3, 7]))
        options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5} | options
        return build_trainer(model, tmp_path, [callback], **options), callback

    whole = trainer_of(lively(tiny.build()))
    whole[0].train()
    resumed = trainer_of(tiny.build(seed=1), save_strategy="no")
    resumed[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [step for step, _ in kept_states(resumed[1])] == [3, 7]
    assert_same_run(resumed, whole)


def test_resume_a_run_that_had_no_callback(tiny, tmp_path):
    # Steps before the checkpoint were made without it; half of the states do nothing, so the cut shows nothing.
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": STEPS}
    plain = build_trainer(silenced(tiny), tmp_path / "plain", **options)
    plain.train()
    trainer, callback = saving_trainer(tiny.build(seed=1), tmp_path / "ours", save_steps=4, warmup_steps=0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))
    assert [entry["step"] for entry in callback.history] == [CUT]
    ours, theirs = log_rows(trainer), log_rows(plain)
    assert [row[1] for row in ours] == pytest.approx([row[1] for row in theirs], rel=1e-5)
    saved = json.loads((tmp_path / "ours" / "checkpoint-8" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["history"] == callback.history


def test_relatives_resume_on_either_side_of_the_cut(relative, tmp_path):
    whole = saving_trainer(lively(relative.build()), tmp_path)
    whole[0].train()
    for step in (3, CUT - 1, CUT, STEPS - 1):
        resumed = saving_trainer(relative.build(seed=1), tmp_path / "resumed", save_strategy="no")
        resumed[0].train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)
    # Its model is small by now.
    expected, held = weights(whole[0].model), whole[0].optimizer
    for step in (3, CUT):
        whole[0].train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_weights(weights(whole[0].model), expected)
        assert whole[0].optimizer is held


@pytest.mark.parametrize("best", [CUT - 2, CUT + 2])
def test_the_best_of_relatives_is_loaded_at_the_end(relative, tmp_path, best):
    scores = (float(step == best) for step in range(2, STEPS + 1, 2))
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "eval_dataset": examples(4)}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    trainer, callback = saving_trainer(
        lively(relative.build()), tmp_path, compute_metrics=lambda _: {"score": next(scores)}, **options
    )
    trainer.train()
    assert trainer.state.best_global_step == best
    assert [entry["status"] for entry in callback.history] == ["undone by loading" if best < CUT else "cut"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert {mixer.state_size for mixer in find_mixers(saved).values()} == {8 if best < CUT else 4}
    assert_same_weights(weights(trainer.model), weights(saved))
    assert_same_weights(dict(trainer.model.named_buffers()), dict(saved.named_buffers()))
    assert torch.equal(trainer.model.eval()(tokens()).logits, saved.eval()(tokens()).logits)


KILLED_RUN = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from conftest import TINY, lively
from test_checkpoint import saving_trainer
from transformers import TrainerCallback

class Killer(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        # The cut's own log: the model is small, and nothing of it was saved yet.
        if "compressm/state_size" in logs:
            os.kill(os.getpid(), signal.SIGKILL)

saving_trainer(lively(TINY[sys.argv[1]].build()), sys.argv[2], Killer(), save_steps=5)[0].train()
"""


def test_a_run_that_was_killed_right_after_the_cut_is_resumed(tiny, tmp_path):
    name = next(name for name, row in TINY.items() if row is tiny)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, name, str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-5"]
    whole = saving_trainer(lively(tiny.build()), tmp_path / "whole", save_strategy="no")
    whole[0].train()
    resumed = saving_trainer(tiny.build(seed=1), tmp_path / "killed", save_steps=5)
    resumed[0].train(resume_from_checkpoint=True)
    assert resumed[0]._initial_global_step == 5
    assert_same_run(resumed, whole)


# Projected cuts of Mamba-2.

MAMBA2 = TINY["mamba2"]


def projected(size: int | list[int] = 3, seed: int = 0, **options) -> nn.Module:
    """A model after a projected cut; with one size for both layers, unless it is a list."""
    model = lively(MAMBA2.build(seed, **options))
    sizes = size if isinstance(size, list) else [size] * len(find_mixers(model))
    compress(model, [tokens(8, 24)], CompreSSMConfig(state_size=sizes, realization="projected"))
    return model


def stock(size: int = 8) -> nn.Module:
    """What a script builds: other weights, in training mode."""
    return MAMBA2.build(seed=1, state_size=size)


def cut_first(model: nn.Module) -> nn.Module:
    """A stock cut from 8 states to 6."""
    compress_(model, selection_plan(model, [0, 1, 2, 4, 5, 7]))
    return model


JOURNEYS = {
    "stock into projected": (lambda: lively(MAMBA2.build()), lambda: projected(seed=1)),
    "projected into stock": (projected, stock),
    "sizes of their own into stock": (lambda: projected([2, 5]), stock),
    "fewer states": (lambda: projected(2), lambda: projected(5, seed=1)),
    "more states": (lambda: projected(5), lambda: projected([2, 3], seed=1)),
    "sizes of their own into others": (lambda: projected([2, 5]), lambda: projected([5, 2], seed=1)),
    "projected after a stock cut into stock": (lambda: projected(state_size=6), stock),
    "projected into stock after a cut": (projected, lambda: cut_first(stock())),
    "small stock into projected": (lambda: cut_first(lively(MAMBA2.build())), lambda: projected(seed=1)),
    "projected by all of its states": (lambda: projected([8, 3]), stock),
}


@pytest.mark.parametrize("journey", JOURNEYS)
def test_projected_weights_are_loaded_in_either_direction(journey):
    source, target = (build() for build in JOURNEYS[journey])
    resized = []
    resize_while_loading(target, lambda mixer, pairs: resized.extend(pairs))
    before = {id(parameter) for parameter in target.parameters()}
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert_same_weights(weights(target), weights(source))
    assert list(weights(target)) == list(weights(source))
    assert type(target) is type(source) and type(target.config) is type(source.config)
    assert target.config.to_dict() == source.config.to_dict()
    assert target.backbone.config is target.config
    for ours, theirs in zip(target.modules(), source.modules(), strict=True):
        assert type(ours) is type(theirs)
        for name in ("ssm_state_size", "feature_size", "conv_dim", "out_features", "in_channels", "groups"):
            assert getattr(ours, name, None) == getattr(theirs, name, None)
    assert torch.equal(target.eval()(tokens()).logits, source.eval()(tokens()).logits)
    # What is reported makes the old parameters the new ones.
    removed = {id(old) for old, _ in resized if old is not None}
    added = {id(new) for _, new in resized if new is not None}
    assert before - removed | added - removed == {id(parameter) for parameter in target.parameters()}


PARTS = {
    "in order": lambda keys: [keys[i : i + 3] for i in range(0, len(keys), 3)],
    "backwards": lambda keys: [keys[i : i + 3] for i in range(0, len(keys), 3)][::-1],
    "one by one": lambda keys: [[key] for key in keys],
    "one by one, backwards": lambda keys: [[key] for key in keys[::-1]],
    "in two halves": lambda keys: [keys[: len(keys) // 2], keys[len(keys) // 2 :]],
    "in two halves, backwards": lambda keys: [keys[len(keys) // 2 :], keys[: len(keys) // 2]],
    "projections last": lambda keys: [
        [key for key in keys if "projection" not in key],
        [key for key in keys if "projection" in key],
    ],
}


@pytest.mark.parametrize("split", PARTS)
@pytest.mark.parametrize(
    "journey",
    ["stock into projected", "projected into stock", "fewer states", "sizes of their own into others"],
)
def test_projected_weights_may_come_in_parts(journey, split):
    """As from a checkpoint of several files, which Transformers reads in any order."""
    source, target = (build() for build in JOURNEYS[journey])
    resize_while_loading(target)
    state = source.state_dict()
    # Twice: what was seen of the first checkpoint says nothing about the second.
    for _ in range(2):
        for part in PARTS[split](list(state)):
            target.load_state_dict({key: state[key] for key in part}, strict=False)
        assert_same_weights(weights(target), weights(source))
        assert type(target) is type(source) and target.config.to_dict() == source.config.to_dict()
    assert torch.equal(target.eval()(tokens()).logits, source.eval()(tokens()).logits)


def test_projected_weights_of_the_same_sizes_change_nothing_else():
    model = projected([2, 5])
    before = list(model.parameters())
    resize_while_loading(model, lambda mixer, pairs: pytest.fail("nothing had to be resized"))
    model.load_state_dict(projected([2, 5], seed=1).state_dict())
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))


def test_frozen_mixers_stay_frozen_when_they_become_projected():
    model = stock()
    model.backbone.layers[0].requires_grad_(False)
    resize_while_loading(model)
    model.load_state_dict(projected().state_dict())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("layers.0" not in name)


def spoiled(change) -> dict[str, torch.Tensor]:
    state = projected().state_dict()
    change(state, "backbone.layers.1.mixer.")
    return state


FOREIGN = {
    "an odd number of columns": (
        lambda state, mixer: state.update({f"{mixer}B_projection": torch.zeros(8, 5)}),
        "size mismatch|Unexpected key",
    ),
    "other features": (
        lambda state, mixer: state.update({f"{mixer}B_projection": torch.zeros(7, 6)}),
        "size mismatch|Unexpected key",
    ),
    "one matrix of another size": (
        lambda state, mixer: state.update({f"{mixer}C_projection": torch.zeros(8, 8)}),
        "size mismatch for backbone.layers.1.mixer.C_projection",
    ),
    "one matrix is missing": (
        lambda state, mixer: state.pop(f"{mixer}C_projection"),
        "Missing key.*backbone.layers.1.mixer.C_projection",
    ),
}


@pytest.mark.parametrize("target", ["stock", "projected"])
@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_projections_are_left_to_torchs_own_error(case, target):
    change, message = FOREIGN[case]
    model = stock() if target == "stock" else projected(2, seed=1)
    resize_while_loading(model)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(spoiled(change))


def test_resize_mixer_round_trip_through_a_projection():
    model = stock()
    before = weights(model)
    for mixer in find_mixers(model).values():
        pairs = resize_mixer(mixer, 3, 8)
        assert [old is None for old, _ in pairs] == [True, True]
    update_configs(model)
    assert (model.config.state_size, model.config.feature_size) == (3, 8)
    model(tokens())
    with pytest.raises(ValueError, match=r"layers\.0\.mixer: its states are projections of 8 features; .* take on 7"):
        resize_mixer(find_mixers(model)["backbone.layers.0.mixer"], 3, 7)
    for mixer in find_mixers(model).values():
        pairs = resize_mixer(mixer, 8)
        assert [new is None for _, new in pairs] == [True, True]
    update_configs(model)
    assert_same_weights(weights(model), before)
    assert model.config.to_dict() == stock().config.to_dict() and type(model) is MAMBA2.language_model


PROJECTED_RUNS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "SGD with momentum": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})},
    "Adafactor": {"optim": "adafactor"},
    "fused AdamW": {"optim": "adamw_torch_fused", "weight_decay": 0.1},
    "accumulation over epochs": {"gradient_accumulation_steps": 2, "data": examples(38)},
    "ragged": {"data": ragged_examples(), "data_collator": pad},
    "callback states restored": {"restore_callback_states_from_checkpoint": True},
    "sizes of their own": {"cut": {"state_size": [3, 8]}},
    "a budget": {"cut": {"state_bytes": 9 * 128}},
    "a tolerance": {"cut": {"tolerance": 0.5}},
    "two cuts": {"cut": {"schedule": [4, CUT], "calibration_tokens": 48}},
    "whatever auto chooses": {"cut": {"state_size": 7, "realization": "auto"}},
}


@pytest.mark.parametrize("kind", PROJECTED_RUNS)
def test_resume_a_projected_run_on_either_side_of_the_cut(tmp_path, kind):
    options = dict(PROJECTED_RUNS[kind])
    options["cut"] = {"realization": "projected"} | options.get("cut", {})
    whole = saving_trainer(lively(MAMBA2.build()), tmp_path, **options)
    whole[0].train()
    for step in (1, 6, CUT - 1, CUT, STEPS - 1):
        trainer, callback = saving_trainer(stock(), tmp_path / "resumed", save_strategy="no", **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        if kind == "callback states restored":
            (callback,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, CompreSSMCallback))
        assert trainer._initial_global_step == step
        assert_same_run((trainer, callback), whole)


def test_resume_a_projected_run_from_shards(tmp_path):
    cut = {"realization": "projected"}
    whole = saving_trainer(with_shards(lively(MAMBA2.build())), tmp_path, cut=cut)
    whole[0].train()
    for step in (6, CUT, STEPS - 1):
        assert len(list((tmp_path / f"checkpoint-{step}").glob("model-*.safetensors"))) > 2
        resumed = saving_trainer(stock(), tmp_path, cut=cut, save_strategy="no")
        resumed[0].train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)
        # And into the model that is projected by now.
        resumed[0].train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_weights(weights(resumed[0].model), weights(whole[0].model))


def test_resume_a_projected_run_in_the_same_trainer(tmp_path):
    options = {"cut": {"realization": "projected", "schedule": [4, CUT], "calibration_tokens": 48}}
    whole = saving_trainer(lively(MAMBA2.build()), tmp_path, weight_decay=0.1, **options)
    whole[0].train()
    expected, held = weights(whole[0].model), whole[0].optimizer
    groups = [[id(parameter) for parameter in group["params"]] for group in held.param_groups]
    names = {id(parameter): name for name, parameter in whole[0].model.named_parameters()}
    order = [[names[key] for key in group] for group in groups]
    # Its model is projected by now: stock weights, projected ones of either size, and stock ones again.
    for step in (6, 2, CUT, 3, STEPS - 1):
        whole[0].train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_weights(weights(whole[0].model), expected)
        assert whole[0].optimizer is held
        names = {id(parameter): name for name, parameter in whole[0].model.named_parameters()}
        assert [[names[id(parameter)] for parameter in group["params"]] for group in held.param_groups] == order


def test_projected_checkpoints_load_by_the_auto_classes(tmp_path):
    sizes = [3, 6]
    logits = {}

    def look(model, state, **_) -> None:
        with torch.no_grad():
            logits[state.global_step] = model.eval()(torch.arange(1, 13)[None]).logits

    cut = {"realization": "projected", "state_size": sizes}
    trainer, callback = saving_trainer(
        lively(MAMBA2.build()), tmp_path, AtStepEnd([CUT - 1, CUT, STEPS], look), cut=cut
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for step in (CUT - 1, CUT, STEPS):
        folders = [tmp_path / f"checkpoint-{step}"] + ([tmp_path / "final"] if step == STEPS else [])
        for folder in folders:
            model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            small = step >= CUT
            assert type(model).__name__ == ("CompressmMamba2ForCausalLM" if small else "Mamba2ForCausalLM")
            assert [mixer.state_size for mixer in find_mixers(model).values()] == (sizes if small else [8, 8])
            assert torch.equal(model.eval()(torch.arange(1, 13)[None]).logits, logits[step])
    (cut,) = read_record(tmp_path)
    assert cut == json.loads(json.dumps(callback.history[0]))
    for layer, size in zip(cut["layers"], sizes, strict=True):
        assert (layer["realization"], layer["kept"], layer["state_size_after"]) == ("projected", None, size)
        assert layer["criterion"] == "balanced truncation" and set(layer["expected_errors"]) == {"stock", "projected"}
        assert [len(values) for values in layer["hankel_values"]] == [8, 8]


def test_a_projected_run_goes_on_from_its_own_checkpoint(tmp_path):
    """The script may also build the model by from_pretrained; its history tells that the target is reached."""
    cut = {"realization": "projected", "state_size": [3, 6]}
    whole = saving_trainer(lively(MAMBA2.build()), tmp_path, cut=cut)
    whole[0].train()
    checkpoint = tmp_path / f"checkpoint-{CUT + 2}"
    built = AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed = saving_trainer(built, tmp_path / "resumed", cut=cut, save_strategy="no")
    resumed[0].train(resume_from_checkpoint=str(checkpoint))
    assert_same_run(resumed, whole)
