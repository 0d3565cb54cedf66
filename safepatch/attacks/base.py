"""What an attack is: within a budget of images, other ways of asking for what a prompt asks for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.prompts import Prompt, mentions_minors
from safepatch.diffusion import FLUX, TYPED, UNET, Components, TokenReader, Way, denoiser, host_kind
from safepatch.errors import SafepatchError, UnsupportedModel

if TYPE_CHECKING:
    from safepatch.data.corpus import Corpus

# What attacks may take.
STATES, WORDS = "text states of a UNet or of SD3", "one CLIP text encoder before a UNet"
VERSION = 1  # of all attacks together: results of another version are not taken for these


class Round(NamedTuple):
    """One image for each prompt.

    Attributes:
        prompts: what is asked, as many as are attacked and in their order.
        way: how.
        starts: of img2img, the prompts whose images, drawn without a patch, are started from.
    """

    prompts: tuple[Prompt, ...]
    way: Way = TYPED
    starts: tuple[Prompt, ...] = ()

    def of(self, part: slice) -> "Round":
        """Some of the prompts, with what belongs to them."""
        return Round(self.prompts[part], self.way.of(part), self.starts[part])


Judge = Callable[[Round], Tensor]  # P(unsafe) of each image of a round, (prompts,)


class Target(NamedTuple):
    """What is attacked; each attack is handed only what its attacker may know of it.

    Attributes:
        pipe: the model, without the patch.
        patch: a file's content; None for the model alone.
        judge: draws what a round asks for, with the patch, and judges it.
    """

    pipe: Any
    patch: PatchArtifact | None = None
    judge: Judge | None = None


class Opponent(NamedTuple):
    """What an attacker knows who knows all weights.

    Attributes:
        pipe: the model, without the patch.
        patch: what is attacked.
        is_gate_known: whether its gate is among what is known; else the attacker thinks the patch always acts.
    """

    pipe: Any
    patch: PatchArtifact
    is_gate_known: bool = False


class Oracle:
    """The target as whoever may only ask it sees it: pictures, judged; what is asked is counted.

    Args:
        judge: P(unsafe) of each image of a round, (prompts,).
        budget: rounds that may be asked.

    Attributes:
        asked: the rounds so far.
    """

    def __init__(self, judge: Judge, budget: int) -> None:
        self._judge, self.budget = judge, budget
        self.asked: list[Round] = []

    @property
    def left(self) -> int:
        """Rounds that may still be asked."""
        return self.budget - len(self.asked)

    def __call__(self, asked: Round) -> Tensor:
        """P(unsafe) of each image, (prompts,); raises `SafepatchError` when the budget is spent."""
        if not self.left:
            raise SafepatchError(f"the attack's budget of {self.budget} images per prompt is spent")
        self.asked.append(asked)
        return self._judge(asked)


Rounds = Callable[["Corpus", Sequence[Prompt], int, int], list[Round]]
Reading = Callable[[TokenReader, "Corpus", Sequence[Prompt], int, int], list[Round]]
Asking = Callable[[Oracle, TokenReader, "Corpus", Sequence[Prompt], int], None]
Finder = Callable[[Opponent, "Corpus", Sequence[Prompt], int, int], list[Round]]


@dataclass(frozen=True)
class Attack:
    """An entry of `ATTACKS`: one of `make`, `read`, `ask` and `find` says how it goes about it.

    A prompt has resisted when no round's image of it is unsafe, so figures of equal budgets may be compared.

    Attributes:
        meaning: what it does, for lists and tables.
        budget: what it may spend, unless somebody names another.
        make: of a corpus, n unsafe prompts with seeds, a seed and a budget, at most so many rounds: whoever types can
            do this.
        read: the same by who knows the text encoder, which is public, and nothing else; one round, found beforehand.
        ask: the same by who may ask the target for pictures, and knows that text encoder; every picture counts.
        find: the same by who knows all weights, and spends the budget before anything is drawn.
        unit: of the budget.
        takes: what of a model, beside its pipeline: "" nothing, `STATES` or `WORDS`.
    """

    meaning: str
    budget: int
    make: Rounds | None = None
    read: Reading | None = None
    ask: Asking | None = None
    find: Finder | None = None
    unit: str = "images per prompt"
    takes: str = ""

    def can_be_made_on(self, pipe: Any) -> bool:
        """Whether a pipeline's model has what it takes."""
        if not self.takes or (host := denoiser(pipe)) is None:
            return True
        if self.takes == STATES:
            return host_kind(host) is not FLUX
        if host_kind(host) is not UNET:
            return False
        try:
            return bool(reader_of(Target(pipe)))
        except UnsupportedModel:
            return False

    def rounds(
        self,
        corpus: "Corpus",
        prompts: Sequence[Prompt],
        seed: int,
        budget: int | None = None,
        target: Target | None = None,
        is_gate_known: bool = False,
    ) -> list[Round]:
        """What is asked; equal seeds, equal rounds.

        Args:
            corpus: of the category.
            prompts: its unsafe prompts, with seeds.
            seed: of everything random.
            budget: by default the attack's own.
            target: what is attacked; where it is not needed it may be left out. Of who knows all weights: without a
                patch there is nothing to undo, and the prompts are asked as they are.
            is_gate_known: as in `Opponent`; of attacks that know all weights only.
        """
        spent = budget or self.budget
        if self.make:
            return self.make(corpus, prompts, seed, spent)
        if target is None:
            return [Round(tuple(prompts))]
        if self.read:
            return self.read(reader_of(target), corpus, prompts, seed, spent)
        if self.ask and target.judge:
            oracle = Oracle(target.judge, spent)
            self.ask(oracle, reader_of(target), corpus, prompts, seed)
            return oracle.asked
        if self.find and target.patch:
            return self.find(Opponent(target.pipe, target.patch, is_gate_known), corpus, prompts, seed, spent)
        return [Round(tuple(prompts))]


def reader_of(target: Target) -> TokenReader:
    """The text encoder of what is attacked."""
    return TokenReader(Components.of(target.pipe).freeze())


def rng(name: str, seed: int, number: int) -> Random:
    """Of one round of an attack."""
    return Random(f"{name} {seed} {number}")


def reworded(prompt: Prompt, text: str) -> Prompt:
    """The prompt in other words; as it was where these would involve minors, which no change of letters may make."""
    return prompt if mentions_minors(text) else replace(prompt, text=text)


def others(name: str, corpus: "Corpus", prompts: Sequence[Prompt], reader: TokenReader) -> list[int]:
    """Numbers of those typed words of a vocabulary that say nothing of the category.

    Left out are the words that name it, and those that no prompt may have.

    Raises:
        SafepatchError: when none is left.
    """
    own = {word.casefold() for prompt in prompts for word in names_in(corpus, prompt.text)} | _names(corpus)
    words = reader.typed.words
    kept = [i for i, word in enumerate(words) if word not in own and not mentions_minors(word)]
    if not kept:
        raise SafepatchError(f"the vocabulary of this model has no words for attack '{name}' to search among")
    return kept


def _names(corpus: "Corpus") -> set[str]:
    """Words of the names of the category's concepts."""
    named = (name for concept in corpus.words.concepts for name in (*concept.known_names, *concept.heldout))
    return {word for name in named for word in name.casefold().split()}


def names_in(corpus: "Corpus", text: str) -> list[str]:
    """Words of `text` that are in a name of one of the category's concepts, as they stand there; else its longest."""
    names = _names(corpus)
    words = [word for word in text.split() if len(word) > 2]
    return [word for word in words if word.casefold().strip(".,;:!?") in names] or sorted(words, key=len)[-1:]
