"""until_done.py with commands that do no more than write what says how to go on."""

from __future__ import annotations

import sys
from pathlib import Path

import until_done
from pretrain_lm import last_checkpoint

from hf_compressm.continuation import CONTINUE_FILE

# It notes what it was called with, and for each name after the folder there is one more run to come.
WORKER = """
import json, pathlib, sys
folder, *others = sys.argv[1:]
with open(f"{folder}/calls", "a") as file:
    print(*others, file=file)
if others == ["fail"]:
    sys.exit(3)
if others:
    command = [*OWN, sys.executable, __file__, folder, *others[1:]]
    pathlib.Path(folder, FILE).write_text(json.dumps({"checkpoint": "small", "command": command}))
"""


def run(folder: Path, *names: str, own: list[str] | None = None) -> tuple[int, list[str]]:
    worker = folder / "worker.py"
    worker.write_text(f"OWN, FILE = {own or []!r}, {CONTINUE_FILE!r}\n{WORKER}")
    code = until_done.main([str(folder), "--", sys.executable, str(worker), str(folder), *names])
    return code, (folder / "calls").read_text().splitlines()


def test_goes_on_until_nothing_is_left(tmp_path):
    assert run(tmp_path, "a", "b") == (0, ["a b", "b", ""])
    # What an earlier run left there is no news.
    assert run(tmp_path) == (0, ["a b", "b", "", ""])


def test_a_failure_ends_it(tmp_path):
    assert run(tmp_path, "a", "fail") == (3, ["a fail", "fail"])


def test_its_own_words_are_not_run_again(tmp_path, monkeypatch, capfd):
    """A training run names the command line that started it, and there that is until_done's."""
    own = ["python", "until_done.py", str(tmp_path), "--"]
    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path), "a"]
    monkeypatch.setattr(sys, "orig_argv", [*own, *command])
    assert run(tmp_path, "a", own=own) == (0, ["a", ""])
    assert "until_done: python" not in capfd.readouterr().out


def test_the_trainers_recipe_finds_cut_checkpoints(tmp_path):
    def written(name: str, content: str = "{}") -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(content)

    assert last_checkpoint(str(tmp_path)) is None
    for name, newest in (("checkpoint-4", "checkpoint-4"), ("cut-checkpoint-4", "cut-checkpoint-4")):
        written(name)
        assert last_checkpoint(str(tmp_path)) == str(tmp_path / newest)
    written("checkpoint-12")
    written("cut-checkpoint-100", content="")
    written(".cut-checkpoint-200")
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-12")
