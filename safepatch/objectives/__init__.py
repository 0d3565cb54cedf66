"""Training objectives: one paper, one file; each says what a patch is regressed on."""

from safepatch.objectives.adv_unlearn import AdvUnlearnConfig
from safepatch.objectives.all_but_one import AllButOneConfig
from safepatch.objectives.base import Objective, Player, Rows, Turn
from safepatch.objectives.closed_form import ClosedFormConfig
from safepatch.objectives.duo import DUOConfig
from safepatch.objectives.esd import ESDConfig
from safepatch.objectives.leco import LECOConfig
from safepatch.objectives.safe_control import SafeControlConfig
from safepatch.objectives.safegen import SafeGenConfig
from safepatch.objectives.sfd import SFDConfig

OBJECTIVES: dict[str, type] = {
    "safe_control": SafeControlConfig,
    "esd": ESDConfig,
    "leco": LECOConfig,
    "closed_form": ClosedFormConfig,
    "all_but_one": AllButOneConfig,
    "duo": DUOConfig,
    "safegen": SafeGenConfig,
    "adv_unlearn": AdvUnlearnConfig,
    "sfd": SFDConfig,
}

__all__ = ["OBJECTIVES", "Objective", "Player", "Rows", "SafeControlConfig", "Turn"]
