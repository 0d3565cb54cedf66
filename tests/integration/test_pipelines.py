"""A patch in the pipelines, schedulers and settings people use; what tests/laws/test_attach_laws.py has is left out.

Each case draws with a pipeline of its own that never had a patch: with the patch at scale 0, and after its removal,
the image must equal that bit for bit, and with the patch awake it must not.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

from safepatch.diffusion import quiet
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import from_artifact
from safepatch.runtime.apply import apply
from safepatch.runtime.check import status
from tests.families import MASK, PHOTO, small_family_pipe
from tests.small import WIDTH, new_artifact, new_small_pipe, new_small_unet, rows, same_residuals

# diffusers 0.42.1's Euler schedulers turn tensors into arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
Change = Callable[[Any], Any]  # takes a pipeline, returns the one to draw with


def draw(pipe: Any, **options: Any) -> Tensor:
    """Images of one prompt from the same noise."""
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}
    settings |= {"prompt": "a knife next to a cat", "generator": torch.Generator().manual_seed(0)} | options
    return quiet(pipe)(**settings).images


def as_class(name: str, **parts: Any) -> Change:
    """The same components in another pipeline class."""
    extra = {} if "XL" in name else {"requires_safety_checker": False}
    return lambda pipe: getattr(diffusers, name)(**pipe.components, **extra, **parts)


def with_controlnet(pipe: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))
        for conv in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            torch.nn.init.normal_(conv.weight, std=0.1)
    return as_class("StableDiffusionControlNetPipeline", controlnet=control)(pipe)


def with_scheduler(name: str) -> Change:
    def change(pipe: Any) -> Any:
        pipe.scheduler = getattr(diffusers, name)(prediction_type="v_prediction")
        return pipe

    return change


def with_lora(pipe: Any) -> Any:
    from peft import LoraConfig  # seconds to import

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False))
    return pipe


def with_ip_adapter(pipe: Any) -> Any:
    """An IP-Adapter of four image tokens, made from its own layout."""
    unet = pipe.unet
    crossed = [unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors if "attn2" in name]
    draw = torch.Generator().manual_seed(0)
    weights = {
        f"{2 * i + 1}.{layer}_ip.weight": 0.1 * torch.randn(attention.inner_dim, WIDTH, generator=draw)
        for i, attention in enumerate(crossed)
        for layer in ("to_k", "to_v")
    }
    sizes = {"proj.weight": (4 * WIDTH, 8), "proj.bias": (4 * WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    projection = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    return pipe


def with_slicing(pipe: Any) -> Any:
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    return pipe


def with_offload(pipe: Any) -> Any:
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def in_bfloat16(pipe: Any) -> Any:
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)  # the small pipelines share one
    return pipe.to(torch.bfloat16)


def unchanged(pipe: Any) -> Any:
    return pipe


def small_xl() -> Any:
    return small_family_pipe("sdxl", transformer_layers_per_block=[1, 1, 1])


def small_lcm() -> Any:
    return new_small_pipe(new_small_unet(time_cond_proj_dim=16))


IMAGE = {"image": PHOTO}
SIZE = {"height": 64, "width": 64}
INPAINT = {"image": PHOTO, "mask_image": MASK, "strength": 1.0, **SIZE}
EMBEDS = {
    "prompt": None,
    "prompt_embeds": torch.ones(1, 60, WIDTH),
    "negative_prompt_embeds": torch.zeros(1, 60, WIDTH),
}

# name -> how to build the pipeline, how to change it before the patch is applied, and options of the call
BUILT: dict[str, tuple[Callable[[], Any], Change, dict[str, Any]]] = {
    "inpainting with 4 channels": (new_small_pipe, as_class("StableDiffusionInpaintPipeline"), INPAINT),
    "ControlNet": (new_small_pipe, with_controlnet, IMAGE),
    "PAG": (new_small_pipe, as_class("StableDiffusionPAGPipeline", pag_applied_layers=["mid"]), {"pag_scale": 1.0}),
    "PAG without guidance": (
        new_small_pipe,
        as_class("StableDiffusionPAGPipeline", pag_applied_layers=["mid"]),
        {"pag_scale": 1.0, "guidance_scale": 1.0},
    ),
    "SDXL": (small_xl, unchanged, SIZE),
    "SDXL at guidance 1": (small_xl, unchanged, {"guidance_scale": 1.0, **SIZE}),
    "SDXL image to image": (small_xl, as_class("StableDiffusionXLImg2ImgPipeline"), {"strength": 1.0, **IMAGE}),
    "SDXL inpainting": (small_xl, as_class("StableDiffusionXLInpaintPipeline"), INPAINT),
    "LCM UNet and scheduler": (small_lcm, with_scheduler("LCMScheduler"), {}),
    "DPM++": (new_small_pipe, with_scheduler("DPMSolverMultistepScheduler"), {}),
    "Euler a": (new_small_pipe, with_scheduler("EulerAncestralDiscreteScheduler"), {}),
    "UniPC": (new_small_pipe, with_scheduler("UniPCMultistepScheduler"), {}),
    "several prompts and images": (
        new_small_pipe,
        unchanged,
        {"prompt": ["a knife", "a cat"], "num_images_per_prompt": 2},
    ),
    "60 tokens": (new_small_pipe, unchanged, EMBEDS),
    "rescaled guidance": (new_small_pipe, unchanged, {"guidance_rescale": 0.7}),
}

# What a user may do to a pipeline before or after a patch is applied.
CHANGES: dict[str, Change] = {
    "LoRA": with_lora,
    "slicing": with_slicing,
    "offload": with_offload,
    "bfloat16": in_bfloat16,
    "deepcopy": copy.deepcopy,
    "image to image by from_pipe": diffusers.StableDiffusionImg2ImgPipeline.from_pipe,
    "IP-Adapter": with_ip_adapter,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "image to image by from_pipe": {"image": PHOTO, "strength": 1.0},
    "IP-Adapter": {"ip_adapter_image_embeds": [torch.ones(2, 1, 8)]},
}


def expect_law(pipe: Any, reference: Tensor, options: dict[str, Any]) -> None:
    """The patch on `pipe` acts, is silent at scale 0, and is gone when removed."""
    (state,) = status(pipe)
    awake = draw(pipe, **options)
    stats = state.stats
    assert stats.acted_calls == stats.patched_calls == stats.unet_calls > 0
    state.handle.scale = 0
    off = draw(pipe, **options)
    state.handle.remove()
    assert awake.isfinite().all()
    assert awake.shape == reference.shape
    assert not torch.equal(awake, reference)
    assert torch.equal(off, reference)
    assert stats.acted_calls == stats.patched_calls == stats.unet_calls / 2
    assert status(pipe) == ()
    assert torch.equal(draw(pipe, **options), reference)


@every_kind
@pytest.mark.parametrize("case", BUILT)
def test_a_patch_acts_and_leaves_no_trace(case, kind):
    build, change, options = BUILT[case]
    reference = draw(change(build()), **options)
    pipe = change(build())
    apply(pipe, new_artifact(pipe.unet, kind))
    expect_law(pipe, reference, options)


@every_kind
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_patch_keeps_acting_whatever_the_user_does_to_the_pipeline(change, when, kind):
    options = OPTIONS.get(change, {})
    reference = draw(CHANGES[change](new_small_pipe()), **options)
    pipe = new_small_pipe()
    artifact = new_artifact(pipe.unet, kind)
    if when == "after":
        apply(pipe, artifact)
    pipe = CHANGES[change](pipe)
    if when == "before":
        apply(pipe, artifact)
    expect_law(pipe, reference, options)


@pytest.mark.slow
@every_kind
def test_a_patch_that_was_attached_first_is_compiled_with_the_unet(kind):
    levels = {"block_out_channels": (16, 32), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    pipe = new_small_pipe(new_small_unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), **levels))
    base = draw(pipe)
    with apply(pipe, new_artifact(pipe.unet, kind)) as handle:
        patched = draw(pipe)
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        compiled = draw(pipe)
        assert handle.stats.patched_calls == handle.stats.unet_calls == 4
    torch.testing.assert_close(compiled, patched, rtol=0, atol=1e-3)
    assert (patched - base).abs().max() > 0.05  # control: what the patch does is far above that tolerance


def test_an_image_prompt_is_seen(small_pipe):
    """Control of the IP-Adapter's cases above."""
    pipe = with_ip_adapter(small_pipe)
    ones, zeros = ({"ip_adapter_image_embeds": [make(2, 1, 8)]} for make in (torch.ones, torch.zeros))
    assert not torch.equal(draw(pipe, **ones), draw(pipe, **zeros))


