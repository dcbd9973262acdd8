"""When to cut."""

from __future__ import annotations

from transformers.utils import logging

from .config import is_whole
from .distributed.processes import warn

logger = logging.get_logger(__name__)

# One cut beats several small ones, and none may fall into learning-rate warm-up.
DEFAULT_FRACTION = 0.2
# CompreSSM (arXiv 2510.02823, section 5): four attempts, evenly spaced in the first tenth of training.
PUBLISHED_FRACTIONS = (0.025, 0.05, 0.075, 0.1)


def cut_steps(schedule: str | list[int | float], total_steps: int, warmup_steps: int = 0) -> list[int]:
    """The training steps after which cuts are due, in rising order.

    Args:
        schedule: `one_cut`, `compressm`, or a list of steps and fractions, as in CompreSSMConfig.
        total_steps: optimizer steps of the whole training.
        warmup_steps: steps of learning-rate warm-up; `one_cut` waits for their end.

    Raises:
        ValueError: no cut would be made before training ends.

    Example:
        >>> cut_steps("one_cut", 1000, warmup_steps=300), cut_steps([50, 0.5], 1000)
        ([300], [50, 500])
    """
    if schedule == "one_cut":
        moments: list[int | float] = [max(DEFAULT_FRACTION, warmup_steps / max(total_steps, 1))]
    elif schedule == "compressm":
        moments = list(PUBLISHED_FRACTIONS)
    else:
        moments = list(schedule)
    steps = sorted({moment if is_whole(moment) else max(1, round(moment * total_steps)) for moment in moments})
    reached = [step for step in steps if step < total_steps]
    if not reached:
        raise ValueError(f"no cut would be made: schedule {schedule!r} means steps {steps} of {total_steps}")
    if len(reached) < len(steps):
        warn(logger, f"cuts at steps {steps[len(reached) :]} lie beyond the last of the {total_steps} steps")
    if schedule != "compressm" and reached[0] < warmup_steps:
        warn(logger, f"the cut at step {reached[0]} falls into learning-rate warm-up ({warmup_steps} steps)")
    return reached
