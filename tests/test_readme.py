"""Every code block of the READMEs is executed, or, where it would train for long, given to the real parsers.

Python blocks run as printed, in order, in one namespace per file and one process, from an empty directory and with a
loopback Hub to push to; so do `hf-compressm` commands for which `GIVEN` has files. What a reader has by then, and no
block defines (a model, a dataset, a checkpoint), comes from the table `GIVEN`: an entry serves each block in which its
text occurs, and may look at the results afterwards. A block of a kind that `LANGUAGES` or `PROGRAMS` does not know is
a failure.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import re
import shlex
import subprocess
import sys
import textwrap
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
import yaml
from conftest import TINY, lively, tokens
from hub_server import loopback_hub
from huggingface_hub import HfApi
from packaging.requirements import InvalidRequirement, Requirement
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    MambaConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

import hf_compressm
from hf_compressm import CompreSSMCallback, CompreSSMConfig, find_mixers
from hf_compressm.cards import write_card
from hf_compressm.cli import app
from hf_compressm.texts import byte_tokenizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
READMES = [name for name in ("README.md", "recipes/README.md", "hub_cards/README.md") if (ROOT / name).exists()]
# What a user of Transformers has imported.
IMPORTED = {each.__name__: each for each in (AutoModelForCausalLM, Trainer, TrainingArguments)} | {"torch": torch}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" if it says none) and the number of its first line."""

    file: str
    line: int
    language: str
    text: str

    def fail(self, why: str) -> AssertionError:
        return AssertionError(f"{self.file}:{self.line}: {why}\n\n{textwrap.indent(self.text, '    ')}")

    def commands(self) -> Iterator[list[str]]:
        """The commands of a shell block, as their arguments, without the variables set before them."""
        for line in re.sub(r"\\\n\s*", " ", self.text).splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                    command = command[1:]
                yield command


def read_blocks(file: str, text: str | None = None) -> list[Block]:
    text = (ROOT / file).read_text(encoding="utf-8") if text is None else text
    blocks = []
    for match in re.finditer(r"^( *)```([^\n`]*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 2
        blocks.append(Block(file, line, match[2].strip(), textwrap.dedent(match[3])))
    return blocks


# --- What a reader has before a block, and what is looked at after it ---


def small_model(architecture: str = "mamba") -> PreTrainedModel:
    """A model with 16 states, few enough to be quick and enough to keep the 12 that the README keeps."""
    return lively(TINY[architecture].build(state_size=16))


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(8, 32, seed)} for seed in range(2)]


def dataset() -> list[dict[str, torch.Tensor]]:
    """As many tokens in a batch as a cut asks for."""
    return [{"input_ids": row, "labels": row} for row in tokens(256, 16)]


def arguments(directory: str, **options: Any) -> TrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    return TrainingArguments(directory, max_steps=3, per_device_train_batch_size=256, **quiet, **options)


@contextlib.contextmanager
def a_trainer(names: dict[str, Any]) -> Iterator[None]:
    names.update(model=small_model(), args=arguments("runs/trainer"), dataset=dataset())
    yield
    assert names["model"].config.state_size == 12


@contextlib.contextmanager
def a_loop(names: dict[str, Any]) -> Iterator[None]:
    from accelerate import Accelerator

    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    names.update(model=model, optimizer=optimizer, scheduler=scheduler, accelerator=Accelerator(cpu=True))
    names.update(loss=model(tokens(), labels=tokens()).loss)
    before = [parameter.clone() for parameter in model.parameters()]
    yield
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@contextlib.contextmanager
def a_finished_model(names: dict[str, Any]) -> Iterator[None]:
    names.update(model=small_model(), batches=batches())
    yield
    assert names["model"].config.state_size == 12 and "12" in str(names["report"])


