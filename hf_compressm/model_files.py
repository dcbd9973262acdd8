"""Saved models: find one in a directory or on the Hub, look at it before its weights are read, load it, replace it.

What can be refused is refused before anything large is read, and nothing of a model is run but Transformers' own code.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    CacheNotFound,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .config import CompreSSMConfig
from .hub_errors import cannot_be_reached, hub_message
from .mixers import ARCHITECTURES, Mixer, find_mixers
from .planning import check_list_of_sizes, must_project, refuse_projection
from .provenance import recall_from
from .ranks import fixed_sizes

logger = logging.get_logger(__name__)

CONFIG_FILE = "config.json"
# Everything but weights: configs, records, tokenizers.
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
# Loading knows two kinds of weights. Those of the second are pickles, which can hold code.
SAFE_WEIGHTS = "model*.safetensors"
PICKLED_WEIGHTS = "pytorch_model*.bin"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# At most this long is waited for the Hub's first answer.
TIMEOUT = 10


@dataclass(frozen=True)
class SavedModel:
    """A saved model, and where it is.

    Attributes:
        name: what the user calls it: a directory, or a repository on the Hub.
        directory: its files on this machine; of a model on the Hub, the small ones until `load_model` fetches weights.
        commit: of a model on the Hub; None for a directory.
        files: all its files, those on the Hub included.
    """

    name: str
    directory: Path
    commit: str | None
    files: list[str]

    @property
    def is_local(self) -> bool:
        return self.commit is None

    def has(self, pattern: str) -> bool:
        """Whether there is a file, not in a folder, whose name is of this pattern."""
        return any(Path(file).match(pattern) and "/" not in file for file in self.files)


def find_model(name: str, revision: str | None = None) -> SavedModel:
    """Find a saved model; of one on the Hub, its small files are fetched.

    Where the Hub cannot be reached, or HF_HUB_OFFLINE is set, a copy in the cache is taken, with a warning.

    Args:
        name: a directory, its config.json, or a repository on the Hub.
        revision: a branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: no such directory, or a directory without config.json.
        OSError: the Hub has no such model, refuses it, or cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.name == CONFIG_FILE:
        path = path.parent
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a directory; --revision is for models on the Hub")
        files = sorted(str(file.relative_to(path)) for file in path.glob("*") if file.is_file())
        return _checked(SavedModel(name, path, None, files))
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"{name}: no such directory, nor can a model on the Hub have this name") from None
    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
        files = [sibling.rfilename for sibling in info.siblings or []]
        directory = snapshot_download(name, revision=info.sha, allow_patterns=SMALL_FILES)
        return _checked(SavedModel(name, Path(directory), info.sha, files))
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if not cannot_be_reached(error):
            raise OSError(hub_message(error, name)) from error
        return _checked(_cached_model(name, revision, error))


def _cached_model(name: str, revision: str | None, error: Exception) -> SavedModel:
    """The copy in the cache of a model on the Hub, which cannot be reached."""
    message = hub_message(error, name)
    try:
        directory = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        others = cached_models()
        known = f"; of models like it, the cache holds {', '.join(others[:5])}" if others else ""
        at = "" if revision is None else f" at {revision}"
        raise OSError(f"{message}, and the cache holds no whole copy of {name}{at}{known}") from error
    logger.warning(f"{message}: going on with the copy of {name} in the cache (commit {directory.name[:8]})")
    files = sorted(str(file.relative_to(directory)) for file in directory.glob("*"))
    return SavedModel(name, directory, directory.name, files)


def cached_models() -> list[str]:
    """The models in the Hub's cache on this machine whose states could be cut."""
    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, ValueError):
        return []
    types, found = supported_model_types(), []
    for repository in sorted(repositories, key=lambda item: item.repo_id):
        configs = [
            file.file_path
            for version in repository.revisions
            for file in version.files
            if file.file_name == CONFIG_FILE and repository.repo_type == "model"
        ]
        with contextlib.suppress(OSError, ValueError):
            if any(json.loads(path.read_text(encoding="utf-8")).get("model_type") in types for path in configs):
                found.append(repository.repo_id)
    return found


def _checked(model: SavedModel) -> SavedModel:
    """The same, with a config.json."""
    if model.has(CONFIG_FILE):
        return model
    if model.has("adapter_config.json"):
        raise FileNotFoundError(
            f"{model.name} holds a PEFT adapter, not a model (adapter_config.json, but no {CONFIG_FILE}); name its "
            "base model, or merge the adapter (merge_and_unload) and save that"
        )
    raise FileNotFoundError(f"{model.name} has no {CONFIG_FILE}; is it a model that save_pretrained wrote?")


def supported_model_types() -> list[str]:
    """The model types of Transformers whose mixers can be cut, and those of their projected forms."""
    stock = sorted({row.model_type for row in ARCHITECTURES.values() if row.model_type})
    projected = {row.model_type for row in ARCHITECTURES.values() if row.can_be_projected}
    return stock + [f"compressm_{name}" for name in stock if name in projected]


def read_config(model: SavedModel) -> PreTrainedConfig:
    """The config of a saved model.

    Raises:
        ValueError: it is not the config of a model that Transformers knows.
    """
    try:
        values = json.loads((model.directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{model.name}: {CONFIG_FILE} is not JSON ({error})") from error
    supported = ", ".join(supported_model_types())
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type is None:
        raise ValueError(
            f"{model.name}: {CONFIG_FILE} names no model_type, so Transformers cannot load it (checkpoints in "
            f"mamba_ssm's own format must be converted first); supported model types: {supported}"
        )
    try:
        return AutoConfig.from_pretrained(model.directory, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{model.name} is a {model_type!r} model, which this version of Transformers does not know; supported "
            f"model types: {supported}"
        ) from error


def build_empty(config: PreTrainedConfig, name: str) -> tuple[PreTrainedModel, dict[str, Mixer]]:
    """A config's language model, or its bare model where there is none, on the meta device; and its mixers.

    Raises:
        ValueError: it is no model whose states can be cut.
    """
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    try:
        with torch.device("meta"):
            model = auto.from_config(copy.deepcopy(config))
        return model, find_mixers(model)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} is a {config.model_type!r} model, which has no state that could be cut; supported model types: "
            f"{', '.join(supported_model_types())}"
        ) from error


