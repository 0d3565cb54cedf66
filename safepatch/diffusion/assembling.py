"""Pipelines that are put together of parts: what a single file of SD3's or Flux's holds, and a folder what it lacks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor, nn

from safepatch.diffusion.loading import empty_unet
from safepatch.errors import UnsupportedModel
from safepatch.progress import bar

LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
Entry = tuple[str, str]  # library and class, as a `model_index.json` has them


def filled_transformer(config: Mapping[str, Any], read: Callable[[str], Tensor], dtype: torch.dtype) -> Any:
    """SD3's or Flux's transformer of this configuration.

    Args:
        config: as diffusers stores it.
        read: gives a weight by diffusers' name.
        dtype: of all weights.
    """
    model = empty_unet(config, dtype)
    names = bar(list(model.state_dict()), desc="reading the transformer", leave=False)
    model.load_state_dict({name: read(name).to(dtype) for name in names}, assign=True)
    return model.eval()


def filled_vae(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder of these tensors in the original layout, configured in the pipeline's `folder`."""
    plain = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    options = {"config": str(folder), "subfolder": "vae", "local_files_only": True, "torch_dtype": dtype}
    return AutoencoderKL.from_single_file(plain, **options)


def filled_text_encoder(entry: Entry, config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A text encoder of these tensors, whose names are transformers' own.

    CLIP's maps what is pooled of SD3's states to themselves where the file has no map.
    """
    kind: Any = getattr(transformers, entry[1])
    with init_empty_weights():
        model = kind(kind.config_class(**config))
    wrapped = hasattr(model, "text_model")
    named = {name if wrapped else name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    own = dict(model.named_parameters())
    if "text_projection.weight" in own:
        named.setdefault("text_projection.weight", torch.eye(*own["text_projection.weight"].shape))
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()  # T5 overflows
    given = {
        name: tensor.to(torch.float32 if kept & set(name.split(".")) else dtype)
        for name, tensor in named.items()
        if name in own
    }
    model.load_state_dict(given, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def part_of_folder(path: Path, entry: Entry, dtype: torch.dtype) -> Any:
    """A pipeline's component that diffusers saved at `path`; raises `UnsupportedModel` when it is damaged."""
    kind: Any = getattr(LIBRARIES[entry[0]], entry[1])
    precision = {"torch_dtype" if entry[0] == "diffusers" else "dtype": dtype}
    options: dict[str, Any] = {"local_files_only": True, **(precision if "Tokenizer" not in entry[1] else {})}
    try:
        made = kind.from_pretrained(str(path), **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UnsupportedModel(f"{path} cannot be read ({first}); fetch or save it again") from error
    return made.eval() if isinstance(made, nn.Module) else made


def assembled(index: Mapping[str, Any], scheduler: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    """The pipeline that a `model_index.json` names, of these parts and a scheduler of this configuration.

    Raises:
        UnsupportedModel: when a weight of some part was never filled in.
    """
    for name, part in parts.items():
        own = part.named_parameters() if isinstance(part, nn.Module) else ()
        absent = [key for key, tensor in own if tensor.is_meta]
        if absent:
            raise UnsupportedModel(f"the file lacks {len(absent)} weights of its {name}, e.g. '{absent[0]}'")
    made = getattr(diffusers, index["scheduler"][1]).from_config(dict(scheduler))
    return getattr(diffusers, index["_class_name"])(scheduler=made, **parts)
