"""Which host a model is."""

from safepatch.diffusion.components import Components
from safepatch.diffusion.hosts.base import Host
from safepatch.diffusion.hosts.flow import FluxHost, SD3Host
from safepatch.diffusion.hosts.kinds import FLUX, SD3, UNET, HostKind, host_kind
from safepatch.diffusion.hosts.unet import UNetHost

HOSTS: dict[HostKind, type[Host]] = {UNET: UNetHost, SD3: SD3Host, FLUX: FluxHost}


def open_host(components: Components, size: int | None = None) -> Host:
    """The model as training may ask of it; raises `ConfigError` for a size that it cannot draw.

    Args:
        components: of the model; frozen.
        size: height and width of pictures in pixels; the model's own by default.
    """
    return HOSTS[host_kind(components.unet)](components, size)
