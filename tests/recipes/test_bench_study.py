"""The study: its arms are cut as the package cuts and differ by that alone; its tables are its numbers."""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

import mambapy.pscan
import pytest
import torch
from readme_tables import README, with_results
from scipy import stats
from transformers.utils import logging as transformers_logging

from hf_compressm import CompreSSMConfig, Compressor, find_mixers
from hf_compressm.criteria import CRITERIA

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "bench"
CELLS = (("mamba", "copying"), ("mamba2", "recall"))


@pytest.fixture(scope="module")
def study():
    """The study as a module, beside its neighbours as a script is; what it sets for its process is undone."""
    kernels = logging.getLogger("transformers.integrations.hub_kernels")
    verbosity, level, threads = transformers_logging.get_verbosity(), kernels.level, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mambapy.pscan, "pscan", mambapy.pscan.pscan)
        patch.syspath_prepend(str(BENCHMARKS))
        import study

        yield study
    transformers_logging.set_verbosity(verbosity)
    kernels.setLevel(level)
    torch.set_num_threads(threads)
    for name in ("study", "study_tables", "readme_results", "fitting", "tasks", "reporting", "speed"):
        sys.modules.pop(name, None)


def test_the_readme_has_the_results(tables):
    import readme_results

    text = README.read_text(encoding="utf-8")
    assert with_results(text, readme_results.results_text()) == text, "run `make readme-tables`"


@pytest.fixture(scope="module")
def tables(study):
    import study_tables

    return study_tables


def tiny_work(study):
    return replace(
        study.WORKS["quick"],
        state_size=8,
        kept=2,
        other_kept=(4,),
        hidden_size=8,
        steps=20,
        batch_tokens=(("mamba", 128), ("mamba2", 128)),
        calibration_tokens=256,
        evaluation_tokens=256,
        evaluation_sequences=8,
    )


def arguments(folder: Path, layout: str, task: str, *more: str) -> list[str]:
    return ["--quick", "--output", str(folder), "--layouts", layout, "--tasks", task, "--processes", "1", *more]


