"""Saved models, found and loaded or refused; directories that appear whole or not at all; what the Hub answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import TINY, lively, tokens
from huggingface_hub import errors

from hf_compressm import CompreSSMConfig, compress, model_files
from hf_compressm.model_files import (
    check_cut,
    check_output,
    find_model,
    load_model,
    new_directory,
    read_config,
)
from hf_compressm.provenance import record_of


@pytest.fixture
def saved(tmp_path):
    """A saved Mamba-1."""
    model = lively(TINY["mamba"].build())
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory, **values) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_model_that_was_cut_remembers_it(tmp_path, tiny):
    model = lively(tiny.build())
    compress(model, [tokens()], CompreSSMConfig(state_size=4))
    model.save_pretrained(tmp_path / "cut")
    loaded = load_model(find_model(str(tmp_path / "cut")))
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)
    assert len(record_of(loaded).made_cuts) == 1 and not loaded.training


def test_dtype_and_config_file(saved):
    model = find_model(str(saved / "config.json"))
    assert model.directory == saved
    assert load_model(model, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        load_model(model, dtype="int8")


def test_pickled_weights_are_refused_unless_allowed(saved, tmp_path):
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    model = find_model(str(saved))
    with pytest.raises(ValueError, match=r"has pickled weights only .* give --allow-pickle"):
        load_model(model)
    assert torch.equal(
        load_model(model, allow_pickle=True).state_dict()["backbone.norm_f.weight"], weights["backbone.norm_f.weight"]
    )

    class Evil:
        def __reduce__(self):
            return (tmp_path / "touched").touch, ()

    torch.save(weights | {"a": Evil()}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="its pickled weights hold more than tensors, and were not read"):
        load_model(model, allow_pickle=True)
    assert not (tmp_path / "touched").exists()


def test_weights_that_are_not_whole(saved):
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    del weights["backbone.layers.1.mixer.A_log"]
    safetensors.torch.save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"its files lack 1 of the model's parameters .*layers.1.mixer.A_log"):
        load_model(find_model(str(saved)))
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"its weights cannot be read .*was the download or the copy cut off"):
        load_model(find_model(str(saved)))
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has a config.json, but no weights"):
        load_model(find_model(str(saved)))


def test_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        find_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds a PEFT adapter, not a model"):
        find_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such directory, nor can a model on the Hub have this name"):
        find_model("runs/of/mine")
    with pytest.raises(ValueError, match="--revision is for models on the Hub"):
        find_model(str(tmp_path), "main")


@pytest.mark.parametrize(
    "config, message",
    [
        ("{", "config.json is not JSON"),
        ("{}", "config.json names no model_type.*supported model types: bamba, .*mamba, mamba2"),
        ('{"model_type": "gru"}', "a 'gru' model, which this version of Transformers does not know; supported"),
        ('{"model_type": "gpt2"}', "is a 'gpt2' model, which has no state that could be cut; supported model types"),
    ],
)
def test_configs_that_do_not_do(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        check_cut(find_model(str(tmp_path)), CompreSSMConfig(state_size=2))


@pytest.mark.parametrize(
    "architecture, rules, message",
    [
        ("mamba", {"state_size": 8}, "target state_size 8 is not below the current 8; choose 1..7"),
        ("mamba", {"state_size": 4, "realization": "projected"}, "MambaMixer cannot be projected"),
        ("mamba2", {"state_size": [4, 4, 4], "realization": "projected"}, "lists 3 numbers"),
        ("mamba2", {"state_bytes": 2048, "realization": "projected"}, "the states take 2048 bytes as they are"),
    ],
)
def test_rules_are_checked_without_weights(tmp_path, architecture, rules, message):
    TINY[architecture].config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_cut(find_model(str(tmp_path)), CompreSSMConfig(**rules))


def test_a_quantized_model_is_refused(saved):
    edit_config(saved, quantization_config={"quant_method": "torchao", "quant_type": "int8_weight_only"})
    with pytest.raises(ValueError, match="is quantized; cut the model that it was made from"):
        check_cut(find_model(str(saved)), CompreSSMConfig(state_size=2))


def test_a_new_directory_appears_whole_or_not_at_all(tmp_path):
    place = tmp_path / "deep" / "down" / "out"
    with pytest.raises(KeyboardInterrupt), new_directory(place) as directory:
        (directory / "part").write_text("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_directory(place) as directory:
        (directory / "config.json").write_text("{}")
        assert not place.exists()
    assert [file.name for file in place.parent.iterdir()] == ["out"]
    assert (place / "config.json").is_file()
    # Replaced only when the new one is complete.
    with pytest.raises(OSError), new_directory(place, overwrite=True) as directory:
        (directory / "config.json").write_text("new")
        raise OSError
    assert (place / "config.json").read_text() == "{}"
    with new_directory(place, overwrite=True) as directory:
        (directory / "new.json").write_text("new")
    assert [file.name for file in place.iterdir()] == ["new.json"]
    assert [file.name for file in place.parent.iterdir()] == ["out"]


def test_outputs_that_are_refused(saved, tmp_path):
    check_output(tmp_path / "new", overwrite=False)
    with pytest.raises(FileExistsError, match="model exists; name another directory, or give --overwrite"):
        check_output(saved, overwrite=False)
    check_output(saved, overwrite=True)
    with pytest.raises(ValueError, match="holds the model that is to be cut"):
        check_output(saved, overwrite=True, source=find_model(str(saved)))
    home = tmp_path / "home"
    home.mkdir()
    check_output(home, overwrite=True)
    (home / "letter.txt").write_text("dear")
    for other in (home, home / "letter.txt"):
        with pytest.raises(FileExistsError, match="is not the directory of a model, and is not replaced"):
            check_output(other, overwrite=True)


@pytest.fixture
def cache(tmp_path, monkeypatch, saved):
    """A Hub's cache with one whole model, me/it, and no Hub."""
    snapshot = tmp_path / "hub" / "models--me--it" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    saved.rename(snapshot)
    refs = tmp_path / "hub" / "models--me--it" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    for name in ("snapshot_download", "scan_cache_dir"):
        function = getattr(model_files, name)
        monkeypatch.setattr(
            model_files,
            name,
            lambda *args, function=function, **kwargs: function(*args, cache_dir=tmp_path / "hub", **kwargs),
        )
    return snapshot


@pytest.mark.parametrize("status", [None, 503])
def test_without_a_network_the_cache_serves(cache, monkeypatch, caplog, status):
    asked = []

    answer = SimpleNamespace(status_code=status, headers={}, request=None)
    error = errors.HTTPError("[Errno 101]") if status is None else errors.HfHubHTTPError("", response=answer)

    def unreachable(*args, **kwargs):
        asked.append(kwargs["timeout"])
        raise error

    monkeypatch.setattr(model_files.HfApi, "model_info", unreachable)
    model = find_model("me/it")
    assert model.directory == cache and model.commit == "0" * 40
    assert load_model(model).config.state_size == read_config(model).state_size == 8
    assert "going on with the copy of me/it in the cache (commit 00000000)" in caplog.text
    with pytest.raises(
        OSError, match="the cache holds no whole copy of me/other; of models like it, the cache holds me/it"
    ):
        find_model("me/other")
    assert len(asked) == 2 and max(asked) <= 10


def test_offline(cache, monkeypatch):
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set, so the Hub is not asked, and the cache holds no whole"):
        find_model("me/other")
