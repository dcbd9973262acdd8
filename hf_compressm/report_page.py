"""`report.html`: what was cut, what it cost and what it brought, on one page that needs no network."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .config import chosen, is_whole
from .files import write_file
from .plots import (
    INK,
    close_up,
    draw_criteria,
    draw_loss,
    draw_loss_around,
    draw_memory,
    draw_spectrum,
    draw_state_size,
    draw_step_time,
    figure_svg,
    save_figure,
)
from .record import LABELS, RECALL, RECORD_FILE, Record, size_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_FILE = "report.html"
NOTHING = "–"
# How the entries of `Record.run` are called on the page; others keep their names.
RUN_NAMES = {"base_model": "base model", "dataset": "data", "seed": "seed", "steps": "training steps"}


@dataclass
class Picture:
    """A figure on the page.

    Attributes:
        file: the name of its PNG.
        alt: what is to be seen, for those who do not see it.
        caption: how to read it.
    """

    figure: Figure
    file: str
    alt: str
    caption: str

    @property
    def svg(self) -> Markup:
        """The figure in the page's own text color."""
        opening = Markup('<svg role="img" aria-label="{}" ').format(self.alt)
        return opening + Markup(figure_svg(self.figure).removeprefix("<svg ").replace(INK, "currentColor"))


