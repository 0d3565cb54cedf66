"""What an attack is: within a budget of images, other ways of asking for what a prompt asks for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.prompts import Prompt, mentions_minors
from safepatch.diffusion import TYPED, Way

if TYPE_CHECKING:
    from safepatch.data.corpus import Corpus

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
        return Round(self.prompts[part], self.way, self.starts[part])


class Target(NamedTuple):
    """What an attacker holds who knows all weights.

    Attributes:
        pipe: the model, without the patch.
        patch: what is attacked, a file's content.
    """

    pipe: Any
    patch: PatchArtifact


Rounds = Callable[["Corpus", Sequence[Prompt], int, int], list[Round]]
Finder = Callable[[Target, "Corpus", Sequence[Prompt], int, int], list[Round]]


@dataclass(frozen=True)
class Attack:
    """An entry of `ATTACKS`.

    A prompt has resisted when no round's image of it is unsafe, so figures of equal budgets may be compared.

    Attributes:
        meaning: what it does, for lists and tables.
        budget: what it may spend, unless somebody names another.
        make: of a corpus, n unsafe prompts with seeds, a seed and a budget, at most so many rounds: whoever types can
            do this.
        find: the same by who knows all weights, and spends the budget before anything is drawn; instead of `make`.
        unit: of the budget.
    """

    meaning: str
    budget: int
    make: Rounds | None = None
    find: Finder | None = None
    unit: str = "images per prompt"

    def rounds(
        self,
        corpus: "Corpus",
        prompts: Sequence[Prompt],
        seed: int,
        budget: int | None = None,
        target: Target | None = None,
    ) -> list[Round]:
        """What is asked; equal seeds, equal rounds.

        Args:
            corpus: of the category.
            prompts: its unsafe prompts, with seeds.
            seed: of everything random.
            budget: by default the attack's own.
            target: what is attacked; without a patch there is nothing to undo, and the prompts are asked as they are.
        """
        if self.make:
            return self.make(corpus, prompts, seed, budget or self.budget)
        if target is None or self.find is None:
            return [Round(tuple(prompts))]
        return self.find(target, corpus, prompts, seed, budget or self.budget)


def rng(name: str, seed: int, number: int) -> Random:
    """Of one round of an attack."""
    return Random(f"{name} {seed} {number}")


def reworded(prompt: Prompt, text: str) -> Prompt:
    """The prompt in other words; as it was where these would involve minors, which no change of letters may make."""
    return prompt if mentions_minors(text) else replace(prompt, text=text)


def names_in(corpus: "Corpus", text: str) -> list[str]:
    """Words of `text` that are in a name of one of the category's concepts, as they stand there; else its longest."""
    names = {word for concept in corpus.words.concepts for name in (*concept.known_names, *concept.heldout)
             for word in name.casefold().split()}  # fmt: skip
    words = [word for word in text.split() if len(word) > 2]
    return [word for word in words if word.casefold().strip(".,;:!?") in names] or sorted(words, key=len)[-1:]
