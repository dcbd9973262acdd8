"""compressm.json: written whole, read back, and refused when it is something else."""

from __future__ import annotations

import json

import pytest

from hf_compressm import Record, read_record, write_record
from hf_compressm.record import tidy_command

CUT = {"status": "cut", "step": 3}


def test_what_is_written_is_read_back(tmp_path):
    record = Record(
        cuts=[{"status": "skipped", "step": 1, "reason": "few"}, CUT],
        versions={"torch": "2"},
        optimizer_parameters=[["a"], []],
        run={"seed": 0, "description": "näher"},
        machine="a machine",
        timeline=[{"step": 1, "state_size": 8, "loss": 1.5}],
        evaluations={"uncut": {"loss": 2.0}, "cut": {"loss": 2.5}},
        criteria={"ghost": [1.0, 0.0]},
    )
    record.save(tmp_path)
    assert Record.load(tmp_path) == record
    assert list(Record.load(tmp_path).evaluations) == ["uncut", "cut"]
    assert record.made_cuts == [CUT]
    assert read_record(tmp_path) == record.cuts


def test_a_history_alone(tmp_path):
    write_record([CUT], tmp_path)
    content = json.loads((tmp_path / "compressm.json").read_text())
    assert content.keys() == {"format_version", "cuts", "versions"}
    assert content["versions"].keys() == {"hf-compressm", "torch", "transformers", "accelerate"}


def test_keys_of_a_later_version_are_left_out(tmp_path):
    Record([CUT]).save(tmp_path)
    file = tmp_path / "compressm.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"later": 1}))
    assert Record.load(tmp_path).cuts == [CUT]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not a record of cuts"),
        ("[]", "is not a record of cuts"),
        ('{"format_version": 1}', "KeyError: 'cuts'"),
        ('{"format_version": 2, "cuts": []}', "record format 2, but this version reads 1"),
        ('{"format_version": 1, "cuts": [{"step": 3}]}', "each with its status"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "compressm.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Record.load(tmp_path)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["train.py", "--hub_token", "hf_abc", "--steps", "9"], "train.py --steps 9"),
        (["train.py", "--hub_token=hf_abc", "--wandb-api-key", "x"], "train.py"),
        (["/usr/bin/python3.11", "my train.py"], "python3.11 'my train.py'"),
        (["train.py", "--password"], "train.py"),
        (["timeout", "9", "env", "HF_TOKEN=hf_abc", "python", "train.py"], "timeout 9 env python train.py"),
    ],
)
def test_commands_hold_no_secret(words, expected):
    assert tidy_command(words) == expected
