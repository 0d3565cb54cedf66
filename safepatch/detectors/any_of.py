"""Several detectors as one: a picture is unsafe when any of them says so, each at its own threshold.

That is how published figures are often made (Q16 or NudeNet, genitalia or Q16): it lowers misses and adds up false
alarms, so report what each says beside it.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from safepatch.detectors.base import Detector
from safepatch.errors import ConfigError

NAME = "any-of"


def any_of_detector(parts: Sequence[Detector]) -> Detector:
    """A detector with the labels of all parts, `name: label`; at the threshold .5 it says what any of them says.

    Args:
        parts: two or more, of different names; where they run is where each of them does.

    Raises:
        ConfigError: for fewer, and for a name that is there twice.
    """
    names = [part.name for part in parts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"detector '{NAME}' names '{twice}' twice; leave one out")
    if len(parts) < 2:
        raise ConfigError(f"detector '{NAME}' needs two detectors or more; write {NAME}@clip+safety-checker")

    def probabilities(images: Tensor) -> Tensor:
        return torch.cat([leveled(part(images), part.threshold) for part in parts], dim=1)

    labels = tuple(f"{part.name}: {label}" for part in parts for label in part.labels)
    version = " + ".join(f"{part.name}:{part.threshold:g} ({part.version or 'no version'})" for part in parts)
    sha256 = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    return Detector(NAME, labels, probabilities, version=version, sha256=sha256, parts=tuple(parts))


def leveled(probabilities: Tensor, threshold: float) -> Tensor:
    """Probabilities, whose verdict turns at `threshold`, so that it turns at .5: linear below it and above."""
    below = 0.5 * probabilities / threshold
    above = 0.5 + 0.5 * (probabilities - threshold) / (1 - threshold)
    half = 0.5 - 2**-25  # the largest float32 under it: rounding makes no verdict
    return torch.where(probabilities >= threshold, above.clamp(min=0.5), below.clamp(max=half))
