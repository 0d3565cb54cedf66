"""Every pipeline of the installed diffusers that takes a UNet: a patch acts in it, or is refused in one line.

`PIPELINES` is the table; the tests prove each line of it, and that no pipeline is missing. For text that names a knife
it is known which rows of which call carry it, by what the text encoders made of it: none of them may go uncorrected.
Run as a script, this file prints the table.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.utils.import_utils import DummyObject
from torch import Tensor, nn

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import quiet
from safepatch.errors import BaseMismatch, PatchBypassed, SafepatchError, UnsupportedModel
from safepatch.patch import PATCH_KINDS
from safepatch.runtime.apply import apply
from safepatch.runtime.handle import Handle
from safepatch.tiny.text import MAX_TOKENS, WIDTH

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it finds `tests`
from tests.families import MASK, PHOTO, small_family_pipe
from tests.small import new_artifact, new_small_pipe, new_small_unet

# Many of these are deprecated by diffusers 0.42.1 itself, and call what it, numpy 2 and transformers 5 deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

PROMPT, SOURCE, NEGATIVE = "a knife next to a cat", "a knife next to a dog", "a picture of a dog"
THEIRS, PARTLY = "the prompt's", "the prompt's, and some of the negative prompt's"
ALL, PLAIN, EMPTY = "all, the negative prompt's too", "all, each the prompt's", "all, each of the empty prompt"
STATES = torch.ones(1, MAX_TOKENS, WIDTH)
DEPTH = torch.linspace(0, 1, 64).expand(1, 64, 64)
CALL: dict[str, Any] = {  # what of it a pipeline takes is passed
    "prompt": PROMPT, "negative_prompt": NEGATIVE, "source_prompt": SOURCE, "num_inference_steps": 2, "strength": 1.0,
    "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "np", "image": PHOTO, "mask_image": MASK,
    "control_image": PHOTO,
}  # fmt: skip

Parts = Callable[[Any], dict[str, Any]]  # of a small pipeline, what another class needs beside its components


@dataclass(frozen=True)
class Patched:
    """A patch acts in it.

    Attributes:
        rows: which of the UNet's rows are corrected.
        call: options of its call, beside those of `CALL`.
        unet: how its UNet differs from the small one.
        parts: components beside those of the small pipeline.
        draw: what to call, for a pipeline with more than one verb.
        made: how its class is made of a small pipeline, if not by its components.
    """

    rows: str = THEIRS
    call: Mapping[str, Any] = field(default_factory=dict)
    unet: Mapping[str, Any] = field(default_factory=dict)
    parts: Parts = lambda pipe: {}
    draw: Callable[[Any, torch.Generator], Any] | None = None
    made: Callable[[Any], Any] | None = None
    what = "patched"


@dataclass(frozen=True)
class Refused:
    """`apply` raises an error of one line, though the patch would fit if nothing were wrong.

    Attributes:
        why: for people.
        error: its type.
        match: what its message says.
        without: components it lacks, which an SD pipeline has.
        parts: components other than the small pipeline's.
        what: the verdict.
    """

    why: str
    match: str
    error: type[SafepatchError] = BaseMismatch
    without: tuple[str, ...] = ()
    parts: Parts = lambda pipe: {}
    what: str = "refused"
    rows = ""


@dataclass(frozen=True)
class NotHere:
    """A package that it needs is not among those that safepatch is tested with."""

    why: str
    what: str = "does not apply"
    rows = ""


# ---- small parts -------------------------------------------------------------------------------------------------


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = make()
    return made.eval() if isinstance(made, nn.Module) else made


@cache
def small_xl() -> Any:
    """SDXL's structure with narrow texts, which are what takes time in it."""
    sizes = {"transformer_layers_per_block": [1, 1, 1], "cross_attention_dim": 64}
    pipe = small_family_pipe("sdxl", **sizes, projection_class_embeddings_input_dim=6 * 256 + 32)
    pipe.text_encoder, pipe.text_encoder_2 = (narrow(part) for part in (pipe.text_encoder, pipe.text_encoder_2))
    return pipe


def narrow(encoder: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32, "num_attention_heads": 2}
    return seeded(lambda: type(encoder)(type(encoder.config).from_dict({**encoder.config.to_dict(), **sizes})))


def base(name: str, unet: Mapping[str, Any]) -> Any:
    """The small pipeline whose components another class gets, with a UNet of its own."""
    if "XL" not in name:
        return new_small_pipe(new_small_unet(**unet))
    parts, config = small_xl().components, {**settings(small_xl().unet), **unet}
    return diffusers.StableDiffusionXLPipeline(
        **{**parts, "unet": seeded(lambda: diffusers.UNet2DConditionModel.from_config(config))}
    )


