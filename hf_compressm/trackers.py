"""A cut in the trackers that a Trainer reports to: a note with what was cut, and the spectrum as a picture.

The numbers of a cut reach every tracker by the Trainer's own log. A note and a picture do not: its `log` takes numbers
only, and each tracker has calls of its own for them.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from .distributed.processes import all_processes
from .plots import draw_spectrum, figure_pixels
from .report import CompressionReport

if TYPE_CHECKING:
    import numpy as np

logger = logging.get_logger(__name__)

# Their places in a tracker, in a section of their own.
NOTE, SPECTRUM = "compressm/cut", "compressm/spectrum"
# What the Trainer's own callbacks call the training step.
GLOBAL_STEP = "train/global_step"


def note_cut(
    callbacks: Iterable[TrainerCallback], report: CompressionReport, cut: Mapping[str, Any], step: int
) -> None:
    """Write a cut into TensorBoard, Weights & Biases and Trackio, where the Trainer reports to them.

    Only the main process writes. A tracker that fails costs a warning, never the training.

    Args:
        callbacks: the Trainer's (`trainer.callback_handler.callbacks`).
        report: of the cut.
        cut: its entry in the history.
        step: the training step.
    """
    writers = [
        (callback, write) for callback in callbacks for kind, write in WRITERS.items() if isinstance(callback, kind)
    ]
    if not writers or not all_processes().is_main:
        return
    try:
        picture = figure_pixels(draw_spectrum(cut))
    except Exception as error:
        _warn("The picture of the spectrum", error)
        return
    for callback, write in writers:
        try:
            write(callback, str(report), picture, step)
        except Exception as error:
            _warn(type(callback).__name__.removesuffix("Callback"), error)


def _warn(name: str, error: Exception) -> None:
    # Not the error's own words: a tracker's may hold an address with a token in it.
    logger.warning_once(
        f"{name} failed ({type(error).__name__}): the note of the cut, or its picture, is missing there. The cut's "
        "numbers and the training are not concerned"
    )


def _to_tensorboard(callback: TensorBoardCallback, text: str, picture: np.ndarray, step: int) -> None:
    writer = callback.tb_writer
    writer.add_text(NOTE, _as_markdown(text, step), step)
    writer.add_image(SPECTRUM, picture, step, dataformats="HWC")
    writer.flush()


def _to_wandb(callback: WandbCallback, text: str, picture: np.ndarray, step: int) -> None:
    wandb = callback._wandb
    note = f"<p>{_title(step)}</p><pre>{html.escape(text)}</pre>"
    content = {NOTE: wandb.Html(note), SPECTRUM: wandb.Image(picture, caption=_title(step))}
    wandb.log(content | {GLOBAL_STEP: step})


def _to_trackio(callback: TrackioCallback, text: str, picture: np.ndarray, step: int) -> None:
    trackio = callback._trackio
    content = {
        NOTE: trackio.Markdown(_as_markdown(text, step)),
        SPECTRUM: trackio.Image(picture, caption=_title(step)),
    }
    trackio.log(content | {GLOBAL_STEP: step})


WRITERS: dict[type[TrainerCallback], Callable[[Any, str, Any, int], None]] = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: _to_wandb,
    TrackioCallback: _to_trackio,
}


def _title(step: int) -> str:
    return f"Cut after step {step:,}"


def _as_markdown(text: str, step: int) -> str:
    return f"{_title(step)}\n\n{textwrap.indent(text, '    ')}"
