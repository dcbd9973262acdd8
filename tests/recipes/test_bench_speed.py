"""The speed benchmark runs and writes what it promises; its numbers are no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "recipes" / "bench" / "speed.py"


def test_quick_run_writes_every_table(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--quick", "--device", "cpu", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    results = json.loads((tmp_path / "speed-quick.json").read_text())
    assert {row["architecture"] for row in results["steps"]} == {"mamba", "mamba2"}
    assert [row["state_size"] for row in results["born_small"]] == ["32 → 8", "32 → 8"]
    for row in results["cuts"]:
        assert set(row["parts_ms"]) == {"measure", "plan", "check", "apply"}
        assert row["tokens"] >= 4096 and row["steps"] > 0
    assert [row["realization"] for row in results["realizations"]] == ["uncut", "stock", "projected"]
    assert results["machine"]["versions"]["torch"]
    table = (tmp_path / "speed-quick.md").read_text()
    assert all(f"## ({part})" in table for part in "abcde") and table in result.stdout
