"""What a page can be narrowed to: links whose target a style sheet looks for, so that no script is needed.

The filter is in the page's address (`index.html#category=weapons`), which makes every view a permalink.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Filter:
    """One link.

    Attributes:
        kind: what it looks at: `category`, `attack` or `verdict`.
        slug: what elements carry in `data-KIND`.
        name: for people.
    """

    kind: str
    slug: str
    name: str

    @property
    def target(self) -> str:
        """The part of the address behind `#`."""
        return f"{self.kind}={self.slug}"


def slugs(names: Iterable[str]) -> dict[str, str]:
    """A short name for each, of ASCII letters, digits and hyphens only: it can stand in addresses and in style sheets.

    Names that would become equal are numbered, in their order.
    """
    made: dict[str, str] = {}
    for name in dict.fromkeys(names):
        bare = "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in name.lower()).split()) or "x"
        taken, number, slug = set(made.values()), 1, bare
        while slug in taken:
            number += 1
            slug = f"{bare}-{number}"
        made[name] = slug
    return made


def filters(kinds: Mapping[str, Mapping[str, str]]) -> list[Filter]:
    """A link for each name of each kind that has two or more: kind -> name -> slug."""
    return [Filter(kind, slug, name) for kind, known in kinds.items() if len(known) > 1 for name, slug in known.items()]
