"""The quality benchmark: its tasks ask what they say, its tables are its numbers, and it goes on where it stopped."""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import mambapy.pscan
import pytest
import torch
from transformers.utils import logging as transformers_logging

from hf_compressm.criteria import CRITERIA

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "bench"
CELLS = (("mamba", "copying"), ("mamba2", "recall"))


@pytest.fixture(scope="module")
def quality():
    """The benchmark as a module, beside its neighbour as a script is; what it sets for its process is undone."""
    kernels = logging.getLogger("transformers.integrations.hub_kernels")
    verbosity, level = transformers_logging.get_verbosity(), kernels.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mambapy.pscan, "pscan", mambapy.pscan.pscan)
        patch.syspath_prepend(str(BENCHMARKS))
        import quality

        yield quality
    transformers_logging.set_verbosity(verbosity)
    kernels.setLevel(level)
    for name in ("quality", "speed"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny_run(quality, tmp_path_factory) -> Path:
    """Two tiny cells through the real main function; returns the folder of the results."""
    folder = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, quality)
        for layout, task in CELLS:
            quality.main(arguments(folder, layout, task, "--resume"))
    return folder


def shrink(patch: pytest.MonkeyPatch, quality) -> None:
    """Make the quick benchmark one of seconds."""
    tiny = replace(
        quality.WORKS["quick"],
        state_size=8,
        kept=(2,),
        hidden_size=8,
        batch_tokens=(("mamba", 128), ("mamba2", 128)),
        steps=(("mamba", 3), ("mamba2", 3)),
        calibration_tokens=256,
        recovery_steps=2,
        evaluation_tokens=256,
    )
    patch.setitem(quality.WORKS, "quick", tiny)


def arguments(folder: Path, layout: str, task: str, *more: str) -> list[str]:
    return ["--quick", "--output", str(folder), "--layouts", layout, "--tasks", task, "--processes", "1", *more]


def sample(quality, task: str, held_out: bool = False) -> tuple[list[list[int]], list[list[int]]]:
    batch = quality.TASKS[task].sample(torch.Generator().manual_seed(3), 32, held_out)
    assert batch["input_ids"].shape == batch["labels"].shape == (32, quality.TASKS[task].length)
    return batch["input_ids"].tolist(), batch["labels"].tolist()


def test_copying_asks_for_the_data_in_order(quality):
    for ids, labels in zip(*sample(quality, "copying"), strict=True):
        mark = ids.index(1)
        data = [token for token in ids[:mark] if token != 0]
        assert len(data) == 8 and ids[:mark].count(0) == 15
        assert labels[: mark + 1] == [-100] * (mark + 1)
        assert labels[mark + 1 :] == ids[mark + 1 :] == data


def test_recall_asks_for_the_value_bound_to_each_key(quality):
    for ids, labels in zip(*sample(quality, "recall"), strict=True):
        bound = {}
        for place in range(0, 12, 2):
            assert ids[place] < 16 <= ids[place + 1] and ids[place] not in bound
            bound[ids[place]] = ids[place + 1]
        assert labels[:12] == [-100] * 12
        for place in range(12, 32, 2):
            assert labels[place] == -100
            assert labels[place + 1] == ids[place + 1] == bound[ids[place]]


def test_induction_asks_for_what_followed_the_token_before(quality):
    for ids, labels in zip(*sample(quality, "induction"), strict=True):
        assert len(set(ids[:16])) == 16
        assert labels[:17] == [-100] * 17
        for place in range(17, 32):
            earlier = ids[:16].index(ids[place - 1])
            assert labels[place] == ids[place] == ids[(earlier + 1) % 16]


def test_text_is_source_code_and_splits_by_file(quality):
    train, held_out = (bytes(quality.standard_library(held).tolist()) for held in (False, True))
    assert len(train) > 4 * len(held_out) > 0
    for source, held in ((train, False), (held_out, True)):
        for ids, labels in zip(*sample(quality, "text", held), strict=True):
            assert bytes(ids) in source
            assert labels == [-100, *ids[1:]]
    license_of_decimal = Path(sys.modules["decimal"].__file__).read_bytes()
    assert (license_of_decimal in train) != (license_of_decimal in held_out)


