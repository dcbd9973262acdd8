"""Optimizer state across a cut: exact where it is elementwise, sliced as an oracle says where it is factored."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import TINY, Tiny, lively, selection_plan, silence_states, tokens, train
from naive import kept_part
from torch import nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup
from transformers.trainer_pt_utils import get_parameter_names

from hf_compressm import (
    CompreSSMConfig,
    compress_,
    exempt_from_weight_decay,
    find_mixers,
    measure,
    plan_compression,
)
from hf_compressm.modeling_compressm import CompressmMamba2Config, CompressmMamba2ForCausalLM
from hf_compressm.optimizer import SLICED_STATE, remove_parameter, sliced_state

KEPT, SILENT = [0, 2, 5, 7], [1, 3, 4, 6]


class Lion(Optimizer):
    """Sign of an interpolated momentum: one moment, and no step count (Chen et al., arXiv 2302.06675)."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                moment = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter -= group["lr"] * torch.sign(0.9 * moment + 0.1 * parameter.grad)
                moment.lerp_(parameter.grad, 0.01)


def two_groups(model: nn.Module) -> list[dict]:
    """Weight decay for matrices only, as the Trainer does it."""
    decayed = get_parameter_names(model, [nn.LayerNorm], ["bias", "norm", "D$"])
    named = list(model.named_parameters())
    return [
        {"params": [parameter for name, parameter in named if name in decayed], "weight_decay": 0.1},
        {"params": [parameter for name, parameter in named if name not in decayed], "weight_decay": 0.0},
    ]


ELEMENTWISE: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "AdamW foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True),
    "AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    "AdamW one by one": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False),
    "AdamW amsgrad": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True),
    "AdamW with groups": lambda model: torch.optim.AdamW(two_groups(model), lr=1e-3),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "Adamax": lambda model: torch.optim.Adamax(model.parameters(), lr=1e-3),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters(), lr=1e-3),
    "RAdam": lambda model: torch.optim.RAdam(model.parameters(), lr=1e-3),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=1e-3),
    "Adadelta": lambda model: torch.optim.Adadelta(model.parameters(), lr=1e-2),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-4),
    "RMSprop centered": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-4, centered=True, momentum=0.9),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2),
    "SGD with momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "SGD nesterov": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True),
    "Lion": lambda model: Lion(model.parameters(), lr=1e-5),
}
FACTORED: dict[str, Callable[[nn.Module], Optimizer]] = {
    "torch Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-3),
    "torch Adafactor foreach": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-3, foreach=True),
    "transformers Adafactor": lambda model: transformers.Adafactor(
        model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False
    ),
    "transformers Adafactor with momentum": lambda model: transformers.Adafactor(
        model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False, beta1=0.9
    ),
    "transformers Adafactor with its own rate": lambda model: transformers.Adafactor(model.parameters()),
}


def silenced(tiny: Tiny, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    model = lively(tiny.build(**options))
    silence_states(model, SILENT)
    return model.to(dtype)


def kept_of(model: nn.Module) -> list[list[int]]:
    return [KEPT] * next(iter(find_mixers(model).values())).groups


def named_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict]:
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def copied(state: dict[str, dict]) -> dict[str, dict]:
    return {name: copy.deepcopy(dict(entries)) for name, entries in state.items()}


