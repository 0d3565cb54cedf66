"""Patch kinds: trainable modules that change what a frozen model makes of a prompt."""

from safepatch.patch.base import Features, Patch, ResidualPatch, Residuals
from safepatch.patch.control import ControlPatch
from safepatch.patch.lite import LitePatch
from safepatch.patch.lora import LoraPatch

PATCH_KINDS: dict[str, type[Patch]] = {"control": ControlPatch, "lite": LitePatch, "lora": LoraPatch}

__all__ = ["PATCH_KINDS", "ControlPatch", "Features", "LitePatch", "LoraPatch", "Patch", "ResidualPatch", "Residuals"]
