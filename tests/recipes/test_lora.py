"""The LoRA recipe: an adapter that is trained across a cut, put back and merged, on a small text."""

from __future__ import annotations

import re

import lora
import pytest
import torch
from conftest import TINY
from peft import PeftConfig
from transformers import AutoModelForCausalLM

from hf_compressm import read_record

SMALL = (
    *("--hidden_size", "16", "--state_size", "16", "--target_state_size", "4", "--block_size", "32"),
    *("--base_steps", "3", "--max_steps", "30", "--rank", "2", "--logging_steps", "50", "--save_steps", "20"),
    *("--per_device_train_batch_size", "32", "--use_cpu", "--report_to", "none", "--disable_tqdm", "True"),
)


@pytest.fixture
def texts(tmp_path) -> str:
    lines = (f"{a} times {b} is {a * b}, a line of arithmetic\n" for b in range(2, 4) for a in range(40))
    (tmp_path / "text.txt").write_text("".join(lines), encoding="utf-8")
    return str(tmp_path / "*.txt")


@pytest.mark.parametrize("options", [(), ("--dora",)])
def test_an_adapter_comes_back_and_is_merged(tmp_path, texts, capsys, options):
    output = tmp_path / "out"
    files = ("--base_files", texts, "--adapter_files", texts)
    trainer = lora.main([*SMALL, *files, "--output_dir", str(output), *options])
    printed = capsys.readouterr().out
    before, after = (
        float(re.search(rf"held-out loss {what}: (.*) nats", printed)[1])
        for what in ("of the base model", "with adapters and a smaller state")
    )
    assert after < before
    card = (output / "adapter" / "README.md").read_text()
    assert "| distance | right before the cut | right after the cut | at the end of training |" in card
    assert "| 128 tokens (4 ×) |" in card and "Recall: nats per token gained" in printed
    blocks = torch.stack([block["input_ids"] for block in lora.byte_blocks(texts, 32)[::10]])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(output / "merged")(blocks, labels=blocks).loss.item()
    assert after == pytest.approx(loss, abs=2e-4)
    assert "put back on the original model: logits differ by 0.0e+00" in printed
    assert float(re.search("merged: logits differ by (.*)", printed)[1]) < 1e-4
    assert PeftConfig.from_pretrained(output / "adapter").use_dora == bool(options)
    assert read_record(output / "checkpoint-20")[0]["step"] == 15
    sizes = [AutoModelForCausalLM.from_pretrained(output / name).config.state_size for name in ("base", "merged")]
    assert sizes == [16, 4] and trainer.model.config.state_size == 4


def test_an_adapter_for_a_model_of_ones_own(tmp_path, texts, capsys):
    base = TINY["mamba"].build(vocab_size=256)
    base.save_pretrained(tmp_path / "own")
    files = ("--base", str(tmp_path / "own"), "--adapter_files", texts, "--output_dir", str(tmp_path / "out"))
    trainer = lora.main([*SMALL, *files, "--max_steps", "10", "--targets", "in_proj"])
    assert trainer.model.config.state_size == 4 and not (tmp_path / "out" / "base").exists()
    assert "put back on the original model: logits differ by 0.0e+00" in capsys.readouterr().out


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="matches 0 bytes"):
        lora.main([*SMALL, "--base_files", str(tmp_path / "*.txt"), "--output_dir", str(tmp_path / "out")])
