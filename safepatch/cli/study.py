"""The verb that asks how often models draw unsafe pictures: study."""

from pathlib import Path
from typing import Annotated

import typer

from safepatch.cli import app
from safepatch.cli.options import Category, Detectors, MatrixDevice, Patches, Steps


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
    n: Annotated[int | None, typer.Option("-n", "--n", help="Prompts of each file; 200.")] = None,
    steps: Steps = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of rows and report.")] = Path("runs/study"),
) -> None:
    """Share of unsafe images, model x prompt set x category, of prompts from anywhere; patched too with --patch."""
    from safepatch.cli.evaluate import matrix_of
    from safepatch.data.columns import FORMATS
    from safepatch.evaluation.study import run_study
    from safepatch.reporting.html import build_report
    from safepatch.reporting.tables import pivot, with_interval

    files = [*(prompts or []), *(Path(word) for word in more or [] if Path(word).suffix.lower() in FORMATS)]
    named = [*(models or []), *(word for word in more or [] if Path(word).suffix.lower() not in FORMATS)]
    given = {"device": device, "protocol.n": n, "protocol.steps": steps, "out": out}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    lists = {"models": named or ["tiny-sd"], "categories": category, "detectors": detector}
    matrix = matrix_of(patch or [], lists, overrides)
    rows = run_study(matrix, files, typer.echo)
    typer.echo("\n".join(matrix.notices()))
    typer.echo(pivot(rows, ("base", "patch", "prompt_set", "detector"), "category", with_interval))
    typer.echo(f"report: {build_report(Path(matrix.out))}")
