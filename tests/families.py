"""Small random pipelines with exactly the structure of each published family, and their single files.

Structure is what the shipped configurations say (blocks, layers, transformer depth, text width, embeddings); only the
channels, the vocabulary and the depth of the text encoders are small.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from safepatch.diffusion import quiet
from safepatch.models.checkpoint import CONFIGS
from safepatch.tiny.text import MAX_TOKENS, new_tokenizer

FAMILIES = ("sd1", "sd1-inpaint", "sd2", "sdxl", "sdxl-refiner")
UNETS = (*FAMILIES, "sd2-inpaint", "sdxl-inpaint")  # nobody has published a refiner that inpaints
PHOTO, MASK = Image.new("RGB", (64, 64), "orange"), Image.new("L", (64, 64), 255)


def small_config(name: str) -> dict[str, dict[str, Any]]:
    """The shipped configuration of a family, `-inpaint` with 9 input channels, at a few channels."""
    family = name.removesuffix("-inpaint")
    config = json.loads((CONFIGS / f"{family}.json").read_text())
    unet = config["unet"]
    unet["block_out_channels"] = [32, 32, 64, 64][: len(unet["block_out_channels"])]
    if isinstance(unet["attention_head_dim"], list):
        unet["attention_head_dim"] = [1] * len(unet["block_out_channels"])
    config["vae"]["block_out_channels"] = [32] * 4
    for key in config.keys() & {"text_encoder", "text_encoder_2"}:
        small = {"vocab_size": 1209, "max_position_embeddings": MAX_TOKENS, "intermediate_size": 64}
        config[key] |= small | {"num_hidden_layers": 1 if family == "sd2" else 2}
    if name.endswith("-inpaint"):
        unet["in_channels"] = 9
        old = config["model_index"]["_class_name"]
        config["model_index"]["_class_name"] = old.removesuffix("Pipeline") + "InpaintPipeline"
    return config


def small_family_pipe(name: str, **sizes: Any) -> Any:
    """A random pipeline of that structure, equal weights every time; `sizes` change the UNet's configuration."""
    config = small_config(name)
    config["unet"] |= sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {part: _new_part(part, entry, config) for part, entry in config["model_index"].items()}
    parts = {key: value for key, value in parts.items() if key != "_class_name"}
    for tokenizer in parts.keys() & ({"tokenizer"} if name.startswith("sd2") else {"tokenizer_2"}):
        parts[tokenizer].pad_token = "!"  # as OpenCLIP's text encoders were trained
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    return quiet(getattr(diffusers, config["model_index"]["_class_name"])(**parts))


def _new_part(name: str, entry: Any, config: dict[str, dict[str, Any]]) -> Any:
    if not isinstance(entry, list) or entry[0] is None:
        return None if isinstance(entry, list) else entry
    library, class_name = entry
    if class_name == "CLIPTokenizer":
        return new_tokenizer()
    if library == "transformers":
        settings = transformers.CLIPTextConfig(**config[name])
        return getattr(transformers, class_name)(settings).eval()
    made = getattr(diffusers, class_name).from_config(config[name])
    return made.eval() if isinstance(made, torch.nn.Module) else made


