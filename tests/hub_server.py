"""A Hub on the loopback interface, as much of it as pushing and loading a model needs; files are kept in memory."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    @property
    def files(self) -> dict[str, bytes]:
        return self.server.files

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, host = urlsplit(self.path).path, f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            self.answer({"url": f"{host}/me/{json.loads(body)['name'].split('/')[-1]}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{host}/me/model/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        else:
            self.answer({"error": f"unknown: {path}"}, 404)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        file = re.fullmatch(r"/me/[^/]+/resolve/[^/]+/(.+)", path)
        if file is not None and file[1] in self.files:
            content = self.files[file[1]]
            self.answer(content, headers={"ETag": f'"{hash(content):x}"', "X-Repo-Commit": COMMIT})
        elif file is not None:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif path == "/api/whoami-v2":
            self.answer({"type": "user", "name": "me", "orgs": []})
        elif "/tree/" in path:
            self.answer([{"type": "file", "path": n, "size": len(f), "oid": "0"} for n, f in self.files.items()])
        elif path.startswith("/api/models/"):
            self.answer({"id": "me/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]})
        else:
            self.answer({"error": f"unknown: {path}"}, 404)

    do_HEAD = do_GET


@contextmanager
def loopback_hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A running Hub: its address, and the files of its one repository, by name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.files = {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.files
    finally:
        server.shutdown()
        server.server_close()
