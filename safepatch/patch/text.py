"""A lora patch of a text encoder: what it makes of a prompt's words stands in for what the frozen one makes of them.

The encoder itself is never touched: a twin, which has its weights and hooks of its own, reads the same tokens again. So
gates, negative prompts and whoever else encodes go on reading the model's own states.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from safepatch.diffusion import Components, Conditioning, is_offloaded_to_disk, read_tokens
from safepatch.errors import ConfigError
from safepatch.patch.lora import LayerHooks, LoraPatch

T = TypeVar("T")

HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)
WRAPPERS = ("forward", "_hf_hook", "_old_forward", "_output_capturing_hooks_installed", "_compiled_call_impl")


class TextPatch(LoraPatch):
    """One low-rank update per linear layer of a text encoder's blocks.

    Its gate, if it has one, reads what the frozen encoders make of a prompt, as any other patch's does.
    """

    component = "text_encoder"

    @classmethod
    def of(
        cls, components: Components, component: str, gate: int = 0, gates: int = 0, picture: int = 0, **layout: Any
    ) -> "TextPatch":
        """A fresh patch for one of the text encoders of a pipeline, which are only read.

        Args:
            components: of the pipeline.
            component: `text_encoder` or `text_encoder_2`.
            gate, gates, picture, layout: as in `from_unet`.

        Raises:
            BaseMismatch: for a pipeline without that encoder.
            ConfigError: for one with a transformer.
        """
        patch = cls.ungated(components.encoder(component)[1], "prompt", False, **layout)
        patch.component = component
        if gate:
            patch.add_gate(components.unet, gate, gates, picture)
        return patch

    def add_gate(self, unet: Any, width: int, gates: int = 0, picture: int = 0) -> None:
        """As of any patch, but for a key that looks at what is drawn; raises `ConfigError` for that."""
        if picture:
            raise ConfigError("not supported yet: a patch of a text encoder whose gate looks at pictures; keys=text")
        super().add_gate(unet, width, gates)

    @staticmethod
    def layers_of(host: Any) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the linear layers in an encoder's blocks, as they are called without a LoRA."""
        found = {}
        for name, module in blocks(host).named_modules():
            if name.startswith("encoder.") and isinstance(module, nn.Linear) and ".lora_" not in name:
                found[name.replace(".base_layer", "")] = (module.out_features, module.in_features)
        return found

    @classmethod
    def taken_layers(cls, host: Any) -> dict[str, tuple[int, ...]]:
        """The same."""
        return {**cls.layers_of(host)}

    def forward(self, unet: Any, predict: Callable[..., Any]) -> Any:
        """What `predict` makes of the patched twin, at scale 1, of an encoder."""
        return read_patched(unet, [(self, None)], predict)

    def hooks_on(self, unet: Any) -> None:
        """Nothing: the host is given other states."""

    def learning(self, unet: Any) -> Any:
        """Nothing: every reading has a twin of its own."""
        return super(LoraPatch, self).learning(unet)

    def recomputing(self, unet: Any) -> Any:
        """Nothing: what is recomputed reads states that were made before."""
        return super(LoraPatch, self).recomputing(unet)


class Given(nn.Module):
    """Stands in for an encoder's embeddings of tokens, (B, T, width), positions added."""

    def __init__(self, embedded: Tensor) -> None:
        super().__init__()
        self._embedded = embedded

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """What is given, whatever the tokens."""
        return self._embedded


def blocks(encoder: Any) -> Any:
    """The transformer inside one of CLIP's text encoders, which some classes wrap."""
    return getattr(encoder, "text_model", encoder)


def encoder_fingerprint(encoder: Any) -> dict[str, int]:
    """What two text encoders must share for a patch of the one to fit the other."""
    return {name: int(getattr(encoder.config, name)) for name in ("hidden_size", "num_hidden_layers")}


def twin(module: nn.Module) -> Any:
    """A module that shares every weight with `module`, and has none of its hooks and wrappers."""
    made = object.__new__(type(module))
    made.__dict__.update((name, value) for name, value in vars(module).items() if name not in WRAPPERS)
    made.__dict__.update((name, OrderedDict()) for name in HOOKS)
    made.__dict__["_modules"] = {name: None if each is None else twin(each) for name, each in module._modules.items()}
    return made


def require_readable(encoder: Any) -> None:
    """Raise `ConfigError` unless a text encoder's own weights are where its twin can read them."""
    if any(each.is_meta for each in encoder.parameters()) or is_offloaded_to_disk(encoder):
        raise ConfigError(
            "a text encoder's weights are offloaded layer by layer or to disk, and its patch has to read them; use "
            "enable_model_cpu_offload()"
        )


