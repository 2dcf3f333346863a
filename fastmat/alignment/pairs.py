"""Features of the same inputs, clean and attacked, at the places where a correction can stand; and which images may
serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError

# image, text: behind the projection of that side. tokens: the image tokens that enter the fusion.
Site = Literal["image", "text", "tokens"]
NAMES: dict[str, str] = {"image": "image projection", "text": "text projection", "tokens": "image tokens"}


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """clean, adversarial: [N, C], or [N, L, C] of tokens; row i of both is one input.

    text_features: [N, E] unit features of a caption of each row, group [N]: equal groups match; None: not known.
    Raises UserError with fewer than two rows, for other shapes, and where no row differs: those are no pairs.
    """

    site: Site
    clean: Tensor
    adversarial: Tensor
    text_features: Tensor | None = None
    group: Tensor | None = None

    def __post_init__(self) -> None:
        if self.clean.shape != self.adversarial.shape or self.clean.dim() not in (2, 3):
            told = f"{tuple(self.clean.shape)} and {tuple(self.adversarial.shape)}"
            raise UserError(f"clean and adversarial features must both be [N, C] or [N, L, C], got {told}")
        if len(self.clean) < 2:
            raise UserError(f"a correction needs two calibration pairs at least, got {len(self.clean)}")
        if torch.equal(self.clean, self.adversarial):
            raise UserError(
                f"there are no adversarial calibration pairs for the {NAMES[self.site]}: the attack changed nothing "
                "there; choose one that does (sga changes images and words, pgd images alone, at eps above 0)"
            )

    @property
    def width(self) -> int:
        return self.clean.shape[-1]

    def flat(self) -> tuple[Tensor, Tensor]:
        """Both as [rows, C]: every token is a row."""
        return self.clean.flatten(0, -2), self.adversarial.flatten(0, -2)

    def joined(self, other: Pairs) -> Pairs:
        """These pairs and then `other`."""

        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        return Pairs(
            site=self.site,
            clean=torch.cat([self.clean, other.clean]),
            adversarial=torch.cat([self.adversarial, other.adversarial]),
            text_features=both(self.text_features, other.text_features),
            group=both(self.group, other.group),
        )


def check_held_out(calibration: RetrievalSet, test: RetrievalSet) -> None:
    """Raise UserError where a correction would be calibrated on what it is judged on.

    The same split of the same set is refused whatever its ids say, other sets where an image id stands in both.
    """
    if (calibration.name, calibration.split) == (test.name, test.split):
        raise UserError(
            f"calibration and test are both {test.name}/{test.split}: calibrate on another split, such as train"
        )
    shared = sorted(set(calibration.ids) & set(test.ids))
    if shared:
        raise UserError(
            f"{len(shared)} calibration images are test images, the first is '{shared[0]}': calibrate on others"
        )
