"""What a user's mistake raises: one sentence, shown as it is, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that cannot be used; the message names it, what was expected and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'steps'?"` when a known name is close to `name`, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
