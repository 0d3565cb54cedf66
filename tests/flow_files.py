"""Small SD3 and Flux pipelines as single files, written from the definition of the layouts they were published in."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from safepatch.tiny.text import MAX_TOKENS
from tests.families import small_transformer_pipe, vae_name

SIZES: dict[str, dict[str, Any]] = {  # heads of which a file tells the width, and Flux's turns by that width
    "sd3": {"num_attention_heads": 1, "attention_head_dim": 64, "caption_projection_dim": 64},
    "sd3.5": {},
    "flux": {"attention_head_dim": 32, "axes_dims_rope": (4, 14, 14)},
}
SIZES["schnell"] = {**SIZES["flux"], "guidance_embeds": False}
PREFIX = "model.diffusion_model."
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))


def small_flow_pipe(name: str) -> Any:
    """A pipeline whose file tells all that its transformer is."""
    return small_transformer_pipe("flux" if name == "schnell" else name, **SIZES[name])


def transformer_layout(transformer: Any) -> dict[str, Tensor]:
    """Every weight of a transformer under its name and in its shape in its makers' layout."""
    made = _flux(transformer) if "Flux" in type(transformer).__name__ else _sd3(transformer)
    return {name: tensor.detach().contiguous().clone() for name, tensor in made.items()}


def vae_layout(pipe: Any) -> dict[str, Tensor]:
    """The autoencoder's weights likewise, without a prefix."""
    return {
        vae_name(name): tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
        for name, tensor in pipe.vae.state_dict().items()
    }


