"""How words and pictures reach a host, beside being typed into its pipeline: as user interfaces and attackers do it."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from torch import Tensor

from safepatch.diffusion.components import Components
from safepatch.diffusion.conditioning import Conditioning
from safepatch.diffusion.hosts.kinds import UNET, host_kind
from safepatch.diffusion.sampling import encode, generate, generate_from_states, quiet
from safepatch.errors import UnsupportedModel


class Way(NamedTuple):
    """How prompts are asked.

    Attributes:
        weight: w of empty + w (prompt - empty), the states of a prompt that is weighted as a whole (Compel's form).
        other, share: another text, and its share of the states: (1 - share) prompt + share other.
        before: a text that is encoded apart and stands in front: user interfaces cut long prompts into such chunks.
        strength: of img2img, in (0, 1]; None for no picture to start from.
        appended: states behind those of every prompt, (1, n, width), which need be no text's.
    """

    weight: float = 1.0
    other: str = ""
    share: float = 0.0
    before: str = ""
    strength: float | None = None
    appended: Tensor | None = None

    @property
    def needs_states(self) -> bool:
        """Whether a pipeline cannot be told by text."""
        return self.weight != 1 or self.share > 0 or bool(self.before) or self.appended is not None

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from other ways, in plain values."""
        states = self.appended
        return (*self[:-1], None if states is None else sha256(states.float().cpu().numpy().tobytes()).hexdigest())


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
        steps: of denoising; img2img takes its share of them.
        guidance_scale: of classifier-free guidance.
        way: how they are asked.
        starts: of img2img, pictures in [0, 1], (B, 3, H, W).

    Raises:
        UnsupportedModel: for a transformer's states, and for a pipeline without img2img.
    """
    if way.strength is not None:
        return _from_pictures(pipe, prompts, seeds, steps, guidance_scale, way.strength, starts)
    if not way.needs_states:
        return generate(pipe, prompts, seeds, steps, guidance_scale)
    asked, negative = _conditioned(pipe, prompts, way)
    return generate_from_states(pipe, asked, negative, seeds, steps, guidance_scale)


def _conditioned(pipe: Any, prompts: Sequence[str], way: Way) -> tuple[Conditioning, Conditioning]:
    """What the host reads of the prompts, and of the empty one."""
    components = Components.of(pipe)
    if host_kind(components.unet) is not UNET:
        raise UnsupportedModel(f"states of a {type(components.unet).__name__}'s prompts are not made; ask it by text")
    asked, empty = encode(components, prompts), encode(components, [""]).expand(len(prompts))
    states = empty.states + way.weight * (asked.states - empty.states)
    if way.share:
        states = torch.lerp(states, encode(components, [way.other]).states.expand_as(states), way.share)
    negative = empty.states
    if way.before:
        states = torch.cat((encode(components, [way.before]).states.expand_as(states), states), dim=1)
        negative = torch.cat((negative, empty.states), dim=1)
    if way.appended is not None:
        free = way.appended.to(states.device, states.dtype).expand(len(states), -1, -1)
        states = torch.cat((states, free), dim=1)
        negative = torch.cat((negative, empty.states[:, -free.shape[1] :]), dim=1)
    return asked._replace(states=states), empty._replace(states=negative)


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
    try:
        other: Any = quiet(AutoPipelineForImage2Image.from_pipe(pipe))
    except ValueError:
        raise UnsupportedModel(f"{type(pipe).__name__} has no img2img pipeline beside it") from None
    images = other(
        list(prompts),
        image=starts,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return images.float().cpu()
