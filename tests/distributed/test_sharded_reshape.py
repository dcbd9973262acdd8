"""Checkpoints of real processes, cut on disk: training goes on from them as after a cut in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import torchrun

pytest.importorskip("deepspeed")

from reshape_worker import SCENARIOS, alone

WORKER = Path(__file__).with_name("reshape_worker.py")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, list]]:
    """What each process saw: the losses after the cut."""
    output = tmp_path_factory.mktemp("reshape")
    torchrun(WORKER, str(output))
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_losses_are_those_of_a_cut_in_process(results, name):
    architecture, realization, engine, _ = SCENARIOS[name]
    expected = alone(architecture, realization, shared_steps=engine == "zero")
    for process in results:
        torch.testing.assert_close(process[name], expected, rtol=0, atol=1e-6)


def test_fp32_and_bf16_weights_are_cut_alike(results):
    assert [process["wrong in bf16"] for process in results] == [[], []]
