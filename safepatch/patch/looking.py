"""What a gate's picture key is shown of a host: what its middle makes of each row.

That is the output of a UNet's mid block, or the image's tokens behind a transformer's middle block: normed as the next
block reads them, and the mean of those in each of 8 x 8 parts of the picture, for there are thousands of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from safepatch.diffusion import UNET, host_kind

PLACES = 8  # of a transformer's picture, each way


def middle(host: Any) -> Any:
    """The module whose output is looked at.

    Of Flux, in whose second half text and image go as one, the last block before that.
    """
    if host_kind(host) is UNET:
        return host.mid_block
    blocks = host.transformer_blocks
    every = len(blocks) + len(getattr(host, "single_transformer_blocks", ()))
    return blocks[min(every // 2, len(blocks) - 1)]


def middle_channels(host: Any) -> int:
    """Channels of what is looked at."""
    return host.mid_block.resnets[-1].out_channels if host_kind(host) is UNET else host.inner_dim


def looked_at(host: Any, output: Any, sample: Tensor, img_ids: Tensor | None = None) -> Tensor:
    """What a picture key is shown, (B, channels, h, w); of a transformer 8 x 8 places.

    Args:
        host: what denoises.
        output: of its `middle`.
        sample: what it was given, (B, C, h, w), or as Flux packs it.
        img_ids: where Flux's image tokens are, (tokens, 3), rows and columns last.
    """
    if host_kind(host) is UNET:
        return output
    _, tokens = output
    if img_ids is None:
        edges = [torch.arange(edge // host.config["patch_size"], device=tokens.device) for edge in sample.shape[-2:]]
        places = torch.cartesian_prod(*edges)
    else:
        places = img_ids[:, 1:].to(tokens.device)
    return _means(layer_norm(tokens.float(), tokens.shape[-1:]), places)


def _means(tokens: Tensor, places: Tensor) -> Tensor:
    """Means of tokens (B, T, C) at rows and columns (T, 2) in each part of the picture, (B, C, 8, 8); 0 of no token."""
    parts = places.long() * PLACES // (places.long().amax(0) + 1)
    number = parts[:, 0] * PLACES + parts[:, 1]
    held = (torch.arange(PLACES**2, device=tokens.device)[:, None] == number).to(tokens.dtype)
    means = (held / held.sum(1, keepdim=True).clamp(min=1)) @ tokens  # a product: its sums have the same bits each time
    return means.transpose(1, 2).unflatten(2, (PLACES, PLACES))
