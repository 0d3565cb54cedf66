"""The embedded flow-matching transformer `tiny-sd3`: SD3's diffusers layout, small, on the base's latents and words.

Rectified flow with logit-normal times (Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution
Image Synthesis", arXiv 2403.03206): x(s) = (1 - s) latents + s noise, and the velocity noise - latents is regressed.

There is no T5. SD3's pipeline then feeds zeros in its place, 256 tokens of them unless it is told another
`max_sequence_length`. Zeros are all alike and stay so in every layer, so n of them are one token whose attention logits
are raised by log n: the transformer is trained that way, on every n, and draws the same with any.
"""

import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from safepatch.tiny.loop import Loss, Schedule, fit
from safepatch.tiny.scenes import caption
from safepatch.tiny.sd3_text import SECOND_WIDTH
from safepatch.tiny.text import WIDTH, tokenize
from safepatch.tiny.unet import CAPTION_DROPOUT, Pool

BATCH = 16
HEADS, HEAD_WIDTH, LAYERS = 5, 32, 6
POOL = 9600
SCHEDULE = Schedule(steps=5600, learning_rate=1.2e-3, warmup=150, decay=0.997, save_every=100)
MOST_ZEROS = 256  # what the pipeline feeds for a T5 that is not there


def new_transformer(layers: int = LAYERS, heads: int = HEADS) -> SD3Transformer2DModel:
    """An untrained transformer on 64 patches of 2 x 2 latents, its blocks and its output zero at first (adaLN-Zero)."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH + SECOND_WIDTH,
        pooled_projection_dim=WIDTH + SECOND_WIDTH,
        caption_projection_dim=heads * HEAD_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    norms = [m for m in transformer.modules() if isinstance(m, AdaLayerNormZero | AdaLayerNormContinuous)]
    for layer in (*(norm.linear for norm in norms), transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Unshifted times: a shift is for more pixels than 64 x 64."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


class CountingAttention:
    """SD3's joint attention in which a key may stand for several that are alike.

    As diffusers' `JointAttnProcessor2_0`, of which it is the masked form: `key_bias`, shape (B, 1, 1, keys), is added
    to the logits; keys are the image's tokens and then the text's.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, key_bias: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """New states of the image's tokens (B, N, width) and of the text's (B, M, width)."""
        image = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        text = [layer(encoder_hidden_states) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        (q, k, v), (text_q, text_k, text_v) = (
            [states.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for states in stream] for stream in (image, text)
        )
        q = torch.cat([attn.norm_q(q), attn.norm_added_q(text_q)], dim=2)
        k = torch.cat([attn.norm_k(k), attn.norm_added_k(text_k)], dim=2)
        mixed = scaled_dot_product_attention(q, k, torch.cat([v, text_v], dim=2), attn_mask=key_bias)
        mixed = mixed.transpose(1, 2).flatten(2)
        shown, read = mixed[:, : hidden_states.shape[1]], mixed[:, hidden_states.shape[1] :]
        return attn.to_out[0](shown), read if attn.context_pre_only else attn.to_add_out(read)


def counting(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """The transformer with attention as `flow_loss` calls it; changed in place."""
    transformer.set_attn_processor(CountingAttention())  # pyright: ignore[reportArgumentType]
    return transformer


class Texts(NamedTuple):
    """The tokenizer, which both text encoders share, and the encoders, frozen."""

    tokenizer: CLIPTokenizer
    first: CLIPTextModelWithProjection
    second: CLIPTextModelWithProjection

    @classmethod
    def of(cls, pipe: StableDiffusion3Pipeline) -> "Texts":
        """Those of a pipeline."""
        return cls(pipe.tokenizer, pipe.text_encoder, pipe.text_encoder_2)


@torch.no_grad()
def encode_texts(texts: Texts, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """What SD3's pipeline reads of `prompts` before T5: states (B, 24, 320) and pooled states (B, 320)."""
    ids = tokenize(texts.tokenizer, prompts)
    read = [encoder(ids, output_hidden_states=True) for encoder in (texts.first, texts.second)]
    states = torch.cat([made.hidden_states[-2] for made in read], dim=-1)
    return states, torch.cat([made.text_embeds for made in read], dim=-1)


def with_zeros(states: Tensor, counts: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """Text states with one zero token behind them, and the `key_bias` by which it stands for `counts` (B,) of them."""
    zeros = torch.zeros_like(states[:, :1])
    bias = torch.zeros(len(states), 1, 1, patches + states.shape[1] + 1)
    bias[:, 0, 0, -1] = counts.float().log()  # of none, -inf
    return torch.cat([states, zeros], dim=1), bias


def logit_normal(n: int, generator: torch.Generator) -> Tensor:
    """`n` times in (0, 1), shape (n,): sigmoids of a standard normal, one from each of its n quantiles."""
    spread = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    return torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)).sigmoid()


def flow_loss(pool: Pool, texts: Texts, batch: int = BATCH) -> Loss:
    """The loss function `(transformer, step) -> scalar` on random captions of random scenes of `pool`."""

    def loss(transformer: Any, step: int) -> Tensor:
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        picks = [rng.randrange(len(pool.scenes)) for _ in range(batch)]
        prompts = ["" if rng.random() < CAPTION_DROPOUT else caption(pool.scenes[i], rng) for i in picks]
        states, pooled = encode_texts(texts, prompts)
        latents = pool.latents[picks].float()
        noise = torch.randn(latents.shape, generator=generator)
        times = logit_normal(batch, generator)
        counts = torch.tensor([rng.choice((0, math.floor(MOST_ZEROS ** rng.random()), MOST_ZEROS)) for _ in picks])
        states, bias = with_zeros(states, counts, latents[0, 0].numel() // 4)
        noisy_latents = torch.lerp(latents, noise, times[:, None, None, None])
        velocity = transformer(
            noisy_latents, states, pooled, times * 1000, joint_attention_kwargs={"key_bias": bias}
        ).sample
        return mse_loss(velocity, noise - latents)

    return loss


def train_transformer(pool: Pool, texts: Texts, checkpoint: Path, schedule: Schedule = SCHEDULE) -> Any:
    """Train (or finish training) the transformer on `pool`."""
    torch.manual_seed(0)
    return fit(counting(new_transformer()), flow_loss(pool, texts), schedule, checkpoint)


def assemble_sd3(transformer: SD3Transformer2DModel, vae: AutoencoderKL, texts: Texts) -> StableDiffusion3Pipeline:
    """The parts as a plain diffusers pipeline without a T5."""
    vae.register_to_config(shift_factor=0.0)  # which the pipeline adds
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow_scheduler(),
        vae=vae,
        text_encoder=texts.first,
        tokenizer=texts.tokenizer,
        text_encoder_2=texts.second,
        tokenizer_2=texts.tokenizer,
        text_encoder_3=None,  # pyright: ignore[reportArgumentType]
        tokenizer_3=None,  # pyright: ignore[reportArgumentType]
    )
