"""How a patch is stored that is its host's weights, or none of them, plus a difference of each of its own."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.errors import BaseMismatch


class StoredPatch(NamedTuple):
    """A patch as its file holds it.

    Attributes:
        tensors: by name and form, as in a `PatchArtifact`.
        shapes: full shape of every parameter that is stored in factors.
    """

    tensors: dict[str, Tensor]
    shapes: dict[str, list[int]]


class Anchored(nn.Module, ABC):
    """What is stored as differences from `anchors`, dense, and so can be rebased."""

    kind: ClassVar[str]

    @abstractmethod
    def anchors(self, unet: Any) -> dict[str, Tensor]:
        """The value each parameter has when its delta is zero, by parameter name."""

    def stored(self, unet: Any) -> StoredPatch:
        """Every parameter's delta, dense."""
        return StoredPatch({f"{self.kind}.{name}.delta": delta for name, delta in self.deltas(unet).items()}, {})

    def load(self, unet: Any, artifact: PatchArtifact, dtype: torch.dtype = torch.float32) -> None:
        """`load_deltas` of what the file holds."""
        self.load_deltas(unet, _Deltas(artifact), dtype)

    def deltas(self, unet: Any) -> dict[str, Tensor]:
        """The patch as differences from `anchors(unet)`, float32; all zero has no effect."""
        anchors = self.anchors(unet)
        return {name: (p.detach().float() - anchors[name].float()).cpu() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_deltas(self, unet: Any, deltas: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Replace every parameter by the host's anchor plus its delta (rebasing), rounded to `dtype`.

        A missing delta counts as zero. A gate stays in float32: its threshold was found so. What held the parameters
        before, an optimizer for instance, must be made anew.

        Raises:
            BaseMismatch: when a delta is for something this host lacks; dropping it would weaken the patch in silence.
        """
        anchors = self.anchors(unet)
        plain = {name.replace(".base_layer.", "."): name for name in anchors}  # PEFT wraps layers that carry a LoRA
        for name in sorted(deltas.keys() - plain.keys()):
            raise BaseMismatch(
                f"this patch changes '{name}', which this model lacks; use it on a model of its own family"
            )
        dtypes = {name: torch.float32 if name.startswith("gate.") else dtype for name in anchors}
        values = {name: _rebased(anchors[name], deltas.get(short), dtypes[name]) for short, name in plain.items()}
        self.load_state_dict(values, strict=False, assign=True)  # a training run's buffers keep their values


class _Deltas(Mapping[str, Tensor]):
    """A patch's dense deltas by the module's parameter names: as they are stored, or multiplied out when asked for."""

    def __init__(self, artifact: PatchArtifact) -> None:
        self._artifact = artifact
        prefix = f"{artifact.info.kind}."
        self._names = {name.removeprefix(prefix): name for name in artifact.parameter_names()}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._artifact.stored(self._names[name])
        return stored["delta"] if "delta" in stored else self._artifact.delta(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _rebased(anchor: Tensor, delta: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`anchor` + `delta`, summed in float32 and rounded once: a tensor of its own."""
    if delta is None:
        return anchor.to(dtype, copy=True)
    if (
        anchor.dtype.itemsize == 1 or torch.result_type(anchor, delta) != dtype
    ):  # else torch's own sum does just that, without copies
        anchor = anchor.float()
    return (anchor + delta.to(anchor.device)).to(dtype)
