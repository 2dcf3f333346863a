"""Random resizing and padding (Xie et al., ICLR 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.errors import UserError
from fastmat.guards.base import Encode


class ResizePad:
    """Every image is shrunk by a factor of its own and laid at a random place of a black canvas of its old size.

    smallest: the factor is uniform in [smallest, 1]. Default 299/331: the paper enlarges 299 pixels to 299 to 330 on a
        canvas of 331; relative to the canvas that is the same, and encoders here have one size. Bilinear, as this
        project chose (the paper's code: nearest), so that its gradient is exact.
    Raises UserError unless 0 < smallest <= 1.
    """

    random = True

    def __init__(self, *, smallest: float = 299 / 331) -> None:
        if not 0 < smallest <= 1:
            raise UserError(f"smallest must be a factor in (0, 1], got {smallest}")
        self.smallest = smallest

    def __call__(self, images: Tensor, *, encode: Encode, draws: Draws) -> Tensor:
        index = torch.arange(len(images), device=images.device)
        u = draws.uniform("resize_pad", index, (3,)).add(1).div(2)  # factor, across, down
        factor = self.smallest + (1 - self.smallest) * u[:, :1]
        # In coordinates of the canvas, -1 to 1, the image's centre may be as far out as it leaves room for.
        centre = (2 * u[:, 1:] - 1) * (1 - factor)
        zero = torch.zeros_like(factor)
        across = torch.cat([1 / factor, zero, -centre[:, :1] / factor], 1)
        down = torch.cat([zero, 1 / factor, -centre[:, 1:] / factor], 1)
        grid = F.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
