"""What a training run will take, told before anything is computed: the device's memory, disk, calls of the host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safepatch.data.bank import SAFE_SHARE, DataConfig
from safepatch.diffusion import FLUX_EDGE, family
from safepatch.errors import lookup
from safepatch.patch import PATCH_KINDS, Patch
from safepatch.training.config import TrainConfig
from safepatch.training.estimate import drawing_bytes, meta_host, pooled_width, step_bytes, told

GIB = 2**30
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATES = {"adamw": 8, "adamw8bit": 2}  # bytes of an optimizer's state per weight
TRANSIENT = {"adamw": 4, "adamw8bit": 0}  # and of what its step makes meanwhile
# Parameters of the text encoders and the autoencoder, which are on the device while latents are drawn.
SURROUNDINGS = {"sd1": 207e6, "sd2": 424e6, "sdxl": 902e6, "sdxl-refiner": 778e6, "tiny-sd": 1e6}
PIXELS = {"tiny-sd": 4}  # per latent; 8 in every other family
FRAGMENTS, CONTEXT = 1.05, 0.6 * GIB  # what a GPU needs beyond what is allocated: a share, and CUDA's own


@dataclass(frozen=True)
class Plan:
    """What a run's needs depend on.

    Attributes:
        kind, sees, layout: of the patch.
        batch_size: pairs per step.
        rows_per_pair: rows of the patched host for each, those that must stay as they are among them.
        held_per_pair: rows whose activations are held at once, as many if it is 0.
        pictures_per_pair: that are drawn for each.
        calls_per_pair: of the host at each step, beside those of its rows.
        dtype: of the host.
        mixed_precision: `no`, `bf16` or `fp16`.
        gradient_checkpointing: whether activations are recomputed.
        gradient_accumulation: batches per step.
        optimizer: `adamw` or `adamw8bit`.
        steps: optimizer steps.
        data: what is drawn, and how.
        guided: whether it is drawn under classifier-free guidance, by two calls a step.
        pushed: whether the rewrite is `guided`: its teacher calls the host twice more.
    """

    kind: str
    sees: str = "instruction+prompt"
    layout: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 4
    rows_per_pair: int = 2
    held_per_pair: int = 0
    pictures_per_pair: int = 2
    calls_per_pair: int = 0
    dtype: torch.dtype = torch.float32
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    gradient_accumulation: int = 1
    optimizer: str = "adamw"
    steps: int = 1200
    data: DataConfig = field(default_factory=DataConfig)
    guided: bool = True
    pushed: bool = False

    @classmethod
    def of(cls, config: TrainConfig, pushed: bool = False) -> "Plan":
        """That of a run's configuration."""
        training, patch = config.training, config.patch
        names = ("batch_size", "mixed_precision", "gradient_checkpointing", "gradient_accumulation", "optimizer")
        dtype = getattr(torch, config.model.dtype) if config.model.dtype else DTYPES[training.mixed_precision]
        return cls(
            patch.kind,
            patch.sees,
            patch.layout,
            rows_per_pair=config.objective.rows_per_pair,
            held_per_pair=config.objective.held_per_pair,
            pictures_per_pair=config.objective.pictures_per_pair,
            calls_per_pair=config.objective.calls_per_pair,
            dtype=dtype,
            steps=training.steps if config.objective.has_steps else 0,
            data=config.data,
            guided=config.data.guidance is None or config.data.guidance > 1,
            pushed=pushed,
            **{name: getattr(training, name) for name in names},
        )

    @property
    def rows(self) -> int:
        """That a step's batch has."""
        return self.batch_size * self.rows_per_pair

    @property
    def held(self) -> int:
        """Rows whose activations are held at once."""
        return self.batch_size * (self.held_per_pair or self.rows_per_pair)

    @property
    def autocast(self) -> torch.dtype | None:
        """What products are computed in, if not in their operands' own precision."""
        return None if self.mixed_precision == "no" else DTYPES[self.mixed_precision]


