"""The training loop, on accelerate; it knows no objective and no patch kind by name.

Every batch, noise and timestep is a function of (seed, step), and a checkpoint holds everything else, so a run that was
killed and resumed ends in the same file as one that was not.
"""

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from safepatch.artifact import PatchArtifact
from safepatch.config import to_dict
from safepatch.data.pairs import PairBank, build_bank
from safepatch.diffusion import Components
from safepatch.errors import SafepatchError, lookup
from safepatch.patch import PATCH_KINDS, Patch
from safepatch.patch.base import require_unet
from safepatch.patch.files import to_artifact
from safepatch.patch.gate import TextGate
from safepatch.runtime.apply import instruction_states
from safepatch.taxonomy import CATEGORIES
from safepatch.training.config import TrainConfig, TrainingConfig
from safepatch.training.gating import fit_gate
from safepatch.training.validation import save_validation_grid


class Interrupted(SafepatchError):
    """Ctrl-C during training; a checkpoint was kept."""


@dataclass
class State:
    """What changes during training, and all that a checkpoint must hold."""

    patch: Patch
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0

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


def train(pipe: Any, config: TrainConfig, bank: PairBank | None = None) -> Path:
    """Train the patch that `config` describes on the frozen `pipe` and return the path of its file.

    Args:
        pipe: the base model's pipeline; its modules are frozen and moved to the device that trains, not changed.
        config: the run. Its `output` folder gets `<category>.safetensors`, `log.jsonl`, `config.json` and, until the
            run is done, `checkpoint.pt`, from which an interrupted run continues by itself.
        bank: the training data, when it is at hand; else it is built from `config.data`.

    Raises:
        Interrupted: on Ctrl-C, after a checkpoint was written.
        ConfigError: when the model draws with a transformer.
        SafepatchError: when the output folder cannot be written.
    """
    category = lookup(CATEGORIES, config.category, what="category")
    out = _output_folder(config)
    accelerator = _accelerator(config.training, out)
    components = Components.of(pipe).freeze().to(accelerator.device)
    require_unet(components.unet, "training")
    bank = bank or build_bank(components, category, config.data)
    state = _fresh_state(components, config, bank)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.is_file():
        state.load(checkpoint)
    instruction = instruction_states(components, [category.instruction])
    if accelerator.is_main_process:
        _rewind_log(out, state.step)
    with _ctrl_c_waits() as asked:
        for values in _steps(state, components, instruction, bank, config, accelerator):
            if accelerator.is_main_process:
                _log(out, state.step, values, accelerator)
                if asked() or state.step % config.training.checkpoint_every == 0:
                    state.save(checkpoint)
                if config.training.validate_every and state.step % config.training.validate_every == 0:
                    save_validation_grid(pipe, state.averaged, category, out / f"step{state.step:06d}.png")
            if asked():
                raise Interrupted(f"stopped at step {state.step}; {checkpoint} is kept, run the same command to resume")
    gates = {}
    if config.patch.gate:
        state.averaged.add_gate(components.unet, config.patch.gate)
        state.averaged.to(components.unet.device)
        gate = cast(TextGate, state.averaged.gate)
        gates = {config.category: fit_gate(gate, components, category, bank, config.training.seed)}
    return _finish(state, components, config, gates, out, checkpoint, accelerator)


