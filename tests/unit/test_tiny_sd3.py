"""The embedded transformer's recipe, very small: plain diffusers reads what it writes, it learns, it resumes."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

from safepatch.diffusion import Components, encode, generate, open_host, quiet
from safepatch.errors import ModelNotFound
from safepatch.tiny import siblings
from safepatch.tiny.loop import Schedule, fit
from safepatch.tiny.models import ASSETS, BASE, add_deltas, load_tiny
from safepatch.tiny.scenes import sample_scene
from safepatch.tiny.sd3 import (
    Texts,
    assemble_sd3,
    counting,
    encode_texts,
    flow_loss,
    flow_scheduler,
    logit_normal,
    new_transformer,
    with_zeros,
)
from safepatch.tiny.sd3_files import SHARED, load_sd3, save_sd3, shared_parts
from safepatch.tiny.sd3_text import PooledReader, new_second_encoder, reading_loss
from safepatch.tiny.unet import Pool
from safepatch.tiny.world import CONCEPTS
from tests.families import small_transformer_pipe

PROMPTS = ["a knife next to a cat", "a dog"]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return shared_parts(ASSETS / BASE)


@pytest.fixture(scope="module")
def texts(parts: dict[str, Any]) -> Texts:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        second = new_second_encoder(parts["text_encoder"].config).eval()
    return Texts(parts["tokenizer"], parts["text_encoder"], second)


@pytest.fixture(scope="module")
def pool() -> Pool:
    rng, names = random.Random(0), list(CONCEPTS)
    scenes = [sample_scene(rng, rng.sample(names, 1)) for _ in range(8)]
    flat = torch.randn(8, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    return Pool(scenes, flat.expand(8, 4, 16, 16).half())


@torch.no_grad()
def small(seed: int = 0) -> SD3Transformer2DModel:
    """One block of one head, with noise on its weights so that it does draw."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = new_transformer(layers=2, heads=1).eval()
        for parameter in transformer.parameters():
            parameter += torch.randn(parameter.shape) / 20
    return transformer


def drawn(pipe: StableDiffusion3Pipeline, seed: int = 0, **more: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe("a cat", num_inference_steps=2, generator=generator, output_type="pt", **more).images  # type: ignore


def test_the_written_parts_and_the_base_make_a_pipeline_that_plain_diffusers_reads(tmp_path: Path, texts: Texts):
    save_sd3(small(), texts.second, ASSETS / BASE, tmp_path / "parts")
    assert not any((tmp_path / "parts" / name).exists() for name in SHARED)
    joined = load_sd3(tmp_path / "parts", ASSETS / BASE)
    assert joined.transformer.dtype == joined.vae.dtype == torch.float32
    base = load_tiny(BASE)
    ours, theirs = joined.vae.state_dict(), base.vae.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    joined.save_pretrained(tmp_path / "whole")
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole", text_encoder_3=None, tokenizer_3=None)
    first, again, other = drawn(joined), drawn(plain), drawn(plain, seed=1)
    torch.testing.assert_close(first, again, atol=1e-4, rtol=1e-4)  # their attention may be computed another way
    assert torch.equal(again, drawn(plain))
    assert first.shape == (1, 3, 64, 64)
    assert first.isfinite().all()
    assert not torch.equal(first, other)  # control


def test_parts_that_are_missing_are_one_line(tmp_path: Path):
    with pytest.raises(ModelNotFound, match="no embedded model at"):
        load_sd3(tmp_path, ASSETS / BASE)


def test_texts_are_read_as_the_pipeline_reads_them(parts: dict[str, Any], texts: Texts):
    pipe = assemble_sd3(small(), parts["vae"], texts)
    states, _, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS, max_sequence_length=3)
    ours, ours_pooled = encode_texts(texts, PROMPTS)
    assert torch.equal(states[:, :24], ours)
    assert not states[:, 24:].any()
    assert torch.equal(pooled, ours_pooled)


@pytest.mark.parametrize("n", [0, 1, 9])
def test_one_token_stands_for_any_number_of_zeros(texts: Texts, n: int):
    states, pooled = encode_texts(texts, PROMPTS)
    latents, times = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, 900.0])
    plain = small()
    assert isinstance(next(iter(plain.attn_processors.values())), JointAttnProcessor2_0)
    ours = counting(copy.deepcopy(plain))

    def counted(counts: list[int]) -> Tensor:
        one, bias = with_zeros(states, torch.tensor(counts), 64)
        return ours(latents, one, pooled, times, joint_attention_kwargs={"key_bias": bias}).sample

    with torch.no_grad():
        told = plain(latents, torch.cat([states, torch.zeros(2, n, 320)], dim=1), pooled, times).sample
        torch.testing.assert_close(counted([n, n]), told, atol=1e-5, rtol=1e-4)
        assert (counted([n + 40, n]) - told)[0].abs().max() > 1e-3  # control: the number does matter


