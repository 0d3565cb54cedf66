"""The factors in a LoRA file, under whatever names programs give them, as a patch's tensors."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import Factors
from safepatch.errors import BaseMismatch, UnsupportedModel
from safepatch.export.joined import parted
from safepatch.export.names import ADAPTER
from safepatch.models.text_layout import TEXT_MODEL
from safepatch.models.weights import Weights

PAIRS = (  # suffixes of down and up, of kohya, PEFT, and diffusers before PEFT
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
FOREIGN = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon of three factors",
}


class Side(NamedTuple):
    """What of a pipeline a file may change.

    Attributes:
        component: diffusers' name for it.
        shapes: of the weights of its layers, by name.
        known: every name that a file may have -> the layers that it is of, in the order of its rows.
    """

    component: str
    shapes: Mapping[str, Sequence[int]]
    known: Mapping[str, tuple[str, ...]]


class Read(NamedTuple):
    """What was found for one side.

    Attributes:
        tensors: a patch's.
        ranks: by layer.
        used: names of the file's tensors that these are.
    """

    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    used: set[str]


def read_factors(
    weights: Weights,
    side: Side,
    dtype: torch.dtype | None = torch.float32,
    ranks: Mapping[str, int] | None = None,
) -> Read:
    """A patch's tensors for one side of a pipeline.

    Args:
        weights: of the file.
        side: what of the pipeline.
        dtype: of the factors, alpha / rank taken into `up`; None as they are stored, of which the scale must be 1.
        ranks: of layers that the file joins in one; None where nobody knows.

    Raises:
        UnsupportedModel: for another kind of file, or half a pair.
        BaseMismatch: when sizes are not the model's.
    """
    tensors, found, used = {}, dict[str, int](), set[str]()
    settings = _Settings(weights, side.component)
    for name in weights.tensors:
        if kind := next((kind for mark, kind in FOREIGN.items() if mark in name), None):
            raise UnsupportedModel(f"{weights.path} is a {kind} ('{name}'); only plain LoRA is read")
        pair = next(((name.removesuffix(down), down, up) for down, up in PAIRS if name.endswith(down)), None)
        if pair is None or (layers := side.known.get(pair[0])) is None:
            continue
        stem, names = pair[0], (f"{pair[0]}{pair[2]}", name, f"{pair[0]}.alpha")
        if names[0] not in weights.tensors:
            raise UnsupportedModel(f"{weights.path} lacks '{names[0]}'; fetch the whole file")
        whole = Factors(*(weights.read(each).flatten(1) for each in names[:2]))  # kernels of convolutions too
        _require_sizes(stem, whole, [side.shapes[layer] for layer in layers])
        alpha = float(weights.read(names[2])) if names[2] in weights.tensors else None
        if dtype:
            scale = settings.scale(layers[0], len(whole.down), alpha)
            whole = Factors(scale * whole.up.to(dtype), whole.down.to(dtype))
        for layer, own in _parts(whole, layers, side.shapes, ranks):
            found[layer] = len(own.down)
            tensors |= {f"lora.{layer}.weight.{form}": own._asdict()[form].contiguous() for form in ("down", "up")}
        used |= set(names)
    return Read(tensors, found, used)


def _require_sizes(stem: str, whole: Factors, shapes: Sequence[Sequence[int]]) -> None:
    """Raise unless factors fit their layer, or all of the layers that are one there."""
    wanted = [sum(shape[0] for shape in shapes), math.prod(shapes[0][1:])]
    if [len(whole.up), whole.down.shape[1]] != wanted or len(whole.down) != whole.up.shape[1]:
        raise BaseMismatch(f"'{stem}' has another size in this model; name the model that it is for: --model")


def _parts(
    whole: Factors, layers: Sequence[str], shapes: Mapping[str, Sequence[int]], ranks: Mapping[str, int] | None
) -> list[tuple[str, Factors]]:
    """Of each layer its own factors; layers without an update are left out."""
    if len(layers) == 1:
        return [(layers[0], whole)]
    known = None if ranks is None else [ranks.get(layer, 0) for layer in layers]
    parts = parted(whole, [shapes[layer][0] for layer in layers], known)
    return [(layer, part) for layer, part in zip(layers, parts, strict=True) if part is not None]


class _Settings:
    """PEFT's, of a file that states them, for one component."""

    def __init__(self, weights: Weights, component: str) -> None:
        try:
            stated = json.loads(weights.metadata.get(ADAPTER, "{}"))
        except ValueError:
            stated = {}
        named = stated.items() if isinstance(stated, dict) else ()
        self._of = {key.removeprefix(f"{component}."): value for key, value in named if key.startswith(f"{component}.")}
        self._alphas: dict[str, float] = self._of.get("alpha_pattern") or {}
        if pattern := next((each for each in self._alphas if not re.fullmatch(r"[\w.]+", each)), None):
            raise UnsupportedModel(f"{weights.path} states alpha by the pattern '{pattern}'; only names are read")

    def scale(self, layer: str, rank: int, alpha: float | None) -> float:
        """alpha / rank, or by rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732) alpha / sqrt(rank)."""
        if alpha is None:
            path = f".{TEXT_MODEL}{layer}"  # a text encoder's, as some classes have it
            named = (value for name, value in self._alphas.items() if path.endswith(f".{name}"))  # by its end, as PEFT
            alpha = next(named, self._of.get("lora_alpha"))
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self._of.get("use_rslora") else rank)
