"""Patch kinds: trainable modules that read a frozen UNet's inputs or features and return residuals for the latter."""

from safepatch.patch.base import Features, Patch, Residuals
from safepatch.patch.control import ControlPatch
from safepatch.patch.lite import LitePatch

PATCH_KINDS: dict[str, type[Patch]] = {"control": ControlPatch, "lite": LitePatch}

__all__ = ["PATCH_KINDS", "ControlPatch", "Features", "LitePatch", "Patch", "Residuals"]
