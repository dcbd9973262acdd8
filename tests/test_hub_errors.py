"""What the Hub's refusals are made into: one line, with what to do, and without the token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from hf_compressm import hub_errors, model_files
from hf_compressm.hub_errors import hub_message
from hf_compressm.model_files import find_model


def response(status: int):
    return SimpleNamespace(status_code=status, headers={}, request=None)


TOKEN = "hf_" + "secret" * 5
REFUSED = [
    (errors.RepositoryNotFoundError, 404, False, "there is no directory me/it here, and no model of that name"),
    (errors.RepositoryNotFoundError, 401, False, "the token in use may not read it"),
    (errors.GatedRepoError, 403, False, "me/it is gated: ask for access at https://huggingface.co/me/it, then log in"),
    (errors.RevisionNotFoundError, 404, False, "me/it has no such revision"),
    (errors.HfHubHTTPError, 429, False, "too many of them"),
    (errors.HfHubHTTPError, 403, True, "the Hub refuses to write to me/it (403): the token lacks write permission"),
    (errors.HfHubHTTPError, 409, True, "the Hub answered 409 about me/it"),
]


@pytest.mark.parametrize("kind, status, writing, message", REFUSED)
def test_what_the_hub_answers(monkeypatch, kind, status, writing, message):
    monkeypatch.setattr(hub_errors, "get_token", lambda: TOKEN)
    error = kind(f"{status} Client Error, Bearer {TOKEN}", response=response(status))
    told = hub_message(error, "me/it", writing=writing)
    assert message in told and TOKEN not in told and "\n" not in told
    if not writing:

        def refuse(*args, **kwargs):
            raise error

        monkeypatch.setattr(model_files.HfApi, "model_info", refuse)
        with pytest.raises(OSError) as caught:
            find_model("me/it")
        assert str(caught.value) == told


def test_without_a_token(monkeypatch):
    monkeypatch.setattr(hub_errors, "get_token", lambda: None)
    error = errors.RepositoryNotFoundError("", response=response(401))
    assert "if it is private, log in with `hf auth login`" in hub_message(error, "me/it")
    told = hub_message(errors.LocalTokenNotFoundError("no token"), "me/it", writing=True)
    assert told.startswith("pushing to me/it needs a token with write permission: log in")
