"""The cut: exact for silent states under training and generation, a stock model afterwards, all or nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import MAMBA1_FAMILY, TINY, Tiny, lively, selection_plan, silence_states, stir, tokens, train
from naive import kept_part
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MambaModel
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM, Mamba2Mixer

from hf_compressm import CompressionPlan, CompreSSMConfig, compress_, find_mixers, measure, plan_compression
from hf_compressm.modeling_compressm import CompressmMamba2ForCausalLM
from hf_compressm.plan import LayerPlan
from hf_compressm.surgery import check_optimizer, optimizer_bytes

# States that stay, in each group; the others are silent. One list: the same in each group.
KEPT = {
    "first half": [0, 1, 2, 3],
    "scattered": [0, 2, 5, 7],
    "all but one": [0, 1, 2, 4, 5, 6, 7],
    "only one": [6],
    "another half in each group": [[0, 2, 5, 7], [1, 2, 3, 6]],
}


def in_each_group(kept: list, model: nn.Module) -> list[list[int]]:
    groups = next(iter(find_mixers(model).values())).groups
    return kept[:groups] if isinstance(kept[0], list) else [kept] * groups


def silent_and_kept(tiny: Tiny, kept: list, **options) -> tuple[nn.Module, list[list[int]]]:
    """A lively model in which only the kept states do anything."""
    model = lively(tiny.build(**options))
    kept = in_each_group(kept, model)
    silence_states(model, [sorted(set(range(8)) - set(row)) for row in kept])
    return model, kept


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Values and identities of everything that a cut may change."""
    state = [] if optimizer is None else [(id(key), dict(value)) for key, value in optimizer.state.items()]
    return {
        "parameters": {name: (id(p), p.detach().clone(), p.grad) for name, p in model.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "groups": [] if optimizer is None else [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "state": [
            (key, {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()})
            for key, state in state
        ],
        "sizes": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, int)}
            for name, module in model.named_modules()
        },
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "classes": [type(module) for module in [*model.modules(), getattr(model, "config", None)]],
    }


