"""The recipe for finished checkpoints, on tiny models and a small text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compress_checkpoint
import datasets
import pretrain_lm
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, lively, tokens
from hub_server import loopback_hub
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
    default_data_collator,
)

from hf_compressm import CompreSSMConfig, compress, read_record

RECIPE = Path(compress_checkpoint.__file__)
SMALL = (
    *("--block_size", "32", "--max_steps", "10", "--per_device_train_batch_size", "4", "--held_out", "0.25"),
    *("--eval_blocks", "8", "--calibration_tokens", "512", "--use_cpu", "--disable_tqdm", "True"),
)
HEADINGS = ("state size N", "parameters", "held-out loss", "next-token accuracy", "KL from the uncut model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four documents of arithmetic, and models with random weights in which states matter."""
    folder = tmp_path_factory.mktemp("compress_checkpoint")
    for number in range(4):
        lines = [f"{a} times {number + 2} is {a * (number + 2)}, a line of arithmetic\n" for a in range(60)]
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
        (folder / "set").mkdir(exist_ok=True)
        (folder / "set" / f"{number}.jsonl").write_text(
            "".join(json.dumps({"content": line, "number": number}) + "\n" for line in lines)
        )
    for name in TINY:
        lively(TINY[name].build(vocab_size=257)).save_pretrained(folder / name)
    # One with a tokenizer of its own.
    texts = datasets.Dataset.from_dict({"text": [(folder / "0.txt").read_text()]})
    words = pretrain_lm.build_tokenizer(pretrain_lm.DataArguments(tokenizer="bpe", vocab_size=300), texts)
    words.save_pretrained(folder / "with words")
    lively(TINY["mamba2"].build(vocab_size=len(words))).save_pretrained(folder / "with words")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch) -> Callable[..., dict[str, Any]]:
    """Run the recipe in this process; what it writes is in the temporary directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str, model: str | None = "mamba") -> dict[str, Any]:
        source = () if model is None else ("--model", str(folder / model))
        text = () if "--dataset" in arguments else ("--train_files", str(folder / "*.txt"))
        return compress_checkpoint.main([*SMALL, *source, *text, "--output_dir", "out", *arguments])

    return run


MODES = [
    ("mamba", "stock", "none", 0.5),
    ("mamba", "stock", "full", 0.0),
    ("mamba", "stock", "lora", 0.5),
    ("mamba2", "stock", "full", 0.5),
    ("with words", "projected", "none", 0.5),
    ("with words", "projected", "lora", 1.0),
]


@pytest.mark.parametrize(("model", "realization", "heal", "distillation"), MODES)
def test_each_way_of_healing_saves_a_plain_model(run, folder, capsys, model, realization, heal, distillation):
    options = ("--realization", realization, "--heal", heal, "--distillation", str(distillation))
    columns = run("--state_size", "2", *options, model=model)
    assert list(columns) == ["uncut", "cut"] + ["healed"] * (heal != "none")
    assert columns["uncut"]["kl_divergence"] == 0 < columns["cut"]["kl_divergence"]
    assert [column["state_size"] for column in columns.values()] == ["8"] + ["2"] * (len(columns) - 1)
    printed = capsys.readouterr().out
    assert all(heading in printed for heading in HEADINGS) and printed.count("state size N") == 1

    saved, source = load_file("out/model.safetensors"), load_file(folder / model / "model.safetensors")
    projections = {name for name in saved if name.endswith("_projection")}
    assert set(saved) == set(source) | projections and bool(projections) == (realization == "projected")
    reloaded = AutoModelForCausalLM.from_pretrained("out").eval()
    assert reloaded.config.state_size == 2
    # Only what was to be trained has changed.
    trained = {"none": (), "lora": ("in_proj.weight", "x_proj.weight", "_projection"), "full": ("",)}[heal]
    for name, tensor in saved.items():
        if name in source and tensor.shape == source[name].shape and (not name.endswith(trained) or not trained):
            assert torch.equal(tensor, source[name]), name
    same = torch.equal(saved["backbone.layers.0.mixer.D"], source["backbone.layers.0.mixer.D"])
    assert same == (heal != "full")
    if heal == "lora" and realization == "projected":
        name = "backbone.layers.0.mixer.in_proj.weight"
        assert not torch.equal(saved[name], source[name])

    (cut,) = read_record("out")
    assert cut["kl_divergence"] == columns["cut"]["kl_divergence"]
    card = Path("out/README.md").read_text()
    assert "| state size N | 8 | 2 |" in card and f"{list(columns.values())[-1]['loss']:.4f}" in card
    assert f"| distance | {' | '.join(columns)} |" in card and "| 128 tokens (4 ×) |" in card
    assert "Recall: nats per token gained" in printed
    assert "python recipes/compress_checkpoint.py --model" in card and "held-out tokens of text files" in card
    assert "<html" in Path("out/report.html").read_text()
    assert Path("out/spectrum.png").stat().st_size > 10_000
    text = "7 times 2 is 14"
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == reloaded.config.vocab_size


def test_projections_are_healed_beside_the_adapters(run):
    options = ("--realization", "projected", "--state_size", "2", "--max_steps", "2")
    run(*options, "--heal", "none", model="mamba2")
    run(*options, "--heal", "lora", "--output_dir", "healed", model="mamba2")
    before, after = (load_file(f"{name}/model.safetensors") for name in ("out", "healed"))
    for name in before:
        assert torch.equal(before[name], after[name]) != name.endswith(("_projection", "in_proj.weight")), name


def test_distillation_brings_the_model_back_to_the_uncut_one(run):
    # A projection leaves less to bring back.
    options = ("--state_size", "2", "--max_steps", "60", "--learning_rate", "3e-3", "--distillation", "1")
    columns = run(*options, "--realization", "stock", model="mamba2")
    assert columns["healed"]["kl_divergence"] < 0.7 * columns["cut"]["kl_divergence"]


def test_what_is_reported_is_what_torch_calculates():
    uncut, blocks = lively(TINY["mamba"].build()).eval(), tokens(6, 24)
    model = lively(TINY["mamba"].build(), seed=1).eval()
    measured = compress_checkpoint.assess(model, uncut, blocks, batch_size=4)
    with torch.no_grad():
        output, before = model(blocks, labels=blocks), uncut(blocks).logits.log_softmax(-1)
    after = output.logits.log_softmax(-1)
    assert measured["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert measured["accuracy"] == pytest.approx((after[:, :-1].argmax(-1) == blocks[:, 1:]).float().mean().item())
    kl = F.kl_div(after[:, :-1].flatten(0, 1), before[:, :-1].flatten(0, 1), log_target=True, reduction="batchmean")
    assert measured["kl_divergence"] == pytest.approx(kl.item(), rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("distillation", [0.0, 0.3, 1.0])
def test_the_healing_loss_and_its_gradient(tmp_path, distillation, accumulation):
    """One step of SGD, in one batch or accumulated over two, against the gradient of the loss as it is defined."""
    uncut, blocks = lively(TINY["mamba2"].build()).eval(), tokens(4, 12)
    model, expected = (lively(TINY["mamba2"].build(), seed=1).train() for _ in range(2))
    output, before = expected(blocks, labels=blocks), uncut(blocks).logits.detach().log_softmax(-1)
    after = output.logits.log_softmax(-1).flatten(0, 1)
    kl = F.kl_div(after, before.flatten(0, 1), log_target=True, reduction="batchmean")
    ((1 - distillation) * output.loss + distillation * kl).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    compress_checkpoint.HealingTrainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in blocks],
        data_collator=default_data_collator,
        uncut=uncut,
        distillation=distillation,
    ).train()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_without_a_model_it_trains_one_and_uses_it_again(run, caplog):
    small = ("--tiny_steps", "2", "--tiny_state_size", "8", "--heal", "none", "--architecture", "mamba2")
    first = run(*small, model=None)
    assert first["cut"]["state_size"] == "1"
    again = run(*small, "--output_dir", "again", model=None)
    assert again == first
    assert "holds a tiny model of an earlier run" in caplog.text


def test_a_data_set_in_the_place_of_files(run, folder):
    options = ("--dataset", str(folder / "set"), "--text_column", "content", "--dataset_split", "train[:80%]")
    results = run(*options, "--state_size", "0.5", "--heal", "none")
    assert results["cut"]["state_size"] == "4"


def test_a_tolerance_and_further_options(run):
    options = ("--tolerance", "0.3", "--cut_options", '{"multiple_of": 2}', "--heal", "none")
    results = run(*options)
    assert int(results["cut"]["state_size"]) in (2, 4, 6)
    assert read_record("out")[0]["layers"][0]["relative_error"] <= 0.3


@pytest.mark.parametrize("model", ["mamba", "mamba2"])
def test_a_quantized_copy(run, model):
    columns = run("--state_size", "4", "--heal", "none", "--quantize", "int8", model=model)
    assert list(columns) == ["uncut", "cut", "int8 copy"]
    assert columns["int8 copy"]["loss"] == pytest.approx(columns["cut"]["loss"], rel=0.05)
    copied = AutoModelForCausalLM.from_pretrained("out/int8")
    kinds = {name: type(parameter).__name__ for name, parameter in copied.named_parameters()}
    assert kinds["backbone.layers.0.mixer.in_proj.weight"] == "Int8Tensor"
    assert AutoTokenizer.from_pretrained("out/int8").eos_token == "<|endoftext|>"


def test_pushing(folder, tmp_path):
    """With the real client, which reads the address when it is imported: in a process of its own."""
    arguments = ("--model", str(folder / "mamba2"), "--train_files", str(folder / "*.txt"), "--state_size", "2")
    pushing = ("--output_dir", "out", "--push_to_hub", "--hub_model_id", "me/smaller", "--hub_token", "hf_secret")
    with loopback_hub() as hub:
        options = ("--heal", "none", "--realization", "stock")
        command = [sys.executable, str(RECIPE), *SMALL, *arguments, *pushing, *options]
        result = subprocess.run(
            command,
            env=hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stderr[-4000:]
    assert "hf_secret" not in result.stdout + result.stderr and hub.places_of("hf_secret") == []
    files = hub.repositories["me/smaller"].files
    assert "each byte of the text is a token" in result.stderr
    assert {"config.json", "model.safetensors", "README.md", "compressm.json", "spectrum.png", "tokenizer.json"} <= {
        *files
    }
    for name, content in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pulled").config.state_size == 2


def gpt2(folder: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)


def quantized(folder: Path) -> None:
    config = TINY["mamba"].config(vocab_size=257)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config.save_pretrained(folder)


def few_words(folder: Path) -> None:
    TINY["mamba"].build().save_pretrained(folder)


BAD = {
    "no mixer": (gpt2, (), ValueError, "is a 'gpt2' model, which has no state that could be cut"),
    "quantized": (quantized, (), ValueError, "is quantized; cut the model that it was made from"),
    "unknown tokens": (few_words, (), ValueError, "knows 0 to 15; give the model's own --tokenizer"),
    "no tokenizer there": (None, ("--tokenizer", "."), ValueError, r"\. has no tokenizer; name another one"),
    "too little text": (None, ("--calibration_tokens", "1000000"), ValueError, "too little text: 1,000,000"),
    "no held-out block": (None, ("--block_size", "100000"), ValueError, "hold fewer than --block_size 100000"),
    "state size not below N": (None, ("--state_size", "8"), ValueError, "state_size 8 is not below the current 8"),
    "nothing to cut": (None, ("--tolerance", "1e-9"), ValueError, "nothing was cut"),
    "two rules": (None, ("--state_size", "2", "--tolerance", "0.1"), ValueError, "exclude each other"),
    "a share above 1": (None, ("--distillation", "2"), ValueError, "from 0 to 1, not 2"),
    "not JSON": (None, ("--cut_options", "{"), ValueError, "--cut_options is not JSON"),
    "cannot be projected": (None, ("--realization", "projected"), ValueError, "MambaMixer cannot be projected"),
    "no file": (None, ("--train_files", "nowhere/*"), FileNotFoundError, "no file matches 'nowhere"),
}


@pytest.mark.parametrize(("make", "arguments", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_and_nothing_is_written(run, tmp_path, make, arguments, kind, message):
    if make is not None:
        make(tmp_path / "model")
        arguments = ("--model", str(tmp_path / "model"), *arguments)
    with pytest.raises(kind, match=message):
        run("--state_size", "2", *arguments) if "--tolerance" not in arguments[:1] else run(*arguments)
    assert not Path("out/model.safetensors").exists()


def test_files_are_not_overwritten(run):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out/ is not empty; give another --output_dir"):
        run("--heal", "none")
    run("--heal", "none", "--overwrite_output_dir")
    assert Path("out/model.safetensors").exists() and Path("out/notes.txt").read_text() == "mine"


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="runs in one process"):
        run()


def test_a_projected_model_is_cut_further(run, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "mamba2")
    compress(model, [tokens(8, 32)], CompreSSMConfig(state_size=4, realization="projected"))
    model.save_pretrained(tmp_path / "projected")
    options = ("--model", str(tmp_path / "projected"), "--realization", "projected", "--state_size", "2")
    columns = run(*options, "--heal", "none", model=None)
    assert [column["state_size"] for column in columns.values()] == ["4", "2"]