def test_sequential_scan_is_that_of_mambapy(quality):
    torch.manual_seed(0)
    A, X = (torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    ours, theirs = quality.SequentialScan.apply(A, X), mambapy.pscan.PScan.apply(A, X)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(states, (A, X), upstream) for states in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_score_is_at_the_asked_positions_only(quality):
    torch.manual_seed(0)
    task = quality.TASKS["recall"]
    model = quality.build("mamba2", task, replace(quality.Work(), hidden_size=8), state_size=4)
    batch = task.sample(torch.Generator().manual_seed(0), 70, False)
    answers = quality.answer(model, batch)
    with torch.no_grad():
        loss = model(**batch).loss.item()
        logits = model(input_ids=batch["input_ids"]).logits
    other = (torch.randn_like(answers[0]).log_softmax(-1), answers[1])
    scores = quality.score(answers, other)
    right, divergence = [], []
    for row in range(70):
        for place in range(13, 32, 2):
            log_probabilities = logits[row, place - 1].log_softmax(-1)
            right.append(float(log_probabilities.argmax() == batch["input_ids"][row, place]))
            reference = torch.distributions.Categorical(logits=other[0][len(divergence)])
            ours = torch.distributions.Categorical(logits=log_probabilities)
            divergence.append(torch.distributions.kl_divergence(reference, ours).item())
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["accuracy"] == pytest.approx(statistics.fmean(right))
    assert scores["kl"] == pytest.approx(statistics.fmean(divergence), rel=1e-4)


def test_every_criterion_and_the_proposed_way_are_compared(quality, tiny_run):
    cells = json.loads((tiny_run / "quality-quick.json").read_text())["cells"]
    assert [(cell["layout"], cell["task"]) for cell in cells] == list(CELLS)
    for cell in cells:
        names = {row["arm"] for row in cell["arms"]}
        proposed = {"refit"} if cell["layout"] == "mamba" else {"projected", "shared out", "balanced"}
        assert names == proposed | {"elimination"} | set(CRITERIA) - {"refit"}
        small = ["stock", "projected"] if cell["layout"] == "mamba2" else []
        assert [(born["arm"], born["kept"]) for born in cell["born_small"]] == [(arm, 2) for arm in small]
        assert all(math.isfinite(row[when][key]) for row in cell["arms"] for when in MOMENTS for key in row[when])


MOMENTS = ("one_shot", "recovered")


def test_tables_hold_the_numbers_of_the_cells(tiny_run):
    results = json.loads((tiny_run / "quality-quick.json").read_text())
    table = (tiny_run / "quality-quick.md").read_text()
    assert (tiny_run / "quality-quick.png").read_bytes().startswith(b"\x89PNG")
    sections = table.split("\n## ")[2:]
    assert len(sections) == len(results["cells"]) == 2
    for section, cell in zip(sections, results["cells"], strict=True):
        assert section.startswith(f"{cell['layout']}, {cell['task']}\n")
        lines = [[part.strip() for part in line.split("|")[1:-1]] for line in section.splitlines() if " ± " in line]
        rows = {line[0]: line[1:] for line in lines if len(line) == 12}
        assert set(rows) == {row["arm"] for row in cell["arms"]}
        by_arm = {row["arm"]: row for row in cell["arms"]}
        for arm, columns in rows.items():
            expected = ["2"]
            for when in MOMENTS:
                base = cell["uncut"][when]["loss"]
                added = by_arm[arm][when]["loss"] - base
                expected += [f"{added:.4f}", f"{by_arm[arm][when]['accuracy']:.3f}", f"{by_arm[arm][when]['kl']:.4f}"]
                for reference in ("ghost", "hankel"):
                    worse = by_arm[reference][when]["loss"] - base
                    expected.append(f"{added / worse:.1%}" if worse > 0 else "–")
            assert [column.split(" ± ")[0] for column in columns] == expected


def made_up_cell(seed: int, losses: dict[str, float], kls: dict[str, float]) -> dict:
    rows = [
        {"arm": arm, "kept": 8, **{when: {"loss": losses[arm], "accuracy": 0.5, "kl": kls[arm]} for when in MOMENTS}}
        for arm in losses
    ]
    uncut = {when: {"loss": 1.0, "accuracy": 1.0, "kl": 0.0} for when in MOMENTS}
    return {"layout": "mamba2", "task": "copying", "seed": seed, "uncut": uncut, "arms": rows}


def test_goals_are_judged_by_the_ratio_of_the_means(quality):
    cells = [
        made_up_cell(0, {"projected": 1.1, "ghost": 2.0, "hankel": 0.5}, {"projected": 0.1, "ghost": 4, "hankel": 1}),
        made_up_cell(1, {"projected": 1.1, "ghost": 5.0, "hankel": 0.5}, {"projected": 0.2, "ghost": 6, "hankel": 1}),
    ]
    summary = quality.summarize(cells)
    row = summary[0]["one_shot"]
    assert row["added"]["mean"] == pytest.approx(0.1) and row["kl"]["sd"] == pytest.approx(0.1 / math.sqrt(2))
    assert row["shares"] == {
        "ghost": pytest.approx(0.2 / 5),
        "ghost_kl": pytest.approx(0.3 / 10),
        "hankel": None,
        "hankel_kl": pytest.approx(0.3 / 2),
    }
    goals = quality.judge(summary, 8)
    assert [(goal["against"], goal["verdict"]) for goal in goals] == [("ghost", "met"), ("ghost_kl", "MISSED")]


def test_resume_runs_no_finished_cell_again(quality, tiny_run, tmp_path, monkeypatch):
    shrink(monkeypatch, quality)
    journal = (tiny_run / "quality-quick.jsonl").read_text()
    # The second cell was being written when the run was stopped.
    (tmp_path / "quality-quick.jsonl").write_text(journal[: len(journal) - 40])
    ran = []
    original = quality.run_cell
    monkeypatch.setattr(quality, "run_cell", lambda *cell: ran.append(cell[:3]) or original(*cell))
    for layout, task in CELLS:
        quality.main(arguments(tmp_path, layout, task, "--resume"))
    assert ran == [("mamba2", "recall", 0)]
    before, after = (json.loads((folder / "quality-quick.json").read_text()) for folder in (tiny_run, tmp_path))
    for results in (before, after):
        for cell in results["cells"]:
            cell.pop("seconds")
            for row in cell["arms"]:
                row.pop("seconds")
    assert after["cells"] == before["cells"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"quality-quick.{e}" for e in ("json", "jsonl", "md", "png")
    ]


def test_a_change_of_sizes_starts_anew(quality, tiny_run, monkeypatch):
    shrink(monkeypatch, quality)
    work = quality.WORKS["quick"]
    assert len(quality.finished_cells(tiny_run / "quality-quick.jsonl", work)) == 2
    assert quality.finished_cells(tiny_run / "quality-quick.jsonl", replace(work, layers=3)) == []
