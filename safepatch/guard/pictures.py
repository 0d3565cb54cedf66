"""What a text's picture shows: a detector's verdict, where a model has drawn it."""

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from safepatch.data.corpus import Corpus
from safepatch.detectors import open_detector, parse_detector
from safepatch.detectors.base import Detector
from safepatch.diffusion import batched, drawn_together, generate, quiet
from safepatch.errors import ConfigError
from safepatch.guard.texts import NO, UNSURE, YES
from safepatch.progress import bar

MOST = 16  # pictures drawn at once, of a model whose pictures are small
CLEAR = 0.5  # of a detector's threshold: a probability below is a no, one between says nothing


def seen(pipe: Any, detector: Detector, steps: int, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """What a detector sees in the pictures that a pipeline makes of texts: probabilities of its labels, (N, labels)."""
    found = []
    with bar(total=len(texts), desc="drawing", unit="picture", leave=False) as shown:
        for part in batched(len(texts), drawn_together(pipe, MOST)):
            found.append(detector(generate(pipe, [texts[i] for i in part], [seeds[i] for i in part], steps)))
            shown.update(len(part))
    return torch.cat(found)


class Pictures:
    """A labeler, see `Labeler`: a detector's verdict on the pictures of some texts; of the rest it knows nothing.

    Args:
        pipe: that draws, without a patch.
        detector: that sees.
        columns: of each category, the places of its labels among the detector's.
        n: texts of which a picture is drawn, at most.
        steps: of denoising.
        seed: by which they are chosen, and of their noise.
    """

    name = "pictures"

    def __init__(
        self, pipe: Any, detector: Detector, columns: Sequence[Sequence[int]], n: int, steps: int, seed: int
    ) -> None:
        self._pipe, self._detector, self._columns = pipe, detector, columns
        self._n, self._steps, self._seed = n, steps, seed

    @classmethod
    def of(cls, pipe: Any, corpora: Sequence[Corpus], detector: str, n: int, steps: int, seed: int) -> "Pictures":
        """With a detector as it is named on the command line.

        Raises:
            ConfigError: without a pipeline, or where the detector cannot see a category.
        """
        if pipe is None:
            raise ConfigError("a detector votes by what a model draws; give --model")
        categories = [corpus.category for corpus in corpora]
        opened = open_detector(parse_detector(detector), categories, pipe.device)
        columns = [[opened.labels.index(label) for label in opened.labels_of(each)] for each in categories]
        return cls(quiet(pipe), opened, columns, n, steps, seed)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See `Labeler`."""
        votes = torch.full((len(texts), len(self._columns)), UNSURE, dtype=torch.int8)
        drawable = [i for i, text in enumerate(texts) if text.strip()]
        some = Random(f"pictures {self._seed}").sample(drawable, min(self._n, len(drawable)))
        drawn, seeds = [texts[i] for i in some], [self._seed + i for i in some]
        chances = seen(self._pipe, self._detector, self._steps, drawn, seeds)
        for column, places in enumerate(self._columns):
            votes[some, column] = self._votes(chances[:, places].amax(1))
        return votes

    def _votes(self, chances: Tensor) -> Tensor:
        clear = torch.where(chances < CLEAR * self._detector.threshold, NO, UNSURE)
        return torch.where(chances >= self._detector.threshold, YES, clear).to(torch.int8)
