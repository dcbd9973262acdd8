"""lm-evaluation-harness on compressed models: its numbers against those of our metrics, and counted with torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compress_checkpoint
import datasets
import evaluate
import lm_eval_model
import pytest
import torch
import yaml
from conftest import TINY, lively, tokens
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMConfig, compress, find_mixers
from hf_compressm.metrics import metric_path

SMALL = (
    *("--held_out", "0.5", "--questions", "12", "--context_length", "20", "--choice_length", "6"),
    *("--documents", "2", "--document_length", "150", "--batch_size", "3"),
)
END_OF_TEXT = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four documents of arithmetic, and cut models: a stock and a projected one."""
    folder = tmp_path_factory.mktemp("lm_eval_model")
    for number in range(4):
        lines = [f"{a} × {number + 2} is {a * (number + 2)}, a line of arithmetic\n" for a in range(60)]
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    for name, realization in (("mamba", "stock"), ("mamba2", "projected")):
        model = lively(TINY[name].build(vocab_size=257))
        compress(model, [tokens(8, 32)], CompreSSMConfig(state_size=2, realization=realization))
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch) -> Callable[..., list[dict[str, Any]]]:
    """Run the recipe in this process, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(models: list[str], *arguments: str) -> list[dict[str, Any]]:
        names = [str(folder / name) for name in models]
        text = ("--train_files", str(folder / "*.txt"))
        return lm_eval_model.main([*SMALL, "--models", *names, *text, *arguments])

    return run


def rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, context: str, choice: str) -> float:
    ids = torch.tensor([[*context.encode(), *choice.encode()]])
    predicted = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    return predicted[-len(choice.encode()) :].sum().item()


def test_its_numbers_are_ours(run, folder, capsys):
    names = ["mamba", "mamba2"]
    results = run(names, "--json", "results.json")
    printed = capsys.readouterr().out
    assert all(f"{task}, {metric}" in printed for task, metric in (("which_goes_on", "acc"),))
    questions, texts = (rows(f"runs/lm_eval_tasks/{name}.jsonl") for name in ("which_goes_on", "held_out_text"))
    assert len(questions) == 12 and [len(row["text"]) for row in texts] == [150, 150]
    sequences = [[END_OF_TEXT, *row["text"].encode()] for row in texts]
    for name, result in zip(names, results, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder / name).eval()
        # A projected cut shares its states out: two in every layer, on average.
        sizes = sorted(mixer.state_size for mixer in find_mixers(model).values())
        assert sum(sizes) == 2 * len(sizes)
        assert result["state_size"] == (f"{sizes[0]}–{sizes[-1]}" if sizes[0] < sizes[-1] else f"{sizes[0]}")
        assert (
            re.search(rf"state size N.* {result['state_size']}\b", printed) and f"{result['state_bytes']:,}" in printed
        )
        ours = evaluate.load(metric_path("perplexity")).compute(predictions=sequences, model=model)
        number_of_bytes = sum(len(row["text"].encode()) for row in texts)
        bits = ours["loss"] * ours["tokens"] / math.log(2) / number_of_bytes
        assert result["tasks"]["held_out_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
        assert f"{bits:.4f}" in printed
        right = 0
        for question in questions:
            values = [log_likelihood(model, question["context"], choice) for choice in question["choices"]]
            right += values.index(max(values)) == question["label"]
        assert result["tasks"]["which_goes_on"]["acc,none"] == pytest.approx(right / len(questions))
    assert [row["name"] for row in json.loads(Path("results.json").read_text())] == [str(folder / n) for n in names]


def test_a_question_asks_for_what_goes_on(run, folder):
    run(["mamba"])
    data = compress_checkpoint.DataArguments(train_files=[str(folder / "*.txt")], held_out=0.5)
    texts = compress_checkpoint.load_documents(data, seed=42)["test"]["text"]
    questions = rows("runs/lm_eval_tasks/which_goes_on.jsonl")
    for question in questions:
        right = question["choices"][question["label"]]
        assert any(question["context"] + right in text for text in texts)
        assert len(set(question["choices"])) == 4 and all(len(choice) == 6 for choice in question["choices"])
    assert len({question["label"] for question in questions}) > 1


def test_a_task_of_ones_own(run, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "data.jsonl").write_text(json.dumps({"text": "one and one is two"}) + "\n")
    task = {"task": "sums", "dataset_path": "json", "output_type": "loglikelihood_rolling", "test_split": "test"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(own / "data.jsonl")}}, "doc_to_target": "text"}
    (own / "sums.yaml").write_text(
        yaml.safe_dump(task | {"doc_to_text": "", "metric_list": [{"metric": "bits_per_byte"}]})
    )
    (result,) = run(["mamba"], "--tasks", "sums", "--include_path", str(own))
    assert set(result["tasks"]) == {"sums"} and not Path("runs").exists()


BAD = {
    "no directory": (["nowhere"], (), FileNotFoundError, "nowhere"),
    "no such task": (["mamba"], ("--tasks", "held_out_text", "hellaswag"), ValueError, "there is no task hellaswag"),
    "short texts": (["mamba"], ("--context_length", "10000"), ValueError, "too short to make questions"),
}


@pytest.mark.parametrize(("models", "arguments", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(run, models, arguments, kind, message):
    with pytest.raises(kind, match=message):
        run(models, *arguments)
