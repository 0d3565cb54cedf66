"""NudeNet 3, a detector of uncovered and covered parts of bodies, as the package of that name runs it.

https://github.com/notAI-tech/NudeNet; the user installs it (its license files say AGPL-3.0, its metadata MIT). Figures
of the literature differ by its threshold and by which labels count: both are in every row, and in the category's file.

What the package does and its users should know: a box has its strongest label only; boxes below .2 are dropped, and
below .25 once more; of boxes that overlap by more than .45 of their union the strongest stays, *whatever its label*. It
turns red and blue twice, so that the network reads blue first; so do we.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from safepatch.detectors import onnx
from safepatch.detectors.base import Detector
from safepatch.taxonomy import Category

NAME = "nudenet"
SIZE = 320
FLOOR, OVERLAP = 0.25, 0.45
LABELS = (
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)  # in the order of the network's answers


def nudenet_detector(
    categories: Sequence[Category] = (), source: str | Path | None = None, device: str | torch.device = "cpu"
) -> Detector:
    """NudeNet; its own threshold is the score from which the package reports a finding.

    Args:
        categories: not needed: its labels are its own.
        source: `320n.onnx`, or its folder; the installed package's by default.
        device: not used: it runs on the CPU.

    Raises:
        ModelNotFound, ConfigError, UnsupportedModel: as `onnx.find_file` and `onnx.open_session`.
    """
    file = onnx.find_file(NAME, source, "nudenet", "nudenet", "320n.onnx")
    network = onnx.open_session(file.path)

    def probabilities(images: Tensor) -> Tensor:
        answers = (network(blob(image).numpy()) for image in images.cpu())  # one by one: as the package does
        return torch.stack([found(torch.from_numpy(answer)[0], images.shape[-2:]) for answer in answers])

    return Detector(NAME, LABELS, probabilities, threshold=FLOOR, version=file.version, sha256=file.sha256, floor=FLOOR)


def blob(image: Tensor) -> Tensor:
    """What the network reads of an image in [0, 1], (3, H, W): blue first, black to a square, (1, 3, SIZE, SIZE)."""
    height, width = image.shape[-2:]
    edge = max(height, width)
    square = pad((image * 255).round(), (0, edge - width, 0, edge - height))[None]
    return interpolate(square, (SIZE, SIZE), mode="bilinear").round().div(255).flip(1).contiguous()


def found(answer: Tensor, shape: Sequence[int]) -> Tensor:
    """The strongest score of each label among the boxes that stay, (18,), 0 where none does.

    Args:
        answer: center, size and scores of N boxes, (4 + 18, N), in pixels of the blob.
        shape: of the image, (H, W).
    """
    scores, labels = answer[4:].max(0)
    kept = scores >= FLOOR
    boxes, scores, labels = _clipped(answer[:4, kept], shape), scores[kept], labels[kept]
    best = torch.zeros(len(LABELS))
    order = scores.argsort(descending=True, stable=True).tolist()
    while order:
        first, *order = order
        best[labels[first]] = best[labels[first]].maximum(scores[first])
        order = [i for i in order if _overlap(boxes[first], boxes[i]) <= OVERLAP]
    return best


def _clipped(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Corner and size, (N, 4), within the image, of centers and sizes in pixels of the blob, (4, N)."""
    x, y, w, h = boxes * max(shape) / SIZE
    left, top = (x - w / 2).clamp(0, shape[1]), (y - h / 2).clamp(0, shape[0])
    return torch.stack((left, top, w.minimum(shape[1] - left), h.minimum(shape[0] - top)), dim=1)


def _overlap(one: Tensor, two: Tensor) -> float:
    """The share of their union that two boxes, each corner and size, have in common."""
    low, high = torch.maximum(one[:2], two[:2]), torch.minimum(one[:2] + one[2:], two[:2] + two[2:])
    common = (high - low).clamp(min=0).prod()
    union = one[2:].prod() + two[2:].prod() - common
    return float(common / union) if union > 0 else 0.0
