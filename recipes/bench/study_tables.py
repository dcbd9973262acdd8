"""The tables and pictures of study.py: every number and every verdict is computed from the journal's cells."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from reporting import write_results
from scipy import stats

CHOSEN = "cut 20 %"
# Claim 2: the arm that is cut in training, and what it is compared with.
PAIRS = (
    (CHOSEN, "small"),
    (CHOSEN, "small, equal time"),
    (CHOSEN, "small projected"),
    ("stock 20 %", "small"),
    (CHOSEN, "full"),
)
REFERENCES = {"ghost": "GHOST", "hankel": "mean-LTI"}
# Claim 3: the share of the references' KL that the default's may be.
MOST_DAMAGE = 0.1
# Largest relative error of a layer, as the plan measured it: what a `tolerance` bounds.
ERRORS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# What the defaults could be instead.
ALTERNATIVES = (
    *("cut 5 %", "cut 10 %", "cut 30 %", "cut 50 %", "stages", "cut after", "cut after + distillation"),
    *("fresh moments 20 %", "rewarmed 20 %", "stock 20 %", "ghost 20 %", "mean-LTI 20 %", "compressm"),
)

Cells = list[dict[str, Any]]


# ------------------------------------------------------------------------------------------------------------- numbers


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation, of one value 0."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values)}


def interval(differences: list[float]) -> dict[str, float | None]:
    """The mean of paired differences and its 95 % confidence interval, by Student's t; None of fewer than two.

    Example:
        >>> {key: value and round(value, 3) for key, value in interval([1.0, 2.0, 3.0]).items()}
        {'mean': 2.0, 'low': -0.484, 'high': 4.484, 'n': 3}
    """
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "n": count}
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": count}


def verdict(difference: dict[str, float | None]) -> str:
    """Whether a loss is lower: `holds` or `reversed` where the interval excludes zero."""
    if difference["low"] is None:
        return "one seed"
    return "holds" if difference["high"] < 0 else "reversed" if difference["low"] > 0 else "not shown"


def arm_of(cell: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((row for row in cell["arms"] if row["arm"] == name), None)


def places(cells: Cells) -> list[tuple[str, str]]:
    """Layouts and tasks, in the order in which they first come."""
    return list(dict.fromkeys((cell["layout"], cell["task"]) for cell in cells))


def at(cells: Cells, layout: str, task: str) -> Cells:
    return [cell for cell in cells if (cell["layout"], cell["task"]) == (layout, task)]


def paired(cells: Cells, arm: str, other: str, key: str = "loss") -> list[float]:
    """arm − other in each cell that has both."""
    rows = [(arm_of(cell, arm), arm_of(cell, other)) for cell in cells]
    return [one[key] - two[key] for one, two in rows if one is not None and two is not None]


# --------------------------------------------------------------------------------------------------------- the summary


def arm_rows(cells: Cells) -> list[dict[str, Any]]:
    """Each arm's quality and time, and its difference to the model born small and to the full one."""
    result = []
    for layout, task in places(cells):
        chosen = at(cells, layout, task)
        for name in dict.fromkeys(row["arm"] for cell in chosen for row in cell["arms"]):
            pairs = [(arm_of(cell, name), arm_of(cell, "full")) for cell in chosen if arm_of(cell, name) is not None]
            rows = [row for row, _ in pairs]
            row = {"layout": layout, "task": task, "arm": name, "seeds": len(rows)}
            row |= {key: spread([item[key] for item in rows]) for key in ("loss", "accuracy", "steps")}
            row["time"] = spread([one["seconds"]["training"] / full["seconds"]["training"] for one, full in pairs])
            row["states"] = spread([statistics.fmean(item["state_sizes"]) for item in rows])
            after = [item["ms_per_step"]["after"] for item in rows if item["ms_per_step"]["after"] is not None]
            row["ms_per_step"] = statistics.fmean(after) if after else None
            for other in ("small", "full", CHOSEN):
                row[f"to {other}"] = interval(paired(chosen, name, other))
            result.append(row)
    return result


