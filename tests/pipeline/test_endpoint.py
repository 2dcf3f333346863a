"""The client of an OpenAI-compatible endpoint: what it sends, and one sentence for everything that goes wrong."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_endpoint import Reply, Script, Served, calls, says, serving

from fastmat.errors import UserError
from fastmat.pipeline import endpoint as module
from fastmat.pipeline.endpoint import Endpoint

MESSAGES = [{"role": "user", "content": "what is it?"}]
TOOLS = [{"type": "function", "function": {"name": "caption", "description": "", "parameters": {"type": "object"}}}]
KEY = "sk-secret-123"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)


def ask(script: Script, **settings: Any) -> tuple[dict[str, Any], Served]:
    with serving(script) as served:
        client = Endpoint(url=served.url, model="a-model", **settings)
        return client.chat(MESSAGES, TOOLS, call=True), served


def failure(script: Script, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        ask(script, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_request_is_openais_and_the_message_comes_back_as_written() -> None:
    message, served = ask(lambda _: calls(("caption", {})), api_key_env="SOME_KEY")
    assert message == calls(("caption", {}))
    assert served.requests == [{"model": "a-model", "messages": MESSAGES, "temperature": 0, "tools": TOOLS}]
    assert served.headers[0]["Authorization"] == f"Bearer {KEY}"
    _, served = ask(lambda _: says("a dog"))
    assert "Authorization" not in served.headers[0]


def test_in_the_last_step_the_model_may_not_call() -> None:
    with serving(lambda _: says("a dog")) as served:
        Endpoint(url=f"{served.url}/chat/completions/", model="m").chat(MESSAGES, TOOLS, call=False)
    assert served.requests[0]["tool_choice"] == "none" and served.requests[0]["tools"] == TOOLS


def test_busy_broken_and_silent_endpoints_are_tried_again() -> None:
    replies: Iterator[Reply | dict[str, Any]] = iter(
        [
            Reply(b"<html>bad gateway</html>", status=502),
            Reply(b"{}", status=429, headers={"Retry-After": "0"}),
            Reply(b"{}", cut=True),
            says("a dog"),
        ]
    )
    message, served = ask(lambda _: next(replies), retries=3)
    assert message == says("a dog") and len(served.requests) == 4


def test_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    replies = iter([429, 503, 503, 500])
    after = {429: {"Retry-After": "7"}, 503: {"Retry-After": "tomorrow"}, 500: {"Retry-After": "9999"}}

    def script(_: object) -> Reply | dict[str, Any]:
        status = next(replies, None)
        return says("a dog") if status is None else Reply(b"{}", status=status, headers=after[status])

    with serving(script) as served:
        Endpoint(url=served.url, model="m", retries=4).chat(MESSAGES, TOOLS, call=True)
    # The scripted endpoint sleeps through the same function, 0 s each time.
    assert [seconds for seconds in waited if seconds > 0] == [7.0, 14.0, 28.0, 30.0]


def test_a_dead_endpoint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        UserError, match=rf"127.0.0.1:{port}/v1/chat/completions does not answer \(connection refused\)"
    ):
        Endpoint(url=f"http://127.0.0.1:{port}/v1", model="m", retries=1).chat(MESSAGES, TOOLS, call=True)


@pytest.mark.parametrize("reply", [Reply(b"{}", wait=0.6), Reply(b" " * 100, drip=0.02)], ids=["silent", "dripping"])
def test_time_outs(reply: Reply) -> None:
    start = time.perf_counter()
    said = failure(lambda _: reply, timeout=0.2, retries=0)
    assert "does not answer (nothing came within 0.2 s)" in said
    assert time.perf_counter() - start < 1.5


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "answers with HTML, not with a chat completion in JSON"),
        (b"  \n<HTML>", "answers with HTML"),
        (b"", "answers with nothing"),
        (b"hello", "answers with text that is not JSON"),
        (b"\xff\xfe", "answers with text that is not JSON"),
        (b"[" * 100_000, "answers with text that is not JSON"),
        (b'{"error": {"message": "no such model"}}', "JSON that is no chat completion: no such model"),
        (b'{"choices": []}', "JSON that is no chat completion"),
        (b'{"choices": [{"message": "hi"}]}', "JSON that is no chat completion"),
        (b"[]", "JSON that is no chat completion: []"),
        (b"null", "JSON that is no chat completion"),
    ],
)
def test_what_is_no_chat_completion_is_not_asked_for_again(body: bytes, said: str) -> None:
    asked = []

    def script(request: dict[str, Any]) -> Reply:
        asked.append(request)
        return Reply(body)

    error = failure(script, retries=3)
    assert said in error and "endpoint.url" in error
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (
            Reply(b'{"error": {"message": "bad\\nkey"}}', status=401),
            "refuses with HTTP 401 (bad key); correct endpoint",
        ),
        (Reply(b"<html>not found</html>", status=404), "refuses with HTTP 404 (a page of HTML)"),
        (Reply(b"", status=400), "refuses with HTTP 400 (no reason)"),
        (Reply(b"oops", status=503), "refuses with HTTP 503 (oops); try again later with --resume"),
        (Reply(b"", status=302, headers={"Location": "http://127.0.0.1:9/"}), "redirects (HTTP 302)"),
        (Reply(b"", status=308, headers={"Location": "http://127.0.0.1:9/"}), "redirects (HTTP 308)"),
    ],
)
def test_refusals_say_why(reply: Reply, said: str) -> None:
    assert said in failure(lambda _: reply, retries=0)


def test_a_flood_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
    assert "more than 1 MiB" in failure(lambda _: Reply(b" " * (1 << 22)))


def test_the_key_is_in_no_message_and_no_object(monkeypatch: pytest.MonkeyPatch) -> None:
    echo = json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode()
    for status in (200, 401):
        said = failure(lambda _, status=status: Reply(echo, status=status), api_key_env="SOME_KEY")  # type: ignore[misc]
        assert KEY not in said and "wrong key ***" in said
    client = Endpoint(url="http://localhost:8000/v1", model="m", api_key_env="SOME_KEY")
    assert KEY not in repr(client) and KEY not in str(vars(client))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "localhost:8000"}, "url must read like http://localhost:8000/v1"),
        ({"url": "file:///etc/passwd"}, "url must read like"),
        ({"url": "http://"}, "url must read like"),
        ({"url": "http://a b/v1"}, "url must read like"),
        ({"url": "http://host:port/v1"}, "url must read like"),
        ({"url": "http://me:secret@host/v1"}, "url must hold no user, password or query"),
        ({"url": "http://host/v1?key=secret"}, "url must hold no user, password or query"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"timeout": float("nan")}, "timeout must be above 0"),
        ({"timeout": float("inf")}, "timeout must be above 0"),
        ({"retries": -1}, "retries 0 or more"),
        ({"api_key_env": "UNSET_KEY"}, "the environment variable UNSET_KEY is not set"),
        ({"api_key_env": "BROKEN_KEY"}, "the environment variable BROKEN_KEY holds blanks or letters that no key has"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN_KEY", "sk-secret\n")
    with pytest.raises(UserError) as caught:
        Endpoint(**{"url": "http://localhost:8000/v1", "model": "m", **settings})
    assert said in str(caught.value) and "secret" not in str(caught.value)
