"""Law 11 at length: every way around a patch that was tried, and what happens. The end of DESIGN lists the same.

A way that is closed raises `PatchBypassed`. A way that is open is tested too: when it closes, DESIGN must change.
"""

import copy
import gc
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, StableDiffusionPipeline
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig

from safepatch.diffusion import quiet
from safepatch.errors import ConfigError, PatchBypassed
from safepatch.patch import PATCH_KINDS
from safepatch.runtime.apply import apply
from safepatch.runtime.check import status
from safepatch.runtime.handle import attached
from tests.small import images, new_artifact, new_small_pipe, new_small_unet, rows, small_artifact
from tests.stress.soak import gated_artifact

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


def clear_pre_hooks(pipe: StableDiffusionPipeline) -> None:
    """Hooks after a module's forward are left."""
    for part in (pipe.unet, pipe.vae):
        for module in part.modules():
            module._forward_pre_hooks.clear()
    images(pipe)


def clear_hooks_after_forward(pipe: StableDiffusionPipeline) -> None:
    for module in pipe.unet.modules():
        module._forward_hooks.clear()
    images(pipe)


def replace_the_first_layer(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.conv_in = copy.deepcopy(new_small_unet().conv_in)
    images(pipe)


CLOSED: dict[str, Callable[[StableDiffusionPipeline], None]] = {
    "a lost hook": lose_the_hook,
    "`unet.forward(...)`, then decoding": call_forward,
    "`unet.forward(...)`, keeping latents": call_forward_and_keep_latents,
    "`unet.forward(...)` and another VAE": call_forward_with_another_vae,
    "another `pipe.unet`": replace_the_unet,
    "another pipeline with the same VAE": share_the_vae_with_another_pipeline,
    "a call that fails half-way, then `unet.forward(...)`": fail_after_the_patch_then_call_forward,
    "AnimateDiff (`UNetMotionModel.from_unet2d`)": animate,
    "clearing the pre-hooks of every module": clear_pre_hooks,
    "clearing the hooks after forward of every module": clear_hooks_after_forward,
    "another `unet.conv_in`": replace_the_first_layer,
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
            module._forward_hooks.clear()
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


# ---- what a patch does is used, counted and told -----------------------------------------------------------------


@every_kind
def test_a_wrapped_forward_that_drops_what_it_does_not_know_loses_no_patch(small_pipe, kind):
    base, forward = images(small_pipe), small_pipe.unet.forward
    with apply(small_pipe, new_artifact(small_pipe.unet, kind)):
        patched = images(small_pipe)
        small_pipe.unet.forward = lambda sample, timestep, encoder_hidden_states, **_: forward(
            sample, timestep, encoder_hidden_states, return_dict=False
        )
        assert torch.equal(images(small_pipe), patched)
    assert not torch.equal(patched, base)  # control


def test_a_forward_that_leaves_the_decoders_skips_out_is_noticed(small_pipe):
    def other_skips(_: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        skips = kwargs["res_hidden_states_tuple"]
        return args, {**kwargs, "res_hidden_states_tuple": tuple(skip[:, :, ::2, ::2] for skip in skips)}

    with apply(small_pipe, new_artifact(small_pipe.unet)):
        hooks = small_pipe.unet.up_blocks[0]._forward_pre_hooks
        before = dict(hooks)
        small_pipe.unet.up_blocks[0].register_forward_pre_hook(other_skips, with_kwargs=True, prepend=True)
        assert len(hooks) == len(before) + 1  # control
        with pytest.raises((PatchBypassed, RuntimeError)):
            images(small_pipe)


def drawn(pipe: StableDiffusionPipeline, steps: int, output_type: str = "pt") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": steps, "height": 64, "width": 64, "output_type": output_type}
    return pipe("a knife", generator=generator, **call).images


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_a_window_into_which_no_step_falls_is_an_error_before_the_image(small_pipe, output_type):
    artifact = new_artifact(small_pipe.unet)
    with apply(small_pipe, artifact, start=0.1):
        with pytest.raises(PatchBypassed, match=r"no step of this denoising is within the patch's window, 0.1 to 1"):
            drawn(small_pipe, 1, output_type)
        drawn(small_pipe, 4, output_type)  # control: some steps are
        with pytest.raises(PatchBypassed, match="no step"):
            drawn(small_pipe, 1, output_type)  # whatever was drawn before
    with apply(small_pipe, artifact, start=0.1, scale=0):
        drawn(small_pipe, 1, output_type)  # one that is off has nothing to miss


def test_without_fail_closed_an_empty_window_is_a_warning(small_pipe):
    with apply(small_pipe, new_artifact(small_pipe.unet), start=0.1, fail_closed=False) as handle:
        with pytest.warns(UserWarning, match="no step of this denoising") as warned:
            drawn(small_pipe, 1)
        assert len([one for one in warned if "no step" in str(one.message)]) == 1
        assert (handle.stats.unet_calls, handle.stats.patched_calls) == (1, 0)


def test_a_weak_img2img_outside_the_window_is_an_error(small_pipe):
    pipe = quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(small_pipe))
    photo = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with apply(pipe, new_artifact(pipe.unet), end=0.5):
        pipe("a knife", image=photo, strength=1.0, num_inference_steps=4, output_type="pt")  # control
        with pytest.raises(PatchBypassed, match="no step"):
            pipe("a knife", image=photo, strength=0.25, num_inference_steps=4, output_type="pt")


def test_a_loop_of_ones_own_outside_the_window_is_an_error_before_the_image(small_pipe):
    sample, _, states = rows()
    with torch.no_grad(), apply(small_pipe, new_artifact(small_pipe.unet), start=0.5):
        for timestep in (100, 400):  # control
            latents = small_pipe.unet(sample, timestep, states).sample
        small_pipe.vae.decode(latents)
        latents = small_pipe.unet(sample, 900, states).sample
        with pytest.raises(PatchBypassed, match="no step"):
            small_pipe.vae.decode(latents)
        small_pipe.vae.decode(latents)  # decoding alone is no denoising


def test_calls_are_counted_as_patched_and_acted_by_what_happened(small_pipe):
    sample, timesteps, states = rows()
    with torch.no_grad(), apply(small_pipe, new_artifact(small_pipe.unet, "lora")) as handle:
        small_pipe.unet(sample, timesteps, states)
        handle.scale = 0
        small_pipe.unet(sample, timesteps, states)
        stats = handle.stats
    assert (stats.unet_calls, stats.patched_calls, stats.acted_calls, stats.acted_rows) == (2, 1, 1, 2)


def lose_a_layer(pipe: StableDiffusionPipeline) -> None:
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer._forward_hooks.clear()


def replace_a_layer(pipe: StableDiffusionPipeline) -> None:
    """As unloading a LoRA does."""
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q = copy.deepcopy(attention.to_q)
    attention.to_q._forward_hooks.clear()


LOSSES: dict[str, Callable[[StableDiffusionPipeline], None]] = {
    "a layer's hook": lose_a_layer,
    "a layer": replace_a_layer,
    "conv_in": lambda pipe: setattr(pipe.unet, "conv_in", new_small_unet().conv_in),
    "every hook after forward": lambda pipe: [module._forward_hooks.clear() for module in pipe.unet.modules()] and None,
    "the VAE's hook": lambda pipe: pipe.vae.decoder._forward_pre_hooks.clear(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_status_looks_at_every_hook(small_pipe, loss):
    with apply(small_pipe, new_artifact(small_pipe.unet, "lora")):
        assert status(small_pipe)[0].active  # control
        LOSSES[loss](small_pipe)
        assert not status(small_pipe)[0].active
        with pytest.raises(PatchBypassed):
            images(small_pipe)


def test_an_attention_that_uses_a_layers_weights_directly_is_named(small_pipe):
    """Functional attention processors never call the layers that a lora patch updates."""

    class Functional:
        def __call__(self, attention, hidden, encoder_hidden_states=None, **_):
            text = hidden if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = (
                torch.nn.functional.linear(given, layer.weight)
                for given, layer in ((hidden, attention.to_q), (text, attention.to_k), (text, attention.to_v))
            )
            weights = (query @ key.transpose(1, 2)).softmax(-1)
            return attention.to_out[1](attention.to_out[0](weights @ value))

    small_pipe.unet.set_attn_processor(Functional())
    images(small_pipe)  # control: the base draws
    with (
        apply(small_pipe, new_artifact(small_pipe.unet, "lora")),
        pytest.raises(PatchBypassed, match=r"attn1.to_k' \(\d+ layers in all\) was not called as a layer"),
    ):
        images(small_pipe)


def test_a_unet_whose_weights_lie_on_disk_is_refused(small_pipe, tmp_path):
    from diffusers.hooks import apply_group_offloading

    options = {"offload_type": "leaf_level", "onload_device": torch.device("cpu")}
    apply_group_offloading(small_pipe.unet, **options, offload_to_disk_path=str(tmp_path))
    with pytest.raises(ConfigError, match="offloaded to disk"):
        apply(small_pipe, new_artifact(new_small_unet()))


def test_a_pipeline_with_a_patch_cannot_be_pickled(small_pipe):
    with apply(small_pipe, new_artifact(small_pipe.unet)), pytest.raises(ConfigError, match="cannot be pickled"):
        pickle.dumps(small_pipe.unet)
    pickle.dumps(small_pipe.unet)  # control


# ---- which rows carry the prompt is decided by the call ----------------------------------------------------------


@every_kind
def test_after_a_guided_image_a_loop_with_the_prompt_first_is_corrected_in_full(small_pipe, kind):
    sample, _, states = rows(1)
    both = torch.cat((states, torch.zeros_like(states)))  # prompt, negative
    base = small_pipe.unet(sample.repeat(2, 1, 1, 1), 500, both).sample.detach()
    with torch.no_grad(), apply(small_pipe, new_artifact(small_pipe.unet, kind)) as handle:
        fresh = small_pipe.unet(sample.repeat(2, 1, 1, 1), 500, both).sample
        images(small_pipe, 4.0)
        before = handle.stats.acted_rows
        assert torch.equal(small_pipe.unet(sample.repeat(2, 1, 1, 1), 500, both).sample, fresh)
        assert handle.stats.acted_rows == before + 2
    assert not torch.equal(fresh[0], base[0])  # control


def test_a_pipeline_that_lays_its_rows_out_otherwise_is_corrected_in_full(small_pipe):
    class PromptFirst(StableDiffusionPipeline):
        """It shares the UNet, is guided, and puts the prompt first."""

        @torch.no_grad()
        def __call__(self, prompt_embeds, negative_prompt_embeds):
            self._guidance_scale = 4.0
            latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))[:1].repeat(2, 1, 1, 1)
            both = torch.cat((prompt_embeds, negative_prompt_embeds))
            return self.unet(latents, 500, encoder_hidden_states=both).sample

    class NegativeFirst(PromptFirst):
        def __call__(self, prompt_embeds, negative_prompt_embeds):
            self._guidance_scale = 4.0
            latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))[:1].repeat(2, 1, 1, 1)
            both = torch.cat((negative_prompt_embeds, prompt_embeds))
            with torch.no_grad():
                return self.unet(latents, 500, encoder_hidden_states=both).sample

    states = rows(2)[2]
    acted = []
    for kind in (PromptFirst, NegativeFirst):
        pipe = quiet(kind(**small_pipe.components, requires_safety_checker=False))
        with apply(small_pipe, new_artifact(small_pipe.unet)) as handle:
            images(small_pipe, 4.0)
            before = handle.stats.acted_rows
            pipe(states[:1], states[1:])
            acted.append(handle.stats.acted_rows - before)
    assert acted == [2, 1]  # control: where the layout is known, the negative row is left alone


