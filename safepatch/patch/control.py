"""The control patch: a trainable clone of the frozen UNet's encoder and mid block, joined by zero convolutions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safepatch.diffusion import UNET, host_kind, projects_states
from safepatch.errors import ConfigError
from safepatch.patch.base import Features, Residuals, row_timesteps
from safepatch.patch.clone import ClonePatch, cloned, latent_channels
from safepatch.patch.transformer import TransformerControlPatch

PROJECTION = "encoder_hid_proj"  # of the text states, which some UNets project before they attend to them


class ControlPatch(ClonePatch):
    """Clone of the encoder and mid block with one zero-initialised 1 x 1 convolution per skip and one for the mid.

    Args:
        clone: the copied encoder parts by their name in the UNet.
        latent_channels: of the sample, the first ones, which the clone reads.
        channels: channels of each skip connection, in encoder order, and last of the mid block.
        sees: `instruction`, `instruction+prompt`, or `prompt`.
    """

    def __init__(
        self, clone: Mapping[str, nn.Module], latent_channels: int, channels: tuple[int, ...], sees: str
    ) -> None:
        super().__init__(clone, latent_channels, sees)
        self.zero_down = nn.ModuleList(_zero_conv(width) for width in channels[:-1])
        self.zero_mid = _zero_conv(channels[-1])

    @classmethod
    def ungated(cls, unet: Any, sees: str, empty: bool, **layout: Any) -> Any:
        """A fresh patch: the clone equals the host's encoder, the zero convolutions are zero.

        For a transformer it is a `TransformerControlPatch`.
        """
        if host_kind(unet) is not UNET:
            return TransformerControlPatch.ungated(unet, sees, empty, **layout)
        if layout:
            raise ConfigError(f"a control patch has no '{min(layout)}'; its layout is the host's")
        parts = {name: getattr(unet, name, None) for name in UNET.encoder}  # a host has only some of the embeddings
        parts = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        if projects_states(unet):
            parts[PROJECTION] = getattr(unet, PROJECTION)
        return cls(cloned(unet, parts, empty), latent_channels(unet), skip_channels(unet), sees)

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        prompt_states: Tensor,
        instruction_states: Tensor,
        conditions: Mapping[str, Tensor] | None = None,
        features: Features | None = None,
        scales: Tensor | None = None,
    ) -> Residuals:
        """Residuals of shape (B, C_i, h_i, w_i) for every skip, and for the mid block."""
        clone: Any = self.clone
        hidden = clone["conv_in"](sample[:, : self.latent_channels])
        embedding = self._embed_time(row_timesteps(timesteps, sample), hidden.dtype, conditions)
        states = self.context(prompt_states, instruction_states)
        if PROJECTION in clone:
            states = clone[PROJECTION](states)
        skips = [hidden]
        for block in clone["down_blocks"]:
            hidden, made = self._block(block, hidden, embedding, states)
            skips.extend(made)
        hidden = self._block(clone["mid_block"], hidden, embedding, states)
        made = [zero(skip) for zero, skip in zip((*self.zero_down, self.zero_mid), (*skips, hidden), strict=True)]
        made = made if scales is None else [residual * scales[..., :1, None, None] for residual in made]
        return Residuals(tuple(made[:-1]), made[-1])

    def joints(self) -> list[nn.Parameter]:
        """The zero convolutions' weights and biases."""
        return [*self.zero_down.parameters(), *self.zero_mid.parameters()]

    def _block(self, block: nn.Module, hidden: Tensor, embedding: Tensor, states: Tensor) -> Any:
        reads_text = getattr(block, "has_cross_attention", False)
        return self.run(block, hidden, embedding, states) if reads_text else self.run(block, hidden, embedding)

    def _embed_time(self, timesteps: Tensor, dtype: torch.dtype, added: Mapping[str, Tensor] | None) -> Tensor:
        embedding = self.clone["time_embedding"](self.clone["time_proj"](timesteps).to(dtype))
        if "add_embedding" not in self.clone:
            return embedding
        if not added or "text_embeds" not in added or "time_ids" not in added:
            raise ConfigError(
                "this UNet needs added_cond_kwargs with text_embeds and time_ids (SDXL); none were passed"
            )
        pooled = self.pooled(added["text_embeds"])
        times = self.clone["add_time_proj"](added["time_ids"].flatten()).reshape(len(pooled), -1)
        joined = torch.cat((pooled, times.to(pooled.dtype)), dim=-1)
        return embedding + self.clone["add_embedding"](joined.to(dtype))


def skip_channels(unet: Any) -> tuple[int, ...]:
    """Channels of every skip in encoder order (conv_in, then each resnet and downsampler), then the mid's."""
    widths = [unet.config["block_out_channels"][0]]  # conv_in may be wrapped by a LoRA
    for block in unet.down_blocks:
        width = block.resnets[-1].out_channels
        widths += [width] * (len(block.resnets) + bool(block.downsamplers))
    return (*widths, unet.mid_block.resnets[-1].out_channels)


def _zero_conv(width: int) -> nn.Conv2d:
    conv: Any = nn.utils.skip_init(nn.Conv2d, width, width, 1)  # draws nothing from the global generator
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv
