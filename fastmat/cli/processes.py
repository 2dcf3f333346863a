"""Which process of a distributed run this is, as the launcher says; known before torch is imported."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """One process speaks for all, and decides about folders."""
    return os.environ.get("RANK", "0") == "0"
