"""Cuts while only adapters train: in the Trainer and in TRL's, saved with their plans, put back, resumed, merged."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import trl
from conftest import MAMBA1_FAMILY, TINY, Tiny, lively, tokens, train
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
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
    silenced,
    weights,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer

from hf_compressm import (
    CompreSSMCallback,
    Compressor,
    compress,
    compress_,
    find_mixers,
    load_compressed_peft,
    read_record,
)
from hf_compressm.provenance import load_plans, plans_of

MAMBA, MAMBA2 = TINY["mamba"], TINY["mamba2"]
CASES = {
    "LoRA": (MAMBA, {"target_modules": ["in_proj", "x_proj"]}),
    "rsLoRA": (MAMBA, {"target_modules": ["x_proj"], "use_rslora": True}),
    "modules_to_save": (MAMBA, {"target_modules": ["in_proj"], "modules_to_save": ["x_proj", "conv1d"]}),
    "target_parameters": (MAMBA, {"target_parameters": ["mixer.A_log"]}),
    "Mamba-2, LoRA": (MAMBA2, {"target_modules": ["in_proj"], "modules_to_save": ["conv1d"]}),
}
# DoRA divides by the norm of rows, and cannot adapt rows that are zero.
DORA = (MAMBA, {"target_modules": ["in_proj", "x_proj"], "use_dora": True})
# Its rows of B and C are scaled by a cut, and learn at another pace from there on.
JAMBA = (MAMBA1_FAMILY["jamba"], {"target_modules": ["x_proj"], "modules_to_save": ["c_layernorm"]})
ALL_CASES = CASES | {"DoRA": DORA, "Jamba, LoRA": JAMBA}
LORA = CASES["LoRA"]


def adapted(tiny: Tiny, options: dict, base: nn.Module | None = None) -> PeftModel:
    """A model half of whose states do nothing, with adapters to be trained; of DoRA, all its states do something."""
    if base is None:
        base = original(tiny, options)
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=4, **options))


def original(tiny: Tiny, options: dict) -> nn.Module:
    """The base of `adapted`."""
    return lively(tiny.build()) if options.get("use_dora") else silenced(tiny)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def assert_same_course(ours: Trainer, theirs: Trainer) -> None:
    """Losses, gradient norms and learning rates."""
    torch.testing.assert_close(torch.tensor(log_rows(ours)), torch.tensor(log_rows(theirs)), atol=2e-5, rtol=2e-5)


def cut_run(directory: Path, case: tuple[Tiny, dict] = LORA, model: PeftModel | None = None, **options) -> Trainer:
    """Eight steps with a cut after the third, and a checkpoint every second step."""
    cut_options = {name: options.pop(name) for name in ("realization", "schedule", "state_size") if name in options}
    model = adapted(*case) if model is None else model
    callback = CompreSSMCallback(config(**cut_options))
    trainer = build_trainer(model, directory, [callback], save_strategy="steps", save_steps=2, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", list(CASES))
def test_adapters_train_across_a_lossless_cut_as_without_it(tmp_path, name):
    tiny, options = CASES[name]
    reference = build_trainer(adapted(tiny, options), tmp_path / "whole")
    reference.train()
    base = weights(original(tiny, options))
    trainer = cut_run(tmp_path / "cut", CASES[name])
    model = trainer.model
    assert {mixer.state_size for mixer in find_mixers(model).values()} == {4}
    assert_same_course(trainer, reference)
    held = {id(item) for group in trainer.optimizer.param_groups for item in group["params"]}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert held == trained == {id(item) for item in trainer.optimizer.state} and len(trained) < len(base)
    whole, cut = (moments(each.model, each.optimizer) for each in (reference, trainer))
    assert whole.keys() == cut.keys()
    for mixer in find_mixers(reference.model).values():
        for axis in mixer.state_axes:
            owner = next(key for key, item in reference.model.named_parameters() if item is axis.tensor)
            for key, value in cut.get(owner, {}).items():
                if value.dim():
                    expected = axis.take(whole[owner][key], torch.tensor([KEPT]).expand(mixer.groups, -1), 8)
                    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-3)


def test_doras_moments_go_with_their_rows(tmp_path):
    seen = {}

    def note(when: str):
        return AtStepEnd(3, lambda model, optimizer, **kwargs: seen.setdefault(when, moments(model, optimizer)))

    model = adapted(*DORA)
    axes = {name: mixer.state_axes for name, mixer in find_mixers(model).items()}
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {owners[id(axis.tensor)]: (name, axis) for name, of in axes.items() for axis in of}
    callbacks = [note("before"), CompreSSMCallback(config()), note("after")]
    trainer = build_trainer(model, tmp_path, callbacks)
    trainer.train()
    layers = {layer["name"]: layer for layer in read_record(tmp_path)[0]["layers"]}
    changed = 0
    for owner, values in seen["after"].items():
        for key, value in values.items():
            before = seen["before"][owner][key]
            if owner in names and value.dim():
                layer, axis = names[owner]
                before = axis.take(before, torch.tensor(layers[layer]["kept"]), 8)
                changed += 1
            assert torch.equal(value, before), (owner, key)
    # B and the magnitudes of x_proj, two moments, two layers.
    assert changed == 8


@pytest.mark.parametrize("name", list(ALL_CASES))
def test_an_adapter_is_saved_with_its_plan_and_put_back_on_the_original_base(tmp_path, name):
    case = ALL_CASES[name]
    trainer = cut_run(tmp_path, case)
    trainer.save_model(tmp_path / "final")
    expected = logits(trainer.model)
    for directory in (tmp_path / "final", tmp_path / "checkpoint-8"):
        (plan,) = load_plans(directory)
        assert list(plan.layers) == list(find_mixers(case[0].build()))
        again = load_compressed_peft(original(*case), directory)
        assert torch.equal(logits(again), expected)
    assert not load_plans(tmp_path / "checkpoint-2")
    assert read_record(tmp_path / "checkpoint-4")[0]["status"] == "cut"
    assert not (tmp_path / "checkpoint-4" / "config.json").exists()

    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain) is case[0].language_model and next(iter(find_mixers(plain).values())).state_size == 4
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_was_put_back_can_be_saved_and_put_back_again(tmp_path):
    trainer = cut_run(tmp_path / "run")
    again = load_compressed_peft(original(*LORA), tmp_path / "run" / "checkpoint-8")
    for number, model in enumerate([again, copy.deepcopy(again)]):
        model.save_pretrained(tmp_path / str(number))
        third = load_compressed_peft(original(*LORA), tmp_path / str(number), adapter_name="default")
        assert torch.equal(logits(third), logits(trainer.model))


def test_several_cuts_are_several_plans(tmp_path):
    trainer = cut_run(tmp_path, schedule=[2, 4], state_size=2)
    sizes = [{layer.state_size_after for layer in plan.layers.values()} for plan in plans_of(trainer.model)]
    assert sizes == [{4}, {2}]
    assert [len(load_plans(tmp_path / f"checkpoint-{step}")) for step in (2, 4, 8)] == [1, 2, 2]
    again = load_compressed_peft(original(*LORA), tmp_path / "checkpoint-8")
    assert torch.equal(logits(again), logits(trainer.model))


@pytest.mark.parametrize("name", ["LoRA", "modules_to_save", "target_parameters", "DoRA"])
def test_a_run_that_is_resumed_after_the_cut_is_the_uninterrupted_one(tmp_path, name):
    case = ALL_CASES[name]
    whole = cut_run(tmp_path, case)
    checkpoint = tmp_path / "checkpoint-6"
    model = load_compressed_peft(original(*case), checkpoint, is_trainable=True)
    trainer = build_trainer(model, tmp_path / "more", [CompreSSMCallback(config())])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert log_rows(trainer) == log_rows(whole)
    assert_same_weights(weights(model), weights(whole.model))
    model.save_pretrained(tmp_path / "saved")
    assert len(load_plans(tmp_path / "saved")) == 1


def test_a_run_that_is_resumed_before_the_cut_makes_it(tmp_path):
    whole = cut_run(tmp_path)
    model = adapted(*LORA)
    trainer = build_trainer(model, tmp_path / "more", [CompreSSMCallback(config())])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert log_rows(trainer) == log_rows(whole)
    assert_same_weights(weights(model), weights(whole.model))


@pytest.mark.parametrize("targets", [["in_proj", "x_proj"], ["in_proj"]])
@pytest.mark.parametrize("hooks", [True, False])
def test_resuming_on_a_base_that_is_not_cut_is_refused(tmp_path, targets, hooks):
    """Some adapters would not fit, others would fit a base that they were not trained with."""
    case = (MAMBA, {"target_modules": targets})
    cut_run(tmp_path, case)
    base = original(*case)
    before = weights(base)
    if hooks:
        # A Trainer of the bare model left its hooks behind.
        build_trainer(base, tmp_path / "other", [CompreSSMCallback(config())])
    model = adapted(*case, base)
    trainer = build_trainer(model, tmp_path / "more", [CompreSSMCallback(config())])
    with pytest.raises(RuntimeError, match=r"load_compressed_peft\(base, checkpoint, is_trainable=True\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    after = {name.replace(".base_layer", ""): tensor for name, tensor in weights(model).items()}
    assert all(torch.equal(tensor, after[f"base_model.model.{name}"]) for name, tensor in before.items())


def test_the_best_adapters_of_before_a_cut_are_not_loaded_after_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_compressm"), "propagate", True)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "eval_dataset": examples(8)}
    # The loss falls, so that the first evaluation is the best one.
    with caplog.at_level(logging.WARNING):
        trainer = cut_run(tmp_path, metric_for_best_model="loss", greater_is_better=True, **options)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert caplog.text.count("best adapters so far") == 1 and "checkpoint-2" in caplog.text
    best = load_compressed_peft(original(*LORA), tmp_path / "checkpoint-4")
    assert torch.equal(logits(trainer.model), logits(best))


def test_a_cut_that_is_taken_back_leaves_no_plan(tmp_path):
    model = adapted(*DORA)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    cut_config = config(pragmatic=True, schedule=[1])
    compressor = Compressor(cut_config, model, optimizer, total_steps=4)
    train(model, optimizer, range(1))
    before = weights(model)
    assert compressor.step() is not None and len(plans_of(model)) == 1
    compressor.take_back()
    assert plans_of(model) == []
    assert_same_weights(weights(model), before)
    model.save_pretrained(tmp_path)
    assert not load_plans(tmp_path)
    train(model, optimizer, range(1))


def test_plans_of_an_earlier_save_do_not_stay(tmp_path):
    trainer = cut_run(tmp_path / "run", schedule=[2, 4], state_size=2)
    trainer.save_model(tmp_path / "saved")
    cut_run(tmp_path / "other").save_model(tmp_path / "saved")
    assert len(load_plans(tmp_path / "saved")) == 1


def test_a_projected_base_comes_back_with_its_projections(tmp_path):
    case = (MAMBA2, {"target_modules": ["in_proj"]})
    whole = cut_run(tmp_path, case, realization="projected")
    mixer = next(iter(find_mixers(whole.model).values()))
    assert mixer.is_projected and not mixer.module.B_projection.requires_grad
    checkpoint = tmp_path / "checkpoint-4"
    model = load_compressed_peft(original(*case), checkpoint, is_trainable=True)
    trainer = build_trainer(model, tmp_path / "more", [CompreSSMCallback(config(realization="projected"))])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert log_rows(trainer) == log_rows(whole) and torch.equal(logits(model), logits(whole.model))
    with pytest.raises(RuntimeError, match="load_compressed_peft"):
        trainer = build_trainer(adapted(*case), tmp_path / "no", [CompreSSMCallback(config(realization="projected"))])
        trainer.train(resume_from_checkpoint=str(checkpoint))

    expected = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4
    )


def test_adapters_of_a_projected_model(tmp_path):
    base = lively(MAMBA2.build())
    compress(base, [tokens()], config(realization="projected"))
    base.save_pretrained(tmp_path / "base")
    model = adapted(MAMBA2, {"target_modules": ["in_proj"]}, base)
    trainer = build_trainer(model, tmp_path / "run")
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert not load_plans(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    )
    assert torch.equal(logits(again), logits(model))
    # A further cut belongs to the adapter.
    compress(model, [tokens()], config(realization="projected", state_size=2))
    model.save_pretrained(tmp_path / "second")
    again = load_compressed_peft(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "second")
    assert torch.equal(logits(again), logits(model))


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0} | {f"w{number}": number for number in range(1, 16)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>")


def sft_run(directory: Path, callbacks: list) -> trl.SFTTrainer:
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1}
    options |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        silenced(MAMBA),
        args=trl.SFTConfig(output_dir=str(directory), gradient_checkpointing=False, max_length=12, **options),
        train_dataset=Dataset.from_list([{"input_ids": item["input_ids"].tolist()} for item in examples()]),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["in_proj", "x_proj"], task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def test_in_trls_trainer(tmp_path):
    reference = sft_run(tmp_path / "whole", [])
    trainer = sft_run(tmp_path / "cut", [CompreSSMCallback(config())])
    assert {mixer.state_size for mixer in find_mixers(trainer.model).values()} == {4}
    assert_same_course(trainer, reference)
    (cut,) = read_record(tmp_path / "cut")
    assert abs(cut["loss_after"] - cut["loss_before"]) < 1e-4 and cut["kl_divergence"] < 1e-5
    trainer.save_model(tmp_path / "saved")
    again = load_compressed_peft(silenced(MAMBA), tmp_path / "saved")
    assert torch.equal(logits(again), logits(trainer.model))


def test_what_cannot_be_put_back_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_compressm"), "propagate", True)
    model = adapted(*LORA)
    model.save_pretrained(tmp_path / "uncut")
    with pytest.raises(FileNotFoundError, match="has no compressm_plan_1"):
        load_compressed_peft(original(*LORA), tmp_path / "uncut")

    with caplog.at_level(logging.WARNING):
        compress(model, [tokens()], config())
    assert "pissa" not in caplog.text
    model.save_pretrained(tmp_path / "cut")
    cut_base = original(*LORA)
    compress_(cut_base, plans_of(model)[0])
    with pytest.raises(ValueError, match="the plan is for state_size 8, but the model has 4"):
        load_compressed_peft(cut_base, tmp_path / "cut")

    model = adapted(MAMBA, {"target_modules": ["in_proj"], "init_lora_weights": "pissa"})
    with caplog.at_level(logging.WARNING):
        compress(model, [tokens()], config())
    assert "'pissa'" in caplog.text
    model.save_pretrained(tmp_path / "pissa")
    base = original(*LORA)
    with pytest.raises(ValueError, match="'pissa'"):
        load_compressed_peft(base, tmp_path / "pissa")
    assert base.config.state_size == 8


def test_a_second_adapter_is_put_back_from_its_folder(tmp_path):
    model = adapted(*LORA)
    torch.manual_seed(2)
    model.add_adapter("second", LoraConfig(r=3, init_lora_weights=False, target_modules=["x_proj"]))
    model.set_adapter("second")
    compress(model, [tokens()], config())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["r"] == 3
    again = load_compressed_peft(original(*LORA), tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(again), logits(model))
    # Or after the first one, as PEFT does it.
    again = load_compressed_peft(original(*LORA), tmp_path)
    again.load_adapter(str(tmp_path / "second"), "second")
    again.set_adapter("second")
    assert torch.equal(logits(again), logits(model))
