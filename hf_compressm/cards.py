"""A model card from the files of a saved model: what was cut, what that cost, how to load it and to make it again."""

from __future__ import annotations

import json
import math
import statistics
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from jinja2 import Environment
from transformers.utils import logging

from .config import chosen
from .plots import plot_error_curves
from .recall_table import recall_by_distance, recall_table
from .record import LABELS, RECALL, RECORD_FILE, Record, size_range

logger = logging.get_logger(__name__)

TAGS = ["mamba", "state-space-model", "compressm"]
CARD_FILE = "README.md"
SPECTRUM_FILE = "spectrum.png"
# End of a class's name → its task on the Hub, and the auto class that loads it.
TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    # PEFT's names.
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
}
# What is no result, though it stands among the evaluations.
SIZES = ("state_size", "parameters", "state_bytes", "step", "tokens", "recall_chance")


def write_card(
    directory: str | Path,
    *,
    repo_id: str | None = None,
    tags: list[str] | None = None,
    training: ModelCard | None = None,
) -> Path:
    """Write the card of a saved model, and the spectrum that it shows.

    All that the card tells stands in `compressm.json`, `config.json` or `adapter_config.json` there. Of a card that is
    in the directory already, language, license and data sets stay.

    Args:
        directory: where a model was saved after a cut.
        repo_id: the repository's name, for the code that loads the model; else the directory's name.
        tags: more than the usual ones.
        training: a card that a Trainer wrote: its metadata and what it tells of the training are taken over.

    Returns:
        README.md.

    Raises:
        FileNotFoundError: no compressm.json.
        ValueError: the record is broken, or tells of no cut.
    """
    directory = Path(directory)
    record = record_of_cuts(directory)
    plot_error_curves(record.made_cuts[-1], directory / SPECTRUM_FILE)
    card = directory / CARD_FILE
    former = training or (ModelCard.load(card, ignore_metadata_errors=True) if card.is_file() else None)
    context = _context(directory, record, repo_id)
    data = _metadata(record, context, former, tags or [])
    template = files("hf_compressm.hub_cards") / "model.md"
    with as_file(template) as path:
        source = path.read_text(encoding="utf-8")
    environment = Environment(trim_blocks=False, keep_trailing_newline=True)
    environment.filters |= {"json": _json, "number": _number, "milliseconds": _milliseconds}
    text = environment.from_string(source).render(
        card_data=data.to_yaml(), training_text=_training_text(training), **context
    )
    card.write_text(text, encoding="utf-8")
    return card


def record_of_cuts(directory: Path) -> Record:
    """The record in a directory, which must tell of a cut; raises as `write_card`."""
    if not (directory / RECORD_FILE).is_file():
        raise FileNotFoundError(
            f"{directory} has no {RECORD_FILE}: it holds no model that hf_compressm cut, or one that was saved before "
            "the cut. Save it after the cut with model.save_pretrained, or cut it with hf-compressm compress"
        )
    record = Record.load(directory)
    if not record.made_cuts:
        raise ValueError(
            f"{directory / RECORD_FILE} tells of no cut that the model still has: there is no card to write"
        )
    return record


def license_of(source: str | Path) -> str | None:
    """The license that a model's card names, of a directory or of a repository; None if none can be read."""
    try:
        if not Path(source).is_dir():
            return ModelCard.load(str(source)).data.license
        card = Path(source) / CARD_FILE
        return ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    except (EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError):
        return None


def _context(directory: Path, record: Record, repo_id: str | None) -> dict[str, Any]:
    """What the template shows."""
    cuts, run = record.made_cuts, record.run
    config = _read(directory / "config.json")
    adapter = _read(directory / "adapter_config.json")
    model_class = (config.get("architectures") or [adapter.get("task_type") or "model"])[0]
    base_model = run.get("base_model") or adapter.get("base_model_name_or_path")
    _, auto_class = _task(model_class)
    evaluations = {stage: _without_recall(values) for stage, values in record.evaluations.items()}
    evaluations = {stage: values for stage, values in evaluations.items() if values}
    names = list(dict.fromkeys(name for values in evaluations.values() for name in values))
    return {
        "name": run.get("name") or (repo_id or directory.resolve().name).split("/")[-1],
        "repo_id": repo_id or str(directory),
        "model_class": model_class,
        "auto_class": auto_class,
        "adapter": {"kind": adapter.get("peft_type", "PEFT")} if adapter else None,
        "base_model": base_model,
        "base_text": _link(base_model),
        "in_training": any(cut.get("step") is not None for cut in cuts),
        "projected": config.get("model_type", "").startswith("compressm_"),
        "description": run.get("description"),
        "healing": run.get("healing"),
        "before": _side(record, cuts[0], "before"),
        "after": _side(record, cuts[-1], "after"),
        "cuts": [cut | {"seconds": sum(cut.get("seconds", {}).values())} for cut in cuts],
        "run": run,
        "machine": record.machine,
        "evaluations": evaluations,
        "metrics": [{"name": name, "label": LABELS.get(name, name.replace("_", " "))} for name in names],
        "recall": recall_table(record),
        "recall_measured": any("recall" in name for values in record.evaluations.values() for name in values),
        "spectrum": SPECTRUM_FILE,
        "plans": any(directory.glob("compressm_plan_*.json")),
        "config": chosen(cuts[-1].get("config") or {}),
        "versions": record.versions,
    }


