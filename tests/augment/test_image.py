"""Views against torchvision's own operations, one image at a time; draws that depend on the sample alone."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from batches import random_batch
from torch import Tensor

from fastmat.attacks.draws import SeededDraws
from fastmat.augment.image import OPERATIONS, VIEW, ImageViews, crop_box, each, resampled
from fastmat.errors import UserError
from fastmat.types import Batch

NAMES = list(OPERATIONS)


def pictures(n: int = 3, size: int = 24) -> Tensor:
    """8-bit pictures with structure, one of them in a narrow range, one channel of it constant."""
    x = torch.linspace(0, 1, size)
    base = torch.stack([x[:, None] * x, x.flip(0)[:, None].expand(size, size), (x[:, None] + x) / 2])
    noise = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = (0.7 * base + 0.3 * noise).clamp(0, 1)
    images[-1] = 0.3 + images[-1] / 3
    images[-1, 1] = 0.5
    return (images * 255).round() / 255


def under(name: str, images: Tensor, level: float) -> Tensor:
    chosen = torch.full((len(images),), NAMES.index(name))
    return each(images, chosen, torch.full((len(images),), level))


def eight_bit(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8)


@pytest.mark.parametrize("level", [-1.0, -0.4, 0.7, 1.0])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("identity", lambda image, level: image),
        ("brightness", lambda image, level: TF.adjust_brightness(image, 1 + 0.9 * level)),
        ("sharpness", lambda image, level: TF.adjust_sharpness(image, 1 + 0.9 * level)),
        ("autocontrast", lambda image, level: TF.autocontrast(image)),
        ("equalize", lambda image, level: TF.equalize(eight_bit(image)).float() / 255),
    ],
)
def test_colour_operations_are_torchvisions(name: str, theirs, level: float) -> None:
    images = pictures()
    # torchvision rounds the smoothed picture of a sharpness change to 8 bits only for 8-bit pictures
    expected = torch.stack([theirs(image, level) for image in images])
    torch.testing.assert_close(under(name, images, level), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("level", [-0.7, 1.0])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_geometry_by_hand(name: str, level: float) -> None:
    """Bilinear sampling at where each pixel comes from, written out; grey outside."""
    image = pictures(1, 8)[0].double()
    size = image.shape[-1]
    expected = torch.full_like(image, 0.5)
    for row in range(size):
        for column in range(size):
            x, y = (2 * column + 1) / size - 1, (2 * row + 1) / size - 1
            angle = math.radians(30 * level)
            from_x, from_y = {
                "shear_x": (x + 0.3 * level * y, y),
                "shear_y": (x, y + 0.3 * level * x),
                "translate_x": (x + 2 * 10 / 256 * level, y),
                "translate_y": (x, y + 2 * 10 / 256 * level),
                "rotate": (math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y),
            }[name]
            at_column, at_row = ((from_x + 1) * size - 1) / 2, ((from_y + 1) * size - 1) / 2
            value = torch.zeros(3, dtype=torch.float64)
            for r in (math.floor(at_row), math.floor(at_row) + 1):
                for c in (math.floor(at_column), math.floor(at_column) + 1):
                    weight = (1 - abs(at_row - r)) * (1 - abs(at_column - c))
                    inside = 0 <= r < size and 0 <= c < size
                    value += weight * (image[:, r, c] if inside else 0.5)
            expected[:, row, column] = value
    found = under(name, image[None].float(), level)[0]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_a_crop_is_a_piece_of_the_image_resized() -> None:
    """The upper left quarter: torchvision crops, and resizes as bilinear sampling does inside."""
    images = pictures(2, 16)
    quarter = torch.tensor([[[0.5, 0, -0.5], [0, 0.5, -0.5]]]).repeat(2, 1, 1)
    expected = TF.resize(images[:, :, :8, :8], [16, 16], antialias=False)
    found = resampled(images, quarter, outside="border")
    torch.testing.assert_close(found[:, :, :14, :14], expected[:, :, :14, :14], atol=1e-5, rtol=0)


def test_crops_have_the_area_and_ratio_asked_for_and_lie_inside() -> None:
    drawn = SeededDraws(0).uniform("crop", torch.arange(2000), (4,))
    box = crop_box(drawn, (0.5, 0.7))
    width, height = box[:, 0, 0], box[:, 1, 1]
    whole = (width < 1) & (height < 1)
    area = (width * height)[whole]
    assert whole.float().mean() > 0.9 and area.min() >= 0.5 - 1e-5 and area.max() <= 0.7 + 1e-5
    assert (width / height).min() >= 0.75 - 1e-5 and (width / height).max() <= 4 / 3 + 1e-5
    assert abs(float((width / height)[whole].log().mean())) < 0.02
    for side, place in ((width, box[:, 0, 2]), (height, box[:, 1, 2])):
        assert bool((place.abs() + side <= 1 + 1e-5).all()) and place.std() > 0.05
    assert not box[:, 0, 1].any() and not box[:, 1, 0].any()


def views_of(batch: Batch, views: ImageViews, seed: int = 5) -> Batch:
    return views(batch, SeededDraws(seed))


def test_views_join_the_group_of_their_image() -> None:
    batch = random_batch((2, 1, 3))
    found = views_of(batch, ImageViews(views=2))
    assert found.images.shape == (9, 3, 32, 32) and found.images.dtype == torch.float32
    assert torch.equal(found.images[:3], batch.images)
    assert found.group.tolist() == batch.group.tolist() * 3
    assert found.texts == batch.texts and torch.equal(found.txt2img, batch.txt2img)
    assert torch.equal(found.text_group, batch.text_group)
    assert len(set(found.index.tolist())) == 9 and found.index[:3].tolist() == batch.index.tolist()
    assert found.images.min() >= 0 and found.images.max() <= 1
    assert not torch.equal(found.images[3:6], found.images[6:]) and not torch.equal(found.images[3:6], batch.images)


def test_in_place_of_the_images() -> None:
    batch = random_batch((2, 1, 3))
    found = views_of(batch, ImageViews(views=2, keep=False))
    beside = views_of(batch, ImageViews(views=2))
    assert torch.equal(found.images, beside.images[3:]) and torch.equal(found.index, beside.index[3:])
    assert found.group.tolist() == batch.group.tolist() * 2 and found.texts == batch.texts
    assert found.index.min() >= VIEW


def test_a_view_depends_on_its_sample_alone() -> None:
    batch = random_batch((1, 1, 1, 1, 1))
    views = ImageViews(views=1, keep=False)
    whole = views_of(batch, views)
    parts = [views_of(batch.rows(*rows), views) for rows in ((0, 2), (2, 5))]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    assert not torch.equal(whole.images, views_of(batch, views, seed=6).images)


def test_nothing_drawn_is_the_image_itself() -> None:
    batch = random_batch((1, 1))
    assert torch.equal(views_of(batch, ImageViews(keep=False, crop=(1.0, 1.0), operations=0)).images, batch.images)


def test_every_operation_is_drawn_with_both_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmat.augment import image

    seen: list[tuple[int, float]] = []

    def spy(images: Tensor, chosen: Tensor, level: Tensor) -> Tensor:
        seen.extend(zip(chosen.tolist(), level.tolist(), strict=True))
        return images

    monkeypatch.setattr(image, "each", spy)
    n = 400
    batch = Batch(
        images=torch.zeros(n, 3, 1, 1),
        texts=(),
        txt2img=torch.zeros(0, dtype=torch.int64),
        index=torch.arange(n),
        group=torch.arange(n),
    )
    views_of(batch, ImageViews(operations=3, magnitude=0.6))
    counts = torch.bincount(torch.tensor([chosen for chosen, _ in seen]), minlength=len(OPERATIONS))
    assert len(seen) == 3 * n and len(counts) == len(OPERATIONS)
    assert counts.min() > 3 * n / len(OPERATIONS) * 0.7 and counts.max() < 3 * n / len(OPERATIONS) * 1.3
    assert {round(level, 4) for _, level in seen} == {-0.6, 0.6}


@pytest.mark.parametrize(
    "wrong",
    [{"views": 0}, {"crop": (0.0, 1.0)}, {"crop": (0.8, 0.5)}, {"operations": -1}, {"magnitude": 1.5}],
)
def test_values_out_of_range(wrong) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        ImageViews(**wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_views_are_the_same_and_nobody_waits() -> None:
    batch = random_batch((1, 1, 1, 1), size=64)
    views = ImageViews(views=2)
    there = views_of(batch.to("cuda"), views)
    here = views_of(batch, views)
    # equalize maps 8-bit values, which a rounding error may move by one
    assert ((there.images.cpu() - here.images).abs() > 1e-4).float().mean() < 0.01
    assert there.images.is_cuda and there.group.is_cuda
    images = batch.images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        views.view(images, batch.index, SeededDraws(5))
    finally:
        torch.cuda.set_sync_debug_mode("default")
