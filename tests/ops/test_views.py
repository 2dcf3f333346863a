import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from fastmat.ops import scale_views

SCALES = (0.5, 0.75, 1.25, 1.5)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [16, 21, 64])
def test_equals_torchvision(size: int, antialias: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.rand(2, 3, size, size, generator=generator)
    noise = 0.05 * torch.randn(len(SCALES), *x.shape, generator=generator)
    views = scale_views(x, SCALES, noise, antialias=antialias)
    for scale, draw, view in zip(SCALES, noise, views, strict=True):
        small = [int(size * scale)] * 2
        down = resize(x + draw, small, InterpolationMode.BICUBIC, antialias=antialias).clamp(0, 1)
        want = resize(down, [size, size], InterpolationMode.BICUBIC, antialias=antialias)
        torch.testing.assert_close(view, want, atol=2e-6, rtol=0)


def test_gradient() -> None:
    x = torch.rand(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    noise = torch.zeros(2, *x.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: scale_views(v, (0.5, 1.5), noise, antialias=True), x.requires_grad_(), atol=1e-4
    )
