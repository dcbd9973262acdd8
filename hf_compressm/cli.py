"""The command line, `hf-compressm`: thin doors to functions of the package."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

INTERRUPTED = 130

app = typer.Typer(
    help="Shrink the state dimension of Hugging Face Mamba models. A MODEL is a directory, or a name on the Hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]
Model = Annotated[str, typer.Argument(help="A model directory, or a model on the Hub.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Data = Annotated[
    list[str],
    typer.Option(
        help="Text files ('texts/*.txt'), token files (.jsonl with input_ids, .npy, .safetensors), or a data set's "
        "name or directory. Can be given several times."
    ),
]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", help="A directory, a name, or 'bytes'. Default: the model's own.")
]
Tokens = Annotated[int | None, typer.Option(min=1, help="Tokens to measure on. Default: 16,384, or what N needs.")]
BlockSize = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens of a sequence. Default: the rows of a token file as they are; else 256."),
]
DataConfig = Annotated[str | None, typer.Option(help="Configuration of the data set.")]
Split = Annotated[str, typer.Option(help="Split of the data set, or a part of one: 'train[:1%]'.")]
TextColumn = Annotated[str, typer.Option(help="Where a data set, or JSON lines, have the text.")]
Tolerance = Annotated[
    float | None, typer.Option(help="Keep as many states as it takes for no layer's output to change by more (0.05).")
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")]
Device = Annotated[str | None, typer.Option(help="Where to calculate. Default: a GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences that are run at once.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the order in which the data are taken.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin where there is no safetensors file.")
]


@app.callback()
def _group() -> None:
    """A callback makes typer keep subcommands where there is only one."""


@app.command(epilog="Example: hf-compressm inspect state-spaces/mamba-130m-hf")
def inspect(model: Model, revision: Revision = None, as_json: AsJson = False) -> None:
    """Tell what a model is: its layers with state, N, bytes of state, how it can be cut, and whether it was."""
    with _reporting(as_json) as out:
        from .inspection import inspect_model
        from .model_files import find_model

        _print(inspect_model(find_model(model, revision)), as_json, out)


@app.command(epilog="Example: hf-compressm analyze runs/lm --data 'texts/*.txt' --tolerance 0.02 --plot states.png")
def analyze(
    model: Model,
    data: Data,
    tokenizer: TokenizerName = None,
    tolerance: Tolerance = 0.05,
    criteria: Annotated[
        str | None,
        typer.Option(help="Ways to choose states to compare: 'refit,ghost,hankel'. Default: the usual ones."),
    ] = None,
    tokens: Tokens = None,
    block_size: BlockSize = None,
    data_config: DataConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    plot: Annotated[Path | None, typer.Option(help="Draw the errors into this file (.png, .svg, .pdf).")] = None,
    save: Annotated[Path | None, typer.Option(help="Write all numbers into this file, as JSON.")] = None,
    verify: Annotated[bool, typer.Option(help="Try the recommended cut out on a copy of the model.")] = True,
    dtype: Dtype = "auto",
    device: Device = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    allow_pickle: AllowPickle = False,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a model's states are worth, and recommend how many to keep."""
    with _reporting(as_json) as out:
        from .analysis import analyze as measure_and_recommend
        from .analysis import plot_analysis
        from .config import CompreSSMConfig
        from .files import write_file
        from .model_files import check_cut, check_weights, find_model, load_model
        from .saved_models import DataOptions, sequences_for

        for file in filter(None, (plot, save)):
            if not file.absolute().parent.is_dir():
                raise FileNotFoundError(f"{file}: there is no directory {file.parent}")
        names = None if criteria is None else [name.strip() for name in criteria.split(",") if name.strip()]
        for name in names or ["auto"]:
            config = CompreSSMConfig(tolerance=tolerance, criterion=name)
        options = DataOptions(data, tokenizer, tokens, block_size, data_config, split, text_column, seed)
        saved = find_model(model, revision)
        mixers = check_cut(saved, config)
        check_weights(saved, allow_pickle=allow_pickle)
        say = _say(as_json)
        say("reading the data")
        sequences, _ = sequences_for(saved, mixers, options, max(mixer.state_size for mixer in mixers.values()) // 4)
        say(f"loading {model}")
        loaded = load_model(saved, dtype=dtype, device=_device(device), allow_pickle=allow_pickle)
        result = measure_and_recommend(
            loaded,
            sequences.calibration,
            tolerance=tolerance,
            criteria=names,
            batch_size=batch_size,
            held_out=(sequences.held_out, sequences.held_out_labels) if verify else None,
            show_progress=not as_json,
        )
        if plot is not None:
            plot_analysis(result, plot, f"{model}, measured on {sequences.calibration.numel():,} tokens")
        if save is not None:
            write_file(save, json.dumps(result.to_dict(), indent=1) + "\n")
        if as_json:
            return _print(result, as_json, out)
        layers = f"{len(mixers)} layers with state" if len(mixers) > 1 else "1 layer with state"
        print(f"{model}: {type(loaded).__name__}, {layers}\n\n{result}", file=out)
        if result.is_worth_it:
            words = ["hf-compressm", "compress", model, *(word for name in data for word in ("--data", name))]
            words += ["--tokenizer", tokenizer] if tokenizer else []
            words += ["--tokens", str(tokens)] if tokens else []
            words += ["--realization", result.recommended] if result.recommended != "stock" else []
            print(f"\nTo do it:\n  {shlex.join(words)} --tolerance {tolerance:g} --output DIR", file=out)
        for file, what in ((plot, "the picture"), (save, "the numbers")):
            if file is not None:
                print(f"{file} holds {what}.", file=out)


@app.command(epilog="Example: hf-compressm compress runs/lm --data 'texts/*.txt' --state-size 16 --output runs/lm-16")
def compress(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Directory for the smaller model; it appears when all is done.")],
    state_size: Annotated[
        str | None,
        typer.Option(help="States to keep: a number (16), a fraction (0.1), or one number per layer (16,8,12)."),
    ] = None,
    tolerance: Tolerance = None,
    state_bytes: Annotated[
        int | None, typer.Option(help="Bytes of state that all layers share out among them (projected only).")
    ] = None,
    hankel_tolerance: Annotated[
        float | None, typer.Option(help="CompreSSM's rule: the share of the Hankel singular values to give up.")
    ] = None,
    realization: Annotated[
        Literal["stock", "projected", "auto"] | None,
        typer.Option(
            help="Select states (stock), mix them (projected; Mamba-2 only), or mix them where a selection would "
            "cost more than 5 % (auto, the default)."
        ),
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="How states are chosen. Default: the best for the layout.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A CompreSSMConfig as JSON; other options go before it.")] = None,
    tokenizer: TokenizerName = None,
    tokens: Tokens = None,
    block_size: BlockSize = None,
    data_config: DataConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    dtype: Dtype = "auto",
    device: Device = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    allow_pickle: AllowPickle = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that is in the directory.")
    ] = False,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Cut a saved model, and save the smaller one with its card, report, record and plan."""
    with _reporting(as_json, "nothing was written") as out:
        from .model_files import check_output, find_model
        from .saved_models import DataOptions, compress_saved, rules

        check_output(output, overwrite=overwrite)
        cut = rules(
            config,
            state_size=_state_size(state_size),
            tolerance=tolerance,
            state_bytes=state_bytes,
            hankel_tolerance=hankel_tolerance,
            realization=realization,
            criterion=criterion,
            calibration_tokens=tokens,
        )
        result = compress_saved(
            find_model(model, revision),
            DataOptions(data, tokenizer, tokens, block_size, data_config, split, text_column, seed),
            cut,
            output,
            dtype=dtype,
            device=_device(device),
            batch_size=batch_size,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            command=["hf-compressm", *sys.argv[1:]],
            show_progress=not as_json,
            say=_say(as_json),
        )
        _print(result, as_json, out)


@app.command(
    epilog="Example: hf-compressm reshape runs/lm/checkpoint-100 --plan runs/lm/plan.json --output runs/lm/cut-100"
)
def reshape(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the Trainer or of accelerator.save_state.")],
    plan: Annotated[Path, typer.Option(help="plan.json, with plan.safetensors beside it.")],
    output: Annotated[Path, typer.Option(help="Where to write the smaller checkpoint; must not exist.")],
    config: Annotated[
        Path | None, typer.Option(help="A config.json, or its directory, if the checkpoint has none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cut a training checkpoint on disk, model and optimizer: what resumes from it goes on with the smaller model."""
    with _reporting(as_json) as out:
        from .plan import CompressionPlan
        from .reshape import reshape_checkpoint

        report = reshape_checkpoint(
            checkpoint, CompressionPlan.load(plan), output, config=config, show_progress=not as_json
        )
        _print(report, as_json, out)