def read_patched(encoder: Any, strengths: Sequence[tuple[LoraPatch, float | None]], read: Callable[[Any], T]) -> T:
    """What `read` makes of a twin of a text encoder that patches update.

    Args:
        encoder: it is only read.
        strengths: patches, each with its scale; None for 1.
        read: asks the twin.

    Raises:
        ConfigError: where its weights are elsewhere, or it has not, or does not call, a layer that is to be updated.
    """
    require_readable(encoder)
    made, updating = twin(encoder), list[LayerHooks]()
    for patch, scale in strengths:
        try:
            hooks = LayerHooks(blocks(made), patch)
        except AttributeError as error:
            raise ConfigError(f"a text encoder lost a layer that its patch updates ({error}); apply it again") from None
        hooks.begin()
        hooks.update(slice(None), None if scale is None else torch.tensor([scale]))
        updating.append(hooks)
    answer = read(made)
    for missed in (what for hooks in updating for what in hooks.missed):
        raise ConfigError(f"a text encoder cannot be patched as it stands: {missed}")
    return answer


def patched_conditioning(components: Components, patch: nn.Module, asked: Conditioning) -> Conditioning:
    """What a host is told of the same prompts, the states of one text encoder being the patched one's.

    Text states behind the words' own, and zeros, which stand for no words, are left as they are.

    Args:
        components: of the frozen model.
        patch: a `TextPatch`, or one that a distributed trainer has wrapped.
        asked: of B prompts, with their tokens.

    Raises:
        ConfigError: where no words stand behind the states.
    """
    own = cast(TextPatch, getattr(patch, "module", patch))
    number, encoder = components.encoder(own.component)
    if asked.tokens is None:
        raise ConfigError("a text-encoder patch reads words, and none stand behind these states; patch the unet")
    tokens, is_xl = asked.tokens[:, number].to(encoder.device), components.text_encoder_2 is not None

    def read(own: Any) -> tuple[Tensor, Tensor | None]:
        if asked.prefix is not None:
            blocks(own).embeddings = Given(prefixed(encoder, tokens, asked.prefix))
        return read_tokens(own, tokens, is_xl)

    states, pooled = patch(encoder, read)
    start = sum(each.config.hidden_size for _, each in components.text_encoders()[:number])
    made = with_states(asked.states, states, start)
    if pooled is None or asked.pooled is None or encoder is not components.text_encoder_2:
        return asked._replace(states=made)
    said = asked.pooled.any(-1, keepdim=True)
    return asked._replace(states=made, pooled=torch.where(said, pooled.to(asked.pooled), asked.pooled))


def reads_words(patch: nn.Module) -> bool:
    """Whether a patch, or one that a distributed trainer has wrapped, reads words, and not only their text states."""
    return isinstance(getattr(patch, "module", patch), TextPatch)


def embeddings(components: Components, component: str) -> Tensor:
    """Of a text encoder's tokens, (tokens, width), float32."""
    return components.encoder(component)[1].get_input_embeddings().weight.detach().float()


def with_states(states: Tensor, own: Tensor, start: int) -> Tensor:
    """`states` (B, T or more, width) with one encoder's (B, T, width') in its columns, from `start` on; zeros stay."""
    length, stop = own.shape[1], start + own.shape[2]
    said = states.flatten(1).any(1)[:, None, None]
    part = torch.where(said, own.to(states), states[:, :length, start:stop])
    wide = torch.cat((states[:, :length, :start], part, states[:, :length, stop:]), dim=2)
    return torch.cat((wide, states[:, length:]), dim=1)


def prefixed(encoder: Any, tokens: Tensor, prefix: Tensor) -> Tensor:
    """Embeddings of tokens (B, T), positions added, with `prefix` (B, k, width) at the places 1 to k."""
    own, k = blocks(encoder).embeddings(tokens), prefix.shape[1]
    places = blocks(encoder).embeddings.position_embedding.weight[1 : k + 1]
    return torch.cat((own[:, :1], (prefix + places).to(own.dtype), own[:, k + 1 :]), dim=1)


def room_for(tokens: Tensor, k: int) -> Tensor:
    """Tokens (B, encoders, T) with `k` more of the first behind it: the places of a prefix; the last stays the last."""
    first = tokens[..., :1]
    return torch.cat((first, first.expand(*first.shape[:-1], k), tokens[..., 1 : -k - 1], tokens[..., -1:]), dim=-1)
