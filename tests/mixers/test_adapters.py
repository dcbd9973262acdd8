"""What PEFT puts around mixers: found, measured as it works, and cut with the layer that it is around."""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys

import pytest
import torch
from conftest import MAMBA1_FAMILY, MAMBA2_FAMILY, Tiny, lively, selection_plan, stir, tokens
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_compressm import CompreSSMConfig, StateStatistics, compress_, find_mixers, measure, plan_compression
from hf_compressm.mixers.adapters import bypassed_adapters, effective_weight, mixture_of_parameters
from hf_compressm.mixers.resize import resize_mixer

MAMBA, MAMBA2 = MAMBA1_FAMILY["mamba"], MAMBA2_FAMILY["mamba2"]
# What adapts which model; every parameter that holds states is adapted by one of them.
CASES = {
    "LoRA": (MAMBA, {"target_modules": ["in_proj", "x_proj"]}),
    "rsLoRA": (MAMBA, {"target_modules": ["x_proj"], "use_rslora": True}),
    "DoRA": (MAMBA, {"target_modules": ["in_proj", "x_proj"], "use_dora": True}),
    "modules_to_save": (MAMBA, {"target_modules": ["in_proj"], "modules_to_save": ["x_proj", "conv1d", "dt_proj"]}),
    "target_parameters": (MAMBA, {"target_parameters": ["mixer.A_log"]}),
    "LoRA inside target_parameters": (MAMBA, {"target_modules": ["x_proj"], "target_parameters": ["mixer.A_log"]}),
    "Mamba-2, LoRA": (MAMBA2, {"target_modules": ["in_proj"]}),
    "Mamba-2, DoRA, modules_to_save": (
        MAMBA2,
        {"target_modules": ["in_proj"], "use_dora": True, "modules_to_save": ["conv1d"]},
    ),
    "Jamba, LoRA, modules_to_save": (
        MAMBA1_FAMILY["jamba"],
        {"target_modules": ["x_proj", "in_proj"], "modules_to_save": ["b_layernorm"]},
    ),
    "Falcon-Mamba, DoRA": (MAMBA1_FAMILY["falcon_mamba"], {"target_modules": ["x_proj"], "use_dora": True}),
    "Zamba, LoRA": (MAMBA1_FAMILY["zamba"], {"target_modules": ["in_proj"], "modules_to_save": ["conv1d"]}),
    "Granite, LoRA": (MAMBA2_FAMILY["granitemoehybrid"], {"target_modules": ["mamba.in_proj", "mamba.out_proj"]}),
}
KEPT = [0, 2, 3, 5, 7]


@torch.no_grad()
def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers in everything that is trained: fresh adapters do nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def adapted(tiny: Tiny, options: dict, seed: int = 0) -> PeftModel:
    """A tiny model with adapters that change what it does."""
    base = (lively if tiny in (MAMBA, MAMBA2) else stir)(tiny.build())
    return trained(get_peft_model(base, LoraConfig(r=2, lora_alpha=4, **options)), seed)


