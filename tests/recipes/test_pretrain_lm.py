"""The language-model recipe, started as its users start it, on a small text."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pretrain_lm
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_lm.py"
DYING_RECIPE = Path(__file__).with_name("dying_pretrain_lm.py")
SMALL = (
    *("--hidden_size", "16", "--layers", "2", "--state_size", "16", "--target_state_size", "4"),
    *("--block_size", "32", "--max_steps", "12", "--per_device_train_batch_size", "4", "--held_out", "0.25"),
    *("--save_steps", "4", "--use_cpu", "--report_to", "none", "--disable_tqdm", "True"),
    *("--cut_options", '{"calibration_tokens": 256}'),
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """Four documents of arithmetic; returns the pattern that matches them."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        lines = (f"{a} times {number + 2} is {a * (number + 2)}, a line of arithmetic\n" for a in range(200))
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    return str(folder / "*.txt")


def run(
    tmp_path: Path, *arguments: str, processes: int = 1, dies_after: int | None = None
) -> subprocess.CompletedProcess:
    """Start the recipe as its users do; with `dies_after`, it is killed right after that step."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        arguments = ("--ddp_backend", "gloo", *arguments)
    command += [str(RECIPE)] if dies_after is None else [str(DYING_RECIPE), str(dies_after)]
    environment = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, *SMALL, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=900
    )


def assert_evaluated(output: Path, texts: str) -> None:
    """The saved numbers are those of the saved model, by Transformers' own loss."""
    data, tokenizer = pretrain_lm.DataArguments([texts], held_out=0.25), AutoTokenizer.from_pretrained(output)
    tokens = pretrain_lm.tokenize(pretrain_lm.load_texts(data, seed=42)["test"][:], tokenizer)
    blocks = torch.tensor(pretrain_lm.pack(tokens, block_size=32)["input_ids"])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(output).eval()(blocks, labels=blocks).loss.item()
    saved = json.loads((output / "eval_results.json").read_text())
    assert saved["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert saved["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    tokens_per_byte = sum(map(len, tokens["input_ids"])) / sum(tokens["bytes"])
    assert saved["eval_bits_per_byte"] == pytest.approx(loss / math.log(2) * tokens_per_byte, rel=1e-5)


@pytest.mark.parametrize(("architecture", "tokenizer"), [("mamba", "bytes"), ("mamba2", "bpe")])
def test_one_process_cuts_and_saves_a_stock_model(tmp_path, texts, architecture, tokenizer):
    output = tmp_path / "out"
    options = ("--architecture", architecture, "--realization", "stock", "--tokenizer", tokenizer)
    options += ("--vocab_size", "300")
    result = run(tmp_path, "--train_files", texts, "--output_dir", str(output), *options)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("CompreSSM, step") == 1 and result.stdout.count("state size N") == 1
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.model_type == architecture and model.config.state_size == 4
    ids = AutoTokenizer.from_pretrained(output)("7 times 2 is", return_tensors="pt")["input_ids"]
    assert AutoTokenizer.from_pretrained(output).decode(ids[0]) == "7 times 2 is"
    assert torch.isfinite(model(ids).logits).all()
    assert json.loads((output / "compressm.json").read_text())["cuts"][0]["status"] == "cut"
    assert_evaluated(output, texts)
    card = (output / "README.md").read_text()
    assert "| distance | right before the cut | right after the cut | at the end of training |" in card
    assert "| 128 tokens (4 ×) |" in card and "| bits per byte |" in card
    assert result.stdout.count("Recall: nats per token gained") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train_files", "nowhere/*.txt"), "no file matches 'nowhere"),
        (("--tolerance", "0.1"), "--target_state_size and --tolerance exclude each other"),
        (("--cut_options", "{"), "--cut_options is not JSON"),
        (("--block_size", "100000"), "hold fewer than --block_size 100000 tokens"),
        (("--target_state_size", "16"), "target state_size 16 is not below the current 16; choose 1..15"),
    ],
)
def test_bad_input_is_named(tmp_path, texts, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        pretrain_lm.main([*SMALL, "--train_files", texts, "--output_dir", str(tmp_path / "out"), *arguments])


@pytest.mark.distributed
def test_two_processes_are_killed_and_go_on(tmp_path, texts):
    """The cut is due at step 6, checkpoints at 4 and 8: one kill loses the cut, the other comes after checkpoint-8."""
    options = ("--train_files", texts, "--cut_at", "6")
    whole = tmp_path / "whole"
    result = run(tmp_path, *options, "--output_dir", str(whole), processes=2)
    assert result.returncode == 0, result.stderr[-4000:]
    assert_evaluated(whole, texts)

    for last_step, going_on_from, cut_again in ((6, "checkpoint-4", True), (9, "checkpoint-8", False)):
        killed = tmp_path / f"killed at {last_step}"
        victim = run(tmp_path, *options, "--output_dir", str(killed), processes=2, dies_after=last_step)
        assert victim.returncode != 0 and not (killed / "model.safetensors").exists()
        result = run(tmp_path, *options, "--output_dir", str(killed), processes=2)
        assert result.returncode == 0, result.stderr[-4000:]
        assert result.stderr.count(f"going on from {killed / going_on_from}") == 1
        assert result.stdout.count("CompreSSM, step 6") == cut_again

        ours, theirs = (load_file(folder / "model.safetensors") for folder in (killed, whole))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
