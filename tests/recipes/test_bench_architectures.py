"""The benchmark of all architectures: a quick run of some of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import WHOLE_MODELS

BENCH = Path(__file__).parents[2] / "recipes" / "bench" / "architectures.py"


def test_quick_run_writes_its_table(tmp_path):
    command = [sys.executable, str(BENCH), "--quick", "--processes", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--architectures", "jamba", "mamba2"], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "architectures-quick.json").read_text())["results"]
    assert [result["model_type"] for result in results] == ["jamba", "mamba2"]
    assert [list(result["ways"]) for result in results] == [
        ["default", "GHOST's selection"],
        ["default", "GHOST's selection", "projected"],
    ]
    for result in results:
        for way in result["ways"].values():
            assert way["kl_divergence"] >= 0 and all(0 < error < 1 for error in way["relative_errors"])
    table = (tmp_path / "architectures-quick.md").read_text()
    assert "| jamba | " in table and table in done.stdout


def test_it_has_every_architecture():
    sys.path.insert(0, str(BENCH.parent))
    try:
        import architectures
    finally:
        sys.path.remove(str(BENCH.parent))
    assert set(architectures.MODELS) == {row.config_class.model_type for row in WHOLE_MODELS.values()}
