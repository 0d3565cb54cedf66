"""Whether a patch can act at all: what applies, merges or fuses a file asks here first.

A kind of patch enters its host through some of its parameters, its joints. When all of them are zero, or missing, the
patch changes nothing, whatever its metadata claim.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safepatch.artifact.info import PatchInfo
from safepatch.artifact.tensor_file import spread
from safepatch.errors import ArtifactError

if TYPE_CHECKING:
    from safepatch.artifact.patch_artifact import PatchArtifact

Shapes = Mapping[str, tuple[int, ...]]

TEXT_GATE = ("bias", "detect", "detect_bias", "weigh")
GATE = (*TEXT_GATE, "decide", "hidden", "look", "time")
PICTURE_KEY = ("bias", "decide", "look", "look_bias", "time")
CHUNK = 1 << 17  # values whose magnitudes stay in a core's cache
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by itemsize
# The bits of infinity, by dtype.
INFINITE = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}


@dataclass(frozen=True)
class Kind:
    """What a file of one kind of patch must hold.

    Attributes:
        joints: matches the parameters through which it enters its host.
        gate: parameters of its gate, where it has one.
        layout: what the shapes of its parameters say of its layout, but for the gate.
    """

    joints: re.Pattern[str]
    gate: tuple[str, ...]
    layout: Callable[[Shapes, Mapping[str, int]], dict[str, int]]


def _of_control(shapes: Shapes, _: Mapping[str, int]) -> dict[str, int]:
    """A transformer's has a depth, a UNet's is the host's."""
    depth = sum(re.fullmatch(r"control\.zero\.\d+\.weight", name) is not None for name in shapes)
    return {"depth": depth} if depth else {}


def _of_lite(shapes: Shapes, _: Mapping[str, int]) -> dict[str, int]:
    key = shapes.get("lite.key", ())
    depth = sum(re.fullmatch(r"lite\.(mid_branch|branches\.0)\.mix\.\d+", name) is not None for name in shapes)
    return {"groups": key[0], "rank": key[1], "depth": depth} if len(key) == 3 else {}


def _of_lora(shapes: Shapes, stated: Mapping[str, int]) -> dict[str, int]:
    """Its rank is that of its training, which compressing and merging change; it cannot be above the widest layer's."""
    widest = max((side for shape in shapes.values() for side in shape), default=0)
    return {"rank": min(stated["rank"], widest)} if "rank" in stated else {}


KINDS = {
    "control": Kind(re.compile(r"control\.zero"), GATE, _of_control),
    "lite": Kind(re.compile(r"lite\.(.+\.)?up"), GATE, _of_lite),
    "lora": Kind(re.compile(r"(?!lora\.gate\.)"), TEXT_GATE, _of_lora),
}


def require_acting(artifact: "PatchArtifact", allow_zero: bool = False) -> None:
    """Raise `ArtifactError` unless every part of a patch is what it says it is, and can change an image.

    Of tensors that stand in a file as few are read as will tell.

    Args:
        artifact: any patch.
        allow_zero: let pass what changes nothing by its values: zeros, weights of 0, gates that never open.
    """
    for weight, part in artifact.parts():
        if part.info.kind not in KINDS:
            raise ArtifactError(f"is a patch of kind '{part.info.kind}', not {', '.join(KINDS)}; upgrade safepatch")
        kind, title = KINDS[part.info.kind], part.info.title
        _require_described(part, kind)
        if not allow_zero:
            _require_weights(part.info, weight)
            _require_thresholds(part.info)
        joints = [name for name in part.parameter_names() if kind.joints.match(name)]
        if not joints:
            raise ArtifactError(f"'{title}' lacks the parameters through which it would act; train it again")
        if not allow_zero and all(is_zero(part, name) for name in joints):
            raise ArtifactError(f"'{title}' holds zeros where it would act, so it changes nothing; train it again")


def require_finite(artifact: "PatchArtifact") -> None:
    """Raise `ArtifactError` when a value is NaN or infinite."""

    def require(name: str) -> None:
        if not is_finite(artifact.tensors[name]):
            raise ArtifactError(f"tensor '{name}' holds NaN or infinity; train the patch again")

    spread(require, sorted(artifact.tensors), artifact.nbytes)


def peak(tensor: Tensor) -> float:
    """The largest magnitude; NaN where a value is NaN."""
    return torch.tensor(_largest(tensor), dtype=BITS[tensor.dtype.itemsize]).view(tensor.dtype).item()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return _largest(tensor) < INFINITE[tensor.dtype]


