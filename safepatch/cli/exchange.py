"""Verbs that write and read other programs' files: export, import."""

from pathlib import Path
from typing import Annotated

import typer

from safepatch.cli import app, say
from safepatch.cli.options import PatchFile


@app.command()
def export(
    patch: PatchFile,
    out: Annotated[Path, typer.Option("-o", "--out", help="A .safetensors file, or of diffusers a folder.")],
    form: Annotated[str, typer.Option("--format", help="kohya (user interfaces), diffusers.")] = "kohya",
) -> None:
    """Write a lora patch as an ordinary LoRA: there it is always on; `import` makes it the gated patch again."""
    from safepatch.export import export as run

    path = run(patch, out, form)
    say(f"exported: {path}; without safepatch it acts on every prompt, on the negative one too")


@app.command("import")
def import_(
    lora: Annotated[Path, typer.Argument(help="A LoRA: kohya's, diffusers', or what `export` wrote.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the patch.")],
    category: Annotated[
        str | None, typer.Option("--category", help="Name or file: what somebody else's LoRA is for.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="What it is for; its family's usual sizes if not given.")
    ] = None,
    partly: Annotated[bool, typer.Option("--partly", help="Leave out what a patch has no place for.")] = False,
    license: Annotated[str, typer.Option("--license", help="Of the patch; what the file states if not given.")] = "",
) -> None:
    """Make a patch of a LoRA; somebody else's has no gate: fit one with `gate`, then merge, apply, attack it."""
    from safepatch.data.corpus import Corpus
    from safepatch.export import import_lora

    named = Corpus.open(category).category if category else None
    artifact = import_lora(lora, named, model, partly, license)
    artifact.save(out)
    gate = "with its gate" if artifact.info.config.get("layout", {}).get("gate") else "without a gate"
    say(f"imported: {out} ({', '.join(artifact.info.categories)}, {gate})")
