"""The loopback Hub answers the real client as the Hub does: what other tests conclude from it rests on this."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
from hub_server import Hub, loopback_hub

# Evaluates the expressions that it reads, one a line as JSON. The client reads HF_ENDPOINT when it is imported, hence
# a process of its own; and it waits long seconds between its attempts.
CLIENT = """
import json, sys, time
from pathlib import Path
import huggingface_hub
from huggingface_hub import *
from huggingface_hub.utils import get_session

time.sleep = lambda seconds: waited.append(seconds)
waited = []
secret, read_only = HfApi(token="hf_secret"), HfApi(token="hf_read_only")
anonymous, stranger = HfApi(token=False), HfApi(token="hf_wrong")
answers = sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    try:
        answer = {"value": eval(json.loads(line))}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer, default=str), file=answers, flush=True)
"""

# Its versions before 2 validate a card at huggingface.co, wherever the Hub is, and do not resume a broken answer.
since_2 = pytest.mark.skipif(int(version("huggingface_hub").split(".")[0]) < 2, reason="needs huggingface_hub 2")


class Client:
    """A process with the real client, in which expressions are evaluated."""

    def __init__(self, hub: Hub, home: Any):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=hub.environment(home),
            text=True,
        )

    def answer(self, expression: str) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(expression) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __call__(self, expression: str) -> Any:
        answer = self.answer(expression)
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def error(self, expression: str) -> str:
        answer = self.answer(expression)
        assert "error" in answer, f"{expression} gave {answer['value']!r}, and no error"
        return answer["error"]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with loopback_hub(large_file_size=5000) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Iterator[Client]:
    client = Client(hub, tmp_path_factory.mktemp("home"))
    yield client
    client.process.stdin.close()
    client.process.wait(timeout=300)


@pytest.fixture(autouse=True)
def _fresh_log(hub):
    hub.requests.clear()
    yield
    waiting = [fault for fault in hub.faults if fault.times > 0]
    hub.faults.clear()
    assert not waiting, "an ordered fault never came"


CARD = "---\nlicense: apache-2.0\ntags: [mamba]\n---\n# A model\n"
FILES = {
    "README.md": CARD.encode(),
    "config.json": b'{"state_size": 12}',
    "model.safetensors": bytes(range(256)) * 40,
    "notes/long.txt": b"a line of text\n" * 400,
    "notes/short.txt": b"short\n",
    "picture": b"\x89PNG\0\0",
    "with space and ü.txt": b"x",
}
LARGE = {"model.safetensors", "notes/long.txt", "picture"}


@pytest.fixture
def folder(tmp_path):
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    return tmp_path


def test_what_is_pushed_comes_back_byte_for_byte(hub, client, folder, tmp_path_factory):
    assert client("secret.create_repo('me/folder').repo_id") == "me/folder"
    client(f"secret.upload_folder(repo_id='me/folder', folder_path={str(folder)!r}, commit_message='all of it')")
    repository = hub.repositories["me/folder"]
    assert {path: repository.files[path] for path in FILES} == FILES
    assert {path for path, file in repository.commit("main").files.items() if file.large} == LARGE
    assert (
        [r.status for r in hub.log("PUT", "/storage/")] == [200] * 3 == [r.status for r in hub.log("POST", "/verify")]
    )
    back = tmp_path_factory.mktemp("back")
    client(f"anonymous.snapshot_download('me/folder', local_dir={str(back)!r})")
    assert {path: (back / path).read_bytes() for path in FILES} == FILES
    cached = client("anonymous.snapshot_download('me/folder')")
    assert cached.endswith(f"snapshots/{repository.commit('main').oid}")
    assert {r.token for r in hub.log("POST") if "/validate-yaml" not in r.path} == {"hf_secret"}
    assert {r.token for r in hub.log("GET")} == {None} == {r.token for r in hub.log(pattern="^/storage/")}
    assert hub.places_of("hf_secret") == []
    # The second push finds nothing to do.
    hub.requests.clear()
    client(f"secret.upload_folder(repo_id='me/folder', folder_path={str(folder)!r})")
    assert not hub.log("POST", "/commit/") and not hub.log("PUT")


def test_what_the_hub_tells_of_a_repository(hub, client):
    hub.create("me/told", FILES)
    told = "anonymous.model_info('me/told')"
    assert client(f"[{told}.id, {told}.sha]") == ["me/told", hub.repositories["me/told"].commit("main").oid]
    assert client(f"[{told}.tags, {told}.card_data.license, {told}.private]") == [["mamba"], "apache-2.0", False]
    assert set(client("anonymous.list_repo_files('me/told')")) == {*FILES, ".gitattributes"}
    entries = client("[type(e).__name__ + ' ' + e.path for e in anonymous.list_repo_tree('me/told')]")
    assert "RepoFolder notes" in entries and "RepoFile notes/short.txt" not in entries
    assert client("[e.path for e in anonymous.list_repo_tree('me/told', 'notes')]") == [
        "notes/long.txt",
        "notes/short.txt",
    ]
    (file,) = client("[vars(e) for e in anonymous.get_paths_info('me/told', ['model.safetensors', 'none'])]")
    assert file["size"] == 10240 and file["lfs"]["sha256"] == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert client("anonymous.file_exists('me/told', 'with space and ü.txt')")
    assert not client("anonymous.file_exists('me/told', 'none')")
    assert client("anonymous.repo_exists('me/told')") and not client("anonymous.repo_exists('me/none')")


def test_branches_tags_and_history(hub, client):
    repository = hub.create("me/branched", {"a.txt": b"1"})
    client("secret.create_branch('me/branched', branch='try/this')")
    assert "409" in client.error("secret.create_branch('me/branched', branch='try/this')")
    client("secret.create_branch('me/branched', branch='try/this', exist_ok=True)")
    upload = "secret.upload_file(path_or_fileobj=b'2', path_in_repo='a.txt', repo_id='me/branched', "
    client(upload + "revision='try/this', commit_message='second', commit_description='at length')")
    client("secret.create_tag('me/branched', tag='v1', revision='try/this')")
    assert (repository.files["a.txt"], repository.files_at("v1")["a.txt"]) == (b"1", b"2")
    assert "RevisionNotFoundError" in client.error(upload + "revision='none')")
    commits = client("[[c.title, c.message] for c in anonymous.list_repo_commits('me/branched', revision='v1')]")
    assert commits == [["second", "at length"], ["files", ""], ["initial commit", ""]]
    branches = "sorted([r.name, r.target_commit] for r in anonymous.list_repo_refs('me/branched').branches)"
    assert client(branches) == [[name, repository.commit(name).oid] for name in ("main", "try/this")]
    path = client("anonymous.hf_hub_download('me/branched', 'a.txt', revision='try/this')")
    assert repository.commit("v1").oid in path
    assert "RevisionNotFoundError" in client.error("anonymous.hf_hub_download('me/branched', 'a.txt', revision='no')")


def test_a_pull_request_leaves_main_alone(hub, client):
    repository = hub.create("other/reviewed", {"a.txt": b"1"})
    upload = "secret.upload_file(path_or_fileobj=b'\\0', path_in_repo='b', repo_id='other/reviewed'"
    assert "403" in client.error(upload + ")") and "b" not in repository.files
    assert client(upload + ", create_pr=True).pr_url") == f"{hub.endpoint}/other/reviewed/discussions/1"
    assert "b" not in repository.files and repository.files_at("refs/pr/1")["b"] == b"\0"
    assert client("Path(anonymous.hf_hub_download('other/reviewed', 'b', revision='refs/pr/1')).read_bytes()[0]") == 0
    assert client(upload + ", create_pr=True).pr_num") == 2


def test_deleting(hub, client):
    repository = hub.create("me/shrinking", FILES)
    client("secret.delete_file('config.json', 'me/shrinking')")
    client("secret.delete_folder('notes', 'me/shrinking')")
    assert {"config.json", "notes/short.txt", "notes/long.txt"} == FILES.keys() - repository.files.keys()
    assert "EntryNotFoundError" in client.error("secret.delete_file('config.json', 'me/shrinking')")
    client("secret.delete_repo('me/shrinking')")
    assert "me/shrinking" not in hub.repositories
    assert "RepositoryNotFoundError" in client.error("secret.delete_repo('me/shrinking')")


def test_a_commit_on_an_old_parent_is_refused(hub, client):
    repository = hub.create("me/raced", {"a.txt": b"1"})
    parent = f"repo_id='me/raced', parent_commit={repository.commit('main').oid!r})"
    client(f"secret.upload_file(path_or_fileobj=b'2', path_in_repo='a.txt', {parent}")
    again = f"secret.upload_file(path_or_fileobj=b'3', path_in_repo='a.txt', {parent}"
    assert "A commit has happened since" in client.error(again)
    assert repository.files["a.txt"] == b"2"


def test_creating_twice_and_elsewhere(hub, client):
    assert client("secret.create_repo('lab/twice', private=True)") == f"{hub.endpoint}/lab/twice"
    assert hub.repositories["lab/twice"].private
    assert "409" in client.error("secret.create_repo('lab/twice')")
    assert client("secret.create_repo('lab/twice', exist_ok=True).repo_id") == "lab/twice"
    assert client("secret.create_repo('mine').repo_id") == "me/mine"
    assert "403 Forbidden" in client.error("secret.create_repo('other/theirs')")


# What is asked with which token: what comes of it, or the client's exception and words of its message.
@pytest.mark.parametrize(
    "expression, expected",
    [
        ("secret.whoami()['name'] == 'me' and secret.whoami()['orgs'][0]['name']", "lab"),
        ("read_only.whoami()['auth']['accessToken']['role']", "read"),
        ("stranger.whoami()", "Invalid user token"),
        ("stranger.model_info('me/open')", "401"),
        ("stranger.create_repo('me/new')", "401"),
        ("anonymous.create_repo('me/new')", "401"),
        ("read_only.create_repo('me/new')", 'rights to create a model under the namespace "me"'),
        ("read_only.create_repo('me/open', exist_ok=True).repo_id", "me/open"),
        ("read_only.upload_file(path_or_fileobj=b'', path_in_repo='a', repo_id='me/open')", "required permissions"),
        ("anonymous.upload_file(path_or_fileobj=b'', path_in_repo='a', repo_id='me/open')", "401"),
        ("secret.upload_file(path_or_fileobj=b'', path_in_repo='a', repo_id='other/open')", "required permissions"),
        ("anonymous.model_info('me/none')", "RepositoryNotFoundError: 401"),
        ("secret.model_info('me/none')", "RepositoryNotFoundError: 404"),
        ("secret.model_info('none')", "RepositoryNotFoundError: 404"),
        ("anonymous.model_info('me/closed')", "RepositoryNotFoundError: 401"),
        ("secret.model_info('other/closed')", "RepositoryNotFoundError: 404"),
        ("read_only.model_info('me/closed').private", True),
        ("anonymous.hf_hub_download('me/closed', 'a')", "RepositoryNotFoundError: 401"),
        ("secret.hf_hub_download('other/gated', 'a')", "GatedRepoError: 403"),
        ("anonymous.hf_hub_download('other/gated', 'a')", "GatedRepoError: 401"),
        ("anonymous.model_info('other/gated').gated", "auto"),
        ("anonymous.hf_hub_download('me/open', 'none')", "EntryNotFoundError: 404"),
        ("Path(anonymous.hf_hub_download('me/open', 'a')).read_text()", "1"),
    ],
)
def test_who_may_do_what(hub, client, expression, expected):
    for name in ("me/open", "me/closed", "other/open", "other/closed", "other/gated"):
        hub.create(name, {"a": b"1"}, private="closed" in name, gated="gated" in name)
    answer = client.answer(expression)
    if "error" in answer:
        assert expected in answer["error"]
    else:
        assert answer["value"] == expected
    assert hub.repositories["me/open"].files["a"] == b"1" and "me/new" not in hub.repositories


@pytest.mark.parametrize(
    "metadata, message",
    [
        ("license: Apache", '"license" must be one of [apache-2.0'),
        ("tags: mamba", '"tags" must be an array'),
        ("tags: [1]", '"tags" must be an array of strings'),
        ("library_name: [transformers]", '"library_name" must be a string'),
        ("base_model: ./runs/base", '"base_model" with value "./runs/base" is not valid'),
        ("base_model_relation: compressed", '"base_model_relation" must be one of'),
        ("language: English", '"language": "English"'),
        ("model-index: {name: x}", '"model-index" must be an array'),
        ("model-index: [{name: x}]", '"model-index[0].results" must be an array'),
        (
            "model-index: [{name: x, results: [{task: {type: t}, dataset: {name: d}}]}]",
            'dataset.type" must be a string',
        ),
        ("tags: [mamba", "YAML Metadata Error"),
    ],
)
def test_cards_are_validated(hub, client, metadata, message):
    repository = hub.create("me/card", {"README.md": CARD.encode()})
    card = f"---\n{metadata}\n---\n# A model\n"
    upload = f"secret.upload_file(path_or_fileobj={card.encode()!r}, path_in_repo='README.md', repo_id='me/card')"
    error = client.error(upload)
    assert "Invalid metadata in README.md" in error and message in error
    assert repository.files["README.md"] == CARD.encode() and not hub.log("POST", "/commit/")


@since_2
def test_a_card_is_pushed_if_it_is_right(hub, client):
    repository = hub.create("me/carded")
    results = "task_type='text-generation', dataset_type='text', dataset_name='Text', metric_type='loss'"
    data = f"model_name='m', tags=['mamba'], eval_results=[EvalResult({results}, metric_value=1.5)]"
    template = "template_str='---\\n{{ card_data }}\\n---\\n# Hi'"
    for data_license, fits in (("Apache", False), ("mit", True)):
        card = f"ModelCard.from_template(ModelCardData(license={data_license!r}, {data}), {template})"
        push = f"{card}.push_to_hub('me/carded', token='hf_secret')"
        if fits:
            client(f"{card}.validate()")
            client(push)
        else:
            assert "must be one of" in client.error(f"{card}.validate()")
            assert "ValueError" in client.error(push) and "README.md" not in repository.files
    assert client("ModelCard.load('me/carded').data.eval_results[0].metric_value") == 1.5


@since_2
def test_a_broken_download_goes_on_where_it_broke(hub, client):
    hub.create("me/broken", FILES)
    # The client keeps whole chunks of what came, by default of 10 MB.
    size = client("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE")
    client("setattr(huggingface_hub.constants, 'DOWNLOAD_CHUNK_SIZE', 5)")
    for path, pattern in (("model.safetensors", "^/storage/"), ("config.json", "/resolve/")):
        hub.fail(pattern, method="GET", drop_after=7)
        download = f"Path(anonymous.hf_hub_download('me/broken', {path!r})).read_bytes().hex()"
        assert bytes.fromhex(client(download)) == FILES[path]
        first, second = hub.log("GET", pattern)
        assert (first.status, second.status, second.headers["range"]) == (None, 206, "bytes=5-")
        hub.requests.clear()
    client(f"setattr(huggingface_hub.constants, 'DOWNLOAD_CHUNK_SIZE', {size})")


def test_a_broken_upload_is_sent_again(hub, client, folder):
    repository = hub.create("me/broken-upload")
    hub.fail("^/storage/", drop_after=100, times=2)
    hub.fail("/verify$", status=503)
    upload = f"path_or_fileobj={str(folder / 'model.safetensors')!r}, path_in_repo='m.bin', repo_id='me/broken-upload'"
    hub.objects.clear()
    client(f"secret.upload_file({upload})")
    assert repository.files["m.bin"] == FILES["model.safetensors"]
    assert [(r.status, len(r.body)) for r in hub.log("PUT")] == [(None, 100), (None, 100), (200, 10240)]
    assert [r.status for r in hub.log("POST", "/verify$")] == [503, 200]


@pytest.mark.parametrize(
    "fault, message",
    [
        ({"status": 500}, "500"),
        ({"status": 409}, "409"),
        ({"status": 401}, "401"),
        ({"status": 403}, "403"),
        ({"drop_after": 10}, "RemoteProtocolError"),
        ({"lose_answer": True}, "RemoteProtocolError"),
    ],
)
def test_a_push_that_broke_at_its_commit_resumes(hub, client, fault, message):
    """The client does not repeat a commit by itself; when it is asked to, the large files are there already."""
    repository = hub.create("me/resumed")
    hub.objects.clear()
    hub.fail("/commit/", **fault)
    upload = "secret.upload_file(path_or_fileobj=b'large' * 2000, path_in_repo='a', repo_id='me/resumed')"
    error = client.error(upload)
    assert message in error or "ReadError" in error
    assert ("a" in repository.files) == ("lose_answer" in fault)
    client(upload)
    assert repository.files["a"] == b"large" * 2000 and len(hub.log("PUT")) == 1
    assert len(repository.commit("main").history()) == 2


def test_a_limited_rate_is_waited_for(hub, client):
    repository = hub.create("me/limited")
    hub.fail("/preupload/", status=429, headers={"Retry-After": "3"}, times=2)
    client("waited.clear()")
    client("secret.upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='me/limited')")
    assert repository.files["a"] == b"1" and client("waited") == [4, 4]
    assert [r.status for r in hub.log("POST", "/preupload/")] == [429, 429, 200]


def test_contents_other_than_announced_are_refused(hub, client):
    repository = hub.create("me/strict")
    put = f"get_session().put('{hub.storage}/storage/{'0' * 64}', content=b'x').status_code"
    assert client(put) == 400 and "0" * 64 not in hub.objects
    line = {"key": "lfsFile", "value": {"path": "a", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    body = "\n".join(json.dumps(entry) for entry in ({"key": "header", "value": {"summary": "s"}}, line))
    post = f"get_session().post('{hub.endpoint}/api/models/me/strict/commit/main', content={body!r}, "
    assert "does not exist: a" in client(post + "headers={'Authorization': 'Bearer hf_secret'}).text")
    assert "a" not in repository.files


def test_a_token_that_escapes_is_found(hub, client):
    hub.create("me/leaky")
    client("secret.upload_file(path_or_fileobj=b'by hf_secret', path_in_repo='a', repo_id='me/leaky')")
    storage = f"{hub.storage}/storage/{'0' * 64}"
    client(f"get_session().get('{storage}', headers={{'Authorization': 'Bearer hf_secret'}}).status_code")
    client(f"get_session().get('{hub.endpoint}/api/models/me/leaky?token=hf_secret').status_code")
    assert hub.places_of("hf_secret") == [
        f"GET /storage/{'0' * 64}: Authorization, sent to the storage host",
        "GET /api/models/me/leaky?token=hf_secret: in its path, headers or body",
        "me/leaky: a",
    ]
    del hub.repositories["me/leaky"]


def test_a_process_gets_no_token_that_it_was_not_given(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_developer")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_of_the_developer")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    environment = hub.environment(tmp_path)
    assert "hf_of_the_developer" not in environment.values() and "HTTPS_PROXY" not in environment
    assert hub.environment(tmp_path, token="hf_secret")["HF_TOKEN"] == "hf_secret"
