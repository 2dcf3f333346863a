"""Any callable as a generator."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from fastmat.augment.files import named_file
from fastmat.augment.offline import Request, Result
from fastmat.errors import UserError


class Function:
    """Your own function: from a list of requests to a list with one caption, PIL image or None for each.

    path: "module:function"; modules in the working directory are found. A request has image_id, caption, load() for
        the picture, copy, and seed, which every draw should be made from.
    per: whether it is asked once for every caption or for every image.
    """

    copies = None

    def __init__(self, *, path: str, per: Literal["caption", "image"] = "caption") -> None:
        self.function = find(path)
        self.per: Literal["caption", "image"] = per
        self.name = path
        try:
            self.model = named_file(Path(inspect.getfile(inspect.unwrap(self.function))))
        except TypeError:  # built in, or an object that can be called
            self.model = path

    def __call__(self, requests: Sequence[Request]) -> Sequence[Result]:
        answer: Sequence[Result] = self.function(requests)
        return answer


def find(path: str) -> Callable[..., Any]:
    """What "module:function" names. Raises UserError when there is no such thing, or it cannot be called."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise UserError(f"{path!r} must read module:function, such as mine:paraphrase")
    sys.path.insert(0, str(Path.cwd()))  # a console script does not look there
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{path!r} is not here ({error}); name a function of a module that Python finds") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise UserError(f"{path!r} is a {type(found).__name__}; name a function")
    return found
