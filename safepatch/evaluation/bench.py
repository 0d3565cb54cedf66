"""A pipeline under evaluation: it draws each set of prompts once for each patch, and a detector may judge it.

Base and patched images start from the same noise and are drawn in the same batches, because a batch's size decides how
torch rounds: what a patch leaves alone is equal bit for bit.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from accelerate import PartialState
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import Round
from safepatch.data.prompts import Prompt
from safepatch.detectors.base import Detector
from safepatch.diffusion import denoiser, drawn_together, generate_by, own_sides, quiet, usual_guidance
from safepatch.diffusion.askable import require_drawable
from safepatch.errors import ConfigError, UnknownWords, UnsupportedModel
from safepatch.evaluation.kept import Batch, Kept, digest, pixels
from safepatch.progress import bar
from safepatch.runtime.apply import apply
from safepatch.runtime.one_step import one_step, step_of

MOST = 25  # images drawn at a time, of a model whose images are small
_HASHES: "WeakKeyDictionary[PatchArtifact, str]" = WeakKeyDictionary()  # hashing a large patch takes a second


@dataclass(frozen=True)
class Protocol:
    """How images are made.

    Attributes:
        n: images per rate.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; None takes the prompt's own, or what is usual for the model.
        seed: of prompts and images; training uses none of these.
        batch_size: images drawn at a time; None takes as many as their size allows (`drawn_together`), at most `MOST`.
    """

    n: int = 200
    steps: int = 20
    guidance_scale: float | None = None
    seed: int = 1000
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        for name in ("n", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; an evaluation needs at least 1")
        require_drawable(self.steps, self.guidance_scale)

    @property
    def settings(self) -> dict[str, Any]:
        """What figures depend on, beside the model; what that decides counts as its usual value."""
        return {**asdict(self), "batch_size": self.batch_size or MOST}


@dataclass
class Bench:
    """One pipeline under evaluation; keeps the images it has made, by prompts and patch.

    Attributes:
        name: of the base model, for the rows.
        pipe: the base model's pipeline.
        detector: the judge, or None: then nothing that needs one is measured.
        protocol: how images are made.
        unsafe_labels: the detector's labels that are known to be unsafe, beside those of the corpus at hand.
        options: what `apply` is told beside the patch, such as `gate` or `speed`.
        kept: the images made so far.
        about: what else they depend on, where benches share `kept`.
        processes: that draw together, into a folder of `kept`; each walks the same measurements in the same order.
    """

    name: str
    pipe: Any
    detector: Detector | None
    protocol: Protocol
    unsafe_labels: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    about: str = ""
    processes: PartialState | None = None

    @property
    def batch_size(self) -> int:
        """Images drawn at a time."""
        return self.protocol.batch_size or drawn_together(self.pipe, MOST)

    def images(self, prompts: Sequence[Prompt], patch: PatchArtifact | None = None, label: str = "") -> Tensor:
        """Images of `prompts`, each with a seed, in [0, 1] by steps of 1/255, (N, 3, H, W), with `patch` or without."""
        return pixels(self.batches(Round(tuple(prompts)), patch, label))

    def bits(self, prompts: Sequence[Prompt], patch: PatchArtifact | None = None, label: str = "") -> Tensor:
        """Of each image what tells whether another is equal to it to the last bit, (N, 32)."""
        return torch.cat([batch.bits for batch in self.batches(Round(tuple(prompts)), patch, label)])

    def batches(self, asked: Round, patch: PatchArtifact | None, label: str) -> list[Batch]:
        """Batches of the images that are asked for; drawn are those that are not kept, and each is kept at once."""
        parts = self._parts([asked], patch)
        found = self._found(parts, patch, label)
        return [found[key] for key, _ in parts]

    def share(self, asked: Sequence[Round], patch: PatchArtifact | None, label: str) -> None:
        """Have the batches of several rounds drawn before they are needed, by all processes; alone, do nothing.

        A batch is drawn by one process, as it would be by a single one, and found by the others when all are done. What
        a patch refuses to draw for want of words is refused again, to each of them, where it is needed.
        """
        if self.processes is None or self.processes.num_processes == 1:
            return
        parts = list(dict(self._parts(asked, patch)).items())
        with suppress(UnknownWords):  # in front of a wait that the others come to
            self._found(parts[self.processes.process_index :: self.processes.num_processes], patch, label)
        self.processes.wait_for_everyone()

    def _parts(self, asked: Sequence[Round], patch: PatchArtifact | None) -> list[tuple[str, Round]]:
        """The batches of rounds, and what they are kept as."""
        size = self.batch_size
        parts = [each.of(slice(at, at + size)) for each in asked for at in range(0, len(each.prompts), size)]
        return [(self._key(part, patch), part) for part in parts]

    def _found(self, parts: Sequence[tuple[str, Round]], patch: PatchArtifact | None, label: str) -> dict[str, Batch]:
        """What is kept, and what is not, drawn."""
        found = {key: self.kept.get(key) for key, _ in parts}
        missing = {key: part for key, part in parts if found[key] is None}
        if missing:
            quiet(self.pipe)
            starts = {key: self.images(part.starts, None, label) for key, part in missing.items() if part.starts}
            total, start = sum(len(part.prompts) for part in missing.values()), time.perf_counter()
            with self._patched(patch), bar(total=total, desc=label, unit="image", leave=False) as shown:
                for key, part in missing.items():
                    found[key] = batch = Batch.of(self._draw(part, starts.get(key), patch))
                    self.kept.put(key, batch)
                    shown.update(len(part.prompts))
            self.kept.count(total, time.perf_counter() - start)
        return cast(dict[str, Batch], found)

    def guidance_scale(self, prompt: Prompt | None = None, patch: PatchArtifact | None = None) -> float:
        """The guidance scale that a prompt is drawn with: none, 1, with a patch that draws in one step."""
        if patch is not None and step_of(patch.info) is not None:
            return 1.0
        if self.protocol.guidance_scale is not None:
            return self.protocol.guidance_scale
        return prompt.guidance if prompt and prompt.guidance is not None else usual_guidance(denoiser(self.pipe))

    def guidance_of(self, prompts: Sequence[Prompt], patch: PatchArtifact | None = None) -> float:
        """The guidance scale that prompts are drawn with; 0 where some have others of their own."""
        scales = {self.guidance_scale(prompt, patch) for prompt in prompts} or {self.guidance_scale(patch=patch)}
        return scales.pop() if len(scales) == 1 else 0.0

    @property
    def size(self) -> int:
        """Height and width of the images in pixels; 0 where no model says."""
        return 0 if denoiser(self.pipe) is None else own_sides(self.pipe)[0]

    def _key(self, asked: Round, patch: PatchArtifact | None) -> str:
        """What tells these images from others."""
        words = [[(p.text, p.seed, self.guidance_scale(p)) for p in some] for some in (asked.prompts, asked.starts)]
        how = [patch_hash(patch), sorted(self.options.items())] if patch else []
        return digest(self.name, self.about, self.protocol.steps, words, asked.way.key, how)

    def steps(self, patch: PatchArtifact | None) -> int:
        """Denoising steps of what is drawn: one with a patch that draws so."""
        return self.protocol.steps if patch is None or step_of(patch.info) is None else 1

    @contextmanager
    def _patched(self, patch: PatchArtifact | None) -> Iterator[None]:
        if patch is None:
            yield
            return
        with one_step(self.pipe, patch.info), apply(self.pipe, patch, **self.options):
            yield

    def _draw(self, asked: Round, starts: Tensor | None, patch: PatchArtifact | None) -> Tensor:
        """Images of one batch, those of one guidance scale at a time."""
        prompts, steps = asked.prompts, self.steps(patch)
        if asked.way.strength is not None and patch is not None and step_of(patch.info) is not None:
            raise UnsupportedModel("a patch that draws in one step starts from noise alone; leave img2img out")
        scales = [self.guidance_scale(prompt, patch) for prompt in prompts]
        made: dict[int, Tensor] = {}
        for scale in dict.fromkeys(scales):
            rows = [i for i, own in enumerate(scales) if own == scale]
            texts, seeds = [prompts[i].text for i in rows], [prompts[i].seed or 0 for i in rows]
            pictures = None if starts is None else starts[rows]
            images = generate_by(self.pipe, texts, seeds, steps, scale, asked.way.of(rows), pictures)
            made.update(zip(rows, images, strict=True))
        return torch.stack([made[i] for i in range(len(prompts))])


def patch_hash(patch: PatchArtifact | None) -> str | None:
    """The patch's content hash, computed once."""
    if patch is None:
        return None
    if patch not in _HASHES:
        _HASHES[patch] = patch.content_hash
    return _HASHES[patch]
