"""JPEG compression (Das et al., 2017; Guo et al., ICLR 2018): small perturbations are hoped to be rounded away."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from fastmat.attacks.draws import Draws
from fastmat.errors import UserError
from fastmat.guards.base import Encode
from fastmat.guards.soft_jpeg import soft_jpeg


class JPEG:
    """Every image is written as a real JPEG file, in memory, and read again.

    quality: 1 to 100; 75, Guo et al.'s choice.
    Gradient: that of a JPEG with soft rounding (`soft_jpeg`), at the real one's values. On the built-in set's
        validation split the identity (BPDA; Athalye et al., ICML 2018, section 4.1) is the far weaker way in: an
        attacker through it spends the budget on what is rounded away.
    On the CPU, image by image, 8 bits a channel: on a GPU this waits for the device.
    Raises UserError for another quality.
    """

    random = False

    def __init__(self, *, quality: int = 75) -> None:
        if not 1 <= quality <= 100:
            raise UserError(f"quality must be 1 to 100, as JPEG has it, got {quality}")
        self.quality = quality

    def __call__(self, images: Tensor, *, encode: Encode, draws: Draws) -> Tensor:
        pixels = images.detach().mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
        files = (encode_jpeg(image, self.quality) for image in pixels)
        read = torch.stack([decode_jpeg(file, ImageReadMode.RGB) for file in files]).to(images) / 255
        soft = soft_jpeg(images, quality=self.quality)
        return soft + (read - soft).detach()
