"""Attacks on what is set: the page's own prompt, asked in other ways, with the patches on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import ATTACKS, Round, Target
from safepatch.data.category import shipped_categories
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import denoiser, generate_by, usual_guidance
from safepatch.errors import lookup
from safepatch.hosting.recording import recording
from safepatch.progress import bar
from safepatch.runtime.apply import apply
from safepatch.runtime.handle import Handle
from safepatch.runtime.parts import Scale
from safepatch.studio.drawing import Picture
from safepatch.studio.judging import Judge
from safepatch.studio.settings import Settings

OFFERED = {"words": 3, "typos": 3, "glyphs": 2, "weighted": 4, "soft-prompt": 20}  # with budgets for who waits


class Attacked(NamedTuple):
    """What an attack came to.

    Attributes:
        attack: its name.
        meaning: in words.
        category: that was attacked.
        plain: the prompt as it stands, with the patches on.
        tries: each way it was asked in.
        labels: of a detector that show the category; none where nothing could tell.
    """

    attack: str
    meaning: str
    category: str
    plain: Picture
    tries: list[Picture]
    labels: frozenset[str]

    @property
    def through(self) -> int:
        """How many tries ended in a picture of the category."""
        return sum(self.shows(each) for each in self.tries)

    def shows(self, picture: Picture) -> bool:
        """Whether a picture shows the category."""
        return bool(self.labels & set(picture.verdict.shown))


def attack(pipe: Any, patch: PatchArtifact, scale: Scale, settings: Settings, judge: Judge) -> Attacked:
    """The prompt with the settings' first seed, asked as it is, then as the attack asks it.

    Args:
        pipe: the model; it is as it was afterwards.
        patch: what is attacked.
        scale: its strength; what is searched by gradients is searched at 1.
        settings: of the page.
        judge: of the pictures.

    Raises:
        UnknownName: for an attack that the page does not offer.
        ConfigError: for a category that there is not, or that the patch is not for.
        PromptError: for a prompt that may not be used.
    """
    lookup(OFFERED, settings.attack, what="attack of the page")
    prompt, known = Prompt(settings.prompt, settings.seed), ATTACKS[settings.attack]
    corpus = Corpus.open(settings.category or _named(settings.prompt, patch.info.categories))
    rounds = known.rounds(corpus, [prompt], settings.seed, settings.budget, Target(pipe, patch))
    pictures = []
    with apply(pipe, patch, scale, gate=settings.gate or None) as handle:
        for asked in bar([Round((prompt,)), *rounds], desc="drawing what was found"):
            pictures.append(_picture(pipe, handle, asked, settings, judge))
    return Attacked(
        settings.attack, known.meaning, corpus.name, pictures[0], pictures[1:], judge.labels_of(corpus.category)
    )


def _named(text: str, categories: Sequence[str]) -> str:
    """The first of a patch's categories whose words a prompt has; in doubt its first."""
    known = [name for name in categories if name in shipped_categories()]
    return next((name for name in known if Corpus.open(name).words.mentions(text)), categories[0])


def _picture(pipe: Any, handle: Handle, asked: Round, settings: Settings, judge: Judge) -> Picture:
    guidance = usual_guidance(denoiser(pipe)) if settings.guidance is None else settings.guidance
    (prompt,) = asked.prompts
    with recording(handle) as drawn:
        (image,) = generate_by(pipe, [prompt.text], [prompt.seed or 0], settings.steps, guidance, asked.way)
    return Picture(image, judge(image), drawn[0], handle.thresholds, handle.looks, _title(asked))


def _title(asked: Round) -> str:
    way, text = asked.way, asked.prompts[0].text
    if way.appended is not None:
        return f"{text} + {way.appended.shape[1]} states that are no words"
    return text if way.weight == 1 else f"({text}) x {way.weight:g}"
