"""Tokens to measure states on and to evaluate with: of text files, of token files, or of a data set.

Texts are packed into sequences one after the other; token files with rows of one length keep them as they are.
"""

from __future__ import annotations

import glob
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .model_files import SavedModel, find_model

END_OF_TEXT = "<|endoftext|>"
# The name of the tokenizer whose tokens are bytes.
BYTES = "bytes"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TOKEN_FILES = (".jsonl", ".npy", ".safetensors")
BLOCK_SIZE = 256
# Held-back tokens to evaluate on, at most.
HELD_OUT_TOKENS = 8192
# Long texts are taken apart, so that some of each may be looked at.
PIECE = 2**15
IGNORED = -100


@dataclass(frozen=True)
class _Document:
    """A text, or a part of one, or a row of a token file: its token ids, and the labels or None."""

    ids: Any
    labels: Any = None
    is_row: bool = True


@dataclass(frozen=True)
class Sequences:
    """Sequences of token ids, shape (number, length).

    Attributes:
        calibration: to measure on.
        held_out: others, to evaluate on.
        held_out_labels: what is to be predicted of them, at the same places (not shifted); -100 is not asked for.
        source: where they are from, in words.
    """

    calibration: torch.Tensor
    held_out: torch.Tensor
    held_out_labels: torch.Tensor
    source: str


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes are tokens 0 to 255, and the end of a text is 256.

    Example:
        >>> byte_tokenizer()("Aé")["input_ids"]
        [65, 195, 169]
    """
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def load_tokenizer(model: SavedModel, name: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was asked for, or else the model's own, or None where it has none.

    Args:
        model: the model.
        name: a directory, a repository on the Hub, or `bytes`.

    Raises:
        ValueError: there is no tokenizer under this name.
        OSError: as `find_model`.
    """
    if name == BYTES:
        return byte_tokenizer()
    source = model if name is None else _tokenizer_files(name)
    # Where there is none, Transformers makes up an empty one.
    if any(source.has(file) for file in TOKENIZER_FILES):
        return AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False)
    if name is not None:
        raise ValueError(f"{name} has no tokenizer; name another one, or give --tokenizer {BYTES}")
    return None


def _tokenizer_files(name: str) -> SavedModel:
    path = Path(name).expanduser()
    if path.is_dir():
        # Unlike a model, it needs no config.json.
        return SavedModel(name, path, None, [file.name for file in path.iterdir()])
    return find_model(name)


