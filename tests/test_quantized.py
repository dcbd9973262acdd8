"""Quantized models: cut first, then quantize. What a cut would take apart is refused, what it leaves alone is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import MAMBA2_FAMILY, TINY, lively, selection_plan, silence_states, stir, tokens
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

from hf_compressm import CompreSSMConfig, compress, compress_, find_mixers, measure
from hf_compressm.mixers.adapters import weight_and_bias


class Int8Params(nn.Parameter):
    """As bitsandbytes': integers, whose scales are beside them."""

    def __new__(cls, data: torch.Tensor) -> Int8Params:
        return torch.Tensor._make_subclass(cls, data, False)

    def __deepcopy__(self, memo: dict) -> Int8Params:
        return type(self)(self.data.clone())


class Params4bit(Int8Params):
    """As bitsandbytes': two numbers in a byte, in a shape of its own."""


class Linear8bitLt(nn.Linear):
    """As bitsandbytes': only its forward knows what its weights stand for."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.bias = layer.bias
        self.scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = Int8Params((layer.weight.detach() / self.scales).round().to(torch.int8))

    @property
    def meant(self) -> torch.Tensor:
        return self.weight.data.float() * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.meant.to(x), None if self.bias is None else self.bias.to(x))


def layers_named(model: nn.Module, *names: str) -> dict[str, nn.Linear]:
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and name.endswith(names)}


def with_torchao(model: nn.Module, *names: str, how: AOBaseConfig | None = None) -> nn.Module:
    chosen = set(layers_named(model, *names))
    quantize_(model, how or Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in chosen)
    return model


def with_torchao_float8(model: nn.Module, *names: str) -> nn.Module:
    """Its layers take no other inputs than those of the type that the weights had."""
    return with_torchao(model, *names, how=Float8WeightOnlyConfig())


def as_in_bitsandbytes(model: nn.Module, *names: str) -> nn.Module:
    for name, layer in layers_named(model, *names).items():
        # Models cast the head's input to the type of its weight, so Transformers leaves that layer out.
        if name != "lm_head":
            model.set_submodule(name, Linear8bitLt(layer))
    return model


def with_parameter(make: Callable[[torch.Tensor], nn.Parameter]) -> Callable[..., nn.Module]:
    def quantize(model: nn.Module, *names: str) -> nn.Module:
        for layer in layers_named(model, *names).values():
            layer.weight = make(layer.weight.detach())
        return model

    return quantize


QUANTIZED = {
    "torchao's int8": (with_torchao, "Int8Tensor"),
    "bitsandbytes' int8": (as_in_bitsandbytes, r"of Linear8bitLt is a Int8Params of torch\.int8"),
    "bitsandbytes' 4 bits": (
        with_parameter(lambda weight: Params4bit(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8))),
        r"Params4bit of torch\.uint8",
    ),
    "fine-grained float8": (
        with_parameter(lambda weight: nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)),
        r"torch\.float8_e4m3fn",
    ),
}
# The linear layer whose rows are states.
OF_STATES = {"mamba": ".x_proj", "mamba2": ".in_proj"}


@pytest.mark.parametrize(("quantize", "kind"), QUANTIZED.values(), ids=QUANTIZED.keys())
@pytest.mark.parametrize("architecture", TINY)
def test_quantized_states_are_refused_by_name(architecture, quantize, kind):
    plain = lively(TINY[architecture].build())
    plan = selection_plan(plain, [0, 2, 5])
    model = quantize(copy.deepcopy(plain), OF_STATES[architecture])
    before = dict(model.named_parameters())
    message = rf"backbone\.layers\.0\.mixer: weight .*{kind}.*cut the model before it is quantized"
    with pytest.raises(TypeError, match=message):
        measure(model, [tokens()])
    with pytest.raises(TypeError, match=message):
        compress_(model, plan)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items()) and model.config.state_size == 8


# What is quantized is no part of a state; the mixer's inner quantities are still calculated from it.
LEFT_ALONE = [
    ("mamba", (".in_proj",)),
    ("mamba", (".out_proj", "lm_head")),
    ("mamba2", (".out_proj", "lm_head")),
]


@pytest.mark.parametrize("quantize", [with_torchao, as_in_bitsandbytes])
@pytest.mark.parametrize(("architecture", "names"), LEFT_ALONE)
def test_other_layers_may_be_quantized(architecture, names, quantize):
    """A twin holds the numbers that the quantized weights stand for: it keeps the same states, at the same error."""
    model = quantize(lively(TINY[architecture].build()).eval(), *names)
    twin = copy.deepcopy(model)
    chosen = layers_named(twin, *names)
    for name, layer in chosen.items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        values = layer.meant if isinstance(layer, Linear8bitLt) else layer.weight.detach().dequantize()
        plain.weight, plain.bias = nn.Parameter(values), layer.bias
        twin.set_submodule(name, plain)
    before = dict(layers_named(model, *names))
    config = CompreSSMConfig(state_size=4)
    ours, theirs = (compress(each, [tokens(32, 24)], config) for each in (model, twin))
    for layer, expected in zip(ours.layers, theirs.layers, strict=True):
        assert layer.kept == expected.kept
        torch.testing.assert_close(layer.error_curve, expected.error_curve, rtol=1e-3, atol=1e-5)
        assert layer.relative_error == pytest.approx(expected.relative_error, rel=1e-2)
    for name, layer in layers_named(model, *names).items():
        assert layer is before[name]
    with torch.no_grad():
        logits, expected = (each(tokens(seed=1)).logits for each in (model, twin))
    assert (logits - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("quantize", [with_torchao, as_in_bitsandbytes])
@pytest.mark.parametrize(("architecture", "names"), LEFT_ALONE)
def test_a_lossless_cut_beside_quantized_layers_is_exact(architecture, names, quantize):
    model = lively(TINY[architecture].build()).eval()
    silence_states(model, [1, 3, 4, 6])
    quantize(model, *names)
    with torch.no_grad():
        before = model(tokens()).logits
        report = compress(model, [tokens()], CompreSSMConfig(state_size=4))
        after = model(tokens()).logits
    assert all(set(row) == {0, 2, 5, 7} for layer in report.layers for row in layer.kept)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [with_torchao, with_torchao_float8, as_in_bitsandbytes])
def test_quantized_weights_are_read_as_what_they_stand_for(quantize, dtype):
    model = quantize(nn.Sequential(nn.Linear(24, 40, dtype=dtype)).requires_grad_(False), "0")
    (layer,) = model
    meant = layer.meant if isinstance(layer, Linear8bitLt) else layer.weight.dequantize()
    weight, bias = weight_and_bias(layer)
    assert weight.dtype == bias.dtype == torch.float32 and type(weight) is torch.Tensor
    # A layer that calculates in bf16 adds the bias before it rounds.
    torch.testing.assert_close(weight, meant.float(), rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)
    torch.testing.assert_close(bias, layer.bias.float(), rtol=0, atol=0)


HYBRIDS = {
    "bamba": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "granitemoehybrid": ("q_proj", "k_proj", "v_proj", "o_proj", "input_linear", "output_linear", "router.layer"),
}


@pytest.mark.parametrize("quantize", [with_torchao, as_in_bitsandbytes])
@pytest.mark.parametrize(("architecture", "names"), HYBRIDS.items())
def test_a_hybrids_attention_and_mlps_may_be_quantized(architecture, names, quantize):
    model = stir(MAMBA2_FAMILY[architecture].build()).eval()
    silence_states(model, [1, 3, 4, 6])
    quantize(model, *names)
    before = {name: (layer, layer.weight) for name, layer in layers_named(model, *names).items()}
    assert len(before) >= 4
    inputs = tokens()
    with torch.no_grad():
        expected = model(inputs).logits
        compress_(model, selection_plan(model, [0, 2, 5, 7]))
        torch.testing.assert_close(model(inputs).logits, expected, rtol=0, atol=1e-5)
    for name, layer in layers_named(model, *names).items():
        assert layer is before[name][0] and layer.weight is before[name][1]


@pytest.mark.parametrize(
    ("architecture", "realization"), [("mamba", "stock"), ("mamba2", "stock"), ("mamba2", "projected")]
)
def test_a_cut_model_is_quantized_while_it_is_loaded(tmp_path, architecture, realization):
    """The way out that the message names, through files.

    What was loaded so cannot be cut, unless it is projected: two matrices that are not quantized make its states.
    """
    model = lively(TINY[architecture].build()).eval()
    compress(model, [tokens()], CompreSSMConfig(state_size=4, realization=realization))
    model.save_pretrained(tmp_path / "cut")
    # Mamba-1's forward multiplies with the weight of dt_proj itself.
    how = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(layers_named(model, ".dt_proj")) or None)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", quantization_config=how).eval()
    kinds = {type(layer.weight).__name__ for layer in layers_named(quantized, ".in_proj", ".out_proj").values()}
    assert kinds == {"Int8Tensor"} and type(quantized) is type(model)
    assert {mixer.state_size for mixer in find_mixers(quantized).values()} == {4}
    quantized.save_pretrained(tmp_path / "quantized")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    with torch.no_grad():
        logits, expected, again = (each(tokens()).logits for each in (quantized, model, reloaded))
    assert (logits - expected).norm() < 0.1 * expected.norm()
    torch.testing.assert_close(again, logits, rtol=0, atol=0)
    if realization == "projected":
        config = CompreSSMConfig(state_size=2, realization="projected")
        assert compress(quantized, [tokens()], config).state_size_after == 2
        assert torch.isfinite(quantized(tokens()).logits).all()
        return
    with pytest.raises(TypeError, match=r"Int8Tensor.*cut the model before it is quantized"):
        measure(quantized, [tokens()])
