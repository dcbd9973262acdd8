"""The recipe that compares models, on tiny ones and a small text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compress_checkpoint
import datasets
import evaluate_model
import pretrain_lm
import pytest
import torch
from conftest import TINY, lively, tokens
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMConfig, compress

SMALL = ("--block_size", "32", "--held_out", "0.25", "--eval_blocks", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four documents of arithmetic; models, cut ones and adapters, all of bytes but one."""
    folder = tmp_path_factory.mktemp("evaluate_model")
    for number in range(4):
        lines = [f"{a} times {number + 2} is {a * (number + 2)}, a line of arithmetic\n" for a in range(60)]
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    for name, realization, size in (("mamba", "stock", 2), ("mamba2", "projected", [2, 2])):
        model = lively(TINY[name].build(vocab_size=257))
        model.save_pretrained(folder / name)
        compress(model, [tokens(8, 32)], CompreSSMConfig(state_size=size, realization=realization))
        model.save_pretrained(folder / f"{name} cut")
    for cut in (False, True):
        base = AutoModelForCausalLM.from_pretrained(folder / "mamba")
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj", "x_proj"]))
        for parameter in adapted.parameters():
            # An adapter begins with zeros.
            parameter.data.add_(0.1 * torch.randn(parameter.shape) if parameter.requires_grad else 0)
        if cut:
            compress(adapted, [tokens(8, 32)], CompreSSMConfig(state_size=4))
        adapted.save_pretrained(folder / ("adapter across a cut" if cut else "adapter"))
    texts = datasets.Dataset.from_dict({"text": [(folder / "0.txt").read_text()]})
    words = pretrain_lm.build_tokenizer(pretrain_lm.DataArguments(tokenizer="bpe", vocab_size=300), texts)
    words.save_pretrained(folder / "words")
    TINY["mamba"].build(vocab_size=len(words)).save_pretrained(folder / "words")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch) -> Callable[..., list[dict[str, Any]]]:
    """Run the recipe in this process, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(models: list[str], *arguments: str) -> list[dict[str, Any]]:
        names = [str(folder / name) for name in models]
        return evaluate_model.main([*SMALL, "--models", *names, "--train_files", str(folder / "*.txt"), *arguments])

    return run


def test_all_kinds_of_models_in_one_table(run, folder, capsys):
    names = ["mamba", "mamba cut", "mamba2", "mamba2 cut", "adapter", "adapter across a cut"]
    results = run(names, "--recall", "--recall_sequences", "5", "--json", "deep/results.json")
    assert [result["state_size"] for result in results] == ["8", "2", "8", "2", "8", "4"]
    assert [result["state_bytes"] for result in results[:2]] == [2 * 32 * 8 * 4, 2 * 32 * 2 * 4]
    assert results[0]["kl_divergence"] is None and all(result["kl_divergence"] > 0 for result in results[1:])
    printed = capsys.readouterr().out
    assert "32 tokens" in printed and "A passage of 16 held-out tokens is read" in printed
    assert results[1]["recall_gain_after_128"] != results[0]["recall_gain_after_128"]
    lines = printed.splitlines()
    heading = next(number for number, line in enumerate(lines) if line.startswith("model "))
    for name, line in zip(names, lines[heading + 1 :], strict=False):
        assert line.startswith(str(folder / name)) and len(line) == len(lines[heading])
    saved = json.loads(Path("deep/results.json").read_text())
    assert saved["reference"] == str(folder / "mamba") and saved["models"] == results
    # The text and the numbers are those of compress_checkpoint.
    data = compress_checkpoint.DataArguments(
        train_files=[str(folder / "*.txt")], block_size=32, held_out=0.25, eval_blocks=8
    )
    tokenizer = compress_checkpoint.load_tokenizer(str(folder / "mamba"), None)
    held_out = torch.tensor(compress_checkpoint.load_blocks(data, tokenizer, seed=42)["test"][:8]["input_ids"])
    uncut, cut = (AutoModelForCausalLM.from_pretrained(folder / name) for name in names[:2])
    expected = compress_checkpoint.assess(cut, uncut, held_out, batch_size=8)
    assert {key: results[1][key] for key in expected} == expected
    assert results[1]["perplexity"] == pytest.approx(math.exp(expected["loss"]))


def test_what_is_compared_with(run, folder):
    ours, theirs = run(["mamba", "mamba cut"], "--reference", str(folder / "mamba cut"))
    assert ours["kl_divergence"] > 0 and theirs["kl_divergence"] is None


def test_associative_recall_can_be_answered_from_what_was_told():
    vocabulary = list(range(100, 120))
    ids, labels = evaluate_model.associative_recall(vocabulary, pairs=6, sequences=50, seed=0)
    assert ids.shape == labels.shape == (50, 24)
    assert torch.equal(ids, evaluate_model.associative_recall(vocabulary, pairs=6, sequences=50, seed=0)[0])
    orders = set()
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        told = dict(zip(row[:12:2], row[1:12:2], strict=True))
        assert len(told) == 6 and set(told) <= set(range(100, 110)) and set(told.values()) <= set(range(110, 120))
        assert [told[key] for key in row[12::2]] == row[13::2] and set(row[12::2]) == set(told)
        assert asked[:12] == [-100] * 12 and asked[12::2] == [-100] * 6 and asked[13::2] == row[13::2]
        orders.add(tuple(list(told).index(key) for key in row[12::2]))
    assert len(orders) > 40


def test_recall_is_what_a_model_that_looks_it_up_gets_right(run, monkeypatch):
    """The recipe asks about the very tokens it made: here all models are given the answers."""
    seen = []
    monkeypatch.setattr(
        evaluate_model,
        "associative_recall",
        lambda vocabulary, pairs, sequences, seed: (
            seen.append((len(vocabulary), pairs, sequences, seed))
            or (torch.tensor([[1, 2, 3]]), torch.tensor([[-100, -100, 3]]))
        ),
    )
    (result,) = run(["mamba"], "--recall", "--recall_pairs", "3", "--seed", "1")
    # All bytes, without the token that ends a text.
    assert seen == [(256, 3, 200, 1)] and result["recall_accuracy"] in (0, 1)
    assert "recall_accuracy" not in run(["mamba"])[0]


BAD = {
    "different tokenizers": (["mamba", "words"], (), ValueError, r"different tokenizers \(257 and 300 tokens\)"),
    "no directory": (["mamba", "nowhere"], (), FileNotFoundError, "nowhere"),
    "no such adapter's base": (["mamba"], ("--reference", "./gone"), FileNotFoundError, "gone"),
    "unknown tokens": (["words"], ("--tokenizer", "bytes", "--reference", "MAMBA"), ValueError, "vocabular"),
    "too many pairs": (["mamba"], ("--recall", "--recall_pairs", "200"), ValueError, "has 128 keys"),
    "no held-out block": (["mamba"], ("--block_size", "100000"), ValueError, "hold fewer than --block_size 100000"),
}


@pytest.mark.parametrize(("models", "arguments", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(run, folder, models, arguments, kind, message):
    arguments = [str(folder / "mamba") if argument == "MAMBA" else argument for argument in arguments]
    with pytest.raises(kind, match=message):
        run(models, *arguments)
