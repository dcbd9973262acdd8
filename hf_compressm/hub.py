"""Push a compressed model to the Hugging Face Hub, with all that belongs to it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from .cards import record_of_cuts, write_card
from .hub_errors import hub_message, status_of
from .record import RECORD_FILE
from .report_page import write_report_page

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a directory that a Trainer wrote: checkpoints, logs, what only a resume needs, and a pickle of all its arguments,
# which holds the token if one was given as `hub_token`.
NOT_PUSHED = [
    "training_args.bin",
    "checkpoint-*",
    "cut-checkpoint-*",
    "runs/*",
    "_*",
    "*.tmp",
    "compressm_continue.json",
    "optimizer.*",
]


def push_compressed(
    source: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
) -> str:
    """Push a compressed model with its card, record, plans, spectrum and report, and a projected one's code.

    `model.push_to_hub(...)` of a model that was cut does this, too. It can be called again after a broken connection:
    what arrived is not sent twice.

    Args:
        source: a model that was cut, or the directory that one was saved in.
        repo_id: `user/name`, or `name` in your own namespace; it is made if it does not exist.
        token: with permission to write; by default, the one you are logged in with.
        private: whether a new repository is private.
        revision: the branch to push to; it is made if it does not exist.
        commit_message, commit_description, create_pr: of the commit.
        max_shard_size: of a weights' file, where `source` is a model.
        tags: for the card, more than those of the model.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        FileNotFoundError: the directory has no compressm.json or no weights.
        ValueError: the model was not cut.
        PermissionError: the token may not write there.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused for another reason.
    """
    if not isinstance(source, (str, Path)):
        with tempfile.TemporaryDirectory() as directory:
            shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            source.save_pretrained(directory, **shards)
            if not (Path(directory) / RECORD_FILE).is_file():
                raise ValueError(
                    f"the {type(source).__name__} remembers no cut: push it with its own push_to_hub, or cut it "
                    "first. (Of a model that was saved after a cut and loaded again, give the directory)"
                )
            return push_compressed(
                directory,
                repo_id,
                token=token,
                private=private,
                revision=revision,
                commit_message=commit_message,
                commit_description=commit_description,
                create_pr=create_pr,
                tags=[*(getattr(source, "model_tags", None) or []), *(tags or [])],
            )
    directory = Path(source)
    _check(directory)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        write_card(directory, repo_id=repo_id, tags=tags)
        write_report_page(directory)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            commit_message=commit_message or f"Upload {directory.name if isinstance(source, str) else 'model'}",
            commit_description=commit_description,
            create_pr=create_pr,
            ignore_patterns=NOT_PUSHED,
        )
    except HfHubHTTPError as error:
        if status_of(error) in (401, 403):
            raise PermissionError(hub_message(error, repo_id, writing=True)) from error
        raise
    return commit.pr_url or commit.commit_url


def _check(directory: Path) -> None:
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    if not any(any(directory.glob(f"{name}*.safetensors")) for name in ("model", "adapter_model")):
        raise FileNotFoundError(
            f"{directory} holds no weights (model.safetensors or the like); name the directory that the model was "
            "saved in"
        )
    record_of_cuts(directory)
