"""Checkpoints rewritten on disk, against the cut in process: the same files, and the same losses after a resume."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import MAMBA1_FAMILY, MAMBA2_FAMILY, TINY, lively, projection_plan, selection_plan, stir, tokens, train
from peft import LoraConfig, get_peft_model
from torch import nn
from training import AtStepEnd, build_trainer, config
from transformers import AutoModelForCausalLM

from hf_compressm import CompressionPlan, CompreSSMCallback, compress_, compressor, find_mixers, read_record
from hf_compressm.reshape import reshape_checkpoint, route
from hf_compressm.reshape.work import anonymous_memory

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})},
    "adafactor": {"optim": "adafactor"},
    "rmsprop": {"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9})},
}
RUNS = [
    ("mamba", "stock", "adamw"),
    ("mamba", "stock", "sgd"),
    ("mamba", "stock", "adafactor"),
    ("mamba2", "stock", "adamw"),
    ("mamba2", "projected", "adamw"),
    ("mamba2", "projected", "adafactor"),
    # Their B and C are normalised: weights and moments are scaled, too.
    ("falcon_mamba", "stock", "adamw"),
    ("falcon_mamba", "stock", "adafactor"),
    ("falcon_mamba", "stock", "rmsprop"),
    ("jamba", "stock", "sgd"),
    # Each head keeps states of its own.
    ("zamba", "stock", "adamw"),
]
# Without experts: the Trainer does not find those that it saved (Transformers renames them), and leaves them new.
MODELS = MAMBA1_FAMILY | TINY | {"jamba": MAMBA1_FAMILY["jamba"].but(num_experts=1)}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def runs(request, tmp_path_factory) -> dict[str, Any]:
    """A run that was cut in process after step 3, and one that was only saved there."""
    architecture, realization, optimizer = request.param
    directory = tmp_path_factory.mktemp("runs")
    options = {"save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1, **OPTIMIZERS[optimizer]}
    plans = []

    def spy(model, plan, *args, **kwargs):
        plans.append(plan)
        return compress_(model, plan, *args, **kwargs)

    cut = config(realization=realization)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressor, "compress_", spy)
        trainer = build_trainer(
            lively(MODELS[architecture].build()), directory / "cut", [CompreSSMCallback(cut)], **options
        )
        trainer.train()
    (plan,) = plans
    later = CompreSSMCallback(config(realization=realization, schedule=[5]))
    stop = AtStepEnd(3, lambda control, **_: setattr(control, "should_training_stop", True))
    build_trainer(lively(MODELS[architecture].build()), directory / "saved", [later, stop], **options).train()
    report = reshape_checkpoint(directory / "saved" / "checkpoint-3", plan, directory / "small" / "checkpoint-3")
    return {
        "architecture": architecture,
        "options": options,
        "directory": directory,
        "losses": losses(trainer),
        "callback": CompreSSMCallback(cut),
        "report": report,
        "plan": plan,
        "in_process": directory / "cut" / "checkpoint-3",
        "reshaped": directory / "small" / "checkpoint-3",
    }


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(our, their, f"{where}[{number}]")
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def test_the_files_are_those_of_a_cut_in_process(runs):
    ours, theirs = runs["reshaped"], runs["in_process"]
    weights = [safetensors.torch.load_file(path / "model.safetensors") for path in (ours, theirs)]
    assert_same(*(dict(sorted(item.items())) for item in weights))
    assert_same(*(torch.load(path / "optimizer.pt") for path in (ours, theirs)))
    assert_same(*(json.loads((path / "config.json").read_text()) for path in (ours, theirs)))
    states = [json.loads((path / "trainer_state.json").read_text()) for path in (ours, theirs)]
    progress = [state["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["progress"] for state in states]
    for item in progress:
        del item["output_dir"]
    assert_same(*progress)
    assert {file.name for file in theirs.iterdir()} == {file.name for file in ours.iterdir()}
    cuts = [read_record(path)[0] for path in (ours, theirs)]
    for cut in cuts:
        # What is measured only in process; and the other run had another schedule.
        for key in ("seconds", "loss_before", "loss_after", "kl_divergence", "scheduled_step"):
            del cut[key]
    # Summed up in another order.
    roundings = [[layer.pop("rounding_error") for layer in cut["layers"]] for cut in cuts]
    assert roundings[0] == pytest.approx(roundings[1], rel=1e-6)
    assert_same(*cuts)


def test_a_resumed_run_goes_on_as_after_a_cut_in_process(runs):
    model = MODELS[runs["architecture"]].build(seed=5)
    trainer = build_trainer(model, runs["directory"] / "again", [runs["callback"]], **runs["options"])
    trainer.train(resume_from_checkpoint=str(runs["reshaped"]))
    assert losses(trainer)[3:] == runs["losses"][3:]
    assert [entry["status"] for entry in runs["callback"].history] == ["cut"]
    assert {mixer.state_size for mixer in find_mixers(model).values()} == {4}


# Models that `save_pretrained` wrote.


REALIZATIONS = ["stock", "projected", "projected again", "selected after a projection"]


@pytest.mark.parametrize(
    "name, realization",
    [*((name, "stock") for name in MAMBA1_FAMILY), *((name, kind) for name in MAMBA2_FAMILY for kind in REALIZATIONS)],
)
def test_saved_models_of_every_architecture(name, realization, tmp_path):
    model = stir((MAMBA1_FAMILY | MAMBA2_FAMILY)[name].build())
    if realization in ("projected again", "selected after a projection"):
        compress_(model, projection_plan(model, 6))
    if realization in ("stock", "selected after a projection"):
        groups = next(iter(find_mixers(model).values())).groups
        plan = selection_plan(model, [[0, 3, 5], [1, 2, 4]][:groups])
    else:
        plan = projection_plan(model, 3, seed=1)
    # Small shards: the matrices of one mixer lie in several files.
    model.save_pretrained(tmp_path / "full", max_shard_size="6KB")
    reshape_checkpoint(tmp_path / "full", plan, tmp_path / "small")
    compress_(model, plan)
    model.save_pretrained(tmp_path / "in process", max_shard_size="6KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(loaded) is type(model)
    assert_same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.eval()(tokens()).logits, model.eval()(tokens()).logits)
    names = ["config.json", *(["modeling_compressm.py"] if "projected" in realization else [])]
    for file in names:
        assert (tmp_path / "small" / file).read_text() == (tmp_path / "in process" / file).read_text()
    metadata = [
        json.loads((tmp_path / path / "model.safetensors.index.json").read_text())["metadata"]
        for path in ("small", "in process")
    ]
    assert metadata[0] == metadata[1]


@pytest.mark.skipif(anonymous_memory() is None, reason="this system does not tell a process's memory")
def test_memory_holds_a_few_tensors_and_not_the_model(tmp_path):
    model = TINY["mamba"].build(num_hidden_layers=24, hidden_size=256, state_size=64)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model.save_pretrained(tmp_path / "full")
    torch.save(optimizer.state_dict(), tmp_path / "full" / "optimizer.pt")
    # Nearly all states stay: the new tensors together would be 30 MiB, and all of the optimizer's state is 120.
    plan = selection_plan(model, list(range(63)))
    report = reshape_checkpoint(tmp_path / "full", plan, tmp_path / "small")
    assert report.bytes_before > 130 * 2**20
    assert report.peak_memory < 8 * 2**20


# Errors: nothing is left behind, and the checkpoint stays as it is.


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of the stock Trainer without this package's callback."""
    directory = tmp_path_factory.mktemp("saved")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build_trainer(lively(TINY["mamba"].build()), directory, **options).train()
    return directory / "checkpoint-2"


