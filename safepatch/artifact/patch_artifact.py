"""A patch as one file: tensors that are deltas (zero = no effect) and everything that says what they are for."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.artifact.acting import is_finite, require_acting, require_finite
from safepatch.artifact.container import DTYPE_NAMES, naming
from safepatch.artifact.info import PatchInfo
from safepatch.artifact.tensor_file import TensorFile
from safepatch.artifact.writer import content_hash, data_of, write_stream
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
            forms `up` (out, r) and `down` (r, rest) together are low-rank. Of a `TensorFile`, they are read when used.
        info: what the patch is.
    """

    tensors: Mapping[str, Tensor]
    info: PatchInfo

    def __post_init__(self) -> None:
        """Refuse names, dtypes and shapes that the format does not know."""
        forms: dict[str, set[str]] = {name: set() for name in self.info.shapes}
        for name, tensor in self.layout.items():
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
        shape, (up, down) = self.info.shapes.get(parameter), (self.layout[f"{parameter}.{f}"] for f in Factors._fields)
        if not shape or not up.ndim == down.ndim == 2:
            return False
        return [*up.shape] == [shape[0], down.shape[0]] and shape[0] * down.shape[1] == math.prod(shape)

    @property
    def layout(self) -> Mapping[str, Tensor]:
        """The tensors by name, of which dtype and shape count: those that stand in a file are not read."""
        return self.tensors.layout if isinstance(self.tensors, TensorFile) else self.tensors

    def parameter_names(self) -> tuple[str, ...]:
        """`<part>.<parameter path>` of every parameter, sorted, without the form."""
        return tuple(sorted({name.rpartition(".")[0] for name in self.tensors}))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Full shape of parameter `name`, None when the patch lacks it."""
        if name in self.info.shapes:
            return tuple(self.info.shapes[name])
        delta = self.layout.get(f"{name}.delta")
        return None if delta is None else tuple(delta.shape)

    def rank(self, name: str) -> int | None:
        """The rank that parameter `name` is stored with, None for dense."""
        return len(self.layout[f"{name}.down"]) if name in self.info.shapes else None

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
        return sum(tensor.nbytes for tensor in self.layout.values())

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor."""
        dtypes = [tensor.dtype for tensor in self.layout.values()]
        return reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    @property
    def content_hash(self) -> str:
        """`0x` and 64 hex digits over tensors and metadata: what `save` stores and `verify` recomputes."""
        return content_hash(self.info.to_metadata(), self.layout, data_of(self.tensors, self.layout))

    @property
    def opened_hash(self) -> str:
        """The same of the file that it was opened from, which stated it truly; empty where it was opened from none."""
        return vars(self).get("_opened_hash", "")

    def parts(self) -> "tuple[Part, ...]":
        """What a bundle keeps apart, bundles inside it opened too; any other patch is its own only part."""
        if not self.info.is_bundle:
            return (Part(1.0, self),)
        opened = [(float(source["weight"]), self.part(index)) for index, source in enumerate(self.info.sources)]
        if sum(len(artifact.tensors) for _, artifact in opened) != len(self.tensors):
            raise ArtifactError("damaged: this bundle holds tensors that belong to none of its parts; merge it again")
        return tuple(
            Part(weight * part.weight, part.artifact) for weight, artifact in opened for part in artifact.parts()
        )

    def part(self, index: int) -> "PatchArtifact":
        """Source `index` of a bundle, as it was before the merge."""
        prefix, source = part_prefix(index), self.info.sources[index]
        if "metadata" not in source:
            raise ArtifactError("damaged: its recipe does not describe its parts; merge it again")
        info = PatchInfo.from_metadata(source["metadata"])
        if isinstance(self.tensors, TensorFile):
            return PatchArtifact(self.tensors.under(prefix), info)
        held = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        return PatchArtifact(held, info)

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
            if self._full_rank(name) > rank:
                delta, dtype = self.delta(name), next(iter(stored.values())).dtype
                stored = {form: cast(name, factor, dtype) for form, factor in factorize(delta, rank)._asdict().items()}
                shapes[name] = list(delta.shape)
            tensors |= {f"{name}.{form}": tensor for form, tensor in stored.items()}
        return PatchArtifact(tensors, replace(self.info, shapes=shapes))

    def _full_rank(self, name: str) -> int:
        """The rank `name` is stored with; 0 for what has no useful rank (biases, gates and the like)."""
        if is_gate(name):
            return 0
        out, *rest = self.shape(name) or (0,)
        return self.rank(name) or (min(out, math.prod(rest)) if len(rest) in (1, 3) else 0)

    def save(self, path: str | Path) -> Path:
        """Write the file, all or nothing; equal artifacts give equal bytes."""
        path = Path(path)
        write_stream(path, self.info.to_metadata(), self.layout, data_of(self.tensors, self.layout))
        return path

    @classmethod
    def open(cls, path: str | Path, allow_zero: bool = False) -> "PatchArtifact":
        """Read a patch into memory, for use.

        Args:
            path: of the file.
            allow_zero: open a patch too that changes nothing: zeros where it would act, weights of 0, closed gates.

        Raises:
            ArtifactError: when it is damaged, altered, not a patch, or a patch that cannot act.
        """
        file = TensorFile.open(Path(path))
        with naming(file.path):
            info = PatchInfo.from_metadata(file.header.metadata)
        tensors = file.load()
        with naming(file.path):
            artifact = cls(tensors, info)
            vars(artifact)["_opened_hash"] = file.header.stated_hash
            require_finite(artifact)
            require_acting(artifact, allow_zero)
        return artifact


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


def verify(path: str | Path, allow_zero: bool = False) -> PatchInfo:
    """Check a whole file as `PatchArtifact.open` does; raises `ArtifactError` unless it is intact and can act."""
    return PatchArtifact.open(path, allow_zero).info
