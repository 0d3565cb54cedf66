"""Whether a host reads the text states that it was called with, which gates went by and text encoders' patches made.

Somebody's hook behind a patch's, or a wrapped `forward`, may give the host others than the patch was shown.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safepatch.diffusion import UNET, HostKind, projects_states
from safepatch.patch.hooks import Hooks
from safepatch.patch.text import TextPatch
from safepatch.runtime.call import Begun
from safepatch.runtime.known import unpatched
from safepatch.runtime.parts import ActivePart
from safepatch.runtime.words import is_close

POOLED = "pooled_projections"  # by which gates go where a host has no other states of CLIP's


class Told(NamedTuple):
    """Text states that a host is to read.

    Attributes:
        given: as it is called with them.
        own: as the frozen encoder made them.
        rows: those that count.
    """

    given: Tensor
    own: Tensor
    rows: slice

    def is_read_in(self, seen: Tensor) -> bool:
        """Whether what the host reads is that, or what another patch has made of the same states."""
        if seen is self.given or seen is self.own:
            return seen is self.given
        if unpatched(seen) is self.own:
            return True
        if seen.shape != self.given.shape:
            return False
        given = self.given[self.rows].float()
        return bool(is_close(seen[self.rows].to(given) - given, given).all())


class Telling:
    """Watches what a host reads of what it is told.

    Args:
        host: UNet or transformer.
        kind: of it.
        parts: of the patch; only those count that have a gate, or change a text encoder.
        now: tells the call of the host that is under way in this thread.
    """

    def __init__(self, host: Any, kind: HostKind, parts: Sequence[ActivePart], now: Callable[[], Begun]) -> None:
        self._is_gated = any(part.patch.gate for part in parts)
        self._exchanges = any(isinstance(part.patch, TextPatch) for part in parts)
        self._readers = _readers(host, kind) if self._is_gated or self._exchanges else {}
        self._now = now
        self.hooks = Hooks()
        for name, reader in self._readers.items():
            self.hooks.before(reader, partial(self._look, name), with_kwargs=True)

    def expect(self, begun: Begun, given: Mapping[str, Any]) -> None:
        """The host is about to be called with these arguments."""
        if begun.call is None or not (self._exchanges or (self._is_gated and begun.settings.gate != "off")):
            return
        rows = begun.call.rows
        begun.told = {name: Told(given[name], unpatched(given[name]), rows) for name in self._readers}

    def missed(self, begun: Begun) -> list[str]:
        """What did not happen in a call that has ended."""
        return [f"'{name}' was exchanged on the way" for name in begun.untold]

    @torch.compiler.disable()
    @torch.no_grad()
    def _look(self, name: str, _: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        told = self._now().told.pop(name, None)
        seen = kwargs.get("encoder_hidden_states", args[-1] if args else None)
        seen = seen[0] if isinstance(seen, tuple) else seen  # an IP-Adapter's picture goes beside
        if told is not None and not (isinstance(seen, Tensor) and told.is_read_in(seen)):
            self._now().untold.append(name)


def _readers(host: Any, kind: HostKind) -> dict[str, nn.Module]:
    """By argument, the first of a host's modules that reads it."""
    if kind is not UNET:
        return {kind.states: host.context_embedder, **({POOLED: host.time_text_embed} if kind.calls_apart else {})}
    if projects_states(host):
        return {kind.states: host.encoder_hid_proj}
    first = next((part for name, part in host.named_modules() if name.endswith(".attn2")), None)
    return {} if first is None else {kind.states: first}
