"""How a run goes on from a checkpoint that was cut: the command, and the file that tells it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import lively, tokens
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMConfig, measure, plan_compression
from hf_compressm.checkpoint import resize_to_checkpoint
from hf_compressm.continuation import CONTINUE_FILE, Continuation, cut_checkpoint, going_on

SCRIPT = """
import json, sys
from hf_compressm.continuation import command_of_this_run
print(json.dumps(command_of_this_run()))
"""
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"


@pytest.mark.parametrize(
    "command, expected",
    [
        (["python", "t.py"], ["python", "t.py", "--resume", "new"]),
        (["python", "t.py", "--resume", "old", "--steps", "9"], ["python", "t.py", "--steps", "9", "--resume", "new"]),
        (["python", "t.py", "--resume=old"], ["python", "t.py", "--resume", "new"]),
        (["python", "t.py", "--resume_also", "x"], ["python", "t.py", "--resume_also", "x", "--resume", "new"]),
    ],
)
def test_a_command_that_goes_on(command, expected):
    assert going_on(command, "--resume", "new") == expected


@pytest.mark.parametrize("launched", [True, False], ids=["by a launcher", "by a shell"])
def test_the_command_of_a_run(tmp_path, launched):
    """The launcher's, which started the processes, and not a shell's, which has it in one word."""
    script, launcher = tmp_path / "train.py", tmp_path / "launch.py"
    script.write_text(SCRIPT)
    launcher.write_text(LAUNCHER)
    command = [sys.executable, *([str(launcher)] if launched else []), str(script), "--lr", "1e-3"]
    printed = subprocess.run(
        # Of the last command a shell makes itself.
        ["bash", "-c", f"{shlex.join(command)}; true"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(printed.splitlines()[-1]) == command


def test_a_checkpoint_is_cut_and_the_way_on_is_told(tiny, tmp_path, capsys):
    model = lively(tiny.build())
    model.save_pretrained(tmp_path / "checkpoint-3")
    plan = plan_compression(model, measure(model, [tokens()]), CompreSSMConfig(state_size=3))
    continuation = cut_checkpoint(tmp_path / "checkpoint-3", plan, tmp_path)
    smaller = tmp_path / "cut-checkpoint-3"
    assert continuation == Continuation.read(tmp_path)
    assert continuation.checkpoint == str(smaller) and continuation.command[-2:] == [
        "--resume_from_checkpoint",
        str(smaller),
    ]
    assert AutoModelForCausalLM.from_pretrained(smaller).config.state_size == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3").config.state_size == 8
    printed = capsys.readouterr().out
    assert "state size 8 -> 3" in printed and shlex.join(continuation.command) in printed and CONTINUE_FILE in printed


def test_nothing_to_go_on_from(tmp_path):
    assert Continuation.read(tmp_path) is None


def test_what_fails_leaves_the_plan_to_try_again_with(tiny, tmp_path):
    model = lively(tiny.build())
    model.save_pretrained(tmp_path / "checkpoint-3")
    plan = plan_compression(model, measure(model, [tokens()]), CompreSSMConfig(state_size=3))
    (tmp_path / "cut-checkpoint-3").mkdir()
    with pytest.raises(FileExistsError, match="cut-checkpoint-3 exists"):
        cut_checkpoint(tmp_path / "checkpoint-3", plan, tmp_path)
    assert type(plan).load(tmp_path / "checkpoint-3-plan.json").digest() == plan.digest()
    assert Continuation.read(tmp_path) is None


def test_a_model_takes_on_the_size_in_a_checkpoints_config(tiny, tmp_path):
    tiny.build(state_size=3).save_pretrained(tmp_path)
    model = tiny.build()
    resize_to_checkpoint(model, tmp_path)
    assert model.config.state_size == 3
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    resize_to_checkpoint(model, tmp_path / "without a config")
    assert model.config.state_size == 3
