"""Options that several verbs share, and what can be wrong with any."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from safepatch.errors import SafepatchError

T = TypeVar("T")

# What to do instead of naming several.
MERGED = "merge them first: safepatch merge"
TOGETHER = "train one for all their categories: safepatch guard train"

PatchFile = Annotated[Path, typer.Argument(help="A patch file (.safetensors).")]
Model = Annotated[
    str, typer.Option("--model", help="tiny-sd, one of its siblings, a diffusers folder, a file, a Hub id.")
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        help="For a single file: CLIP's tokenizer folder (default: the Hub cache); of SD3, Flux a pipeline's folder.",
    ),
]
Keys = Annotated[list[Path] | None, typer.Option("--key", help="Public key or root certificate, PEM; may be repeated.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Open a .ckpt, with torch's restricted loader.")]
Device = Annotated[str, typer.Option("--device", help="Where to draw: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Of the model: float32 (default), float16, bfloat16.")]
ModelDtype = Annotated[str | None, typer.Option("--model-dtype", help="Of the model, where --dtype is the patch's.")]
PredictionType = Annotated[
    str | None,
    typer.Option(
        "--prediction-type", help="Of a single file's UNet: epsilon or v_prediction; default: what its family has."
    ),
]
Category = Annotated[
    list[str] | None, typer.Option("--category", help="A shipped category, or a category file; may be given again.")
]
Reads = Annotated[
    str,
    typer.Option("--reads", help="What a gate reads: windows, any few words in a row, or prompt, all of it at once."),
]
GuardAction = Annotated[
    str,
    typer.Option(
        "--guard-action", help="block what the guard claims, rewrite it with harmless words, or only score it."
    ),
]

# Of verbs that measure; what is not given is the matrix's own.
Models = Annotated[list[str] | None, typer.Option("--model", help="On what; tiny-sd. May be repeated.")]
Patches = Annotated[list[Path] | None, typer.Option("--patch", help="A patch; may be repeated.")]
Detectors = Annotated[
    list[str] | None, typer.Option("--detector", help="Judge, NAME[:THRESHOLD][@WEIGHTS]; may be repeated.")
]
MatrixDevice = Annotated[str | None, typer.Option("--device", help="Where to draw: cpu, cuda, cuda:1, mps.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps; 20.")]


def opened(
    model: str,
    device: str = "cpu",
    dtype: str | None = None,
    tokenizer: Path | None = None,
    allow_pickle: bool = False,
    prediction_type: str | None = None,
) -> Any:
    """The pipeline that these options name, on its device.

    Raises:
        SafepatchError: for a device that there is not, and as `ModelConfig.load`.
    """
    from safepatch.diffusion.askable import require_device
    from safepatch.models.load import ModelConfig

    require_device(device)
    source = None if tokenizer is None else str(tokenizer)
    return ModelConfig(model, source, dtype, prediction_type, allow_pickle).load().to(device)


def only(given: Sequence[T], flag: str, instead: str) -> T:
    """The value of an option that was given once; raises `SafepatchError` otherwise, with what to do `instead`.

    Of an option that is not asked for again the command line takes the last value, and says nothing of the others.
    """
    if len(given) != 1:
        raise SafepatchError(f"{flag} is given {len(given)} times, and one would count; {instead}")
    return given[0]


def require_with(context: typer.Context, option: str, of_it: Iterable[str]) -> None:
    """Raise `SafepatchError` where options `of_it` are given, which would do nothing, and `option` is not.

    Options are named as the verb's parameters.
    """
    if idle := None if _is_given(context, option) else next((name for name in of_it if _is_given(context, name)), None):
        flags = {str(parameter.name): parameter.opts[0] for parameter in context.command.params}
        raise SafepatchError(f"{flags[idle]} does nothing alone; give {flags[option]} too, or leave it out")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
