"""The command line, `hf-compressm`: thin doors to functions of the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

app = typer.Typer(
    help="Shrink the state dimension of Hugging Face Mamba models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.callback()
def _group() -> None:
    """A callback makes typer keep subcommands where there is only one."""


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
    from .plan import CompressionPlan
    from .reshape import reshape_checkpoint

    try:
        report = reshape_checkpoint(
            checkpoint, CompressionPlan.load(plan), output, config=config, show_progress=not as_json
        )
    except (ValueError, TypeError, OSError) as error:
        _fail(error)
    _print(report, as_json)


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
    realization: Annotated[Literal["stock", "projected"], typer.Option(help="What the smaller model is.")] = "stock",
    sequences: Annotated[int, typer.Option(help="Sequences that each process trains on at once.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Where step times were measured.")] = "cuda",
    as_json: AsJson = False,
) -> None:
    """Tell what a cut takes and what it brings, without the model's weights: memory, communication, expected speed."""
    from transformers import AutoConfig

    from .estimate import estimate as calculate

    try:
        result = calculate(
            AutoConfig.from_pretrained(model),
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
    except (ValueError, TypeError, OSError) as error:
        _fail(error)
    _print(result, as_json)


def _print(result: Any, as_json: bool) -> None:
    print(json.dumps(result.to_dict(), indent=1) if as_json else result)


def _fail(error: Exception) -> NoReturn:
    """Say what is wrong in one line; a user's mistake needs no traceback."""
    print(f"hf-compressm: {error}", file=sys.stderr)
    raise typer.Exit(code=1)


def main() -> None:
    """What the installed command calls."""
    app()


if __name__ == "__main__":
    main()
