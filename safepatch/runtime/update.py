"""What a lora patch adds to a model's weights, as numbers: no file and no pipeline is touched here."""

from collections.abc import Mapping
from hashlib import sha256
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.artifact.container import raw_bytes
from safepatch.artifact.patch_artifact import Part, PatchArtifact
from safepatch.diffusion import UNET
from safepatch.errors import BaseMismatch, ConfigError
from safepatch.models.weights import DTYPES, Stored
from safepatch.patch import LoraPatch
from safepatch.patch.lora import updated_weights

FLOATS = {name for name, dtype in DTYPES.items() if dtype.is_floating_point and dtype.itemsize > 1}


class Update(NamedTuple):
    """What a lora patch, or a bundle of such, adds to a host.

    Attributes:
        parts: the patches.
        scale: strength of all.
    """

    parts: tuple[Part, ...]
    scale: float

    @classmethod
    def of(cls, artifact: PatchArtifact, scale: float) -> "Update":
        """The update that `artifact` stands for; raises `ConfigError` for another kind or a scale below 0."""
        if not 0 <= scale < float("inf"):
            raise ConfigError(f"scale must be 0 or more, not {scale}")
        for part in artifact.parts():
            kind = part.artifact.info.kind
            if kind != LoraPatch.kind:
                raise ConfigError(f"a {kind} patch is a network of its own and has no weights to fuse; use apply")
        return cls(artifact.parts(), scale)

    @property
    def components(self) -> tuple[str, ...]:
        """Of a pipeline, all that change, sorted."""
        return tuple(sorted({part.artifact.info.component for part in self.parts}))

    def of_component(self, component: str) -> "Update":
        """What of it is for one component, the `unet` for whatever denoises."""
        return Update(tuple(part for part in self.parts if part.artifact.info.component == component), self.scale)

    @property
    def names(self) -> set[str]:
        """The weights of the host that change."""
        return {name for part in self.parts for name in updated_weights(part.artifact)}

    @property
    def digest(self) -> str:
        """SHA-256 of what is added; gates in front of the parts, and so their order in a bundle, make no difference."""
        return f"0x{sha256(b''.join(sorted(map(_digest, self.parts)))).hexdigest()}"

    def delta(self, name: str) -> Tensor:
        """What is added to weight `name`, (out, in) float32."""
        own = f"lora.{name}"
        held = [part for part in self.parts if own in part.artifact.parameter_names()]
        return sum((self.scale * part.weight * part.artifact.delta(own) for part in held), torch.zeros(()))

    def added(self, name: str, weight: Tensor) -> Tensor:
        """`weight`, the host's of that name, with the update: summed in float32, rounded once."""
        delta = self.delta(name).to(weight.device)
        return (weight.float() + delta.reshape(weight.shape)).to(weight.dtype).contiguous()

    def require(self, stored: Mapping[str, Stored]) -> None:
        """Raise, before anything is written, unless every weight is there and can take a small difference.

        Args:
            stored: the host's weights by name.
        """
        missing = sorted(self.names - stored.keys())
        if missing:
            raise BaseMismatch(f"this patch changes '{missing[0]}', which this model lacks; use it on its own family")
        for part in self.parts:
            for name in updated_weights(part.artifact):
                dtype, shape, *_ = stored[name]
                if dtype not in FLOATS:
                    raise ConfigError(
                        f"'{name}' is stored as {dtype} and cannot take a patch; fuse before offloading or quantizing"
                    )
                if (shape[0], prod(shape[1:])) != _size(part.artifact, name):
                    raise BaseMismatch(f"'{name}' has another size in this model; use the patch on its own family")


def _size(artifact: PatchArtifact, name: str) -> tuple[int, int]:
    """Rows and columns of what is added to a weight."""
    stored = artifact.stored(f"lora.{name}")
    if "delta" in stored:
        return len(stored["delta"]), prod(stored["delta"].shape[1:])
    return len(stored["up"]), stored["down"].shape[1]


def _digest(part: Part) -> bytes:
    component = part.artifact.info.component
    seen = sha256(f"{part.weight!r}{'' if component == UNET.component else component}".encode())
    for name in sorted(updated_weights(part.artifact)):
        for form, tensor in sorted(part.artifact.stored(f"lora.{name}").items()):
            seen.update(f"{name}.{form}".encode())
            seen.update(raw_bytes(tensor))
    return seen.digest()
