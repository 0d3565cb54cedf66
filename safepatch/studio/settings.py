"""What is set in the page, as a value that travels in an address and cannot hold nonsense."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode

from safepatch.artifact.info import BUNDLE
from safepatch.errors import ConfigError, lookup, nearest
from safepatch.merging import METHODS

T = TypeVar("T", int, float)

PATCH, SCALE = "patch", "scale."  # keys of an address that may come again: a patch each, and a strength by category
GATES = ("", "hard", "soft", "off")  # empty: as the patch has it
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**53),  # what a browser's numbers hold
    "images": (1, 4),
    "steps": (1, 100),
    "guidance": (0, 100),
    "budget": (1, 500),
}
MOST_PATCHES, LONGEST, MOST_STRENGTH = 12, 4000, 10.0  # patches; characters of a text; times a patch as it was trained


@dataclass(frozen=True)
class Settings:
    """Everything that can be set; what cannot be run cannot be constructed.

    Attributes:
        model: a name, a folder, a file, or a Hub id.
        patches: paths, or `user/repo@revision`.
        method: by which several are merged.
        scales: strength by category, from 0, off; 1 for those not named.
        gate: `hard`, `soft`, `off`, or empty for what is usual for the patch.
        prompt: what to draw.
        seed: of the first image; the others have those that follow.
        images: how many.
        steps: of denoising.
        guidance: of classifier-free guidance; None is what is usual for the model.
        attack: a key of `attacking.OFFERED`.
        budget: of the attack, in its own unit.
        category: that is attacked, a shipped one or a file; empty is the patch's that the prompt names.
        out: where the page writes a merged patch.

    Raises:
        ConfigError: for a value out of range.
        UnknownName: for a method or a gate that there is not.
    """

    model: str = "tiny-sd"
    patches: tuple[str, ...] = ()
    method: str = BUNDLE
    scales: Mapping[str, float] = field(default_factory=dict)
    gate: str = ""
    prompt: str = "a knife next to a cat"
    seed: int = 0
    images: int = 2
    steps: int = 20
    guidance: float | None = None
    attack: str = "words"
    budget: int = 3
    category: str = ""
    out: str = "merged.safetensors"

    def __post_init__(self) -> None:
        """Refuse nonsense with one line."""
        lookup(dict.fromkeys((*METHODS, BUNDLE)), self.method, what="merge method")
        lookup(dict.fromkeys(GATES), self.gate, what="gate mode")
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name}: from {least:g} to {most:g}, not {value:g}")
        for name, value in self.scales.items():
            if not 0 <= value <= MOST_STRENGTH:
                raise ConfigError(f"the strength of {name} is {value:g}; give 0 (off) to {MOST_STRENGTH:g}")
        if len(self.patches) > MOST_PATCHES:
            raise ConfigError(f"{len(self.patches)} patches; the page takes {MOST_PATCHES} at most")
        for text in (self.model, self.prompt, self.category, self.out, *self.patches):
            if len(text) > LONGEST:
                raise ConfigError(f"a text of {len(text)} characters; {LONGEST} at most")

    @classmethod
    def from_query(cls, query: str) -> "Settings":
        """What an address says after its `?`; what it does not say is as usual.

        Raises:
            ConfigError: for a key that there is not, and for a value that is none.
        """
        read: dict[str, Any] = {}
        patches, scales = list[str](), dict[str, float]()
        try:
            pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=200)
        except ValueError as error:
            raise ConfigError(f"an address that cannot be read ({error}); copy it whole") from None
        for key, value in pairs:
            if key == PATCH:
                patches += [value.strip()] if value.strip() else []
            elif key.startswith(SCALE):
                scales[key.removeprefix(SCALE)] = _number(key, value, float)
            elif key not in READ:
                raise ConfigError(f"nothing is called '{key}' here{nearest(key, READ)}")
            else:
                read[key] = READ[key](key, value)
        kept = {name: value for name, value in scales.items() if value != 1}
        return cls(patches=tuple(dict.fromkeys(patches)), scales=kept, **read)

    def to_query(self) -> str:
        """The inverse: what differs from the usual, as it stands in an address; equal settings, equal text."""
        usual = Settings()
        plain = {name: getattr(self, name) for name in READ if getattr(self, name) != getattr(usual, name)}
        pairs: list[tuple[str, str]] = [(name, _written(value)) for name, value in plain.items()]
        pairs += [(PATCH, patch) for patch in self.patches]
        pairs += [(SCALE + name, _written(value)) for name, value in sorted(self.scales.items()) if value != 1]
        return urlencode(pairs)


def _number(key: str, text: str, kind: type[T]) -> T:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{key}: a {'whole ' if kind is int else ''}number, not '{text[:40]}'")
    return value  # pyright: ignore[reportReturnType] - a NaN has been refused


def _text(_: str, text: str) -> str:
    return text.strip()


def _whole(key: str, text: str) -> int:
    return _number(key, text, int)


def _guidance(key: str, text: str) -> float | None:
    return _number(key, text, float) if text.strip() else None


def _written(value: object) -> str:
    return "" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)


# How each key of an address is read.
READ: dict[str, Callable[[str, str], Any]] = {
    **dict.fromkeys(("model", "method", "gate", "prompt", "attack", "category", "out"), _text),
    **dict.fromkeys(("seed", "images", "steps", "budget"), _whole),
    "guidance": _guidance,
}