def test_equal_latents_in_an_unguided_batch_are_all_corrected(small_pipe):
    call = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "pt"}
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    embeds, _ = small_pipe.encode_prompt(["a knife"], "cpu", 1, False)
    with apply(small_pipe, new_artifact(small_pipe.unet)) as handle:
        images(small_pipe, 4.0)
        before = handle.stats.acted_rows
        small_pipe(
            prompt_embeds=embeds.repeat(2, 1, 1), negative_prompt_embeds=embeds.repeat(2, 1, 1), latents=latents,
            guidance_scale=1.0, **call,
        )  # fmt: skip
        assert handle.stats.acted_rows == before + 2


def test_states_that_are_written_into_between_steps_are_looked_at_again(small_pipe):
    """A callback may turn a denoising's states round in place; which rows are the negative prompt's is asked anew."""
    acted = []

    def swap(_: object, index: int, __: object, kwargs: dict) -> dict:
        acted.append(handle.stats.acted_rows)
        if index == 0:
            kwargs["prompt_embeds"].copy_(kwargs["prompt_embeds"].flip(0))
        return kwargs

    with apply(small_pipe, new_artifact(small_pipe.unet)) as handle:
        small_pipe(
            "a knife", num_inference_steps=3, height=64, width=64, output_type="latent", guidance_scale=4.0,
            callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )  # fmt: skip
    assert [b - a for a, b in zip([0, *acted], acted, strict=False)] == [1, 2, 2]


