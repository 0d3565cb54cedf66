"""Frozen rectified-flow transformers as training sees them: noise, velocities, words, and pictures of their own."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from safepatch.diffusion import Components, Host, Spelling, encode_windows, open_host, text_width
from safepatch.errors import BaseMismatch, ConfigError
from safepatch.patch.gate import TextGate
from tests.families import small_transformer_pipe

NAMES = ("sd3", "sd3.5", "flux")
every_host = pytest.mark.parametrize("name", NAMES)
TEXTS, SEEDS = ["a knife", "a picture of a dog"], [3, 4]


@cache
def pipe_of(name: str, **sizes: Any) -> Any:
    return small_transformer_pipe(name, **sizes)


def host_of(name: str, **sizes: Any) -> Host:
    return open_host(Components.of(pipe_of(name, **sizes)), 64)


def noised(host: Host, n: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean latents, noise, timesteps all over the schedule, noisy latents."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(n, *host.latent_shape, generator=generator) for _ in range(2))
    timesteps = torch.linspace(0, host.steps - 1, n).long()
    return clean, noise, timesteps, host.add_noise(clean, noise, timesteps)


@every_host
def test_clean_latents_noise_and_velocities_stand_for_each_other(name):
    host = host_of(name)
    clean, noise, timesteps, noisy = noised(host)
    truth = host.target(clean, noise, timesteps)
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(host.to_x0(noisy, timesteps, truth), clean, **close)
    torch.testing.assert_close(host.to_noise(noisy, timesteps, truth), noise, **close)
    torch.testing.assert_close(host.from_x0(noisy, timesteps, clean), truth, **close)
    prediction = torch.randn_like(clean)
    back = host.from_x0(noisy, timesteps, host.to_x0(noisy, timesteps, prediction))
    torch.testing.assert_close(back, prediction, **close)
    assert torch.equal(noisy[-1], noise[-1])  # the last timestep is pure noise
    assert not torch.allclose(host.to_x0(noisy, timesteps, -truth), clean, atol=0.1)  # control


@pytest.mark.parametrize("guidance", [None, 1.0, 3.0])
@every_host
def test_a_host_draws_what_its_pipeline_draws(name, guidance):
    host, pipe = host_of(name), pipe_of(name)
    usual = 3.5 if name == "flux" else 7.0
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    wanted = pipe(TEXTS, guidance_scale=usual if guidance is None else guidance, generator=generators, **options).images
    if name == "flux":
        wanted = pipe._unpack_latents(wanted, 64, 64, pipe.vae_scale_factor)
    made = host.draw(TEXTS, SEEDS, 3, guidance)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    assert (host.draw(TEXTS, SEEDS, 3, 9.0) - made).abs().max() > 1e-3  # control
    assert host.draw([""], [0], 1).shape == (1, *host.latent_shape)


@every_host
def test_a_prediction_is_the_same_for_each_row_alone(name):
    host = host_of(name)
    _, _, timesteps, noisy = noised(host, 2)
    read = host.encode(TEXTS)
    with torch.no_grad():
        both = host.predict(noisy, timesteps, read)
        alone = host.predict(noisy[1:], timesteps[1:], read.of(slice(1, 2)))
        other = host.predict(noisy[1:], timesteps[1:], read.of(slice(0, 1)))
    assert both.shape == noisy.shape
    assert both.dtype == torch.float32
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, alone, atol=1e-5)  # control


def test_a_t5_that_is_missing_is_zeros():
    parts = {**pipe_of("sd3").components, "text_encoder_3": None, "tokenizer_3": None}
    pipe = type(pipe_of("sd3"))(**parts)
    host, whole = open_host(Components.of(pipe), 64), host_of("sd3")
    tokens = pipe.tokenizer.model_max_length
    states, theirs = host.encode(TEXTS).states, whole.encode(TEXTS).states
    assert states.shape == theirs.shape
    assert torch.equal(states[:, :tokens], theirs[:, :tokens])
    assert not states[:, tokens:].any()
    assert theirs[:, tokens:].any()  # control
    assert host.draw(["a cat"], [0], 1).isfinite().all()


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_model_without_an_encoder_that_it_needs_is_refused(name, part):
    pipe = type(pipe_of(name))(**{**pipe_of(name).components, part: None})
    with pytest.raises(BaseMismatch, match=f"has no {part}; build the pipeline with all its parts") as caught:
        Components.of(pipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "size"), [("sd3", 8), ("sd3", 72), ("sd3", 1024), ("flux", 24)])
def test_sizes_that_the_model_cannot_draw_are_refused(name, size):
    with pytest.raises(ConfigError, match=f"pictures of {size} pixels cannot be drawn .*use .* (16|512)"):
        open_host(Components.of(pipe_of(name)), size)


def test_a_transformer_that_is_given_more_than_latents_is_refused():
    with pytest.raises(ConfigError, match="not supported yet: training for a transformer that is given more"):
        host_of("flux-fill")


# ---- words -----------------------------------------------------------------------------------------------------


@every_host
def test_windows_are_encoded_as_prompts_are(name):
    host = host_of(name)
    spelling = Spelling(host.components.tokenizer)
    window = tuple(spelling.words(host.components.tokenizer("knife").input_ids))
    states, whole = encode_windows(host.components, [window]), host.words(host.encode(["knife", "a knife"]))
    assert states.shape[-1] == whole.shape[-1] == text_width(host.unet)
    told = min(states.shape[1], whole.shape[1], len(window) + 2)
    torch.testing.assert_close(states[0, :told], whole[0, :told], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states[0, :told], whole[1, :told], atol=1e-4)  # control


def test_a_gate_goes_by_what_clip_says_and_not_by_t5():
    host = host_of("sd3")
    gate = TextGate(text_width(host.unet), 8, 1)
    read = host.encode(TEXTS)
    wanted = gate.read(host.words(read))
    tokens = host.components.tokenizer.model_max_length
    assert torch.equal(gate.read(read.states), wanted)
    other = read.states.clone()
    other[:, tokens:] *= 9
    assert torch.equal(gate.read(other), wanted)
    other[:, tokens:] = 0  # no T5
    assert torch.equal(gate.read(other), wanted)
    other[:, 1:tokens] *= 9
    assert not torch.equal(gate.read(other), wanted)  # control
