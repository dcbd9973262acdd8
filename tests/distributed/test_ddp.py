"""Cuts under DistributedDataParallel in two real processes: hand-written loops, and the Trainer's second calls."""

from __future__ import annotations

import json
from pathlib import Path

import ddp_worker
import pytest
import torch
from launch import torchrun

LOOPS = {loop.__name__: loop for loop in ddp_worker.LOOPS}
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning"),
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[list[dict], str]:
    """What the two processes wrote into their files, and what they printed together."""
    output = tmp_path_factory.mktemp("ddp")
    printed = torchrun(Path(ddp_worker.__file__), str(output)).stdout
    return [json.loads((output / f"{rank}.json").read_text()) for rank in (0, 1)], printed


@pytest.mark.parametrize("name", [*LOOPS, "low_rank_hook", "uneven_tokens"])
def test_processes_are_bit_identical(launched, name):
    first, second = (result[name] for result in launched[0])
    assert first == second


@pytest.mark.parametrize("name", LOOPS)
def test_two_processes_equal_one_with_the_doubled_batch(launched, name):
    two, one = launched[0][0][name], LOOPS[name]()
    full_size_again = name.endswith(("taken_back", "loaded_from_before_the_cut", "undone", "reloaded"))
    if name.startswith("projected") and not full_size_again:
        assert sum(one["sizes"]) == 8 and two["state_size"] == one["state_size"] == min(one["sizes"])
    else:
        assert two["state_size"] == one["state_size"] == (8 if full_size_again else 4)
    assert two["sizes"] == one["sizes"]
    assert two["errors"] == pytest.approx(one["errors"], rel=1e-3)
    assert [tuple(entry) for entry in two["history"]] == one["history"]
    assert [step for _, step, _ in one["history"]] == [3]
    assert two["kept"] == one["kept"] and two["refits"] == one["refits"]
    if name in ("plain", "projected_by_default"):
        assert set(one["refits"]) == {"alternating least squares"}
    assert two.get("small") == one.get("small") == (4 if full_size_again else None)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=2e-5)
    # Weights and moments; a refit magnifies what rounding did to the states.
    assert two["sums"].keys() == one["sums"].keys()
    for name, numbers in one["sums"].items():
        assert two["sums"][name] == pytest.approx(numbers, rel=5e-3, abs=1e-5), name


def test_communication_hooks_stay(launched):
    for result in launched[0]:
        assert all(calls > 0 for calls in result["communication_hook"]["calls_per_step"])
        # It had something to forget, and went on with buckets of another size.
        before, after = result["low_rank_hook"]["remembered"]
        assert sum(before) > sum(after) > 0
        assert result["low_rank_hook"]["state_size"] == 4


def test_processes_agree_on_when_there_are_enough_tokens(launched):
    for result in launched[0]:
        assert result["uneven_tokens"]["history"] == [["cut", 3, 3 * (48 + 24)]]


def test_different_plans_are_refused_on_every_process(launched):
    for result in launched[0]:
        assert "the processes hold different versions of the plan" in result["different_plans"]["message"]
        assert result["different_plans"]["history"] == [] and result["different_plans"]["state_size"] == 8


def test_what_is_refused_when_training_begins(launched):
    for result in launched[0]:
        messages = result["refused"]
        assert "several processes train this model, but nothing wraps it" in messages["bare"]
        assert "the processes hold different versions of the config" in messages["other rule"]


def test_a_trainer_resumes_under_its_own_wrapper(launched):
    for result in launched[0]:
        weights, sizes = result["trainer_twice"]["weights"], result["trainer_twice"]["sizes"]
        assert len(set(weights)) == 1
        assert sizes == [8, 8, 4, 4, 4, 4, 4, 4] + [4] * 6 + [4] * 2
    assert launched[0][0]["trainer_twice"] == launched[0][1]["trainer_twice"]


def test_a_pragmatic_cut_is_taken_back_on_every_process(launched):
    first, second = (result["pragmatic_trainer"] for result in launched[0])
    assert first == second
    assert first["status"] == ["taken back"]
    assert first["sizes"] == [8, 8, 4, 4, 4, 8, 8, 8]


def test_the_table_is_printed_by_one_process(launched):
    # Two Trainers; one of them cuts a second time, after it resumed from before the cut.
    assert launched[1].count("CompreSSM, step 3") == 3
