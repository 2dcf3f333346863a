"""An OpenAI-compatible endpoint, asked by the standard library; what goes wrong is told in one sentence.

The key is read from the environment for every request, and stands nowhere else: not in an object, a file or a message.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any, NoReturn
from urllib.parse import urlsplit

from fastmat.errors import UserError

Object = dict[str, Any]  # of JSON
# This project's choices.
MOST_BYTES = 1 << 24  # of an answer; a chat completion has kilobytes
LONGEST_TIMEOUT = 3600
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries; the wait doubles
TRANSIENT = {408, 425, 429}  # and 500 and above: worth another try


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a language model listens.

    url: the base, such as http://localhost:8000/v1; /chat/completions is added to it. model: its name there.
    api_key_env: the environment variable that holds the key; None: no key is sent. timeout: seconds for one answer.
    retries: further tries where the endpoint is silent, busy or broken.
    Raises UserError for a URL that cannot be one, or has a password inside, and for an unset variable.
    """

    url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 2

    def __post_init__(self) -> None:
        if any(letter in self.url for letter in "@?#"):  # and not shown, for it may hold a secret
            raise UserError("url must hold no user, password or query; put the key into the variable of api_key_env")
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable or not self.url.isascii() or " " in self.url:
            raise UserError(f"url must read like http://localhost:8000/v1, got {self.url!r}")
        if not 0 < self.timeout <= LONGEST_TIMEOUT or self.retries < 0:
            raise UserError(
                f"timeout must be above 0 and at most {LONGEST_TIMEOUT} s, retries 0 or more, got {self.timeout:g} and "
                f"{self.retries}"
            )
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "")
            if not (key and key.isascii() and key.isprintable() and " " not in key):  # no header could hold it
                state = "holds blanks or letters that no key has" if key else "is not set"
                raise UserError(
                    f"api_key_env: the environment variable {self.api_key_env} {state}; put the key into it"
                )

    @property
    def address(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def chat(self, messages: Sequence[Object], tools: Sequence[Object], *, call: bool) -> Object:
        """The message that comes next, as the model wrote it; temperature 0.

        tools: in OpenAI's format. call: whether the model may call them now.
        Raises UserError when the endpoint is dead, refuses, or answers with anything but a chat completion.
        """
        body: Object = {"model": self.model, "messages": list(messages), "temperature": 0, "tools": list(tools)}
        if not call:
            body["tool_choice"] = "none"
        wait = FIRST_WAIT
        for left in range(self.retries, -1, -1):
            try:
                return self._message(self._post(json.dumps(body).encode()))
            except urllib.error.HTTPError as error:
                with error:
                    if not left or not (error.code in TRANSIENT or error.code >= 500):
                        self._refused(error)
                    wait = _asked_to_wait(error.headers, wait)
            except (OSError, http.client.HTTPException, UnicodeError) as error:  # timeouts and URLErrors are OSErrors
                if not left:
                    self._fail(f"does not answer ({_reason(error, self.timeout)}); start it, or correct endpoint.url")
            time.sleep(min(wait, LONGEST_WAIT))
            wait *= 2
        raise AssertionError

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "fastmat"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.api_key_env, '')}"
        request = urllib.request.Request(self.address, data=body, headers=headers, method="POST")
        until = time.monotonic() + self.timeout
        content = b""
        # The timeout is one of silence, so an endpoint that drips is held to it here.
        with urllib.request.build_opener(NoRedirect).open(request, timeout=self.timeout) as answer:
            while part := answer.read1(1 << 16):
                content += part
                if time.monotonic() > until:
                    raise TimeoutError
                if len(content) > MOST_BYTES:
                    self._fail(f"answers with more than {MOST_BYTES >> 20} MiB; check endpoint.url")
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
        return content

    def _message(self, content: bytes) -> Object:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            what = "HTML" if _is_html(content) else "nothing" if not content.strip() else "text that is not JSON"
            self._fail(
                f"answers with {what}, not with a chat completion in JSON; endpoint.url must be the base of an "
                "OpenAI-compatible API, such as http://localhost:8000/v1"
            )
        try:
            message = answer["choices"][0]["message"]
            if not isinstance(message, dict):
                raise TypeError
        except (KeyError, IndexError, TypeError):
            said = _said(content)
            self._fail(f"answers with JSON that is no chat completion: {said}; check endpoint.url and endpoint.model")
        return message

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        if 300 <= error.code < 400:
            self._fail(f"redirects (HTTP {error.code}), which is not followed; put the new address into endpoint.url")
        try:
            said = _said(error.read(MOST_BYTES))
        except (OSError, http.client.HTTPException):
            said = "no reason"
        advice = "try again later with --resume" if error.code == 429 or error.code >= 500 else "correct endpoint"
        self._fail(f"refuses with HTTP {error.code} ({said}); {advice}")

    def _fail(self, what: str) -> NoReturn:
        """Servers may repeat the key in what they say."""
        key = os.environ.get(self.api_key_env, "") if self.api_key_env else ""
        raise UserError(f"endpoint: {self.address} {what.replace(key, '***') if key else what}") from None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address, and the question as a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _asked_to_wait(headers: Message | None, default: float) -> float:
    """Seconds of Retry-After, where the server names them."""
    try:
        return max(0.0, float(headers["Retry-After"])) if headers and "Retry-After" in headers else default
    except ValueError:
        return default


def _reason(error: BaseException, timeout: float) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, TimeoutError):
        return f"nothing came within {timeout:g} s"
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror.lower()
    return (
        "it broke off" if isinstance(inner, http.client.HTTPException) else str(inner).lower() or type(inner).__name__
    )


def _is_html(content: bytes) -> bool:
    return content[:1000].lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<body"))


def _said(content: bytes) -> str:
    """What an answer says is wrong, in one line."""
    if _is_html(content):
        return "a page of HTML"
    try:
        told = json.loads(content)
        error = told.get("error", told) if isinstance(told, dict) else told
        said = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        said = content[:1000].decode("utf-8", "replace")
    line = " ".join(str(said).split())
    return line[:200] or "no reason"
