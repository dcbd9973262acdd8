"""Checkpoints across a cut: what is saved, who can load it, and resuming on either side of the cut."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, lively, selection_plan, tokens
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

from hf_compressm import CompreSSMCallback, compress_, find_mixers, read_record, resize_while_loading, write_record
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


def saving_trainer(model: nn.Module, directory: Path, *callbacks, **options) -> tuple[Trainer, CompreSSMCallback]:
    callback = CompreSSMCallback(config(schedule=[CUT], calibration_tokens=3 * 48))
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
        assert (folder / "compressm.json").exists() == small
        # Inputs are only there while a cut is soon due.
        assert (folder / "compressm_inputs_0.safetensors").exists() == (4 <= step < CUT)
        if small:
            assert read_record(folder) == callback.history
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
    """Bit for bit: weights, moments, the log, and what the cut was decided to be."""
    assert kept_states(ours[1]) == kept_states(theirs[1]) != []
    assert_same_weights(weights(ours[0].model), weights(theirs[0].model))
    expected = moments(theirs[0].model, theirs[0].optimizer)
    for name, state in moments(ours[0].model, ours[0].optimizer).items():
        assert_same_weights(state, expected[name])
    assert log_rows(ours[0]) == log_rows(theirs[0])
    assert ours[0].model.config.state_size == theirs[0].model.config.state_size == 4


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
