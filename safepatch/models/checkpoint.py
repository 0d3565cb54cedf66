"""What a single-file checkpoint in the original (CompVis/LDM) layout holds, told from its header alone.

The family follows from the names of the tensors, the sizes from their shapes; the rest of the configuration is the
family's, from `assets/configs`. So a file of any width is loaded without asking the network for its configuration.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch.diffusion import not_supported
from safepatch.errors import ConfigError, ModelNotFound, UnsupportedModel
from safepatch.models.folder import write_config
from safepatch.models.weights import UNET, open_weights

CONFIGS = Path(__file__).parent.parent / "assets" / "configs"
VAE = "first_stage_model."

# Prefix of tensors that only this family has; the first that is found decides.
FAMILIES: dict[str, str] = {
    "conditioner.embedders.1.model.": "sdxl",
    "conditioner.embedders.0.model.": "sdxl-refiner",
    "cond_stage_model.model.": "sd2",
    "cond_stage_model.transformer.text_model.": "sd1",
}
# Where each family keeps its text encoders: in OpenAI's CLIP layout, or in OpenCLIP's.
CLIP: dict[str, dict[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer.text_model."},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.text_model."},
}
OPEN_CLIP: dict[str, dict[str, str]] = {
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {"text_encoder_2": "conditioner.embedders.1.model."},
    "sdxl-refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
# What else a file may be: a part of its tensors' names, and what to say.
OTHERS: dict[str, str] = {
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "edm_mean": "Playground v2.5",
    "lora_": "a LoRA without its model",
    "control_model.": "a ControlNet without its model",
}
# How names begin in a whole checkpoint, and in a file of one component alone, whichever its layout.
PARTS: dict[str, str] = {"UNet": f"{UNET}input_blocks.", "VAE": VAE}
COMPONENTS: dict[str, str] = {
    "input_blocks.": "a UNet",
    "down_blocks.": "a UNet",
    "decoder.": "a VAE",
    "text_model.": "a text encoder",
}
WHOLE = "use the whole checkpoint, or a diffusers folder"
SD2_READ = 23  # layers of its text encoder that are read: some files, converted from diffusers, hold these alone
PREDICTION_TYPES = {"v": "v_prediction", "epsilon": "epsilon"}  # ModelSpec's names


@dataclass(frozen=True)
class Checkpoint:
    """A single file, before any weight is read.

    Attributes:
        path: of the file.
        family: `sd1`, `sd2`, `sdxl` or `sdxl-refiner`.
        config: `model_index` and the configuration of each component, as diffusers stores them.
    """

    path: Path
    family: str
    config: dict[str, dict[str, Any]]

    def write_config(self, folder: Path) -> Path:
        """Lay the configuration out in `folder` as diffusers reads it; returns the folder."""
        return write_config(self.config, folder)

    def vocabulary(self, tokenizer: str) -> int:
        """How many tokens the text encoder behind `tokenizer` or `tokenizer_2` knows."""
        return self.config[tokenizer.replace("tokenizer", "text_encoder")]["vocab_size"]


def open_checkpoint(path: Path, allow_pickle: bool = False, prediction_type: str | None = None) -> Checkpoint:
    """Recognize a single file from its header.

    Args:
        path: a `.safetensors` file, or a `.ckpt` where `allow_pickle`.
        allow_pickle: read a pickle too, with torch's restricted loader.
        prediction_type: of the UNet; by default what the file states, else the family's own.

    Raises:
        ModelNotFound: when there is no such file.
        UnsupportedModel: when it is no Stable Diffusion 1, 2 or XL checkpoint with UNet, VAE and text encoder.
    """
    if prediction_type not in (None, *PREDICTION_TYPES.values()):
        raise ConfigError(f"prediction type '{prediction_type}' is unknown; choose epsilon or v_prediction")
    if not path.is_file():
        raise ModelNotFound(f"no file at {path}; check the path of the checkpoint")
    shapes, metadata = _read_header(path, allow_pickle)
    family = _family(path, shapes, metadata)
    try:
        config = _config(family, shapes)
    except (KeyError, IndexError) as error:
        raise UnsupportedModel(f"{path} looks like {family} but has no tensor {error}; fetch the whole file") from error
    _check_inputs(path, config)
    stated = prediction_type or PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", ""))
    stated = stated or ("v_prediction" if "v_pred" in shapes else None)  # a marker in v-prediction SDXL files
    config["scheduler"]["prediction_type"] = stated or config["scheduler"]["prediction_type"]
    if "ztsnr" in shapes and stated == "v_prediction":  # another: its schedule ends in noise alone (arXiv 2305.08891)
        config["scheduler"] |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return Checkpoint(path, family, config)


Shapes = dict[str, list[int]]


def original_unet_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a UNet in the original layout, told by its own tensors alone.

    Args:
        shapes: by the names that they have in whole checkpoints.

    Raises:
        UnsupportedModel: when it is none of Stable Diffusion 1, 2 or XL.
    """
    try:
        family = _unet_family(shapes)
        unet = json.loads((CONFIGS / f"{family}.json").read_text(encoding="utf-8"))["unet"]
        return unet | _unet_sizes(unet, shapes)
    except (KeyError, IndexError) as error:
        raise UnsupportedModel(f"the UNet is not of Stable Diffusion 1, 2 or XL: it has no tensor {error}") from error


