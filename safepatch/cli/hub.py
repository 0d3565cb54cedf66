"""Verbs about the Hub: push, pull."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safepatch.cli import app, say
from safepatch.cli.options import PatchFile
from safepatch.errors import SafepatchError

if TYPE_CHECKING:
    from safepatch.artifact.info import PatchInfo


@app.command()
def push(
    patch: PatchFile,
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; it is made if need be.")],
    base_model: Annotated[
        str, typer.Option("--base-model", help="Hub id of the model it is for; what the patch records if not given.")
    ] = "",
    license: Annotated[
        str, typer.Option("--license", help="What the patch states if not given, else what its base's card states.")
    ] = "",
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Folder of an evaluation of this file, for the card.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made now.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and stop; the Hub is not asked.")] = False,
) -> None:
    """Put a patch on the Hub, with a card, and as a LoRA for other programs where it has that form."""
    from safepatch import hub
    from safepatch.artifact.container import read_header
    from safepatch.artifact.patch_artifact import verify
    from safepatch.detectors.weights import sha256_of
    from safepatch.signing import signed_by

    hub.require_repo(repo)
    if not dry_run:
        hub.require_token()
    info, content_hash = verify(patch), read_header(patch).stated_hash
    base = base_model or hub.stated_base(info)
    license = license or info.license or (hub.license_of(base) if base and not dry_run else "")
    measured = hub.figures(figures, content_hash) if figures else ""
    with tempfile.TemporaryDirectory() as folder:
        lora, why = _exported(patch, Path(folder), info)
        files = {hub.PATCH_FILE: patch, **({hub.LORA_FILE: lora} if lora else {})}
        files |= {f"{hub.PATCH_FILE}{path.suffix}": path for path in signed_by(patch)}
        sums = {name: sha256_of([path]) for name, path in files.items()}
        text = hub.card(info, hub.Beside(repo, content_hash, sums, base, license, measured, why))
        if dry_run:
            say(*text.splitlines())
            return
        pushed = hub.push(files, repo, text, private)
    say(f"pushed: {pushed.page}", f"this very file: {pushed.pinned}")


@app.command()
def pull(
    patch: Annotated[str, typer.Argument(help="user/repo, user/repo@REVISION, user/repo@REVISION#CONTENT-HASH.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where to write the patch; here, called after its repository.")
    ] = None,
) -> None:
    """Fetch a patch from the Hub, check it whole, and write it; what is in the cache needs no network."""
    from safepatch import hub
    from safepatch.artifact.patch_artifact import verify
    from safepatch.files import copy_file
    from safepatch.signing import signed_by

    reference = hub.Reference.parse(patch)
    if out is None and (out := Path(f"{reference.repo.split('/')[1]}.safetensors")).exists():
        raise SafepatchError(f"{out} is there already; say where to write with -o")
    fetched = hub.fetch(reference, signed=True)
    info = verify(fetched.path)
    copy_file(fetched.path, out)
    for path in signed_by(fetched.path):
        copy_file(path, out.with_name(f"{out.name}{path.suffix}"))
    say(f"pulled: {out} ({', '.join(info.categories)})", f"this very file: {fetched.pinned}")


def _exported(patch: Path, folder: Path, info: "PatchInfo") -> tuple[Path | None, str]:
    """The patch as a LoRA in `folder`, as most programs read it; None, and why, where it has no such form."""
    from safepatch.diffusion import UNET, config_kind
    from safepatch.errors import ConfigError
    from safepatch.export import export
    from safepatch.hub import LORA_FILE

    is_unet = config_kind(info.fingerprint) is UNET
    try:
        return (export(patch, folder / LORA_FILE) if is_unet else export(patch, folder, "diffusers")), ""
    except ConfigError as error:
        return None, str(error)
