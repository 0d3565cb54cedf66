"""Head to head: patches that are trained alike but for some settings, measured on the same pictures, on one page.

What is finished is not done again: patches are kept in `train/` below the run's folder, with the minutes they took, and
their figures as those of any matrix.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from safepatch.config import load_config
from safepatch.errors import ConfigError
from safepatch.evaluation.bench import Protocol
from safepatch.evaluation.matrix import Matrix, PatchEntry
from safepatch.evaluation.run import run_matrix
from safepatch.files import write_text
from safepatch.reporting.html import build_report
from safepatch.results import NONE, Row, write_rows
from safepatch.training.config import TrainConfig, load_train_config
from safepatch.training.trainer import train

MINUTES = "minutes.json"  # beside a patch: how long it took


@dataclass(frozen=True)
class Comparison:
    """What is compared, as a file says it.

    Attributes:
        model: what all patches are trained on.
        variants: by name, the settings of its own that each has, `key=value` as `safepatch train` takes them.
        categories: names or files; each variant is trained for each.
        settings: of all of them.
        models: what they are measured on; `model` by default.
        metrics, detectors, attacks, protocol, pictures, device, dtype: as in a `Matrix`.
        out: folder of patches, rows and the page.
    """

    model: str = MISSING
    variants: dict[str, list[str]] = MISSING
    categories: list[str] = MISSING
    settings: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    detectors: list[str] = field(default_factory=list)
    attacks: list[str] = field(default_factory=list)
    protocol: Protocol = field(default_factory=Protocol)
    pictures: int = 4
    device: str = "cpu"
    dtype: str | None = None
    out: str = "runs/compare"

    def __post_init__(self) -> None:
        """Refuse what compares nothing, or would end in one folder."""
        if not self.variants or not self.categories:
            raise ConfigError("a comparison needs variants and categories; name one of each at least")
        if bad := next((name for name in self.variants if not name.strip() or Path(name).name != name), None):
            raise ConfigError(f"'{bad}' cannot name a folder; call that variant otherwise")

    def config(self, variant: str, category: str) -> TrainConfig:
        """How a variant is trained for a category; raises `ConfigError` for a setting that there is not."""
        own = [f"category={category}", f"model={self.model}", *self.settings, *self.variants[variant]]
        return load_train_config(None, [*own, f"output={self.folder(variant, category)}"])

    def folder(self, variant: str, category: str) -> Path:
        """Where that is trained."""
        return Path(self.out) / "train" / variant / Path(category).stem

    def matrix(self, patches: Sequence[PatchEntry]) -> Matrix:
        """What is measured of the patches."""
        return Matrix(
            models=self.models or [self.model],
            patches=list(patches),
            categories=self.categories,
            metrics=self.metrics,
            detectors=self.detectors,
            attacks=self.attacks,
            protocol=self.protocol,
            pictures=self.pictures,
            device=self.device,
            dtype=self.dtype,
            out=self.out,
        )


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """The comparison of a YAML file, with `key=value` overrides.

    Raises:
        ConfigError: for anything unknown, missing, unreadable or of a wrong type.
    """
    return load_config(Comparison, path, overrides)


def compare(comparison: Comparison, tell: Callable[[str], object] = print) -> list[Row]:
    """Train what is not trained yet, measure what is not measured yet, and write rows and page into the folder.

    Raises:
        SafepatchError: for whatever training or evaluation refuses; every variant's settings are read first.
    """
    plans = {name: [comparison.config(name, category) for category in comparison.categories]
             for name in comparison.variants}  # fmt: skip
    entries, minutes = list[PatchEntry](), list[Row]()
    for name, configs in plans.items():
        paths = []
        for config in configs:
            tell(f"training {name} for {config.category}")
            path, took = _trained(config)
            paths.append(str(path))
            minutes.append(_row(comparison, name, path.stem, took))
        entries.append(PatchEntry(name, paths=paths))
    rows = [*run_matrix(comparison.matrix(entries), tell=tell), *minutes]
    write_rows(Path(comparison.out) / "rows.jsonl", rows)
    build_report(Path(comparison.out))
    return rows


def _trained(config: TrainConfig) -> tuple[Path, float]:
    """The patch's file, and the minutes it took when it was trained."""
    start, kept = time.monotonic(), Path(str(config.output)) / MINUTES
    path = train(config.load_model(), config)
    if not kept.is_file():
        write_text(kept, json.dumps((time.monotonic() - start) / 60) + "\n")
    return path, float(json.loads(kept.read_text()))


def _row(comparison: Comparison, name: str, category: str, minutes: float) -> Row:
    rest = {"attack": NONE, "n": 1, "seed": comparison.protocol.seed, "detector": NONE}
    value = {"value": minutes, "low": minutes, "high": minutes}
    return Row(patch=name, base=comparison.model, category=category, metric="train_minutes", **value, **rest)
