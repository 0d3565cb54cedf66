"""Stable Diffusion 1, 2, XL, its refiner and their inpainting variants, as what training may ask of a frozen model."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from safepatch.diffusion.components import Components
from safepatch.diffusion.conditioning import Conditioning, moved
from safepatch.diffusion.encoding import encode
from safepatch.diffusion.hosts.base import Host, Residuals
from safepatch.diffusion.hosts.kinds import UNET, HostKind
from safepatch.diffusion.noise import alphas, prediction_type, training_target
from safepatch.errors import UnsupportedModel

PREDICTED = ("epsilon", "v_prediction", "sample")
INPAINTING = 9  # channels of a UNet that is given a mask and what is around it beside the latents
SCORE, EMPTY_SCORE = 6.0, 2.5  # aesthetic ones of the refiner's prompts and of negative ones, its pipeline's defaults


class UNetHost(Host):
    """A frozen UNet with its text encoders, autoencoder and noise schedule.

    It draws by DDIM (Song et al. 2021, arXiv 2010.02502). An inpainting UNet is asked to paint the whole picture.

    Raises:
        UnsupportedModel: for another noise schedule, such as EDM's or a flow model's.
    """

    kinds: ClassVar[tuple[HostKind, ...]] = (UNET,)

    def __init__(self, components: Components, size: int | None = None) -> None:
        super().__init__(components, size)
        scheduler = components.scheduler
        if scheduler is None:  # one of meta tensors, which draws nothing
            return
        if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("prediction_type") not in PREDICTED:
            raise UnsupportedModel(
                f"not supported yet: training for a UNet whose noise schedule is that of {type(scheduler).__name__}; "
                "patches know those of Stable Diffusion, DDIM's for instance"
            )

    @property
    def _edge(self) -> int:
        return self.unet.config.sample_size

    @property
    def _fold(self) -> int:
        return 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def predicts(self) -> str:
        """`epsilon`, `v_prediction` or `sample`."""
        return prediction_type(self.components.scheduler)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of one picture's latents."""
        edge = self.size // self.scale
        return (self.unet.config.out_channels, edge, edge)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the model reads of `prompts`, on its device; of the empty one, what its own pipeline gives it."""
        read = encode(self.components, prompts).to(self.device)  # the text encoders may have been put aside
        if self.family != "sdxl-refiner":
            return read
        scores = torch.tensor([SCORE if prompt else EMPTY_SCORE for prompt in prompts])
        return read._replace(score=moved(scores, self.device))

    def _schedule(self, steps: int) -> tuple[Any, list[Any]]:
        scheduler = DDIMScheduler.from_config(
            self.components.scheduler.config, timestep_spacing="trailing", clip_sample=False, thresholding=False
        )
        scheduler.set_timesteps(steps)
        return scheduler, [*scheduler.timesteps.tolist(), 0]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) latents + sqrt(1 - a) noise at integer `timesteps` (B,), whatever the pipeline samples with."""
        signal, sigma = alphas(self.components.scheduler, timesteps)
        return signal * latents + sigma * noise

    def predict(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, residuals: Residuals | None = None
    ) -> Tensor:
        """The model's prediction in its own parametrisation, (B, 4, h, w), float32.

        Args:
            noisy: latents, (B, 4, h, w).
            timesteps: integer, (B,).
            conditioning: of B prompts.
            residuals: of a patch, for the skips and the mid block.
        """
        dtype, extra = self.components.compute_dtype, self.conditions(conditioning)
        options: dict[str, Any] = {"added_cond_kwargs": extra} if extra else {}
        if residuals is not None:
            down, mid = residuals
            options["down_block_additional_residuals"] = tuple(residual.to(dtype) for residual in down)
            options["mid_block_additional_residual"] = mid.to(dtype)
        states = conditioning.states.to(dtype)
        return self.unet(
            self._input(noisy).to(dtype), timesteps, encoder_hidden_states=states, **options
        ).sample.float()

    def conditions(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """What else the UNet is told of each row, by diffusers' names: SDXL's pooled states and sizes."""
        if conditioning.pooled is None:
            return {}
        pooled = conditioning.pooled.to(self.device, self.components.compute_dtype)
        ids = self._time_ids.expand(len(pooled), -1)
        if conditioning.score is not None:
            ids = torch.cat((ids[:, :-1], conditioning.score.to(ids)[:, None]), dim=1)
        return {"text_embeds": pooled, "time_ids": ids}

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, v or the latents, by the model's `prediction_type`."""
        return training_target(self.components.scheduler, latents, noise, timesteps)

    def to_x0(self, noisy: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction stands for, (B, 4, h, w)."""
        signal, sigma = alphas(self.components.scheduler, timesteps)
        kind = prediction_type(self.components.scheduler)
        if kind == "v_prediction":
            return signal * noisy - sigma * prediction
        return prediction if kind == "sample" else (noisy - sigma * prediction) / signal

    def from_x0(self, noisy: Tensor, timesteps: Tensor, clean: Tensor) -> Tensor:
        """The prediction that stands for clean latents: the inverse of `to_x0`."""
        signal, sigma = alphas(self.components.scheduler, timesteps)
        kind = prediction_type(self.components.scheduler)
        if kind == "v_prediction":
            return (signal * noisy - clean) / sigma
        return clean if kind == "sample" else (noisy - signal * clean) / sigma

    def to_noise(self, noisy: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """The noise that a prediction stands for, (B, 4, h, w)."""
        signal, sigma = alphas(self.components.scheduler, timesteps)
        return (noisy - signal * self.to_x0(noisy, timesteps, prediction)) / sigma

    def put_aside(self, but: str = "") -> None:
        """Move what only the bank needed, the autoencoder and the text encoders, off the device; but for one of them.

        Args:
            but: its name in a pipeline.
        """
        _ = self._surroundings if self.unet.config.in_channels == INPAINTING else None
        super().put_aside(but)

    def _input(self, noisy: Tensor) -> Tensor:
        """What the UNet is given: the latents, and where it inpaints a mask of ones and nothing around it."""
        if self.unet.config.in_channels != INPAINTING:
            return noisy
        mask = torch.ones_like(noisy[:, :1])
        return torch.cat((noisy, mask, self._surroundings.to(noisy).expand(len(noisy), -1, -1, -1)), dim=1)

    @cached_property
    def _surroundings(self) -> Tensor:
        """Latents of the grey picture that masking everything leaves, (1, 4, h, w)."""
        return self.encode_images(torch.full((1, 3, self.size, self.size), 0.5)).to(self.device)

    @cached_property
    def _time_ids(self) -> Tensor:
        """SDXL's sizes and crop, or the refiner's sizes, crop and aesthetic score, (1, 6 or 5)."""
        config, size = self.unet.config, float(self.size)
        pooled = self.components.text_encoder_2.config.projection_dim
        count = (config.projection_class_embeddings_input_dim - pooled) // config.addition_time_embed_dim
        ids = [size, size, 0.0, 0.0, *([SCORE] if count == 5 else [size, size])]
        return torch.tensor([ids], device=self.device, dtype=self.components.compute_dtype)