def check_cut(model: SavedModel, cut: CompreSSMConfig) -> dict[str, Mixer]:
    """Refuse a cut that cannot be made, before any weight is read.

    Args:
        model: the model to cut.
        cut: the rules.

    Returns:
        The mixers of the model on the meta device.

    Raises:
        ValueError: a quantized model, one without states to cut, or rules that do not fit it.
    """
    config = read_config(model)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{model.name} is quantized; cut the model that it was made from, and quantize the smaller one"
        )
    _, mixers = build_empty(config, model.name)
    if must_project(cut):
        refuse_projection([mixer for mixer in mixers.values() if not mixer.can_be_projected])
    check_list_of_sizes(cut, mixers)
    present = {name: mixer.state_size for name, mixer in mixers.items()}
    if cut.state_size is not None:
        fixed_sizes(cut, present, {name: number for number, name in enumerate(mixers)})
    whole = sum(mixer.bytes_per_state * mixer.state_size for mixer in mixers.values())
    if cut.state_bytes is not None and cut.state_bytes >= whole:
        raise ValueError(f"state_bytes is {cut.state_bytes}, but the states take {whole} bytes as they are; give less")
    return mixers


def check_weights(model: SavedModel, *, allow_pickle: bool = False) -> bool:
    """Whether a model's weights are pickled.

    Raises:
        FileNotFoundError: there are none.
        ValueError: there are only pickled ones, and they are not allowed.
    """
    if model.has(SAFE_WEIGHTS):
        return False
    if not model.has(PICKLED_WEIGHTS):
        raise FileNotFoundError(f"{model.name} has a {CONFIG_FILE}, but no weights ({SAFE_WEIGHTS})")
    if not allow_pickle:
        raise ValueError(
            f"{model.name} has pickled weights only ({PICKLED_WEIGHTS}), and a pickle can hold code; give "
            "--allow-pickle to read them as tensors and nothing else, or save the model as safetensors"
        )
    return True


def fetch_weights(model: SavedModel, *, pickled: bool = False) -> Path:
    """The directory with a model's weights; of a model on the Hub, they are fetched now.

    Raises:
        OSError: the Hub cannot be reached, or refuses.
    """
    pattern = PICKLED_WEIGHTS if pickled else SAFE_WEIGHTS
    if model.is_local or all((model.directory / file).is_file() for file in model.files if Path(file).match(pattern)):
        return model.directory
    try:
        patterns = [*SMALL_FILES, pattern]
        return Path(snapshot_download(model.name, revision=model.commit, allow_patterns=patterns))
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise OSError(hub_message(error, model.name)) from error


def load_model(
    model: SavedModel, *, dtype: str = "auto", device: str | torch.device = "cpu", allow_pickle: bool = False
) -> PreTrainedModel:
    """Load a language model, in eval mode; it remembers the cuts that its compressm.json tells of.

    Args:
        model: from `find_model`.
        dtype: of the weights; auto: as they are saved.
        device: where to put them.
        allow_pickle: read pickled weights where there are no others, by torch.load's `weights_only`.

    Raises:
        ValueError: a quantized model, weights that are pickled, broken or not all there, or an unknown dtype.
        OSError: files that are missing, or the Hub.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    pickled = check_weights(model, allow_pickle=allow_pickle)
    directory = fetch_weights(model, pickled=pickled)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=read_config(model),
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=not pickled,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        raise ValueError(f"{model.name}: its pickled weights hold more than tensors, and were not read") from error
    except Exception as error:
        # Of a broken safetensors file, the library has an error of its own.
        if type(error).__name__ == "SafetensorError":
            raise ValueError(
                f"{model.name}: its weights cannot be read ({error}); was the download or the copy cut off?"
            ) from error
        raise
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{model.name}: its files lack {len(missing)} of the model's parameters ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''})"
        )
    recall_from(loaded, directory)
    return loaded.to(device).eval()


def check_output(output: Path, *, overwrite: bool, source: SavedModel | None = None) -> None:
    """Refuse a directory that must not be written to; the first thing to do.

    Raises:
        FileExistsError: it exists, and may not be replaced or does not look like a model.
        ValueError: it is where the model is read from.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists; name another directory, or give --overwrite to replace it")
    # Whoever mistypes a path must not lose a home directory.
    if not output.is_dir() or (any(output.iterdir()) and not (output / CONFIG_FILE).is_file()):
        raise FileExistsError(f"{output} is not the directory of a model, and is not replaced; name another one")
    if source is not None and source.directory.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"{output} holds the model that is to be cut; name another directory for the smaller one")


@contextlib.contextmanager
def new_directory(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden directory beside a place that is moved there when all is written, and removed if anything fails.

    Args:
        output: the place.
        overwrite: replace a directory that is there; only when the new one is complete.

    Raises:
        FileExistsError: as `check_output`.
    """
    check_output(output, overwrite=overwrite)
    output = output.absolute()
    made = [parent for parent in output.parents if not parent.exists()]
    beside, old = (output.with_name(f".{output.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    try:
        beside.mkdir(parents=True)
        yield beside
        check_output(output, overwrite=overwrite)
        if output.exists():
            output.rename(old)
        beside.rename(output)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if old.exists() and not output.exists():
            old.rename(output)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
