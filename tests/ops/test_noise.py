import numpy as np
import pytest
import torch

from fastmat.ops import normal_noise, uniform_noise
from fastmat.ops.noise import noise_op, philox

INDEX = torch.tensor([0, 5, 2**33 + 7])


def test_the_stream_is_philox_4x64_10() -> None:
    """The first block of Random123's known answers for key and counter zero, as NumPy counts from one."""
    before_zero = np.random.Philox(key=0, counter=2**256 - 1)
    assert [hex(word) for word in before_zero.random_raw(4)] == [
        "0x16554d9eca36314c", "0xdb20fe9d672d0fdc", "0xd7e772cee186176b", "0x7e68b68aec7ba23b",
    ]  # fmt: skip
    ours = philox(7, 3, stream=1).random_raw(4)
    assert (ours == np.random.Philox(key=7, counter=1 * 2**64 + 3 * 2**128).random_raw(4)).all()


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 17, 4099])
def test_every_element_is_its_own_bits(n: int, backend: str, device: torch.device) -> None:
    """Against one element at a time, from the definition in kernels/noise.py."""
    got = uniform_noise(-3, INDEX.to(device), (n,), backend=backend).cpu()
    assert got.shape == (3, n)
    eighth = -(-n // 8)
    for row, i in zip(got, INDEX.tolist(), strict=True):
        words = philox(-3, i).random_raw(4 * eighth)
        for e in range(0, n, max(1, n // 50)):
            k, c = divmod(e, eighth)
            half = (int(words[4 * c + k // 2]) >> (32 * (k % 2))) & 0xFFFFFFFF
            assert float(row[e]) == 2 * ((half >> 9) + 0.5) / 2**23 - 1


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 2053)])
def test_backends_agree(shape: tuple[int, ...], device: torch.device) -> None:
    index = INDEX.to(device)
    uniform = [uniform_noise(11, index, shape, backend=backend) for backend in ("reference", "triton")]
    assert torch.equal(*uniform), "uniform noise is the same to the bit"
    normal = [normal_noise(11, index, shape, backend=backend) for backend in ("reference", "triton")]
    torch.testing.assert_close(*normal, atol=2e-6, rtol=2e-6)


def test_rows_depend_on_seed_and_sample_only(backend: str, device: torch.device) -> None:
    index = torch.arange(5, device=device)
    whole = normal_noise(1, index, (3, 4), backend=backend)
    assert torch.equal(normal_noise(1, index[3:], (3, 4), backend=backend), whole[3:])
    assert torch.equal(normal_noise(1, index.flip(0), (3, 4), backend=backend), whole.flip(0))
    assert torch.equal(normal_noise(1 + 2**64, index, (12,), backend=backend).view(5, 3, 4), whole)
    assert not torch.equal(normal_noise(2, index, (3, 4), backend=backend), whole)


def test_moments() -> None:
    n = 1 << 18
    u = uniform_noise(0, torch.arange(4), (n,)).double()
    z = normal_noise(0, torch.arange(4), (n,)).double()
    assert u.abs().max() < 1 and (u.mean(1).abs() < 5 / (3 * n) ** 0.5).all()
    assert u.square().mean().item() == pytest.approx(1 / 3, abs=2e-3)
    assert z.isfinite().all() and (z.mean(1).abs() < 5 / n**0.5).all()
    for power, moment in ((2, 1.0), (3, 0.0), (4, 3.0)):
        assert (z**power).mean().item() == pytest.approx(moment, abs=0.03)
    correlation = torch.corrcoef(torch.cat([z, z.roll(1, 1)])).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / n**0.5


def test_operator(device: torch.device) -> None:
    arguments = (INDEX.to(device), 20, 3, True, "")
    torch.library.opcheck(noise_op, arguments)
    compiled = torch.compile(lambda i: normal_noise(3, i, (4, 5)) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(INDEX.to(device)), normal_noise(3, INDEX.to(device), (4, 5)) * 2)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="index must be int64"):
        uniform_noise(0, INDEX.float(), (3,))
    with pytest.raises(ValueError, match="index must have shape"):
        uniform_noise(0, INDEX[None], (3,))
    with pytest.raises(ValueError, match="shape must be the sides"):
        uniform_noise(0, INDEX, (3, -1))
    with pytest.raises(ValueError, match="backend"):
        uniform_noise(0, INDEX, (3,), backend="cuda")
