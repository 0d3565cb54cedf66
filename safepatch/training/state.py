"""What changes while a patch is trained, and all that a checkpoint must hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from safepatch.errors import SafepatchError
from safepatch.patch import Patch
from safepatch.training.config import TrainingConfig


@dataclass
class State:
    """A patch in training.

    Attributes:
        patch: the weights of this step.
        average: their moving average.
        optimizer: of `patch`; each of its groups has its own `multiple` of the learning rate.
        step: optimizer steps done.
    """

    patch: Patch
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def fresh(cls, patch: Patch, options: TrainingConfig) -> "State":
        """The state before the first step."""
        patch.train()
        average = AveragedModel(patch, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay)).requires_grad_(False)
        return cls(patch, average, _optimizer(patch, options))

    @property
    def averaged(self) -> Patch:
        """The patch with the averaged weights."""
        return cast(Patch, self.average.module)

    def save(self, path: Path) -> None:
        """Write atomically: a kill at any moment leaves the previous checkpoint or the new one."""
        parts = {"patch": self.patch, "average": self.average, "optimizer": self.optimizer}
        partial = path.with_suffix(".partial")
        torch.save({"step": self.step, **{name: part.state_dict() for name, part in parts.items()}}, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue from `path`; raises `SafepatchError` when it was written for another module."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.patch.load_state_dict(saved["patch"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise SafepatchError(f"{path} is of another version of safepatch; delete it to start anew") from error
        self.step = saved["step"]


def _optimizer(patch: Patch, options: TrainingConfig) -> torch.optim.Optimizer:
    joints = {id(parameter) for parameter in patch.joints()}
    groups = [
        {"params": [p for p in patch.parameters() if id(p) in joints], "multiple": options.joint_rate},
        {"params": [p for p in patch.parameters() if id(p) not in joints], "multiple": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=cast(float, options.learning_rate), weight_decay=0.0)
