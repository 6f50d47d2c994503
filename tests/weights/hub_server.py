"""A server of the few routes of the Hugging Face Hub that downloading uses. Not a test itself.

It serves directories as repositories, keeps a list of what it was asked, and can break a transfer,
refuse a repository, or claim sizes that are not so.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Hub:
    """What the server has, and what it was asked.

    Attributes:
        repositories: directory by id.
        revisions: names of the one commit, by id; "main" is always one.
        refused: status and the Hub's code, by id.
        breaks: how many transfers of a file end in its middle, by its name.
        claimed: bytes that a file is said to have.
    """

    url: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    revisions: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    breaks: dict[str, int] = field(default_factory=dict)
    claimed: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def gets(self, name: str) -> list[str]:
        """The transfers of a file, as "GET RANGE"."""
        return [line.split(" ", 2)[2] for line in self.asked if line.startswith(f"GET {name} ")]


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub without repositories, for as long as the `with` lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def say(self, status: int, data: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def answer(self, *, body: bool) -> None:
            parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
            api = parts[:2] == ["api", "models"]
            names = parts[2:] if api else parts
            repository, rest = "/".join(names[:2]), names[2:]
            if repository in hub.refused:
                status, code = hub.refused[repository]
                return self.say(status, b"", X_Error_Code=code, X_Error_Message=code)
            root = hub.repositories.get(repository)
            if root is None:
                return self.say(404, b"", X_Error_Code="RepoNotFound")
            known = [COMMIT, "main", *hub.revisions.get(repository, [])]
            if len(rest) > 1 and rest[1] not in known:
                return self.say(404, b"", X_Error_Code="RevisionNotFound")
            if api:
                files = sorted(p for p in root.rglob("*") if p.is_file())
                return self.say(200, self.listing(repository, rest, root, files))
            return self.send(root / "/".join(rest[2:]), body=body)

        def listing(self, repository: str, rest: list[str], root: Path, files: list[Path]) -> bytes:
            entries = []
            for path in files:
                name, etag = path.relative_to(root).as_posix(), _etag(path)
                size = hub.claimed.get(name, path.stat().st_size)
                lfs = {"size": size, "pointerSize": 130}
                entry = {"type": "file", "path": name, "rfilename": name, "size": size}
                entry |= {"oid": etag[:40], "blobId": etag[:40]}
                entries.append({**entry, "lfs": {**lfs, "oid": etag, "sha256": etag}})
            if rest and rest[0] == "tree":
                return json.dumps(entries).encode()
            return json.dumps({"id": repository, "sha": COMMIT, "siblings": entries}).encode()

        def send(self, path: Path, *, body: bool) -> None:
            data, begin = path.read_bytes(), 0
            asked = self.headers.get("Range", "")
            hub.asked.append(f"{self.command} {path.name} {asked}")
            if asked.startswith("bytes="):
                begin = int(asked.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - begin))
            self.send_header("ETag", f'"{_etag(path)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if not body:
                return
            if hub.breaks.get(path.name, 0) > 0:
                hub.breaks[path.name] -= 1
                self.wfile.write(data[begin : begin + (len(data) - begin) // 2])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(data[begin:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
