"""README's tables say what the code's tables hold; `python tests/unit/test_readme.py` writes them anew."""

import re
from pathlib import Path

import pytest

from safepatch.merging.methods import METHODS
from safepatch.objectives import OBJECTIVES
from safepatch.patch import PATCH_KINDS
from safepatch.taxonomy import CATEGORIES
from safepatch.tiny.models import MODELS

README = Path(__file__).parents[2] / "README.md"


def first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rendered() -> dict[str, str]:
    """Every table by its marker's name."""
    categories = [(f"`{c.name}`", c.definition, ", ".join(x.name for x in c.concepts)) for c in CATEGORIES.values()]
    named = {"methods": ("method", METHODS), "objectives": ("objective", OBJECTIVES), "kinds": ("kind", PATCH_KINDS)}
    return {
        "categories": table(("category", "stand-in for", "drawn as"), categories),
        "models": table(("model", "art"), [(f"`{name}`", vendor) for name, vendor in MODELS.items()]),
        **{
            key: table((head, "what it does"), [(f"`{name}`", first_line(x)) for name, x in entries.items()])
            for key, (head, entries) in named.items()
        },
    }


def blocks(text: str) -> dict[str, str]:
    found = re.findall(r"<!-- table: (\w+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    return dict(found)


@pytest.mark.parametrize("name", ["categories", "models", "methods", "objectives", "kinds"])
def test_readme_table_equals_the_codes_table(name: str) -> None:
    assert blocks(README.read_text())[name] == rendered()[name]


def test_a_changed_table_is_noticed() -> None:
    altered = README.read_text().replace("| `weapons` |", "| `weapon` |", 1)
    assert blocks(altered)["categories"] != rendered()["categories"]


if __name__ == "__main__":
    text = README.read_text()
    for name, body in rendered().items():
        pattern = rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)"
        text = re.sub(pattern, lambda match, body=body: match[1] + body + match[2], text, flags=re.DOTALL)
    README.write_text(text)