@pytest.mark.parametrize("build", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_state_of_the_kept_rows_is_kept_bit_for_bit(tiny, build, dtype):
    """States that matter, so that no two rows of a moment are alike."""
    model = lively(tiny.build(use_bias=True)).to(dtype)
    optimizer = build(model)
    train(model, optimizer, range(2))
    before, kept = copied(named_state(model, optimizer)), kept_of(model)
    compress_(model, selection_plan(model, KEPT), optimizer)
    after = named_state(model, optimizer)
    assert set(optimizer.state) <= set(model.parameters())
    for name, parameter in model.named_parameters():
        assert after[name].keys() == before[name].keys()
        for key, value in before[name].items():
            if isinstance(value, torch.Tensor) and value.dim():
                assert torch.equal(after[name][key], kept_part(name, value, kept)), (name, key)
                assert after[name][key].shape == parameter.shape and after[name][key].dtype == value.dtype
            else:
                assert after[name][key] == value


@pytest.mark.parametrize("build", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
def test_training_goes_on_as_if_nothing_had_happened(tiny, build):
    uncut, cut = silenced(tiny), silenced(tiny)
    optimizers = build(uncut), build(cut)
    for model, optimizer in zip((uncut, cut), optimizers, strict=True):
        train(model, optimizer, range(3))
    compress_(cut, selection_plan(cut, KEPT), optimizers[1])
    losses, norms = train(uncut, optimizers[0], range(3, 7))
    assert train(cut, optimizers[1], range(3, 7)) == (pytest.approx(losses, rel=1e-4), pytest.approx(norms, rel=1e-2))
    ours, kept = dict(cut.named_parameters()), kept_of(cut)
    for name, parameter in uncut.named_parameters():
        torch.testing.assert_close(ours[name], kept_part(name, parameter, kept), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "SGD with momentum", "Lion"])
def test_training_in_bf16_goes_on_as_if_nothing_had_happened(tiny, name):
    uncut, cut = silenced(tiny, torch.bfloat16), silenced(tiny, torch.bfloat16)
    optimizers = ELEMENTWISE[name](uncut), ELEMENTWISE[name](cut)
    for model, optimizer in zip((uncut, cut), optimizers, strict=True):
        train(model, optimizer, range(3))
    compress_(cut, selection_plan(cut, KEPT), optimizers[1])
    losses, _ = train(uncut, optimizers[0], range(3, 7))
    assert train(cut, optimizers[1], range(3, 7))[0] == pytest.approx(losses, rel=2e-2)


def test_the_kept_rows_go_on_training(tiny):
    """An optimizer that still held the old parameters would leave them as they are."""
    model = lively(tiny.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, range(1))
    compress_(model, selection_plan(model, KEPT), optimizer)
    axes = [axis for mixer in find_mixers(model).values() for axis in mixer.layout.state_axes(mixer.module)]
    before = [axis.tensor.detach().clone() for axis in axes]
    train(model, optimizer, range(1, 2))
    for axis, old in zip(axes, before, strict=True):
        assert (axis.tensor != old).transpose(0, axis.dim).reshape(axis.tensor.shape[axis.dim], -1).any(1).all()


def second_moment(entries: dict) -> torch.Tensor | None:
    """What a factored optimizer takes for the mean square of each gradient entry: row · column / mean of the rows."""
    if "row_var" in entries:
        row, column = entries["row_var"], entries["col_var"]
        return row * column / row.mean(-2, keepdim=True)
    if "exp_avg_sq_row" in entries:
        row, column = entries["exp_avg_sq_row"], entries["exp_avg_sq_col"]
        return row[..., :, None] * column[..., None, :] / row.mean(-1)[..., None, None]
    return entries.get("variance", entries.get("exp_avg_sq"))


@pytest.mark.parametrize("build", FACTORED.values(), ids=FACTORED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_factors_describe_the_same_second_moments_as_before(tiny, build, dtype):
    tolerance = {"rtol": 1e-4 if dtype == torch.float32 else 2e-2, "atol": 0.0}
    model = lively(tiny.build(use_bias=True)).to(dtype)
    optimizer = build(model)
    train(model, optimizer, range(3))
    before, kept = copied(named_state(model, optimizer)), kept_of(model)
    compress_(model, selection_plan(model, KEPT), optimizer)
    shrunk = 0
    for name, parameter in model.named_parameters():
        old, new = before[name], optimizer.state[parameter]
        assert old.keys() == new.keys()
        expected = kept_part(name, second_moment(old), kept)
        assert expected.shape == parameter.shape
        torch.testing.assert_close(second_moment(new), expected, **tolerance)
        if expected.shape == second_moment(old).shape:
            continue
        shrunk += 1
        # A factor is an average over the other dimension: of those that are left.
        for key, dim, keepdim in [
            ("row_var", -1, True),
            ("col_var", -2, True),
            ("exp_avg_sq_row", -1, False),
            ("exp_avg_sq_col", -2, False),
        ]:
            if key in new:
                torch.testing.assert_close(new[key], expected.mean(dim, keepdim=keepdim), **tolerance)
        if "exp_avg" in new:
            assert torch.equal(new["exp_avg"], kept_part(name, old["exp_avg"], kept))
        for key in ("step", "RMS"):
            assert key not in new or new[key] == old[key]
    assert shrunk == 2 * (2 if tiny is TINY["mamba"] else 4)


@pytest.mark.parametrize("build", FACTORED.values(), ids=FACTORED.keys())
def test_factored_optimizers_go_on(tiny, build):
    model = lively(tiny.build())
    optimizer = build(model)
    train(model, optimizer, range(3))
    compress_(model, selection_plan(model, KEPT), optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses, _ = train(model, optimizer, range(3, 6))
    assert all(map(math.isfinite, losses))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all() and not torch.equal(parameter, before[name])


@pytest.mark.parametrize("build", FACTORED.values(), ids=FACTORED.keys())
def test_a_factored_cut_before_the_first_gradient_of_a_layer(tiny, build):
    """Second moments of zero must not become NaN."""
    model = lively(tiny.build())
    optimizer = build(model)
    train(model, optimizer, range(1))
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if key in SLICED_STATE:
                value.zero_()
    compress_(model, selection_plan(model, KEPT), optimizer)
    for entries in optimizer.state.values():
        assert all(torch.isfinite(value).all() for value in entries.values() if isinstance(value, torch.Tensor))


def test_an_optimizer_without_state_yet(tiny):
    uncut, cut = silenced(tiny), silenced(tiny)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (uncut, cut)]
    compress_(cut, selection_plan(cut, KEPT), optimizers[1])
    assert not optimizers[1].state
    losses, _ = train(uncut, optimizers[0], range(3))
    assert train(cut, optimizers[1], range(3))[0] == pytest.approx(losses, rel=1e-5)


def test_a_frozen_layer_has_no_state(tiny):
    model = lively(tiny.build())
    model.backbone.layers[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    train(model, optimizer, range(1))
    compress_(model, selection_plan(model, KEPT), optimizer)
    train(model, optimizer, range(1, 2))
    (group,) = optimizer.param_groups
    now = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [id(p) for p in group["params"]] == [id(p) for p in now]
    assert set(optimizer.state) == set(now)


def test_groups_keep_their_order_and_options(tiny):
    model = lively(tiny.build())
    optimizer = torch.optim.AdamW(two_groups(model), lr=1e-3)
    train(model, optimizer, range(1))

    def groups() -> list[tuple[list[str], dict]]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return [
            ([names[id(p)] for p in group["params"]], {key: value for key, value in group.items() if key != "params"})
            for group in optimizer.param_groups
        ]

    before, objects = groups(), [id(group) for group in optimizer.param_groups]
    assert len(before[0][0]) > 0 < len(before[1][0])
    compress_(model, selection_plan(model, KEPT), optimizer)
    assert groups() == before
    # Schedulers hold on to the group dictionaries.
    assert [id(group) for group in optimizer.param_groups] == objects


def test_a_learning_rate_schedule_goes_on(tiny):
    rates = []
    for is_cut in (False, True):
        model = silenced(tiny)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = get_cosine_schedule_with_warmup(optimizer, 2, 8)
        rates.append([])
        for step in range(8):
            train(model, optimizer, [step])
            scheduler.step()
            rates[-1].append((scheduler.get_last_lr(), optimizer.param_groups[0]["lr"]))
            if is_cut and step == 3:
                compress_(model, selection_plan(model, KEPT), optimizer)
    assert rates[0] == rates[1] and len({rate for _, rate in rates[0]}) > 4


def test_an_optimizer_prepared_by_accelerate(tiny):
    accelerator = Accelerator(cpu=True)
    model, optimizer = lively(tiny.build()), None
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    train(model, optimizer, range(1))
    compress_(model, selection_plan(model, KEPT), optimizer)
    assert set(optimizer.optimizer.state) == set(model.parameters())
    train(model, optimizer, range(1, 3))


def test_state_dict_loads_beside_the_saved_model(tiny, tmp_path):
    """As a resumed run does it: the model from disk, a new optimizer, the moments by position."""
    model = lively(tiny.build())
    optimizer = torch.optim.AdamW(two_groups(model), lr=1e-3)
    train(model, optimizer, range(2))
    compress_(model, selection_plan(model, KEPT), optimizer)
    model.save_pretrained(tmp_path)
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path)
    second = torch.optim.AdamW(two_groups(resumed), lr=1e-3)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(resumed, second, range(2, 5)) == train(model, optimizer, range(2, 5))


class Strange(Lion):
    """Adds one more entry to its state."""

    def __init__(self, params, entry) -> None:
        super().__init__(params, lr=1e-5)
        self.entry = entry

    @torch.no_grad()
    def step(self, closure=None) -> None:
        super().step(closure)
        for parameter, state in self.state.items():
            key, make = self.entry
            state[key] = make(parameter)


class Quantized(torch.Tensor):
    pass


UNKNOWN = {
    "an unknown key": (("preconditioner", torch.zeros_like), r"'preconditioner' .* is an unknown tensor of shape"),
    "an unknown key with one number": (("norm", lambda p: p.norm()), r"'norm' .* is an unknown tensor of shape \(\)"),
    "a known key of another shape": (
        ("exp_avg_sq", lambda p: torch.zeros(p.numel() + 1)),
        r"'exp_avg_sq' .* has shape .*, which does not fit the parameter's",
    ),
    "a step for each row": (("step", lambda p: torch.zeros(3)), r"'step' .* is an unknown tensor of shape \(3,\)"),
    "a quantized tensor": (
        ("exp_avg_sq", lambda p: torch.zeros_like(p).as_subclass(Quantized)),
        r"'exp_avg_sq' .* is a Quantized",
    ),
    "a list": (("history", lambda p: [p]), r"'history' .* is a list"),
}


@pytest.mark.parametrize(("entry", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_state_is_refused_by_name(tiny, entry, message):
    model = lively(tiny.build())
    optimizer = Strange(model.parameters(), entry)
    train(model, optimizer, range(1))
    names = r"optimizer Strange cannot be carried through a cut: its state "
    where = r"of parameter backbone\.layers\.0\.mixer: \w+ of \w+ "
    first, rest = message.split(" .* ")
    with pytest.raises(TypeError, match=f"{names}{first} {where}{rest}.*supported: AdamW and its relatives"):
        compress_(model, selection_plan(model, KEPT), optimizer)


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.ASGD])
def test_optimizers_of_torch_that_are_not_supported(tiny, kind):
    model = lively(tiny.build())
    optimizer = kind(model.parameters(), lr=1e-4)
    train(model, optimizer, range(1))
    with pytest.raises(TypeError, match=f"optimizer {kind.__name__} cannot be carried through a cut"):
        compress_(model, selection_plan(model, KEPT), optimizer)


def test_lbfgs_is_refused(tiny):
    """It keeps its own list of parameters and flat vectors over all of them: a cut would freeze the layers."""
    model = lively(tiny.build())
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-4, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(TypeError, match="LBFGS cannot be carried through a cut"):
        compress_(model, selection_plan(model, KEPT), optimizer)


def test_sliced_state_only_reads(tiny):
    model = lively(tiny.build())
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    mixer = next(iter(find_mixers(model).values()))
    axis = mixer.layout.state_axes(mixer.module)[0]
    before = copy.deepcopy(dict(optimizer.state[axis.tensor]))
    state = sliced_state(optimizer, axis.tensor, "name", axis.dim, torch.tensor([1, 3]))
    state["exp_avg"].zero_()
    now = optimizer.state[axis.tensor]
    assert all(torch.equal(now[key], value) for key, value in before.items())


# The two parameters that a projection adds.

MAMBA2 = TINY["mamba2"]
PROJECTIONS = ("B_projection", "C_projection")


def project(model: nn.Module, optimizer: Optimizer, size: int | list[int] = 4) -> None:
    config = CompreSSMConfig(state_size=size, realization="projected")
    compress_(model, plan_compression(model, measure(model, [tokens(8, 24)]), config), optimizer)


def names_in_groups(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def undecayed_two_groups(model: nn.Module) -> list[dict]:
    """The groups that the Trainer would build for a projected model: no decay for projections."""
    moved = [parameter for name, parameter in model.named_parameters() if name.endswith(PROJECTIONS)]
    decayed, rest = two_groups(model)
    order = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    decayed["params"] = [parameter for parameter in decayed["params"] if not any(parameter is p for p in moved)]
    everything = {id(parameter): parameter for parameter in [*rest["params"], *moved]}
    rest["params"] = sorted(everything.values(), key=lambda parameter: order[id(parameter)])
    return [decayed, rest]


def by_layer(model: nn.Module) -> list[dict]:
    """Learning rates that fall with the depth, and the rest; no group is without decay."""
    layers = [list(layer.parameters()) for layer in model.backbone.layers]
    inside = {id(parameter) for layer in layers for parameter in layer}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [
        {"params": params, "lr": 1e-3 / (number + 1), "weight_decay": 0.01}
        for number, params in enumerate([*layers, rest])
    ]


def slow_mixers_in_reverse(model: nn.Module) -> list[dict]:
    """Each layer has a group with and one without decay, the last layer first."""
    groups = []
    for layer in reversed(model.backbone.layers):
        own = list(layer.parameters())
        groups.append({"params": [p for p in own if p.dim() == 1 or p.shape[0] == 8], "weight_decay": 0.0})
        groups.append({"params": [p for p in own if p.dim() > 1 and p.shape[0] != 8], "weight_decay": 0.1})
    return groups


GROUPINGS: dict[str, Callable[[nn.Module], list]] = {
    "one": lambda model: list(model.parameters()),
    "the Trainer's two": undecayed_two_groups,
    "by layer": by_layer,
    "two for each layer": slow_mixers_in_reverse,
}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("size", [4, [3, 8]], ids=["one size", "a size for each layer"])
def test_projections_take_the_place_that_a_new_optimizer_would_give_them(grouping, size):
    """Checkpoints hold optimizer state by position."""
    model = lively(MAMBA2.build())
    optimizer = torch.optim.AdamW(GROUPINGS[grouping](model), lr=1e-3)
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    train(model, optimizer, range(2))
    before = copied(named_state(model, optimizer))
    project(model, optimizer, size)
    fresh = torch.optim.AdamW(GROUPINGS[grouping](model), lr=1e-3)
    assert names_in_groups(model, optimizer) == names_in_groups(model, fresh)
    now = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    assert now == options
    # The others keep their moments, untouched; the new ones have none.
    for name, parameter in model.named_parameters():
        if name.endswith(PROJECTIONS):
            assert parameter not in optimizer.state
        else:
            assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in before[name].items())
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, optimizer, range(2, 3))
    for name, parameter in model.named_parameters():
        held = any(name in group for group in names_in_groups(model, optimizer))
        assert torch.equal(parameter, values[name]) == (not held)
        assert name.endswith(PROJECTIONS) <= held


def test_a_scheduler_goes_on_with_the_projections():
    model = lively(MAMBA2.build())
    optimizer = torch.optim.AdamW(undecayed_two_groups(model), lr=1e-3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, 8)
    for step in range(6):
        train(model, optimizer, [step])
        scheduler.step()
        if step == 2:
            project(model, optimizer)
    assert len(optimizer.param_groups) == 2
    assert {group["lr"] for group in optimizer.param_groups} == {scheduler.get_last_lr()[0]}


ALL_OPTIMIZERS = ELEMENTWISE | FACTORED


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_every_optimizer_trains_the_projections(name):
    model = lively(MAMBA2.build())
    optimizer = ALL_OPTIMIZERS[name](model)
    train(model, optimizer, range(2))
    project(model, optimizer, 5)
    for first, size in ((2, 3), (4, None)):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        losses, _ = train(model, optimizer, [first])
        assert all(map(math.isfinite, losses))
        for key, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all() and not torch.equal(parameter, before[key]), key
        # The second cut multiplies into the first, and leaves the moments of another basis behind.
        if size is not None:
            kept = copied(named_state(model, optimizer))
            project(model, optimizer, size)
            for key, parameter in model.named_parameters():
                assert bool(optimizer.state.get(parameter)) == (not key.endswith(PROJECTIONS) and bool(kept[key]))
            assert set(optimizer.state) <= set(model.parameters())


def test_a_frozen_base_gets_frozen_projections():
    model = lively(MAMBA2.build())
    model.backbone.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    project(model, optimizer)
    assert names_in_groups(model, optimizer) == [["lm_head.weight"]]
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(PROJECTIONS))


