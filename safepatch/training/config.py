"""Everything a training run is made of, as one typed configuration."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from safepatch.config import load_config
from safepatch.data.pairs import PairsConfig
from safepatch.errors import ConfigError, lookup
from safepatch.objectives import OBJECTIVES, SafeControlConfig
from safepatch.patch import PATCH_KINDS


@dataclass(frozen=True)
class PatchConfig:
    """Which patch to train.

    Attributes:
        kind: `control`, a trainable clone of the host's encoder; `lite`, narrow branches on the host's features; or
            `lora`, low-rank updates of the host's own layers.
        sees: what its cross-attention reads: `instruction`, or `instruction+prompt`; a lora patch has none.
        rank: of a control patch, store the deltas of layers wider than this as low-rank factors (0, the default,
            stores them dense); of a lite patch, channels per branch (default 64); of a lora patch, of each update
            (default 16).
        depth: of a lite patch, 3 x 3 convolutions per branch (default 1).
        gate: channels of a gate that keeps the patch off what it is not for; 0 trains none.
    """

    kind: str = "control"
    sees: str = "instruction+prompt"
    rank: int | None = None
    depth: int | None = None
    gate: int = 0

    def __post_init__(self) -> None:
        """Refuse what would fail only when training is over."""
        for name, value in (("gate", self.gate), ("rank", self.rank or 0)):
            if value < 0:
                raise ConfigError(f"patch.{name} must be at least 0, not {value}")

    @property
    def layout(self) -> dict[str, Any]:
        """What `from_unet` is told; a kind's own defaults for what is not set."""
        values = {"rank": None if self.kind == "control" else self.rank, "depth": self.depth}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: optimizer steps.
        batch_size: pairs per step and process; as many preserved rows come with them, unless nothing is preserved.
        learning_rate: peak of AdamW's rate, after a linear warm-up and before a cosine decay to a tenth; the kind's
            own by default.
        joint_rate: multiple of the learning rate for the patch's zero-initialised joints: nothing behind a joint learns
            before the joint has left zero; the kind's own by default.
        warmup: steps of the warm-up.
        ema_decay: of the exponential moving average that is saved.
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: `no`, `bf16` or `fp16`.
        gradient_accumulation: batches per step.
        gradient_checkpointing: recompute the patch's activations in the backward pass to save memory.
        seed: of batches, noise and timesteps.
        checkpoint_every: steps between checkpoints.
        validate_every: steps between validation pictures; 0 makes none.
        tensorboard: also log to tensorboard (needs the extra of that name).
    """

    steps: int = 1200
    batch_size: int = 4
    learning_rate: float | None = None
    joint_rate: float | None = None
    warmup: int = 20
    ema_decay: float = 0.99
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0
    checkpoint_every: int = 100
    validate_every: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("steps", "batch_size", "gradient_accumulation", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} must be at least 1, not {getattr(self, name)}")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ConfigError(f"training.mixed_precision must be no, bf16 or fp16, not '{self.mixed_precision}'")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        category: what the patch is for.
        model: the base: `tiny-sd`, a diffusers folder, a checkpoint file or a Hub id.
        output: folder for the patch, its log and its checkpoint.
        patch, objective, data, training: the parts.
    """

    category: str = MISSING
    model: str = "tiny-sd"
    output: str = "runs/train/${category}"
    patch: PatchConfig = field(default_factory=PatchConfig)
    objective: Any = field(default_factory=SafeControlConfig)
    data: PairsConfig = field(default_factory=PairsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        """Fill in what depends on the kind."""
        kind = lookup(PATCH_KINDS, self.patch.kind, what="patch kind")
        rates = {name: getattr(self.training, name) for name in ("learning_rate", "joint_rate")}
        rates = {name: getattr(kind, name) if rate is None else rate for name, rate in rates.items()}
        object.__setattr__(self, "training", replace(self.training, **rates))


def load_train_config(path: Path | None, overrides: list[str]) -> TrainConfig:
    """The configuration of a YAML file with dotlist overrides; raises `ConfigError` for anything it cannot mean."""
    return load_config(TrainConfig, path, overrides, choices={"objective": OBJECTIVES})
