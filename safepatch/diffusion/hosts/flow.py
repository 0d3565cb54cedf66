"""Rectified-flow transformers, Stable Diffusion 3 and Flux, as what training may ask of a frozen model.

x_s = (1 - s) x_0 + s ε, and the model predicts the velocity ε - x_0 (Liu et al. 2022, arXiv 2209.03003; Esser et al.
2024, arXiv 2403.03206). Timestep t stands for s = (t + 1) / steps, the training schedule of diffusers' schedulers, so
that objectives draw timesteps here as anywhere. They draw them uniformly or towards noise, as they are told to, not
logit-normally as these models were trained; the shift holds where something is drawn.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from safepatch.diffusion.components import Components
from safepatch.diffusion.conditioning import Conditioning
from safepatch.diffusion.encoding import FLUX_TOKENS, SD3_TOKENS, encode
from safepatch.diffusion.hosts.base import Host, Predict, Residuals
from safepatch.diffusion.hosts.kinds import FLUX, FLUX_EDGE, SD3, HostKind, text_width
from safepatch.errors import ConfigError


class FlowHost(Host):
    """A frozen transformer of SD3's or Flux's kind; it draws by Euler's method on its scheduler's own sigmas.

    Attributes:
        tokens: of T5 that its pipeline reads, unless told otherwise.
    """

    tokens: ClassVar[int]

    def __init__(self, components: Components, size: int | None = None) -> None:
        super().__init__(components, size)
        config = self.unet.config
        if config.in_channels != (config.out_channels or config.in_channels):
            raise ConfigError("not supported yet: training for a transformer that is given more than latents")

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the model reads of `prompts`, on its device: states of all its encoders, and CLIP's pooled ones."""
        return encode(self.components, prompts, self.tokens).to(self.device)

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Share of noise at `timesteps` (B,), shape (B, 1, 1, 1), in (0, 1]."""
        return (self.clock(timesteps) / self.steps).view(-1, 1, 1, 1)

    def clock(self, timesteps: Tensor) -> Tensor:
        """Timesteps in (0, steps]."""
        return timesteps.float() + 1

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - s) latents + s noise."""
        sigma = self.sigmas(timesteps)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity, ε - x_0."""
        return noise - latents

    def to_x0(self, noisy: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents that a velocity stands for, (B, C, h, w)."""
        return noisy - self.sigmas(timesteps) * prediction

    def from_x0(self, noisy: Tensor, timesteps: Tensor, clean: Tensor) -> Tensor:
        """The velocity that stands for clean latents: the inverse of `to_x0`."""
        return (noisy - clean) / self.sigmas(timesteps)

    def to_noise(self, noisy: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """The noise that a velocity stands for, (B, C, h, w)."""
        return noisy + (1 - self.sigmas(timesteps)) * prediction

    @abstractmethod
    def words(self, conditioning: Conditioning) -> Tensor:
        """What CLIP's encoders say of the prompts, (B, tokens, width): of T5's, gates are told in CLIP's words."""

    def conditions(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """What else the transformer is told of each row: CLIP's pooled states, and what Flux is told beside."""
        return self._told(conditioning, self.guidance)

    @abstractmethod
    def _told(self, conditioning: Conditioning, guidance: float) -> dict[str, Tensor]:
        """The same for a guidance of one's own."""

    def predict(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, residuals: Residuals | None = None
    ) -> Tensor:
        """The velocity, (B, C, h, w), float32.

        Args:
            noisy: latents, (B, C, h, w).
            timesteps: (B,).
            conditioning: of B prompts.
            residuals: of a patch, for the image tokens.
        """
        return self._predicted(noisy, timesteps, conditioning, self.guidance, residuals)

    def _predicted(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance: float,
        residuals: Residuals | None = None,
    ) -> Tensor:
        dtype, (sample, times) = self.components.compute_dtype, self.shown(noisy, timesteps)
        options: dict[str, Any] = {**self._told(conditioning, guidance), "timestep": times, "return_dict": False}
        if residuals is not None:
            made = [residual.to(dtype) for residual in (*residuals[0], residuals[1])]
            options[self.kind.residuals] = self.kind.spread(made, len(self.unet.transformer_blocks))
        states = conditioning.states.to(dtype)
        return self._back(self.unet(hidden_states=sample.to(dtype), encoder_hidden_states=states, **options)[0]).float()

    def _back(self, prediction: Tensor) -> Tensor:
        """A prediction in the shape of latents."""
        return prediction

    def _schedule(self, steps: int) -> tuple[Any, list[Any]]:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.components.scheduler.config)
        options: dict[str, Any] = {"mu": self._mu} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(steps, sigmas=self._sigmas(steps, scheduler.config), **options)
        return scheduler, [*(scheduler.timesteps - 1).tolist(), -1.0]

    def _sigmas(self, steps: int, config: Mapping[str, Any]) -> Any:
        """Those that its pipeline asks its scheduler for, before they are shifted; None where it names none."""
        return None

    @property
    def _mu(self) -> float:
        """Log of the shift that suits the number of image tokens, as the pipelines compute it."""
        config, tokens = self.components.scheduler.config, (self.size // self.scale // self._fold) ** 2
        fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, largest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return least + (largest - least) / (most - fewest) * (tokens - fewest)


class SD3Host(FlowHost):
    """Stable Diffusion 3 and 3.5; T5 may be missing."""

    kinds: ClassVar[tuple[HostKind, ...]] = (SD3,)
    tokens: ClassVar[int] = SD3_TOKENS

    def __init__(self, components: Components, size: int | None = None) -> None:
        super().__init__(components, size)
        config = self.unet.config
        if (edge := config.pos_embed_max_size * self._fold) < self.size // self.scale:
            raise ConfigError(
                f"pictures of {self.size} pixels cannot be drawn by this model; use at most {edge * self.scale}"
            )

    @property
    def _edge(self) -> int:
        return self.unet.config.sample_size

    @property
    def _fold(self) -> int:
        return self.unet.config.patch_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of one picture's latents."""
        edge = self.size // self.scale
        return (self.unet.config.in_channels, edge, edge)

    def words(self, conditioning: Conditioning) -> Tensor:
        """The states of CLIP's encoders side by side."""
        tokens = self.components.tokenizer.model_max_length
        return conditioning.states[:, :tokens, : text_width(self.unet)]

    def _told(self, conditioning: Conditioning, guidance: float) -> dict[str, Tensor]:
        return {"pooled_projections": _pooled(conditioning).to(self.device, self.components.compute_dtype)}

    def shown(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The latents, and timesteps in (0, steps]."""
        return noisy, self.clock(timesteps)


class FluxHost(FlowHost):
    """Flux 1; a distilled one is told the usual guidance, and none is computed by a second row."""

    kinds: ClassVar[tuple[HostKind, ...]] = (FLUX,)
    tokens: ClassVar[int] = FLUX_TOKENS

    @property
    def _edge(self) -> int:
        return FLUX_EDGE

    @property
    def _fold(self) -> int:
        return 2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of one picture's latents, before they are packed."""
        edge = self.size // self.scale
        return (self.unet.config.in_channels // 4, edge, edge)

    def shown(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The latents as tokens of 2 x 2, (B, h w / 4, 4 C), and timesteps in (0, 1]."""
        tokens = noisy.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h / 2, 2, w / 2, 2)
        return tokens.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), self.clock(timesteps) / self.steps

    def words(self, conditioning: Conditioning) -> Tensor:
        """CLIP's pooled state."""
        return _pooled(conditioning)[:, None]

    def _told(self, conditioning: Conditioning, guidance: float) -> dict[str, Tensor]:
        pooled, dtype = _pooled(conditioning), self.components.compute_dtype
        told = {"pooled_projections": pooled.to(self.device, dtype), "img_ids": self._places}
        told["txt_ids"] = torch.zeros(conditioning.states.shape[1], 3, device=self.device, dtype=dtype)
        if self.unet.config.guidance_embeds:
            told["guidance"] = torch.full((len(pooled),), guidance, device=self.device)
        return told

    @cached_property
    def _places(self) -> Tensor:
        """Row and column of each image token, (tokens, 3)."""
        at = torch.arange(self.size // self.scale // 2, device=self.device, dtype=self.components.compute_dtype)
        rows, columns = torch.meshgrid(at, at, indexing="ij")
        return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1)

    def _back(self, prediction: Tensor) -> Tensor:
        edge = self.size // self.scale // 2
        tokens = prediction.unflatten(2, (-1, 2, 2)).unflatten(1, (edge, edge))  # (B, h / 2, w / 2, C, 2, 2)
        return tokens.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def _sigmas(self, steps: int, config: Mapping[str, Any]) -> Any:
        return None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)

    def _guided(
        self,
        latents: Tensor,
        t: float,
        asked: Conditioning,
        empty: Conditioning,
        guidance: float,
        predict: Predict | None,
    ) -> Tensor:
        """One call, told the guidance; whoever predicts instead is told the usual one."""
        times = torch.full((len(latents),), t, device=self.device)
        return predict(latents, times, asked) if predict else self._predicted(latents, times, asked, guidance)


def _pooled(conditioning: Conditioning) -> Tensor:
    assert conditioning.pooled is not None, "it was encoded by a host of this kind"
    return conditioning.pooled
