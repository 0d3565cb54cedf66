"""A patch module that is ready to act on one host, and how strongly it does."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.errors import ConfigError
from safepatch.patch import Patch
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


def thresholds(parts: Sequence[ActivePart]) -> dict[str, float]:
    """From which probability on each gate opens, by what it is called."""
    return {
        name: float(value)
        for part in parts
        if part.thresholds is not None
        for name, value in zip(part.gates, part.thresholds, strict=False)
    }


def looks(parts: Sequence[ActivePart]) -> dict[str, Look]:
    """How the gates open that look at pictures, by what they are called."""
    return {
        name: Look(keys, float(odds.double().sigmoid()))
        for part in parts
        if part.evidence is not None
        for name, keys, odds in zip(part.gates, part.keys, part.evidence, strict=True)
        if keys != TEXT
    }
