"""What the Hub's refusals mean, and what to do about them, in one line; without the token."""

from __future__ import annotations

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def status_of(error: Exception) -> int | None:
    """The status of the Hub's answer, if there was one."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def cannot_be_reached(error: Exception) -> bool:
    """Whether an error says nothing of the model: no network, or a Hub that is out of order."""
    known = (RepositoryNotFoundError, RevisionNotFoundError)
    return not isinstance(error, known) and (status_of(error) is None or status_of(error) >= 500)


def hub_message(error: Exception, name: str, *, writing: bool = False) -> str:
    """What is wrong with the Hub, or with what was asked of it, and what to do, in one line; without the token.

    Args:
        error: of huggingface_hub, or of the connection.
        name: the repository.
        writing: whether something was to be written to it.
    """
    page, status = f"{constants.ENDPOINT}/{name}", status_of(error)
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, LocalTokenNotFoundError):
        return f"pushing to {name} needs a token with write permission: {log_in}"
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: ask for access at {page}, then {log_in}"
    if writing and status in (401, 403):
        return (
            f"the Hub refuses to write to {name} ({status}): the token lacks write permission, or is not valid. Make "
            f"one that may write at {constants.ENDPOINT}/settings/tokens, and {log_in}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no such revision; its branches and tags are at {page}"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        private = log_in if get_token() is None else "the token in use may not read it"
        return f"there is no directory {name} here, and no model of that name on the Hub; if it is private, {private}"
    if status == 429:
        return f"the Hub answers no more requests for now ({status}, too many of them); try again in some minutes"
    if status is not None:
        return f"the Hub answered {status} about {name}; try again later"
    if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, so the Hub is not asked"
    if isinstance(error, LocalEntryNotFoundError):
        return f"the files of {name} cannot be fetched from the Hub"
    return f"the Hub ({constants.ENDPOINT}) cannot be reached ({type(error).__name__})"


def is_hub_error(error: Exception) -> bool:
    """Whether `hub_message` knows more about an error than it says itself."""
    kinds = (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, LocalTokenNotFoundError)
    return isinstance(error, kinds)
