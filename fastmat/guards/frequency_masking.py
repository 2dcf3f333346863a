"""Random frequency masking behind a detector (Yue et al., ACM MM 2021, arXiv 2208.00428)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fastmat.attacks.draws import Draws
from fastmat.errors import UserError
from fastmat.guards.base import Encode
from fastmat.guards.dct import dct, inverse_dct
from fastmat.guards.detector import load_detector


class FrequencyMasking(nn.Module):
    """High frequencies of an image are blocked at random, but only where a detector takes it for adversarial.

    detector: file of one that `fastmat.guards.detector` trained; None: every image is masked.
    cutoff: share of the highest frequency, (u / H + v / W) / 2, from which on a coefficient may be blocked.
    drop: probability that such a coefficient is. All channels share the mask.
    The paper masks for super-resolution and trains its network along; the two constants are this project's choice,
    made on the built-in set's validation split.

    Gradient: exact through the mask; through the detector's hard decision that of a sigmoid of its score
    (straight-through), so that an attacker can also climb out of the masked branch.
    Raises UserError for shares outside [0, 1] and for a file that is no detector; a call does for images of another
    size than the detector's.
    """

    random = True

    def __init__(self, *, detector: Path | None = None, cutoff: float = 0.25, drop: float = 0.9) -> None:
        super().__init__()
        for name, share in (("cutoff", cutoff), ("drop", drop)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} must be a share in [0, 1], got {share}")
        self.detector = None if detector is None else load_detector(detector)
        self.cutoff = cutoff
        self.drop = drop

    def forward(self, images: Tensor, *, encode: Encode, draws: Draws) -> Tensor:
        high, wide = images.shape[-2:]
        index = torch.arange(len(images), device=images.device)
        drawn = draws.uniform("frequency_masking", index, (high, wide)).add(1).div(2)
        rows, columns = (torch.arange(n, device=images.device) / n for n in (high, wide))
        blocked = ((rows[:, None] + columns) / 2 >= self.cutoff) & (drawn < self.drop)
        masked = inverse_dct(dct(images).masked_fill(blocked[:, None], 0.0)).clamp(0, 1)
        if self.detector is None:
            return masked
        score = self.detector(images)
        soft = (score / (1 + score.detach().abs())).sigmoid()  # else a sure detector would have no gradient
        gate = soft + ((score > 0).to(soft) - soft).detach()
        return images + gate[:, None, None, None] * (masked - images)
