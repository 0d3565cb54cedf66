"""What the metadata of a patch may say: one schema, checked before anything of it is used.

Keys that it does not name are free, for records that nothing depends on, but whatever they hold is plain: texts that
can be written, finite numbers, no depths that exhaust a stack.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from safepatch.errors import ArtifactError

Check = Callable[[Any, str], None]  # of a value, and of where it stands

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
MAX_DEPTH = 40
MAX_WINDOWS = 9  # one more than the words that a gate may read at a time
KEYS = ("text", "picture", "either", "both")  # that open a gate
MAX_COUNT = 1 << 31  # that a layout or a shape may name


def refused(value: Any, where: str, wanted: str) -> ArtifactError:
    """The one line about a value that is not what it must be."""
    return ArtifactError(f"patch info '{where}' is {reprlib.repr(value)}; give {wanted}")


def plain(value: Any, where: str, depth: int = 0) -> None:
    """Any JSON value that can be written down again, nested to a reasonable depth."""
    if depth > MAX_DEPTH:
        raise ArtifactError(f"patch info '{where}' is nested {MAX_DEPTH} times and more; give a flatter record")
    if isinstance(value, str):
        text(value, where)
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            plain(item, where, depth + 1)


def text(value: Any, where: str) -> None:
    """A text in which no half of a surrogate pair is alone."""
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise refused(value, where, "a text") from None


def name(value: Any, where: str) -> None:
    """A text that may stand in a list of names on one line."""
    text(value, where)
    if not value.isprintable() or not value:
        raise refused(value, where, "a name of printable characters")


def number(value: Any, where: str) -> None:
    """A finite number, which no bool is."""
    if type(value) not in (int, float) or not -math.inf < value < math.inf:
        raise refused(value, where, "a finite number")


def probability(value: Any, where: str) -> None:
    """A number in [0, 1]."""
    number(value, where)
    if not 0 <= value <= 1:
        raise refused(value, where, "a number from 0 to 1")


def whole(value: Any, where: str, low: int = 0, below: int = MAX_COUNT) -> None:
    """A whole number in [low, below)."""
    if type(value) is not int or not low <= value < below:
        raise refused(value, where, f"a whole number from {low} to {below - 1}")


def sums(value: Any, where: str) -> None:
    """A text of numbers with spaces between them, not all 0: what a patch keeps of its base, see `patch.drift`."""
    text(value, where)
    try:
        length = math.hypot(*map(float, value.split()))
    except ValueError:
        length = math.nan
    if not 0 < length < math.inf:
        raise refused(value, where, "numbers with spaces between them, not all 0")


def table(of: Check, key: Check = text) -> Check:
    """A table whose keys and values are alike."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise refused(value, where, "a dict")
        for inner, item in value.items():
            key(inner, where)
            of(item, f"{where}.{inner}")

    return check


def items(of: Check, length: int | None = None) -> Check:
    """A list, of so many items if `length` says."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or length not in (None, len(value)):
            raise refused(value, where, "a list" if length is None else f"a list of {length}")
        for index, item in enumerate(value):
            of(item, f"{where}[{index}]")

    return check


def record(needed: Mapping[str, Check], known: Mapping[str, Check] | None = None, rest: Check = plain) -> Check:
    """A table that has what is `needed`, may have what is `known`, and holds for the rest what `rest` allows."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise refused(value, where, "a dict")
        for missing in sorted(needed.keys() - value.keys()):
            raise ArtifactError(f"patch info '{where}' has no '{missing}'; give it")
        checks = {**needed, **(known or {})}
        for inner, item in value.items():
            checks.get(inner, rest)(item, f"{where}.{inner}")

    return check


def one_of(names: Sequence[str]) -> Check:
    """One of these texts."""

    def check(value: Any, where: str) -> None:
        if value not in names:
            raise refused(value, where, f"one of {', '.join(names)}")

    return check


def maybe(of: Check) -> Check:
    """That, or null."""
    return lambda value, where: None if value is None else of(value, where)


def recipe(value: Any, where: str) -> None:
    """How a patch was merged, or null; what it says of pairs is about sources that there are."""
    _RECIPE(value, where)
    sources = len(value.get("sources", ())) if value else 0
    for pair in value.get("conflicts", ()) if value else ():
        items(partial(whole, below=sources), 2)(pair["sources"], f"{where}.conflicts.sources")


def _stored(value: Any, where: str) -> None:
    """Dtype and shape of a tensor, `["F16", [3, 4]]`."""
    items(plain, 2)(value, where)
    name(value[0], where)
    items(whole)(value[1], where)


COUNT = partial(whole, low=1)
_FIGURES = record(dict.fromkeys(("cosine", "sign_conflict", "norm_ratio"), maybe(number)))
_SOURCE = record(
    {"hash": text, "weight": number, "categories": items(name)},
    {"title": text, "recipe": recipe, "metadata": table(text), "tensors": table(_stored)},
)
_RECIPE = maybe(
    record(
        {"method": name},
        {
            "sources": items(_SOURCE),
            "rank": whole,
            "conflicts": items(record({"sources": items(whole, 2), "overall": _FIGURES, "blocks": table(_FIGURES)})),
            "rank_errors": table(number),
            "heal": record({"steps": whole, "error": number, "error_before": number}),
        },
    )
)
_GATE = record(
    {"threshold": probability},
    {
        "windows": partial(whole, below=MAX_WINDOWS),
        "certified_recall": probability,
        "keys": one_of(KEYS),
        "picture": record({"threshold": probability}),
    },
)


def component(value: Any, where: str) -> None:
    """A part of a pipeline that a patch may change."""
    if value not in COMPONENTS:
        raise refused(value, where, f"one of {', '.join(COMPONENTS)}")


_CONFIG = {
    "sees": name,
    "layout": table(COUNT),
    "gate": table(_GATE, key=name),
    "component": component,
    "encoder": table(COUNT),
    "one_step": record({"timestep": whole}),
}

SCHEMA: dict[str, Check] = {
    "kind": name,
    "title": text,
    "license": text,
    "instructions": table(text, key=name),
    "fingerprint": table(plain),
    "base": record({}, {"encoder_sketch": sums}, rest=text),
    "config": record({}, _CONFIG),
    "training": table(plain),
    "recipe": recipe,
    "evaluation": table(plain),
    "shapes": table(items(COUNT)),
}