def settings(part: Any) -> dict[str, Any]:
    return {key: value for key, value in part.config.items() if not key.startswith("_")}


def conditioning(pipe: Any) -> tuple[int, ...]:
    """Channels with which a ControlNet shrinks its picture as the VAE does."""
    return (16, 32, 96) if pipe.vae_scale_factor == 4 else (16, 32, 96, 256)


def awakened(controlnet: Any) -> dict[str, Any]:
    for conv in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        nn.init.normal_(conv.weight, std=0.1)
    return {"controlnet": controlnet.eval()}


def controlnet(pipe: Any) -> dict[str, Any]:
    make = diffusers.ControlNetModel.from_unet
    return seeded(lambda: awakened(make(pipe.unet, conditioning_embedding_out_channels=conditioning(pipe))))


def union(pipe: Any) -> dict[str, Any]:
    kind = diffusers.ControlNetUnionModel
    config = {key: value for key, value in pipe.unet.config.items() if key in inspect.signature(kind).parameters}
    sizes = {"num_trans_channel": 32, "num_trans_head": 2, "num_proj_channel": 32}
    return seeded(lambda: awakened(kind(**{**config, **sizes})))


def controlnet_xs(pipe: Any) -> Any:
    make = diffusers.ControlNetXSAdapter.from_unet
    return seeded(lambda: make(pipe.unet, size_ratio=1.0, conditioning_embedding_out_channels=conditioning(pipe)))


def adapter(channels: list[int], factor: int, kind: str) -> Parts:
    sizes = {"channels": channels, "downscale_factor": factor, "num_res_blocks": 1}
    return lambda pipe: {"adapter": seeded(lambda: diffusers.T2IAdapter(in_channels=3, adapter_type=kind, **sizes))}


def scheduled(name: str, **options: Any) -> Parts:
    return lambda pipe: {"scheduler": getattr(diffusers, name)(**options)}


def with_depth_vae(pipe: Any) -> dict[str, Any]:
    config = {**pipe.vae.config, "in_channels": 6, "out_channels": 6}
    return {"vae": seeded(lambda: diffusers.AutoencoderKL.from_config(config))}


def processor() -> Any:
    return transformers.CLIPImageProcessor(size=32, crop_size=32)


def vision() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, projection_dim=WIDTH, image_size=32, patch_size=16)
    return transformers.CLIPVisionModelWithProjection(config)


def grounding(pipe: Any) -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection

    return {
        "image_encoder": seeded(vision),
        "image_project": seeded(lambda: CLIPImageProjection(hidden_size=WIDTH)),
        "processor": transformers.CLIPProcessor(processor(), pipe.tokenizer),
    }


def unclip_image(pipe: Any) -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    return {
        "image_encoder": seeded(vision),
        "feature_extractor": processor(),
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        "image_noising_scheduler": diffusers.DDPMScheduler(),
    }


def unclip_prior(pipe: Any) -> dict[str, Any]:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    prior = seeded(lambda: diffusers.PriorTransformer(**sizes, embedding_dim=WIDTH, num_embeddings=MAX_TOKENS))
    return unclip_image(pipe) | {
        "prior": prior,
        "prior_tokenizer": pipe.tokenizer,
        "prior_text_encoder": seeded(lambda: transformers.CLIPTextModelWithProjection(pipe.text_encoder.config)),
        "prior_scheduler": diffusers.UnCLIPScheduler(prediction_type="sample"),
    }


def pix2pix_zero(pipe: Any) -> dict[str, Any]:
    parts = {"scheduler": diffusers.DDIMScheduler(), "inverse_scheduler": diffusers.DDIMInverseScheduler()}
    return parts | {"caption_generator": None, "caption_processor": None}


def pag(parts: Parts = lambda pipe: {}) -> Patched:
    return Patched(call={"pag_scale": 1.0}, parts=lambda pipe: {"pag_applied_layers": ["mid"], **parts(pipe)})


def invert_and_edit(pipe: Any, generator: torch.Generator) -> Any:
    """LEDITS++."""
    options = {"num_inversion_steps": 3, "skip": 0.4, "generator": generator}
    pipe.invert(image=PHOTO, source_prompt=SOURCE, **options)
    return pipe(editing_prompt=[PROMPT], negative_prompt=NEGATIVE, output_type="np", generator=generator)


