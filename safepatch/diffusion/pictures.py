"""Pictures and their latents, and pictures on the disk."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from safepatch.files import replacing, unwritable


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w) of images in [0, 1], shape (B, 3, H, W): the mode of the posterior.

    One by one: at 1024 pixels each takes gigabytes.
    """
    vae = _steady(vae)
    pixels = ((part * 2 - 1).to(vae.device, vae.dtype) for part in images.split(1))
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels])
    return (latents - (vae.config.get("shift_factor") or 0)) * vae.config["scaling_factor"]


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images in [0, 1], shape (B, 3, H, W), float32, on the CPU, of scaled latents (B, 4, h, w); one by one."""
    vae = _steady(vae)
    plain = latents / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0)
    parts = (part.to(vae.device, vae.dtype) for part in plain.split(1))
    return torch.cat([(vae.decode(part).sample.float() / 2 + 0.5).clamp(0, 1).cpu() for part in parts])


def _steady(vae: AutoencoderKL) -> AutoencoderKL:
    """One that no picture makes overflow, as SDXL's does in half precision."""
    if vae.config.get("force_upcast") and vae.dtype == torch.float16:
        return copy.deepcopy(vae).float()
    return vae


def as_picture(image: Tensor) -> Image.Image:
    """An image in [0, 1], shape (3, H, W), in 8 bits."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def save_image(image: Tensor, path: Path) -> None:
    """Write an image as PNG, all or nothing; raises `SafepatchError` when it cannot be.

    Args:
        image: in [0, 1], shape (3, H, W).
        path: of the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            as_picture(image).save(file, "PNG")
    except OSError as error:
        raise unwritable(path, error, "choose another -o") from error
