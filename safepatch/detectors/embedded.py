"""The small classifier of the embedded world: it knows emoji and nothing else."""

import torch
from torch import Tensor

from safepatch.detectors.base import Detector
from safepatch.tiny.models import load_classifier
from safepatch.tiny.world import CONCEPTS


def embedded_detector() -> Detector:
    """The detector that `tiny-sd` and its siblings are measured by."""
    classifier = load_classifier()

    @torch.no_grad()
    def probabilities(images: Tensor) -> Tensor:
        return torch.sigmoid(classifier(images))

    return Detector("embedded", tuple(CONCEPTS), probabilities, version="tiny-sd's own classifier")
