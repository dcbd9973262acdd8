"""Cut a saved model and save what came out, in one call: what `hf-compressm compress` does."""

from __future__ import annotations

import copy
import dataclasses
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .analysis import evaluate, why_not_copied
from .cards import license_of, write_card
from .config import RULES, CompreSSMConfig
from .mixers import Mixer, find_mixers
from .model_files import SavedModel, check_cut, check_output, check_weights, load_model, new_directory, read_config
from .planning import plan_compression
from .provenance import record_of
from .ranks import fixed_state_size
from .record import describe_machine, size_range
from .refit import tokens_for_a_fit
from .report import CompressionReport
from .report_page import write_report_page
from .statistics import measure
from .surgery import compress_
from .texts import Sequences, load_sequences, load_tokenizer

# Calibration tokens, unless the states need more.
CALIBRATION_TOKENS = 16384


@dataclass(frozen=True)
class DataOptions:
    """Where the tokens come from; as in `load_sequences` and `load_tokenizer`.

    Attributes:
        data: files, patterns, directories or names of data sets.
        tokenizer: None: the model's own.
        tokens: to measure on; None: 16,384, or more where a cut needs them.
    """

    data: list[str]
    tokenizer: str | None = None
    tokens: int | None = None
    block_size: int | None = None
    config_name: str | None = None
    split: str = "train"
    text_column: str = "text"
    seed: int = 0


@dataclass(frozen=True)
class SavedCut:
    """What became of a model.

    Attributes:
        output: the directory with the smaller one.
        report: of the cut.
        evaluations: `uncut` and `cut` → metric → value, on tokens that were held back.
        files: what is in the directory.
    """

    output: Path
    report: CompressionReport
    evaluations: dict[str, dict[str, Any]]
    files: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON can hold it."""
        return asdict(self) | {"output": str(self.output), "report": self.report.to_dict()}

    def __str__(self) -> str:
        stages = list(self.evaluations)
        rows = [("", *stages)]
        for label, name, form in (
            ("states N", "state_size", "{}"),
            ("parameters", "parameters", "{:,}"),
            ("recurrent state, bytes per sequence", "state_bytes", "{:,}"),
            ("loss, nats per token", "loss", "{:.4f}"),
            ("perplexity", "perplexity", "{:.3f}"),
            ("next-token accuracy", "accuracy", "{:.2%}"),
            ("KL from the uncut model, nats per token", "kl_divergence", "{:.1e}"),
        ):
            values = [self.evaluations[stage].get(name) for stage in stages]
            rows.append((label, *("–" if value is None else form.format(value) for value in values)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            f"{row[0]:{widths[0]}}"
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        tokens = self.evaluations[stages[-1]]["tokens"]
        return "\n".join(
            [
                str(self.report),
                "",
                *lines,
                f"(loss, accuracy and KL: on {tokens:,} tokens that were held back)",
                "",
                f"{self.output} holds the smaller model: {', '.join(self.files)}",
            ]
        )


def sequences_for(
    model: SavedModel, mixers: dict[str, Mixer], options: DataOptions, kept: int
) -> tuple[Sequences, PreTrainedTokenizerBase | None]:
    """The tokens to measure and to evaluate on, before any weight is read; and the tokenizer, or None.

    Args:
        model: the model.
        mixers: its mixers.
        options: where the tokens come from.
        kept: how many states may stay, which tells how many tokens are needed.
    """
    tokenizer = load_tokenizer(model, options.tokenizer)
    largest = max(mixer.state_size for mixer in mixers.values())
    wanted = options.tokens or max(CALIBRATION_TOKENS, tokens_for_a_fit(kept, largest))
    sequences = load_sequences(
        options.data,
        tokenizer,
        tokens=wanted,
        vocabulary=read_config(model).get_text_config().vocab_size,
        block_size=options.block_size,
        config_name=options.config_name,
        split=options.split,
        text_column=options.text_column,
        seed=options.seed,
    )
    return sequences, tokenizer


def expected_states(config: CompreSSMConfig, mixers: dict[str, Mixer]) -> int:
    """How many states a rule may keep, as far as it can be told before states are measured."""
    largest = max(mixer.state_size for mixer in mixers.values())
    return max(1, largest // 4) if config.state_size is None else fixed_state_size(config.state_size, largest)


def compress_saved(
    model: SavedModel,
    data: DataOptions,
    config: CompreSSMConfig,
    output: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    batch_size: int = 8,
    allow_pickle: bool = False,
    overwrite: bool = False,
    command: Iterable[str] = (),
    show_progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> SavedCut:
    """Load a model, cut it, and save the smaller one with its tokenizer, record, plan, card and report.

    What can be refused is refused before weights are read. The directory appears when all of it is written.

    Args:
        model: from `find_model`.
        data: where calibration and held-back tokens come from.
        config: what to keep; its schedule plays no part.
        output: a directory that does not exist.
        dtype, device, allow_pickle: as in `load_model`.
        batch_size: sequences that are run at once.
        overwrite: replace a model that is in `output`.
        command: what the user typed, for the card; it must hold no token.
        show_progress: show progress bars.
        say: told what is being done.

    Returns:
        What became of the model.

    Raises:
        FileExistsError: `output` exists.
        ValueError, TypeError, OSError: a model, data or rules that do not do; nothing is written.
    """
    output = Path(output)
    check_output(output, overwrite=overwrite, source=model)
    mixers = check_cut(model, config)
    check_weights(model, allow_pickle=allow_pickle)
    say("reading the data")
    data = dataclasses.replace(data, tokens=data.tokens or config.calibration_tokens)
    sequences, tokenizer = sequences_for(model, mixers, data, expected_states(config, mixers))
    say(f"loading {model.name}")
    uncut = load_model(model, dtype=dtype, device=device, allow_pickle=allow_pickle)
    before = describe(uncut)
    statistics = measure(uncut, sequences.calibration.split(batch_size), show_progress=show_progress)
    say("choosing the states that stay")
    plan = plan_compression(uncut, statistics, config)
    del statistics
    if not plan.changes:
        raise ValueError(
            f"nothing was cut: the rule keeps more than {config.max_kept_fraction:.0%} of the states. Accept a larger "
            "--tolerance, or name a size: --state-size"
        )
    say("cutting, and evaluating the model before and after")
    held_out, tight = (sequences.held_out, sequences.held_out_labels, batch_size), why_not_copied(uncut)
    if tight:
        say(f"the KL divergence is left out: {tight}")
        results = evaluate({"uncut": uncut}, *held_out)
        smaller, report = uncut, compress_(uncut, plan)
        results |= evaluate({"cut": smaller}, *held_out)
    else:
        smaller = copy.deepcopy(uncut)
        report = compress_(smaller, plan)
        results = evaluate({"uncut": uncut, "cut": smaller}, *held_out)
    report.loss_before, report.loss_after = (results[stage]["loss"] for stage in ("uncut", "cut"))
    report.kl_divergence = results["cut"].get("kl_divergence")
    record = record_of(smaller)
    record.cuts[-1] |= report.to_dict()
    record.run |= _run(model, data, command)
    record.machine, record.evaluations = describe_machine(), results
    say(f"writing {output}")
    with new_directory(output, overwrite=overwrite) as directory:
        smaller.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        write_card(directory, repo_id=output.name)
        write_report_page(directory)
        files = sorted(file.name for file in directory.iterdir())
    return SavedCut(
        output, report, {"uncut": before | results["uncut"], "cut": describe(smaller) | results["cut"]}, files
    )


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The sizes of a model: `state_size` in words ("8", "3–5"), `parameters`, and `state_bytes` per sequence."""
    mixers = find_mixers(model).values()
    return {
        "state_size": size_range(mixer.state_size for mixer in mixers),
        "parameters": model.num_parameters(),
        "state_bytes": sum(mixer.bytes_per_state * mixer.state_size for mixer in mixers),
    }


