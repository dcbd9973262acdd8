"""What processes tell each other: in three real processes, in a group of two of them, and in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import torchrun

from hf_compressm.distributed.processes import ALONE, NonFiniteError, all_processes


def expected(size: int, rank: int) -> dict:
    messages = ["", "of the \x00 first", "another"][:size]
    first_cause = {"one fails": "ValueError", "all fail": "NonFiniteError", "unknown": "Strange"}
    failing = {"one fails": rank == 1, "all fail": True, "unknown": rank == 1}
    cause = {what: first_cause[what] if failing[what] else "NoneType" for what in failing}
    return {
        "size": size,
        "rank": rank,
        "is_main": rank == 0,
        "owns": [number % size == rank for number in range(4)],
        "sum": [sum(range(1, size + 1)), 10.0 * size],
        "transposed": [[float(sum(range(1, size + 1)))] * 3] * 2,
        "total": sum(range(size)) + size / 2,
        "broadcast": [0, 0],
        "all_gather": messages,
        "gather": messages if rank == 1 else [],
        "same": None,
        "no failure": None,
        "one fails": ["ValueError", f"process 1 of {size}, counting: bad number 7", cause["one fails"]],
        "all fail": ["NonFiniteError", f"process 0 of {size}, counting: NaN on 0", cause["all fail"]],
        "unknown": ["RuntimeError", f"process 1 of {size}, counting: Strange: what?", cause["unknown"]],
        "afterwards": size,
    }


@pytest.mark.distributed
def test_three_processes_and_a_group_of_two(tmp_path):
    torchrun(Path(__file__).with_name("processes_worker.py"), str(tmp_path), processes=3)
    for rank in range(3):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        refusal = result["all"].pop("different")
        assert "different versions of the plan (process 0: abababababab, process 1:" in refusal
        assert result["all"] == expected(3, rank)
        assert ("pair" in result) == (rank > 0)
        if rank > 0:
            assert "process 1: abababababab); nothing was cut" in result["pair"].pop("different")
            assert result["pair"] == expected(2, rank - 1)


def test_one_process():
    assert all_processes() == ALONE
    tensor = torch.tensor([1.0, 2.0])
    ALONE.sum([tensor])
    ALONE.broadcast(tensor)
    assert tensor.tolist() == [1.0, 2.0]
    assert (ALONE.size, ALONE.rank, ALONE.is_main, ALONE.owns(5), ALONE.total(2.5)) == (1, 0, True, True, 2.5)
    assert ALONE.all_gather(b"plan") == ALONE.gather(b"plan", to=0) == [b"plan"]
    ALONE.check_same("ab", "the plan")
    with pytest.raises(NonFiniteError, match=r"^as it is$"), ALONE.all_or_none("counting"):
        raise NonFiniteError("as it is")
