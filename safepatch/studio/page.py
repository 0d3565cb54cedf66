"""The page and what it is filled with, as HTML; jinja escapes every text, `printable` what would fool a reader."""

import base64
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from safepatch.artifact.info import BUNDLE
from safepatch.attacks import ATTACKS
from safepatch.data.category import shipped_categories
from safepatch.diffusion import as_picture
from safepatch.errors import SafepatchError, printable
from safepatch.merging import METHODS
from safepatch.models.load import MODELS
from safepatch.results import TOY
from safepatch.studio.attacking import OFFERED, Attacked
from safepatch.studio.chosen import Choice, Slider
from safepatch.studio.commands import attacking, merging
from safepatch.studio.desk import Desk
from safepatch.studio.drawing import Pair
from safepatch.studio.merged import Merged
from safepatch.studio.openings import colors, openings_svg
from safepatch.studio.settings import Settings

HERE = Path(__file__).parent
FIRST = 5  # choices that are seen at once, beside those that are ticked
GATES = {
    "": "as the patch has it",
    "hard": "hard: open or shut",
    "soft": "soft: in proportion",
    "off": "off: always on",
}


def page(desk: Desk, settings: Settings, choices: Sequence[Choice], nonce: str, message: str = "") -> str:
    """The whole page with these settings filled in; nothing is drawn, and no model opened."""
    try:
        known, commands = desk.sliders(settings), desk.commands(settings)
    except SafepatchError as error:
        known, commands, message = list[Slider](), list[str](), message or str(error)
    named = {choice.value for choice in choices}
    extra = [Choice(patch, patch) for patch in settings.patches if patch not in named]
    attacks = {name: {"budget": budget, "meaning": ATTACKS[name].meaning} for name, budget in OFFERED.items()}
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            settings=settings,
            usual=Settings(),
            choices=_sorted([*extra, *choices], settings),
            known=known,
            commands=commands,
            message=message,
            nonce=nonce,
            gates=GATES,
            models=sorted(MODELS),
            attacks=attacks,
            categories=list(shipped_categories()),
            methods=[BUNDLE, *METHODS],
            notices=[TOY] if settings.model in MODELS else [],
        )
    )


def _sorted(choices: Sequence[Choice], settings: Settings) -> dict[str, list[Choice]]:
    """Those that are seen at once, ticked ones and the first of those that come with safepatch; and the others."""
    first = [choice for choice in choices if choice.title.endswith("lora")][:FIRST] or choices[:FIRST]
    seen = [choice for choice in choices if choice in first or choice.value in settings.patches]
    return {"seen": seen, "more": [choice for choice in choices if choice not in seen]}


def pairs(drawn: Sequence[Pair], settings: Settings) -> str:
    """Base and patched side by side."""
    return _part("pairs", drawn, settings.prompt)


def attacked(found: Attacked, settings: Settings, desk: Desk) -> str:
    """What an attack came to."""
    return _part("attacked", found, attacking(settings, desk.opening, desk.detector or ""))


def merged(made: Merged, settings: Settings) -> str:
    """What a merge came to."""
    return _part("merged", made, merging(settings))


def sliders(known: Sequence[Slider]) -> str:
    """Strengths that can be set."""
    return _part("sliders", known)


def lines(commands: Sequence[str]) -> str:
    """Command lines."""
    return _part("lines", commands)


def _part(name: str, *values: Any) -> str:
    return str(getattr(_environment().get_template("parts.html.j2").module, name)(*values))


@cache
def _environment() -> Environment:
    loader = FileSystemLoader([HERE, HERE.parent / "reporting"])  # the style is the report's
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"png": _png, "printable": printable, "colors": colors, "openings": openings_svg}
    return environment


def _png(image: Tensor) -> str:
    with BytesIO() as buffer:
        as_picture(image).save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
