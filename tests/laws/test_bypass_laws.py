"""Law 11 at length: every way around a patch that was tried, and what happens. The end of DESIGN lists the same.

A way that is closed raises `PatchBypassed`. A way that is open is tested too: when it closes, DESIGN must change.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, StableDiffusionPipeline

from safepatch.diffusion import quiet
from safepatch.errors import ConfigError, PatchBypassed
from safepatch.patch import PATCH_KINDS
from safepatch.runtime.apply import apply
from safepatch.runtime.check import status
from safepatch.runtime.handle import attached
from tests.small import images, new_artifact, new_small_pipe, new_small_unet, rows

DESIGN = (Path(__file__).parents[2] / "DESIGN.md").read_text()


def forward(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """The UNet's prediction without its hooks."""
    sample, timesteps, states = rows()
    return pipe.unet.forward(sample, timesteps, states).sample


def sharing(pipe: StableDiffusionPipeline, **parts: object) -> StableDiffusionPipeline:
    """Another pipeline of the same components but for `parts`."""
    return quiet(StableDiffusionPipeline(**{**pipe.components, **parts}, requires_safety_checker=False))


def lose_the_hook(pipe: StableDiffusionPipeline) -> None:
    pipe.unet._forward_pre_hooks.clear()
    images(pipe)


def call_forward(pipe: StableDiffusionPipeline) -> None:
    pipe.vae.decode(forward(pipe))


def call_forward_and_keep_latents(pipe: StableDiffusionPipeline) -> None:
    forward(pipe)


def call_forward_with_another_vae(pipe: StableDiffusionPipeline) -> None:
    pipe.vae = new_small_pipe().vae
    pipe.vae.decode(forward(pipe))


def replace_the_unet(pipe: StableDiffusionPipeline) -> None:
    pipe.unet = new_small_unet()
    images(pipe)


def share_the_vae_with_another_pipeline(pipe: StableDiffusionPipeline) -> None:
    images(sharing(pipe, unet=new_small_unet()))


def fail_after_the_patch_then_call_forward(pipe: StableDiffusionPipeline) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    hook = pipe.unet.time_embedding.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        images(pipe)
    hook.remove()
    forward(pipe)


def animate(pipe: StableDiffusionPipeline) -> None:
    """`UNetMotionModel.from_unet2d` copies the weights and no hook."""
    adapter = MotionAdapter(
        block_out_channels=(16, 32, 32),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
    )
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    other = quiet(AnimateDiffPipeline(**parts, motion_adapter=adapter, scheduler=DDIMScheduler()))
    other("a knife", num_frames=2, num_inference_steps=1, height=64, width=64, output_type="pt")


CLOSED: dict[str, Callable[[StableDiffusionPipeline], None]] = {
    "a lost hook": lose_the_hook,
    "`unet.forward(...)`, then decoding": call_forward,
    "`unet.forward(...)`, keeping latents": call_forward_and_keep_latents,
    "`unet.forward(...)` and another VAE": call_forward_with_another_vae,
    "another `pipe.unet`": replace_the_unet,
    "another pipeline with the same VAE": share_the_vae_with_another_pipeline,
    "a call that fails half-way, then `unet.forward(...)`": fail_after_the_patch_then_call_forward,
    "AnimateDiff (`UNetMotionModel.from_unet2d`)": animate,
}


def remove_it(pipe: StableDiffusionPipeline) -> None:
    for found in status(pipe):
        found.handle.remove()
    images(pipe)


def set_its_scale_to_zero(pipe: StableDiffusionPipeline) -> None:
    status(pipe)[0].handle.scale = 0
    images(pipe)


def clear_every_hook(pipe: StableDiffusionPipeline) -> None:
    for part in (pipe.unet, pipe.vae):
        for module in part.modules():
            module._forward_pre_hooks.clear()
    images(pipe)


