"""A frozen UNet as training sees it: noise, predictions, and pictures of its own, in any parametrisation."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from safepatch.diffusion import (
    Components,
    Conditioning,
    UNetHost,
    decode_latents,
    joined,
    open_host,
    training_target,
)
from safepatch.errors import ConfigError, UnsupportedModel
from tests.families import small_transformer_pipe
from tests.small import new_small_host, new_small_pipe, rows, spied

KINDS = ("epsilon", "v_prediction", "sample")
every_parametrisation = pytest.mark.parametrize("kind", KINDS)


def host_of(kind: str = "v_prediction", scheduler: Any = DDIMScheduler, **settings: Any) -> UNetHost:
    """A small host of another noise schedule."""
    pipe = new_small_pipe()
    config = {**pipe.scheduler.config, "rescale_betas_zero_snr": False, "prediction_type": kind, **settings}
    pipe.scheduler = scheduler.from_config(config)
    return UNetHost(Components.of(pipe))


def noised(host: UNetHost, n: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean latents, noise, timesteps all over the schedule, noisy latents."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(n, 4, 16, 16, generator=generator) for _ in range(2))
    timesteps = torch.linspace(20, 950, n).long()
    return clean, noise, timesteps, host.add_noise(clean, noise, timesteps)


# ---- parametrisations ------------------------------------------------------------------------------------------


@every_parametrisation
def test_clean_latents_and_predictions_stand_for_each_other(kind):
    host = host_of(kind)
    clean, noise, timesteps, noisy = noised(host)
    truth = training_target(host.components.scheduler, clean, noise, timesteps)
    torch.testing.assert_close(host.to_x0(noisy, timesteps, truth), clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(host.from_x0(noisy, timesteps, clean), truth, rtol=1e-3, atol=1e-3)
    prediction = torch.randn_like(clean)
    back = host.from_x0(noisy, timesteps, host.to_x0(noisy, timesteps, prediction))
    torch.testing.assert_close(back, prediction, rtol=1e-3, atol=1e-3)
    other = host_of(KINDS[KINDS.index(kind) - 1])
    assert not torch.allclose(other.to_x0(noisy, timesteps, truth), clean, atol=0.1)  # control


@every_parametrisation
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_noise_is_added_by_the_schedule_whatever_the_pipeline_samples_with(kind, scheduler):
    host = host_of(kind, scheduler)
    clean, noise, timesteps, noisy = noised(host)
    cumulative = host.components.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, cumulative.sqrt() * clean + (1 - cumulative).sqrt() * noise)
    torch.testing.assert_close(noisy, host_of(kind).components.scheduler.add_noise(clean, noise, timesteps))


def test_at_a_zero_signal_to_noise_ratio_nothing_of_the_picture_is_left():
    host = new_small_host()
    clean, noise = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    last = torch.tensor([host.steps - 1])
    torch.testing.assert_close(host.add_noise(clean, noise, last), noise)
    torch.testing.assert_close(host.to_x0(noise, last, -clean), clean)


# ---- predictions -----------------------------------------------------------------------------------------------


def test_a_prediction_is_the_unets_own():
    host, (sample, timesteps, states) = new_small_host(), rows()
    with torch.no_grad():
        wanted = host.unet(sample, timesteps, encoder_hidden_states=states).sample
        assert torch.equal(host.predict(sample, timesteps, Conditioning(states)), wanted)
        assert not torch.equal(host.predict(sample, timesteps, Conditioning(states.flip(0))), wanted)  # control


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_host_predicts_in_float32(dtype):
    host, (sample, timesteps, states) = new_small_host(), rows()
    with torch.no_grad():
        full = host.predict(sample, timesteps, Conditioning(states))
        host.unet.to(dtype)
        with spied(host.unet) as calls:
            half = host.predict(sample, timesteps, Conditioning(states))
    assert half.dtype == torch.float32
    assert calls[0]["sample"].dtype == calls[0]["encoder_hidden_states"].dtype == dtype
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)
    assert not torch.equal(half, full)  # control


# ---- drawing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [None, 1.0, 3.0])
@every_parametrisation
def test_a_host_draws_what_its_pipeline_draws(kind, guidance):
    host = host_of(kind)
    pipe = new_small_pipe()
    config = {**host.components.scheduler.config, "clip_sample": False, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(config)
    texts, seeds = ["a knife", "a picture of a dog"], [3, 4]
    wanted = pipe(
        texts,
        num_inference_steps=3,
        guidance_scale=1.5 if guidance is None else guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    made = host.draw(texts, seeds, 3, guidance)
    assert torch.equal(made, wanted)
    assert not torch.equal(host.draw(texts, [3, 5], 3, guidance), made)  # control
    assert host.draw([""], [0], 1).shape == (1, *host.latent_shape)


def test_drawing_leaves_the_pipeline_and_the_global_generator_alone():
    host, before = new_small_host(), torch.get_rng_state()
    scheduler = dict(host.components.scheduler.config)
    host.draw(["a cat"], [0], 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert dict(host.components.scheduler.config) == scheduler
    assert not [p for module in host.components.modules() for p in module.parameters() if p.requires_grad]


def test_what_is_read_is_where_the_unet_is(monkeypatch):
    """Text encoders that were put aside read on the CPU."""
    host = new_small_host()
    monkeypatch.setattr(UNetHost, "device", property(lambda _: torch.device("meta")))
    assert host.encode(["a cat"]).states.device.type == "meta"


# ---- what it is ------------------------------------------------------------------------------------------------


def test_equal_models_have_equal_keys_and_others_do_not():
    key = new_small_host().key
    assert new_small_host().key == key
    trained, read, drawn = (new_small_host() for _ in range(3))
    for module in (trained.unet, read.components.text_encoder, drawn.components.vae):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.01
    keys = {host.key for host in (trained, read, drawn, UNetHost(new_small_host().components, 128), host_of("epsilon"))}
    assert len({key, *keys}) == 6


@pytest.mark.parametrize("size", [8, 63, 72, -64])
def test_sizes_that_the_model_cannot_draw_are_refused(size):
    with pytest.raises(
        ConfigError, match=f"pictures of {size} pixels cannot be drawn .*use a multiple of 16"
    ) as caught:
        UNetHost(new_small_host().components, size)
    assert "\n" not in str(caught.value)
    assert UNetHost(new_small_host().components, 96).latent_shape == (4, 24, 24)


def test_a_transformer_is_refused():
    with pytest.raises(ConfigError, match="not supported yet: training for a SD3Transformer2DModel"):
        UNetHost(Components.of(small_transformer_pipe("sd3")))


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_unet_of_another_noise_schedule_is_refused_in_a_line(scheduler):
    pipe = new_small_pipe()
    UNetHost(Components.of(pipe))  # control
    pipe.scheduler = scheduler()
    with pytest.raises(UnsupportedModel, match=f"noise schedule is that of {scheduler.__name__}; ") as caught:
        open_host(Components.of(pipe))
    assert "\n" not in str(caught.value)


def test_an_autoencoder_that_overflows_in_half_precision_decodes_in_float32():
    vae = new_small_pipe().vae
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vae.post_quant_conv.weight *= 1e4
        vae.decoder.conv_in.weight *= 1e2
    wanted = decode_latents(vae, latents)
    vae.half()
    vae.register_to_config(force_upcast=False)
    assert not decode_latents(vae, latents).isfinite().all()  # control
    vae.register_to_config(force_upcast=True)
    torch.testing.assert_close(decode_latents(vae, latents.half()), wanted, rtol=0.1, atol=0.1)
    assert vae.dtype == torch.float16


def test_conditionings_are_joined_picked_and_spread_row_by_row():
    one, two = (Conditioning(torch.full((n, 3, 5), float(n)), torch.full((n, 2), float(n))) for n in (1, 2))
    both = joined([one, two])
    assert both.states[:, 0, 0].tolist() == both.pooled[:, 0].tolist() == [1, 2, 2]
    assert both.of(torch.tensor([True, False, True])).pooled[:, 0].tolist() == [1, 2]
    assert one.expand(4).states.shape == (4, 3, 5)
    assert joined([Conditioning(one.states)]).pooled is None
    assert both.score is None
    scored = joined([one._replace(score=torch.tensor([2.5])), two._replace(score=torch.tensor([6.0, 6.0]))])
    assert scored.of(slice(0, 2)).score.tolist() == [2.5, 6.0]
    assert both.to("cpu", torch.float64).pooled.dtype == torch.float64


def test_the_last_words_state_is_the_one_that_reads_it():
    host, prompts = new_small_host(), ["", "a knife", "a picture of a knife"]
    assert host.last_words(prompts).tolist() == [0, 2, 5]
    knife, spoon = host.encode(["a knife"]).states[0], host.encode(["a spoon"]).states[0]
    assert (knife != spoon).any(-1).nonzero()[0] == 2  # control: before it, the two read alike


def test_a_denoising_stops_where_it_is_told():
    host, noise = new_small_host(), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    asked, empty = host.encode(["a cat", "a dog"]), host.encode([""]).expand(2)
    none, some, whole = (host.denoise(noise, asked, empty, 4, 2.0, until=until) for until in (0, 2, None))
    assert torch.equal(none.latents, noise)
    assert (none.timestep, some.timestep, whole.timestep) == (999, 499, 0)
    assert not torch.equal(some.latents, whole.latents)  # control
