"""Stable Diffusion 1, 2, XL, its refiner and their inpainting variants, as what training may ask of a frozen model."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from safepatch.diffusion.components import Components
from safepatch.diffusion.conditioning import Conditioning, joined, moved
from safepatch.diffusion.hosts.kinds import UNET, family, host_kind, usual_guidance
from safepatch.diffusion.sampling import alphas, encode, encode_images, prediction_type
from safepatch.errors import ConfigError

INPAINTING = 9  # channels of a UNet that is given a mask and what is around it beside the latents
SCORE, EMPTY_SCORE = 6.0, 2.5  # aesthetic ones of the refiner's prompts and of negative ones, its pipeline's defaults
SAMPLED = 997  # every so many-th weight tells one model from another

Residuals = tuple[tuple[Tensor, ...], Tensor]
Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]  # noisy latents, timesteps, conditioning -> a prediction


class Denoised(NamedTuple):
    """Latents (B, 4, h, w), and the integer timestep at which they are."""

    latents: Tensor
    timestep: int


class UNetHost:
    """A frozen UNet with its text encoders, autoencoder and noise schedule; objectives know no more of a model.

    Predictions are float32 whatever the model computes in. An inpainting UNet is asked to paint the whole picture.

    Args:
        components: of the model; frozen.
        size: height and width of pictures in pixels; the model's own by default.

    Raises:
        ConfigError: when the model draws with a transformer, or for a size its autoencoder cannot make.
    """

    def __init__(self, components: Components, size: int | None = None) -> None:
        if host_kind(components.unet) is not UNET:
            name = type(components.unet).__name__
            raise ConfigError(f"not supported yet: training for a {name}; it works with UNets only")
        self.components = components.freeze()
        self.unet: Any = components.unet
        self.scale = 2 ** (len(components.vae.config.block_out_channels) - 1)  # pixels per latent
        self.size = size or self.unet.config.sample_size * self.scale
        divisor = self.scale * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if self.size < divisor or self.size % divisor:
            raise ConfigError(
                f"pictures of {self.size} pixels cannot be drawn by this model; use a multiple of {divisor}"
            )

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.device

    @property
    def family(self) -> str:
        """`sd1`, `sd2`, `sdxl`, `sdxl-refiner`, `tiny-sd` or `unknown`."""
        return family(self.unet.config)

    @property
    def steps(self) -> int:
        """Of the training schedule: timesteps are below it."""
        return self.components.scheduler.config.num_train_timesteps

    @property
    def guidance(self) -> float:
        """The guidance scale that suits the family."""
        return usual_guidance(self.unet)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of one picture's latents."""
        edge = self.size // self.scale
        return (self.unet.config.out_channels, edge, edge)

    @cached_property
    def key(self) -> str:
        """A hash that tells this model's pictures from another's: of some of its weights, and of its settings."""
        digest = hashlib.sha256(f"{self.family} {self.size} {dict(self.components.scheduler.config)}".encode())
        for module in self.components.modules():
            digest.update(json.dumps(sorted(module.state_dict()), sort_keys=True).encode())
            for weights in module.parameters():
                digest.update(weights.detach().flatten()[::SAMPLED].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the model reads of `prompts`, on its device; of the empty one, what its own pipeline gives it."""
        read = encode(self.components, prompts).to(self.device)  # the text encoders may have been put aside
        if self.family != "sdxl-refiner":
            return read
        scores = torch.tensor([SCORE if prompt else EMPTY_SCORE for prompt in prompts])
        return read._replace(score=moved(scores, self.device))

    def last_words(self, prompts: Sequence[str]) -> Tensor:
        """Which of each prompt's text states is the last word's (its last token), int64 (B,); 0 of the empty one."""
        tokenizer, _ = self.components.text_encoders()[0]
        read = tokenizer(list(prompts), truncation=True, max_length=tokenizer.model_max_length).input_ids
        return torch.tensor([len(ids) - 2 for ids in read])  # behind it is the end's mark

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, 4, h, w), float32, of images in [0, 1], (B, 3, H, W)."""
        return encode_images(self.components.vae, images).float()

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float | None = None,
        predict: Predict | None = None,
    ) -> Tensor:
        """Latents that the model itself makes of `prompts`, (B, 4, h, w), float32, on its device.

        Args:
            prompts: "" is allowed.
            seeds: of the starting noise, one each.
            steps: of denoising, DDIM (Song et al. 2021, arXiv 2010.02502) from the last timestep on.
            guidance: of classifier-free guidance; what suits the family by default.
            predict: what predicts for the prompts, instead of this host; for the empty one, which guidance points away
                from, this host does.
        """
        latents = moved(torch.stack([self._noise(seed) for seed in seeds]), self.device)
        asked, empty = self.encode(prompts), self.encode([""]).expand(len(prompts))
        return self.denoise(latents, asked, empty, steps, guidance, predict).latents

    @torch.no_grad()
    def denoise(
        self,
        latents: Tensor,
        asked: Conditioning,
        empty: Conditioning,
        steps: int,
        guidance: float | None = None,
        predict: Predict | None = None,
        until: int | None = None,
    ) -> "Denoised":
        """What `draw` does with pure noise, as far as one likes.

        Args:
            latents: standard noise, (B, 4, h, w).
            asked, empty: of B prompts, and of what guidance points away from.
            steps: of the whole denoising.
            guidance, predict: as in `draw`.
            until: how many of the steps are made, all by default.
        """
        guidance = self.guidance if guidance is None else guidance
        scheduler = DDIMScheduler.from_config(
            self.components.scheduler.config, timestep_spacing="trailing", clip_sample=False, thresholding=False
        )
        scheduler.set_timesteps(steps)
        times = [*scheduler.timesteps.tolist(), 0]
        until = steps if until is None else until
        for t in times[:until]:
            pred = self._guided(latents, t, asked, empty, guidance, predict)
            latents = scheduler.step(pred, t, latents, return_dict=False)[0]
        return Denoised(latents, times[until])

    def _guided(
        self,
        latents: Tensor,
        t: int,
        asked: Conditioning,
        empty: Conditioning,
        guidance: float,
        predict: Predict | None,
    ) -> Tensor:
        """The prediction under classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), (B, 4, h, w)."""
        n, times = len(latents), torch.full((2 * len(latents),), t, device=self.device)
        if guidance <= 1:
            return (predict or self.predict)(latents, times[:n], asked)
        if predict:
            towards, base = predict(latents, times[:n], asked), self.predict(latents, times[:n], empty)
        else:
            base, towards = self.predict(torch.cat((latents, latents)), times, joined([empty, asked])).chunk(2)
        return base + guidance * (towards - base)

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

    def save_memory(self, again: Callable[[], AbstractContextManager] = nullcontext) -> None:
        """Recompute the UNet's activations in the backward pass; that happens inside a context that `again` makes."""

        def recomputed(block: Any, *inputs: Any) -> Any:
            return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))

        self.unet.enable_gradient_checkpointing(gradient_checkpointing_func=recomputed)

    def keep_activations(self) -> None:
        """Undo `save_memory`."""
        self.unet.disable_gradient_checkpointing()

    def put_aside(self, but: str = "") -> None:
        """Move what only the bank needed, the autoencoder and the text encoders, off the device; but for one of them.

        Args:
            but: its name in a pipeline.
        """
        _ = self._surroundings if self.unet.config.in_channels == INPAINTING else None
        for module in self.components.modules():
            if module is not self.unet and module is not getattr(self.components, but, None):
                module.to("cpu")

    def _noise(self, seed: int) -> Tensor:
        return torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed))

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


def batched(n: int, size: int) -> Iterator[range]:
    """The numbers below n, `size` at a time."""
    return (range(start, min(start + size, n)) for start in range(0, n, size))
