"""Training objectives: one paper, one file; each says what a patch is regressed on."""

from safepatch.objectives.safe_control import SafeControlConfig, safe_control_loss

OBJECTIVES: dict[str, type] = {"safe_control": SafeControlConfig}

__all__ = ["OBJECTIVES", "SafeControlConfig", "safe_control_loss"]
