"""A CLIP text encoder asked by tokens, and by what stands between tokens: what searches over words need of a model."""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.diffusion.components import Components
from safepatch.diffusion.conditioning import Conditioning
from safepatch.diffusion.hosts.kinds import UNET, host_kind
from safepatch.errors import UnsupportedModel

WHOLE = "</w>"  # ends a token of CLIP's that ends a word
SHORTEST = 3  # letters of a word


class Typed(NamedTuple):
    """Words of a vocabulary that are one token each, however they are typed.

    Attributes:
        words: lower-case letters only.
        ids: their tokens, (len(words),).
    """

    words: tuple[str, ...]
    ids: Tensor


class TokenReader:
    """The text encoder of a model that has one, as its UNet reads it; states can be differentiated.

    Args:
        components: of the model.

    Raises:
        UnsupportedModel: for a model with several text encoders, or with none of CLIP's.
    """

    def __init__(self, components: Components) -> None:
        encoders = components.text_encoders() if host_kind(components.unet) is UNET else []
        if len(encoders) != 1 or components.text_encoder is None:
            raise UnsupportedModel(
                "words are searched for in one CLIP text encoder, which Stable Diffusion 1 and 2 have; leave this "
                "attack out on other models"
            )
        self._tokenizer, self._encoder = encoders[0]
        self.length: int = self._tokenizer.model_max_length

    @property
    def table(self) -> Tensor:
        """The tokens' embeddings, (tokens, width), float32."""
        return self._encoder.get_input_embeddings().weight.detach().float()

    @cached_property
    def typed(self) -> Typed:
        """The words of the vocabulary, sorted; without those that the tokenizer would take apart again."""
        names = (token.removesuffix(WHOLE) for token in self._tokenizer.get_vocab() if token.endswith(WHOLE))
        words = sorted(w for w in names if len(w) >= SHORTEST and w.isascii() and w.isalpha() and w.islower())
        read = self._tokenizer(words, add_special_tokens=False).input_ids
        kept = [(word, ids[0]) for word, ids in zip(words, read, strict=True) if len(ids) == 1]
        return Typed(tuple(word for word, _ in kept), torch.tensor([token for _, token in kept]))

    def ids(self, texts: Sequence[str], free: int = 0) -> Tensor:
        """Token ids (B, length); the places 1 to `free`, behind the first token, are left for others."""
        cut = self._tokenizer(list(texts), truncation=True, max_length=self.length - free).input_ids
        fill = self._tokenizer.pad_token_id
        rows = [[each[0], *[fill] * free, *each[1:]] for each in cut]
        return torch.tensor([row + [fill] * (self.length - len(row)) for row in rows], device=self._encoder.device)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """States of texts, (B, length, width), float32."""
        return self.states(self.ids(texts))

    def asked(self, ids: Tensor, embedded: Tensor) -> Conditioning:
        """What a UNet is told of tokens (B, length) with embeddings (B, k, width) at the places from 1 on."""
        return Conditioning(self.states(ids, embedded), tokens=ids[:, None], prefix=embedded)

    def states(self, ids: Tensor, embedded: Tensor | None = None, at: int = 1) -> Tensor:
        """States (B, length, width), float32, of tokens.

        Args:
            ids: (B, length).
            embedded: embeddings that stand at the places from `at` on instead of those of `ids`, (B, k, width).
            at: the first of them.
        """
        if embedded is None:
            return self._encoder(ids).last_hidden_state.float()
        put = embedded

        def replace(_: object, args: tuple, output: Tensor) -> Tensor:
            return torch.cat((output[:, :at], put.to(output.dtype), output[:, at + put.shape[1] :]), dim=1)

        hook = self._encoder.get_input_embeddings().register_forward_hook(replace)
        try:
            return self._encoder(ids).last_hidden_state.float()
        finally:
            hook.remove()


@torch.no_grad()
def teach(pipe: Any, word: str, embedding: Tensor) -> None:
    """Give a pipeline's text encoder a new word, as whoever loads a textual inversion does; the tokenizer is a copy.

    Args:
        pipe: changed in place; with one text encoder.
        word: as prompts write it, and nothing that its tokenizer knows.
        embedding: of it, (1, 1, width).
    """
    encoder = pipe.text_encoder
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.add_tokens([word])
    number = pipe.tokenizer.convert_tokens_to_ids(word)
    if number >= encoder.get_input_embeddings().num_embeddings:
        encoder.resize_token_embeddings(number + 1, mean_resizing=False)
    encoder.get_input_embeddings().weight[number] = embedding.flatten().to(encoder.device, encoder.dtype)
    encoder.requires_grad_(False)