@pytest.fixture(params=list(CASES))
def case(request) -> tuple[Tiny, dict]:
    return CASES[request.param]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def without_adapters(model: PeftModel) -> nn.Module:
    """The plain model that does the same."""
    plain = copy.deepcopy(model).merge_and_unload()
    # PEFT leaves the layers inside a mixer that it took a wrapper off.
    for module in list(plain.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                setattr(module, name, layer.get_base_layer())
    return plain


def assert_same_statistics(ours: dict[str, StateStatistics], theirs: dict[str, StateStatistics]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        for statistic in ("state_gram", "readout_gram", "contribution_gram", "A", "B_norm", "C_norm"):
            one, other = getattr(ours[name], statistic), getattr(theirs[name], statistic)
            assert (one - other).norm() <= 1e-5 * other.norm(), (name, statistic)


def test_mixers_have_their_names_in_the_base_model(case):
    tiny, options = case
    base = tiny.build()
    names, config = list(find_mixers(base)), base.config
    mixers = find_mixers(get_peft_model(base, LoraConfig(**options)))
    assert list(mixers) == names and all(mixer.config is config for mixer in mixers.values())


def test_measured_is_what_the_adapted_model_does(case):
    model = adapted(*case)
    assert_same_statistics(measure(model, [tokens()]), measure(without_adapters(model), [tokens()]))


@pytest.mark.parametrize(
    ("name", "state"),
    [
        (name, state)
        for name in ("LoRA", "DoRA", "modules_to_save", "target_parameters")
        for state in ("disabled", "merged", "the second of two")
        if (name, state) != ("DoRA", "merged")
    ],
)
def test_measured_is_what_is_active(name, state):
    model = adapted(*CASES[name])
    if state == "disabled":
        model.base_model.disable_adapter_layers()
        reference = lively(CASES[name][0].build())
    elif state == "merged":
        model.merge_adapter()
        reference = without_adapters(adapted(*CASES[name]))
    else:
        model.add_adapter("second", LoraConfig(r=3, **CASES[name][1]))
        model.set_adapter("second")
        reference = without_adapters(trained(model, seed=1))
    assert_same_statistics(measure(model, [tokens()]), measure(reference, [tokens()]))


def test_a_cut_is_that_of_the_model_with_its_adapters_merged(case):
    model = adapted(*case)
    reference = without_adapters(model)
    config = CompreSSMConfig(state_size=5, realization="stock")
    plan = plan_compression(reference, measure(reference, [tokens()]), config)
    if case[0] in (MAMBA, MAMBA1_FAMILY["zamba"]):
        assert all(set(layer.mixtures) == {"B", "C"} for layer in plan.layers.values())
    mixers = find_mixers(model)
    fields = {"B": "drive", "C": "readout"}
    layers = {
        name: dataclasses.replace(
            layer,
            **{
                fields[role]: mixture_of_parameters(name, mixers[name].axes, matrix, layer.kept, role)
                for role, matrix in layer.mixtures.items()
            },
        )
        for name, layer in plan.layers.items()
    }
    before = logits(model)
    compress_(model, dataclasses.replace(plan, layers=layers))
    compress_(reference, plan)
    change = (before - logits(model)).abs().max()
    assert (logits(model) - logits(reference)).abs().max() < 1e-3 * change
    assert_consistent_sizes(model)
    merged = model.merge_and_unload()
    assert (logits(merged) - logits(reference)).abs().max() < 1e-3 * change
    assert all(mixer.state_size == 5 for mixer in find_mixers(merged).values())


def assert_consistent_sizes(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features), name
        elif isinstance(module, nn.Conv1d):
            assert module.weight.shape[0] == module.out_channels == module.in_channels == module.groups, name
        elif hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            A, B = (next(iter(part.values())).weight.shape for part in (module.lora_A, module.lora_B))
            assert (module.in_features, module.out_features) == (A[1], B[0]), name


@pytest.mark.parametrize("name", ["LoRA", "modules_to_save", "target_parameters"])
def test_every_adapter_is_cut_whether_active_or_not(name):
    tiny, options = CASES[name]
    model = adapted(tiny, options)
    model.add_adapter("second", LoraConfig(r=3, **options))
    model.set_adapter("second")
    trained(model, seed=1)
    model.set_adapter("default")
    references = {}
    for adapter in ("second", "default"):
        model.set_adapter(adapter)
        references[adapter] = without_adapters(model)
    plan = plan_compression(
        references["default"], measure(references["default"], [tokens()]), CompreSSMConfig(state_size=5)
    )
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    compress_(model, plan)
    assert trains == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for adapter, reference in references.items():
        model.set_adapter(adapter)
        compress_(reference, plan)
        torch.testing.assert_close(logits(model), logits(reference), atol=1e-4, rtol=0)
    assert_consistent_sizes(model)


@pytest.mark.parametrize("name", ["LoRA", "target_parameters"])
def test_a_merged_adapter_can_be_taken_out_after_the_cut(name):
    model = adapted(*CASES[name])
    reference = copy.deepcopy(model)
    plan = selection_plan(model, KEPT)
    compress_(reference, plan)
    model.merge_adapter()
    compress_(model, plan)
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-4, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-4, rtol=0)


def test_lora_with_a_bias_of_its_own():
    tiny, options = CASES["LoRA"]
    model = adapted(tiny, options | {"lora_bias": True})
    x_proj = find_mixers(model)["backbone.layers.0.mixer"].module.x_proj
    x = torch.randn(3, x_proj.in_features)
    before = x_proj(x)
    plan = plan_compression(model, measure(model, [tokens()]), CompreSSMConfig(state_size=5))
    compress_(model, plan)
    layer, rank = plan.layers["backbone.layers.0.mixer"], before.shape[1] - 16
    delta, B, C = before.split([rank, 8, 8], dim=1)
    assert layer.drive is not None
    expected = torch.cat([delta, B @ layer.drive[0].T, C @ layer.readout[0].T], dim=1)
    torch.testing.assert_close(x_proj(x), expected)


def test_doras_rows_are_exact_for_the_active_adapter_and_a_warning_tells_of_others(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_compressm"), "propagate", True)
    tiny, options = CASES["DoRA"]
    model = adapted(tiny, options)
    model.add_adapter("second", LoraConfig(r=3, **options))
    model.set_adapter("second")
    trained(model, seed=1)
    mixer = find_mixers(model)["backbone.layers.0.mixer"]
    x_proj, rank = mixer.module.x_proj, mixer.module.time_step_rank
    before = effective_weight(x_proj)
    kept = torch.tensor([KEPT])
    # Without a refit nothing is mixed, and DoRA is exact for all.
    selection = torch.eye(8)[kept]
    for role in "BC":
        assert torch.equal(mixture_of_parameters("", mixer.axes, selection, kept, role)[0], selection[0])
    assert not caplog.text
    generator, M0, M = torch.Generator().manual_seed(0), {}, {}
    for role in "BC":
        M0[role] = torch.randn(1, 5, 8, generator=generator)
        with caplog.at_level(logging.WARNING):
            M[role] = mixture_of_parameters(mixer.name, mixer.axes, M0[role], kept, role)
        assert f"of the adapter 'default' it changes the rows of {role} by a further" in caplog.text
        assert "'second'" not in caplog.text
        caplog.clear()
    plan = selection_plan(model, KEPT)
    # Of the second layer, C alone: the rows of B are then only selected.
    drives = (M["B"], None)
    layers = {
        name: dataclasses.replace(layer, readout=M["C"], drive=drive)
        for (name, layer), drive in zip(plan.layers.items(), drives, strict=True)
    }
    other = find_mixers(model)["backbone.layers.1.mixer"].module.x_proj
    untouched = effective_weight(other)
    compress_(model, dataclasses.replace(plan, layers=layers))
    after = effective_weight(x_proj)
    torch.testing.assert_close(after[rank + 5 :], M0["C"][0] @ before[rank + 8 :], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after[rank : rank + 5], M0["B"][0] @ before[rank : rank + 8], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(effective_weight(other)[rank : rank + 5], untouched[rank + kept[0]])


def test_resizing_keeps_adapters_and_their_layers_together(case):
    model = adapted(*case)
    for mixer in find_mixers(model).values():
        resize_mixer(mixer, 3, model=model)
    assert {mixer.state_size for mixer in find_mixers(model).values()} == {3}
    assert_consistent_sizes(model)
    logits(model)


UNKNOWN = {
    "another kind of adapter": (
        TypeError,
        "LoHa|loha",
        lambda base: get_peft_model(base, LoHaConfig(target_modules=["x_proj"])),
    ),
    "a whole mixer": (
        TypeError,
        "whole mixer",
        lambda base: get_peft_model(base, LoraConfig(target_modules=["lm_head"], modules_to_save=["mixer"])),
    ),
    "DoRA that is merged": (RuntimeError, "unmerge_adapter", lambda base: merged_dora(base)),
}


def merged_dora(base: nn.Module) -> PeftModel:
    model = get_peft_model(base, LoraConfig(target_modules=["x_proj"], use_dora=True))
    model.merge_adapter()
    return model


@pytest.mark.parametrize("what", list(UNKNOWN))
def test_what_cannot_be_cut_is_refused_and_left_as_it_is(what):
    error, message, build = UNKNOWN[what]
    plan = selection_plan(MAMBA.build(), KEPT)
    model = build(MAMBA.build())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        compress_(model, plan)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("parameter", ["A_log", "x_proj_weight"])
def test_an_adapter_that_all_heads_share_is_refused(parameter):
    model = adapted(MAMBA1_FAMILY["zamba"], {"target_parameters": [f"mamba.{parameter}"]})
    with pytest.raises(TypeError, match=parameter):
        compress_(model, selection_plan(model, KEPT))


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: mixer.module for name, mixer in find_mixers(model).items()}


def test_bypassed_adapters_are_named(monkeypatch):
    model = adapted(MAMBA, {"target_modules": ["dt_proj", "x_proj"]})
    # An adapter of dt_proj does nothing, which is also what is measured.
    reference = copy.deepcopy(model)
    for mixer in find_mixers(reference).values():
        mixer.module.dt_proj = mixer.module.dt_proj.base_layer
    assert_same_statistics(measure(model, [tokens()]), measure(reference, [tokens()]))
    (message,) = bypassed_adapters(modules_of(model))
    assert "backbone.layers.0.mixer.dt_proj, backbone.layers.1.mixer.dt_proj" in message
    monkeypatch.setitem(sys.modules, "mamba_ssm", object())
    _, message = bypassed_adapters(modules_of(model))
    assert "backbone.layers.0.mixer.x_proj" in message
    assert not bypassed_adapters(modules_of(MAMBA.build()))