def mask_and_edit(pipe: Any, generator: torch.Generator) -> Any:
    """DiffEdit."""
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "generator": generator}
    texts = {"source_prompt": SOURCE, "target_prompt": PROMPT, "target_negative_prompt": NEGATIVE}
    mask = pipe.generate_mask(image=PHOTO, num_maps_per_mask=1, **texts, **options)
    latents = pipe.invert(prompt=SOURCE, negative_prompt=NEGATIVE, image=PHOTO, inpaint_strength=1.0, **options).latents
    given = {"mask_image": np.ones_like(mask), "image_latents": latents, "inpaint_strength": 1.0}
    return pipe(prompt=PROMPT, negative_prompt=NEGATIVE, output_type="np", **given, **options)


def in_blocks(pipe: Any) -> Any:
    """SDXL as modular blocks, which call the UNet once more for the negative prompt."""
    modular = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    modular.update_components(**{name: part for name, part in pipe.components.items() if part is not None})
    return modular


def from_text(pipe: Any, generator: torch.Generator) -> Any:
    given = ("prompt", "negative_prompt", "num_inference_steps", "height", "width", "output_type")
    return pipe(**{name: CALL[name] for name in given}, generator=generator, output="images"), None


# ---- UNets and text encoders that a patch does not fit -----------------------------------------------------------


def motion(pipe: Any) -> Any:
    channels, settings = pipe.unet.config["block_out_channels"], {"num_attention_heads": 2, "norm_num_groups": 8}
    settings |= {"layers_per_block": 1, "max_seq_length": 4}
    options = {f"motion_{name}": value for name, value in settings.items()}
    return seeded(lambda: diffusers.MotionAdapter(block_out_channels=channels, **options))


def moving(pipe: Any) -> dict[str, Any]:
    """AnimateDiff's, made from the very UNet that the patch is for."""
    return {"unet": diffusers.UNetMotionModel.from_unet2d(pipe.unet, motion(pipe))}


def even(**overrides: Any) -> Any:
    """A small pipeline whose UNet has as many channels at each level, as some blocks below need them."""
    return new_small_pipe(new_small_unet(block_out_channels=(32, 32, 32), **overrides))


@cache
def even_artifact() -> PatchArtifact:
    return new_artifact(even().unet)


