"""Verbs over many models or many patches: study, compare, resurge, variants."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safepatch.cli import app, say
from safepatch.cli.evaluate import fields, matrix_of
from safepatch.cli.options import (
    AllowPickle,
    Category,
    Detectors,
    Dtype,
    MatrixDevice,
    Models,
    Patches,
    Steps,
    Tokenizer,
)

if TYPE_CHECKING:
    from safepatch.evaluation.matrix import Matrix
    from safepatch.results import Row


@app.command()
def study(
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL or PROMPTS]...", help="More of either; files of prompts by ending."),
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--models", "--model", help="On what; tiny-sd. More may follow.")
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option("--prompts", help="A file of prompts: CSV, JSONL, text, ... More may follow.")
    ] = None,
    category: Category = None,
    patch: Patches = None,
    detector: Detectors = None,
    device: MatrixDevice = None,
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Prompts of each file; 200.")] = None,
    steps: Steps = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of rows and report.")] = Path("runs/study"),
) -> None:
    """Share of unsafe images, model x prompt set x category, of prompts from anywhere; patched too with --patch."""
    from safepatch.data.tables import FORMATS
    from safepatch.evaluation.study import run_study

    files = [*(prompts or []), *(Path(word) for word in more or [] if Path(word).suffix.lower() in FORMATS)]
    named = [*(models or []), *(word for word in more or [] if Path(word).suffix.lower() not in FORMATS)]
    lists = {"models": named, "categories": category, "detectors": detector}
    matrix = matrix_of(patch, lists, fields(device, dtype, tokenizer, allow_pickle, n, steps, out))
    rows = run_study(matrix, files, say)
    _tell(matrix, rows, ("base", "patch", "prompt_set", "detector"))


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="What to train alike, and in what it differs: configs/compare/*.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of its settings.")] = None,
) -> None:
    """Train patches that differ in some settings, and measure them on the same pictures; one table and one page."""
    from safepatch.comparison import compare as run
    from safepatch.comparison import load_comparison
    from safepatch.reporting.tables import summary

    comparison = load_comparison(file, overrides or [])
    say(*summary(run(comparison, say)).splitlines())
    say(f"report: {Path(comparison.measure.out) / 'index.html'}")


@app.command()
def resurge(
    models: Models = None,
    patch: Patches = None,
    category: Category = None,
    detector: Detectors = None,
    way: Annotated[
        list[str] | None, typer.Option("--way", help="benign-lora, benign-full, unsafe-lora; all. May be repeated.")
    ] = None,
    train_steps: Annotated[int, typer.Option("--train-steps", help="Of training the model further.")] = 500,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="A small model's is ten times that.")] = 1e-4,
    pictures: Annotated[int, typer.Option("--pictures", help="That the model draws to learn from.")] = 128,
    device: MatrixDevice = None,
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Images per rate; 200.")] = None,
    steps: Steps = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of rows and report.")] = Path("runs/resurge"),
) -> None:
    """Train a patched model further, on harmless pictures and on unsafe ones: does the category come back?"""
    from safepatch.resurgence import WAYS, Tuning, run_resurgence

    lists = {"models": models, "categories": category, "detectors": detector}
    matrix = matrix_of(patch, lists, fields(device, dtype, tokenizer, allow_pickle, n, steps, out))
    tuning = Tuning(tuple(way or WAYS), train_steps, learning_rate=learning_rate, pictures=pictures)
    rows = run_resurgence(matrix, tuning, say)
    _tell(matrix, rows, ("measure", "base", "patch", "detector"))


@app.command()
def variants(
    models: Models = None,
    patch: Patches = None,
    category: Category = None,
    detector: Detectors = None,
    way: Annotated[
        list[str] | None, typer.Option("--way", help="sdedit, inversion, dreambooth; all. May be repeated.")
    ] = None,
    subject: Annotated[
        list[str] | None, typer.Option("--subject", help="A harmless thing: 'a cat'; three if none. May be repeated.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", help="Folder of the subject's; by default the model draws five.")
    ] = None,
    train_steps: Annotated[int, typer.Option("--train-steps", help="Of learning a subject.")] = 400,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="A small model's is ten times that.")] = 1e-4,
    device: MatrixDevice = None,
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Images per rate, of all subjects together; 200.")] = None,
    steps: Steps = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of rows and report.")] = Path("runs/variants"),
) -> None:
    """Edit harmless subjects into unsafe pictures, by a start picture, a learned word and a LoRA: does a patch hold?"""
    from safepatch.variants import WAYS, Learning, run_variants

    lists = {"models": models, "categories": category, "detectors": detector}
    matrix = matrix_of(patch, lists, fields(device, dtype, tokenizer, allow_pickle, n, steps, out))
    ways = tuple(way) if way else tuple(name for name in WAYS if name != "none")
    learning = Learning(ways, tuple(subject or ()), folder=pictures, steps=train_steps, learning_rate=learning_rate)
    rows = run_variants(matrix, learning, say)
    _tell(matrix, rows, ("metric", "attack", "base", "patch", "detector"))


def _tell(matrix: "Matrix", rows: "Sequence[Row]", columns: tuple[str, ...]) -> None:
    """What was found, by category, after what a reader must know first; writes the page."""
    from safepatch.reporting.html import build_report
    from safepatch.reporting.tables import pivot, with_interval

    say(*matrix.notices())
    say(*pivot(rows, columns, "category", with_interval).splitlines())
    say(f"report: {build_report(Path(matrix.out))}")
