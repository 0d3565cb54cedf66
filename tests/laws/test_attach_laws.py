"""Laws 1, 2 and 11, for every patch kind: off means off, removed means gone, bypassed means no image.

Beside them the rules of attaching: what stacks, which rows are corrected, and which pipelines it works in.
"""

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from diffusers import (
    ControlNetModel,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from torch import Tensor, nn

from safepatch.artifact.info import BUNDLE
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import quiet
from safepatch.errors import ConfigError, PatchBypassed, UnknownName
from safepatch.merging import MergeRecipe, combine
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from safepatch.runtime.apply import apply, attach
from safepatch.runtime.handle import Handle
from safepatch.runtime.stats import Stats
from tests.families import small_transformer_pipe
from tests.small import (
    DOWN,
    INSTRUCTION,
    MID,
    PROMPTS,
    RESIDUAL_KINDS,
    SEEDS,
    awaken,
    features_of,
    images,
    new_artifact,
    new_patch,
    new_small_pipe,
    new_small_unet,
    rows,
    same_residuals,
    small_artifact,
    spied,
)

every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
every_residual_kind = pytest.mark.parametrize("kind", RESIDUAL_KINDS)
HOOK_TABLES = [f"_forward{pre}_hooks{suffix}" for pre in ("", "_pre") for suffix in ("", "_with_kwargs")]
PHOTO = Image.new("RGB", (64, 64), "orange")


def hook_count(pipe: StableDiffusionPipeline) -> int:
    """Entries in any hook table of any module of the pipeline."""
    modules = [module for part in (pipe.unet, pipe.vae, pipe.text_encoder) for module in part.modules()]
    return sum(
        len(getattr(module, table)) for module in modules for table in (*HOOK_TABLES, "_forward_hooks_always_called")
    )


def weights(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def call(pipe: StableDiffusionPipeline, **kwargs: object) -> dict:
    """What reached the UNet, and its output, in one direct call on two random rows."""
    sample, timesteps, states = rows()
    with spied(pipe.unet) as calls:
        pipe.unet(sample, timesteps, encoder_hidden_states=states, **kwargs)
    return calls[0]


def given(seen: dict) -> tuple[tuple[Tensor, ...], Tensor]:
    """The residuals of one spied call."""
    return seen[DOWN], seen[MID]


def plus(*residuals: tuple[tuple[Tensor, ...], Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    return tuple(sum(parts) for parts in zip(*(down for down, _ in residuals), strict=True)), sum(
        mid for _, mid in residuals
    )


def each(residuals: tuple[tuple[Tensor, ...], Tensor]) -> tuple[Tensor, ...]:
    return (*residuals[0], residuals[1])


# ---- law 1: off is off -----------------------------------------------------------------------------------------


def zero(artifact: PatchArtifact) -> PatchArtifact:
    return replace(artifact, tensors={name: torch.zeros_like(tensor) for name, tensor in artifact.tensors.items()})


SILENT: dict[str, Callable[[StableDiffusionPipeline, str], Handle]] = {
    "scale 0": lambda pipe, kind: apply(pipe, small_artifact(kind), scale=0),
    "a zero artifact": lambda pipe, kind: apply(pipe, zero(small_artifact(kind))),
    "a fresh patch": lambda pipe, kind: attach(pipe, new_patch(pipe.unet, kind, seed=None), [INSTRUCTION]),
    "a fresh artifact": lambda pipe, kind: apply(pipe, small_artifact(kind, seed=None)),
}


@every_kind
@pytest.mark.parametrize("silent", sorted(SILENT))
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_silent_patch_changes_no_bit(small_pipe, kind, silent, guidance_scale):
    base = images(small_pipe, guidance_scale)
    with SILENT[silent](small_pipe, kind) as handle:
        assert torch.equal(images(small_pipe, guidance_scale), base)
    assert handle.stats.unet_calls == 1
    assert handle.stats.patched_calls == (silent != "scale 0")  # control: it was asked, and was silent
    with apply(small_pipe, small_artifact(kind)):
        assert not torch.equal(images(small_pipe, guidance_scale), base)  # control: an awake patch is not


@every_kind
def test_attaching_draws_nothing_from_the_global_generator(small_pipe, kind):
    """Whoever seeds globally gets the same starting noise with a patch as without."""
    artifact = small_artifact(kind)
    before = torch.get_rng_state()
    with apply(small_pipe, artifact):
        images(small_pipe)
    assert torch.equal(torch.get_rng_state(), before)


@every_kind
def test_scale_can_be_changed_between_calls(small_pipe, kind):
    base = images(small_pipe)
    with apply(small_pipe, small_artifact(kind), scale=0.5) as handle:
        half = images(small_pipe)
        handle.scale = 1.0
        whole = images(small_pipe)
        handle.scale = 0
        off = images(small_pipe)
        handle.scale = 0.5
        again = images(small_pipe)
    assert torch.equal(off, base)
    assert torch.equal(again, half)
    assert not torch.equal(half, base)  # control
    assert not torch.equal(half, whole)


@every_residual_kind
def test_scale_multiplies_the_residuals(small_pipe, kind):
    with apply(small_pipe, small_artifact(kind)) as handle:
        whole = given(call(small_pipe))
        handle.scale = 0.5
        half = given(call(small_pipe))
    assert same_residuals(plus(half, half), whole)


@pytest.mark.parametrize("scale", [-1, float("nan"), float("inf"), {"weapons": -1}])
def test_a_scale_out_of_range_is_refused(small_pipe, scale):
    with pytest.raises(ConfigError, match="scale must be 0"):
        apply(small_pipe, small_artifact(), scale=scale)
    assert hook_count(small_pipe) == 0


def bundle_of_two(kind: str) -> tuple[PatchArtifact, PatchArtifact, PatchArtifact]:
    """A patch for weapons, one for gore, and the bundle of both."""
    weapons, gore = small_artifact(kind, 1), small_artifact(kind, 2)
    gore = replace(gore, info=replace(gore.info, instructions={"gore": "no gore, show flowers instead"}))
    return weapons, gore, combine([weapons, gore], MergeRecipe(["weapons", "gore"], method=BUNDLE))


@every_residual_kind
def test_each_category_of_a_bundle_has_a_scale_of_its_own(small_pipe, kind):
    weapons, _, both = bundle_of_two(kind)
    with apply(small_pipe, weapons, scale=0.5):
        alone = given(call(small_pipe))
    with apply(small_pipe, both, scale={"weapons": 0.5, "gore": 0}) as handle:
        assert same_residuals(given(call(small_pipe)), alone)
        handle.scale = {"weapons": 0.5}  # what is not named stays at 1
        assert not same_residuals(given(call(small_pipe)), alone)  # control
        handle.scale = {"weapons": 0, "gore": 0}
        assert DOWN not in call(small_pipe)


def test_a_category_the_patch_is_not_for_is_refused_as_a_scale(small_pipe):
    with pytest.raises(UnknownName, match=r"category of this patch.*did you mean 'weapons'"):
        apply(small_pipe, small_artifact(), scale={"weapon": 0.5})
    assert hook_count(small_pipe) == 0


def test_categories_merged_into_one_share_a_scale(small_pipe):
    merged = small_artifact()
    merged = replace(merged, info=replace(merged.info, instructions={"gore": INSTRUCTION, "weapons": INSTRUCTION}))
    with pytest.raises(ConfigError, match="gore, weapons were merged into one"):
        apply(small_pipe, merged, scale={"weapons": 0.5})
    assert hook_count(small_pipe) == 0
    apply(small_pipe, merged, scale={"weapons": 0.5, "gore": 0.5}).remove()  # control


@every_residual_kind
def test_a_patch_acts_within_its_window_only(small_pipe, kind):
    sample, _, states = rows()
    with torch.no_grad(), apply(small_pipe, small_artifact(kind), start=0.2, end=0.6), spied(small_pipe.unet) as calls:
        for timestep in (999, 790, 600, 410, 390, 0):
            small_pipe.unet(sample, timestep, encoder_hidden_states=states)
    assert [DOWN in seen for seen in calls] == [False, True, True, True, False, False]


@pytest.mark.parametrize("window", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.8, 0.2)])
def test_a_window_that_is_none_is_refused(small_pipe, window):
    with pytest.raises(ConfigError, match="0 <= start < end <= 1"):
        apply(small_pipe, small_artifact(), start=window[0], end=window[1])
    assert hook_count(small_pipe) == 0


# ---- speed: an answer that is used twice ------------------------------------------------------------------------


def runs_at(pipe, timesteps: list[int], kind: str = "control", **options) -> list[int]:
    """Which of the UNet calls at `timesteps` the patch itself ran in, by index."""
    sample, _, states = rows()
    ran: list[int] = []
    with torch.no_grad(), apply(pipe, small_artifact(kind), **options) as handle:
        handle._attachment.corrector.parts[0].patch.register_forward_pre_hook(
            lambda *_: ran.append(handle.stats.unet_calls)
        )
        for timestep in timesteps:
            pipe.unet(sample, timestep, encoder_hidden_states=states)
        assert handle.stats.patched_calls == len(timesteps)  # an answer used again counts as the patch's say
    late = kind == "lite"  # which runs after the call was counted
    return [index - late for index in ran]


def test_a_fast_patch_runs_at_every_second_step_of_each_denoising(small_pipe):
    steps = [900, 700, 500, 300, 100, 900, 700]
    assert runs_at(small_pipe, steps) == [0, 1, 2, 3, 4, 5, 6]  # control
    assert runs_at(small_pipe, steps, speed="fast") == [0, 2, 4, 5]  # the second denoising begins anew
    assert runs_at(small_pipe, steps, "lite", speed="fast") == [0, 1, 2, 3, 4, 5, 6]  # costs next to nothing


def test_a_fast_patch_gives_the_step_between_the_answer_of_the_step_before(small_pipe):
    sample, _, states = rows()
    with torch.no_grad(), apply(small_pipe, small_artifact(), speed="fast") as handle, spied(small_pipe.unet) as calls:
        for timestep in (900, 700, 500):
            small_pipe.unet(sample, timestep, encoder_hidden_states=states)
        handle.scale = 0.5
        small_pipe.unet(sample, 400, encoder_hidden_states=states)
        small_pipe.unet(sample, 300, encoder_hidden_states=states.flip(0))
    first, second, third, halved, other = (seen[MID] for seen in calls)
    assert torch.equal(first, second)
    assert not torch.equal(second, third)  # control: the timestep matters
    assert not torch.equal(third, halved)  # a changed scale is obeyed at once
    assert not torch.equal(halved, other)  # and so is another prompt


def test_a_pipeline_that_works_tile_by_tile_is_never_given_another_tiles_residuals(small_pipe):
    tiles = [900, 900, 700, 700, 500, 500]
    assert runs_at(small_pipe, tiles, speed="fast") == [0, 1, 2, 3, 4, 5]
    assert runs_at(small_pipe, [*tiles, 900, 700], speed="fast") == [0, 1, 2, 3, 4, 5, 6]  # untiled again


def test_a_step_that_a_scheduler_goes_over_twice_makes_no_tiles_of_the_rest(small_pipe):
    small_pipe.scheduler = PNDMScheduler.from_config(small_pipe.scheduler.config, skip_prk_steps=True)
    small_pipe.scheduler.set_timesteps(6)  # Stable Diffusion 1's own scheduler
    steps = small_pipe.scheduler.timesteps.tolist()
    assert steps[1] == steps[2]
    assert len(set(steps)) == 6  # control: all others come once
    assert runs_at(small_pipe, steps, speed="fast") == [0, 2, 3, 5]


def test_a_fast_patch_holds_nothing_once_it_is_off_and_can_be_copied(small_pipe):
    handle = apply(small_pipe, small_artifact(), speed="fast")
    patched = images(small_pipe)
    assert handle._attachment.corrector._memory.now.residuals  # control
    with apply(small_pipe, small_artifact(seed=1), speed="fast"):
        images(copy.deepcopy(small_pipe))
    assert torch.equal(images(small_pipe), patched)
    handle.remove()
    assert not handle._attachment.corrector._memory.now.residuals


def test_an_unknown_speed_is_refused(small_pipe):
    with pytest.raises(UnknownName, match="did you mean 'fast'"):
        apply(small_pipe, small_artifact(), speed="fastt")
    assert hook_count(small_pipe) == 0


NOT_TO_BE_SET = {"scale": -1.0, "start": 1.0, "gate": "tight", "speed": "slow", "reads": "minds"}


@pytest.mark.parametrize("what", NOT_TO_BE_SET)
def test_a_patch_that_is_refused_leaves_no_hook_on_text_encoders(small_pipe, what):
    listening = listening_artifact(small_pipe)
    with apply(small_pipe, listening):
        assert small_pipe.text_encoder._forward_hooks  # control
    with pytest.raises((ConfigError, UnknownName)):
        apply(small_pipe, listening, **{what: NOT_TO_BE_SET[what]})
    assert hook_count(small_pipe) == 0


def listening_artifact(pipe) -> PatchArtifact:
    """A patch whose gate reads windows, and so listens to text encoders."""
    patch = new_patch(pipe.unet, "lora")
    patch.add_gate(pipe.unet, 2)
    made = to_artifact(awaken(patch), pipe.unet, {"weapons": INSTRUCTION})
    gate = {"weapons": {"threshold": 0.5, "windows": 2}}
    return replace(made, info=replace(made.info, config={**made.info.config, "gate": gate}))


@pytest.mark.parametrize("host", ["unet", "transformer"])
def test_of_quantized_weights_a_control_patch_makes_no_clone(small_pipe, host):
    pipe = small_pipe if host == "unet" else small_transformer_pipe("sd3")
    artifacts = {kind: new_artifact(getattr(pipe, host), kind) for kind in PATCH_KINDS}
    layer = next(module for name, module in getattr(pipe, host).named_modules() if name.endswith(".to_q"))
    layer.weight = nn.Parameter(torch.zeros(*layer.weight.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match=rf"the (UNet|{host})'s weights are quantized.*use a lora or lite patch"):
        apply(pipe, artifacts["control"])
    for kind in ("lite", "lora"):
        apply(pipe, artifacts[kind]).remove()  # control: they stand beside the weights


def test_a_unet_without_its_weights_is_refused(small_pipe):
    apply(small_pipe, small_artifact()).remove()  # control
    before = hook_count(small_pipe)
    small_pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ConfigError, match=r"offloaded layer by layer.*use enable_model_cpu_offload"):
        apply(small_pipe, small_artifact())
    assert hook_count(small_pipe) == before


@pytest.mark.parametrize("in_place", [True, False])
def test_a_unet_that_was_compiled_before_is_refused(small_pipe, in_place):
    """Code that was traced without hooks may go on without them, and nothing would notice."""
    apply(small_pipe, small_artifact()).remove()  # control
    if in_place:
        small_pipe.unet.compile(backend="eager")
    else:
        small_pipe.unet = torch.compile(small_pipe.unet, backend="eager")
    with pytest.raises(ConfigError, match="apply the patch to the pipeline first, then compile"):
        apply(small_pipe, small_artifact())
    assert hook_count(small_pipe) == 0


# ---- law 2: removed is gone ------------------------------------------------------------------------------------


@every_kind
def test_removing_restores_every_bit_and_leaves_no_hook(small_pipe, kind):
    base, before = images(small_pipe), weights(small_pipe)
    handle = apply(small_pipe, small_artifact(kind))
    assert not torch.equal(images(small_pipe), base)  # control
    assert hook_count(small_pipe) > 0  # control
    assert small_pipe.unet.state_dict().keys() == before.keys()  # also while attached
    handle.remove()
    handle.remove()  # twice is harmless
    assert torch.equal(images(small_pipe), base)
    assert same_weights(weights(small_pipe), before)
    assert hook_count(small_pipe) == 0


@every_kind
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_several_patches_come_off_in_any_order(small_pipe, kind, order):
    base, before = call(small_pipe)["output"], weights(small_pipe)
    artifacts = [small_artifact(kind, seed) for seed in range(3)]
    with apply(small_pipe, artifacts[order[2]]):
        alone = call(small_pipe)["output"]
    assert not torch.equal(alone, base)  # control
    handles = [apply(small_pipe, artifact) for artifact in artifacts]
    for index in order[:2]:
        handles[index].remove()
    assert torch.equal(call(small_pipe)["output"], alone)  # the one left acts as if it had always been alone
    handles[order[2]].remove()
    assert torch.equal(call(small_pipe)["output"], base)
    assert same_weights(weights(small_pipe), before)
    assert hook_count(small_pipe) == 0


@every_kind
def test_a_body_that_raises_is_left_clean(small_pipe, kind):
    def body() -> None:
        with apply(small_pipe, small_artifact(kind)):
            assert not torch.equal(images(small_pipe), base)  # control
            raise ZeroDivisionError

    base = images(small_pipe)
    with pytest.raises(ZeroDivisionError):
        body()
    assert torch.equal(images(small_pipe), base)
    assert hook_count(small_pipe) == 0


def test_hooks_of_others_stay(small_pipe):
    seen = []
    own = small_pipe.unet.register_forward_pre_hook(lambda *_: seen.append(1))
    with apply(small_pipe, small_artifact()):
        assert hook_count(small_pipe) > 1  # control
    assert hook_count(small_pipe) == 1
    call(small_pipe)
    assert seen
    own.remove()


def test_a_mismatched_patch_leaves_no_hook(small_pipe):
    other = new_artifact(new_small_unet(layers_per_block=2))
    with pytest.raises(Exception, match="this patch is for") as caught:
        apply(small_pipe, other)
    assert "\n" not in str(caught.value)
    assert hook_count(small_pipe) == 0


def test_is_active_says_whether_the_patch_still_hangs_on_the_pipeline(small_pipe):
    handle = apply(small_pipe, small_artifact())
    assert handle.is_active
    unet, small_pipe.unet = small_pipe.unet, new_small_unet()
    assert not handle.is_active
    small_pipe.unet = unet
    assert handle.is_active
    handle.remove()
    assert not handle.is_active


def test_a_patch_does_not_keep_the_pipeline_alive():
    pipe = new_small_pipe()
    handle = apply(pipe, small_artifact())
    del pipe
    gc.collect()
    assert handle._attachment.pipe is None
    assert not handle.is_active
    handle.remove()


# ---- stacking --------------------------------------------------------------------------------------------------


@every_residual_kind
def test_two_patches_add_up(small_pipe, kind):
    artifacts = [small_artifact(kind, seed) for seed in (1, 2)]
    alone = []
    for artifact in artifacts:
        with apply(small_pipe, artifact):
            alone.append(given(call(small_pipe)))
    with apply(small_pipe, artifacts[0]), apply(small_pipe, artifacts[1]):
        both = given(call(small_pipe))
    assert same_residuals(both, plus(*alone))
    assert not same_residuals(*alone)  # control


@every_residual_kind
def test_a_bundle_is_its_parts_applied_together_each_with_its_own_instruction_and_weight(small_pipe, kind):
    first, second = (new_artifact(small_pipe.unet, kind, seed) for seed in (1, 2))
    second = replace(second, info=replace(second.info, instructions={"gore": "no gore, show flowers instead"}))
    alone = []
    for artifact, scale in ((first, 1.0), (second, 0.5)):
        with apply(small_pipe, artifact, scale):
            alone.append(given(call(small_pipe)))
    bundle = combine([first, second], MergeRecipe(("first", "second"), (1.0, 0.5), BUNDLE))
    with apply(small_pipe, bundle) as handle:
        together = given(call(small_pipe))
        assert handle.stats == Stats(unet_calls=1, patched_calls=1, acted_calls=1, acted_rows=2)
        images(small_pipe)  # the fail-closed check counts a bundle as one patch
    assert same_residuals(together, plus(*alone))
    mixed = combine([first, second], MergeRecipe(("first", "second"), (0.5, 1.0), BUNDLE))
    with apply(small_pipe, mixed):
        assert not same_residuals(given(call(small_pipe)), together)  # control: weights count
    sums = combine([first, second], MergeRecipe(("first", "second"), (1.0, 0.5), "task-arithmetic"))
    with apply(small_pipe, sums):
        assert not same_residuals(given(call(small_pipe)), together)  # control: a sum of weights is something else
    assert hook_count(small_pipe) == 0


@every_residual_kind
def test_a_patch_attached_over_another_copies_none_of_its_hooks(small_pipe, kind):
    with apply(small_pipe, small_artifact(kind, seed=1)) as first:
        assert hook_count(small_pipe) > 0  # control: there are hooks to copy
        second = PATCH_KINDS[kind].from_unet(small_pipe.unet, "instruction")
        assert not [m for m in second.modules() for table in HOOK_TABLES if getattr(m, table)]
        calls = first.stats.unet_calls
        second(*rows(), torch.randn(1, 5, 192), features=features_of(new_small_unet(), *rows()))
        assert first.stats.unet_calls == calls
    assert hook_count(small_pipe) == 0


def test_residuals_already_there_are_added_to(small_pipe):
    with apply(small_pipe, small_artifact()) as handle:
        own = given(call(small_pipe))
        handle.scale = 0
        others = (tuple(torch.randn_like(r) for r in own[0]), torch.randn_like(own[1]))
        untouched = call(small_pipe, **{DOWN: others[0], MID: others[1]})
        handle.scale = 1
        summed = call(small_pipe, **{DOWN: list(others[0]), MID: others[1]})
    assert same_residuals(given(untouched), others)  # control
    assert same_residuals(given(summed), plus(others, own))
    assert not torch.equal(summed["output"], untouched["output"])


# ---- which rows are corrected ----------------------------------------------------------------------------------


@every_residual_kind
@pytest.mark.parametrize("negative", [None, "a knife"])
def test_under_guidance_the_negative_rows_are_the_bases(small_pipe, kind, negative):
    with spied(small_pipe.unet) as base:
        images(small_pipe, 4.0, negative)
    with apply(small_pipe, small_artifact(kind)), spied(small_pipe.unet) as patched:
        images(small_pipe, 4.0, negative)
    assert torch.equal(base[0]["sample"], patched[0]["sample"])  # control: one noise
    assert all(not r[:2].any() and r[2:].any() for seen in patched for r in each(given(seen)))
    assert torch.equal(patched[0]["output"][:2], base[0]["output"][:2])
    assert not torch.equal(patched[0]["output"][2:], base[0]["output"][2:])  # control


@every_residual_kind
def test_without_guidance_every_row_is_corrected(small_pipe, kind):
    with apply(small_pipe, small_artifact(kind)), spied(small_pipe.unet) as calls:
        images(small_pipe, 1.0)
    assert all(len(r) == 2 and r[0].any() and r[1].any() for seen in calls for r in each(given(seen)))


def test_guidance_of_an_earlier_image_leaves_no_row_uncorrected(small_pipe):
    """A pipeline keeps its last guidance scale; another pipeline, or a direct call, on the same UNet has its own."""
    other = quiet(StableDiffusionImg2ImgPipeline.from_pipe(small_pipe))
    with apply(small_pipe, small_artifact()):
        images(small_pipe, 4.0)
        assert small_pipe.do_classifier_free_guidance  # control: still set
        with spied(small_pipe.unet) as calls:
            other(
                list(PROMPTS), image=PHOTO, num_inference_steps=2, strength=1.0, guidance_scale=1.0, output_type="pt",
                generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            )  # fmt: skip
        calls.append(call(small_pipe))
    assert all(r[0].any() and r[1].any() for seen in calls for r in each(given(seen)))


def test_perturbed_attention_guidance_has_its_negative_rows_left_alone_too(small_pipe):
    pipe = quiet(
        StableDiffusionPAGPipeline(**small_pipe.components, pag_applied_layers=["mid"], requires_safety_checker=False)
    )
    with apply(pipe, small_artifact()), spied(pipe.unet) as calls:
        pipe(PROMPTS[0], num_inference_steps=2, guidance_scale=4.0, pag_scale=1.0, output_type="pt")
    assert all(
        len(r) == 3 and not r[0].any() and r[1].any() and r[2].any() for seen in calls for r in each(given(seen))
    )


def test_text_first_layouts_are_corrected_in_full(small_pipe):
    """InstructPix2Pix lays out [text, image, uncond]: for two images no part may be mistaken for a negative prompt."""
    sample, _, states = rows(2)
    with apply(small_pipe, small_artifact()):
        images(small_pipe, 4.0)
        with torch.no_grad(), spied(small_pipe.unet) as calls:
            small_pipe.unet(sample.repeat(3, 1, 1, 1), 500, encoder_hidden_states=states.repeat(3, 1, 1))
    assert all(row.any() for r in each(given(calls[0])) for row in r)


# ---- pipelines and calls it works in ---------------------------------------------------------------------------


def test_img2img_from_pipe_is_patched_and_restored(small_pipe):
    pipe = quiet(StableDiffusionImg2ImgPipeline.from_pipe(small_pipe))

    def draw() -> Tensor:
        options = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 4.0, "output_type": "pt"}
        return pipe(PROMPTS[0], image=PHOTO, generator=torch.Generator().manual_seed(0), **options).images

    base = draw()
    for target in (pipe, small_pipe):  # attached to the new pipeline, or to the one it came from
        with apply(target, small_artifact()) as handle:
            assert not torch.equal(draw(), base)
            assert handle.stats.patched_calls == handle.stats.unet_calls == 2
        assert torch.equal(draw(), base)


def test_a_patch_survives_from_pipe(small_pipe):
    base = images(small_pipe)
    with apply(small_pipe, small_artifact()):
        other = quiet(StableDiffusionPipeline.from_pipe(small_pipe))
        assert not torch.equal(images(other), base)


def test_controlnet_pipelines_keep_their_control(small_pipe):
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(small_pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))
    for conv in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(conv.weight, std=0.1)
    pipe = quiet(
        StableDiffusionControlNetPipeline(**small_pipe.components, controlnet=controlnet, requires_safety_checker=False)
    )

    def seen() -> list[dict]:
        with spied(pipe.unet) as calls:
            generator = torch.Generator().manual_seed(0)
            pipe(PROMPTS[0], PHOTO, num_inference_steps=1, guidance_scale=4.0, output_type="pt", generator=generator)
        return calls

    base = given(seen()[0])
    with apply(pipe, small_artifact()):
        patched = given(seen()[0])
    for with_patch, control in zip(each(patched), each(base), strict=True):
        assert control.any()  # control
        assert torch.equal(with_patch[0], control[0])  # the negative row keeps the ControlNet's residual alone
        assert not torch.equal(with_patch[1], control[1])