def small_transformer_pipe(name: str, **sizes: Any) -> Any:
    """A random pipeline of `sd3`, `sd3.5`, `flux` or `flux-fill`; `sizes` change the transformer's configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _small_sd3(name, sizes) if name.startswith("sd3") else _small_flux(name, sizes)


def _small_sd3(name: str, sizes: dict[str, Any]) -> Any:
    better = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if name == "sd3.5" else {}
    options = {"in_channels": 4, "out_channels": 4, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16}
    options |= {"joint_attention_dim": 96, "caption_projection_dim": 32, "pooled_projection_dim": 64}
    transformer = diffusers.SD3Transformer2DModel(
        **{"sample_size": 32, "patch_size": 2, "pos_embed_max_size": 32, **options, **better, **sizes}
    )
    texts = {f"text_encoder{end}": _small_clip(with_projection=True) for end in ("", "_2")}
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_small_vae(transformer.config.in_channels),
            tokenizer=new_tokenizer(),
            tokenizer_2=new_tokenizer(),
            text_encoder_3=_small_t5(96),
            tokenizer_3=_small_t5_tokenizer(),
            **texts,
        )
    )


def _small_flux(name: str, sizes: dict[str, Any]) -> Any:
    options = {"in_channels": 40 if name == "flux-fill" else 16, "out_channels": 16, "num_layers": 4}
    options |= {"num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 48}
    options |= {"pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 4, 8)}
    transformer = diffusers.FluxTransformer2DModel(**{**options, **sizes})
    return quiet(
        diffusers.FluxPipeline(
            transformer=transformer.eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_small_vae(),
            text_encoder=_small_clip(with_projection=False),
            tokenizer=new_tokenizer(),
            text_encoder_2=_small_t5(48),
            tokenizer_2=_small_t5_tokenizer(),
        )
    )


def _small_vae(channels: int = 4) -> Any:
    sizes = {"block_out_channels": (32,) * 4, "latent_channels": channels, "layers_per_block": 1, "sample_size": 64}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return diffusers.AutoencoderKL(**sizes, **blocks, shift_factor=0.1, scaling_factor=1.5).eval()


def _small_clip(with_projection: bool) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=1209,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel)(config).eval()


def _small_t5(width: int) -> Any:
    sizes = {"vocab_size": 128, "d_model": width, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()


def _small_t5_tokenizer() -> Any:
    letters = [(letter, -3.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz,-"]
    return transformers.T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], extra_ids=0)


def draw(pipe: Any, **options: Any) -> Tensor:
    """One 64 x 64 image, (1, 3, 64, 64), of a pipeline of any class here, always from the same noise."""
    kind = type(pipe).__name__
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}
    if "Img2Img" in kind:
        settings |= {"image": PHOTO, "strength": 1.0}
    elif "Inpaint" in kind:
        settings |= {"image": PHOTO, "mask_image": MASK, "strength": 1.0, "height": 64, "width": 64}
    else:
        settings |= {"height": 64, "width": 64}
    generator = torch.Generator().manual_seed(0)
    prompt = options.pop("prompt", "a knife next to a cat")
    return pipe(prompt, generator=generator, **settings | options).images


# ---- the original (CompVis/LDM) layout, written from the layout's own definition ----------------------------------


def original_layout(pipe: Any, family: str) -> dict[str, Tensor]:
    """Every weight of the pipeline under its name and in its shape in the original layout."""
    family = family.removesuffix("-inpaint")
    tensors = {f"model.diffusion_model.{unet_name(name, pipe.unet)}": t for name, t in pipe.unet.state_dict().items()}
    for name, tensor in pipe.vae.state_dict().items():
        attention = ".attentions." in name and tensor.ndim == 2  # was a 1 x 1 convolution
        tensors[f"first_stage_model.{vae_name(name)}"] = tensor[:, :, None, None] if attention else tensor
    if family == "sd1":
        tensors |= _clip(pipe.text_encoder, "cond_stage_model.transformer.")
    elif family == "sd2":
        tensors |= _with_unused_layer(_open_clip(pipe.text_encoder, "cond_stage_model.model."))
    elif family == "sdxl":
        tensors |= _clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= _open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= _open_clip(pipe.text_encoder_2, "conditioner.embedders.0.model.")
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def write_original(pipe: Any, family: str, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """The pipeline as a single file in the original layout."""
    save_file(original_layout(pipe, family), path, metadata)
    return path


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_name(name: str, unet: Any) -> str:
    layer, _, end = name.rpartition(".")
    if layer in UNET_ENDS:
        return f"{UNET_ENDS[layer]}.{end}"
    side, *rest = name.split(".")
    step = unet.config["layers_per_block"] + 1
    if side == "mid_block":
        place = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(rest[:2])]
        return f"middle_block.{place}.{_in_resnet(rest[2:])}"
    level, part, number, inner = int(rest[0]), rest[1], int(rest[2]), rest[3:]
    if part == "downsamplers":
        return f"input_blocks.{step * (level + 1)}.0.op.{inner[-1]}"
    if part == "upsamplers":
        behind = 2 if hasattr(unet.up_blocks[level], "attentions") else 1
        return f"output_blocks.{step * level + step - 1}.{behind}.conv.{inner[-1]}"
    first, blocks = (1, "input_blocks") if side == "down_blocks" else (0, "output_blocks")
    return f"{blocks}.{first + step * level + number}.{int(part == 'attentions')}.{_in_resnet(inner)}"


def _in_resnet(inner: list[str]) -> str:
    return ".".join([RESNET.get(inner[0], inner[0]), *inner[1:]])


def vae_name(name: str) -> str:
    words = name.split(".")
    if words[1:2] == ["down_blocks"] or words[1:2] == ["up_blocks"]:
        down, level = words[1] == "down_blocks", int(words[2])
        level = level if down else 3 - level
        part = {"resnets": f"block.{words[4]}", "downsamplers": "downsample", "upsamplers": "upsample"}[words[3]]
        words[1:5] = ["down" if down else "up", str(level), part]
    elif words[1:3] == ["mid_block", "resnets"]:
        words[1:4] = ["mid", f"block_{int(words[3]) + 1}"]
    elif words[1:3] == ["mid_block", "attentions"]:
        names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
        words[1:] = ["mid", "attn_1", names[words[4]], words[-1]]
    return ".".join(words).replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def _clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}text_model.{n.removeprefix('text_model.')}": t for n, t in encoder.state_dict().items()}


OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.", "encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def _open_clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    made = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            made["text_projection"] = tensor.T
        elif ".q_proj." in name:
            joined = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            made[_open_clip_name(name.replace("self_attn.q_proj.", "attn.in_proj_"))] = joined
        elif ".k_proj." not in name and ".v_proj." not in name:
            made[_open_clip_name(name)] = tensor
    return {f"{prefix}{name}": tensor for name, tensor in made.items()}


def _open_clip_name(name: str) -> str:
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name


def _with_unused_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD2 files hold one layer more than is read."""
    last = "transformer.resblocks.0."
    unused = {name.replace(last, "transformer.resblocks.1."): t + 1 for name, t in tensors.items() if last in name}
    return tensors | unused


@cache
def tokenizer_folder(path: Path) -> Path:
    """A folder with the small tokenizer alone."""
    new_tokenizer().save_pretrained(path)
    return path
