"""The detector, and the attack that must pass it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from batches import random_batch
from guards.test_guards import images
from scipy.fft import dctn

from fastmat.attacks.objectives import Contrastive
from fastmat.attacks.pgd import PGD
from fastmat.errors import UserError
from fastmat.guards.detector import Detector, load_detector, save_detector, spectrum, train_detector
from fastmat.guards.evading import EvadingPGD
from fastmat.models.tiny import tiny_clip
from fastmat.models.weights import save_weights
from fastmat.types import ThreatModel

EPS = 8 / 255


def noisy(seed: int, n: int = 60) -> torch.Tensor:
    x = images(n, seed=seed)
    return (x + EPS * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).sign()).clamp(0, 1)


def test_the_spectrum_by_hand() -> None:
    x = images(2, size=19)
    told = np.zeros((2, 3, 8, 8))
    for top in (0, 8):
        for left in (0, 8):
            block = x[..., top : top + 8, left : left + 8].double().numpy()
            told += np.abs(dctn(block, axes=(-2, -1), norm="ortho")) / 4
    expected = np.log(np.maximum(told, 1e-4)).reshape(2, -1)
    assert np.allclose(spectrum(x).numpy(), expected, atol=1e-3)
    assert bool(spectrum(torch.zeros(1, 3, 8, 8)).isfinite().all())


def test_it_learns_and_keeps_its_share_of_false_alarms() -> None:
    clean = images(60, seed=1)
    detector = train_detector(spectrum(clean), spectrum(noisy(2)), image_size=32, false_alarms=0.1)
    assert float((detector(clean) > 0).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert float((detector(noisy(3)) > 0).float().mean()) > 0.95  # of other images
    assert float((detector(images(60, seed=4)) > 0).float().mean()) < 0.4
    again = train_detector(spectrum(clean), spectrum(noisy(2)), image_size=32, false_alarms=0.1)
    assert torch.equal(detector.weight, again.weight)


def test_to_disk_and_back_and_bad_files(tmp_path: Path) -> None:
    x = images(20)
    detector = train_detector(spectrum(x), spectrum(noisy(1, 20)), image_size=32)
    save_detector(detector, tmp_path / "d.safetensors")
    assert torch.equal(load_detector(tmp_path / "d.safetensors")(x), detector(x))
    with pytest.raises(UserError, match="trained on images of 32 x 32 pixels and cannot judge 24 x 24"):
        detector(images(1, size=24))
    with pytest.raises(UserError, match=r"detector file .* does not exist"):
        load_detector(tmp_path / "absent.safetensors")
    save_weights(tiny_clip(), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="is no detector"):
        load_detector(tmp_path / "m.safetensors")
    other = Detector(image_size=32)
    other.weight = torch.zeros(3)
    save_detector(other, tmp_path / "o.safetensors")
    with pytest.raises(UserError, match="of another shape"):
        load_detector(tmp_path / "o.safetensors")
    with pytest.raises(UserError, match="needs clean and adversarial images"):
        train_detector(spectrum(x)[:0], spectrum(x), image_size=32)


def test_evading_pgd_is_adversarial_and_unseen() -> None:
    """PGD is seen; the same with the detector in mind is not, and still ascends the objective."""
    model = tiny_clip(seed=1).eval()
    batch = random_batch((2,) * 12).replace(images=images(12, seed=7))
    threat = ThreatModel(eps=EPS)
    detector = train_detector(spectrum(images(60, seed=1)), spectrum(noisy(2)), image_size=32)
    plain = PGD(threat=threat, steps=10)(model, batch)
    evading = EvadingPGD(threat=threat, detector=detector, steps=40)(model, batch)
    assert float(evading.distance.max()) <= EPS + 1e-6
    seen, unseen = (float((detector(result.images) > 0).float().mean()) for result in (plain, evading))
    assert seen > 0.9 and unseen < 0.1

    from fastmat.attacks.base import context_of

    value = Contrastive().bind(model, batch, context_of(model, batch))
    with torch.no_grad():
        clean, hurt = (value(model.encode_image(x)).mean() for x in (batch.images, evading.images))
    assert hurt > clean + 0.1
