"""Verbs over many models or many patches: study, compare, resurge, variants."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safepatch.cli import app
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
    from safepatch.reporting.html import build_report
    from safepatch.reporting.tables import pivot, with_interval

    files = [*(prompts or []), *(Path(word) for word in more or [] if Path(word).suffix.lower() in FORMATS)]
    named = [*(models or []), *(word for word in more or [] if Path(word).suffix.lower() not in FORMATS)]
    given = {"device": device, "dtype": dtype, "tokenizer": tokenizer, "allow_pickle": allow_pickle or None}
    given |= {"protocol.n": n, "protocol.steps": steps, "out": out}
    matrix = _matrix(patch, {"models": named or ["tiny-sd"], "categories": category, "detectors": detector}, given)
    rows = run_study(matrix, files, typer.echo)
    typer.echo("\n".join(matrix.notices()))
    typer.echo(pivot(rows, ("base", "patch", "prompt_set", "detector"), "category", with_interval))
    typer.echo(f"report: {build_report(Path(matrix.out))}")


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
    typer.echo(summary(run(comparison, typer.echo)))
    typer.echo(f"report: {Path(comparison.measure.out) / 'index.html'}")


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
    from safepatch.reporting.html import build_report
    from safepatch.reporting.tables import pivot, with_interval
    from safepatch.resurgence import WAYS, Tuning, run_resurgence

    given = {"device": device, "dtype": dtype, "tokenizer": tokenizer, "allow_pickle": allow_pickle or None}
    given |= {"protocol.n": n, "protocol.steps": steps, "out": out}
    matrix = _matrix(patch, {"models": models or ["tiny-sd"], "categories": category, "detectors": detector}, given)
    tuning = Tuning(tuple(way or WAYS), train_steps, learning_rate=learning_rate, pictures=pictures)
    rows = run_resurgence(matrix, tuning, typer.echo)
    typer.echo("\n".join(matrix.notices()))
    typer.echo(pivot(rows, ("measure", "base", "patch", "detector"), "category", with_interval))
    typer.echo(f"report: {build_report(Path(matrix.out))}")


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
    from safepatch.reporting.html import build_report
    from safepatch.reporting.tables import pivot, with_interval
    from safepatch.variants import WAYS, Learning, run_variants

    given = {"device": device, "dtype": dtype, "tokenizer": tokenizer, "allow_pickle": allow_pickle or None}
    given |= {"protocol.n": n, "protocol.steps": steps, "out": out}
    matrix = _matrix(patch, {"models": models or ["tiny-sd"], "categories": category, "detectors": detector}, given)
    ways = tuple(way) if way else tuple(name for name in WAYS if name != "none")
    learning = Learning(ways, tuple(subject or ()), folder=pictures, steps=train_steps, learning_rate=learning_rate)
    rows = run_variants(matrix, learning, typer.echo)
    typer.echo("\n".join(matrix.notices()))
    typer.echo(pivot(rows, ("metric", "attack", "base", "patch", "detector"), "category", with_interval))
    typer.echo(f"report: {build_report(Path(matrix.out))}")


def _matrix(patch: list[Path] | None, lists: dict[str, list[str] | None], given: dict[str, Any]) -> "Matrix":
    """The matrix of a command's options; those that were not given are its own."""
    from safepatch.cli.evaluate import matrix_of

    return matrix_of(patch or [], lists, [f"{name}={value}" for name, value in given.items() if value is not None])
