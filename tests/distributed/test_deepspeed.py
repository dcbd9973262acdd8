"""DeepSpeed in two real processes: against the uncut model, and against one process without DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import torchrun

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed
# Set before deepspeed is imported by the worker's functions, and for the processes that are started.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def worker(request) -> Any:
    """The worker's module: importing it imports DeepSpeed, which looks for an accelerator."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    patch.delenv("ACCELERATE_USE_CPU", raising=False)
    import deepspeed_worker

    return deepspeed_worker


@pytest.fixture(scope="module")
def runs(worker, tmp_path_factory) -> list[dict[str, dict]]:
    """What each process saw."""
    output = tmp_path_factory.mktemp("runs")
    torchrun(Path(worker.__file__), str(output))
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


def close(ours: Any, theirs: Any, tolerance: float) -> bool:
    return ours == pytest.approx(theirs, rel=0, abs=tolerance)


def test_processes_hold_the_same(runs):
    first, second = runs
    assert first == second
    sizes = {name: result["state_size"] for name, result in first.items() if "state_size" in result}
    assert {name for name, size in sizes.items() if size == 8} == {
        *(name for name in sizes if "uncut" in name or "taken back" in name)
    }


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_removing_silent_states_changes_nothing(runs, precision, stage):
    cut, uncut = runs[0][f"{precision}, ZeRO-{stage}"], runs[0][f"{precision}, ZeRO-{stage}, uncut"]
    assert cut["state_size"] == 4
    assert close(cut["losses"], uncut["losses"], 1e-6)
    assert close(cut["norms"], uncut["norms"], 1e-6)
    assert cut["of the kept"].keys() == uncut["of the kept"].keys()
    assert any("master" in name for name in cut["of the kept"]) == (precision == "bf16")
    for name, numbers in uncut["of the kept"].items():
        assert close(cut["of the kept"][name], numbers, 1e-6), name
    assert cut["bytes"] < uncut["bytes"]


@pytest.mark.parametrize(
    "name",
    [
        "ZeRO-1",
        "ZeRO-2",
        "ZeRO-1, accumulation",
        "ZeRO-2, accumulation",
        "ZeRO-2, Mamba-2",
        "ZeRO-2, torch's backward",
        "ZeRO-2, small buckets, shuffled",
        "ZeRO-1, overlapping, all-reduced",
        "ZeRO-1, falcon_mamba",
        "ZeRO-2, falcon_mamba",
        "ZeRO-2, jamba",
        "ZeRO-1, zamba",
        "ZeRO-2, zamba",
        "ZeRO-2, mamba, LoRA",
        "ZeRO-2, mamba, DoRA",
        "ZeRO-2, mamba2, LoRA",
        "ZeRO-2, mamba2, DoRA",
    ],
)
def test_two_processes_equal_one_without_deepspeed(worker, runs, name):
    """With a refit of the readout, clipping, a schedule, and a group without weight decay."""
    _, options = worker.LIKE_ONE_PROCESS[name]
    two, one = runs[0][name], worker.alone(**options)
    assert close(two["losses"], one["losses"], 2e-6)
    assert close(two["norms"], one["norms"], 2e-6)
    assert two["learning_rates"] == one["learning_rates"]
    assert two["of the kept"].keys() == one["of the kept"].keys()
    for state, numbers in one["of the kept"].items():
        assert close(two["of the kept"][state], numbers, 1e-5), state


def test_engine_keeps_its_optimizer_and_its_hooks(runs):
    checked = {name: result for name, result in runs[0].items() if "same object" in result}
    assert len(checked) > 10
    for name, result in checked.items():
        assert result["same object"] and result["one hook each"] and result["its own hooks"], name
        # DeepSpeed's own way to the moments; it goes wrong with round_robin_gradients.
        assert result.get("found", True) or "shuffled" in name, name


def test_cut_before_the_first_step(runs):
    assert close(runs[0]["before training"]["losses"], runs[0]["fp32, ZeRO-2, uncut"]["losses"], 1e-6)


def test_a_cut_is_taken_back(worker, runs):
    fp32, bf16 = runs[0]["taken back"], runs[0]["taken back, bf16"]
    assert fp32["small"] == bf16["small"] == 4
    assert close(fp32["losses"], worker.alone(cutting=False)["losses"], 2e-6)
    assert bf16["losses"] == runs[0]["bf16, ZeRO-1, uncut"]["losses"]
    assert bf16["of the kept"] == runs[0]["bf16, ZeRO-1, uncut"]["of the kept"]


@pytest.mark.parametrize("name", ["falcon_mamba", "mamba, DoRA"])
def test_a_cut_of_scaled_or_adapted_layers_is_taken_back(worker, runs, name):
    result, uncut = runs[0][f"taken back, {name}"], worker.alone(name, cutting=False)
    assert result["small"] == 4
    assert close(result["losses"], uncut["losses"], 2e-6)
    # An undone engine holds the whole moments; the worker looks at what a cut would keep.
    for state, numbers in uncut["of the kept"].items():
        assert close(result["of the kept"][state], numbers, 1e-5), state


def test_refit_is_made_of_the_master_weights(runs):
    """And what the optimizer was told meanwhile, such as the loss scale, is not forgotten."""
    assert runs[0]["refitted"] == {"refitted": True, "rounded": True, "carried": True}


