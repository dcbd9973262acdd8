"""until_done.py with commands that do no more than write what says how to go on."""

from __future__ import annotations

import sys
from pathlib import Path

import until_done
from pretrain_lm import last_checkpoint

from hf_compressm.continuation import CONTINUE_FILE

# It notes what it was called with. Each of the names before --resume is a run that ends at a cut, and the next goes on
# from there; what it says of its own command line need not be what until_done started.
WORKER = """
import json, pathlib, sys
folder, *names = sys.argv[1:]
resumed = names.pop() if "--resume" in names else None
names = [name for name in names if name != "--resume"]
with open(f"{folder}/calls", "a") as file:
    print(resumed, file=file)
if resumed == "fail":
    sys.exit(3)
left = names if resumed is None else names[names.index(resumed) + 1:]
if left:
    command = ["timeout", "9", "until_done.py", "--", *sys.argv, "--resume", left[0]]
    pathlib.Path(folder, FILE).write_text(json.dumps({"checkpoint": left[0], "command": command}))
"""


def run(folder: Path, *names: str) -> tuple[int, list[str]]:
    worker = folder / "worker.py"
    worker.write_text(f"FILE = {CONTINUE_FILE!r}\n{WORKER}")
    code = until_done.main([str(folder), "--", sys.executable, str(worker), str(folder), *names])
    return code, (folder / "calls").read_text().split()


def test_goes_on_until_nothing_is_left(tmp_path):
    assert run(tmp_path, "a", "b") == (0, ["None", "a", "b"])
    # What an earlier run left there is no news.
    assert run(tmp_path) == (0, ["None", "a", "b", "None"])


def test_a_failure_ends_it(tmp_path):
    assert run(tmp_path, "a", "fail", "b") == (3, ["None", "a", "fail"])


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