@contextlib.contextmanager
def a_selection(names: dict[str, Any]) -> Iterator[None]:
    """The config that the block makes keeps a Mamba-2 an ordinary model."""
    names.update(model=small_model("mamba2"))
    yield
    hf_compressm.compress(names["model"], batches(), names["config"])
    assert (names["model"].config.model_type, names["model"].config.state_size) == ("mamba2", 12)


@contextlib.contextmanager
def saved_demo(names: dict[str, Any]) -> Iterator[None]:
    small_model().save_pretrained("runs/demo")
    yield
    assert isinstance(names["model"], PreTrainedModel)


@contextlib.contextmanager
def a_new_mixer(names: dict[str, Any]) -> Iterator[None]:
    from hf_compressm.mixers.architectures import unregister_mixer

    class MyMixer(torch.nn.Module):
        """Transformers' mixer under other names."""

        def __init__(self, mixer: torch.nn.Module):
            super().__init__()
            theirs = {"d_state": "ssm_state_size", "d_inner": "intermediate_size", "dt_rank": "time_step_rank"}
            self.__dict__.update({name: value for name, value in vars(mixer).items() if name not in theirs.values()})
            self.__dict__.update({ours: getattr(mixer, name) for ours, name in theirs.items()})

    names.update(MyMixer=MyMixer)
    try:
        yield
        (mixer,) = find_mixers(torch.nn.Sequential(MyMixer(small_model().backbone.layers[0].mixer))).values()
        assert mixer.state_size == 16
    finally:
        unregister_mixer(MyMixer)


@contextlib.contextmanager
def a_trained_adapter(names: dict[str, Any]) -> Iterator[None]:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small_model(), LoraConfig(r=2, target_modules=["in_proj", "x_proj"]))
    callback = CompreSSMCallback(CompreSSMConfig(state_size=12))
    trainer = Trainer(model, arguments("runs/lora"), train_dataset=dataset(), callbacks=[callback])
    trainer.train()
    trainer.save_model("runs/lora/adapter")
    names.update(base=small_model())
    yield
    assert isinstance(names["model"], PreTrainedModel) and names["model"].config.state_size == 12


@contextlib.contextmanager
def a_checkpoint_and_its_plan(names: dict[str, Any]) -> Iterator[None]:
    model = small_model()
    model.save_pretrained("runs/lm/checkpoint-100")
    config = CompreSSMConfig(state_size=12)
    plan = hf_compressm.plan_compression(model, hf_compressm.measure(model, batches()), config)
    plan.save("runs/lm/checkpoint-100-plan.json")
    yield
    cut = AutoModelForCausalLM.from_pretrained("runs/lm/cut-100")
    assert {mixer.state_size for mixer in find_mixers(cut).values()} == {12}


@contextlib.contextmanager
def a_large_models_config(names: dict[str, Any]) -> Iterator[None]:
    """Where the Hub would have it, there is a directory of this name."""
    MambaConfig(architectures=["MambaForCausalLM"]).save_pretrained("state-spaces/mamba-2.8b-hf")
    yield


@contextlib.contextmanager
def a_model_and_its_trainer(names: dict[str, Any]) -> Iterator[None]:
    model = small_model()
    callback = CompreSSMCallback(CompreSSMConfig(state_size=12))
    trainer = Trainer(
        model, arguments("runs/pushed", hub_model_id="me/trained"), train_dataset=dataset(), callbacks=[callback]
    )
    trainer.train()
    model.save_pretrained("runs/demo")
    names.update(model=model, trainer=trainer)
    yield
    api = HfApi()
    for name in ("me/small", "me/demo", "me/trained"):
        assert {"README.md", "compressm.json", "model.safetensors"} <= set(api.list_repo_files(name)), name


