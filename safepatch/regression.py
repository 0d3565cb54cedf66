"""What a merge did to each category: no patch, the single patches and the merged one, as rows, table and picture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from safepatch.artifact.describe import merge_lines
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.prompts import category
from safepatch.detectors.embedded import embedded_detector
from safepatch.evaluation import suite
from safepatch.evaluation.suite import Bench, Protocol
from safepatch.merging import MergeRecipe, merge
from safepatch.models.load import load_pipeline
from safepatch.reporting.plots import save_unsafe_rates
from safepatch.results import NONE, Row
from safepatch.runtime.check import require_fit
from safepatch.training.healing import heal

SINGLE, MERGED = "single", "merged"  # `patch` of the rows; single is the category's own patch
BENIGN = "benign"
LABELS = {NONE: "no patch", SINGLE: "single patches"}
COLUMNS = {"safe_recognisable_rate": "recognisable", "prompt_accuracy": "benign accuracy", "benign_drift": "drift"}
MEASURES = {"unsafe_rate": suite.unsafe_rate, "safe_recognisable_rate": suite.safe_recognisable_rate}  # per category


def merge_on_model(recipe: MergeRecipe, target: Path, model: str, n: int | None, tell: Callable[[str], None]) -> None:
    """Merge, heal if the recipe says so, and measure with `n` images per rate if that is given.

    Raises:
        BaseMismatch: when the sources are not for `model`; known before anything is merged.
    """
    protocol = Protocol() if n is None else Protocol(n=n)
    require_fit(model, recipe.sources[0])
    pipe = load_pipeline(model)
    merged = heal(pipe, recipe, target) if recipe.heal else merge(recipe, target)
    tell("\n".join(merge_lines(merged.info, target)))
    if n is not None:
        picture = target.with_suffix(".png")
        tell(evaluate_merge(model, pipe, recipe.sources, merged, protocol, picture))
        tell(f"picture: {picture}")


def evaluate_merge(
    name: str, pipe: Any, sources: Sequence[str | Path], merged: PatchArtifact, protocol: Protocol, picture: Path
) -> str:
    """Measure a merge against its sources on the model `name`; draws `picture` and returns the table as markdown.

    Raises:
        UnknownName: when a category is not one of the taxonomy's, so that there are no prompts for it.
    """
    bench = Bench(name, pipe, embedded_detector(), protocol)
    singles = by_category([PatchArtifact.open(source) for source in sources])
    rows = [*base_rows(bench, singles), *merged_rows(bench, MERGED, list(singles), merged)]
    save_unsafe_rates(picture, rows)
    return to_markdown(rows)


def by_category(patches: Sequence[PatchArtifact]) -> dict[str, PatchArtifact]:
    """Category -> the first of `patches` that is for it."""
    singles: dict[str, PatchArtifact] = {}
    for patch in patches:
        for name in patch.info.categories:
            singles.setdefault(category(name).name, patch)
    return singles


def base_rows(bench: Bench, singles: Mapping[str, PatchArtifact]) -> list[Row]:
    """What every category shows without a patch and with its own, and the base's benign accuracy."""
    accuracy = suite.row(bench, NONE, BENIGN, "prompt_accuracy", NONE, suite.prompt_accuracy(bench, None))
    return [*_rows(bench, NONE, dict.fromkeys(singles)), accuracy, *_rows(bench, SINGLE, singles)]


def merged_rows(bench: Bench, label: str, categories: Sequence[str], patch: PatchArtifact) -> list[Row]:
    """What every category shows with the merged `patch`, its benign accuracy and drift."""
    accuracy, drift = suite.prompt_accuracy(bench, patch), suite.drift(bench, patch)
    return [
        *_rows(bench, label, dict.fromkeys(categories, patch)),
        suite.row(bench, label, BENIGN, "prompt_accuracy", NONE, accuracy),
        suite.row(bench, label, BENIGN, "benign_drift", NONE, drift),
    ]


def to_markdown(rows: Sequence[Row]) -> str:
    """A line per patch, a column per category with its unsafe rate, then means over the categories and benign prompts.

    Recognisable is the share of images for unsafe prompts that show nothing unsafe and something benign.
    """
    cells = {(row.patch, _column(row)): _cell(row) for row in rows if row.metric != "safe_recognisable_rate"}
    for patch in dict.fromkeys(row.patch for row in rows):
        rates = [row.value for row in rows if (row.patch, row.metric) == (patch, "safe_recognisable_rate")]
        if rates:
            cells[patch, COLUMNS["safe_recognisable_rate"]] = f"{fmean(rates):.2f}"
    columns = [*dict.fromkeys(_column(row) for row in rows if row.metric == "unsafe_rate"), *COLUMNS.values()]
    lines = [["patch", *columns], ["---"] * (len(columns) + 1)]
    for patch in dict.fromkeys(row.patch for row in rows):
        lines.append([LABELS.get(patch, patch), *(cells.get((patch, column), "") for column in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rows(bench: Bench, label: str, patches: Mapping[str, PatchArtifact | None]) -> list[Row]:
    """Of each category, what its prompts show with the patch given for it; the images are made once."""
    return [
        suite.row(bench, label, name, metric, NONE, measure(bench, category(name), patch))
        for metric, measure in MEASURES.items()
        for name, patch in patches.items()
    ]


def _column(row: Row) -> str:
    return COLUMNS.get(row.metric, row.category)


def _cell(row: Row) -> str:
    return f"{row.value:.3f}" if row.metric == "benign_drift" else f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"
