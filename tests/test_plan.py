"""The plan: pure data, the same after any journey, refused when damaged, and made without touching the model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, lively, selection_plan, silence_states, tokens
from naive import run_mixer
from torch import nn

from hf_compressm import (
    CompressionPlan,
    CompreSSMConfig,
    NonFiniteError,
    compress_,
    find_mixers,
    measure,
    plan_compression,
)
from hf_compressm.criteria import CRITERIA
from hf_compressm.elimination import eliminate
from hf_compressm.plan import _digest
from hf_compressm.planning import NEARLY_LOSSLESS, may_project
from hf_compressm.projection import mean_field_error_curve, measured_error_curve


def make_plan(tiny, config: CompreSSMConfig | None = None) -> tuple[nn.Module, CompressionPlan]:
    model = lively(tiny.build())
    statistics = measure(model, [tokens(8, 24)])
    return model, plan_compression(model, statistics, config or CompreSSMConfig(state_size=3))


def assert_same_plan(one: CompressionPlan, two: CompressionPlan) -> None:
    assert (one.tokens, one.config, list(one.layers)) == (two.tokens, two.config, list(two.layers))
    for name, layer in one.layers.items():
        for option in dataclasses.fields(layer):
            first, second = getattr(layer, option.name), getattr(two.layers[name], option.name)
            if isinstance(first, torch.Tensor):
                assert first.dtype == second.dtype and torch.equal(first, second)
            else:
                assert first == second


class TestFiles:
    @pytest.fixture
    def plan(self) -> CompressionPlan:
        return make_plan(TINY["mamba"])[1]

    @pytest.fixture
    def folder(self, plan, tmp_path) -> Path:
        plan.save(tmp_path)
        return tmp_path

    def edit(self, folder: Path, change) -> None:
        content = json.loads((folder / "plan.json").read_text())
        change(content)
        (folder / "plan.json").write_text(json.dumps(content))

    def test_round_trip_is_exact(self, tiny, tmp_path):
        _, plan = make_plan(tiny)
        plan.save(tmp_path / "new" / "folder")
        assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == {"plan.json", "plan.safetensors"}
        loaded = CompressionPlan.load(tmp_path / "new" / "folder")
        assert_same_plan(loaded, plan)
        assert loaded.digest() == plan.digest()

    def test_round_trip_through_bytes_is_exact(self, tiny):
        _, plan = make_plan(tiny)
        loaded = CompressionPlan.from_bytes(plan.to_bytes())
        assert_same_plan(loaded, plan)
        assert loaded.digest() == plan.digest()

    def test_the_json_file_may_have_any_name(self, plan, tmp_path):
        plan.save(tmp_path / "first.json")
        selection_plan(TINY["mamba2"].build(), [1, 2]).save(str(tmp_path / "second.json"))
        assert_same_plan(CompressionPlan.load(str(tmp_path / "first.json")), plan)
        assert CompressionPlan.load(tmp_path / "second.json").tensors() == {}

    def test_special_numbers_survive(self, plan, tmp_path):
        name, layer = next(iter(plan.layers.items()))
        odd = dataclasses.replace(layer, error_curve=[math.inf, 0.1 + 0.2, 5e-324], relative_error=1 / 3)
        dataclasses.replace(plan, layers={name: odd}).save(tmp_path)
        loaded = CompressionPlan.load(tmp_path).layers[name]
        assert (loaded.error_curve, loaded.relative_error) == (odd.error_curve, odd.relative_error)

    def test_digest_sees_every_part(self, plan):
        name, layer = next(iter(plan.layers.items()))
        readout = layer.readout.clone()
        readout[0, 0, 0] = np.nextafter(np.float32(readout[0, 0, 0]), np.float32(np.inf)).item()
        changes = [
            {"kept": layer.kept.flip(1)},
            {"readout": readout},
            {"readout": None},
            {"drive": readout},
            {"drive": None},
            {"drive": layer.readout, "readout": layer.drive},
            {"relative_error": layer.relative_error * (1 + 1e-15)},
            {"criterion": "ghost"},
            {"mixer_class": "Mamba2Mixer"},
            {"error_curve": layer.error_curve[:-1]},
        ]
        variants = [
            dataclasses.replace(plan, layers=plan.layers | {name: dataclasses.replace(layer, **change)})
            for change in changes
        ]
        variants += [
            dataclasses.replace(plan, tokens=1),
            dataclasses.replace(plan, config=CompreSSMConfig(state_size=4)),
        ]
        digests = {variant.digest() for variant in [plan, *variants]}
        assert len(digests) == len(variants) + 1

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_truncated_json(self, folder, share):
        text = (folder / "plan.json").read_text()
        (folder / "plan.json").write_text(text[: int(share * len(text))])
        with pytest.raises(ValueError, match=r"plan\.json: the plan is truncated or not a plan .* make it anew"):
            CompressionPlan.load(folder)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_truncated_safetensors(self, folder, share):
        data = (folder / "plan.safetensors").read_bytes()
        (folder / "plan.safetensors").write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=r"plan\.json: the plan is truncated or not a plan"):
            CompressionPlan.load(folder)

    def test_binary_rubbish(self, folder):
        (folder / "plan.json").write_bytes(bytes(range(255, 0, -1)))
        with pytest.raises(ValueError, match="the plan is truncated or not a plan"):
            CompressionPlan.load(folder)

    @pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
    def test_a_missing_file_is_named(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name} is missing; a plan is two files"):
            CompressionPlan.load(folder)

    @pytest.mark.parametrize(
        "change",
        [
            lambda content, layer: layer["kept"][0].__setitem__(0, 1 - layer["kept"][0][0]),
            lambda content, layer: layer["kept"][0].pop(),
            lambda content, layer: layer["kept"].append([1]),
            lambda content, layer: layer.update(kept="all"),
            lambda content, layer: layer.update(relative_error=0.0),
            lambda content, layer: layer.update(state_size_before=16),
            lambda content, layer: layer.update(state_size_after=5),
            lambda content, layer: layer.pop("refit"),
            lambda content, layer: layer.update(note="by hand"),
            lambda content, layer: content.update(tokens=10**9),
            lambda content, layer: content["config"].update(state_size=0),
            lambda content, layer: content["config"].update(criterion="mine"),
            lambda content, layer: content["layers"].popitem(),
            lambda content, layer: content.update(digest="0" * 64),
        ],
    )
    def test_an_edited_json_file(self, folder, change):
        self.edit(folder, lambda content: change(content, next(iter(content["layers"].values()))))
        with pytest.raises(ValueError, match=r"plan\.json: its digest does not match its content; it was edited"):
            CompressionPlan.load(folder)

    @pytest.mark.parametrize("key", ["digest", "format_version"])
    def test_a_missing_key_is_named(self, folder, key):
        self.edit(folder, lambda content: content.pop(key))
        with pytest.raises(ValueError, match=rf"plan\.json: not a plan, or edited \(KeyError: '{key}'\)"):
            CompressionPlan.load(folder)

    @pytest.mark.parametrize("content", ["[]", "12", "null", '"plan"', "{}"])
    def test_json_that_is_no_plan(self, folder, content):
        (folder / "plan.json").write_text(content)
        with pytest.raises(ValueError, match=r"plan\.json: not a plan, or edited"):
            CompressionPlan.load(folder)

    @pytest.mark.parametrize(
        "change",
        [
            lambda name, tensors: tensors[name].view(-1)[3].add_(1e-6),
            lambda name, tensors: tensors.pop(name),
            lambda name, tensors: tensors.update(another=torch.zeros(2)),
            lambda name, tensors: tensors.update({name: tensors[name].view(torch.int32)}),
            lambda name, tensors: tensors.update({name: tensors[name].view(8, 3)}),
        ],
    )
    def test_an_edited_matrix(self, plan, folder, change):
        tensors = safetensors.torch.load_file(folder / "plan.safetensors")
        change(next(iter(tensors)), tensors)
        safetensors.torch.save_file(tensors, folder / "plan.safetensors")
        with pytest.raises(ValueError, match=r"plan\.json: its digest does not match"):
            CompressionPlan.load(folder)

    def test_the_matrices_of_another_plan(self, folder, tmp_path):
        make_plan(TINY["mamba"], CompreSSMConfig(state_size=3, criterion="smallest"))[1].save(tmp_path / "other")
        (tmp_path / "other" / "plan.safetensors").replace(folder / "plan.safetensors")
        with pytest.raises(ValueError, match="mixed with another plan"):
            CompressionPlan.load(folder)

    def test_damaged_bytes(self, plan):
        data = plan.to_bytes()
        damaged = data[:-1] + bytes([data[-1] ^ 1])
        with pytest.raises(ValueError, match="the plan's bytes: its digest does not match"):
            CompressionPlan.from_bytes(damaged)

    def test_a_newer_format(self, folder):
        self.edit(folder, lambda content: content.update(format_version=3))
        with pytest.raises(ValueError, match=r"plan\.json: plan format 3, but this version reads 1 and 2"):
            CompressionPlan.load(folder)

    def test_a_config_with_options_of_a_newer_version(self, plan, folder, caplog, monkeypatch):
        """A newer version writes one option more, and its digest covers it."""
        options = plan.config.to_dict() | {"rank_per_layer": True}
        monkeypatch.setattr(CompreSSMConfig, "to_dict", lambda self: options)
        plan.save(folder)
        monkeypatch.undo()
        assert_same_plan(CompressionPlan.load(folder), plan)
        assert "ignoring unknown keys ['rank_per_layer']" in caplog.text

    def test_a_plan_of_an_older_version_has_no_drive(self, tmp_path):
        """And its config no number of rounds; the file is otherwise the same."""
        _, plan = make_plan(TINY["mamba"], CompreSSMConfig(state_size=3, refit_rounds=0))
        content, tensors = plan.to_dict(), plan.tensors()
        content["config"].pop("refit_rounds")
        assert all(name.endswith(".readout") for name in tensors)
        assert "drive" not in json.dumps(content)
        (tmp_path / "plan.json").write_text(json.dumps(content | {"digest": _digest(content, tensors)}))
        safetensors.torch.save_file(tensors, tmp_path / "plan.safetensors")
        loaded = CompressionPlan.load(tmp_path)
        for name, layer in loaded.layers.items():
            assert torch.equal(layer.readout, plan.layers[name].readout) and layer.drive is None
        model = lively(TINY["mamba"].build())
        compress_(model, loaded)
        assert model.config.state_size == 3

    def test_a_config_of_an_older_version_that_lacks_an_option(self, plan, folder, monkeypatch):
        options = plan.config.to_dict()
        options.pop("multiple_of")
        monkeypatch.setattr(CompreSSMConfig, "to_dict", lambda self: options)
        plan.save(folder)
        monkeypatch.undo()
        assert_same_plan(CompressionPlan.load(folder), plan)


def test_replaying_a_saved_plan_gives_the_same_model_bit_for_bit(tiny, tmp_path):
    model, plan = make_plan(tiny)
    original = copy.deepcopy(model)
    plan.save(tmp_path)
    compress_(model, plan)
    compress_(original, CompressionPlan.load(tmp_path))
    assert original.config.to_dict() == model.config.to_dict()
    weights = model.state_dict()
    assert list(original.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in original.state_dict().items())


def test_planning_twice_gives_the_same_plan(tiny):
    assert make_plan(tiny)[1].digest() == make_plan(tiny)[1].digest()


@pytest.mark.parametrize("rule", [{"state_size": 3}, {"tolerance": 0.3}, {"hankel_tolerance": 0.1}])
def test_planning_touches_nothing(tiny, rule):
    model = lively(tiny.build()).train()
    statistics = measure(model, [tokens(8, 24)])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    sums = [tensor.clone() for layer in statistics.values() for tensor in layer.sums]
    identities, config = [id(p) for p in model.parameters()], model.config.to_dict()
    state = torch.get_rng_state()
    plan_compression(model, statistics, CompreSSMConfig(**rule))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    now = [tensor for layer in statistics.values() for tensor in layer.sums]
    assert all(torch.equal(tensor, before) for tensor, before in zip(now, sums, strict=True))
    assert [id(p) for p in model.parameters()] == identities and model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("criterion", ["auto", "refit", "ghost", "hankel", "magnitude", "random", "smallest"])
def test_plans_keep_the_best_states_in_rising_order(tiny, criterion):
    model = lively(tiny.build())
    statistics = measure(model, [tokens(8, 24)])
    config = CompreSSMConfig(state_size=3, realization="stock", criterion=criterion, seed=5)
    plan = plan_compression(model, statistics, config)
    for name, layer in plan.layers.items():
        auto = "refit" if tiny is TINY["mamba"] else "ghost"
        assert layer.criterion == (auto if criterion == "auto" else criterion)
        scores = CRITERIA[layer.criterion](statistics[name], 5)
        for kept, score in zip(layer.kept.tolist(), scores.tolist(), strict=True):
            assert kept == sorted(sorted(range(8), key=score.__getitem__)[-3:])
    assert plan.tokens == 8 * 24
    assert plan.changes == plan.layers


def test_mamba1_plans_carry_a_readout_and_a_drive_and_mamba2_plans_projections(tiny):
    _, plan = make_plan(tiny)
    for layer in plan.layers.values():
        assert layer.refit == "alternating least squares"
        if tiny is TINY["mamba"]:
            for matrix in (layer.readout, layer.drive):
                assert matrix.shape == (1, 3, 8) and matrix.dtype == torch.float32
            assert layer.mixtures == {"B": layer.drive, "C": layer.readout} and layer.realization == "stock"
        else:
            assert layer.mixtures == {} and layer.realization == "projected"


def test_selections_of_mamba2_carry_no_matrix():
    _, plan = make_plan(TINY["mamba2"], CompreSSMConfig(state_size=3, realization="stock"))
    assert plan.tensors() == {} and {layer.refit for layer in plan.layers.values()} == {"none"}


@pytest.mark.parametrize(("steps", "method"), [(10, "conjugate gradients"), (0, "mean field")])
def test_without_rounds_or_steps_the_rows_of_b_are_only_selected(steps, method):
    _, plan = make_plan(
        TINY["mamba"], CompreSSMConfig(state_size=3, refit_rounds=2 if steps == 0 else 0, refit_steps=steps)
    )
    for layer in plan.layers.values():
        assert (layer.refit, layer.drive, list(layer.mixtures)) == (method, None, ["C"])


def test_without_refit_states_are_only_selected():
    _, plan = make_plan(TINY["mamba"], CompreSSMConfig(state_size=3, refit=False))
    for layer in plan.layers.values():
        assert (layer.mixtures, layer.refit, layer.criterion) == ({}, "none", "ghost")


def test_error_without_a_refit_is_that_of_the_layer_after_the_cut(tiny):
    """Removing states takes their share of y away: the error is measured by running both layers on the same input."""
    model = lively(tiny.build())
    statistics = measure(model, [tokens(4, 12)])
    config = CompreSSMConfig(state_size=3, realization="stock", refit=False)
    plan = plan_compression(model, statistics, config)
    runs = {name: run_mixer(model.get_submodule(name), statistics[name].inputs[0][0]) for name in find_mixers(model)}
    compress_(model, plan)
    for name, run in runs.items():
        after = run_mixer(model.get_submodule(name), statistics[name].inputs[0][0])
        error, energy = (run.weight * (run.y - after.y) ** 2).sum(), (run.weight * run.y**2).sum()
        assert plan.layers[name].relative_error == pytest.approx((error / energy) ** 0.5, rel=1e-3)
        assert plan.layers[name].error_curve[3] == pytest.approx((error / energy) ** 0.5, rel=1e-3)


def test_error_curve_of_a_refit_is_that_of_the_elimination():
    model = lively(TINY["mamba"].build())
    statistics = measure(model, [tokens(8, 24)])
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=3))
    for name, layer in plan.layers.items():
        _, squared = eliminate(statistics[name].state_gram[0], statistics[name].readout_gram[0])
        expected = [1.0, *squared.sqrt().flip(0)[1:].tolist(), 0.0]
        assert layer.error_curve == pytest.approx(expected, abs=1e-7)
        assert len(layer.error_curve) == 9


def test_error_curves_run_from_everything_to_nothing(tiny):
    _, plan = make_plan(tiny)
    for layer in plan.layers.values():
        assert layer.error_curve[0] == pytest.approx(1.0) and layer.error_curve[-1] == 0.0


def test_a_tolerance_is_met_by_every_layer(tiny):
    _, plan = make_plan(tiny, CompreSSMConfig(tolerance=0.3, realization="stock"))
    (size,) = {layer.state_size_after for layer in plan.layers.values()}
    assert 1 <= size < 8
    assert all(layer.error_curve[size] <= 0.3 for layer in plan.layers.values())
    assert any(layer.error_curve[size - 1] > 0.3 for layer in plan.layers.values())


def test_a_rule_that_finds_nothing_worth_cutting(tiny):
    _, plan = make_plan(tiny, CompreSSMConfig(tolerance=1e-9))
    assert plan.changes == {}
    for layer in plan.layers.values():
        assert layer.kept.tolist() == [list(range(8))] * len(layer.kept)
        assert (layer.readout, layer.relative_error) == (None, 0.0)


def test_models_side_by_side_get_a_size_each():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = TINY["mamba"].build_base(), TINY["mamba2"].build_base(state_size=4)

        def forward(self, input_ids):
            return self.large(input_ids), self.small(input_ids)

    model = Both()
    statistics = measure(model, [tokens(8, 24)])
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=0.5, realization="stock"))
    sizes = [(layer.state_size_before, layer.state_size_after) for layer in plan.layers.values()]
    assert sizes == [(8, 4), (8, 4), (4, 2), (4, 2)]
    # What is projected shares its states out, but not with models of another config.
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=0.5))
    sizes = [layer.state_size_after for layer in plan.layers.values()]
    assert sizes[:2] == [4, 4] and sum(sizes[2:]) == 2 + 2
    assert [layer.realization for layer in plan.layers.values()] == ["stock"] * 2 + ["projected"] * 2


@pytest.mark.parametrize("rule", [{"state_size": 3}, {"tolerance": 0.1}, {"hankel_tolerance": 0.1}])
@pytest.mark.parametrize("silent", ["the output", "the states"])
def test_a_layer_that_passes_nothing_on_is_cut_like_the_others(tiny, silence, rule, silent):
    model = lively(tiny.build())
    if silent == "the states":
        silence(model, list(range(8)))
    else:
        nn.init.zeros_(model.backbone.layers[1].mixer.out_proj.weight)
    plan = plan_compression(model, measure(model, [tokens(8, 24)]), CompreSSMConfig(**rule))
    layer = plan.layers["backbone.layers.1.mixer"]
    assert layer.relative_error == 0 and all(map(math.isfinite, layer.error_curve))
    assert layer.error_curve[1] == 0
    compress_(model, plan)
    assert torch.isfinite(model(tokens()).logits).all()


def test_a_target_that_is_not_below_the_present_size(tiny):
    with pytest.raises(
        ValueError, match=r"backbone\.layers\.0\.mixer: target state_size 8 is not below the current 8"
    ):
        make_plan(tiny, CompreSSMConfig(state_size=8))


def test_statistics_of_other_layers(tiny):
    model = tiny.build()
    statistics = measure(model, [tokens()])
    statistics["elsewhere"] = statistics.pop("backbone.layers.1.mixer")
    missing, unknown = r"\['backbone\.layers\.1\.mixer'\]", r"\['elsewhere'\]"
    with pytest.raises(ValueError, match=f"layers without statistics {missing}, statistics without a layer {unknown}"):
        plan_compression(model, statistics, CompreSSMConfig(state_size=3))


def test_statistics_of_another_state_size(tiny):
    statistics = measure(tiny.build(), [tokens()])
    with pytest.raises(ValueError, match="measured at state_size 8, but the model has 4; measure again"):
        plan_compression(tiny.build(state_size=4), statistics, CompreSSMConfig(state_size=3))


def test_statistics_without_a_token(tiny):
    model = tiny.build()
    statistics = measure(model, [tokens()])
    statistics["backbone.layers.1.mixer"].tokens.zero_()
    with pytest.raises(ValueError, match=r"backbone\.layers\.1\.mixer: the statistics hold no real token"):
        plan_compression(model, statistics, CompreSSMConfig(state_size=3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_parameters(tiny, value):
    model = tiny.build()
    statistics = measure(model, [tokens()])
    mixer = find_mixers(model)["backbone.layers.1.mixer"]
    for axis in mixer.layout.state_axes(mixer.module):
        number = axis.tensor.flatten()[0].item()
        axis.tensor.data.view(-1)[0] = value
        with pytest.raises(
            NonFiniteError, match=rf"layers\.1\.mixer: parameter {axis.parameter} holds NaN or infinity"
        ):
            plan_compression(model, statistics, CompreSSMConfig(state_size=3))
        axis.tensor.data.view(-1)[0] = number
    assert plan_compression(model, statistics, CompreSSMConfig(state_size=3)).changes


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_statistics(tiny, value):
    model = tiny.build()
    statistics = measure(model, [tokens()])
    statistics["backbone.layers.1.mixer"].state_gram[0, 1, 2] = value
    with pytest.raises(
        NonFiniteError, match=r"layers\.1\.mixer: the statistics hold NaN or infinity; nothing was cut"
    ):
        plan_compression(model, statistics, CompreSSMConfig(state_size=3))


def test_activations_that_overflow_are_noticed(tiny):
    model = tiny.build()
    nn.init.constant_(model.backbone.layers[0].mixer.in_proj.weight, 1e30)
    statistics = measure(model, [tokens()])
    with pytest.raises(NonFiniteError, match="the statistics hold NaN or infinity"):
        plan_compression(model, statistics, CompreSSMConfig(state_size=3))


# Projected plans of Mamba-2.

MAMBA2 = TINY["mamba2"]
PROJECTED = CompreSSMConfig(state_size=3, realization="projected")


def small_layer(model: nn.Module, number: int, silent: list[int]) -> None:
    """Silence states of one layer only."""
    silence_states(model.backbone.layers[number].mixer, silent)


class TestProjectedFiles:
    @pytest.fixture
    def plan(self) -> CompressionPlan:
        return make_plan(MAMBA2, PROJECTED)[1]

    @pytest.mark.parametrize("size", [3, [3, 8], [2, 5]])
    def test_round_trips_are_exact(self, size, tmp_path):
        _, plan = make_plan(MAMBA2, dataclasses.replace(PROJECTED, state_size=size))
        plan.save(tmp_path)
        for loaded in (CompressionPlan.load(tmp_path), CompressionPlan.from_bytes(plan.to_bytes())):
            assert_same_plan(loaded, plan)
            assert loaded.digest() == plan.digest()

    def test_digest_sees_every_part(self, plan):
        name, layer = next(iter(plan.layers.items()))
        matrix = layer.B_projection.clone()
        matrix[0, 0] = np.nextafter(np.float32(matrix[0, 0]), np.float32(np.inf)).item()
        changes = [
            {"B_projection": matrix},
            {"C_projection": matrix},
            {"B_projection": layer.C_projection, "C_projection": layer.B_projection},
            {"hankel_values": layer.hankel_values[:1]},
            {"hankel_values": None},
            {"expected_errors": layer.expected_errors | {"stock": 0.0}},
            {"groups": 1},
            {"refit": "balanced"},
        ]
        variants = [
            dataclasses.replace(plan, layers=plan.layers | {name: dataclasses.replace(layer, **change)})
            for change in changes
        ]
        assert len({variant.digest() for variant in [plan, *variants]}) == len(variants) + 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda name, tensors: tensors[f"{name}.B_projection"].view(-1)[3].add_(1e-6),
            lambda name, tensors: tensors.pop(f"{name}.C_projection"),
            lambda name, tensors: tensors.update({f"{name}.readout": torch.zeros(3, 8)}),
        ],
    )
    def test_an_edited_matrix(self, plan, tmp_path, change):
        plan.save(tmp_path)
        tensors = safetensors.torch.load_file(tmp_path / "plan.safetensors")
        change(next(iter(plan.layers)), tensors)
        safetensors.torch.save_file(tensors, tmp_path / "plan.safetensors")
        with pytest.raises(ValueError, match=r"plan\.json: its digest does not match"):
            CompressionPlan.load(tmp_path)

    @pytest.mark.parametrize("key", ["groups", "hankel_values", "expected_errors"])
    def test_a_missing_key_is_named(self, plan, tmp_path, key):
        """Of a file whose digest is right: a plan of an older version."""
        content = plan.to_dict()
        for layer in content["layers"].values():
            layer.pop(key)
        tensors = plan.tensors()
        with pytest.raises(ValueError, match=rf"a file: not a plan, or edited \(KeyError: '{key}'\)"):
            CompressionPlan._from_parts(content | {"digest": _digest(content, tensors)}, tensors, "a file")


@pytest.mark.parametrize("size", [3, [3, 8], [2, 5]])
def test_replaying_a_projected_plan_gives_the_same_model_bit_for_bit(size, tmp_path):
    model, plan = make_plan(MAMBA2, dataclasses.replace(PROJECTED, state_size=size))
    originals = [copy.deepcopy(model), copy.deepcopy(model)]
    plan.save(tmp_path)
    compress_(model, plan)
    for original, loaded in zip(
        originals, (CompressionPlan.load(tmp_path), CompressionPlan.from_bytes(plan.to_bytes())), strict=True
    ):
        compress_(original, loaded)
        assert original.config.to_dict() == model.config.to_dict()
        assert type(original) is type(model)
        weights = model.state_dict()
        assert list(original.state_dict()) == list(weights)
        assert all(torch.equal(value, weights[name]) for name, value in original.state_dict().items())


@pytest.mark.parametrize(
    "rule",
    [{"state_size": 3}, {"state_size": [3, 8]}, {"tolerance": 0.3}, {"hankel_tolerance": 0.1}, {"state_bytes": 1100}],
)
@pytest.mark.parametrize("realization", ["projected", "auto"])
def test_planning_a_projection_touches_nothing(rule, realization):
    model = lively(MAMBA2.build()).train()
    statistics = measure(model, [tokens(8, 24)])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    identities, config = [id(p) for p in model.parameters()], model.config.to_dict()
    state = torch.get_rng_state()
    settings = CompreSSMConfig(realization=realization, **rule)
    plans = [plan_compression(model, statistics, settings) for _ in range(2)]
    assert plans[0].digest() == plans[1].digest()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == identities and model.config.to_dict() == config
    assert type(model) is MAMBA2.language_model and torch.equal(torch.get_rng_state(), state)


def test_what_a_projected_plan_says():
    model = lively(MAMBA2.build())
    statistics = measure(model, [tokens(8, 24)])
    for rounds in (0, 3):
        plan = plan_compression(model, statistics, dataclasses.replace(PROJECTED, projection_rounds=rounds))
        for name, layer in plan.layers.items():
            assert (layer.realization, layer.kept, layer.readout, layer.groups) == ("projected", None, None, 2)
            size = layer.state_size_after
            assert layer.B_projection.shape == layer.C_projection.shape == (8, 2 * size)
            assert (layer.state_size_before, layer.is_change) == (8, True)
            assert layer.criterion == "balanced truncation"
            assert layer.refit == ("alternating least squares" if rounds else "balanced")
            for values in layer.hankel_values:
                assert len(values) == 8 and values == sorted(values, reverse=True) and values[-1] >= 0
            curve = measured_error_curve(find_mixers(model)[name], statistics[name])
            assert layer.error_curve == pytest.approx(curve.tolist(), rel=1e-2, abs=1e-3)
            selection = CompreSSMConfig(state_size=size, realization="stock")
            stock = plan_compression(model, statistics, selection).layers[name]
            assert layer.expected_errors == pytest.approx(
                {"stock": stock.relative_error, "projected": float(curve[size])}, rel=1e-2
            )
            assert layer.relative_error <= layer.expected_errors["projected"] * (1 + 1e-3)
            # A selection is one of the projections.
            assert layer.relative_error < stock.relative_error
            assert stock.expected_errors["stock"] == stock.relative_error
            assert stock.expected_errors["projected"] == pytest.approx(
                float(mean_field_error_curve(statistics[name])[size])
            )
        assert sum(layer.state_size_after for layer in plan.layers.values()) == 6


def test_plans_of_mamba1_expect_no_projection():
    _, plan = make_plan(TINY["mamba"])
    for layer in plan.layers.values():
        assert set(layer.expected_errors) == {"stock"} and layer.hankel_values is None


@pytest.mark.parametrize(
    "rule", [{"realization": "projected", "state_size": 3}, {"realization": "auto", "state_size": [3, 3]}]
)
def test_mamba1_is_not_projected(rule):
    with pytest.raises(
        ValueError,
        match=r"layers\.0\.mixer: MambaMixer cannot be projected\. In its layout \(Mamba-1\), each channel's states "
        r"decay at rates of their own, so a change .* does not commute with the dynamics.*Use realization='stock'",
    ):
        make_plan(TINY["mamba"], CompreSSMConfig(**rule))


def test_auto_leaves_mamba1_stock():
    _, plan = make_plan(TINY["mamba"], CompreSSMConfig(state_size=3, realization="auto"))
    _, stock = make_plan(TINY["mamba"])
    for name, layer in plan.layers.items():
        assert layer.realization == "stock" and torch.equal(layer.kept, stock.layers[name].kept)
        assert torch.equal(layer.readout, stock.layers[name].readout)


def test_auto_selects_where_that_is_nearly_lossless_and_projects_elsewhere():
    model = lively(MAMBA2.build())
    for number, silent in enumerate(([1, 3, 4, 6], [0, 1, 2, 5])):
        small_layer(model, number, silent)
    statistics = measure(model, [tokens(8, 24)])
    # Sizes for each layer leave no choice; of a tolerance, a stock model has what the most demanding layer wants.
    for rule, realization, sizes in (
        ({"state_size": 4}, "stock", [4, 4]),
        ({"state_size": 5}, "stock", [5, 5]),
        ({"state_size": 3}, "projected", [3, 3]),
        ({"state_size": [3, 4]}, "projected", [3, 4]),
        ({"state_size": [4, 4]}, "projected", [4, 4]),
        ({"state_bytes": 8 * 128}, "projected", [4, 4]),
        ({"tolerance": 0.01}, "stock", [4, 4]),
    ):
        plan = plan_compression(model, statistics, CompreSSMConfig(realization="auto", **rule))
        assert {layer.realization for layer in plan.layers.values()} == {realization}, rule
        assert [layer.state_size_after for layer in plan.layers.values()] == sizes, rule
    # Where one layer needs a projection, those that share its config are projected with it.
    model = lively(MAMBA2.build())
    small_layer(model, 0, [1, 3, 4, 6])
    statistics = measure(model, [tokens(8, 24)])
    stock, plan = (
        plan_compression(model, statistics, CompreSSMConfig(state_size=4, realization=realization))
        for realization in ("stock", "auto")
    )
    assert [layer.realization for layer in plan.layers.values()] == ["projected"] * 2
    errors = [layer.relative_error for layer in stock.layers.values()]
    assert errors[0] < 1e-3 < NEARLY_LOSSLESS < errors[1]


def test_a_tolerance_is_met_by_every_projected_layer_with_as_few_states_as_it_needs():
    model = lively(MAMBA2.build())
    small_layer(model, 0, [1, 3, 4, 6, 7])
    statistics = measure(model, [tokens(8, 24)])
    config = CompreSSMConfig(tolerance=0.2, realization="projected")
    plan = plan_compression(model, statistics, config)
    sizes = []
    for name, layer in plan.layers.items():
        curve = measured_error_curve(find_mixers(model)[name], statistics[name])
        assert layer.state_size_after == next(size for size, error in enumerate(curve.tolist()) if error <= 0.2)
        assert layer.relative_error <= 0.2
        sizes.append(layer.state_size_after)
    assert sizes[0] < sizes[1] < 8


def test_the_energy_rule_on_measured_hankel_values():
    model = lively(MAMBA2.build())
    statistics = measure(model, [tokens(8, 24)])
    config = CompreSSMConfig(hankel_tolerance=0.1, realization="projected", max_kept_fraction=1.0)
    plan = plan_compression(model, statistics, config)
    for name, layer in plan.layers.items():
        wanted = []
        for H, omega in zip(statistics[name].state_gram, statistics[name].readout_gram, strict=True):
            values = np.sort(np.linalg.eigvals(H.double().numpy() @ omega.double().numpy()).real.clip(0) ** 0.5)[::-1]
            wanted.append(next(r for r in range(1, 9) if values[:r].sum() >= 0.9 * values.sum()))
        assert layer.state_size_after == max(wanted) < 8


def test_a_rule_that_finds_nothing_worth_a_projection():
    _, plan = make_plan(MAMBA2, CompreSSMConfig(tolerance=1e-9, realization="projected"))
    assert plan.changes == {}
    assert [layer.realization for layer in plan.layers.values()] == ["stock"] * 2


@pytest.mark.parametrize("sizes", [[3], [3, 3, 3]])
def test_a_list_needs_a_number_for_each_mixer(sizes):
    names = r"backbone\.layers\.0\.mixer, backbone\.layers\.1\.mixer"
    with pytest.raises(
        ValueError, match=rf"state_size lists {len(sizes)} numbers, .*but the model has 2 mixers: {names}"
    ):
        make_plan(MAMBA2, dataclasses.replace(PROJECTED, state_size=sizes))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (8, r"layers\.0\.mixer: target state_size 8 is not below the current 8; choose 1\.\.7"),
        (9, r"layers\.0\.mixer: target state_size 9 is not below the current 8"),
        ([3, 9], r"layers\.1\.mixer: target state_size 9 is above the current 8; choose 1\.\.8"),
        ([8, 8], r"state_size \[8, 8\] is what the layers already have; choose a smaller one"),
    ],
)
def test_projected_targets_that_are_no_cut(size, message):
    with pytest.raises(ValueError, match=message):
        make_plan(MAMBA2, dataclasses.replace(PROJECTED, state_size=size))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_projections(value):
    model, plan = make_plan(MAMBA2, PROJECTED)
    compress_(model, plan)
    statistics = measure(model, [tokens()])
    module = model.backbone.layers[1].mixer
    for name in ("B_projection", "C_projection"):
        number = getattr(module, name)[2, 1].item()
        getattr(module, name).data[2, 1] = value
        with pytest.raises(NonFiniteError, match=rf"layers\.1\.mixer: parameter {name} holds NaN or infinity"):
            plan_compression(model, statistics, CompreSSMConfig(state_size=2))
        getattr(module, name).data[2, 1] = number


@pytest.mark.parametrize("realization", ["stock", "auto", "projected"])
def test_a_projected_model_stays_projected(realization):
    """Stock asks for a selection: of a projected model, it is one of its states."""
    model, plan = make_plan(MAMBA2, dataclasses.replace(PROJECTED, state_size=[5, 5]))
    compress_(model, plan)
    statistics = measure(model, [tokens(8, 24)])
    again = plan_compression(model, statistics, CompreSSMConfig(state_size=3, realization=realization))
    expected = "stock" if realization == "stock" else "projected"
    for layer in again.layers.values():
        assert layer.realization == expected and layer.state_size_before == 5
        assert (layer.kept is None) == (expected == "projected")
    sizes = [layer.state_size_after for layer in again.layers.values()]
    assert sum(sizes) == 6 and (expected == "projected" or sizes == [3, 3])


@pytest.mark.parametrize(
    ("options", "may"),
    [
        ({}, True),
        ({"realization": "stock"}, False),
        ({"realization": "projected"}, True),
        # To name a criterion is to ask for a selection by it.
        ({"criterion": "ghost"}, False),
        ({"criterion": "hankel"}, False),
        ({"criterion": "ghost", "realization": "projected"}, True),
        ({"criterion": "ghost", "state_size": [3, 5]}, True),
    ],
)
def test_what_may_be_projected(options, may):
    config = CompreSSMConfig(**({"state_size": 3} | options))
    assert may_project(config) == may
    _, plan = make_plan(MAMBA2, config)
    assert {layer.realization for layer in plan.layers.values()} == {"projected" if may else "stock"}


@pytest.mark.parametrize("realization", ["auto", "projected"])
def test_layers_share_the_states_out_by_their_measured_errors(realization):
    """So that the sum of their squared errors is the least of all ways with so many states on average."""
    model = lively(MAMBA2.build(num_hidden_layers=3))
    small_layer(model, 1, [0, 2, 3, 5, 7])
    statistics = measure(model, [tokens(8, 24)])
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=4, realization=realization))
    curves = [measured_error_curve(mixer, statistics[name]) for name, mixer in find_mixers(model).items()]
    sizes = [layer.state_size_after for layer in plan.layers.values()]

    def squared(way: Iterable[int]) -> float:
        return sum(float(curve[size]) ** 2 for curve, size in zip(curves, way, strict=True))

    ways = [way for way in itertools.product(range(1, 9), repeat=3) if sum(way) == 12]
    assert tuple(sizes) in ways and sizes[1] == 3
    assert squared(sizes) == pytest.approx(min(map(squared, ways)))
    assert squared(sizes) < squared([4, 4, 4])
    # And the plan's errors are those of the sizes.
    for layer, curve, size in zip(plan.layers.values(), curves, sizes, strict=True):
        assert layer.relative_error <= float(curve[size]) * (1 + 1e-3)


def test_the_next_cut_of_a_shared_out_model_goes_by_the_average():
    model = lively(MAMBA2.build())
    small_layer(model, 0, [1, 3, 4, 6, 7])
    compress_(model, plan_compression(model, measure(model, [tokens(8, 24)]), CompreSSMConfig(state_size=5)))
    before = [mixer.state_size for mixer in find_mixers(model).values()]
    assert sum(before) == 10 and before[0] < before[1]
    statistics = measure(model, [tokens(8, 24)])
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=4))
    after = [layer.state_size_after for layer in plan.layers.values()]
    assert sum(after) == 8 and all(now <= old for now, old in zip(after, before, strict=True))
    with pytest.raises(ValueError, match=r"target state_size 5 is not below the current 5; choose 1\.\.4"):
        plan_compression(model, statistics, CompreSSMConfig(state_size=5))


def test_shared_out_sizes_are_multiples():
    _, plan = make_plan(MAMBA2, CompreSSMConfig(state_size=3, multiple_of=2))
    sizes = [layer.state_size_after for layer in plan.layers.values()]
    assert sum(sizes) == 8 and all(size % 2 == 0 for size in sizes)


def test_sharing_out_goes_by_the_measured_curves(monkeypatch):
    """Here made up: of one layer, the first state is all that matters, and of the other, one as much as the next."""
    model = lively(MAMBA2.build())
    statistics = measure(model, [tokens(8, 24)])
    curves = iter([torch.tensor([1.0] + [0.0] * 8), torch.linspace(1, 0, 9)])
    monkeypatch.setattr("hf_compressm.planning.measured_error_curve", lambda mixer, statistics: next(curves))
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=4))
    assert [layer.state_size_after for layer in plan.layers.values()] == [1, 7]
    # A list leaves nothing to measure; the iterator has nothing more.
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=[5, 2]))
    assert [layer.state_size_after for layer in plan.layers.values()] == [5, 2]
