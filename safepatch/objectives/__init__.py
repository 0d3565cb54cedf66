"""Training objectives: one paper, one file; each says what a patch is regressed on."""

from safepatch.objectives.base import Objective, Player, Rows, Turn
from safepatch.objectives.safe_control import SafeControlConfig

OBJECTIVES: dict[str, type] = {"safe_control": SafeControlConfig}

__all__ = ["OBJECTIVES", "Objective", "Player", "Rows", "SafeControlConfig", "Turn"]
