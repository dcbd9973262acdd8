"""Every knob of a cut, in one dataclass that reads and writes JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .files import write_file

logger = logging.get_logger(__name__)

SCHEDULES = ("one_cut", "compressm")
REALIZATIONS = ("stock", "projected", "auto")
# The rules for the number of states; exactly one is set.
RULES = ("state_size", "tolerance", "hankel_tolerance", "state_bytes")
# A value of multiple_of: the sizes that Mamba's kernels compute with.
KERNEL_SIZES = "kernel"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(kw_only=True)
class CompreSSMConfig:
    """What to cut, when, and how.

    Exactly one of `state_size`, `tolerance`, `hankel_tolerance` and `state_bytes` says how many states are kept.

    Raises:
        ValueError: a value out of range, or not exactly one rule for the number of states.
        TypeError: a value of the wrong type.

    Example:
        >>> CompreSSMConfig(state_size=12).criterion
        'auto'
        >>> CompreSSMConfig(tolerance=0.02, multiple_of=4).to_dict()["multiple_of"]
        4
    """

    state_size: int | float | list[int] | None = _option(
        None,
        "States to keep: a number (12), or a fraction of the present number (0.1). Stock layers keep so many each; "
        "projected ones so many on average, shared out so that the sum of the layers' squared errors is the least. A "
        "list has a number for each mixer, in the model's order (projected layers only).",
    )
    tolerance: float | None = _option(
        None, "Keep the fewest states for which no layer's measured relative output error exceeds this (0.02 = 2 %)."
    )
    hankel_tolerance: float | None = _option(
        None, "CompreSSM's rule: keep the fewest states that hold the share 1 - tau of the sum of the Hankel values."
    )
    state_bytes: int | None = _option(
        None,
        "Bytes that the recurrent state of one sequence may take in all projected layers together (caches hold it in "
        "float32); shared out so that the sum of the layers' squared errors is the least.",
    )
    realization: str = _option(
        "auto",
        "What the smaller model is: `stock` (an ordinary Transformers model: states are selected), `projected` "
        "(Mamba-2 layouts only: two more matrices per mixer, nearly lossless, an own model class), or `auto` (stock "
        "where its expected error is small, nothing else is possible, or a criterion is named; else projected).",
    )
    projection_rounds: int = _option(
        3, "How often the two matrices of a projection take turns in being fitted; 0 keeps the balanced truncation."
    )
    criterion: str = _option(
        "auto",
        "How states are ranked; auto is `refit` for Mamba-1 and `ghost` for Mamba-2. See hf_compressm.criteria.",
    )
    refit: bool = _option(
        True, "Refit the readout C and the drive B of the kept states in closed form (Mamba-1 layouts only)."
    )
    refit_steps: int = _option(10, "Conjugate-gradient steps of each fit; 0 keeps the mean-field start.")
    refit_rounds: int = _option(
        2, "How often drive and readout take turns in being fitted after the first fit of the readout; 0 fits C alone."
    )
    refit_penalty: float = _option(0.001, "Weight lambda that draws the refit towards its mean-field start.")
    calibration_tokens: int | None = _option(
        None, "Tokens, over all processes, that a cut is measured on. None: max(4096, 2 r N)."
    )
    schedule: str | list[int | float] = _option(
        "one_cut",
        "When to cut: `one_cut` (at a fifth of training, never during warm-up), `compressm` (four attempts in the "
        "first tenth, as published), or a list of steps (int) and fractions of training (float).",
    )
    multiple_of: int | str = _option(
        1,
        "Round the number of kept states up to a multiple of this; `kernel`: up to 16, 32, 64, ..., as Mamba's "
        "Triton kernels pad it anyway.",
    )
    max_kept_fraction: float = _option(
        0.95, "A rule that measures (tolerance, hankel_tolerance) cuts only if it keeps less than this share of N."
    )
    on_non_finite: str = _option("skip", "What to do about non-finite statistics or parameters: `skip` or `raise`.")
    pragmatic: bool = _option(False, "Evaluate some steps after a cut, and take the cut back if the metric fell.")
    pragmatic_steps: int = _option(50, "Training steps between a cut and its evaluation.")
    pragmatic_metric: str | None = _option(None, "The metric; None: metric_for_best_model, or eval_loss.")
    pragmatic_tolerance: float = _option(
        0.02, "How much worse the metric may be, relative to its value before the cut."
    )
    seed: int = _option(0, "Seed of the `random` criterion.")

    def __post_init__(self) -> None:
        from .criteria import CRITERIA

        rules = {name: getattr(self, name) for name in RULES}
        given = [name for name, value in rules.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of {', '.join(RULES)}; got {given or 'none of them'}")
        self._check_state_size()
        for name in ("tolerance", "hankel_tolerance"):
            if rules[name] is not None:
                self._check_number(name, low=0, high=1, open_low=True)
        self._check_number("refit_penalty", low=0)
        self._check_number("pragmatic_tolerance", low=0)
        self._check_number("max_kept_fraction", low=0, high=1, open_low=True, closed_high=True)
        for name, low in (
            ("refit_steps", 0),
            ("refit_rounds", 0),
            ("projection_rounds", 0),
            ("pragmatic_steps", 1),
            ("seed", 0),
        ):
            self._check_whole(name, low)
        if self.multiple_of != KERNEL_SIZES:
            if isinstance(self.multiple_of, str):
                raise ValueError(f"multiple_of must be a whole number or {KERNEL_SIZES!r}, got {self.multiple_of!r}")
            self._check_whole("multiple_of", 1)
        for name in ("calibration_tokens", "state_bytes"):
            if getattr(self, name) is not None:
                self._check_whole(name, 1)
        if self.realization not in REALIZATIONS:
            raise ValueError(f"realization must be one of {', '.join(REALIZATIONS)}, got {self.realization!r}")
        if self.realization == "stock" and (self.state_bytes is not None or isinstance(self.state_size, list)):
            rule = "state_bytes" if self.state_bytes is not None else "a list of state sizes"
            raise ValueError(
                f"{rule} gives each layer a state size of its own, but a stock config holds one for all layers; set "
                "realization='projected' (Mamba-2 layouts), or one state_size"
            )
        if isinstance(self.state_size, list) and self.multiple_of != 1:
            raise ValueError(
                f"multiple_of is {self.multiple_of!r}, but a list of state sizes is taken as it is; round its numbers "
                "yourself"
            )
        for name in ("refit", "pragmatic"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.criterion != "auto" and self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}; choose auto or one of {', '.join(CRITERIA)}")
        if self.on_non_finite not in ("skip", "raise"):
            raise ValueError(f"on_non_finite must be 'skip' or 'raise', got {self.on_non_finite!r}")
        self._check_schedule()

    def _check_state_size(self) -> None:
        size = self.state_size
        if size is None or (is_whole(size) and size >= 1) or (isinstance(size, float) and 0 < size < 1):
            return
        if isinstance(size, (list, tuple)):
            self.state_size = list(size)
            if size and all(is_whole(item) and item >= 1 for item in size):
                return
            raise ValueError(f"state_size must list an int of at least 1 for each mixer, got {size!r}")
        if isinstance(size, (int, float)) and not isinstance(size, bool):
            raise ValueError(f"state_size must be an int of at least 1 or a float between 0 and 1, got {size!r}")
        raise TypeError(f"state_size must be an int or a float, got {size!r} ({type(size).__name__})")

    def _check_number(
        self, name: str, low: float, high: float | None = None, open_low: bool = False, closed_high: bool = False
    ) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
        above = value > low if open_low else value >= low
        below = high is None or (value <= high if closed_high else value < high)
        if not (above and below):
            upper = "" if high is None else f" and {'at most' if closed_high else 'below'} {high}"
            raise ValueError(f"{name} must be {'above' if open_low else 'at least'} {low}{upper}, got {value!r}")

    def _check_whole(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not is_whole(value):
            raise TypeError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})")
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, str):
            if self.schedule not in SCHEDULES:
                raise ValueError(
                    f"unknown schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}, or a list"
                )
            return
        if not isinstance(self.schedule, (list, tuple)) or not self.schedule:
            raise TypeError(f"schedule must be a name or a non-empty list of steps, got {self.schedule!r}")
        self.schedule = list(self.schedule)
        for moment in self.schedule:
            step = is_whole(moment) and moment >= 1
            if not step and not (isinstance(moment, float) and 0 < moment < 1):
                raise ValueError(f"schedule: {moment!r} is neither a step (int >= 1) nor a fraction between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompreSSMConfig:
        """Build a config from a dictionary; keys that this version does not know are dropped with a warning."""
        known = {option.name for option in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            logger.warning(f"CompreSSMConfig: ignoring unknown keys {unknown} (written by a newer version?)")
        return cls(**{name: value for name, value in values.items() if name in known})

    def save(self, path: str | Path) -> None:
        """Write the config as a JSON file."""
        write_file(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CompreSSMConfig:
        """Read a config written by `save`."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} does not hold a config: expected an object, got {type(values).__name__}")
        return cls.from_dict(values)


def chosen(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config's dictionary is not the default.

    Example:
        >>> chosen(CompreSSMConfig(state_size=12, realization="stock").to_dict())
        {'state_size': 12, 'realization': 'stock'}
    """
    usual = {option.name: option.default for option in dataclasses.fields(CompreSSMConfig)}
    return {name: value for name, value in config.items() if name not in usual or value != usual[name]}
