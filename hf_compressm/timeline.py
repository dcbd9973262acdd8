"""Loss, step time and memory over a training, for the record."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch

# Beyond this many, every other entry is dropped.
MOST_ENTRIES = 1000


class Timeline:
    """Gathers an entry of a record's `timeline` each time that a Trainer logs a loss.

    Time is taken between logs, not step by step: a GPU runs behind the program, and only a log waits for it.
    Evaluation, saving and cuts between two logs make their step time unknown, not wrong.

    Args:
        entries: as in `Record.timeline`; new ones are added to this list.
    """

    def __init__(self, entries: list[dict[str, Any]] | None = None) -> None:
        self.entries = [] if entries is None else entries
        self._start: float | None = None
        self._steps = 0

    def step_begins(self) -> None:
        if self._start is None:
            self._start, self._steps = time.perf_counter(), 0

    def step_ends(self) -> None:
        self._steps += 1

    def interrupt(self) -> None:
        """Something else than training follows: the time since the last entry counts for nothing."""
        self._start = None

    def add(self, step: int, state_size: int, loss: float | None = None) -> None:
        """Note how training went since the last entry, or since it was interrupted.

        Args:
            step: optimizer steps made.
            state_size: N in them.
            loss: mean loss since the last one, if there is one.
        """
        entry: dict[str, Any] = {"step": step, "state_size": state_size}
        if loss is not None:
            entry["loss"] = loss
        if self._start is not None and self._steps:
            entry["step_seconds"] = (time.perf_counter() - self._start) / self._steps
        on_gpu = torch.cuda.is_available()
        entry["memory_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        self.entries.append(entry)
        if len(self.entries) > MOST_ENTRIES:
            self.entries[:] = self.entries[::2]
        self.interrupt()

    def before_cut(self, step: int, state_size: int) -> None:
        """Close the time before a cut, and let the peak of memory be that of the training after it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._start is not None and self._steps:
            self.add(step, state_size)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
