"""Picture files, which come from anywhere, to RGB pictures."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from fastmat.errors import UserError

# Decoders that need no other program; Pillow's EPS reader, for one, would start Ghostscript on a stranger's file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

# 8,192 x 8,192 in RGB is 192 MiB per worker. Below the size at which Pillow itself warns of a decompression bomb.
MAX_PIXELS = 2**26

# Resizing the short side to a model's 224 px multiplies the long one: at 100:1 still 15 MB.
MAX_ASPECT = 100


def read_image(path: Path, *, where: str = "") -> Image.Image:
    """Decode `path` to an RGB picture, at the orientation it is stored in, as the published loaders do.

    Transparency is composited on white, 16-bit grey is scaled to 8 bits, the first frame of an animation is taken.

    where: put before the path in messages ("test.json, row 3: ").

    Raises UserError naming the file: missing, no picture, truncated, above MAX_PIXELS or MAX_ASPECT.
    """
    return _decode(path, f"{where}{path}")


def decode_image(data: bytes, *, name: str) -> Image.Image:
    """The picture in `data`, as `read_image` decodes a file; `name` is put before what is wrong with it."""
    return _decode(io.BytesIO(data), name)


def _decode(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        # Pillow warns of large pictures, refused below, and of odd metadata, which nobody reads.
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as image:
            _check_size(image.size, name)  # only the header has been read so far
            image.load()
            return _to_rgb(image, name)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; check the image folder and the annotation") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more than {MAX_PIXELS:,} pixels; shrink the picture first") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not a picture; expected one of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise nearly anything on a damaged file
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
        raise UserError(f"{name}: cannot be decoded ({error}); the file is damaged, fetch it again") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name}: {width} x {height} is more than the {MAX_PIXELS:,} pixels allowed; shrink the picture first"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise UserError(f"{name}: {width} x {height} is longer than {MAX_ASPECT}:1; crop the picture first")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image, name)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey, scaled: Pillow's own conversion would clip every value above 255 to white."""
    values = np.asarray(image)
    if values.dtype.kind not in "ui" or values.min() < 0 or values.max() > 65535:
        raise UserError(f"{name}: its pixels have no fixed range (mode {image.mode}); save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
