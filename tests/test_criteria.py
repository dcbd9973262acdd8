"""The scores, each against its formula written as a loop; Hankel values against scipy's Lyapunov solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import TINY, lively, tokens
from naive import run_mixer

from hf_compressm import CompreSSMConfig, StateStatistics, measure, plan_compression
from hf_compressm.criteria import CRITERIA, criterion, hankel_singular_values, mean_lti_gramians
from hf_compressm.elimination import eliminate


def measured(tiny, **options) -> tuple[torch.nn.Module, StateStatistics]:
    """The first mixer of a model, and its statistics."""
    model = lively(tiny.build(num_hidden_layers=1, **options))
    ((name, statistics),) = measure(model, [tokens()]).items()
    return model.get_submodule(name), statistics


def made_up(groups: int = 1, channels: int = 1, size: int = 5, shared: bool = False, seed: int = 0) -> StateStatistics:
    """Statistics with random values that a mean-LTI system can be built from."""
    generator = torch.Generator().manual_seed(seed)
    count = 10.0
    uniform = torch.rand(groups, channels, 1 if shared else size, generator=generator)
    means = torch.randn(2, groups, size, generator=generator)
    grams = [torch.eye(size).repeat(groups, 1, 1) for _ in range(3)]
    return StateStatistics(
        tokens=torch.tensor(count),
        state_gram=grams[0],
        readout_gram=grams[1],
        contribution_gram=grams[2],
        state_energy=torch.ones(groups, channels, size),
        delta_sum=count * (0.1 + torch.rand(groups, channels, generator=generator)),
        B_sum=count * means[0],
        C_sum=count * means[1],
        A=-0.1 - uniform,
        B_norm=torch.ones(groups, size),
        C_norm=torch.ones(groups, size),
    )


def mean_system(statistics: StateStatistics, group: int, channel: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, c) of the diagonal system that one channel is on average."""
    tokens = statistics.tokens.item()
    size = statistics.state_size
    delta = statistics.delta_sum[group, channel].item() / tokens
    rates = statistics.A[group, channel].expand(size).double().numpy()
    b = delta * statistics.B_sum[group].double().numpy() / tokens
    c = statistics.C_sum[group].double().numpy() / tokens
    return np.exp(delta * rates), b, c


def test_table_holds_the_published_names():
    published = {"ghost", "hankel", "empirical", "last", "aire", "sparsessm", "taylor", "magnitude"}
    assert set(CRITERIA) >= published | {"refit", "random", "smallest"}


def test_scores_have_one_number_for_each_state_of_each_group(tiny):
    mixer, statistics = measured(tiny)
    groups = getattr(mixer, "n_groups", 1)
    for name, score in CRITERIA.items():
        values = score(statistics, 0)
        assert values.shape == (groups, 8) and values.dtype == torch.float64, name
        assert torch.isfinite(values).all(), name


def test_refit_scores_states_by_the_step_of_their_removal(tiny):
    _, statistics = measured(tiny)
    scores = CRITERIA["refit"](statistics, 0)
    for group in range(statistics.groups):
        removed, _ = eliminate(statistics.state_gram[group], statistics.readout_gram[group])
        for step, state in enumerate(removed.tolist()):
            assert scores[group, state] == step


def test_ghost_is_the_energy_of_each_state_alone(tiny):
    mixer, statistics = measured(tiny, state_size=4)
    run = run_mixer(mixer, statistics.inputs[0][0])
    expected = np.zeros((run.groups, 4))
    for b, t in run.tokens():
        for d, g in enumerate(run.group):
            for n in range(4):
                expected[g, n] += run.weight[b, t, d] * (run.C[b, t, g, n] * run.h[b, t, d, n]) ** 2
    np.testing.assert_allclose(CRITERIA["ghost"](statistics, 0).numpy(), expected, rtol=1e-4)