@dataclass(frozen=True)
class Prediction:
    """What a run will take; sizes in bytes.

    Attributes:
        plan: of the run.
        weights: of the frozen host.
        patch: of the patch, float32.
        optimizer: its state.
        activations_per_row: what each row of a batch adds at the worst moment of a step.
        fixed: what else there is at that moment, whatever the batch: gradients, weights in another precision.
        learning: most that is allocated at once while the patch learns.
        drawing: the same while latents are drawn.
        disk: of latents and text states.
        drawing_calls: rows that the host computes to draw the latents.
        training_calls: the same for training: teacher, patched host, its backward pass, and what is recomputed.
    """

    plan: Plan
    weights: int
    patch: int
    optimizer: int
    activations_per_row: int
    fixed: int
    learning: int
    drawing: int
    disk: int
    drawing_calls: int
    training_calls: int

    @property
    def peak(self) -> int:
        """Most that is allocated at once in the whole run."""
        return max(self.learning, self.drawing)

    @property
    def needed(self) -> int:
        """What the device must have: what is allocated, what lies between, and what CUDA takes for itself."""
        return int(self.peak * FRAGMENTS + CONTEXT)

    def lines(self, calls_per_second: float | None = None) -> list[str]:
        """For people; seconds only where it is known how many rows the host computes in one."""
        plan, took = self.plan, ""
        if calls_per_second:
            took = f", {_duration((self.drawing_calls + self.training_calls) / calls_per_second)}"
        return [
            f"memory: {_gib(self.needed)} of the device: host {_gib(self.weights)}, patch {_gib(self.patch)} and its "
            f"average, optimizer {_gib(self.optimizer)}, {plan.held} rows of {_gib(self.activations_per_row)}, the "
            f"rest {_gib(self.fixed)}; while drawing {_gib(self.drawing)}",
            f"disk: {_gib(self.disk)} in {plan.data.folder}",
            f"rows the host computes: {self.drawing_calls:,} to draw latents, {self.training_calls:,} to train{took}",
        ]

    def warning(self, total: int) -> str | None:
        """One line that says what to change, where a device with `total` bytes is too small; else None."""
        if self.needed <= total:
            return None
        return f"this run needs about {_gib(self.needed)}, the device has {_gib(total)}: {self._remedy(total)}"

    def _remedy(self, total: int) -> str:
        plan, room = self.plan, (total - CONTEXT) / FRAGMENTS
        if self.learning <= room:
            return f"draw fewer pictures at once, data.batch_size={max(1, plan.data.batch_size // 2)}"
        beside = self.learning - plan.held * self.activations_per_row
        fitting = int((room - beside) // self.activations_per_row) * plan.batch_size // plan.held
        ways = {
            "training.mixed_precision=bf16": plan.mixed_precision == "no",
            "training.gradient_checkpointing=true": not plan.gradient_checkpointing,
            f"training.batch_size={fitting}": 1 <= fitting < plan.batch_size,
            "training.optimizer=adamw8bit": plan.optimizer == "adamw" and self.optimizer > GIB,
            "patch.kind=lite": plan.kind == "control",
        }
        named = [way for way, helps in ways.items() if helps]
        return f"try {', '.join(named)}" if named else "use a smaller data.size, or a larger device"


def predict(config: Mapping[str, Any], plan: Plan) -> Prediction:
    """What a run takes with a UNet of this configuration; no weight is read, and seconds are enough.

    Args:
        config: the UNet's, as `unet_config` gives it.
        plan: of the run.
    """
    name = family(config)
    scale = PIXELS.get(name, 8)
    size = plan.data.size or (config.get("sample_size", FLUX_EDGE) or 64) * scale
    host = meta_host(config, size, plan.dtype, scale)
    patch = _meta_patch(host.unet, plan)
    if plan.gradient_checkpointing:
        host.save_memory(lambda: patch.recomputing(host.unet))
    rows, (tokens, _) = max(2, plan.rows), told(config)
    one, all_ = (step_bytes(host, patch, n, tokens, plan.autocast).peak for n in (1, rows))
    weights, own = _bytes(host.unet.parameters()), _bytes(patch.parameters())
    count, row = own // 4, (all_ - one) // (rows - 1)
    state = count * STATES[plan.optimizer]
    fixed = max(0, one - row) + (own if plan.gradient_accumulation > 1 else 0)
    at_worst = max(fixed + plan.held * row, own + count * TRANSIENT[plan.optimizer])
    drawn_at_once = plan.data.batch_size * (2 if plan.guided else 1)
    beside = int(SURROUNDINGS.get(name, 0)) * plan.dtype.itemsize
    return Prediction(
        plan,
        weights,
        own,
        state,
        row,
        fixed,
        weights + 2 * own + state + at_worst,
        weights + beside + drawn_at_once * drawing_bytes(host, 1, tokens),
        _disk(config, size // scale, plan),
        *_calls(plan),
    )


def predict_run(config: TrainConfig, unet: Mapping[str, Any], pushed: bool = False) -> Prediction:
    """`predict` for a run's configuration, the UNet's, and whether the category's rewrite is `guided`."""
    return predict(unet, Plan.of(config, pushed))


def device_bytes() -> int | None:
    """Memory of the GPU that would be used; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _meta_patch(unet: Any, plan: Plan) -> Patch:
    kind = lookup(PATCH_KINDS, plan.kind, what="patch kind")
    patch = kind.from_unet(unet, plan.sees, empty=True, **plan.layout).to("meta").train()
    patch.gradient_checkpointing = plan.gradient_checkpointing
    return patch


def _disk(config: Mapping[str, Any], edge: int, plan: Plan) -> int:
    """Latents in float32; text states of prompts that are all different, in the host's precision."""
    pairs, kept = plan.data.pairs, plan.data.pairs if plan.rows_per_pair > 1 else 1
    latents = plan.pictures_per_pair * pairs * _channels(config) * edge * edge * 4
    tokens, width = told(config)
    text = tokens * width + pooled_width(config)
    return latents + (2 * pairs + kept) * text * plan.dtype.itemsize


def _channels(config: Mapping[str, Any]) -> int:
    """Of latents; Flux's are told as tokens of 2 x 2."""
    return config["in_channels"] // 4 if family(config) == "flux" else config.get("out_channels") or 4


def _calls(plan: Plan) -> tuple[int, int]:
    """Rows that the host computes to draw latents, and to train."""
    pictures = plan.data.pairs * plan.pictures_per_pair
    passes = 4 if plan.gradient_checkpointing else 3
    drawing = pictures * plan.data.steps * (2 if plan.guided else 1)
    training = plan.rows * passes + plan.batch_size * plan.calls_per_pair
    if plan.pushed:
        drawing += int(plan.data.pairs * SAFE_SHARE) * plan.data.steps * 2
        training += plan.batch_size * 2
    return drawing, plan.steps * plan.gradient_accumulation * training


def _bytes(tensors: Any) -> int:
    held: list[Tensor] = list(tensors)
    return sum(tensor.nbytes for tensor in held)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def _duration(seconds: float) -> str:
    return f"about {seconds / 60:.0f} minutes" if seconds >= 120 else f"about {seconds:.0f} seconds"
