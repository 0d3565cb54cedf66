"""Run a matrix: every cell that is not finished is measured, in an order that loads each model and patch once.

Processes that were launched together (`accelerate launch`) walk through the cells in step and share the images of
each, batch by batch; the first of them writes.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import VERSION, parse_attack, require_attackable
from safepatch.data.corpus import Corpus
from safepatch.detectors import ANY_OF, has_labels, misfit, open_detector, parse_detector, parts_of
from safepatch.detectors.base import Detector
from safepatch.diffusion import denoiser
from safepatch.errors import ConfigError
from safepatch.evaluation import gallery
from safepatch.evaluation.attacked import attack_rows
from safepatch.evaluation.bench import Bench
from safepatch.evaluation.cells import Cell, CellLog, Finished, stamp, words_of
from safepatch.evaluation.kept import Kept, digest
from safepatch.evaluation.matrix import Matrix, pictures_of
from safepatch.evaluation.subjects import Healer, Subject, subjects
from safepatch.evaluation.suite import MEASURES, evaluate
from safepatch.evaluation.sweep import THRESHOLDS, sweep
from safepatch.files import claimed, write_text
from safepatch.models.load import load_pipeline
from safepatch.patch.files import absolute
from safepatch.results import NONE, Row, write_rows
from safepatch.runtime.check import require_fit

DRAWN = "drawn"  # folder of the images of a run, to be deleted when no more cells are wanted
Tell = Callable[[str], object]


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
        _require_device(matrix.device)
        corpora = matrix.corpora()
        every = subjects(matrix, list(corpora), heal)
        for model, path in product(_models(matrix), {path for each in every for path in each.files.values() if path}):
            require_fit(model, path, matrix.allow_pickle)
        if unjudged := [model for model in matrix.models if matrix.attacks and not matrix.detectors_on(model)]:
            raise ConfigError(f"attacks on {unjudged[0]} need a judge; name one: --detector safety-checker, or clip")
        specs = dict.fromkeys(spec for model in _models(matrix) for spec in matrix.detectors_on(model))
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


def run_matrix(matrix: Matrix, heal: Healer | None = None, tell: Tell = print) -> list[Row]:
    """Measure what is not measured yet; writes `rows.jsonl` and what the report needs into the matrix's folder.

    They are written after every cell, so a run that ends early leaves what it found; results of an earlier run stay
    until there are as many new ones.

    Args:
        matrix: what to measure.
        heal: as in `subjects`.
        tell: where progress goes, a line for each cell.

    Returns:
        The rows of all cells, in the matrix's order.

    Raises:
        SafepatchError: when another process has the folder, and as `Plan.of`.
    """
    state, out = processes(), Path(matrix.out)
    with state.main_process_first():
        plan = Plan.of(matrix, heal)
    with claimed(out) if state.is_main_process else nullcontext():
        return _run(plan, out, tell, state)


def processes() -> PartialState:
    """Those that were launched together to share a matrix, as the one that asks sees them; mostly it is alone."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _run(plan: Plan, out: Path, tell: Tell, state: PartialState) -> list[Row]:
    state.wait_for_everyone()  # until the folder is claimed
    log = CellLog(out, writes=state.is_main_process)
    state.wait_for_everyone()  # until all have read the same log
    tasks = {model: list(plan.tasks(model)) for model in _models(plan.matrix)}
    cells = [task.cell for each in tasks.values() for task in each]
    for model, todo in tasks.items():
        if missing := [task for task in todo if task.cell not in log]:
            _run_model(plan, replace(plan.bench(model), processes=state), missing, cells, log, tell)
    if state.is_main_process:
        write_results(plan, {cell: log[cell] for cell in cells})
    return [row for cell in cells for row in log[cell].rows]


def _run_model(
    plan: Plan, bench: Bench, missing: Sequence[Task], cells: Sequence[Cell], log: CellLog, tell: Tell
) -> None:
    """What is missing of one model, which is let go of before the next one is opened."""
    is_main = bench.processes is None or bench.processes.is_main_process
    if any(task.cell.attacks for task in missing):
        require_attackable(bench.pipe, plan.matrix.attacks)
    for task, patch in _opened(bench, missing):
        if is_main:
            tell(f"[{cells.index(task.cell) + 1}/{len(cells)}] {_said(task.cell)}")
        log.add(task.cell, _timed(plan, bench, task, patch))
        if is_main:
            write_results(plan, {cell: log[cell] for cell in cells if cell in log}, only_more=True)
    drawn, seconds = (sum(log[task.cell].took.get(name, 0) for task in missing) for name in ("drawn", "seconds"))
    if is_main and drawn:
        tell(f"{bench.name}: {drawn} images drawn and judged, {drawn / seconds:.2f} per second")


def _timed(plan: Plan, bench: Bench, task: Task, patch: PatchArtifact | None) -> Finished:
    """One cell, with the seconds that it took and the images that all processes drew."""
    before, start = bench.kept.drawn, time.perf_counter()
    finished = measure(plan, bench, task, patch)
    drawn = gather_object([bench.kept.drawn - before])
    return replace(finished, seconds=round(time.perf_counter() - start, 6), drawn=sum(drawn), processes=len(drawn))


