"""The command line: what it prints, what it returns, and what a user's mistake gets."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import lively, tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_compressm import CompreSSMConfig, measure, plan_compression
from hf_compressm.cli import app


@pytest.fixture
def saved(tmp_path, tiny):
    """A saved model, and a plan for it."""
    model = lively(tiny.build())
    model.save_pretrained(tmp_path / "full")
    plan_compression(model, measure(model, [tokens()]), CompreSSMConfig(state_size=3)).save(tmp_path)
    return tmp_path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_reshape(saved):
    code, out, _ = run("reshape", saved / "full", "--plan", saved / "plan.json", "--output", saved / "small")
    assert code == 0 and "model.safetensors" in out
    model = AutoModelForCausalLM.from_pretrained(saved / "small")
    assert model.config.state_size == 3
    assert torch.isfinite(model(tokens()).logits).all()


def test_reshape_as_json(saved):
    code, out, _ = run("reshape", saved / "full", "--plan", saved, "--output", saved / "small", "--json")
    report = json.loads(out)
    assert code == 0 and report["files"]["model.safetensors"] == "reshaped"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing", "--plan", "plan.json", "--output", "small"], "there is no checkpoint directory"),
        (["full", "--plan", "full", "--output", "small"], "plan.json is missing; a plan is two files"),
        (["full", "--plan", "plan.json", "--output", "full"], "exists; name a directory that does not"),
    ],
)
def test_mistakes_get_one_line(saved, arguments, message):
    places = [argument if argument.startswith("--") else saved / argument for argument in arguments]
    code, out, err = run("reshape", *places)
    assert code == 1 and out == ""
    assert message in err and err.startswith("hf-compressm: ") and err.count("\n") == 1
    assert not (saved / "small").exists()


def test_a_plan_of_another_model(saved, tiny):
    other = tiny.build(state_size=16)
    other.save_pretrained(saved / "other")
    code, _, err = run("reshape", saved / "other", "--plan", saved, "--output", saved / "small")
    assert code == 1 and "the plan is for state_size 8, but the model has 16" in err


def test_estimate(saved):
    code, out, _ = run(
        "estimate", saved / "full", "--state-size", 2, "--world-size", 4, "--strategy", "zero2", "--json"
    )
    estimate = json.loads(out)
    assert code == 0 and estimate["before"]["state_bytes"] == 4 * estimate["after"]["state_bytes"]
    code, out, _ = run("estimate", saved / "full", "--state-size", 2)
    assert code == 0 and "N 8 → 2" in out and "assumptions:" in out


def test_estimate_refuses(saved):
    code, _, err = run("estimate", saved / "full", "--state-size", 8)
    assert code == 1 and "give fewer" in err
    code, _, err = run("estimate", saved / "nowhere", "--state-size", 2)
    assert code == 1 and "nowhere" in err
    # Of options, typer itself tells.
    assert run("estimate", saved / "full", "--state-size", 2, "--strategy", "zero9")[0] == 2


def test_help_has_an_example():
    for command in ("reshape", "estimate"):
        code, out, _ = run(command, "--help")
        assert code == 0 and f"hf-compressm {command}" in " ".join(out.split())
