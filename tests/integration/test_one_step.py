"""A patch that draws in one step: its pipeline must be able to, and every call of it must be that step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import Round
from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, Conditioning, UNetHost, Way, draws_in_one_step, generate, one_step_scheduler
from safepatch.errors import ConfigError, MergeError, UnsupportedModel
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.suite import evaluate
from safepatch.merging import MergeRecipe, merge
from safepatch.models.load import ModelConfig
from safepatch.objectives.sfd import SFDConfig
from safepatch.patch.files import from_artifact
from safepatch.patch.host import patched_prediction
from safepatch.runtime.apply import apply
from safepatch.runtime.one_step import one_step, step_of
from safepatch.training.config import PatchConfig, TrainConfig, TrainingConfig
from safepatch.training.gates import add_gate
from safepatch.training.trainer import train
from tests.small import PROMPTS, SEEDS, new_small_pipe, small_artifact


def artifact(timestep: int = 999) -> PatchArtifact:
    """A lora patch, awake, that says it draws in one step."""
    made = small_artifact("lora")
    return replace(made, info=replace(made.info, config={**made.info.config, "one_step": {"timestep": timestep}}))


def drawn(pipe: Any, **more: Any) -> Tensor:
    return generate(pipe, PROMPTS, SEEDS, **{"steps": 1, "guidance_scale": 1.0, **more})


@pytest.mark.parametrize("timestep", [999, 625])
@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_picture_is_the_clean_latents_of_one_patched_prediction(timestep, kind):
    pipe, patch = new_small_pipe(), artifact(timestep)
    pipe.scheduler.register_to_config(prediction_type=kind, rescale_betas_zero_snr=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    host = UNetHost(Components.of(pipe))
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ask: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    with one_step(pipe, patch.info), apply(pipe, patch):
        made = pipe(list(PROMPTS), latents=noise, **ask).images
    times, module = torch.full((2,), timestep), from_artifact(patch, pipe.unet)
    asked = Conditioning(host.encode(PROMPTS).states)
    with torch.no_grad():
        wanted = host.to_x0(noise, times, patched_prediction(host, module, noise, times, asked, asked.states[:1]))
        bare = host.to_x0(noise, times, host.predict(noise, times, asked))
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert not torch.allclose(made, bare, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))  # control


def test_a_scheduler_that_cannot_is_told_in_one_line_and_lent_one_that_can():
    pipe, patch = new_small_pipe(), artifact()
    pipe.scheduler = own = PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(
        ConfigError, match="draws in one step from timestep 999, and this PNDMScheduler does not"
    ) as told:
        apply(pipe, patch)
    assert "\n" not in str(told.value)
    with one_step(pipe, patch.info), apply(pipe, patch):
        made = drawn(pipe)
    assert pipe.scheduler is own
    with one_step(pipe, small_artifact("lora").info):
        assert pipe.scheduler is own  # control: any other patch is at home in any scheduler
    pipe.scheduler = one_step_scheduler(own, 999)
    assert not torch.equal(drawn(pipe), made)  # control: the patch did something


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler
@pytest.mark.parametrize(
    ("kind", "spacing", "can"),
    [
        (DDIMScheduler, "trailing", True),
        (DDIMScheduler, "leading", False),
        (EulerDiscreteScheduler, "trailing", True),
        (LCMScheduler, "trailing", True),
        (PNDMScheduler, "leading", False),
    ],
)
def test_schedulers_are_judged_by_what_they_do(kind, spacing, can):
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    unclipped = {"clip_sample": False} if kind is DDIMScheduler else {}
    scheduler = kind(timestep_spacing=spacing, **schedule, **unclipped)
    assert draws_in_one_step(scheduler, 999) == can
    assert not draws_in_one_step(scheduler, 500)
    assert draws_in_one_step(one_step_scheduler(scheduler, 500), 500)


@pytest.mark.parametrize(
    ("asked", "says"),
    [({"steps": 2}, "set num_inference_steps=1"), ({"guidance_scale": 3.0}, "without guidance; set guidance_scale=1")],
)
def test_any_other_denoising_is_refused_while_the_patch_is_on(asked, says):
    pipe, patch = new_small_pipe(), artifact()
    with one_step(pipe, patch.info):
        with apply(pipe, patch), pytest.raises(ConfigError, match=says):
            drawn(pipe, **asked)
        with apply(pipe, patch, scale=0.0):
            off = drawn(pipe, **asked)
        assert torch.equal(off, drawn(pipe, **asked))


def test_nothing_is_merged_with_it_and_no_gate_keeps_it_off(tmp_path):
    files = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for made, file in zip((artifact(), small_artifact("lora", 1)), files, strict=True):
        made.save(file)
    with pytest.raises(MergeError, match=r"one\.safetensors draws every picture in one step"):
        merge(MergeRecipe(tuple(map(str, files))), tmp_path / "merged.safetensors")
    with pytest.raises(ConfigError, match="no gate may keep it off"):
        add_gate(artifact(), new_small_pipe(), Corpus.open("weapons"))


def test_a_trained_one_says_so_and_is_measured_in_one_step(tmp_path):
    config = TrainConfig(
        model=ModelConfig("small"),
        output=str(tmp_path / "out"),
        patch=PatchConfig(gate=0, rank=4),
        objective=SFDConfig(one_step=True, score_rank=2),
        data=DataConfig(pairs=2, steps=1, cache=str(tmp_path / "cache")),
        training=TrainingConfig(steps=2, batch_size=1, checkpoint_every=1, device="cpu"),
    )
    corpus, pipe = Corpus.open("weapons"), new_small_pipe()
    with pytest.raises(ConfigError, match=r"no gate may keep it off; set patch\.gate=0"):
        train(pipe, replace(config, patch=PatchConfig(gate=32)), corpus)
    patch = PatchArtifact.open(train(pipe, config, corpus))
    assert step_of(patch.info) == 999
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    bench = Bench("small", pipe, None, Protocol(n=1, steps=2, batch_size=1))
    (row,) = evaluate(bench, corpus, patch, "one", ["benign_drift"])
    assert (row.steps, row.guidance_scale) == (1, 1.0)
    assert bench.steps(small_artifact("lora")) == 2  # control
    (prompt,) = corpus.evaluation("plain", 1, 0)
    pictures = Round((prompt,), Way(strength=0.5), (prompt,))
    with pytest.raises(UnsupportedModel, match="starts from noise alone; leave img2img out"):
        bench.batches(pictures, patch, "")
    assert bench.batches(pictures, None, "")  # control
