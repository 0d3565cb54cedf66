"""The control patch: a trainable clone of the frozen UNet's encoder and mid block, joined by zero convolutions.

Layout after ControlNet (Zhang et al. 2023, arXiv 2302.05543) without a hint image: what steers the clone is a
textual safety instruction that its cross-attention reads, alone or together with the row's own prompt states.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safepatch.diffusion import without_image_prompts
from safepatch.errors import ConfigError
from safepatch.patch.base import Features, Patch, Residuals, row_timesteps

SEES = ("instruction", "instruction+prompt")
# The encoder half of UNet2DConditionModel, in the order it runs; a host has only some of the embeddings.
CLONED = ("conv_in", "time_proj", "time_embedding", "add_time_proj", "add_embedding", "down_blocks", "mid_block")


class ControlPatch(Patch):
    """Clone of the encoder and mid block with one zero-initialised 1 x 1 convolution per skip and one for the mid.

    Args:
        clone: the copied encoder parts by their name in the UNet.
        channels: channels of each skip connection, in encoder order, and last of the mid block.
        sees: `instruction`, or `instruction+prompt`.
    """

    kind = "control"
    reads_features = False
    learning_rate = 1e-3
    joint_rate = 10.0

    def __init__(self, clone: Mapping[str, nn.Module], channels: tuple[int, ...], sees: str) -> None:
        super().__init__()
        if sees not in SEES:
            raise ConfigError(f"a control patch cannot see '{sees}'; choose one of: {', '.join(SEES)}")
        self.sees = sees
        self.layout = {}
        self.gradient_checkpointing = False
        self.clone = nn.ModuleDict(dict(clone))
        self.zero_down = nn.ModuleList(_zero_conv(width) for width in channels[:-1])
        self.zero_mid = _zero_conv(channels[-1])

    @classmethod
    def from_unet(
        cls, unet: Any, sees: str = "instruction+prompt", gate: int = 0, empty: bool = False, **layout: Any
    ) -> "ControlPatch":
        """A fresh patch: the clone equals the host's encoder, the zero convolutions are zero; `gate` is a width."""
        if layout:
            raise ConfigError(f"a control patch has no '{min(layout)}'; its layout is the host's")
        parts = {name: getattr(unet, name) for name in CLONED if isinstance(getattr(unet, name, None), nn.Module)}
        clone = {name: _copy_without_hooks(part, empty).float().requires_grad_(True) for name, part in parts.items()}
        clone["conv_in"] = _narrowed(clone["conv_in"], unet.config["out_channels"])
        patch = cls(clone, skip_channels(unet), sees)
        if gate:
            patch.add_gate(unet, gate)
        return patch

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        prompt_states: Tensor,
        instruction_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        features: Features | None = None,
        scales: Tensor | None = None,
    ) -> Residuals:
        """Residuals of shape (B, C_i, h_i, w_i) for every skip, and for the mid block."""
        clone: Any = self.clone
        hidden = clone["conv_in"](sample[:, : clone["conv_in"].in_channels])
        embedding = self._embed_time(row_timesteps(timesteps, sample), hidden.dtype, added_cond_kwargs)
        states = self._context(prompt_states, instruction_states)
        skips = [hidden]
        for block in clone["down_blocks"]:
            hidden, made = self._run(block, hidden, embedding, states)
            skips.extend(made)
        hidden = self._run(clone["mid_block"], hidden, embedding, states)
        made = [zero(skip) for zero, skip in zip((*self.zero_down, self.zero_mid), (*skips, hidden), strict=True)]
        made = made if scales is None else [residual * scales[..., :1, None, None] for residual in made]
        return Residuals(tuple(made[:-1]), made[-1])

    def joints(self) -> list[nn.Parameter]:
        """The zero convolutions' weights and biases."""
        return [*self.zero_down.parameters(), *self.zero_mid.parameters()]

    def anchors(self, unet: Any) -> dict[str, Tensor]:
        """The host's own encoder weights for the clone, zeros for the zero convolutions."""
        host = dict(unet.named_parameters())
        host["conv_in.weight"] = host["conv_in.weight"][:, : self.clone["conv_in"].in_channels]
        return {
            name: host[name.removeprefix("clone.")] if name.startswith("clone.") else torch.zeros_like(p)
            for name, p in self.named_parameters()
        }

    def _context(self, prompt_states: Tensor, instruction_states: Tensor) -> Tensor:
        instruction = instruction_states.expand(prompt_states.shape[0], -1, -1)
        return instruction if self.sees == "instruction" else torch.cat((instruction, prompt_states), dim=1)

    def _run(self, block: nn.Module, hidden: Tensor, embedding: Tensor, states: Tensor) -> Any:
        inputs = (hidden, embedding, states) if getattr(block, "has_cross_attention", False) else (hidden, embedding)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _embed_time(self, timesteps: Tensor, dtype: torch.dtype, added: Mapping[str, Tensor] | None) -> Tensor:
        embedding = self.clone["time_embedding"](self.clone["time_proj"](timesteps).to(dtype))
        if "add_embedding" not in self.clone:
            return embedding
        if not added or "text_embeds" not in added or "time_ids" not in added:
            raise ConfigError(
                "this UNet needs added_cond_kwargs with text_embeds and time_ids (SDXL); none were passed"
            )
        times = self.clone["add_time_proj"](added["time_ids"].flatten()).reshape(added["text_embeds"].shape[0], -1)
        joined = torch.cat((added["text_embeds"], times.to(added["text_embeds"].dtype)), dim=-1)
        return embedding + self.clone["add_embedding"](joined.to(dtype))


def skip_channels(unet: Any) -> tuple[int, ...]:
    """Channels of every skip in encoder order (conv_in, then each resnet and downsampler), then the mid's."""
    widths = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        width = block.resnets[-1].out_channels
        widths += [width] * (len(block.resnets) + bool(block.downsamplers))
    return (*widths, unet.mid_block.resnets[-1].out_channels)


def _zero_conv(width: int) -> nn.Conv2d:
    conv: Any = nn.utils.skip_init(nn.Conv2d, width, width, 1)  # draws nothing from the global generator
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def _narrowed(conv: Any, channels: int) -> Any:
    """`conv` on its first `channels` inputs: of what an inpainting UNet is given, only the latents are every host's."""
    if conv.in_channels > channels:
        conv.in_channels, conv.weight = channels, nn.Parameter(conv.weight.detach()[:, :channels].clone())
    return conv


def _copy_without_hooks(module: nn.Module, empty: bool) -> nn.Module:
    """A deep copy without the host's hooks and image prompts: the clone must run no other patch, and reads text."""
    tables = [getattr(part, name) for part in module.modules() for name in _HOOK_TABLES]
    replaced: dict[int, Any] = {id(table): OrderedDict() for table in tables}
    if empty:
        replaced |= {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in module.parameters()}
    return without_image_prompts(copy.deepcopy(module, replaced))


_HOOK_TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
