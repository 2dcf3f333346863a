"""What an expert is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Argument:
    """What an expert has to be told beside the picture, in words. name, description: as the agent reads them."""

    name: str
    description: str


class Expert(Protocol):
    """Answers about pictures in words.

    description: what it does, as the agent reads it. argument: what it has to be told; None: nothing.
    from_gallery: its answers are captions of the data, so that they are right or wrong.
    """

    description: str
    argument: Argument | None
    from_gallery: bool

    def answer(self, images: Tensor, arguments: Sequence[str]) -> list[str]:
        """An answer to each of [B, 3, H, W] fp32 in [0, 1], on the device of its model.

        arguments: one per picture; not read where `argument` is None.
        """
        ...
