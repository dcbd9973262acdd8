"""What the benchmarks share: where their results go, and in which form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def write_results(output: Path, name: str, results: dict[str, Any], tables: str) -> None:
    """Write NAME.json and NAME.md into a directory, and print the tables."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{name}.json"
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(tables, encoding="utf-8")
    print(tables)
    print(f"written to {file} and {file.with_suffix('.md').name}")