@dataclass
class Table:
    """A table on the page; the first cell of each row is its header.

    Attributes:
        numeric: the numbers of the columns that hold numbers.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numeric: set[int] = field(default_factory=set)


def write_report_page(directory: str | Path, output: str | Path | None = None) -> Path:
    """Write what `compressm.json` tells of a model as one HTML page, with its pictures in it.

    The pictures are also written as PNG files, into `report_pictures/` beside `report.html`. What the record does not
    hold (a timeline, evaluations, ...) is left out.

    Args:
        directory: of a saved model or a checkpoint, with its `compressm.json`.
        output: the page's file; by default `report.html` in that directory. An older one is replaced.

    Returns:
        The page's file.

    Raises:
        FileNotFoundError: there is no `compressm.json`.
        ValueError: it is broken.
    """
    file = Path(directory) / RECORD_FILE
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist. A model that was cut has it beside its weights: save it once more with "
            "save_pretrained after the cut, or name the directory of a checkpoint that was saved after it"
        )
    record = Record.load(directory)
    _check(record, file)
    output = Path(directory) / PAGE_FILE if output is None else Path(output)
    pictures = Pictures(record)
    page = _template().render(**_content(record, pictures))
    for picture in pictures.all():
        save_figure(picture.figure, output.with_name(f"{output.stem}_pictures") / picture.file)
    write_file(output, page)
    return output


@dataclass
class Pictures:
    """The pictures of a record, as far as it has what they show."""

    record: Record
    spectra: list[Picture] = field(init=False)
    close_ups: list[Picture | None] = field(init=False)
    training: list[Picture] = field(init=False)
    criteria: list[Picture] = field(init=False)

    def __post_init__(self) -> None:
        record, numbers = self.record, _numbered(self.record.made_cuts)
        self.spectra = [_spectrum(cut, number) for number, cut in numbers]
        self.close_ups = [_close_up(record.timeline, cut, number) for number, cut in numbers]
        self.training = _training_pictures(record)
        self.criteria = _criteria_picture(record)

    def all(self) -> list[Picture]:
        close_ups = [picture for picture in self.close_ups if picture is not None]
        return [*self.spectra, *close_ups, *self.training, *self.criteria]


def _template() -> Any:
    environment = Environment(loader=PackageLoader("hf_compressm"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html")


def _content(record: Record, pictures: Pictures) -> dict[str, Any]:
    made = record.made_cuts
    return {
        "headline": _headline(made),
        "summary": _summary(record),
        "numbers": _key_numbers(record) if made else [],
        "evaluations": _evaluations(record.evaluations),
        "training": pictures.training,
        "cuts": [
            {
                "title": f"The cut{_at_step(cut)}" if len(made) == 1 else f"Cut {number}{_at_step(cut)}",
                "summary": _cut_summary(cut),
                "figures": [
                    picture for picture in (pictures.spectra[number - 1], pictures.close_ups[number - 1]) if picture
                ],
                "layers": _layer_table(cut),
            }
            for number, cut in _numbered(made)
        ],
        "criteria": pictures.criteria,
        "attempts": _attempts(record.cuts),
        "facts": _facts(record),
        "command": str(record.run.get("command") or ""),
        "configs": _configs(record.cuts),
    }


def _headline(made: Sequence[Mapping[str, Any]]) -> str:
    if not made:
        return "Nothing was cut"
    before, after = _range(made[0], "before"), _range(made[-1], "after")
    return f"State size {before} → {after}"


def _summary(record: Record) -> list[str]:
    """The first lines: what happened, when, and what it brought."""
    made, others = record.made_cuts, [cut for cut in record.cuts if cut["status"] != "cut"]
    if not made:
        if not others:
            return ["The record lists no cut and no attempt at one: the model has the states it was built with."]
        return ["No cut was made that stayed: the model has the states it was built with. The reasons are below."]
    steps = [f"{cut['step']:,}" for cut in made if cut.get("step") is not None]
    total = _number(record.run.get("steps"))
    whole = "" if total is None else f" of {total:,.0f}"
    when = f" after step{'s' if len(steps) > 1 else ''} {_and(steps)}{whole}" if steps else " in one shot"
    realization = "projected" if _any_projected(made) else "stock"
    lines = [f"The state of {_count(len(made[-1]['layers']), 'Mamba layer')} was cut{when}."]
    if realization == "projected":
        lines[0] += " The states were projected: the model has two more matrices in each layer that was cut."
    else:
        lines[0] += " It is still a stock Transformers model, with fewer states."
    before, after = _step_seconds(record)
    if before and after:
        lines.append(
            f"A training step takes {_duration(after)} instead of {_duration(before)}: {_faster(before, after)}."
        )
    return lines


def _key_numbers(record: Record) -> list[dict[str, str]]:
    made = record.made_cuts
    first, last = made[0], made[-1]
    numbers = []

    def add(name: str, value: str | None, note: str = "") -> None:
        if value is not None:
            numbers.append({"name": name, "value": value, "note": note})

    add("state size N", f"{_range(first, 'before')} → {_range(last, 'after')}")
    pairs = (
        ("parameters", "parameters", "{:,.0f}".format),
        ("recurrent state of one sequence", "state_bytes", _bytes),
        ("optimizer's state", "optimizer_bytes", _bytes),
    )
    for name, key, form in pairs:
        before, after = _number(first.get(f"{key}_before")), _number(last.get(f"{key}_after"))
        if before and after is not None:
            add(name, _arrow(form(before), form(after)), f"{(after - before) / before:+.0%}".replace("-", "−"))
    before, after = _step_seconds(record)
    if before and after:
        add("training step", _arrow(_duration(before), _duration(after)), _faster(before, after))
    errors = [_number(layer.get("relative_error")) for cut in made for layer in cut["layers"]]
    errors = [error for error in errors if error is not None]
    if errors:
        add("largest relative error of a layer", f"{max(errors):.2%}", "of its output, right after a cut")
    losses = _number(last.get("loss_before")), _number(last.get("loss_after"))
    if None not in losses:
        add("loss across the cut" if len(made) == 1 else "loss across the last cut", "{:.4f} → {:.4f}".format(*losses))
    divergence = _number(last.get("kl_divergence"))
    if divergence is not None:
        add(
            "KL divergence of the answers",
            f"{divergence:.1e} nats",
            f"per token, across the {'' if len(made) == 1 else 'last '}cut",
        )
    seconds = [_number(value) for cut in made for value in (cut.get("seconds") or {}).values()]
    if seconds:
        add("time of the cut" if len(made) == 1 else "time of the cuts", _duration(sum(filter(None, seconds))))
    return numbers


def _evaluations(evaluations: Mapping[str, Mapping[str, Any]]) -> Table | None:
    names = dict.fromkeys(name for values in evaluations.values() for name in values)
    # Recall over distances has a table of its own, in the card.
    metrics = [name for name in names if not RECALL.fullmatch(name)]
    if not metrics:
        return None
    rows = [
        [LABELS.get(name, name), *(_short(values.get(name)) for values in evaluations.values())] for name in metrics
    ]
    numeric = set(range(1, len(evaluations) + 1))
    return Table("The model, evaluated at each stage.", ["metric", *evaluations], rows, numeric)


def _layer_table(cut: Mapping[str, Any]) -> Table:
    rows = []
    for layer in cut["layers"]:
        curve, size = layer.get("error_curve") or [], layer["state_size_after"]
        unchanged = layer.get("status") == "unchanged"
        rows.append(
            [
                layer["name"],
                f"{layer['state_size_before']} → {size}",
                _short(curve[size] if size < len(curve) else None),
                _short(layer.get("relative_error")),
                "unchanged" if unchanged else str(layer.get("realization", "stock")),
                NOTHING if unchanged else str(layer.get("criterion", NOTHING)),
                NOTHING if unchanged else str(layer.get("refit", NOTHING)),
            ]
        )
    return Table(
        "What became of each layer. Relative errors are those of the layer's output: expected when the number of "
        "states was chosen, and measured on the same tokens after the refit.",
        ["layer", "N", "expected error", "measured error", "realization", "criterion", "refit"],
        rows,
        {1, 2, 3},
    )


def _cut_summary(cut: Mapping[str, Any]) -> list[str]:
    parts = [f"N {_range(cut, 'before')} → {_range(cut, 'after')}"]
    tokens = _number(cut.get("tokens"))
    if tokens is not None:
        parts.append(
            f"decided on {tokens:,.0f} tokens that training had just seen"
            if cut.get("step") is not None
            else f"decided on {tokens:,.0f} tokens"
        )
    seconds = [_number(value) or 0 for value in (cut.get("seconds") or {}).values()]
    if seconds:
        parts.append(f"made in {_duration(sum(seconds))}")
    losses = _number(cut.get("loss_before")), _number(cut.get("loss_after"))
    if None not in losses:
        parts.append("loss {:.4f} → {:.4f}".format(*losses))
    divergence = _number(cut.get("kl_divergence"))
    if divergence is not None:
        parts.append(f"KL divergence {divergence:.1e} nats per token")
    return ["; ".join(parts) + "."]


def _attempts(cuts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    attempts = []
    for cut in cuts:
        if cut["status"] == "cut":
            continue
        what = f"{cut['status']}" if cut.get("step") is None else f"step {cut['step']:,}, {cut['status']}"
        if cut.get("layers"):
            what += f" (N {_range(cut, 'before')} → {_range(cut, 'after')})"
        attempts.append({"what": what[0].upper() + what[1:], "why": _reason(cut)})
    return attempts


def _reason(cut: Mapping[str, Any]) -> str:
    if cut.get("reason"):
        return str(cut["reason"])
    before, after = _number(cut.get("metric_before")), _number(cut.get("metric_after"))
    if cut["status"] == "taken back" and before is not None and after is not None:
        return f"{cut.get('metric', 'the metric')} was {before:.4f} before the cut and {after:.4f} after it"
    if cut["status"] == "undone by loading":
        return "weights of before the cut were loaded after it"
    return ""


def _facts(record: Record) -> list[tuple[str, str]]:
    facts = [
        (RUN_NAMES.get(name, name.replace("_", " ")), _plainly(value))
        for name, value in record.run.items()
        if name != "command" and value not in (None, "", [], {})
    ]
    if record.machine:
        facts.append(("machine", record.machine))
    if record.versions:
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())))
    return facts


def _configs(cuts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The configs of the cuts, each once."""
    texts: dict[str, list[str]] = {}
    for cut in cuts:
        if cut.get("config"):
            text = json.dumps(chosen(cut["config"]), indent=2, ensure_ascii=False)
            texts.setdefault(text, []).append(f"{cut['step']:,}" if cut.get("step") is not None else "")
    if len(texts) == 1:
        return [{"title": "The config (what is not named has its default)", "text": text} for text in texts]
    return [{"title": f"The config at step {_and(steps)}", "text": text} for text, steps in texts.items()]


