"""A small random pipeline and what the tests need around it: seconds to build, milliseconds to run.

It has the embedded model's layout (tokenizer, 192 wide text states, 16 x 16 latents, v-prediction) and none of its
training, so it shows that mechanisms work, never that a patch is any good.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.bank import Batch, Latents, PairBank, Retained, Texts
from safepatch.data.category import Rewrite
from safepatch.diffusion import Components, Conditioning, UNetHost, generate, quiet
from safepatch.models.load import ModelConfig
from safepatch.patch import PATCH_KINDS, Features, Patch, ResidualPatch, Residuals
from safepatch.patch.files import to_artifact
from safepatch.patch.host import HostHooks, answered
from safepatch.tiny.text import MAX_TOKENS, WIDTH, new_tokenizer
from safepatch.tiny.unet import assemble

DOWN, MID = "down_block_additional_residuals", "mid_block_additional_residual"
INSTRUCTION = "no weapons, show harmless tools instead"
PROMPTS, SEEDS = ("a knife next to a cat", "a picture of a dog"), (1, 2)


def new_small_unet(**overrides: Any) -> UNet2DConditionModel:
    """A random UNet in the embedded model's layout, narrow; `overrides` change its configuration."""
    options = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**{**options, **overrides}).eval()


def _new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def _new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


@cache
def _parts() -> Components:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = new_tokenizer()
        vae, text_encoder = _new_vae().eval(), _new_text_encoder(tokenizer).eval()
    return Components(new_small_unet(), vae, text_encoder, tokenizer, scheduler=None)


