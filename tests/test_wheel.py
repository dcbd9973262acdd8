"""The wheel holds all that the package needs, and names all that it depends on: it runs where nothing else is."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# What is no code, and must not be forgotten.
DATA = {
    "hf_compressm/py.typed",
    "hf_compressm/hub_cards/model.md",
    "hf_compressm/templates/report.html",
    "hf_compressm/modeling_compressm.py",
    "hf_compressm/metrics/perplexity.py",
    "hf_compressm/metrics/kl_divergence.py",
    "hf_compressm/metrics/last_position_accuracy.py",
    "hf_compressm/metrics/recall_accuracy.py",
}
USE = """
import sys
from pathlib import Path
import torch
import hf_compressm
from hf_compressm import CompreSSMConfig, compress
from hf_compressm.cards import write_card
from hf_compressm.metrics import metric_path
from hf_compressm.report_page import write_report_page
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM
folder = Path(sys.argv[1])
assert Path(hf_compressm.__file__).is_relative_to(sys.prefix), hf_compressm.__file__
special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
sizes = {"vocab_size": 16, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8}
model = Mamba2ForCausalLM(Mamba2Config(**sizes, **special, n_groups=1, chunk_size=8)).eval()
ids = torch.arange(12).repeat(2, 1)
compress(model, [ids], CompreSSMConfig(state_size=3, realization="projected"))
model.save_pretrained(folder)
assert (folder / "modeling_compressm.py").is_file()
again = AutoModelForCausalLM.from_pretrained(folder)
assert torch.equal(again(ids).logits, model(ids).logits) and again.config.state_size == 3
assert "## What was cut" in write_card(folder).read_text()
assert "<html" in write_report_page(folder).read_text()
assert Path(metric_path("perplexity")).exists()
"""


def dependencies(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions that are required, without extras, and what they require, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [(Requirement(text), frozenset()) for text in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
        )
        if not wanted:
            continue
        distribution = importlib.metadata.distribution(requirement.name)
        known = distribution.metadata["Name"].lower() in found
        found[distribution.metadata["Name"].lower()] = distribution
        if not known or requirement.extras:
            inner = map(Requirement, distribution.requires or [])
            waiting += [(item, frozenset(requirement.extras) | {""}) for item in inner]
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution, and the wheel that was built from it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("hf_compressm", "hub_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return next(output.glob("*.tar.gz")), next(output.glob("*.whl"))


def test_what_is_inside(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    modules = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "hf_compressm").rglob("*.py")
        if "__pycache__" not in file.parts
    }
    assert names >= DATA | modules
    assert not [name for name in names if name.startswith(("tests", "recipes", "hub_cards"))]
    with tarfile.open(sdist) as content:
        assert any(name.endswith("/hub_cards/model.md") for name in content.getnames())


def test_it_runs_where_nothing_else_is(built, tmp_path):
    _, wheel = built
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    (site_packages,) = (tmp_path / "empty" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site_packages)
    (metadata,) = site_packages.glob("*.dist-info")
    requires = importlib.metadata.PathDistribution(metadata).requires
    for distribution in dependencies([text for text in requires if "extra ==" not in text]).values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            place = site_packages / top
            if not place.exists():
                place.symlink_to(Path(distribution.locate_file(top)).resolve())
    python, environment = tmp_path / "empty" / "bin" / "python", {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)

    def run(*arguments: object) -> str:
        command = [str(python), *map(str, arguments)]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout

    run("-c", USE, tmp_path / "model")
    assert "CompressmMamba2ForCausalLM" in run("-m", "hf_compressm.cli", "inspect", tmp_path / "model")