@every_kind
def test_a_patch_of_the_text_to_image_model_works_in_inpainting(small_pipe, kind):
    """Inpainting UNets take mask and masked image too: 9 input channels. A patch reads the latents only."""
    unet = new_small_unet(in_channels=9)
    with torch.no_grad():
        unet.load_state_dict({**small_pipe.unet.state_dict(), "conv_in.weight": unet.conv_in.weight})
    parts = {**small_pipe.components, "unet": unet}
    pipe = quiet(StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False))

    def draw() -> Tensor:
        options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt", "height": 64, "width": 64}
        generator = torch.Generator().manual_seed(0)
        return pipe(
            PROMPTS[0], image=PHOTO, mask_image=Image.new("L", (64, 64), 255), generator=generator, **options
        ).images

    base, artifact = draw(), small_artifact(kind)
    with apply(pipe, artifact):
        assert not torch.equal(draw(), base)
    assert torch.equal(draw(), base)
    with apply(pipe, zero(artifact)):
        assert torch.equal(draw(), base)


@every_residual_kind
def test_timesteps_may_come_in_any_form(small_pipe, kind):
    sample, _, states = rows()
    forms = (500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500, 500]), torch.tensor(500.0))
    with torch.no_grad(), apply(small_pipe, small_artifact(kind)), spied(small_pipe.unet) as calls:
        for form in forms:
            small_pipe.unet(sample, form, encoder_hidden_states=states)
        small_pipe.unet(sample, 501, states)  # control, and states given by position
    first, *others, control = [given(seen) for seen in calls]
    assert all(same_residuals(other, first) for other in others)
    assert not same_residuals(control, first)


