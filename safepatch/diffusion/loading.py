"""Pipelines and their parts from folders, single files and the Hub."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from safepatch.diffusion.components import UNCHECKED, Components, not_supported
from safepatch.diffusion.hosts.kinds import TRANSFORMERS, config_kind
from safepatch.errors import ModelNotFound, UnsupportedModel

T = TypeVar("T")

HALF = "fp16"  # as variants of weights are called
CLIP = "openai/clip-vit-large-patch14"


def load_folder(
    path: Path, index: Mapping[str, Any], dtype: torch.dtype | None, variant: str | None = None
) -> DiffusionPipeline:
    """The pipeline that diffusers saved in the folder `path`, of whatever class its index names.

    Args:
        path: of the folder.
        index: its `model_index.json`.
        dtype: of all weights; float32 when None.
        variant: of weights, where the folder has no plain ones.

    Raises:
        ModelNotFound: when a tokenizer is missing.
        UnsupportedModel: when something else is missing or damaged.
    """
    # transformers would keep the dtype that is stored, beside diffusers' float32
    options = {"dtype": dtype or torch.float32, "variant": variant, "local_files_only": True, **_unchecked(index)}
    try:
        pipe = DiffusionPipeline.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UnsupportedModel(f"{path} cannot be read ({_first_line(error)}); fetch or save it again") from error
    for name, part in pipe.components.items():
        if name.startswith("tokenizer"):
            _require_words(part, path / name)
    return pipe


def denoiser_entry(index: Mapping[str, Any]) -> tuple[str, str]:
    """The component of a `model_index.json` that denoises, and its class; raises `UnsupportedModel` if unknown."""
    if "unet" in index:
        return "unet", index["unet"][1]
    name = (index.get("transformer") or [None, None])[1]
    if name not in TRANSFORMERS:
        raise not_supported(str(index.get("_class_name", "a model without a UNet")))
    return "transformer", name


def load_single_file(
    path: Path, config: Path, tokenizers: Mapping[str, CLIPTokenizer], dtype: torch.dtype | None
) -> DiffusionPipeline:
    """The pipeline in a file of the original (CompVis/LDM) layout; never asks the network.

    Args:
        path: the checkpoint.
        config: folder with `model_index.json` and a configuration per component, as diffusers lays them out.
        tokenizers: by component name; they are not in such files.
        dtype: of all weights; float32 when None.

    Raises:
        UnsupportedModel: when the file lacks weights that its family has.
    """
    index = read_json(config / "model_index.json")
    build = getattr(diffusers, index["_class_name"]).from_single_file
    try:
        pipe = build(
            str(path), config=str(config), local_files_only=True, dtype=dtype, **tokenizers, **_unchecked(index)
        )
    except NotImplementedError as error:  # torch, on moving a weight that was never filled in
        raise UnsupportedModel(f"{path} lacks weights of its UNet or VAE; fetch the whole file") from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise UnsupportedModel(f"{path} cannot be read as {index['_class_name']} ({_first_line(error)})") from error
    for part in Components.of(pipe).modules():
        absent = [name for name, tensor in part.named_parameters() if tensor.is_meta]
        if absent:
            raise UnsupportedModel(f"{path} lacks {len(absent)} weights of {type(part).__name__}, e.g. '{absent[0]}'")
    return pipe


def read_unet(source: str) -> Any:
    """What denoises alone, of a Hub id."""
    component, name = denoiser_entry(DiffusionPipeline.load_config(source))
    load = getattr(diffusers, name).from_pretrained
    return _of_a_variant(lambda variant: load(source, subfolder=component, variant=variant))


def _of_a_variant(load: Callable[[str | None], T]) -> T:
    """What `load` makes of plain weights, or of those in half precision, as many repositories hold no others."""
    try:
        return load(None)
    except (OSError, ValueError) as error:
        try:
            return load(HALF)
        except (OSError, ValueError):
            raise error from None


def empty_unet(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """What denoises by this configuration, its weights on the meta device: their shapes, and nothing else."""
    log = logging.getLogger("diffusers")
    level, _ = log.level, log.setLevel(logging.ERROR)  # it warns that nothing is kept in float32
    try:
        with torch.device("meta"):
            return getattr(diffusers, _class_name(config)).from_config(dict(config)).to(dtype)
    finally:
        log.setLevel(level)


def empty_text_encoder(config: Mapping[str, Any]) -> Any:
    """One of CLIP's text encoders by this configuration, its weights on the meta device."""
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))


