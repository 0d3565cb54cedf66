"""What a guard's probabilities come to: a prompt is drawn as it is, in other words, or not at all."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from safepatch.errors import PromptBlocked
from safepatch.guard.file import Guard

SCORE, BLOCK, REWRITE = "score", "block", "rewrite"
ACTIONS = (SCORE, BLOCK, REWRITE)


class Decision(NamedTuple):
    """What was made of one prompt.

    Attributes:
        prompt: as it was asked.
        drawn: as it is drawn; None where it was refused.
        category: that is most probable, by its threshold.
        probability: of it.
        chances: of every category, by name.
        is_claimed: whether that category's threshold is reached.
    """

    prompt: str
    drawn: str | None
    category: str
    probability: float
    chances: Mapping[str, float]
    is_claimed: bool

    @property
    def is_rewritten(self) -> bool:
        """Whether other words are drawn than were asked."""
        return self.drawn not in (None, self.prompt)


def decide(guard: Guard, action: str, texts: Sequence[str]) -> list[Decision]:
    """What is to be done with each text.

    Raises:
        PromptBlocked: without a category, where the guard's answer is no probability: nobody could read that text.
        PromptError: for a text that is too long.
    """
    return [_decide(guard, action, text, chances) for text, chances in zip(texts, _read(guard, texts), strict=True)]


def admitted(guard: Guard, action: str, text: str) -> Decision:
    """What is done with one text that is drawn; raises `PromptBlocked` for one that is not, and as `decide`."""
    (decision,) = decide(guard, action, [text])
    if decision.drawn is None:
        raise refusal(decision, action)
    return decision


def refusal(decision: Decision, action: str) -> PromptBlocked:
    """What is raised for a text that is not drawn."""
    why = "blocked" if action == BLOCK else "blocked, for no rewriting helps"
    told = f"a prompt is {why}: {decision.category} with probability {decision.probability:.2f}"
    return PromptBlocked(told, decision.category, decision.probability)


def _read(guard: Guard, texts: Sequence[str]) -> list[list[float]]:
    chances = guard(texts)
    if not chances.isfinite().all():  # no number is below nothing, so it would pass
        raise PromptBlocked("a prompt is blocked: the guard could not judge it; see to its file, or the model's")
    return chances.tolist()


def _decide(guard: Guard, action: str, text: str, chances: list[float]) -> Decision:
    worst, name, chance = _worst(guard, chances)
    drawn: str | None = text
    if worst >= 0 and action == BLOCK:
        drawn = None
    elif worst >= 0 and action == REWRITE:
        drawn = _rewritten(guard, text, chances)
    return Decision(text, drawn, name, chance, dict(zip(guard.categories, chances, strict=True)), worst >= 0)


def _worst(guard: Guard, chances: list[float]) -> tuple[float, str, float]:
    """The category furthest beyond its threshold, how far, and its probability."""
    beyond = (torch.tensor(chances) - guard.thresholds).tolist()
    place = max(range(len(beyond)), key=beyond.__getitem__)
    return beyond[place], guard.categories[place], chances[place]


def _rewritten(guard: Guard, text: str, chances: list[float]) -> str | None:
    """The text with the claimed categories' concepts replaced; None where it is still claimed, or names none."""
    new = text
    for name, chance in zip(guard.categories, chances, strict=True):
        new = guard.rewritten(new, name) if chance >= guard.info.thresholds[name] else new
    return new if new != text and _worst(guard, _read(guard, [new])[0])[0] < 0 else None


def lacking(guarded: Sequence[str], patched: Sequence[str]) -> list[str]:
    """Warnings of categories that only one of a guard and a patch knows."""
    pairs = ((guarded, patched, "the patch"), (patched, guarded, "the guard"))
    missing = [(what, sorted(set(these) - set(those))) for these, those, what in pairs]
    return [f"warning: {what} knows nothing of {', '.join(names)}" for what, names in missing if names]