@every_residual_kind
@pytest.mark.parametrize("tokens", [1, 24, 60])
def test_text_states_may_have_any_length(small_pipe, kind, tokens):
    sample, timesteps, states = rows(tokens=tokens)
    with torch.no_grad(), apply(small_pipe, small_artifact(kind)), spied(small_pipe.unet) as calls:
        small_pipe.unet(sample, timesteps, encoder_hidden_states=states)
    assert all(r.any() for r in each(given(calls[0])))


def test_a_half_precision_host_gets_residuals_of_its_own_dtype(small_pipe):
    artifact = small_artifact()
    small_pipe.to(torch.bfloat16)
    with apply(small_pipe, artifact), spied(small_pipe.unet) as calls:
        images(small_pipe)
    assert {r.dtype for r in each(given(calls[0]))} == {torch.bfloat16}


# ---- law 11: bypassed is no image ------------------------------------------------------------------------------


def bypass_by_forward(pipe: StableDiffusionPipeline) -> None:
    """One UNet call that runs no hook of the UNet, then an image."""
    with torch.no_grad():
        latents = pipe.unet.forward(*rows()[:2], rows()[2]).sample
        pipe.vae.decode(latents)


def bypass_by_replacing(pipe: StableDiffusionPipeline) -> None:
    unet, pipe.unet = pipe.unet, new_small_unet()
    try:
        images(pipe)
    finally:
        pipe.unet = unet


