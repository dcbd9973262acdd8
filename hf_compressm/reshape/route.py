"""`reshape_checkpoint`: files are rewritten, written anew or copied beside the output, which is then renamed."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..mixers import find_mixers
from ..plan import CompressionPlan
from ..provenance import PLAN_FILE
from ..record import RECORD_FILE, library_versions
from ..report import CompressionReport
from ..surgery import layer_report
from . import dcp, records, safetensors_files, torch_files, zero
from .skeleton import Skeleton
from .work import Work, copy_file

logger = logging.get_logger(__name__)

INDEX = "model.safetensors.index.json"
INPUTS = "compressm_inputs_*.safetensors"
PLANS = "compressm_plan_*"
WEIGHTS = re.compile(r"pytorch_model(_fsdp)?(_\d+)?\.bin")
OPTIMIZER = re.compile(r"optimizer\.(pt|bin)")
UNSUPPORTED = {
    re.compile(r".*_rank\d+\.bin"): "FSDP's own files of each process (use_dcp=False, or LOCAL_STATE_DICT)",
    re.compile(r"pytorch_model-\d+-of-\d+\.bin"): "weights in several pickles; save them as safetensors",
    re.compile(r"optimizer_\d+\.(pt|bin)"): "several optimizers",
}


@dataclass
class ReshapeReport:
    """What became of a checkpoint.

    Attributes:
        source, output: the two directories.
        compression: the cut, as one in process reports it.
        files: every file or directory of the output → `reshaped`, `written` or `copied`; of the source → `dropped`.
        bytes_before, bytes_after: the size of the two directories.
        peak_memory: bytes of memory that this took on top of what the process had, without the cache of files;
            measured whenever a new tensor was made; None where the system does not tell.
        seconds: how long it took.
    """

    source: str
    output: str
    compression: CompressionReport
    files: dict[str, str]
    bytes_before: int
    bytes_after: int
    peak_memory: int | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        done: dict[str, list[str]] = {}
        for name, status in self.files.items():
            done.setdefault(status, []).append(name)
        memory = "" if self.peak_memory is None else f", {self.peak_memory / 2**20:,.0f} MiB of memory"
        return "\n".join(
            [
                str(self.compression),
                *(f"{status}: {', '.join(names)}" for status, names in done.items()),
                f"{self.output}: {self.bytes_before / 2**20:,.1f} → {self.bytes_after / 2**20:,.1f} MiB, "
                f"{self.seconds:.1f} s{memory}",
            ]
        )


def reshape_checkpoint(
    checkpoint: str | Path,
    plan: CompressionPlan,
    output: str | Path,
    *,
    config: PreTrainedConfig | nn.Module | str | Path | None = None,
    show_progress: bool = False,
) -> ReshapeReport:
    """Write a copy of a training checkpoint in which the model is cut, and its optimizer with it.

    For engines that shard parameters where a cut in process is not possible: save, reshape, and resume with the
    smaller config; the losses are those of a cut in process. Takes checkpoints of the Trainer and of Accelerate's
    `save_state`, with plain, FSDP (sharded by DCP, or full) or DeepSpeed (ZeRO-1, -2, -3) weights and optimizer, and
    models that `save_pretrained` wrote. Tensors pass through one by one. The output appears when it is complete; the
    checkpoint is only read. Files that are not known are copied.

    Args:
        checkpoint: its directory.
        plan: the cut, from `plan_compression` or `CompressionPlan.load`.
        output: a directory that does not exist yet.
        config: the model's config, its directory, or the model itself (its values are not read): where the checkpoint
            has no config.json, or where the model's class is your own.
        show_progress: show a bar on the way.

    Raises:
        ValueError: the plan does not fit the checkpoint, or a file is damaged or of a format that is not supported, or
            the checkpoint holds only adapters.
        FileNotFoundError: the checkpoint, or a part of it, is missing.
        FileExistsError: the output exists.
        TypeError: an optimizer state that is not supported.
        OSError: the output cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> from hf_compressm import CompreSSMConfig, measure, plan_compression
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=8, num_hidden_layers=1))
        >>> statistics = measure(model, [torch.arange(8).repeat(4, 1)])
        >>> plan = plan_compression(model, statistics, CompreSSMConfig(state_size=2))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     model.save_pretrained(f"{directory}/full")
        ...     report = reshape_checkpoint(f"{directory}/full", plan, f"{directory}/small")
        ...     MambaForCausalLM.from_pretrained(f"{directory}/small").config.state_size
        2
    """
    start = time.perf_counter()
    checkpoint, output = Path(checkpoint).absolute(), Path(output).absolute()
    if not isinstance(plan, CompressionPlan):
        raise TypeError(f"plan must be a CompressionPlan (CompressionPlan.load reads one), got {type(plan).__name__}")
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"there is no checkpoint directory {checkpoint}")
    _refuse_adapters(checkpoint)
    if output.exists():
        raise FileExistsError(f"{output} exists; name a directory that does not")
    if output.is_relative_to(checkpoint):
        raise ValueError(f"{output} lies inside the checkpoint; name a directory outside of it")
    if not plan.changes:
        raise ValueError("the plan changes nothing: every layer keeps all of its states")
    try:
        skeleton = Skeleton(_model(checkpoint, config), plan)
    except ValueError as error:
        raise ValueError(f"{checkpoint} cannot be cut by this plan: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    bytes_before = _size(checkpoint)
    with (
        _beside(output, checkpoint) as target,
        tqdm(total=bytes_before, unit="B", unit_scale=True, desc="reshape", disable=not show_progress) as bar,
    ):
        scratch = target / ".scratch"
        scratch.mkdir()
        record = records.read_recorded(checkpoint)
        work = Work(skeleton, scratch, record.optimizer_parameters, bar.update)
        state = records.TrainingState(checkpoint, record.cuts)
        files = _rewrite_tensors(work, checkpoint, target)
        compression = _compression_report(work, plan, state.step)
        state.cut(compression.to_dict(), work)
        files |= _write_small_files(work, checkpoint, target, state)
        for item in sorted(checkpoint.iterdir()):
            if item.name in files:
                continue
            if item.match(INPUTS) and not state.pending:
                files[item.name] = "dropped"
                continue
            _copy(item, target / item.name, work)
            files[item.name] = "copied"
        scratch.rmdir()
    return ReshapeReport(
        source=str(checkpoint),
        output=str(output),
        compression=compression,
        files=dict(sorted(files.items())),
        bytes_before=bytes_before,
        bytes_after=_size(output),
        peak_memory=work.peak,
        seconds=time.perf_counter() - start,
    )


def _refuse_adapters(checkpoint: Path) -> None:
    if (checkpoint / "adapter_config.json").is_file():
        raise ValueError(
            f"{checkpoint} holds adapters of PEFT without the base that they belong to. Cut the model with its "
            "adapters: model = PeftModel.from_pretrained(base, checkpoint), compress_(model, plan), "
            "model.save_pretrained(output); hf_compressm.load_compressed_peft(base, output) then puts them back on "
            "the uncut base, and load_compressed_peft(base, checkpoint) those of a checkpoint that lies behind a cut"
        )


def _model(checkpoint: Path, config: PreTrainedConfig | nn.Module | str | Path | None) -> nn.Module:
    if isinstance(config, nn.Module):
        return copy.deepcopy(config).to("meta")
    if not isinstance(config, PreTrainedConfig):
        config = records.load_config(checkpoint if config is None else Path(config))
    return records.build_skeleton(copy.deepcopy(config))


@contextlib.contextmanager
def _beside(output: Path, like: Path) -> Iterator[Path]:
    """A directory that becomes the output when all went well, and vanishes when not."""
    target = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield target
        target.chmod(stat.S_IMODE(like.stat().st_mode) | stat.S_IRWXU)
        for folder, _, files in os.walk(target):
            for file in [*files, ""]:
                _sync(Path(folder, file))
        if output.exists():
            raise FileExistsError(f"{output} came to exist meanwhile; name a directory that does not")
        target.rename(output)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    _sync(output.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rewrite_tensors(work: Work, checkpoint: Path, target: Path) -> dict[str, str]:
    """Rewrite whatever holds parameters of the plan or an optimizer's state."""
    placed = _rewrite_safetensors(work, checkpoint, target)
    files = dict.fromkeys(placed.values(), "reshaped")
    optimizers, weights = [], []
    for item in sorted(checkpoint.iterdir()):
        unsupported = next((why for pattern, why in UNSUPPORTED.items() if pattern.fullmatch(item.name)), None)
        if unsupported is not None:
            raise ValueError(f"{item} is not supported: {unsupported}")
        if item.is_dir():
            if dcp.is_dcp(item):
                order, work.optimizer_order = work.optimizer_order, None
                if dcp.rewrite(work, item, target / item.name):
                    files[item.name] = "reshaped"
                    (weights if work.optimizer_order is None else optimizers).append(item.name)
                work.optimizer_order = work.optimizer_order or order
            elif zero.is_zero(item):
                zero.rewrite(work, item, target / item.name)
                files[item.name] = "reshaped"
                optimizers.append(item.name)
                weights.append(item.name)
        elif OPTIMIZER.fullmatch(item.name):
            torch_files.rewrite_optimizer(work, item, target / item.name)
            files[item.name] = "reshaped"
            optimizers.append(item.name)
        elif WEIGHTS.fullmatch(item.name) and torch_files.rewrite_weights(work, item, target / item.name):
            files[item.name] = "reshaped"
            weights.append(item.name)
    if len(optimizers) > 1:
        raise ValueError(
            f"{checkpoint} holds an optimizer's state in several formats: {optimizers}; remove all but one"
        )
    if placed and "pytorch_model.bin" in files:
        raise ValueError(f"{checkpoint} holds the weights in pytorch_model.bin and {sorted(set(placed.values()))}")
    if not placed and not weights:
        raise ValueError(f"{checkpoint} holds no weights of the model: no file has {work.skeleton.touched[:1]}")
    if (checkpoint / INDEX).is_file() and placed:
        safetensors_files.rewrite_index(work, checkpoint / INDEX, target / INDEX, checkpoint, placed)
        files[INDEX] = "reshaped"
    return files


