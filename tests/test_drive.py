"""The closed-form refit of the drive B against dense normal equations, autograd, and the layer after the cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import MAMBA1_FAMILY, TINY, lively, measured, stir, tokens
from naive import NaiveRun, naive

from hf_compressm import CompreSSMConfig, StateStatistics, compress_, find_mixers, measure, plan_compression
from hf_compressm import refit as refit_module
from hf_compressm.drive import KeptRecurrence, fit_drive, kept_recurrences, selection
from hf_compressm.mixers import Mixer
from hf_compressm.refit import Readout, mean_field_readout, refit_readout

SIZE, KEPT, PENALTY = 5, [0, 2, 4], 0.01


def layer(
    batch: int = 6, length: int = 16, mask: torch.Tensor | None = None, seed: int = 0
) -> tuple[Mixer, StateStatistics]:
    """A Mamba-1 mixer whose states matter, and its statistics."""
    model = lively(TINY["mamba"].build(seed, state_size=SIZE, num_hidden_layers=1), seed)
    return measured(model, batch, length, mask, seed)


@dataclasses.dataclass
class Group:
    """What the oracle knows of a group of channels, in float64: b sequences, t times, d channels, n states, r kept.

    Attributes:
        features: the states that B[n] alone would feed with a kept state's decay rate, [b, t, d, r, n].
        B, C: [b, t, n].
        y, weight: [b, t, d].
        mask: [b, t].
        observed: how strongly a kept state is observed, for readouts v [b, t, r].
    """

    decay: np.ndarray
    input: np.ndarray
    features: np.ndarray
    B: np.ndarray
    C: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, delta, x, A, B, C, y, weight, mask) -> Group:
        """From Δ and x [b, t, d] and the kept states' decay rates A [d, r]."""
        decay = np.exp(delta[..., None] * A)
        features = np.zeros((*decay.shape, B.shape[-1]))
        state = np.zeros_like(features[:, 0])
        for t in range(delta.shape[1]):
            pushed = (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
            state = decay[:, t, ..., None] * state + pushed[:, :, None]
            features[:, t] = state
        return cls(decay, delta * x, features, B, C, y, weight, mask)

    def output(self, drive: np.ndarray, readout: np.ndarray) -> np.ndarray:
        """ŷ of states that are fed by `drive` and read out by `readout`, both [r, n]."""
        return np.einsum("btdrn,rn,btr->btd", self.features, drive, self.C @ readout.T)

    def squared_error(self, drive: np.ndarray, readout: np.ndarray) -> float:
        return float((self.weight * (self.y - self.output(drive, readout)) ** 2).sum())

    def observed(self, v: np.ndarray) -> np.ndarray:
        """Σ_t (Δ_t x_t)² Σ_{τ≥t} w_τ (v_τ a_{t+1} ⋯ a_τ)², one time after the other, [r]."""
        total = np.zeros(v.shape[-1])
        for t in range(v.shape[1]):
            left = np.ones_like(self.decay[:, t])
            for later in range(t, v.shape[1]):
                left = left * self.decay[:, later] if later > t else left
                seen = self.weight[:, later, :, None] * (v[:, later, None] * left) ** 2
                total += (self.input[:, t, :, None] ** 2 * seen).sum((0, 1))
        return total

    def optimum(self, drive: np.ndarray, readout: np.ndarray, penalty: float) -> np.ndarray:
        """The drive of least squares with the penalty λ tr(diag(q) D Ω_B Dᵀ) on D, its difference from `drive`."""
        v = self.C @ readout.T
        rows = (self.features * v[:, :, None, :, None]).reshape(*self.y.shape, -1)
        real = self.B[self.mask > 0]
        normal = penalty * np.kron(np.diag(self.observed(v)), real.T @ real / len(real))
        normal += np.einsum("btd,btdi,btdj->ij", self.weight, rows, rows)
        right = np.einsum("btd,btd,btdi->i", self.weight, self.y - self.output(drive, readout), rows)
        return drive + np.linalg.solve(normal, right).reshape(drive.shape)


def group_of_run(mixer: Mixer, run: NaiveRun, kept: list[int] = KEPT) -> Group:
    A = -mixer.module.A_log.detach().double().exp().numpy()[:, kept]
    return Group.of(run.delta, run.x, A, run.B[:, :, 0], run.C[:, :, 0], run.y, run.weight, run.mask)


def groups_of_scan(mixer: Mixer, statistics: StateStatistics, kept: torch.Tensor) -> list[Group]:
    """Of every head, from the scan's inputs; test_mamba1_normalized.py holds these against the models themselves."""
    ((hidden_states, mask),) = statistics.inputs
    with torch.no_grad():
        scan = mixer.scan_inputs(hidden_states, mask)
    numbers = {
        field.name: getattr(scan, field.name).detach().double().numpy()
        for field in dataclasses.fields(scan)
        if isinstance(getattr(scan, field.name), torch.Tensor)
    }
    groups = []
    for number, own in enumerate(kept.tolist()):
        delta, x, B, C, gate = (numbers[name][:, :, number] for name in ("delta", "x", "B", "C", "gate"))
        whole = Group.of(delta, x, numbers["A"][number], B, C, np.zeros_like(x), np.zeros_like(x), numbers["mask"])
        y = np.einsum("btdnn,btn->btd", whole.features, C)
        weight = (gate * numbers["gain"][number]) ** 2 * numbers["mask"][..., None]
        groups.append(Group.of(delta, x, numbers["A"][number][:, own], B, C, y, weight, numbers["mask"]))
    return groups


def mean_fields(statistics: StateStatistics, kept: torch.Tensor) -> torch.Tensor:
    return torch.stack([mean_field_readout(H, own) for H, own in zip(statistics.state_gram, kept, strict=True)])


def disturbed(drive: torch.Tensor) -> torch.Tensor:
    """A start other than a selection: the penalty goes by the distance from it."""
    generator = torch.Generator().manual_seed(3)
    return drive + 0.2 * torch.randn(drive.shape, generator=generator, dtype=torch.float64)


PADDING = torch.ones(6, 16, dtype=torch.long)
PADDING[0, :6] = 0
PADDING[3, 9:] = 0


@pytest.mark.parametrize("mask", [None, PADDING], ids=["no padding", "padding"])
@pytest.mark.parametrize("penalty", [1e-3, 1e-1, 3.0])
def test_enough_steps_reach_the_dense_optimum(mask, penalty):
    mixer, statistics = layer(mask=mask)
    kept = torch.tensor([KEPT])
    readout, start = mean_fields(statistics, kept), disturbed(selection(kept, SIZE))
    group = group_of_run(mixer, naive(mixer, statistics))
    found = fit_drive(kept_recurrences(mixer, statistics, kept), start, readout, steps=60, penalty=penalty)
    assert found.shape == (1, 3, SIZE) and found.dtype == torch.float64
    expected = group.optimum(start[0].numpy(), readout[0].numpy(), penalty)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-2, atol=1e-2)
    before, ours, best = (
        group.squared_error(drive, readout[0].numpy()) for drive in (start[0].numpy(), found[0].numpy(), expected)
    )
    assert ours == pytest.approx(best, rel=1e-3) and best < before


