"""From training to the Hub and back: train with a cut, push, pull in a fresh process, evaluate, compare, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hub_server import loopback_hub

from hf_compressm import Record

TESTS = Path(__file__).parent
TOKEN = "hf_secret"
TRAIN = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(TESTS)!r}]
from conftest import TINY
from training import build_trainer, config
import torch
from hf_compressm import CompreSSMCallback
from hf_compressm.texts import byte_tokenizer
tokenizer, text = byte_tokenizer(), Path("texts/all.txt").read_text()
ids = torch.tensor(tokenizer(text)["input_ids"])
rows = ids[: len(ids) // 32 * 32].view(-1, 32)
data = [{{"input_ids": row, "labels": row}} for row in rows]
model = TINY["mamba2"].build(vocab_size=len(tokenizer))
options = {{"push_to_hub": True, "hub_model_id": "me/small", "max_steps": 40, "learning_rate": 1e-2}}
options |= {{"eval_strategy": "steps", "eval_steps": 10}}
cut = CompreSSMCallback(config(schedule=[20], realization="projected"))
trainer = build_trainer(model, Path("run"), [cut], data=data, eval_dataset=data[:8], **options)
trainer.processing_class = tokenizer
trainer.save_model("uncut")
tokenizer.save_pretrained("uncut")
trainer.train()
trainer.push_to_hub(dataset="texts")
"""
PULL = """
import contextlib, io, json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import evaluate_model
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_compressm.cli import app
loaded = AutoModelForCausalLM.from_pretrained("me/small")
assert AutoTokenizer.from_pretrained("me/small").eos_token == "<|endoftext|>"
texts = ["--train_files", "texts/*.txt", "--sample_by", "line", "--block_size", "32"]
evaluate_model.main(["--models", "uncut", "me/small", *texts, "--json", "results.json"])
pulled = snapshot_download("me/small")
for command in (["inspect", "me/small"], ["diff", "uncut", "me/small"]):
    app([*command], standalone_mode=False)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        app([*command, "--json"], standalone_mode=False)
    Path(f"{command[0]}.json").write_text(out.getvalue())
app(["report", pulled, "--output", "page.html"], standalone_mode=False)
app(["card", pulled], standalone_mode=False)
print(pulled)
"""


def test_train_push_pull_evaluate_diff_report(tmp_path):
    (tmp_path / "texts").mkdir()
    lines = [f"{number} times {number} is {number * number}." for number in range(400)]
    (tmp_path / "texts" / "all.txt").write_text("\n".join(lines))
    with loopback_hub() as hub:

        def run(script: str, *arguments: object, home: str, token: str | None = None) -> str:
            command = [sys.executable, "-c", script, *map(str, arguments)]
            environment = hub.environment(tmp_path / home, token) | {"OMP_NUM_THREADS": "1"}
            result = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
            )
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
            assert TOKEN not in result.stdout + result.stderr
            return result.stdout

        run(TRAIN, home="trainer", token=TOKEN)
        printed = run(PULL, TESTS.parent / "recipes", home="reader")
        assert hub.places_of(TOKEN) == []
        pushed = hub.repositories["me/small"].files

    pulled = Path(printed.splitlines()[-1])
    record = Record.load(pulled)
    (cut,) = record.made_cuts
    assert cut["step"] == 20
    assert {"tokenizer.json", "modeling_compressm.py", "report.html", "README.md"} <= set(pushed)
    assert record.evaluations["after the cut"]["loss"] < record.evaluations["before the cut"]["loss"]

    untrained, trained = json.loads((tmp_path / "results.json").read_text())["models"]
    assert (untrained["name"], trained["name"]) == ("uncut", "me/small")
    assert (untrained["state_size"], trained["state_size"]) == ("8", "4")
    assert trained["loss"] < untrained["loss"] - 0.5 and trained["kl_divergence"] > 0
    inspected, difference = (json.loads((tmp_path / name).read_text()) for name in ("inspect.json", "diff.json"))
    assert inspected["model_class"] == "CompressmMamba2ForCausalLM"
    assert [mixer["state_size"] for mixer in inspected["mixers"]] == [4, 4]
    assert inspected["cuts"][0]["step"] == 20 and inspected["parameters"] == cut["parameters_after"]
    assert difference["config"]["state_size"] == [8, 4]
    projections = {f"{layer['name']}.{kind}_projection" for layer in cut["layers"] for kind in "BC"}
    assert set(difference["added"]) == projections and not difference["removed"]
    assert sum(a * b for a, b in difference["added"].values()) == inspected["parameters"] - untrained["parameters"]
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "## What was cut" in (pulled / "README.md").read_text()
