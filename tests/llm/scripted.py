"""A real HTTP server on loopback that speaks the chat-completions protocol and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from robustvlm.llm import Endpoint

Act = Callable[["Handler"], None]


def completion(content: object, *, finish_reason: str = "stop", tokens: bool = True, **message: Any) -> Act:
    """Answer with a message; what is no text is sent as JSON text."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
    usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}} if tokens else {}
    return status(200, {"id": "x", "object": "chat.completion", "choices": [choice], **usage})


def status(code: int, body: object = None, **headers: str) -> Act:
    """Answer with a status, a JSON body and headers (underscores stand for dashes)."""

    def act(handler: Handler) -> None:
        payload = json.dumps(body if body is not None else {"error": {"message": f"trouble {code}"}}).encode()
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)

    return act


def drop(handler: Handler) -> None:
    """Close the connection without a word."""
    handler.close_connection = True


def break_off(handler: Handler) -> None:
    """Promise a long body and send half of it."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def hang(handler: Handler) -> None:
    """Say nothing until the test is over."""
    handler.script.over.wait(20)
    handler.close_connection = True


def trickle(handler: Handler) -> None:
    """Send a byte now and then, for ever, so that no single read ever times out."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.script.over.wait(0.02):
        handler.wfile.write(b" ")


@dataclass
class Script:
    """What the server does, act by act (the last is repeated), and the requests that it got."""

    acts: list[Act]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, "test-model")


class Handler(BaseHTTPRequestHandler):
    script: Script

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        script = self.script
        script.requests.append(json.loads(self.rfile.read(length)))
        script.keys.append(self.headers.get("Authorization"))
        script.paths.append(self.path)
        act = script.acts[min(len(script.requests), len(script.acts)) - 1]
        try:
            act(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(*acts: Act) -> Iterator[Script]:
    """Run the server for the length of a with block."""
    script = Script(list(acts))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Scripted", (Handler,), {"script": script}))
    server.daemon_threads = True
    script.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        script.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
