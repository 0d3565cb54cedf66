"""Head to head: patches that are trained alike but for some settings, measured on the same pictures, on one page.

What is finished is not done again: patches are kept in `train/` below the run's folder, with the minutes they took, and
their figures as those of any matrix.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from omegaconf import MISSING

from safepatch.config import assigned, load_config
from safepatch.errors import ConfigError
from safepatch.evaluation.matrix import Matrix, MergeEntry, PatchEntry
from safepatch.evaluation.run import run_matrix
from safepatch.files import write_text
from safepatch.reporting.html import build_report
from safepatch.results import NONE, Row, write_rows
from safepatch.training.config import TrainConfig, load_train_config
from safepatch.training.folder import RunFolder
from safepatch.training.trainer import train

MINUTES = "minutes.json"  # beside a patch: how long it took


@dataclass(frozen=True)
class Comparison:
    """What is compared, as a file says it.

    Attributes:
        model: what all patches are trained on.
        variants: by name, the settings of its own that each has, `key=value` as `safepatch train` takes them.
        categories: names or files; each variant is trained for each, and measured on all.
        settings: of all of them.
        beside: patch files; each variant is also measured in a bundle with them.
        measure: on which models, by which metrics, attacks and so on: a `Matrix` whose `models` are `model` by default,
            whose `patches` are measured too, and into whose folder, `out`, the variants are trained.
    """

    model: str = MISSING
    variants: dict[str, list[str]] = MISSING
    categories: list[str] = MISSING
    settings: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    measure: Matrix = field(default_factory=lambda: Matrix(models=[], out="runs/compare"))

    def __post_init__(self) -> None:
        """Refuse what compares nothing, or would end in one folder."""
        if not self.variants or not self.categories:
            raise ConfigError("a comparison needs variants and categories; name one of each at least")
        if bad := next((name for name in self.variants if not name.strip() or Path(name).name != name), None):
            raise ConfigError(f"'{bad}' cannot name a folder; call that variant otherwise")
        if self.measure.categories:
            raise ConfigError("measure.categories are those of the comparison; name them in categories alone")

    def config(self, variant: str, category: str) -> TrainConfig:
        """How a variant is trained for a category; raises `ConfigError` for a setting that there is not."""
        own = [assigned("category", category), assigned("model", self.model), *self.settings, *self.variants[variant]]
        return load_train_config(None, [*own, assigned("output", self.folder(variant, category))])

    def folder(self, variant: str, category: str) -> Path:
        """Where that is trained."""
        return Path(self.measure.out) / "train" / variant / Path(category).stem

    def matrix(self, trained: Mapping[str, Sequence[str]]) -> Matrix:
        """What is measured, of the variants' files by name."""
        own = [PatchEntry(name, paths=[*files]) for name, files in trained.items()]
        bundles = [
            PatchEntry(f"{name}, in a bundle", merge=MergeEntry(sources=[*files, *self.beside]))
            for name, files in trained.items()
            if self.beside
        ]
        return replace(
            self.measure,
            models=self.measure.models or [self.model],
            patches=[*own, *bundles, *self.measure.patches],
            categories=self.categories,
        )


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """The comparison of a YAML file, with `key=value` overrides.

    Raises:
        ConfigError: for anything unknown, missing, unreadable or of a wrong type.
    """
    try:
        return load_config(Comparison, path, overrides)
    except ConfigError as error:
        moved = next((each.name for each in fields(Matrix) if f"unknown key '{each.name}' in" in str(error)), None)
        if moved is None:
            raise
        raise ConfigError(f"{path}: '{moved}' stands under measure now: measure.{moved}") from None


def compare(comparison: Comparison, tell: Callable[[str], object] = print) -> list[Row]:
    """Train what is not trained yet, measure what is not measured yet, and write rows and page into the folder.

    Raises:
        SafepatchError: for whatever training or evaluation refuses; every variant's settings are read first.
    """
    plans = {name: [comparison.config(name, category) for category in comparison.categories]
             for name in comparison.variants}  # fmt: skip
    trained, minutes = dict[str, list[str]](), list[Row]()
    for name, configs in plans.items():
        trained[name] = []
        for config in configs:
            tell(f"training {name} for {config.category}")
            path, took = _trained(config)
            trained[name].append(str(path))
            minutes += [] if took is None else [_row(comparison, name, path.stem, took)]
    matrix = comparison.matrix(trained)
    rows = [*run_matrix(matrix, tell=tell), *minutes]
    write_rows(Path(matrix.out) / "rows.jsonl", rows)
    build_report(Path(matrix.out))
    return rows


def _trained(config: TrainConfig) -> tuple[Path, float | None]:
    """The patch's file, and the minutes it took, those before it was stopped among them; None if some were not counted.

    That is where a run was killed, or was not begun by a comparison.
    """
    folder = RunFolder(Path(str(config.output)))
    kept, has_file = folder.path / MINUTES, any(folder.path.glob("*.safetensors"))
    has_begun, is_counted = has_file or folder.checkpoint.is_file(), kept.is_file()
    is_done = has_file and not folder.checkpoint.is_file()
    before = float(json.loads(kept.read_text())) if is_counted else 0.0
    pipe, start = config.load_model(), time.monotonic()
    try:
        path = train(pipe, config)
    finally:
        if folder.path.is_dir() and not is_done and (is_counted or not has_begun):
            write_text(kept, json.dumps(before + (time.monotonic() - start) / 60) + "\n")
    return path, float(json.loads(kept.read_text())) if kept.is_file() else None


def _row(comparison: Comparison, name: str, category: str, minutes: float) -> Row:
    rest = {"attack": NONE, "n": 1, "seed": comparison.measure.protocol.seed, "detector": NONE}
    value = {"value": minutes, "low": minutes, "high": minutes}
    return Row(patch=name, base=comparison.model, category=category, metric="train_minutes", **value, **rest)