def _steps(
    state: State,
    components: Components,
    instruction: Tensor,
    bank: PairBank,
    config: TrainConfig,
    accelerator: Accelerator,
) -> Iterator[dict[str, float]]:
    """Run the remaining optimizer steps; yields the losses of each after counting it."""
    options = config.training
    wrapped, optimizer = accelerator.prepare(state.patch, state.optimizer)
    state.optimizer = optimizer
    bar = tqdm(
        total=options.steps,
        initial=state.step,
        desc=f"training {config.category}",
        disable=not accelerator.is_main_process,
    )
    while state.step < options.steps:
        for group in optimizer.param_groups:
            group["lr"] = group["multiple"] * learning_rate(options, state.step)
        values = _accumulate(wrapped, state.step, components, instruction, bank, config, accelerator)
        accelerator.clip_grad_norm_(wrapped.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.average.update_parameters(accelerator.unwrap_model(wrapped))
        state.step += 1
        bar.update()
        bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
        yield values
    bar.close()


def _accumulate(
    patch: nn.Module,
    step: int,
    components: Components,
    instruction: Tensor,
    bank: PairBank,
    config: TrainConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Back-propagate the batches of one optimizer step; returns the mean of each loss part."""
    options, totals = config.training, {}
    pieces = options.gradient_accumulation
    for piece in range(pieces):
        draw = (step * pieces + piece) * accelerator.num_processes + accelerator.process_index
        batch = bank.batch(draw, options.batch_size, options.seed).to(accelerator.device)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + draw)
        with accelerator.autocast():
            losses = config.objective.loss(patch, components, instruction, batch, generator)
        accelerator.backward(losses["loss"] / pieces)
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value.item() / pieces
    return totals


def learning_rate(options: TrainingConfig, step: int) -> float:
    """AdamW's rate at `step` (from 0): linear warm-up, then a cosine down to a tenth of the peak."""
    peak = cast(float, options.learning_rate)
    if step < options.warmup:
        return peak * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def _fresh_state(components: Components, config: TrainConfig, bank: PairBank) -> State:
    kind = lookup(PATCH_KINDS, config.patch.kind, what="patch kind")
    patch = kind.from_unet(components.unet, config.patch.sees, **config.patch.layout)
    patch.gradient_checkpointing = config.training.gradient_checkpointing
    for name, value in config.objective.buffers(bank.rows.unsafe_states).items():  # in checkpoints, not in the file
        patch.register_buffer(name, value)
    patch.to(components.unet.device).train()
    average = AveragedModel(patch, multi_avg_fn=get_ema_multi_avg_fn(config.training.ema_decay)).requires_grad_(False)
    return State(patch, average, _optimizer(patch, config.training))


def _optimizer(patch: Patch, options: TrainingConfig) -> torch.optim.Optimizer:
    joints = {id(parameter) for parameter in patch.joints()}
    groups = [
        {"params": [p for p in patch.parameters() if id(p) in joints], "multiple": options.joint_rate},
        {"params": [p for p in patch.parameters() if id(p) not in joints], "multiple": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=cast(float, options.learning_rate), weight_decay=0.0)


def _accelerator(options: TrainingConfig, out: Path) -> Accelerator:
    AcceleratorState._reset_state()  # it would refuse another precision than an earlier run's in the same process
    log_with = "tensorboard" if options.tensorboard else None
    accelerator = Accelerator(mixed_precision=options.mixed_precision, log_with=log_with, project_dir=out)
    if log_with:
        accelerator.init_trackers("tensorboard")
    return accelerator


def _output_folder(config: TrainConfig) -> Path:
    """The run's folder, made and tried; a checkpoint of another configuration in it is refused."""
    out = Path(config.output)
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_dict(config), indent=1, sort_keys=True) + "\n"
        record = out / "config.json"
        if not record.is_file() or record.read_text() != text:  # another process may have written the same just now
            if (out / "checkpoint.pt").is_file():
                raise SafepatchError(
                    f"{out} holds the checkpoint of another configuration; delete it or choose another output="
                )
            record.write_text(text)
    except OSError as error:
        raise SafepatchError(f"cannot write to {out} ({error.strerror}); choose another output=") from error
    return out


@contextmanager
def _ctrl_c_waits() -> Iterator[Callable[[], bool]]:
    """Ctrl-C only asks to stop, so that whole steps are kept; a second one stops at once, at the last checkpoint."""
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield lambda: False  # signals are the main thread's, and what someone else arranged for them stays
        return
    presses: list[int] = []

    def ask(number: int, _: object) -> None:
        presses.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, usual)


def _rewind_log(out: Path, step: int) -> None:
    """Drop what an earlier run logged after `step`, where this one goes on."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    log.write_text("".join(f"{line}\n" for line in lines[:step]))


def _log(out: Path, step: int, values: dict[str, float], accelerator: Accelerator) -> None:
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")
    accelerator.log(values, step=step)


def _finish(
    state: State,
    components: Components,
    config: TrainConfig,
    gates: dict[str, Any],
    out: Path,
    checkpoint: Path,
    accelerator: Accelerator,
) -> Path:
    """Write the averaged patch as an artifact and drop the checkpoint."""
    path = out / f"{config.category}.safetensors"
    if accelerator.is_main_process:
        training = {
            "steps": state.step,
            "processes": accelerator.num_processes,
            "torch": torch.__version__.split("+")[0],
        }
        artifact = pack(state.averaged, components, config, training, gates)
        artifact.save(path)
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return path


def pack(
    patch: Patch, components: Components, config: TrainConfig, training: dict[str, Any], gates: dict[str, Any]
) -> PatchArtifact:
    """The trained patch as an artifact in float16, low-rank when the configuration says so; `gates` by category."""
    instructions = {config.category: CATEGORIES[config.category].instruction}
    recorded = {name: value for name, value in to_dict(config).items() if name != "output"}
    recorded |= {"gate": gates} if gates else {}
    artifact = to_artifact(patch, components.unet, instructions, recorded, training)
    if config.patch.kind == "control" and config.patch.rank:
        artifact = artifact.compress(config.patch.rank)
    return artifact.astype(torch.float16)
