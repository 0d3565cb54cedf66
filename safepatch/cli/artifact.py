"""Verbs for files: merge, split, inspect, verify."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safepatch.cli import app, say
from safepatch.cli.options import (
    AllowPickle,
    Category,
    Device,
    Dtype,
    Keys,
    Model,
    ModelDtype,
    PatchFile,
    PredictionType,
    Tokenizer,
    opened,
    require_with,
)
from safepatch.errors import SafepatchError

if TYPE_CHECKING:
    from safepatch.artifact.info import PatchInfo
    from safepatch.hosting.receipt import Verified
    from safepatch.merging import MergeRecipe


@app.command()
def merge(
    context: typer.Context,
    sources: Annotated[list[Path], typer.Argument(help="Patch files for one architecture, or one recipe (.yaml).")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where to write the merged patch.")] = None,
    method: Annotated[str | None, typer.Option(help="How to merge, see the README; bundle if not given.")] = None,
    weights: Annotated[str | None, typer.Option(help="Comma-separated weights, one per source.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that a sparsifying method keeps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the methods that drop at random, and of healing.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the merged tensors: float16, bfloat16, float32.")] = None,
    rank: Annotated[int | None, typer.Option(help="With cat: re-compress to this rank.")] = None,
    conflicts: Annotated[bool | None, typer.Option(help="Compare the sources pair by pair; on if not given.")] = None,
    heal: Annotated[
        int | None, typer.Option(help="Training steps, without images, to do what bundle does at one patch's cost.")
    ] = None,
    heal_rate: Annotated[float | None, typer.Option(help="With --heal: its learning rate; 1e-4 if not given.")] = None,
    mixed_precision: Annotated[str, typer.Option(help="With --heal: no, bf16 or fp16.")] = "no",
    category: Category = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Measure and draw every category.")] = False,
    model: Model = "tiny-sd",
    n: Annotated[int, typer.Option("-n", "--n", help="With --evaluate: images per rate.")] = 200,
    device: Device = "cpu",
    model_dtype: ModelDtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    prediction_type: PredictionType = None,
) -> None:
    """Merge patches into one file; an option given here overrides the recipe's."""
    from safepatch.artifact.describe import merge_lines
    from safepatch.merging import merge as run

    given = {"method": method, "density": density, "seed": seed, "dtype": dtype, "rank": rank, "conflicts": conflicts}
    given |= {"weights": _numbers(weights), "heal": heal, "heal_rate": heal_rate}
    recipe = _recipe(sources, {name: value for name, value in given.items() if value is not None})
    target = out or (Path(recipe.out) if recipe.out else None)
    if target is None:
        raise SafepatchError("nowhere to write the merged patch; give -o FILE, or 'out' in the recipe")
    if not recipe.heal:
        require_with(context, "heal", ("heal_rate", "mixed_precision"))
    if evaluate:
        from safepatch.evaluation.bench import Protocol

        Protocol(n=n)  # a wrong number is told before anything is written
    if recipe.heal:
        opening = (device, model_dtype, tokenizer, allow_pickle, prediction_type)
        info = _healed(recipe, target, model, opening, category or [], mixed_precision)
    else:
        info = run(recipe, target).info
    say(*merge_lines(info, target))
    if evaluate:
        from safepatch.cli.evaluate import measure_merge

        how = {"device": device, "dtype": model_dtype, "allow_pickle": allow_pickle}
        how |= {"tokenizer": str(tokenizer) if tokenizer else None, "prediction_type": prediction_type}
        measure_merge(recipe.sources, target, model, category, n, how)


def _healed(
    recipe: "MergeRecipe", target: Path, model: str, opening: tuple[Any, ...], categories: list[str], precision: str
) -> "PatchInfo":
    """What a healed merge is, once it is written; `opening` is the rest of what `opened` takes."""
    from safepatch.data.corpus import Corpus
    from safepatch.runtime.check import require_fit
    from safepatch.training.healing import OPTIONS, heal

    options = replace(OPTIONS, mixed_precision=precision)
    corpora = [Corpus.open(name) for name in categories]
    require_fit(model, recipe.sources[0], opening[3])  # before gigabytes of weights are read
    return heal(opened(model, *opening), recipe, target, corpora, options).info


def _recipe(sources: list[Path], options: dict[str, Any]) -> "MergeRecipe":
    from safepatch.merging import MergeRecipe, load_recipe
    from safepatch.merging.recipe import HEALED

    if any(path.suffix in (".yaml", ".yml") for path in sources):
        if len(sources) > 1:
            raise SafepatchError("give one recipe, or patch files; not both")
        return replace(load_recipe(sources[0]), **options)
    if options.get("heal"):
        options = {"method": HEALED, **options}
    return MergeRecipe(tuple(map(str, sources)), **options)


