"""A model's text encoders as gates hear them: what of a call each of them said, and in which words it was asked.

CLIP's encoders share the channels of a UNet's text states, and of the first states of SD3's; T5's stand behind those of
SD3, and are all that Flux has, which is told CLIP's pooled state beside. What T5 alone was told, behind the end of what
CLIP reads or as a prompt of its own, is spelled as CLIP's words, since by those gates go.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safepatch.diffusion import UNET, Components, FluxHost, SD3Host, host_kind

ALL = slice(None)


@dataclass(frozen=True)
class Voice:
    """A CLIP text encoder.

    Attributes:
        encoder: the module.
        tokens, channels: of the text states, those that are its own.
    """

    encoder: Any
    tokens: slice
    channels: slice

    def said(self, states: Tensor, words: Tensor) -> Tensor:
        """Its own of a call's text states (B, tokens, width) and of those by which gates go."""
        return states[:, self.tokens, self.channels]

    def layers(self, output: Any) -> Iterator[Tensor]:
        """States (B, tokens, width) that pipelines take from its answer: the last, or with clip skip others."""
        return layers_of(self.encoder, output)

    def spelled(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Prompts in its tokens, in CLIP's."""
        return prompts


@dataclass(frozen=True)
class Pooled(Voice):
    """Flux's CLIP encoder, of which one state is taken of each prompt."""

    def said(self, states: Tensor, words: Tensor) -> Tensor:
        """That state, (B, 1, width)."""
        return words

    def layers(self, output: Any) -> Iterator[Tensor]:
        """That state."""
        if (pooled := getattr(output, "pooler_output", None)) is not None:
            yield pooled[:, None]


@dataclass(frozen=True)
class T5(Voice):
    """A T5 encoder.

    Attributes:
        theirs, ours: its tokenizer, and CLIP's.
    """

    theirs: Any
    ours: Any

    def spelled(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Prompts in its tokens, in CLIP's."""
        texts = self.theirs.batch_decode(prompts, skip_special_tokens=True)
        return self.ours(texts, add_special_tokens=False).input_ids


def voices(components: Components) -> list[Voice]:
    """Those of a model."""
    pairs, t5, kind = components.text_encoders(), components.t5(), host_kind(components.unet)
    length = None if kind is UNET else 0 if kind.calls_apart else pairs[0][0].model_max_length
    start, made = 0, list[Voice]()
    for _, encoder in pairs:
        width = encoder.config.hidden_size
        own = Voice(encoder, slice(length), slice(start, start + width))
        made.append(Pooled(encoder, ALL, ALL) if kind.calls_apart else own)
        start += width
    return [*made, *([T5(t5[1], slice(length, None), ALL, t5[0], pairs[0][0])] if t5 else [])]


def asked(components: Components, prompts: Sequence[str]) -> Iterator[Sequence[Sequence[int]]]:
    """Prompts as each text encoder of a model reads them, cut off as its pipeline does it, in CLIP's tokens."""
    for tokenizer, _ in components.text_encoders():
        yield tokenizer(list(prompts), truncation=True, max_length=tokenizer.model_max_length).input_ids
    most = (FluxHost if host_kind(components.unet).calls_apart else SD3Host).tokens
    for voice in voices(components):
        if isinstance(voice, T5):
            yield voice.spelled(voice.theirs(list(prompts), truncation=True, max_length=most).input_ids)


def layers_of(encoder: Any, output: Any) -> Iterator[Tensor]:
    """States (B, tokens, width) that pipelines take from an encoder's answer: the last, or with clip skip others."""
    last = getattr(output, "last_hidden_state", None)
    if last is None:
        last = next((part for part in output if isinstance(part, Tensor) and part.ndim == 3), None)
    if last is None:
        return
    yield last
    norm = getattr(getattr(encoder, "text_model", encoder), "final_layer_norm", None)
    for hidden in getattr(output, "hidden_states", None) or ():
        yield hidden
        if norm is not None:
            yield norm(hidden)
