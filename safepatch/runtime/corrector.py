"""What the parts of a patch add to one call of the host, computed when it is asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from safepatch.patch import Features, ResidualPatch, Residuals
from safepatch.patch.gate import TextGate
from safepatch.runtime.parts import ActivePart, Scale
from safepatch.runtime.residuals import Cached, Call, padded, plus

SPEEDS = {"full": 1, "fast": 2}  # denoising steps for which a control patch's residuals are used


class Settings(NamedTuple):
    """What a user sets on a `Handle`, checked there."""

    scale: Scale
    gate: str
    speed: str


@dataclass
class Stats:
    """What happened since the patch was attached.

    Attributes:
        unet_calls: times the host's first layer ran, however it was called.
        patched_calls: times the patch had its say.
        gated_rows: rows that a gate has judged, counted per step and category.
        open_rows: those of them for which it opened.
    """

    unet_calls: int = 0
    patched_calls: int = 0
    gated_rows: int = 0
    open_rows: int = 0


class Corrector:
    """What the parts of a patch do in each call, with what they remember from step to step.

    Parts that compute residuals are asked for them `early` or `late`; others, left to hooks of their own, for their
    `strength`.

    Attributes:
        parts: those that compute residuals.
        has_gate: whether any part, of whatever kind, has one.
        stats: counters; those of gated rows are kept here.
        on_gate: shown the timesteps and the gates' probabilities (B, gates), if set.
    """

    def __init__(self, parts: Sequence[ActivePart]) -> None:
        self.parts = tuple(part for part in parts if isinstance(part.patch, ResidualPatch))
        self.has_gate = any(part.patch.gate for part in parts)
        self.stats = Stats()
        self.on_gate: Callable[[Any, Tensor], None] | None = None
        self._cache: dict[int, Cached] = {}  # by the part's identity

    @property
    def reads_features(self) -> bool:
        """Whether any part, or a gate of one, must be shown the host's features."""
        return any(_module(part).reads_features or part.patch.gate for part in self.parts)

    def forget(self) -> None:
        """Drop residuals that were kept for later steps."""
        self._cache.clear()

    def early(self, call: Call, settings: Settings) -> Residuals | None:
        """Before the host runs: the sum over the parts that read none of its features."""
        return self._sum([part for part in self.parts if not _is_late(part, settings)], call, settings, None)

    def late(self, call: Call, settings: Settings, features: Features) -> Residuals | None:
        """Once the host's encoder has run: the sum over the parts that read its features."""
        return self._sum([part for part in self.parts if _is_late(part, settings)], call, settings, features)

    @torch.no_grad()
    def strength(self, part: ActivePart, call: Call, settings: Settings) -> Tensor:
        """Of a part without residuals: one for all rows to correct, (1,), or where it has a gate one for each, (B,)."""
        scales = part.scales(settings.scale).to(call.sample.device)
        if part.patch.gate is None or settings.gate == "off":
            return scales
        states = call.prompt_states[call.rows].float()
        return scales * self._openings(part, settings.gate, None, call.row_timesteps, states)[:, 0]

    def _sum(
        self, parts: Sequence[ActivePart], call: Call, settings: Settings, features: Features | None
    ) -> Residuals | None:
        made = [self._recent(part, call, settings, features) for part in parts]
        made = [residuals for residuals in made if residuals is not None]
        return reduce(plus, made) if made else None

    def _recent(self, part: ActivePart, call: Call, settings: Settings, features: Features | None) -> Residuals | None:
        """The part's residuals, or those of the step before where the speed allows and its gate was open for all rows.

        Where it was closed for a row it is asked again, so that no row depends on the others.
        """
        if settings.speed == "full" or _module(part).reads_features:
            return self._now(part, call, settings, features)[0]
        last = self._cache.get(id(part))
        if last and last.uses < SPEEDS[settings.speed] and last.serves(call):
            self._cache[id(part)] = last._replace(timestep=call.timestep, uses=last.uses + 1)
            return last.residuals
        made, scales = self._now(part, call, settings, features)
        tiled = last is not None and last.shows_tiles(call)
        self._cache[id(part)] = Cached(
            made if scales.all() else None,
            call.sample.shape,
            call.rows,
            call.prompt_states,
            call.timestep,
            is_tiled=tiled,
        )
        return made

    def _now(
        self, part: ActivePart, call: Call, settings: Settings, features: Features | None
    ) -> tuple[Residuals | None, Tensor]:
        """The part's residuals, None where it is off for all rows, and the scales it has."""
        shown = features and features.of_rows(call.rows)
        scales = self._scales(part, call, settings, shown)
        return self._residuals(part, call, scales, shown) if scales.any() else None, scales

    @torch.no_grad()
    def _scales(self, part: ActivePart, call: Call, settings: Settings, shown: Features | None) -> Tensor:
        """Strength of each group, (groups,), or where a gate decides of each row and group, (B, groups)."""
        scales = part.scales(settings.scale).to(call.sample.device)
        if shown is None or part.patch.gate is None or settings.gate == "off":
            return scales
        states = call.prompt_states[call.rows]
        return scales * self._openings(part, settings.gate, shown.mid, call.row_timesteps, states)

    @torch.no_grad()
    def _residuals(self, part: ActivePart, call: Call, scales: Tensor, shown: Features | None) -> Residuals:
        sample, rows = call.sample, call.rows
        patch = _module(part).to(sample.device)
        dtype = next(patch.parameters()).dtype
        times = call.row_timesteps
        conditions = {name: value[rows] for name, value in call.conditions.items()} | dict(call.shared)
        instruction = part.instruction_states.to(sample.device, dtype)
        states = call.prompt_states[rows].to(dtype)
        shown = shown and shown.to(dtype)
        made = patch(sample[rows].to(dtype), times, states, instruction, conditions, shown, scales.to(dtype))
        return Residuals(tuple(padded(r, rows, sample) for r in made.down), padded(made.mid, rows, sample))

    def _openings(self, part: ActivePart, mode: str, mid: Tensor | None, timesteps: Tensor, states: Tensor) -> Tensor:
        """How far the gate is open for each row and group, in [0, 1], (B, groups); 0 or 1 where it is hard.

        A patch that was merged into one group acts where the gate of any of its sources opens.
        """
        gate, thresholds = cast(TextGate, part.patch.gate).to(states.device), cast(Tensor, part.thresholds)
        mid = None if mid is None else mid.float()  # a gate stays in float32
        probabilities = gate(mid, timesteps, states.float()).sigmoid()
        is_open = probabilities >= thresholds.to(probabilities.device)
        self.stats.gated_rows += is_open.numel()
        self.stats.open_rows += int(is_open.sum())
        if self.on_gate:
            self.on_gate(timesteps, probabilities)
        openings = probabilities if mode == "soft" else is_open.float()
        return openings if part.patch.groups > 1 else openings.amax(1, keepdim=True)


def _module(part: ActivePart) -> ResidualPatch:
    return cast(ResidualPatch, part.patch)


def _is_late(part: ActivePart, settings: Settings) -> bool:
    """Whether the part needs the host's features, for itself or for its gate."""
    return _module(part).reads_features or (part.patch.gate is not None and settings.gate != "off")
