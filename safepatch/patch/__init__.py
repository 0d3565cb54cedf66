"""Patch kinds: trainable modules that read a frozen UNet's inputs and return residuals for its features."""

from safepatch.patch.base import Patch, Residuals
from safepatch.patch.control import ControlPatch

PATCH_KINDS: dict[str, type[Patch]] = {"control": ControlPatch}

__all__ = ["PATCH_KINDS", "ControlPatch", "Patch", "Residuals"]
