"""How a cut is shared out, and the calculator: their benchmarks run; the numbers are no test's business."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "recipes" / "bench"
pytestmark = pytest.mark.long


def run(*command: str) -> str:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_how_the_work_is_shared_out():
    printed = run(str(BENCH / "processes.py"), "--quick")
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| Mamba-")]
    assert [row[1] for row in rows] == ["1", "2", "4"] * 2
    assert all(float(row[4]) > 0 for row in rows)


def test_estimates_beside_measurements(tmp_path):
    run(str(BENCH / "estimate.py"), "--quick", "--output", str(tmp_path))
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md"}
