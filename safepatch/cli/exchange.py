"""Verbs that write and read other programs' files: export, import."""

from pathlib import Path
from typing import Annotated

import typer

from safepatch.cli import app, say
from safepatch.cli.options import AllowPickle, Dtype, PatchFile, Tokenizer

CONTROLNET = "controlnet"


@app.command()
def export(
    patch: PatchFile,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A .safetensors file; of diffusers, and of a ControlNet, a folder.")
    ],
    form: Annotated[
        str, typer.Option("--format", help="kohya (user interfaces), diffusers, or controlnet, of a control patch.")
    ] = "kohya",
    model: Annotated[
        str, typer.Option("--model", help="Of a ControlNet, whose weights it takes: a folder, a file, a Hub id.")
    ] = "tiny-sd",
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write a lora patch as a LoRA, which `import` makes the gated patch again, or a control patch as a ControlNet."""
    from safepatch.errors import lookup
    from safepatch.export import FORMATS

    lookup(dict.fromkeys((*FORMATS, CONTROLNET)), form, what="format")
    if form == CONTROLNET:
        _export_controlnet(patch, out, model, dtype, tokenizer, allow_pickle)
        return
    from safepatch.export import export as run

    path = run(patch, out, form)
    say(f"exported: {path}; without safepatch it acts on every prompt, on the negative one too")


def _export_controlnet(
    patch: Path, out: Path, model: str, dtype: str | None, tokenizer: Path | None, allow_pickle: bool
) -> None:
    from safepatch.artifact.info import read_info
    from safepatch.export import export_controlnet, require_controlnet
    from safepatch.models.load import ModelConfig
    from safepatch.runtime.check import require_fit

    info = read_info(patch)
    require_controlnet(info)
    require_fit(model, patch, allow_pickle)  # before gigabytes of weights are read
    pipe = ModelConfig(model, str(tokenizer) if tokenizer else None, dtype, allow_pickle=allow_pickle).load()
    path = export_controlnet(patch, out, pipe)
    lost = "its gate is lost: it" if info.config.get("layout", {}).get("gate") else "it"
    say(f"exported: {path}; {lost} acts on every prompt, on the negative one too, whatever the hint image")


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
    is_gated = any(each.config.get("layout", {}).get("gate") for each in artifact.info.singles())
    say(f"imported: {out} ({', '.join(artifact.info.categories)}, {'with its gate' if is_gated else 'without a gate'})")
