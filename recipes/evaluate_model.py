"""Compare language models on the same text: what they are, and how well they predict it.

Models are directories or names on the Hub: stock or projected, or a PEFT adapter's directory (its base is loaded, cut
as it was when the adapter was trained, and the adapter put on it). All are asked about the same held-out text, which
compress_checkpoint.py holds out with the same options; the others' predictions are compared with those of the first
model, or of --reference. Without --train_files or --dataset, it is source code of Python's standard library.

    python recipes/evaluate_model.py --models runs/tiny_mamba_32_600 runs/compressed
    python recipes/evaluate_model.py --models my/model runs/compressed --train_files 'texts/*.txt' --json results.json
    python recipes/evaluate_model.py --models my/model runs/compressed --recall

--recall adds what a smaller state costs first. A passage of the text is read, other text follows, up to four times
--block_size, and the passage is read again: by how much is it predicted better for having been read? And associative
recall: each sequence lists pairs of tokens, a key and a value, and then names the keys again: of how many does the
model know the value? One that never learnt to recall knows none, cut or not.
"""

from __future__ import annotations

import json
import logging
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import torch
from compress_checkpoint import BYTES, DataArguments, load_blocks, load_tokenizer
from recall import Rereading, measure_recall, rereading
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from hf_compressm import load_compressed_peft
from hf_compressm.files import write_file
from hf_compressm.metrics import metric_path
from hf_compressm.model_files import find_model
from hf_compressm.saved_models import describe

logger = logging.getLogger("evaluate_model")

ADAPTER = "adapter_config.json"
NOT_ASKED = -100
HEADINGS = {
    "name": "model",
    "state_size": "N",
    "parameters": "parameters",
    "state_bytes": "state bytes",
    "loss": "loss",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "kl_divergence": "KL",
    "recall_accuracy": "recall",
    "recall_sequence_accuracy": "all recalled",
}
FORMATS = {
    "parameters": ",",
    "state_bytes": ",",
    "loss": ".4f",
    "perplexity": ".3f",
    "accuracy": ".2%",
    "kl_divergence": ".4f",
    "recall_accuracy": ".2%",
    "recall_sequence_accuracy": ".2%",
}