def video(name: str) -> Parts:
    blocks = {"down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D")}
    sizes = {"block_out_channels": (32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    made = {**blocks, **sizes, "cross_attention_dim": WIDTH}
    return lambda pipe: {"unet": getattr(diffusers, name)(**made)}


def sound(pipe: Any) -> dict[str, Any]:
    """AudioLDM's UNet reads its text as a class embedding."""
    text = {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 32}
    widths = {"cross_attention_dim": (32, 32, 32), "block_out_channels": (32, 32, 32)}
    return {"unet": new_small_unet(class_embeddings_concat=True, **widths, **text)}


def sound_2(pipe: Any) -> dict[str, Any]:
    config = {key: pipe.unet.config[key] for key in ("block_out_channels", "layers_per_block", "norm_num_groups")}
    blocks = {key: pipe.unet.config[key] for key in ("down_block_types", "up_block_types")}
    widths = ([None, WIDTH],) * 3
    return {"unet": diffusers.AudioLDM2UNet2DConditionModel(**config, **blocks, cross_attention_dim=widths)}


def dreamlite(pipe: Any) -> dict[str, Any]:
    sizes = {"block_out_channels": (32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    return {"unet": diffusers.DreamLiteUNetModel(**sizes, cross_attention_dim=WIDTH, attention_head_dim=16)}


def k_upscaler(pipe: Any) -> dict[str, Any]:
    """The published latent upscaler's UNet has no middle block, and blocks of its own."""
    blocks = {"down_block_types": ("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 2), "mid_block_type": None}
    blocks |= {"up_block_types": (*["KCrossAttnUpBlock2D"] * 2, "KUpBlock2D"), "block_out_channels": (32, 32, 32)}
    time = {"resnet_time_scale_shift": "scale_shift", "time_embedding_type": "fourier", "timestep_post_act": "gelu"}
    return {"unet": new_small_unet(in_channels=8, out_channels=5, attention_head_dim=8, **blocks, **time)}


def fused_xs(pipe: Any) -> dict[str, Any]:
    """Of a UNet with two layers a block, as all have that there are ControlNet-XS for."""
    pipe = even(layers_per_block=2)
    return {"unet": diffusers.UNetControlNetXSModel.from_unet(pipe.unet, controlnet_xs(pipe))}


def roberta(pipe: Any) -> dict[str, Any]:
    """AltDiffusion's, whose own states are wider than those that the UNet reads."""
    from diffusers.pipelines.deprecated.alt_diffusion import modeling_roberta_series as alt

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = alt.RobertaSeriesConfig(**sizes, project_dim=WIDTH, vocab_size=len(pipe.tokenizer), pad_token_id=1)
    return {"text_encoder": seeded(lambda: alt.RobertaSeriesModelWithTransformation(config))}


def context_clip(pipe: Any) -> dict[str, Any]:
    from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel

    return {"text_encoder": seeded(lambda: ContextCLIPTextModel(pipe.text_encoder.config))}


# ---- the table ---------------------------------------------------------------------------------------------------

EIGHT, MODES = {"in_channels": 8}, {"control_image": [PHOTO], "control_mode": [0]}
CROSSED = {  # a T2I-Adapter's pictures go in behind blocks that read text
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
BOXES = {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.5]], "gligen_scheduled_sampling_beta": 1.0}
FRAMES = {"video_length": 2, "t0": 0, "t1": 1, "num_inference_steps": 3}
LCM = Patched(PLAIN, unet={"time_cond_proj_dim": 16}, parts=scheduled("LCMScheduler"))
LEDITS = Patched(
    ALL,
    parts=scheduled("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=2),
    draw=invert_and_edit,
)
UNCLIP = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}
CYCLE = scheduled("DDIMScheduler", steps_offset=1, clip_sample=False, set_alpha_to_one=False)
WHOLE = {"processing_resolution": 0}


def lacks(*parts: str, why: str) -> Refused:
    return Refused(why, f"has no {', '.join(parts)}", without=parts)


def other_unet(why: str, parts: Parts, what: str = "refused", differs: str = "down_block_types") -> Refused:
    return Refused(why, rf"this patch is for tiny-sd UNets \({differs} ", parts=parts, what=what)


PIXELS = lacks("vae", why="it draws pixels; there is no VAE")
WITHOUT_TEXT = lacks("vae", "text_encoder", "tokenizer", why="it reads no text")
FROM_PICTURES = lacks("text_encoder", "tokenizer", why="it reads a picture and no text")
MOVQ = lacks("vae", why="its images come from a MoVQ, not a VAE")
MOVING = other_unet("its motion modules make another UNet; and a patched UNet turned into one is noticed", moving)
SOUND = other_unet("it makes sound", sound, "does not apply", "cross_attention_dim")
VIDEO = other_unet("it makes video with a UNet of its own", video("UNet3DConditionModel"), "does not apply")
XS = other_unet(
    "its UNet is fused with the ControlNet; and a patched UNet turned into one is noticed",
    fused_xs,
    differs="layers_per_block",
)
TWO_UNETS = Refused("it has two UNets", "not supported yet", UnsupportedModel, ("unet",))
ROBERTA = Refused("its text encoder is not CLIP's", "text encoder", SafepatchError, parts=roberta)
CONTEXT = Refused("its text encoder reads a picture too", "text encoder", SafepatchError, parts=context_clip)
ONNX = NotHere("its UNet is an ONNX graph, which has no hooks")
KOLORS = NotHere("its text encoder is ChatGLM; needs sentencepiece")

PIPELINES: dict[str, Patched | Refused | NotHere] = {
    "AltDiffusionImg2ImgPipeline": ROBERTA,
    "AltDiffusionPipeline": ROBERTA,
    "AnimateDiffControlNetPipeline": MOVING,
    "AnimateDiffPAGPipeline": MOVING,
    "AnimateDiffPipeline": MOVING,
    "AnimateDiffSDXLPipeline": MOVING,
    "AnimateDiffSparseControlNetPipeline": MOVING,
    "AnimateDiffVideoToVideoControlNetPipeline": MOVING,
    "AnimateDiffVideoToVideoPipeline": MOVING,
    "AudioDiffusionPipeline": NotHere("it makes sound; needs librosa"),
    "AudioLDM2Pipeline": other_unet("it makes sound", sound_2, "does not apply", "cross_attention_dim"),
    "AudioLDMPipeline": SOUND,
    "BlipDiffusionControlNetPipeline": CONTEXT,
    "BlipDiffusionPipeline": CONTEXT,
    "ConsisIDPipeline": NotHere("it makes video with a transformer; needs opencv"),
    "ConsistencyModelPipeline": WITHOUT_TEXT,
    "CycleDiffusionPipeline": Patched(ALL, {"source_guidance_scale": 2.0, "strength": 0.8}, parts=CYCLE),
    "DDIMPipeline": WITHOUT_TEXT,
    "DDPMPipeline": WITHOUT_TEXT,
    "DanceDiffusionPipeline": WITHOUT_TEXT,
    "DreamLiteMobilePipeline": other_unet("its UNet has blocks of its own", dreamlite),
    "DreamLitePipeline": other_unet("its UNet has blocks of its own", dreamlite),
    "I2VGenXLPipeline": other_unet("it makes video with a UNet of its own", video("I2VGenXLUNet"), "does not apply"),
    "IFImg2ImgPipeline": PIXELS,
    "IFImg2ImgSuperResolutionPipeline": PIXELS,
    "IFInpaintingPipeline": PIXELS,
    "IFInpaintingSuperResolutionPipeline": PIXELS,
    "IFPipeline": PIXELS,
    "IFSuperResolutionPipeline": PIXELS,
    "Kandinsky3Img2ImgPipeline": MOVQ,
    "Kandinsky3Pipeline": MOVQ,
    "KandinskyCombinedPipeline": MOVQ,
    "KandinskyImg2ImgCombinedPipeline": MOVQ,
    "KandinskyImg2ImgPipeline": MOVQ,
    "KandinskyInpaintCombinedPipeline": MOVQ,
    "KandinskyInpaintPipeline": MOVQ,
    "KandinskyPipeline": MOVQ,
    "KandinskyV22CombinedPipeline": MOVQ,
    "KandinskyV22ControlnetImg2ImgPipeline": MOVQ,
    "KandinskyV22ControlnetPipeline": MOVQ,
    "KandinskyV22Img2ImgCombinedPipeline": MOVQ,
    "KandinskyV22Img2ImgPipeline": MOVQ,
    "KandinskyV22InpaintCombinedPipeline": MOVQ,
    "KandinskyV22InpaintPipeline": MOVQ,
    "KandinskyV22Pipeline": MOVQ,
    "KarrasVePipeline": WITHOUT_TEXT,
    "KolorsImg2ImgPipeline": KOLORS,
    "KolorsPAGPipeline": KOLORS,
    "KolorsPipeline": KOLORS,
    "LDMPipeline": WITHOUT_TEXT,
    "LDMSuperResolutionPipeline": WITHOUT_TEXT,
    "LDMTextToImagePipeline": lacks("vae", "text_encoder", why="it has a VQ-VAE and its own BERT"),
    "LEditsPPPipelineStableDiffusion": LEDITS,
    "LEditsPPPipelineStableDiffusionXL": LEDITS,
    "LatentConsistencyModelImg2ImgPipeline": LCM,
    "LatentConsistencyModelPipeline": LCM,
    "MarigoldDepthPipeline": Patched(EMPTY, WHOLE, EIGHT),
    "MarigoldIntrinsicsPipeline": Patched(
        EMPTY,
        WHOLE,
        {"in_channels": 12, "out_channels": 8},
        lambda pipe: {"target_properties": {"target_names": ["albedo", "material"]}},
    ),
    "MarigoldNormalsPipeline": Patched(EMPTY, WHOLE, EIGHT),
    "MusicLDMPipeline": SOUND,
    "OnnxStableDiffusionImg2ImgPipeline": ONNX,
    "OnnxStableDiffusionInpaintPipeline": ONNX,
    "OnnxStableDiffusionInpaintPipelineLegacy": ONNX,
    "OnnxStableDiffusionPipeline": ONNX,
    "OnnxStableDiffusionUpscalePipeline": ONNX,
    "PIAPipeline": MOVING,
    "PNDMPipeline": WITHOUT_TEXT,
    "PaintByExamplePipeline": FROM_PICTURES,
    "RePaintPipeline": WITHOUT_TEXT,
    "ScoreSdeVePipeline": WITHOUT_TEXT,
    "SemanticStableDiffusionPipeline": Patched(ALL, {"editing_prompt": [SOURCE], "edit_warmup_steps": 0}),
    "SpectrogramDiffusionPipeline": NotHere("it makes sound; needs note_seq"),
    "StableDiffusionAdapterPipeline": Patched(unet=CROSSED, parts=adapter([16, 32, 32], 4, "full_adapter")),
    "StableDiffusionAttendAndExcitePipeline": Patched(
        call={"token_indices": [2], "attn_res": (16, 16), "max_iter_to_alter": 1, "thresholds": {0: 0}}, unet=CROSSED
    ),
    "StableDiffusionControlNetImg2ImgPipeline": Patched(parts=controlnet),
    "StableDiffusionControlNetInpaintPipeline": Patched(parts=controlnet),
    "StableDiffusionControlNetPAGInpaintPipeline": pag(controlnet),
    "StableDiffusionControlNetPAGPipeline": pag(controlnet),
    "StableDiffusionControlNetPipeline": Patched(parts=controlnet),
    "StableDiffusionControlNetXSPipeline": XS,
    "StableDiffusionDepth2ImgPipeline": Patched(
        call={"depth_map": DEPTH}, unet={"in_channels": 5}, parts=lambda pipe: {"depth_estimator": None}
    ),
    "StableDiffusionDiffEditPipeline": Patched(
        PARTLY,
        parts=lambda pipe: {
            "scheduler": diffusers.DDIMScheduler(),
            "inverse_scheduler": diffusers.DDIMInverseScheduler(),
        },
        draw=mask_and_edit,
    ),
    "StableDiffusionGLIGENPipeline": Patched(call=BOXES, unet={"attention_type": "gated"}),
    "StableDiffusionGLIGENTextImagePipeline": Patched(
        call={**BOXES, "gligen_images": [PHOTO]}, unet={"attention_type": "gated-text-image"}, parts=grounding
    ),
    "StableDiffusionImageVariationPipeline": FROM_PICTURES,
    "StableDiffusionImg2ImgPipeline": Patched(),
    "StableDiffusionInpaintPipeline": Patched(unet={"in_channels": 9}),
    "StableDiffusionInpaintPipelineLegacy": Patched(),
    "StableDiffusionInstructPix2PixPipeline": Patched(ALL, unet=EIGHT),
    "StableDiffusionLDM3DPipeline": Patched(parts=with_depth_vae),
    "StableDiffusionLatentUpscalePipeline": other_unet("its UNet has blocks of its own, and none between", k_upscaler),
    "StableDiffusionModelEditingPipeline": Patched(parts=lambda pipe: {"with_augs": ["A photo of "]}),
    "StableDiffusionOnnxPipeline": ONNX,
    "StableDiffusionPAGImg2ImgPipeline": pag(),
    "StableDiffusionPAGInpaintPipeline": pag(),
    "StableDiffusionPAGPipeline": pag(),
    "StableDiffusionPanoramaPipeline": Patched(
        PARTLY,
        {"width": 576, "view_batch_size": 2, "num_inference_steps": 1},  # two views
    ),
    "StableDiffusionParadigmsPipeline": Patched(PARTLY, {"parallel": 2}, parts=scheduled("DDIMParallelScheduler")),
    "StableDiffusionPipeline": Patched(),
    "StableDiffusionPipelineSafe": Patched(ALL),
    "StableDiffusionPix2PixZeroPipeline": Patched(
        call={"source_embeds": 0 * STATES, "target_embeds": STATES}, parts=pix2pix_zero
    ),
    "StableDiffusionSAGPipeline": Patched(PARTLY),
    "StableDiffusionUpscalePipeline": Patched(
        call={"image": PHOTO.resize((16, 16)), "noise_level": 5},
        unet={"in_channels": 7, "num_class_embeds": 1000},
        parts=lambda pipe: {"low_res_scheduler": diffusers.DDPMScheduler(), "max_noise_level": 350},
    ),
    "StableDiffusionXLAdapterPipeline": Patched(parts=adapter([32, 32, 64, 64], 16, "full_adapter_xl")),
    "StableDiffusionXLControlNetImg2ImgPipeline": Patched(parts=controlnet),
    "StableDiffusionXLControlNetInpaintPipeline": Patched(parts=controlnet),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": pag(controlnet),
    "StableDiffusionXLControlNetPAGPipeline": pag(controlnet),
    "StableDiffusionXLControlNetPipeline": Patched(parts=controlnet),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Patched(call=MODES, parts=union),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Patched(call=MODES, parts=union),
    "StableDiffusionXLControlNetUnionPipeline": Patched(call=MODES, parts=union),
    "StableDiffusionXLControlNetXSPipeline": XS,
    "StableDiffusionXLImg2ImgPipeline": Patched(),
    "StableDiffusionXLInpaintPipeline": Patched(),
    "StableDiffusionXLInstructPix2PixPipeline": Patched(ALL, unet=EIGHT),
    "StableDiffusionXLModularPipeline": Patched(ALL, made=in_blocks, draw=from_text),
    "StableDiffusionXLPAGImg2ImgPipeline": pag(),
    "StableDiffusionXLPAGInpaintPipeline": pag(),
    "StableDiffusionXLPAGPipeline": pag(),
    "StableDiffusionXLPipeline": Patched(),
    "StableUnCLIPImg2ImgPipeline": Patched(unet=UNCLIP, parts=unclip_image),
    "StableUnCLIPPipeline": Patched(ALL, {"prior_num_inference_steps": 2}, UNCLIP, unclip_prior),
    "StableVideoDiffusionPipeline": FROM_PICTURES,
    "TextToVideoSDPipeline": VIDEO,
    "TextToVideoZeroPipeline": Patched(ALL, FRAMES, parts=scheduled("DDIMScheduler")),
    "TextToVideoZeroSDXLPipeline": Patched(ALL, FRAMES, parts=scheduled("DDIMScheduler")),
    "UniDiffuserPipeline": lacks("tokenizer", why="its UNet is a transformer over text and picture"),
    "VersatileDiffusionDualGuidedPipeline": TWO_UNETS,
    "VersatileDiffusionImageVariationPipeline": TWO_UNETS,
    "VersatileDiffusionPipeline": TWO_UNETS,
    "VersatileDiffusionTextToImagePipeline": TWO_UNETS,
    "VideoToVideoSDPipeline": VIDEO,
}


PATCHED = {name: row for name, row in PIPELINES.items() if isinstance(row, Patched)}
REFUSED = {name: row for name, row in PIPELINES.items() if isinstance(row, Refused)}


# ---- which rows carry the prompt ---------------------------------------------------------------------------------


class Watch:
    """Which rows of the UNet's calls carry the prompt, and which of them a patch corrects.

    Attributes:
        handle: of the patch, once there is one.
        calls: of each call while there is a handle: how many rows, those that name the knife, and those corrected.
    """

    def __init__(self, pipe: Any) -> None:
        self.handle: Handle | None = None
        self.calls: list[tuple[int, set[int], set[int]]] = []
        self._knife = (pipe.tokenizer or pipe.tokenizer_2)("knife").input_ids[1]
        self._without: list[Tensor] = []  # states of texts that do not name it
        encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "prior_text_encoder")]
        self._hooks = [part.register_forward_hook(self._read, with_kwargs=True) for part in encoders if part]
        self._hooks.append(pipe.unet.register_forward_hook(self._note, with_kwargs=True))  # before the patch's ends

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _read(self, _: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        layers = [output.last_hidden_state, *(output.hidden_states or ())]
        rows = [row for row, text in enumerate(ids.tolist()) if self._knife not in text]
        self._without += [states[row].detach() for states in layers for row in rows]

    def _note(self, _: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.handle is None:
            return
        states = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        prompts = {row for row, state in enumerate(states) if not self._is_without(state)}
        call = self.handle._attachment._calls.now.call  # what no public counter tells: which rows
        self.calls.append((len(states), prompts, set(range(len(states))[call.rows]) if call else set()))

    def _is_without(self, state: Tensor) -> bool:
        known = any(torch.equal(state[:, : other.shape[-1]], other) for other in self._without)
        return known or not state.any()  # SDXL's state of no negative prompt is zero

    @property
    def rows(self) -> str:
        """Which rows are corrected, in the table's words."""
        if not any(prompts for _, prompts, _ in self.calls):
            return EMPTY
        if all(len(prompts) == total for total, prompts, _ in self.calls):
            return PLAIN
        if all(corrected == prompts for _, prompts, corrected in self.calls):
            return THEIRS
        return ALL if all(len(corrected) == total for total, _, corrected in self.calls) else PARTLY


@contextmanager
def watched(pipe: Any) -> Iterator[Watch]:
    watch = Watch(pipe)
    try:
        yield watch
    finally:
        watch.close()


# ---- the proofs --------------------------------------------------------------------------------------------------


def takes(function: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in names}


def build(name: str) -> Any:
    row, kind = PATCHED[name], getattr(diffusers, name)
    pipe = base(name, row.unet)
    if row.made:
        return quiet(row.made(pipe))
    return quiet(kind(**takes(kind, {**pipe.components, "requires_safety_checker": False, **row.parts(pipe)})))


def draw(pipe: Any) -> Tensor:
    row, generator = PATCHED[type(pipe).__name__], torch.Generator().manual_seed(0)
    if row.draw:
        images = row.draw(pipe, generator)[0]
    else:
        options = takes(type(pipe).__call__, {**CALL, "generator": generator})
        images = pipe(**{**options, **row.call})[0]
    return torch.as_tensor(np.asarray(images, dtype=np.float32))


def in_its_class(name: str, row: Refused) -> Any:
    """A pipeline with every component that its class takes: those of a small one, which a patch fits, where it can."""
    kind, small = getattr(diffusers, name), even()
    assert not set(row.without) & inspect.signature(kind).parameters.keys()
    given = {part: small.components.get(part) or nn.Identity() for part in inspect.signature(kind).parameters}
    pipe = kind.__new__(kind)
    vars(pipe).update(given | takes(kind, row.parts(small)))
    return pipe


def test_the_table_has_every_pipeline_that_takes_a_unet_and_no_other():
    kinds = {name: getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name}
    not_here = {name for name, kind in kinds.items() if isinstance(kind, DummyObject) and "Flax" not in name}
    here = kinds.keys() - not_here
    takers = {name for name in here if inspect.isclass(kinds[name]) and _takes_unet(kinds[name])}
    by_blocks = {name for name, row in PATCHED.items() if row.made}
    assert takers | not_here | by_blocks == PIPELINES.keys()
    assert by_blocks <= here


def _takes_unet(kind: type) -> bool:
    return any("unet" in name for name in inspect.signature(kind).parameters)


@pytest.mark.parametrize("name", PATCHED)
def test_no_row_that_carries_the_prompt_goes_uncorrected(name):
    row, pipe = PATCHED[name], build(name)
    with watched(pipe) as watch:
        original = draw(pipe)
        assert original.isfinite().all()
        for kind in ["control"] if "XL" in name else sorted(PATCH_KINDS):
            watch.calls.clear()
            with apply(pipe, new_artifact(pipe.unet, kind)) as handle:
                watch.handle = handle
                patched = draw(pipe)
                watch.handle = None
            stats = handle.stats
            assert stats.unet_calls == stats.patched_calls == stats.acted_calls == len(watch.calls) > 0
            assert all(prompts <= corrected for _, prompts, corrected in watch.calls)
            assert stats.acted_rows == sum(len(corrected) for _, _, corrected in watch.calls)
            assert watch.rows == row.rows
            assert patched.isfinite().all()
            assert not torch.equal(patched, original)
        assert torch.equal(draw(pipe), original)


@pytest.mark.parametrize("name", REFUSED)
def test_a_patch_that_would_be_wrong_is_refused_in_one_line(name):
    row = REFUSED[name]
    with pytest.raises(row.error, match=row.match) as caught:
        apply(in_its_class(name, row), even_artifact())
    assert "\n" not in str(caught.value)


def test_the_same_patch_fits_the_pipeline_they_are_made_of():
    """Control of those that are refused."""
    pipe = even()
    with apply(pipe, even_artifact()) as handle:
        assert handle.is_active


@pytest.mark.parametrize("make", [motion, controlnet_xs])
def test_a_patched_unet_that_a_pipeline_makes_another_one_of_is_noticed(make):
    """AnimateDiff and ControlNet-XS copy weights and no hooks; the VAE is the same."""
    pipe = even(layers_per_block=1 if make is motion else 2)
    name, part = ("AnimateDiff", "motion_adapter") if make is motion else ("StableDiffusionControlNetXS", "controlnet")
    kind = getattr(diffusers, f"{name}Pipeline")

    def made() -> Any:
        parts = {**pipe.components, "requires_safety_checker": False, part: make(pipe)}
        options = takes(kind.__call__, {**CALL, "num_frames": 2})
        return quiet(kind(**takes(kind, parts)))(**options)

    made()  # control: it does run
    with apply(pipe, new_artifact(pipe.unet)), pytest.raises(PatchBypassed, match="shares this VAE"):
        made()


# ---- as a table --------------------------------------------------------------------------------------------------


def markdown() -> str:
    """The table, pipelines with equal fates on one line."""
    fates: dict[tuple[str, str], list[str]] = {}
    for name, row in PIPELINES.items():
        what = row.what if isinstance(row, Patched) else f"{row.what}: {row.why}"
        fates.setdefault((what, row.rows), []).append(name.removesuffix("Pipeline"))
    lines = [f"| {', '.join(names)} | {what} | {rows} |" for (what, rows), names in sorted(fates.items(), key=_order)]
    return "\n".join(["| pipeline | what happens | rows that are corrected |", "|---|---|---|", *lines])


def _order(fate: tuple[tuple[str, str], list[str]]) -> tuple[int, str, str]:
    (what, rows), _ = fate
    return ("patched", "refused", "does not apply").index(what.partition(":")[0]), rows, what


if __name__ == "__main__":
    print(markdown())
