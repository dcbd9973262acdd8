"""The mixers' forward on a CPU: the same outputs as Transformers' own, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from conftest import MAMBA1_FAMILY, MAMBA2_FAMILY, TINY, lively, stir, tokens
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from hf_compressm.mixers import find_mixers, streamed_forward
from hf_compressm.mixers.mixer import Mixer

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0] + [1] * 6])


def outputs(mixer: Mixer, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        return mixer.module(hidden_states, attention_mask=mask)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["no mask", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAMBA1_FAMILY)
def test_outputs_are_those_of_transformers(name, dtype, mask, monkeypatch):
    mixers = find_mixers(stir(MAMBA1_FAMILY[name].build()).to(dtype).eval())
    mixer = list(mixers.values())[-1]
    hidden_states = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs, scans, scan_output = outputs(mixer, hidden_states, mask), [], streamed_forward.scan_output
    monkeypatch.setattr(streamed_forward, "scan_output", lambda inputs: scans.append(inputs) or scan_output(inputs))
    with streamed_forward.streamed_forward(mixers):
        ours = outputs(mixer, hidden_states, mask)
    assert ours.dtype == theirs.dtype and len(scans) == 1
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
    outputs(mixer, hidden_states, mask)
    assert len(scans) == 1 and "forward" not in vars(mixer.module)


def test_forwards_of_which_we_cannot_be_sure_are_left_alone():
    class Own(type(TINY["mamba"].build().backbone.layers[0].mixer)):
        pass

    model = lively(TINY["mamba"].build())
    first, second = (layer.mixer for layer in model.backbone.layers)
    first.__class__ = Own
    hooked = second.forward = lambda *args, **kwargs: torch.zeros(())
    projected = MAMBA2_FAMILY["mamba2"].build()
    with streamed_forward.streamed_forward(find_mixers(model) | find_mixers(projected)):
        assert "forward" not in vars(first) and second.forward is hooked
        assert not any("forward" in vars(module) for module in projected.modules())
    assert second.forward is hooked


def test_quantized_layers_keep_their_forward():
    """It may round its inputs, too; here a layer does whose weights are eight bits wide."""
    model = lively(TINY["mamba"].build()).eval()
    first, second = (layer.mixer for layer in model.backbone.layers)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, _: module is first.in_proj)
    mixer = find_mixers(model)["backbone.layers.0.mixer"]
    hidden_states = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    theirs = outputs(mixer, hidden_states, None)
    with streamed_forward.streamed_forward(find_mixers(model)):
        assert "forward" not in vars(first) and "forward" in vars(second)
        torch.testing.assert_close(outputs(mixer, hidden_states, None), theirs, rtol=0, atol=0)


def test_forwards_come_back_after_an_error():
    model = TINY["mamba"].build()
    with pytest.raises(IndexError), streamed_forward.streamed_forward(find_mixers(model)):
        model(torch.full((1, 2), 10**6))
    assert not any("forward" in vars(module) for module in model.modules())
    model(tokens())
