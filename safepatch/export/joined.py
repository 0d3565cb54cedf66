"""Layers of SD3 and Flux as the original layout has them, where queries, keys and values are the rows of one matrix.

Kohya's files are of that layout, so that several updates of diffusers' layers are one there: `down` of all, one below
the other, and `up` block by block. Somebody else's `up` need not be in blocks.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from safepatch.artifact.patch_artifact import Factors
from safepatch.diffusion import family
from safepatch.errors import ConfigError

KOHYA = "lora_unet_"  # what names of a denoiser's layers begin with, a transformer's too
Parts = Mapping[str, tuple[str, ...]]  # layer of the original layout -> diffusers' layers, in the order of its rows

OF_FLUX: dict[str, tuple[str, Parts]] = {  # diffusers' blocks -> what the original calls them, and their layers
    "transformer_blocks": (
        "double_blocks",
        {
            "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn_proj": ("attn.to_out.0",),
            "img_mlp_0": ("ff.net.0.proj",),
            "img_mlp_2": ("ff.net.2",),
            "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn_proj": ("attn.to_add_out",),
            "txt_mlp_0": ("ff_context.net.0.proj",),
            "txt_mlp_2": ("ff_context.net.2",),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",)},
    ),
}
OF_SD3: dict[str, tuple[str, Parts]] = {
    "transformer_blocks": (
        "joint_blocks",
        {
            "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "x_block_attn_proj": ("attn.to_out.0",),
            "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block_attn2_proj": ("attn2.to_out.0",),
            "x_block_mlp_fc1": ("ff.net.0.proj",),
            "x_block_mlp_fc2": ("ff.net.2",),
            "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "context_block_attn_proj": ("attn.to_add_out",),
            "context_block_mlp_fc1": ("ff_context.net.0.proj",),
            "context_block_mlp_fc2": ("ff_context.net.2",),
        },
    )
}


def original_layers(layers: Iterable[str], config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Kohya's name of each layer of the original layout that any of `layers` is in -> all of diffusers' layers in it.

    Raises:
        ConfigError: for a layer that has no place there.
    """
    table, found = OF_FLUX if family(config) == "flux" else OF_SD3, {}
    for layer in layers:
        group, number, inner = (*layer.split(".", 2), "", "")[:3]
        original, parts = table.get(group, ("", {}))
        name = next((name for name, inners in parts.items() if inner in inners), None)
        if name is None:
            raise ConfigError(f"'{layer}' has no name in the original layout of its model; give --format diffusers")
        found[f"{KOHYA}{original}_{number}_{name}"] = tuple(f"{group}.{number}.{each}" for each in parts[name])
    return found


def rows_of(layers: Sequence[str], config: Mapping[str, Any]) -> list[int]:
    """How many rows each of several layers has that are one in the original layout."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return [4 * width if layer.endswith("proj_mlp") else width for layer in layers]


def join(parts: Sequence[Factors | None], rows: Sequence[int]) -> Factors:
    """The update of one layer that several are in, None for one without an update.

    Args:
        parts: `up` (n, r) and `down` (r, in) of each.
        rows: n of each.
    """
    held = [part for part in parts if part is not None]
    up = held[0].up.new_zeros(sum(rows), sum(len(part.down) for part in held))
    row = column = 0
    for part, height in zip(parts, rows, strict=True):
        if part is not None:
            up[row : row + height, column : column + len(part.down)] = part.up
            column += len(part.down)
        row += height
    return Factors(up, torch.cat([part.down for part in held]))


def parted(whole: Factors, rows: Sequence[int], ranks: Sequence[int] | None = None) -> list[Factors | None]:
    """What `join` was given; of somebody else's update, each layer's with the columns that it has a use for.

    Args:
        whole: `up` (sum of rows, r) and `down` (r, in).
        rows: of each layer.
        ranks: of each, 0 for one without an update; None where nobody knows.

    Raises:
        ValueError: when it was not made of layers of these ranks.
    """
    parts, column = [], 0
    for index, own in enumerate(whole.up.split(list(rows))):
        if ranks is None:
            used = own.any(dim=0).nonzero()[:, 0]
        else:
            used, column = torch.arange(column, column + ranks[index]), column + ranks[index]
        parts.append(Factors(own[:, used].contiguous(), whole.down[used]) if len(used) else None)
    if ranks is not None and not torch.equal(join(parts, rows).up, whole.up):
        raise ValueError("its layers are mixed")
    return parts
