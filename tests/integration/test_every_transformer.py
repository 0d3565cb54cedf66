"""Every pipeline of the installed diffusers that takes a transformer of SD3 or Flux: a patch acts on the prompt's rows.

`PIPELINES` is the table; the tests prove each line of it, and that no pipeline is missing. For text that names a knife
it is known which calls' rows carry it; none of them may go uncorrected, and none of the negative prompt's be corrected.
"""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils.import_utils import DummyObject
from torch import Tensor, nn

from safepatch.diffusion import quiet
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from safepatch.runtime.apply import apply
from tests.families import MASK, PHOTO, small_transformer_pipe
from tests.small import INSTRUCTION, awaken

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PROMPT, NEGATIVE = "a knife next to a cat", "a picture of a dog"
CALL: dict[str, Any] = {  # what of it a pipeline takes is passed
    "prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 2, "strength": 1.0, "guidance_scale": 4.0,
    "true_cfg_scale": 2.0, "height": 64, "width": 64, "max_sequence_length": 32, "output_type": "pt", "image": PHOTO,
    "mask_image": MASK, "control_image": PHOTO, "control_mask": MASK,
}  # fmt: skip
TRANSFORMERS = ("SD3Transformer2DModel", "FluxTransformer2DModel")


@dataclass(frozen=True)
class Taken:
    """A pipeline that a patch acts in.

    Attributes:
        name: of the small pipeline whose parts it gets.
        sizes: of its transformer, where they are others.
        parts: beside those, made of the transformer.
        call: options beside those of `CALL`.
    """

    name: str = "flux"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    parts: Callable[[Any], dict[str, Any]] = lambda transformer: {}
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Left:
    """A pipeline that is not drawn with here."""

    why: str


def awakened(controlnet: Any) -> dict[str, Any]:
    for name, part in controlnet.named_modules():
        if "controlnet" in name and isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.1)
    return {"controlnet": controlnet.eval()}


def of_sd3(extra: int) -> Callable[[Any], dict[str, Any]]:
    make = diffusers.SD3ControlNetModel.from_transformer
    return lambda transformer: awakened(make(transformer, num_layers=2, num_extra_conditioning_channels=extra))


def of_flux(transformer: Any) -> dict[str, Any]:
    make = diffusers.FluxControlNetModel.from_transformer
    heads = {"attention_head_dim": 16, "num_attention_heads": 2}
    return awakened(make(transformer, num_layers=2, num_single_layers=1, **heads, load_weights_from_transformer=False))


TWICE = {"in_channels": 32}  # beside the latents, those of a picture that controls
PERTURBED = {"call": {"pag_scale": 1.0}, "parts": lambda transformer: {"pag_applied_layers": ["blocks.1"]}}

PIPELINES: dict[str, Taken | Left] = {
    "FluxControlImg2ImgPipeline": Taken(sizes=TWICE),
    "FluxControlInpaintPipeline": Taken(sizes=TWICE),
    "FluxControlNetImg2ImgPipeline": Taken(parts=of_flux),
    "FluxControlNetInpaintPipeline": Taken(parts=of_flux),
    "FluxControlNetPipeline": Taken(parts=of_flux),
    "FluxControlPipeline": Taken(sizes=TWICE),
    "FluxFillPipeline": Taken("flux-fill", {"in_channels": 2 * 16 + 256}),  # latents, what is around a mask, the mask
    "FluxImg2ImgPipeline": Taken(),
    "FluxInpaintPipeline": Taken(),
    "FluxKontextInpaintPipeline": Taken(),
    "FluxKontextPipeline": Taken(call={"_auto_resize": False}),
    "FluxPipeline": Taken(),
    "StableDiffusion3ControlNetInpaintingPipeline": Taken("sd3", parts=of_sd3(1)),
    "StableDiffusion3ControlNetPipeline": Taken("sd3", parts=of_sd3(0)),
    "StableDiffusion3Img2ImgPipeline": Taken("sd3"),
    "StableDiffusion3InpaintPipeline": Taken("sd3", {"in_channels": 16, "out_channels": 16}),
    "StableDiffusion3PAGImg2ImgPipeline": Taken("sd3", **PERTURBED),
    "StableDiffusion3PAGPipeline": Taken("sd3", **PERTURBED),
    "StableDiffusion3Pipeline": Taken("sd3"),
    "VisualClozeGenerationPipeline": Left("reads rows of pictures laid out in a grid"),
    "VisualClozePipeline": Left("draws by the one above"),
}
TAKEN = {name: row for name, row in PIPELINES.items() if isinstance(row, Taken)}