def claim_2(cells: Cells) -> list[dict[str, Any]]:
    """Is a model that starts big and is cut better than one trained small?"""
    result = []
    for layout, task in places(cells):
        for arm, other in PAIRS:
            losses = paired(at(cells, layout, task), arm, other)
            if not losses:
                continue
            loss = interval(losses)
            accuracy = interval(paired(at(cells, layout, task), arm, other, "accuracy"))
            row = {"layout": layout, "task": task, "arm": arm, "against": other}
            result.append(row | {"loss": loss, "accuracy": accuracy, "verdict": verdict(loss)})
    return result


def damages(cells: Cells, arm: str, moment: float, kept: int | None = None, key: str = "kl") -> list[float]:
    """What a cut alone did at a moment, one number for each cell; at the study's r if no other is given."""
    return [
        row[key]
        for cell in cells
        for row in cell["damage"]
        if (row["arm"], row["moment"], row["kept"]) == (arm, moment, kept or cell["work"]["kept"])
    ]


def claim_3(cells: Cells) -> list[dict[str, Any]]:
    """Is the damage of a cut at most a tenth of GHOST's and of the mean-LTI rule's?"""
    result = []
    for layout in dict.fromkeys(cell["layout"] for cell in cells):
        tasks = [at(cells, *place) for place in places(cells) if place[0] == layout]
        own = [cell for group in tasks for cell in group]
        for moment in moments_of(own):
            for reference in REFERENCES:
                default = statistics.fmean(damages(own, "default", moment))
                share = default / statistics.fmean(damages(own, reference, moment))
                by_task = {
                    group[0]["task"]: statistics.fmean(damages(group, "default", moment))
                    / statistics.fmean(damages(group, reference, moment))
                    for group in tasks
                }
                row = {"layout": layout, "moment": moment, "against": reference, "cells": len(own), "kl": default}
                row |= {"share": share, "mean of task shares": statistics.fmean(by_task.values()), "by task": by_task}
                result.append(row | {"goal": MOST_DAMAGE, "verdict": "met" if share <= MOST_DAMAGE else "MISSED"})
    return result


def moments_of(cells: Cells) -> list[float]:
    return sorted({row["moment"] for cell in cells for row in cell["damage"]})


def damage_rows(cells: Cells) -> list[dict[str, Any]]:
    """The damage of every way to cut, at every moment and r."""
    result = []
    for layout, task in places(cells):
        chosen = at(cells, layout, task)
        ways = [(row["moment"], row["arm"], row["kept"]) for cell in chosen for row in cell["damage"] if "kl" in row]
        for moment, arm, kept in dict.fromkeys(ways):
            row = {"layout": layout, "task": task, "moment": moment, "arm": arm, "kept": kept}
            row |= {key: spread(damages(chosen, arm, moment, kept, key)) for key in ("kl", "added")}
            result.append(row)
    return result


def error_rows(cells: Cells) -> list[dict[str, Any]]:
    """What default cuts did to the answers, by the error that their plans foresaw for the layers."""
    result = []
    for layout in dict.fromkeys(cell["layout"] for cell in cells):
        cuts = [row for cell in cells if cell["layout"] == layout for row in cell["damage"] if row["arm"] == "default"]
        for low, high in itertools.pairwise((*ERRORS, None)):
            own = [row for row in cuts if low <= max(row["relative_errors"]) < (high or math.inf)]
            if own:
                row = {"layout": layout, "low": low, "high": high, "cuts": len(own)}
                row |= {key: statistics.median(item[key] for item in own) for key in ("kl", "added")}
                result.append(row | {f"largest {key}": max(item[key] for item in own) for key in ("kl", "added")})
    return result


