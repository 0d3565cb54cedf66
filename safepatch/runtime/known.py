"""Tensors that are known again: by identity, or as what stands in for another."""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

UNPATCHED = "_safepatch_unpatched"  # attribute of text states that were exchanged


def unpatched(tensor: Tensor) -> Tensor:
    """Text states as the frozen encoder made them, where a patch has exchanged them for others; else themselves."""
    return getattr(tensor, UNPATCHED, tensor)


def with_unpatched(tensor: Tensor, own: Tensor) -> Tensor:
    """`tensor`, which stands in for `own`: other patches, and gates, go by that one."""
    setattr(tensor, UNPATCHED, own)
    return tensor


class Known(NamedTuple):
    """Tensors that are known by identity, without a look at their values, as long as nobody writes into them.

    Under `torch.inference_mode` nobody counts what is written; there the values are kept, and looked at.
    """

    tensors: tuple["weakref.ref[Tensor]", ...]
    versions: tuple[int | Tensor, ...]

    @classmethod
    def of(cls, *tensors: Tensor) -> "Known":
        """Remember them."""
        versions = tuple(each.clone() if each.is_inference() else each._version for each in tensors)
        return cls(tuple(map(weakref.ref, tensors)), versions)

    def is_still(self, *tensors: Tensor) -> bool:
        """Whether they are the ones, with the same values."""
        if len(tensors) != len(self.tensors):
            return False
        if not all(seen() is each for seen, each in zip(self.tensors, tensors, strict=True)):
            return False
        return all(
            torch.equal(before, each) if isinstance(before, Tensor) else before == each._version
            for before, each in zip(self.versions, tensors, strict=True)
        )
