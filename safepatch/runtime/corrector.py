"""What the parts of a patch add to one call of the host, computed when it is asked for."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from safepatch.patch import Features, ResidualPatch, Residuals
from safepatch.patch.base import plus
from safepatch.patch.gate import TextGate
from safepatch.patch.hooks import Calls
from safepatch.runtime.call import Begun, Call
from safepatch.runtime.known import Known
from safepatch.runtime.memory import Cached, Heard, Memory, Read
from safepatch.runtime.parts import ActivePart
from safepatch.runtime.residuals import padded
from safepatch.runtime.settings import SPEEDS
from safepatch.runtime.sight import seen_so_far
from safepatch.runtime.stats import Stats
from safepatch.runtime.words import Words


class Corrector:
    """What the parts of a patch do in each call.

    Parts that compute residuals are asked for them `early` or `late`; others, left to hooks of their own, for their
    `strength`. Strengths are decided on the CPU: a gate that reads features is waited for once a step, because a patch
    that it leaves alone is not run at all; one that reads text alone is asked once a denoising.

    Attributes:
        parts: those that compute residuals.
        words: what gates that read windows make of the words behind a call's text states.
        stats: counters; those of gated rows are kept here.
        on_gate: shown the timesteps and the gates' probabilities (B, gates), if set.
    """

    def __init__(self, parts: Sequence[ActivePart], words: Words) -> None:
        self.parts = tuple(part for part in parts if isinstance(part.patch, ResidualPatch))
        self.words = words
        self.stats = Stats()
        self.on_gate: Callable[[Any, Tensor], None] | None = None
        self._memory = Calls(Memory)

    def forget(self) -> None:
        """Drop what was kept for later steps."""
        self._memory = Calls(Memory)

    def early(self, begun: Begun) -> Residuals | None:
        """Before the host runs: the sum over the parts that read none of its features."""
        return self._sum([part for part in self.parts if not _is_late(part, begun)], begun, None)

    def late(self, begun: Begun, features: Features) -> Residuals | None:
        """Once the host's encoder has run: the sum over the parts that read its features."""
        return self._sum([part for part in self.parts if _is_late(part, begun)], begun, features)

    @torch.no_grad()
    def strength(self, part: ActivePart, begun: Begun) -> Tensor | None:
        """Of a part without residuals: one for all rows to correct, (1,), or where it has a gate one for each, (B,).

        Of one of several groups it is one for each of them too, (1 or B, groups). None where it is off for all.
        """
        scales, groups = self._scales(part, begun, None), part.patch.groups
        begun.note(scales)
        return scales.reshape(-1, groups).squeeze(1) if scales.any() else None

    @torch.no_grad()
    def judged(self, part: ActivePart, begun: Begun) -> Tensor:
        """Strength of a part of one group, of all rows to correct, (1,), or of each, (B,); nothing is noted down."""
        return self._scales(part, begun, None).reshape(-1)

    def _sum(self, parts: Sequence[ActivePart], begun: Begun, features: Features | None) -> Residuals | None:
        made = [self._recent(part, begun, features) for part in parts]
        made = [residuals for residuals in made if residuals is not None]
        return reduce(plus, made) if made else None

    def _recent(self, part: ActivePart, begun: Begun, features: Features | None) -> Residuals | None:
        """The part's residuals, or those of the step before where the speed allows and its gate was open for all rows.

        Where it was closed for a row it is asked again, so that no row depends on the others.
        """
        call, kept = cast(Call, begun.call), self._memory.now.residuals
        if begun.settings.speed == "full" or _module(part).reads_features:
            return self._now(part, begun, features)[0]
        last = kept.get(id(part))
        if last and last.uses < SPEEDS[begun.settings.speed] and last.serves(call):
            kept[id(part)] = last._replace(timestep=call.timestep, uses=last.uses + 1)
            begun.note(last.scales)
            return last.residuals
        made, scales = self._now(part, begun, features)
        kept[id(part)] = Cached(
            made if scales.all() else None,
            call.sample.shape,
            call.rows,
            Known.of(*call.told),
            call.timestep,
            scales,
            calls=last.calls_with(call) if last else 1,
        )
        return made

    def _now(self, part: ActivePart, begun: Begun, features: Features | None) -> tuple[Residuals | None, Tensor]:
        """The part's residuals, None where it is off for all rows, and the scales it has."""
        call = cast(Call, begun.call)
        shown = features and features.of_rows(call.rows)
        scales = self._scales(part, begun, shown)
        begun.note(scales)
        return self._residuals(part, call, scales, shown) if scales.any() else None, scales

    @torch.no_grad()
    def _scales(self, part: ActivePart, begun: Begun, shown: Features | None) -> Tensor:
        """Strength of each group, (groups,), or where a gate decides of each row and group, (B, groups); on the CPU."""
        scales, gate = part.scales(begun.settings.scale), part.patch.gate
        if gate is None or begun.settings.gate == "off":
            return scales
        looks = shown is not None and gate.reads_features
        probabilities = self._looked(part, begun, cast(Features, shown).mid) if looks else self._read(part, begun)
        return scales * self._openings(part, begun, probabilities)

    @torch.no_grad()
    def _residuals(self, part: ActivePart, call: Call, scales: Tensor, shown: Features | None) -> Residuals:
        sample, rows = call.sample, call.rows
        patch = _module(part).to(sample.device)
        dtype = next(patch.parameters()).dtype
        times = call.row_timesteps
        conditions = {name: value[rows] for name, value in call.conditions.items()} | dict(call.shared)
        instruction = part.instruction_states.to(sample.device, dtype)
        states, scales = call.prompt_states[rows].to(dtype), scales.to(sample.device, dtype, non_blocking=True)
        made = patch(sample[rows].to(dtype), times, states, instruction, conditions, shown and shown.to(dtype), scales)
        return Residuals(tuple(padded(r, rows, sample) for r in made.down), padded(made.mid, rows, sample))

    def _looked(self, part: ActivePart, begun: Begun, mid: Tensor) -> Tensor:
        """Probabilities by a gate that reads features, (B, gates); it stays in float32."""
        call = cast(Call, begun.call)
        states = call.words[call.rows].float()
        gate = cast(TextGate, part.patch.gate).to(states.device)
        return gate(mid.float(), call.row_timesteps, states, *self._heard(gate, begun)).sigmoid().cpu()

    def _read(self, part: ActivePart, begun: Begun) -> Tensor:
        """Probabilities by a gate that reads text alone, (B, gates)."""
        call, kept = cast(Call, begun.call), self._memory.now.texts
        last = kept.get(id(part))
        if last is None or last.rows != call.rows or not last.states.is_still(*call.told):
            states = call.words[call.rows].float()
            gate = cast(TextGate, part.patch.gate).to(states.device)
            logits = gate(None, call.row_timesteps, states, *self._heard(gate, begun))
            last = Read(Known.of(*call.told), call.rows, logits.sigmoid().cpu())
            kept[id(part)] = last
        return last.probabilities

    def _heard(self, gate: TextGate, begun: Begun) -> tuple[Tensor, ...]:
        """What `gate` makes of the words behind the call's states, (B, groups), where it reads words; else nothing."""
        if begun.settings.reads != "windows" or not self.words.hears(gate):
            return ()
        call = cast(Call, begun.call)
        memory = self._memory.now
        last = memory.words
        if last is None or last.rows != call.rows or not last.states.is_still(*call.told):
            logits, known = self.words.behind(call.prompt_states[call.rows], call.words[call.rows])
            self.stats.count(wordless_rows=int((~known).sum()))
            last = memory.words = Heard(Known.of(*call.told), call.rows, logits)
        return (self.words.of(gate, last.logits).to(call.prompt_states.device),)

    def _openings(self, part: ActivePart, begun: Begun, probabilities: Tensor) -> Tensor:
        """How far the gate is open for each row and group, in [0, 1], (B, groups); 0 or 1 where it is hard.

        A patch that was merged into one group acts where the gate of any of its sources opens.
        """
        is_open, openings = probabilities >= cast(Tensor, part.thresholds), probabilities
        begun.hear(part.gates, probabilities)
        if self.on_gate:
            self.on_gate(cast(Call, begun.call).row_timesteps, probabilities)
        if part.looks:
            evidence = seen_so_far(part, begun)
            shown, by_picture = evidence.sigmoid(), evidence >= cast(Tensor, part.evidence)
            begun.see(part.gates, shown)
            self.stats.count(picture_rows=int((by_picture & ~is_open).sum()))
            is_open, openings = part.turned(is_open, by_picture), part.turned(openings, shown)
        self.stats.count(gated_rows=is_open.numel(), open_rows=int(is_open.sum()))
        openings = openings if begun.settings.gate == "soft" else is_open.float()
        return openings if part.patch.groups > 1 else openings.amax(1, keepdim=True)


def _module(part: ActivePart) -> ResidualPatch:
    return cast(ResidualPatch, part.patch)


def _is_late(part: ActivePart, begun: Begun) -> bool:
    """Whether the part needs the host's features, for itself or for its gate."""
    gate = part.patch.gate
    looks = gate is not None and gate.reads_features and begun.settings.gate != "off"
    return _module(part).reads_features or looks