def _spectrum(cut: Mapping[str, Any], number: int) -> Picture:
    layers = cut["layers"]
    both = any(layer.get("hankel_values") for layer in layers)
    errors = [error for error in (_number(layer.get("relative_error")) for layer in layers) if error is not None]
    measured = f" The errors measured there are at most {max(errors):.2%}." if errors else ""
    alt = (
        f"Curves that fall with the number of states kept, one for each of {_count(len(layers), 'layer')}: the "
        f"relative error of the layer's output. A dot on each marks the number chosen, {_range(cut, 'after')} of "
        f"{_range(cut, 'before')}.{measured}"
    )
    caption = (
        "How much a layer's output would change (1 = entirely) if only r of its states were kept: what lies right of "
        "the steep part carries little. The dots are the choice, with the error measured there."
    )
    if both:
        alt += " Below, the Hankel singular values of each layer, in falling order."
        caption += (
            " Below, Hankel singular values: how much of what goes into a layer comes out of it by way of each "
            "direction of the state."
        )
    return Picture(draw_spectrum(cut), f"spectrum_{number}.png", alt, caption)


def _close_up(timeline: Sequence[Mapping[str, Any]], cut: Mapping[str, Any], number: int) -> Picture | None:
    if cut.get("step") is None or not close_up(timeline, cut["step"]):
        return None
    alt = f"The training loss in the steps before and after the cut at step {cut['step']:,}"
    losses = _number(cut.get("loss_before")), _number(cut.get("loss_after"))
    if None not in losses:
        alt += "; on one batch, {:.4f} right before the cut and {:.4f} right after it".format(*losses)
    caption = (
        "The training loss near the cut. The two marks are one and the same batch, right before and right after: the "
        "damage that the cut did at once."
        if None not in losses
        else "The training loss near the cut."
    )
    return Picture(draw_loss_around(timeline, cut), f"loss_around_cut_{number}.png", f"{alt}.", caption)


