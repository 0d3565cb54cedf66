"""Where the weights of SD3's and Flux's transformers are in the layout that their makers published them in.

Names differ from diffusers', queries, keys and values are one tensor, and the two halves of the last norm's modulation
stand the other way round: shift before scale.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.diffusion import family

# What diffusers calls it: what they do. In front of both stands the block's number, where there is one.
SD3_OUTER = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    **{f"attn.to_{part}": "x_block.attn.qkv" for part in "qkv"},
    **{f"attn.add_{part}_proj": "context_block.attn.qkv" for part in "qkv"},
    **{f"attn2.to_{part}": "x_block.attn2.qkv" for part in "qkv"},
    **{f"attn.norm_{part}": f"x_block.attn.ln_{part}" for part in "qk"},
    **{f"attn.norm_added_{part}": f"context_block.attn.ln_{part}" for part in "qk"},
    **{f"attn2.norm_{part}": f"x_block.attn2.ln_{part}" for part in "qk"},
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FLUX_OUTER = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{theirs}_embedder.linear_{number}": f"{ours}_in.{layer}_layer"
        for theirs, ours in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
        for number, layer in ((1, "in"), (2, "out"))
    },
}
FLUX_BLOCK = {
    **{f"attn.to_{part}": "img_attn.qkv" for part in "qkv"},
    **{f"attn.add_{part}_proj": "txt_attn.qkv" for part in "qkv"},
    **{f"attn.norm_{part}": f"img_attn.norm.{name}_norm" for part, name in (("q", "query"), ("k", "key"))},
    **{f"attn.norm_added_{part}": f"txt_attn.norm.{name}_norm" for part, name in (("q", "query"), ("k", "key"))},
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE = {
    **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1"),
    **{f"attn.norm_{part}": f"norm.{name}_norm" for part, name in (("q", "query"), ("k", "key"))},
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
}
PART = {"q": 0, "k": 1, "v": 2, "proj_mlp": 3}  # of what is one tensor, in this order


class Place(NamedTuple):
    """Where a weight is.

    Attributes:
        name: of the tensor that holds it.
        rows: of that tensor's, those that are the weight's, in their order; all of them for none.
    """

    name: str
    rows: tuple[slice, ...] = ()

    def take(self, stored: Tensor) -> Tensor:
        """The weight out of that tensor."""
        return torch.cat([stored[rows] for rows in self.rows]) if self.rows else stored

    def put(self, stored: Tensor, weight: Tensor) -> Tensor:
        """That tensor with another weight in its place."""
        if not self.rows:
            return weight
        made, start = stored.clone(), 0
        for rows in self.rows:
            made[rows] = weight[start : (start := start + rows.stop - rows.start)]
        return made

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Of the weight, where that of the tensor is `stored`."""
        return (sum(rows.stop - rows.start for rows in self.rows), *stored[1:]) if self.rows else stored


def places(weights: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Place]:
    """Of each of a transformer's weights, by diffusers' name, where it is.

    Args:
        weights: anything that has the shape of each.
        config: of the transformer.
    """
    of = _flux if family(config) == "flux" else _sd3
    return {name: of(name, weights[name].shape, config) for name in weights}


def _sd3(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Place:
    layer, end = _split(name, SD3_OUTER)
    if not layer.startswith("transformer_blocks."):
        place = SD3_OUTER[layer] + end
        return Place(place, _halves(shape[0]) if layer == "norm_out.linear" else ())
    _, number, inner = layer.split(".", 2)
    place = f"joint_blocks.{number}.{SD3_BLOCK[inner]}{end}"
    if inner == "norm1_context.linear" and int(number) == config["num_layers"] - 1:
        return Place(place, _halves(shape[0]))
    return Place(place, _third(inner, shape[0]) if place.endswith(f".qkv{end}") else ())


def _flux(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Place:
    layer, end = _split(name, FLUX_OUTER)
    kind, number, inner = (*layer.split(".", 2), "", "")[:3]
    if kind == "transformer_blocks":
        end = ".scale" if ".norm_" in layer else end
        place = f"double_blocks.{number}.{FLUX_BLOCK[inner]}{end}"
        return Place(place, _third(inner, shape[0]) if place.endswith(f".qkv{end}") else ())
    if kind == "single_transformer_blocks":
        end = ".scale" if ".norm_" in layer else end
        place = f"single_blocks.{number}.{FLUX_SINGLE[inner]}{end}"
        width = config["num_attention_heads"] * config["attention_head_dim"]
        first = PART.get(inner.rpartition("_")[2], PART["proj_mlp"]) * width
        return Place(place, (slice(first, first + shape[0]),) if ".linear1." in place else ())
    return Place(FLUX_OUTER[layer] + end, _halves(shape[0]) if layer == "norm_out.linear" else ())


def _split(name: str, outer: Mapping[str, str]) -> tuple[str, str]:
    """A weight's layer, and `.weight` or `.bias`; what is no layer's has no end."""
    if name in outer:
        return name, ""
    layer, _, end = name.rpartition(".")
    return layer, f".{end}"


def _halves(n: int) -> tuple[slice, ...]:
    """The second half of n rows, then the first."""
    return slice(n // 2, n), slice(0, n // 2)


def _third(layer: str, n: int) -> tuple[slice, ...]:
    """Of 3 n rows, those of queries, keys or values."""
    part = PART[layer.removesuffix("_proj").rpartition("_")[2]]
    return (slice(part * n, (part + 1) * n),)