def test_doras_magnitudes_follow_the_rows_that_they_belong_to(runs):
    assert runs[0]["refitted, DoRA"]["difference"] < 1e-6


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("ZeRO-3", "divides the parameters themselves"),
        ("ZeRO-0", "not supported"),
        ("offload", "an offloaded optimizer"),
        ("16-bit ZeRO-1", "BF16_Optimizer"),
        ("optimizer", "SGD's state 'noise'"),
        ("accumulating", "gradients of the present parameters"),
        ("compress_", "cut it with reshape_checkpoint"),
        ("pragmatic", "only a checkpoint of it can be cut"),
        ("projected", "realization='projected' adds parameters"),
        ("adapters", "one of adapters does not hold their base. Train with DDP, FSDP2 or DeepSpeed ZeRO-1 or -2"),
    ],
)
def test_what_cannot_be_cut_is_named(runs, what, reason):
    assert reason in runs[0]["refusals"][what]
    assert runs[0]["refusals"]["ZeRO-2"] is None


def test_mixers_can_be_read_under_zero3(worker, runs):
    """Between two steps, and in a replay there; the training does not notice."""
    one = worker.alone(cutting=False)
    assert close(runs[0]["ZeRO-3"]["losses"], one["losses"], 2e-6)
    expected = worker.alone(cutting=False, last=worker.CUT_AFTER)["mixers"]
    for name, (between, numel_afterwards, within) in runs[0]["ZeRO-3"]["seen"].items():
        assert between == within == pytest.approx(expected[name], rel=1e-5)
        assert numel_afterwards == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_trainer(worker, runs, stage):
    """Losses, gradient norms and learning rates; and the smaller checkpoint loads into a model built full-size."""
    cut, uncut, resumed = (runs[0][f"Trainer, ZeRO-{stage}{what}"] for what in ("", ", uncut", ", resumed"))
    assert cut["processes"] == 2 and cut["held"] == [True]
    assert cut["history"] == resumed["history"] == [["cut", worker.CUT_AFTER]]
    assert cut["kept"] == [[worker.KEPT]] * 2
    for ours, theirs in zip(cut["rows"], uncut["rows"], strict=True):
        assert close(ours, theirs, 1e-6)
    assert resumed["rows"] == cut["rows"]
    assert resumed["weights"] == cut["weights"]


def test_trainer_under_zero3_goes_on_from_a_cut_checkpoint(worker, runs, tmp_path):
    """Against a cut in process, in one process, at the same batches."""
    run, alone = runs[0]["Trainer, ZeRO-3"], worker.in_process(tmp_path)
    step = worker.CUT_AFTER
    assert [row[0] for row in run["first"]] == list(range(1, step + 1))
    assert run["built"] == 4
    assert run["kept"] == alone["kept"] and len(run["kept"]) == 2
    assert run["history"] == [["cut", step]]
    assert len(run["rows"]) == len(alone["rows"]) == 8
    for ours, theirs in zip(run["rows"], alone["rows"], strict=True):
        assert close(ours, theirs, 5e-5)


def test_the_checkpoint_is_cut_once_and_says_how_to_go_on(worker, runs):
    first, second = (process["Trainer, ZeRO-3"] for process in runs)
    name = f"cut-checkpoint-{worker.CUT_AFTER}"
    assert first["written"] == [1, 0]
    assert first["goes_on"] == second["goes_on"] == first["file"]
    assert first["goes_on"]["command"][-2:] == ["--resume_from_checkpoint", first["goes_on"]["checkpoint"]]
    assert Path(first["goes_on"]["checkpoint"]).name == name
    assert first["checkpoints"] == [f"checkpoint-{worker.CUT_AFTER}", name]
    assert first["goes_on_again"] is None


@pytest.mark.parametrize(
    ("option", "reason"), [("save_only_model", "leaves out the optimizer"), ("pragmatic", "cannot take a cut back")]
)
def test_what_the_way_by_a_checkpoint_does_not_allow(runs, option, reason):
    assert reason in runs[0]["Trainer, ZeRO-3"][option]


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_loop(worker, runs, stage):
    """ZeRO-3 by way of a checkpoint: the second half goes on from it."""
    cut, uncut = runs[0][f"Accelerate, ZeRO-{stage}"], runs[0]["Accelerate, uncut"]
    assert (cut["state_size"], uncut["state_size"]) == (4, 8)
    assert cut["history"] == [["cut", worker.CUT_AFTER]]
    assert len(cut["losses"]) == worker.STEPS
    assert close(cut["losses"], uncut["losses"], 1e-6)
    assert cut["learning_rates"] == uncut["learning_rates"]


def test_accelerate_loop_is_told_how_to_go_on(worker, runs):
    first = runs[0]["Accelerate, ZeRO-3"]["first"]
    assert len(first["losses"]) == worker.CUT_AFTER and first["state_size"] == 8 and first["history"] == []
    assert Path(first["goes_on"]["checkpoint"]).name == f"cut-step_{worker.CUT_AFTER}"
    assert first["goes_on"]["command"][-2:] == ["--resume", first["goes_on"]["checkpoint"]]
    assert runs[0]["Accelerate, ZeRO-3"]["goes_on"] is None
