"""Measure, plan and cut in one call."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import lively, tokens, train

from hf_compressm import CompreSSMConfig, NonFiniteError, compress, compress_, find_mixers, measure, plan_compression


@pytest.mark.parametrize(
    "rule", [{"state_size": 3}, {"state_size": 0.25}, {"tolerance": 0.3}, {"hankel_tolerance": 0.3}]
)
def test_equals_the_three_functions(tiny, rule):
    config, batches = CompreSSMConfig(**rule), [tokens(8, 24), tokens(4, 24, seed=1)]
    model = lively(tiny.build())
    other = copy.deepcopy(model)
    report = compress(model, batches, config)
    expected = compress_(other, plan_compression(other, measure(other, batches), config))
    assert report == expected and report.changed and report.tokens == 12 * 24
    assert model.config.to_dict() == other.config.to_dict() and type(model) is type(other)
    sizes = [mixer.state_size for mixer in find_mixers(model).values()]
    assert math.ceil(sum(sizes) / 2) == report.state_size_after < 8
    assert [layer.state_size_after for layer in report.layers] == sizes
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())


def test_takes_any_iterable_once(tiny):
    model = lively(tiny.build())
    report = compress(model, (tokens(4, 12, seed) for seed in range(3)), CompreSSMConfig(state_size=4))
    assert report.tokens == 3 * 48 and report.state_size_after == 4


def test_carries_an_optimizer(tiny):
    model = lively(tiny.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, range(2))
    config = CompreSSMConfig(state_size=4, realization="stock")
    report = compress(model, [tokens(8, 24)], config, optimizer)
    assert report.optimizer_bytes_after < report.optimizer_bytes_before
    assert set(optimizer.state) == set(model.parameters())
    train(model, optimizer, range(2, 4))


@pytest.mark.parametrize(
    ("config", "batches", "error"),
    [
        (CompreSSMConfig(state_size=8), [tokens()], ValueError),
        (CompreSSMConfig(state_size=4), [], ValueError),
        (CompreSSMConfig(state_size=4), [{"input_ids": tokens(), "attention_mask": torch.zeros(4, 12)}], ValueError),
        (CompreSSMConfig(state_size=4), [{"inputs_embeds": torch.full((1, 4, 16), torch.nan)}], NonFiniteError),
    ],
)
def test_an_error_leaves_the_model_as_it_was(tiny, config, batches, error):
    model = lively(tiny.build())
    before = {name: (id(parameter), parameter.detach().clone()) for name, parameter in model.named_parameters()}
    with pytest.raises(error):
        compress(model, batches, config)
    assert model.config.state_size == 8
    for name, parameter in model.named_parameters():
        identity, values = before[name]
        assert id(parameter) == identity and torch.equal(parameter, values)


def test_compressing_twice(tiny):
    model = lively(tiny.build())
    for size in (5, 2):
        report = compress(model, [tokens(8, 24)], CompreSSMConfig(state_size=size))
        sizes = [mixer.state_size for mixer in find_mixers(model).values()]
        assert sum(sizes) == 2 * size == 2 * report.state_size_after
    assert torch.isfinite(model(tokens()).logits).all()