def replace_unet_and_keep_latents(pipe: StableDiffusionPipeline) -> None:
    pipe.unet = new_small_unet()
    pipe("a knife", num_inference_steps=1, height=64, width=64, output_type="latent")


def save_and_load(pipe: StableDiffusionPipeline, folder: Path) -> None:
    pipe.save_pretrained(folder)
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    assert status(loaded) == ()  # what a host can ask
    images(quiet(loaded))


OPEN: dict[str, Callable[..., None]] = {
    "`handle.remove()`": remove_it,
    "`handle.scale = 0`": set_its_scale_to_zero,
    "clearing the hooks of every module": clear_every_hook,
    "another `pipe.unet`, keeping latents": replace_unet_and_keep_latents,
    "`save_pretrained` and loading again": save_and_load,
}

every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))


@every_kind
@pytest.mark.parametrize("way", CLOSED)
def test_a_closed_way_around_a_patch_raises(small_pipe, kind, way):
    with torch.no_grad(), apply(small_pipe, new_artifact(small_pipe.unet, kind)):
        with pytest.raises(PatchBypassed) as caught:
            CLOSED[way](small_pipe)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", CLOSED)
def test_control_without_fail_closed_the_way_is_open(small_pipe, way):
    with torch.no_grad(), apply(small_pipe, new_artifact(small_pipe.unet), fail_closed=False):
        CLOSED[way](small_pipe)


@pytest.mark.parametrize("way", OPEN)
def test_an_open_way_is_open(small_pipe, way, tmp_path):
    apply(small_pipe, new_artifact(small_pipe.unet))
    OPEN[way](small_pipe, *([tmp_path] if way.startswith("`save") else []))


@pytest.mark.parametrize(("ways", "answer"), [(CLOSED, "`PatchBypassed`"), (OPEN, "an image")])
def test_the_list_in_design_has_every_way(ways, answer):
    for way in ways:
        (line,) = [line for line in DESIGN.splitlines() if line.startswith(f"| {way} |")]
        assert answer in line


def test_two_pipelines_with_one_vae_may_each_carry_a_patch(small_pipe):
    """SDXL's refiner usually borrows the base's VAE."""
    other = sharing(small_pipe, unet=new_small_unet())
    with apply(small_pipe, new_artifact(small_pipe.unet)):
        with pytest.raises(PatchBypassed, match="its UNet carries no patch"):
            images(other)  # control
        with apply(other, new_artifact(other.unet)):
            images(other)
            images(small_pipe)


def test_a_copied_unet_keeps_its_patch(small_pipe):
    base = images(small_pipe)
    with apply(small_pipe, new_artifact(small_pipe.unet)):
        patched = images(small_pipe)
        other = new_small_pipe(copy.deepcopy(small_pipe.unet))
        assert torch.equal(images(other), patched)
        assert len(attached(other.unet)) == 1
    assert not torch.equal(patched, base)  # control


def test_status_shows_what_is_attached_and_what_was_lost(small_pipe):
    assert status(small_pipe) == ()
    with apply(small_pipe, new_artifact(small_pipe.unet), scale=0.5) as handle:
        (found,) = status(small_pipe)
        assert (found.categories, found.active, found.scale, found.handle) == (("weapons",), True, 0.5, handle)
        images(small_pipe)
        assert status(small_pipe)[0].stats.patched_calls == 1  # one step
        small_pipe.unet._forward_pre_hooks.clear()
        assert not status(small_pipe)[0].active
        assert not handle.is_active
    assert status(small_pipe) == ()


def test_status_of_a_pipeline_from_another_shows_the_same_patch(small_pipe):
    with apply(small_pipe, new_artifact(small_pipe.unet)) as handle:
        other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(small_pipe)
        assert [found.handle for found in status(other)] == [handle]


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(small_pipe, scale):
    with pytest.raises(ConfigError, match="scale must be 0"):
        apply(small_pipe, new_artifact(small_pipe.unet), scale=scale)
