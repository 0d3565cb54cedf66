"""Options that several verbs share."""

from pathlib import Path
from typing import Annotated, Any

import typer

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
    import torch

    from safepatch.errors import SafepatchError
    from safepatch.models.load import ModelConfig

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0][:120]
        raise SafepatchError(f"no device '{device}' here ({first}); choose another --device") from None
    source = None if tokenizer is None else str(tokenizer)
    return ModelConfig(model, source, dtype, prediction_type, allow_pickle).load().to(device)
