"""Models of bf16 and fp16 weights: a cut is decided in float32 and float64, and written back in the model's type."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TINY, lively, tokens

from hf_compressm import CompressionPlan, CompreSSMConfig, compress_, find_mixers, measure, plan_compression
from hf_compressm.report import CompressionReport

# What one rounding to the type may change, relative to the number.
UNIT_ROUNDOFF = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-25}
REALIZATIONS = [("mamba", "stock"), ("mamba2", "stock"), ("mamba2", "projected")]
# More of them than it takes for the refit to be fitted to the outputs.
CALIBRATION = tokens(32, 24, seed=3)


def cut(model: torch.nn.Module, realization: str) -> tuple[CompressionPlan, CompressionReport]:
    statistics = measure(model, [CALIBRATION])
    for layer in statistics.values():
        assert {tensor.dtype for tensor in (*layer.sums, layer.A, layer.B_norm, layer.C_norm)} == {torch.float32}
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=4, realization=realization))
    return plan, compress_(model, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("architecture", "realization"), REALIZATIONS)
def test_a_low_precision_model_is_cut_as_its_float32_copy(architecture, realization, dtype):
    model = lively(TINY[architecture].build()).eval().to(dtype)
    copied = copy.deepcopy(model).float()
    inputs = tokens(16, 24, seed=4)
    with torch.no_grad():
        uncut = copied(inputs).logits
        types = {name: parameter.dtype for name, parameter in model.named_parameters()}
        (plan, report), (expected_plan, expected_report) = cut(model, realization), cut(copied, realization)
        logits, expected = model(inputs).logits.float(), copied(inputs).logits
    for layer, expected_layer in zip(report.layers, expected_report.layers, strict=True):
        assert layer.kept == expected_layer.kept
        assert layer.relative_error == pytest.approx(expected_layer.relative_error, rel=0.05)
    for name, layer in plan.layers.items():
        for matrix in (layer.readout, layer.drive, layer.B_projection, layer.C_projection):
            assert matrix is None or matrix.dtype in (torch.float32, torch.float64)
        assert layer.refit == expected_plan.layers[name].refit
    after = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert set(after.values()) == {dtype} and set(types) <= set(after)
    # What the cut costs is the same; the type adds what it adds to any calculation.
    error, expected_error = ((each - uncut).norm().item() for each in (logits, expected))
    assert error == pytest.approx(expected_error, rel=0.1)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_the_refit_is_rounded_once(dtype):
    """The new rows of B and C are M times the old ones in float64, brought into the model's type at the end."""
    model = lively(TINY["mamba"].build()).eval().to(dtype)
    old = {name: mixer.module.x_proj.weight.detach().clone() for name, mixer in find_mixers(model).items()}
    plan, report = cut(model, "stock")
    for layer in report.layers:
        mixer = find_mixers(model)[layer.name].module
        rank = mixer.time_step_rank
        rows, mixtures = old[layer.name][rank:].double().split(8), plan.layers[layer.name].mixtures
        exact = torch.cat([mixtures[role][0].double() @ part for role, part in zip("BC", rows, strict=True)])
        new = mixer.x_proj.weight[rank:].detach()
        assert torch.equal(new, exact.to(dtype))
        squared = (new.double() - exact).square().sum() / exact.square().sum()
        assert layer.rounding_error == pytest.approx(squared.sqrt().item(), rel=1e-6)
        assert 0.1 * UNIT_ROUNDOFF[dtype] < layer.rounding_error < UNIT_ROUNDOFF[dtype]
    said = f"rounded by up to {max(layer.rounding_error for layer in report.layers):.1e} of their size"
    assert (said in str(report)) == (dtype is not torch.float32)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_what_a_selection_takes_over_is_not_rounded(dtype):
    _, report = cut(lively(TINY["mamba2"].build()).eval().to(dtype), "stock")
    assert [layer.rounding_error for layer in report.layers] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projections_are_rounded_once_too(dtype):
    model = lively(TINY["mamba2"].build()).eval().to(dtype)
    plan, report = cut(model, "projected")
    for layer in report.layers:
        mixer, planned = find_mixers(model)[layer.name].module, plan.layers[layer.name]
        pairs = [(mixer.B_projection, planned.B_projection), (mixer.C_projection, planned.C_projection)]
        assert all(torch.equal(ours, matrix.to(dtype)) for ours, matrix in pairs)
        error = sum((ours.double() - matrix.double()).square().sum() for ours, matrix in pairs)
        norm = sum(matrix.double().square().sum() for _, matrix in pairs)
        assert layer.rounding_error == pytest.approx((error / norm).sqrt().item(), rel=1e-6)
        assert 0 < layer.rounding_error < UNIT_ROUNDOFF[dtype]
