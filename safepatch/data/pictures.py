"""Pictures in files, as people see them."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

# What reading a file that is no picture, or a damaged or enormous one, may raise: PIL's, of broken PNGs too.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def upright(file: Path | BinaryIO) -> Image.Image:
    """The picture in a file, red, green and blue, turned as its camera says (EXIF); raises one of `UNREADABLE`."""
    with Image.open(file) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")
