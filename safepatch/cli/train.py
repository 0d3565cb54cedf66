"""Verbs that learn: write a category file, train a patch, fit a gate."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safepatch.cli import app, say
from safepatch.cli.options import (
    AllowPickle,
    Category,
    Device,
    Dtype,
    Model,
    PatchFile,
    PredictionType,
    Tokenizer,
    opened,
)
from safepatch.errors import SafepatchError

if TYPE_CHECKING:
    from safepatch.training.config import TrainConfig


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the category; the files are named after it.")],
    folder: Annotated[Path, typer.Option("-o", "--out", help="Where to write them.")] = Path(),
) -> None:
    """Write a category file and its prompts, commented and valid as they are: edit them and go."""
    from safepatch.data.new import write_category

    for path in write_category(name, folder):
        say(f"wrote: {path}")
    say(f"next: edit them, then  safepatch train {folder / name}.yaml model=YOUR-MODEL --dry-run")


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A category, by its file or a shipped one's name, or the YAML configuration of a run.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Any field as key.key=value; model=... is one.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and what it will take, and stop.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", help="Where to train: cpu, cuda, cuda:1, mps; what accelerate chooses.")
    ] = "",
    dtype: Dtype = None,
) -> None:
    """Train a patch for one category."""
    from safepatch.config import assigned, to_yaml
    from safepatch.data.corpus import Corpus
    from safepatch.diffusion.askable import require_device
    from safepatch.files import require_writable

    given = {"training.device": device or None, "model.dtype": dtype}
    named = [assigned(name, value) for name, value in given.items() if value is not None]
    resolved = planned(config, [*(overrides or []), *named])
    if resolved.training.device:
        require_device(resolved.training.device)
    corpus = Corpus.open(resolved.category)
    for note in corpus.notes:
        say(note)
    resolved.model.require_whole()
    require_writable(Path(resolved.output or "runs/train") / "log.jsonl")
    foreseen = _foreseen(resolved, corpus.rewrite.by == "guided", always=dry_run)
    if dry_run:
        say(*to_yaml(resolved).splitlines())
    for line in foreseen:
        say(line)
    if dry_run:
        return
    from safepatch.training.trainer import train as run

    path = run(resolved.load_model(), resolved, corpus)
    say(f"patch: {path} ({path.stat().st_size / 1e6:.1f} MB)")


def planned(config: str, overrides: list[str]) -> "TrainConfig":
    """The run that the words of a command line describe; the first may be a field as well, as `category=weapons`."""
    from safepatch.data.category import shipped_categories
    from safepatch.data.tables import FORMATS
    from safepatch.training.config import load_train_config

    if "=" in config:
        return load_train_config(None, [config, *overrides])
    if config in shipped_categories() and not Path(config).exists():
        return load_train_config(None, [f"category={config}", *overrides])
    if Path(config).suffix.lower() in FORMATS:
        raise SafepatchError(f"{config} is a file of prompts; a category file names it: safepatch new NAME writes one")
    return load_train_config(Path(config), overrides)


def _foreseen(config: "TrainConfig", pushed: bool, always: bool) -> list[str]:
    """What a run will take, if that is asked for, and a warning where the GPU is too small for it."""
    from safepatch.models.load import unet_config
    from safepatch.training.memory import device_bytes, predict_run

    total = device_bytes()
    if not always and total is None:
        return []
    foreseen = predict_run(config, unet_config(config.model.named, config.model.allow_pickle), pushed)
    warning = None if total is None else foreseen.warning(total)
    return [*(foreseen.lines() if always else ()), *([f"warning: {warning}"] if warning else ())]


@app.command()
def gate(
    patch: PatchFile,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the patch with its gate.")],
    model: Model = "tiny-sd",
    category: Category = None,
    width: Annotated[int, typer.Option(help="Channels of the gate; 0 takes off the one that is there.")] = 32,
    windows: Annotated[
        int, typer.Option(help="Words that it reads alone, at most so many in a row: no others can close it; 0: none.")
    ] = 3,
    keys: Annotated[
        str, typer.Option(help="What opens it: text, picture (what is being drawn), either, or both of them.")
    ] = "text",
    pairs: Annotated[
        int, typer.Option(help="Pairs of pictures that a picture key learns from; as many that must stay are drawn.")
    ] = 768,
    draw_steps: Annotated[int, typer.Option(help="Denoising steps in which these are drawn.")] = 10,
    cache: Annotated[
        str | None, typer.Option(help="Where they are kept; the user's cache folder if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of captions and pictures.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    prediction_type: PredictionType = None,
) -> None:
    """Fit a gate to a patch: it acts where it is for, and leaves every other image as it was, bit for bit."""
    from safepatch.artifact.patch_artifact import PatchArtifact
    from safepatch.data.bank import DataConfig
    from safepatch.data.corpus import Corpus
    from safepatch.files import require_writable
    from safepatch.runtime.check import require_fit
    from safepatch.training.gates import add_gate, without_gate

    artifact = PatchArtifact.open(patch)
    if width == 0:
        without_gate(artifact).save(out)
        say(f"no gate: {out}")
        return
    if len(category or []) > 1:
        raise SafepatchError("a gate is fitted for one category; give --category once")
    corpus = Corpus.open((category or artifact.info.categories)[0])
    require_writable(out)
    require_fit(model, patch, allow_pickle)  # before gigabytes of weights are read
    pipe = opened(model, device, dtype, tokenizer, allow_pickle, prediction_type)
    data = DataConfig(pairs=pairs, steps=draw_steps, cache=cache, seed=seed)
    gated = add_gate(artifact, pipe, corpus, width, data, windows, keys)
    gated.save(out)
    records = {name: it for part in gated.parts() for name, it in part.artifact.info.config["gate"].items()}
    for name, record in records.items():
        says = f"opens at {record['threshold']:.3f}; {_shares(record)}{_certified(record)}"
        say(f"gate for {name}: {says}: {out}", *_pictured(record))


def _shares(record: Mapping[str, Any]) -> str:
    """For how many captions a gate opened, and of which."""
    unsafe, harmless = f"{record['unsafe_opened']:.1%} of unsafe", f"{record['harmless_opened']:.1%} of harmless ones"
    if record.get("learned"):
        return f"it opened for {unsafe} captions, of those that it learned from, and on unseen ones for {harmless}"
    return f"on unseen captions it opened for {unsafe} and {harmless}"


def _pictured(record: Mapping[str, Any]) -> list[str]:
    """How often what is drawn opens a gate that looks at it."""
    picture = record.get("picture")
    if picture is None:
        return []
    shares = f"{picture['unsafe_opened']:.1%} of unsafe pictures drawn again without words"
    return [
        f"  keys: {record['keys']}; what is drawn opens {shares}, {picture['harmless_opened']:.1%} of harmless ones"
    ]


def _certified(record: Mapping[str, Any]) -> str:
    """How often a gate opens by a few words alone, which no others can drown."""
    recall = record.get("certified_recall")
    return "" if recall is None else f"; of the unsafe, {recall:.1%} by a few words that no others can drown"
