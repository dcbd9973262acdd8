"""FSDP1 in two real processes: whole mixers can be read between steps, and a cut be planned on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, lively, tokens
from fsdp1_worker import alone
from launch import torchrun

from hf_compressm import find_mixers

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict[str, dict]]:
    output = tmp_path_factory.mktemp("runs")
    torchrun(Path(__file__).with_name("fsdp1_worker.py"), str(output))
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


def test_mixers_can_be_read_and_training_does_not_notice(runs):
    model = lively(TINY["mamba"].build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        ids = tokens(8, 12, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {
        name: {key: item.norm().item() for key, item in mixer.module.named_parameters()}
        for name, mixer in find_mixers(model).items()
    }
    for process in runs:
        for name, result in process.items():
            if name.startswith("due"):
                continue
            assert result["same"], name
            assert result["mixers"].keys() == expected.keys()
            for mixer, norms in expected.items():
                assert result["mixers"][mixer] == pytest.approx(norms, rel=1e-5), name


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_the_plan_is_that_of_one_process_and_training_goes_on(runs, use_orig_params):
    first, second = (process[f"due {use_orig_params}"] for process in runs)
    expected = alone()
    assert first == second
    plan = first["plan"]
    for same in ("layers", "kept", "refits", "tokens"):
        assert plan[same] == expected["plan"][same]
    assert plan["errors"] == pytest.approx(expected["plan"]["errors"], rel=1e-3)
    assert plan["refits"] == ["alternating least squares"] * 2
    for matrices in ("readouts", "drives"):
        for ours, theirs in zip(plan[matrices], expected["plan"][matrices], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-2)
    assert "FSDP1 flattens parameters" in first["reason"]
    assert first["reports"] == [None] * 4 and first["history"] == [] and first["state_size"] == 8
    assert first["losses"] == pytest.approx(expected["losses"], abs=2e-6)
