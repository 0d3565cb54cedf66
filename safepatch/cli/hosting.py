"""Verbs for hosts: audit, keygen, serve."""

from pathlib import Path
from typing import Annotated

import typer

from safepatch.cli import app, say
from safepatch.cli.options import (
    MERGED,
    TOGETHER,
    AllowPickle,
    Device,
    Dtype,
    GuardAction,
    Model,
    PredictionType,
    Reads,
    Tokenizer,
    only,
    opened,
    require_with,
)


@app.command()
def audit(
    prompts: Annotated[Path, typer.Argument(help="A log of prompts: CSV, TSV, JSONL, JSON, TOML or text.")],
    patches: Annotated[list[Path], typer.Option("--patch", help="The patch, single or merged.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder of audit.csv and audit.html; may be half done.")
    ] = Path("audit"),
    model: Model = "tiny-sd",
    column: Annotated[str | None, typer.Option(help="That holds the prompts, where its name does not say so.")] = None,
    gate_threshold: Annotated[
        float | None, typer.Option(help="Probability from which a gate opens; what the patch says if not given.")
    ] = None,
    reads: Reads = "windows",
    guards: Annotated[
        list[Path] | None, typer.Option("--guard", help="A guard's file, whose verdicts stand beside the patch's.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Say which prompts a patch would act on, and by which words; no image is made."""
    from safepatch.files import require_writable
    from safepatch.guard.decide import lacking
    from safepatch.guard.file import Guard
    from safepatch.hosting.audit_log import audit as run
    from safepatch.runtime.check import require_fit

    patch, guard = only(patches, "--patch", MERGED), only(guards or [None], "--guard", TOGETHER)
    require_writable(out / "audit.csv")
    info, _ = require_fit(model, patch, allow_pickle)  # before gigabytes of weights are read
    if guard:
        for line in lacking(Guard.open(guard).categories, info.categories):
            say(line, err=True)
    pipe = opened(model, device, dtype, tokenizer, allow_pickle)
    say(*run(prompts, pipe, patch, out, column, gate_threshold, reads, guard).lines())


@app.command()
def keygen(
    out: Annotated[
        Path, typer.Option("-o", "--out", help="PEM file of the private key; the public one goes beside it.")
    ],
) -> None:
    """Make a pair of keys to sign receipts with."""
    from safepatch.hosting.keys import keygen as run

    private, public = run(out)
    say(f"private key: {private} (keep it to yourself)", f"public key: {public}")


@app.command()
def serve(
    context: typer.Context,
    patches: Annotated[
        list[Path], typer.Option("--patch", help="The patch, single or merged; without it nothing is served.")
    ],
    model: Model = "tiny-sd",
    host: Annotated[
        str, typer.Option(help="Address to serve on; any but this machine's own needs --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 8188,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line; SAFEPATCH_API_KEYS holds more, comma-separated.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images of equal steps, size and guidance that are drawn at once.")] = 4,
    waiting: Annotated[
        int, typer.Option(help="Images that may wait; whoever comes then is told when to come back.")
    ] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 120.0,
    max_steps: Annotated[int, typer.Option(help="Denoising steps that may be asked for.")] = 100,
    max_size: Annotated[int, typer.Option(help="Pixels of a side that may be asked for.")] = 1024,
    least_scale: Annotated[
        float | None, typer.Option(help="Strength of the patch that requests may choose, up to 1; none if not given.")
    ] = None,
    guards: Annotated[
        list[Path] | None, typer.Option("--guard", help="A guard's file: it judges prompts before they may wait.")
    ] = None,
    guard_action: GuardAction = "block",
    receipt: Annotated[bool, typer.Option("--receipt", help="Put a receipt into every PNG, see generate.")] = False,
    receipt_key: Annotated[Path | None, typer.Option(help="With --receipt: sign it with this key, see keygen.")] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="With --receipt-key: its certificates, PEM, for a C2PA manifest in every PNG.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    prediction_type: PredictionType = None,
) -> None:
    """Serve images over HTTP, each drawn with the patch or not at all."""
    from safepatch.hosting.limits import Keys, Limits
    from safepatch.hosting.serve import Service, listening
    from safepatch.hosting.serve import serve as run
    from safepatch.hosting.stamp import Stamp
    from safepatch.runtime.check import require_fit

    require_with(context, "guards", ("guard_action",))
    require_with(context, "receipt", ("receipt_key", "certificate"))
    patch, guard = only(patches, "--patch", MERGED), only(guards or [None], "--guard", TOGETHER)
    limits = Limits(timeout=timeout, steps=max_steps, edge=max_size, least_scale=least_scale)
    known = Keys.of(keys)
    stamp = Stamp.of(receipt_key, certificate=certificate) if receipt else None
    service = Service(patch, limits, batch, waiting, guard, guard_action, stamp)
    require_fit(model, patch, allow_pickle)
    with listening(host, port, known) as ours:
        say(f"serving {model} with {patch} on http://{host}:{port}, once it is loaded")
        run(ours, lambda: opened(model, device, dtype, tokenizer, allow_pickle, prediction_type), known, service)
