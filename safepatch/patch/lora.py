"""The lora patch: low-rank updates of the host's own linear layers (LoRA; Hu et al. 2022, arXiv 2106.09685).

It is the kind that needs nothing beside the host at run time: `safepatch.fuse` adds it to the host's weights. Until
then it acts beside each layer, W x + scale * up (down x), and can be taken off. It reads no instruction; of prompt and
timestep it knows what the host's layers are given. It acts from the first layer on, so a gate in front of it judges by
the prompt's text.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import text_width
from safepatch.errors import BaseMismatch, ConfigError
from safepatch.patch.base import Patch
from safepatch.patch.deltas import StoredPatch
from safepatch.patch.draw import Draw
from safepatch.patch.gate import TextGate
from safepatch.patch.layers import linear_layers, taken_layers
from safepatch.patch.places import Acting, PlaceHooks, lent

GATE = "lora.gate."  # what the names of a gate's tensors begin with
# Where in a transformer a patch may act: on the image's tokens, on the text's, or on both; Flux's single blocks,
# through which both go as one, are neither's alone.
STREAMS: dict[str, str] = {
    "both": "",
    "image": r"^transformer_blocks\.\d+\.(attn2?\.to_([qkv]|out\.0)$|ff\.)",
    "text": r"^transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)$|ff_context\.)",
}


class Update(nn.Module):
    """What is added to one layer's output.

    Args:
        up, down: factors (out, r) and (r, in); of a convolution, in is that of all its kernel's places.
        delta: in their place, where a merge has left no factors, (out, in).
    """

    up: nn.Parameter | None
    down: nn.Parameter | None
    delta: nn.Parameter | None

    def __init__(self, up: Tensor | None = None, down: Tensor | None = None, delta: Tensor | None = None) -> None:
        super().__init__()
        for name, weight in {"up": up, "down": down, "delta": delta}.items():
            self.register_parameter(name, None if weight is None else nn.Parameter(weight))

    def forward(self, hidden: Tensor, layer: nn.Module | None = None) -> Tensor:
        """(..., in) -> (..., out); of a convolution, `layer`, (B, in, h, w) -> (B, out, h', w')."""
        if isinstance(layer, nn.Conv2d):
            return self._convolved(hidden, layer)
        if self.up is None or self.down is None:
            return linear(hidden, cast(Tensor, self.delta))
        return linear(linear(hidden, self.down), self.up)

    def _convolved(self, hidden: Tensor, layer: nn.Conv2d) -> Tensor:
        kernel = cast(Tensor, self.delta if self.down is None else self.down)
        kernel = kernel.reshape(len(kernel), layer.in_channels, *layer.kernel_size)
        made = conv2d(hidden, kernel, None, layer.stride, layer.padding, layer.dilation)
        return made if self.up is None else conv2d(made, self.up[:, :, None, None])

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype


class LoraPatch(Patch):
    """One low-rank update per linear layer of the host's transformer blocks.

    Args:
        updates: by the layer's name in the host.
        rank: of each; recorded only.
    """

    kind = "lora"
    learning_rate = 1e-4
    joint_rate = 1.0

    def __init__(self, updates: dict[str, Update], rank: int) -> None:
        super().__init__()
        self.sees, self.layout = "prompt", {"rank": rank}
        self.layers = tuple(updates)
        self.updates = nn.ModuleList(updates.values())
        self.hooks: LayerHooks | None = None  # while it learns

    @classmethod
    def ungated(cls, unet: Any, sees: str, empty: bool, rank: int = 16, **layout: Any) -> Self:
        """A fresh patch: `up` is zero; what it `sees` is the host's business, and there is nothing to leave `empty`."""
        if layout:
            raise ConfigError(f"a lora patch has no '{min(layout)}', only a rank and a gate")
        if rank < 1:
            raise ConfigError(f"a lora patch needs a rank of at least 1, not {rank}")
        return cls(fresh_updates(cls.layers_of(unet), rank, seed=0), rank)

    @staticmethod
    def layers_of(host: Any) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the layers that it may update."""
        return linear_layers(host)

    @classmethod
    def taken_layers(cls, host: Any) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the weight of the layers that a file's updates may be for, convolutions too."""
        return taken_layers(host)

    def new_gate(self, unet: Any, width: int, gates: int) -> TextGate:
        """Fresh gates that read the text."""
        return TextGate(text_width(unet), width, gates)

    def hooks_on(self, unet: Any) -> PlaceHooks | None:
        """Those on the layers that it updates."""
        return LayerHooks(unet, self)

    def forward(self, unet: Any, predict: Callable[..., Any]) -> Any:
        """What `predict`, which calls `unet`, makes with the updates at scale 1."""
        with updated(unet, self):
            return predict()

    def keep_layers(self, pattern: str) -> None:
        """Update those layers only; what is left out is not in the file either."""
        kept = {layer: update for layer, update in self.each() if re.search(pattern, layer)}
        if not kept:
            raise ConfigError(f"this model has no layer like '{pattern}'; choose others, or all")
        self.layers, self.updates = tuple(kept), nn.ModuleList(kept.values())

    def put(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Replace all updates by these: of each layer `up` (out, r) and `down` (r, in).

        What held the old ones, an optimizer for instance, must be made anew.
        """
        self.layers = tuple(factors)
        self.updates = nn.ModuleList(Update(up, down) for up, down in factors.values())
        self.layout = {**self.layout, "rank": max(len(down) for _, down in factors.values())}

    def each(self) -> Iterator[tuple[str, Update]]:
        """Each layer's name with its update."""
        return zip(self.layers, cast(Iterator[Update], iter(self.updates)), strict=True)

    def learning(self, unet: Any) -> AbstractContextManager:
        """Hooks are put on the host's layers once for all of the block."""
        return lent(self, LayerHooks(unet, self))

    def recomputing(self, unet: Any) -> AbstractContextManager:
        """The updates again."""
        return updated(unet, self)

    def joints(self) -> list[nn.Parameter]:
        """The zero-initialised factors."""
        return [parameter for name, parameter in self.updates.named_parameters() if name.endswith(".up")]

    def stored(self, unet: Any) -> StoredPatch:
        """The factors of each layer's update, and the gate's weights."""
        gate, shapes = self.gate.named_parameters() if self.gate else (), {}
        tensors = {f"{GATE}{name}.delta": p.detach().float().cpu() for name, p in gate}
        for layer, update in self.each():
            weights = {form: p.detach().float().cpu() for form, p in update.named_parameters()}
            tensors |= {f"lora.{layer}.weight.{form}": weight for form, weight in weights.items()}
            if "up" in weights:
                shapes[f"lora.{layer}.weight"] = [len(weights["up"]), weights["down"].shape[1]]
        return StoredPatch(tensors, shapes)

    def load(self, unet: Any, artifact: PatchArtifact, dtype: torch.dtype = torch.float32) -> None:
        """Replace every update by the file's, of whatever rank.

        Raises:
            BaseMismatch: when one is for a layer that this host lacks.
        """
        known, updates = self.taken_layers(unet), {}
        if self.gate:  # it stays in float32: its threshold was found so
            values = {name: artifact.delta(f"{GATE}{name}") for name, _ in self.gate.named_parameters()}
            self.gate.load_state_dict(values, assign=True)
        for name in updated_weights(artifact):
            layer = name.removesuffix(".weight")
            if layer not in known:
                raise BaseMismatch(f"this patch changes '{layer}', which this model lacks; use it on its own family")
            if artifact.shape(f"lora.{name}") != known[layer]:
                raise BaseMismatch(f"'{layer}' has another size in this model; use the patch on its own family")
            stored = artifact.stored(f"lora.{name}")
            updates[layer] = Update(**{form: tensor.to(dtype) for form, tensor in stored.items()})
        self.layers, self.updates = tuple(updates), nn.ModuleList(updates.values())


def updated_weights(artifact: PatchArtifact) -> list[str]:
    """Names of the host's weights that a lora patch is for."""
    return [name.removeprefix("lora.") for name in artifact.parameter_names() if not name.startswith(GATE)]


class LayerHooks(PlaceHooks):
    """Hooks on a host's linear layers that add a patch's updates to what they make.

    Where a layer runs on another number of rows than the host, as in PAG, they cannot be told apart: all are updated.
    """

    def __init__(self, unet: Any, patch: LoraPatch) -> None:
        self._updates = dict(patch.each())
        super().__init__(unet, self._updates)

    def _changed(self, place: str, module: nn.Module, now: Acting, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows, update = cast(slice, now.rows), self._updates[place]
        now.left.discard(place)
        is_whole = rows.stop in (None, len(output))
        start = (rows.start or 0) if is_whole else 0
        hidden = args[0][start:]
        own = getattr(module, "base_layer", module)  # PEFT wraps layers that carry a LoRA
        added = update.to(hidden.device)(hidden.to(update.dtype), own).to(output.dtype)
        if now.scale is not None:
            scale = now.scale if is_whole else now.scale.max()[None]
            added = scale.to(hidden.device, output.dtype).reshape(-1, *[1] * (output.ndim - 1)) * added
        return torch.cat((output[:start], output[start:] + added)) if start else output + added


@contextmanager
def updated(unet: Any, patch: LoraPatch) -> Iterator[None]:
    """Within the block, every call of `unet` is updated at scale 1."""
    hooks = patch.hooks or LayerHooks(unet, patch)
    hooks.begin()
    hooks.update(slice(None))
    try:
        yield
    finally:
        hooks.end()
        if hooks is not patch.hooks:
            hooks.hooks.remove()


def fresh_updates(layers: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Update]:
    """Updates that change nothing yet, of layers (out, in) by name: `up` is zero, `down` drawn from `seed`."""
    draw, updates = Draw(seed=seed), {}
    for name, (out, width) in layers.items():
        down = draw.normal(1, min(rank, out, width), width)[0].detach().clone()
        updates[name] = Update(torch.zeros(out, len(down)), down)
    return updates