def _rewrite_safetensors(work: Work, checkpoint: Path, target: Path) -> dict[str, str]:
    """Rewrite the safetensors files that hold parameters of the plan; returns stored names → files."""
    placed: dict[str, str] = {}
    found: dict[str, str] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        # Plans of earlier cuts have names like those of projections, but are none.
        if file.match(INPUTS) or file.match(PLANS):
            continue
        names = safetensors_files.stored_names(work, safetensors_files.read_header(file)[0])
        twice = sorted(set(names) & set(found))
        if twice:
            raise ValueError(f"{checkpoint}: {file.name} and {found[twice[0]]} both hold {twice[0]}; remove one")
        if names:
            found |= dict.fromkeys(names, file.name)
            placed |= dict.fromkeys(safetensors_files.rewrite(work, file, target / file.name), file.name)
    missing = [name for name in work.skeleton.touched if name not in found]
    if found and missing:
        raise ValueError(f"{checkpoint}: {sorted(set(found.values()))} lack the model's parameters {missing}")
    return placed


def _write_small_files(work: Work, checkpoint: Path, target: Path, state: records.TrainingState) -> dict[str, str]:
    model = work.skeleton.model_after
    if hasattr(model, "config"):
        records.write_config(model, target)
    record = records.read_recorded(checkpoint)
    record.cuts, record.versions, record.optimizer_parameters = state.history, library_versions(), work.optimizer_order
    record.save(target)
    number = 1 + len(list(checkpoint.glob(f"{PLANS}.json")))
    work.skeleton.plan.save(target / PLAN_FILE.format(number=number))
    written = [*state.write(target, work), RECORD_FILE]
    written += [file.name for file in target.glob(f"{PLANS[:-1]}{number}.*")]
    files = {name: "reshaped" if (checkpoint / name).exists() else "written" for name in written}
    for file in target.iterdir():
        if file.name == "config.json" or file.suffix == ".py":
            files[file.name] = "reshaped" if (checkpoint / file.name).exists() else "written"
    return files