def longer_rows(cells: Cells) -> list[dict[str, Any]]:
    """Accuracy on sequences longer than those of training."""
    result = []
    for layout, task in places(cells):
        rows = [row for cell in at(cells, layout, task) for row in cell["longer"]]
        for arm, times, length in dict.fromkeys((row["arm"], row["times"], row["length"]) for row in rows):
            values = [row["accuracy"] for row in rows if (row["arm"], row["times"]) == (arm, times)]
            place = {"layout": layout, "task": task, "arm": arm, "times": times, "length": length}
            result.append(place | {"accuracy": spread(values)})
    return result


def alternatives(cells: Cells) -> list[dict[str, Any]]:
    """Other moments, and other ways to treat the optimizer, against the chosen arm, over all cells of a layout."""
    result = []
    for layout in dict.fromkeys(cell["layout"] for cell in cells):
        own = [cell for cell in cells if cell["layout"] == layout]
        for name in (CHOSEN, *ALTERNATIVES):
            losses = paired(own, name, CHOSEN)
            if not losses:
                continue
            times = [
                arm_of(cell, name)["seconds"]["training"] / arm_of(cell, "full")["seconds"]["training"]
                for cell in own
                if arm_of(cell, name) is not None
            ]
            verdicts = [verdict(interval(paired(at(own, *place), name, CHOSEN))) for place in places(own)]
            row = {"layout": layout, "arm": name, "cells": len(losses), "loss": interval(losses)}
            row |= {"better": sum(loss < 0 for loss in losses), "time": statistics.fmean(times)}
            row |= {"tasks better": verdicts.count("holds"), "tasks worse": verdicts.count("reversed")}
            result.append(row)
    return result


def summarize(cells: Cells) -> dict[str, Any]:
    """Everything that the tables show."""
    return {
        "machine": cells[0]["machine"],
        "work": cells[0]["work"],
        "seeds": {f"{layout}, {task}": [c["seed"] for c in at(cells, layout, task)] for layout, task in places(cells)},
        "claim 2": claim_2(cells),
        "claim 3": claim_3(cells),
        "errors": error_rows(cells),
        "longer": longer_rows(cells),
        "alternatives": alternatives(cells),
        "arms": arm_rows(cells),
        "damage": damage_rows(cells),
    }


# ---------------------------------------------------------------------------------------------------------- the tables


Columns = dict[str, Callable[[dict[str, Any]], Any]]


