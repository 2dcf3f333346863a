"""A small classifier that tells attacked images from clean ones by their spectrum.

The idea of arXiv 2208.00428 (an adversarial sample classifier in the frequency domain); features and model are this
project's: the logarithm of the mean size of every coefficient of the DCT of 8 x 8 blocks, and a logistic regression.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.guards.dct import blocks, dct
from fastmat.models.weights import load_state, read_state, save_weights

BLOCK = 8  # JPEG's
SMALLEST = 1e-4  # of a mean coefficient: a fortieth of a grey level, so that flat images have a logarithm


class Detector(nn.Module):
    """Images [B, 3, H, W] in [0, 1] of one size to scores [B]: above 0 they are taken for adversarial.

    Gradients flow to the pixels: an attacker may fool it. A call raises UserError for images of another size.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    size: Tensor

    def __init__(self, *, image_size: int = 0) -> None:
        super().__init__()
        width = 3 * BLOCK * BLOCK
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("weight", torch.zeros(width))
        self.register_buffer("bias", torch.zeros(()))
        self.register_buffer("size", torch.tensor(image_size))
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.image_size, self.image_size):
            high, wide = images.shape[-2:]
            raise UserError(
                f"the detector was trained on images of {self.image_size} x {self.image_size} pixels and cannot judge "
                f"{high} x {wide}: train one on this model's size"
            )
        return (spectrum(images) - self.mean) / self.std @ self.weight + self.bias


def spectrum(images: Tensor) -> Tensor:
    """[B, 3, H, W] to [B, 3 * 8 * 8]: the logarithm of the mean absolute coefficient, over blocks."""
    return dct(blocks(images, BLOCK)).abs().mean(2).clamp_min(SMALLEST).log().flatten(1)


def train_detector(
    clean: Tensor,
    adversarial: Tensor,
    *,
    image_size: int,
    steps: int = 300,
    lr: float = 0.05,
    weight_decay: float = 1e-3,
    false_alarms: float = 0.05,
) -> Detector:
    """A detector of two sets of spectra [N, 192] and [M, 192] (`spectrum`), not of the images that it is judged on.

    Logistic regression by full-batch Adam from zero, so nothing is drawn. Scores are shifted so that the share
    `false_alarms` of the clean ones lies above 0. All constants are this project's choice.
    Raises UserError for an empty set.
    """
    if not len(clean) or not len(adversarial):
        raise UserError(
            f"a detector needs clean and adversarial images, got {len(clean)} and {len(adversarial)}: raise "
            "detector.images"
        )
    found = torch.cat([clean, adversarial])
    truth = torch.cat([torch.zeros(len(clean)), torch.ones(len(adversarial))]).to(found)
    balance = torch.where(truth > 0, 0.5 / len(adversarial), 0.5 / len(clean))
    detector = Detector(image_size=image_size).to(found.device)
    detector.mean.copy_(found.mean(0))
    detector.std.copy_(found.std(0).clamp_min(1e-3))
    x = (found - detector.mean) / detector.std
    weight, bias = (torch.zeros_like(t, requires_grad=True) for t in (detector.weight, detector.bias))
    optimiser = torch.optim.Adam([weight, bias], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            losses = F.binary_cross_entropy_with_logits(x @ weight + bias, truth, reduction="none")
            (losses @ balance + weight_decay * weight.square().sum()).backward()
            optimiser.step()
    detector.weight.copy_(weight.detach())
    detector.bias.copy_(bias.detach())
    detector.bias.sub_((x[: len(clean)] @ detector.weight + detector.bias).quantile(1 - false_alarms))
    return detector


def save_detector(detector: Detector, path: Path) -> None:
    """As safetensors, whole or not at all."""
    save_weights(detector, path)


def load_detector(path: Path) -> Detector:
    """Raises UserError where there is no such file, or it is no detector."""
    if not path.is_file():
        raise UserError(f"detector file {path} does not exist: `fastmat study test-time` trains one")
    state = read_state(path)
    detector = Detector()
    if state.keys() != detector.state_dict().keys():
        raise UserError(f"{path} is no detector: it holds {', '.join(sorted(state)[:3]) or 'nothing'}")
    load_state(detector, state, source=str(path))
    detector.image_size = int(detector.size)
    return detector
