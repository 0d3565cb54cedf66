"""ComfyUI's UNet as patches know hosts: a diffusers UNet of the same architecture, of which only a clone needs weights.

ComfyUI keeps the original layout, in which blocks are numbered through; patches are written against diffusers' names.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safepatch.diffusion import UNET, empty_unet, original_names
from safepatch.errors import UnsupportedModel
from safepatch.models.checkpoint import original_unet_config
from safepatch.models.weights import UNET as STORED

PREFIX = "diffusion_model."  # of ComfyUI's names
STEPS = 1000  # of the schedule that patches are trained on


def host_of(model: Any, with_encoder: bool) -> Any:
    """A diffusers UNet with the architecture of ComfyUI's `model`, its weights on the meta device.

    Args:
        model: ComfyUI's MODEL, which is only read.
        with_encoder: give it the model's own encoder and mid block, without anybody's LoRA, for a clone of them.

    Raises:
        UnsupportedModel: when it is no UNet of Stable Diffusion 1, 2 or XL, or counts its timesteps in another way.
    """
    net, name = getattr(model.model, "diffusion_model", None), type(model.model).__name__
    if not hasattr(net, "input_blocks"):
        raise UnsupportedModel(f"{name} is no UNet; these nodes know Stable Diffusion 1, 2 and XL")
    sampling = model.get_model_object("model_sampling")
    if not STEPS / 2 < float(sampling.timestep(sampling.sigma_max)) < STEPS:
        raise UnsupportedModel(f"{name} does not count its timesteps from 0 to {STEPS - 1}, as patches do")
    stored = {STORED + key.removeprefix(PREFIX): found[0] for key, found in model.get_key_patches(PREFIX).items()}
    shapes = {key: torch.empty(weight.shape, device="meta") for key, (weight, _) in stored.items()}
    config = original_unet_config({key: list(shape.shape) for key, shape in shapes.items()})
    host = empty_unet(config, compute_dtype(model))
    names = _names(host, shapes, config)
    if with_encoder:
        wanted = {key: original for key, original in names.items() if key.split(".")[0] in UNET.encoder}
        host.load_state_dict({key: _read(*stored[at]) for key, at in wanted.items()}, strict=False, assign=True)
    return host


def compute_dtype(model: Any) -> torch.dtype:
    """What ComfyUI computes in, whatever it stores the weights as."""
    return model.model.manual_cast_dtype or model.model.get_dtype()


def _names(host: Any, shapes: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, str]:
    """Name in the original layout of each of the host's weights."""
    try:
        names = original_names(shapes, config)
    except (KeyError, IndexError) as error:
        raise UnsupportedModel(f"the UNet is not of Stable Diffusion 1, 2 or XL: it has no {error}") from error
    for name, weight in host.state_dict().items():
        if name not in names or shapes[names[name]].shape != weight.shape:
            raise UnsupportedModel(f"'{name}' is not in this UNet as Stable Diffusion 1, 2 and XL have it")
    return names


def _read(weight: Tensor, convert: Any) -> Tensor:
    """A weight as numbers, where ComfyUI keeps it in another form."""
    weight = convert(weight, inplace=False)
    if not weight.is_floating_point():
        raise UnsupportedModel("the UNet's weights are quantized, and a control patch copies them; load it unquantized")
    return weight.detach()