def plan_for(**options: Any) -> CompressionPlan:
    return selection_plan(TINY["mamba"].build(**options), [0, 3, 5])


def cut_off(name: str, end: int = -400) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        file = checkpoint / name
        file.write_bytes(file.read_bytes()[:end])

    return damage


def rewritten(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = torch.load(checkpoint / name)
        torch.save(change(content) or content, checkpoint / name)

    return damage


def shuffled(content: dict[str, Any]) -> None:
    """Moments that fit no known order of the parameters."""
    states = content["state"]
    states[0], states[1] = states[1], states[0]


def with_unknown_state(content: dict[str, Any]) -> None:
    for state in content["state"].values():
        state["curvature"] = torch.zeros_like(state["exp_avg"])


class Foreign:
    pass


def two_formats(checkpoint: Path) -> None:
    torch.save(safetensors.torch.load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")


def other_shards(checkpoint: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "truncated weights": (cut_off("model.safetensors"), ValueError, "model.safetensors is not a whole safetensors"),
    "truncated header": (cut_off("model.safetensors", 100), ValueError, "is not a whole safetensors file"),
    "truncated optimizer": (cut_off("optimizer.pt"), ValueError, "optimizer.pt cannot be read"),
    "no config": (
        lambda path: (path / "config.json").unlink(),
        FileNotFoundError,
        "has no config.json; give `config`",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ValueError, "holds no weights of the model"),
    "missing shard": (other_shards, FileNotFoundError, "missing: .'model-00002-of-00002"),
    "two formats": (two_formats, ValueError, "weights in pytorch_model.bin and .'model.safetensors'"),
    "two optimizers": (
        lambda path: shutil.copy(path / "optimizer.pt", path / "optimizer.bin"),
        ValueError,
        "several formats: .'optimizer.bin', 'optimizer.pt'",
    ),
    "unknown order": (rewritten("optimizer.pt", shuffled), ValueError, r"groups of \[16, 6\] parameters, and neither"),
    "unknown state": (rewritten("optimizer.pt", with_unknown_state), TypeError, "its state 'curvature' of parameter"),
    "foreign objects": (rewritten("optimizer.pt", lambda _: {"state": Foreign()}), ValueError, "cannot be read"),
    "not an optimizer": (rewritten("optimizer.pt", lambda _: {"lr": 1}), ValueError, "it has the keys .'lr'"),
    "shards of FSDP's own": (
        lambda path: (path / "optimizer_0_rank0.bin").touch(),
        ValueError,
        "not supported: FSDP's own files",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(saved, tmp_path, name):
    damage, error, message = DAMAGES[name]
    checkpoint = tmp_path / "in" / "checkpoint"
    shutil.copytree(saved, checkpoint)
    damage(checkpoint)
    before = contents(checkpoint)
    with pytest.raises(error, match=message):
        reshape_checkpoint(checkpoint, plan_for(), tmp_path / "out" / "small")
    assert contents(checkpoint) == before
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("by", ["Trainer", "save_pretrained"])
def test_adapters_without_their_base_are_refused(tmp_path, by):
    model = get_peft_model(lively(TINY["mamba"].build()), LoraConfig(r=2, target_modules=["in_proj", "x_proj"]))
    if by == "Trainer":
        build_trainer(model, tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=2).train()
        checkpoint = tmp_path / "run" / "checkpoint-2"
    else:
        model.save_pretrained(checkpoint := tmp_path / "adapters")
    before = contents(checkpoint)
    for base in (None, TINY["mamba"].config(), model):
        with pytest.raises(ValueError, match=r"adapters of PEFT without the base.*load_compressed_peft\(base, output"):
            reshape_checkpoint(checkpoint, plan_for(), tmp_path / "small", config=base)
    assert contents(checkpoint) == before and not (tmp_path / "small").exists()


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapters_that_were_saved_with_their_base(tmp_path, dora):
    """As Accelerate and sharding engines save them."""
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["x_proj"], "init_lora_weights": False, "use_dora": dora}
    model = get_peft_model(lively(TINY["mamba"].build()), LoraConfig(**options))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    train(model, optimizer, [0])
    (checkpoint := tmp_path / "full").mkdir()
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.bin")
    for refit in (False, True):
        plan, small = plan_for(), tmp_path / f"small {refit}"
        if refit:
            for layer in plan.layers.values():
                object.__setattr__(layer, "readout", torch.randn(1, 3, 8))
        if refit and dora:
            with pytest.raises(ValueError, match="the refit of DoRA's magnitudes takes several tensors at once"):
                reshape_checkpoint(checkpoint, plan, small, config=model)
            continue
        reshape_checkpoint(checkpoint, plan, small, config=model)
        cut, moments = copy.deepcopy((model, optimizer))
        compress_(cut, plan, moments)
        assert_same(torch.load(small / "pytorch_model.bin"), dict(cut.state_dict()))
        assert_same(torch.load(small / "optimizer.bin"), moments.state_dict())


@pytest.mark.parametrize(
    "plan, message",
    [
        (lambda: plan_for(num_hidden_layers=3), "unknown layers .'backbone.layers.2.mixer'"),
        (lambda: plan_for(state_size=16), "for state_size 16, but the model has 8"),
        (lambda: selection_plan(TINY["mamba2"].build(), [0, 1]), "kept indices have shape"),
        (lambda: selection_plan(TINY["mamba"].build(), list(range(8))), "the plan changes nothing"),
    ],
)
def test_plans_of_other_models_are_refused(saved, tmp_path, plan, message):
    with pytest.raises(ValueError, match=message):
        reshape_checkpoint(saved, plan(), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_config_are_refused(saved, tmp_path):
    wider = TINY["mamba"].config(hidden_size=32)
    with pytest.raises(ValueError, match=r"A_log has shape \(32, 8\), but with the checkpoint's config"):
        reshape_checkpoint(saved, plan_for(), tmp_path / "small", config=wider)


def test_a_checkpoint_is_cut_once(saved, tmp_path):
    reshape_checkpoint(saved, plan_for(), tmp_path / "small")
    with pytest.raises(ValueError, match="for state_size 8, but the model has 3"):
        reshape_checkpoint(tmp_path / "small", plan_for(), tmp_path / "smaller")
    with pytest.raises(FileExistsError, match="small exists"):
        reshape_checkpoint(saved, plan_for(), tmp_path / "small")
    with pytest.raises(ValueError, match="lies inside the checkpoint"):
        reshape_checkpoint(saved, plan_for(), saved / "small")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint directory"):
        reshape_checkpoint(tmp_path / "nothing", plan_for(), tmp_path / "smaller")


def test_a_run_that_never_knew_the_callback_is_not_cut_again(saved, tmp_path):
    reshape_checkpoint(saved, plan_for(), tmp_path / "small" / "checkpoint-2")
    state = json.loads((tmp_path / "small" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["progress"] == {
        "global_step": 2,
        "done_until": 2,
        "stopped": True,
        "recording": False,
    }
    callback = CompreSSMCallback(config(state_size=3, schedule=[1]))
    model = TINY["mamba"].build()
    trainer = build_trainer(model, tmp_path / "run", [callback], max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "small" / "checkpoint-2"))
    assert [(entry["status"], entry["step"]) for entry in callback.history] == [("cut", 2)]
    assert model.config.state_size == 3


@pytest.mark.parametrize("limit", [2_000, 40_000])
def test_a_full_disk_leaves_nothing_behind(saved, tmp_path, limit):
    """A limit on the size of files acts as a full disk does: writing raises an OSError somewhere on the way."""
    before = contents(saved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "out").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError):
            reshape_checkpoint(saved, plan_for(), tmp_path / "out" / "small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []
    assert contents(saved) == before


def as_another_user(target: Callable[[], None]) -> int:
    """Run something in a process that may not write everywhere, as root may; returns its exit code."""

    def run() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)
        target()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


def test_a_read_only_directory_is_refused(saved):
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory() as folder:
        (out := Path(folder) / "out").mkdir()
        Path(folder).chmod(0o755)
        checkpoint = Path(folder) / "checkpoint"
        shutil.copytree(saved, checkpoint)
        for item in (out, checkpoint, *checkpoint.iterdir()):
            item.chmod(0o555 if item.is_dir() else 0o444)
        before = contents(checkpoint)

        def refused() -> None:
            with pytest.raises(PermissionError, match="out"):
                reshape_checkpoint(checkpoint, plan_for(), out / "small")

        assert as_another_user(refused) == 0
        assert list(out.iterdir()) == [] and contents(checkpoint) == before
        # A checkpoint that nobody may write to is no obstacle: it is only read.
        out.chmod(0o777)
        assert as_another_user(lambda: reshape_checkpoint(checkpoint, plan_for(), out / "small")) == 0
        assert (out / "small" / "model.safetensors").exists() and contents(checkpoint) == before


@pytest.mark.parametrize("stage", ["rewrite_optimizer", "library_versions", "_sync"])
def test_a_kill_leaves_no_output(saved, tmp_path, stage, monkeypatch):
    """What was begun lies beside, hidden; the output is not there, and a second try makes it."""
    before = contents(saved)

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        owner = route.torch_files if stage == "rewrite_optimizer" else route
        setattr(owner, stage, die)
        reshape_checkpoint(saved, plan_for(), tmp_path / "small")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "small").exists() and contents(saved) == before
    assert all(item.name.startswith(".small.") for item in tmp_path.iterdir())
    reshape_checkpoint(saved, plan_for(), tmp_path / "small")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.state_size == 3


def test_unknown_files_are_copied_and_the_report_lists_them_all(saved, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(saved, checkpoint)
    (checkpoint / "notes").mkdir()
    (checkpoint / "notes" / "a.txt").write_text("mine")
    (checkpoint / "compressm_inputs_0.safetensors").write_bytes(b"")
    report = reshape_checkpoint(checkpoint, plan_for(), tmp_path / "small")
    assert (tmp_path / "small" / "notes" / "a.txt").read_text() == "mine"
    assert (tmp_path / "small" / "rng_state.pth").read_bytes() == (checkpoint / "rng_state.pth").read_bytes()
    kept = {name for name, status in report.files.items() if status != "dropped"}
    assert kept == {item.name for item in (tmp_path / "small").iterdir()}
    assert report.files["compressm_inputs_0.safetensors"] == "dropped"
    assert report.files["optimizer.pt"] == report.files["model.safetensors"] == "reshaped"
    assert 0 < report.bytes_after < report.bytes_before
    assert report.compression.parameters_after < report.compression.parameters_before
    assert "notes" in str(report) and json.dumps(report.to_dict())


def test_names_in_the_record_tell_whose_moments_are_where(saved, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(saved, checkpoint)
    model = TINY["mamba"].build()
    names = [name for name, _ in model.named_parameters()][::-1]
    optimizer = torch.optim.AdamW([dict(model.named_parameters())[name] for name in names])
    train(model, optimizer, [0])
    model.save_pretrained(checkpoint)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match="write them there as optimizer_parameters"):
        reshape_checkpoint(checkpoint, plan_for(), tmp_path / "small")
    record = {"format_version": 1, "versions": {}, "cuts": [], "optimizer_parameters": [names]}
    (checkpoint / "compressm.json").write_text(json.dumps(record))
    reshape_checkpoint(checkpoint, plan_for(), tmp_path / "small")
    compress_(model, plan_for(), optimizer)
    assert_same(torch.load(tmp_path / "small" / "optimizer.pt"), optimizer.state_dict())
    assert json.loads((tmp_path / "small" / "compressm.json").read_text())["optimizer_parameters"] == [names]


def test_a_model_of_your_own_class_is_given_itself(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = lively(TINY["mamba"].build())

    model = Wrapped()
    plan = selection_plan(model, [0, 3, 5])
    (tmp_path / "full").mkdir()
    torch.save(model.state_dict(), tmp_path / "full" / "pytorch_model.bin")
    reshape_checkpoint(tmp_path / "full", plan, tmp_path / "small", config=model)
    compress_(model, plan)
    assert_same(torch.load(tmp_path / "small" / "pytorch_model.bin"), dict(model.state_dict()))