def with_lora(pipe: StableDiffusionPipeline, *layers: str) -> None:
    """Somebody's LoRA, by PEFT, awake."""
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=list(layers)))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))


@every_kind
def test_a_lora_that_is_unloaded_under_a_patch_takes_no_hook_with_it_unnoticed(small_pipe, kind):
    artifact = new_artifact(small_pipe.unet, kind)
    with_lora(small_pipe, "to_q")
    with apply(small_pipe, artifact):
        images(small_pipe)
        assert status(small_pipe)[0].active  # control
        recurse_remove_peft_layers(small_pipe.unet)
        is_active, drawn = status(small_pipe)[0].active, None
        if is_active:
            drawn = images(small_pipe)
        else:
            with pytest.raises(PatchBypassed):
                images(small_pipe)
    base = images(small_pipe)
    assert drawn is None or not torch.equal(drawn, base)


@every_kind
def test_a_lora_on_the_first_layer_is_no_hindrance(small_pipe, kind):
    artifact = new_artifact(small_pipe.unet, kind)
    with_lora(small_pipe, "conv_in")
    base = images(small_pipe)
    with apply(small_pipe, artifact) as handle:
        assert not torch.equal(images(small_pipe), base)
        assert handle.is_active
    assert torch.equal(images(small_pipe), base)