def load_sequences(
    data: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int,
    vocabulary: int,
    block_size: int | None = None,
    held_out_tokens: int = HELD_OUT_TOKENS,
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    seed: int = 0,
) -> Sequences:
    """Take sequences to measure on, and others to evaluate on, out of some data, in random order.

    Args:
        data: text files (UTF-8; `*` and `**` match several), token files, data set directories, or names of data sets
            on the Hub. Token files are JSON lines with `input_ids` and perhaps `labels`; .npy with ids in one
            dimension or two; .safetensors with `input_ids` and perhaps `labels`. JSON lines may also hold text.
        tokenizer: for texts.
        tokens: how many are to be measured on; whole sequences are taken.
        vocabulary: the number of tokens that the model knows.
        block_size: the length of a sequence; None keeps the rows of token files if they are of one length, and is
            256 else.
        held_out_tokens: how many are held back, at most; at least one sequence is.
        config_name, split: of a data set.
        text_column: the name under which data sets and JSON lines hold the text.
        seed: of the order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is empty or not what its name says, too few tokens, or tokens that the model does not
            know.
    """
    names = list(data)
    sources = [source for name in names for source in _sources(name, config_name, split, seed)]
    random.Random(seed).shuffle(sources)
    documents = (document for source in sources for document in _documents(source, tokenizer, text_column, seed))
    parts, wanted = [], tokens + held_out_tokens + (block_size or BLOCK_SIZE)
    for document in documents:
        parts.append(document)
        wanted -= len(document.ids)
        if wanted <= 0:
            break
    if not any(len(part.ids) for part in parts):
        raise ValueError(f"{', '.join(names)}: empty, or nothing but white space")
    lengths = {len(part.ids) for part in parts}
    whole = block_size is None and all(part.is_row for part in parts) and len(lengths) == 1 and max(lengths) > 1
    length = lengths.pop() if whole else block_size or BLOCK_SIZE
    ids = np.concatenate([np.asarray(part.ids, dtype=np.int64) for part in parts])
    labels = np.concatenate(
        [np.asarray(part.ids if part.labels is None else part.labels, dtype=np.int64) for part in parts]
    )
    number, needed = len(ids) // length, -(-tokens // length)
    if number < needed + 1:
        raise ValueError(
            f"too little data: {len(ids):,} tokens, which make {number} whole sequences of {length}; needed are "
            f"{needed * length:,} tokens ({needed} sequences) to measure on, and one sequence more to evaluate on. "
            "Give more data, or fewer --tokens"
        )
    ids, labels = (torch.from_numpy(part[: number * length].reshape(number, length)) for part in (ids, labels))
    _check_vocabulary(ids, vocabulary, ", ".join(names), tokenizer)
    # Of few texts, too, both parts see something of each.
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    ids, labels = ids[order], labels[order]
    held = slice(needed, needed + max(1, held_out_tokens // length))
    return Sequences(ids[:needed], ids[held], labels[held], ", ".join(names))


def _check_vocabulary(ids: torch.Tensor, vocabulary: int, source: str, tokenizer: Any) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        remedy = "is the data for another model?" if tokenizer is None else "give the model's own --tokenizer"
        raise ValueError(
            f"{source}: token {low if low < 0 else high} is none that the model knows: it knows 0 to "
            f"{vocabulary - 1}; {remedy}"
        )


def _sources(name: str, config_name: str | None, split: str, seed: int) -> list[Any]:
    """What a name of data stands for: files, or one data set."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if files:
            return files
        # A name on the Hub has no ending of a file; where both are possible, a file was meant.
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or path.suffix in (".txt", ".md", ".py", *TOKEN_FILES):
            raise FileNotFoundError(f"{name}: no such file, and no file matches it")
    return [_data_set(name, path, config_name, split, seed)]


def _data_set(name: str, path: Path, config_name: str | None, split: str, seed: int) -> Any:
    import datasets

    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(path)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(name, config_name, split=split)
    except Exception as error:
        # Its errors are of many kinds, and most of them name no data set.
        raise ValueError(f"the data set {name} cannot be loaded ({type(error).__name__}: {error})") from error
    return rows.shuffle(seed=seed)


def _documents(
    source: Any, tokenizer: PreTrainedTokenizerBase | None, text_column: str, seed: int
) -> Iterator[_Document]:
    """The documents of a source, in random order."""
    if not isinstance(source, Path):
        columns = source.column_names
        if "input_ids" not in columns and text_column not in columns:
            raise ValueError(
                f"the data set has no column {text_column!r}; name one with --text-column: {', '.join(columns)}"
            )
        for row in source:
            yield _of_a_row(row, tokenizer, text_column, "the data set")
        return
    if source.stat().st_size == 0:
        return
    if source.suffix == ".npy":
        yield from _of_npy(source, seed)
    elif source.suffix == ".safetensors":
        yield from _of_safetensors(source, seed)
    elif source.suffix == ".jsonl":
        lines = _read_text(source).splitlines()
        for number in _shuffled(len(lines), seed):
            where = f"{source}, line {number + 1}"
            if lines[number].strip():
                yield _of_a_row(_json_row(lines[number], where), tokenizer, text_column, where)
    else:
        pieces = _pieces(_read_text(source))
        for number in _shuffled(len(pieces), seed):
            last = number == len(pieces) - 1
            yield _Document(_tokenized(pieces[number], tokenizer, str(source), ends=last), is_row=False)


def _shuffled(number: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(number), number)


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    how = "texts are UTF-8, and token files end in .jsonl, .npy or .safetensors"
    if b"\0" in data:
        raise ValueError(f"{file} is a binary file; {how}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {data[error.start]:#04x}"
        raise ValueError(f"{file} is a binary file, or a text that is not in UTF-8 ({where}); {how}") from error
    return text if text.strip() else ""


def _pieces(text: str) -> list[str]:
    """A text in parts of about 32,768 characters, which end where a line ends."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an object with `input_ids` or text is expected, not a {type(row).__name__}")
    return row


def _of_a_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, text_column: str, where: str
) -> _Document:
    if "input_ids" not in row:
        if not isinstance(row.get(text_column), str):
            raise ValueError(
                f"{where}: neither `input_ids` nor text under {text_column!r} (--text-column), but {list(row)}"
            )
        return _Document(_tokenized(row[text_column], tokenizer, where, ends=True), is_row=False)
    ids, labels = row["input_ids"], row.get("labels")
    for name, values in (("input_ids", ids), ("labels", labels)):
        if values is not None and (
            not isinstance(values, list)
            or not all(isinstance(value, int) and not isinstance(value, bool) for value in values)
            or len(values) != len(ids)
        ):
            raise ValueError(f"{where}: `{name}` must be a list of whole numbers, as long as `input_ids`")
    return _Document(ids, labels)


def _tokenized(text: str, tokenizer: PreTrainedTokenizerBase | None, where: str, *, ends: bool) -> list[int]:
    if tokenizer is None:
        raise ValueError(
            f"{where} is text, but the model has no tokenizer; name one with --tokenizer (`{BYTES}`: each byte is a "
            "token), or give a token file (.jsonl, .npy, .safetensors)"
        )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if ends and tokenizer.eos_token_id is not None else ids


def _of_npy(file: Path, seed: int) -> Iterator[_Document]:
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not an array of numbers ({error})") from error
    yield from _rows(ids, None, f"{file}", seed)


def _of_safetensors(file: Path, seed: int) -> Iterator[_Document]:
    try:
        with safetensors.safe_open(file, "np") as content:
            names = list(content.keys())
            if "input_ids" not in names:
                raise ValueError(f"{file} holds {names}, but no `input_ids`")
            ids = content.get_tensor("input_ids")
            labels = content.get_tensor("labels") if "labels" in names else None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from error
    yield from _rows(ids, labels, f"{file}: input_ids", seed)


def _rows(ids: Any, labels: Any, where: str, seed: int) -> Iterator[_Document]:
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu" or ids.size == 0:
        raise ValueError(
            f"{where}: token ids are whole numbers in one dimension or two, not {ids.dtype} of shape {ids.shape}"
        )
    if labels is not None and labels.shape != ids.shape:
        raise ValueError(f"{where} has shape {ids.shape}, but the labels have {labels.shape}")
    is_row = ids.ndim == 2
    starts = range(0, len(ids), 1 if is_row else PIECE)
    for number in _shuffled(len(starts), seed):
        place = number if is_row else slice(starts[number], starts[number] + PIECE)
        yield _Document(ids[place], None if labels is None else labels[place], is_row)
