"""Find a model by whatever a user calls it, and say what it is before its weights are read."""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safepatch.diffusion import (
    CLIP,
    TEXT_ENCODERS,
    denoiser,
    denoiser_entry,
    hub_unet_config,
    load_folder,
    load_from_hub,
    load_single_file,
    load_tokenizer,
    read_json,
    read_unet,
)
from safepatch.errors import ConfigError, ModelNotFound, UnsupportedModel, lookup, nearest
from safepatch.models.checkpoint import Checkpoint, open_checkpoint
from safepatch.models.flow_file import FlowFile
from safepatch.models.flow_pipeline import load_flow_file, sources
from safepatch.models.folder import chosen, chosen_variant
from safepatch.models.weights import Weights, open_weights
from safepatch.tiny.models import MODELS, folder_of, load_tiny

# Which token fills a prompt up: OpenCLIP's text encoders were trained with "!", CLIP's with its end token.
PAD_TOKENS = {("sd2", "tokenizer"): "!", ("sdxl", "tokenizer_2"): "!", ("sdxl-refiner", "tokenizer_2"): "!"}


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how to open it.

    Attributes:
        path: an embedded model by name, a diffusers folder, a `.safetensors` file, or a Hub id.
        tokenizer: for a single file, the folder of CLIP's tokenizer; for one of SD3's or Flux's, that of a pipeline
            which has what the file lacks.
        dtype: of its weights: `float32`, `float16` or `bfloat16`; embedded models stay float32.
        prediction_type: for a single file, `epsilon` or `v_prediction` where the file does not say.
        allow_pickle: open a `.ckpt` too.
    """

    path: str = ""
    tokenizer: str | None = None
    dtype: str | None = None
    prediction_type: str | None = None
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        """Refuse a dtype that there is not."""
        dtype_of(self.dtype)

    @property
    def named(self) -> str:
        """The path; raises `ConfigError` where none is given."""
        if not self.path:
            raise ConfigError("no model; name the one to train on: model=FOLDER, a .safetensors file, or a Hub id")
        return self.path

    def require_whole(self) -> None:
        """Raise what `load` would where something of a single file's is nowhere, before any weight is read."""
        if flow := flow_file(self.named, self.allow_pickle):
            sources(flow, self.tokenizer)
        elif str(self.named) not in MODELS and _is_file(self.named):
            _tokenizers(open_checkpoint(Path(self.named), self.allow_pickle, self.prediction_type), self.tokenizer)

    def load(self) -> Any:
        """The pipeline; see `load_pipeline`."""
        return load_pipeline(self.named, self.tokenizer, self.allow_pickle, self.prediction_type, dtype_of(self.dtype))


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype called `name`; raises `UnknownName` for one that models cannot have."""
    return None if name is None else lookup(DTYPES, name, what="dtype")


def load_pipeline(
    name: str | Path,
    tokenizer: str | Path | None = None,
    allow_pickle: bool = False,
    prediction_type: str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A diffusers pipeline: an embedded model by name, a diffusers folder, a `.safetensors` file, or a Hub id.

    Args:
        name: what to load; only a Hub id may ask the network.
        tokenizer: for a single file, the folder of CLIP's tokenizer; by default the Hub cache is searched. For one of
            SD3's or Flux's, the folder of a pipeline which has what the file lacks: text encoders, tokenizers, the VAE.
        allow_pickle: open a `.ckpt` too, with torch's restricted loader.
        prediction_type: for a single file, of its UNet; by default what the file states, else `epsilon`, and for
            SD2 `v_prediction` (its 512-pixel base is `epsilon` and looks the same).
        dtype: of all weights, float32 by default; embedded models stay float32.

    Raises:
        ModelNotFound: with the nearest embedded name, or with what is wrong with the path.
        UnsupportedModel: when it is none of Stable Diffusion 1, 2, XL and 3, and Flux 1.
    """
    _refuse_misspelled(name)
    if str(name) in MODELS:
        return load_tiny(str(name))
    if not _is_file(name):
        return _load_folder(Path(name), dtype) if Path(name).is_dir() else load_from_hub(str(name), dtype)
    if flow := flow_file(name, allow_pickle):
        return load_flow_file(flow, tokenizer, dtype)
    checkpoint = open_checkpoint(Path(name), allow_pickle, prediction_type)
    tokenizers = _tokenizers(checkpoint, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        config = checkpoint.write_config(Path(folder))
        return load_single_file(_lower_case(checkpoint.path, Path(folder)), config, tokenizers, dtype)


def _load_folder(folder: Path, dtype: torch.dtype | None) -> Any:
    index = read_json(folder / "model_index.json")
    denoiser_entry(index)  # a model of another kind is refused before its weights are looked for
    return load_folder(folder, index, dtype, chosen_variant(folder, index))


def _lower_case(path: Path, folder: Path) -> Path:
    """The file, or in `folder` a link to it, under a suffix that diffusers knows."""
    if path.suffix == path.suffix.lower():
        return path
    link = folder / f"model{path.suffix.lower()}"
    link.symlink_to(path.resolve())
    return link


def unet_config(name: str | Path, allow_pickle: bool = False) -> dict[str, Any]:
    """Configuration of what denoises in whatever `load_pipeline` would load; no weights are read.

    Raises:
        ModelNotFound: as `load_pipeline`.
        UnsupportedModel: as `load_pipeline`.
    """
    _refuse_misspelled(name)
    if flow := flow_file(name, allow_pickle):
        return flow.config["transformer"]
    if _is_file(name):
        return open_checkpoint(Path(name), allow_pickle).config["unet"]
    folder = folder_of(str(name)) if str(name) in MODELS else Path(name)
    if not folder.is_dir():
        return hub_unet_config(str(name))
    component, _ = denoiser_entry(read_json(folder / "model_index.json"))
    return read_json(folder / component / "config.json")


def text_encoder_configs(name: str | Path, allow_pickle: bool = False) -> dict[str, dict[str, Any]]:
    """Configurations of CLIP's text encoders in whatever `load_pipeline` would load, by component; none of a Hub id."""
    if _is_file(name):
        config = open_checkpoint(Path(name), allow_pickle).config
        return {part: config[part] for part in TEXT_ENCODERS if part in config}
    folder = folder_of(str(name)) if str(name) in MODELS else Path(name)
    there = [part for part in TEXT_ENCODERS if (folder / part / "config.json").is_file()]
    return {part: read_json(folder / part / "config.json") for part in there}


def load_unet(name: str) -> Any:
    """What denoises alone, of an embedded model or a Hub id."""
    return denoiser(load_tiny(name)) if name in MODELS else read_unet(name)


def flow_file(name: str | Path, allow_pickle: bool = False) -> FlowFile | None:
    """The header of a single file of SD3's or Flux's; None for whatever else is called so.

    Raises:
        UnsupportedModel: when the file is damaged, or a pickle and none is allowed.
    """
    if str(name) in MODELS or not Path(name).is_file():
        return None
    return FlowFile.of(open_weights(Path(name), allow_pickle))


def unet_files(name: str | Path, allow_pickle: bool = False) -> list[Weights] | None:
    """The files that hold the weights of what denoises; None where they are in none, but built or on the Hub.

    Raises:
        UnsupportedModel: when one is missing or damaged, or a pickle and none is allowed.
    """
    if str(name) in MODELS or not Path(name).exists():
        return None
    if _is_file(name):
        return [open_weights(Path(name), allow_pickle)]
    component, _ = denoiser_entry(read_json(Path(name) / "model_index.json"))
    return [open_weights(path, allow_pickle=True) for path in chosen(Path(name) / component)[1]]


def text_encoder_weights(
    name: str | Path, component: str, allow_pickle: bool = False
) -> tuple[list[str], Callable[[str], torch.Tensor]] | None:
    """Names of a text encoder's weights, and what reads one; None where they are in no files of its own.

    Raises:
        UnsupportedModel: when a file is missing or damaged, or a pickle and none is allowed.
    """
    if str(name) in MODELS:
        own = dict(getattr(load_tiny(str(name)), component).named_parameters())
        return list(own), own.__getitem__
    if not (Path(name) / component).is_dir():
        return None
    files = [open_weights(path, allow_pickle) for path in chosen(Path(name) / component)[1]]
    places = {key: file for file in files for key in file.tensors}
    return list(places), lambda key: places[key].read(key)


def license_of(name: str | Path) -> str:
    """The licence that a model states: a folder's README in its front matter, a file in its metadata; else empty."""
    if str(name) in MODELS:
        return "apache-2.0"
    if _is_file(name):
        return open_weights(Path(name), allow_pickle=True).metadata.get("modelspec.license", "")
    readme = Path(name) / "README.md"
    front = re.match(r"---\n(.*?)\n---", readme.read_text(errors="replace"), re.DOTALL) if readme.is_file() else None
    stated = re.search(r"^license:[ ]*([\w.+-]+)[ ]*$", front[1], re.MULTILINE) if front else None
    return stated[1] if stated else ""


def recorded_name(name: str | Path) -> str:
    """What a record calls a model: a Hub id as it is, of a path only its last part."""
    is_here = str(name) in MODELS or _is_file(name) or Path(name).is_dir()
    return Path(name).name if is_here or str(name).count("/") != 1 else str(name)


def _refuse_misspelled(name: str | Path) -> None:
    if str(name).startswith("tiny") and str(name) not in MODELS and not Path(name).exists():
        raise ModelNotFound(f"no embedded model '{name}'{nearest(str(name), MODELS)}")


def _is_file(name: str | Path) -> bool:
    suspected = Path(name).suffix.lower() in (".safetensors", ".ckpt", ".pt", ".bin") or str(name).startswith(
        (".", "/")
    )
    return Path(name).is_file() or (suspected and not Path(name).is_dir())


def _tokenizers(checkpoint: Checkpoint, folder: str | Path | None) -> dict[str, Any]:
    """The tokenizers of a single file, by component name; `folder` is one tokenizer's, or a pipeline's."""
    index = checkpoint.config["model_index"]
    made = {}
    for name in (name for name in ("tokenizer", "tokenizer_2") if index.get(name, [None])[0]):
        source = folder or CLIP
        source = Path(source) / name if (Path(source) / name).is_dir() else source
        made[name] = load_tokenizer(source, PAD_TOKENS.get((checkpoint.family, name)))
        if len(made[name]) > checkpoint.vocabulary(name):
            raise UnsupportedModel(
                f"the tokenizer at {source} has {len(made[name])} tokens, the text encoder of {checkpoint.path} knows "
                f"{checkpoint.vocabulary(name)}; pass the tokenizer that belongs to it"
            )
    return made
