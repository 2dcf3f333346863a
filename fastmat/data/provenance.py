"""Where a caption or an image that no human wrote or took comes from: keys of a row in the project's JSON format."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fastmat.errors import UserError, nearest

HUMAN = "human"
Made = Literal["caption", "image"]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """generator: what made it ("eda"). model: name and hash of what is behind it. source: what it was made from, a
    caption or the id of an image. seed: of the draws. made: whether the row's caption or its image is what was made.
    """

    generator: str
    model: str
    source: str
    seed: int
    made: Made = "caption"

    def row(self) -> dict[str, Any]:
        """Its keys in a row of JSON."""
        return asdict(self)


def read_provenance(row: dict[str, Any], where: str) -> Provenance | None:
    """The provenance that a row of JSON states; None for a human's: no key "generator", or "human" there.

    where: file and row, for errors. Raises UserError on a key of another type.
    """
    generator = row.get("generator", HUMAN)
    if generator == HUMAN:
        return None
    texts = {"generator": generator, "model": row.get("model", ""), "source": row.get("source", "")}
    for key, value in texts.items():
        if not isinstance(value, str) or not (value or key != "generator"):
            raise UserError(f"{where}: '{key}' must be a string{' that says something' * (not value)}, got {value!r}")
    seed, made = row.get("seed", 0), row.get("made", "caption")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"{where}: 'seed' must be a whole number, got {seed!r}")
    if made not in get_args(Made):
        raise UserError(f"{where}: 'made' is {made!r}{nearest(str(made), get_args(Made))}")
    return Provenance(**texts, seed=seed, made=made)
