"""The training loop of the embedded model's parts: cosine rate, weight averaging, checkpoints that resume.

Patches are trained by `safepatch.training`; this loop is only for building the world they live in.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

Loss = Callable[[Any, int], Tensor]  # (module, step) -> scalar


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: optimizer steps in all.
        learning_rate: peak; linear warm-up over `warmup` steps, then cosine down to 5 % of it.
        decay: of the exponential moving average of the weights, which is what is kept.
        save_every: steps between checkpoints.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    decay: float = 0.997
    save_every: int = 500

    def rate(self, step: int) -> float:
        """The learning rate at `step`, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def fit(
    module: Any,
    loss: Loss,
    schedule: Schedule,
    checkpoint: Path,
    stop_after: float = math.inf,
) -> Any:
    """Train `module` and return the average of its weights; picks up from `checkpoint` when it exists.

    Args:
        module: what is trained, in place.
        loss: `(module, step) -> scalar`; draws its own batch from the step number.
        schedule: length and rates.
        checkpoint: file to resume from and save to.
        stop_after: seconds after which to stop early, keeping the checkpoint.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = copy.deepcopy(module).eval().requires_grad_(False)
    start = _resume(checkpoint, module, average, optimizer)
    began, smooth = time.monotonic(), 0.0
    bar = tqdm(range(start, schedule.steps), initial=start, total=schedule.steps, desc=checkpoint.stem, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        value = loss(module, step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        _average(average, module, min(schedule.decay, (1 + step) / (10 + step)))
        smooth = 0.98 * smooth + 0.02 * value.item() if step > start else value.item()
        bar.set_postfix(loss=f"{smooth:.4f}")
        late = time.monotonic() - began > stop_after
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps or late:
            _save(checkpoint, module, average, optimizer, step + 1)
        if late:
            break
    return average


def _average(average: nn.Module, module: nn.Module, decay: float) -> None:
    for kept, current in zip(average.parameters(), module.parameters(), strict=True):
        kept.lerp_(current.detach(), 1 - decay)


def _resume(path: Path, module: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _save(path: Path, module: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"module": module.state_dict(), "average": average.state_dict()}
    partial = path.with_suffix(".partial")
    torch.save({**state, "optimizer": optimizer.state_dict(), "step": step}, partial)
    partial.replace(path)