def _training_pictures(record: Record) -> list[Picture]:
    timeline = record.timeline
    cuts = [cut for cut in record.cuts if cut["status"] != "skipped"]
    rows = (
        ("state_size", draw_state_size, str, "The state size N", "The largest state size of any layer."),
        ("loss", draw_loss, "{:.3g}".format, "The training loss", "The loss that the training logged."),
        (
            "step_seconds",
            draw_step_time,
            _duration,
            "The time of a training step",
            "The mean between two entries of the log.",
        ),
        (
            "memory_bytes",
            draw_memory,
            _bytes,
            "The memory",
            "On a GPU the most that was in use, the cut left out; else what the whole process holds.",
        ),
    )
    pictures = []
    for key, draw, form, name, caption in rows:
        values = [value for value in (_number(entry.get(key)) for entry in timeline) if value is not None]
        if len(values) < 2:
            continue
        first, last = (form(int(value) if key == "state_size" else value) for value in (values[0], values[-1]))
        alt = f"{name} over the training: {first} at its beginning, {last} at its end."
        if cuts:
            caption += f" The orange {'line marks the cut' if len(cuts) == 1 else 'lines mark the cuts'}."
        file = draw.__name__.removeprefix("draw_") + ".png"
        pictures.append(Picture(draw(timeline, cuts), file, alt, caption))
    return pictures


def _criteria_picture(record: Record) -> list[Picture]:
    criteria = {name: curve for name, curve in record.criteria.items() if len(curve) > 1}
    if not criteria:
        return []
    made = record.made_cuts
    # The curves are of the uncut model, as is the first cut.
    kept = max(layer["state_size_after"] for layer in made[0]["layers"]) if made else None
    alt = f"The expected relative error against the number of states kept, a curve for each of {_and(criteria)}."
    at_choice = {
        name: _number(curve[kept]) for name, curve in criteria.items() if kept is not None and kept < len(curve)
    }
    if at_choice:
        values = [f"{name} {_short(value)}" for name, value in at_choice.items()]
        alt += f" With {kept} states: {', '.join(values)}."
    caption = (
        "The error that each criterion expects in its worst layer if only r states are kept; the lower, the better "
        "its choice of states."
    )
    return [Picture(draw_criteria(criteria, kept), "criteria.png", alt, caption)]


