"""The stock Trainer in two real processes, against one process with the doubled batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import torchrun
from train_worker import SCENARIOS

WORKER = Path(__file__).with_name("train_worker.py")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Results by process: `0` and `1` of the two, `alone` of the one."""
    output = tmp_path_factory.mktemp("runs")
    torchrun(WORKER, str(output))
    tests = str(Path(__file__).parents[1])
    alone = subprocess.run(
        [sys.executable, str(WORKER), str(output)],
        env=os.environ | {"PYTHONPATH": tests, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert alone.returncode == 0, alone.stderr[-8000:]
    files = {"0": "2-0.json", "1": "2-1.json", "alone": "1-0.json"}
    return {name: json.loads((output / file).read_text()) for name, file in files.items()}


RESUMED = {
    "resumed from 2": "uninterrupted",
    "resumed from 4": "uninterrupted",
    "resumed projected from 2": "uninterrupted projected",
    "resumed projected from 4": "uninterrupted projected",
}


@pytest.mark.parametrize("scenario", [*SCENARIOS, *RESUMED, *sorted(set(RESUMED.values()))])
def test_processes_are_bit_identical(runs, scenario):
    """Weights, optimizer moments and what was cut."""
    first, second = runs["0"][scenario], runs["1"][scenario]
    assert sum(first["sizes"]) == 4 + 4 and first["state_size"] == min(first["sizes"])
    assert first["status"] == ["cut"]
    for what in ("weights", "moments", "sizes", "kept", "relative_error"):
        assert first[what] == second[what]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_equal_one_with_the_doubled_batch(runs, scenario):
    two, one = runs["0"][scenario], runs["alone"][scenario]
    assert two["sizes"] == one["sizes"] and two["kept"] == one["kept"]
    assert two["relative_error"] == pytest.approx(one["relative_error"], rel=1e-3)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("scenario", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(runs, scenario):
    for process in ("0", "1"):
        for what in ("kept", "relative_error", "weights", "moments"):
            assert runs[process][scenario][what] == runs[process][RESUMED[scenario]][what]


def test_non_finite_states_of_one_process_skip_the_cut_on_all(runs):
    for process in ("0", "1"):
        assert runs[process]["poisoned"]["status"] == ["skipped"]
        assert runs[process]["poisoned"]["state_size"] == 8
