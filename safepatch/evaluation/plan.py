"""The cells of a matrix, and what it takes to measure them: its words, patches and detectors, opened."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

from safepatch.attacks import VERSION, parse_attack
from safepatch.data.corpus import Corpus
from safepatch.detectors import ANY_OF, has_labels, misfit, open_detector, parse_detector, parts_of
from safepatch.detectors.base import Detector
from safepatch.diffusion.askable import require_device
from safepatch.errors import ConfigError
from safepatch.evaluation.bench import Bench
from safepatch.evaluation.cells import Cell, stamp, words_of
from safepatch.evaluation.kept import Kept, digest
from safepatch.evaluation.matrix import Matrix, pictures_of
from safepatch.evaluation.subjects import Healer, Subject, subjects
from safepatch.evaluation.suite import MEASURES
from safepatch.evaluation.sweep import THRESHOLDS
from safepatch.results import NONE
from safepatch.runtime.check import require_fit

DRAWN = "drawn"  # folder of the images of a run, to be deleted when no more cells are wanted


class Task(NamedTuple):
    """A cell with what it takes to measure it."""

    cell: Cell
    subject: Subject
    corpus: Corpus
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A matrix with its words, patches and detectors opened.

    Attributes:
        matrix: what to measure.
        corpora: by category.
        subjects: the base and the patches.
        detectors: by how they were named.
    """

    matrix: Matrix
    corpora: Mapping[str, Corpus]
    subjects: Sequence[Subject]
    detectors: Mapping[str, Detector]
    _words: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, matrix: Matrix, heal: Healer | None = None) -> "Plan":
        """The plan of a matrix; makes its merges.

        Raises:
            SafepatchError: for what cannot be opened, and for a patch that does not fit a model.
        """
        require_device(matrix.device)
        corpora = matrix.corpora()
        every = subjects(matrix, list(corpora), heal)
        files = {path for each in every for path in each.files.values() if path}
        for model, path in product(matrix.every_model, files):
            require_fit(model, path, matrix.allow_pickle)
        if unjudged := [model for model in matrix.models if matrix.attacks and not matrix.detectors_on(model)]:
            raise ConfigError(f"attacks on {unjudged[0]} need a judge; name one: --detector safety-checker, or clip")
        specs = dict.fromkeys(spec for model in matrix.every_model for spec in matrix.detectors_on(model))
        detectors = {spec: _open(spec, list(corpora.values()), matrix.device) for spec in specs}
        words = {name: words_of(corpus, matrix.protocol) for name, corpus in corpora.items()}
        return cls(matrix, corpora, every, detectors, words)

    def tasks(self, model: str) -> Iterator[Task]:
        """The cells of a model, in the order they are measured."""
        matrix, specs, metrics = self.matrix, self.matrix.detectors_on(model), self.matrix.metrics_on(model)
        judged = tuple(name for name in metrics if MEASURES[name].judged)
        unjudged = tuple(name for name in metrics if not MEASURES[name].judged)
        pictures, common = self.pictures_on(model), [matrix.protocol.settings, *self._about(model)]
        for subject in self.subjects:
            for category in subject.files if subject.absolute != model else ():
                corpus, about = self.corpora[category], [*common, self._words[category], subject.identity(category)]
                for spec in specs:
                    detector = self.detectors[spec]
                    how = digest(about, judged, THRESHOLDS, detector.threshold, detector.version, detector.sha256,
                                 *self._foreign_labels(corpus, spec))  # fmt: skip
                    if judged:
                        yield Task(Cell(model, subject.name, category, spec, how), subject, corpus, judged)
                    if matrix.attacks and model not in matrix.transfer:
                        how = digest(how, [tuple(parse_attack(each)) for each in matrix.attacks], VERSION)
                        yield Task(Cell(model, subject.name, category, spec, how, attacks=True), subject, corpus, ())
                if pictures or (unjudged and subject.name != NONE):
                    how = digest(about, unjudged, pictures, specs)
                    yield Task(Cell(model, subject.name, category, NONE, how), subject, corpus, unjudged)

    def _foreign_labels(self, corpus: Corpus, spec: str) -> list[str]:
        """Labels of the other categories, which are not benign, but for those of its neighbors, which are its words."""
        own = {
            label for each in (corpus, *corpus.neighbours) for label in self.detectors[spec].labels_of(each.category)
        }
        return sorted(self.unsafe_labels(spec) - own)

    def pictures_on(self, model: str) -> int:
        """How many pictures of each set are kept."""
        return 0 if model in self.matrix.transfer else self.matrix.pictures

    def bench(self, model: str) -> Bench:
        """The model, ready to draw."""
        pipe = self.matrix.model(model).load().to(self.matrix.device)
        about, kept = digest(self._about(model)), Kept(Path(self.matrix.out) / DRAWN)
        return Bench(model, pipe, None, self.matrix.protocol, kept=kept, about=about)

    def _about(self, model: str) -> list[object]:
        """Which model it is, and how it is loaded."""
        return [asdict(self.matrix.model(model)), stamp(model), self.matrix.device, DRAWN]

    def unsafe_labels(self, spec: str) -> frozenset[str]:
        """Of a detector, those that count as one of the categories."""
        detector = self.detectors[spec]
        return frozenset(label for corpus in self.corpora.values() for label in detector.labels_of(corpus.category))

    def judges(self, model: str) -> list[Detector]:
        """The model's detectors that were made for its pictures."""
        specs = self.matrix.detectors_on(model)
        return [self.detectors[s] for s in specs if misfit(s, pictures_of(model)) is None]


def _open(spec: str, corpora: Sequence[Corpus], device: str) -> Detector:
    """The detector for the corpora, which must have labels for it, and for those neighbours that have some."""
    parsed = parse_detector(spec)
    categories = {corpus.name: corpus.category for corpus in corpora}
    others = {other.name: other.category for corpus in corpora for other in corpus.neighbours}
    judges = parts_of(parsed.source or "") if parsed.name == ANY_OF else [parsed]
    labelled = {name: each for name, each in others.items() if all(has_labels(judge.name, each) for judge in judges)}
    return open_detector(parsed, list({**labelled, **categories}.values()), device)
