"""Weights in safetensors files: rewritten tensor by tensor, since the library writes only what is in memory whole.

A file is 8 bytes with the length of a header, the header (JSON: name → dtype, shape and place), and the raw values.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch

from .work import CHUNK, Work

NUMBERS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """A file's header and where its values begin, after a check that the file is whole.

    Raises:
        ValueError: the file is cut off, or not a safetensors file.
    """
    try:
        with safetensors.safe_open(file, "pt"):
            pass
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            return json.loads(handle.read(length)), 8 + length
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); was it cut off?") from error


def stored_names(work: Work, header: dict[str, Any]) -> dict[str, str]:
    """The names in a file of the parameters that change, or that new ones come to lie beside."""
    skeleton, found = work.skeleton, {}
    for name in skeleton.touched:
        for stored in (name, skeleton.name_in_files(name)):
            if stored in header:
                found[name] = stored
    return found


def rewrite(work: Work, source: Path, target: Path) -> list[str]:
    """Write a file with the cut's parameters in the place of the old ones.

    Returns:
        The changed and the added parameters, as the file calls them.
    """
    skeleton = work.skeleton
    header, start = read_header(source)
    names = stored_names(work, header)
    by_stored = {stored: name for name, stored in names.items() if name in skeleton.changed}
    metadata = header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    for stored, name in by_stored.items():
        skeleton.check_shape(name, header[stored]["shape"], str(source))
        if header[stored]["dtype"] not in NUMBERS:
            raise TypeError(
                f"{source}: {stored} is of {header[stored]['dtype']}; cut the model before it is quantized"
            )
    added = {}
    for name, beside in skeleton.added.items():
        if beside in names:
            renamed = names[beside] != beside
            added[skeleton.name_in_files(name) if renamed else name] = (name, header[names[beside]]["dtype"])

    new_header, place = {} if metadata is None else {"__metadata__": metadata}, 0
    sized = [
        (stored, entry["dtype"], skeleton.after[by_stored[stored]].shape if stored in by_stored else entry["shape"])
        for stored, entry in entries
    ] + [(stored, dtype, skeleton.after[name].shape) for stored, (name, dtype) in added.items()]
    for stored, dtype, shape in sized:
        if stored in header and stored not in by_stored:
            begin, end = header[stored]["data_offsets"]
            size = end - begin
        else:
            size = math.prod(shape) * NUMBERS[dtype].itemsize
        new_header[stored] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(new_header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for stored, entry in entries:
            begin, end = entry["data_offsets"]
            if stored in by_stored:
                # A mapping of its own: pages of one that stays open would all count as in use.
                with safetensors.safe_open(source, "pt") as content:
                    values = work.values(by_stored[stored], content.get_tensor(stored))
                _write_values(writer, values)
                work.advance(end - begin)
            else:
                _copy_range(reader, start + begin, end - begin, writer, work)
        for name, dtype in added.values():
            _write_values(writer, work.values(name, torch.empty(0, dtype=NUMBERS[dtype])))
    return [*by_stored, *added]


def rewrite_index(work: Work, source: Path, target: Path, directory: Path, placed: dict[str, str]) -> None:
    """Write the index of a sharded model anew.

    Args:
        work: the rewrite.
        source, target: the old and the new index.
        directory: where the old files are.
        placed: the parameters that were written, as files call them → the file that holds them.

    Raises:
        FileNotFoundError: a file that the index names is missing.
    """
    index = json.loads(source.read_text(encoding="utf-8"))
    missing = sorted({file for file in index["weight_map"].values() if not (directory / file).is_file()})
    if missing:
        raise FileNotFoundError(f"{source} names files that are missing: {missing}")
    index["weight_map"] |= placed
    metadata = index.setdefault("metadata", {})
    sizes = [
        entry["data_offsets"][1]
        for file in set(index["weight_map"].values())
        for entry in [max(_entries(target.parent / file, directory / file), key=lambda item: item["data_offsets"][1])]
    ]
    metadata["total_size"] = sum(sizes)
    if "total_parameters" in metadata:
        before, after = (
            sum(parameter.numel() for parameter in parameters.values())
            for parameters in (work.skeleton.before, work.skeleton.after)
        )
        metadata["total_parameters"] += after - before
    target.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _entries(new: Path, old: Path) -> list[dict[str, Any]]:
    header, _ = read_header(new if new.is_file() else old)
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _write_values(writer: BinaryIO, values: torch.Tensor) -> None:
    writer.write(values.contiguous().flatten().view(torch.uint8).numpy())


def _copy_range(reader: BinaryIO, begin: int, count: int, writer: BinaryIO, work: Work) -> None:
    reader.seek(begin)
    while count:
        chunk = reader.read(min(CHUNK, count))
        if not chunk:
            raise ValueError(f"{reader.name} ends too early; was it cut off?")
        writer.write(chunk)
        work.advance(len(chunk))
        count -= len(chunk)
