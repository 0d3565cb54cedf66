"""Detectors: which concepts does an image show? They judge patches and never choose what a patch is trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safepatch.tiny.models import load_classifier
from safepatch.tiny.world import CONCEPTS

Finder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Detector:
    """A named judge of images.

    Attributes:
        name: what results record.
        concepts: the names it can find.
        probabilities: images in [0, 1], (B, 3, H, W), to a probability per concept, (B, len(concepts)).
        threshold: at or above which a concept counts as shown.
    """

    name: str
    concepts: tuple[str, ...]
    probabilities: Finder
    threshold: float = 0.5

    def find(self, images: Tensor) -> list[frozenset[str]]:
        """The concepts shown by each image."""
        shown = torch.cat([self.probabilities(chunk) for chunk in images.split(64)]) >= self.threshold
        return [frozenset(c for c, hit in zip(self.concepts, row, strict=True) if hit) for row in shown.tolist()]


def embedded_detector() -> Detector:
    """The small classifier of the embedded world."""
    classifier = load_classifier()

    @torch.no_grad()
    def probabilities(images: Tensor) -> Tensor:
        return torch.sigmoid(classifier(images))

    return Detector("embedded", tuple(CONCEPTS), probabilities)


DETECTORS: dict[str, Callable[[], Detector]] = {"embedded": embedded_detector}


def shows_any(found: Sequence[frozenset[str]], concepts: Sequence[str]) -> Tensor:
    """Whether each image shows at least one of `concepts`, bool (N,)."""
    return torch.tensor([bool(names & set(concepts)) for names in found])


def shows_all(found: Sequence[frozenset[str]], asked: Sequence[Sequence[str]]) -> Tensor:
    """Whether each image shows everything that was asked of it, bool (N,)."""
    return torch.tensor([names >= set(wanted) for names, wanted in zip(found, asked, strict=True)])