def test_each_head_has_a_drive_of_its_own():
    model = stir(MAMBA1_FAMILY["zamba"].build(mamba_d_state=SIZE)).eval()
    (name, mixer), *_ = find_mixers(model).items()
    statistics = measure(model, [tokens(6, 16)])[name]
    kept = torch.tensor([[0, 2, 4], [1, 2, 3]])
    readout, start = mean_fields(statistics, kept), disturbed(selection(kept, SIZE))
    found = fit_drive(kept_recurrences(mixer, statistics, kept), start, readout, steps=80, penalty=PENALTY)
    for number, group in enumerate(groups_of_scan(mixer, statistics, kept)):
        expected = group.optimum(start[number].numpy(), readout[number].numpy(), PENALTY)
        np.testing.assert_allclose(found[number].numpy(), expected, rtol=1e-2, atol=1e-2)


def random_recurrence(length: int = 9) -> tuple[KeptRecurrence, torch.Tensor, torch.Tensor]:
    """Of two groups with three channels, two of four states kept, in float64; with the Δ and A of its decays."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels, states = (length, 2, 2, 3), (length, 2, 2, 4)
    delta, A = numbers(*channels).exp(), -numbers(2, 3, 2).exp()
    decay = (delta[..., None] * A).exp()
    run = KeptRecurrence(
        decay=decay,
        # What is taken for the decay after the last step does not matter.
        decay_back=torch.cat([decay[1:], torch.full_like(decay[:1], 7.0)]).flip(0),
        input=numbers(*channels),
        B=numbers(*states),
        C=numbers(*states),
        y=numbers(*channels),
        weight=numbers(*channels).square(),
        mask=torch.ones(length, 2, dtype=torch.float64),
    )
    return run, delta, A


def plain_output(run: KeptRecurrence, drive: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The recurrence as it is written, without writing into tensors, so that autograd can follow it."""
    state, outputs = torch.zeros(2, 2, 3, 2, dtype=torch.float64), []
    for t in range(len(run.decay)):
        B = torch.einsum("grn,bgn->bgr", drive, run.B[t])
        state = run.decay[t] * state + run.input[t, ..., None] * B[:, :, None]
        outputs.append((state * v[t, :, :, None]).sum(-1))
    return torch.stack(outputs)


