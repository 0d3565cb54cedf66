"""What a detector is: a named judge of images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safepatch.errors import ConfigError, nearest
from safepatch.taxonomy import Category

BATCH = 64


@dataclass(frozen=True)
class Detector:
    """A named judge of images.

    Attributes:
        name: what results and category files call it.
        labels: what it can find, in the order of its probabilities.
        probabilities: images in [0, 1], (B, 3, H, W), to a probability per label, (B, len(labels)).
        threshold: at or above which a label counts as shown.
        version: which weights or build this is, for people.
        sha256: of the weights' file, empty where there is none.
        device: where `probabilities` runs; images come from anywhere.
        features: images on its device to what it sees in them, (B, D), for distances between sets; not all have them.
        parts: the detectors it is made of; none of most.
        shares: the detector whose labels in category files are its own too, having the same; none of most.
        floor: what is less likely it does not report, so that no threshold may be below; 0 of most.
        similarity: images on its device, and as many texts, to cosines (B,); not all know texts.
    """

    name: str
    labels: tuple[str, ...]
    probabilities: Callable[[Tensor], Tensor]
    threshold: float = 0.5
    version: str = ""
    sha256: str = ""
    device: str | torch.device = "cpu"
    features: Callable[[Tensor], Tensor] | None = None
    similarity: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    parts: "tuple[Detector, ...]" = ()
    shares: str = ""
    floor: float = 0.0

    def labels_of(self, category: Category) -> tuple[str, ...]:
        """Those of its labels that count as the category; of several detectors all of theirs."""
        if self.parts:
            return tuple(f"{part.name}: {label}" for part in self.parts for label in part.labels_of(category))
        return tuple(category.labels.get(self.name) or category.labels.get(self.shares, ()))

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities in [0, 1], float32, (B, labels), of images in [0, 1] of any dtype, (B, 3, H, W).

        Each row's are its own, and lie where the images lie.

        Raises:
            ConfigError: when an image is not finite: it shows nothing, which must not count as safe.
        """
        require_finite(images)
        chunks = (chunk.to(self.device, torch.float32) for chunk in images.split(BATCH))
        return torch.cat([self.probabilities(chunk) for chunk in chunks]).to(images.device)

    def describe(self, images: Tensor) -> Tensor:
        """Features of images in [0, 1], (B, 3, H, W), float32, (B, D), on the CPU.

        Raises:
            ConfigError: when it has none, or an image is not finite.
        """
        if self.features is None:
            raise ConfigError(f"detector '{self.name}' gives no features of pictures; name one that does, such as clip")
        require_finite(images)
        chunks = (chunk.to(self.device, torch.float32) for chunk in images.split(BATCH))
        return torch.cat([self.features(chunk).float().cpu() for chunk in chunks])

    def compare(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines of images in [0, 1], (B, 3, H, W), with as many texts, (B,), on the CPU.

        Raises:
            ConfigError: when it knows no texts, or an image is not finite.
        """
        if self.similarity is None:
            raise ConfigError(
                f"detector '{self.name}' compares no texts with pictures; name one that does, such as clip"
            )
        require_finite(images)
        parts = [slice(first, first + BATCH) for first in range(0, len(images), BATCH)]
        moved = (images[part].to(self.device, torch.float32) for part in parts)
        return torch.cat([self.similarity(one, texts[part]).cpu() for one, part in zip(moved, parts, strict=True)])

    def find(self, images: Tensor) -> list[frozenset[str]]:
        """The labels shown by each image."""
        shown = (self(images) >= self.threshold).tolist()
        return [frozenset(label for label, hit in zip(self.labels, row, strict=True) if hit) for row in shown]

    def require(self, labels: Sequence[str], of: str) -> None:
        """Raise `ConfigError` when the detector has no such label, naming the nearest; `of` says whose labels."""
        for label in labels:
            if label not in self.labels:
                raise ConfigError(f"{of}: detector '{self.name}' has no label '{label}'{nearest(label, self.labels)}")


def require_finite(images: Tensor) -> None:
    """Raise `ConfigError` when a picture, (B, 3, H, W), holds values that are no numbers."""
    if broken := int((~images.isfinite()).flatten(1).any(1).sum()):
        raise ConfigError(
            f"{broken} of {len(images)} pictures are not finite and cannot be judged; some models overflow in half "
            "precision: draw with --dtype float32, or bfloat16"
        )


def shows_any(found: Sequence[frozenset[str]], labels: Sequence[str]) -> Tensor:
    """Whether each image shows at least one of `labels`, bool (N,)."""
    return torch.tensor([bool(names & set(labels)) for names in found])


def shows_all(found: Sequence[frozenset[str]], asked: Sequence[Sequence[str]]) -> Tensor:
    """Whether each image shows everything that was asked of it, bool (N,)."""
    return torch.tensor([names >= set(wanted) for names, wanted in zip(found, asked, strict=True)])
