"""When to cut."""

from __future__ import annotations

import pytest

from hf_compressm.schedule import cut_steps


@pytest.mark.parametrize(
    ("schedule", "total", "warmup", "steps"),
    [
        ("one_cut", 1000, 0, [200]),
        ("one_cut", 1000, 100, [200]),
        ("one_cut", 1000, 300, [300]),
        ("one_cut", 7, 0, [1]),
        ("one_cut", 2, 0, [1]),
        ("compressm", 1000, 0, [25, 50, 75, 100]),
        ("compressm", 1000, 500, [25, 50, 75, 100]),
        ("compressm", 20, 0, [1, 2]),
        ([10], 1000, 0, [10]),
        ([30, 10, 0.02, 0.5], 1000, 0, [10, 20, 30, 500]),
        ([10, 0.01], 1000, 0, [10]),
        ([0.0001], 1000, 0, [1]),
    ],
)
def test_steps(schedule, total, warmup, steps):
    assert cut_steps(schedule, total, warmup) == steps


@pytest.mark.parametrize(("schedule", "total"), [([1000], 1000), ([2000, 3000], 1000), ("one_cut", 1), ([0.9], 2)])
def test_a_schedule_without_a_cut_is_an_error(schedule, total):
    with pytest.raises(ValueError, match=r"no cut would be made: schedule .* means steps"):
        cut_steps(schedule, total)


def test_a_warm_up_as_long_as_training_is_an_error():
    with pytest.raises(ValueError, match=r"means steps \[100\] of 100"):
        cut_steps("one_cut", 100, warmup_steps=100)


def test_cuts_beyond_the_end_are_announced(caplog):
    assert cut_steps([10, 200], 100) == [10]
    assert "cuts at steps [200] lie beyond the last of the 100 steps" in caplog.text


def test_cuts_in_warm_up_are_announced(caplog):
    assert cut_steps([10], 100, warmup_steps=20) == [10]
    assert "the cut at step 10 falls into learning-rate warm-up (20 steps)" in caplog.text


@pytest.mark.parametrize("schedule", ["one_cut", "compressm", [30]])
def test_nothing_to_announce(schedule, caplog):
    cut_steps(schedule, 100, warmup_steps=20)
    assert caplog.text == ""
