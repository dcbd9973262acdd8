"""What is told of a saved model from its config and its record alone."""

from __future__ import annotations

import json

import pytest
from conftest import TINY, lively, tokens

from hf_compressm import CompreSSMConfig, compress, find_mixers
from hf_compressm.inspection import inspect_model
from hf_compressm.model_files import find_model


def inspect(directory):
    return inspect_model(find_model(str(directory)))


def test_every_architecture_by_its_config_alone(tmp_path, architecture):
    architecture.config().save_pretrained(tmp_path)
    facts, model = inspect(tmp_path), architecture.build()
    assert facts.model_class == type(model).__name__ and facts.model_type == model.config.model_type
    assert facts.parameters == model.num_parameters()
    mixers = find_mixers(model)
    assert [mixer.name for mixer in facts.mixers] == list(mixers)
    assert {mixer.state_size for mixer in facts.mixers} == {8}
    assert [mixer.groups for mixer in facts.mixers] == [mixer.groups for mixer in mixers.values()]
    assert getattr(model.config, facts.state_size_field) == 8
    text = str(facts)
    assert "N = 8" in text and "cut so far        no" in text
    assert ("projected:" in text) == next(iter(mixers.values())).can_be_projected


def test_state_bytes_are_those_of_a_cache(tmp_path, tiny):
    model = tiny.build()
    model.config.save_pretrained(tmp_path)
    cache = model(tokens(batch=1), use_cache=True).cache_params
    states = sum(layer.recurrent_states[0].nbytes for layer in cache.layers)
    assert inspect(tmp_path).state_bytes == states


def test_a_model_that_was_cut_twice(tmp_path):
    model = lively(TINY["mamba2"].build())
    compress(model, [tokens()], CompreSSMConfig(state_size=6, realization="stock"))
    compress(model, [tokens()], CompreSSMConfig(state_size=[2, 5]))
    model.save_pretrained(tmp_path)
    facts = inspect(tmp_path)
    assert [mixer.state_size for mixer in facts.mixers] == [2, 5]
    assert [mixer.feature_size for mixer in facts.mixers] == [6, 6]
    first, second = facts.cuts
    assert first["state_size_before"] == [8, 8] and first["state_size_after"] == [6, 6]
    assert second["state_size_after"] == [2, 5] and second["realization"] == "projected"
    text = str(facts)
    assert "2 states, projected from 6 features in each of 2 groups" in text
    assert "N 8 → 6 in one shot (stock, by ghost;" in text and "N 6 → 2 to 5 in one shot (projected" in text
    assert json.loads(json.dumps(facts.to_dict()))["state_bytes"] == 7 * facts.mixers[0].state_bytes // 2


def test_a_quantized_model(tmp_path):
    TINY["mamba"].config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    quantization = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    assert "can be cut        no: it is quantized" in str(inspect(tmp_path))


def test_a_broken_record(tmp_path):
    TINY["mamba"].config().save_pretrained(tmp_path)
    (tmp_path / "compressm.json").write_text("{}")
    with pytest.raises(ValueError, match=r"compressm.json is not a record of cuts"):
        inspect(tmp_path)
