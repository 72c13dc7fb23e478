"""Real servers for the tests: `transformers serve` with a model, and one whose every response a test decides."""

import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.ranks import Forked
from train.runtime.local import free_port

Response = tuple[int, dict[str, str], bytes]


def completion(text: str | None) -> Response:
    """What an OpenAI-compatible server answers."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return body({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


def body(value: Any, status: int = 200, **headers: str) -> Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "application/json"} | given, json.dumps(value).encode()


class ScriptedServer:
    """chat: request -> response, for each chat completion, and where `texts` is given, for each completion of a text;
    models: the names that /v1/models lists, or a response. What was asked is kept in `asked`, with the headers in
    `headers`."""

    def __init__(
        self, chat: Callable[[dict[str, Any]], Response], models: list[str] | Response | None = None,
        texts: Callable[[dict[str, Any]], Response] | None = None,
    ):  # fmt: skip
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.listed = 0
        listing = models if isinstance(models, tuple) else body({"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in models or ["m"]
        ]})  # fmt: skip
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.listed += 1
                found = {"/v1/models": listing, "/health": (200, {}, b"")}
                self.send(found.get(self.path) or body({"detail": "Not Found"}, 404))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(request)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                given = {"/v1/chat/completions": chat, "/v1/completions": texts}.get(self.path)
                self.send(given(request) if given else body({"detail": "Not Found"}, 404))

            def send(self, response: Response) -> None:
                status, headers, content = response
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # of 5, others are reset where this process has no time to accept them

            def handle_error(self, *arguments: Any) -> None:
                pass  # a client that gave up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "ScriptedServer":
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def questions(self) -> list[str]:
        """The last message of each chat that was asked."""
        return [request["messages"][-1]["content"] for request in self.asked]


class TransformersServe:
    """`transformers serve` of a model directory on a port; start() and kill() as often as wanted."""

    def __init__(self, model: Path, log: Path):
        self.model, self.log, self.port = str(model), log, free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process: Forked | None = None

    def start(self) -> None:
        """Until it listens. The model itself is read at the first request."""
        words = [Path(sys.executable).with_name("transformers"), "serve", self.model, "--device", "cpu"]
        words += ["--port", str(self.port), "--host", "127.0.0.1"]
        with open(self.log, "a") as log:
            self.process = Forked(
                *words, stdout=log, stderr=log, env={"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
            )
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        """SIGKILL, as when a node dies."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def requests(self) -> int:
        """Chats that it has answered or refused, over all its starts."""
        return self.log.read_text().count("POST /v1/chat/completions")


@contextmanager
def transformers_serve(model: Path, directory: Path) -> Iterator[TransformersServe]:
    server = TransformersServe(model, directory / "serve.log")
    try:
        server.start()
        yield server
    finally:
        server.kill()
