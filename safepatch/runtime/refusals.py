"""What no patch can be put on as it stands; said before anything of it is changed."""

from typing import Any

from torch import nn

from safepatch.diffusion import (
    denoiser,
    has_fused_projections,
    host_kind,
    is_compiled,
    is_offloaded_to_disk,
    uncompiled,
)
from safepatch.errors import ConfigError


def refuse_compiled(pipe: Any) -> None:
    """Raise `ConfigError` if what denoises is compiled: what was traced without hooks may go on without them."""
    host = denoiser(pipe)
    if is_compiled(host):
        name = host_kind(uncompiled(host)).component
        raise ConfigError(f"pipe.{name} is compiled already; apply the patch to the pipeline first, then compile")


def refuse_absent_weights(host: nn.Module) -> None:
    """Raise `ConfigError` if weights that a patch is added to lie elsewhere, with placeholders in their stead."""
    if any(parameter.is_meta for parameter in host.parameters()):
        raise ConfigError(
            "the UNet's weights are offloaded layer by layer, none is there to add to; use enable_model_cpu_offload()"
        )
    if is_offloaded_to_disk(host):
        raise ConfigError(
            "the UNet's weights are offloaded to disk group by group, what is there are placeholders; apply the patch "
            "first, or offload to the CPU"
        )


def refuse_fused_projections(host: nn.Module) -> None:
    """Raise `ConfigError` if attention runs on fused copies of the weights that patches are differences to."""
    if has_fused_projections(host):
        raise ConfigError("attention runs on fused projections; call unfuse_qkv_projections() first, fuse them never")
