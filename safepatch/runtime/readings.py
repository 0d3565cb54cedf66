"""What a text encoder was asked, kept so that a patched one can read the same again; and whose states a host is given.

A prompt is known again by a few values of what the encoder made of it, as gates know it (`safepatch.runtime.words`).
What is kept is what the encoder's blocks were given: learned tokens and embeddings of an attacker's own are in there.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safepatch.patch.hooks import Hooks, unpicklable
from safepatch.patch.text import Given, blocks
from safepatch.runtime.voices import layers_of
from safepatch.runtime.words import LATEST, PROMPTS, SHARE, VALUES, Places, is_close, is_reading_windows


class Reading(NamedTuple):
    """One prompt that an encoder read.

    Attributes:
        key: tells it from others.
        values: of its states at every layer that somebody may take, (layers, 2 VALUES); of pooled ones, a single row.
        tokens, mask: as the encoder was given them, (1, T); no mask as a rule.
        embedded: what its blocks were given, (1, T, width), positions added.
        strengths: of LoRAs that it carried, by layer and name: a pipeline may weaken them while it encodes.
    """

    key: tuple
    values: Tensor
    tokens: Tensor
    mask: Tensor | None
    embedded: Tensor
    strengths: Mapping[str, Mapping[str, float]]

    def again(self, encoder: Any, is_pooled: bool, layer: int) -> Tensor:
        """What another encoder, whose embeddings are replaced, makes of it: (T, width), or pooled (1, width)."""
        device, dtype = encoder.device, encoder.dtype
        blocks(encoder).embeddings = Given(self.embedded.to(device, dtype))
        for name, scaling in self.strengths.items():
            part = encoder.get_submodule(name)
            part.scaling = {**getattr(part, "scaling", {}), **scaling}
        mask = {} if self.mask is None else {"attention_mask": self.mask.to(device)}
        made = encoder(input_ids=self.tokens.to(device), output_hidden_states=True, **mask)
        return made[0] if is_pooled else list(layers_of(encoder, made))[layer][0]


class Match(NamedTuple):
    """Of which readings some states are.

    Attributes:
        readings: one, or those whose states they are a sum of.
        layer: number of the layer they were taken from.
        is_whole: whether they are that one's as it was read.
    """

    readings: tuple[Reading, ...]
    layer: int
    is_whole: bool


class Readings:
    """Listens to one text encoder of a pipeline, whoever calls it."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._forget()
        self.hooks = Hooks()
        self.hooks.before(encoder, self._begin)
        self.hooks.after(blocks(encoder).embeddings, self._embed)
        self.hooks.after(encoder, self._note, with_kwargs=True)

    def _forget(self) -> None:
        self._lock, self._own = threading.Lock(), threading.local()
        self._states, self._pooled = OrderedDict[tuple, Reading](), OrderedDict[tuple, Reading]()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Readings":
        """Of a copied pipeline; what was read is read again."""
        copied = memo[id(self)] = object.__new__(Readings)
        copied._encoder, copied.hooks = copy.deepcopy(self._encoder, memo), copy.deepcopy(self.hooks, memo)
        copied._forget()
        return copied

    __reduce__ = unpicklable

    def of_states(self, chunk: Tensor) -> Match | None:
        """Whose states (T, width) are; None for nobody's."""
        return self._found(chunk, self._states)

    def of_pooled(self, pooled: Tensor) -> Match | None:
        """Whose pooled states (1, width) are."""
        return self._found(pooled, self._pooled)

    def lengths(self) -> list[int]:
        """How many tokens the prompts that were read have, the latest first."""
        with self._lock:
            return list(dict.fromkeys(each.tokens.shape[1] for each in reversed(self._states.values())))

    def _found(self, chunk: Tensor, kept: "OrderedDict[tuple, Reading]") -> Match | None:
        with self._lock:
            noted = [each for each in kept.values() if each.key[1] == tuple(chunk.shape)]
        if not noted or not chunk.isfinite().all():
            return None
        values = Places.of(*chunk.shape).take(chunk)
        for each in reversed(noted):
            if (same := is_close(values - each.values, each.values)).any():
                return Match((each,), int(same.int().argmax()), True)
        return _mixed(values, noted[-LATEST:])

    @torch.compiler.disable()
    def _begin(self, *_: Any) -> None:
        """What is embedded from now on is this call's: a cache in front of the encoder answers without embedding."""
        if not is_reading_windows():
            self._own.embedded = None

    @torch.compiler.disable()
    def _embed(self, _: nn.Module, args: tuple, output: Tensor) -> None:
        if not is_reading_windows():
            self._own.embedded = output.detach()

    @torch.compiler.disable()
    @torch.no_grad()
    def _note(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """The encoder has read prompts."""
        tokens = args[0] if args else kwargs.get("input_ids")
        embedded = getattr(self._own, "embedded", None)
        if is_reading_windows() or not isinstance(tokens, Tensor) or embedded is None:
            return
        tokens, layers = tokens.reshape(-1, tokens.shape[-1]), list(layers_of(encoder, output))
        if not layers or embedded.shape[:2] != tokens.shape:
            return
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        pooled = output[0][:, None] if output[0].ndim == 2 else None
        strengths = _lora_strengths(encoder)
        for row in range(len(tokens)):
            given = tokens[row : row + 1].cpu(), None if mask is None else mask[row : row + 1].cpu()
            read = (*given, embedded[row : row + 1].cpu(), strengths)
            room = max(PROMPTS, len(tokens))
            self._keep(self._states, torch.stack([layer[row] for layer in layers]), read, room)
            if pooled is not None:
                self._keep(self._pooled, pooled[row : row + 1], read, room)

    def _keep(self, kept: "OrderedDict[tuple, Reading]", layers: Tensor, read: tuple[Any, ...], room: int) -> None:
        """Keep a prompt by what was made of it at each layer, (layers, T, width); of all, the latest `room`."""
        values = Places.of(*layers.shape[1:]).take(layers)
        key = (len(layers), tuple(layers.shape[1:]), values.numpy().tobytes())
        with self._lock:
            kept.pop(key, None)
            kept[key] = Reading(key, values, *read)
            while len(kept) > room:
                kept.popitem(last=False)


def _lora_strengths(encoder: nn.Module) -> dict[str, dict[str, float]]:
    """By layer that carries LoRAs, how strong each is now."""
    known = {name: getattr(part, "scaling", None) for name, part in encoder.named_modules()}
    return {name: dict(scaling) for name, scaling in known.items() if isinstance(scaling, dict)}


def _mixed(values: Tensor, noted: Sequence[Reading]) -> Match | None:
    """The prompts whose last states add up to those behind values (2 VALUES,), at some layer."""
    last = values[:VALUES]
    for layer in range(max(len(each.values) for each in noted)):
        there = [each for each in noted if len(each.values) > layer and each.values[layer].isfinite().all()]
        if not there:
            continue
        prompts = torch.stack([each.values[layer, :VALUES] for each in there], dim=1)
        shares = torch.linalg.lstsq(prompts, last[:, None], driver="gelsd").solution[:, 0]
        if is_close(prompts @ shares - last, last):
            parts = tuple(each for each, share in zip(there, shares.tolist(), strict=True) if abs(share) >= SHARE)
            return Match(parts, layer, False) if parts else None
    return None
