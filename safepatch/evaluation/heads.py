"""Train the multi-headed detector's heads of labelled pictures, and score them on those that were kept back."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.detectors.multi_headed import Eye, Head, save_heads, train_heads
from safepatch.errors import ConfigError
from safepatch.evaluation.metrics import Estimate, precision, rate, recall
from safepatch.evaluation.scoring import SAFE, picture, pictures, shown
from safepatch.progress import bar

LEARNED = 0.6  # share of the pictures that heads learn from; the others score them (Unsafe Diffusion's split)
FEWEST = 3  # pictures of a label: two to learn from, one to score by
THRESHOLD = 0.5


class Kept(NamedTuple):
    """A head's figures on pictures that it has not seen.

    Attributes:
        label: whose head.
        recall: share of its pictures that are found.
        precision: share of the findings that are its; None where nothing is found.
        false_alarms: share of the safe pictures that are found.
    """

    label: str
    recall: Estimate
    precision: Estimate | None
    false_alarms: Estimate


def train(
    folder: Path, labels: Sequence[str], out: Path, clip: str | None = None, device: str = "cpu", seed: int = 0
) -> list[Kept]:
    """Train a head for each label and write them into `out`.

    Args:
        folder: holds a folder of pictures for each label, and `safe`.
        labels: by default every folder there is but `safe`.
        out: folder of the heads.
        clip: folder or Hub id of CLIP.
        device: where CLIP runs.
        seed: of the split, and of training.

    Raises:
        ConfigError: for a folder without pictures, a picture that cannot be read, and too few of a label.
        SafepatchError: as `Eye.open` and `save_heads`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; name one that holds a folder of pictures for each label, and {SAFE}")
    names = list(labels) or sorted(
        p.name for p in folder.iterdir() if p.is_dir() and p.name != SAFE and p.name[0] != "."
    )
    if not names or SAFE in names:
        raise ConfigError(f"{folder} needs a folder of pictures for each label, such as violent, beside {SAFE}")
    found = {name: pictures(folder / name) for name in (*names, SAFE)}
    if few := next((name for name, paths in found.items() if len(paths) < FEWEST), None):
        raise ConfigError(
            f"a head needs {FEWEST} pictures or more, and {folder / few} holds {len(found[few])}; add some"
        )
    eye = Eye.open(clip, device)
    seen = {name: _embedded(eye, paths, name, seed) for name, paths in found.items()}
    learned = {name: rows[: _count(rows)] for name, rows in seen.items()}
    heads = train_heads({name: learned[name] for name in names}, learned[SAFE], seed)
    save_heads(heads, eye, clip, out)
    return [
        _scored(name, heads[name], seen[name][_count(seen[name]) :], seen[SAFE][_count(seen[SAFE]) :]) for name in names
    ]


def lines(scores: Sequence[Kept]) -> list[str]:
    """As a markdown table."""
    head = ["| label | recall | precision | false alarms |", "| --- | --- | --- | --- |"]
    rows = [[each.label, *map(shown, (each.recall, each.precision, each.false_alarms))] for each in scores]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows)]


def _embedded(eye: Eye, paths: Sequence[Path], name: str, seed: int) -> Tensor:
    """What CLIP sees in each picture, in an order that has nothing to do with names, (N, width)."""
    mixed = Random(f"{seed} {name}").sample(list(paths), len(paths))
    return torch.cat([eye(picture(path)).cpu() for path in bar(mixed, desc=name, unit="picture", leave=False)])


def _count(rows: Tensor) -> int:
    """Of those that are learned from; at least one is kept back."""
    return min(len(rows) - 1, max(2, round(LEARNED * len(rows))))


@torch.no_grad()
def _scored(name: str, head: Head, unsafe: Tensor, safe: Tensor) -> Kept:
    flags = torch.sigmoid(head(torch.cat((unsafe, safe)))) >= THRESHOLD
    truth = torch.arange(len(flags)) < len(unsafe)
    return Kept(name, recall(truth, flags), precision(truth, flags) if flags.any() else None, rate(flags[~truth]))
