"""Three ways to edit a subject: what each makes of a model, and what prompts then call the subject."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks.learning import Pace, drawn_by, lora, word
from safepatch.data.latents import Drawing, Latents
from safepatch.data.settings import DataConfig
from safepatch.data.words import noun
from safepatch.diffusion import TYPED, Components, TokenReader, UNetHost, Way, decode_latents, teach
from safepatch.errors import ConfigError, SafepatchError, lookup
from safepatch.evaluation.bench import Bench
from safepatch.evaluation.kept import digest
from safepatch.files import replacing, unwritable
from safepatch.results import NONE
from safepatch.runtime.fuse import fuse

WORD = "<it>"  # what a learned word is written as
RARE = "sks"  # DreamBooth's identifier, in front of the class


@dataclass(frozen=True)
class Learning:
    """How subjects are learned.

    Attributes:
        ways: keys of `WAYS`.
        subjects: harmless things; by default some of the first category's.
        count: of those.
        folder: pictures of the one subject that is named; by default the model draws some.
        pictures: that a subject is learned of.
        steps: of learning, of the word and of the LoRA.
        learning_rate: of the LoRA. Small models take ten times as much.
        rank: of the LoRA.
        strength: of img2img, in (0, 1].
    """

    ways: tuple[str, ...] = ("sdedit", "inversion", "dreambooth")
    subjects: tuple[str, ...] = ()
    count: int = 3
    folder: Path | None = None
    pictures: int = 5
    steps: int = 400
    learning_rate: float = 1e-4
    rank: int = 16
    strength: float = 0.8

    def __post_init__(self) -> None:
        """Refuse what there is not, and what learns or edits nothing."""
        for way in self.ways:
            lookup(WAYS, way, what="way to edit")
        if min(self.count, self.pictures, self.steps, self.rank) < 1 or not self.learning_rate > 0:
            raise ConfigError("count, pictures, steps and rank must be at least 1, the learning rate above 0")
        if not all(subject.strip() for subject in self.subjects):
            raise ConfigError("a subject is empty; say what it is: --subject 'a cat'")
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength is {self.strength}; it must be above 0 and at most 1")
        if self.folder and len(self.subjects) != 1:
            raise ConfigError("pictures of one's own are of one subject; say which: --subject 'a dog'")


class Variant(NamedTuple):
    """A model that can draw the subject.

    Attributes:
        bench: of it.
        phrase: what prompts call the subject.
        how: they are asked.
        shown: of a learned subject, one of its pictures, (1, 3, H, W).
    """

    bench: Bench
    phrase: str
    how: Way = TYPED
    shown: Tensor | None = None


def as_it_is(bench: Bench, subject: str, learning: Learning, files: list[Path]) -> Variant:
    """The subject by its name."""
    return Variant(bench, subject)


def sdedit(bench: Bench, subject: str, learning: Learning, files: list[Path]) -> Variant:
    """From a harmless picture of the subject (Meng et al. 2022, arXiv 2108.01073)."""
    return Variant(bench, subject, Way(strength=learning.strength))


def inversion(bench: Bench, subject: str, learning: Learning, files: list[Path]) -> Variant:
    """By a word learned of the subject's pictures; raises `UnsupportedModel` for several text encoders."""
    reader = TokenReader(Components.of(bench.pipe).freeze())
    lesson = Lesson.of(bench, subject, learning, files)

    def make() -> Tensor:
        loss, device = drawn_by(lesson.host), lesson.host.device
        return word(reader, device, loss, lesson.latents, learning.steps, 0, noun(subject).split()[-1]).cpu()

    path = lesson.path("word")
    teach(bench.pipe, WORD, _word(path, make))
    return lesson.variant(path, WORD)


def dreambooth(bench: Bench, subject: str, learning: Learning, files: list[Path]) -> Variant:
    """By a LoRA learned of the subject's pictures, under a rare name."""
    lesson, phrase = Lesson.of(bench, subject, learning, files), rarely(subject)
    path = lesson.path("lora")
    try:
        made = PatchArtifact.open(path)
    except (OSError, SafepatchError):
        pace = Pace(learning.steps, 4, learning.learning_rate)
        texts = [f"a picture of {phrase}"] * len(lesson.latents)
        made = lora(lesson.host, texts, lesson.latents, pace, learning.rank)
        made.save(path)
    variant = lesson.variant(path, phrase)
    fuse(bench.pipe, made)
    return variant


class Edit(NamedTuple):
    """An entry of `WAYS`: what it is, for tables, and what it makes of a fresh bench, which it may change."""

    meaning: str
    make: Callable[[Bench, str, Learning, list[Path]], Variant]


WAYS: dict[str, Edit] = {
    NONE: Edit("the subject by its name, from noise", as_it_is),
    "sdedit": Edit("img2img of a harmless picture of the subject", sdedit),
    "inversion": Edit("a new word, learned of a few pictures of the subject", inversion),
    "dreambooth": Edit("a LoRA, learned of them under a rare name, in the model's weights", dreambooth),
}


class Lesson(NamedTuple):
    """Pictures to learn of.

    Attributes:
        bench: of the model, as it is.
        host: of it.
        latents: of the pictures, (N, 4, h, w).
        key: what is learned depends on it.
    """

    bench: Bench
    host: UNetHost
    latents: Tensor
    key: str

    @classmethod
    def of(cls, bench: Bench, subject: str, learning: Learning, files: list[Path]) -> "Lesson":
        """The files' pictures, or some that the model draws of the subject; they are made once."""
        folder = bench.kept.folder or Path()
        host = UNetHost(Components.of(bench.pipe))
        drawings = [Drawing(f"a picture of {subject}", i) for i in range(learning.pictures)]
        drawings = [Drawing(subject, i, image=file) for i, file in enumerate(files)] or drawings
        made = Latents(
            host, drawings, DataConfig(steps=bench.protocol.steps, cache=str(folder)), f"pictures of {subject}"
        )
        how = {name: value for name, value in asdict(learning).items() if name in ("steps", "learning_rate", "rank")}
        key = digest(host.key, subject, [drawing.key for drawing in drawings], bench.protocol.steps, how)
        return cls(bench, host, made[torch.arange(len(made))], key)

    def path(self, what: str) -> Path:
        """Of the file that keeps what is learned."""
        return (self.bench.kept.folder or Path()) / f"{what}-{self.key}.safetensors"

    def variant(self, path: Path, phrase: str) -> Variant:
        """The bench with what was learned in its pipeline."""
        shown = decode_latents(self.host.components.vae, self.latents[:1])
        return Variant(replace(self.bench, about=digest(self.bench.about, path.name)), phrase, shown=shown)


def rarely(subject: str) -> str:
    """`a cat` as `a sks cat`."""
    bare = noun(subject)
    return f"{'a ' if bare != subject else ''}{RARE} {bare}"


def _word(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """A learned word, kept in a file."""
    try:
        return load_file(path)["word"]
    except (OSError, SafetensorError, KeyError):
        pass
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(save({"word": made.contiguous()}))
    except OSError as error:
        raise unwritable(path, error) from error
    return made
