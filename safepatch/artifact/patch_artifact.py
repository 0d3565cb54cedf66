"""A patch as one file: tensors that are deltas (zero = no effect) and everything that says what they are for."""

import math
import re
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from safepatch.artifact.container import (
    DTYPE_NAMES,
    check_hash,
    content_hash,
    naming,
    read_header,
    write,
)
from safepatch.artifact.info import PatchInfo
from safepatch.errors import ArtifactError, lookup

FORMS = ({"delta"}, {"down", "up"})  # how one parameter may be stored: dense or low-rank


class Factors(NamedTuple):
    """A low-rank delta: `up` (out, r) @ `down` (r, rest), reshaped to the parameter."""

    up: Tensor
    down: Tensor


def factorize(delta: Tensor, rank: int) -> Factors:
    """Best rank-`rank` factors of `delta` (out, *), each carrying sqrt(S) (Eckart & Young 1936); float32."""
    u, s, vh = torch.linalg.svd(delta.flatten(1).float(), full_matrices=False)
    root = s[:rank].sqrt()
    return Factors(up=u[:, :rank] * root, down=root[:, None] * vh[:rank])


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; the smallest and the largest tell, as NaN is both."""
    return not tensor.numel() or all(math.isfinite(end.item()) for end in tensor.aminmax())


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as `dtype`; raises `ArtifactError` when a finite value overflows."""
    result = tensor.to(dtype)
    if is_finite(result) or not is_finite(tensor):
        return result
    raise ArtifactError(f"'{name}' overflows {dtype}; keep it as float32 or use smaller weights")


