"""Run a matrix: every cell that is not finished is measured, in an order that loads each model and patch once.

Processes that were launched together (`accelerate launch`) walk through the cells in step and share the images of
each, batch by batch; the first of them writes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import parse_attack, require_attackable
from safepatch.diffusion import denoiser
from safepatch.evaluation import gallery
from safepatch.evaluation.attacked import attack_rows
from safepatch.evaluation.bench import Bench
from safepatch.evaluation.cells import Cell, CellLog, Finished
from safepatch.evaluation.folder import write_results
from safepatch.evaluation.matrix import Matrix
from safepatch.evaluation.plan import Plan, Task
from safepatch.evaluation.subjects import Healer, Subject
from safepatch.evaluation.suite import evaluate
from safepatch.evaluation.sweep import sweep
from safepatch.files import claimed
from safepatch.models.load import load_pipeline
from safepatch.patch.files import absolute
from safepatch.results import NONE, Row

Tell = Callable[[str], object]


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
    tasks = {model: list(plan.tasks(model)) for model in plan.matrix.every_model}
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


def _said(cell: Cell) -> str:
    patch = "no patch" if cell.patch == NONE else cell.patch
    what = "pictures" if cell.detector == NONE else cell.detector
    return f"{cell.model}, {patch}, {cell.category}, {what}{', attacked' if cell.attacks else ''}"