BYPASSES = {"unet.forward": bypass_by_forward, "another pipe.unet": bypass_by_replacing}


@every_kind
@pytest.mark.parametrize("bypass", sorted(BYPASSES))
def test_an_image_made_without_the_patch_is_refused(small_pipe, kind, bypass):
    artifact = small_artifact(kind)
    with apply(small_pipe, artifact):
        images(small_pipe)  # control: what is patched is not refused
        with pytest.raises(PatchBypassed) as caught:
            BYPASSES[bypass](small_pipe)
        assert "\n" not in str(caught.value)
        images(small_pipe)  # nor is what is patched again
    with apply(small_pipe, artifact, fail_closed=False):
        BYPASSES[bypass](small_pipe)
    BYPASSES[bypass](small_pipe)  # control: without a patch there is nothing to bypass


def test_a_pipeline_that_calls_forward_itself_is_refused(small_pipe, monkeypatch):
    forward = small_pipe.unet.forward
    with apply(small_pipe, small_artifact()):
        monkeypatch.setattr(type(small_pipe.unet), "__call__", lambda _, *args, **kwargs: forward(*args, **kwargs))
        with pytest.raises(PatchBypassed, match="ran without its patch"):
            images(small_pipe)


def test_decoding_alone_is_no_bypass(small_pipe):
    with torch.no_grad(), apply(small_pipe, small_artifact()):
        small_pipe.vae.decode(torch.randn(1, 4, 8, 8))


