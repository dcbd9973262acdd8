"""Compressed models are pushed with the real client, in every way there is, and load from the Hub as they were."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from conftest import TINY, lively, tokens
from hub_server import Hub, loopback_hub

from hf_compressm import CompreSSMConfig, compress

TOKEN = "hf_secret"
TESTS = str(Path(__file__).parent)

# The client reads the endpoint when it is imported, so it runs in processes of its own.
START = f"""
import json, logging, sys
from pathlib import Path
sys.path[:0] = [{TESTS!r}]
from conftest import TINY, lively, tokens
from training import build_trainer, config, examples
import torch
from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress, push_compressed
"""
EVERY_WAY = """
folder = Path(sys.argv[1])
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    realization = "projected" if strategy == "every_save" else "stock"
    model, data = lively(TINY["mamba2"].build()), examples()
    trainer = build_trainer(
        model, folder / strategy, [CompreSSMCallback(config(realization=realization))], eval_dataset=data[:4],
        push_to_hub=True, hub_strategy=strategy, hub_model_id=f"me/{strategy}", hub_always_push=True,
        save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4, **({"save_total_limit": 1}),
    )
    trainer.train()
    if strategy == "end":
        trainer.push_to_hub(dataset="texts", language="en", license="mit")
    trainer._finish_current_push()
model = lively(TINY["mamba2"].build())
compress(model, [tokens()], CompreSSMConfig(state_size=[3, 4], realization="projected"))
model.add_model_tags("mine")
model.push_to_hub("model", commit_message="by the model", private=True)
model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="me/while-saving")
print(push_compressed(folder / "saved", "me/directory", revision="branch"))
print(push_compressed(folder / "saved", "me/directory", create_pr=True))
"""
PULL = """
import sys
if sys.argv[1] == "without the package":
    sys.modules["hf_compressm"] = None
else:
    import hf_compressm
import safetensors.torch, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[4], trust_remote_code=sys.argv[1] == "without the package")
tokens = safetensors.torch.load_file(sys.argv[2])["tokens"]
with torch.no_grad():
    logits = model.eval()(tokens).logits
safetensors.torch.save_file({"logits": logits.contiguous()}, sys.argv[3])
"""
# What goes along with every compressed model.
ALWAYS = {"README.md", "config.json", "model.safetensors", "compressm.json", "spectrum.png"}
ALWAYS |= {"compressm_plan_1.json", "compressm_plan_1.safetensors"}


def run(script: str, *arguments: object, hub: Hub, home: Path, token: str | None = TOKEN) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = hub.environment(home, token) | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    assert TOKEN not in result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A Hub to which models were pushed in every way there is, and what was printed."""
    folder = tmp_path_factory.mktemp("pushed")
    with loopback_hub() as hub:
        printed = run(START + EVERY_WAY, folder, hub=hub, home=folder / "home")
        yield hub, printed


def card_of(files: dict[str, bytes]) -> tuple[dict, str]:
    """A card's metadata and text."""
    _, metadata, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


@pytest.mark.parametrize(
    "name, projected",
    [
        ("end", False),
        ("every_save", True),
        ("checkpoint", False),
        ("all_checkpoints", False),
        ("model", True),
        ("while-saving", True),
    ],
)
def test_what_goes_along(pushed, name, projected):
    hub, _ = pushed
    files = hub.repositories[f"me/{name}"].files
    # Pictures of the training take seconds to draw: a Trainer's pushes while it trains go without.
    assert set(files) >= (ALWAYS | {"report.html"} if name in ("end", "model", "while-saving") else ALWAYS)
    assert ("modeling_compressm.py" in files) == projected
    record, config = json.loads(files["compressm.json"]), json.loads(files["config.json"])
    assert [cut["status"] for cut in record["cuts"]] == ["cut"]
    metadata, text = card_of(files)
    assert {"mamba", "state-space-model", "compressm"} <= set(metadata["tags"])
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert "## What was cut" in text and f'from_pretrained("me/{name}")' in text
    sizes = [layer["state_size_after"] for layer in record["cuts"][0]["layers"]]
    assert (config.get("state_ranks") or [config["state_size"]] * 2) == sizes
    # Nothing of another run, and nothing that only a resume needs.
    assert not [file for file in files if file.endswith((".tmp", "optimizer.pt")) and "checkpoint" not in file]


def test_trainers_tell_of_the_training(pushed):
    hub, _ = pushed
    metadata, text = card_of(hub.repositories["me/end"].files)
    assert metadata["license"] == "mit" and metadata["language"] in ("en", ["en"])
    assert "Cut after training step 3 of 8" in text and "## Training procedure" in text
    assert {result["type"] for result in metadata["model-index"][0]["results"][0]["metrics"]} == {"loss"}


def test_checkpoints_on_the_hub_can_be_resumed_from(pushed):
    hub, _ = pushed
    last = {name for name in hub.repositories["me/checkpoint"].files if name.startswith("last-checkpoint/")}
    assert last >= {f"last-checkpoint/{name}" for name in ("compressm.json", "optimizer.pt", "trainer_state.json")}
    record = json.loads(hub.repositories["me/all_checkpoints"].files["checkpoint-4/compressm.json"])
    assert record["cuts"] and record["optimizer_parameters"]
    assert not any(name.startswith("checkpoint-") for name in hub.repositories["me/every_save"].files)