def _run(model: SavedModel, data: DataOptions, command: Iterable[str]) -> dict[str, Any]:
    """How the smaller model came about, for its record; without the folders of this machine."""
    known = {
        "base_model": None if model.is_local else model.name,
        "license": license_of(model.directory if model.is_local else model.name),
        "dataset": ", ".join(Path(name).name if Path(name).exists() or "*" in name else name for name in data.data),
        "seed": data.seed,
        "command": shlex.join(command),
    }
    return {name: value for name, value in known.items() if value not in (None, "")}


def rules(file: Path | None = None, **given: Any) -> CompreSSMConfig:
    """The rules of a cut, of a file and of what is given besides, which goes first.

    Args:
        file: a CompreSSMConfig as JSON, or None.
        given: fields of CompreSSMConfig; those that are None are not given. One of the rules for the number of states
            takes the place of the file's.

    Raises:
        ValueError, TypeError: as CompreSSMConfig.
        OSError: the file cannot be read.

    Example:
        >>> rules(state_size=4, tolerance=None).state_size
        4
    """
    given = {name: value for name, value in given.items() if value is not None}
    from_file = {} if file is None else CompreSSMConfig.load(file).to_dict()
    chosen = [name for name in RULES if name in given]
    if chosen:
        from_file = {name: value for name, value in from_file.items() if name not in RULES}
    if len(chosen) > 1 or not (chosen or from_file):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in RULES)
        raise ValueError(f"give one of {options} to say how many states to keep, or a --config that does")
    return CompreSSMConfig(**from_file | given)
