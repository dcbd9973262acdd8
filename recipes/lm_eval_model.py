"""Run EleutherAI's lm-evaluation-harness on compressed models, offline, with tasks made of text of one's own.

Models are directories or names on the Hub, stock or projected, or PEFT adapters' directories, as in evaluate_model.py.
Two tasks are made of held-out text and written to --task_dir, as lm-eval's YAML files with their data:

    which_goes_on   after some characters of text, which of four pieces of text goes on? (acc; by chance a quarter)
    held_out_text   how many bits does each byte of the text take? (bits_per_byte, byte_perplexity)

Both may be asked of models with different tokenizers. Without --train_files or --dataset, the text is source code of
Python's standard library.

    python recipes/lm_eval_model.py --models runs/tiny_mamba_32_600 runs/compressed
    python recipes/lm_eval_model.py --models my/model runs/compressed --tasks my_task --include_path my/tasks

The same tasks run from lm-eval's own command line, too; a projected model then needs its code, or this package:

    lm_eval --model hf --model_args pretrained=runs/compressed --include_path runs/lm_eval_tasks --tasks which_goes_on
"""

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from compress_checkpoint import DataArguments, load_documents, load_tokenizer
from evaluate_model import aligned, base_of, load_model
from transformers import HfArgumentParser

from hf_compressm.files import write_file
from hf_compressm.model_files import find_model
from hf_compressm.saved_models import describe

CHOICES = 4
TASKS: dict[str, dict[str, Any]] = {
    "which_goes_on": {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "held_out_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
}


@dataclass
class HarnessArguments:
    _argument_group_name = "models and tasks"

    models: list[str] = field(metadata={"help": "Directories, or names on the Hub."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Of all models: a directory, a name, or 'bytes'. Default: each model's own; else bytes."},
    )
    dtype: str = field(default="auto", metadata={"help": "Type of the weights; auto: as saved."})
    batch_size: int = field(default=8, metadata={"help": "Requests that run together."})
    seed: int = field(default=42, metadata={"help": "Of the choice of held-out texts, and of questions."})
    tasks: list[str] = field(
        default_factory=lambda: list(TASKS),
        metadata={"help": "Names of tasks; others than the two need --include_path."},
    )
    include_path: str | None = field(default=None, metadata={"help": "A folder with tasks of your own."})
    task_dir: str = field(default="runs/lm_eval_tasks", metadata={"help": "Where the two tasks are written."})
    questions: int = field(default=100, metadata={"help": "Questions of which_goes_on, at most."})
    context_length: int = field(default=128, metadata={"help": "Characters before each question."})
    choice_length: int = field(default=16, metadata={"help": "Characters of each answer."})
    documents: int = field(default=20, metadata={"help": "Texts of held_out_text, at most."})
    document_length: int = field(default=1000, metadata={"help": "Characters that are taken of each."})
    json: str | None = field(default=None, metadata={"help": "Write the results to this file, too."})


def make_questions(texts: list[str], args: HarnessArguments) -> list[dict[str, Any]]:
    """Pieces of text, how each goes on, and how three others do, in random order."""
    chooser = random.Random(args.seed)
    length = args.context_length + args.choice_length
    pieces = [text[start : start + length] for text in texts for start in range(0, len(text) - length + 1, length)]
    chooser.shuffle(pieces)
    questions = []
    for piece in pieces[: args.questions]:
        context, right = piece[: args.context_length], piece[args.context_length :]
        others = sorted({other[args.context_length :] for other in pieces} - {right})
        if len(others) < CHOICES - 1:
            break
        choices = [right, *chooser.sample(others, CHOICES - 1)]
        chooser.shuffle(choices)
        questions.append({"context": context, "choices": choices, "label": choices.index(right)})
    if not questions:
        raise ValueError(
            f"the held-out texts are too short to make questions: at least {CHOICES} different pieces of {length} "
            "characters are needed; give more text, or a smaller --context_length"
        )
    return questions


def write_tasks(texts: list[str], args: HarnessArguments) -> None:
    """Both tasks, as lm-eval reads them."""
    documents = [text[: args.document_length] for text in texts if text][: args.documents]
    rows = {"which_goes_on": make_questions(texts, args), "held_out_text": [{"text": text} for text in documents]}
    folder = Path(args.task_dir).absolute()
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        write_file(data, "".join(json.dumps(row) + "\n" for row in rows[name]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        write_file(folder / f"{name}.yaml", yaml.safe_dump({"task": name} | source | task, sort_keys=False))


def run_harness(name: str, args: HarnessArguments, manager: Any) -> dict[str, Any]:
    """lm-eval's numbers for one model: task → metric → value."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # Not by its name: a projected model is known in this process, and an adapter's base has to be cut first.
    model = load_model(name, args.dtype).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(base_of(name), args.tokenizer)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
    results = lm_eval.evaluate(harness, manager.load(args.tasks), bootstrap_iters=1000)["results"]
    return {"name": name, **describe(model), "tasks": results}


def table(results: list[dict[str, Any]]) -> str:
    """What was measured, a column for each model."""
    rows = [["", *(result["name"] for result in results)]]
    rows.append(["state size N", *(result["state_size"] for result in results)])
    rows.append(["recurrent state, bytes per sequence", *(f"{result['state_bytes']:,}" for result in results)])
    for task, metrics in results[0]["tasks"].items():
        for metric in metrics:
            kind, _, rule = metric.partition(",")
            if not rule or kind.endswith("_stderr"):
                continue
            cells = []
            for result in results:
                measured = result["tasks"][task]
                error = measured.get(f"{kind}_stderr,{rule}")
                shown = f"{measured[metric]:.4f}"
                cells.append(f"{shown} ± {error:.4f}" if isinstance(error, float) else shown)
            rows.append([f"{task}, {kind}", *cells])
    return aligned(rows)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args, data = HfArgumentParser((HarnessArguments, DataArguments)).parse_args_into_dataclasses(arguments)
    logging.basicConfig(format="%(message)s")
    # It warns of every default that it takes.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Transformers says for each kernel that it is not installed; on a CPU none could be.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("this recipe needs lm-eval: pip install lm-eval==0.4.13") from error
    for name in args.models:
        find_model(base_of(name))
    if set(args.tasks) & set(TASKS):
        write_tasks(load_documents(data, args.seed)["test"]["text"], args)
    folders = [args.task_dir] if Path(args.task_dir).is_dir() else []
    folders += [] if args.include_path is None else [args.include_path]
    manager = TaskManager(include_path=folders, include_defaults=False)
    unknown = sorted(set(args.tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"there is no task {', '.join(unknown)}; {' and '.join(folders) or 'the folders given'} hold "
            f"{', '.join(manager.all_tasks) or 'none'}"
        )
    results = [run_harness(name, args, manager) for name in args.models]
    print(f"\n{table(results)}\n")
    if args.json is not None:
        write_file(Path(args.json), json.dumps(results, indent=1, default=str) + "\n")
        print(f"{args.json} holds these numbers")
    return results


if __name__ == "__main__":
    main()
