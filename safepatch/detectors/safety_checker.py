"""The safety checker that Stable Diffusion 1.x came with, as a probability instead of a black picture.

It compares a picture's CLIP embedding with those of 17 hidden concepts, each with a threshold of its own, which are
lowered by .01 once one of three *special care* concepts is met (diffusers' `StableDiffusionSafetyChecker`; what it was
built for and misses: Rando et al., "Red-Teaming the Stable Diffusion Safety Filter", 2022,
https://arxiv.org/abs/2210.04610). It knows sexual content only, photographs better than drawings.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor
from torch.nn.functional import normalize

from safepatch.detectors.base import Detector
from safepatch.detectors.clip import clip_pixels
from safepatch.detectors.weights import find_weights, load_model
from safepatch.taxonomy import Category

NAME = "safety-checker"
SOURCE = "CompVis/stable-diffusion-safety-checker"
LABELS = ("nsfw",)

CARE = 0.01  # by how much special care lowers every threshold
EDGE = 0.0005  # margins are rounded to three digits before they are compared with 0, so this is where a verdict turns
SCALE = 100.0  # CLIP's logit scale: what turns a difference of its cosines into a logit
BELOW_HALF = 0.5 - 2**-25  # the largest float32 under one half


def safety_checker_detector(
    categories: Sequence[Category] = (), source: str | Path | None = None, device: str | torch.device = "cpu"
) -> Detector:
    """The safety checker, one label, `nsfw`; at the threshold .5 it answers as diffusers' class does.

    Args:
        categories: not needed: its label is its own.
        source: folder or Hub id of the checker, or folder of a pipeline that has one; `SOURCE` by default.
        device: where it runs.

    Raises:
        ModelNotFound: when the weights are nowhere.
        UnsupportedModel: when they are of another model.
    """
    weights = find_weights(source or SOURCE, NAME, part="safety_checker")
    checker = load_model(StableDiffusionSafetyChecker, weights, device)

    @torch.no_grad()
    def probabilities(images: Tensor) -> Tensor:
        pixels = clip_pixels(images, checker.config.vision_config.image_size)
        return from_margins(margins(checker, pixels)).unsqueeze(1)

    return Detector(NAME, LABELS, probabilities, version=weights.version, sha256=weights.sha256, device=device)


def margins(checker: StableDiffusionSafetyChecker, pixels: Tensor) -> Tensor:
    """By how much the nearest concept's cosine exceeds its threshold, (B,), of CLIP's pixels, (B, 3, size, size)."""
    embeds = normalize(checker.visual_projection(checker.vision_model(pixels).pooler_output))
    care = embeds @ normalize(checker.special_care_embeds).T - checker.special_care_embeds_weights
    concepts = embeds @ normalize(checker.concept_embeds).T - checker.concept_embeds_weights
    careful = (care.round(decimals=3) > 0).any(1, keepdim=True)
    return (concepts + CARE * careful).amax(1)


def from_margins(margins: Tensor) -> Tensor:
    """P(nsfw), (B,): a sigmoid of the margin past `EDGE`, at least .5 exactly where the checker says yes."""
    probabilities = torch.sigmoid(SCALE * (margins - EDGE))
    verdicts = margins.round(decimals=3) > 0
    return torch.where(verdicts, probabilities.clamp(min=0.5), probabilities.clamp(max=BELOW_HALF))