def test_a_preview_before_the_window_begins_is_no_missed_window(small_pipe):
    """User interfaces decode latents while they are drawn."""

    def preview(pipe: StableDiffusionPipeline, _: int, __: int, kwargs: dict) -> dict:
        pipe.vae.decode(kwargs["latents"])
        return kwargs

    with apply(small_pipe, new_artifact(small_pipe.unet), start=0.6) as handle:
        small_pipe(
            "a knife", num_inference_steps=4, height=64, width=64, output_type="pt", callback_on_step_end=preview
        )
        assert handle.stats.acted_calls == 1


# ---- what gates go by is what the UNet reads -----------------------------------------------------------------------


@every_kind
def test_a_gate_hears_what_is_written_into_a_buffer_under_inference_mode(small_pipe, kind):
    """There nobody counts what is written into a tensor; a loop of one's own may keep one for all prompts."""
    sample, _, states = rows(1)
    with apply(small_pipe, gated_artifact(small_pipe, kind)) as handle, torch.inference_mode():
        judged: list[float] = []
        handle.on_gate = lambda _, probabilities: judged.append(float(probabilities.max()))
        buffer = states.clone()
        small_pipe.unet(sample, 500, buffer)
        small_pipe.unet(sample, 500, buffer)
        again = len(judged)
        buffer.copy_(-2 * states)
        small_pipe.unet(sample, 500, buffer)
    assert len(judged) == again + 1
    assert judged[-1] != judged[0]
    assert len(set(judged[:again])) == 1  # control: of the same words it thinks the same


@every_kind
def test_a_forward_that_reads_other_words_than_the_gate_is_noticed(small_pipe, kind):
    sample, timesteps, states = rows()
    forward, others = small_pipe.unet.forward, {"encoder_hidden_states": states.flip(0)}
    for artifact, is_noticed in (
        (gated_artifact(small_pipe, kind), True),
        (new_artifact(small_pipe.unet, kind), False),
    ):
        with torch.no_grad(), apply(small_pipe, artifact) as handle:
            small_pipe.unet(sample, timesteps, encoder_hidden_states=states)  # control
            small_pipe.unet.forward = lambda *args, **given: forward(*args, **{**given, **others})
            if is_noticed:
                with pytest.raises(PatchBypassed, match="'encoder_hidden_states' was exchanged on the way"):
                    small_pipe.unet(sample, timesteps, encoder_hidden_states=states)
                handle.gate = "off"
            small_pipe.unet(sample, timesteps, encoder_hidden_states=states)  # what reads no words is not concerned
            del small_pipe.unet.forward


# ---- status is of the pipeline that was asked about ----------------------------------------------------------------


def test_a_patch_that_another_pipeline_carries_is_not_active_in_one_with_the_same_vae(small_pipe):
    other = sharing(small_pipe, unet=new_small_unet())
    second = replace(
        small_artifact(), info=replace(small_artifact().info, instructions={"drugs": "no drugs"}, title="")
    )
    with apply(small_pipe, new_artifact(small_pipe.unet)), apply(other, second):
        told = [{found.categories: found.active for found in status(pipe)} for pipe in (small_pipe, other)]
    assert told[0][("weapons",)]  # control
    assert not told[1][("weapons",)]
    assert told[1][("drugs",)]
    assert not told[0][("drugs",)]


def test_a_patch_is_active_in_a_pipeline_that_outlives_the_one_it_was_made_of(small_pipe):
    pipe = new_small_pipe()
    base = images(pipe)
    apply(pipe, new_artifact(pipe.unet))
    other = quiet(StableDiffusionPipeline.from_pipe(pipe))
    del pipe
    gc.collect()
    (found,) = status(other)
    assert found.handle._attachment.pipe is None  # control
    assert found.active
    assert not torch.equal(images(other), base)
    other.unet._forward_pre_hooks.clear()
    assert not status(other)[0].active
