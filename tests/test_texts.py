"""Tokens out of texts, token files and data sets: what is taken, what is held back, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch

from hf_compressm.model_files import SavedModel
from hf_compressm.texts import byte_tokenizer, load_sequences, load_tokenizer

TEXT = "".join(f"line {number} of a text\n" for number in range(400))


def write_tokens(file: Path, rows: list[list[int]], labels: bool = False) -> Path:
    """Rows in the form that the file's name asks for; labels are the ids plus one."""
    if file.suffix == ".npy":
        np.save(file, np.array(rows))
    elif file.suffix == ".safetensors":
        ids = torch.tensor(rows)
        safetensors.torch.save_file({"input_ids": ids} | ({"labels": ids + 1} if labels else {}), file)
    else:
        row = [{"input_ids": ids} | ({"labels": [item + 1 for item in ids]} if labels else {}) for ids in rows]
        file.write_text("\n".join(map(json.dumps, row)) + "\n")
    return file


def test_texts_are_packed_and_a_part_is_held_back(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("Zürich " * 600)
    (tmp_path / "empty.txt").write_text("")
    tokenizer = byte_tokenizer()
    options = {"vocabulary": 257, "block_size": 64, "held_out_tokens": 20_000}
    found = load_sequences([f"{tmp_path}/*.txt"], tokenizer, tokens=4000, **options)
    assert found.calibration.shape == (63, 64) and found.held_out.shape[1] == 64
    assert torch.equal(found.held_out, found.held_out_labels)
    # All that is left is held back, and nothing of it was measured on.
    total = len(TEXT.encode()) + 1 + len(("Zürich " * 600).encode()) + 1
    assert len(found.held_out) == total // 64 - 63
    for part in (found.calibration, found.held_out):
        text = "|".join(tokenizer.decode([token for token in row if token < 256]) for row in part.tolist())
        assert " of a text\nline" in text and "Zürich Zürich" in text
    few = load_sequences([f"{tmp_path}/*.txt"], tokenizer, tokens=4000, **options | {"held_out_tokens": 640})
    assert len(few.held_out) == 10


def test_the_seed_decides_on_the_order(tmp_path):
    file = write_tokens(tmp_path / "rows.jsonl", [[number] * 8 for number in range(50)])
    orders = [
        load_sequences([str(file)], None, tokens=80, vocabulary=50, seed=seed).calibration[:, 0].tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("ending", [".jsonl", ".npy", ".safetensors"])
def test_rows_of_one_length_stay_as_they_are(tmp_path, ending):
    rows = [[number, *range(10)] for number in range(20)]
    file = write_tokens(tmp_path / f"rows{ending}", rows, labels=ending != ".npy")
    found = load_sequences([str(file)], None, tokens=11 * 15, vocabulary=30)
    assert found.calibration.shape == (15, 11) and found.held_out.shape == (5, 11)
    taken = found.calibration.tolist() + found.held_out.tolist()
    assert sorted(taken) == rows
    shift = 0 if ending == ".npy" else 1
    assert torch.equal(found.held_out_labels, found.held_out + shift)


def test_a_block_size_packs_rows(tmp_path):
    file = write_tokens(tmp_path / "rows.npy", [[1, 2, 3]] * 100)
    found = load_sequences([str(file)], None, tokens=100, vocabulary=4, block_size=10)
    assert found.calibration.shape == (10, 10)
    assert [3, 1, 2, 3, 1, 2, 3, 1, 2, 3] in found.calibration.tolist()


def test_a_stream_of_ids(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(2000, dtype=np.uint16))
    found = load_sequences([str(tmp_path / "ids.npy")], None, tokens=512, vocabulary=2000)
    assert found.calibration.shape == (2, 256) and found.calibration.dtype == torch.int64


def test_json_lines_and_data_sets_of_text(tmp_path):
    rows = [{"body": f"{number} " * 50} for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "rows.jsonl", tmp_path / "saved"):
        found = load_sequences(
            [str(source)], byte_tokenizer(), tokens=256, vocabulary=257, block_size=32, text_column="body"
        )
        assert found.calibration.shape == (8, 32)
        assert int(found.calibration.max()) <= 256
    with pytest.raises(ValueError, match="no column 'text'; name one with --text-column: body"):
        load_sequences([str(tmp_path / "saved")], byte_tokenizer(), tokens=256, vocabulary=257)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, "missing.txt: no such file"),
        ("nothing*.txt", None, "no file matches it"),
        ("empty.txt", b"", "empty.txt: empty, or nothing but white space"),
        ("blank.txt", b" \n\n ", "empty, or nothing but white space"),
        ("binary.txt", b"abc\0def", "binary.txt is a binary file; texts are UTF-8, and token files end in"),
        ("latin.txt", "Zürich".encode("latin1") * 9, r"not in UTF-8 \(byte 1 is 0xfc\)"),
        ("short.txt", b"too short", "too little data: 10 tokens, which make 0 whole sequences of 16; needed are 64 "),
        ("broken.jsonl", b'{"input_ids": [1,', r"broken.jsonl, line 1: not JSON"),
        ("list.jsonl", b"[1, 2]", "line 1: an object with `input_ids` or text is expected, not a list"),
        ("words.jsonl", b'{"input_ids": ["a"]}', "`input_ids` must be a list of whole numbers"),
        ("uneven.jsonl", b'{"input_ids": [1, 2], "labels": [1]}', "`labels` must be a list of whole numbers, as long"),
        (
            "other.jsonl",
            b'{"words": "a"}',
            r"neither `input_ids` nor text under 'text' \(--text-column\), but \['words'\]",
        ),
        ("broken.npy", b"no array", "is not an array of numbers"),
        ("broken.safetensors", b"no tensors", "is not a whole safetensors file"),
    ],
)
def test_refusals(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_sequences([str(tmp_path / name)], byte_tokenizer(), tokens=64, vocabulary=257, block_size=16)


def test_pickles_and_fractions_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object))
    with pytest.raises(ValueError, match="is not an array of numbers"):
        load_sequences([str(tmp_path / "objects.npy")], None, tokens=4, vocabulary=9)
    np.save(tmp_path / "floats.npy", np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"whole numbers in one dimension or two, not float64 of shape \(3, 4\)"):
        load_sequences([str(tmp_path / "floats.npy")], None, tokens=4, vocabulary=9)


