"""Verbs about prompts: guard train, guard score, guard attack, guard inspect."""

import json
from pathlib import Path
from typing import Annotated

import typer

from safepatch.cli import app, say
from safepatch.cli.options import AllowPickle, Device, Dtype, Tokenizer, opened, require_with
from safepatch.errors import ArtifactError

guards = typer.Typer(help="Which prompts are for a category: a classifier of prompts.", no_args_is_help=True)
app.add_typer(guards, name="guard")

GuardModel = Annotated[str | None, typer.Option("--model", help="Whose text encoder clip reads, and a patch's gates.")]


@guards.command()
def train(
    context: typer.Context,
    categories: Annotated[list[str], typer.Argument(help="Shipped categories, or category files.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the guard.")],
    encoder: Annotated[str, typer.Option("--encoder", help="clip, the model's own; or minilm, an extra.")] = "clip",
    model: GuardModel = None,
    labels: Annotated[
        str | None, typer.Option("--labels", help="Hand-labelled prompts to learn from: a file, or english.")
    ] = None,
    answers: Annotated[
        str | None, typer.Option("--answers", help="Somebody's answers, a language model's for instance: a file.")
    ] = None,
    unlabelled: Annotated[
        list[str] | None, typer.Option("--prompts", help="Prompts that nobody has labelled; may be repeated.")
    ] = None,
    test: Annotated[
        str | None, typer.Option("--test", help="Hand-labelled prompts for figures only: a file, or english.")
    ] = None,
    patch: Annotated[str | None, typer.Option("--patch", help="A patch of --model, whose gates vote too.")] = None,
    detector: Annotated[
        str | None, typer.Option("--detector", help="Votes too, by what --model draws of some texts: NAME[:THRESHOLD].")
    ] = None,
    pictures: Annotated[int, typer.Option(help="With --detector: how many are drawn.")] = 256,
    steps: Annotated[int, typer.Option(help="With --detector: denoising steps.")] = 20,
    captions: Annotated[int, typer.Option(help="Texts to learn from, by category.")] = 1024,
    hidden: Annotated[int, typer.Option(help="Width of the layer of each member of a head.")] = 16,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    precision: Annotated[
        float | None,
        typer.Option("--precision", help="At which to catch all that can be; see --beta."),
    ] = None,
    beta: Annotated[
        float, typer.Option("--beta", help="Without --precision: how many times as much recall counts as precision.")
    ] = 1.0,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw how well it is calibrated, .png or .svg.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Distil a guard from weak labelers' votes on texts made of the categories' words; says how good it is."""
    from safepatch.data.corpus import Corpus
    from safepatch.files import require_writable
    from safepatch.guard.config import GuardConfig
    from safepatch.guard.measure import table
    from safepatch.guard.train import train as run

    require_with(context, "detector", ("pictures", "steps"))
    judged = {"labels": labels, "answers": answers, "unlabelled": tuple(unlabelled or ()), "test": test}
    drawn = {"patch": patch, "detector": detector, "pictures": pictures, "steps": steps}
    config = GuardConfig(encoder, captions, hidden, seed=seed, precision=precision, beta=beta, **judged, **drawn)
    require_writable(out)
    corpora = [Corpus.open(name) for name in categories]
    needs_model = encoder == "clip" or patch is not None or detector is not None
    pipe = opened(model or "tiny-sd", device, dtype, tokenizer, allow_pickle) if needs_model else None
    guard = run(corpora, config, pipe)
    stated = guard.save(out)
    for name, report in guard.info.report.items():
        say("", f"{TITLES[name]}", "", *table(report))
    if plot:
        from safepatch.reporting.reliability import save_reliability

        save_reliability(plot, {TITLES[name]: each["calibration"] for name, each in guard.info.report.items()})
    say("", f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB, {stated[:14]}) for {', '.join(guard.categories)}")


TITLES = {"words": "the categories' own words, in unseen wordings", "test": "hand-labelled prompts, and harmless ones"}


@guards.command()
def score(
    prompts: Annotated[Path, typer.Argument(help="A .csv or .tsv with a column of prompts, or a .txt, one a line.")],
    guard: Annotated[Path, typer.Option("--guard", help="A guard's file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write verdicts and probabilities, a .csv.")],
    model: GuardModel = None,
    column: Annotated[str | None, typer.Option("--column", help="That holds the prompts.")] = None,
    patch: Annotated[Path | None, typer.Option("--patch", help="Say which of its categories the guard lacks.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Score every prompt of a file, however long; what cannot be read is told, and does not pass."""
    from safepatch.artifact.info import read_info
    from safepatch.guard.decide import lacking
    from safepatch.guard.file import Guard
    from safepatch.guard.score import score_file

    judge = Guard.open(guard)
    if patch:
        for line in lacking(judge.categories, read_info(patch).categories):
            say(line, err=True)
    reads_model = judge.info.encoder == "clip"
    judge.bind(opened(model or "tiny-sd", device, dtype, tokenizer, allow_pickle) if reads_model else None)
    tally = score_file(judge, prompts, out, column)
    claimed = ", ".join(f"{name} {tally.claimed[name]}" for name in judge.categories)
    say(f"{tally.rows} prompts: {tally.passed} pass; {claimed}; wrote {out}")
    for line in tally.told:
        say(f"note: unread: {line}", err=True)
    if tally.unread > len(tally.told):
        say(f"note: {tally.unread - len(tally.told)} more unread, see the column verdict", err=True)


@guards.command()
def attack(
    context: typer.Context,
    categories: Annotated[list[str], typer.Argument(help="Of the guard: shipped ones, or category files.")],
    guard: Annotated[Path, typer.Option("--guard", help="A guard's file.")],
    attacks: Annotated[
        list[str] | None, typer.Option("--attack", help="NAME[:BUDGET]; all that type texts if none. May be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="Whose text encoder attackers know, and that draws.")
    ] = "tiny-sd",
    draw: Annotated[
        bool, typer.Option("--draw", help="Draw what passes, without a patch, and see what it shows.")
    ] = False,
    detector: Annotated[
        str, typer.Option("--detector", help="With --draw: what sees it, NAME[:THRESHOLD].")
    ] = "embedded",
    steps: Annotated[int, typer.Option(help="With --draw: denoising steps.")] = 20,
    n: Annotated[int, typer.Option("-n", "--n", help="Prompts per category.")] = 50,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Ask in other ways for what a guard refuses, and count what it lets pass."""
    from safepatch.attacks import parse_attack
    from safepatch.data.corpus import Corpus
    from safepatch.guard.attack import TEXTS, Eye, attack_guard, table
    from safepatch.guard.file import Guard

    require_with(context, "draw", ("detector", "steps"))
    judge, corpora = Guard.open(guard), [Corpus.open(name) for name in categories]
    asked = [parse_attack(text) for text in attacks or (TEXTS if draw else TEXTS[:-1])]
    pipe = opened(model, device, dtype, tokenizer, allow_pickle)
    judge.bind(pipe)
    found = []
    for corpus in corpora:
        eye = Eye.of(pipe, corpus, detector, steps) if draw else None
        found += attack_guard(judge, corpus, [(each.name, each.budget) for each in asked], n, seed, pipe, eye)
    say(*table(found))


@guards.command()
def inspect(
    guard: Annotated[Path, typer.Argument(help="A guard's file.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with everything that was recorded.")] = False,
) -> None:
    """Check a guard's file and say what it is and how good it was."""
    from dataclasses import asdict

    from safepatch.guard.file import Guard, stated_hash
    from safepatch.guard.measure import table

    info = Guard.open(guard).info
    if as_json:
        typer.echo(json.dumps(asdict(info) | {"hash": stated_hash(guard)}, indent=1, sort_keys=True))
        return
    say(f"hash           {stated_hash(guard)}", f"encoder        {info.encoder}")
    for name, definition in info.categories.items():
        say(f"{name}: {definition}; from {info.thresholds[name]:.3f} on")
    try:
        for name, report in info.report.items():
            say("", TITLES.get(name, name), "", *table(report))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{guard}: damaged: its report cannot be read ({error!r}); see --json") from error