def _side(record: Record, cut: dict[str, Any], side: str) -> dict[str, Any]:
    """What the model was before the first cut, or is after the last."""
    sizes = sorted({layer[f"state_size_{side}"] for layer in cut["layers"]})
    seconds = [
        entry["step_seconds"]
        for entry in record.timeline
        if entry.get("step_seconds") and entry.get("state_size") == sizes[-1]
    ]
    return {
        "state_size": size_range(sizes),
        "parameters": cut[f"parameters_{side}"],
        "optimizer_bytes": cut.get(f"optimizer_bytes_{side}", 0),
        "state_bytes": cut.get(f"state_bytes_{side}", 0),
        "step_ms": 1000 * statistics.median(seconds) if seconds else None,
    }


def _without_recall(values: dict[str, Any]) -> dict[str, Any]:
    """An evaluation without what the table of recall shows."""
    distances = recall_by_distance(values)
    matches = {name: RECALL.fullmatch(name) for name in values}
    names = [name for name, match in matches.items() if match is None or int(match[1]) not in distances]
    return {name: values[name] for name in names if not (distances and name == "recall_chance")}


def _metadata(record: Record, context: dict[str, Any], former: ModelCard | None, tags: list[str]) -> ModelCardData:
    run, is_adapter = record.run, context["adapter"] is not None
    known = {} if former is None else former.data.to_dict()
    task, _ = _task(context["model_class"])
    dataset = run.get("dataset")
    on_hub = context["base_model"] if _is_repository(context["base_model"]) else None
    earlier = known.get("base_model")
    if isinstance(earlier, str) and not _is_repository(earlier):
        # PEFT names a folder of this machine, too, which the Hub would take for a repository.
        known = known | {"base_model": None, "tags": [tag for tag in known.get("tags") or [] if earlier not in tag]}
    tags = [*TAGS, *run.get("tags", []), *tags, *(known.get("tags") or [])]
    values = {
        "license": run.get("license") or known.get("license"),
        "language": known.get("language"),
        "library_name": "peft" if is_adapter else "transformers",
        "base_model": on_hub or known.get("base_model"),
        "base_model_relation": None,
        "pipeline_tag": run.get("pipeline_tag") or task,
        "datasets": known.get("datasets") or ([dataset] if _is_repository(dataset) else None),
        "tags": list(dict.fromkeys(tags)),
    }
    if values["base_model"] is not None:
        values["base_model_relation"] = "adapter" if is_adapter else "finetune"
    return ModelCardData(**values, model_name=context["name"], eval_results=_results(record, context) or None)


def _results(record: Record, context: dict[str, Any]) -> list[EvalResult]:
    """The last evaluation, as the Hub's model-index takes it."""
    if not record.evaluations:
        return []
    stage, values = list(record.evaluations.items())[-1]
    task, _ = _task(context["model_class"])
    dataset = record.run.get("dataset") or "held-out data"
    return [
        EvalResult(
            task_type=record.run.get("pipeline_tag") or task or "other",
            dataset_type=dataset if _is_repository(dataset) else "other",
            dataset_name=dataset,
            metric_type=name,
            metric_value=round(value, 6),
            metric_name=f"{LABELS.get(name, name)} ({stage})",
        )
        for name, value in values.items()
        if name not in SIZES
        and not RECALL.fullmatch(name)
        and isinstance(value, (int, float))
        and math.isfinite(value)
    ]


def _training_text(training: ModelCard | None) -> str:
    """What a Trainer's own card tells of the training."""
    if training is None:
        return ""
    text = training.text.strip()
    for heading in ("## Training procedure", "## Training"):
        if heading in text:
            return text[text.index(heading) :].strip()
    return f"## Training\n\n{text}"


def _task(model_class: str) -> tuple[str | None, str]:
    return next((found for ending, found in TASKS.items() if model_class.endswith(ending)), (None, "AutoModel"))


def _is_repository(name: str | None) -> bool:
    """Whether a name can be a repository's on the Hub, and is no folder here."""
    return bool(name) and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _link(base_model: str | None) -> str:
    if not base_model:
        return "a trained model"
    return f"[{base_model}](https://huggingface.co/{base_model})" if _is_repository(base_model) else f"`{base_model}`"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _number(value: Any) -> str:
    """A number as a table shows it."""
    if value is None or value == "":
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"