def _step_seconds(record: Record) -> tuple[float | None, float | None]:
    """The median time of a step before the first cut and after the last one."""
    steps = [cut["step"] for cut in record.made_cuts if cut.get("step") is not None]
    if not steps:
        return None, None
    before, after, previous = [], [], 0
    for entry in record.timeline:
        seconds = _number(entry.get("step_seconds"))
        if seconds and entry["step"] <= steps[0]:
            before.append(seconds)
        elif seconds and previous >= steps[-1]:
            after.append(seconds)
        previous = entry["step"]
    return statistics.median(before) if before else None, statistics.median(after) if after else None


def _check(record: Record, file: Path) -> None:
    """A record may have been written, or edited, by anybody."""
    kinds = {"versions": dict, "run": dict, "machine": str, "timeline": list, "evaluations": dict, "criteria": dict}
    wrong = [
        f"{name} is not a {kind.__name__}"
        for name, kind in kinds.items()
        if not isinstance(getattr(record, name), kind)
    ]
    if not wrong:
        wrong = [
            *(f"cut {number}: {what}" for number, cut in enumerate(record.cuts, 1) for what in _wrong_in_cut(cut)),
            *(
                f"timeline: entry {number} has no step"
                for number, entry in enumerate(record.timeline, 1)
                if not isinstance(entry, dict) or not is_whole(entry.get("step"))
            ),
            *(
                f"evaluations: {name!r} is not a dict"
                for name, values in record.evaluations.items()
                if not isinstance(values, dict)
            ),
            *(
                f"criteria: {name!r} is not a list"
                for name, curve in record.criteria.items()
                if not isinstance(curve, list)
            ),
        ]
    if wrong:
        raise ValueError(f"{file} is not a record that a report can be made of: {'; '.join(wrong[:3])}")


def _wrong_in_cut(cut: Mapping[str, Any]) -> Iterable[str]:
    if not (cut.get("step") is None or is_whole(cut["step"])):
        yield f"its step is {cut['step']!r}"
    if not isinstance(cut.get("seconds") or {}, dict):
        yield "its seconds are not a dict"
    layers = cut.get("layers") or []
    if not isinstance(layers, list) or (cut["status"] == "cut" and not layers):
        yield "it lists no layers"
        return
    for layer in layers:
        sizes = (
            [layer.get(f"state_size_{when}") for when in ("before", "after")] if isinstance(layer, dict) else [None]
        )
        if not all(is_whole(size) and size > 0 for size in sizes) or not isinstance(layer.get("name"), str):
            yield "a layer without name, state_size_before or state_size_after"
            continue
        lists = [layer[name] for name in ("error_curve", "hankel_values") if layer.get(name) is not None]
        if not all(isinstance(item, list) for item in [*lists, *(layer.get("hankel_values") or [])]):
            yield f"layer {layer['name']!r}: error_curve or hankel_values is not a list"


def _numbered(cuts: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    return list(enumerate(cuts, 1))


def _at_step(cut: Mapping[str, Any]) -> str:
    return "" if cut.get("step") is None else f" after step {cut['step']:,}"


def _range(cut: Mapping[str, Any], when: str) -> str:
    """The state size of all layers, or from the smallest to the largest."""
    return size_range(layer[f"state_size_{when}"] for layer in cut["layers"])


def _any_projected(cuts: Sequence[Mapping[str, Any]]) -> bool:
    return any(layer.get("realization") == "projected" for cut in cuts for layer in cut["layers"])


def _number(value: Any) -> float | None:
    """A finite number, or None for all that is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _short(value: Any) -> str:
    """A number in few digits, always in the same form in a column."""
    number = _number(value)
    if number is None:
        return NOTHING
    if isinstance(number, int) or abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.4f}" if number == 0 or abs(number) >= 1e-4 else f"{number:.1e}"


def _bytes(size: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,.0f} bytes"


def _duration(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _arrow(before: str, after: str) -> str:
    """From … to …, with a unit that both have named once."""
    number, _, unit = before.partition(" ")
    return f"{number} → {after}" if unit and after.endswith(f" {unit}") else f"{before} → {after}"


def _faster(before: float, after: float) -> str:
    return f"{before / after:.1f} times faster" if before >= after else f"{after / before:.1f} times slower"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _and(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _plainly(value: Any) -> str:
    return (
        f"{value:,}" if is_whole(value) else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )
