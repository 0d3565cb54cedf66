"""The training loop, on accelerate; it knows no objective and no patch kind by name.

Every batch, noise and timestep is a function of (seed, step), and a checkpoint holds everything else, so a run that was
killed and resumed ends in the same file as one that was not.
"""

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
from tqdm import tqdm

from safepatch.artifact.patch_artifact import PatchArtifact
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
from safepatch.training.folder import RunFolder
from safepatch.training.gating import fit_gate
from safepatch.training.state import State
from safepatch.training.validation import save_validation_grid


class Interrupted(SafepatchError):
    """Ctrl-C during training; a checkpoint was kept."""


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
    out = RunFolder.claim(config)
    accelerator = _accelerator(config.training, out)
    components = Components.of(pipe).freeze().to(accelerator.device)
    require_unet(components.unet, "training")
    bank = bank or build_bank(components, category, config.data)
    run = Run(config, components, bank, _fresh_state(components, config, bank), accelerator)
    if out.checkpoint.is_file():
        run.state.load(out.checkpoint)
    if accelerator.is_main_process:
        out.rewind_log(run.state.step)
    with _ctrl_c_waits() as asked:
        for values in run.steps():
            step = run.state.step
            if accelerator.is_main_process:
                out.log({"step": step, **values})
                accelerator.log(values, step=step)
                if asked() or step % config.training.checkpoint_every == 0:
                    run.state.save(out.checkpoint)
                if config.training.validate_every and step % config.training.validate_every == 0:
                    save_validation_grid(pipe, run.state.averaged, category, out.path / f"step{step:06d}.png")
            if asked():
                raise Interrupted(f"stopped at step {step}; {out.checkpoint} is kept, run the same command to resume")
    artifact = run.result()
    path = out.path / f"{config.category}.safetensors"
    if accelerator.is_main_process:
        artifact.save(path)
        out.checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return path


@dataclass(frozen=True)
class Run:
    """One training run: what does not change in it, and its state.

    Attributes:
        config: the run's settings.
        components: the frozen base model.
        bank: the training data.
        state: what is trained.
        accelerator: device, precision and processes.
    """

    config: TrainConfig
    components: Components
    bank: PairBank
    state: State
    accelerator: Accelerator

    def steps(self) -> Iterator[dict[str, float]]:
        """Run the remaining optimizer steps; yields the losses of each after counting it."""
        options, state, accelerator = self.config.training, self.state, self.accelerator
        instruction = instruction_states(self.components, [CATEGORIES[self.config.category].instruction])
        wrapped, state.optimizer = accelerator.prepare(state.patch, state.optimizer)
        bar = tqdm(
            total=options.steps,
            initial=state.step,
            desc=f"training {self.config.category}",
            disable=not accelerator.is_main_process,
        )
        while state.step < options.steps:
            for group in state.optimizer.param_groups:
                group["lr"] = group["multiple"] * learning_rate(options, state.step)
            values = self.accumulate(wrapped, instruction)
            accelerator.clip_grad_norm_(wrapped.parameters(), options.max_grad_norm)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.average.update_parameters(accelerator.unwrap_model(wrapped))
            state.step += 1
            bar.update()
            bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
            yield values
        bar.close()

    def accumulate(self, patch: nn.Module, instruction: Tensor) -> dict[str, float]:
        """Back-propagate the batches of one optimizer step; returns the mean of each loss part."""
        options, accelerator, totals = self.config.training, self.accelerator, {}
        pieces = options.gradient_accumulation
        for piece in range(pieces):
            draw = (self.state.step * pieces + piece) * accelerator.num_processes + accelerator.process_index
            batch = self.bank.batch(draw, options.batch_size, options.seed).to(accelerator.device)
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + draw)
            with accelerator.autocast():
                losses = self.config.objective.loss(patch, self.components, instruction, batch, generator)
            accelerator.backward(losses["loss"] / pieces)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value.item() / pieces
        return totals

    def result(self) -> PatchArtifact:
        """The averaged patch as an artifact, a gate fitted when the configuration asks for one."""
        config, patch, gates = self.config, self.state.averaged, {}
        if config.patch.gate:
            patch.add_gate(self.components.unet, config.patch.gate)
            patch.to(self.components.unet.device)
            gate, category = cast(TextGate, patch.gate), CATEGORIES[config.category]
            gates = {config.category: fit_gate(gate, self.components, category, self.bank, config.training.seed)}
        training = {
            "steps": self.state.step,
            "processes": self.accelerator.num_processes,
            "torch": torch.__version__.split("+")[0],
        }
        return _pack(patch, self.components, config, training, gates)


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
    return State.fresh(patch.to(components.unet.device), config.training)


def _accelerator(options: TrainingConfig, out: RunFolder) -> Accelerator:
    AcceleratorState._reset_state()  # it would refuse another precision than an earlier run's in the same process
    log_with = "tensorboard" if options.tensorboard else None
    accelerator = Accelerator(mixed_precision=options.mixed_precision, log_with=log_with, project_dir=out.path)
    if log_with:
        accelerator.init_trackers("tensorboard")
    return accelerator


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


def _pack(
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
