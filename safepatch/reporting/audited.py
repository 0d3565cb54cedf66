"""The page of an audit: which prompts a patch would touch, and which words open its gates; nothing is scripted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from safepatch.files import write_text


@dataclass(frozen=True)
class Phrase:
    """Words that open a gate.

    Attributes:
        words: as the text encoder reads them.
        count: of prompts in which they do.
        examples: some of those prompts, each with what the gate says of it, in [0, 1].
    """

    words: str
    count: int
    examples: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class CategoryAudit:
    """One category of a patch.

    Attributes:
        name: of it.
        counts: prompts by verdict, in the order in which they are shown.
        threshold: from which probability on its gate opens, as text; empty without a gate.
        phrases: that open its gate, the most frequent first.
        others: how many more there are.
    """

    name: str
    counts: Mapping[str, int]
    threshold: str
    phrases: Sequence[Phrase]
    others: int


@dataclass(frozen=True)
class AuditPage:
    """What the page of an audit says.

    Attributes:
        about: what was audited, by name.
        prompts: how many.
        counts: prompts by verdict, of the whole patch.
        meanings: of the verdicts.
        categories: of the patch.
        guarded: prompts by verdict, and by what a guard says of them; empty without one.
    """

    about: Mapping[str, str]
    prompts: int
    counts: Mapping[str, int]
    meanings: Mapping[str, str]
    categories: Sequence[CategoryAudit]
    guarded: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def write_audit(path: Path, page: AuditPage) -> Path:
    """Write the page, all or nothing; every text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template("audit.html.j2").render(page=page))
    return path