def test_projections_of_layers_that_the_optimizer_does_not_train():
    """The first layer's parameters ask for gradients, but no optimizer holds them."""
    model = lively(MAMBA2.build())
    optimizer = torch.optim.AdamW(model.backbone.layers[1].parameters(), lr=1e-3)
    project(model, optimizer)
    (names,) = names_in_groups(model, optimizer)
    assert {name for name in names if name.endswith(PROJECTIONS)} == {
        f"backbone.layers.1.mixer.{name}" for name in PROJECTIONS
    }


def test_accelerates_optimizer_takes_the_projections():
    model = lively(MAMBA2.build())
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    project(model, optimizer)
    (names,) = names_in_groups(model, optimizer)
    assert names == [name for name, _ in model.named_parameters()]


def test_remove_parameter_forgets_it_and_its_state():
    model = lively(MAMBA2.build())
    optimizer = torch.optim.AdamW(two_groups(model), lr=1e-3)
    train(model, optimizer, range(1))
    gone = model.backbone.layers[0].mixer.D
    before = names_in_groups(model, optimizer)
    remove_parameter(optimizer, gone)
    name = "backbone.layers.0.mixer.D"
    assert names_in_groups(model, optimizer) == [[item for item in group if item != name] for group in before]
    assert gone not in optimizer.state and len(optimizer.state) == len(list(model.parameters())) - 1


def test_a_trainer_is_told_not_to_decay_projections(tmp_path):
    """A model that is projected from its first step on, without the callback."""
    config = CompressmMamba2Config(**(MAMBA2.config().to_diff_dict() | {"state_size": 3, "feature_size": 8}))
    model = CompressmMamba2ForCausalLM(config)
    arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, report_to="none", use_cpu=True)

    def decayed(told: bool) -> set[str]:
        trainer = Trainer(model, arguments)
        if told:
            exempt_from_weight_decay(trainer)
        trainer.create_optimizer()
        return set(names_in_groups(model, trainer.optimizer)[0])

    projections = {name for name, _ in model.named_parameters() if name.endswith(PROJECTIONS)}
    assert len(projections) == 4
    assert decayed(told=False) - decayed(told=True) == projections
