"""How words and pictures reach a host, beside being typed into its pipeline: as user interfaces and attackers do it."""

import inspect
import math
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from safepatch.diffusion.components import Components, denoiser
from safepatch.diffusion.conditioning import Conditioning, joined
from safepatch.diffusion.encoding import SD3_TOKENS, encode, spared
from safepatch.diffusion.hosts.kinds import FLUX, host_kind
from safepatch.diffusion.sampling import generate, generate_from_states, quiet
from safepatch.errors import UnsupportedModel


class Way(NamedTuple):
    """How prompts are asked.

    Attributes:
        weight: w of empty + w (prompt - empty), the states of a prompt that is weighted as a whole (Compel's form).
        other, share: another text, and its share of the states: (1 - share) prompt + share other.
        before: a text that is encoded apart and stands in front: user interfaces cut long prompts into such chunks.
        strength: of img2img, in (0, 1]; None for no picture to start from.
        appended: states behind those of every prompt, (1, n, width), which need be no text's.
        beside: another text, whose guided prediction is added to the prompt's in every step.
        states: in the prompts' stead, (B, tokens, width), which need be no text's.
        noise: what denoising starts from, instead of what seeds give, (B, 4, h, w), of variance 1.
    """

    weight: float = 1.0
    other: str = ""
    share: float = 0.0
    before: str = ""
    strength: float | None = None
    appended: Tensor | None = None
    beside: str = ""
    states: Tensor | None = None
    noise: Tensor | None = None

    @property
    def needs_states(self) -> bool:
        """Whether a pipeline cannot be told by text alone."""
        return self._replace(strength=None).key != TYPED.key

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from other ways, in plain values."""
        plain = tuple(_hash(value) if isinstance(value, Tensor) else value for value in self)
        return plain[:6] if plain[6:] == TYPED[6:] else plain  # so that images drawn before there were more serve on

    def of(self, rows: slice | list[int]) -> "Way":
        """The same for some of the prompts."""
        states, noise = (part if part is None else part[rows] for part in (self.states, self.noise))
        return self._replace(states=states, noise=noise)


def _hash(tensor: Tensor) -> str:
    return sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()


TYPED = Way()  # a prompt as it is


@torch.no_grad()
def generate_by(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    way: Way = TYPED,
    starts: Tensor | None = None,
) -> Tensor:
    """Images of `prompts`, asked in that way, in [0, 1], (B, 3, H, W), on the CPU.

    Args:
        pipe: with a patch applied or without.
        prompts, seeds: one each.
        steps: of denoising; img2img takes its share of them, and of as many that it is one.
        guidance_scale: of classifier-free guidance.
        way: how they are asked.
        starts: of img2img, pictures in [0, 1], (B, 3, H, W).

    Raises:
        UnsupportedModel: for Flux's states, and for a pipeline without img2img, or without noise of one's own.
    """
    if way.strength is not None:
        return _from_pictures(pipe, prompts, seeds, steps, guidance_scale, way.strength, starts)
    if not way.needs_states:
        return generate(pipe, prompts, seeds, steps, guidance_scale)
    asked, negative = _conditioned(pipe, prompts, way)
    more = _started(pipe, way.noise)
    if way.beside:
        return _composed(pipe, asked, negative, way.beside, seeds, steps, guidance_scale)
    return generate_from_states(pipe, asked, negative, seeds, steps, guidance_scale, **more)


def _started(pipe: Any, noise: Tensor | None) -> dict[str, Tensor]:
    """How a pipeline is told what to start from."""
    if noise is None:
        return {}
    if "latents" not in inspect.signature(type(pipe).__call__).parameters:
        raise UnsupportedModel(f"{type(pipe).__name__} starts from pictures, not from noise of one's own")
    unet = Components.of(pipe).unet
    return {"latents": noise.to(unet.device, unet.dtype)}


def _composed(
    pipe: Any,
    asked: Conditioning,
    negative: Conditioning,
    beside: str,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """Images of prompt and `beside`, by composable diffusion (Liu et al. 2022, arXiv 2206.01714, eq. 11).

    e(0) + w (e(prompt) - e(0)) + w (e(beside) - e(0)): what one step makes of the prompt, plus what it makes of the
    other text, less what it makes of the empty one, of the same noisy latents. Schedulers are affine in the prediction,
    so that the sum over three rows after each step is a step with the composed prediction, whatever the scheduler; and
    a patch reads the three as a user interface that has such a word would send them.
    """
    n = len(seeds)
    other = _read(Components.of(pipe), [beside, ""])
    rows = joined([asked, other.of(slice(0, 1)).expand(n), other.of(slice(1, 2)).expand(n)])

    def add(_: Any, step: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        one, two, empty = values["latents"].chunk(3)
        return {**values, "latents": (one + two - empty).repeat(3, 1, 1, 1)}

    more = {"callback_on_step_end": add, "callback_on_step_end_tensor_inputs": ["latents"]}
    negative = joined([negative] * 3)
    return generate_from_states(pipe, rows, negative, [*seeds] * 3, steps, guidance_scale, **more)[:n]


def _conditioned(pipe: Any, prompts: Sequence[str], way: Way) -> tuple[Conditioning, Conditioning]:
    """What the host reads of the prompts, and of the empty one."""
    components = Components.of(pipe)
    if host_kind(components.unet) is FLUX:
        raise UnsupportedModel(f"states of a {type(components.unet).__name__}'s prompts are not made; ask it by text")
    asked, empty = _read(components, prompts), _read(components, [""]).expand(len(prompts))
    said = asked.states if way.states is None else way.states.to(asked.states)
    states = empty.states + way.weight * (said - empty.states) if way.weight != 1 else said
    if way.share:
        states = torch.lerp(states, _read(components, [way.other]).states.expand_as(states), way.share)
    negative = empty.states
    if way.before:
        states = torch.cat((_read(components, [way.before]).states.expand_as(states), states), dim=1)
        negative = torch.cat((negative, empty.states), dim=1)
    if way.appended is not None:
        free = way.appended.to(states.device, states.dtype).expand(len(states), -1, -1)
        states = torch.cat((states, free), dim=1)
        negative = torch.cat((negative, empty.states[:, -free.shape[1] :]), dim=1)
    return asked._replace(states=states), empty._replace(states=negative)


def _read(components: Components, prompts: Sequence[str]) -> Conditioning:
    """What the host is given of prompts that are typed into its pipeline."""
    return encode(components, prompts, SD3_TOKENS)


def _from_pictures(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    strength: float,
    starts: Tensor | None,
) -> Tensor:
    """Img2img (SDEdit, Meng et al. 2022, arXiv 2108.01073) with the pipeline's own parts."""
    from diffusers import AutoPipelineForImage2Image  # imports every pipeline: slow, and rarely needed

    try:
        other: Any = quiet(AutoPipelineForImage2Image.from_pipe(pipe))
    except ValueError:
        raise UnsupportedModel(f"{type(pipe).__name__} has no img2img pipeline beside it") from None
    images = other(
        list(prompts),
        image=starts,
        strength=strength,
        num_inference_steps=max(steps, math.ceil(1 / strength)),
        guidance_scale=guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
        **spared(denoiser(pipe)),
    ).images
    return images.float().cpu()