def table(rows: Iterable[dict[str, Any]], columns: Columns) -> str:
    """A Markdown table; a column is its heading and what it says of a row."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[str(say(row)) for say in columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pm(values: dict[str, float], digits: int = 3) -> str:
    return f"{values['mean']:.{digits}f} ± {values['sd']:.{digits}f}"


def between(values: dict[str, float | None], digits: int = 3) -> str:
    """A difference and its interval."""
    if values["low"] is None:
        return f"{values['mean']:+.{digits}f}"
    return f"{values['mean']:+.{digits}f} [{values['low']:+.{digits}f}, {values['high']:+.{digits}f}]"


def percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}".replace("%", " %")


PLACE: Columns = {"layout": lambda row: row["layout"], "task": lambda row: row["task"]}

CLAIM_2: Columns = {
    **PLACE,
    "arm": lambda row: row["arm"],
    "against": lambda row: row["against"],
    "seeds": lambda row: row["loss"]["n"],
    "difference in loss": lambda row: between(row["loss"]),
    "in accuracy": lambda row: between(row["accuracy"]),
    "lower loss": lambda row: row["verdict"],
}

CLAIM_3: Columns = {
    "layout": lambda row: row["layout"],
    "cut at": lambda row: percent(row["moment"], 0),
    "mean KL": lambda row: f"{row['kl']:.2g}",
    "against": lambda row: REFERENCES[row["against"]],
    "cells": lambda row: row["cells"],
    "share of its KL": lambda row: percent(row["share"]),
    "mean of the tasks' shares": lambda row: percent(row["mean of task shares"]),
    "worst task": lambda row: worst(row["by task"]),
    "goal": lambda row: row["verdict"],
}

ERROR: Columns = {
    "layout": lambda row: row["layout"],
    "largest error of a layer": lambda row: (
        f"{percent(row['low'], 0)} to {percent(row['high'], 0)}" if row["high"] else f"above {percent(row['low'], 0)}"
    ),
    "cuts": lambda row: row["cuts"],
    "KL": lambda row: f"{row['kl']:.2g}",
    "largest KL": lambda row: f"{row['largest kl']:.2g}",
    "added loss": lambda row: f"{row['added']:+.2g}",
    "largest added loss": lambda row: f"{row['largest added']:+.2g}",
}

ALTERNATIVE: Columns = {
    "layout": lambda row: row["layout"],
    "arm": lambda row: row["arm"],
    "time / full": lambda row: f"{row['time']:.2f}",
    f"loss − {CHOSEN}": lambda row: between(row["loss"], 4),
    "lower in": lambda row: f"{row['better']} of {row['cells']} cells",
    "tasks lower": lambda row: row["tasks better"],
    "tasks higher": lambda row: row["tasks worse"],
}

ARM: Columns = {
    "arm": lambda row: row["arm"],
    "r": lambda row: f"{row['states']['mean']:.4g}",
    "steps": lambda row: f"{row['steps']['mean']:.0f}",
    "time / full": lambda row: f"{row['time']['mean']:.2f}",
    "ms / step": lambda row: "–" if row["ms_per_step"] is None else f"{row['ms_per_step']:.1f}",
    "loss": lambda row: pm(row["loss"]),
    "accuracy": lambda row: pm(row["accuracy"]),
    "loss − small": lambda row: "" if row["arm"] == "small" else between(row["to small"]),
    "loss − full": lambda row: "" if row["arm"] == "full" else between(row["to full"]),
}


def worst(shares: dict[str, float]) -> str:
    task = max(shares, key=shares.__getitem__)
    return f"{task}: {percent(shares[task])}"


def longer_table(rows: list[dict[str, Any]]) -> str:
    found = {(row["layout"], row["task"], row["arm"], row["times"]): row["accuracy"] for row in rows}
    arms = list({(row["layout"], row["task"], row["arm"]): row for row in rows}.values())
    columns: Columns = {**PLACE, "arm": lambda row: row["arm"]}
    for times in sorted({row["times"] for row in rows}):
        columns["as trained" if times == 1 else f"{times}×"] = lambda row, times=times: pm(
            found[row["layout"], row["task"], row["arm"], times]
        )
    return table(arms, columns)


def damage_table(summary: dict[str, Any], layout: str, moment: float) -> str:
    """KL of every way to cut, by task; the default at several r comes first."""
    rows = [row for row in summary["damage"] if (row["layout"], row["moment"]) == (layout, moment)]
    found = {(row["arm"], row["kept"], row["task"]): row["kl"]["mean"] for row in rows}
    ways = list({(row["arm"], row["kept"]): row for row in rows}.values())
    ways.sort(key=lambda row: (row["arm"] != "default", row["kept"] if row["arm"] == "default" else 0))
    columns: Columns = {"way to cut": lambda row: REFERENCES.get(row["arm"], row["arm"]), "r": lambda row: row["kept"]}
    for task in dict.fromkeys(row["task"] for row in rows):
        columns[task] = lambda row, task=task: f"{found.get((row['arm'], row['kept'], task), math.nan):.2g}"
    return table(ways, columns)


def markdown(summary: dict[str, Any]) -> str:
    """All tables."""
    work, machine = summary["work"], summary["machine"]
    batches = ", ".join(f"{tokens} tokens ({layout})" for layout, tokens in work["batch_tokens"])
    seeds = sorted({seed for numbers in summary["seeds"].values() for seed in numbers})
    parts = [
        "# Shrinking in training: what it gives and what it costs",
        f"Stock Transformers models, {work['layers']} layers of width {work['hidden_size']}, N = "
        f"{work['state_size']} → r = {work['kept']} (of Mamba-2, r states per layer on average), trained for "
        f"{work['steps']} steps of at least {batches}; seeds {', '.join(map(str, seeds))}. All arms of a seed see the "
        "same batches in the same order. Loss (nats) and accuracy at the asked positions of the same held-out "
        "sequences; r, steps, times and ms are means over seeds, ± is the standard deviation "
        "over seeds, brackets are 95 % confidence intervals (Student's t) of the mean paired difference, each on its "
        "own: with many rows, some exclude zero by chance. Times are one thread's process seconds, cuts included. "
        f"{machine['device']}, torch {machine['versions']['torch']}, transformers "
        f"{machine['versions']['transformers']}, {machine['date']}.",
        "## Claim 2: a model that starts big and is cut against one trained small",
        "`holds`: the interval of the difference in loss lies below zero; `reversed`: above; `not shown`: it contains "
        "zero. `small, equal time` trains for as long as the cut model took; `small projected` has the cut model's "
        "architecture from the start.",
        table(summary["claim 2"], CLAIM_2),
        "## Claim 3: what a cut does to the model, without training after it",
        "KL (nats per asked token) from the uncut to the cut model, of the default at the same r as GHOST's selection "
        f"and the mean-LTI rule's. Goal: the mean over all tasks and seeds is at most {percent(MOST_DAMAGE, 0)} of "
        "theirs. The mean of the tasks' shares stands beside it: there, a task that hardly needs its states counts as "
        "much as one that a selection ruins.",
        table(summary["claim 3"], CLAIM_3),
        "## What a measured error means",
        "The default's cuts at all moments and sizes, of all tasks and seeds, by the largest relative error that the "
        "plan measured in a layer (what `tolerance` bounds): median and largest KL and added loss, nats.",
        table(summary["errors"], ERROR),
        "## The choice of defaults",
        f"Each arm against `{CHOSEN}` (one cut at a fifth of training, by the defaults), over all tasks and seeds; "
        "tasks lower or higher: in how many tasks the interval over seeds excludes zero. Losses of different tasks "
        "differ in size, so that the interval over all cells is a summary, not a test.",
        table(summary["alternatives"], ALTERNATIVE),
    ]
    if summary["longer"]:
        parts += [
            "## Beyond the trained length",
            "Accuracy: recall with twice and four times as many pairs to remember as in training, passkey in "
            "sequences two and four times as long.",
            longer_table(summary["longer"]),
        ]
    for place in summary["seeds"]:
        rows = [row for row in summary["arms"] if f"{row['layout']}, {row['task']}" == place]
        parts += [f"## {place}", f"Seeds: {len(summary['seeds'][place])}.", table(rows, ARM)]
    parts += ["## All ways to cut: KL from the uncut model"]
    for layout in dict.fromkeys(row["layout"] for row in summary["damage"]):
        for moment in work["thorough_moments"]:
            if any((row["layout"], row["moment"]) == (layout, moment) for row in summary["damage"]):
                when = "at the end of training" if moment == 1 else f"at {percent(moment, 0)} of training"
                parts += [f"### {layout}, {when}", damage_table(summary, layout, moment)]
    return "\n\n".join(parts) + "\n"


# -------------------------------------------------------------------------------------------------------- the pictures


def write_tables(cells: Cells, output: Path, name: str) -> None:
    """Write NAME.json, NAME.md and four pictures of finished cells."""
    # Cells come as they finish; the tables have an order of their own.
    order = list(dict.fromkeys(cell["task"] for cell in sorted(cells, key=lambda cell: cell["seed"])))
    cells = sorted(cells, key=lambda cell: (cell["layout"], order.index(cell["task"]), cell["seed"]))
    summary = summarize(cells)
    write_results(output, name, summary, markdown(summary))
    for what, draw in PICTURES.items():
        draw(cells, summary, output / f"{name}-{what}.png")


def panels(
    cells: Cells, title: str, draw: Callable[[Any, str, str], None], path: Path, note: str = "", columns: int = 5
) -> None:
    """One panel for each layout and task, and one legend for all."""
    from matplotlib.figure import Figure

    layouts = list(dict.fromkeys(cell["layout"] for cell in cells))
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    figure = Figure(figsize=(max(7.0, 1.0 + 3.6 * len(tasks)), 1.2 + 3.0 * len(layouts)), layout="constrained")
    grid = figure.subplots(len(layouts), len(tasks), squeeze=False)
    labelled: dict[str, Any] = {}
    for row, layout in enumerate(layouts):
        for column, task in enumerate(tasks):
            axes = grid[row][column]
            if not at(cells, layout, task):
                axes.set_axis_off()
                continue
            draw(axes, layout, task)
            axes.set_title(f"{layout}, {task}", fontsize=10)
            axes.grid(alpha=0.3)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                labelled.setdefault(label, handle)
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns, fontsize="small")
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=10)
    figure.savefig(path, dpi=110)


COLORS = {
    **{"full": "black", "small": "tab:blue", "small, equal time": "tab:cyan", "small projected": "tab:purple"},
    **{
        "cut 5 %": "#ffcf99",
        "cut 10 %": "#ffa94d",
        "cut 20 %": "tab:red",
        "cut 30 %": "#a61e1e",
        "cut 50 %": "#5c0f0f",
    },
    **{"stages": "tab:olive", "ghost 20 %": "tab:gray", "mean-LTI 20 %": "tab:brown", "stock 20 %": "tab:pink"},
    **{"cut after": "tab:green", "cut after + distillation": "limegreen"},
}
TRACED = ("full", "small, equal time", CHOSEN)


def draw_time(cells: Cells, summary: dict[str, Any], path: Path) -> None:
    """Loss against total training time."""

    def draw(axes: Any, layout: str, task: str) -> None:
        chosen = at(cells, layout, task)
        seconds = statistics.fmean(arm_of(cell, "full")["seconds"]["training"] for cell in chosen)
        for name in TRACED:
            traces = [arm_of(cell, name)["trace"] for cell in chosen]
            points = [
                [statistics.fmean(values) for values in zip(*point, strict=True)]
                for point in zip(*traces, strict=True)
            ]
            axes.plot([p[1] / seconds for p in points], [p[2] for p in points], color=COLORS[name], lw=1, alpha=0.5)
        rows = [row for row in summary["arms"] if (row["layout"], row["task"]) == (layout, task)]
        rows = [row for row in rows if row["arm"] in COLORS]
        for row in rows:
            axes.errorbar(
                row["time"]["mean"],
                row["loss"]["mean"],
                row["loss"]["sd"],
                fmt="s" if "small" in row["arm"] else "D" if row["arm"].startswith("cut") else "o",
                ms=5,
                color=COLORS[row["arm"]],
                lw=1,
                label=row["arm"],
            )
        low = min(row["loss"]["mean"] - row["loss"]["sd"] for row in rows)
        high = max(row["loss"]["mean"] + row["loss"]["sd"] for row in rows)
        margin = 0.08 * (high - low)
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlim(0)
        axes.set_xlabel("training time / that of the full model", fontsize=9)
        axes.set_ylabel("held-out loss, nats", fontsize=9)

    note = "markers: at the end of training, mean ± standard deviation over seeds; lines: on the way there"
    panels(cells, "Quality against total training time", draw, path, note)


WAYS = {
    "default": ("tab:red", "o"),
    "ghost": ("tab:gray", "s"),
    "hankel": ("tab:brown", "^"),
    "stock": ("tab:pink", "v"),
    "projected, equal r": ("tab:orange", "D"),
}


def draw_damage(cells: Cells, summary: dict[str, Any], path: Path) -> None:
    """KL of a cut alone against the moment it is made."""

    def draw(axes: Any, layout: str, task: str) -> None:
        chosen = at(cells, layout, task)
        for arm, (color, marker) in WAYS.items():
            moments = [moment for moment in moments_of(chosen) if damages(chosen, arm, moment)]
            if moments:
                values = [damages(chosen, arm, moment) for moment in moments]
                xs, middle = [100 * moment for moment in moments], [statistics.fmean(column) for column in values]
                label = REFERENCES.get(arm, arm)
                axes.plot(xs, middle, color=color, marker=marker, ms=4, lw=1.3, label=label)
                axes.fill_between(
                    xs, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12, lw=0
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [100 * moment for moment in moments_of(chosen)]
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("cut at, % of training", fontsize=9)
        axes.set_ylabel("KL from the uncut model, nats", fontsize=9)

    kept = summary["work"]["kept"]
    panels(cells, f"Damage of a cut to r = {kept} alone (mean and range over seeds)", draw, path)


def draw_sizes(cells: Cells, summary: dict[str, Any], path: Path) -> None:
    """KL of a cut alone against r."""

    def draw(axes: Any, layout: str, task: str) -> None:
        chosen = at(cells, layout, task)
        work = summary["work"]
        sizes = sorted({work["kept"], *work["other_kept"]})
        for moment, style in zip(work["thorough_moments"], ("--", "-"), strict=False):
            when = "after training" if moment == 1 else f"at {percent(moment, 0)}"
            values = [damages(chosen, "default", moment, kept) for kept in sizes]
            middle = [statistics.fmean(column) for column in values]
            axes.plot(sizes, middle, style, color="tab:red", marker="o", ms=4, label=f"default, {when}")
            axes.fill_between(
                sizes, [min(v) for v in values], [max(v) for v in values], color="tab:red", alpha=0.1, lw=0
            )
            for arm in REFERENCES:
                color, marker = WAYS[arm]
                face = color if moment == 1 else "none"
                value = statistics.fmean(damages(chosen, arm, moment))
                label = f"{REFERENCES[arm]}, {when}"
                axes.plot([work["kept"]], [value], marker, color=color, mfc=face, ms=6, ls="", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("states kept, r", fontsize=9)
        axes.set_ylabel("KL from the uncut model, nats", fontsize=9)

    full = summary["work"]["state_size"]
    panels(cells, f"Damage of a cut from N = {full} against r (mean and range over seeds)", draw, path, columns=3)


STYLES = ("-", "--", ":", "-.")


def draw_spectra(cells: Cells, summary: dict[str, Any], path: Path) -> None:
    """Each layer's error against r, over training."""
    from matplotlib import colormaps

    def draw(axes: Any, layout: str, task: str) -> None:
        chosen = at(cells, layout, task)
        moments = sorted({row["moment"] for cell in chosen for row in cell["spectra"]})
        layers = sorted({row["layer"] for cell in chosen for row in cell["spectra"]})
        for number, moment in enumerate(moments):
            color = colormaps["viridis"](0.9 * (1 - number / max(1, len(moments) - 1)))
            for layer, style in zip(layers, STYLES, strict=False):
                curves = [
                    row["error_curve"]
                    for cell in chosen
                    for row in cell["spectra"]
                    if (row["moment"], row["layer"]) == (moment, layer)
                ]
                curve = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                label = f"at {percent(moment, 0)} of training" if layer == layers[0] else None
                axes.plot(range(1, len(curve) - 1), curve[1:-1], style, color=color, lw=1, label=label)
        for layer, style in zip(layers, STYLES, strict=False):
            axes.plot([], [], style, color="gray", lw=1, label=f"layer {layer}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(1e-3, 1.2)
        ticks = [2**power for power in range(20) if 2**power < len(curve)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.axvline(summary["work"]["kept"], color="gray", lw=0.8)
        axes.set_xlabel("states kept, r", fontsize=9)
        axes.set_ylabel("expected relative error of the layer", fontsize=9)

    panels(
        cells,
        "What the states are worth, over training (mean over seeds)",
        draw,
        path,
        "vertical line: r of the study",
        columns=4,
    )


PICTURES = {"time": draw_time, "damage": draw_damage, "sizes": draw_sizes, "spectra": draw_spectra}
