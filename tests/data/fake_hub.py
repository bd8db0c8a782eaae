"""Hugging Face's Hub on this machine, as far as a file system of data sets asks it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


@contextmanager
def serving(repository: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a hub that holds one data set; `files` may change meanwhile."""

    class Answer(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            name = path.removeprefix(f"/datasets/{repository}/resolve/main/")
            if name in files:
                self.file(files[name])
            elif path == f"/api/datasets/{repository}":
                self.json({"id": repository, "sha": commit(), "private": False, "tags": [], "downloads": 0, "likes": 0})
            elif path.startswith(f"/api/datasets/{repository}/tree/main"):
                below = path.removeprefix(f"/api/datasets/{repository}/tree/main").strip("/")
                if below and below not in folders():
                    return self.body(b"", {"x-error-code": "EntryNotFound"}, status=404)
                self.json(
                    [entry(name) for name in (*files, *folders()) if name.startswith(f"{below}/" if below else "")]
                )
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["paths"]
            self.json([entry(name) for name in asked if name in files or name in folders()])

        def json(self, content: Any) -> None:
            self.body(json.dumps(content).encode(), {"content-type": "application/json"})

        def file(self, content: bytes) -> None:
            headers = {"etag": f'"{sha1(content).hexdigest()}"', "x-repo-commit": commit(), "accept-ranges": "bytes"}
            first, last = self.headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1 if last else None]
            headers["content-range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self.body(part, headers, status=206 if "range" in self.headers else 200)

        def body(self, content: bytes, headers: Mapping[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def commit() -> str:
        return sha1(repr(sorted(files.items())).encode()).hexdigest()

    def folders() -> set[str]:
        return {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}

    def entry(name: str) -> dict[str, Any]:
        if name not in files:
            return {"type": "directory", "path": name, "oid": commit()}
        return {"type": "file", "path": name, "size": len(files[name]), "oid": sha1(files[name]).hexdigest()}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
