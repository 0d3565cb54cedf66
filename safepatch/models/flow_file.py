"""What a single file of SD3's or Flux's holds, told from its header: the transformer, and what else of a pipeline.

Such files hold the transformer alone, or the autoencoder and some text encoders beside it (as ComfyUI's do). Sizes come
from shapes, the rest from `assets/configs`, as for other families; weights are read one tensor at a time.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from safepatch.diffusion import empty_unet
from safepatch.errors import UnsupportedModel
from safepatch.models.flow_layout import Place, places
from safepatch.models.weights import UNET, Weights

CONFIGS = Path(__file__).parent.parent / "assets" / "configs"
MARKS = {"sd3": "joint_blocks.0.x_block.attn.qkv.weight", "flux": "double_blocks.0.img_attn.qkv.weight"}
# How names begin of what else a file may hold, by the family's name for it.
T5 = "text_encoders.t5xxl.transformer."
TEXTS = {
    "sd3": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": T5,
    },
    "flux": {"text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": T5},
}
VAES = ("first_stage_model.", "vae.")
# Endings of names that stand beside weights which are stored in few bits by more than a cast.
QUANTISED = re.compile(r"\.(absmax|SCB|scale_weight|weight_scale|scale_input|input_scale)$|(^|\.)scaled_fp8$")
INTEGERS = ("I8", "U8", "I16", "I32", "I64")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FlowFile:
    """A single file of SD3's or Flux's, before any weight is read.

    Attributes:
        weights: of the file.
        family: `sd3` or `flux`.
        prefix: what the names of the transformer's tensors begin with.
        parts: of what else the file holds, how its tensors' names begin, by diffusers' name of the component.
    """

    weights: Weights
    family: str
    prefix: str
    parts: Mapping[str, str]

    @classmethod
    def of(cls, weights: Weights) -> "FlowFile | None":
        """The file as one of these; None for any other.

        Raises:
            UnsupportedModel: for weights that are stored in few bits by more than a cast.
        """
        names = weights.tensors
        found = [(family, prefix) for prefix in (UNET, "") for family, mark in MARKS.items() if prefix + mark in names]
        if not found:
            return None
        (family, prefix), *_ = found
        _require_plain(weights, prefix)
        vae = {"vae": each for each in VAES if f"{each}decoder.conv_in.weight" in names}  # noqa: B035 one of them
        begins = {**TEXTS[family], **vae}
        held = {part: each for part, each in begins.items() if any(name.startswith(each) for name in names)}
        return cls(weights, family, prefix, held)

    @cached_property
    def config(self) -> dict[str, dict[str, Any]]:
        """`model_index` and the configuration of each component, as diffusers stores them, in this file's sizes.

        Raises:
            UnsupportedModel: when it lacks tensors by which they are told.
        """
        config = json.loads((CONFIGS / f"{self.family}.json").read_text(encoding="utf-8"))
        shapes = {name: stored.shape for name, stored in self.weights.tensors.items()}
        own = {name.removeprefix(self.prefix): shape for name, shape in shapes.items() if name.startswith(self.prefix)}
        try:
            config["transformer"] |= (_sd3_sizes if self.family == "sd3" else _flux_sizes)(own)
            for part, prefix in self.parts.items():
                inner = {n.removeprefix(prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}
                sizes = _vae_sizes if part == "vae" else _t5_sizes if prefix == T5 else _clip_sizes
                config[part] |= sizes(inner)
        except KeyError as error:
            raise UnsupportedModel(
                f"{self.weights.path} looks like {self.family} but has no tensor {error}; fetch the whole file"
            ) from error
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise UnsupportedModel(
                f"{self.weights.path} is like {self.family} but its tensors have other shapes ({error}); fetch it again"
            ) from error
        if self.family == "flux" and not config["transformer"]["guidance_embeds"]:  # schnell
            config["scheduler"] |= {"shift": 1.0, "use_dynamic_shifting": False}
        return config

    @cached_property
    def places(self) -> dict[str, Place]:
        """Of each weight of the transformer, by diffusers' name, which tensor of the file holds it.

        Raises:
            UnsupportedModel: when the file lacks one.
        """
        config = self.config["transformer"]
        found = {
            name: place._replace(name=self.prefix + place.name)
            for name, place in places(empty_unet(config).state_dict(), config).items()
        }
        for place in found.values():
            if place.name not in self.weights.tensors:
                raise UnsupportedModel(
                    f"{self.weights.path} lacks '{place.name}' of its transformer; fetch the whole file"
                )
        return found

    @cached_property
    def read(self) -> Callable[[str], Tensor]:
        """Reads a weight of the transformer by diffusers' name; raises as `places`."""
        found = self.places
        return lambda name: found[name].take(self.weights.read(found[name].name))

    def of_part(self, part: str) -> dict[str, Tensor]:
        """The tensors of another component, by their names in the file without what these begin with."""
        prefix = self.parts[part]
        names = [name for name in self.weights.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.weights.read(name) for name in names}


