"""Padding, layers that do nothing, missing parts, and plans that do not fit: Mamba-1 with norms, and in heads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import silence_states, tokens
from test_mamba1_normalized import KEPT, NORMALIZED, build, first_mixer
from torch import nn

from hf_compressm import CompreSSMConfig, compress, compress_, find_mixers, measure, plan_compression
from hf_compressm.drive import kept_recurrences, selection
from hf_compressm.elimination import eliminate
from hf_compressm.mixers import Architecture, mamba1, register_mixer, take
from hf_compressm.planning import _needs_inputs, _refit_error
from hf_compressm.refit import Readout, _Fit, _fit, _result, mean_field_readout, measured_selection_curve
from hf_compressm.token_systems import ReadoutNorm, TokenSystem, systems_of, token_systems


@pytest.mark.parametrize("options", [{}, {"refit": False}], ids=["fit", "selection"])
@pytest.mark.parametrize("name", NORMALIZED)
def test_padding_does_not_count_in_what_a_cut_scales(name, options):
    model, inputs = build(name), tokens(16, 12)
    padded = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    padded = {kind: nn.functional.pad(values, (0, 12)) for kind, values in padded.items()}
    config = CompreSSMConfig(state_size=3, **options)
    plain, with_padding = (
        plan_compression(model, measure(model, [batch]), config).layers for batch in ({"input_ids": inputs}, padded)
    )
    for layer in plain:
        assert torch.equal(plain[layer].kept, with_padding[layer].kept)
        for role, scale in plain[layer].scales.items():
            assert with_padding[layer].scales[role] == pytest.approx(scale, rel=1e-3)
        assert with_padding[layer].relative_error == pytest.approx(plain[layer].relative_error, rel=1e-3)


@torch.no_grad()
def test_norms_of_parameters_are_those_behind_the_norms_weights():
    mixer = first_mixer(build("jamba"))
    module = mixer.module
    module.b_layernorm.weight[0] *= -1
    weights = torch.cat([module.b_layernorm.weight, module.c_layernorm.weight])
    rows = weights[:, None] * module.x_proj.weight[module.time_step_rank :]
    torch.testing.assert_close(torch.cat(mixer.parameter_norms(), dim=1)[0], rows.norm(dim=1))


def test_norms_without_weights_follow_the_new_size():
    """The CUDA kernels read these ones; the forward in torch does not."""
    model = build("falcon_mamba")
    compress(model, [tokens(16, 12)], CompreSSMConfig(state_size=3))
    for mixer in find_mixers(model).values():
        assert mixer.module.b_layernorm.weight.tolist() == mixer.module.c_layernorm.weight.tolist() == [1.0] * 3


@pytest.mark.parametrize("name", NORMALIZED)
def test_layers_that_do_nothing_are_scaled_by_finite_numbers(name):
    model = build(name)
    silence_states(model, list(range(8)))
    report = compress(model, [tokens(16, 12)], CompreSSMConfig(state_size=3))
    assert report.layers[0].relative_error == 0


@pytest.mark.parametrize(("h", "y"), [(1.0, -1.0), (0.0, 1.0)], ids=["opposite", "zero"])
def test_a_gain_is_positive_whatever_the_kept_states_do(h, y):
    one = torch.ones(1)
    norm = ReadoutNorm(torch.tensor([0]), torch.ones(2), torch.ones(1, 2), one, 0.0, one, one)
    e = y - h
    system = TokenSystem(
        gram=torch.full((1, 1, 1), h * h),
        p=torch.full((1, 1), e * h),
        C=torch.ones(1, 2),
        error=one * e**2,
        energy=one * y**2,
        start=torch.ones(1, 1),
        norm=norm,
    )
    gain, _ = system.best_gain(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert gain == 1.0


@torch.no_grad()
def test_norms_of_parameters_are_those_of_each_heads_rows():
    mixer = first_mixer(build("zamba"))
    rows = mixer.module.x_proj_weight[:, mixer.module.time_step_rank :].norm(dim=-1)
    torch.testing.assert_close(torch.cat(mixer.parameter_norms(), dim=1), rows)


@pytest.mark.parametrize("name", NORMALIZED)
@torch.no_grad()
def test_the_fit_is_a_least_squares_solution_for_its_features(name):
    model = build(name)
    ((_, statistics), *_) = measure(model, [tokens(16, 32)]).items()
    kept = torch.tensor([0, 2, 5])
    start = mean_field_readout(statistics.state_gram[0], kept)
    (system,) = token_systems(first_mixer(model), statistics, kept[None], start[None])
    features = system.features(start, 1.3)
    H_SS = statistics.state_gram[0].double()[kept][:, kept]
    omega = statistics.readout_gram[0].double() / statistics.tokens

    def gradient(matrix: torch.Tensor) -> torch.Tensor:
        residual = system.p - system.times_gram(features @ matrix.float().T - system.start)
        return residual.T @ features

    found = start + _fit(system, features, start, H_SS, omega, 300, 0.0)
    assert gradient(found).norm() < 1e-3 * gradient(start).norm()


def test_rows_of_each_group_are_taken_along_a_dimension_counted_from_the_end():
    values, index = torch.arange(24).view(2, 3, 4), torch.tensor([[0, 2], [1, 2]])
    expected = torch.stack([part[rows] for part, rows in zip(values, index, strict=True)])
    assert torch.equal(take(values, 1, index), expected)
    assert torch.equal(take(values, -2, index), expected)


@pytest.mark.parametrize("part", ["D", "conv1d", "x_proj", "dt_proj", "out_proj"])
def test_a_missing_part_is_named(part):
    model = build("jamba")
    setattr(first_mixer(model).module, part, None)
    with pytest.raises(ValueError, match=rf"layer model\.layers\.0\.mamba: {part} of JambaMambaMixer is missing"):
        compress(model, [tokens()], CompreSSMConfig(state_size=3))


@pytest.mark.parametrize(
    ("name", "needed"), [("mamba", False), ("zamba", False), ("jamba", True), ("falcon_mamba", True)]
)
def test_the_selection_behind_a_norm_looks_at_the_inputs_of_all_processes(name, needed):
    assert _needs_inputs(first_mixer(build(name)), CompreSSMConfig(state_size=3, refit=False)) == needed


def test_errors_of_heads_count_by_their_energy():
    statistics = next(iter(measure(build("zamba"), [tokens(16, 12)]).values()))
    statistics.state_gram[1] *= 100
    order = torch.arange(8).expand(2, -1)
    grams = list(zip(statistics.state_gram.double(), statistics.readout_gram.double(), strict=True))
    removed = sum(
        eliminate(H, omega, rows)[1] * (H * omega).sum() for (H, omega), rows in zip(grams, order, strict=True)
    )
    torch.testing.assert_close(_refit_error(statistics, order), removed / sum((H * omega).sum() for H, omega in grams))


@pytest.mark.parametrize("options", [{}, {"refit_steps": 0}, {"refit": False}])
def test_a_norm_that_lets_nothing_through_is_cut_all_the_same(options):
    model, inputs = build("jamba"), tokens(16, 12)
    with torch.no_grad():
        for mixer in find_mixers(model).values():
            mixer.module.c_layernorm.weight.zero_()
    before = model(inputs).logits
    report = compress(model, [inputs], CompreSSMConfig(state_size=3, **options))
    assert [layer.relative_error for layer in report.layers] == [0, 0]
    torch.testing.assert_close(model(inputs).logits, before)


@pytest.mark.parametrize("name", NORMALIZED)
def test_a_plan_without_scales_is_refused(name):
    model = build(name)
    plan = plan_compression(model, measure(model, [tokens(16, 12)]), CompreSSMConfig(state_size=3))
    bare = {layer: dataclasses.replace(part, scales={}) for layer, part in plan.layers.items()}
    with pytest.raises(ValueError, match=r"the plan scales \{\}; expected a positive number.* for each of \['B'"):
        compress_(model, dataclasses.replace(plan, layers=bare))


@pytest.mark.parametrize("name", ["jamba", "zamba"])
def test_statistics_without_inputs_are_refused(name):
    model = build(name)
    statistics = measure(model, [tokens(16, 12)])
    bare = {layer: dataclasses.replace(part, inputs=[]) for layer, part in statistics.items()}
    with pytest.raises(
        ValueError, match="the statistics hold no recorded inputs, which this plan needs; measure again"
    ):
        plan_compression(model, bare, CompreSSMConfig(state_size=3))


def test_registrations_of_something_else_are_refused():
    with pytest.raises(TypeError, match="architecture must be an Architecture, got <module"):
        register_mixer(nn.Linear, mamba1)
    with pytest.raises(ValueError, match="Linear: only Transformers' own mixers have projected classes"):
        register_mixer(nn.Linear, Architecture("own", mamba1, can_be_projected=True))


@pytest.mark.parametrize(
    ("size", "tried"),
    [(8, [1, 2, 3, 4, 5, 6, 7]), (20, [2, 4, 6, 8, 10, 12, 14, 16, 18])],
    ids=["8 states", "20 states"],
)
def test_a_measured_curve_does_not_fall_with_fewer_states(monkeypatch, size, tried):
    """Half as many states are tried where there are many; between them the error is interpolated."""
    model = build("jamba", mamba_d_state=size, num_hidden_layers=2)
    ((_, statistics),) = measure(model, [tokens(4, 12)]).items()
    errors = {kept: 0.9 - 0.04 * kept + (0.2 if kept == 6 else 0.0) for kept in tried}
    seen = []

    def select(mixer, statistics, kept):
        seen.append(kept.shape[1])
        return Readout(None, errors[kept.shape[1]], "none")

    monkeypatch.setattr("hf_compressm.refit.select_readout", select)
    order = torch.arange(size)[None]
    curve = measured_selection_curve(first_mixer(model), statistics, order, refit=False).numpy()
    assert seen == tried
    assert curve[0] == 1 and curve[size] == 0
    assert (np.diff(curve) <= 0).all() and curve[4] == pytest.approx(errors[6])
    assert curve[7 if size == 8 else 8] == pytest.approx(errors[7 if size == 8 else 8])


@pytest.mark.parametrize(("rounds", "method"), [(0, "conjugate gradients"), (2, "alternating least squares")])
def test_a_fit_of_one_head_alone_is_named(rounds, method):
    model = build("zamba")
    with torch.no_grad():
        for mixer in find_mixers(model).values():
            mixer.module.x_proj_weight[0, mixer.module.time_step_rank :] = 0
    report = compress(model, [tokens(64, 32)], CompreSSMConfig(state_size=3, refit_rounds=rounds))
    assert {layer.refit for layer in report.layers} == {method}


def test_an_error_below_zero_is_rounding():
    mixer, statistics = first_mixer(build("mamba")), next(iter(measure(build("mamba"), [tokens()]).values()))
    kept = torch.tensor([KEPT])
    start = torch.eye(8, dtype=torch.float64)[kept]
    systems = systems_of(kept_recurrences(mixer, statistics, kept), selection(kept, 8), start)
    result = _result(mixer, systems, [_Fit(start[0], 1.0, torch.tensor(-1e-9), "mean field")])
    assert result.relative_error == 0
