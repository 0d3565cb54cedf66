"""Everything a training run is made of, as one typed configuration."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from safepatch.config import assigned, load_config
from safepatch.data.bank import DataConfig
from safepatch.diffusion import TEXT_ENCODERS, UNET
from safepatch.errors import ConfigError, lookup
from safepatch.models.load import ModelConfig
from safepatch.objectives import OBJECTIVES, SafeControlConfig
from safepatch.patch import PATCH_KINDS
from safepatch.patch.gate import WIDEST, WINDOWS
from safepatch.patch.lora import STREAMS
from safepatch.patch.picture import KEYS, TEXT

OWN = {"name", "definition", "instruction", "concepts"}  # keys of a category file, and of no run
SHORT = {"model": "path", "objective": "name"}  # `model=x` is `model.path=x`
PRECISIONS = ("no", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adamw8bit")
LEAST = dict.fromkeys(("steps", "batch_size", "gradient_accumulation", "checkpoint_every", "log_every"), 1)
LEAST |= {"warmup": 0, "validate_every": 0}
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass(frozen=True)
class PatchConfig:
    """Which patch to train.

    Attributes:
        kind: `lora`, low-rank updates of the host's own layers; `lite`, narrow branches on the host's features; or
            `control`, a trainable clone of the host's encoder.
        component: what of the pipeline it changes: `unet`, or of a lora patch `text_encoder` or `text_encoder_2`.
        sees: what its cross-attention reads: `instruction`, `instruction+prompt`, or, of a control patch that is to
            be exported as a ControlNet, `prompt`; a lora patch has none.
        rank: of a lora patch, of each update (default 16); of a lite patch, channels per branch (default 64); of a
            control patch, store the deltas of layers wider than this as low-rank factors (default 0, dense).
        depth: of a lite patch, maps in each branch (default 1): 3 x 3 convolutions, of a transformer linear ones.
        stream: of a lora patch on a transformer, whose tokens it acts on: `image`, `text`, or `both` (the default).
        gate: channels of a gate that keeps the patch off what it is not for; 0 trains none.
        windows: words of the widest window that the gate reads alone, so that no words around it can close it; 0 for
            whole prompts only.
        keys: what opens the gate: `text`, `picture` (what is being drawn), `either` of them, or `both`.
    """

    kind: str = "lora"
    component: str = UNET.component
    sees: str = "instruction+prompt"
    rank: int | None = None
    depth: int | None = None
    stream: str | None = None
    gate: int = 32
    windows: int = WINDOWS
    keys: str = TEXT

    def __post_init__(self) -> None:
        """Refuse what would fail only when training is over."""
        for name, value in (("gate", self.gate), ("rank", self.rank or 0)):
            if value < 0:
                raise ConfigError(f"patch.{name} must be at least 0, not {value}")
        lookup(dict.fromkeys((UNET.component, *TEXT_ENCODERS)), self.component, what="component for patch.component")
        if self.component in TEXT_ENCODERS and self.kind != "lora":
            raise ConfigError(f"a {self.kind} patch cannot change the {self.component}; set patch.kind=lora")
        if self.stream is not None:
            lookup(STREAMS, self.stream, what="stream of a transformer")
        if not 0 <= self.windows <= WIDEST:
            raise ConfigError(f"patch.windows must be from 0 to {WIDEST} words, not {self.windows}")
        if lookup(dict.fromkeys(KEYS, self.keys), self.keys, what="set of keys") != TEXT and not self.gate:
            raise ConfigError(f"patch.keys={self.keys} needs a gate to open; set patch.gate, or keys=text")

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
        optimizer: `adamw`, or `adamw8bit`, which keeps its state in 8 bits (needs the extra `8bit`).
        mixed_precision: `no`, `bf16` or `fp16`; with either of these the host is held in that precision, the patch in
            float32.
        gradient_accumulation: batches per step.
        gradient_checkpointing: recompute activations, the host's and the patch's, in the backward pass to save memory.
        device: where to train: `cpu`, `cuda`, `cuda:1`, `mps`; what accelerate chooses if empty.
        seed: of batches, noise and timesteps.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of the log, each of them the mean since the last.
        validate_every: steps between validation pictures; 0 makes none.
        report_to: also log to these: `tensorboard`, `wandb`, `trackio`, `mlflow` (each needs its package).
    """

    steps: int = 1200
    batch_size: int = 4
    learning_rate: float | None = None
    joint_rate: float | None = None
    warmup: int = 20
    ema_decay: float = 0.99
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    mixed_precision: str = "no"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    device: str = ""
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 10
    validate_every: int = 0
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.mixed_precision == "False":  # what YAML makes of a bare `no`
            object.__setattr__(self, "mixed_precision", "no")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"training.{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("learning_rate", "joint_rate", "max_grad_norm"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"training.{name} must be above 0, not {value}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"training.ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        for name in self.report_to:
            lookup(dict.fromkeys(TRACKERS), name, what="tracker for training.report_to")
        for name, allowed in (("mixed_precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"training.{name} must be one of {', '.join(allowed)}, not '{getattr(self, name)}'")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        category: what the patch is for: a shipped category's name, or a category file; not needed where a corpus is at
            hand.
        model: the base; not needed where a pipeline is at hand.
        output: folder for the patch, its log and its checkpoint; `runs/train/CATEGORY-KIND` if not given, and for a
            text encoder's patch `runs/train/CATEGORY-COMPONENT`.
        license: of the patch, an SPDX expression; by default what the base states.
        patch, objective, data, training: the parts.
    """

    category: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    output: str = ""
    license: str = ""
    patch: PatchConfig = field(default_factory=PatchConfig)
    objective: Any = field(default_factory=SafeControlConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        """Fill in what depends on the rest."""
        kind = lookup(PATCH_KINDS, self.patch.kind, what="patch kind")
        if self.data.wordless and not getattr(self.objective, "takes_wordless", False):
            raise ConfigError(f"data.wordless means nothing to objective={self.objective.name}; use safe_control, or 0")
        rates = {name: getattr(self.training, name) for name in ("learning_rate", "joint_rate")}
        rates = {name: getattr(kind, name) if rate is None else rate for name, rate in rates.items()}
        object.__setattr__(self, "training", replace(self.training, **rates))
        if self.data.select and not self.objective.selects:
            names = " or ".join(name for name, schema in OBJECTIVES.items() if schema.selects)
            raise ConfigError(f"data.select chooses pairs of pictures, for objective={names}; leave it out")
        if self.data.strength and not self.objective.selects and self.patch.keys == TEXT:
            names = " or ".join(name for name, schema in OBJECTIVES.items() if schema.selects)
            raise ConfigError(f"data.strength draws the second picture of a pair, for objective={names}; leave it out")

    def load_model(self) -> Any:
        """The base's pipeline, in the precision that it is trained in unless its own is given.

        Raises:
            ConfigError: when no model is named, and as `load_pipeline`.
        """
        usual = {"no": None, "bf16": "bfloat16", "fp16": "float16"}[self.training.mixed_precision]
        return replace(self.model, dtype=self.model.dtype or usual).load()


def load_train_config(path: Path | None, overrides: list[str]) -> TrainConfig:
    """The configuration of a YAML file with dotlist overrides; raises `ConfigError` for anything it cannot mean.

    Args:
        path: a training configuration, or a category file, with all else as it is by default. A category file that a
            configuration names may lie beside it.
        overrides: `key.key=value` items.
    """
    if path is not None and is_category_file(path):
        path, overrides = None, [assigned("category", path), *overrides]
    config = load_config(TrainConfig, path, overrides, choices={"objective": OBJECTIVES}, short=SHORT)
    beside = None if path is None else path.parent / config.category
    if beside is None or Path(config.category).is_file() or not beside.is_file():
        return config
    return replace(config, category=str(beside))


def is_category_file(path: Path) -> bool:
    """Whether a YAML file defines a category, or begins to, rather than how to train for one."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return False  # whoever reads it next says what is wrong
    return isinstance(content, dict) and bool(OWN & content.keys()) and not content.keys() & {"category", "model"}
