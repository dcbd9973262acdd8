"""The benchmark of cutting a checkpoint on disk runs and writes what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "recipes" / "bench" / "reshape.py"


def test_quick_run_writes_its_table_and_leaves_no_checkpoint(tmp_path):
    output, scratch = tmp_path / "results", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, str(BENCHMARK), "--quick", "--output", str(output), "--scratch", str(scratch)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    results = json.loads((output / "reshape-quick.json").read_text())
    before, after = results["parameters"]
    assert after < before and results["bytes"][1] < results["bytes"][0]
    assert results["peak_anonymous_bytes"] > 0 and results["seconds"] > 0
    assert (output / "reshape-quick.md").read_text() in result.stdout
    assert list(scratch.iterdir()) == []
