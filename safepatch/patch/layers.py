"""Which of a host's layers a lora patch changes: those that ours learn, and those that anybody's may be for."""

from typing import Any

from torch import nn

from safepatch.diffusion import UNET, host_kind

BLOCKS = ("attentions", "transformer_blocks", "single_transformer_blocks")  # where the layers are that ours learn
SIDES = ("down_blocks", "mid_block", "up_blocks")  # of a UNet, where other people's LoRAs have layers too
THEIRS = {"lora_A", "lora_B", "processor"}  # in names of a LoRA's own layers, or an IP-Adapter's


def linear_layers(unet: Any) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of the linear layers in the host's transformer blocks, as they are called without a LoRA.

    Of a transformer these are attention and feed-forward of both its streams, the image's tokens and the text's; not
    the layers that make its norms' scales and shifts of the timestep.
    """
    found, is_transformer = {}, host_kind(unet) is not UNET
    for name, module in unet.named_modules():
        path = set(name.split("."))
        if is_transformer and any(part.startswith("norm") for part in path):
            continue
        if isinstance(module, nn.Linear) and not path & THEIRS and path & set(BLOCKS):
            found[_plain(name)] = (module.out_features, module.in_features)
    return found


def taken_layers(unet: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weight of every layer that an update may be for.

    Beside `linear_layers` those of a UNet's residual blocks and of what samples up and down, and its convolutions
    (out, in, k, k): other people's LoRAs are for them too.
    """
    found: dict[str, tuple[int, ...]] = {**linear_layers(unet)}
    for name, module in unet.named_modules() if host_kind(unet) is UNET else ():
        path = name.split(".")
        if path[0] not in SIDES or THEIRS & set(path):
            continue
        if isinstance(module, nn.Linear):
            found[_plain(name)] = (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv2d):
            found[_plain(name)] = (module.out_channels, module.in_channels, *module.kernel_size)
    return found


def _plain(name: str) -> str:
    """A layer's own name: PEFT wraps layers that carry a LoRA."""
    return name.replace(".base_layer", "")