def write_flow_file(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> Path:
    """A single file of these tensors, cast first where a dtype is given."""
    save_file({name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under longer names."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def new_clip(width: int, with_projection: bool) -> Any:
    """A small text encoder with heads of 64, as CLIP's are."""
    sizes = {"vocab_size": 1209, "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": width // 64, "max_position_embeddings": MAX_TOKENS, "projection_dim": width}
    sizes |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # as in published configurations
    kind = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    with torch.random.fork_rng():
        torch.manual_seed(width)
        return kind(transformers.CLIPTextConfig(**sizes)).eval()


def new_t5(width: int) -> Any:
    """A small T5 encoder of the kind that both families have."""
    sizes = {"vocab_size": 128, "d_model": width, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(width)
        config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        return transformers.T5EncoderModel(config).eval()


def text_layout(encoder: Any) -> dict[str, Tensor]:
    """A text encoder's weights as ComfyUI's files name them: transformers' names, CLIP's inside `text_model`."""
    named = {name: tensor for name, tensor in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}
    if isinstance(encoder, transformers.CLIPTextModel):
        named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in named.items()}
    return {name: tensor.contiguous().clone() for name, tensor in named.items()}


def _layer(name: str, *layers: Any) -> dict[str, Tensor]:
    """Layers one below the other as one, under a name."""
    return {f"{name}.{end}": torch.cat([getattr(each, end) for each in layers]) for end in ("weight", "bias")}


def _turned(name: str, layer: Any) -> dict[str, Tensor]:
    """A norm's modulation, shift before scale."""
    return {f"{name}.{end}": torch.cat(getattr(layer, end).chunk(2)[::-1]) for end in ("weight", "bias")}


def _sd3(t: Any) -> dict[str, Tensor]:
    made = {"pos_embed": t.pos_embed.pos_embed, **_layer("x_embedder.proj", t.pos_embed.proj)}
    times, texts = t.time_text_embed.timestep_embedder, t.time_text_embed.text_embedder
    made |= _layer("t_embedder.mlp.0", times.linear_1) | _layer("t_embedder.mlp.2", times.linear_2)
    made |= _layer("y_embedder.mlp.0", texts.linear_1) | _layer("y_embedder.mlp.2", texts.linear_2)
    made |= _layer("context_embedder", t.context_embedder) | _layer("final_layer.linear", t.proj_out)
    made |= _turned("final_layer.adaLN_modulation.1", t.norm_out.linear)
    for i, block in enumerate(t.transformer_blocks):
        made |= prefixed(f"joint_blocks.{i}.", _sd3_block(block, is_last=i == len(t.transformer_blocks) - 1))
    return made


def _sd3_block(block: Any, is_last: bool) -> dict[str, Tensor]:
    attn, x, context = block.attn, "x_block.", "context_block."
    made = _layer(f"{x}attn.qkv", attn.to_q, attn.to_k, attn.to_v) | _layer(f"{x}attn.proj", attn.to_out[0])
    made |= _layer(f"{context}attn.qkv", attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    made |= _layer(f"{x}adaLN_modulation.1", block.norm1.linear)
    made |= _layer(f"{x}mlp.fc1", block.ff.net[0].proj) | _layer(f"{x}mlp.fc2", block.ff.net[2])
    if attn.norm_q is not None:
        made |= {f"{x}attn.ln_q.weight": attn.norm_q.weight, f"{x}attn.ln_k.weight": attn.norm_k.weight}
        made |= {f"{context}attn.ln_q.weight": attn.norm_added_q.weight}
        made |= {f"{context}attn.ln_k.weight": attn.norm_added_k.weight}
    if (second := block.attn2) is not None:
        made |= _layer(f"{x}attn2.qkv", second.to_q, second.to_k, second.to_v)
        made |= _layer(f"{x}attn2.proj", second.to_out[0])
        made |= {f"{x}attn2.ln_q.weight": second.norm_q.weight, f"{x}attn2.ln_k.weight": second.norm_k.weight}
    if is_last:
        return made | _turned(f"{context}adaLN_modulation.1", block.norm1_context.linear)
    made |= _layer(f"{context}adaLN_modulation.1", block.norm1_context.linear)
    made |= _layer(f"{context}attn.proj", attn.to_add_out)
    net = block.ff_context.net
    return made | _layer(f"{context}mlp.fc1", net[0].proj) | _layer(f"{context}mlp.fc2", net[2])


def _flux(t: Any) -> dict[str, Tensor]:
    made = _layer("img_in", t.x_embedder) | _layer("txt_in", t.context_embedder)
    made |= _layer("final_layer.linear", t.proj_out) | _turned("final_layer.adaLN_modulation.1", t.norm_out.linear)
    for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        embedder = getattr(t.time_text_embed, f"{ours}_embedder", None)
        if embedder is not None:
            made |= _layer(f"{theirs}_in.in_layer", embedder.linear_1)
            made |= _layer(f"{theirs}_in.out_layer", embedder.linear_2)
    for i, block in enumerate(t.transformer_blocks):
        made |= prefixed(f"double_blocks.{i}.", _flux_double(block))
    for i, block in enumerate(t.single_transformer_blocks):
        attn = block.attn
        single = _layer("linear1", attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
        single |= _layer("linear2", block.proj_out) | _layer("modulation.lin", block.norm.linear)
        single |= {"norm.query_norm.scale": attn.norm_q.weight, "norm.key_norm.scale": attn.norm_k.weight}
        made |= prefixed(f"single_blocks.{i}.", single)
    return made


def _flux_double(block: Any) -> dict[str, Tensor]:
    attn = block.attn
    made = _layer("img_attn.qkv", attn.to_q, attn.to_k, attn.to_v) | _layer("img_attn.proj", attn.to_out[0])
    made |= _layer("txt_attn.qkv", attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    made |= _layer("txt_attn.proj", attn.to_add_out)
    norms = {"img": (attn.norm_q, attn.norm_k), "txt": (attn.norm_added_q, attn.norm_added_k)}
    parts = {"img": (block.norm1.linear, block.ff.net), "txt": (block.norm1_context.linear, block.ff_context.net)}
    for stream, (query, key) in norms.items():
        made[f"{stream}_attn.norm.query_norm.scale"] = query.weight
        made[f"{stream}_attn.norm.key_norm.scale"] = key.weight
    for stream, (modulation, net) in parts.items():
        made |= _layer(f"{stream}_mod.lin", modulation)
        made |= _layer(f"{stream}_mlp.0", net[0].proj) | _layer(f"{stream}_mlp.2", net[2])
    return made
