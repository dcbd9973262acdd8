"""The collective operations of a cut: in two real processes, and in one, where each of them does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import torchrun

from hf_compressm.distributed.collectives import (
    broadcast_bytes,
    broadcast_tensor,
    check_same_everywhere,
    is_distributed,
    is_main_process,
    sum_over_processes,
    world_size,
)


@pytest.mark.distributed
def test_two_processes(tmp_path):
    torchrun(Path(__file__).with_name("collectives_worker.py"), str(tmp_path))
    for rank in (0, 1):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        refusal = result.pop("different")
        assert "the processes hold different versions of the plan (this one: abababababab); nothing was cut" in refusal
        assert result == {
            "is_distributed": True,
            "is_main_process": rank == 0,
            "world_size": 2,
            "sum": [3.0, 20.0],
            "sum in place": [3.0, 20.0],
            "tensor": [0, 0],
            "bytes": "of the \x00 first",
            "same": None,
            "afterwards": 2,
        }


def test_one_process():
    tensor = torch.tensor([1.0, 2.0])
    assert sum_over_processes(tensor) is tensor and broadcast_tensor(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert broadcast_bytes(b"plan", torch.device("cpu")) == b"plan"
    assert check_same_everywhere("ab", "the plan", torch.device("cpu")) is None
    assert (is_distributed(), is_main_process(), world_size()) == (False, True, 1)
