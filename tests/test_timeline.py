"""What is noted of a training: times between logs, and nothing of what interrupts it."""

from __future__ import annotations

import pytest

from hf_compressm import timeline
from hf_compressm.timeline import Timeline


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    now = [100.0]
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def steps(line: Timeline, clock, number: int, seconds: float) -> None:
    for _ in range(number):
        line.step_begins()
        clock(seconds)
        line.step_ends()


def test_the_mean_step_between_two_logs(clock):
    line = Timeline()
    steps(line, clock, 4, 0.5)
    # A GPU is waited for when the loss is read.
    clock(1.0)
    line.add(4, 8, loss=2.0)
    clock(7.0)
    steps(line, clock, 2, 0.25)
    line.add(6, 8, loss=1.0)
    assert [entry["step_seconds"] for entry in line.entries] == [0.75, 0.25]
    assert [tuple(entry.values())[:3] for entry in line.entries] == [(4, 8, 2.0), (6, 8, 1.0)]
    assert all(entry["memory_bytes"] > 2**20 for entry in line.entries)


def test_a_cut_ends_the_time_of_the_larger_model(clock):
    line = Timeline()
    steps(line, clock, 3, 1.0)
    line.before_cut(3, 8)
    clock(50.0)
    line.add(3, 4, loss=1.0)
    steps(line, clock, 2, 0.5)
    line.add(5, 4, loss=0.5)
    steps_of = [(entry["state_size"], entry.get("step_seconds")) for entry in line.entries]
    assert steps_of == [(8, 1.0), (4, None), (4, 0.5)]


def test_what_interrupts_counts_for_nothing(clock):
    line = Timeline()
    steps(line, clock, 1, 1.0)
    line.interrupt()
    clock(30.0)
    steps(line, clock, 1, 1.0)
    line.add(2, 8, loss=1.0)
    assert line.entries[0]["step_seconds"] == 1.0


def test_a_long_run_keeps_every_other_entry():
    line = Timeline()
    for step in range(timeline.MOST_ENTRIES + 1):
        line.add(step, 8, loss=0.0)
    assert len(line.entries) == timeline.MOST_ENTRIES // 2 + 1
    assert [entry["step"] for entry in line.entries[:3]] == [0, 2, 4]
