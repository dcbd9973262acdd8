"""The command line: what it prints, what it returns, and what a user's mistake gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, lively, tokens
from huggingface_hub import errors
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_compressm import (
    CompreSSMConfig,
    Record,
    find_mixers,
    hub,
    inspection,
    measure,
    plan_compression,
    saved_models,
)
from hf_compressm.analysis import evaluate
from hf_compressm.cli import app
from hf_compressm.model_files import find_model, load_model
from hf_compressm.texts import byte_tokenizer, load_sequences


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


MODEL_COMMANDS = ["inspect", "analyze", "compress", "reshape", "estimate", "card", "report", "push", "diff"]
DATA = "--data tokens.jsonl --tokens 240"


@pytest.fixture(autouse=True)
def _loud_again():
    """The command line hides what libraries say; other tests may want to hear it."""
    import huggingface_hub.utils
    from transformers.utils import logging

    before = logging.get_verbosity(), huggingface_hub.utils.logging.get_verbosity()
    yield
    logging.set_verbosity(before[0])
    huggingface_hub.utils.logging.set_verbosity(before[1])


@pytest.fixture
def place(tmp_path, tiny, monkeypatch):
    """A working directory with a saved model, a tokenizer beside it, and a file of tokens."""
    monkeypatch.chdir(tmp_path)
    lively(tiny.build()).save_pretrained("full")
    rows = [{"input_ids": row} for row in tokens(40, 12).tolist()]
    Path("tokens.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def line(command: str) -> tuple[int, str, str]:
    return run(*command.split())


def files() -> set[str]:
    return {file.name for file in Path().iterdir()}


def test_inspect(place):
    code, out, _ = line("inspect full")
    assert code == 0 and "N = 8" in out and "can be cut        stock" in out
    code, out, _ = line("inspect full --json")
    assert code == 0 and json.loads(out)["mixers"][0]["state_size"] == 8


def test_analyze(place):
    code, out, err = line(f"analyze full {DATA} --tolerance 0.4 --plot a.png --save a.json")
    assert code == 0 and "Recommendation: keep" in out and "Tried out on a copy" in out
    assert "hf-compressm compress full --data tokens.jsonl --tokens 240" in out and "--tolerance 0.4" in out
    assert "measuring states" in err and "reading the data" in err
    assert Path("a.png").stat().st_size > 10_000
    saved = json.loads(Path("a.json").read_text())
    code, out, err = line(f"analyze full {DATA} --tolerance 0.4 --json --no-verify --criteria ghost")
    told = json.loads(out)
    assert code == 0 and told["verification"] is None and list(told["criteria"]) == ["ghost"]
    assert told["choices"]["stock"] == saved["choices"]["stock"] and err == ""
    # What it says can be typed.
    command = next(
        text for text in line(f"analyze full {DATA} --tolerance 0.4")[1].splitlines() if " compress " in text
    )
    assert line(command.strip().removeprefix("hf-compressm ").replace("DIR", "small"))[0] == 0
    assert Path("small/model.safetensors").is_file()


def test_compress(place):
    byte_tokenizer().save_pretrained("full")
    code, out, err = line(f"compress full {DATA} --state-size 3 --output small")
    assert code == 0 and "KL from the uncut model" in out and "measuring states" in err
    assert {"README.md", "compressm.json", "compressm_plan_1.json", "report.html", "tokenizer.json"} <= {
        file.name for file in Path("small").iterdir()
    }
    model, record = AutoModelForCausalLM.from_pretrained("small"), Record.load("small")
    sizes = [mixer.state_size for mixer in find_mixers(model).values()]
    assert sum(sizes) == 2 * 3 and all(f"8 → {size}" in out for size in sizes)
    assert list(record.evaluations) == ["uncut", "cut"] and record.machine
    assert record.run["dataset"] == "tokens.jsonl" and record.run["command"].startswith("hf-compressm")
    (cut,) = record.made_cuts
    assert cut["loss_after"] == record.evaluations["cut"]["loss"] and cut["kl_divergence"] >= 0
    # What was recorded is what the saved model does.
    saved = find_model("small")
    sequences = load_sequences(["tokens.jsonl"], None, tokens=240, vocabulary=16)
    result = evaluate({"cut": load_model(saved)}, sequences.held_out, sequences.held_out_labels)
    assert result["cut"]["loss"] == pytest.approx(record.evaluations["cut"]["loss"], rel=1e-6)
    # And once more: the second cut follows the first.
    code, out, err = line(f"compress small {DATA} --state-size 2 --output smaller --json")
    assert code == 0 and err == ""
    made = [[layer["state_size_after"] for layer in cut["layers"]] for cut in Record.load("smaller").made_cuts]
    assert made[0] == sizes and sum(made[1]) == 2 * 2
    said = json.loads(out)["evaluations"]["cut"]["state_size"]
    assert said == ("2" if made[1] == [2, 2] else f"{min(made[1])}–{max(made[1])}")
    assert files() == {"full", "small", "smaller", "tokens.jsonl"}


def test_compress_by_a_config(mamba, no_pages):
    CompreSSMConfig(state_size=7, refit_steps=2, calibration_tokens=120).save("rules.json")
    code, _, _ = line("compress full --data tokens.jsonl --config rules.json --state-size 0.5 --output small")
    (cut,) = Record.load("small").made_cuts
    assert code == 0 and cut["tokens"] == 120
    assert (cut["config"]["state_size"], cut["config"]["refit_steps"]) == (0.5, 2)


def test_compress_projects(tmp_path, monkeypatch, no_pages):
    monkeypatch.chdir(tmp_path)
    lively(TINY["mamba2"].build()).save_pretrained("full")
    torch_rows = tokens(40, 12)
    Path("tokens.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in torch_rows.tolist()))
    assert line(f"compress full {DATA} --state-size 2,5 --realization projected --output a")[0] == 0
    assert AutoModelForCausalLM.from_pretrained("a").config.state_ranks == [2, 5]
    half = json.loads(line("inspect full --json")[1])["state_bytes"] // 2
    code, out, _ = line(f"compress full {DATA} --state-bytes {half} --realization projected --output b --json")
    assert code == 0 and json.loads(out)["evaluations"]["cut"]["state_bytes"] <= half
    assert line(f"compress full {DATA} --hankel-tolerance 0.3 --criterion hankel --output c")[0] == 0
    assert Path("a/modeling_compressm.py").is_file()


@pytest.fixture
def mamba(tmp_path, monkeypatch):
    """As `place`, but for what does not depend on the architecture."""
    monkeypatch.chdir(tmp_path)
    lively(TINY["mamba"].build()).save_pretrained("full")
    rows = [json.dumps({"input_ids": row}) for row in tokens(40, 12).tolist()]
    Path("tokens.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture
def no_pages(monkeypatch):
    """Card and report, which take the most time, are left out."""
    for name in ("write_card", "write_report_page"):
        monkeypatch.setattr(saved_models, name, lambda *args, **kwargs: None)


def test_overwrite(mamba, no_pages):
    assert line(f"compress full {DATA} --state-size 3 --output small")[0] == 0
    Path("small/old.txt").write_text("old")
    code, _, err = line(f"compress full {DATA} --state-size 2 --output small")
    assert code == 1 and "small exists; name another directory, or give --overwrite" in err
    # A failure leaves the old one.
    code, _, err = line(f"compress full {DATA} --tolerance 0.0000001 --output small --overwrite")
    assert code == 1 and "nothing was cut" in err
    assert AutoModelForCausalLM.from_pretrained("small").config.state_size == 3 and Path("small/old.txt").exists()
    assert line(f"compress full {DATA} --state-size 2 --output small --overwrite")[0] == 0
    assert AutoModelForCausalLM.from_pretrained("small").config.state_size == 2 and not Path("small/old.txt").exists()
    assert files() == {"full", "small", "tokens.jsonl"}


def test_the_files_of_a_cut(mamba, monkeypatch):
    assert line(f"compress full {DATA} --state-size 3 --output small")[0] == 0
    for file in ("README.md", "report.html"):
        Path("small", file).unlink()
    code, out, _ = line("card small")
    assert code == 0 and out == "wrote small/README.md\n" and "8" in Path("small/README.md").read_text()
    code, out, _ = line("report small --output page.html --json")
    assert code == 0 and json.loads(out) == {"file": "page.html"} and Path("page.html").is_file()
    code, out, _ = line("diff full small")
    assert code == 0 and "state_size: 8 → 3" in out and "reshaped:" in out
    assert json.loads(line("diff full small --json")[1])["config"]["state_size"] == [8, 3]
    asked = []
    monkeypatch.setattr(
        hub, "push_compressed", lambda *args, **kwargs: asked.append((args, kwargs)) or "https://hub/x"
    )
    code, out, _ = line("push small me/small --private --revision dev")
    assert code == 0 and out == "pushed to https://hub/x\n"
    assert asked[0][0] == (Path("small"), "me/small") and asked[0][1]["private"] and asked[0][1]["revision"] == "dev"


MISTAKES = [
    ("inspect missing/one", "HF_HUB_OFFLINE is set, so the Hub is not asked, and the cache holds no whole copy"),
    ("inspect no/such/place", "no/such/place: no such directory"),
    ("inspect empty", "empty has no config.json"),
    ("inspect gpt", "a 'gpt2' model, which has no state that could be cut; supported model types: bamba"),
    (f"compress full {DATA} --state-size 3 --output full", "full exists"),
    (f"compress full {DATA} --state-size 8 --output new", "target state_size 8 is not below the current 8"),
    (f"compress full {DATA} --state-size eight --output new", "--state-size is a number (16), a fraction (0.1)"),
    (f"compress full {DATA} --output new", "give one of --state-size, --tolerance, --hankel-tolerance, --state-bytes"),
    (f"compress full {DATA} --state-size 3 --tolerance 0.1 --output new", "give one of --state-size"),
    (f"compress full {DATA} --tolerance 2 --output new", "tolerance must be above 0 and below 1, got 2.0"),
    (f"compress pickled {DATA} --state-size 3 --output new", "pickled weights only (pytorch_model*.bin)"),
    (f"compress quantized {DATA} --state-size 3 --output new", "quantized is quantized; cut the model that it was"),
    ("compress full --data tokens.jsonl --state-size 3 --output new", "too little data: 480 tokens"),
    ("compress full --data empty.txt --tokenizer bytes --state-size 3 --output new", "empty.txt: empty, or nothing"),
    ("compress full --data binary.txt --tokenizer bytes --state-size 3 --output new", "binary.txt is a binary file"),
    ("compress full --data nothing*.txt --state-size 3 --output new", "no file matches it"),
    (
        "compress full --data big.jsonl --tokens 24 --state-size 3 --output new",
        "token 99 is none that the model knows",
    ),
    (f"compress full {DATA} --state-size 3 --device cuda:7 --output new", "--device cuda:7: not usable here"),
    (f"compress full {DATA} --config missing.json --output new", "missing.json"),
    (f"compress full {DATA} --state-size 3 --criterion best --output new", "unknown criterion 'best'"),
    (f"analyze full {DATA} --tolerance 0", "tolerance must be above 0"),
    (f"analyze full {DATA} --criteria best", "unknown criterion 'best'"),
    (f"analyze full {DATA} --plot no/where/a.png", "there is no directory no/where"),
    ("analyze full --data tokens.jsonl", "needed are 16,392 tokens (1366 sequences) to measure on"),
    ("card full", "full has no compressm.json"),
    ("report empty", "compressm.json"),
    ("push full me/x", "compressm.json"),
    ("diff full empty", "empty has no config.json"),
]


@pytest.mark.parametrize("command, message", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "gpt", "quantized", "pickled"):
        Path(name).mkdir()
    Path("gpt/config.json").write_text('{"model_type": "gpt2"}')
    TINY["mamba"].build().save_pretrained("full")
    values = json.loads(Path("full/config.json").read_text())
    for name, more in (("quantized", {"quantization_config": {"quant_method": "x"}}), ("pickled", {})):
        Path(name, "config.json").write_text(json.dumps(values | more))
    Path("pickled/pytorch_model.bin").write_bytes(b"")
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(bytes(300))
    Path("tokens.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in tokens(40, 12).tolist()))
    Path("big.jsonl").write_text("\n".join([json.dumps({"input_ids": [99, 1, 2]})] * 20))
    before = files()
    code, out, err = line(command)
    assert code == 1 and out == ""
    last = err.splitlines()[-1]
    assert message in last and last.startswith("hf-compressm: ") and "Traceback" not in err
    assert files() == before and not list(Path("empty").iterdir())


def test_no_weight_is_read_for_what_can_be_refused_before(mamba, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    for command in (
        f"compress full {DATA} --state-size 8 --output new",
        f"compress full {DATA} --state-size 3 --output full",
        "compress full --data missing.txt --state-size 3 --output new",
    ):
        assert line(command)[0] == 1
    with pytest.raises(AssertionError, match="weights were loaded"):
        line(f"compress full {DATA} --state-size 3 --output new")


@pytest.mark.parametrize("moment", ["measure", "write_card"])
def test_ctrl_c_leaves_nothing_behind(mamba, monkeypatch, moment):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved_models, moment, interrupt)
    before = files()
    code, out, err = line(f"compress full {DATA} --state-size 3 --output new")
    assert code == 130 and out == "" and files() == before
    assert err.splitlines()[-1] == "hf-compressm: interrupted; nothing was written"


def test_a_real_ctrl_c(tmp_path):
    TINY["mamba"].build(num_hidden_layers=4, hidden_size=64).save_pretrained(tmp_path / "full")
    rows = [json.dumps({"input_ids": row}) for row in tokens(1000, 64).tolist()]
    (tmp_path / "tokens.jsonl").write_text("\n".join(rows))
    command = [
        "compress",
        "full",
        "--data",
        "tokens.jsonl",
        "--tokens",
        "60000",
        "--state-size",
        "3",
        "--output",
        "new",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_compressm.cli", *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # Where the tests run in the background, a shell may have them ignore the signal, and they hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said = ""
    while "loading full" not in said:
        said = process.stderr.readline()
        assert said, "it ended early"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == "hf-compressm: interrupted; nothing was written"
    assert {file.name for file in tmp_path.iterdir()} == {"full", "tokens.jsonl"}


@pytest.mark.parametrize("status, kind", [(403, errors.HfHubHTTPError), (None, errors.LocalTokenNotFoundError)])
def test_the_token_is_never_told(mamba, monkeypatch, status, kind):
    token = "hf_" + "abcdefgh" * 4
    monkeypatch.setenv("HF_TOKEN", token)
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error = kind(f"{token} bad", response=response) if status else kind(f"{token} bad")

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "push_compressed", refuse)
    code, out, err = line("push full me/x")
    assert code == 1 and token not in out + err and "write permission" in err and "hf auth login" in err
    monkeypatch.setattr(
        hub, "push_compressed", lambda *a, **k: (_ for _ in ()).throw(ValueError(f"bad {token}\nhere"))
    )
    code, out, err = line("push full me/x")
    assert code == 1 and err == "hf-compressm: bad (the token) here\n"


def test_what_libraries_print_does_not_spoil_the_json(mamba, monkeypatch):
    find = inspection.build_empty

    def chatty(*args, **kwargs):
        print("a library speaks")
        return find(*args, **kwargs)

    monkeypatch.setattr(inspection, "build_empty", chatty)
    code, out, err = line("inspect full --json")
    assert code == 0 and json.loads(out)["model_type"] and "a library speaks" in err


def test_a_bug_keeps_its_traceback(mamba, monkeypatch):
    def bug(*args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr(inspection, "inspect_model", bug)
    result = CliRunner().invoke(app, ["inspect", "full"])
    assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize("command", MODEL_COMMANDS)
def test_help_has_an_example(command):
    code, out, _ = run(command, "--help")
    assert code == 0 and f"hf-compressm {command}" in " ".join(out.split()) and "--json" in out
    assert run(command, "--nonsense")[0] == 2


def test_push_takes_no_token():
    # It would lie in the shell's history.
    assert "--token" not in run("push", "--help")[1]
