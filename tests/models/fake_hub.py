"""A model hub on this machine's own loopback address: just enough of its protocol."""

import hashlib
import http.server
import json
import threading
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves the files of one folder as one model.

    Args:
        repo_id: The model's id.
        folder: Its files, sub-folders included.

    Attributes:
        served: Names of the files whose content was asked for, in order.
    """

    def __init__(self, repo_id: str, folder: Path) -> None:
        self.repo_id = repo_id
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.served: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *_: Any) -> None:
                """Log nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop the hub."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: Any, *, body: bool) -> None:
        """Answer one request as the hub would."""
        path = request.path.split("?")[0]
        api = f"/api/models/{self.repo_id}"
        resolve = f"/{self.repo_id}/resolve/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": n, "size": len(data)} for n, data in self.files.items()]
            self._send(
                request, json.dumps({"id": self.repo_id, "sha": COMMIT, "siblings": siblings})
            )
        elif path.startswith(f"{api}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in self.files.items()
            ]
            self._send(request, json.dumps(entries))
        elif path.startswith(resolve):
            self._send_file(request, path.removeprefix(resolve).split("/", 1)[1], body)
        elif path.startswith(f"{api}/revision/"):
            self._send(request, "{}", 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._send(request, "{}", 404, {"X-Error-Code": "RepoNotFound"})

    def _send_file(self, request: Any, name: str, body: bool) -> None:
        if name not in self.files:
            self._send(request, "", 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = self.files[name]
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.send_header("ETag", f'"{_oid(data)}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        if body:
            self.served.append(name)
            request.wfile.write(data)

    def _send(
        self, request: Any, text: str, code: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(code)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(text)))
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(text.encode())


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