@pytest.mark.parametrize("chunk_elements", [1, 3 * 2 * 2 * 3 * 2, 2**22], ids=["one", "three", "all"])
def test_runs_forwards_and_backwards_are_those_of_autograd(monkeypatch, chunk_elements):
    """In chunks of one, three and all time steps."""
    monkeypatch.setattr("hf_compressm.mixers.scan.CHUNK_ELEMENTS", chunk_elements)
    (run, _, _), generator = random_recurrence(), torch.Generator().manual_seed(1)
    drive = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    v = torch.randn(9, 2, 2, 2, generator=generator, dtype=torch.float64)
    errors = torch.randn(9, 2, 2, 3, generator=generator, dtype=torch.float64)
    expected = plain_output(run, drive, v)
    (expected * errors).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(run.output(drive, v), expected)
        torch.testing.assert_close(run.backwards(errors, v), drive.grad)


def test_how_strongly_states_are_observed_is_what_its_sum_says(monkeypatch):
    monkeypatch.setattr("hf_compressm.mixers.scan.CHUNK_ELEMENTS", 2 * 2 * 2 * 3 * 2)
    run, all_delta, A = random_recurrence()
    v = torch.randn(9, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = run.observed(v)
    for number in range(2):
        delta, drive, B, C, y, weight = (
            tensor[:, :, number].transpose(0, 1).numpy()
            for tensor in (all_delta, run.input, run.B, run.C, run.y, run.weight)
        )
        group = Group.of(delta, drive / delta, A[number].numpy(), B, C, y, weight, run.mask.T.numpy())
        expected = group.observed(v[:, :, number].transpose(0, 1).numpy())
        np.testing.assert_allclose(found[number].numpy(), expected)


def refit(mixer: Mixer, statistics: StateStatistics, rounds: int, steps: int = 10) -> Readout:
    return refit_readout(mixer, statistics, torch.tensor([KEPT]), steps=steps, penalty=1e-3, rounds=rounds)


@pytest.mark.parametrize("seed", range(3))
def test_each_round_lowers_the_error_and_reports_the_real_one(seed):
    mixer, statistics = layer(seed=seed)
    group, errors = group_of_run(mixer, naive(mixer, statistics)), []
    for rounds in range(4):
        result = refit(mixer, statistics, rounds)
        assert result.method == ("alternating least squares" if rounds else "conjugate gradients")
        drive = np.eye(SIZE)[KEPT] if result.drive is None else result.drive[0].double().numpy()
        real = group.squared_error(drive, result.matrix[0].double().numpy()) / group.squared_error(
            0 * drive, 0 * drive
        )
        assert result.relative_error == pytest.approx(real**0.5, rel=1e-3)
        assert (result.drive is None) == (rounds == 0)
        errors.append(result.relative_error)
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.95 * errors[0]


@pytest.mark.parametrize("good", [0, 1])
def test_a_round_that_does_not_lower_the_error_is_the_last_and_not_taken(monkeypatch, good):
    mixer, statistics = layer()
    calls = []

    def fit_some(recurrences, drive, readout, **options):
        calls.append(drive)
        return fit_drive(recurrences, drive, readout, **options) if len(calls) <= good else torch.zeros_like(drive)

    expected = refit(mixer, statistics, rounds=good)
    monkeypatch.setattr(refit_module, "fit_drive", fit_some)
    result = refit(mixer, statistics, rounds=5)
    assert len(calls) == good + 1
    assert (result.method, result.relative_error) == (expected.method, expected.relative_error)
    assert torch.equal(result.matrix, expected.matrix)
    assert result.drive is None if not good else torch.equal(result.drive, expected.drive)


def test_the_next_round_starts_from_the_drive_of_the_last(monkeypatch):
    mixer, statistics = layer()
    starts, found = [], []

    def fit_and_note(recurrences, drive, readout, **options):
        starts.append(drive)
        found.append(fit_drive(recurrences, drive, readout, **options))
        return found[-1]

    monkeypatch.setattr(refit_module, "fit_drive", fit_and_note)
    refit(mixer, statistics, rounds=2)
    assert torch.equal(starts[0], selection(torch.tensor([KEPT]), SIZE)) and torch.equal(starts[1], found[0])


def test_without_a_fit_the_drive_stays():
    mixer, statistics = layer()
    for result in (refit(mixer, statistics, rounds=2, steps=0), refit(*layer(1, 3), rounds=2)):
        assert (result.method, result.drive) == ("mean field", None)


@pytest.mark.parametrize("name", ["falcon_mamba", "jamba"])
def test_behind_norms_the_drive_stays(name):
    model = stir(MAMBA1_FAMILY[name].build()).eval()
    plan = plan_compression(model, measure(model, [tokens(16, 24)]), CompreSSMConfig(state_size=3))
    for layer_plan in plan.layers.values():
        assert layer_plan.refit in ("conjugate gradients", "mean field")
        assert layer_plan.drive is None and set(layer_plan.mixtures) == {"C"}


def test_the_fit_is_exact_for_silent_states(silence):
    model = lively(TINY["mamba"].build(state_size=SIZE))
    silence(model, [1, 3])
    for name, statistics in measure(model, [tokens(8, 24)]).items():
        result = refit(find_mixers(model)[name], statistics, rounds=2)
        assert result.relative_error < 1e-5
        for matrix in (result.matrix, result.drive):
            if matrix is not None:
                torch.testing.assert_close(matrix[0][:, KEPT], torch.eye(3), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("silent", ["the output", "the states"])
def test_a_layer_that_passes_nothing_on_has_a_finite_drive(silence, silent):
    mixer, statistics = layer()
    if silent == "the states":
        silence(mixer.module, list(range(SIZE)))
    else:
        torch.nn.init.zeros_(mixer.module.out_proj.weight)
    ((hidden_states, mask),) = statistics.inputs
    statistics = StateStatistics.empty(mixer)
    statistics.update(mixer, hidden_states, mask)
    kept = torch.tensor([KEPT])
    start = selection(kept, SIZE)
    found = fit_drive(kept_recurrences(mixer, statistics, kept), start, start, steps=10, penalty=PENALTY)
    assert torch.equal(found, start)


def test_the_fit_touches_nothing():
    mixer, statistics = layer()
    weights = {name: value.clone() for name, value in mixer.module.state_dict().items()}
    inputs = [hidden_states.clone() for hidden_states, _ in statistics.inputs]
    sums, state = [tensor.clone() for tensor in statistics.sums], torch.get_rng_state()
    assert refit(mixer, statistics, rounds=2).drive is not None
    assert all(torch.equal(value, weights[name]) for name, value in mixer.module.state_dict().items())
    assert all(torch.equal(tensor, before) for tensor, before in zip(statistics.sums, sums, strict=True))
    assert all(torch.equal(tensor, before) for (tensor, _), before in zip(statistics.inputs, inputs, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["mamba", "zamba"])
def test_the_cut_layer_puts_out_what_was_fitted(name):
    """The scan of the mixer after the cut, fed with what it was measured on, against the plan's matrices."""
    model = stir(MAMBA1_FAMILY[name].build()).eval()
    statistics = measure(model, [tokens(8, 24)])
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=3))
    expected = {}
    for layer_name, mixer in find_mixers(model).items():
        part = plan.layers[layer_name]
        assert part.refit == "alternating least squares" and set(part.mixtures) == {"B", "C"}
        expected[layer_name] = [
            group.output(part.drive[number].double().numpy(), part.readout[number].double().numpy())
            for number, group in enumerate(groups_of_scan(mixer, statistics[layer_name], part.kept))
        ]
    compress_(model, plan)
    for layer_name, mixer in find_mixers(model).items():
        after = groups_of_scan(mixer, statistics[layer_name], torch.arange(3).expand(mixer.groups, -1))
        for group, wanted in zip(after, expected[layer_name], strict=True):
            np.testing.assert_allclose(group.y, wanted, rtol=1e-3, atol=1e-4)