def test_a_clone_reads_every_token_of_the_text_beside_an_image_prompt():
    """Its host's IP-Adapter would make it take the last tokens for an image's."""
    plain, adapted = new_small_pipe(), with_ip_adapter(new_small_pipe())
    ours, theirs = (from_artifact(new_artifact(plain.unet), pipe.unet) for pipe in (plain, adapted))
    inputs = (*rows(), torch.randn(1, 5, WIDTH))
    assert same_residuals(ours(*inputs), theirs(*inputs))


@every_kind
def test_a_patch_acts_under_autocast(small_pipe, kind):
    def shot(cast: bool = True) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
            return draw(small_pipe)

    base, plain = shot(), shot(cast=False)
    assert not torch.equal(base, plain)  # control: autocast does something
    with apply(small_pipe, new_artifact(small_pipe.unet, kind)) as handle:
        assert not torch.equal(shot(), base)
        handle.scale = 0
        assert torch.equal(shot(), base)
    assert torch.equal(shot(), base)


@every_kind
def test_a_copied_pipeline_and_its_original_go_their_own_ways(small_pipe, kind):
    base = draw(small_pipe)
    with apply(small_pipe, new_artifact(small_pipe.unet, kind)) as handle:
        patched = draw(small_pipe)
        copied = copy.deepcopy(small_pipe)
        (own,) = status(copied)
        assert own.categories == ("weapons",)
        assert own.handle is not handle
        own.handle.remove()
        assert torch.equal(draw(copied), base)
        assert torch.equal(draw(small_pipe), patched)
    assert not torch.equal(patched, base)  # control


@every_kind
def test_a_patch_for_two_images_of_different_size(small_pipe, kind):
    wide = {"height": 64, "width": 96}
    base = draw(small_pipe, **wide)
    with apply(small_pipe, new_artifact(small_pipe.unet, kind)):
        draw(small_pipe)
        assert not torch.equal(draw(small_pipe, **wide), base)
    assert torch.equal(draw(small_pipe, **wide), base)


def test_the_photo_is_seen_by_image_to_image(small_pipe):
    """Control of the cases above: the image given is not ignored."""
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(small_pipe)
    blue = Image.new("RGB", (64, 64), "blue")
    options = {"strength": 0.5, "num_inference_steps": 4}
    assert not torch.equal(draw(pipe, image=PHOTO, **options), draw(pipe, image=blue, **options))
