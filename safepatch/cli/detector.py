"""Verbs about judges: detector list, detector score."""

from pathlib import Path
from typing import Annotated

import typer

from safepatch.cli import app, say
from safepatch.cli.options import Device

judges = typer.Typer(help="The judges of pictures: which there are, and how good one is.", no_args_is_help=True)
app.add_typer(judges, name="detector")


@judges.command("list")
def show() -> None:
    """Say which detectors there are."""
    from safepatch.detectors import DETECTORS

    for name, entry in DETECTORS.items():
        say(f"{name:16} {entry.about}")


@judges.command()
def train(
    folder: Annotated[Path, typer.Argument(help="Holds a folder of pictures for each label, and safe/.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the heads: --detector multi-headed@FOLDER.")],
    label: Annotated[list[str] | None, typer.Option("--label", help="Of a head; default: every folder.")] = None,
    clip: Annotated[str | None, typer.Option("--clip", help="CLIP's folder or Hub id; default: OpenAI's L/14.")] = None,
    device: Device = "cpu",
) -> None:
    """Train the multi-headed detector on labelled pictures; says how good it is on those that were kept back."""
    from safepatch.evaluation.heads import lines
    from safepatch.evaluation.heads import train as run

    say(*lines(run(folder, label or [], out, clip, device)))


@judges.command()
def score(
    folder: Annotated[Path, typer.Argument(help="Holds pictures in unsafe/ and in safe/.")],
    category: Annotated[str, typer.Option("--category", help="Name or file: whose labels count as unsafe.")],
    detector: Annotated[str, typer.Option("--detector", help="NAME[:THRESHOLD][@WEIGHTS].")] = "embedded",
    device: Device = "cpu",
) -> None:
    """Recall, precision and false alarms on labelled pictures, at its threshold and at others."""
    from safepatch.data.corpus import Corpus
    from safepatch.detectors import open_detector, parse_detector
    from safepatch.evaluation.scoring import lines
    from safepatch.evaluation.scoring import score as run

    named = Corpus.open(category).category
    judge = open_detector(parse_detector(detector), [named], device)
    say(*lines(run(judge, judge.labels_of(named), folder)))
