"""A model remembers its cuts, and whoever saves it saves them."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TINY, lively, tokens
from training import build_trainer, config, examples

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    Compressor,
    Record,
    compress,
    compress_,
    measure,
    plan_compression,
)
from hf_compressm.provenance import load_plans, plans_of, record_of, save_provenance


def cut(tiny, *sizes: int):
    model = lively(tiny.build())
    original = copy.deepcopy(model)
    for size in sizes:
        compress(model, [tokens()], CompreSSMConfig(state_size=size))
    return original, model


def test_an_uncut_model_remembers_nothing(tiny, tmp_path):
    model = tiny.build()
    assert record_of(model).cuts == [] and plans_of(model) == []
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "compressm.json").exists()
    assert model.model_tags is None


def test_a_saved_model_brings_record_and_plans(tiny, tmp_path):
    original, model = cut(tiny, 4, 2)
    model.save_pretrained(tmp_path)
    record = Record.load(tmp_path)
    assert [entry["layers"][0]["state_size_after"] for entry in record.cuts] == [4, 2]
    assert [entry["config"]["state_size"] for entry in record.cuts] == [4, 2]
    bytes_per_state = record.cuts[0]["state_bytes_before"] // 8
    assert [entry["state_bytes_after"] for entry in record.cuts] == [4 * bytes_per_state, 2 * bytes_per_state]
    for plan in load_plans(tmp_path):
        compress_(original, plan)
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in original.state_dict().items())
    assert {"mamba", "compressm"} <= set(model.model_tags)


def test_a_copy_saves_itself(tiny, tmp_path):
    _, model = cut(tiny, 4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    other.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not again.get_input_embeddings().weight.any()
    assert len(load_plans(tmp_path)) == 1


def test_only_the_main_process_writes(tiny, tmp_path):
    _, model = cut(tiny, 4)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "compressm.json").exists()


def test_a_trainers_checkpoints_and_its_last_save(tiny, tmp_path):
    callback = CompreSSMCallback(config())
    data = examples()
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    trainer = build_trainer(lively(tiny.build()), tmp_path, [callback], eval_dataset=data[:4], **options)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    before, after, last = (Record.load(tmp_path / name) for name in ("checkpoint-2", "checkpoint-8", "model"))
    assert before.cuts == [] and len(before.timeline) == 2 and not load_plans(tmp_path / "checkpoint-2")
    assert after.cuts == last.cuts == callback.history and len(load_plans(tmp_path / "checkpoint-8")) == 1
    sizes = [entry["state_size"] for entry in last.timeline]
    assert sizes[0] == 8 and sizes[-1] == 4 and sizes == sorted(sizes, reverse=True)
    losses = {entry["step"]: entry["loss"] for entry in last.timeline if "loss" in entry}
    assert losses == {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert last.evaluations["after the cut"]["step"] == 8
    assert last.evaluations["after the cut"]["loss"] == trainer.state.log_history[-2]["eval_loss"]
    assert last.run["seed"] == 42 and last.run["steps"] == 8 and last.run["batch_size"] == 4
    assert "optimizer_parameters" not in (tmp_path / "model" / "compressm.json").read_text()
    assert after.optimizer_parameters


@pytest.mark.parametrize("resume_from", [2, 4])
def test_a_resumed_run_remembers_as_the_unbroken_one(tiny, tmp_path, resume_from):
    def run(resume: str | None = None) -> Record:
        model, options = lively(tiny.build()), {"save_strategy": "steps", "save_steps": 2}
        trainer = build_trainer(model, tmp_path, [CompreSSMCallback(config())], **options)
        trainer.train(resume_from_checkpoint=resume)
        assert len(plans_of(model)) == 1
        trainer.save_model(str(tmp_path / "model"))
        return Record.load(tmp_path / "model")

    unbroken, plan = run(), load_plans(tmp_path / "checkpoint-8")[0]
    resumed = run(str(tmp_path / f"checkpoint-{resume_from}"))
    assert load_plans(tmp_path / "model")[0].digest() == plan.digest()
    for record in (unbroken, resumed):
        for entry in record.cuts:
            entry.pop("seconds")
    assert resumed.cuts == unbroken.cuts
    steps = [[entry["step"] for entry in record.timeline] for record in (unbroken, resumed)]
    assert steps[0] == steps[1]


def test_a_cut_that_is_taken_back_is_not_saved(tiny, tmp_path):
    model = lively(tiny.build())
    optimizer = torch.optim.AdamW(model.parameters())
    compressor = Compressor(config(schedule=[1], pragmatic=True), model, optimizer, total_steps=4)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert compressor.step() is not None and len(plans_of(model)) == 1
    compressor.take_back()
    assert plans_of(model) == [] and record_of(model).made_cuts == []
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "compressm.json").exists()


def test_earlier_cuts_stay_in_the_record(tmp_path):
    """A model that was cut in one shot, and again while it trains."""
    model = lively(TINY["mamba"].build())
    compress(model, [tokens()], CompreSSMConfig(state_size=6))
    build_trainer(model, tmp_path, [CompreSSMCallback(config())]).train()
    assert [entry["layers"][0]["state_size_after"] for entry in record_of(model).cuts] == [6, 4]
    assert [plan.config.state_size for plan in plans_of(model)] == [6, 4]


def test_plans_of_an_earlier_save_do_not_stay(tmp_path):
    _, model = cut(TINY["mamba"], 4, 2)
    save_provenance(model, tmp_path)
    assert len(load_plans(tmp_path)) == 2
    plan = plan_compression(other := TINY["mamba"].build(), measure(other, [tokens()]), CompreSSMConfig(state_size=4))
    compress_(other, plan)
    save_provenance(other, tmp_path)
    assert [plan.digest() for plan in load_plans(tmp_path)] == [plan.digest()]
    assert len(list(tmp_path.glob("compressm_plan_*"))) == 2