def _largest(tensor: Tensor) -> int:
    """The bits of the largest magnitude; those of NaN are above infinity's.

    Floats of one sign are ordered as their bits are: the largest signed integer is that of the largest positive value,
    the largest unsigned one that of the largest negative one. NumPy's work, unlike torch's, shares no threads and holds
    no lock; so it takes no memory either.
    """
    integer = BITS[tensor.dtype.itemsize]
    bits = tensor.detach().cpu().contiguous().view(integer).reshape(-1).numpy()
    chunks = [bits[at : at + CHUNK] for at in range(0, len(bits), CHUNK)]
    unsigned, positive = bits.dtype.str.replace("i", "u"), torch.iinfo(integer).max
    return max((max(int(part.max()), int(part.view(unsigned).max()) & positive) for part in chunks), default=0)


def is_zero(artifact: "PatchArtifact", name: str) -> bool:
    """Whether the delta of parameter `name` is zero: all of it, or one of its factors."""
    return any(peak(tensor) == 0 for tensor in artifact.stored(name).values())


def _require_weights(info: PatchInfo, weight: float) -> None:
    """Raise unless the part's weight in its bundle and those of what it was merged from are above 0."""
    weights = [(info.categories, weight), *((source["categories"], source["weight"]) for source in info.sources)]
    for categories, each in weights:
        if each <= 0:
            raise ArtifactError(
                f"{', '.join(categories)} has weight {each:g} in this merge, so it does not act; merge again"
            )


def _require_thresholds(info: PatchInfo) -> None:
    """Raise unless every gate could open: no probability is above 1."""
    for category, gate in info.config.get("gate", {}).items():
        if gate["threshold"] >= 1:
            raise ArtifactError(
                f"the gate for {category} opens above {gate['threshold']:g}, which is never; fit it again"
            )
        if gate.get("keys", "text") != "text" and gate.get("picture", {"threshold": 0})["threshold"] >= 1:
            raise ArtifactError(f"the picture key for {category} never opens; fit it again")


def _require_described(part: "PatchArtifact", kind: Kind) -> None:
    """Raise unless the layout is what the shapes say it is, so that it can be built without surprises."""
    title, config, categories = part.info.title, part.info.config, part.info.categories
    if not categories or "sees" not in config:
        missing = "what it sees of the prompt" if categories else "a category"
        raise ArtifactError(f"'{title}' does not name {missing}; train it again")
    shapes = {name: part.shape(name) or () for name in part.parameter_names()}
    stated = config.get("layout", {})
    found = kind.layout(shapes, stated) | _gate_layout(part, kind, shapes, stated)
    for key in sorted(stated.keys() | found.keys()):
        if stated.get(key) != found.get(key):
            raise ArtifactError(f"its layout says {key} {stated.get(key)}, its tensors say {found.get(key)}")
    if stated.get("groups", 1) not in (1, len(categories)):
        raise ArtifactError(f"'{title}' has {stated['groups']} groups for {len(categories)} categories; merge it again")


def _gate_layout(part: "PatchArtifact", kind: Kind, shapes: Shapes, stated: Mapping[str, int]) -> dict[str, int]:
    """What the shapes say of the gates, one for each category; their parameters and thresholds must all be there."""
    prefix, categories = f"{part.info.kind}.gate.", part.info.categories
    held = {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    if not held:
        return {}
    needed = kind.gate if "cross_attention_dim" in part.info.fingerprint else TEXT_GATE  # a transformer's reads no more
    missing = [*sorted({*needed} - held), *sorted({*categories} - part.info.config.get("gate", {}).keys())]
    if missing:
        raise ArtifactError(f"'{part.info.title}' lacks '{missing[0]}' of its gate; fit it again (safepatch gate)")
    gates, width = (*shapes[f"{prefix}detect"], 0, 0)[:2]
    if not gates == len(categories) == (stated.get("gates") or stated.get("groups", 1)):
        raise ArtifactError(f"'{part.info.title}' has {gates} gates for {len(categories)} categories; fit them again")
    return {"gate": width, **({"gates": gates} if "gates" in stated else {}), **_picture_layout(part, held, shapes)}


def _picture_layout(part: "PatchArtifact", held: set[str], shapes: Shapes) -> dict[str, int]:
    """What the shapes say of the keys that look at pictures: all parameters are there, or none, and none needed."""
    keys = {name.removeprefix("picture.") for name in held if name.startswith("picture.")}
    records, title = part.info.config.get("gate", {}), part.info.title
    looking = [category for category in part.info.categories if records[category].get("keys", "text") != "text"]
    missing = sorted({*PICTURE_KEY} - keys) if keys or looking else []
    if missing:
        raise ArtifactError(f"'{title}' lacks '{missing[0]}' of its picture key; fit it again (safepatch gate)")
    for category in looking:
        if "picture" not in records[category]:
            raise ArtifactError(f"'{title}' does not say when the picture key for {category} opens; fit it again")
    return {"picture": (*shapes[f"{part.info.kind}.gate.picture.look"], 0, 0)[1]} if keys else {}
