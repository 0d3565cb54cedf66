"""Which words stand behind the text states that a host is given: what each of its text encoders was asked, and said.

A gate that was fitted for windows reads a prompt's words, a few in a row, each few encoded alone. The host is given
states, not words; so this watches the text encoders' own calls, reads the windows of whatever they encode, and keeps
for each prompt what the gates made of them, beside a few values of its states, by which they are known again. Nobody
need pass the words along: whoever encodes with the pipeline's encoders is seen, in chunks and word by word too.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from safepatch.diffusion import Components
from safepatch.patch.gate import TextGate
from safepatch.patch.hooks import Hooks, unpicklable
from safepatch.runtime.heard import WindowGates
from safepatch.runtime.parts import ActivePart
from safepatch.runtime.voices import voices

PROMPTS, WINDOWS = 256, 1 << 15  # that are remembered; of a larger batch, all
VALUES = 192  # by which states are known again: of the last token, which has heard all others, and as many of all
CLOSE = 1e-2  # how far apart two values are at most that are the same, in half precision; a share
LATEST, SHARE = 48, 0.05  # prompts of which states may be a sum, and the least that one may have in it
_READING = threading.local()  # whether this thread's encoders are at work for some patch's windows


class Places(NamedTuple):
    """Where the values by which states (tokens, width) are known again come from: `VALUES` of the last, and of all."""

    tokens: Tensor
    channels: Tensor

    @classmethod
    def of(cls, tokens: int, width: int) -> "Places":
        """The same for every prompt of an encoder."""
        chance = torch.Generator().manual_seed(0)
        spread = torch.randint(tokens, (VALUES,), generator=chance)
        channels = torch.randint(width, (2 * VALUES,), generator=chance)
        return cls(torch.cat((torch.full((VALUES,), tokens - 1), spread)), channels)

    def take(self, states: Tensor) -> Tensor:
        """Of states (..., tokens, width), (..., 2 VALUES) float32 on the CPU."""
        return states[..., self.tokens.to(states.device), self.channels.to(states.device)].float().cpu()


class Noted(NamedTuple):
    """One prompt that an encoder was asked.

    Attributes:
        values: of its states at every layer that somebody may read, (layers, 2 VALUES).
        heard: what each gate made of its strongest window, (gates,) logits.
    """

    values: Tensor
    heard: Tensor


class Words:
    """What the gates of a patch make of the words behind text states.

    Args:
        components: of the pipeline; its text encoders are watched.
        parts: of the patch.
    """

    def __init__(self, components: Components, parts: Sequence[ActivePart]) -> None:
        self._gates = [(cast(TextGate, part.patch.gate), part.windows) for part in parts if part.reads_windows]
        self._slices, start = dict[int, slice](), 0
        for gate, widths in self._gates:
            self._slices[id(gate)] = slice(start, start + len(widths))
            start += len(widths)
        self._columns = start
        self._forget()
        self.hooks = Hooks()
        if self._gates:
            self._windows, self._voices = WindowGates(components, self._gates, WINDOWS), voices(components)
            for number, voice in enumerate(self._voices):
                self.hooks.after(voice.encoder, partial(self._note, number), with_kwargs=True)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._prompts = OrderedDict[tuple, Noted]()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Words":
        """Of a copied pipeline, with copies of the gates; what was heard is heard again."""
        copied = memo[id(self)] = object.__new__(Words)
        kept = {name: value for name, value in vars(self).items() if name not in ("_lock", "_prompts")}
        copied.__dict__.update((name, copy.deepcopy(value, memo)) for name, value in kept.items())
        copied._slices = {id(gate): at for (gate, _), at in zip(copied._gates, self._slices.values(), strict=True)}
        copied._forget()
        return copied

    __reduce__ = unpicklable

    def of(self, gate: nn.Module, prompts: Tensor) -> Tensor:
        """What `gate` made of what `behind` found: its own columns, (B, groups)."""
        return prompts[:, self._slices[id(gate)]]

    def hears(self, gate: nn.Module | None) -> bool:
        """Whether `gate` reads windows."""
        return id(gate) in self._slices

    @torch.compiler.disable()
    @torch.no_grad()
    def behind(self, states: Tensor, words: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the gates made of the words behind each row of text states, and whether those words are known.

        States of several prompts, or of one in chunks, count for each of them.

        Args:
            states: (B, tokens, width).
            words: those by which gates go, (B, tokens', width'), where they are others.

        Returns:
            Logits (B, gates), the lowest there is where no words are known; and (B,) bool; on the CPU.
        """
        heard = torch.full((len(states), self._columns), -torch.inf)
        known = torch.ones(len(states), dtype=torch.bool)
        for number, voice in enumerate(self._voices):
            part, is_known = voice.said(states, states if words is None else words), torch.zeros_like(known)
            for tokens, some in self._asked(number, part).items():
                rest = part.shape[1] % tokens  # states that somebody added behind; they take nothing away
                chunks = part[:, : part.shape[1] - rest].unflatten(1, (-1, tokens))
                found, is_found = _recognised(Places.of(tokens, part.shape[2]).take(chunks), some)
                heard, is_known = torch.maximum(heard, found), is_known | (is_found if not rest else False)
            known = known & is_known
        return heard, known

    def _asked(self, number: int, states: Tensor) -> dict[int, list[Noted]]:
        """What one encoder was asked and states (B, tokens, width) may be of, by the number of tokens of a prompt."""
        found: dict[int, list[Noted]] = {}
        with self._lock:
            for (by, shape, *_), each in self._prompts.items():
                if by == number and shape[1] == states.shape[2] and states.shape[1] >= shape[0]:
                    found.setdefault(shape[0], []).append(each)
        return found

    @torch.compiler.disable()
    @torch.no_grad()
    def _note(self, number: int, encoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A text encoder has read prompts: read their windows too."""
        tokens = args[0] if args else kwargs.get("input_ids")
        if is_reading_windows() or not isinstance(tokens, Tensor) or tokens.is_floating_point():
            return
        layers = list(self._voices[number].layers(output))
        if not layers:
            return
        given = tokens.reshape(-1, tokens.shape[-1]).tolist()
        _READING.windows = True
        try:
            heard = self._read(number, given)
        finally:
            _READING.windows = False
        shape = (layers[0].shape[1], layers[0].shape[2])
        values = Places.of(*shape).take(torch.stack(layers, dim=1))
        with self._lock:
            for row, each in zip(given, zip(values, heard, strict=True), strict=True):
                key = (number, shape, len(layers), kwargs.get("layer"), tuple(row))  # of one that tells one layer alone
                self._prompts.pop(key, None)
                self._prompts[key] = Noted(*each)
            while len(self._prompts) > max(PROMPTS, len(given)):
                self._prompts.popitem(last=False)

    def _read(self, number: int, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """What each gate makes of the strongest window of each prompt, given as tokens: (gates,) logits for each."""
        self._windows.renew()
        bags = [self._windows.bag(tokens) for tokens in self._voices[number].spelled(prompts)]
        judged = self._windows.judged(bags)
        return [self._windows.strongest(bag, judged) for bag in bags]


def is_reading_windows() -> bool:
    """Whether this thread's encoders are at work for some patch's windows, and not for whoever draws."""
    return getattr(_READING, "windows", False)


def _recognised(values: Tensor, noted: Sequence[Noted]) -> tuple[Tensor, Tensor]:
    """What was heard of the prompts that chunks of states are of, (B, gates), and whether each row is known whole.

    The same values are the same prompt. Where there are none, as of weighted words or of prompts on the way from one to
    another, what the last token makes the sum of some of the latest prompts is known by those.

    Args:
        values: of each chunk, (B, chunks, 2 VALUES).
        noted: the prompts that were read, the latest last.
    """
    heard = torch.stack([each.heard for each in noted])
    same = _same(values, noted)
    unknown = ~same.any(-1) & values.isfinite().all(-1)
    if unknown.any():
        latest = noted[-LATEST:]
        same[unknown, -len(latest) :] = _mixed(values[unknown], latest)
    return torch.where(same[..., None], heard, -torch.inf).amax(2).amax(1), same.any(-1).all(-1)


def _same(values: Tensor, noted: Sequence[Noted]) -> Tensor:
    """Whether values (B, chunks, 2 VALUES) are those of some layer of each prompt, (B, chunks, prompts)."""
    known = torch.cat([each.values for each in noted])
    owners = torch.repeat_interleave(torch.arange(len(noted)), torch.tensor([len(each.values) for each in noted]))
    fits = is_close(values[:, :, None] - known, known).int()
    return torch.zeros(*values.shape[:2], len(noted), dtype=fits.dtype).index_add(2, owners, fits) > 0


def is_close(apart: Tensor, to: Tensor) -> Tensor:
    """Whether differences are those of rounding; a few of CLIP's states are far larger than all others."""
    return (apart.abs() <= CLOSE * (to.abs() + to.abs().median(-1, keepdim=True).values)).all(-1)


def _mixed(values: Tensor, noted: Sequence[Noted]) -> Tensor:
    """Which prompts' states add up to values (N, 2 VALUES), at any one layer: (N, prompts) bool."""
    found = torch.zeros(len(values), len(noted), dtype=torch.bool)
    last = values[:, :VALUES].T
    for layer in range(max(len(each.values) for each in noted)):
        there = [i for i, each in enumerate(noted) if len(each.values) > layer and each.values[layer].isfinite().all()]
        if not there:
            continue
        prompts = torch.stack([noted[i].values[layer, :VALUES] for i in there], dim=1)
        shares = torch.linalg.lstsq(prompts, last, driver="gelsd").solution  # (prompts, N); some may be alike
        fits = is_close((prompts @ shares - last).T, last.T)
        found[:, there] |= ((shares >= SHARE) & fits).T
    return found
