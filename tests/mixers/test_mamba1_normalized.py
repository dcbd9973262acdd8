"""Norms on B and C, and heads: what the package recomputes and reports, against the models themselves."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import scipy.optimize
import torch
from conftest import MAMBA1_FAMILY, silence_states, stir, tokens
from torch import nn

from hf_compressm import CompreSSMConfig, compress, compress_, find_mixers, measure, plan_compression
from hf_compressm.mixers import Mixer, mamba1_normalized, stream_states
from hf_compressm.mixers.mamba1_normalized import balance, raw_readout
from hf_compressm.optimizer_state import POWERS

NORMALIZED = ["falcon_mamba", "jamba"]
KEPT, SILENT = [0, 2, 5], [1, 3, 4, 6, 7]


def build(name: str, **options) -> nn.Module:
    return stir(MAMBA1_FAMILY[name].build(**options)).eval()


def first_mixer(model: nn.Module) -> Mixer:
    return next(iter(find_mixers(model).values()))


def record(
    model: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What the first mixer takes, its mask, and what enters its out_proj."""
    taken: list[torch.Tensor] = []
    mixer = first_mixer(model).module

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        taken[:] = [args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")]

    handles = [
        mixer.register_forward_pre_hook(keep, with_kwargs=True),
        mixer.out_proj.register_forward_pre_hook(lambda module, args: taken.append(args[0])),
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return tuple(taken)


@pytest.mark.parametrize("name", list(MAMBA1_FAMILY))
def test_the_scan_is_recomputed_as_the_model_runs_it(name):
    model, inputs = build(name), tokens(4, 12)
    mask = torch.ones_like(inputs)
    mask[0, :5] = 0
    hidden_states, layer_mask, expected = record(model, {"input_ids": inputs, "attention_mask": mask})
    scan = first_mixer(model).scan_inputs(hidden_states, layer_mask)
    states = torch.cat([part.clone() for _, part in stream_states(scan)])
    y = (states @ scan.C.transpose(0, 1)[..., None]).squeeze(-1) + scan.D * scan.x.transpose(0, 1)
    passed_on = (y * scan.gate.transpose(0, 1)).flatten(2).transpose(0, 1)
    torch.testing.assert_close(passed_on[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"refit": False}, {"refit_steps": 0}], ids=["fit", "selection", "mean field"])
@pytest.mark.parametrize("name", list(MAMBA1_FAMILY))
def test_the_reported_error_is_that_of_the_cut_model(name, options):
    """Of what the first layer passes on, channel by channel: Σ (out_proj's input)² ‖W_out[:,d]‖²."""
    # Norms in the scale of their weights: roots of mean squares of about 1.
    model, inputs = build(name), tokens(32, 32)
    hidden_states, _, before = record(model, {"input_ids": inputs})
    scan = first_mixer(model).scan_inputs(hidden_states, None)
    skip = (scan.D * scan.x * scan.gate).flatten(2)
    gain = first_mixer(model).module.out_proj.weight.norm(dim=0)
    config = CompreSSMConfig(state_size=3, calibration_tokens=1, **options)
    report = compress(model, [inputs], config)
    _, _, after = record(model, {"input_ids": inputs})
    # Where out_proj is scaled, its input is as much smaller.
    after = after * (first_mixer(model).module.out_proj.weight.norm(dim=0) / gain)
    error = ((before - after) * gain).norm() / ((before - skip) * gain).norm()
    expected = report.layers[0].relative_error
    if name in ("mamba", "zamba") and not options.get("refit", True):
        # There the error of a selection is estimated from the sums: the same number.
        assert expected == pytest.approx(float(error), rel=1e-3)
    assert float(error) == pytest.approx(expected, rel=2e-3)
    assert 0.01 < expected < 1


@pytest.mark.parametrize("name", list(MAMBA1_FAMILY))
def test_a_fit_is_better_than_a_selection(name):
    errors = []
    for options in ({"refit": False}, {"refit_steps": 0}, {}):
        report = compress(build(name), [tokens(64, 32)], CompreSSMConfig(state_size=3, criterion="ghost", **options))
        errors.append(report.layers[0].relative_error)
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("name", NORMALIZED)
def test_a_cut_of_silent_states_scales_gradients_and_moments_inversely(name):
    """p' = c p and the same outputs: g' = g / c, so that moments are divided by c and c²."""
    model = build(name).train()
    silence_states(model, SILENT)
    small = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.0) for each in (model, small)]
    batch = {"input_ids": tokens(4, 12), "labels": tokens(4, 12)}

    def step(each: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        each(**batch).loss.backward()
        optimizer.step()

    for each, optimizer in zip((model, small), optimizers, strict=True):
        step(each, optimizer)
    optimizers[1].zero_grad()
    statistics = measure(small, [tokens(32, 32)])
    plan = plan_compression(small, statistics, CompreSSMConfig(state_size=3, refit=False))
    compress_(small, plan, optimizers[1])
    mixers, smaller = find_mixers(model), find_mixers(small)
    factors = [
        (axis, small_axis, axis.factors(plan.layers[layer].scales, 3), plan.layers[layer].kept)
        for layer in mixers
        for axis, small_axis in zip(mixers[layer].axes, smaller[layer].axes, strict=True)
    ]
    assert sum(factor is not None for _, _, factor, _ in factors) == len(mixers) * 3
    assert all(set(kept[0].tolist()) == set(KEPT) for *_, kept in factors)
    for axis, small_axis, factor, kept in factors:
        shape = [-1 if dim == axis.dim else 1 for dim in range(axis.tensor.dim())]
        factor = torch.ones(1) if factor is None else factor.float().view(shape)
        state, small_state = (
            optimizer.state[each.tensor] for optimizer, each in zip(optimizers, (axis, small_axis), strict=True)
        )
        torch.testing.assert_close(small_axis.tensor, axis.take(axis.tensor, kept, 8) * factor)
        for key in ("exp_avg", "exp_avg_sq"):
            expected = axis.take(state[key], kept, 8) * factor ** POWERS[key]
            torch.testing.assert_close(small_state[key], expected, msg=f"{axis.parameter} {key}")
    for each, optimizer in zip((model, small), optimizers, strict=True):
        step(each, optimizer)
    for axis, small_axis, factor, kept in factors:
        shape = [-1 if dim == axis.dim else 1 for dim in range(axis.tensor.dim())]
        factor = torch.ones(1) if factor is None else factor.float().view(shape)
        expected = axis.take(axis.tensor.grad, kept, 8) / factor
        torch.testing.assert_close(small_axis.tensor.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("name", NORMALIZED)
def test_training_goes_on_much_as_it_would_have(name, optimizer):
    """Outputs are equal at the cut; steps do not follow a scale, so that the losses part, and both fall."""
    losses = []
    for cuts in (False, True):
        model = build(name).train()
        silence_states(model, SILENT)
        rate = {"AdamW": 3e-3, "SGD": 1e-2}[optimizer]
        trainer = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
        own: list[float] = []
        for number in range(60):
            if cuts and number == 10:
                compress_(model, lossless_plan(model), trainer)
            loss = model(input_ids=tokens(4, 12, number % 4), labels=tokens(4, 12, number % 4)).loss
            loss.backward()
            own.append(loss.item())
            trainer.step()
            trainer.zero_grad()
        losses.append(torch.tensor(own))
    whole, cut = losses
    torch.testing.assert_close(cut[:11], whole[:11], rtol=1e-5, atol=1e-5)
    assert (cut - whole).abs()[11:20].max() < 0.15 * whole[0]
    start, with_all, without = whole[:4].mean(), whole[-8:].mean(), cut[-8:].mean()
    assert with_all < 0.95 * start and without < 0.95 * start
    assert without < 1.25 * with_all


def lossless_plan(model: nn.Module):
    return plan_compression(model, measure(model, [tokens(32, 32)]), CompreSSMConfig(state_size=3, refit=False))


def test_raw_readouts_act_before_the_weights_of_the_norm():
    generator = torch.Generator().manual_seed(0)
    readout, c = torch.randn(3, 8, generator=generator), torch.randn(8, generator=generator)
    weight, kept = 0.5 + torch.rand(8, generator=generator), torch.tensor(KEPT)
    rows = raw_readout(readout, kept, weight)
    torch.testing.assert_close(weight[kept] * (rows @ c), readout @ (weight * c))
    identity = torch.eye(8)[kept]
    torch.testing.assert_close(raw_readout(identity, kept, weight), identity)


def test_a_weight_of_nearly_zero_is_not_divided_by():
    weight = torch.ones(8)
    weight[2], weight[5] = 0.0, -1e-9
    rows = raw_readout(torch.ones(3, 8), torch.tensor(KEPT), weight)
    assert torch.isfinite(rows).all() and rows.abs().max() <= 1001
    assert rows[1, 0] == pytest.approx(1000) and rows[2, 0] == pytest.approx(-1000)


@pytest.mark.parametrize("name", NORMALIZED)
def test_epsilon_takes_part(name):
    """A norm whose ε is as large as the mean square: still exact, since rows are scaled and not ε."""
    epsilon = {"falcon_mamba": "mixer_rms_eps", "jamba": "rms_norm_eps"}[name]
    model = build(name, **{epsilon: 0.5})
    silence_states(model, SILENT)
    with torch.no_grad():
        before = model(tokens()).logits
        compress_(model, lossless_plan(model))
        torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-4, atol=1e-4)


def test_heads_of_zamba_keep_states_of_their_own():
    model = build("zamba")
    mixer = first_mixer(model)
    silent = [[1, 3, 4, 6, 7], [0, 1, 2, 3, 4]]
    silence_states(model, silent)
    with torch.no_grad():
        before = model(tokens()).logits
    old = mixer.module.A_log.detach().clone()
    report = compress(model, [tokens(32, 32)], CompreSSMConfig(state_size=3))
    assert report.layers[0].kept == [[0, 2, 5], [5, 6, 7]]
    assert torch.equal(mixer.module.A_log[0], old[0][:, [0, 2, 5]])
    assert torch.equal(mixer.module.A_log[1], old[1][:, [5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("name", NORMALIZED)
def test_a_tolerance_holds_for_what_is_measured(name, refit):
    """The sums do not know what the norms lose, so that the error is measured for each size."""
    inputs = [tokens(64, 32)]
    for tolerance in (0.3, 0.5):
        model = build(name, **{"jamba": {"num_hidden_layers": 2}}.get(name, {"num_hidden_layers": 1}))
        statistics = measure(model, inputs)
        config = CompreSSMConfig(tolerance=tolerance, refit=refit, refit_steps=0)
        ((layer, plan),) = plan_compression(model, statistics, config).layers.items()
        kept, curve = plan.state_size_after, plan.error_curve
        assert 1 < kept < 8 and curve[kept] <= tolerance < curve[kept - 1]
        assert plan.relative_error == pytest.approx(curve[kept], rel=1e-5)
        one_less = CompreSSMConfig(state_size=kept - 1, refit=refit, refit_steps=0)
        fewer = plan_compression(model, statistics, one_less).layers[layer]
        assert fewer.relative_error > tolerance


def features(seed: int = 0, count: int = 200) -> torch.Tensor:
    """b_t of 8 states, of very different sizes that change with time."""
    generator = torch.Generator().manual_seed(seed)
    rhythms = torch.rand(count, 3, generator=generator) @ torch.rand(3, 8, generator=generator) ** 4
    return torch.randn(count, 8, generator=generator) * rhythms


def test_balances_are_the_non_negative_least_squares():
    b, epsilon = features(), 1e-3
    mean_squares = b.square().mean(-1) + epsilon
    alpha = balance(b[:, KEPT].square(), mean_squares, epsilon, 8)
    shares = b[:, KEPT].square() / 8 / mean_squares[:, None]
    wanted = 1 - epsilon / mean_squares
    expected, residual = scipy.optimize.nnls(shares.double().numpy(), wanted.double().numpy())
    assert (expected > 0.02 * expected.max()).all()
    np.testing.assert_allclose(alpha.square().numpy(), expected, rtol=1e-3)
    constant = (shares.sum(1) - wanted).norm()
    assert residual < 0.95 * constant


def test_balances_are_one_where_the_removed_states_are_zero():
    b = features()
    b[:, SILENT] = 0
    mean_squares = b.square().mean(-1) + 0.1
    torch.testing.assert_close(balance(b[:, KEPT].square(), mean_squares, 0.1, 8), torch.ones(3))


def test_a_balance_is_never_much_smaller_than_the_others():
    b = features()
    b[:, 2] *= 1e4
    alpha = balance(b[:, KEPT].square(), features().square().mean(-1), 0.0, 8)
    assert torch.isfinite(alpha).all()
    assert alpha.min() == pytest.approx(mamba1_normalized.SMALLEST_BALANCE * alpha.max().item())


def test_balances_make_a_cut_of_jamba_better(monkeypatch):
    errors = []
    for balanced in (False, True):
        model = build("jamba")
        with torch.no_grad():
            for mixer in find_mixers(model).values():
                # Rows of different sizes, as training makes them.
                mixer.module.x_proj.weight[1:] *= torch.logspace(-1, 1, 16)[:, None]
        statistics = measure(model, [tokens(64, 32)])
        with monkeypatch.context() as patch:
            if not balanced:
                patch.setattr("hf_compressm.token_systems.balance", lambda squares, *_: torch.ones(squares.shape[1]))
            plan = plan_compression(model, statistics, CompreSSMConfig(state_size=3))
        compress_(model, plan)
        errors.append([layer.relative_error for layer in plan.layers.values()])
    assert all(better < 0.99 * worse for worse, better in zip(*errors, strict=True))


@pytest.mark.parametrize(
    "scales",
    [{"B": -1.0}, {"B": [1.0, 1.0]}, {"B": [1.0, float("nan"), 1.0]}, {"D": 2.0}, {"X": 1.0}],
    ids=str,
)
def test_scales_that_do_not_fit_are_refused(scales):
    model = build("jamba")
    plan = lossless_plan(model)
    name = next(iter(plan.layers))
    plan.layers[name] = dataclasses.replace(plan.layers[name], scales=scales)
    with pytest.raises(ValueError, match=r"the plan scales .*expected a positive number, or one for each of the 3"):
        compress_(model, plan)
