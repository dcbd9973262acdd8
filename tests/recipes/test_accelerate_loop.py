"""The hand-written loop: runs that stop and go on, on one process and on two, against one that does not stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate_loop
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parents[1]
RECIPES = TESTS.parent / "recipes"
# The cut is due at step 4 and takes the tokens of steps 3 and 4; an epoch has 7 batches.
SMALL = (
    *("--hidden_size", "16", "--state_size", "16", "--target_state_size", "4", "--block_size", "128"),
    *("--steps", "20", "--save_every", "3", "--report_to", "tensorboard"),
)
ALONE, EACH_OF_TWO = ("--batch_size", "16"), ("--batch_size", "8")
ROWS = 120


def small_text(folder: Path) -> tuple[str, str]:
    """The option that lets the recipe learn a small text."""
    lines = (f"{a} times {b} is {a * b}, a line of arithmetic\n" for b in range(2, 40) for a in range(200))
    file = folder / "text.txt"
    file.write_text("".join(lines)[: ROWS * 128], encoding="utf-8")
    return "--files", str(file)


def run_here(output: Path, *arguments: str) -> Path:
    """Run the recipe on one process, in this one."""
    words, sys.argv = sys.argv, ["accelerate_loop.py", *SMALL, *ALONE, *arguments, "--output_dir", str(output)]
    try:
        accelerate_loop.main()
    finally:
        sys.argv = words
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return output


def start(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command as users do, and fail with its output if it fails."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    modules = [str(TESTS), str(TESTS / "distributed"), os.environ.get("PYTHONPATH", "")]
    base = {"OMP_NUM_THREADS": "1", "PATH": os.pathsep.join(paths), "PYTHONPATH": os.pathsep.join(modules)}
    base |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, env=os.environ | base | environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return result


def logged(output: Path, name: str = "loss") -> dict[int, float]:
    """What the tracker was told, by step."""
    (file,) = (output / "accelerate_loop").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def assert_evaluated(output: Path, text: tuple[str, str]) -> None:
    """The end of the text, which no step has seen, was evaluated on: the loss is Transformers' own."""
    held_out = accelerate_loop.load_blocks([Path(text[1])], 128)[-ROWS // 20 :]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(output / "step_20").eval()
        loss = model(held_out, labels=held_out).loss.item()
    assert logged(output, "held_out_loss") == {20: pytest.approx(loss, rel=1e-5)}


def assert_same_end(ours: Path, theirs: Path, tolerance: float = 0.0) -> None:
    """The same weights in the last checkpoint, of the smaller model."""
    assert json.loads((ours / "step_20" / "config.json").read_text())["state_size"] == 4
    ours, theirs = (load_file(folder / "step_20" / "model.safetensors") for folder in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> tuple[str, str]:
    return small_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", params=["1", "2"], ids=["each batch a step", "accumulated"])
def unbroken(request, text, tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """A run on one process in one go, and what it was started with."""
    options = (*text, "--accumulation", request.param)
    return run_here(tmp_path_factory.mktemp("unbroken"), *options), options


@pytest.mark.parametrize(("checkpoint", "cuts"), [("step_3", 1), ("step_6", 0)], ids=["before the cut", "after it"])
def test_a_resumed_run_is_the_unbroken_one(unbroken, text, tmp_path, capsys, checkpoint, cuts):
    whole, options = unbroken
    assert_evaluated(whole, text)
    resumed = run_here(tmp_path, *options, "--resume", str(whole / checkpoint))
    assert capsys.readouterr().out.count("CompreSSM, step 4") == cuts
    assert logged(resumed) == {step: loss for step, loss in logged(whole).items() if step > int(checkpoint[-1])}
    assert logged(whole)[20] < logged(whole)[1]
    assert logged(whole, "lr")[20] == pytest.approx(0, abs=1e-12) and logged(whole, "lr")[1] == pytest.approx(3e-3)
    assert logged(whole, "compressm/state_size") == {4: 4.0}
    assert_same_end(resumed, whole)
    ours, theirs = (json.loads((run / "step_20" / "compressm.json").read_text()) for run in (resumed, whole))
    (cut,) = ours["cuts"]
    assert (cut["step"], cut["status"]) == (4, "cut")
    # What was measured around the cut is kept by a run that goes on after it.
    assert list(ours["evaluations"]) == ["right before the cut", "right after the cut", "at the end of training"]
    assert ours["evaluations"] == theirs["evaluations"]
    card = (resumed / "step_20" / "README.md").read_text()
    assert (
        "| 512 tokens (4 ×) |" in card and f"| {ours['evaluations']['at the end of training']['loss']:.4f} |" in card
    )


def test_too_little_text_is_named(text, tmp_path):
    with pytest.raises(ValueError, match=rf"--files have {ROWS} blocks .* fewer than --batch_size"):
        run_here(tmp_path, *text, "--batch_size", "500")


@pytest.mark.distributed
def test_two_processes_are_like_one_and_resume(text, tmp_path):
    """Started by accelerate's config, and resumed by torchrun; each process has other inputs when it saves."""
    whole, loop = tmp_path / "whole", str(RECIPES / "accelerate_loop.py")
    launch = ("accelerate", "launch", "--config_file", str(RECIPES / "configs" / "cpus.yaml"))
    options = (*SMALL, *text, *EACH_OF_TWO, "--cpu")
    first = start(*launch, loop, *options, "--output_dir", str(whole), ACCELERATE_USE_CPU="true")
    assert first.stdout.count("CompreSSM, step 4") == 1 and first.stdout.count("checkpoints are in") == 1
    alone = run_here(tmp_path / "alone", *text)
    assert logged(whole) == pytest.approx(logged(alone), abs=1e-4)
    assert_evaluated(whole, text)
    assert first.stdout.count("held-out loss") == 1

    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", loop)
    resumed = tmp_path / "resumed"
    second = start(*torchrun, *options, "--output_dir", str(resumed), "--resume", str(whole / "step_3"))
    assert second.stdout.count("CompreSSM, step 4") == 1
    assert second.stderr.count("falling back") <= 3
    assert_same_end(resumed, whole)