@contextlib.contextmanager
def models_and_texts(names: dict[str, Any]) -> Iterator[None]:
    """A model that knows bytes, the demo's, and some text."""
    lively(TINY["mamba"].build(state_size=16, vocab_size=257)).save_pretrained("runs/lm")
    byte_tokenizer().save_pretrained("runs/lm")
    Path("texts").mkdir()
    for number in range(20):
        Path(f"texts/{number}.txt").write_text(f"{number} times {number} is {number * number}. " * 60)
    yield
    assert Path("states.png").is_file() and Path("runs/lm-small/report.html").is_file()
    assert "README.md" in HfApi().list_repo_files("me/lm-small")


@contextlib.contextmanager
def a_cut_model(names: dict[str, Any]) -> Iterator[None]:
    names.update(model=small_model())
    hf_compressm.compress(names["model"], batches(), CompreSSMConfig(state_size=12))
    yield
    assert "Trained on short texts only." in write_card("runs/small").read_text()


# Text of a block -> what a reader has before it; `contextlib.nullcontext` for commands that run as they stand.
GIVEN: dict[str, Callable[[dict[str, Any]], contextlib.AbstractContextManager[None]]] = {
    "trainer = Trainer(model=model": a_trainer,
    "compressor = Compressor(": a_loop,
    "report = compress(model, batches": a_finished_model,
    'config = CompreSSMConfig(state_size=12, realization="stock")': a_selection,
    'from_pretrained("runs/demo")': saved_demo,
    "register_mixer(MyMixer": a_new_mixer,
    "load_compressed_peft(base": a_trained_adapter,
    "hf-compressm reshape": a_checkpoint_and_its_plan,
    "hf-compressm estimate": a_large_models_config,
    "trainer.push_to_hub()": a_model_and_its_trainer,
    "hf-compressm analyze": models_and_texts,
    "record_of(model)": a_cut_model,
}


def execute(block: Block, names: dict[str, Any]) -> None:
    """Run a block: Python as printed, of a shell block the commands of our own if files are given for it."""
    given = [context for text, context in GIVEN.items() if text in block.text]
    try:
        with contextlib.ExitStack() as stack:
            for context in given:
                stack.enter_context(context(names))
            if block.language == "python":
                # Tracebacks point to the README's own lines.
                exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / block.file), "exec"), names)
            elif block.language in SHELL and given:
                for program, *words in (command for command in block.commands() if command):
                    if program == "hf-compressm":
                        result = CliRunner().invoke(app, words)
                        output = f"{result.output}\n{result.exception or ''}"
                        assert result.exit_code == 0, f"{program} {shlex.join(words)} returned an error:\n{output}"
    except Exception as error:
        raise block.fail(f"the block failed with {type(error).__name__}: {error}") from error


# --- What the real parsers say of a command that would run for long ---


class Parsed(Exception):
    """Ends a recipe when its options are parsed."""


