"""A patch module that is ready to act on one host, and how strongly it does."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.errors import ConfigError, lookup
from safepatch.patch import Patch
from safepatch.patch.gate import MODES
from safepatch.patch.picture import TEXT

Scale = float | Mapping[str, float]


class Look(NamedTuple):
    """How a gate that looks at pictures opens.

    Attributes:
        keys: what opens it, of `KEYS`.
        threshold: probability above which its picture key turns.
    """

    keys: str
    threshold: float


class ActivePart(NamedTuple):
    """A patch module and what goes with it.

    Attributes:
        patch: the module, on the pipeline's UNet.
        instruction_states: states of the instructions it reads, (1, tokens, width).
        weight: its weight among the parts of a bundle.
        categories: what it is for, in the order of its instructions; empty if unknown.
        thresholds: probabilities above which each gate opens, (gates,); None without a gate.
        windows: words of the widest window that each gate reads alone; 0 for one that reads whole prompts only.
        keys: what opens each gate, of `KEYS`; the text alone where nothing is said.
        evidence: log odds above which each gate's picture key opens, (gates,); None where no picture counts.
        names: what its gates are called where their categories do not tell them from another part's, see `told_apart`.
    """

    patch: Patch
    instruction_states: Tensor
    weight: float = 1.0
    categories: tuple[str, ...] = ()
    thresholds: Tensor | None = None
    windows: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    evidence: Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def gates(self) -> tuple[str, ...]:
        """What its gates are called: by their categories, as a rule."""
        return self.names or self.categories

    @property
    def reads_windows(self) -> bool:
        """Whether some gate of it reads windows."""
        return any(self.windows)

    @property
    def looks(self) -> bool:
        """Whether some gate of it looks at the picture."""
        return any(key != TEXT for key in self.keys)

    def turned(self, text: Tensor, picture: Tensor) -> Tensor:
        """How far both keys together open each gate: of each key (B, gates), in [0, 1] or bool; the same of the gates.

        `either` takes the wider, `both` the narrower.
        """
        ways = {"text": text, "picture": picture}
        ways |= {"either": torch.maximum(text, picture), "both": torch.minimum(text, picture)}
        return torch.stack([ways[key][:, gate] for gate, key in enumerate(self.keys)], dim=1)

    def scales(self, scale: Scale) -> Tensor:
        """Scale times weight for each group of the part's patch, (groups,)."""
        if not isinstance(scale, Mapping):
            return torch.full((self.patch.groups,), scale * self.weight)
        scales = [scale.get(name, 1.0) for name in self.categories]
        if self.patch.groups == 1 and len(set(scales)) > 1:
            raise ConfigError(
                f"{', '.join(self.categories)} were merged into one and share one scale; merge by bundle, or lite "
                "patches by cat, to keep them apart"
            )
        return torch.tensor(scales[: self.patch.groups]) * self.weight


def told_apart(parts: Sequence[ActivePart]) -> list[ActivePart]:
    """The parts of a patch, of which the gates for one category that open at different odds have names of their own."""
    odds: dict[str, set[tuple]] = {}
    for part in parts:
        for name, *opens in _opens(part):
            odds.setdefault(name, set()).add(tuple(opens))
    return [
        part._replace(names=tuple(n if len(odds.get(n, ())) < 2 else f"{n} (part {i})" for n in part.categories))
        for i, part in enumerate(parts, start=1)
    ]


def _opens(part: ActivePart) -> Iterator[tuple[str, str, float, float]]:
    """Of each gate its category, what opens it, and from where on."""
    if part.thresholds is None:
        return
    keys = part.keys or (TEXT,) * len(part.categories)
    evidence = [0.0] * len(part.categories) if part.evidence is None else part.evidence.tolist()
    yield from zip(part.categories, keys, part.thresholds.tolist(), evidence, strict=False)


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


def gate_mode(parts: Sequence[ActivePart], gate: str | None) -> str:
    """How the gates of these parts are to act, `hard` by default where there are any; raises `ConfigError`."""
    gated = any(part.patch.gate for part in parts)
    if gate is not None and gate not in MODES:
        raise ConfigError(f"gate must be one of {', '.join(MODES)}, not '{gate}'")
    if gate in ("hard", "soft") and not gated:
        raise ConfigError(f"this patch has no gate to be {gate}; fit one with `safepatch gate`, or leave gate out")
    return gate or ("hard" if gated else "off")


def check_window(window: tuple[float, float]) -> None:
    """Raise `ConfigError` unless it is a part of the denoising, from 0 (pure noise) to 1 (the image)."""
    start, end = window
    if not 0 <= start < end <= 1:
        raise ConfigError(f"start and end must be 0 <= start < end <= 1, not {start} and {end}")
