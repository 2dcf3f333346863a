"""A local HTTP endpoint that answers as scripted: no network, no model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """wait: seconds before anything is sent. drip: seconds between single bytes of the body. cut: the connection ends
    before the body does."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    drip: float = 0.0
    cut: bool = False


Script = Callable[[dict[str, Any]], Reply | dict[str, Any]]


@dataclass
class Served:
    """url: the base. requests: bodies; headers: those of each; both in order."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def serving(script: Script) -> Iterator[Served]:
    """An endpoint that answers every POST by `script`, a message or a whole reply."""
    served = Served(url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append(request)
            served.headers.append(dict(self.headers))
            reply = script(request)
            if isinstance(reply, dict):
                reply = Reply(json.dumps({"choices": [{"message": reply}]}).encode())
            time.sleep(reply.wait)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body) + reply.cut))
            self.end_headers()
            for byte in reply.body if reply.drip else [reply.body]:
                self.wfile.write(byte if isinstance(byte, bytes) else bytes([byte]))
                self.wfile.flush()
                time.sleep(reply.drip)

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # whoever asked did not wait
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def says(text: str) -> dict[str, Any]:
    """A message that answers."""
    return {"role": "assistant", "content": text}


def calls(*asked: tuple[str, object]) -> dict[str, Any]:
    """A message with tool calls: name, and arguments as text or as what they shall say."""
    made = [
        {
            "id": f"id-{place}",
            "type": "function",
            "function": {"name": name, "arguments": given if isinstance(given, str) else json.dumps(given)},
        }
        for place, (name, given) in enumerate(asked)
    ]
    return {"role": "assistant", "content": None, "tool_calls": made}


def told(request: dict[str, Any]) -> list[str]:
    """What tools have said so far in a request's messages."""
    return [message["content"] for message in request["messages"] if message["role"] == "tool"]


def relaying(*tools: str) -> Script:
    """A model that calls every tool of these once, then answers with what they said."""

    def script(request: dict[str, Any]) -> dict[str, Any]:
        said = told(request)
        return says("; ".join(said)) if said else calls(*((tool, {"phrase": "a digit"}) for tool in tools))

    return script