@dataclass(frozen=True, eq=False)
class PatchArtifact:
    """Deltas of a patch and their description: what training ends in and everything else starts from.

    Attributes:
        tensors: `<part>.<parameter path>.<form>` -> values; form `delta` is dense with the parameter's shape,
            forms `up` (out, r) and `down` (r, rest) together are low-rank.
        info: what the patch is.
    """

    tensors: dict[str, Tensor]
    info: PatchInfo

    def __post_init__(self) -> None:
        """Refuse names, dtypes and shapes that the format does not know."""
        forms: dict[str, set[str]] = {name: set() for name in self.info.shapes}
        for name, tensor in self.tensors.items():
            parameter, _, form = name.rpartition(".")
            forms.setdefault(parameter, set()).add(form)
            if tensor.dtype not in DTYPE_NAMES:
                raise ArtifactError(f"'{name}' is {tensor.dtype}; patches hold {', '.join(DTYPE_NAMES.values())}")
        for parameter, found in forms.items():
            if not parameter or found not in FORMS or not self._fits(parameter, found):
                raise ArtifactError(f"'{parameter}' holds {sorted(found)}; give a delta, or up, down and their shape")

    def _fits(self, parameter: str, forms: set[str]) -> bool:
        if "delta" in forms:
            return parameter not in self.info.shapes
        shape, (up, down) = self.info.shapes.get(parameter), self.factors(parameter)
        if not shape or not all(isinstance(side, int) for side in shape) or not up.ndim == down.ndim == 2:
            return False
        return [*up.shape] == [shape[0], down.shape[0]] and shape[0] * down.shape[1] == math.prod(shape)

    def parameter_names(self) -> tuple[str, ...]:
        """`<part>.<parameter path>` of every parameter, sorted, without the form."""
        return tuple(sorted({name.rpartition(".")[0] for name in self.tensors}))

    def stored(self, name: str) -> dict[str, Tensor]:
        """Form -> tensor of parameter `name`, as stored; empty when the patch lacks it."""
        names = {form: f"{name}.{form}" for form in ("delta", "down", "up")}
        return {form: self.tensors[full] for form, full in names.items() if full in self.tensors}

    def factors(self, name: str) -> Factors:
        """`up` (out, r) and `down` (r, rest) of a low-rank parameter, as stored."""
        return Factors(*(lookup(self.tensors, f"{name}.{form}", what="tensor") for form in Factors._fields))

    def delta(self, name: str) -> Tensor:
        """The dense float32 delta of parameter `name`, in that parameter's shape."""
        if name not in self.info.shapes:
            return lookup(self.tensors, f"{name}.delta", what="tensor").float()
        up, down = self.factors(name)
        return (up.float() @ down.float()).reshape(self.info.shapes[name])

    def deltas(self) -> dict[str, Tensor]:
        """Parameter name -> dense float32 delta."""
        return {name: self.delta(name) for name in self.parameter_names()}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor."""
        dtypes = [tensor.dtype for tensor in self.tensors.values()]
        return reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    @property
    def content_hash(self) -> str:
        """`0x` and 64 hex digits over tensors and metadata: what `save` stores and `verify` recomputes."""
        return content_hash(self.info.to_metadata(), self.tensors)

    def parts(self) -> "tuple[Part, ...]":
        """What a bundle keeps apart, bundles inside it opened too; any other patch is its own only part."""
        if not self.info.is_bundle:
            return (Part(1.0, self),)
        sources = [(index, float(source["weight"])) for index, source in enumerate(self._sources())]
        opened = [(weight, self.part(index)) for index, weight in sources]
        if sum(len(artifact.tensors) for _, artifact in opened) != len(self.tensors):
            raise ArtifactError("damaged: this bundle holds tensors that belong to none of its parts; merge it again")
        return tuple(
            Part(weight * part.weight, part.artifact) for weight, artifact in opened for part in artifact.parts()
        )

    def part(self, index: int) -> "PatchArtifact":
        """Source `index` of a bundle, as it was before the merge."""
        prefix = part_prefix(index)
        held = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        return PatchArtifact(held, PatchInfo.from_metadata(self._sources()[index]["metadata"]))

    def _sources(self) -> list[dict[str, Any]]:
        sources = (self.info.recipe or {}).get("sources")
        if isinstance(sources, list) and all({"weight", "metadata"} <= source.keys() for source in sources):
            return sources
        raise ArtifactError("damaged: its recipe does not describe its parts; merge it again")

    def astype(self, dtype: torch.dtype) -> "PatchArtifact":
        """The same patch with every tensor as `dtype`."""
        return replace(self, tensors={name: cast(name, tensor, dtype) for name, tensor in self.tensors.items()})

    def compress(self, rank: int) -> "PatchArtifact":
        """The same patch, its 2-D and 4-D deltas of larger rank as their best factors of `rank` >= 1; but gates."""
        if rank < 1:
            raise ArtifactError(f"cannot compress to rank {rank}; give a rank of at least 1")
        tensors: dict[str, Tensor] = {}
        shapes = dict(self.info.shapes)
        for name in self.parameter_names():
            stored = self.stored(name)
            if self._rank(name) > rank:
                delta, dtype = self.delta(name), next(iter(stored.values())).dtype
                stored = {form: cast(name, factor, dtype) for form, factor in factorize(delta, rank)._asdict().items()}
                shapes[name] = list(delta.shape)
            tensors |= {f"{name}.{form}": tensor for form, tensor in stored.items()}
        return PatchArtifact(tensors, replace(self.info, shapes=shapes))

    def _rank(self, name: str) -> int:
        """The rank `name` is stored with; 0 for what has no useful rank (biases, gates and the like)."""
        if is_gate(name):
            return 0
        if name in self.info.shapes:
            return self.factors(name).up.shape[1]
        delta = self.tensors[f"{name}.delta"]
        return min(delta.flatten(1).shape) if delta.ndim in (2, 4) else 0

    def save(self, path: str | Path) -> Path:
        """Write the file, all or nothing; equal artifacts give equal bytes."""
        path = Path(path)
        write(path, self.info.to_metadata(), self.tensors)
        return path

    @classmethod
    def open(cls, path: str | Path) -> "PatchArtifact":
        """Read a patch; raises `ArtifactError` when it is damaged, altered, or not a patch."""
        path = Path(path)
        with naming(path):
            header = read_header(path)
            info = PatchInfo.from_metadata(header.metadata)
            check_hash(path, header)
            return cls(load_file(path), info)


def is_gate(name: str) -> bool:
    """Whether tensor or parameter `name` is a gate's."""
    return re.match(r"(part\d+\.)*\w+\.gate\.", name) is not None


class Part(NamedTuple):
    """One patch of a bundle and the weight its residuals are multiplied with."""

    weight: float
    artifact: PatchArtifact


def part_prefix(index: int) -> str:
    """What the tensor names of a bundle's part begin with."""
    return f"part{index}."


def verify(path: str | Path) -> PatchInfo:
    """Check the whole file, its hash and that every value is finite; raises `ArtifactError` otherwise."""
    artifact = PatchArtifact.open(path)
    broken = [name for name, tensor in sorted(artifact.tensors.items()) if not tensor.isfinite().all()]
    if broken:
        raise ArtifactError(f"{path}: tensor '{broken[0]}' holds NaN or infinity; train the patch again")
    return artifact.info