def test_the_table_has_every_pipeline_that_takes_such_a_transformer_and_no_other():
    kinds = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")}
    here = {name: kind for name, kind in kinds.items() if inspect.isclass(kind) and not isinstance(kind, DummyObject)}
    assert {name for name, kind in here.items() if takes_one(kind)} == PIPELINES.keys()


def takes_one(kind: Any) -> bool:
    try:
        wanted = typing.get_type_hints(kind.__init__).get("transformer")
    except NameError:  # annotated with what is not installed
        wanted = inspect.signature(kind).parameters.get("transformer", inspect.Parameter.empty)
    return getattr(wanted, "__name__", "") in TRANSFORMERS


def build(name: str) -> Any:
    row, kind = TAKEN[name], getattr(diffusers, name)
    pipe = small_transformer_pipe(row.name, **row.sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = {**pipe.components, **row.parts(pipe.transformer)}
    return quiet(kind(**{part: value for part, value in given.items() if part in inspect.signature(kind).parameters}))


def draw(pipe: Any) -> Tensor:
    takes, row = inspect.signature(type(pipe).__call__).parameters, TAKEN[type(pipe).__name__]
    options = {key: value for key, value in CALL.items() if key in takes}
    return pipe(**{**options, **row.call}, generator=torch.Generator().manual_seed(0)).images


def states_of(pipe: Any, text: str) -> Tensor:
    """A text's states as a call's row has them, (1, tokens, width)."""
    given = {"prompt": text, "prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    takes = inspect.signature(pipe.encode_prompt).parameters
    asked = {key: value for key, value in given.items() if key in takes}
    return pipe.encode_prompt(**asked, max_sequence_length=CALL["max_sequence_length"])[0]


@pytest.mark.parametrize("name", TAKEN)
def test_the_prompts_rows_are_corrected_and_no_others(name):
    pipe, rows = build(name), list[tuple[list[bool], list[int]]]()
    takes, original = inspect.signature(type(pipe).__call__).parameters, draw(pipe)
    with torch.no_grad():
        knife = states_of(pipe, PROMPT)

    def note(_: nn.Module, args: tuple, given: dict[str, Any], output: Any) -> None:
        is_knife = [torch.allclose(row, knife[0], atol=1e-5) for row in given["encoder_hidden_states"]]
        call = handle._attachment._calls.now.call  # what no public counter tells: which rows
        rows.append((is_knife, list(range(len(is_knife)))[call.rows] if call else []))

    for kind in ("control", "lora"):
        watch = pipe.transformer.register_forward_hook(note, with_kwargs=True)  # before the patch's ends
        patch = awaken(PATCH_KINDS[kind].from_unet(pipe.transformer), size=0.05)
        with apply(pipe, to_artifact(patch, pipe.transformer, {"weapons": INSTRUCTION})) as handle:
            rows.clear()
            patched = draw(pipe)
        watch.remove()
        assert handle.stats.unet_calls == len(rows) > 0
        assert any(not all(those) for those, _ in rows) == ("negative_prompt" in takes)  # control
        assert all(corrected == [i for i, knives in enumerate(those) if knives] for those, corrected in rows)
        assert handle.stats.acted_rows == sum(len(corrected) for _, corrected in rows) > 0
        assert patched.isfinite().all()
        assert not torch.equal(patched, original)
        assert torch.equal(draw(pipe), original)
