"""The ControlNet of a UNet, in diffusers' class (Zhang et al. 2023, arXiv 2302.05543)."""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch

from safepatch.diffusion.loading import empty_unet
from safepatch.errors import UnsupportedModel

HINT = (16, 32, 96, 256)  # channels on the way from a hint's pixels to latents; each step halves its edge


def empty_controlnet(config: Mapping[str, Any], channels: int, halvings: int) -> Any:
    """A ControlNet for UNets of this configuration, its weights on the meta device.

    Args:
        config: of the UNet.
        channels: of the latents.
        halvings: how often the VAE halves the edge of an image.

    Raises:
        UnsupportedModel: for a UNet of which diffusers makes none.
    """
    unet = empty_unet({**config, "in_channels": channels})
    try:
        with torch.device("meta"):
            return diffusers.ControlNetModel.from_unet(
                unet, conditioning_embedding_out_channels=HINT[: halvings + 1], load_weights_from_unet=False
            )
    except (ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"diffusers makes no ControlNet of this model's UNet ({error})") from error
