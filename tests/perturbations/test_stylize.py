"""AdaIN with random weights in the published layout: statistics by their formula, shares by severity."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.perturbations.stylize import Stylize, decoder_from_relu4_1, vgg_to_relu4_1, with_statistics
from fastmat.types import Batch, ThreatModel

THREAT = ThreatModel(eps=2 / 255, max_words=1)
# Places and sizes of the convolutions in the files that pytorch-AdaIN publishes.
ENCODER = {0: 3, 2: 64, 5: 64, 9: 128, 12: 128, 16: 256, 19: 256, 22: 256, 25: 256, 29: 512}
DECODER = {1: 256, 5: 256, 8: 256, 11: 256, 14: 128, 18: 128, 21: 64, 25: 64, 28: 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adain")
    (folder / "styles/deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (24, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "styles/deep" / f"{i}.png")
    torch.manual_seed(0)
    beyond = {"32.weight": torch.zeros(2), "35.bias": torch.zeros(2)}  # the published encoder goes on
    encoder, decoder = vgg_to_relu4_1(), decoder_from_relu4_1()
    for layer in (*encoder, *decoder):
        if isinstance(layer, nn.Conv2d):  # so that something of the image reaches the end
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.constant_(layer.bias, 0.0)
    nn.init.constant_(decoder[-1].bias, 0.5)
    save_file(encoder.state_dict() | beyond, folder / "vgg.safetensors")
    save_file(decoder.state_dict(), folder / "decoder.safetensors")
    return {
        "styles": folder / "styles",
        "encoder": folder / "vgg.safetensors",
        "decoder": folder / "decoder.safetensors",
    }


def batch_of(*, first: int = 0, count: int = 2) -> Batch:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))[first : first + count]
    return Batch(
        images=images,
        texts=("a",) * count,
        txt2img=torch.arange(count),
        index=torch.arange(first, first + count),
        group=torch.arange(count),
    )


def test_the_published_layout() -> None:
    for network, sizes in ((vgg_to_relu4_1(), ENCODER), (decoder_from_relu4_1(), DECODER)):
        state = network.state_dict()
        assert {int(key.split(".")[0]): len(state[key]) for key in state if key.endswith("weight")} == sizes


def test_statistics_move() -> None:
    content, style = torch.randn(1, 4, 5, 6), 3 * torch.randn(1, 4, 7, 2) + 1
    moved = with_statistics(content, style)
    assert torch.allclose(moved.mean((2, 3)), style.mean((2, 3)), atol=1e-5)
    assert torch.allclose(moved.std((2, 3)), style.std((2, 3)), rtol=1e-3)


def test_images_take_the_style(files: dict[str, Path]) -> None:
    model = tiny_clip()
    made = [Stylize(threat=THREAT, severity=s, **files)(model, batch_of()).images for s in (1, 5)]
    assert made[0].shape == batch_of().images.shape and not torch.equal(*made)
    alone = Stylize(threat=THREAT, severity=5, **files)(model, batch_of(first=1, count=1)).images
    assert torch.allclose(made[1][1:], alone, atol=1 / 255 + 1e-6)


def test_refusals(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"styles: .* holds no \.png or \.jpg"):
        Stylize(threat=THREAT, **{**files, "styles": tmp_path})
    with pytest.raises(UserError, match=r"encoder: .* does not exist"):
        Stylize(threat=THREAT, **{**files, "encoder": tmp_path / "vgg.pth"})
    with pytest.raises(UserError, match="does not fit this model"):
        Stylize(threat=THREAT, **{**files, "decoder": files["encoder"]})(tiny_clip(), batch_of())
