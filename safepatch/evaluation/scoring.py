"""How good is a judge? Recall, precision and false alarms of a detector on pictures that somebody has labelled."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from safepatch.data.pictures import UNREADABLE, upright
from safepatch.detectors.base import Detector
from safepatch.errors import ConfigError
from safepatch.evaluation.metrics import Estimate, precision, rate, recall
from safepatch.progress import bar

UNSAFE, SAFE = "unsafe", "safe"  # folders of a labelled folder
SWEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Score(NamedTuple):
    """A detector's figures at one threshold.

    Attributes:
        threshold: from which probability on a picture counts as unsafe.
        recall: share of the unsafe pictures that are found.
        precision: share of the findings that are unsafe; None where nothing is found.
        false_alarms: share of the safe pictures that are found.
    """

    threshold: float
    recall: Estimate
    precision: Estimate | None
    false_alarms: Estimate


def score(detector: Detector, labels: Sequence[str], folder: Path) -> list[Score]:
    """The figures at the detector's own threshold, which come first, and at those of `SWEEP` from its floor on.

    Of a detector made of several, whose thresholds are its parts', at its own alone.

    Args:
        detector: what is scored.
        labels: those of its labels that count as unsafe.
        folder: holds `unsafe` and `safe`, folders of pictures of any size.

    Raises:
        ConfigError: for a folder without pictures, and a picture that cannot be read.
    """
    unsafe, safe = (pictures(Path(folder) / name) for name in (UNSAFE, SAFE))
    wanted = [detector.labels.index(label) for label in labels]
    found = [
        float(detector(picture(path))[0, wanted].max())
        for path in bar([*unsafe, *safe], desc="judging", unit="picture", leave=False)
    ]
    certain, truth = torch.tensor(found), torch.arange(len(found)) < len(unsafe)
    swept = [] if detector.parts else [threshold for threshold in SWEEP if threshold >= detector.floor]
    return [_at(threshold, certain, truth) for threshold in (detector.threshold, *swept)]


def lines(scores: Sequence[Score]) -> list[str]:
    """As a markdown table, the detector's own threshold first."""
    head = ["| threshold | recall | precision | false alarms |", "| --- | --- | --- | --- |"]
    made = []
    for number, each in enumerate(scores):
        figures = [shown(figure) for figure in (each.recall, each.precision, each.false_alarms)]
        made.append(f"| {each.threshold:g}{' (its own)' if number == 0 else ''} | {' | '.join(figures)} |")
    return [*head, *made]


def _at(threshold: float, certain: Tensor, truth: Tensor) -> Score:
    flags = certain >= threshold
    found = precision(truth, flags) if flags.any() else None
    return Score(threshold, recall(truth, flags), found, rate(flags[~truth]))


def shown(figure: Estimate | None) -> str:
    """A figure with its interval, for tables."""
    return "nothing found" if figure is None else f"{figure.value:.3f} [{figure.low:.2f}, {figure.high:.2f}]"


def pictures(folder: Path) -> list[Path]:
    """The files of pictures in a folder and below it, sorted; raises `ConfigError` when there are none."""
    known = Image.registered_extensions()
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known) if folder.is_dir() else []
    if not found:
        raise ConfigError(f"no pictures in {folder}; a labelled folder holds pictures in {UNSAFE}/ and in {SAFE}/")
    return found


def picture(path: Path) -> Tensor:
    """A picture in [0, 1], (1, 3, H, W); raises `ConfigError` when it cannot be read."""
    try:
        image = upright(path)
    except UNREADABLE as error:
        raise ConfigError(f"cannot read {path} as a picture ({error}); remove it from the labelled folder") from error
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255