def assert_untouched(before: dict, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    now = snapshot(model, optimizer)
    for kind in ("groups", "sizes", "config", "classes"):
        assert now[kind] == before[kind]
    for kind in ("parameters", "buffers", "state"):
        assert same(now[kind], before[kind]), kind


def same(one, two) -> bool:
    """Equality that goes into containers, bit by bit for tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def assert_close(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


class TestSilentStates:
    """Invariant 1."""

    @pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT.keys())
    @pytest.mark.parametrize("options", [{}, {"use_bias": True}, {"use_conv_bias": False}])
    def test_logits(self, tiny, kept, options):
        model, kept = silent_and_kept(tiny, kept, **options)
        mask = torch.ones(4, 12, dtype=torch.long)
        mask[0, :4] = 0
        with torch.no_grad():
            before = model(tokens(), attention_mask=mask).logits
            compress_(model, selection_plan(model, kept))
            assert_close(model(tokens(), attention_mask=mask).logits, before)
        assert model.config.state_size == len(kept[0])

    @pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT.keys())
    def test_training_goes_on_as_if_nothing_had_happened(self, tiny, kept):
        uncut, kept = silent_and_kept(tiny, kept)
        cut = copy.deepcopy(uncut)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1) for model in (uncut, cut)]
        for model, optimizer in zip((uncut, cut), optimizers, strict=True):
            train(model, optimizer, range(3))
        compress_(cut, selection_plan(cut, kept), optimizers[1])
        losses, norms = train(uncut, optimizers[0], range(3, 8))
        assert train(cut, optimizers[1], range(3, 8)) == (
            pytest.approx(losses, rel=1e-5),
            pytest.approx(norms, rel=1e-3),
        )
        ours = dict(cut.named_parameters())
        for name, parameter in uncut.named_parameters():
            assert_close(ours[name], kept_part(name, parameter, kept))
            for key, moment in optimizers[0].state[parameter].items():
                assert_close(
                    optimizers[1].state[ours[name]][key], kept_part(name, moment, kept) if moment.dim() else moment
                )

    @pytest.mark.parametrize("use_cache", [False, True])
    def test_generation(self, tiny, use_cache):
        model, kept = silent_and_kept(tiny, [0, 2, 5, 7])
        options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        before = model.eval().generate(tokens(3, 5), **options)
        compress_(model, selection_plan(model, kept))
        after = model.generate(tokens(3, 5), **options)
        assert torch.equal(after.sequences, before.sequences) and after.sequences.shape == (3, 13)
        assert_close(torch.stack(after.logits), torch.stack(before.logits))

    @pytest.mark.parametrize("refit_steps", [0, 10])
    def test_a_measured_plan_finds_them(self, tiny, refit_steps):
        model, kept = silent_and_kept(tiny, [0, 2, 5, 7])
        with torch.no_grad():
            before = model(tokens()).logits
            config = CompreSSMConfig(state_size=4, refit_steps=refit_steps)
            plan = plan_compression(model, measure(model, [tokens(8, 24)]), config)
            assert all(layer.kept.tolist() == kept for layer in plan.layers.values())
            compress_(model, plan)
            assert_close(model(tokens()).logits, before)

    def test_two_cuts_in_a_row(self, tiny):
        model, _ = silent_and_kept(tiny, [1, 4])
        before = model(tokens()).logits
        compress_(model, selection_plan(model, [0, 1, 2, 4, 6]))
        compress_(model, selection_plan(model, [1, 3]))
        assert_close(model(tokens()).logits, before)
        assert model.config.state_size == 2


def test_states_that_matter_do_change_the_output(tiny):
    """The tests above could otherwise pass on a model that ignores its states."""
    model = lively(tiny.build())
    before = model(tokens()).logits
    compress_(model, selection_plan(model, [0, 2, 5, 7]))
    assert (model(tokens()).logits - before).abs().max() > 1e-3


def test_generation_after_a_cut_is_the_same_with_and_without_cache(tiny):
    model = lively(tiny.build()).eval()
    compress_(model, plan_compression(model, measure(model, [tokens(8, 24)]), CompreSSMConfig(state_size=3)))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache, without = (model.generate(tokens(3, 5), use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache, without)


def test_the_cut_model_is_a_stock_model(tiny, tmp_path):
    model = lively(tiny.build()).eval()
    config = CompreSSMConfig(state_size=3, realization="stock")
    compress_(model, plan_compression(model, measure(model, [tokens(8, 24)]), config))
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is tiny.language_model and stock.config.state_size == 3
    with torch.no_grad():
        assert torch.equal(stock(tokens()).logits, model(tokens()).logits)


def test_every_number_that_the_forward_reads_follows(tiny):
    model = tiny.build()
    compress_(model, selection_plan(model, [0, 2, 7]))
    fresh = tiny.build(state_size=3)
    for (name, ours), (_, theirs) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        numbers = [{key: value for key, value in vars(m).items() if isinstance(value, int)} for m in (ours, theirs)]
        assert numbers[0] == numbers[1], name
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in fresh.named_parameters()]
    assert model.config.to_dict() == fresh.config.to_dict()
    assert model.backbone.config.state_size == 3


def test_bare_mixers(tiny):
    model = tiny.build()
    module = model.backbone.layers[0].mixer
    compress_(module, selection_plan(module, [0, 2, 7]))
    assert module.ssm_state_size == 3
    if not isinstance(module, Mamba2Mixer):
        assert module.config.state_size == 3
    hidden_states = torch.randn(2, 5, 16)
    assert module(hidden_states).shape == hidden_states.shape


def test_models_inside_another_module():
    both = nn.ModuleDict({"a": TINY["mamba"].build(), "b": nn.Sequential(TINY["mamba2"].build_base())})
    plan = selection_plan(both, [0, 2, 7])
    plan.layers.update(selection_plan(nn.ModuleDict({"a": both["a"]}), [1, 4]).layers)
    report = compress_(both, plan)
    assert (both["a"].config.state_size, both["b"][0].config.state_size) == (2, 3)
    assert [layer.state_size_after for layer in report.layers] == [2, 2, 3, 3]
    both["a"](tokens()), both["b"][0](tokens())


def test_bf16_models(tiny):
    model, kept = silent_and_kept(tiny, [0, 2, 5, 7])
    model.to(torch.bfloat16)
    before = dict(model.named_parameters())
    compress_(model, selection_plan(model, kept))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, kept_part(name, before[name], kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refits_are_folded_into_the_rows_of_b_and_c(dtype):
    model = lively(TINY["mamba"].build()).to(dtype)
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    plan = plan_compression(model, measure(model, [tokens(8, 24)]), CompreSSMConfig(state_size=3))
    compress_(model, plan)
    for name, layer in plan.layers.items():
        old, new = before[f"{name}.x_proj.weight"], model.get_parameter(f"{name}.x_proj.weight")
        drive, readout = layer.drive[0].double(), layer.readout[0].double()
        expected = torch.cat([old[:1], drive @ old[1:9], readout @ old[9:17]])
        assert torch.equal(new, expected.to(dtype))


def test_a_drive_without_a_readout_and_a_readout_without_a_drive_leave_the_other_rows_selected():
    generator = torch.Generator().manual_seed(0)
    for field, number in (("drive", 0), ("readout", 1)):
        model = lively(TINY["mamba"].build())
        before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        matrix = torch.randn(1, 3, 8, generator=generator)
        plan = last_layer({field: matrix})(selection_plan(model, [0, 2, 7]))
        name, old = "backbone.layers.1.mixer.x_proj.weight", before["backbone.layers.1.mixer.x_proj.weight"]
        compress_(model, plan)
        rows = [old[1:9][[0, 2, 7]], old[9:17][[0, 2, 7]]]
        rows[number] = matrix[0].double() @ (old[1:9], old[9:17])[number]
        assert torch.equal(model.get_parameter(name), torch.cat([old[:1], *rows]).float())


def test_each_heads_drive_is_folded_into_its_own_rows():
    model = stir(MAMBA1_FAMILY["zamba"].build())
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    plan = plan_compression(model, measure(model, [tokens(8, 24)]), CompreSSMConfig(state_size=3))
    compress_(model, plan)
    for name, layer in plan.layers.items():
        assert layer.drive.shape == layer.readout.shape == (2, 3, 8)
        old, new = before[f"{name}.x_proj_weight"], model.get_parameter(f"{name}.x_proj_weight")
        rank = old.shape[1] - 16
        delta, B, C = old.split([rank, 8, 8], dim=1)
        parts = [delta, *(torch.bmm(M.double(), rows) for M, rows in ((layer.drive, B), (layer.readout, C)))]
        assert torch.equal(new, torch.cat(parts, dim=1).float())


class TestParameters:
    def test_attributes_and_training_flags_stay(self, tiny):
        model = tiny.build()
        for name, parameter in model.named_parameters():
            parameter.mark = name
            parameter.requires_grad = "layers.0" in name
        compress_(model, selection_plan(model, [0, 2, 7]))
        for name, parameter in model.named_parameters():
            assert parameter.mark == name
            assert parameter.requires_grad == ("layers.0" in name)
            assert type(parameter) is nn.Parameter and parameter.is_leaf and parameter.is_contiguous()

    def test_gradients_that_are_alive_are_carried(self, tiny):
        model = tiny.build()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        before = {name: parameter.grad for name, parameter in model.named_parameters()}
        compress_(model, selection_plan(model, [0, 2, 7]))
        kept = in_each_group([0, 2, 7], model)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, kept_part(name, before[name], kept))

    def test_untouched_parameters_are_the_same_objects(self, tiny):
        model = tiny.build()
        before = {name: (parameter, parameter.shape) for name, parameter in model.named_parameters()}
        compress_(model, selection_plan(model, [0, 2, 7]))
        for name, parameter in model.named_parameters():
            old, shape = before[name]
            assert (parameter is old) == (parameter.shape == shape)
            # Nothing that still holds the old parameter sees it change.
            assert old.shape == shape

    def test_order_of_parameters_stays(self, tiny):
        """Checkpoints hold optimizer state by position."""
        model = tiny.build()
        before = [name for name, _ in model.named_parameters()]
        compress_(model, selection_plan(model, [0, 2, 7]))
        assert [name for name, _ in model.named_parameters()] == before

    def test_modes_and_hooks_stay(self, tiny):
        model = tiny.build().train()
        model.backbone.layers[0].eval()
        seen = []
        model.backbone.layers[1].mixer.register_forward_pre_hook(lambda *_: seen.append(1))
        modes = [module.training for module in model.modules()]
        compress_(model, selection_plan(model, [0, 2, 7]))
        assert [module.training for module in model.modules()] == modes
        model(tokens())
        assert seen == [1]


def test_a_plan_without_changes_touches_nothing(tiny):
    model = tiny.build()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    before = snapshot(model, optimizer)
    report = compress_(model, selection_plan(model, list(range(8))), optimizer)
    assert_untouched(before, model, optimizer)
    assert not report.changed and [layer.status for layer in report.layers] == ["unchanged"] * 2


def test_the_report_counts(tiny):
    model = tiny.build()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    fresh = tiny.build(state_size=3)
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, fresh)]
    tensors = len(list(model.parameters()))
    report = compress_(model, selection_plan(model, [0, 2, 7]), optimizer)
    assert [report.parameters_before, report.parameters_after] == counts
    # Two moments of four bytes for each number, and a step count of four bytes for each tensor.
    assert [report.optimizer_bytes_before, report.optimizer_bytes_after] == [8 * n + 4 * tensors for n in counts]
    assert optimizer_bytes(optimizer) == report.optimizer_bytes_after and optimizer_bytes(None) == 0
    assert [layer.name for layer in report.layers] == list(find_mixers(model))
    assert all(layer.kept == in_each_group([0, 2, 7], model) for layer in report.layers)


def test_wrappers_of_a_model_are_looked_through(tiny):
    model, kept = silent_and_kept(tiny, [0, 2, 5, 7])
    before = model(tokens()).logits
    compress_(torch.compile(nn.DataParallel(model), backend="eager"), selection_plan(model, kept))
    assert model.config.state_size == 4
    assert_close(model(tokens()).logits, before)


def last_layer(change: dict | Callable[[LayerPlan], dict]) -> Callable[[CompressionPlan], CompressionPlan]:
    """A change of the last layer of a plan, so that the layers before it are fine."""

    def apply(plan: CompressionPlan) -> CompressionPlan:
        name, layer = list(plan.layers.items())[-1]
        values = change(layer) if callable(change) else change
        return dataclasses.replace(plan, layers=plan.layers | {name: dataclasses.replace(layer, **values)})

    return apply


def with_state(state: int) -> Callable[[CompressionPlan], CompressionPlan]:
    """The last layer's last index becomes another."""

    def change(layer: LayerPlan) -> dict:
        kept = layer.kept.clone()
        kept[-1, -1] = state
        return {"kept": kept}

    return last_layer(change)


LAYER = r"layer backbone\.layers\.1\.mixer: "
BAD_PLANS = {
    "a layer is missing": (
        lambda plan: dataclasses.replace(plan, layers=dict(list(plan.layers.items())[:1])),
        r"plan and model do not match: the plan lacks layers \['backbone\.layers\.1\.mixer'\]",
    ),
    "layers of another model": (
        lambda plan: dataclasses.replace(plan, layers={f"model.{name}": layer for name, layer in plan.layers.items()}),
        r"unknown layers \['model\.backbone.*the model's mixers are \['backbone\.layers\.0\.mixer'",
    ),
    "no layers": (lambda plan: dataclasses.replace(plan, layers={}), "plan and model do not match"),
    "another N": (last_layer({"state_size_before": 16}), LAYER + "the plan is for state_size 16, but the model has 8"),
    "an index above N": (with_state(8), LAYER + r"kept indices .* reach outside 0\.\.7"),
    "a negative index": (with_state(-1), LAYER + r"kept indices .*-1.* reach outside 0\.\.7"),
    "a repeated index": (with_state(2), LAYER + r"kept indices .*\[0, 2, 2\].* repeat a state"),
    "one dimension": (last_layer(lambda layer: {"kept": layer.kept[0]}), LAYER + r"kept indices have shape \(3,\)"),
    "too many groups": (
        last_layer(lambda layer: {"kept": layer.kept.repeat(2, 1)}),
        LAYER + r"kept indices have shape \(\d, 3\); expected \(\d, r\) with r in 1\.\.8",
    ),
    "no state": (last_layer(lambda layer: {"kept": layer.kept[:, :0]}), LAYER + r"kept indices have shape \(\d, 0\)"),
    "more states than there are": (
        last_layer(lambda layer: {"kept": layer.kept.repeat(1, 3)}),
        LAYER + r"kept indices have shape \(\d, 9\)",
    ),
    "layers of one config with different sizes": (
        last_layer(lambda layer: {"kept": layer.kept[:, :2]}),
        r"layers that share one config must keep one state_size, but the plan has .*0\.mixer': 3.*1\.mixer': 2",
    ),
    "one layer of a config unchanged": (
        last_layer(lambda layer: {"kept": torch.arange(8).repeat(len(layer.kept), 1)}),
        "layers that share one config must keep one state_size",
    ),
}
BAD_MATRICES = {
    "transposed": (torch.zeros(1, 8, 3), r"has shape \(1, 8, 3\); expected \(1, 3, 8\)"),
    "for fewer states": (torch.zeros(1, 2, 8), r"has shape \(1, 2, 8\); expected \(1, 3, 8\)"),
    "without groups": (torch.zeros(3, 8), r"has shape \(3, 8\); expected \(1, 3, 8\)"),
    "NaN": (torch.full((1, 3, 8), math.nan), "holds NaN or infinity"),
    "infinite": (torch.full((1, 3, 8), math.inf), "holds NaN or infinity"),
}


def trained(tiny: Tiny) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny.build()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    return model, optimizer


@pytest.mark.parametrize(("spoil", "message"), BAD_PLANS.values(), ids=BAD_PLANS.keys())
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_touched(tiny, spoil, message):
    model, optimizer = trained(tiny)
    before, plan = snapshot(model, optimizer), spoil(selection_plan(model, [0, 2, 7]))
    with pytest.raises(ValueError, match=message):
        compress_(model, plan, optimizer)
    assert_untouched(before, model, optimizer)


@pytest.mark.parametrize("field", ["readout", "drive"])
@pytest.mark.parametrize(("matrix", "message"), BAD_MATRICES.values(), ids=BAD_MATRICES.keys())
def test_a_readout_or_a_drive_that_does_not_fit_is_refused(field, matrix, message):
    model, optimizer = trained(TINY["mamba"])
    before, plan = snapshot(model, optimizer), last_layer({field: matrix})(selection_plan(model, [0, 2, 7]))
    with pytest.raises(ValueError, match=LAYER + f"the {field} matrix {message}"):
        compress_(model, plan, optimizer)
    assert_untouched(before, model, optimizer)


@pytest.mark.parametrize("name", ["falcon_mamba", "jamba"])
def test_a_drive_behind_norms_is_refused(name):
    model = MAMBA1_FAMILY[name].build()
    plan = last_layer({"drive": torch.eye(8)[None, [0, 2, 7]]})(selection_plan(model, [0, 2, 7]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the plan refits the drive, which Mamba-1, .* mixers do not allow"):
        compress_(model, plan)
    assert_untouched(before, model)


@pytest.mark.parametrize("field", ["readout", "drive"])
def test_a_readout_or_a_drive_for_mamba2_is_refused(field):
    model, optimizer = trained(TINY["mamba2"])
    plan = last_layer({field: torch.zeros(3, 8)})(selection_plan(model, [0, 2, 7]))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=LAYER + f"the plan refits the {field}, which Mamba-2 mixers do not allow"):
        compress_(model, plan, optimizer)
    assert_untouched(before, model, optimizer)


def test_a_plan_of_the_other_architecture_is_refused(tiny):
    other = TINY["mamba2" if tiny is TINY["mamba"] else "mamba"].build()
    model, optimizer = trained(tiny)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"kept indices have shape"):
        compress_(model, selection_plan(other, [0, 2, 7]), optimizer)
    assert_untouched(before, model, optimizer)


def test_a_plan_is_not_applied_twice(tiny):
    model = tiny.build()
    plan = selection_plan(model, [0, 2, 7])
    compress_(model, plan)
    before = snapshot(model)
    with pytest.raises(ValueError, match="the plan is for state_size 8, but the model has 3"):
        compress_(model, plan)
    assert_untouched(before, model)


class QuantizedTensor(torch.Tensor):
    """Stands for the tensor subclasses of quantization libraries."""


def last_state_parameter(model: nn.Module) -> tuple[nn.Module, str]:
    mixer = list(find_mixers(model).values())[-1]
    axis = mixer.layout.state_axes(mixer.module)[-1]
    return axis.module, axis.parameter


def strange_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module, name = last_state_parameter(model)
    optimizer.state[getattr(module, name)]["curvature"] = torch.ones(5)


def gradient_hook(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module, name = last_state_parameter(model)
    getattr(module, name).register_hook(lambda grad: grad)


def accumulation_hook(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module, name = last_state_parameter(model)
    getattr(module, name).register_post_accumulate_grad_hook(lambda parameter: None)


def tied_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module, name = last_state_parameter(model)
    model.reader = nn.Module()
    model.reader.register_parameter("weight", getattr(module, name))


def quantized_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module, name = last_state_parameter(model)
    values = getattr(module, name).detach().as_subclass(QuantizedTensor)
    setattr(module, name, nn.Parameter(values, requires_grad=False))


def integer_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module, name = last_state_parameter(model)
    setattr(module, name, nn.Parameter(getattr(module, name).detach().to(torch.int8), requires_grad=False))


OBSTACLES = {
    "an optimizer state of unknown kind": (
        strange_optimizer_state,
        TypeError,
        r"AdamW cannot be carried.*'curvature'",
    ),
    "a gradient hook": (gradient_hook, RuntimeError, r"layers\.1\.mixer.* has gradient hooks"),
    "a hook after accumulation": (accumulation_hook, RuntimeError, r"layers\.1\.mixer.* has gradient hooks"),
    "a parameter with two owners": (tied_parameter, RuntimeError, r"several owners \(.*layers\.1.*, reader\.weight\)"),
    "a quantized parameter": (quantized_parameter, TypeError, r"layers\.1\.mixer: .* is a QuantizedTensor"),
    "an integer parameter": (integer_parameter, TypeError, r"of torch\.int8, not a plain floating-point tensor"),
}


@pytest.mark.parametrize(("spoil", "kind", "message"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_a_failure_in_the_last_layer_leaves_everything_as_it_was(tiny, spoil, kind, message):
    model, optimizer = trained(tiny)
    spoil(model, optimizer)
    before = snapshot(model, optimizer)
    with pytest.raises(kind, match=message):
        compress_(model, selection_plan(model, [0, 2, 7]), optimizer)
    assert_untouched(before, model, optimizer)


def test_parameters_tied_between_layers_are_refused():
    model = TINY["mamba"].build()
    first, second = (layer.mixer for layer in model.backbone.layers)
    second.x_proj.weight = first.x_proj.weight
    before = snapshot(model)
    with pytest.raises(
        RuntimeError, match=r"several owners \(backbone\.layers\.0.*, backbone\.layers\.1.*\); untie it"
    ):
        compress_(model, selection_plan(model, [0, 2, 7]))
    assert_untouched(before, model)


def test_tied_embeddings_are_no_obstacle(tiny):
    model = tiny.build(tie_word_embeddings=True)
    compress_(model, selection_plan(model, [0, 2, 7]))
    assert model.lm_head.weight is model.get_input_embeddings().weight


class FullyShardedDataParallel(nn.Module):
    """Stands for FSDP1's wrapper, which is recognized by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_sharded_models_are_refused_with_the_way_out(tiny):
    model = FullyShardedDataParallel(tiny.build())
    plan = selection_plan(model, [0, 2, 7])
    with pytest.raises(RuntimeError, match=r"FSDP1 flattens parameters.*The way out: .*reshape_checkpoint"):
        compress_(model, plan)


def test_inner_sharding_is_refused(tiny):
    model = tiny.build()
    model.backbone.layers[1] = FullyShardedDataParallel(model.backbone.layers[1])
    with pytest.raises(RuntimeError, match="FSDP1 flattens parameters"):
        compress_(model, selection_plan(model, [0, 2, 7]))


def test_deepspeed_zero_3_is_refused(tiny):
    model = tiny.build()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO-3 divides the parameters"):
        compress_(model, selection_plan(model, [0, 2, 7]))


def test_unknown_mixers_and_models_without_mixers(tiny):
    plan = selection_plan(tiny.build(), [0, 2, 7])

    class StrangeMixer(nn.Module):
        ssm_state_size = 8

    with pytest.raises(
        TypeError, match=r"StrangeMixer carries a state, but is not supported.*MambaMixer, Mamba2Mixer"
    ):
        compress_(nn.Sequential(StrangeMixer()), plan)
    with pytest.raises(ValueError, match="Sequential has no mixer whose state could be reduced"):
        compress_(nn.Sequential(nn.Linear(2, 2)), plan)


def test_an_optimizer_that_is_none(tiny):
    model = tiny.build()
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got SimpleNamespace"):
        compress_(model, selection_plan(model, [0, 2, 7]), SimpleNamespace(param_groups=[]))


class TestCheckOptimizer:
    def test_a_fitting_optimizer(self, tiny):
        model, optimizer = trained(tiny)
        check_optimizer(model, optimizer)
        compress_(model, selection_plan(model, [0, 2, 7]), optimizer)
        check_optimizer(model, optimizer)

    def test_a_moment_of_the_wrong_shape(self, tiny):
        """Fused AdamW would not notice."""
        model, optimizer = trained(tiny)
        module, name = last_state_parameter(model)
        state = optimizer.state[getattr(module, name)]
        state["exp_avg"] = torch.cat([state["exp_avg"], state["exp_avg"]])
        with pytest.raises(RuntimeError, match=rf"state 'exp_avg' of .*{name} has shape"):
            check_optimizer(model, optimizer)


def test_models_that_share_a_config_keep_one_size():
    """One config object holds one number, however many models it belongs to."""
    config = MambaConfig(vocab_size=16, hidden_size=16, state_size=8, num_hidden_layers=1)
    both = nn.ModuleList([MambaModel(config), MambaModel(config)])
    plan = selection_plan(both, [0, 2, 7])
    with pytest.raises(ValueError, match="layers that share one config"):
        compress_(both, last_layer({"kept": torch.tensor([[0, 1]])})(plan))
    compress_(both, plan)
    assert config.state_size == 3


# Projections of Mamba-2.

MAMBA2 = TINY["mamba2"]
MATRICES = ("B_projection", "C_projection")


def projection_plan(model: nn.Module, sizes: list[int], seed: int = 0) -> CompressionPlan:
    """A plan made by hand: random projections of each layer to some number of states."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for (name, mixer), size in zip(find_mixers(model).items(), sizes, strict=True):
        W, V = torch.randn(2, mixer.state_size, 2 * size, generator=generator) / mixer.state_size**0.5
        layers[name] = projected_layer(mixer.state_size, W, V)
    return CompressionPlan(layers, 1, CompreSSMConfig(state_size=sizes, realization="projected"))


def projected_layer(size: int, W: torch.Tensor, V: torch.Tensor) -> LayerPlan:
    return LayerPlan(
        mixer_class="Mamba2Mixer",
        state_size_before=size,
        kept=None,
        readout=None,
        criterion="by hand",
        refit="none",
        relative_error=0.25,
        error_curve=[1.0] + [0.0] * size,
        B_projection=W,
        C_projection=V,
        groups=2,
    )


def products(first: CompressionPlan, second: CompressionPlan) -> CompressionPlan:
    """The plan that does at once what two do after each other."""
    layers = {}
    for name, one in first.layers.items():
        two, matrices = second.layers[name], []
        for matrix in MATRICES:
            pairs = zip(getattr(one, matrix).chunk(2, dim=1), getattr(two, matrix).chunk(2, dim=1), strict=True)
            matrices.append(torch.cat([(left.double() @ right.double()).float() for left, right in pairs], dim=1))
        layers[name] = projected_layer(8, *matrices)
    return dataclasses.replace(first, layers=layers)


def unit_columns(kept: list[list[int]], size: int = 8) -> torch.Tensor:
    return torch.cat([torch.eye(size)[:, row] for row in kept], dim=1)


@pytest.mark.parametrize("kept", [[[0, 2, 5], [0, 2, 5]], [[0, 2, 5, 7], [1, 2, 3, 6]], [[6], [0]]])
def test_a_projection_on_coordinates_is_a_selection(kept):
    selected = lively(MAMBA2.build())
    projected = copy.deepcopy(selected)
    units = unit_columns(kept)
    layers = {name: projected_layer(8, units, units) for name in find_mixers(projected)}
    compress_(projected, CompressionPlan(layers, 1, CompreSSMConfig(state_size=len(kept[0]), realization="projected")))
    compress_(selected, selection_plan(selected, kept))
    with torch.no_grad():
        assert_close(projected(tokens()).logits, selected(tokens()).logits)


def test_all_coordinates_in_any_basis_change_nothing():
    model = lively(MAMBA2.build())
    before = model(tokens()).logits
    layers = {}
    for number, name in enumerate(find_mixers(model)):
        bases = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        inverses = torch.linalg.inv(bases).transpose(1, 2)
        layers[name] = projected_layer(8, torch.cat(list(bases), 1).float(), torch.cat(list(inverses), 1).float())
    report = compress_(model, CompressionPlan(layers, 1, CompreSSMConfig(state_size=8, realization="projected")))
    assert report.changed and [layer.status for layer in report.layers] == ["cut"] * 2
    torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-3, atol=1e-4)


def test_a_projected_model_is_that_of_its_class():
    model = lively(MAMBA2.build())
    plan = projection_plan(model, [3, 5])
    before = dict(model.named_parameters())
    report = compress_(model, plan)
    fresh = CompressmMamba2ForCausalLM(copy.deepcopy(model.config))
    assert type(model) is type(fresh) and type(model.config) is type(fresh.config)
    for (name, ours), (_, theirs) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        assert type(ours) is type(theirs), name
        numbers = [{key: value for key, value in vars(m).items() if isinstance(value, int)} for m in (ours, theirs)]
        assert numbers[0] == numbers[1], name
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in fresh.named_parameters()]
    assert model.config.to_dict() == fresh.config.to_dict()
    assert (model.config.state_size, model.config.state_ranks, model.config.feature_size) == (3, [3, 5], 8)
    assert model.backbone.config is model.config
    for name, parameter in model.named_parameters():
        layer, _, matrix = name.rpartition(".")
        if matrix in MATRICES:
            assert torch.equal(parameter, getattr(plan.layers[layer], matrix)) and parameter.is_leaf
        else:
            # Nothing else is touched.
            assert parameter is before[name]
    assert [layer.state_size_after for layer in report.layers] == [3, 5]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(tokens()).logits, model.eval()(tokens()).logits)


def test_a_second_projection_multiplies_into_the_first():
    model = lively(MAMBA2.build())
    once = copy.deepcopy(model)
    first = projection_plan(model, [5, 6], seed=1)
    compress_(model, first)
    second = projection_plan(model, [3, 4], seed=2)
    compress_(model, second)
    whole = products(first, second)
    compress_(once, whole)
    for name, module in [(name, mixer.module) for name, mixer in find_mixers(model).items()]:
        for matrix in MATRICES:
            assert_close(getattr(module, matrix), getattr(whole.layers[name], matrix))
        assert module.feature_size == 8
    assert [mixer.state_size for mixer in find_mixers(model).values()] == [3, 4]
    assert (model.config.state_size, model.config.state_ranks, model.config.feature_size) == (3, [3, 4], 8)
    with torch.no_grad():
        assert_close(model(tokens()).logits, once(tokens()).logits)


def test_a_selection_of_a_projected_models_states_takes_columns():
    model = lively(MAMBA2.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compress_(model, projection_plan(model, [6, 6]), optimizer)
    train(model, optimizer, range(2))
    kept = [[0, 2, 5], [1, 3, 4]]
    columns = [*kept[0], *(6 + state for state in kept[1])]
    before = {name: (p.detach().clone(), dict(optimizer.state[p])) for name, p in model.named_parameters()}
    once = copy.deepcopy(model)
    units = unit_columns(kept, size=6)
    plan = CompressionPlan(
        {name: projected_layer(6, units, units) for name in find_mixers(once)}, 1, CompreSSMConfig(state_size=3)
    )
    compress_(once, plan)
    compress_(model, selection_plan(model, kept), optimizer)
    for name, parameter in model.named_parameters():
        value, state = before[name]
        small = name.endswith(MATRICES)
        assert torch.equal(parameter, value[:, columns] if small else value)
        for key, moment in state.items():
            now = optimizer.state[parameter][key]
            assert torch.equal(now, moment[:, columns] if small and moment.dim() else moment)
    assert (model.config.state_size, model.config.feature_size) == (3, 8)
    with torch.no_grad():
        assert_close(model(tokens()).logits, once(tokens()).logits)
    train(model, optimizer, range(2, 3))


def test_a_stock_cut_before_a_projection():
    model, _ = silent_and_kept(MAMBA2, [0, 2, 5, 7])
    before = model(tokens()).logits
    compress_(model, selection_plan(model, [0, 2, 4, 5, 7]))
    config = CompreSSMConfig(state_size=4, realization="projected")
    compress_(model, plan_compression(model, measure(model, [tokens(8, 24)]), config))
    assert (model.config.state_size, model.config.feature_size) == (4, 5)
    torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-3, atol=1e-5)


def test_projections_have_the_dtype_of_the_model():
    model = lively(MAMBA2.build()).to(torch.bfloat16)
    plan = projection_plan(model, [3, 3])
    compress_(model, plan)
    for name, layer in plan.layers.items():
        for matrix in MATRICES:
            assert torch.equal(model.get_parameter(f"{name}.{matrix}"), getattr(layer, matrix).to(torch.bfloat16))
    assert torch.isfinite(model(tokens()).logits).all()


def test_modes_hooks_and_frozenness_stay_when_a_mixer_is_projected():
    model = MAMBA2.build().train()
    first, second = (layer.mixer for layer in model.backbone.layers)
    first.requires_grad_(False)
    second.eval()
    seen = []
    first.register_forward_pre_hook(lambda *_: seen.append(1))
    modes = [module.training for module in model.modules()]
    compress_(model, projection_plan(model, [3, 3]))
    assert [module.training for module in model.modules()] == modes
    model(tokens())
    assert seen == [1]
    for mixer in (first, second):
        mixer.B_projection.mark = "kept"
    for _ in range(2):
        assert not any(parameter.requires_grad for parameter in first.parameters())
        assert all(parameter.requires_grad for parameter in second.parameters())
        assert first.B_projection.mark == second.B_projection.mark == "kept"
        compress_(model, projection_plan(model, [first.ssm_state_size - 1] * 2))


def test_one_of_two_models_is_projected():
    both = nn.ModuleDict({"a": TINY["mamba"].build(), "b": nn.Sequential(MAMBA2.build_base())})
    plan = projection_plan(nn.ModuleDict({"b": both["b"]}), [3, 5])
    plan.layers.update(selection_plan(nn.ModuleDict({"a": both["a"]}), [1, 4]).layers)
    compress_(both, plan)
    assert type(both["a"]) is TINY["mamba"].language_model and both["a"].config.state_size == 2
    assert type(both["b"][0]).__name__ == "CompressmMamba2Model" and both["b"][0].config.state_ranks == [3, 5]
    both["a"](tokens()), both["b"][0](tokens())


def test_a_bare_mixer_is_projected():
    module = MAMBA2.build().backbone.layers[0].mixer
    compress_(module, projection_plan(module, [3]))
    assert (module.ssm_state_size, module.feature_size) == (3, 8)
    hidden_states = torch.randn(2, 5, 16)
    assert module(hidden_states).shape == hidden_states.shape


def test_the_report_of_a_projected_cut():
    model = lively(MAMBA2.build())
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    count, held = sum(p.numel() for p in model.parameters()), optimizer_bytes(optimizer)
    config = CompreSSMConfig(state_size=[3, 5], realization="projected")
    plan = plan_compression(model, measure(model, [tokens(8, 24)]), config)
    report = compress_(model, plan, optimizer)
    # Two matrices of 8 rows, for two groups, in each layer; they have no moments yet.
    assert (report.parameters_before, report.parameters_after) == (count, count + 2 * 8 * 2 * (3 + 5))
    assert report.optimizer_bytes_before == report.optimizer_bytes_after == held
    assert [layer.realization for layer in report.layers] == ["projected"] * 2
    for layer, planned in zip(report.layers, plan.layers.values(), strict=True):
        assert (layer.kept, layer.hankel_values) == (None, planned.hankel_values)
        assert layer.expected_errors == planned.expected_errors
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    text = str(report)
    worst = {kind: max(layer.expected_errors[kind] for layer in report.layers) for kind in ("stock", "projected")}
    assert "8 → 3" in text and "8 → 5" in text and "balanced truncation, alternating least squares" in text
    assert (
        f"largest expected relative error at this size: {worst['stock']:.4f} by selection (realization stock), "
        f"{worst['projected']:.4f} projected\n" in text
    )


def test_the_report_of_a_selection_says_what_a_projection_would_cost():
    model = lively(MAMBA2.build())
    config = CompreSSMConfig(state_size=3, realization="stock")
    report = compress_(model, plan_compression(model, measure(model, [tokens(8, 24)]), config))
    worst = {kind: max(layer.expected_errors[kind] for layer in report.layers) for kind in ("stock", "projected")}
    assert worst["projected"] < worst["stock"] == report.relative_error
    assert f"{worst['projected']:.4f} projected (in the mean field)\n" in str(report)
    mamba = lively(TINY["mamba"].build())
    report = compress_(mamba, plan_compression(mamba, measure(mamba, [tokens(8, 24)]), CompreSSMConfig(state_size=3)))
    assert "projected" not in str(report)


def matrix_of(**matrices: torch.Tensor | None) -> Callable[[CompressionPlan], CompressionPlan]:
    return last_layer(matrices)


BAD_PROJECTIONS = {
    "transposed": (
        matrix_of(B_projection=torch.zeros(6, 8)),
        LAYER + r"B_projection has shape \(6, 8\); expected \(8, 8\)",
    ),
    "of other features": (
        matrix_of(B_projection=torch.zeros(7, 6)),
        LAYER + r"B_projection has shape \(7, 6\); expected",
    ),
    "an odd number of columns": (
        matrix_of(B_projection=torch.zeros(8, 5), C_projection=torch.zeros(8, 5)),
        LAYER + r"B_projection has shape \(8, 5\); expected \(8, 4\) with 2 groups and r in 1\.\.8",
    ),
    "of different sizes": (
        matrix_of(C_projection=torch.zeros(8, 4)),
        LAYER + r"C_projection has shape \(8, 4\); expected \(8, 6\)",
    ),
    "only one": (matrix_of(C_projection=None), LAYER + r"C_projection has shape None"),
    "only the other": (matrix_of(B_projection=None), LAYER + "the plan has neither kept states nor a projection"),
    "more states than features": (
        matrix_of(B_projection=torch.zeros(8, 18), C_projection=torch.zeros(8, 18)),
        LAYER + r"B_projection has shape \(8, 18\); expected .* r in 1\.\.8",
    ),
    "no state": (
        matrix_of(B_projection=torch.zeros(8, 0), C_projection=torch.zeros(8, 0)),
        LAYER + r"B_projection has shape \(8, 0\)",
    ),
    "three dimensions": (matrix_of(C_projection=torch.zeros(8, 2, 3)), LAYER + r"C_projection has shape \(8, 2, 3\)"),
    "NaN": (matrix_of(C_projection=torch.full((8, 6), math.nan)), LAYER + "C_projection holds NaN or infinity"),
    "infinite": (matrix_of(B_projection=torch.full((8, 6), math.inf)), LAYER + "B_projection holds NaN or infinity"),
    "other groups": (last_layer({"groups": 3}), LAYER + "B_projection has shape .* with 2 groups"),
    "another N": (last_layer({"state_size_before": 16}), LAYER + "the plan is for state_size 16, but the model has 8"),
    "one layer is selected": (
        last_layer({"B_projection": None, "C_projection": None, "kept": torch.tensor([[0, 1, 2]] * 2)}),
        r"layers that share one config must all be projected or none, but the plan has .*: 'projected', .*: 'stock'",
    ),
    "a layer is missing": (
        lambda plan: dataclasses.replace(plan, layers=dict(list(plan.layers.items())[:1])),
        r"plan and model do not match: the plan lacks layers",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_PROJECTIONS.values(), ids=BAD_PROJECTIONS.keys())
def test_a_projection_that_does_not_fit_is_refused_before_anything_is_touched(spoil, message):
    model, optimizer = trained(MAMBA2)
    before, plan = snapshot(model, optimizer), spoil(projection_plan(model, [3, 3]))
    with pytest.raises(ValueError, match=message):
        compress_(model, plan, optimizer)
    assert_untouched(before, model, optimizer)


def test_a_projection_of_mamba1_is_refused():
    model, optimizer = trained(TINY["mamba"])
    before, plan = snapshot(model, optimizer), projection_plan(model, [3, 3])
    with pytest.raises(ValueError, match="the plan projects its states, which Mamba-1 mixers do not allow"):
        compress_(model, plan, optimizer)
    assert_untouched(before, model, optimizer)


class OwnForward(Mamba2Mixer):
    """A mixer that a projected forward would hide."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(2 * hidden_states, *args, **kwargs)


def test_a_mixer_with_a_forward_of_its_own_is_refused():
    model, optimizer = trained(MAMBA2)
    model.backbone.layers[1].mixer.__class__ = OwnForward
    before = snapshot(model, optimizer)
    with pytest.raises(TypeError, match=r"OwnForward has no projected form; these mixers have, .*: .*Mamba2Mixer"):
        compress_(model, projection_plan(model, [3, 3]), optimizer)
    assert_untouched(before, model, optimizer)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (quantized_parameter, "is a QuantizedTensor"),
        (integer_parameter, r"of torch\.int8, not a plain floating-point"),
    ],
)
@pytest.mark.parametrize("again", [False, True], ids=["first projection", "second projection"])
def test_a_quantized_mixer_is_not_projected(spoil, message, again, monkeypatch):
    """Neither next to quantized weights, nor by multiplying into quantized projections."""
    model, optimizer = trained(MAMBA2)
    if again:
        compress_(model, projection_plan(model, [5, 5]), optimizer)
    else:
        module = model.backbone.layers[1].mixer.in_proj
        monkeypatch.setitem(spoil.__globals__, "last_state_parameter", lambda _: (module, "weight"))
    spoil(model, optimizer)
    before = snapshot(model, optimizer)
    with pytest.raises(TypeError, match=rf"layers\.1\.mixer: .*{message}"):
        compress_(model, projection_plan(model, [3, 3]), optimizer)
    assert_untouched(before, model, optimizer)


@pytest.mark.parametrize("second", ["projected", "selected"])
@pytest.mark.parametrize("spoil", [gradient_hook, accumulation_hook])
def test_hooks_on_a_projection_are_refused(spoil, second):
    model, optimizer = trained(MAMBA2)
    compress_(model, projection_plan(model, [5, 5]), optimizer)
    train(model, optimizer, range(1))
    spoil(model, optimizer)
    before = snapshot(model, optimizer)
    plan = projection_plan(model, [3, 3]) if second == "projected" else selection_plan(model, [0, 2, 4])
    with pytest.raises(RuntimeError, match=r"layers\.1\.mixer: C_projection.* has gradient hooks"):
        compress_(model, plan, optimizer)
    assert_untouched(before, model, optimizer)


def test_a_projection_that_is_tied_is_refused():
    model, optimizer = trained(MAMBA2)
    compress_(model, projection_plan(model, [5, 5]), optimizer)
    tied_parameter(model, optimizer)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"several owners \(.*layers\.1.*, reader\.weight\)"):
        compress_(model, projection_plan(model, [3, 3]), optimizer)
    assert_untouched(before, model, optimizer)


def test_a_projected_plan_is_not_applied_twice():
    model = MAMBA2.build()
    plan = projection_plan(model, [3, 3])
    compress_(model, plan)
    before = snapshot(model)
    with pytest.raises(ValueError, match="the plan is for state_size 8, but the model has 3"):
        compress_(model, plan)
    assert_untouched(before, model)


def test_what_a_compiled_or_wrapped_model_calls_is_projected():
    model = lively(MAMBA2.build())
    once = copy.deepcopy(model)
    plan = projection_plan(model, [3, 5])
    compress_(torch.compile(nn.DataParallel(model), backend="eager"), plan)
    compress_(once, plan)
    assert type(model) is CompressmMamba2ForCausalLM and MAMBA2.language_model is Mamba2ForCausalLM
    assert torch.equal(model(tokens()).logits, once(tokens()).logits)


@pytest.mark.parametrize("refused", [True, False])
def test_a_plan_for_all_states_of_some_layers(refused):
    """Layers that keep all of their states are projected with the others, since they share a config."""
    model = lively(MAMBA2.build())
    config = CompreSSMConfig(state_size=[3, 8], realization="projected")
    plan = plan_compression(model, measure(model, [tokens(8, 24)]), config)
    if refused:
        whole = last_layer({"B_projection": None, "C_projection": None, "kept": torch.arange(8).repeat(2, 1)})(plan)
        with pytest.raises(ValueError, match="must all be projected or none"):
            compress_(model, whole)
        return
    report = compress_(model, plan)
    assert model.config.state_ranks == [3, 8] and [layer.status for layer in report.layers] == ["cut", "cut"]
    assert report.layers[1].relative_error == 0
    # A second cut that this layer has no part in leaves it alone.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, range(1))
    before = snapshot(model, optimizer)
    config = CompreSSMConfig(state_size=[2, 8], realization="projected")
    report = compress_(model, plan_compression(model, measure(model, [tokens(8, 24)]), config), optimizer)
    assert [layer.status for layer in report.layers] == ["cut", "unchanged"]
    assert model.config.state_ranks == [2, 8]
    after = snapshot(model, optimizer)
    for name, parameter in after["parameters"].items():
        if not name.startswith("backbone.layers.0.mixer.") or not name.endswith(MATRICES):
            assert same(parameter, before["parameters"][name])
    assert len(after["state"]) == len(before["state"]) - 2
