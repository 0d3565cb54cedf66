"""A pipeline out of one of SD3's or Flux's single files, and of a folder what the file lacks: encoders, tokenizers."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from safepatch.diffusion import (
    CLIP,
    assembled,
    filled_text_encoder,
    filled_transformer,
    filled_vae,
    load_tokenizer,
    part_of_folder,
)
from safepatch.errors import ModelNotFound, UnsupportedModel
from safepatch.models.flow_file import FlowFile
from safepatch.models.folder import write_config

DISPENSABLE = {"sd3": ("text_encoder_3", "tokenizer_3")}  # without T5 SD3 reads what CLIP's encoders say
PADDED_BY = {("sd3", "tokenizer_2"): "!"}  # the token that fills a prompt up, as OpenCLIP's encoder was trained
NAMED = {"transformer": "transformer", "text_encoder": "text encoder", "tokenizer": "tokenizer", "vae": "VAE"}


def load_flow_file(file: FlowFile, folder: str | Path | None, dtype: torch.dtype | None) -> Any:
    """The pipeline of a single file; never asks the network.

    Args:
        file: its header.
        folder: of a pipeline that has what the file lacks; or of CLIP's tokenizer alone.
        dtype: of all weights; float32 by default.

    Raises:
        ModelNotFound: when something is in neither.
        UnsupportedModel: when a weight, or all of a component that is there, cannot be read.
    """
    config, dtype, made = file.config, dtype or torch.float32, dict[str, Any]()
    for name, source in sources(file, folder).items():
        made[name] = None if source is None else _made(file, name, source, dtype)
    for name in (name for name in made if name.startswith("tokenizer") and made[name] is not None):
        _require_known(file, name, made)
    return assembled(config["model_index"], config["scheduler"], made)


def sources(file: FlowFile, folder: str | Path | None) -> dict[str, Callable[[torch.dtype], Any] | None]:
    """Of each component but the scheduler what makes it, of a dtype; None for one that the family can do without.

    Raises:
        ModelNotFound: when one that it needs is nowhere; nothing has been read then.
    """
    found = {name: _source(file, name, folder) for name in _components(file.config["model_index"])}
    third = DISPENSABLE.get(file.family, ())
    if not (third and found[third[0]] is None):
        third = ()
    lacking = [name for name, source in found.items() if source is None and name not in third]
    if not lacking:
        return found | dict.fromkeys(third)
    where = f"{folder} has" if folder else "no folder is named that has"
    none = "none" if folder else "them"
    raise ModelNotFound(
        f"{file.weights.path} holds no {', no '.join(map(_called, lacking))}, and {where} {none}; name a diffusers "
        f"folder of {file.family} (--tokenizer FOLDER, of train model.tokenizer=, in Python tokenizer=)"
    )


def _components(index: Mapping[str, Any]) -> list[str]:
    """Those of a pipeline that it cannot draw without, but for the scheduler."""
    return [name for name, entry in index.items() if isinstance(entry, list) and entry[0] and name != "scheduler"]


def _source(file: FlowFile, name: str, folder: str | Path | None) -> Callable[[torch.dtype], Any] | None:
    entry = file.config["model_index"][name]
    if name == "transformer":
        return lambda dtype: filled_transformer(file.config[name], file.read, dtype)
    if name == "vae" and name in file.parts:
        return lambda dtype: _vae(file, dtype)
    if name in file.parts:
        return lambda dtype: filled_text_encoder(entry, file.config[name], file.of_part(name), dtype)
    if folder is not None and (Path(folder) / name).is_dir():
        return lambda dtype: part_of_folder(Path(folder) / name, entry, dtype)
    if entry[1] != "CLIPTokenizer":
        return None
    try:
        load_tokenizer(folder or CLIP)
    except ModelNotFound:
        return None
    return lambda _: load_tokenizer(folder or CLIP, PADDED_BY.get((file.family, name)))


def _made(file: FlowFile, name: str, source: Callable[[torch.dtype], Any], dtype: torch.dtype) -> Any:
    try:
        return source(dtype)
    except (RuntimeError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:160]
        raise UnsupportedModel(f"the {_called(name)} for {file.weights.path} cannot be read ({why})") from error


def _vae(file: FlowFile, dtype: torch.dtype) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return filled_vae(write_config(file.config, Path(folder)), file.of_part("vae"), dtype)


def _require_known(file: FlowFile, name: str, made: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModel` for a tokenizer with tokens that its text encoder does not know."""
    tokenizer, encoder = made[name], made[name.replace("tokenizer", "text_encoder")]
    if len(tokenizer) > encoder.config.vocab_size:
        raise UnsupportedModel(
            f"the {_called(name)} has {len(tokenizer)} tokens, the text encoder for {file.weights.path} knows "
            f"{encoder.config.vocab_size}; pass the one that belongs to it"
        )


def _called(name: str) -> str:
    kind = next(kind for kind in NAMED if name.startswith(kind))
    return f"{NAMED[kind]} ({name})"