def _require_plain(weights: Weights, prefix: str) -> None:
    """Raise `UnsupportedModel` unless every weight is a float that a cast made smaller at most."""
    for name, stored in weights.tensors.items():
        is_weight = name.startswith(prefix) and name.endswith(".weight")
        if QUANTISED.search(name) or (is_weight and stored.dtype in INTEGERS):
            raise UnsupportedModel(
                f"not supported yet: quantised weights ('{name}' in {weights.path}); use a file of fp32, fp16, bf16 or "
                "plain fp8"
            )


def _sd3_sizes(shapes: Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    blocks = _count(r"joint_blocks\.(\d+)\.x_block\.attn\.qkv\.weight", shapes)
    normed = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = normed[0] if normed else 64  # of those without, which is Stable Diffusion 3 medium alone
    dual = r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv\.weight"
    return {
        "attention_head_dim": head,
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "dual_attention_layers": sorted(int(m[1]) for name in shapes if (m := re.fullmatch(dual, name))),
        "in_channels": channels,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "num_attention_heads": max(1, width // head),
        "num_layers": blocks,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "patch_size": patch,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "qk_norm": "rms_norm" if normed else None,
    }


def _flux_sizes(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    made = shapes["final_layer.linear.weight"][0]
    return {
        "attention_head_dim": head,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "in_channels": channels,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "num_attention_heads": width // head,
        "num_layers": _count(r"double_blocks\.(\d+)\.img_attn\.qkv\.weight", shapes),
        "num_single_layers": _count(r"single_blocks\.(\d+)\.linear1\.weight", shapes),
        "out_channels": None if made == channels else made,
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
    }


def _vae_sizes(shapes: Shapes) -> dict[str, Any]:
    levels = _count(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight", shapes)
    return {
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": _count(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight", shapes),
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
    }


def _clip_sizes(shapes: Shapes) -> dict[str, Any]:
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    sizes = {
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(r"text_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight", shapes),
        "hidden_size": width,
        "num_attention_heads": max(1, width // 64),
    }
    return sizes | {"projection_dim": shapes.get("text_projection.weight", (width,))[0]}


def _t5_sizes(shapes: Shapes) -> dict[str, Any]:
    first = "encoder.block.0.layer"
    heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"][1]
    return {
        "vocab_size": shapes["shared.weight"][0],
        "d_model": shapes["shared.weight"][1],
        "d_ff": shapes[f"{first}.1.DenseReluDense.wi_0.weight"][0],
        "d_kv": shapes[f"{first}.0.SelfAttention.q.weight"][0] // heads,
        "num_heads": heads,
        "num_layers": _count(r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.q\.weight", shapes),
    }


def _count(pattern: str, shapes: Shapes) -> int:
    """How many numbers there are in names like that, from 0 on."""
    return len({found[1] for name in shapes if (found := re.fullmatch(pattern, name))})