def test_drawn_and_read_for_safepatch_it_has_one_zero_for_t5_and_plain_diffusers_gives_it_many(
    texts: Texts, parts: Any
):
    pipe = quiet(assemble_sd3(small(), parts["vae"], texts))
    components, options = Components.of(pipe), {"steps": 2, "guidance_scale": 7.0}
    ours = generate(pipe, ["a cat"], [0], **options)
    assert torch.equal(ours, generate(pipe, ["a cat"], [0], **options, max_sequence_length=1))
    assert not torch.equal(ours, generate(pipe, ["a cat"], [0], **options, max_sequence_length=256))  # control
    host = open_host(components)
    assert host.encode(["a cat"]).states.shape == encode(components, ["a cat"]).states.shape == (1, 25, 320)
    other = quiet(small_transformer_pipe("sd3"))
    other.text_encoder_3 = other.tokenizer_3 = None
    assert (
        open_host(Components.of(other)).encode(["a cat"]).states.shape[1] == 24 + 256
    )  # control: nobody trained it so


def test_noise_and_velocity_are_the_schedulers(texts: Texts, pool: Pool):
    """A transformer that knows the velocity has no loss, and one step along it from pure noise draws the latents."""
    scheduler, latents, noise = flow_scheduler(), torch.ones(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    scheduler.set_timesteps(1)
    step = scheduler.step(noise - latents, scheduler.timesteps[0], noise)
    torch.testing.assert_close(step.prev_sample, latents)
    scheduler.set_timesteps(10)
    noisy = scheduler.scale_noise(latents, scheduler.timesteps[3:4], noise)
    torch.testing.assert_close(noisy, torch.lerp(latents, noise, scheduler.sigmas[3]))


def test_times_are_logit_normal():
    times = logit_normal(1000, torch.Generator().manual_seed(0))
    assert ((times > 0) & (times < 1)).all()
    normal = times.logit()
    assert normal.mean().abs() < 0.01
    assert (normal.std() - 1).abs() < 0.01
    assert not torch.equal(times, logit_normal(1000, torch.Generator().manual_seed(1)))  # control


def test_a_transformer_starts_with_no_velocity_and_learns(tmp_path: Path, texts: Texts, pool: Pool):
    loss = flow_loss(pool, texts, batch=8)
    fresh = counting(new_transformer(layers=1, heads=2))
    with torch.no_grad():
        before = loss(fresh, 1000)
        states, pooled = encode_texts(texts, PROMPTS)
        assert not fresh(torch.ones(2, 4, 16, 16), states, pooled, torch.zeros(2)).sample.any()
    schedule = Schedule(steps=30, learning_rate=1e-2, warmup=5, decay=0.7)
    learned = fit(fresh, loss, schedule, tmp_path / "t.pt")
    with torch.no_grad():
        assert loss(learned, 1000) < 0.8 * before


def test_training_goes_on_where_it_stopped(tmp_path: Path, texts: Texts, pool: Pool):
    loss, schedule = flow_loss(pool, texts, batch=2), Schedule(steps=4, learning_rate=1e-3, warmup=1, save_every=1)

    def trained(name: str, *stops: float) -> dict[str, Tensor]:
        for stop in (*stops, float("inf")):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                new = counting(new_transformer(layers=1, heads=1))
            average = fit(new, loss, schedule, tmp_path / name, stop_after=stop)
        return average.state_dict()

    whole, halved, other = (
        trained("whole.pt"),
        trained("halves.pt", 0, 0),
        fit(counting(small()), loss, schedule, tmp_path / "other.pt").state_dict(),
    )
    assert all(torch.equal(whole[name], halved[name]) for name in whole)
    assert any(not torch.equal(whole[name], other[name]) for name in whole if name in other)  # control


def test_the_second_encoder_learns_to_read(tmp_path: Path, parts: dict[str, Any], texts: Texts):
    assert texts.second.config.hidden_size == texts.second.config.projection_dim == 128
    loss, reader = reading_loss(parts["tokenizer"]), PooledReader(copy.deepcopy(texts.second).float())
    with torch.no_grad():
        before = loss(reader, 100)
    learned = fit(reader, loss, Schedule(steps=12, learning_rate=3e-3, warmup=3, decay=0.6), tmp_path / "r.pt")
    with torch.no_grad():
        assert loss(learned, 100) < before - 1


def test_a_sibling_is_the_transformer_and_low_rank_deltas(
    tmp_path: Path, texts: Texts, pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(siblings, "LORA", Schedule(steps=2, learning_rate=1e-2, warmup=1))
    loss, recipe = flow_loss(pool, texts, batch=2), siblings.RECIPES["sd3-twemoji"]
    siblings.train_sibling(counting(small()), loss, recipe, tmp_path / "s.pt", tmp_path / "s.safetensors")
    sibling, base = small(), dict(small().named_parameters())
    add_deltas(sibling, tmp_path / "s.safetensors")
    changed = {name for name, own in sibling.named_parameters() if not torch.equal(own, base[name])}
    assert "transformer_blocks.0.attn.add_q_proj.weight" in changed
    assert {"pos_embed.proj.weight", "proj_out.weight"} <= changed
    assert not any(name.endswith("bias") for name in changed)  # adapters have none