def new_small_pipe(unet: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    """A pipeline of its own: equal weights every time, nothing shared but the tokenizer."""
    parts = _parts()
    vae, text_encoder = copy.deepcopy(parts.vae), copy.deepcopy(parts.text_encoder)
    return quiet(assemble(unet or copy.deepcopy(parts.unet), vae, text_encoder, parts.tokenizer))


@torch.no_grad()
def awaken(patch: Patch, seed: int = 0, size: float = 0.1) -> Patch:
    """The patch with noise of standard deviation `size` on every weight, so that it does change images."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in patch.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return patch.eval().requires_grad_(False)


LAYOUTS: dict[str, dict[str, int]] = {"lite": {"rank": 4}, "lora": {"rank": 4}}
RESIDUAL_KINDS = ("control", "lite")  # those that compute residuals


def new_patch(unet: nn.Module, kind: str = "control", sees: str = "instruction+prompt", seed: int | None = 0) -> Patch:
    """A patch of `kind` on `unet`, awake, or fresh when `seed` is None."""
    patch = PATCH_KINDS[kind].from_unet(unet, sees, **LAYOUTS.get(kind, {})).eval()
    return patch if seed is None else awaken(patch, seed)


def new_artifact(unet: nn.Module, kind: str = "control", seed: int | None = 0) -> PatchArtifact:
    """That patch as an artifact, float32."""
    return to_artifact(new_patch(unet, kind, seed=seed), unet, {"weapons": INSTRUCTION})


@cache
def small_artifact(kind: str = "control", seed: int | None = 0) -> PatchArtifact:
    """`new_artifact` on the small pipeline's UNet; artifacts are frozen, so one serves all tests."""
    return new_artifact(_parts().unet, kind, seed)


def images(pipe: StableDiffusionPipeline, guidance_scale: float = 4.0, negative: str | None = None) -> Tensor:
    """Two images in one step, (2, 3, 64, 64)."""
    negatives = [negative] * len(PROMPTS) if negative else None
    return generate(pipe, PROMPTS, SEEDS, steps=1, guidance_scale=guidance_scale, negative_prompts=negatives)


def one_at_a_time(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> list[Any]:
    """Models are what `make` gives, and none may be opened while another is held; returns one entry for each."""
    made: list[weakref.ref] = []

    def load(_: ModelConfig) -> Any:
        gc.collect()
        assert not any(pipe() for pipe in made)
        pipe = make()
        made.append(weakref.ref(pipe))
        return pipe

    monkeypatch.setattr(ModelConfig, "load", load)
    return made


def rows(n: int = 2, channels: int = 4, tokens: int = MAX_TOKENS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random noisy latents (n, channels, 16, 16), integer timesteps (n,) and text states (n, tokens, 192)."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(n, channels, 16, 16, generator=generator)
    timesteps = torch.randint(0, 1000, (n,), generator=generator)
    return sample, timesteps, torch.randn(n, tokens, WIDTH, generator=generator)


def same_residuals(left: tuple[tuple[Tensor, ...], Tensor], right: tuple[tuple[Tensor, ...], Tensor]) -> bool:
    """Whether two patches' residuals, or what two UNet calls were given, are equal in every bit."""
    pairs = zip((*left[0], left[1]), (*right[0], right[1]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def new_small_host(unet: UNet2DConditionModel | None = None) -> UNetHost:
    """A small pipeline, or its parts around `unet`, as objectives see it."""
    return UNetHost(Components.of(new_small_pipe(unet)))


class KeptTexts:
    """Stands in for `Texts`: what a host would read of texts that nobody wrote.

    Args:
        states: of each, (N, tokens, width).
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states

    def __getitem__(self, numbers: Sequence[int] | Tensor) -> Conditioning:
        return Conditioning(self.states[torch.as_tensor(numbers)])


def bank(seed: int, n: int = 12, safe_share: float = 0.5, retain: bool = True) -> PairBank:
    """Random rows in which the unsafe prompts have something in common; of pairs, the first ones show the safe twin."""
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(n, 4, 16, 16, generator=generator) for _ in range(2)]
    states = torch.randn(3 * n, 6, WIDTH, generator=generator)
    states[:n, 2] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(-1))
    texts, numbers = cast(Texts, KeptTexts(states)), torch.arange(3 * n)
    kept = Retained(cast(Latents, latents[1]), texts, numbers[2 * n :]) if retain else None
    is_safe = torch.arange(n) < safe_share * n
    return PairBank(
        cast(Latents, latents[0]), is_safe, texts, numbers[:n], numbers[n : 2 * n], Rewrite("replace"), kept
    )


def batch(seed: int = 0, n: int = 2, edge: int = 8, rewrite: Rewrite | None = None) -> Batch:
    """Random rows of `n` pairs and `n` that are to stay, with the prompts that a guided teacher is pushed between."""
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(n, 4, edge, edge, generator=generator) for _ in range(2)]
    unsafe, safe, retain = (Conditioning(torch.randn(n, MAX_TOKENS, WIDTH, generator=generator)) for _ in range(3))
    away, towards = (Conditioning(torch.randn(n, MAX_TOKENS, WIDTH, generator=generator)) for _ in range(2))
    rewrite = rewrite or Rewrite("replace")
    guides = (away, towards) if rewrite.by == "guided" else (None, None)
    return Batch(latents[0], unsafe, unsafe if rewrite.by == "guided" else safe, rewrite, latents[1], retain, *guides)


def corrections(patch: ResidualPatch, unet: nn.Module, inputs: tuple[Tensor, ...], instruction: Tensor) -> Residuals:
    """What the patch makes of `rows()` on `unet`, which shows its features to the kinds that read them."""
    if not patch.reads_features:
        return patch(*inputs, instruction)
    return patch(*inputs, instruction, features=features_of(unet, *inputs))


@torch.no_grad()
def features_of(unet: nn.Module, *inputs: Tensor) -> Features:
    """The host's own features for `rows()`."""
    seen: list[Features] = []
    with answered(unet, seen.append):
        unet(*inputs)
    return seen[0]


@contextmanager
def spied(unet: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments, and as `output` the prediction, of every UNet call, as they are after all patches.

    What patches answer to the host's features counts as residual arguments too.
    """
    calls: list[dict[str, Any]] = []
    expect = HostHooks._expect

    def arrive(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append({**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs})

    def leave(_: nn.Module, args: tuple, output: Any) -> None:
        calls[-1]["output"] = output[0]

    def overhear(hooks: HostHooks, residuals: Residuals | None) -> None:
        expect(hooks, residuals)
        if residuals is not None:
            given = calls[-1].get(DOWN, [0.0] * len(residuals.down)), calls[-1].get(MID, 0.0)
            calls[-1][DOWN] = tuple(old + new for old, new in zip(given[0], residuals.down, strict=True))
            calls[-1][MID] = given[1] + residuals.mid

    hooks = unet.register_forward_pre_hook(arrive, with_kwargs=True), unet.register_forward_hook(leave)
    HostHooks._expect = overhear  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        HostHooks._expect = expect  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()
