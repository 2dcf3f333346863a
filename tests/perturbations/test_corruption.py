"""Every corruption: its formula written again, drawn anew from the same seed, monotone where more means more."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.perturbations import blur, digital, noise, weather
from fastmat.perturbations.corruption import KINDS, Corruption
from fastmat.types import Batch, ThreatModel

THREAT = ThreatModel(eps=2 / 255, max_words=1)
MONOTONE = sorted(set(KINDS) - {"glass_blur", "elastic_transform", "fog", "snow", "frost"})


def smooth(size: int = 48) -> Tensor:
    """[2, 3, size, size]: gradients and a disc, on 8-bit levels."""
    line = torch.linspace(0.1, 0.8, size)
    ground = torch.stack((line[:, None].expand(size, size), line.expand(size, size), 0.9 - line.expand(size, size)))
    disc = (line[:, None] - 0.45).square() + (line - 0.45).square() < 0.02
    return (torch.stack((ground, torch.where(disc, 0.95, ground))) * 255).round() / 255


def batch_of(images: Tensor, *, first: int = 0) -> Batch:
    count = len(images)
    return Batch(
        images=images,
        texts=tuple(f"a picture number {i}" for i in range(count)),
        txt2img=torch.arange(count),
        index=torch.arange(first, first + count),
        group=torch.arange(count),
    )


@pytest.fixture(scope="module")
def frost_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frost")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (40, 64, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def corruption(kind: str, severity: int, frost: Path, *, seed: int = 0) -> Corruption:
    return Corruption(threat=THREAT, kind=kind, severity=severity, frost=frost if kind == "frost" else None, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_severity(kind: str, frost_folder: Path) -> None:
    model, images = tiny_clip(), smooth()
    moved = []
    for severity in range(1, 6):
        attack: Attack = corruption(kind, severity, frost_folder)
        result = attack(model, batch_of(images))
        assert result.images.shape == images.shape and result.images.dtype == torch.float32
        assert torch.equal(result.images, (result.images * 255).round() / 255)
        assert bool(((result.images >= 0) & (result.images <= 1)).all())
        assert result.texts == batch_of(images).texts
        assert torch.allclose(result.distance, (result.images - images).abs().flatten(1).amax(1))
        assert result.distance.min() > 2 / 255, "no budget holds it"
        moved.append(float((result.images - images).abs().mean()))
    if kind in MONOTONE:
        assert moved == sorted(moved), moved
    assert moved[4] > moved[0] or kind in ("elastic_transform", "snow", "frost")


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_seed_and_image_alone(kind: str, frost_folder: Path) -> None:
    model, images = tiny_clip(), smooth()
    both = corruption(kind, 3, frost_folder)(model, batch_of(images)).images
    alone = corruption(kind, 3, frost_folder)(model, batch_of(images[1:], first=1)).images
    assert torch.equal(both[1:], alone)
    other = corruption(kind, 3, frost_folder, seed=1)(model, batch_of(images)).images
    fixed = kind in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert torch.equal(both, other) == fixed


def test_noise_by_its_formula() -> None:
    x = np.full((200, 200, 3), 0.5)
    for level, (gaussian, shot, impulse, speckle) in enumerate(
        zip(noise.GAUSSIAN, noise.SHOT, noise.IMPULSE, noise.SPECKLE, strict=True)
    ):
        rng = np.random.default_rng(level)
        assert noise.gaussian_noise(x, level, rng).std() == pytest.approx(gaussian, rel=0.02)
        # A Poisson count of mean 0.5 c over c has the standard deviation sqrt(0.5 / c).
        assert noise.shot_noise(x, level, rng).std() == pytest.approx(math.sqrt(0.5 / shot), rel=0.02)
        struck = noise.impulse_noise(x, level, rng)
        assert set(np.unique(struck)) == {0.0, 0.5, 1.0}
        assert (struck != 0.5).mean() == pytest.approx(impulse, rel=0.05)
        assert noise.speckle_noise(x, level, rng).std() == pytest.approx(0.5 * speckle, rel=0.02)


def test_blurs_keep_the_mean_and_spread_a_point() -> None:
    point = np.zeros((101, 101, 3))
    point[50, 50] = 1
    rng = np.random.default_rng(0)
    for level, (radius, _) in enumerate(blur.DEFOCUS):
        spread = blur.defocus_blur(point, level, rng)[..., 0]
        distance = np.hypot(*np.mgrid[-50:51, -50:51])
        assert spread.sum() == pytest.approx(1)
        assert spread[distance > radius + 4].max() < 1e-6
        inside = spread[distance <= radius - 3]
        assert inside.size == 0 or np.allclose(inside, inside.max(), rtol=1e-3)
    for level, (radius, sigma) in enumerate(blur.MOTION):
        kernel = blur.trail(radius, sigma, 0.0)
        row = kernel[2 * radius]
        weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
        assert np.allclose(row[2 * radius :], weights / weights.sum()) and row[: 2 * radius].sum() == 0
        assert blur.motion_blur(point, level, np.random.default_rng(1))[..., 0].sum() == pytest.approx(1, abs=1e-6)
    soft = blur.glass_blur(np.full((24, 24, 3), 0.25), 4, rng)
    assert np.allclose(soft, 0.25)
    constant = blur.zoom_blur(np.full((31, 20, 3), 0.7), 4, rng)
    assert constant.shape == (31, 20, 3) and np.allclose(constant, 0.7)


def test_zoom_is_bilinear_about_the_middle() -> None:
    ramp = np.linspace(0, 1, 64)[None, :, None] * np.ones((64, 1, 3))
    near = blur.zoomed(ramp, 2.0)
    assert near.shape == ramp.shape
    # Half the slope, and the same middle.
    slopes = np.diff(near[0, :, 0])
    assert np.allclose(slopes, slopes[0]) and slopes[0] == pytest.approx(np.diff(ramp[0, :, 0])[0] / 2, rel=0.05)
    assert near[0, 31:33, 0].mean() == pytest.approx(0.5, abs=0.02)


def test_brightness_is_the_value_of_hsv() -> None:
    import colorsys

    rng = np.random.default_rng(0)
    x = np.concatenate((rng.random((5, 5, 3)), np.zeros((1, 5, 3))))
    for level, more in enumerate(weather.BRIGHTNESS):
        wanted = np.array(
            [
                [colorsys.hsv_to_rgb(h, s, min(1, v + more)) for h, s, v in (colorsys.rgb_to_hsv(*p) for p in row)]
                for row in x
            ]
        )
        assert np.allclose(weather.brightness(x, level, rng), wanted)


def test_fog_and_its_cloud() -> None:
    cloud = weather.plasma(64, 2.0, np.random.default_rng(0))
    assert (cloud.min(), cloud.max()) == (0.0, 1.0)
    # A slow fade has more in its details than a quick one.
    rough = [np.abs(np.diff(weather.plasma(64, fade, np.random.default_rng(0)), axis=0)).mean() for fade in (1.2, 3.0)]
    assert rough[0] > 2 * rough[1]
    x = np.full((40, 40, 3), 0.5)
    fogged = weather.fog(x, 0, np.random.default_rng(3))
    cloud = weather.plasma(64, 2.0, np.random.default_rng(3))[:40, :40, None]
    assert np.allclose(fogged, (0.5 + 1.5 * cloud) * 0.5 / 2.0)


def test_digital_by_their_formulas() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((30, 20, 3))
    assert np.allclose(digital.contrast(x, 3, rng), (x - x.mean((0, 1))) * 0.1 + x.mean((0, 1)))
    blocks = digital.pixelate(x, 4, rng)
    assert len(np.unique(blocks.reshape(-1, 3), axis=0)) <= int(30 * 0.25) * int(20 * 0.25)
    grid = np.stack(np.meshgrid(np.arange(30), np.arange(20), indexing="ij"), -1).reshape(-1, 2).astype(float)
    assert np.allclose(digital.sampled(x, grid, mode="mirror"), x)
    assert digital.elastic_transform(x, 4, rng).shape == x.shape


def test_frost_and_snow(frost_folder: Path) -> None:
    x = np.full((50, 90, 3), 0.5)  # larger than the pictures, which are enlarged
    picture = np.full((40, 64, 3), 0.2)
    assert np.allclose(weather.frost(x, 1, np.random.default_rng(0), pictures=[picture]), 0.8 * 0.5 + 0.6 * 0.2)
    snowy = weather.snow(x, 0, np.random.default_rng(0))
    assert snowy.min() >= 0.8 * 0.5 + 0.2 * 0.5 - 1e-9 and snowy.mean() > 0.55


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "fogg"}, "there is no kind 'fogg'; did you mean 'fog'"),
        ({"kind": "fog", "severity": 6}, "severity must be a whole number from 1 to 5, got 6"),
        ({"kind": "frost", "frost": Path("nowhere")}, "frost: nowhere has no pictures of frost"),
    ],
)
def test_refusals(arguments: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Corruption(threat=THREAT, **arguments)
