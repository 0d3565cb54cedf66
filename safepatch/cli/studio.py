"""The verb for the page: studio."""

from pathlib import Path
from typing import Annotated

import typer

from safepatch.cli import app, say
from safepatch.cli.options import AllowPickle, Device, Dtype, Model, PredictionType, Tokenizer, opened

START = "weapons"  # the category whose shipped patch is ticked where nobody names one


@app.command()
def studio(
    patches: Annotated[
        list[str] | None, typer.Argument(help="Patches to begin with: files, or user/repo[@revision].")
    ] = None,
    model: Model = "tiny-sd",
    host: Annotated[
        str, typer.Option(help="Address to show it on; any but this machine's own needs --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to show it on.")] = 8189,
    keys: Annotated[
        Path | None, typer.Option(help="File of keys, one a line, that a browser is asked for as the password.")
    ] = None,
    detector: Annotated[str | None, typer.Option(help="Judge of what is blurred, NAME[:THRESHOLD][@WEIGHTS].")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    prediction_type: PredictionType = None,
) -> None:
    """Show a page on this machine: base and patched side by side, gates, strengths, attacks, merging."""
    from safepatch.detectors import parse_detector
    from safepatch.hosting.limits import Keys
    from safepatch.hosting.serve import listening
    from safepatch.studio.serve import require_packages
    from safepatch.studio.serve import serve as run

    require_packages()
    if detector:
        parse_detector(detector)
    known = Keys.of(keys)
    with listening(host, port, known) as ours:
        from safepatch.studio import chosen
        from safepatch.studio.desk import Desk
        from safepatch.studio.settings import Settings

        start = Settings(model, tuple(patches or _shipped(model)))
        chosen.infos(start)  # a file that is no patch is told now
        given = (device, dtype, tokenizer, allow_pickle, prediction_type)
        desk = Desk(lambda name: opened(name, *given), start, detector, device)
        desk.allow_pickle, desk.opening = allow_pickle, _opening(*given)
        say(f"studio: http://{f'[{host}]' if ':' in host else host}:{ours.getsockname()[1]} (Ctrl+C ends it)")
        run(ours, desk, known, host)


def _shipped(model: str) -> list[str]:
    """A shipped patch, for an embedded model."""
    from safepatch.models.load import MODELS
    from safepatch.studio.chosen import offered

    named = [choice.value for choice in offered() if choice.title == f"{START} · lora"]
    return named if model in MODELS else []


def _opening(
    device: str, dtype: str | None, tokenizer: Path | None, allow_pickle: bool, prediction_type: str | None
) -> list[str]:
    words = [] if device == "cpu" else ["--device", device]
    words += ["--dtype", dtype] if dtype else []
    words += ["--tokenizer", str(tokenizer)] if tokenizer else []
    words += ["--prediction-type", prediction_type] if prediction_type else []
    return words + (["--allow-pickle"] if allow_pickle else [])
