"""What a gate's picture key has seen so far of each denoising, out of the host's own passes.

A hook on the host's middle (`safepatch.patch.looking`) shows the key what the host made of each row. What it makes of
that counts from the next step on: so the host is run once, and nobody waits for its device in the midst of a step. A
row for which the key opened stays open until its denoising ends.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from safepatch.diffusion import host_kind
from safepatch.patch.gate import TextGate
from safepatch.patch.hooks import Hooks
from safepatch.patch.looking import looked_at, middle
from safepatch.patch.picture import added_up
from safepatch.runtime.call import Begun, Call
from safepatch.runtime.parts import ActivePart


class Seen(NamedTuple):
    """What one part's keys made of the rows of a denoising, on the host's device.

    Attributes:
        evidence: the mean of the last steps' logits, (rows, gates).
        looks: how many steps were seen of each row, (rows, 1).
        timesteps: of the last one, (rows, 1).
        highest: of the evidence so far, (rows, gates).
        told: `highest`, or what of it has arrived on the CPU once `ready`.
        ready: an event of the device behind which `told` holds; None where it holds at once.
    """

    evidence: Tensor
    looks: Tensor
    timesteps: Tensor
    highest: Tensor
    told: Tensor
    ready: Any = None

    @classmethod
    def of(cls, logits: Tensor, timesteps: Tensor, before: "Seen | None", goes_on: bool) -> "Seen":
        """One step more.

        Args:
            logits: of this step, (rows, gates).
            timesteps: of the rows, (rows,).
            before: the steps before.
            goes_on: whether it is known to be the same denoising; else a row whose noise grew is another one's.
        """
        times, never = timesteps[:, None].float(), torch.full_like(logits, -torch.inf)
        if before is None or (len(before.evidence) != len(logits) and not goes_on):
            return cls(logits, torch.ones_like(times), times, logits, *_fetched(logits))
        if len(before.evidence) != len(logits):
            highest = torch.maximum(_spread(before.highest, len(logits)), logits)
            return cls(logits, torch.ones_like(times), times, highest, *_fetched(highest))
        anew = torch.zeros_like(times, dtype=torch.bool) if goes_on else times > before.timesteps
        looks = torch.where(anew, 1, before.looks + 1)
        evidence = torch.where(anew, logits, added_up(before.evidence, logits, looks))
        highest = torch.maximum(torch.where(anew, never, before.highest), evidence)
        return cls(evidence, looks, times, highest, *_fetched(highest))

    def heard(self) -> Tensor:
        """The highest evidence of the steps before this one, (rows, gates), on the CPU."""
        if self.ready is not None:
            self.ready.synchronize()  # of the first half of the step before; the device has the other to do
        return self.told


class Sight:
    """Shows what the host makes of each row to the keys of those parts that have one.

    Args:
        unet: the host.
        parts: of the patch.
        now: tells the call of the host that is under way in this thread.
    """

    def __init__(self, unet: Any, parts: Sequence[ActivePart], now: Callable[[], Begun]) -> None:
        self._parts = [part for part in parts if part.looks]
        self._unet, self._now = unet, now
        self.hooks = Hooks()
        if self._parts:
            self.hooks.after(middle(unet), self._look)

    def missed(self, begun: Begun) -> list[str]:
        """What did not happen in a call that has ended."""
        asked = self._parts and begun.call is not None and begun.settings.gate != "off"
        beside = begun.skipped and begun.seen  # the call of all blocks at this step was looked at
        return ["what its gate looks at was not shown"] if asked and not begun.has_looked and not beside else []

    @torch.compiler.disable()
    @torch.no_grad()
    def _look(self, _: nn.Module, args: tuple, output: Any) -> None:
        begun = self._now()
        if begun.skipped:  # without some blocks it is another picture
            return
        begun.has_looked = True
        if begun.call is None or begun.settings.gate == "off":
            return
        call, rows = begun.call, _wordless_rows(begun.call)
        mid = looked_at(self._unet, output, call.sample, call.shared.get("img_ids"))[rows]
        for part in self._parts:
            key = cast(nn.Module, cast(TextGate, part.patch.gate).picture).to(mid.device)
            times = call._replace(rows=rows).row_timesteps.to(mid.device)
            logits = key(mid, times / host_kind(self._unet).timestep_unit)
            begun.seen[id(part)] = Seen.of(logits, times, begun.seen.get(id(part)), begun.is_followed)


def _wordless_rows(call: Call) -> slice:
    """The rows to look at: those that show the same pictures under the negative prompt, usually the empty one.

    What the prompt says drowns what is drawn. Without guidance there are no such rows.
    """
    apart, own = call.rows.start, call.rows.stop - call.rows.start
    return slice(0, apart) if apart and own % apart == 0 else call.rows


def seen_so_far(part: ActivePart, begun: Begun) -> Tensor:
    """What the part's picture keys made of the steps before, (rows, gates) logits on the CPU; lowest at the first."""
    rows, seen = cast(Call, begun.call).rows, begun.seen.get(id(part))
    n, gates = rows.stop - rows.start, len(cast(Tensor, part.thresholds))
    nothing = torch.full((n, gates), -torch.inf)
    if seen is None or (len(seen.told) != n and not begun.is_followed):
        return nothing
    if begun.is_followed:
        return _spread(seen.heard(), n)
    times = cast(Call, begun.call).row_timesteps[:, None]  # of a loop of one's own, which may begin anew unnoticed
    return torch.where((times > seen.timesteps.to(times.device)).cpu(), nothing, seen.heard())


def _spread(rows: Tensor, n: int) -> Tensor:
    """What is known of some rows (m, gates), of n that show the same pictures; in doubt the highest, of all."""
    m = len(rows)
    if m == n:
        return rows
    if m and n % m == 0:
        return rows.repeat(n // m, 1)
    if n and m % n == 0:
        return rows.unflatten(0, (-1, n)).amax(0)
    return rows.amax(0, keepdim=True).expand(n, -1)


def _fetched(values: Tensor) -> tuple[Tensor, Any]:
    """On its way to the CPU, and what tells that it is there; nothing waits for it here."""
    if values.device.type != "cuda":
        return values.cpu(), None
    told = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    told.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(values.device))
    return told, ready
