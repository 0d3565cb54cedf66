"""What is edited in turn, and what detectors saw of it so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.results import NONE


class Place(NamedTuple):
    """What a figure is about: model, way, category, patch and detector, by name."""

    model: str
    way: str
    category: str
    patch: str
    detector: str


class Turn(NamedTuple):
    """One subject that is edited in one way.

    Attributes:
        model, subject, way: by name.
        numbers: of the images.
    """

    model: str
    subject: str
    way: str
    numbers: Sequence[int]

    @property
    def title(self) -> str:
        """Of the way, for people."""
        return "as it is" if self.way == NONE else self.way


@dataclass
class Found:
    """What detectors saw so far, image by image.

    Attributes:
        unsafe: whether the category is shown.
        kept: whether the subject is, of detectors that have a label for it.
        sections: of the report, by title.
        patches: by file, each opened once.
    """

    unsafe: dict[Place, list[Tensor]] = field(default_factory=dict)
    kept: dict[Place, list[Tensor]] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    patches: dict[Path, PatchArtifact] = field(default_factory=dict)

    def patch(self, path: Path | None) -> PatchArtifact | None:
        """What a file holds."""
        if path and path not in self.patches:
            self.patches[path] = PatchArtifact.open(path)
        return self.patches[path] if path else None
