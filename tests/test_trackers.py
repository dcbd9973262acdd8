"""A cut in TensorBoard, Weights & Biases and Trackio: real runs of the Trainer, read back from what they wrote."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import tempfile

# Trackio reads it when it is imported, which no test module does.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from training import build_trainer, config
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress
from hf_compressm.distributed.processes import Processes
from hf_compressm.plots import draw_spectrum, figure_pixels
from hf_compressm.trackers import NOTE, SPECTRUM, note_cut

PROJECT = "cuts"
LINE = "backbone.layers.1.mixer"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run with all three trackers; the cutting callback, and the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("run")
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true", "WANDB_PROJECT": PROJECT}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import trackio
        import wandb

        # It would start a server for its dashboard, and say its address with the token that may write there.
        patch.setattr(trackio, "show", lambda *args, **kwargs: None)
        cutter = CompreSSMCallback(config())
        trainer = build_trainer(
            TINY["mamba"].build(),
            folder,
            [cutter],
            max_steps=5,
            report_to=["tensorboard", "wandb", "trackio"],
            project=PROJECT,
            run_name="a run",
        )
        trainer.train()
        wandb.finish()
    return cutter, folder


@pytest.fixture(scope="module")
def spectrum(run) -> np.ndarray:
    """The picture that each tracker should have."""
    return figure_pixels(draw_spectrum(run[0].history[0]))


def test_tensorboard_has_the_numbers_the_note_and_the_picture(run, spectrum):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = run[1].rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "tensors": 0})
    events.Reload()

    assert [(event.step, event.value) for event in events.Scalars("train/compressm/state_size")] == [(3, 4.0)]
    (note,) = events.Tensors(f"{NOTE}/text_summary")
    text = note.tensor_proto.string_val[0].decode()
    assert note.step == 3 and "Cut after step 3" in text and f"    {LINE}" in text and "8 → 4" in text
    (image,) = events.Images(SPECTRUM)
    folder = run[1] / "tensorboard.png"
    folder.write_bytes(image.encoded_image_string)
    assert image.step == 3 and np.array_equal(np.asarray(Image.open(folder)), spectrum)


def wandb_records(file: Path) -> list[bytes]:
    """The records of a run's file, a LevelDB log: parts with checksum, length and kind, in blocks of 32 KiB."""
    data, position, records, parts = file.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            # It is whole, or this was its last part.
            records.append(parts)
            parts = b""
    return records


def test_wandb_offline_has_them(run, spectrum):
    from wandb.proto import wandb_internal_pb2

    (file,) = run[1].rglob("run-*.wandb")
    rows = []
    for data in wandb_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            # A medium's items have keys of two parts.
            row = {(*item.nested_key, item.key)[:2]: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for (name, *_), value in row.items()} | row)

    assert [row["train/global_step"] for row in rows if "train/compressm/state_size" in row] == [3]
    (row,) = [row for row in rows if NOTE in row]
    assert row["train/global_step"] == 3 and row[SPECTRUM, "caption"] == "Cut after step 3"
    media = file.parent / "files"
    page = (media / row[NOTE, "path"]).read_text(encoding="utf-8")
    assert LINE in page and "8 → 4" in page
    assert np.array_equal(np.asarray(Image.open(media / row[SPECTRUM, "path"]).convert("RGB")), spectrum)


def test_trackio_has_them(run, spectrum):
    (database,) = Path(os.environ["TRACKIO_DIR"]).glob(f"{PROJECT}*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("select metrics from metrics order by step")]

    assert [row["train/global_step"] for row in rows if "train/compressm/state_size" in row] == [3]
    (row,) = [row for row in rows if NOTE in row]
    assert row["train/global_step"] == 3 and row[NOTE]["_type"] == "trackio.markdown"
    assert "Cut after step 3" in row[NOTE]["_value"] and f"    {LINE}" in row[NOTE]["_value"]
    picture = Image.open(Path(os.environ["TRACKIO_DIR"]) / "media" / row[SPECTRUM]["file_path"])
    assert np.array_equal(np.asarray(picture.convert("RGB")), spectrum)


@pytest.fixture(scope="module")
def cut():
    """A report, and its entry in a history."""
    import torch

    report = compress(
        TINY["mamba"].build(num_hidden_layers=1), [torch.arange(12).repeat(4, 1)], CompreSSMConfig(state_size=4)
    )
    return report, {"status": "cut", **report.to_dict()}


class Broken:
    """Whatever it is asked for fails, with a token in the words."""

    def __getattr__(self, name):
        def fail(*args, **kwargs):
            raise ConnectionError("http://127.0.0.1:7860/?write_token=sesame")

        return fail


def tracker(kind: type[TrainerCallback], attribute: str) -> TrainerCallback:
    callback = kind.__new__(kind)
    setattr(callback, attribute, Broken())
    return callback


@pytest.fixture
def broken() -> list[TrainerCallback]:
    pairs = [(TensorBoardCallback, "tb_writer"), (WandbCallback, "_wandb"), (TrackioCallback, "_trackio")]
    return [tracker(kind, attribute) for kind, attribute in pairs]


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What is warned of from here on, by this module."""
    messages: list[str] = []
    logger = logging.get_logger("hf_compressm.trackers")
    monkeypatch.setattr(logger, "warning", lambda message, *args, **kwargs: messages.append(message))
    type(logger).warning_once.cache_clear()
    return messages


def test_a_tracker_that_fails_is_named_once_and_breaks_nothing(broken, cut, warnings):
    for step in (3, 7):
        note_cut(broken, *cut, step)

    assert [message.split()[0] for message in warnings] == ["TensorBoard", "Wandb", "Trackio"]
    assert all("ConnectionError" in message and "sesame" not in message for message in warnings)


def test_one_that_fails_does_not_keep_the_others_from_writing(broken, cut, warnings):
    class Writer:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *args, **kwargs: self.calls.append(name)

    works = tracker(TensorBoardCallback, "tb_writer")
    works.tb_writer = Writer()
    note_cut([*broken, works], *cut, 3)
    assert works.tb_writer.calls == ["add_text", "add_image", "flush"]


@pytest.mark.parametrize("broken_spectrum", [{"layers": []}, {"layers": [{"name": "no sizes"}]}])
def test_a_spectrum_that_cannot_be_drawn_breaks_nothing(broken, cut, warnings, broken_spectrum):
    note_cut(broken, cut[0], broken_spectrum, 3)
    assert len(warnings) == 1 and "picture" in warnings[0]


def test_only_the_main_process_writes(broken, cut, warnings, monkeypatch):
    monkeypatch.setattr(Processes, "is_main", property(lambda self: False))
    note_cut(broken, *cut, 3)
    assert not warnings


def test_without_a_tracker_nothing_is_drawn(cut, monkeypatch):
    monkeypatch.setattr("hf_compressm.trackers.draw_spectrum", lambda cut: pytest.fail("a picture for nobody"))
    note_cut([TrainerCallback()], *cut, 3)
