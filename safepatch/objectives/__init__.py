"""Training objectives: one paper, one file; each says what a patch is regressed on."""

from safepatch.objectives.base import Objective, Player, Rows, Turn
from safepatch.objectives.closed_form import ClosedFormConfig
from safepatch.objectives.esd import ESDConfig
from safepatch.objectives.leco import LECOConfig
from safepatch.objectives.safe_control import SafeControlConfig

OBJECTIVES: dict[str, type] = {
    "safe_control": SafeControlConfig,
    "esd": ESDConfig,
    "leco": LECOConfig,
    "closed_form": ClosedFormConfig,
}

__all__ = ["OBJECTIVES", "Objective", "Player", "Rows", "SafeControlConfig", "Turn"]
