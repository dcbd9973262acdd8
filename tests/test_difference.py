"""What changed between two saved models."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TINY, lively, tokens

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.difference import compare_models
from hf_compressm.model_files import find_model


def compare(directory):
    return compare_models(find_model(str(directory / "a")), find_model(str(directory / "b")))


def test_the_same_model(tmp_path, tiny):
    model = tiny.build()
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    difference = compare(tmp_path)
    assert difference.is_empty and difference.unchanged == len(model.state_dict()) - model.config.tie_word_embeddings
    assert "are the same model" in str(difference)


@pytest.mark.parametrize("realization", ["stock", "projected"])
def test_a_cut(tmp_path, realization):
    model = lively(TINY["mamba2"].build())
    model.save_pretrained(tmp_path / "a")
    compress(model, [tokens()], CompreSSMConfig(state_size=3, realization=realization))
    model.save_pretrained(tmp_path / "b", max_shard_size="4KB")
    difference = compare(tmp_path)
    assert difference.config["state_size"] == (8, 3)
    assert len(difference.a.cuts) == 0 and len(difference.b.cuts) == 1
    assert difference.bytes_a == 4 * difference.a.parameters and difference.bytes_b == 4 * difference.b.parameters
    text = str(difference)
    assert "state_size: 8 → 3" in text and not difference.values and not difference.removed
    name = "backbone.layers.0.mixer"
    if realization == "stock":
        # Two groups with B and C each: 20 rows fewer.
        old, new = difference.reshaped[f"{name}.in_proj.weight"]
        assert (old[0] - new[0], old[1]) == (20, new[1]) and not difference.added
    else:
        assert difference.added[f"{name}.B_projection"] == [8, 6] and not difference.reshaped
        assert difference.config["model_type"] == ("mamba2", "compressm_mamba2")
        assert f"{name}.B_projection: [8, 6]" in text
    assert json.loads(json.dumps(difference.to_dict()))["is_empty"] is False


@torch.no_grad()
def test_values(tmp_path):
    model = TINY["mamba"].build()
    model.save_pretrained(tmp_path / "a")
    for number, parameter in enumerate(model.parameters()):
        if number % 2:
            parameter *= 1 + 0.01 * number
    model.backbone.layers[0].mixer.D.zero_()
    model.save_pretrained(tmp_path / "b")
    difference = compare(tmp_path)
    names = dict(model.named_parameters())
    expected = {name: 0.01 * number for number, name in enumerate(names) if number % 2}
    expected |= {"backbone.layers.0.mixer.D": 1.0}
    nonzero = {name: value for name, value in expected.items() if names[name].any() or name.endswith("0.mixer.D")}
    assert difference.values == pytest.approx(nonzero, rel=1e-5)
    assert list(difference.values.values()) == sorted(difference.values.values(), reverse=True)
    text = str(difference)
    assert "backbone.layers.0.mixer.D: 100.00%" in text
    assert f"and {len(difference.values) - 10} more" in text or len(difference.values) <= 10
    assert difference.unchanged == len(names) - len(difference.values)


def test_layers_of_different_sizes(tmp_path):
    model = lively(TINY["mamba2"].build())
    model.save_pretrained(tmp_path / "a")
    compress(model, [tokens()], CompreSSMConfig(state_size=[2, 5], realization="projected"))
    model.save_pretrained(tmp_path / "b")
    assert "backbone.layers.1.mixer: 8 → 5" in str(compare(tmp_path))


def test_refusals(tmp_path):
    model = TINY["mamba"].build()
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        compare(tmp_path)
    file.unlink()
    torch.save(model.state_dict(), tmp_path / "b" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has pickled weights; only safetensors files are compared"):
        compare(tmp_path)