def check_script(words: list[str]) -> None:
    """The options of a Python script, or module, given to its own parser."""
    words = [word for word in words if word != "-u"]
    if words[:1] == ["-m"]:
        return check_command(words[1:])
    script = ROOT / words[0]
    assert script.exists(), f"there is no {words[0]}"

    def then_stop(method: Callable) -> Callable:
        def wrapper(*arguments: Any, **options: Any) -> None:
            method(*arguments, **options)
            raise Parsed

        return wrapper

    patches = [
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        mock.patch.object(ArgumentParser, "parse_args", then_stop(ArgumentParser.parse_args)),
        mock.patch.object(
            HfArgumentParser,
            "parse_args_into_dataclasses",
            then_stop(HfArgumentParser.parse_args_into_dataclasses),
        ),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(contextlib.suppress(Parsed))
        importlib.import_module(script.stem).main()
        raise AssertionError(f"{words[0]} parsed no options")


def check_launch(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch", f"accelerate {words[0]} is not checked yet: add it to tests/test_readme.py"
    parsed = launch_command_parser().parse_args(words[1:])
    assert parsed.config_file is None or (ROOT / parsed.config_file).exists(), f"there is no {parsed.config_file}"
    check_script([parsed.training_script, *parsed.training_script_args])


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    check_script([parsed.training_script, *parsed.training_script_args])


def check_make(words: list[str]) -> None:
    result = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def check_pip(words: list[str]) -> None:
    """Extras and packages that pip is asked for are in pyproject.toml."""
    assert words[0] == "install", f"pip {words[0]} is not checked yet: add it to tests/test_readme.py"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    known = {Requirement(item).name for items in (project["dependencies"], *extras.values()) for item in items}
    for word in (word for word in words[1:] if not word.startswith("-")):
        try:
            wanted = Requirement(re.sub(r"^\.(?=\[|$)", project["name"], word))
        except InvalidRequirement as error:
            raise AssertionError(f"pip install {word}: {error}") from None
        assert wanted.name in known | {project["name"]}, f"{wanted.name} is nowhere in pyproject.toml"
        missing = wanted.extras - set(extras) if wanted.name == project["name"] else set()
        assert not missing, f"pyproject.toml has no extra {missing}; it has {sorted(extras)}"


def check_typer(program: str, application: typer.Typer) -> Callable[[list[str]], None]:
    def check(words: list[str]) -> None:
        """Each command's own parser; it is not run."""
        command, path = typer.main.get_command(application), program
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{path} has no command {words[0]}; it has {sorted(command.commands)}"
            command, path, words = command.commands[words[0]], f"{path} {words[0]}", words[1:]
        # --help is an option that prints and leaves.
        with contextlib.suppress(typer.Exit), contextlib.redirect_stdout(None):
            command.make_context(path, list(words))

    return check


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "pip": check_pip,
    "python": check_script,
    "accelerate": check_launch,
    "torchrun": check_torchrun,
    "hf-compressm": check_typer("hf-compressm", app),
}


def check_command(words: list[str]) -> None:
    assert words[0] in PROGRAMS, f"nothing checks {words[0]!r}: add it to PROGRAMS of tests/test_readme.py"
    try:
        PROGRAMS[words[0]](words[1:])
    except SystemExit as error:
        raise AssertionError(f"the options are refused: {shlex.join(words)}") from error


def check_shell(block: Block) -> None:
    for command in block.commands():
        if command:
            check_command(command)


def check_python(block: Block) -> None:
    compile(block.text, block.file, "exec")


# Python is compiled here and run in a process of its own; formulas are for GitHub's eyes.
LANGUAGES: dict[str, Callable[[Block], object]] = {
    "python": check_python,
    **dict.fromkeys(SHELL := ("", "bash", "sh", "shell"), check_shell),
    "json": lambda block: json.loads(block.text),
    "yaml": lambda block: yaml.safe_load(block.text),
    "math": lambda block: None,
}


def check(block: Block) -> None:
    """Everything that can be said about a block without executing it."""
    if block.language not in LANGUAGES:
        raise block.fail(f"nothing executes blocks of {block.language!r}: add it to LANGUAGES of tests/test_readme.py")
    try:
        LANGUAGES[block.language](block)
    except Exception as error:
        raise block.fail(str(error)) from error


ALL_BLOCKS = [block for file in READMES for block in read_blocks(file)]


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=lambda block: f"{block.file}:{block.line}")
def test_a_block_is_of_a_known_kind_and_accepted(block):
    check(block)


@pytest.mark.parametrize("file", READMES)
def test_no_block_is_overlooked(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(read_blocks(file)), f"a block of {file} is not fenced by lines of ``` alone"
    assert not re.search(r"^ *(~~~|<pre|\t)|^\s*\n {4,}[^\s*0-9-]", text, re.MULTILINE), f"{file}: use ``` for blocks"


RUNNABLE = [file for file in READMES if any(block.language == "python" for block in read_blocks(file))]


@pytest.mark.parametrize("file", RUNNABLE)
def test_blocks_run_as_printed(file, tmp_path):
    with loopback_hub() as hub:
        environment = hub.environment(tmp_path / "home", token="hf_secret")
        command = [sys.executable, __file__, file]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stdout + result.stderr[-4000:]
        assert hub.places_of("hf_secret") == [] and "hf_secret" not in result.stdout + result.stderr


def test_all_that_is_given_is_needed():
    unused = [text for text in GIVEN if not any(text in block.text for block in ALL_BLOCKS)]
    assert not unused, f"no README has a block with {unused}: remove it from GIVEN of tests/test_readme.py"


def test_make_targets_in_the_text_exist():
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in READMES)
    for words in re.findall(r"`make ([a-z -]+)`", text):
        check_make(words.split())


