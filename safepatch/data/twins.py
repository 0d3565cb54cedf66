"""Where the safe twin of an unsafe prompt comes from: what `rewrite` means for captions and for lines of a file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from safepatch.data.category import CategoryFile, Concept, Rewrite
from safepatch.data.prompts import EMPTY, Prompt
from safepatch.data.readers import Line, PromptFile
from safepatch.data.words import replaced
from safepatch.errors import ConfigError, PromptError

SOMETHING = "something"  # what `guided` puts in a concept's place: a noun phrase, as concepts are


@dataclass(frozen=True)
class Guide:
    """How the teacher of one prompt is pushed.

    Attributes:
        away, towards: the two prompts between which it is pushed.
        rewrite: how far, and what is left out.
    """

    away: str
    towards: str
    rewrite: Rewrite

    @property
    def key(self) -> list[object]:
        """What a picture of the teacher's depends on, beside the prompt."""
        return [self.away, self.towards, self.rewrite.scale, self.rewrite.threshold, self.rewrite.momentum]


def settled(rewrite: Rewrite, file: CategoryFile, read: PromptFile | None) -> Rewrite:
    """The rewrite with its `by`, which follows from what the file gives where it is left out."""
    if rewrite.by == "column" and read is None:
        raise ConfigError(f"category '{file.name}': rewrite.by is column, but there is no file of pairs; give 'pairs'")
    if rewrite.by == "replace" and (bare := [concept.name for concept in file.concepts if not concept.replacement]):
        raise ConfigError(
            f"category '{file.name}': rewrite.by is replace, but '{bare[0]}' has no replacement; give one"
        )
    if rewrite.by is not None:
        return rewrite
    if read is not None and "safe" in read.took:
        return replace(rewrite, by="column")
    if rewrite.target:
        return replace(rewrite, by="target")
    replaceable = file.concepts and all(concept.replacement for concept in file.concepts)
    return replace(rewrite, by="replace" if replaceable else "guided")


def file_pairs(read: PromptFile, rewrite: Rewrite, file: CategoryFile) -> tuple[list[tuple[Prompt, Prompt]], list[str]]:
    """Pairs of the file's lines, and a note on lines that name none of the concepts to replace."""
    if rewrite.by == "column" and "safe" not in read.took:
        raise PromptError(
            f"{read.path.name} has no column of safe prompts; name one by rewrite.column, or set "
            "rewrite.by to replace, target, empty or guided"
        )
    pairs = [(line.prompt, twin) for line in read.lines if (twin := _line_twin(line, rewrite, file)) is not None]
    lost = len(read.lines) - len(pairs)
    if not pairs:
        raise PromptError(f"no prompt of {read.path.name} names one of the concepts, so there is nothing to replace")
    return pairs, [f"{read.path.name}: left out {lost} prompts that name none of the concepts"] if lost else []


def _line_twin(line: Line, rewrite: Rewrite, file: CategoryFile) -> Prompt | None:
    if rewrite.by == "column":
        return Prompt(str(line.safe), image=line.safe_image)
    if rewrite.by == "target":
        return Prompt(str(rewrite.target), image=line.safe_image)
    if rewrite.by == "empty":
        return EMPTY
    if rewrite.by == "guided":
        return Prompt(without(line.text, file.concepts), image=line.safe_image)
    text = replaced(line.text, file.concepts)
    return None if text == line.text else Prompt(text, image=line.safe_image)


def caption_twin(unsafe: Prompt, replacement: str, rewrite: Rewrite, concepts: Sequence[Concept]) -> Prompt:
    """The twin of a caption; `replacement` is the caption with its concept replaced, '' where there is none for it.

    Raises:
        ConfigError: when it takes a replacement, and there is none.
    """
    if rewrite.by == "target":
        return Prompt(str(rewrite.target))
    if rewrite.by == "empty":
        return EMPTY
    if rewrite.by == "guided":
        return Prompt(without(unsafe.text, concepts))
    if not replacement:
        raise ConfigError(
            f"'{unsafe.text}' has no safe twin; give its concept a replacement, or set rewrite.by to target, empty or "
            "guided"
        )
    return Prompt(replacement)


def without(text: str, concepts: Sequence[Concept]) -> str:
    """`text` with something in the place of every concept that it names."""
    return replaced(text, [replace(concept, replacement=SOMETHING) for concept in concepts])
