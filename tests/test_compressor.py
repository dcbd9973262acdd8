"""The Compressor in a hand-written loop, with Accelerate and without."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, lively, tokens
from naive import kept_part
from torch import nn
from training import KEPT, assert_same_weights, config, moments, silenced, weights

from hf_compressm import CompreSSMConfig, Compressor, find_mixers, read_record, write_record


def batches(start: int = 0, stop: int = 8) -> Iterator[torch.Tensor]:
    return (tokens(4, 12, seed=number) for number in range(start, stop))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-3)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules()]


def seen_once(tiny, seed: int = 0, **options) -> tuple[nn.Module, torch.optim.Optimizer, Compressor]:
    """A model, its optimizer and its Compressor after the step that the cut is due at."""
    model = lively(tiny.build(seed))
    optimizer = adamw(model)
    compressor = Compressor(config(**({"schedule": [1]} | options)), model, optimizer, total_steps=51)
    train_step(model, optimizer, next(batches()))
    return model, optimizer, compressor


def test_a_plain_loop(tiny):
    losses, models, optimizers = [], [], []
    for cut in (True, False):
        model = silenced(tiny)
        optimizer = adamw(model)
        compressor = Compressor(config(), model, optimizer, total_steps=8) if cut else None
        losses.append([])
        reports = []
        for ids in batches():
            losses[-1].append(train_step(model, optimizer, ids))
            if cut:
                reports.append(compressor.step())
        if cut:
            assert [report is not None for report in reports] == [step == 3 for step in range(1, 9)]
            assert (reports[2].step, reports[2].state_size_after) == (3, 4)
            assert compressor.history == [{"status": "cut", "scheduled_step": 3, **reports[2].to_dict()}]
            assert (compressor.global_step, compressor.state_size, compressor.pending) == (8, 4, [])
        models.append(model)
        optimizers.append(optimizer)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    kept, full = [KEPT] * find_mixers(models[0])["backbone.layers.0.mixer"].groups, weights(models[1])
    for name, value in weights(models[0]).items():
        torch.testing.assert_close(value, kept_part(name, full[name], kept), rtol=0, atol=1e-5)


def test_a_loop_with_accelerate(tiny):
    def run(cut: bool) -> tuple[list[float], dict[str, torch.Tensor], list[dict]]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = silenced(tiny)
        model, optimizer = accelerator.prepare(model, adamw(model))
        compressor = Compressor(config(), model, optimizer, total_steps=5, accelerator=accelerator)
        losses, history = [], compressor.history if cut else []
        for ids in batches(0, 10):
            with accelerator.accumulate(model):
                loss = model.train()(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                if cut:
                    compressor.step()
        assert compressor.global_step == (5 if cut else 0)
        compressor.remove()
        return losses, weights(model), history

    ours, theirs = run(True), run(False)
    assert [entry["step"] for entry in ours[2]] == [3]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    kept = ours[2][0]["layers"][0]["kept"]
    for name, value in ours[1].items():
        torch.testing.assert_close(value, kept_part(name, theirs[1][name], kept), rtol=0, atol=1e-5)


def accelerated(tiny, settings: CompreSSMConfig, seed: int):
    """A prepared model, its optimizer and a Compressor that Accelerate saves and loads with them."""
    accelerator = Accelerator(cpu=True)
    model = lively(tiny.build(seed))
    model, optimizer = accelerator.prepare(model, adamw(model))
    compressor = Compressor(settings, model, optimizer, total_steps=8, accelerator=accelerator)
    accelerator.register_for_checkpointing(compressor)
    return accelerator, model, optimizer, compressor


def go_on(model, optimizer, compressor, first: int, last: int) -> None:
    for ids in batches(first, last):
        train_step(model, optimizer, ids)
        compressor.step()


@pytest.mark.parametrize("saved_at", [2, 3, 6], ids=["before the cut", "right after it", "later"])
def test_accelerates_checkpoints(tiny, tmp_path, saved_at):
    accelerator, *whole = accelerated(tiny, config(), seed=0)
    go_on(*whole, 0, saved_at)
    accelerator.save_state(tmp_path)
    go_on(*whole, saved_at, 8)

    accelerator, *resumed = accelerated(tiny, config(), seed=1)
    accelerator.load_state(tmp_path)
    assert resumed[2].global_step == saved_at and resumed[2].state_size == (8 if saved_at == 2 else 4)
    go_on(*resumed, saved_at, 8)
    assert [entry["step"] for entry in resumed[2].history] == [3]
    assert_same_weights(weights(resumed[0]), weights(whole[0]))

    # The other way: the model is small by now, and the checkpoint may be full-size.
    accelerator.load_state(tmp_path)
    go_on(*resumed, saved_at, 8)
    assert_same_weights(weights(resumed[0]), weights(whole[0]))
    parameters = {id(parameter) for group in resumed[1].param_groups for parameter in group["params"]}
    assert parameters == {id(parameter) for parameter in resumed[0].parameters()}


def test_state_dict_is_plain_and_enough(tiny):
    model, _, compressor = seen_once(tiny, schedule=[2, 50])
    assert compressor.step(1) is None and compressor.step(2) is not None
    state = compressor.state_dict()
    assert set(state) == {"history", "global_step", "done_until", "stopped", "recording"}
    other = Compressor(config(schedule=[2, 50]), tiny.build(), total_steps=51)
    other.model.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert (other.pending, other.global_step, other.state_size) == ([50], 2, 6)


def test_the_same_inputs_are_recorded_after_a_resume(tiny):
    # Two batches of 48 tokens are wanted at step 8, so the last four steps are recorded; but batches become shorter.
    lengths = [12] * 5 + [3] * 5

    def train(compressor: Compressor, first: int, last: int) -> None:
        for step in range(first, last + 1):
            compressor.model.train()(tokens(4, lengths[step - 1], seed=step))
            compressor.step(step)

    def start() -> Compressor:
        return Compressor(config(schedule=[8], calibration_tokens=96), lively(tiny.build()), total_steps=10)

    whole = start()
    train(whole, 1, 3)
    state = whole.state_dict()
    train(whole, 4, 10)
    assert [(entry["step"], entry["tokens"]) for entry in whole.history] == [(9, 96)]
    resumed = start()
    resumed.load_state_dict(state | {"history": []})
    train(resumed, 4, 10)
    assert [layer["kept"] for layer in resumed.history[0]["layers"]] == [
        layer["kept"] for layer in whole.history[0]["layers"]
    ]
    assert (resumed.history[0]["step"], resumed.history[0]["tokens"]) == (9, 96)


def test_the_step_may_be_told_or_counted(tiny):
    for told in (True, False):
        model, optimizer, compressor = seen_once(tiny, schedule=[5])
        for number, ids in enumerate(batches(1, 6), start=2):
            train_step(model, optimizer, ids)
            compressor.step(number if told else None)
        # Counting began one step late.
        assert [entry["step"] for entry in compressor.history] == [5]
        assert compressor.global_step == (6 if told else 5)


def test_a_step_that_was_passed_over_is_made_up_for(tiny):
    _, _, compressor = seen_once(tiny, schedule=[3])
    report = compressor.step(7)
    assert report.step == 7 and compressor.history[0]["scheduled_step"] == 3


@pytest.mark.parametrize("by", ["keyword", "position", "embedding"])
def test_inputs_however_they_are_given(tiny, by):
    model = silenced(tiny)
    compressor = Compressor(config(), model, total_steps=8)
    for number, ids in enumerate(batches(0, 4), start=1):
        if by == "keyword":
            model.train()(input_ids=ids)
        elif by == "position":
            model.train()(ids)
        else:
            model.train()(inputs_embeds=model.get_input_embeddings()(ids))
        compressor.step(number)
    (entry,) = compressor.history
    assert (entry["step"], entry["tokens"]) == (3, 48)
    assert all(row == KEPT for layer in entry["layers"] for row in layer["kept"])
    # Nothing to learn from means no loss, but logits all the same.
    assert entry["loss_before"] is None and entry["kl_divergence"] == pytest.approx(0, abs=1e-6)


def test_cut_by_hand_before_any_step(tiny):
    model = tiny.build()
    compressor = Compressor(config(), model, adamw(model), total_steps=8)
    with pytest.raises(ValueError, match="no input has been recorded yet; run at least one training step before"):
        compressor.cut()


@pytest.mark.parametrize("schedule", [[1], [50], [2, 50]])
def test_cut_by_hand(tiny, schedule):
    model, _, compressor = seen_once(tiny, schedule=schedule)
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    report = compressor.cut()
    assert report.state_size_after == model.config.state_size == 4
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert compressor.pending == []


def test_a_failed_cut_changes_nothing(tiny):
    model, optimizer, compressor = seen_once(tiny, pragmatic=True)
    mixer = find_mixers(model)["backbone.layers.1.mixer"]
    mixer.layout.state_axes(mixer.module)[-1].tensor.register_hook(lambda gradient: gradient)
    before = weights(model), moments(model, optimizer), list(model.parameters())
    with pytest.raises(RuntimeError, match=r"layers\.1\.mixer.* has gradient hooks"):
        compressor.cut()
    assert_same_weights(weights(model), before[0])
    for name, state in moments(model, optimizer).items():
        assert_same_weights(state, before[1][name])
    assert all(new is old for new, old in zip(model.parameters(), before[2], strict=True))
    assert model.config.state_size == 8 and compressor.history == [] and not compressor.can_take_back


# The way back.


def test_take_back(tiny):
    model, optimizer, compressor = seen_once(tiny, pragmatic=True)
    before = weights(model), moments(model, optimizer), model.eval()(tokens()).logits
    compressor.cut()
    assert compressor.can_take_back
    for ids in batches(1, 3):
        train_step(model, optimizer, ids)
    optimizer.param_groups[0]["lr"] = 1e-4
    compressor.take_back()
    assert_same_weights(weights(model), before[0])
    for name, state in moments(model, optimizer).items():
        assert_same_weights(state, before[1][name])
    assert torch.equal(model.eval()(tokens()).logits, before[2])
    assert model.config.state_size == compressor.state_size == 8
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert compressor.history[-1]["status"] == "taken back"
    assert compressor.pending == [] and not compressor.can_take_back
    train_step(model, optimizer, tokens(seed=9))
    assert all(not torch.equal(value, before[0][name]) for name, value in weights(model).items())


def test_take_back_before_the_optimizer_has_moments(tiny):
    model = lively(tiny.build())
    optimizer = adamw(model)
    compressor = Compressor(config(pragmatic=True), model, optimizer, total_steps=8)
    before = weights(model)
    model.train()(tokens())
    compressor.cut()
    compressor.take_back()
    assert_same_weights(weights(model), before)
    assert not any(optimizer.state.values())
    train_step(model, optimizer, tokens())


def test_take_back_without_an_optimizer(tiny):
    model = lively(tiny.build())
    compressor = Compressor(config(pragmatic=True), model, total_steps=8)
    before = weights(model)
    model.train()(tokens())
    compressor.cut()
    compressor.take_back()
    assert_same_weights(weights(model), before)


def test_there_must_be_a_cut_to_take_back(tiny):
    message = "there is no cut to take back; set pragmatic=True to keep weights before a cut"
    for pragmatic in (True, False):
        _, _, compressor = seen_once(tiny, pragmatic=pragmatic)
        with pytest.raises(RuntimeError, match=message):
            compressor.take_back()
        compressor.cut()
        assert compressor.can_take_back == pragmatic
        compressor.keep()
        with pytest.raises(RuntimeError, match=message):
            compressor.take_back()
        assert [entry["status"] for entry in compressor.history] == ["cut"]


# The history, carried to another run.


@pytest.mark.parametrize(
    "target, again",
    [
        (4, None),
        (0.5, None),
        (6, None),
        # Less than the earlier run asked for.
        (2, 2),
        (0.25, 2),
    ],
)
def test_a_target_that_an_earlier_run_reached_is_not_asked_for_again(tiny, tmp_path, target, again):
    model, optimizer, compressor = seen_once(tiny)
    compressor.cut()
    write_record(compressor.history, tmp_path)
    compressor.remove()
    following = Compressor(
        config(schedule=[1], state_size=target), model, optimizer, total_steps=4, history=read_record(tmp_path)
    )
    assert following.pending == ([] if again is None else [1])
    train_step(model, optimizer, tokens())
    report = following.step()
    assert (report and report.state_size_after) == again
    assert model.config.state_size == (again or 4)
    assert len(following.history) == (1 if again is None else 2)


def test_without_the_history_a_reached_target_is_refused(tiny):
    model, optimizer, compressor = seen_once(tiny)
    compressor.cut()
    compressor.remove()
    with pytest.raises(ValueError, match="target state_size 4 is not below the current 4"):
        Compressor(config(), model, optimizer, total_steps=8)


def test_weights_from_before_a_cut_undo_it(tiny):
    model, _, compressor = seen_once(tiny)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressor.cut()
    model.load_state_dict(before)
    compressor.follow_loaded_weights()
    assert compressor.history[0]["status"] == "undone by loading"
    assert compressor.state_size == model.config.state_size == 8


def test_remove_leaves_the_model_as_it_was(tiny):
    model = tiny.build()
    before = hooks(model)
    compressor = Compressor(config(), model, total_steps=8)
    assert sum(hooks(model)) == sum(before) + 1 + len(find_mixers(model))
    compressor.remove()
    assert hooks(model) == before


def test_remove_after_a_cut_still_loads_both_sizes(tiny):
    model, optimizer, compressor = seen_once(tiny)
    full = {name: value.clone() for name, value in model.state_dict().items()}
    compressor.cut()
    compressor.remove()
    assert not model._forward_pre_hooks
    model.load_state_dict(full)
    assert model.config.state_size == 8
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert parameters == {id(parameter) for parameter in model.parameters()}


# What is wanted, and what is refused.


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"state_size": 4}, 4096),
        ({"state_size": 4, "calibration_tokens": 7}, 7),
        ({"tolerance": 0.1}, 4096),
    ],
)
def test_wanted_tokens(tiny, options, wanted):
    assert Compressor(CompreSSMConfig(**options), tiny.build(), total_steps=10).wanted_tokens == wanted


@pytest.mark.parametrize(
    ("options", "wanted"), [({"state_size": 48}, 2 * 48 * 64), ({"state_size": 0.75}, 2 * 48 * 64)]
)
def test_a_large_state_wants_more_tokens(options, wanted):
    model = TINY["mamba"].build(state_size=64)
    assert Compressor(CompreSSMConfig(**options), model, total_steps=10).wanted_tokens == wanted


def test_smaller_weights_want_fewer_tokens():
    tiny = TINY["mamba"]
    compressor = Compressor(CompreSSMConfig(state_size=48), tiny.build(state_size=64), total_steps=10)
    assert compressor.recorder.wanted_tokens == 2 * 48 * 64
    compressor.model.load_state_dict(tiny.build(state_size=56).state_dict())
    compressor.follow_loaded_weights()
    assert compressor.recorder.wanted_tokens == compressor.wanted_tokens == 2 * 48 * 56


class Strange(torch.optim.SGD):
    """Keeps a state that nobody knows how to cut."""

    def step(self, closure=None):
        for parameter in itertools.chain(*(group["params"] for group in self.param_groups)):
            self.state[parameter]["curvature"] = torch.ones(3)
        return super().step(closure)


def test_an_optimizer_that_cannot_be_carried_is_refused_at_the_first_step(tiny):
    model = tiny.build()
    optimizer = Strange(model.parameters(), lr=0.1)
    compressor = Compressor(config(schedule=[50]), model, optimizer, total_steps=100)
    train_step(model, optimizer, tokens())
    with pytest.raises(TypeError, match="Strange cannot be carried through a cut: its state 'curvature'"):
        compressor.step()
    assert compressor.global_step == 1


def test_other_parameters_in_the_optimizer_are_no_concern(tiny):
    model, temperature = lively(tiny.build()), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([*model.parameters(), temperature], lr=5e-3)
    compressor = Compressor(config(pragmatic=True), model, optimizer, total_steps=8)
    for ids in batches(0, 4):
        (model.train()(input_ids=ids, labels=ids).loss * temperature.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
    assert model.config.state_size == 4 and not torch.equal(temperature, torch.ones(3))
    compressor.take_back()
    assert model.config.state_size == 8


def test_an_optimizer_of_another_model_is_warned_of(tiny, caplog):
    Compressor(config(), tiny.build(), adamw(tiny.build()), total_steps=8)
    assert any("the optimizer does not update it" in record.message for record in caplog.records)


# Projected cuts of Mamba-2.

MAMBA2 = TINY["mamba2"]
PROJECTIONS = ("B_projection", "C_projection")


def projected_once(**options) -> tuple[nn.Module, torch.optim.Optimizer, Compressor]:
    return seen_once(MAMBA2, **({"realization": "projected"} | options))


def sizes(model: nn.Module) -> list[int]:
    return [mixer.state_size for mixer in find_mixers(model).values()]


def held_in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer holds exactly the model's parameters, as one that was built now would."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [id(parameter) for parameter in held] == [id(parameter) for parameter in model.parameters()]


def test_a_projected_cut_in_a_plain_loop():
    """Half of the states do nothing: the projection that leaves them out changes nothing, and then it learns."""
    losses, models = [], []
    for settings in (None, config(realization="projected")):
        model = silenced(MAMBA2)
        optimizer = adamw(model)
        compressor = settings and Compressor(settings, model, optimizer, total_steps=8)
        losses.append([])
        for ids in batches():
            losses[-1].append(train_step(model, optimizer, ids))
            if compressor and (report := compressor.step()) is not None:
                assert (report.step, report.state_size_before, report.state_size_after) == (3, 8, 4)
                assert report.relative_error < 1e-3 and report.kl_divergence == pytest.approx(0, abs=1e-6)
                assert compressor.history == [{"status": "cut", "scheduled_step": 3, **report.to_dict()}]
                start = weights(model)
        models.append(model)
    assert losses[1][:4] == pytest.approx(losses[0][:4], rel=1e-5) and losses[1][4:] != losses[0][4:]
    assert held_in_order(model, optimizer) and compressor.pending == []
    for name, value in weights(model).items():
        assert not name.endswith(PROJECTIONS) or not torch.equal(value, start[name])


@pytest.mark.parametrize("saved_at", [2, 3, 4, 6], ids=["before the cuts", "right after one", "between", "later"])
@pytest.mark.parametrize("target", [3, [3, 8]], ids=["one size", "a size for each layer"])
def test_accelerates_checkpoints_of_a_projected_run(tmp_path, saved_at, target):
    settings = config(realization="projected", state_size=target, schedule=[3, 5])
    accelerator, *whole = accelerated(MAMBA2, settings, seed=0)
    go_on(*whole, 0, saved_at)
    accelerator.save_state(tmp_path)
    go_on(*whole, saved_at, 8)
    assert [entry["step"] for entry in whole[2].history] == [3, 5]

    accelerator, *resumed = accelerated(MAMBA2, settings, seed=1)
    # The second time, the model is projected by now, and the checkpoint may be stock, or of other sizes.
    for _ in range(2):
        accelerator.load_state(tmp_path)
        assert resumed[2].global_step == saved_at
        assert held_in_order(resumed[0], resumed[1])
        go_on(*resumed, saved_at, 8)
        assert [entry["step"] for entry in resumed[2].history] == [3, 5]
        assert sizes(resumed[0]) == ([3, 3] if target == 3 else target)
        assert_same_weights(weights(resumed[0]), weights(whole[0]))
        ours, theirs = (moments(run[0], run[1]) for run in (resumed, whole))
        assert ours.keys() == theirs.keys()
        for name, state in theirs.items():
            assert_same_weights(ours[name], state)
        assert held_in_order(resumed[0], resumed[1])


@pytest.mark.parametrize("first", [None, {"realization": "projected", "state_size": [6, 8]}, {"state_size": 6}])
def test_take_back_a_projected_cut(first):
    model, optimizer, compressor = seen_once(MAMBA2, **(first or {"state_size": 6}))
    if first is not None:
        compressor.cut()
        train_step(model, optimizer, next(batches(1, 2)))
    compressor.remove()
    settings = config(pragmatic=True, realization="projected", state_size=3, schedule=[5])
    compressor = Compressor(settings, model, optimizer, total_steps=51)
    train_step(model, optimizer, next(batches(2, 3)))
    before = weights(model), moments(model, optimizer), model.eval()(tokens()).logits, sizes(model), type(model)
    described = model.config.to_dict()
    compressor.cut()
    assert sum(sizes(model)) == 6 and held_in_order(model, optimizer)
    for ids in batches(3, 5):
        train_step(model, optimizer, ids)
    compressor.take_back()
    assert_same_weights(weights(model), before[0])
    carried = moments(model, optimizer)
    assert carried.keys() == before[1].keys()
    for name, state in carried.items():
        assert_same_weights(state, before[1][name])
    assert torch.equal(model.eval()(tokens()).logits, before[2])
    assert (sizes(model), type(model), model.config.to_dict()) == (before[3], before[4], described)
    assert held_in_order(model, optimizer) and compressor.history[-1]["status"] == "taken back"
    train_step(model, optimizer, tokens(seed=9))
    assert all(not torch.equal(value, before[0][name]) for name, value in weights(model).items())


@pytest.mark.parametrize("target", [4, [3, 8]], ids=["one size", "one layer stays"])
def test_weights_from_before_a_projected_cut_undo_it(target):
    model, optimizer, compressor = projected_once(state_size=target)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressor.cut()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    compressor.follow_loaded_weights()
    assert compressor.history[0]["status"] == "cut"
    model.load_state_dict(before)
    compressor.follow_loaded_weights()
    assert compressor.history[0]["status"] == "undone by loading"
    assert sizes(model) == [8, 8] and compressor.state_size == 8
    assert type(model) is MAMBA2.language_model and held_in_order(model, optimizer)
    train_step(model, optimizer, tokens())
    # And forth again: the optimizer trains the projections.
    model.load_state_dict(after)
    assert held_in_order(model, optimizer)
    train_step(model, optimizer, tokens())
    for name, value in weights(model).items():
        assert not name.endswith(PROJECTIONS) or not torch.equal(value, after[name])


def test_a_failed_projected_cut_changes_nothing():
    model, optimizer, compressor = projected_once(pragmatic=True)
    compressor.cut()
    compressor.keep()
    train_step(model, optimizer, tokens())
    model.backbone.layers[1].mixer.C_projection.register_hook(lambda gradient: gradient)
    following = Compressor(
        config(realization="projected", state_size=2, schedule=[5]), model, optimizer, total_steps=51
    )
    train_step(model, optimizer, tokens())
    before = weights(model), moments(model, optimizer), list(model.parameters())
    with pytest.raises(RuntimeError, match=r"layers\.1\.mixer: C_projection has gradient hooks"):
        following.cut()
    assert_same_weights(weights(model), before[0])
    for name, state in moments(model, optimizer).items():
        assert_same_weights(state, before[1][name])
    assert all(new is old for new, old in zip(model.parameters(), before[2], strict=True))
    assert sizes(model) == [4, 4] and following.history == []


@pytest.mark.parametrize(
    "options, again",
    [
        ({"state_size": [3, 8]}, None),
        ({"state_size": [2, 8]}, [2, 8]),
        ({"state_size": 8}, None),
        ({"state_bytes": 11 * 128}, None),
        ({"state_bytes": 10 * 128}, 10),
    ],
)
def test_a_projected_target_that_an_earlier_run_reached_is_not_asked_for_again(tmp_path, options, again):
    model, optimizer, compressor = projected_once(state_size=[3, 8])
    compressor.cut()
    write_record(compressor.history, tmp_path)
    compressor.remove()
    following = Compressor(
        config(schedule=[1], realization="projected", **options),
        model,
        optimizer,
        total_steps=4,
        history=read_record(tmp_path),
    )
    assert following.pending == ([] if again is None else [1])
    train_step(model, optimizer, tokens())
    assert (following.step() is None) == (again is None)
    assert again in (None, sizes(model), sum(sizes(model)))
    assert len(following.history) == (1 if again is None else 2)


@pytest.mark.parametrize(
    "present, target, steps, expected",
    [(40, 10, [1, 2], [32, 16]), (20, 10, [1, 2], [16]), (64, 10, [1, 2, 3], [32, 16])],
)
def test_several_cuts_in_sizes_of_the_kernels(present, target, steps, expected):
    model = lively(MAMBA2.build(state_size=present, num_hidden_layers=1))
    settings = config(realization="projected", state_size=target, multiple_of="kernel", schedule=steps)
    compressor, found = Compressor(settings, model, total_steps=8), []
    for ids in batches(0, 4):
        model.train()(input_ids=ids, labels=ids)
        report = compressor.step()
        found += [] if report is None else [report.state_size_after]
    assert found == expected


@pytest.mark.parametrize(
    "options, wanted", [({"state_size": [3, 40]}, 2 * 40 * 64), ({"state_bytes": 99 * 128}, 4096)]
)
def test_wanted_tokens_of_projected_cuts(options, wanted):
    model = MAMBA2.build(state_size=64)
    settings = CompreSSMConfig(realization="projected", **options)
    assert Compressor(settings, model, total_steps=10).wanted_tokens == wanted


def test_projections_that_the_optimizer_does_not_hold_are_warned_of(caplog):
    """An optimizer that was built before the model was cut by hand."""
    model, _, compressor = projected_once()
    compressor.cut()
    compressor.remove()
    stale = torch.optim.AdamW([p for name, p in model.named_parameters() if not name.endswith(PROJECTIONS)])
    Compressor(config(realization="projected", state_size=2), model, stale, total_steps=8)
    messages = [record.message for record in caplog.records if "the optimizer does not update it" in record.message]
    assert len(messages) == 4 and "B_projection" in messages[0]
