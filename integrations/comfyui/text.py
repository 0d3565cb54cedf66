"""ComfyUI's CLIP as safepatch knows text encoders: what reads instructions, and the windows of what was asked."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from safepatch.diffusion import Components
from safepatch.errors import UnsupportedModel

NAMES = ("l", "h", "g")  # ComfyUI's, of CLIP's text encoders; SDXL has the first and the last


class Said(NamedTuple):
    """What an encoder answers, as transformers' encoders do.

    Attributes:
        pooled: (B, width).
        last_hidden_state: (B, tokens, width), of the layer that the model reads.
        hidden_states: the same as the last but one, where SDXL looks for it.
    """

    pooled: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, Tensor]


class Encoder:
    """One of ComfyUI's text encoders, asked as transformers' are; at the model's own layer, whatever clip skip is set.

    Args:
        model: ComfyUI's `SDClipModel`.
    """

    device = torch.device("cpu")  # where it is given tokens; ComfyUI moves them

    def __init__(self, model: Any) -> None:
        self._model = model
        width = model.transformer.get_input_embeddings().weight.shape[1]
        self.config = SimpleNamespace(hidden_size=width, max_position_embeddings=model.max_length)

    def __call__(self, tokens: Tensor, output_hidden_states: bool = False) -> Said:
        """What it makes of tokens (B, T); ComfyUI's encoders read their full length, the rest is cut off again."""
        model, rows = self._model, tokens.tolist()
        rows = [row + [row[-1]] * (model.max_length - len(row)) for row in rows]
        kept = model.layer, model.layer_idx, model.return_projected_pooled
        model.layer, model.layer_idx, model.return_projected_pooled = model.options_default
        try:
            states, pooled = model(rows)[:2]
        finally:
            model.layer, model.layer_idx, model.return_projected_pooled = kept
        states = states[:, : tokens.shape[1]]
        return Said(pooled, states, (states, states))

    def get_input_embeddings(self) -> Any:
        """Of its tokens."""
        return self._model.transformer.get_input_embeddings()

    def register_forward_hook(self, function: Callable, **_: Any) -> RemovableHandle:
        """Let `function(encoder, (tokens,), {layer}, output)` know whatever ComfyUI asks it; tokens (B, T)."""

        def heard(model: Any, args: tuple, output: tuple) -> None:
            function(self, (self._numbers(args[0]),), {"layer": (model.layer, model.layer_idx)}, output)

        return self._model.register_forward_hook(heard)

    def _numbers(self, sections: Sequence[Sequence[Any]]) -> Tensor:
        """Tokens as numbers; an embedding of somebody's (textual inversion) is no word and stands there as an end."""
        end = self._model.special_tokens["end"]
        return torch.tensor([[token if isinstance(token, int) else end for token in row] for row in sections])


@dataclass(frozen=True)
class ComfyText(Components):
    """The parts of a pipeline that there are: what denoises, and ComfyUI's text encoders with their tokenizers."""

    def text_encoders(self) -> list[tuple[Any, Any]]:
        """Tokenizer and text encoder pairs, in the order in which the UNet's text states hold them."""
        pairs = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        return [pair for pair in pairs if pair[1] is not None]


def text_of(clip: Any, unet: Any) -> ComfyText:
    """The text encoders of ComfyUI's CLIP, ready to be asked.

    Args:
        clip: ComfyUI's CLIP.
        unet: the host, whose text states they are to make.

    Raises:
        UnsupportedModel: when it makes other states than the UNet reads.
    """
    found = {name: (_tokenizer(clip, name), Encoder(model)) for name, model in _models(clip).items()}
    first, second = found.get("l") or found.get("h") or (None, None), found.get("g") or (None, None)
    text = ComfyText(
        unet=unet,
        vae=cast(Any, None),
        scheduler=None,
        text_encoder=cast(Any, first[1]),
        tokenizer=cast(Any, first[0]),
        text_encoder_2=second[1],
        tokenizer_2=second[0],
    )
    made, read = sum(encoder.config.hidden_size for _, encoder in text.text_encoders()), unet.config.cross_attention_dim
    if made != read:
        raise UnsupportedModel(
            f"this CLIP makes text states {made} wide, the model reads {read}; connect the model's own CLIP"
        )
    clip.cond_stage_model.reset_clip_options()
    clip.load_model()
    clip.cond_stage_model.set_clip_options({"execution_device": clip.patcher.load_device})
    return text


def _models(clip: Any) -> dict[str, Any]:
    """ComfyUI's models of CLIP's encoders, by ComfyUI's names."""
    models = {name: getattr(clip.cond_stage_model, f"clip_{name}", None) for name in NAMES}
    return {name: model for name, model in models.items() if model is not None}


def _tokenizer(clip: Any, name: str) -> Any:
    """Transformers' tokenizer that ComfyUI's wraps, filling up as ComfyUI does."""
    wrapper = getattr(clip.tokenizer, f"clip_{name}")
    tokenizer = copy.deepcopy(wrapper.tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(wrapper.pad_token)
    tokenizer.model_max_length = wrapper.max_length
    return tokenizer