@app.command()
def split(
    merged: PatchFile,
    category: Annotated[str, typer.Argument(help="Which part.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the part.")],
    component: Annotated[str, typer.Option(help="Of a two-sided bundle: text_encoder, text_encoder_2 or unet.")] = "",
) -> None:
    """Take a category's patch back out of a merge by cat or bundle, bit for bit."""
    from safepatch.merging import split as run

    part = run(merged, category, out, component)
    say(f"split {', '.join(part.info.categories)}: {out}, unchanged ({part.content_hash[:14]})")


@app.command()
def inspect(
    patch: PatchFile,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw a merge's conflicts as a heat map, .png or .svg.")] = None,
) -> None:
    """Say what a patch file is, from its header alone, or a guard's; `--json` leaves nothing out."""
    if _is_guard(patch):
        from safepatch.cli.guard import inspect as inspect_guard

        inspect_guard(patch, as_json)
        return
    from safepatch.artifact.container import read_header
    from safepatch.artifact.describe import described, shortened
    from safepatch.artifact.info import read_info

    info = described(read_info(patch))
    info |= {"megabytes": round(patch.stat().st_size / 1e6, 2), "hash": read_header(patch).stated_hash}
    if picture:
        from safepatch.reporting.plots import save_conflict_map

        labels = [", ".join(source["categories"]) for source in info["sources"]]
        save_conflict_map(picture, labels, info["conflicts"])
    if as_json:
        typer.echo(json.dumps(info, indent=1, sort_keys=True))
        return
    for key, value in shortened(info).items():
        say(f"{key:15s} {json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value}")


@app.command()
def verify(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A patch file, a guard's, or a PNG with a receipt.")],
    allow_zero: Annotated[
        bool, typer.Option("--allow-zero", help="Let a patch pass that changes nothing: zeros, weights of 0.")
    ] = False,
    key: Keys = None,
    replay: Annotated[bool, typer.Option("--replay", help="Draw the image again, and compare the pixels.")] = False,
    model: Model = "tiny-sd",
    patch: Annotated[Path | None, typer.Option(help="With --replay: the patch it was drawn with.")] = None,
    prompt: Annotated[str | None, typer.Option(help="With --replay, where the receipt holds only its hash.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    prediction_type: PredictionType = None,
) -> None:
    """Check a patch or a guard (structure, hash, that it can act) or an image's receipt; with --key, whose it is."""
    from safepatch.hosting.receipt import is_png, verify_image

    require_with(context, "replay", ("patch", "prompt", "negative_prompt"))
    if not file.exists():
        raise SafepatchError(f"there is no {file}; give a patch, a guard, or a PNG with a receipt")
    if not is_png(file):
        if replay or file.suffix.lower() == ".png":
            raise SafepatchError(f"{file} is no PNG with a receipt; give an image that was drawn with --receipt")
        _verify_file(file, allow_zero, key)
        return
    if key and len(key) > 1:
        raise SafepatchError("a receipt has one signature; give one --key")
    verified = verify_image(file, key[0] if key else None)
    say(f"ok: {file} is as its receipt says", f"key: {_signed(verified)}", *verified.lines())
    if replay:
        from safepatch.hosting.replay import replay as draw_again

        pipe = opened(model, device, dtype, tokenizer, allow_pickle, prediction_type)
        say(*draw_again(file, verified, pipe, patch, prompt, negative_prompt))


def _verify_file(file: Path, allow_zero: bool, key: list[Path] | None) -> None:
    say(f"ok: {file} is intact ({_intact(file, allow_zero)})")
    if key:
        from safepatch.signing import require_signed

        say(f"signed by: {require_signed(file, key)}")


def _intact(file: Path, allow_zero: bool = False) -> str:
    """What the whole file, a patch's or a guard's, is for; raises `ArtifactError` unless it is intact."""
    if _is_guard(file):
        from safepatch.guard.file import Guard

        return f"a guard for {', '.join(Guard.open(file).categories)}"
    from safepatch.artifact.patch_artifact import verify as run

    return ", ".join(run(file, allow_zero).categories)


def _is_guard(file: Path) -> bool:
    from safepatch.artifact.container import GUARD_KEY, naming, read_header

    with naming(file):
        return GUARD_KEY in read_header(file).metadata


def _signed(verified: "Verified") -> str:
    if verified.key is None:
        return "not signed, anybody could have written it"
    return f"signed with {verified.key}" + ("" if verified.is_vouched_for else "; give --key to say whose it is")


@app.command()
def sign(
    patch: PatchFile,
    key: Annotated[Path, typer.Option("--key", help="Private key, EC, PEM: openssl ecparam -name prime256v1 -genkey.")],
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="Of that key, to be told by a certificate.")
    ] = None,
    chain: Annotated[
        list[Path] | None, typer.Option("--chain", help="Certificates from that one up to the root; may be repeated.")
    ] = None,
) -> None:
    """Sign a patch or a guard: FILE.sig, and FILE.pub for whoever trusts on first use, are written beside it."""
    from safepatch.signing import sign as run

    _intact(patch)
    say(f"signed: {run(patch, key, certificate, chain or [])}")


def _numbers(text: str | None) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise SafepatchError(f"--weights takes numbers separated by commas, not '{text}'") from None
