"""Which part of a step begins, told by whoever begins it; nobody listens unless a training run does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Enter = Callable[[str], None]
_enter: ContextVar[Enter | None] = ContextVar("enter", default=None)


@contextmanager
def heard_by(enter: Enter) -> Iterator[None]:
    """Inside, `enter` is called with the name of every part that begins."""
    token = _enter.set(enter)
    try:
        yield
    finally:
        _enter.reset(token)


@contextmanager
def text_attack() -> Iterator[None]:
    """An attack on captions; all else that a defence does before the outer forward counts as the attack on images."""
    enter = _enter.get()
    if enter is None:
        yield
        return
    enter("text_attack")
    try:
        yield
    finally:
        enter("image_attack")
