"""What changes while a patch is trained, and all that a checkpoint must hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from safepatch.errors import ConfigError, SafepatchError
from safepatch.files import is_full, replacing
from safepatch.objectives import Player
from safepatch.patch import Patch
from safepatch.training.config import TrainingConfig


@dataclass
class State:
    """A patch in training.

    Attributes:
        patch: the weights of this step.
        average: their moving average.
        players: the patch's own, and whoever plays with it or against it.
        step: optimizer steps done.
        scaler: of fp16's losses, if there is one.
    """

    patch: Patch
    average: AveragedModel
    players: Sequence[Player]
    step: int = 0
    scaler: Any = field(default=None)

    @property
    def averaged(self) -> Patch:
        """The patch with the averaged weights."""
        return cast(Patch, self.average.module)

    @property
    def parts(self) -> Mapping[str, Any]:
        """What a checkpoint keeps the state of, by name."""
        parts: dict[str, Any] = {"average": self.average}
        for player in self.players:
            parts |= {player.name: player.module, f"{player.name}.optimizer": player.optimizer}
        return parts | ({"scaler": self.scaler} if self.scaler else {})

    def save(self, path: Path) -> None:
        """Write atomically: a kill at any moment, or a full disk, leaves the previous checkpoint or the new one.

        Raises:
            SafepatchError: when it cannot be written.
        """
        try:
            with replacing(path) as file:
                torch.save({"step": self.step, **{name: part.state_dict() for name, part in self.parts.items()}}, file)
        except (OSError, RuntimeError) as error:  # torch's zip writer says RuntimeError where the disk is full
            reason = "the disk is full" if is_full(error) or isinstance(error, RuntimeError) else "cannot write"
            raise SafepatchError(
                f"{reason}: {path}, step {self.step}; the checkpoint before it is kept, make room and run the same "
                "command to resume"
            ) from error

    def load(self, path: Path) -> None:
        """Continue from `path`; raises `SafepatchError` when it was written for another module."""
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise SafepatchError(f"{path} is of another version of safepatch; delete it to start anew") from error
        self.step = saved["step"]


def fresh_average(patch: Patch, decay: float) -> AveragedModel:
    """The moving average of a patch that has not learned yet."""
    return AveragedModel(patch, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)


def patch_player(patch: Patch, options: TrainingConfig) -> Player:
    """The patch as a player; each group of its parameters has its own `multiple` of the learning rate."""
    joints = {id(parameter) for parameter in patch.joints()}
    free = [parameter for parameter in patch.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in free if id(p) in joints], "multiple": cast(float, options.joint_rate)},
        {"params": [p for p in free if id(p) not in joints], "multiple": 1.0},
    ]
    make = _adamw8bit() if options.optimizer == "adamw8bit" else torch.optim.AdamW
    return Player("patch", patch, make(groups, lr=cast(float, options.learning_rate), weight_decay=0.0))


def _adamw8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError("adamw8bit needs bitsandbytes; pip install 'safepatch-diffusion[8bit]'") from error
    return AdamW8bit
