"""The sums that a cut is decided by, against a naive loop over sequences, times, channels and states."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import TINY, VOCABULARY, lively, tokens
from naive import NaiveRun, run_mixer
from torch import nn

import hf_compressm.statistics
from hf_compressm import StateStatistics, find_mixers, measure
from hf_compressm.mixers import stream_states

LEFT = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
MASKS = {"none": None, "left": LEFT, "right": LEFT.flip(1)}
OPTIONS = {
    "plain": {},
    "biases": {"use_bias": True},
    "no conv bias": {"use_conv_bias": False},
    "biases but none of the convolution": {"use_bias": True, "use_conv_bias": False},
}
SUMS = [
    "tokens",
    "state_gram",
    "readout_gram",
    "contribution_gram",
    "state_energy",
    "delta_sum",
    "B_sum",
    "C_sum",
]


def batch_of(mask: torch.Tensor | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = {"input_ids": tokens(3, 7, seed)}
    return batch if mask is None else batch | {"attention_mask": mask}


@torch.no_grad()
def mixer_inputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each mixer is given in a forward pass of the test's own."""
    seen, mixers = {}, find_mixers(model)
    handles = [
        mixer.module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.update({name: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
        for name, mixer in mixers.items()
    ]
    model.eval()(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def naive_sums(run: NaiveRun) -> dict[str, np.ndarray]:
    size, channels = run.h.shape[-1], len(run.group) // run.groups
    grams = (run.groups, size, size)
    sums = {
        "tokens": np.zeros(()),
        "state_gram": np.zeros(grams),
        "readout_gram": np.zeros(grams),
        "contribution_gram": np.zeros(grams),
        "state_energy": np.zeros((run.groups, channels, size)),
        "delta_sum": np.zeros((run.groups, channels)),
        "B_sum": np.zeros((run.groups, size)),
        "C_sum": np.zeros((run.groups, size)),
    }
    for b, t in run.tokens():
        sums["tokens"] += 1
        for g in range(run.groups):
            C = run.C[b, t, g]
            sums["B_sum"][g] += run.B[b, t, g]
            sums["C_sum"][g] += C
            for m in range(size):
                for n in range(size):
                    sums["readout_gram"][g, m, n] += C[m] * C[n]
        for d, g in enumerate(run.group):
            h, w, C = run.h[b, t, d], run.weight[b, t, d], run.C[b, t, g]
            sums["delta_sum"][g, d % channels] += run.delta[b, t, d]
            for n in range(size):
                sums["state_energy"][g, d % channels, n] += h[n] ** 2
            for m in range(size):
                for n in range(size):
                    sums["state_gram"][g, m, n] += w * h[m] * h[n]
                    sums["contribution_gram"][g, m, n] += w * C[m] * h[m] * C[n] * h[n]
    return sums


def assert_equals_naive(statistics: StateStatistics, sums: dict[str, np.ndarray], rtol: float = 1e-4) -> None:
    for name in SUMS:
        ours, oracle = getattr(statistics, name).double(), torch.from_numpy(np.asarray(sums[name]))
        torch.testing.assert_close(ours, oracle, rtol=rtol, atol=rtol * oracle.abs().max().item(), msg=name.__add__)


def assert_same(ours: dict[str, StateStatistics], other: dict[str, StateStatistics], **tolerances) -> None:
    assert len(ours) == len(other)
    for first, second in zip(ours.values(), other.values(), strict=True):
        for one, two in zip(first.sums, second.sums, strict=True):
            torch.testing.assert_close(one, two, **tolerances)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_sums_equal_the_naive_loop(tiny, options, mask):
    model, batch = lively(tiny.build(num_hidden_layers=1, state_size=4, **options)), batch_of(mask)
    (name, seen), *_ = mixer_inputs(model, batch).items()
    statistics = measure(model, [batch])[name]
    run = run_mixer(model.get_submodule(name), seen, mask)
    assert_equals_naive(statistics, naive_sums(run))
    energy = (run.weight * run.y**2).sum()
    assert statistics.contribution_gram.sum().item() == pytest.approx(energy, rel=1e-4)


def test_every_layer_has_its_own_sums(tiny):
    model, batch = lively(tiny.build(state_size=4)), batch_of(LEFT)
    statistics = measure(model, [batch])
    assert list(statistics) == list(find_mixers(model))
    for name, seen in mixer_inputs(model, batch).items():
        assert_equals_naive(statistics[name], naive_sums(run_mixer(model.get_submodule(name), seen, LEFT)))


def test_bf16_models_are_measured_in_float32(tiny):
    model, batch = lively(tiny.build(num_hidden_layers=1, state_size=4)).to(torch.bfloat16), batch_of(LEFT)
    (name, seen), *_ = mixer_inputs(model, batch).items()
    statistics = measure(model, [batch])[name]
    assert seen.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in statistics.sums)
    # The mixer's input is rounded; what follows is not.
    assert_equals_naive(statistics, naive_sums(run_mixer(model.get_submodule(name), seen, LEFT)))


def test_autocast_around_the_measurement_changes_no_sum_of_the_first_layer(tiny):
    model = lively(tiny.build_base(num_hidden_layers=1))
    plain = measure(model, [batch_of(LEFT)])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(measure(model, [batch_of(LEFT)]), plain, rtol=1e-6, atol=0.0)


def test_gradient_checkpointing_changes_nothing(tiny):
    model = lively(tiny.build())
    plain = measure(model, [batch_of(LEFT)])
    model.gradient_checkpointing_enable()
    model.train()
    assert_same(measure(model, [batch_of(LEFT)]), plain, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("chunk_elements", [1, 1000])
@pytest.mark.parametrize("gram_elements", [1, 1000])
def test_chunks_change_nothing(tiny, monkeypatch, chunk_elements, gram_elements):
    model = lively(tiny.build())
    whole = measure(model, [batch_of(LEFT)])
    small = functools.partial(stream_states, chunk_elements=chunk_elements)
    monkeypatch.setattr(hf_compressm.statistics, "stream_states", small)
    monkeypatch.setattr(hf_compressm.statistics, "GRAM_ELEMENTS", gram_elements)
    assert_same(measure(model, [batch_of(LEFT)]), whole, rtol=1e-4, atol=1e-5)


def test_batches_add_up_and_their_inputs_are_kept(tiny):
    model = lively(tiny.build())
    batches = [batch_of(LEFT), batch_of(None, seed=1)]
    parts, whole = [measure(model, [batch]) for batch in batches], measure(model, batches)
    for name, statistics in whole.items():
        assert statistics.tokens == LEFT.sum() + 21
        for total, one, two in zip(statistics.sums, *(part[name].sums for part in parts), strict=True):
            torch.testing.assert_close(total, one + two, rtol=1e-5, atol=1e-6)
        inputs = [mixer_inputs(model, batch)[name] for batch in batches]
        for (kept, _), own in zip(statistics.inputs, inputs, strict=True):
            torch.testing.assert_close(kept, own, rtol=1e-5, atol=1e-6)
        assert torch.equal(statistics.inputs[0][1], LEFT) and statistics.inputs[1][1] is None


def test_parameters_are_described(tiny):
    model = tiny.build()
    for name, mixer in find_mixers(model).items():
        statistics = measure(model, [tokens()])[name]
        assert (statistics.groups, statistics.state_size) == (mixer.groups, mixer.state_size)
        torch.testing.assert_close(statistics.A, mixer.layout.decay_rates(mixer.module))
        B_norm, C_norm = mixer.layout.parameter_norms(mixer.module)
        assert torch.equal(statistics.B_norm, B_norm) and torch.equal(statistics.C_norm, C_norm)


@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: (ids,), lambda ids: {"input_ids": ids}])
def test_batches_may_be_tensors_tuples_or_dictionaries(tiny, form):
    model = tiny.build()
    assert_same(measure(model, [form(tokens())]), measure(model, [{"input_ids": tokens()}]), rtol=0.0, atol=0.0)


def test_inputs_embeds_are_taken_too(tiny):
    model = tiny.build()
    embeds = model.get_input_embeddings()(tokens()).detach()
    assert_same(measure(model, [{"inputs_embeds": embeds}]), measure(model, [tokens()]), rtol=0.0, atol=0.0)


def test_labels_are_never_needed(tiny):
    model = tiny.build()
    unusable = {"labels": torch.full((3, 7), VOCABULARY + 99), "num_items_in_batch": torch.tensor(0)}
    assert_same(measure(model, [batch_of() | unusable]), measure(model, [batch_of()]), rtol=0.0, atol=0.0)


def test_base_model_and_language_model_agree(tiny):
    model = tiny.build()
    assert_same(measure(model, [batch_of(LEFT)]), measure(model.backbone, [batch_of(LEFT)]), rtol=0.0, atol=0.0)


class Classifier(nn.Module):
    """A user's own module around a base model."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(16, 3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.body(input_ids=input_ids).last_hidden_state[:, -1])


def test_model_inside_another_module(tiny):
    model = Classifier(tiny.build_base())
    statistics = measure(model, [batch_of() | {"labels": torch.zeros(3)}])
    assert list(statistics) == ["body.layers.0.mixer", "body.layers.1.mixer"]
    assert_same(statistics, measure(model.body, [batch_of()]), rtol=0.0, atol=0.0)


class TwoTowers(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, left_ids: torch.Tensor, right_ids: torch.Tensor) -> torch.Tensor:
        return self.left(left_ids).last_hidden_state[:, -1] * self.right(right_ids).last_hidden_state[:, -1]


def test_module_that_holds_two_models():
    towers = TwoTowers(TINY["mamba"].build_base(), TINY["mamba2"].build_base(state_size=4))
    statistics = measure(towers, [{"left_ids": tokens(), "right_ids": tokens(4, 5)}])
    own = [
        *measure(towers.left, [tokens()]).values(),
        *measure(towers.right, [tokens(4, 5)]).values(),
    ]
    assert list(statistics) == [f"{side}.layers.{layer}.mixer" for side in ("left", "right") for layer in (0, 1)]
    assert_same(statistics, dict(enumerate(own)), rtol=0.0, atol=0.0)


def footprint(model: nn.Module) -> list:
    """Modes and hooks of every module."""
    return [
        (
            module.training,
            dict(module._forward_pre_hooks),
            dict(module._forward_pre_hooks_with_kwargs),
            dict(module._forward_hooks),
            dict(module._backward_hooks),
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_no_trace(tiny, fails):
    model = tiny.build().train()
    model.backbone.layers[0].eval()
    model.backbone.layers[1].register_forward_pre_hook(lambda module, args: None)
    before, weights = footprint(model), {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    if fails:
        with pytest.raises(IndexError):
            measure(model, [batch_of(), {"input_ids": torch.full((1, 3), VOCABULARY)}])
    else:
        measure(model, [batch_of()])
    assert footprint(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_statistics_are_taken_in_eval_mode_and_without_gradients(tiny):
    model, seen = tiny.build().train(), []
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, torch.is_grad_enabled())))
    measure(model, [tokens()])
    assert seen == [(False, False)]


def test_nothing_but_padding_is_an_error(tiny):
    with pytest.raises(ValueError, match=r"layer backbone\.layers\.0\.mixer: saw no real token"):
        measure(tiny.build(), [batch_of(torch.zeros(3, 7, dtype=torch.long))])


def test_no_batch_is_an_error(tiny):
    with pytest.raises(ValueError, match="saw no real token"):
        measure(tiny.build(), [])


def test_a_padded_sequence_counts_for_nothing(tiny):
    model = lively(tiny.build())
    mask = torch.tensor([[1] * 7, [0] * 7, [1] * 7])
    ids = tokens(3, 7)
    padded = measure(model, [{"input_ids": ids, "attention_mask": mask}])
    assert_same(padded, measure(model, [ids[[0, 2]]]), rtol=1e-4, atol=1e-6)


def test_non_finite_sums_are_noticed(tiny):
    model = tiny.build()
    layer = next(iter(measure(model, [tokens()]).values()))
    assert layer.is_finite()
    for tensor in (*layer.sums, layer.A, layer.B_norm, layer.C_norm):
        value = tensor.flatten()[0].clone()
        tensor.view(-1)[0] = float("nan")
        assert not layer.is_finite()
        tensor.view(-1)[0] = value
    assert layer.is_finite()


def test_wide_layers_are_measured_on_some_of_their_channels(tiny):
    wide = {"mamba": {}, "mamba2": {"num_heads": 20, "head_dim": 16}}[tiny.build().config.model_type]
    model = lively(tiny.build(hidden_size=160, num_hidden_layers=1, state_size=4, **wide))
    ((name, mixer),) = find_mixers(model).items()
    statistics, hidden_states = measure(model, [tokens()])[name], mixer_inputs(model, {"input_ids": tokens()})[name]
    with torch.no_grad():
        some = mixer.scan_inputs(hidden_states, None).sampled()
    assert some.gain.numel() == 256 and mixer.scan_inputs(hidden_states, None).gain.numel() == 320
    torch.testing.assert_close(statistics.A, some.A)
    torch.testing.assert_close(statistics.delta_sum, some.delta.sum((0, 1)))
    states = torch.cat([part.clone() for _, part in stream_states(some)])
    torch.testing.assert_close(statistics.state_energy, states.square().sum((0, 1)))
    y = torch.einsum("tbgdn,btgn->tbgd", states, some.C)
    energy = (some.weight(y, 0) * y.square()).sum()
    torch.testing.assert_close(statistics.contribution_gram.sum(), energy, rtol=1e-4, atol=0.0)
