"""A file as provenance names it."""

from __future__ import annotations

import hashlib
from pathlib import Path


def named_file(path: Path) -> str:
    """Name and the beginning of the sha256 of its content."""
    with open(path, "rb") as file:
        return f"{Path(path).name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
