"""A pipeline under evaluation: it draws each set of prompts once for each patch, and a detector may judge it.

Base and patched images start from the same noise and are drawn in the same batches, because a batch's size decides how
torch rounds: what a patch leaves alone is equal bit for bit.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.prompts import Prompt
from safepatch.detectors.base import Detector
from safepatch.diffusion import denoiser, generate, quiet, usual_guidance
from safepatch.errors import ConfigError
from safepatch.progress import bar
from safepatch.runtime.apply import apply

_HASHES: "WeakKeyDictionary[PatchArtifact, str]" = WeakKeyDictionary()  # hashing a large patch takes a second


@dataclass(frozen=True)
class Protocol:
    """How images are made.

    Attributes:
        n: images per rate.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; None takes the prompt's own, or what is usual for the model.
        seed: of prompts and images; training uses none of these.
        batch_size: images drawn at a time.
    """

    n: int = 200
    steps: int = 20
    guidance_scale: float | None = None
    seed: int = 1000
    batch_size: int = 25

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        for name in ("n", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; an evaluation needs at least 1")


@dataclass
class Bench:
    """One pipeline under evaluation; remembers the images it has made, by prompts and patch.

    Attributes:
        name: of the base model, for the rows.
        pipe: the base model's pipeline.
        detector: the judge, or None: then nothing that needs one is measured.
        protocol: how images are made.
        unsafe_labels: the detector's labels that are known to be unsafe, beside those of the corpus at hand.
        options: what `apply` is told beside the patch, such as `gate` or `speed`.
    """

    name: str
    pipe: Any
    detector: Detector | None
    protocol: Protocol
    unsafe_labels: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    _images: dict[tuple[tuple[Prompt, ...], str | None], Tensor] = field(default_factory=dict)

    def images(self, prompts: Sequence[Prompt], patch: PatchArtifact | None = None, label: str = "") -> Tensor:
        """Images of `prompts`, each with a seed, in [0, 1], (N, 3, H, W), with `patch` or without."""
        hash, size = self._key(patch), self.protocol.batch_size
        chunks = [tuple(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        missing = [chunk for chunk in dict.fromkeys(chunks) if (chunk, hash) not in self._images]
        if missing:
            quiet(self.pipe)
            with (
                self._patched(patch),
                bar(total=sum(map(len, missing)), desc=label, unit="image", leave=False) as shown,
            ):
                for chunk in missing:
                    self._images[chunk, hash] = self._draw(chunk)
                    shown.update(len(chunk))
        return torch.cat([self._images[chunk, hash] for chunk in chunks])

    def guidance_scale(self, prompt: Prompt | None = None) -> float:
        """The guidance scale that a prompt is drawn with."""
        if self.protocol.guidance_scale is not None:
            return self.protocol.guidance_scale
        return prompt.guidance if prompt and prompt.guidance is not None else usual_guidance(denoiser(self.pipe))

    def forget(self, patch: PatchArtifact) -> None:
        """Give back the memory of the images made with `patch`."""
        hash = self._key(patch)
        self._images = {key: images for key, images in self._images.items() if key[1] != hash}

    def _key(self, patch: PatchArtifact | None) -> str | None:
        """What tells pictures of one prompt from each other."""
        return f"{patch_hash(patch)} {sorted(self.options.items())}" if patch else None

    def _patched(self, patch: PatchArtifact | None) -> AbstractContextManager:
        return apply(self.pipe, patch, **self.options) if patch else nullcontext()

    def _draw(self, prompts: Sequence[Prompt]) -> Tensor:
        """Images of prompts, those of one guidance scale at a time."""
        scales = [self.guidance_scale(prompt) for prompt in prompts]
        made: dict[int, Tensor] = {}
        for scale in dict.fromkeys(scales):
            rows = [i for i, own in enumerate(scales) if own == scale]
            texts, seeds = [prompts[i].text for i in rows], [prompts[i].seed or 0 for i in rows]
            made.update(zip(rows, generate(self.pipe, texts, seeds, self.protocol.steps, scale), strict=True))
        return torch.stack([made[i] for i in range(len(prompts))])


def patch_hash(patch: PatchArtifact | None) -> str | None:
    """The patch's content hash, computed once."""
    if patch is None:
        return None
    if patch not in _HASHES:
        _HASHES[patch] = patch.content_hash
    return _HASHES[patch]
