"""What the report of an augmented set says: plain values, as `augment.json` keeps them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """The properties of what one source made, human captions first.

    source: "human" or a generator. made: "caption" or "image". images: human images it is about; items: how many
    captions or images it made for them. An estimate is None where it has no meaning; `fastmat.augment.measure` defines
    them.
    """

    source: str
    made: str
    images: int
    items: int
    alignment: Estimate | None
    relative_alignment: Estimate | None
    diversity: Estimate | None
    word_diversity: Estimate | None
    gap: Estimate | None

    def plain(self) -> dict[str, Any]:
        return asdict(self)
