"""Verbs that measure: evaluate, attack, the demo."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safepatch.cli import app, say
from safepatch.cli.options import (
    AllowPickle,
    Category,
    Detectors,
    Device,
    Dtype,
    MatrixDevice,
    Models,
    Patches,
    Steps,
    Tokenizer,
    opened,
)
from safepatch.errors import ConfigError, lookup

if TYPE_CHECKING:
    from safepatch.evaluation.matrix import Matrix

USUAL = "tiny-sd"  # the model where none is named
PICTURES = 8  # of each prompt set, in the report of one patch


@app.command()
def evaluate(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[MATRIX.yaml] [key=value]...", help="A matrix; any of its fields.")
    ] = None,
    model: Models = None,
    patch: Patches = None,
    category: Category = None,
    detector: Detectors = None,
    device: MatrixDevice = None,
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Images per rate; 200.")] = None,
    steps: Steps = None,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", help="NAME[+gate][:BUDGET], see `attack --list`; may be repeated.")
    ] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="Attacks together: quick, full.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of rows and report; runs/evaluate.")] = None,
) -> None:
    """Measure what patches stop and what they cost; what is finished is not measured again. Writes an HTML report."""
    attacks = _attacks(attack or [], suite)
    path = Path(words[0]) if words and "=" not in words[0] else None
    overrides = [*(words or [])[path is not None :], *fields(device, dtype, tokenizer, allow_pickle, n, steps, out)]
    if path:
        if model or patch or category or detector or attacks:
            raise ConfigError(
                "a matrix names models, patches, categories, detectors and attacks; leave these options out"
            )
        from safepatch.evaluation.matrix import load_matrix

        measure(load_matrix(path, overrides))
        return
    matrix = matrix_of(
        patch, {"models": model, "categories": category, "detectors": detector, "attacks": attacks}, overrides
    )
    if not matrix.patches and not matrix.categories:
        raise ConfigError(
            "nothing to measure; give a matrix (.yaml), --patch FILE, or --category NAME for the model as it is"
        )
    measure(matrix)


@app.command()
def attack(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME[+gate][:BUDGET]]...", help="All if none.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Say which attacks there are, and stop.")] = False,
    model: Models = None,
    patch: Patches = None,
    category: Category = None,
    detector: Detectors = None,
    device: MatrixDevice = None,
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    n: Annotated[int, typer.Option("-n", "--n", help="Prompts per category.")] = 50,
    steps: Steps = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of rows and report.")] = Path("runs/attack"),
) -> None:
    """Ask in other ways for what a patch stops, and count what comes through; the base is attacked too."""
    from safepatch.attacks import ATTACKS

    if show:
        for name, entry in ATTACKS.items():
            say(f"{name:17} {entry.budget} {entry.unit}; {entry.meaning}")
        return
    if not patch:
        raise ConfigError("nothing to attack; give --patch FILE")
    lists = {"models": model, "categories": category, "detectors": detector}
    lists |= {"attacks": names or list(ATTACKS), "metrics": ["unsafe_rate"]}
    measure(matrix_of(patch, lists, fields(device, dtype, tokenizer, allow_pickle, n, steps, out)))


def _attacks(names: list[str], suite: str | None) -> list[str]:
    """Those that were named, and those of the suite."""
    if suite is None:
        return names
    from safepatch.attacks import SUITES

    return list(dict.fromkeys([*names, *lookup(SUITES, suite, what="suite")]))


def fields(
    device: str | None,
    dtype: str | None,
    tokenizer: Path | None,
    allow_pickle: bool,
    n: int | None,
    steps: int | None,
    out: Path | None,
) -> list[str]:
    """Fields of a matrix as `key=value` items, of the options of verbs that measure; those not given are its own."""
    from safepatch.config import assigned

    given = {"device": device, "dtype": dtype, "tokenizer": tokenizer, "allow_pickle": allow_pickle or None}
    given |= {"protocol.n": n, "protocol.steps": steps, "out": out}
    return [assigned(name, value) for name, value in given.items() if value is not None]


def matrix_of(patches: list[Path] | None, lists: Mapping[str, list[str] | None], overrides: list[str]) -> "Matrix":
    """The matrix that the options describe; `lists` are fields of it, which go before its `overrides`."""
    from dataclasses import replace

    from safepatch.config import load_config
    from safepatch.evaluation.matrix import Matrix, PatchEntry

    written = load_config(Matrix, None, [f"models=[{USUAL}]", f"pictures={PICTURES}", *overrides])
    given: dict[str, Any] = {name: list(values) for name, values in lists.items() if values}
    return replace(written, **given, **({"patches": _named(patches, PatchEntry)} if patches else {}))


def _named(patches: list[Path], entry: Any) -> list[Any]:
    """An entry per file, called by its stem, or by its path where stems are equal."""
    stems = [path.stem for path in patches]
    return [
        entry(name=path.stem if stems.count(path.stem) == 1 else str(path.with_suffix("")), path=str(path))
        for path in patches
    ]


def measure(matrix: "Matrix") -> None:
    """Run a matrix and print its table, after what a reader must know first; of several processes the first does."""
    from safepatch.evaluation.run import processes, run_matrix
    from safepatch.reporting.html import build_report
    from safepatch.reporting.tables import summary
    from safepatch.reporting.timings import read_timings, told
    from safepatch.results import METRICS, SWEPT

    rows = run_matrix(matrix, heal=_healer(matrix.device, matrix.dtype), tell=say)
    if not processes().is_main_process:
        return
    say(*matrix.notices())
    if rows:
        say(*summary(rows).splitlines())
        for name in dict.fromkeys(row.metric for row in rows if row.metric in METRICS and row.metric != SWEPT):
            say(f"{name}: {METRICS[name].meaning}")
    for name, said in told(read_timings(Path(matrix.out))).items():
        say(f"{name}: {said}")
    say(f"report: {build_report(Path(matrix.out))}")


def measure_merge(
    sources: Sequence[str | Path],
    merged: Path,
    model: str,
    categories: Sequence[str] | None,
    n: int,
    opening: dict[str, Any],
) -> None:
    """Measure a merge beside its sources, each category's own alone; the folder is called after the merged file.

    `opening` are a matrix's fields that say how the model is opened.
    """
    from safepatch.evaluation.bench import Protocol
    from safepatch.evaluation.matrix import Matrix, PatchEntry

    patches = [PatchEntry("single", paths=[str(source) for source in sources]), PatchEntry("merged", path=str(merged))]
    out, named = str(merged.with_suffix(".evaluation")), list(categories or [])
    measure(Matrix([model], [], patches, named, protocol=Protocol(n=n), out=out, **opening))


def _healer(device: str, dtype: str | None) -> Any:
    """What makes a matrix's healed merges."""

    def run(model: str, recipe: Any, path: Path) -> None:
        from safepatch.training.healing import heal

        heal(opened(model, device, dtype), recipe, path)

    return run


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` or `attack` wrote.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page.")] = Path("compare.html"),
) -> None:
    """One page about one run or several, without a model; says first in what their protocols differ."""
    from safepatch.reporting.compare import build_comparison

    say(f"report: {build_comparison(runs, out)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the report.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="Training steps of the demo's own patch.")] = 400,
    n: Annotated[int, typer.Option("-n", "--n", help="Images per rate.")] = 20,
    device: Device = "cpu",
) -> None:
    """The whole job in a few minutes: train, merge, load onto a sibling checkpoint, generate, score, report."""
    from safepatch.demo import run_demo
    from safepatch.diffusion.askable import require_device

    require_device(device)
    say(f"report: {run_demo(out, steps, n, device)}")
