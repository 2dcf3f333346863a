"""Each guard against a plain re-writing of what it says, and its gradient against what it claims."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import random_batch
from PIL import Image
from scipy.fft import dctn, idctn
from torch import Tensor

from fastmat.attacks.draws import Draws, SeededDraws
from fastmat.attacks.objectives import CosineToOwn
from fastmat.attacks.pgd import PGD
from fastmat.errors import UserError
from fastmat.guards.base import Encode, Guard
from fastmat.guards.dct import blocks, dct, inverse_dct
from fastmat.guards.detector import Detector, save_detector, spectrum
from fastmat.guards.frequency_masking import FrequencyMasking
from fastmat.guards.guarded import Guarded
from fastmat.guards.jpeg import JPEG
from fastmat.guards.resize_pad import ResizePad
from fastmat.guards.soft_jpeg import soft_jpeg
from fastmat.guards.ttc import TTC
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel


def images(n: int = 4, size: int = 32, seed: int = 0) -> Tensor:
    """Smooth, as photos are."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def through(guard: Guard, x: Tensor, *, seed: int = 0) -> Tensor:
    model = tiny_clip().eval().requires_grad_(False)
    return guard(x, encode=lambda pixels: model.encode_image(pixels).embeds, draws=SeededDraws(seed))


GUARDS = [JPEG(), ResizePad(), FrequencyMasking(), TTC()]


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: type(guard).__name__)
def test_images_stay_images_and_randomness_is_handed_in(guard: Guard) -> None:
    x = images()
    before = torch.random.get_rng_state()
    out = through(guard, x, seed=1)
    assert out.shape == x.shape and out.dtype == torch.float32
    assert float(out.min()) >= 0 and float(out.max()) <= 1
    assert torch.equal(out, through(guard, x, seed=1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(out, through(guard, x, seed=2)) != guard.random
    # Rows have draws of their own: two equal images come out different, where anything is drawn.
    twice = through(guard, x[:1].repeat(2, 1, 1, 1))
    assert torch.equal(twice[0], twice[1]) != guard.random


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: type(guard).__name__)
def test_an_attacker_has_a_gradient(guard: Guard) -> None:
    x = images().requires_grad_(True)
    with torch.no_grad():
        assert not through(guard, x).requires_grad or type(guard) is TTC
    (gradient,) = torch.autograd.grad(through(guard, x).square().sum(), x)
    assert bool(gradient.isfinite().all()) and bool((gradient.flatten(1).norm(dim=1) > 0).all())


def test_jpeg_is_pillows_file() -> None:
    x = images()
    out = through(JPEG(quality=40), x)
    for image, read in zip(x, out, strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=40)
        told = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        # Two builds of one library may round a block's last bit apart.
        assert (255 * read - told).abs().max() <= 2
    assert (255 * (x - out)).abs().max() > 3


@pytest.mark.parametrize("size", [32, 21])
@pytest.mark.parametrize("quality", [20, 75, 95])
def test_soft_jpeg_is_about_the_file(size: int, quality: int) -> None:
    x = images(4, size=size)
    x = (x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    real, soft = through(JPEG(quality=quality), x), soft_jpeg(x, quality=quality)
    assert (real - x).abs().mean() > 8 / 255 and (soft - real).abs().mean() < 3 / 255


def test_the_way_through_jpeg_beats_the_identity() -> None:
    """The gradient that was chosen against the one that was not, on the model that both attack through real files."""

    class Identity(JPEG):
        def __call__(self, pixels: Tensor, *, encode: Encode, draws: Draws) -> Tensor:
            read = super().__call__(pixels.detach(), encode=encode, draws=draws)
            return pixels + (read - pixels).detach()

    batch = random_batch((2,) * 12).replace(images=images(12, seed=3))
    bare = tiny_clip(seed=1).eval()
    judge = Guarded(model=bare, guard=JPEG(quality=50))
    value = CosineToOwn().bind(judge, batch, None)
    attack = PGD(threat=ThreatModel(eps=4 / 255), objective=CosineToOwn(), steps=20)
    reached = []
    for surrogate in (bare, Guarded(model=bare, guard=Identity(quality=50)), judge):
        with torch.no_grad():
            reached.append(float(value(judge.encode_image(attack(surrogate, batch).images)).mean()))
    with torch.no_grad():
        clean = float(value(judge.encode_image(batch.images)).mean())
    without, identity, soft = (value - clean for value in reached)
    assert soft > 1.2 * identity and soft > 1.2 * without, (without, identity, soft)


def test_resize_pad_lays_a_smaller_image_on_black() -> None:
    x = torch.ones(200, 3, 24, 24)
    out = through(ResizePad(smallest=0.5), x)
    inside = out[:, 0] > 0.5
    sides = torch.stack([inside.any(1).sum(1), inside.any(2).sum(1)], 1)
    assert torch.equal(sides[:, 0], sides[:, 0].clamp(12, 24)) and (sides[:, 0] - sides[:, 1]).abs().max() <= 1
    assert sides.min() == 12 and sides.max() == 24
    assert (sides.prod(1) - inside.sum((1, 2)) <= 4).all()  # one square, but for its corners
    first = inside.any(1).float().argmax(1)
    room = 24 - sides[:, 0]
    assert (first <= room + 1).all() and (first[room > 6] > 0).any() and (first[room > 6] < 6).any()
    # Nothing is shrunk: nothing is changed.
    x = images()
    assert torch.allclose(through(ResizePad(smallest=1.0), x), x, atol=1e-6)


def test_the_shrunk_image_is_the_image() -> None:
    """Shrunk by hand at the factor and place that were drawn."""
    x = images(1, size=16)
    guard = ResizePad(smallest=0.6)
    u = (SeededDraws(0).uniform("resize_pad", torch.arange(1), (3,))[0] + 1) / 2
    factor = 0.6 + 0.4 * u[0]
    left, top = ((1 - factor) * 16 * u[i] for i in (1, 2))
    out = through(guard, x)[0]
    for row, column in ((5, 7), (8, 8), (9, 4)):
        across, down = ((column + 0.5 - left) / factor - 0.5, (row + 0.5 - top) / factor - 0.5)
        i, j = math.floor(down), math.floor(across)
        if not (0 <= i < 15 and 0 <= j < 15):
            continue
        a, b = down - i, across - j
        square = x[0, :, i : i + 2, j : j + 2]
        mixed = (1 - a) * ((1 - b) * square[:, 0, 0] + b * square[:, 0, 1]) + a * (
            (1 - b) * square[:, 1, 0] + b * square[:, 1, 1]
        )
        assert torch.allclose(out[:, row, column], mixed, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (1, 3)])
def test_dct_is_scipys(shape: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    told = dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")
    assert torch.allclose(dct(x).double(), torch.from_numpy(told), atol=1e-5)
    assert torch.allclose(inverse_dct(dct(x)), x, atol=1e-5)


def test_blocks_in_reading_order() -> None:
    x = torch.arange(6 * 9).view(1, 1, 6, 9).float()
    cut = blocks(x, 4)
    assert cut.shape == (1, 1, 2, 4, 4)
    assert torch.equal(cut[0, 0, 1], x[0, 0, :4, 4:8])


def test_masking_blocks_high_frequencies_at_random() -> None:
    x = images(2)
    out = through(FrequencyMasking(cutoff=0.5, drop=0.75), x)
    u = (SeededDraws(0).uniform("frequency_masking", torch.arange(2), (32, 32)) + 1) / 2
    told = dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")
    dropped = 0
    for i in range(32):
        for j in range(32):
            for image in range(2):
                if (i / 32 + j / 32) / 2 >= 0.5 and u[image, i, j] < 0.75:
                    told[image, :, i, j] = 0
                    dropped += 1
    expected = torch.from_numpy(idctn(told, axes=(-2, -1), norm="ortho")).clamp(0, 1)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert dropped / 2 == pytest.approx(0.75 * 32 * 33 / 2, rel=0.1)


def test_only_what_the_detector_flags_is_masked(tmp_path: pytest.TempPathFactory) -> None:
    x = images(4)
    detector = Detector(image_size=32)
    detector.weight.fill_(1.0)
    scores = spectrum(x).sum(1)
    detector.bias.fill_(-float(scores.median()) - 1e-3)
    path = tmp_path / "detector.safetensors"  # type: ignore[operator]
    save_detector(detector, path)
    flagged = detector(x) > 0
    assert flagged.any() and not flagged.all()
    guard, bare = FrequencyMasking(detector=path), FrequencyMasking()
    out = through(guard, x)
    assert torch.equal(out[~flagged], x[~flagged])
    assert torch.allclose(out[flagged], through(bare, x)[flagged], atol=1e-6)
    # The way out: a step along the gradient of what masking changes moves the score, however sure the detector is.
    for scale in (1.0, 1e3):
        with torch.no_grad():
            guard.detector.weight.mul_(scale), guard.detector.bias.mul_(scale)  # type: ignore[union-attr]
        live = x.clone().requires_grad_(True)
        changed = (through(guard, live) - live).flatten(1)
        gate = torch.autograd.grad((changed.detach() * changed).sum(), live)[0]
        assert (gate.flatten(1).norm(dim=1)[flagged] > 1e-4).all()


def test_ttc_by_hand() -> None:
    """The published steps, image by image, with the noise handed in."""
    model = tiny_clip(seed=3).eval().requires_grad_(False)
    x = images(6, seed=5)

    def encode(pixels: Tensor) -> Tensor:
        return model.encode_image(pixels).embeds

    noise = SeededDraws(4).uniform("ttc", torch.arange(6), x.shape[1:]) * 4 / 255
    ratios = (encode((x + noise).clamp(0, 1)) - encode(x)).norm(dim=1) / encode(x).norm(dim=1)
    threshold = float(ratios.sort().values[2:4].mean())
    guard = TTC(threshold=threshold, steps=3)
    out = guard(x, encode=encode, draws=SeededDraws(4))
    sides = set()
    for i in range(6):
        own = x[i : i + 1]
        at = [(own + noise[i : i + 1]).clamp(0, 1)]
        for _ in range(3):
            live = at[-1].clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad((encode(live) - encode(own)).square().sum(), live)
            delta = (at[-1] - own + gradient.sign() / 255).clamp(-4 / 255, 4 / 255)
            at.append((own + delta).clamp(0, 1))
        stable = bool(ratios[i] < threshold)
        sides.add(stable)
        weights = [math.exp(2 * step) for step in range(4)]
        mean = sum(w * image for w, image in zip(weights, at, strict=True)) / sum(weights)
        assert torch.allclose(out[i : i + 1], mean if stable else at[0], atol=2e-6)
    assert sides == {True, False}


def test_ttcs_gradient_is_the_derivative() -> None:
    """Noise, signs and decision are constant around an image, so a small step moves every pixel by itself alone."""
    model = tiny_clip(seed=3).double().eval().requires_grad_(False)
    x = (0.2 + 0.6 * images(2)).double()

    def guard(pixels: Tensor) -> Tensor:
        return TTC()(pixels, encode=lambda y: model.image_projection(model.image_tower(y)[0]), draws=SeededDraws(0))

    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    step = 1e-9
    moved = (guard(x + step * direction) - guard(x)) / step
    assert ((moved - direction).abs() < 1e-3).double().mean() > 0.999
    live = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((guard(live) * direction).sum(), live)
    assert torch.equal(gradient, direction)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: JPEG(quality=0), "quality must be 1 to 100, as JPEG has it, got 0"),
        (lambda: JPEG(quality=101), "got 101"),
        (lambda: ResizePad(smallest=0), "smallest must be a factor in"),
        (lambda: FrequencyMasking(drop=1.5), "drop must be a share in"),
        (lambda: FrequencyMasking(cutoff=-0.1), "cutoff must be a share in"),
        (lambda: TTC(steps=0), "steps must be at least 1"),
        (lambda: TTC(threshold=-1), "threshold must not be negative"),
    ],
)
def test_refusals(make: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()  # type: ignore[operator]
