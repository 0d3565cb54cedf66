"""A call of the host, as far as a patch is concerned with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.diffusion import HostKind
from safepatch.patch.base import row_timesteps
from safepatch.runtime.known import unpatched
from safepatch.runtime.residuals import Taking
from safepatch.runtime.settings import NONE, Settings


class Call(NamedTuple):
    """What the host is given, and which rows of it are to be corrected.

    Attributes:
        sample: noisy latents, (B, >= 4, h, w), or as Flux packs them, (B, tokens, >= 64).
        timesteps: int, float, 0-d or (B,).
        prompt_states: text states, (B, tokens, width).
        conditions: what else the host is told of each row, by name, e.g. SDXL's `text_embeds`; each (B, ...).
        shared: what it is told of all rows at once.
        rows: those to correct.
        words: text states by which gates go, (B, tokens, width').
    """

    sample: Tensor
    timesteps: Any
    prompt_states: Tensor
    conditions: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    rows: slice
    words: Tensor

    @classmethod
    def of(cls, kind: HostKind, args: tuple, kwargs: Mapping[str, Any]) -> "Call":
        """The call with these arguments, all rows of it."""
        given = kind.bind(args, kwargs)
        sample, timesteps, states = (given[name] for name in (kind.sample, kind.timestep, kind.states))
        states = unpatched(states)
        given |= given.get("added_cond_kwargs") or {}  # a UNet's conditions are in there
        conditions, shared = (
            {name: unpatched(given[name]) for name in names if isinstance(given.get(name), Tensor)}
            for names in (kind.conditions, kind.shared)
        )
        words = conditions["pooled_projections"][:, None] if kind.calls_apart else states
        return cls(sample, timesteps, states, conditions, shared, slice(0, len(sample)), words)

    @property
    def told(self) -> tuple[Tensor, ...]:
        """All that gates that read text go by, as the host is given it."""
        pooled = self.conditions.get("pooled_projections")
        return (self.prompt_states,) if pooled is None else (self.prompt_states, pooled)

    @property
    def row_timesteps(self) -> Tensor:
        """Those of the rows to correct, (B,)."""
        return row_timesteps(self.timesteps, self.sample)[self.rows]

    @property
    def timestep(self) -> float:
        """Of the first row; where it lies on a device, asking waits for the device."""
        return float(torch.as_tensor(self.timesteps).flatten()[0])


@dataclass
class Begun:
    """A call of the host that is under way, as one attachment sees it.

    Attributes:
        given: as the host was called, all rows of it.
        call: with the rows to correct; None where there is nothing to correct.
        settings: as they were when it began.
        is_prepared: whether the patch had its say.
        has_entered: whether the host's first layer has run.
        acted: on which of the rows to correct something acts, (rows,) bool on the CPU; None for none.
        handed: residuals were passed as an argument, if any, and whether they were taken.
        judged: by category what its gates said of the rows to correct, (rows,) probabilities on the CPU.
        pictured: likewise of those that look at pictures, what was seen of the steps before.
        seen: what the keys to pictures have seen of this denoising, by the part's identity; added to in this call.
        is_followed: whether a pipeline's call tells where the denoising begins and ends.
        has_looked: whether the keys to pictures were shown this call.
        skipped: transformer blocks that it leaves out, as SD3's skip layer guidance does.
        told: what the host is to read, by argument; taken out when it has.
        untold: arguments in whose stead it read something else.
    """

    given: Call | None = None
    call: Call | None = None
    settings: Settings = NONE
    is_prepared: bool = False
    has_entered: bool = False
    acted: Tensor | None = None
    handed: Taking | None = None
    judged: dict[str, Tensor] = field(default_factory=dict)
    pictured: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[int, Any] = field(default_factory=dict)
    is_followed: bool = False
    has_looked: bool = False
    skipped: Sequence[int] = ()
    told: dict[str, Any] = field(default_factory=dict)
    untold: list[str] = field(default_factory=list)

    def note(self, scales: Tensor) -> None:
        """Corrections of these strengths, (groups,) or (rows, groups) on the CPU, are added."""
        assert self.call is not None, "nothing acts in a call without rows to correct"
        acts = (scales != 0).any(-1).expand(self.call.rows.stop - self.call.rows.start)
        self.acted = acts if self.acted is None else self.acted | acts

    def hear(self, categories: Sequence[str], probabilities: Tensor) -> None:
        """Gates of these categories said this of the rows to correct, (rows, gates); of one's several the highest."""
        _keep_highest(self.judged, categories, probabilities)

    def see(self, categories: Sequence[str], probabilities: Tensor) -> None:
        """Likewise those that look at pictures."""
        _keep_highest(self.pictured, categories, probabilities)


class Step(NamedTuple):
    """What a patch did in one call of the host; of all rows of the call, those of the negative prompt too.

    Attributes:
        timestep: of the call.
        acted: which rows something was added to, (B,) bool.
        judged: by category what its gate said, (B,) probabilities; NaN of rows that it was not asked about.
        pictured: likewise where its gate looks at the picture, what that said.
    """

    timestep: float
    acted: Tensor
    judged: Mapping[str, Tensor]
    pictured: Mapping[str, Tensor] = MappingProxyType({})

    @classmethod
    def of(cls, begun: Begun) -> "Step":
        """Of a call that has ended."""
        given = begun.given
        assert given is not None, "it has begun"
        acted = torch.zeros(len(given.sample), dtype=torch.bool)
        rows = begun.call.rows if begun.call else slice(0, 0)
        if begun.acted is not None:
            acted[rows] = begun.acted
        judged, pictured = (
            {name: _of_all_rows(said, rows, len(acted)) for name, said in each.items()}
            for each in (begun.judged, begun.pictured)
        )
        return cls(given.timestep, acted, judged, pictured)


def _keep_highest(kept: dict[str, Tensor], categories: Sequence[str], probabilities: Tensor) -> None:
    for name, each in zip(categories, probabilities.unbind(1), strict=False):
        kept[name] = torch.maximum(kept.get(name, each), each)


def _of_all_rows(said: Tensor, rows: slice, n: int) -> Tensor:
    """(n,), NaN of rows that nothing was said of."""
    whole = torch.full((n,), torch.nan)
    whole[rows] = said
    return whole
