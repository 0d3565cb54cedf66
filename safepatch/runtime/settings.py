"""What is set on a patch that is attached: checked when it is set, and read once in each call of the host."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from safepatch.errors import ConfigError, lookup
from safepatch.patch.gate import MODES, READINGS
from safepatch.runtime.parts import ActivePart, Scale

WHOLE = (0.0, 1.0)  # the window of a patch that acts in all of a denoising
SPEEDS = {"full": 1, "fast": 2}  # denoising steps for which a control patch's residuals are used


class Settings(NamedTuple):
    """What a user sets.

    Attributes:
        scale: strength, one for all or by category.
        window: the part of the denoising in which the patch acts, from 0 (pure noise) to 1 (the image).
        gate: how its gates act, of `MODES`; None, until it is checked, for the usual one.
        speed: of `SPEEDS`.
        reads: what its gates go by, of `READINGS`.
    """

    scale: Scale = 1.0
    window: tuple[float, float] = WHOLE
    gate: str | None = None
    speed: str = "full"
    reads: str = "windows"

    def checked(self, parts: Sequence[ActivePart]) -> "Settings":
        """The same, if a patch of these parts can be set so; raises `ConfigError` or `UnknownName` if it cannot."""
        check_scale(parts, self.scale)
        check_window(self.window)
        lookup(SPEEDS, self.speed, what="speed")
        lookup(dict.fromkeys(READINGS), self.reads, what="way of reading")
        return self._replace(gate=gate_mode(parts, self.gate))


NONE = Settings(scale=0.0, gate="off")


def check_scale(parts: Sequence[ActivePart], scale: Scale) -> None:
    """Raise for a scale out of range, of a category that there is not, or that parts cannot tell apart."""
    for value in scale.values() if isinstance(scale, Mapping) else [scale]:
        if not 0 <= value < math.inf:  # NaN too
            raise ConfigError(f"scale must be 0 (off) or more, not {value}")
    for name in scale if isinstance(scale, Mapping) else ():
        known = sorted({name for part in parts for name in part.categories})
        lookup(dict.fromkeys(known), name, what="category of this patch")
    for part in parts:
        part.scales(scale)  # refuses what the part cannot tell apart


def check_window(window: tuple[float, float]) -> None:
    """Raise `ConfigError` unless it is a part of the denoising, from 0 (pure noise) to 1 (the image)."""
    start, end = window
    if not 0 <= start < end <= 1:
        raise ConfigError(f"start and end must be 0 <= start < end <= 1, not {start} and {end}")


def gate_mode(parts: Sequence[ActivePart], gate: str | None) -> str:
    """How the gates of these parts are to act, `hard` by default where there are any; raises `ConfigError`."""
    gated = any(part.patch.gate for part in parts)
    if gate is not None and gate not in MODES:
        raise ConfigError(f"gate must be one of {', '.join(MODES)}, not '{gate}'")
    if gate in ("hard", "soft") and not gated:
        raise ConfigError(f"this patch has no gate to be {gate}; fit one with `safepatch gate`, or leave gate out")
    return gate or ("hard" if gated else "off")
