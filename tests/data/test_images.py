import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmat.data.images import MAX_ASPECT, MAX_PIXELS, read_image
from fastmat.errors import UserError
from fastmat.types import ImageTransform


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def png(path: Path, width: int, height: int) -> Path:
    """A valid PNG header of any size, without the pixels: what a decompression bomb looks like."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    image.convert(mode).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [0, 255, 127]


def test_transparent_palette_is_composited_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    assert pixels(tmp_path / "a.png").tolist() == [[[200, 10, 20], [255, 255, 255]]]


def test_transparent_colour_of_an_rgb_file_is_composited_on_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "a.png").tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 257, 128 * 257, 65535]], dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 5 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    assert pixels(path)[0, :, 1].tolist() == [0, 1, 1, 128, 255]


def test_16_bit_rgb_keeps_its_high_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 1 1 65535\n" + struct.pack(">HHH", 65535, 128 * 257, 255))
    assert pixels(path).tolist() == [[[255, 128, 1]]]


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.5]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: its pixels have no fixed range"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (5, 4), "white").convert(mode).save(path)
    assert pixels(path).shape == (4, 5, 3)
    assert pixels(path).min() >= 250


def test_one_pixel_goes_through_a_model_transform(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "a.png")
    for mode in ("squash", "crop"):
        out = ImageTransform(size=8, mode=mode)(read_image(tmp_path / "a.png"))  # type: ignore[arg-type]
        assert out.shape == (3, 8, 8)
        assert out[:, 3, 3].tolist() == [10, 20, 30]


@pytest.mark.parametrize("size", [(20_000, 20_000), (20_000, 5_000), (10_000, 9_000)])
def test_bombs_are_refused_from_their_header(tmp_path: Path, size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=rf"bomb\.png: .*{MAX_PIXELS:,} pixels"):
            read_image(png(tmp_path / "bomb.png", *size))


def test_20000_pixels_a_side_within_the_limit_are_read(tmp_path: Path) -> None:
    Image.new("L", (20_000, 200), 7).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png").size == (20_000, 200)


def test_a_hair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"hair\.png: 1 x 20000 is longer than {MAX_ASPECT}:1"):
        read_image(png(tmp_path / "hair.png", 1, 20_000))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set\.json, row 3: .*none\.png: no such file"):
        read_image(tmp_path / "none.png", where="set.json, row 3: ")


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_non_images_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png: not a picture"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"a\.{suffix}: (cannot be decoded|not a picture)"):
        read_image(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_image(tmp_path)
