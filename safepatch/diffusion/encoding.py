"""What a host reads of prompts: text states, pooled states, tokens."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from safepatch.diffusion.components import Components, uncompiled
from safepatch.diffusion.conditioning import Conditioning
from safepatch.diffusion.hosts.kinds import FLUX, UNET, host_kind, is_tiny_sd3
from safepatch.errors import PromptError

T5_TOKENS, SD3_TOKENS, FLUX_TOKENS = 77, 256, 512  # of T5: of an instruction, and of a prompt, unless told otherwise
ZEROS = 1  # that the embedded transformer is given for the T5 that it lacks: any number draws the same (DESIGN.md, 73)


def encode_prompts(components: Components, prompts: Sequence[str]) -> Tensor:
    """Text states of `prompts` as the pipeline computes them, shape (B, tokens, width); see `encode`."""
    return encode(components, prompts).states


@torch.no_grad()
def encode(components: Components, prompts: Sequence[str], t5_tokens: int = T5_TOKENS) -> Conditioning:
    """What the host reads of `prompts`, as its pipeline computes it.

    SD 1 and 2 read the text encoder's last layer; SDXL reads the last but one of each encoder, side by side, and the
    second one's pooled state, and zeros for the empty prompt. SD3 and Flux read as many tokens of T5 as is said; where
    SD3 lacks that, they are zeros.
    """
    if not prompts:
        raise PromptError("no prompts to encode; give at least one")
    if host_kind(components.unet) is not UNET:
        return _encode_by_pipeline(components, prompts, t5_tokens)
    read = encode_tokens(components, [_token_ids(tokenizer, prompts) for tokenizer, _ in components.text_encoders()])
    if read.pooled is None or components.text_encoder is None or "" not in prompts:
        return read
    said = torch.tensor([bool(prompt) for prompt in prompts], device=read.states.device)  # SDXL's base, not its refiner
    return read._replace(states=read.states * said[:, None, None], pooled=read.pooled * said[:, None])


def encode_words(components: Components, prompts: Sequence[str]) -> Tensor:
    """The text states of `prompts` by which gates go, (B, tokens, width): what CLIP's encoders say, not T5."""
    if host_kind(components.unet) is UNET:
        return encode(components, prompts).states
    return encode_tokens(components, [_token_ids(each, prompts) for each, _ in components.text_encoders()]).states


@torch.no_grad()
def encode_tokens(components: Components, tokens: Sequence[Tensor]) -> Conditioning:
    """What a UNet reads of prompts that are tokens already, (B, T) for each text encoder, with start, end, padding.

    Of SD3 it is what CLIP's encoders say, before T5's width is filled up. Flux is told CLIP's pooled state alone, which
    stands for text states here, (B, 1, width).
    """
    if host_kind(components.unet) is FLUX:
        (_, text_encoder), *_ = components.text_encoders()
        said: Tensor = text_encoder(tokens[0].to(text_encoder.device)).pooler_output
        return Conditioning(said[:, None], said)
    is_xl = components.text_encoder_2 is not None
    read = [read_tokens(each, ids, is_xl) for (_, each), ids in zip(components.text_encoders(), tokens, strict=True)]
    states = torch.cat([each for each, _ in read], dim=-1)
    return Conditioning(states, read[-1][1], tokens=torch.stack([*tokens], dim=1).to(states.device))


def read_tokens(text_encoder: Any, tokens: Tensor, is_xl: bool) -> tuple[Tensor, Tensor | None]:
    """States (B, T, width) that a UNet takes from one CLIP encoder, of tokens (B, T); of SDXL's the pooled ones too."""
    made = text_encoder(tokens.to(text_encoder.device), output_hidden_states=is_xl)
    return (made.hidden_states[-2], made[0]) if is_xl else (made.last_hidden_state, None)


def _token_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """(B, tokens), cut and filled up to the tokenizer's own length."""
    length = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
    return tokenizer(list(prompts), return_tensors="pt", **length).input_ids


@torch.no_grad()
def _encode_by_pipeline(components: Components, prompts: Sequence[str], t5_tokens: int) -> Conditioning:
    """As SD3's and Flux's own pipelines do."""
    from diffusers import FluxPipeline, StableDiffusion3Pipeline  # slow to import, and rarely needed

    parts = {name: getattr(components, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer")}
    parts |= {"transformer": components.unet}
    parts |= {"text_encoder_2": components.text_encoder_2, "tokenizer_2": components.tokenizer_2}
    options = {"max_sequence_length": t5_tokens, **spared(components.unet), "device": components.text_encoder.device}
    if host_kind(components.unet) is FLUX:
        with _hushed(FluxPipeline):
            states, pooled, _ = FluxPipeline(**parts).encode_prompt(list(prompts), None, **options)
        return Conditioning(states, pooled)
    parts |= {"text_encoder_3": components.text_encoder_3, "tokenizer_3": components.tokenizer_3}
    texts = [list(prompts)] * 3  # one for each encoder
    with _hushed(StableDiffusion3Pipeline):
        pipe = StableDiffusion3Pipeline(**parts)
        states, _, pooled, _ = pipe.encode_prompt(*texts, do_classifier_free_guidance=False, **options)
    return Conditioning(states, pooled)


def spared(host: Any) -> dict[str, int]:
    """What pipelines of the embedded transformer are told, so that four of five of its tokens are not nothing."""
    return {"max_sequence_length": ZEROS} if is_tiny_sd3(uncompiled(host)) else {}


@contextmanager
def _hushed(pipeline: type) -> Iterator[None]:
    """Within the block a class of pipelines does not say of every prompt what it cuts off."""
    logger = logging.getLogger(pipeline.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