def test_encoding_is_no_place_to_refuse(small_pipe):
    with torch.no_grad(), apply(small_pipe, small_artifact()):
        small_pipe.unet = new_small_unet()
        small_pipe.vae.encode(torch.randn(1, 3, 16, 16))
        with pytest.raises(PatchBypassed):
            small_pipe.vae.decode(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_failed_in_the_patch_hides_no_later_bypass(small_pipe, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    with apply(small_pipe, small_artifact()) as handle:
        with monkeypatch.context() as patched:
            patched.setattr(handle._attachment.corrector.parts[0].patch, "forward", fail)
            with pytest.raises(error):
                images(small_pipe)
        with pytest.raises(PatchBypassed):
            bypass_by_forward(small_pipe)


def test_a_lost_hook_on_a_block_is_noticed(small_pipe):
    with apply(small_pipe, small_artifact("lite")):
        images(small_pipe)  # control
        small_pipe.unet.up_blocks[0]._forward_pre_hooks.clear()  # where the skips are corrected
        with pytest.raises(PatchBypassed, match="hooks inside it are lost"):
            images(small_pipe)
    images(small_pipe)


def test_every_patch_of_several_is_watched(small_pipe):
    artifacts = [small_artifact(seed=seed) for seed in (1, 2)]
    with apply(small_pipe, artifacts[0]) as first, apply(small_pipe, artifacts[1], fail_closed=False):
        images(small_pipe)
        next(iter(first._attachment._hooks)).handle.remove()  # somebody takes the first one's hook off
        with pytest.raises(PatchBypassed):
            images(small_pipe)
