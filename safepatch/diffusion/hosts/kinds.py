"""The kinds of denoiser that a patch can be attached to, and how each is called.

A UNet takes residuals for its skips and its mid block; the transformers of Stable Diffusion 3 and Flux take them for
the image tokens behind their blocks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TINY_SD3_WIDTH = 320  # of its text states; SD3's are 4096 wide
FLUX_EDGE = 128  # of the latents of 1024 pixels; Flux's configuration names no size
FAMILIES: dict[int, str] = {192: "tiny-sd", 768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}


class HostKind(NamedTuple):
    """One of diffusers' classes of denoisers.

    Attributes:
        noun: what messages call it.
        component: its name in a pipeline.
        arguments: names of the arguments of its `forward`, in their order.
        sample, timestep, states: which of its arguments are the noisy latents, the timestep and the text states.
        conditions: names of what else of a call a patch reads, one row per sample.
        shared: the same, with no rows.
        residuals: of a transformer, the argument that takes a list of them.
        timestep_unit: what its `timestep` counts for a step of the training schedule.
        entry: the part that runs first, and once, however the host is called.
        entry_weight: name of the parameter that reads the latents, in its first columns.
        encoder: the parts that a control patch clones, in the order they run; a host may lack some.
        fingerprint: what two configurations must share for a patch of the one to fit the other.
        text_width: name of the setting that tells how wide the text states are by which gates go.
        guidance_scale: that suits its models.
        calls_apart: whether its pipelines call it once more for the negative prompt, instead of with more rows.
    """

    noun: str
    component: str
    arguments: tuple[str, ...]
    sample: str
    timestep: str
    states: str
    conditions: tuple[str, ...]
    shared: tuple[str, ...]
    residuals: str
    timestep_unit: float
    entry: str
    entry_weight: str
    encoder: tuple[str, ...]
    fingerprint: tuple[str, ...]
    text_width: str
    guidance_scale: float
    calls_apart: bool = False

    def bind(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, however they were given."""
        return {**kwargs, **dict(zip(self.arguments, args, strict=False))}

    def spread(self, residuals: Sequence[Any], blocks: int) -> list[Any]:
        """A transformer's residuals as it spreads them over its blocks, one for each."""
        interval = blocks / len(residuals)
        return [residuals[int(i / (math.ceil(interval) if self is FLUX else interval))] for i in range(blocks)]


UNET = HostKind(
    noun="UNet",
    component="unet",
    arguments=(
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
        "return_dict",
    ),
    sample="sample",
    timestep="timestep",
    states="encoder_hidden_states",
    conditions=("text_embeds", "time_ids"),
    shared=(),
    residuals="",
    timestep_unit=1,
    entry="conv_in",
    entry_weight="conv_in.weight",
    encoder=("conv_in", "time_proj", "time_embedding", "add_time_proj", "add_embedding", "down_blocks", "mid_block"),
    fingerprint=("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim"),
    text_width="cross_attention_dim",
    guidance_scale=7.5,
)
_LEADING = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
_TRANSFORMER = UNET._replace(
    noun="transformer",
    component="transformer",
    arguments=_LEADING,
    sample="hidden_states",
    conditions=("pooled_projections",),
    text_width="pooled_projection_dim",  # CLIP's states are as wide as what is pooled of them
)
_SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "patch_size")
SD3 = _TRANSFORMER._replace(
    arguments=(*_LEADING, "block_controlnet_hidden_states", "joint_attention_kwargs", "return_dict", "skip_layers"),
    residuals="block_controlnet_hidden_states",
    entry="pos_embed",
    entry_weight="pos_embed.proj.weight",
    encoder=("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks"),
    fingerprint=(*_SIZES, "dual_attention_layers", "qk_norm"),
    guidance_scale=7.0,
)
FLUX = _TRANSFORMER._replace(
    arguments=(
        *_LEADING,
        "img_ids",
        "txt_ids",
        "guidance",
        "joint_attention_kwargs",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "return_dict",
        "controlnet_blocks_repeat",
    ),
    conditions=("pooled_projections", "guidance"),
    shared=("img_ids",),
    residuals="controlnet_block_samples",
    timestep_unit=1 / 1000,
    entry="x_embedder",
    entry_weight="x_embedder.weight",
    encoder=("x_embedder", "pos_embed", "time_text_embed", "context_embedder", "transformer_blocks"),
    fingerprint=(*_SIZES, "guidance_embeds"),
    guidance_scale=3.5,
    calls_apart=True,
)
UNSAID: dict[str, Any] = {"dual_attention_layers": (), "guidance_embeds": False}  # of files that do not say
PROJECTED = "text_proj"  # what the configuration of a UNet says that projects its text states
IP_ADAPTER = "ip_image_proj"  # what an adapter writes into a UNet's configuration
TRANSFORMERS: dict[str, HostKind] = {"SD3Transformer2DModel": SD3, "FluxTransformer2DModel": FLUX}


def host_kind(host: Any) -> HostKind:
    """The kind of a denoiser; every other class than those of `TRANSFORMERS` is taken for a UNet."""
    return TRANSFORMERS.get(type(host).__name__, UNET)


def config_kind(config: Mapping[str, Any]) -> HostKind:
    """The kind of the denoiser that a configuration describes, or a patch's fingerprint of one."""
    if "cross_attention_dim" in config:
        return UNET
    return FLUX if config.keys() & {"num_single_layers", "guidance_embeds"} else SD3


def fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configurations of two hosts must share for a patch of the one to fit the other, as plain JSON values."""
    values = {key: config.get(key, UNSAID.get(key)) for key in config_kind(config).fingerprint}
    if (projected := config.get("encoder_hid_dim_type")) not in (None, IP_ADAPTER):  # Kolors is like SDXL but for this
        values["encoder_hid_dim_type"] = projected
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def text_width(host: Any) -> int:
    """How wide the text states are by which gates go: of a transformer, those of its CLIP encoders."""
    kind = host_kind(host)
    return states_width(host.config) if kind is UNET else host.config[kind.text_width]


def states_width(config: Mapping[str, Any]) -> int:
    """How wide the text states are that a UNet is handed, which some project before they attend to them."""
    return config["encoder_hid_dim" if _projects(config) else UNET.text_width]


def projects_states(unet: Any) -> bool:
    """Whether a UNet projects its text states before it attends to them, as Kolors' does."""
    return _projects(unet.config)


def _projects(config: Mapping[str, Any]) -> bool:
    return config.get("encoder_hid_dim_type") == PROJECTED


def family(config: Mapping[str, Any]) -> str:
    """The model family, e.g. `sd1`, of a UNet by the width of its text states; or `unknown`."""
    kind = config_kind(config)
    if kind is not UNET:
        return "flux" if kind is FLUX else "sd3"
    width = config["cross_attention_dim"]
    return FAMILIES.get(width, "unknown") if isinstance(width, int) else "unknown"


def is_tiny_sd3(host: Any) -> bool:
    """Whether it is the embedded transformer, or a sibling of it."""
    return host.config.get("joint_attention_dim") == TINY_SD3_WIDTH


def usual_guidance(host: Any) -> float:
    """The classifier-free guidance scale that suits the model's family; small for the embedded ones (DESIGN.md, 10)."""
    if is_tiny_sd3(host):
        return 3.0
    return 1.5 if family(host.config) == "tiny-sd" else host_kind(host).guidance_scale
