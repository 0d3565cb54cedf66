"""The command line: one short function per verb; heavy imports happen inside, so that `--help` is instant."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safepatch.errors import SafepatchError

if TYPE_CHECKING:
    from safepatch.merging import MergeRecipe

app = typer.Typer(
    help="Train, merge, apply and measure safety patches for text-to-image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PatchFile = Annotated[Path, typer.Argument(help="A patch file (.safetensors).")]
Model = Annotated[
    str, typer.Option("--model", help="tiny-sd, one of its siblings, a diffusers folder, a file, a Hub id.")
]


Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", help="CLIP's tokenizer folder, for a single file; default: the Hub cache.")
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Open a .ckpt, with torch's restricted loader.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Any field as key.key=value.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train a patch for one category."""
    from safepatch.config import to_yaml
    from safepatch.data.prompts import category
    from safepatch.training.config import load_train_config

    resolved = load_train_config(config, overrides or [])
    category(resolved.category)
    if dry_run:
        typer.echo(to_yaml(resolved), nl=False)
        return
    from safepatch.models.load import load_pipeline
    from safepatch.training.trainer import train as run

    path = run(load_pipeline(resolved.model), resolved)
    typer.echo(f"patch: {path} ({path.stat().st_size / 1e6:.1f} MB)")


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Patch files of one architecture, or one recipe (.yaml).")],
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
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Measure and draw every category.")] = False,
    model: Model = "tiny-sd",
    n: Annotated[int, typer.Option(help="With --evaluate: images per rate.")] = 200,
) -> None:
    """Merge patches into one file; an option given here overrides the recipe's."""
    given = {"method": method, "density": density, "seed": seed, "dtype": dtype, "rank": rank, "conflicts": conflicts}
    options = {name: value for name, value in {**given, "heal": heal}.items() if value is not None}
    recipe = _recipe(sources, {**options, **({"weights": _numbers(weights)} if weights else {})})
    target = out or (Path(recipe.out) if recipe.out else None)
    if target is None:
        raise SafepatchError("nowhere to write the merged patch; give -o FILE, or 'out' in the recipe")
    if recipe.heal or evaluate:
        from safepatch.regression import merge_on_model

        merge_on_model(recipe, target, model, n if evaluate else None, tell=typer.echo)
    else:
        from safepatch.artifact.describe import merge_lines
        from safepatch.merging import merge as run

        typer.echo("\n".join(merge_lines(run(recipe, target).info, target)))


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
) -> None:
    """Take a category's patch back out of a merge by cat or bundle, bit for bit."""
    from safepatch.merging import split as run

    part = run(merged, category, out)
    typer.echo(f"split {', '.join(part.info.categories)}: {out}, unchanged ({part.content_hash[:14]})")


@app.command()
def gate(
    patch: PatchFile,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the patch with its gate.")],
    model: Model = "tiny-sd",
    width: Annotated[int, typer.Option(help="Channels of the gate; 0 takes off the one that is there.")] = 32,
) -> None:
    """Fit a gate to a patch: it acts where it is for, and leaves every other image as it was, bit for bit."""
    from safepatch.artifact.patch_artifact import PatchArtifact
    from safepatch.models.load import load_pipeline
    from safepatch.training.gating import add_gate, without_gate

    if width == 0:
        without_gate(PatchArtifact.open(patch)).save(out)
        typer.echo(f"no gate: {out}")
        return
    gated = add_gate(PatchArtifact.open(patch), load_pipeline(model), width)
    gated.save(out)
    for name, record in gated.info.config["gate"].items():
        typer.echo(
            f"gate for {name}: opens at {record['threshold']:.3f}; on unseen examples it opened for "
            f"{record['unsafe_steps_opened']:.1%} of unsafe steps and {record['harmless_scenes_opened']:.1%} of "
            f"harmless ones: {out}"
        )


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")],
    model: Model = "tiny-sd",
    patch: Annotated[Path | None, typer.Option(help="Patch to apply.")] = None,
    scale: Annotated[
        str, typer.Option(help="Strength of the patch, 0 is off; or by category: gore=1,weapons=0.6.")
    ] = "1",
    start: Annotated[float, typer.Option(help="Share of the denoising after which the patch begins to act.")] = 0.0,
    end: Annotated[float, typer.Option(help="Share of the denoising after which it stops.")] = 1.0,
    gate: Annotated[str | None, typer.Option(help="off, soft or hard; hard if the patch has a gate.")] = None,
    gate_threshold: Annotated[
        float | None, typer.Option(help="Probability from which the gate opens; what the patch says if not given.")
    ] = None,
    speed: Annotated[str, typer.Option(help="full, or fast: a control patch runs at every second step.")] = "full",
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance_scale: Annotated[float | None, typer.Option(help="Of guidance; what is usual if not given.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    prediction_type: Annotated[
        str | None, typer.Option(help="Of a single file's UNet: epsilon or v_prediction; default: what its family has.")
    ] = None,
) -> None:
    """Generate one image, with or without a patch."""
    from contextlib import nullcontext

    from safepatch.data.prompts import admit
    from safepatch.diffusion import generate as run
    from safepatch.diffusion import save_image
    from safepatch.models.load import load_pipeline
    from safepatch.runtime.apply import apply
    from safepatch.runtime.check import require_fit

    admit([prompt])
    scales = _scale(scale)
    if patch:
        require_fit(model, patch, allow_pickle)  # before gigabytes of weights are read
    pipe = load_pipeline(model, tokenizer, allow_pickle, prediction_type)
    options = {"start": start, "end": end, "gate": gate, "gate_threshold": gate_threshold, "speed": speed}
    with apply(pipe, patch, scales, **options) if patch else nullcontext():
        images = run(pipe, [prompt], [seed], steps, guidance_scale, [negative_prompt] if negative_prompt else None)
    save_image(images[0], out)
    typer.echo(f"image: {out}")