@pytest.mark.parametrize("ids, bad", [([0, 3, 16], 16), ([0, -1, 3], -1)])
def test_tokens_that_the_model_does_not_know(tmp_path, ids, bad):
    file = write_tokens(tmp_path / "ids.jsonl", [ids] * 10)
    with pytest.raises(ValueError, match=f"token {bad} is none that the model knows: it knows 0 to 15"):
        load_sequences([str(file)], None, tokens=6, vocabulary=16)
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="give the model's own --tokenizer"):
        load_sequences([str(tmp_path / "a.txt")], byte_tokenizer(), tokens=600, vocabulary=16)


def test_text_needs_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="the model has no tokenizer; name one with --tokenizer"):
        load_sequences([str(tmp_path / "a.txt")], None, tokens=64, vocabulary=16)


def test_a_data_set_that_is_not_there():
    with pytest.raises(ValueError, match="the data set nobody/nothing cannot be loaded"):
        load_sequences(["nobody/nothing"], None, tokens=64, vocabulary=16)


def test_tokenizers(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "with")
    (tmp_path / "without").mkdir()
    model = SavedModel("m", tmp_path / "without", None, ["config.json"])
    assert load_tokenizer(model) is None
    assert len(load_tokenizer(model, "bytes")) == 257
    assert load_tokenizer(model, str(tmp_path / "with"))("a")["input_ids"] == [97]
    with pytest.raises(ValueError, match="without has no tokenizer"):
        load_tokenizer(model, str(tmp_path / "without"))


def test_one_sequence_at_least_is_held_back(tmp_path):
    file = write_tokens(tmp_path / "rows.npy", [[1, 2, 3, 0]] * 5)
    assert len(load_sequences([str(file)], None, tokens=16, vocabulary=4).held_out) == 1
    with pytest.raises(
        ValueError, match=r"20 tokens, which make 5 whole sequences of 4; needed are 20 tokens \(5 seq"
    ):
        load_sequences([str(file)], None, tokens=17, vocabulary=4)