# The test of the tests: a block that cannot work, and what is said about it.
@pytest.mark.parametrize(
    "language, text, message",
    [
        ("cobol", "DISPLAY 1", "nothing executes blocks of 'cobol'"),
        ("python", "print(1", "was never closed"),
        ("json", "{'a': 1}", "Expecting property name"),
        ("", "rm -rf build", "nothing checks 'rm'"),
        ("bash", "make demo && make no-such-target", "No rule to make target"),
        ("", "pip install '.[cuda,gpu]'", "has no extra {'gpu'}"),
        ("", "pip install mamba", "mamba is nowhere in pyproject.toml"),
        ("", "python recipes/digit.py", "there is no recipes/digit.py"),
        ("", "A=1 python recipes/digits.py \\\n  --state_sizes 12", "'--state_sizes'"),
        ("", "python recipes/digits.py --architecture mamba3", "the options are refused"),
        ("", "python recipes/accelerate_loop.py --target 8 --step x", "the options are refused"),
        ("", "accelerate launch --config_file none.yaml recipes/digits.py", "there is no none.yaml"),
        ("", "accelerate launch --num_processes 2 recipes/digits.py --no 1", "'--no'"),
        ("", "torchrun --nproc_per_node 2 recipes/accelerate_loop.py --no 1", "the options are refused"),
        ("", "hf-compressm shrink model", "has no command shrink"),
        ("", "hf-compressm estimate model --state-size small", "small"),
        ("", "hf-compressm estimate model", "Missing parameter: state_size"),
    ],
)
def test_a_wrong_block_fails(language, text, message):
    (block,) = read_blocks("X.md", f"# Title\n\n```{language}\n{text}\n```\n")
    with pytest.raises(AssertionError) as caught:
        check(block)
    assert str(caught.value).startswith("X.md:4: ") and message in str(caught.value)
    assert textwrap.indent(text, "    ") in str(caught.value)


def test_a_block_that_breaks_is_quoted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = read_blocks("X.md", "```python\na = 1\n...\nb = a / 0\n```\n")
    with pytest.raises(AssertionError, match=r"X.md:2: the block failed with ZeroDivisionError(.|\n)*    b = a / 0"):
        execute(block, {})
    shell = Block("X.md", 2, "", "hf-compressm reshape runs/lm/checkpoint-100 --plan no.json --output out\n")
    with pytest.raises(AssertionError, match=r"returned an error(.|\n)*no.json"):
        execute(shell, {})


if __name__ == "__main__":
    namespace = {"__name__": "readme", **IMPORTED}
    torch.set_num_threads(1)
    for each in read_blocks(sys.argv[1]):
        try:
            execute(each, namespace)
        except AssertionError as failure:
            traceback.print_exception(failure.__cause__)
            sys.exit(str(failure))


def test_troubleshooting_quotes_real_messages():
    """All but Transformers' own are in the package's source, between two placeholders at most."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Troubleshooting")[1].split("\n## ")[0]
    quoted = [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("| `")]
    messages = [row.split("`")[1] for row in quoted if "(Transformers)" not in row]
    assert len(messages) >= 8
    sources = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "hf_compressm").rglob("*.py")]
    strings = [
        node.value
        for source in sources
        for node in ast.walk(source)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    missing = [message for message in messages if not any(message in text for text in strings)]
    assert not missing