def test_magnitude_is_the_product_of_two_row_norms_of_mamba1():
    mixer, statistics = measured(TINY["mamba"])
    weight, rank = mixer.x_proj.weight.detach().double(), mixer.time_step_rank
    expected = [
        math.sqrt((weight[rank + n] ** 2).sum()) * math.sqrt((weight[rank + 8 + n] ** 2).sum()) for n in range(8)
    ]
    assert CRITERIA["magnitude"](statistics, 0)[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_magnitude_is_the_product_of_two_row_norms_of_mamba2():
    mixer, statistics = measured(TINY["mamba2"])
    weight = mixer.in_proj.weight.detach().double()
    for g in range(2):
        for n in range(8):
            B, C = weight[64 + 8 * g + n], weight[64 + 16 + 8 * g + n]
            expected = math.sqrt((B**2).sum()) * math.sqrt((C**2).sum())
            assert CRITERIA["magnitude"](statistics, 0)[g, n].item() == pytest.approx(expected, rel=1e-5)


def test_random_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    first, again, other = (CRITERIA["random"](made_up(seed=s), seed) for s, seed in ((0, 3), (1, 3), (0, 4)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shared", [False, True], ids=["a rate per state", "a rate per head"])
@pytest.mark.parametrize("seed", range(3))
def test_gramians_solve_the_lyapunov_equations(shared, seed):
    statistics = made_up(groups=2, shared=shared, seed=seed)
    P, Q = mean_lti_gramians(statistics)
    for group in range(2):
        a, b, c = mean_system(statistics, group, 0)
        controllability = scipy.linalg.solve_discrete_lyapunov(np.diag(a), np.outer(b, b))
        observability = scipy.linalg.solve_discrete_lyapunov(np.diag(a).T, np.outer(c, c))
        np.testing.assert_allclose(P[group].numpy(), controllability, rtol=1e-5)
        np.testing.assert_allclose(Q[group].numpy(), observability, rtol=1e-5)
        values = np.sqrt(np.abs(scipy.linalg.eigvals(controllability @ observability)))
        expected = np.sort(values)[::-1]
        np.testing.assert_allclose(
            hankel_singular_values(statistics)[group].numpy(), expected, rtol=1e-4, atol=1e-6 * expected[0]
        )


def test_hankel_scores_a_state_like_the_system_of_that_state_alone():
    statistics = made_up()
    a, b, c = mean_system(statistics, 0, 0)
    for n in range(5):
        P = scipy.linalg.solve_discrete_lyapunov([[a[n]]], [[b[n] ** 2]])[0, 0]
        Q = scipy.linalg.solve_discrete_lyapunov([[a[n]]], [[c[n] ** 2]])[0, 0]
        np.testing.assert_allclose(P, b[n] ** 2 / (1 - a[n] ** 2))
        assert CRITERIA["hankel"](statistics, 0)[0, n].item() == pytest.approx(math.sqrt(P * Q), rel=1e-5)


def share_of_prefix(scores: list[float]) -> list[float]:
    return [score / sum(other for other in scores if other >= score) for score in scores]


@pytest.mark.parametrize("shared", [False, True], ids=["a rate per state", "a rate per head"])
@pytest.mark.parametrize("name", ["last", "aire"])
def test_scores_of_impulse_responses(name, shared):
    statistics = made_up(groups=2, channels=3, shared=shared)
    for group in range(2):
        scores = []
        for n in range(5):
            total = 0.0
            for channel in range(3):
                a, b, c = (values[n] for values in mean_system(statistics, group, channel))
                # The impulse response is c aᵗ b, and the peak of its frequency response, at frequency zero, its sum.
                impulse = [c * a**t * b for t in range(2000)]
                total += sum(impulse) ** 2 if name == "last" else sum(value**2 for value in impulse)
            scores.append(total / 3)
        ours = CRITERIA[name](statistics, 0)[group]
        assert ours.tolist() == pytest.approx(share_of_prefix(scores), rel=1e-4)
        assert ours.argsort().tolist() == np.argsort(scores).tolist()
        assert ours.max().item() == 1


@pytest.mark.parametrize("name", ["last", "aire"])
def test_states_that_are_never_read_score_zero(name):
    statistics = made_up()
    statistics.C_sum[0, 2] = 0
    assert CRITERIA[name](statistics, 0)[0, 2] == 0
    statistics.C_sum[:] = 0
    assert torch.equal(CRITERIA[name](statistics, 0), torch.zeros(1, 5, dtype=torch.float64))


def test_empirical_is_the_product_of_what_is_reached_and_what_is_read(tiny):
    mixer, statistics = measured(tiny, state_size=4)
    run = run_mixer(mixer, statistics.inputs[0][0])
    reached, read = np.zeros((run.groups, 4)), np.zeros((run.groups, 4))
    for b, t in run.tokens():
        for n in range(4):
            for g in range(run.groups):
                read[g, n] += run.C[b, t, g, n] ** 2
            for d, g in enumerate(run.group):
                reached[g, n] += run.weight[b, t, d] * run.h[b, t, d, n] ** 2
    np.testing.assert_allclose(CRITERIA["empirical"](statistics, 0).numpy(), np.sqrt(reached * read), rtol=1e-4)


def test_sparsessm_is_squared_parameters_times_squared_states(tiny):
    mixer, statistics = measured(tiny, state_size=4)
    run = run_mixer(mixer, statistics.inputs[0][0])
    A_log = mixer.A_log.detach().double()
    expected = np.zeros((run.groups, 4))
    for b, t in run.tokens():
        for d, g in enumerate(run.group):
            for n in range(4):
                parameter = A_log[d, n] if A_log.dim() == 2 else A_log[d // mixer.head_dim]
                expected[g, n] += parameter.item() ** 2 * run.h[b, t, d, n] ** 2
    np.testing.assert_allclose(CRITERIA["sparsessm"](statistics, 0).numpy(), expected, rtol=1e-4)


def test_sparsessm_ranks_the_slowest_mode_of_a_fresh_mamba1_last():
    model = TINY["mamba"].build(num_hidden_layers=1)
    (statistics,) = measure(model, [tokens()]).values()
    scores = CRITERIA["sparsessm"](statistics, 0)[0]
    assert scores[0] == 0 and (scores[1:] > 0).all()


def test_taylor_is_the_derivative_of_the_energy_by_a_gate_on_each_state(tiny):
    mixer, statistics = measured(tiny, state_size=4)
    run = run_mixer(mixer, statistics.inputs[0][0])
    C = torch.from_numpy(run.C[:, :, run.group])
    h, weight = torch.from_numpy(run.h), torch.from_numpy(run.weight)
    gate = torch.ones(run.groups, 4, dtype=torch.float64, requires_grad=True)
    y = (gate[torch.from_numpy(run.group)] * C * h).sum(-1)
    ((weight * y.square()).sum() / 2).backward()
    expected = gate.grad.abs()
    torch.testing.assert_close(
        CRITERIA["taylor"](statistics, 0), expected, rtol=1e-4, atol=1e-5 * expected.max().item()
    )


def test_gramians_are_averaged_over_channels():
    statistics = made_up(groups=2, channels=4)
    P, Q = mean_lti_gramians(statistics)
    for group in range(2):
        systems = [mean_system(statistics, group, channel) for channel in range(4)]
        for i in range(5):
            for j in range(5):
                mean_P = sum(b[i] * b[j] / (1 - a[i] * a[j]) for a, b, _ in systems) / 4
                mean_Q = sum(c[i] * c[j] / (1 - a[i] * a[j]) for a, _, c in systems) / 4
                assert P[group, i, j].item() == pytest.approx(mean_P, rel=1e-5)
                assert Q[group, i, j].item() == pytest.approx(mean_Q, rel=1e-5)


def test_hankel_values_fall_and_add_up_to_those_of_the_real_layer(tiny):
    _, statistics = measured(tiny)
    values = hankel_singular_values(statistics)
    assert (values.diff(dim=-1) <= 0).all() and (values >= 0).all()
    P, Q = mean_lti_gramians(statistics)
    # The trace of P Q is the sum of the squared values.
    torch.testing.assert_close(values.square().sum(-1), (P @ Q).diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-5, atol=0)


def test_a_slow_system_does_not_divide_by_zero():
    statistics = made_up()
    statistics.delta_sum *= 1e-9
    assert torch.isfinite(hankel_singular_values(statistics)).all()


def test_smallest_ranks_the_other_way_round():
    statistics = made_up()
    assert torch.equal(CRITERIA["smallest"](statistics, 0), -CRITERIA["hankel"](statistics, 0))


def test_a_user_may_add_a_criterion(tiny, monkeypatch):
    monkeypatch.setitem(CRITERIA, "by number", None)

    @criterion("by number")
    def by_number(statistics, seed):
        return torch.arange(8.0).repeat(statistics.groups, 1)

    model = tiny.build()
    config = CompreSSMConfig(state_size=3, criterion="by number")
    plan = plan_compression(model, measure(model, [tokens()]), config)
    for layer in plan.layers.values():
        assert layer.criterion == "by number"
        assert layer.kept.tolist() == [[5, 6, 7]] * len(layer.kept)