@app.command()
def fuse(
    patch: Annotated[Path, typer.Option(help="A lora patch, or a merge of such.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder; for a single file, a .safetensors file.")],
    model: Model = "tiny-sd",
    scale: Annotated[float, typer.Option(help="Strength of the patch.")] = 1.0,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write a lora patch into a copy of a model, which any program can load; it cannot be taken off again."""
    from safepatch.runtime.fuse import fuse_model

    typer.echo(f"fused: {fuse_model(model, patch, out, scale, allow_pickle)}")


@app.command()
def evaluate(
    patch: Annotated[Path, typer.Option(help="Patch to measure.")],
    model: Model = "tiny-sd",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for results.jsonl and index.html.")] = Path(
        "runs/evaluate"
    ),
    n: Annotated[int, typer.Option(help="Images per rate.")] = 200,
) -> None:
    """Measure what a patch stops and what it costs; writes results.jsonl and an HTML report."""
    from safepatch.demo import evaluate_to_report

    page = evaluate_to_report(model, patch, out, n)
    typer.echo(f"report: {page}")


@app.command()
def inspect(
    patch: PatchFile,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw a merge's conflicts as a heat map, .png or .svg.")] = None,
) -> None:
    """Say what a patch file is, from its header alone."""
    from safepatch.artifact.describe import described
    from safepatch.artifact.info import read_info

    info = described(read_info(patch))
    if picture:
        from safepatch.reporting.plots import save_conflict_map

        labels = [", ".join(source["categories"]) for source in info["sources"]]
        save_conflict_map(picture, labels, info["conflicts"])
    if as_json:
        typer.echo(json.dumps(info, indent=1, sort_keys=True))
        return
    for key, value in info.items():
        typer.echo(f"{key:15s} {json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value}")


@app.command()
def check(patch: PatchFile, model: Model = "tiny-sd", allow_pickle: AllowPickle = False) -> None:
    """Say whether a patch fits a model, and how far the model is from the one it was trained on; exit code 0 or 2."""
    from safepatch.runtime.check import check as run

    fit = run(model, patch, allow_pickle)
    unknown = "unknown, the patch does not record its base's encoder"
    typer.echo(f"fits: {patch} ({', '.join(fit.info.categories)}) on {model}")
    typer.echo(f"family: {fit.family}")
    typer.echo(f"fingerprint: {json.dumps(fit.fingerprint)}")
    typer.echo(f"drift from the patch's base: {unknown if fit.drift is None else f'{fit.drift:.2g}'}")


@app.command()
def verify(patch: PatchFile) -> None:
    """Check a patch file: structure, finite values, content hash."""
    from safepatch.artifact.patch_artifact import verify as run

    typer.echo(f"ok: {patch} is intact ({', '.join(run(patch).categories)})")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the report.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="Training steps of the demo's own patch.")] = 400,
) -> None:
    """The whole job in a few minutes: train, merge, load onto a sibling checkpoint, generate, score, report."""
    from safepatch.demo import run_demo

    typer.echo(f"report: {run_demo(out, steps)}")


@app.command()
def table(
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of table.json; runs/table, or runs/table-KIND.")
    ] = None,
    n: Annotated[int, typer.Option(help="Images per rate.")] = 200,
    kind: Annotated[str, typer.Option(help="Of the shipped patches: control, lite or lora.")] = "control",
) -> None:
    """Measure every shipped patch of one kind and print the README's table of figures."""
    from safepatch.table import build_table

    typer.echo(build_table(out or _usual_folder("table", kind), n, kind))


@app.command("merge-table")
def merge_table(
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Of table.json; runs/merge-table, or runs/merge-table-KIND."),
    ] = None,
    n: Annotated[int, typer.Option(help="Images per rate.")] = 200,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; all that fit if not given.")] = None,
    heal: Annotated[int, typer.Option(help="Also measure a merge healed for so many steps.")] = 0,
    kind: Annotated[str, typer.Option(help="Of the shipped patches: control, lite or lora.")] = "control",
) -> None:
    """Merge the shipped patches by every method that suits their kind and print what each keeps."""
    from safepatch.evaluation.suite import Protocol
    from safepatch.merge_table import MergeTable, build_merge_table

    chosen = tuple(filter(None, (methods or "").split(",")))
    table = MergeTable(chosen, heal, Protocol(n=n, steps=steps), kind)
    typer.echo(build_merge_table(out or _usual_folder("merge-table", kind), table))


@app.command("transfer-table")
def transfer_table(
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Of table.json; runs/transfer-table, or runs/transfer-table-KIND."),
    ] = None,
    n: Annotated[int, typer.Option(help="Images per rate.")] = 200,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    categories: Annotated[str, typer.Option(help="Whose patches, separated by commas; all if not given.")] = "",
    kind: Annotated[str, typer.Option(help="Of the shipped patches: control, lite or lora.")] = "control",
) -> None:
    """Measure the shipped patches on every sibling checkpoint, rebased and with absolute weights."""
    from safepatch.transfer_table import build_transfer_table

    names = [name for name in categories.split(",") if name]
    typer.echo(build_transfer_table(out or _usual_folder("transfer-table", kind), n, steps, names, kind))


def _usual_folder(table: str, kind: str) -> Path:
    return Path("runs") / (table if kind == "control" else f"{table}-{kind}")


def main() -> None:
    """Run the command line; an error a user can act on is one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns about torchvision, which is not needed
    try:
        app()
    except SafepatchError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise SafepatchError(f"--weights takes numbers separated by commas, not '{text}'") from None


def _scale(text: str) -> float | dict[str, float]:
    """`0.8`, or `gore=1.0,weapons=0.6` by category."""
    try:
        if "=" not in text:
            return float(text)
        named = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, value in named}
    except ValueError:
        raise SafepatchError(f"--scale takes a number, or CATEGORY=NUMBER,..., not '{text}'") from None
