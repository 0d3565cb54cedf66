"""The small classifiers of the embedded world, two that learned apart: they know emoji and nothing else."""

import torch
from torch import Tensor

from safepatch.detectors.base import Detector
from safepatch.tiny.models import load_classifier, load_second
from safepatch.tiny.world import CONCEPTS


def embedded_detector() -> Detector:
    """The detector that `tiny-sd` and its siblings are measured by."""
    classifier = load_classifier()

    @torch.no_grad()
    def probabilities(images: Tensor) -> Tensor:
        return torch.sigmoid(classifier(images))

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        maps = classifier.features(images * 2 - 1)
        return torch.cat((maps.mean((2, 3)), maps.amax((2, 3))), dim=1)

    return Detector("embedded", tuple(CONCEPTS), probabilities, version="tiny-sd's own classifier", features=features)


def second_detector() -> Detector:
    """Another judge of the same things: other architecture, seed and art; see `safepatch.tiny.second`."""
    classifier = load_second()

    @torch.no_grad()
    def probabilities(images: Tensor) -> Tensor:
        return torch.sigmoid(classifier(images))

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return classifier.features(images * 2 - 1).mean((2, 3))

    about = "a second classifier, of other art"
    return Detector("embedded-second", tuple(CONCEPTS), probabilities, version=about, features=features)