def _class_name(config: Mapping[str, Any]) -> str:
    kinds = {kind: name for name, kind in TRANSFORMERS.items()}
    return kinds.get(config_kind(config), "UNet2DConditionModel")


def original_names(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, str]:
    """Under which name the original (CompVis/LDM) layout holds each weight of a UNet, by the weight's own name.

    Args:
        tensors: of the file, by name; diffusers' own converter is followed, values are not read.
        config: of the UNet.
    """
    marks = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    names = {id(mark): name for name, mark in marks.items()}
    converted = convert_ldm_unet_checkpoint(dict(marks), dict(config))
    return {name: names[id(mark)] for name, mark in converted.items() if id(mark) in names}


def load_from_hub(name: str, dtype: torch.dtype | None) -> DiffusionPipeline:
    """The pipeline of a Hub id, from the cache or the network; raises `ModelNotFound` when neither has it."""
    try:
        options = {"dtype": dtype or torch.float32, **_unchecked(DiffusionPipeline.load_config(name))}
        return _of_a_variant(lambda variant: DiffusionPipeline.from_pretrained(name, variant=variant, **options))
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"no model '{name}' here, nor on the Hub, if that is reached ({_first_line(error)}); "
            "give a folder or a file"
        ) from error


def load_tokenizer(source: str | Path, pad_token: str | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer from a folder or the local Hub cache, padding with `pad_token` where its vocabulary has that.

    Raises:
        ModelNotFound: when it is in neither.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(source), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise _no_tokenizer(source) from error
    if not _knows_words(tokenizer):
        raise _no_tokenizer(source)
    if pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = pad_token
    return tokenizer


def hub_unet_config(name: str) -> dict[str, Any]:
    """Configuration of what denoises in a Hub id's pipeline; no weights are fetched."""
    try:
        component, _ = denoiser_entry(DiffusionPipeline.load_config(name))
        return dict(UNet2DConditionModel.load_config(name, subfolder=component))
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"no model '{name}' here, nor on the Hub if that is reached ({_first_line(error)})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table of a model folder; raises `ModelNotFound` when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path.parent} has no {path.name}; give a folder saved by diffusers") from error
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"cannot read {path} ({_first_line(error)}); save or fetch the model again") from error


def _no_tokenizer(source: str | Path) -> ModelNotFound:
    if str(source) == CLIP:
        where, instead = f"and {CLIP} is not in the Hub cache", f"have {CLIP} in the Hub cache"
    else:
        where, instead = f"and there is none at {source}", "give another folder"
    return ModelNotFound(
        f"a single file holds no tokenizer, {where}; name CLIP's folder (--tokenizer, of train model.tokenizer=, in "
        f"Python tokenizer=), or {instead}"
    )


def _knows_words(tokenizer: Any) -> bool:
    """Whether there are any: transformers makes an empty tokenizer of a folder that holds none."""
    return tokenizer is None or len(tokenizer) > len(set(tokenizer.all_special_tokens))


def _require_words(tokenizer: Any, source: Path) -> None:
    if not _knows_words(tokenizer):
        raise ModelNotFound(f"no tokenizer at {source}, it has no word list; fetch it again, or give another folder")


def _unchecked(index: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that leave the safety checker out of a pipeline that has one."""
    return UNCHECKED if "safety_checker" in index else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
