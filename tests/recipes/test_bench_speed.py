"""The speed benchmarks run, write what they promise and judge by their goals; their numbers are no test's business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "bench"
MODULES = ("decoding", "peak_memory", "reporting", "scan_kernels", "speed", "speed_tables", "workloads")


@pytest.fixture
def benchmark_modules(monkeypatch):
    """The benchmarks' modules as their neighbours import them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def run_benchmark(name, *options):
    command = [sys.executable, str(BENCHMARKS / name), "--device", "cpu", *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


@pytest.mark.long
def test_quick_run_writes_every_table(tmp_path):
    result = run_benchmark("speed.py", "--quick", "--output", tmp_path)
    results = json.loads((tmp_path / "speed-quick.json").read_text())
    assert [(row["architecture"], row["state_size"]) for row in results["steps"]] == [
        (architecture, size) for architecture in ("mamba", "mamba2") for size in (32, 8)
    ]
    assert [row["state_size"] for row in results["born_small"]] == ["32 → 8", "32 → 8"]
    for row in results["cuts"]:
        assert set(row["parts_ms"]) == {"measure", "plan", "check", "apply"}
        assert row["tokens"] >= 4096 and row["steps"] > 0
    assert [row["realization"] for row in results["realizations"]] == ["uncut", "stock", "projected"]
    models = [("mamba", "stock"), ("mamba2", "stock"), ("mamba2", "projected")]
    assert [(row["architecture"], row["realization"]) for row in results["runs"]] == models
    for row in results["runs"]:
        assert row["cut_at_step"] >= 2 and row["cut_step_ms"]["count"] == row["steps"] - row["cut_at_step"]
        assert row["cut_s"] < row["cut_run_s"] and row["run_ratio"] == row["full_s"] / row["cut_run_s"]
    assert [row["state_size"] for row in results["limit"]] == [8, 8]
    decoding = {(row["architecture"], row["realization"], row["state_size"]): row for row in results["decoding"]}
    assert set(decoding) == {(*model, 8) for model in models} | {(*model, 32) for model in models[:2]}
    # One layer, 32 channels, float32.
    assert all(row["state_bytes"] == 32 * 4 * key[2] for key, row in decoding.items())
    assert {(row["architecture"], row["realization"]) for row in results["training_memory"]} == set(models)
    assert results["machine"]["versions"]["torch"] and len(results["goals"]) == 2
    assert "scan mambapy" in results["kernels"]["mamba"]
    table = (tmp_path / "speed-quick.md").read_text()
    assert all(f"## ({part})" in table for part in "abcdefghi") and table in result.stdout
    # The benchmark says what it computes with before it computes.
    assert "mamba computes with: " + results["kernels"]["mamba"] in result.stderr


def test_large_run_tells_time_and_memory_of_one_cut(tmp_path):
    run_benchmark("speed.py", "--quick", "--large", "--output", tmp_path)
    results = json.loads((tmp_path / "speed-large-quick.json").read_text())
    (row,) = results["large"]
    assert row["steps"] == pytest.approx(sum(row["parts_ms"].values()) / row["step_ms"]) and row["cut_mib"] > 0
    assert [goal["wanted"] for goal in results["goals"]] == ["at most 3", "at most 1"]
    assert "## (j)" in (tmp_path / "speed-large-quick.md").read_text()


@pytest.mark.usefixtures("benchmark_modules")
@pytest.mark.parametrize(
    ("measured", "met"),
    [((2.8, 5.0, 0.97, 3.0, 100), True), ((2.79, 4.99, 0.969, 3.01, 101), False), ((9, 9, 1.031, 9, 200), None)],
)
def test_goals_are_judged_at_their_limits(measured, met):
    from speed_tables import judge

    run, step, born, cut, memory = measured
    results = {
        "runs": [
            {
                "architecture": kind,
                "state_size": size,
                "steps": 100,
                "run_ratio": run,
                "step_ratio": step,
            }
            for kind, size in (("mamba", "128 → 12"), ("mamba", "32 → 8"), ("mamba2", "128 → 12"))
        ],
        "born_small": [{"architecture": "mamba2", "state_size": "64 → 16", "ratio": {"median": born}}],
        "large": [
            {
                "architecture": "mamba",
                "state_size": "128 → 16",
                "parameters": 130e6,
                "steps": cut,
                "step_mib": 100,
                "cut_mib": memory,
            }
        ],
    }
    goals = judge(results, "cpu")
    # Only mamba's headline cut has a goal for its run.
    assert [goal["value"] for goal in goals] == [run, step, born, cut, memory / 100]
    assert [goal["met"] for goal in goals] == ([True, True, False, False, False] if met is None else [met] * 5)
    # On a GPU times are as measured.
    assert [goal["value"] for goal in judge(results, "cuda")] == [born, cut, memory / 100]
    assert judge({}, "cpu") == []


@pytest.mark.usefixtures("benchmark_modules")
def test_limit_is_what_is_left_without_states():
    from speed import compare_with_limit

    times = {128: 100.0, 16: 30.0, 1: 20.0}
    rows = [{"architecture": "mamba", "state_size": n, "step_ms": {"median": ms}} for n, ms in times.items()]
    (row,) = compare_with_limit(rows)
    assert (row["largest"], row["state_size"], row["speed_up"], row["largest_speed_up"]) == (128, 16, 100 / 30, 5)
    assert row["share"] == pytest.approx(70 / 80)


@pytest.mark.long
def test_quick_gpu_run_on_a_cpu_measures_every_part(tmp_path):
    result = run_benchmark("gpu.py", "--quick", "--output", tmp_path)
    results = json.loads((tmp_path / "gpu-quick.json").read_text())
    rows = {part: results[part] for part in ("training", "cut", "decoding", "language")}
    assert [row for part in rows.values() for row in part if "error" in row] == []
    assert results["failed"] == []
    assert {(row["hidden_size"], row["compiled"]) for row in rows["training"]} == {(16, 0), (16, 1), (32, 0)}
    assert all(row["steps"] > 0 and row["parameters"] > 0 for row in rows["cut"])
    assert {row["batch"] for row in rows["decoding"]} == {1, 2}
    arms = [row["arm"] for row in rows["language"]]
    assert arms == [
        "full size",
        "born small",
        "cut, stock",
        *("full size", "born small", "cut, stock", "cut, projected"),
    ]
    for row in rows["language"]:
        assert row["curve"][-1]["step"] == row["steps"] and (row["cut_seconds"] > 0) == row["arm"].startswith("cut")
    assert "bfloat16" in (tmp_path / "gpu-quick.md").read_text() and "computes with" in result.stdout

    # A part that is run again for one architecture replaces its rows only; a fault stands there as an error.
    before = (tmp_path / "gpu-quick.json").read_text()
    options = ("--parts", "language", "--architectures", "mamba", "--steps", "1")
    result = run_benchmark("gpu.py", "--quick", "--output", tmp_path, *options)
    again = json.loads((tmp_path / "gpu-quick.json").read_text())
    assert again["decoding"] == json.loads(before)["decoding"]
    assert again["language"][:4] == [row for row in results["language"] if row["architecture"] == "mamba2"]
    assert all("error" in row for row in again["language"][4:]) and "Failed:" in result.stdout


@pytest.fixture
def triton_only(tmp_path, monkeypatch, benchmark_modules):
    """A mamba-ssm without its CUDA extension, and no causal-conv1d; what the benchmark patches is undone."""
    for module, name in (
        (modeling_mamba, "mamba_inner_fn"),
        (modeling_mamba2, "mamba2_split_conv1d_scan_combined"),
        (modeling_mamba2, "mamba2_chunk_scan"),
        (modeling_mamba2, "mamba2_selective_state_update"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    kernels = tmp_path / "mamba_ssm" / "ops" / "triton"
    kernels.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda\n")
    (kernels / "ssd_combined.py").write_text(
        "def mamba_chunk_scan_combined(x, chunk_size):\n    return x, chunk_size\n"
    )
    (kernels / "selective_state_update.py").write_text("def selective_state_update(state):\n    return state\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield kernels
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


def test_triton_kernels_serve_mamba2_without_the_cuda_extension(triton_only):
    from scan_kernels import choose_kernels, kernels_in_use

    assert kernels_in_use("mamba2")["scan"] == "torch"
    notes = choose_kernels()
    assert "Triton kernels serve Mamba-2" in notes[0] and "causal-conv1d is not installed" in notes[1]
    # An argument that the kernel does not know is dropped.
    assert modeling_mamba2.mamba2_chunk_scan(1, chunk_size=2, cu_seq_lens_q=3) == (1, 2)
    parts = kernels_in_use("mamba2")
    assert (parts["scan"], parts["decoding"], parts["fused training"]) == ("mamba_ssm", "mamba_ssm", "none")
    assert kernels_in_use("mamba")["scan"] == "mambapy" and "selective_scan_cuda" not in sys.modules


def test_kernels_that_cannot_be_imported_leave_plain_torch(triton_only):
    from scan_kernels import choose_kernels, kernels_in_use

    (triton_only / "ssd_combined.py").write_text("raise RuntimeError('no triton here')\n")
    assert "no triton here" in choose_kernels()[0]
    assert kernels_in_use("mamba2")["scan"] == "torch"


FAKE_PYTHON = r"""#!/usr/bin/env bash
# Stands for a Python that sees a GPU of compute capability 9.0, and can build.
case "$*" in
    *get_device_capability*) echo 90 ;;
    *version_info*) echo cp312-torch2.11 ;;
    *"-m pip wheel"*) cp "${@: -1}/setup.py" "$RECORD/$(basename "$(head -n 1 "${@: -1}/setup.py" | cut -c3-)").py"
        mkdir -p "${@: -2:1}" && touch "${@: -2:1}/$(head -n 1 "${@: -1}/setup.py" | cut -c3-)-1-none.whl" ;;
    *"pip install"*whl*) touch "$RECORD/installed" ;;
    *"pip install"*) ;;
    *) exit 1 ;;
esac
"""
SETUP = """# {name}
bare_metal_version = 13
cc_flag = []
cc_flag.append("-gencode")
cc_flag.append("arch=compute_75,code=sm_75")
if bare_metal_version >= 12:
    cc_flag.append("-gencode")
    cc_flag.append("arch=compute_120,code=sm_120")
cc_flag.append("-DBUILD")
"""


def build_kernels(tmp_path, setup=SETUP):
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    for name, version in (("mamba_ssm", "2.3.2.post1"), ("causal_conv1d", "1.7.0")):
        (tmp_path / "setup.py").write_text(setup.format(name=name))
        with tarfile.open(tmp_path / f"{name}-{version}.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "setup.py", f"{name}-{version}/setup.py")
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "RECORD": str(tmp_path)}
    command = ["bash", str(BENCHMARKS / "build_kernels.sh"), str(tmp_path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)


def test_kernels_are_built_for_one_gpu_only(tmp_path):
    build_kernels(tmp_path)
    for name in ("mamba_ssm", "causal_conv1d"):
        variables = {}
        exec((tmp_path / f"{name}.py").read_text(), variables)
        assert variables["cc_flag"] == ["-gencode", "arch=compute_90,code=sm_90", "-DBUILD"]
        (tmp_path / f"{name}.py").unlink()
    assert (tmp_path / "installed").exists()
    # Wheels of an earlier build are taken as they are.
    build_kernels(tmp_path)
    assert not (tmp_path / "mamba_ssm.py").exists()


def test_a_build_that_fails_is_said_and_ends_nothing(tmp_path):
    result = build_kernels(tmp_path, "# {name}\nflags = []\n")
    assert (
        "mamba-ssm could not be built" in result.stdout and "in a way that this script does not know" in result.stdout
    )