def _unet_family(shapes: Shapes) -> str:
    """SDXL's UNets are told sizes, the refiner's has a fourth level; SD2's maps into attention are no convolutions."""
    if any(name.startswith(f"{UNET}label_emb.") for name in shapes):
        return "sdxl-refiner" if f"{UNET}input_blocks.9.0.op.weight" in shapes else "sdxl"
    return "sd2" if len(shapes[f"{UNET}input_blocks.1.1.proj_in.weight"]) == 2 else "sd1"


def _read_header(path: Path, allow_pickle: bool) -> tuple[Shapes, dict[str, str]]:
    weights = open_weights(path, allow_pickle)
    return {name: list(stored.shape) for name, stored in weights.tensors.items()}, dict(weights.metadata)


def _family(path: Path, shapes: Shapes, metadata: dict[str, str]) -> str:
    if any(key.startswith("safepatch.") for key in metadata):
        raise UnsupportedModel(f"{path} is a safety patch, not a model; pass it as --patch")
    found = [family for prefix, family in FAMILIES.items() if any(name.startswith(prefix) for name in shapes)]
    begins = {part: any(name.startswith(prefix) for name in shapes) for part, prefix in PARTS.items()}
    if not (found or begins["UNet"]) or "edm_mean" in shapes:
        raise _unknown(path, shapes)
    lacking = [part for part, is_there in {**begins, "text encoder": bool(found)}.items() if not is_there]
    if lacking:
        raise UnsupportedModel(f"{path} holds no {' and no '.join(lacking)}; {WHOLE}")
    return found[0]


def _unknown(path: Path, shapes: Shapes) -> UnsupportedModel:
    """The error for a file that is no Stable Diffusion checkpoint."""
    others = [what for mark, what in OTHERS.items() if any(mark in name for name in shapes)]
    alone = [what for start, what in COMPONENTS.items() if any(name.startswith(start) for name in shapes)]
    if alone and not others:
        return UnsupportedModel(f"{path} holds {alone[0]} alone; {WHOLE}")
    return not_supported(f"{others[0] if others else 'an unknown kind of model'} ({path})")


def _config(family: str, shapes: Shapes) -> dict[str, dict[str, Any]]:
    """The family's configuration with the sizes of this file."""
    config = json.loads((CONFIGS / f"{family}.json").read_text(encoding="utf-8"))
    config["unet"] |= _unet_sizes(config["unet"], shapes)
    levels = range(len(config["vae"]["block_out_channels"]))
    config["vae"]["block_out_channels"] = [shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in levels]
    for name, prefix in CLIP.get(family, {}).items():
        config[name] |= _clip_sizes(prefix, shapes)
    for name, prefix in OPEN_CLIP.get(family, {}).items():
        config[name] |= _open_clip_sizes(prefix, shapes)
    if family == "sd2" and config["text_encoder"]["num_hidden_layers"] != SD2_READ:  # of files that hold no more
        config["text_encoder"]["num_hidden_layers"] -= 1  # it was trained on the last layer but one
    if config["unet"]["in_channels"] == 9:
        name = config["model_index"]["_class_name"]
        config["model_index"]["_class_name"] = name.removesuffix("Pipeline") + "InpaintPipeline"
    return config


def _unet_sizes(unet: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    levels = range(len(unet["block_out_channels"]))
    step = unet["layers_per_block"] + 1  # input blocks per level: the resnets and a downsampler
    widths = [shapes[f"{UNET}input_blocks.{1 + i * step}.0.in_layers.2.weight"][0] for i in levels]
    sizes: dict[str, Any] = {
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "block_out_channels": widths,
        "cross_attention_dim": shapes[f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
    }
    if isinstance(unet["attention_head_dim"], list):  # diffusers' name for the number of heads; each is 64 wide
        sizes["attention_head_dim"] = [max(1, width // 64) for width in widths]
    if "projection_class_embeddings_input_dim" in unet:
        sizes["projection_class_embeddings_input_dim"] = shapes[f"{UNET}label_emb.0.0.weight"][1]
    return sizes


def _clip_sizes(prefix: str, shapes: Shapes) -> dict[str, int]:
    hidden = shapes[f"{prefix}embeddings.token_embedding.weight"][1]
    return {
        "vocab_size": shapes[f"{prefix}embeddings.token_embedding.weight"][0],
        "max_position_embeddings": shapes[f"{prefix}embeddings.position_embedding.weight"][0],
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(f"{prefix}encoder.layers.", ".layer_norm1.weight", shapes),
        "hidden_size": hidden,
        "num_attention_heads": max(1, hidden // 64),
    }


def _open_clip_sizes(prefix: str, shapes: Shapes) -> dict[str, int]:
    hidden = shapes[f"{prefix}token_embedding.weight"][1]
    return {
        "vocab_size": shapes[f"{prefix}token_embedding.weight"][0],
        "max_position_embeddings": shapes[f"{prefix}positional_embedding"][0],
        "intermediate_size": shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": _count(f"{prefix}transformer.resblocks.", ".ln_1.weight", shapes),
        "hidden_size": hidden,
        "num_attention_heads": max(1, hidden // 64),
        "projection_dim": shapes.get(f"{prefix}text_projection", [hidden, hidden])[1],
    }


def _count(prefix: str, suffix: str, shapes: Shapes) -> int:
    return sum(name.startswith(prefix) and name.endswith(suffix) for name in shapes)


def _check_inputs(path: Path, config: dict[str, dict[str, Any]]) -> None:
    channels = config["unet"]["in_channels"]
    if channels not in (4, 9):
        raise not_supported(f"a UNet with {channels} input channels ({path})")
