"""The control patch of a transformer, as Stable Diffusion 3 and Flux have: a clone of its first blocks.

Layout after diffusers' ControlNets of these models: one zero-initialised linear layer behind each cloned block; what it
makes is added to the host's image tokens behind as many consecutive blocks as the host has for each of the clone.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safepatch.diffusion import host_kind
from safepatch.errors import ConfigError
from safepatch.patch.base import Features, Residuals, row_timesteps
from safepatch.patch.clone import ClonePatch, cloned, latent_channels


class TransformerControlPatch(ClonePatch):
    """Clone of a transformer's embeddings and first blocks with one zero-initialised linear layer per block.

    Args:
        clone: the copied parts by their name in the transformer.
        latent_channels: of the sample, the first ones, which the clone reads.
        width: channels of its tokens.
        depth: how many blocks were copied.
        sees: `instruction`, `instruction+prompt`, or `prompt`.
    """

    def __init__(self, clone: Mapping[str, nn.Module], latent_channels: int, width: int, depth: int, sees: str) -> None:
        super().__init__(clone, latent_channels, sees)
        self.layout = {"depth": depth}
        self.zero = nn.ModuleList(_zero_linear(width) for _ in range(depth))

    @classmethod
    def ungated(
        cls, unet: Any, sees: str, empty: bool, depth: int | None = None, **layout: Any
    ) -> "TransformerControlPatch":
        """A fresh patch for the transformer `unet`, with `depth` of its blocks, by default a quarter of them."""
        if layout:
            raise ConfigError(f"a transformer's control patch has no '{min(layout)}', only a depth")
        blocks = len(unet.transformer_blocks)
        depth = math.ceil(blocks / 4) if depth is None else depth
        if not 1 <= depth <= blocks:
            raise ConfigError(f"depth must be within [1, {blocks}], the transformer's blocks, not {depth}")
        parts = {name: getattr(unet, name) for name in host_kind(unet).encoder}
        parts["transformer_blocks"] = unet.transformer_blocks[:depth]
        return cls(cloned(unet, parts, empty), latent_channels(unet), unet.inner_dim, depth, sees)

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
        """Residuals of shape (B, image tokens, width) for every cloned block, the last block's as `mid`.

        Args:
            sample: noisy latents (B, C, h, w), or as Flux packs them, (B, image tokens, C).
            timesteps: as the host counts them, (B,) or a scalar.
            prompt_states: the rows' text states, (B, tokens, width).
            instruction_states: the safety instruction's text states, (1 or B, tokens, width).
            conditions: `pooled_projections` (B, width); for Flux also `img_ids` (image tokens, 3) and, where it is
                distilled, `guidance` (B,).
            features: not read.
            scales: strength of the correction, (1,) or (B, 1); 1 by default.

        Raises:
            ConfigError: when a condition is missing.
        """
        clone: Any = self.clone
        states = self.context(prompt_states, instruction_states)
        try:
            hidden, rotary = self._embed_image(sample, states, conditions or {})
            condition = self._embed_time(row_timesteps(timesteps, sample), conditions or {})
        except KeyError as error:
            raise ConfigError(f"the transformer was called without {error}; call it as its pipeline does") from error
        states, made = clone["context_embedder"](states), []
        for block, zero in zip(clone["transformer_blocks"], self.zero, strict=True):
            states, hidden = self.run(block, hidden, states, condition, **rotary)
            made.append(zero(hidden) if scales is None else zero(hidden) * scales[..., :1, None])
        return Residuals(tuple(made[:-1]), made[-1])

    def joints(self) -> list[nn.Parameter]:
        """The zero-initialised layers' weights and biases."""
        return list(self.zero.parameters())

    def _embed_image(
        self, sample: Tensor, states: Tensor, given: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The image's tokens (B, tokens, width) and, for Flux, where all tokens are; those of text are nowhere."""
        clone: Any = self.clone
        if "x_embedder" not in clone:
            return clone["pos_embed"](sample[:, : self.latent_channels]).contiguous(), {}
        places = torch.cat((given["img_ids"].new_zeros(states.shape[1], 3), given["img_ids"]))
        hidden = clone["x_embedder"](sample[..., : self.latent_channels])
        return hidden, {"image_rotary_emb": clone["pos_embed"](places)}

    def _embed_time(self, timesteps: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """One state per row, (B, width), of the timestep, the pooled text and, where Flux has it, the guidance."""
        embed: Any = self.clone["time_text_embed"]
        pooled = self.pooled(given["pooled_projections"]).to(next(self.zero.parameters()).dtype)
        if "x_embedder" not in self.clone:
            return embed(timesteps, pooled)
        times = [timesteps.to(pooled.dtype) * 1000]  # Flux counts timesteps and guidance in thousandths
        if hasattr(embed, "guidance_embedder"):
            times.append(given["guidance"].to(pooled.dtype) * 1000)
        return embed(*times, pooled)


def _zero_linear(width: int) -> nn.Linear:
    linear: Any = nn.utils.skip_init(nn.Linear, width, width)  # draws nothing from the global generator
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
