"""What to measure, as a value: models x patches x categories x detectors, from a YAML file or from code."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from safepatch.artifact.info import BUNDLE, PatchInfo, read_info
from safepatch.attacks import parse_attack
from safepatch.config import load_config
from safepatch.data.category import category_path
from safepatch.data.corpus import Corpus
from safepatch.detectors import Pictures, misfit, parse_detector
from safepatch.errors import ConfigError, lookup
from safepatch.evaluation.bench import Protocol
from safepatch.evaluation.suite import MEASURES, USUAL
from safepatch.merging import MergeRecipe
from safepatch.models.load import MODELS, ModelConfig, dtype_of
from safepatch.results import NONE, TOY
from safepatch.shipped import shipped_patches

EMBEDDED = "embedded"  # the detector of the embedded models


@dataclass(frozen=True)
class MergeEntry:
    """A merge that is made to be measured; it is kept, and made once.

    Attributes:
        sources: patch files.
        shipped: instead of them, a kind: the shipped patches of that kind for the matrix's categories.
        method, weights, density, rank, seed, heal: as in `MergeRecipe`.
    """

    sources: list[str] = field(default_factory=list)
    shipped: str | None = None
    method: str = BUNDLE
    weights: list[float] = field(default_factory=list)
    density: float = 0.5
    rank: int = 0
    seed: int = 0
    heal: int = 0

    def recipe(self, sources: Sequence[str | Path]) -> MergeRecipe:
        """The recipe over `sources`; raises `MergeError` for what cannot be merged."""
        options = {name: getattr(self, name) for name in ("method", "density", "rank", "seed", "heal")}
        return MergeRecipe(tuple(map(str, sources)), tuple(self.weights), conflicts=False, **options)


@dataclass(frozen=True)
class PatchEntry:
    """A patch of a matrix: exactly one of `path`, `paths`, `shipped` and `merge` says which.

    Attributes:
        name: in rows and tables.
        path: its file, measured on every category.
        paths: files; a category is measured with the first that is for it.
        shipped: a kind; a category is measured with its own shipped patch of that kind.
        merge: a merge, measured on every category.
        absolute: the embedded name or path of the model that the patch was trained on: its weights are put onto the
            model as they were there, not moved along with it.
    """

    name: str = MISSING
    path: str | None = None
    paths: list[str] = field(default_factory=list)
    shipped: str | None = None
    merge: MergeEntry | None = None
    absolute: str | None = None

    def __post_init__(self) -> None:
        """Refuse what names no patch, or several."""
        given = [name for name in ("path", "paths", "shipped", "merge") if getattr(self, name)]
        if len(given) != 1:
            what = f"both {' and '.join(given)}" if given else "none of them"
            raise ConfigError(f"patch '{self.name}' needs one of path, paths, shipped and merge; it has {what}")
        if self.name == NONE:
            raise ConfigError(f"'{NONE}' is the base without a patch, which is always measured; choose another name")


@dataclass(frozen=True)
class Matrix:
    """What to measure; the base without a patch is always measured too.

    Attributes:
        models: names, folders or files.
        transfer: further models, on which only `unsafe_rate` is measured.
        patches: what is put on them.
        categories: names of shipped ones or files; by default those that the patches are for.
        metrics: keys of `MEASURES`; the usual ones by default.
        detectors: `name[:threshold][@weights]`; by default `embedded` on embedded models, and no detector on others.
        attacks: `name[+gate][:budget]`, on `models`; a detector judges them.
        protocol: how images are made.
        pictures: how many of each prompt set are kept for the report.
        device, dtype: where models run, and in what.
        tokenizer, prediction_type, allow_pickle: of models that are single files, as in `load_pipeline`.
        out: folder of rows, pictures, merges and the report.
    """

    models: list[str] = MISSING
    transfer: list[str] = field(default_factory=list)
    patches: list[PatchEntry] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    detectors: list[str] = field(default_factory=list)
    attacks: list[str] = field(default_factory=list)
    protocol: Protocol = field(default_factory=Protocol)
    pictures: int = 4
    device: str = "cpu"
    dtype: str | None = None
    tokenizer: str | None = None
    prediction_type: str | None = None
    allow_pickle: bool = False
    out: str = "runs/evaluate"

    def __post_init__(self) -> None:
        """Refuse what names nothing there is, before anything is drawn."""
        for metric in self.metrics:
            lookup(MEASURES, metric, what="metric")
        for detector in self.detectors:
            parse_detector(detector)
        for attack in self.attacks:
            parse_attack(attack)
        dtype_of(self.dtype)
        named = {
            "model": self.every_model,
            "patch": [patch.name for patch in self.patches],
            "attack": [parse_attack(attack).label for attack in self.attacks],
            "detector": self.detectors,
            "metric": self.metrics,
        }
        for name, values in named.items():
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ConfigError(f"{name} '{twice}' is in the matrix twice; leave one out")

    @property
    def every_model(self) -> tuple[str, ...]:
        """Those of `models`, then those of `transfer`."""
        return (*self.models, *self.transfer)

    def metrics_on(self, model: str) -> tuple[str, ...]:
        """What is measured on a model."""
        metrics = tuple(self.metrics) or USUAL
        return tuple(name for name in metrics if name == "unsafe_rate") if model in self.transfer else metrics

    def detectors_on(self, model: str) -> tuple[str, ...]:
        """The detectors that judge a model's pictures; one that was not made for them only if it was named."""
        return tuple(self.detectors) or ((EMBEDDED,) if model in MODELS else ())

    def model(self, name: str) -> ModelConfig:
        """How to open a model."""
        return ModelConfig(name, self.tokenizer, self.dtype, self.prediction_type, self.allow_pickle)

    def corpora(self) -> dict[str, Corpus]:
        """The categories' words, by name.

        Raises:
            ConfigError: for a category that is neither shipped nor a file.
        """
        opened = [Corpus.open(name) for name in self.categories or self._own_categories()]
        return {corpus.name: corpus for corpus in opened}

    def notices(self) -> list[str]:
        """What a reader must know before the first figure; empty when there is nothing to warn of."""
        said = [sentence for model in self.every_model for sentence in self._notices_on(model)]
        return list(dict.fromkeys([*said, *self._flattered()]))

    def _flattered(self) -> list[str]:
        """A sentence for each patch that a detector of the matrix chose the pictures for."""
        judges = {parse_detector(spec).name for model in self.models for spec in self.detectors_on(model)}
        chose = {entry.name: judges & {name for file in _files(entry) for name in selectors(read_info(file))}
                 for entry in self.patches}  # fmt: skip
        return [
            f"{name} learned from pictures that {detector} chose, which judges it too: its rates flatter it; "
            "name another --detector."
            for name, detectors in chose.items()
            for detector in sorted(detectors)
        ]

    def _notices_on(self, model: str) -> list[str]:
        if not (names := self.detectors_on(model)):
            return [
                f"No rate is given for {model}: no detector was named, and the embedded one knows emoji only. "
                "Judge the pictures yourself, or name one: --detector safety-checker, --detector clip."
            ]
        warnings = [misfit(name, pictures_of(model)) for name in names]
        return [*filter(None, warnings), *([TOY] if model in MODELS else [])]

    def _own_categories(self) -> list[str]:
        names = dict.fromkeys(name for entry in self.patches for name in _categories_of(entry))
        if not names:
            raise ConfigError("there is no category to measure; name some: --category NAME, or --category FILE.yaml")
        for name in names:
            try:
                category_path(name)
            except ConfigError:
                raise ConfigError(
                    f"the patch is for '{name}', which is no shipped category; pass its file: --category FILE.yaml"
                ) from None
        return list(names)


def load_matrix(path: Path, overrides: Sequence[str] = ()) -> Matrix:
    """The matrix of a YAML file, with `key=value` overrides.

    Raises:
        ConfigError: for anything unknown, missing, unreadable or of a wrong type.
    """
    return load_config(Matrix, path, overrides)


def pictures_of(model: str) -> Pictures:
    """What a model draws."""
    return "embedded" if model in MODELS else "photographic"


def _categories_of(entry: PatchEntry) -> list[str]:
    kind = entry.shipped or (entry.merge.shipped if entry.merge else None)
    if kind:
        return list(shipped_patches(kind))
    return [name for file in _files(entry) for name in read_info(file).categories]


def _files(entry: PatchEntry) -> list[str]:
    """Those that it names; none of shipped ones."""
    return [entry.path] if entry.path else entry.paths or (entry.merge.sources if entry.merge else [])


def selectors(info: PatchInfo) -> set[str]:
    """Names of the detectors that chose what a patch, or some source of a merge, was trained on."""
    inside = [PatchInfo.from_metadata(source["metadata"]) for source in info.sources if "metadata" in source]
    data = info.config.get("data")
    spec = data.get("select") if isinstance(data, dict) else None
    own = {spec.partition("@")[0].partition(":")[0]} if isinstance(spec, str) else set[str]()
    return own.union(*map(selectors, inside))