@app.command(
    epilog="Example: hf-compressm estimate state-spaces/mamba-2.8b-hf --state-size 8 --world-size 8 --strategy fsdp2"
)
def estimate(
    model: Annotated[str, typer.Argument(help="A model directory, a config.json, or a model on the Hub.")],
    state_size: Annotated[int, typer.Option(help="N after the cut.")],
    tokens: Annotated[
        int | None, typer.Option(help="Calibration tokens; by default, what the Compressor takes.")
    ] = None,
    world_size: Annotated[int, typer.Option(help="Processes that train the model.")] = 1,
    strategy: Annotated[
        Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"], typer.Option(help="What shares the model out.")
    ] = "ddp",
    dtype: Annotated[str, typer.Option(help="Type of the weights in training.")] = "bfloat16",
    optimizer: Annotated[Literal["adamw", "lion", "sgd"], typer.Option(help="What trains it.")] = "adamw",
    realization: Annotated[
        Literal["stock", "projected", "auto"],
        typer.Option(help="What the smaller model is; auto: projected where that is possible."),
    ] = "auto",
    sequences: Annotated[int, typer.Option(help="Sequences that each process trains on at once.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Where step times were measured.")] = "cuda",
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a cut takes and what it brings, without the model's weights: memory, communication, expected speed."""
    with _reporting(as_json) as out:
        from .estimate import estimate as calculate
        from .model_files import find_model, read_config

        result = calculate(
            read_config(find_model(model, revision)),
            state_size=state_size,
            tokens=tokens,
            world_size=world_size,
            strategy=strategy,
            dtype=dtype,
            optimizer=optimizer,
            realization=realization,
            sequences=sequences,
            length=length,
            device=device,
        )
        _print(result, as_json, out)


@app.command(epilog="Example: hf-compressm card runs/lm-16")
def card(
    directory: Annotated[Path, typer.Argument(help="A directory that a model was saved in after a cut.")],
    as_json: AsJson = False,
) -> None:
    """Write the model card, README.md, from what the directory tells of the cut."""
    with _reporting(as_json) as out:
        from .cards import write_card

        _print_file(write_card(directory), as_json, out)


@app.command(epilog="Example: hf-compressm report runs/lm-16 --output lm-16.html")
def report(
    directory: Annotated[Path, typer.Argument(help="A directory that a model was saved in after a cut.")],
    output: Annotated[
        Path | None, typer.Option(help="The file to write. Default: report.html in the directory.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a page with pictures of what was cut, what it cost and what it brought; it needs no network."""
    with _reporting(as_json) as out:
        from .report_page import write_report_page

        _print_file(write_report_page(directory, output), as_json, out)


@app.command(epilog="Example: hf-compressm push runs/lm-16 me/lm-16 --private   (log in first: hf auth login)")
def push(
    directory: Annotated[Path, typer.Argument(help="A directory that a model was saved in after a cut.")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; it is made if it does not exist.")],
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to. Default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Push a smaller model to the Hub, with card, report, record and plan. The token is the one you logged in with."""
    with _reporting(as_json, name=repo) as out:
        from .hub import push_compressed

        url = push_compressed(directory, repo, private=private, revision=revision, commit_message=message)
        print(json.dumps({"url": url}) if as_json else f"pushed to {url}", file=out, flush=True)


@app.command(epilog="Example: hf-compressm diff runs/lm runs/lm-16")
def diff(
    a: Annotated[str, typer.Argument(help="A model directory, or a model on the Hub.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Tell what changed from one model to another: config, class, states per layer, shapes and values."""
    with _reporting(as_json) as out:
        from .difference import compare_models
        from .model_files import find_model

        _print(compare_models(find_model(a), find_model(b), show_progress=not as_json), as_json, out)


def _state_size(text: str | None) -> int | float | list[int] | None:
    """A command line's 16, 0.1 or 16,8,12."""
    if text is None:
        return None
    try:
        if "," in text:
            return [int(part) for part in text.split(",")]
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(
            f"--state-size is a number (16), a fraction (0.1), or a number for each layer (16,8,12), not {text!r}"
        ) from None


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from error
    return name


def _say(as_json: bool) -> Any:
    """What tells of long work as it goes on."""
    return (lambda text: None) if as_json else (lambda text: print(f"{text} ...", file=sys.stderr, flush=True))


def _print(result: Any, as_json: bool, out: TextIO) -> None:
    print(json.dumps(result.to_dict(), indent=1) if as_json else result, file=out, flush=True)


def _print_file(file: Path, as_json: bool, out: TextIO) -> None:
    print(json.dumps({"file": str(file)}) if as_json else f"wrote {file}", file=out, flush=True)


@contextlib.contextmanager
def _reporting(as_json: bool, comfort: str = "", name: str = "") -> Iterator[TextIO]:
    """Within this context, a user's mistake gets one line and no traceback, and Ctrl-C ends the command.

    Args:
        as_json: whether progress is hidden.
        comfort: what is true after Ctrl-C.
        name: the repository that a Hub's error is about.

    Yields:
        Where the result goes. All that libraries print goes to stderr: it would be no JSON.
    """
    out = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            _be_quiet(as_json)
            yield out
    except KeyboardInterrupt:
        _fail(f"interrupted{comfort and '; ' + comfort}", INTERRUPTED)
    except BrokenPipeError:
        # Whoever reads the output, `head` for one, has seen enough. Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise typer.Exit(code=1) from None
    except typer.Exit:
        raise
    except Exception as error:
        _explain(error, name)


def _explain(error: Exception, name: str) -> None:
    """End with the line that an error of the user's, of the network's or of a file's deserves; raise what is a bug."""
    from .hub_errors import hub_message, is_hub_error

    if is_hub_error(error):
        _fail(hub_message(error, name, writing=bool(name)))
    if isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)):
        _fail(str(error) or type(error).__name__)
    raise error


def _be_quiet(as_json: bool) -> None:
    """Hide what libraries say of themselves: which kernels are not installed, which files are fetched."""
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    huggingface_hub.utils.logging.set_verbosity_error()
    if as_json or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()
        datasets.disable_progress_bars()


def _fail(message: str, code: int = 1) -> None:
    """Say what is wrong in one line, without the token, and end."""
    from huggingface_hub import get_token

    for token in filter(None, (get_token(), os.environ.get("HF_TOKEN"))):
        message = message.replace(token, "(the token)")
    print(f"hf-compressm: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code=code)


def main() -> None:
    """What the installed command calls."""
    app()


if __name__ == "__main__":
    main()
