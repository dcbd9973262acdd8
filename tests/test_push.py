"""A projected model is pushed with the real client, and loads from the Hub in both ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch
from conftest import TINY, lively, tokens
from hub_server import loopback_hub

from hf_compressm import CompreSSMConfig, compress

# The client reads the endpoint when it is imported, so it runs in processes of its own.
PUSH = """
import sys
import hf_compressm
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("me/model", token="hf_secret")
"""
PULL = """
import sys
if sys.argv[1] == "without the package":
    sys.modules["hf_compressm"] = None
else:
    import hf_compressm
import safetensors.torch, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/model", trust_remote_code=sys.argv[1] == "without the package")
tokens = safetensors.torch.load_file(sys.argv[2])["tokens"]
with torch.no_grad():
    logits = model.eval()(tokens).logits
safetensors.torch.save_file({"logits": logits.contiguous()}, sys.argv[3])
"""


def run(script: str, *arguments: str, endpoint: str, home: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "hf_secret" not in result.stdout + result.stderr


def test_what_is_pushed_loads_with_the_package_and_without(tmp_path):
    model = lively(TINY["mamba2"].build()).eval()
    compress(model, [tokens()], CompreSSMConfig(state_size=[3, 4], realization="projected"))
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model(tokens()).logits
    safetensors.torch.save_file({"tokens": tokens()}, tmp_path / "tokens")
    with loopback_hub() as (endpoint, files):
        run(PUSH, str(tmp_path / "model"), endpoint=endpoint, home=tmp_path / "pusher")
        assert {"config.json", "model.safetensors", "modeling_compressm.py"} <= set(files)
        config = json.loads(files["config.json"])
        assert config["model_type"] == "compressm_mamba2" and config["state_ranks"] == [3, 4]
        assert b"hf_secret" not in b"".join(files.values())
        for way in ("with the package", "without the package"):
            run(PULL, way, str(tmp_path / "tokens"), str(tmp_path / way), endpoint=endpoint, home=tmp_path / "home")
            logits = safetensors.torch.load_file(tmp_path / way)["logits"]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
