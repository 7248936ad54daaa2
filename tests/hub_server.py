"""A server that speaks as much of the Hugging Face hub's protocol as a download needs.

Source: huggingface_hub 2.4, `HfApi.model_info` and `file_download`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class Hub:
    """Models by id, each a folder of files; what was asked for is written down.

    Attributes:
        gated: ids that need `token`.
        cut_after: bytes of a file after which the connection breaks, once for each file.
    """

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    token: str = "hf_secret"
    cut_after: int | None = None
    requests: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    url: str = ""

    @property
    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return set(self.sent)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer at `hub.url` while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, hub, with_body=True)

        def do_HEAD(self) -> None:
            _answer(self, hub, with_body=False)

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(request: BaseHTTPRequestHandler, hub: Hub, *, with_body: bool) -> None:
    path = unquote(urlsplit(request.path).path).strip("/")
    hub.requests.append(f"{request.command} {path}")
    parts = path.split("/")
    api = parts[:2] == ["api", "models"]
    repo = "/".join(parts[2:4] if api else parts[:2])
    rest = parts[4:] if api else parts[2:]
    if repo not in hub.models:
        return _refuse(request, 404, "RepoNotFound", "Repository not found")
    if repo in hub.gated and request.headers.get("Authorization") != f"Bearer {hub.token}":
        return _refuse(request, 403, "GatedRepo", "Access to this model is restricted")
    revision = rest[1] if len(rest) > 1 else "main"
    if revision not in ("main", "v1", COMMIT):
        return _refuse(request, 404, "RevisionNotFound", "Invalid rev id")
    if api:
        return _send(request, _model(repo, hub), {"Content-Type": "application/json"}, with_body)
    name = "/".join(rest[2:])
    file = hub.models[repo] / name
    if not file.is_file():
        return _refuse(request, 404, "EntryNotFound", "Entry not found")
    _send_file(request, hub, name, file.read_bytes(), with_body)


def _model(repo: str, hub: Hub) -> bytes:
    root = hub.models[repo]
    files = sorted(path for path in root.rglob("*") if path.is_file())
    siblings = [
        {"rfilename": p.relative_to(root).as_posix(), "size": p.stat().st_size, "blobId": "0"}
        for p in files
    ]
    return json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}).encode()


def _send_file(
    request: BaseHTTPRequestHandler, hub: Hub, name: str, content: bytes, with_body: bool
) -> None:
    begin = 0
    if wanted := request.headers.get("Range"):
        begin = int(wanted.removeprefix("bytes=").split("-")[0])
    headers = {
        "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        "X-Repo-Commit": COMMIT,
        "Accept-Ranges": "bytes",
    }
    if begin:
        headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
    cut = hub.cut_after is not None and name not in hub.sent and len(content) > hub.cut_after
    if with_body:
        sent = hub.cut_after if cut else len(content) - begin
        hub.sent[name] = hub.sent.get(name, 0) + (sent or 0)
    _send(request, content[begin:], headers, with_body, cut_after=hub.cut_after if cut else None)


def _send(
    request: BaseHTTPRequestHandler,
    content: bytes,
    headers: dict[str, str],
    with_body: bool,
    cut_after: int | None = None,
) -> None:
    request.send_response(206 if "Content-Range" in headers else 200)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if with_body:
        request.wfile.write(content if cut_after is None else content[:cut_after])
    if with_body and cut_after is not None:
        request.close_connection = True


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
    request.send_response(status)
    request.send_header("X-Error-Code", code)
    request.send_header("X-Error-Message", message)
    request.send_header("Content-Length", "0")
    request.end_headers()
