"""What a patch did to each image of a batch, step by step, as its handle tells."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from safepatch.patch.picture import TEXT
from safepatch.runtime.call import Step
from safepatch.runtime.handle import Handle
from safepatch.runtime.parts import Look

PICTURE = "picture"
_COUNTED = {TEXT: (TEXT,), PICTURE: (PICTURE,), "either": (TEXT, PICTURE), "both": (TEXT, PICTURE)}
NONE: Mapping[str, Look] = MappingProxyType({})


@dataclass
class Drawn:
    """What was done to one image.

    Attributes:
        timesteps: of the calls of what denoises, in their order.
        acted: numbers of the calls in which something was added to a row of the image, the first being 0.
        gates: by category, what its gate said in each call, a probability; None where it was not asked.
        pictures: likewise, what a gate that looks at pictures had seen of the calls before.
    """

    timesteps: list[float] = field(default_factory=list)
    acted: list[int] = field(default_factory=list)
    gates: dict[str, list[float | None]] = field(default_factory=dict)
    pictures: dict[str, list[float | None]] = field(default_factory=dict)

    def opened(self, thresholds: Mapping[str, float], looks: Mapping[str, Look] = NONE) -> tuple[str, ...]:
        """The categories whose gate opened at some step."""
        return tuple(self.turned(thresholds, looks))

    def turned(self, thresholds: Mapping[str, float], looks: Mapping[str, Look] = NONE) -> dict[str, tuple[str, ...]]:
        """The categories whose gate opened at some step, each with the keys that opened it.

        Args:
            thresholds: of the words' keys, see `Handle.thresholds`.
            looks: see `Handle.looks`.
        """
        words = {name for name, p in _most(self.gates).items() if p >= thresholds.get(name, math.inf)}
        shown = {name for name, p in _most(self.pictures).items() if name in looks and p >= looks[name].threshold}
        found = {}
        for name in sorted(self.gates):
            keys, turned = looks[name].keys if name in looks else TEXT, {TEXT: name in words, PICTURE: name in shown}
            if (all if keys == "both" else any)(turned[key] for key in _COUNTED[keys]):
                found[name] = tuple(key for key in _COUNTED[keys] if turned[key])
        return found


@contextmanager
def recording(handle: Handle | None, images: int = 1) -> Iterator[list[Drawn]]:
    """Within the block, what `handle` does is noted down for each image of a batch; without one, nothing happens.

    The rows of a call are, once or several times, those of all images in their order.
    """
    drawn = [Drawn() for _ in range(images)]
    if handle is None:
        yield drawn
        return
    before = handle.on_step
    handle.on_step = lambda step: _note(drawn, step)
    try:
        yield drawn
    finally:
        handle.on_step = before


def _note(drawn: Sequence[Drawn], step: Step) -> None:
    aligned = len(step.acted) % len(drawn) == 0
    for number, each in enumerate(drawn):
        rows = slice(number, None, len(drawn)) if aligned else slice(None)  # in doubt whatever happened, to any row
        if step.acted[rows].any():
            each.acted.append(len(each.timesteps))
        for kept, told in ((each.gates, step.judged), (each.pictures, step.pictured)):
            for name, said in told.items():
                past = kept.setdefault(name, [])
                past += [None] * (len(each.timesteps) - len(past))
                past.append(_highest(said[rows]))
        each.timesteps.append(step.timestep)
        for past in (*each.gates.values(), *each.pictures.values()):
            past += [None] * (len(each.timesteps) - len(past))


def _most(said: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """The highest of each category's probabilities."""
    return {name: max((p for p in each if p is not None), default=-1.0) for name, each in said.items()}


def _highest(said: Tensor) -> float | None:
    heard = [p for p in said.tolist() if not math.isnan(p)]
    return max(heard, default=None)