def test_options_of_a_push(pushed):
    hub, printed = pushed
    assert hub.repositories["me/model"].private and not hub.repositories["me/end"].private
    assert hub.repositories["me/model"].commit("main").title == "by the model"
    assert "mine" in card_of(hub.repositories["me/model"].files)[0]["tags"]
    directory = hub.repositories["me/directory"]
    assert set(directory.files) == {".gitattributes"}
    assert set(directory.files_at("branch")) >= ALWAYS and set(directory.files_at("refs/pr/1")) >= ALWAYS
    commit, request = printed.splitlines()[-2:]
    assert "/commit/" in commit and request.endswith("/discussions/1")


def test_the_token_lies_nowhere(pushed):
    hub, _ = pushed
    assert hub.places_of(TOKEN) == []
    assert {request.token for request in hub.requests if not request.storage} <= {TOKEN, None}


def test_what_is_pushed_loads_with_the_package_and_without(tmp_path):
    model = lively(TINY["mamba2"].build()).eval()
    compress(model, [tokens()], CompreSSMConfig(state_size=[3, 4], realization="projected"))
    with torch.no_grad():
        expected = model(tokens()).logits
    model.save_pretrained(tmp_path / "model")
    safetensors.torch.save_file({"tokens": tokens()}, tmp_path / "tokens")
    with loopback_hub() as hub:
        push = "from hf_compressm import push_compressed\nimport sys\npush_compressed(sys.argv[1], 'me/model')"
        run(push, tmp_path / "model", hub=hub, home=tmp_path / "pusher")
        for way in ("with the package", "without the package"):
            arguments = (way, tmp_path / "tokens", tmp_path / way, "me/model")
            run(PULL, *arguments, hub=hub, home=tmp_path / "home", token=None)
            logits = safetensors.torch.load_file(tmp_path / way)["logits"]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


# What goes wrong: the faults ordered, the repository, the token, and what is said.
FAULTS = """
from huggingface_hub import constants
folder = sys.argv[1]
for case in json.loads(sys.argv[2]):
    try:
        push_compressed(folder, case["repository"], token=case["token"])
        print(json.dumps("pushed"))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def test_what_goes_wrong(tmp_path):
    model = lively(TINY["mamba"].build())
    compress(model, [tokens()], CompreSSMConfig(state_size=4))
    model.save_pretrained(tmp_path / "model")
    with loopback_hub() as hub:
        hub.create("me/there", {"old.txt": b"stays"})
        hub.create("other/theirs")
        cases = [
            ("me/unknown-token", "hf_unknown", "PermissionError", "the token lacks write permission, or is not valid"),
            ("me/read-only", "hf_read_only", "PermissionError", "the Hub refuses to write to me/read-only (403)"),
            ("other/theirs", TOKEN, "PermissionError", "the Hub refuses to write to other/theirs (403)"),
            ("me/there", TOKEN, "pushed", ""),
            ("me/breaks", TOKEN, "Error", ""),
            ("me/breaks", TOKEN, "pushed", ""),
            ("me/down", TOKEN, "HfHubHTTPError", "500"),
            ("me/down", TOKEN, "pushed", ""),
            ("me/busy", TOKEN, "pushed", ""),
            ("me/conflict", TOKEN, "HTTPError", "409"),
            ("me/conflict", TOKEN, "pushed", ""),
        ]
        hub.fail("me/down/commit/", status=500, times=1)
        hub.fail("me/busy/preupload/", status=429, headers={"Retry-After": "0"}, times=1)
        hub.fail("me/conflict/commit/", status=409, times=1)
        hub.fail("me/breaks/commit/", drop_after=50, times=1)
        listed = json.dumps([{"repository": name, "token": token} for name, token, *_ in cases])
        printed = run(START + FAULTS, tmp_path / "model", listed, hub=hub, home=tmp_path / "home", token=None)
        for (name, _, kind, message), line in zip(cases, printed.splitlines(), strict=True):
            outcome = json.loads(line)
            if kind == "pushed":
                assert outcome == "pushed", (name, outcome)
                assert set(hub.repositories[name].files) >= ALWAYS
            else:
                assert outcome != "pushed" and kind in outcome[0] and message in outcome[1], (name, outcome)
        assert hub.repositories["me/there"].files["old.txt"] == b"stays"
        # The weights, the same for all, were sent once; also where the connection broke after they had arrived.
        weights = hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
        assert len(hub.log("PUT", f"/storage/{weights}")) == 1
        assert hub.places_of(TOKEN) == [] and hub.places_of("hf_unknown") == []


def test_what_cannot_be_pushed(tmp_path):
    from hf_compressm import push_compressed

    with pytest.raises(FileNotFoundError, match="there is no directory"):
        push_compressed(tmp_path / "missing", "me/model")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        push_compressed(tmp_path, "me/model")
    with pytest.raises(ValueError, match="remembers no cut"):
        push_compressed(TINY["mamba"].build(), "me/model")
    TINY["mamba"].build().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no compressm\.json"):
        push_compressed(tmp_path, "me/model")