def _copy(item: Path, target: Path, work: Work) -> None:
    if item.is_dir():
        target.mkdir()
        for inner in sorted(item.iterdir()):
            _copy(inner, target / inner.name, work)
    else:
        copy_file(item, target, work.advance)


def _compression_report(work: Work, plan: CompressionPlan, step: int | None) -> CompressionReport:
    skeleton = work.skeleton
    bytes_per_state = {name: mixer.bytes_per_state for name, mixer in find_mixers(skeleton.model_after).items()}
    return CompressionReport(
        layers=[
            layer_report(name, layer, skeleton.roundings[name].relative_error) for name, layer in plan.layers.items()
        ],
        tokens=plan.tokens,
        parameters_before=sum(parameter.numel() for parameter in skeleton.before.values()),
        parameters_after=sum(parameter.numel() for parameter in skeleton.after.values()),
        optimizer_bytes_before=work.optimizer_bytes_before,
        optimizer_bytes_after=work.optimizer_bytes_after,
        state_bytes_before=sum(bytes_per_state[name] * layer.state_size_before for name, layer in plan.layers.items()),
        state_bytes_after=sum(bytes_per_state[name] * layer.state_size_after for name, layer in plan.layers.items()),
        config=plan.config.to_dict(),
        step=step,
    )


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
