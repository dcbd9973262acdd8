"""Write small files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(file: Path, data: bytes | str) -> None:
    """Write a file beside its place and move it there: a reader finds the old one or the new one, never a part.

    Args:
        file: its folder is made if it is missing.
        data: text is written as UTF-8.

    Raises:
        OSError: nothing is left behind then.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