def measure(plan: Plan, bench: Bench, task: Task, patch: PatchArtifact | None) -> Finished:
    """One cell."""
    cell = task.cell
    if cell.detector != NONE:
        judged = replace(bench, detector=plan.detectors[cell.detector], unsafe_labels=plan.unsafe_labels(cell.detector))
        if cell.attacks:
            specs = {each: parse_attack(each) for each in plan.matrix.attacks}
            rows = attack_rows(judged, task.corpus, patch, cell.patch, specs)
        else:
            rows = evaluate(judged, task.corpus, patch, cell.patch, task.metrics)
            if "unsafe_rate" in task.metrics and cell.model in plan.matrix.models:
                rows += sweep(judged, task.corpus, patch, cell.patch)
        return Finished([replace(row, detector=cell.detector) for row in rows])
    rows = evaluate(bench, task.corpus, patch, cell.patch, task.metrics)
    of, out = gallery.Pictures(cell.model, cell.patch, cell.category, cell.settings), Path(plan.matrix.out)
    count, judges = plan.pictures_on(cell.model), plan.judges(cell.model)
    kept = gallery.save_pictures(bench, task.corpus, patch, of, count, out, judges)
    return Finished(rows, kept)


def write_results(plan: Plan, cells: Mapping[Cell, Finished], only_more: bool = False) -> None:
    """Write rows, protocol, notices and pictures; of equal cells, equal bytes. Beside them, how long it took.

    Args:
        plan: what was to be measured.
        cells: what was.
        only_more: leave the results that are there, perhaps an earlier run's, where they have more rows.
    """
    out, finished = Path(plan.matrix.out), list(cells.values())
    rows = [row for each in finished for row in each.rows]
    path = out / "rows.jsonl"
    if only_more and has_more(path, rows):
        return
    gallery.write_gallery(out, dict(plan.corpora), [picture for each in finished for picture in each.pictures])
    records = {
        "notices": {"notices": plan.matrix.notices()},
        "protocol": protocol_of(plan, rows),
        "timings": [{**asdict(cell), **took} for cell, each in cells.items() if (took := each.took)],
    }
    for name, record in records.items():
        write_text(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_rows(path, rows)


def has_more(path: Path, rows: Sequence[Row]) -> bool:
    """Whether a file, perhaps an earlier run's, holds more rows than these."""
    return path.is_file() and path.read_bytes().count(b"\n") > len(rows)


def protocol_of(plan: Plan, rows: Sequence[Row]) -> dict[str, str]:
    """How it was measured, as texts for people."""
    patches = dict.fromkeys(f"{row.patch}: {row.kind}, {row.patch_hash}" for row in rows if row.patch != NONE)
    protocol = plan.matrix.protocol
    own = "each prompt's own" if protocol.guidance_scale is None else "0"
    guidance = dict.fromkeys(f"{row.guidance_scale:g}" if row.guidance_scale else own for row in rows)
    judges = [
        f"{spec}: threshold {each.threshold:g}, {each.version or 'no version'}, sha256 {each.sha256 or 'none'}"
        for spec, each in plan.detectors.items()
    ]
    return {
        "models": ", ".join(_models(plan.matrix)),
        "patches": "; ".join(patches) or ", ".join(subject.name for subject in plan.subjects),
        "categories": ", ".join(plan.corpora),
        "detectors": "; ".join(judges) or NONE,
        "images per rate": str(protocol.n),
        "denoising steps": str(protocol.steps),
        "guidance scale": ", ".join(guidance) or str(protocol.guidance_scale or "what is usual for the model"),
        "scheduler": ", ".join(dict.fromkeys(row.scheduler for row in rows)) or "the model's",
        "seed": str(protocol.seed),
        "device and dtype": f"{plan.matrix.device}, {plan.matrix.dtype or 'float32'}",
    }


def _opened(bench: Bench, tasks: Sequence[Task]) -> Iterator[tuple[Task, PatchArtifact | None]]:
    """Tasks with their patches, each opened once while tasks in a row share it."""
    last: tuple[object, PatchArtifact | None] = (None, None)
    for task in tasks:
        key = (task.subject.name, task.subject.files[task.cell.category])
        if key != last[0]:
            last = (key, _patch(bench, task.subject, task.cell.category))
        yield task, last[1]


def _patch(bench: Bench, subject: Subject, category: str) -> PatchArtifact | None:
    path = subject.files[category]
    if path is None:
        return None
    patch = PatchArtifact.open(path)
    if subject.absolute is None:
        return patch
    return absolute(patch, denoiser(load_pipeline(subject.absolute)), denoiser(bench.pipe))


def _open(spec: str, corpora: Sequence[Corpus], device: str) -> Detector:
    """The detector for the corpora, which must have labels for it, and for those neighbours that have some."""
    parsed = parse_detector(spec)
    categories = {corpus.name: corpus.category for corpus in corpora}
    others = {other.name: other.category for corpus in corpora for other in corpus.neighbours}
    judges = parts_of(parsed.source or "") if parsed.name == ANY_OF else [parsed]
    labelled = {name: each for name, each in others.items() if all(has_labels(judge.name, each) for judge in judges)}
    return open_detector(parsed, list({**labelled, **categories}.values()), device)


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"no device '{device}' here ({str(error).splitlines()[0][:120]}); choose another") from None


def _models(matrix: Matrix) -> list[str]:
    return [*matrix.models, *matrix.transfer]


def _said(cell: Cell) -> str:
    patch = "no patch" if cell.patch == NONE else cell.patch
    what = "pictures" if cell.detector == NONE else cell.detector
    return f"{cell.model}, {patch}, {cell.category}, {what}{', attacked' if cell.attacks else ''}"