@dataclass
class EvaluationArguments:
    _argument_group_name = "models"

    models: list[str] = field(metadata={"help": "Directories, or names on the Hub."})
    reference: str | None = field(
        default=None, metadata={"help": "What the predictions are compared with (KL). Default: the first model."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Of all models: a directory, a name, or 'bytes'. Default: the models' own; else bytes."},
    )
    dtype: str = field(default="auto", metadata={"help": "Type of the weights; auto: as saved."})
    batch_size: int = field(default=8, metadata={"help": "Sequences that run together."})
    seed: int = field(default=42, metadata={"help": "Of the choice of held-out texts, and of the recall task."})
    recall: bool = field(default=False, metadata={"help": "Also measure recall."})
    recall_pairs: int = field(default=8, metadata={"help": "Pairs of a key and a value in each sequence."})
    recall_sequences: int = field(default=200, metadata={"help": "Sequences of the recall task."})
    json: str | None = field(default=None, metadata={"help": "Write the results to this file, too."})


def load_model(name: str, dtype: str) -> PreTrainedModel:
    """A model, or an adapter on the base that it was trained on."""
    if not (Path(name) / ADAPTER).exists():
        # Transformers' own errors say less of what is missing.
        find_model(name)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    from peft import PeftModel

    base = load_model(base_of(name), dtype)
    try:
        return load_compressed_peft(base, name)
    except FileNotFoundError:
        # It has no plan: it was not trained across a cut.
        return PeftModel.from_pretrained(base, name)


def base_of(name: str) -> str:
    """The base model of an adapter's directory; the name of a model itself."""
    file = Path(name) / ADAPTER
    return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.exists() else name


def common_tokenizer(names: list[str], asked: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for, or else the models' own, which must be one."""
    if asked is not None:
        return load_tokenizer(names[0], asked)
    first, *others = ((name, load_tokenizer(name, None)) for name in dict.fromkeys(map(base_of, names)))
    for name, tokenizer in others:
        if tokenizer.get_vocab() != first[1].get_vocab():
            raise ValueError(
                f"{first[0]} and {name} have different tokenizers ({len(first[1])} and {len(tokenizer)} tokens): what "
                "they predict cannot be compared. Compare models that were made from one another, or, if both were "
                f"trained with the same tokens, name these with --tokenizer (a directory, a name, or '{BYTES}')"
            )
    return first[1]


def associative_recall(
    vocabulary: list[int], pairs: int, sequences: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a key and a value, then the keys in another order, each with its value; the latter values are asked.

    Keys are tokens of the vocabulary's first half, different within a sequence; values are of its second half.

    Returns:
        Token ids and labels, both of shape (sequences, 4 · pairs).
    """
    half = len(vocabulary) // 2
    if not 1 <= pairs <= half:
        raise ValueError(f"--recall_pairs is {pairs}, but a vocabulary of {len(vocabulary)} tokens has {half} keys")
    if sequences < 1:
        raise ValueError(f"--recall_sequences is {sequences}; give at least 1")
    generator, tokens = torch.Generator().manual_seed(seed), torch.tensor(vocabulary)
    keys = torch.rand(sequences, half, generator=generator).argsort(dim=1)[:, :pairs]
    values = torch.randint(half, 2 * half, (sequences, pairs), generator=generator)
    order = torch.rand(sequences, pairs, generator=generator).argsort(dim=1)
    told = torch.stack([keys, values], dim=2).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], dim=2).flatten(1)
    input_ids = tokens[torch.cat([told, asked], dim=1)]
    labels = torch.full_like(input_ids, NOT_ASKED)
    labels[:, 2 * pairs + 1 :: 2] = input_ids[:, 2 * pairs + 1 :: 2]
    return input_ids, labels


def table(results: list[dict[str, Any]]) -> str:
    """What was measured, a line for each model."""
    keys = [key for key in HEADINGS if any(key in result for result in results)]
    rows = [[HEADINGS[key] for key in keys]]
    for result in results:
        values = ((key, result[key]) for key in keys)
        rows.append(["–" if value is None else format(value, FORMATS.get(key, "")) for key, value in values])
    return aligned(rows)


def reread_table(results: list[dict[str, Any]], passages: Rereading) -> str:
    """Gain by an earlier reading, and accuracy of the later one: a line for each model, a column for each distance."""
    rows = [["model", *(f"{distance:,} tokens" for distance in passages.read)]]
    for result in results:
        cells = []
        for distance in passages.read:
            gain, error, accuracy = (
                result[f"recall_{name}_after_{distance}"] for name in ("gain", "gain_error", "accuracy")
            )
            cells.append(f"{gain:.3f} ± {error:.3f} ({accuracy:.1%})")
        rows.append([result["name"], *cells])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """Lines of cells in columns: names on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = HfArgumentParser((EvaluationArguments, DataArguments))
    args, data = parser.parse_args_into_dataclasses(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("compress_checkpoint").setLevel(logging.INFO)
    # Transformers says for each kernel that it is not installed; on a CPU none could be.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    reference_name = args.reference or args.models[0]
    names = list(dict.fromkeys([reference_name, *args.models]))
    for name in names:
        find_model(base_of(name))
    tokenizer = common_tokenizer(names, args.tokenizer)
    held_out = load_blocks(data, tokenizer, args.seed)["test"][: data.eval_blocks]["input_ids"]
    passages = rereading(held_out, data.block_size)
    special = set(tokenizer.all_special_ids)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    reference = load_model(reference_name, args.dtype).to(device)
    # A model may know more tokens than its tokenizer makes, but all are asked the same.
    vocabulary = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    results = []
    for name in args.models:
        model = reference if name == reference_name else load_model(name, args.dtype).to(device)
        given = {"model": model, "batch_size": args.batch_size}
        predicted = evaluate.load(metric_path("perplexity")).compute(predictions=held_out, **given)
        result = {"name": name, **describe(model), **predicted, "kl_divergence": None}
        if model is not reference:
            kl = evaluate.load(metric_path("kl_divergence"))
            result |= kl.compute(predictions=held_out, reference_model=reference, **given)
        if args.recall:
            ids, labels = associative_recall(vocabulary, args.recall_pairs, args.recall_sequences, args.seed)
            recalled = evaluate.load(metric_path("recall_accuracy")).compute(
                predictions=ids, references=labels, **given
            )
            result |= {f"recall_{key}": value for key, value in recalled.items()} | measure_recall(model, passages)
        results.append(result)

    print(f"\n{table(results)}\n")
    print(
        f"N: states of each channel; state bytes: what they take per sequence. On {results[0]['tokens']:,} held-out "
        "tokens: loss in nats\nper token, perplexity, accuracy of the next token, and KL from the predictions of "
        f"{reference_name} in nats per token."
    )
    if args.recall:
        print(
            f"Recall of {args.recall_pairs} pairs: share of the values that are right (by chance "
            f"{2 / len(vocabulary):.2%}), and of the sequences with all right."
        )
        print(
            f"\n{reread_table(results, passages)}\n" if passages.read else "\nThere is too little text to read again."
        )
        print(textwrap.fill(f"{passages.description} ± is half of a 95 % interval.", 110))
    if args.json is not None:
        summary = {"data": data.dataset or data.train_files, "reference": reference_name, "models": results}
        write_file(Path(args.json), json.dumps(summary, indent=1) + "\n")
        print(f"{args.json} holds these numbers")
    return results


if __name__ == "__main__":
    main()