@pytest.fixture(scope="module")
def tiny_run(study, tmp_path_factory) -> Path:
    """Two tiny cells through the real main function; returns the folder of the results."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(study.WORKS, "quick", tiny_work(study))
        for layout, task in CELLS:
            study.main(arguments(folder, layout, task, "--resume"))
    return folder


@pytest.fixture(scope="module")
def cells(tiny_run) -> list[dict]:
    return [json.loads(line) for line in (tiny_run / "study-quick.jsonl").read_text().splitlines()]


def trained(study, cell, steps: int):
    run = study.start(cell, cell.work.state_size)
    study.train(cell, run, steps, study.cosine(cell.work, cell.work.steps))
    return run


def weights(run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


# ------------------------------------------------------------------------------------------------------------ training


def test_sequential_scan_is_that_of_mambapy(study):
    torch.manual_seed(0)
    A, X = (torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    ours, theirs = study.SequentialScan.apply(A, X), mambapy.pscan.PScan.apply(A, X)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(states, (A, X), upstream) for states in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_score_is_at_the_asked_positions_only(study):
    torch.manual_seed(0)
    task = study.TASKS["recall"]
    model = study.build("mamba2", task, replace(study.Work(), hidden_size=8), state_size=4)
    batch = task.sample(torch.Generator().manual_seed(0), 140, False)
    answers = study.answer(model, batch)
    with torch.no_grad():
        loss = model(**batch).loss.item()
        logits = model(input_ids=batch["input_ids"]).logits
    asked = batch["labels"][:, 1:] != -100
    right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[asked].float().mean().item()
    other = torch.randn_like(answers[0]).log_softmax(-1)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=other), torch.distributions.Categorical(logits=logits[:, :-1][asked])
    )
    assert study.score(answers) == {"loss": pytest.approx(loss, rel=1e-5), "accuracy": pytest.approx(right)}
    assert study.score(answers, (other, answers[1]))["kl"] == pytest.approx(divergence.mean().item(), rel=1e-4)


def test_batches_are_paired_and_calibration_is_what_was_seen_last(study):
    cell = study.Cell("mamba", "copying", 3, tiny_work(study))
    same, step, seed = cell, 5, replace(cell, seed=4)
    assert torch.equal(cell.batch(step)["input_ids"], copy.deepcopy(same).batch(step)["input_ids"])
    assert not torch.equal(cell.batch(step)["input_ids"], cell.batch(step + 1)["input_ids"])
    assert not torch.equal(cell.batch(step)["input_ids"], seed.batch(step)["input_ids"])
    # 256 tokens are two batches of four sequences of 32 tokens.
    assert [batch["input_ids"].tolist() for batch in cell.calibration(step)] == [
        cell.batch(earlier)["input_ids"].tolist() for earlier in (3, 4)
    ]


@pytest.mark.parametrize("layout", ["mamba", "mamba2"])
def test_an_arm_is_what_the_compressor_makes_of_the_same_training(study, layout):
    cell = study.Cell(layout, "copying", 1, tiny_work(study))
    snapshots = {4: trained(study, cell, 4)}
    run = study.run_arm(cell, snapshots, study.arms(layout, cell.work)["cut 20 %"])

    other = study.start(cell, 8)
    config = CompreSSMConfig(state_size=2, calibration_tokens=256, schedule=[4])
    compressor = Compressor(config, other.model, other.optimizer, total_steps=20)
    for step in range(20):
        for group in other.optimizer.param_groups:
            # Warm-up over one step of twenty.
            group["lr"] = 4e-3 * (1 + math.cos(math.pi * step / 20)) / 2
        other.model.train()
        other.model(**cell.batch(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        other.optimizer.step()
        other.optimizer.zero_grad()
        compressor.step()
    sizes = [[mixer.state_size for mixer in find_mixers(model).values()] for model in (run.model, other.model)]
    assert sizes[0] == sizes[1] and sum(sizes[0]) == 2 * len(sizes[0])
    torch.testing.assert_close(weights(run), weights(other), rtol=1e-4, atol=1e-5)
    assert snapshots[4].step == 4 and len(run.step_seconds) == 20


def test_a_copy_trains_on_as_the_run_does(study):
    cell = study.Cell("mamba2", "copying", 1, tiny_work(study))
    run, rate = trained(study, cell, 6), study.cosine(cell.work, 20)
    branch = run.copy()
    before = weights(run)
    study.train(cell, branch, 12, rate)
    assert torch.equal(weights(run), before)
    study.train(cell, run, 12, rate)
    assert torch.equal(weights(run), weights(branch))


def test_fresh_moments_are_those_of_the_cut_parameters_only(study):
    cell = study.Cell("mamba", "copying", 1, tiny_work(study))
    run = trained(study, cell, 4)
    study.cut(cell, run, CompreSSMConfig(state_size=2), fresh_moments=True)
    without = {name for name, parameter in run.model.named_parameters() if parameter not in run.optimizer.state}
    layers = range(cell.work.layers)
    expected = {f"backbone.layers.{n}.mixer.{p}" for n in layers for p in ("A_log", "x_proj.weight")}
    assert without == expected


def test_learning_rates_warm_up_and_fall_and_warm_up_again(study, monkeypatch):
    work = replace(tiny_work(study), steps=100, rewarmed=0.1)
    rate = study.cosine(work, 100)
    assert [rate(step) / 4e-3 for step in (0, 4, 50)] == pytest.approx([0.2, (1 + math.cos(0.04 * math.pi)) / 2, 0.5])
    cell = study.Cell("mamba", "copying", 1, work)
    seen = {}

    def record(cell, run, until, rate, **options):
        seen.update({step: rate(step) for step in range(run.step, until)})
        run.step_seconds += [0.0] * (until - run.step)

    monkeypatch.setattr(study, "train", record)
    monkeypatch.setattr(study, "cut", lambda *arguments, **options: None)
    run = study.start(cell, 8)
    record(cell, run, 20, rate)
    study.run_arm(cell, {20: run}, study.arms("mamba", work)["rewarmed 20 %"])
    assert [seen[step] / rate(step) for step in (19, 20, 24, 29, 30, 99)] == pytest.approx([1, 0.1, 0.5, 1, 1, 1])


def test_distillation_brings_the_answers_closer_to_the_teacher(study):
    cell = study.Cell("mamba2", "copying", 1, replace(tiny_work(study), distilled=1.0, distillation_rate=0.02))
    full = trained(study, cell, 20)
    with torch.no_grad():
        # A teacher that is sure of something.
        full.model.lm_head.weight.mul_(20)
    student = study.start(cell, 2)
    teacher = study.answer(full.model, cell.evaluation)
    before, kept = study.score(study.answer(student.model, cell.evaluation), teacher)["kl"], weights(full)
    study.distill(cell, student, full.model)
    after = study.score(study.answer(student.model, cell.evaluation), teacher)["kl"]
    assert after < 0.85 * before
    assert torch.equal(weights(full), kept) and student.step == 20


# --------------------------------------------------------------------------------------------------------- whole cells


def test_every_arm_is_there_and_ends_at_the_same_step(study, cells):
    for cell, (layout, task) in zip(cells, CELLS, strict=True):
        assert (cell["layout"], cell["task"], cell["seed"]) == (layout, task, 0)
        rows = {row["arm"]: row for row in cell["arms"]}
        in_training = {f"cut {share} %" for share in (5, 10, 20, 30, 50)} | {"stages", "compressm", "ghost 20 %"}
        in_training |= {"mean-LTI 20 %", "fresh moments 20 %", "rewarmed 20 %"}
        others = {"full", "small", "small, equal time", "cut after", "cut after + distillation"}
        only = {"small projected", "stock 20 %"} if layout == "mamba2" else set()
        assert set(rows) == in_training | others | only
        for name, row in rows.items():
            assert math.isfinite(row["loss"]) and len(row["state_sizes"]) == 2
            if name not in ("small, equal time", "cut after + distillation"):
                assert row["steps"] == 20
        assert rows["full"]["state_sizes"] == [8, 8] and sum(rows["cut 20 %"]["state_sizes"]) == 4
        assert [item["step"] for item in rows["stages"]["cuts"]] == [1, 2, 4, 6]
        assert [sum(item["state_sizes"]) for item in rows["stages"]["cuts"]] == [12, 8, 6, 4]
        assert rows["cut after + distillation"]["steps"] == 22
        per_step = rows["small"]["seconds"]["training"] / 20
        equal = rows["small, equal time"]["steps"]
        assert equal == pytest.approx(rows["cut 20 %"]["seconds"]["training"] / per_step, abs=1)
        parts = rows["cut 20 %"]["seconds"]
        assert parts["training"] == pytest.approx(parts["before"] + parts["after"] + parts["cuts"], rel=1e-4)
        assert rows["cut 20 %"]["ms_per_step"]["before"] is not None


def test_damage_and_arms_tell_the_same_of_the_same_cut(cells):
    for cell in cells:
        rows = {row["arm"]: row for row in cell["arms"]}
        damage = {(row["arm"], row["moment"], row["kept"]): row for row in cell["damage"]}
        assert damage["default", 1.0, 2]["loss"] == pytest.approx(rows["cut after"]["loss"], rel=1e-4)
        assert damage["uncut", 1.0, 8]["loss"] == pytest.approx(rows["full"]["loss"], rel=1e-4)
        (after_the_cut,) = [loss for step, _, loss, _ in rows["cut 20 %"]["trace"][-20:] if step == 4][-1:]
        assert damage["default", 0.2, 2]["loss"] == pytest.approx(after_the_cut, rel=1e-4)
        assert damage["default", 0.2, 2]["added"] == pytest.approx(
            damage["default", 0.2, 2]["loss"] - damage["uncut", 0.2, 8]["loss"], abs=1e-5
        )
        for moment in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0):
            assert {("default", moment, 2), ("ghost", moment, 2), ("hankel", moment, 2)} <= set(damage)
            curves = [row["error_curve"] for row in cell["spectra"] if row["moment"] == moment]
            assert [len(curve) for curve in curves] == [9, 9]
        for moment in (0.2, 1.0):
            found = {arm for arm, when, _ in damage if when == moment}
            assert set(CRITERIA) - {"refit"} | {"elimination", "default", "uncut"} <= found
            assert ("default", moment, 4) in damage


def test_longer_sequences_are_tried_where_there_are_any(cells):
    copying, recall = cells
    assert copying["longer"] == []
    assert [(row["arm"], row["length"]) for row in recall["longer"]] == [
        (arm, length) for length in (32, 44, 68) for arm in ("full", "small", "cut 20 %", "cut after")
    ]
    assert all(0 <= row["accuracy"] <= 1 for row in recall["longer"])


# ---------------------------------------------------------------------------------------------------- going on, tables


def test_resume_runs_no_finished_cell_again(study, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(study.WORKS, "quick", tiny_work(study))
    journal = (tiny_run / "study-quick.jsonl").read_text()
    # The second cell was being written when the run was stopped.
    (tmp_path / "study-quick.jsonl").write_text(journal[: len(journal) - 40] + "\n")
    ran, second = [], json.loads(journal.splitlines()[1])
    monkeypatch.setattr(study, "run_cell", lambda *cell: ran.append(cell[:3]) or second)
    for layout, task in CELLS:
        study.main(arguments(tmp_path, layout, task, "--resume"))
    assert ran == [("mamba2", "recall", 0)]
    kinds = ("time", "damage", "sizes", "spectra")
    names = {f"study-quick.{e}" for e in ("json", "jsonl", "md")} | {f"study-quick-{kind}.png" for kind in kinds}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / "study-quick.md").read_text() == (tiny_run / "study-quick.md").read_text()
    assert len(study.read_cells(tmp_path / "study-quick.jsonl", tiny_work(study))) == 2
    assert study.read_cells(tmp_path / "study-quick.jsonl", replace(tiny_work(study), layers=3)) == []


def test_a_failed_cell_is_told_and_does_not_end_the_run(study, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.WORKS, "quick", tiny_work(study))
    good = json.loads((tiny_run / "study-quick.jsonl").read_text().splitlines()[1])

    def run_cell(layout, *rest):
        if layout == "mamba":
            raise RuntimeError("it is broken")
        return good

    monkeypatch.setattr(study, "run_cell", run_cell)
    command = ["--quick", "--output", str(tmp_path), "--tasks", "recall", "--processes", "1"]
    with pytest.raises(SystemExit, match=r"1 cells failed \(mamba, recall, seed 0\)"):
        study.main(command)
    assert "it is broken" in capsys.readouterr().err
    assert [json.loads(line) for line in (tmp_path / "study-quick.jsonl").read_text().splitlines()] == [good]


def test_knobs_of_the_fits_are_turned_one_at_a_time(study, tmp_path, monkeypatch):
    import fitting

    work = replace(tiny_work(study), calibration_tokens=1024, state_size=16, kept=4)
    monkeypatch.setitem(study.WORKS, "quick", work)
    fitting.main(["--quick", "--processes", "1", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "fitting-quick.json").read_text())
    rows = {(row["layout"], row["knob"], row["value"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == sum(len(list(fitting.ways(layout, work))) for layout in study.LAYOUTS)
    # As many tokens as the defaults have, and no others: the same cut.
    assert rows["mamba", "calibration tokens", 1024]["kl"] == rows["mamba", "defaults", ""]["kl"]
    for knob, value in [("refit_rounds", 0), ("refit_steps", 3), ("refit_penalty", 1e-1)]:
        assert rows["mamba", knob, value]["kl"] != rows["mamba", "defaults", ""]["kl"], knob
    # The tiny model has no more channels than that.
    assert rows["mamba", "channels of the fits", 16]["kl"] == rows["mamba", "defaults", ""]["kl"]
    summary = {(row["layout"], row["knob"], row["value"]): row for row in results["summary"]}
    one = summary["mamba2", "projection_rounds", 0]
    ratio = rows["mamba2", "projection_rounds", 0]["kl"] / rows["mamba2", "defaults", ""]["kl"]
    assert one["ratio"] == pytest.approx(ratio) and one["models"] == 1
    assert (
        f"| projection_rounds | 0 | {one['kl']['recall']:.2g} | {one['ratio']:.2f}"
        in (tmp_path / "fitting-quick.md").read_text()
    )


def test_tables_without_a_cell_say_what_to_do(study, tmp_path):
    with pytest.raises(SystemExit, match="holds no finished cell"):
        study.main(["--tables", "--output", str(tmp_path)])


def made_up(layout: str, task: str, seed: int, losses: dict[str, float], kls: dict[str, float]) -> dict:
    seconds = {"full": 10.0, "small": 2.0}
    return {
        "layout": layout,
        "task": task,
        "seed": seed,
        "work": {"kept": 8},
        "arms": [
            {"arm": arm, "loss": loss, "accuracy": 1 - loss / 10, "seconds": {"training": seconds.get(arm, 4.0)}}
            for arm, loss in losses.items()
        ],
        "damage": [
            {"arm": arm, "moment": 0.2, "kept": 8, "kl": kl, "added": kl / 2, "relative_errors": [kl / 20, kl / 10]}
            for arm, kl in kls.items()
        ],
    }


def test_claim_2_is_a_paired_test_over_seeds(tables):
    cut, small = [1.0, 1.2, 1.1, 1.3], [1.1, 1.25, 1.22, 1.36]
    cells = [
        made_up("mamba", "text", seed, {"cut 20 %": one, "small": two, "small, equal time": one - 0.01 * seed}, {})
        for seed, (one, two) in enumerate(zip(cut, small, strict=True))
    ]
    rows = {row["against"]: row for row in tables.claim_2(cells)}
    expected = stats.ttest_rel(cut, small).confidence_interval(0.95)
    assert [rows["small"]["loss"][end] for end in ("low", "high")] == pytest.approx([expected.low, expected.high])
    assert rows["small"]["verdict"] == "holds" and expected.high < 0
    assert rows["small"]["accuracy"]["mean"] == pytest.approx(-rows["small"]["loss"]["mean"] / 10)
    # 0, 0.01, 0.02, 0.03: the interval contains zero.
    assert rows["small, equal time"]["verdict"] == "not shown" and set(rows) == {"small", "small, equal time"}
    worse = [made_up("mamba", "text", seed, {"cut 20 %": 2.0 + seed / 100, "small": 1.0}, {}) for seed in range(3)]
    assert [row["verdict"] for row in tables.claim_2(worse)] == ["reversed"]
    assert [row["verdict"] for row in tables.claim_2(worse[:1])] == ["one seed"]


def test_claim_3_is_a_ratio_of_means_and_a_mean_of_the_tasks_ratios(tables):
    cells = [
        made_up("mamba", "text", 0, {}, {"default": 0.01, "ghost": 0.2, "hankel": 1.0}),
        made_up("mamba", "text", 1, {}, {"default": 0.03, "ghost": 0.6, "hankel": 1.0}),
        made_up("mamba", "recall", 0, {}, {"default": 1.0, "ghost": 5.0, "hankel": 20.0}),
        made_up("mamba2", "recall", 0, {}, {"default": 1.0, "ghost": 20.0, "hankel": 5.0}),
    ]
    rows = {(row["layout"], row["against"]): row for row in tables.claim_3(cells)}
    row = rows["mamba", "ghost"]
    assert row["share"] == pytest.approx(1.04 / 5.8)
    assert row["by task"] == {"text": pytest.approx(0.05), "recall": pytest.approx(0.2)}
    assert row["mean of task shares"] == pytest.approx(0.125) and row["verdict"] == "MISSED"
    assert rows["mamba", "hankel"]["verdict"] == rows["mamba2", "ghost"]["verdict"] == "met"
    assert rows["mamba2", "hankel"]["verdict"] == "MISSED"


def test_the_readme_shows_each_task_alone(tables):
    import readme_results

    cells = [
        made_up("mamba", task, 0, {}, {"default": own, "ghost": 1.0, "hankel": 2.0})
        for task, own in (("text", 0.3), ("recall", 0.1))
    ]
    rows = {row["name"]: row["shares"] for row in readme_results.claim_3_rows({"claim 3": tables.claim_3(cells)})}
    assert {name: round(shares[0.2], 6) for name, shares in rows.items()} == {
        "mamba, of GHOST's": 0.2,
        "mamba, of mean-LTI's": 0.1,
        "mamba, of GHOST's, text alone": 0.3,
        "mamba, of GHOST's, recall alone": 0.1,
    }


def test_measured_errors_stand_beside_what_they_did(tables):
    cells = [
        made_up("mamba", "text", seed, {}, {"default": kl, "ghost": 5.0}) for seed, kl in enumerate((0.15, 0.6, 0.9))
    ]
    first, second = tables.error_rows(cells)
    assert (first["low"], first["high"], first["cuts"], first["kl"]) == (0.01, 0.02, 1, 0.15)
    assert (second["low"], second["high"], second["cuts"]) == (0.05, 0.1, 2)
    assert (second["kl"], second["largest kl"], second["largest added"]) == pytest.approx((0.75, 0.9, 0.45))


def test_tables_hold_the_numbers_of_the_cells(tables, tiny_run, cells):
    text = (tiny_run / "study-quick.md").read_text()
    for cell in cells:
        section = text.split(f"\n## {cell['layout']}, {cell['task']}\n")[1].split("\n## ")[0]
        lines = [[part.strip() for part in line.split("|")[1:-1]] for line in section.splitlines() if " ± " in line]
        rows = {line[0]: line[1:] for line in lines}
        by_arm = {row["arm"]: row for row in cell["arms"]}
        assert set(rows) == set(by_arm)
        for arm, columns in rows.items():
            row = by_arm[arm]
            assert columns[1] == str(row["steps"])
            share = row["seconds"]["training"] / by_arm["full"]["seconds"]["training"]
            assert columns[2] == f"{share:.2f}"
            assert [column.split(" ± ")[0] for column in columns[4:6]] == [
                f"{row['loss']:.3f}",
                f"{row['accuracy']:.3f}",
            ]
            if arm != "small":
                assert columns[6] == f"{row['loss'] - by_arm['small']['loss']:+.3f}"
    summary = json.loads((tiny_run / "study-quick.json").read_text())
    shares = {(row["layout"], row["moment"], row["against"]): row["share"] for row in summary["claim 3"]}
    for cell in cells:
        damage = {row["arm"]: row for row in cell["damage"] if row["moment"] == 0.3}
        share = damage["default"]["kl"] / damage["ghost"]["kl"]
        assert shares[cell["layout"], 0.3, "ghost"] == pytest.approx(share)
        assert f"| {tables.percent(share)} |" in text
    for picture in ("time", "damage", "sizes", "spectra"):
        assert (tiny_run / f"study-quick-{picture}.png").read_bytes().startswith(b"\x89PNG")
