"""A Compressor in four real processes: DDP, two DDP groups at once, FSDP2; and how the work is shared out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engines_worker
import pytest
import torch
from engines_worker import CUT_AFTER, GROUPS, LOOPS, PROCESSES, STEPS, WORK
from launch import torchrun

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict[str, Any]]:
    """What each process saw. A cut for which the processes are not in step would never end."""
    output = tmp_path_factory.mktemp("engines")
    torchrun(Path(engines_worker.__file__), str(output), processes=PROCESSES, timeout=900)
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def assert_same_training(ours: dict[str, Any], alone: dict[str, Any]) -> None:
    assert ours["cut"] == alone["cut"]
    assert ours["kept"] == alone["kept"]
    assert ours["errors"] == pytest.approx(alone["errors"], rel=1e-3)
    torch.testing.assert_close(ours["losses"], alone["losses"], rtol=0, atol=5e-5)
    # Of every weight and moment.
    assert ours["norms"] == pytest.approx(alone["norms"], rel=5e-3)


@pytest.mark.parametrize("name", LOOPS)
def test_processes_are_equal_and_like_one_with_all_rows(runs, name):
    first, *others = (process[name] for process in runs)
    assert all(other == first for other in others)
    _, options = LOOPS[name]
    assert_same_training(first, engines_worker.alone(**options))
    assert first["cut"][:2] == ["cut", CUT_AFTER]
    assert all(value is not None for value in first["check"])


@pytest.mark.parametrize("name", [name for name in LOOPS if name.startswith("FSDP2")])
def test_parameters_are_sharded_between_steps(runs, name):
    """Also after the step that measured, planned, cut and compared: nothing is left gathered."""
    assert runs[0][name]["sharded"] == [True] * STEPS


@pytest.mark.parametrize("kind", GROUPS)
def test_groups_train_and_cut_models_of_their_own_at_once(runs, kind):
    for number, options in enumerate(GROUPS[kind]):
        first, second = (process["groups"][kind] for process in runs[2 * number : 2 * number + 2])
        assert first == second
        assert_same_training(first, engines_worker.alone(count=2, **options))


def test_a_process_that_fails_while_planning_makes_all_fail(runs):
    first, *others = (process["one fails"] for process in runs)
    assert all(other == first for other in others)
    assert "process 1 of 4, ranking states: the second process stumbled" in first["message"]
    assert_same_training(first, engines_worker.alone())


@pytest.mark.parametrize("name", WORK)
def test_the_work_is_shared_out(runs, name):
    """Counted, not timed: states that are run through, and layers that are ranked and fitted."""
    alone = engines_worker.work(name, None)
    kinds = ("statistics", "drive", "projection")
    assert all(alone[kind] > 0 for kind in (["statistics", "drive"] if name == "selection" else kinds[::2]))
    shares = [process["work"][name] for process in runs]
    for kind in alone:
        # Nothing is left out, and nothing is done twice.
        assert sum(share[kind] for share in shares) == alone[kind], kind
        assert max(share[kind] for share in shares) <= 0.6 * alone[kind], kind
    assert max(sum(share[kind] for kind in kinds) for share in shares) <= 0.6 * sum(alone[kind] for kind in kinds)
