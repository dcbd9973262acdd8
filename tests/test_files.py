"""Files are there whole, or as they were before."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from hf_compressm import files
from hf_compressm.files import write_file


@pytest.mark.parametrize("data", ["näher\n", b"\x00\xff"], ids=["text", "bytes"])
def test_a_file_is_written(tmp_path, data):
    file = tmp_path / "new" / "folder" / "file"
    for _ in range(2):
        write_file(file, data)
        assert file.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert list(file.parent.iterdir()) == [file]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files acts as a full disk does: the write stops half-way with an OSError."""
    file = tmp_path / "file"
    write_file(file, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError):
            write_file(file, "n" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file(tmp_path, stage):
    file = tmp_path / "file"
    write_file(file, "old")

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        setattr(files.os if stage == "fsync" else Path, stage, die)
        write_file(file, "new")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert file.read_text() == "old"
    write_file(file, "new")
    assert file.read_text() == "new"
