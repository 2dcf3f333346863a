"""Images in the manner of paintings: AdaIN (Huang and Belongie, ICCV 2017), as in Stylized-ImageNet (Geirhos et al.,
ICLR 2019). Of the 17 perturbations of images the one that is learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.weights import load_state, read_state
from fastmat.perturbations.base import Perturbation, eight_bit
from fastmat.types import Batch, ThreatModel

SEVERITIES = 5
STEP = 0.2  # of the style's share, per severity (Qiu et al.)
EPS = 1e-5
SUFFIXES = (".png", ".jpg", ".jpeg")


class Stylize(Perturbation):
    """Images alone: each takes the colours and strokes of a painting that is drawn for it.

    styles: folder of paintings, with any folders in it (published: those of Painter by Numbers). encoder, decoder: the
        weights of pytorch-AdaIN, vgg_normalised.pth and decoder.pth, or safetensors with their keys.
    severity: 1 to 5, a fifth of the style each.
    Raises UserError for another severity, a folder without paintings, and files that hold other weights.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        styles: Path,
        encoder: Path,
        decoder: Path,
        severity: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, severity=severity, severities=SEVERITIES, seed=seed)
        self.styles = sorted(path for path in styles.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.styles:
            raise UserError(f"styles: {styles} holds no .png or .jpg; name a folder of paintings")
        self.files = (encoder, decoder)
        for name, path in (("encoder", encoder), ("decoder", decoder)):
            if not path.is_file():
                raise UserError(f"{name}: {path} does not exist; pytorch-AdaIN publishes it")

    def perturb(self, batch: Batch) -> tuple[Tensor, tuple[str, ...]]:
        made = [
            self.stylized(image, self.generator(index))
            for index, image in zip(batch.index.tolist(), batch.images, strict=True)
        ]
        return torch.stack(made).to(batch.images.device), batch.texts

    @torch.no_grad()
    def stylized(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """[3, H, W]; the painting is brought to the image's size."""
        encoder, decoder = self.networks
        height, width = image.shape[1:]
        path = self.styles[int(rng.integers(len(self.styles)))]
        try:
            painting = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        except OSError as error:
            raise UserError(f"styles: {path} is no picture ({error}); remove it") from error
        style = torch.from_numpy(np.asarray(painting).astype(np.float32) / 255).permute(2, 0, 1)
        content, manner = encoder(torch.stack((image.cpu().float(), style))).split(1)
        share = STEP * self.severity
        decoded = decoder(share * with_statistics(content, manner) + (1 - share) * content)
        return eight_bit(decoded[0, :, :height, :width].permute(1, 2, 0).double().numpy())

    @cached_property
    def networks(self) -> tuple[nn.Sequential, nn.Sequential]:
        made = (vgg_to_relu4_1(), decoder_from_relu4_1())
        for path, network in zip(self.files, made, strict=True):
            state = read_state(path)
            # The published encoder goes on where nothing here reads it.
            load_state(
                network, {key: state[key] for key in state if int(key.split(".")[0]) < len(network)}, source=str(path)
            )
            network.eval().requires_grad_(False)
        return made


def with_statistics(content: Tensor, style: Tensor) -> Tensor:
    """`content` [1, C, H, W] with every channel's mean and standard deviation those of `style`."""
    mean, own = content.mean((2, 3), keepdim=True), (content.var((2, 3), keepdim=True) + EPS).sqrt()
    other = (style.var((2, 3), keepdim=True) + EPS).sqrt()
    return (content - mean) / own * other + style.mean((2, 3), keepdim=True)


def vgg_to_relu4_1() -> nn.Sequential:
    """VGG-19 up to its tenth layer; places of the layers, which name the weights, as published."""
    pool = partial(nn.MaxPool2d, 2, 2, ceil_mode=True)
    widths = [(3, 64), (64, 64), None, (64, 128), (128, 128), None, (128, 256), *[(256, 256)] * 3, None, (256, 512)]
    return nn.Sequential(nn.Conv2d(3, 3, 1), *stacked(widths, pool))


def decoder_from_relu4_1() -> nn.Sequential:
    """The way back; the last convolution is not rectified."""
    grow = partial(nn.Upsample, scale_factor=2, mode="nearest")
    widths = [(512, 256), None, *[(256, 256)] * 3, (256, 128), None, (128, 128), (128, 64), None, (64, 64), (64, 3)]
    return nn.Sequential(*stacked(widths, grow)[:-1])


def stacked(widths: Sequence[tuple[int, int] | None], between: Callable[[], nn.Module]) -> list[nn.Module]:
    """Padded 3x3 convolutions, each rectified; None: `between`."""
    layers: list[nn.Module] = []
    for pair in widths:
        layers += [between()] if pair is None else [nn.ReflectionPad2d(1), nn.Conv2d(*pair, 3), nn.ReLU()]
    return layers
