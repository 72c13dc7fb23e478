"""A small HTTP server on this machine that speaks the OpenAI protocol for chats, with answers that a test gives."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Answer = Callable[[dict[str, Any]], str | tuple[int, str]]


@contextmanager
def serving(answer: Answer, model: str = "judge") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base URL, the requests so far). `answer` gives a request's text, or (HTTP status, body)."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request | {"authorization": self.headers["Authorization"], "path": self.path})
            if request["model"] != model:
                self.send(404, json.dumps({"error": {"message": f"The model `{request['model']}` does not exist."}}))
                return
            found = answer(request)
            if isinstance(found, tuple):
                self.send(*found)
                return
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": found}}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
            self.send(200, json.dumps(body))

        def send(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if body.startswith("{") else "text/html")
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
