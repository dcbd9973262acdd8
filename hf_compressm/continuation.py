"""The way round engines that cannot be cut while they train: cut a checkpoint, and say how to go on from it."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from transformers.utils import logging

from .files import write_file
from .plan import CompressionPlan
from .reshape import reshape_checkpoint

logger = logging.get_logger(__name__)

CONTINUE_FILE = "compressm_continue.json"
RESUME_OPTION = "--resume_from_checkpoint"


@dataclass(frozen=True)
class Continuation:
    """How to go on after a checkpoint was cut.

    Attributes:
        checkpoint: the checkpoint of the smaller model.
        command: what goes on from it: the command of this run with the checkpoint as its last option.
    """

    checkpoint: str
    command: list[str]

    @classmethod
    def read(cls, directory: str | Path) -> Continuation | None:
        """What `cut_checkpoint` wrote into a directory, or None."""
        file = Path(directory) / CONTINUE_FILE
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def cut_checkpoint(
    checkpoint: str | Path, plan: CompressionPlan, directory: str | Path, resume_option: str = RESUME_OPTION
) -> Continuation:
    """Cut a checkpoint that was just saved, and write and print the command that goes on. Call it in one process.

    Args:
        checkpoint: a directory that the Trainer or `accelerator.save_state` wrote; it stays as it is.
        plan: what to cut.
        directory: of the run; `compressm_continue.json` is written there, and the smaller checkpoint beside the other,
            as `cut-` and its name.
        resume_option: the script's option that names a checkpoint.

    Raises:
        What `reshape_checkpoint` raises. The plan then lies in the directory, to try again with.
    """
    checkpoint = Path(checkpoint).absolute()
    smaller = checkpoint.with_name(f"cut-{checkpoint.name}")
    plan.save(Path(directory) / f"{checkpoint.name}-plan.json")
    reshape_checkpoint(checkpoint, plan, smaller)
    command = going_on(command_of_this_run(), resume_option, str(smaller))
    continuation = Continuation(str(smaller), command)
    write_file(Path(directory) / CONTINUE_FILE, json.dumps(asdict(continuation), indent=1) + "\n")
    sizes = sorted({(layer.state_size_before, layer.state_size_after) for layer in plan.changes.values()})
    change = ", ".join(f"{before} -> {after}" for before, after in sizes)
    print(
        f"\nCompreSSM: the checkpoint {checkpoint} was cut, state size {change}. This run ends here. To go on with "
        f"the smaller model, build it from the config in {smaller} and load that checkpoint:\n\n"
        f"  {shlex.join(command)}\n\n({Path(directory) / CONTINUE_FILE} has this command, too)",
        flush=True,
    )
    return continuation


def going_on(command: list[str], option: str, checkpoint: str) -> list[str]:
    """A command with an option that names the checkpoint to go on from; an earlier one is taken out.

    Example:
        >>> going_on(["python", "train.py", "--resume", "old", "--steps", "9"], "--resume", "new")
        ['python', 'train.py', '--steps', '9', '--resume', 'new']
    """
    kept, words = [], iter(command)
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return [*kept, option, checkpoint]


def command_of_this_run() -> list[str]:
    """The command that started this process: that of the launcher, if one did."""
    own = [sys.executable, *sys.argv]
    names = {sys.argv[0], str(Path(sys.argv[0]).absolute())}
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:
            break
        # A shell has the whole command in one word.
        if not names.intersection(words):
            break
        own = words
    return own
