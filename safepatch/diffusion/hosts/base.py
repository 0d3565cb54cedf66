"""What training may ask of a frozen model, whatever denoises in it."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from safepatch.diffusion.components import Components
from safepatch.diffusion.conditioning import Conditioning, joined, moved
from safepatch.diffusion.hosts.kinds import HostKind, family, host_kind, usual_guidance
from safepatch.diffusion.pictures import encode_images
from safepatch.errors import ConfigError

SAMPLED = 997  # every so many-th weight tells one model from another

Residuals = tuple[tuple[Tensor, ...], Tensor]
Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]  # noisy latents, timesteps, conditioning -> a prediction


class Denoised(NamedTuple):
    """Latents (B, C, h, w), and the timestep at which they are; of a flow model it need not be an integer."""

    latents: Tensor
    timestep: float


class Host(ABC):
    """A frozen model: what denoises, text encoders, autoencoder, noise schedule; objectives know no more of it.

    Timesteps count the training schedule from 0, the least noise, to `steps` - 1. Predictions are float32 whatever the
    model computes in.

    Args:
        components: of the model; frozen.
        size: height and width of pictures in pixels; the model's own by default.

    Raises:
        ConfigError: when the model is of another kind, or for a size that it cannot draw.
    """

    kinds: ClassVar[tuple[HostKind, ...]]

    def __init__(self, components: Components, size: int | None = None) -> None:
        if host_kind(components.unet) not in self.kinds:
            name = type(components.unet).__name__
            raise ConfigError(f"not supported yet: training for a {name}; it works with {self.kinds[0].noun}s only")
        self.components = components.freeze()
        self._again: Callable[[], AbstractContextManager] = nullcontext
        self.unet: Any = components.unet
        self.kind = host_kind(components.unet)
        self.scale = 2 ** (len(components.vae.config.block_out_channels) - 1)  # pixels per latent
        self.size = size or self._edge * self.scale
        divisor = self.scale * self._fold
        if self.size < divisor or self.size % divisor:
            raise ConfigError(
                f"pictures of {self.size} pixels cannot be drawn by this model; use a multiple of {divisor}"
            )

    @property
    @abstractmethod
    def _edge(self) -> int:
        """Height and width of the model's own latents."""

    @property
    @abstractmethod
    def _fold(self) -> int:
        """What height and width of latents must be multiples of."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.unet.device

    @property
    def family(self) -> str:
        """`sd1`, `sd2`, `sdxl`, `sdxl-refiner`, `sd3`, `flux`, `tiny-sd` or `unknown`."""
        return family(self.unet.config)

    @property
    def steps(self) -> int:
        """Of the training schedule: timesteps are below it."""
        return self.components.scheduler.config.num_train_timesteps

    @property
    def predicts(self) -> str:
        """`epsilon`, `v_prediction`, `sample` or `flow`."""
        return "flow"

    @property
    def guidance(self) -> float:
        """The guidance scale that suits the family."""
        return usual_guidance(self.unet)

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of one picture's latents."""

    @cached_property
    def key(self) -> str:
        """A hash that tells this model's pictures from another's: of some of its weights, and of its settings."""
        digest = hashlib.sha256(f"{self.family} {self.size} {dict(self.components.scheduler.config)}".encode())
        for module in self.components.modules():
            digest.update(json.dumps(sorted(module.state_dict()), sort_keys=True).encode())
            for weights in module.parameters():
                digest.update(weights.detach().flatten()[::SAMPLED].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the model reads of `prompts`, on its device; of the empty one, what its own pipeline gives it."""

    def words(self, conditioning: Conditioning) -> Tensor:
        """The text states by which gates go, (B, tokens, width)."""
        return conditioning.states

    def last_words(self, prompts: Sequence[str]) -> Tensor:
        """Which of each prompt's text states is the last word's (its last token), int64 (B,); 0 of the empty one."""
        tokenizer, _ = self.components.text_encoders()[0]
        read = tokenizer(list(prompts), truncation=True, max_length=tokenizer.model_max_length).input_ids
        return torch.tensor([len(ids) - 2 for ids in read])  # behind it is the end's mark

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w), float32, of images in [0, 1], (B, 3, H, W)."""
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
        """Latents that the model itself makes of `prompts`, (B, C, h, w), float32, on its device.

        Args:
            prompts: "" is allowed.
            seeds: of the starting noise, one each.
            steps: of denoising, from the last timestep on.
            guidance: of classifier-free guidance; what suits the family by default.
            predict: what predicts for the prompts, instead of this host; for the empty one, which guidance points away
                from, this host does.
        """
        latents = moved(torch.stack([self._noise(seed) for seed in seeds]), self.device)
        asked, empty = self.encode(prompts), self.encode([""]).expand(len(prompts))
        return self.denoise(latents, asked, empty, steps, guidance, predict).latents

    @torch.no_grad()
    def redraw(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        away: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        strength: float,
        guidance: float | None = None,
    ) -> Tensor:
        """Pictures drawn again by other words: img2img (SDEdit, Meng et al. 2022, arXiv 2108.01073).

        Args:
            latents: of the pictures, (B, C, h, w).
            prompts: what is asked of each.
            away: what guidance points away from.
            seeds: of the noise that is added, one each.
            steps: of a whole denoising.
            strength: share of them that is made, in (0, 1]; at 1 nothing of the pictures is left.
            guidance: as in `draw`.

        Returns:
            Latents (B, C, h, w), float32, on the model's device.
        """
        since = steps - max(1, round(strength * steps))
        noise = moved(torch.stack([self._noise(seed) for seed in seeds]), self.device)
        first = torch.full((len(latents),), self.times(steps)[since], device=self.device)
        noisy = self.add_noise(moved(latents, self.device), noise, first) if since else noise
        return self.denoise(noisy, self.encode(prompts), self.encode(away), steps, guidance, since=since).latents

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
        since: int = 0,
    ) -> Denoised:
        """What `draw` does with pure noise, as far as one likes.

        Args:
            latents: standard noise, (B, C, h, w), or what it had become before step `since`.
            asked, empty: of B prompts, and of what guidance points away from.
            steps: of the whole denoising.
            guidance, predict: as in `draw`.
            until: the first step that is not made, none by default.
            since: the first that is.
        """
        guidance = self.guidance if guidance is None else guidance
        scheduler, times = self._schedule(steps)
        until = steps if until is None else until
        for t, own in list(zip(times, scheduler.timesteps.tolist(), strict=False))[since:until]:
            pred = self._guided(latents, t, asked, empty, guidance, predict)
            latents = scheduler.step(pred, own, latents, return_dict=False)[0]
        return Denoised(latents, times[until])

    def times(self, steps: int) -> list[Any]:
        """The timesteps of `denoise`."""
        return self._schedule(steps)[1][:-1]

    @abstractmethod
    def _schedule(self, steps: int) -> tuple[Any, list[Any]]:
        """A scheduler set to so many steps, and the timestep before each of them and behind the last."""

    def _guided(
        self,
        latents: Tensor,
        t: float,
        asked: Conditioning,
        empty: Conditioning,
        guidance: float,
        predict: Predict | None,
    ) -> Tensor:
        """The prediction under classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), (B, C, h, w)."""
        n, times = len(latents), torch.full((2 * len(latents),), t, device=self.device)
        if guidance <= 1:
            return (predict or self.predict)(latents, times[:n], asked)
        if predict:
            towards, base = predict(latents, times[:n], asked), self.predict(latents, times[:n], empty)
        else:
            base, towards = self.predict(torch.cat((latents, latents)), times, joined([empty, asked])).chunk(2)
        return base + guidance * (towards - base)

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (B, C, h, w) at `timesteps` (B,), whatever the pipeline samples with."""

    @abstractmethod
    def predict(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, residuals: Residuals | None = None
    ) -> Tensor:
        """The model's prediction in its own parametrisation, (B, C, h, w), float32.

        Args:
            noisy: latents, (B, C, h, w).
            timesteps: (B,).
            conditioning: of B prompts.
            residuals: of a patch.
        """

    @abstractmethod
    def conditions(self, conditioning: Conditioning) -> Mapping[str, Tensor]:
        """What else the denoiser is told, by diffusers' names."""

    def shown(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and timesteps as the denoiser, and a patch beside it, are given them."""
        return noisy, timesteps

    def clock(self, timesteps: Tensor) -> Tensor:
        """Timesteps as the denoiser is given them, but in steps of the training schedule."""
        return timesteps

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model was regressed on for clean latents and noise, (B, C, h, w)."""

    @abstractmethod
    def to_x0(self, noisy: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction stands for, (B, C, h, w)."""

    @abstractmethod
    def from_x0(self, noisy: Tensor, timesteps: Tensor, clean: Tensor) -> Tensor:
        """The prediction that stands for clean latents: the inverse of `to_x0`."""

    @abstractmethod
    def to_noise(self, noisy: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """The noise that a prediction stands for, (B, C, h, w)."""

    def save_memory(self, again: Callable[[], AbstractContextManager] = nullcontext) -> None:
        """Recompute the denoiser's activations in the backward pass, inside a context that `again` makes."""

        def recomputed(block: Any, *inputs: Any) -> Any:
            return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), self._again()))

        self._again = again
        self.unet.enable_gradient_checkpointing(gradient_checkpointing_func=recomputed)

    def keep_activations(self) -> None:
        """Undo `save_memory`."""
        self._again = nullcontext
        self.unet.disable_gradient_checkpointing()

    @contextmanager
    def recomputed_in(self, again: Callable[[], AbstractContextManager]) -> Iterator[None]:
        """What is predicted within the block is recomputed, if it is, in another context than the patch's."""
        before, self._again = self._again, again
        try:
            yield
        finally:
            self._again = before

    def put_aside(self, but: str = "") -> None:
        """Move what only the bank needed, the autoencoder and the text encoders, off the device; but for one of them.

        Args:
            but: its name in a pipeline.
        """
        for module in self.components.modules():
            if module is not self.unet and module is not getattr(self.components, but, None):
                module.to("cpu")

    def take_back(self) -> None:
        """Move all that was put aside to the device again."""
        self.components.to(self.device)

    def _noise(self, seed: int) -> Tensor:
        return torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed))


def batched(n: int, size: int) -> Iterator[range]:
    """The numbers below n, `size` at a time."""
    return (range(start, min(start + size, n)) for start in range(0, n, size))
