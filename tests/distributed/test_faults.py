"""A cut that is broken at any stage: nothing saved is lost, nobody hangs, and the same command goes on as if unbroken.

`make test` breaks one process at each stage, and what raises at the main ones; `make test-distributed` does it all.
"""

from __future__ import annotations

from pathlib import Path

import faults
import pytest
from faults import STAGES, Ended, Fault, break_and_resume, matrix, odd_row, run, train

DOCUMENT = (Path(__file__).parents[2] / "recipes" / "README.md").read_text(encoding="utf-8")
SHORT = [Fault("kill", "one", stage) for stage in ("statistics", "exchange of the plan", "surgery", "wrapper")]
SHORT += [Fault("raise", "one", stage) for stage in ("fit", "surgery")]
SHORT += [Fault("kill", "all", "weights being saved"), Fault("kill", "one", "optimizer")]
SHORT += [Fault("disk full", "one", "record being saved"), Fault("kill", "one", "record being saved")]
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Ended:
    """The unbroken run."""
    ended = faults.unbroken(tmp_path_factory.mktemp("unbroken"))
    assert [result["history"] for result in ended.results] == [[["cut", 3]]] * 2
    return ended


def cells() -> list:
    return [
        pytest.param(
            fault, id=f"{fault.stage}-{fault.kind} {fault.where}", marks=[] if fault in SHORT else pytest.mark.long
        )
        for fault in matrix()
    ]


@pytest.mark.parametrize("fault", cells())
def test_a_broken_cut(fault, tmp_path, expected):
    outcome = break_and_resume(fault, tmp_path, expected)
    assert outcome.ended.by_themselves and outcome.ended.seconds < faults.PATIENCE
    assert outcome.left == []
    assert outcome.equal
    before_the_cut = fault.stage in ("statistics", "ranking", "fit", "surgery")
    if before_the_cut and fault.kind == "raise":
        # The same error everywhere, and nothing is cut.
        (first, second), message = outcome.ended.errors, f"process {STAGES[fault.stage][2]} of 2, "
        assert first == second and first[0] == "ValueError" and first[1].startswith(message)
        assert first[1].endswith("this process fails on purpose")
        assert outcome.state_sizes == [8, 8]
    # The documentation has the table that the harness makes.
    assert f"| {' | '.join(outcome.row())} |" in DOCUMENT


@pytest.mark.parametrize("name", faults.ODDITIES)
def test_one_process_is_unlike_the_others(name, tmp_path):
    fault, tokens = faults.ODDITIES[name]
    row = odd_row(name, run(lambda: train(tmp_path, tokens), tmp_path, fault))
    assert "FAILS" not in row[1] and "DIFFERENT" not in row[1]
    assert f"| {' | '.join(row)} |" in DOCUMENT


def test_every_stage_is_in_the_table():
    assert all(DOCUMENT.count(f"| {fault.stage} | {fault.kind} {fault.where} |") == 1 for fault in matrix())


def test_a_fault_that_is_not_noticed_would_be_seen(tmp_path, expected, monkeypatch):
    """The harness itself: without the agreement at the end of a block, one process waits until the other is gone."""
    monkeypatch.setattr("hf_compressm.distributed.processes.Processes.all_or_none", lambda self, doing: _nothing())
    ended = run(lambda: train(tmp_path), tmp_path, Fault("raise", "one", "fit"))
    assert ended.errors[0] != ended.errors[1]


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *error):
        return None
