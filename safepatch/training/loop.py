"""The training loop, on accelerate; it knows no objective and no patch kind by name.

Every batch, noise and timestep is a function of (seed, step), and a checkpoint holds everything else, so a run that was
killed and resumed ends in the same file as one that was not. No step waits for the device but those that write
something, and those of fp16, whose scaler must know whether a gradient overflowed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from safepatch.diffusion import Host
from safepatch.files import unwritable
from safepatch.objectives import Objective, Player, Rows, Turn
from safepatch.patch import Patch
from safepatch.progress import bar
from safepatch.training.config import TrainingConfig
from safepatch.training.folder import RunFolder
from safepatch.training.interrupts import Interrupted, ctrl_c_waits
from safepatch.training.state import State, fresh_average, patch_player

NOISE = 1 << 31  # added to the seeds of a step's noise and timesteps: drawn as its batch was, they would tell its pairs


@dataclass(frozen=True)
class Run:
    """One training run, but for what changes in it.

    Attributes:
        label: of the progress bar.
        objective: whose losses.
        host: the frozen model.
        rows: the objective's training data.
        instruction: text states of the safety instruction, (1, tokens, width).
        options: how to train.
        accelerator: device, precision and processes.
        show: draws validation pictures of a patch into a file, if there are to be any.
    """

    label: str
    objective: Objective
    host: Host
    rows: Rows
    instruction: Tensor
    options: TrainingConfig
    accelerator: Accelerator
    show: Callable[[Patch, Path], None] | None = None

    def solved(self, patch: Patch, out: RunFolder) -> Patch:
        """`patch` as an objective without steps makes it; what that says of itself is logged as step 0."""
        errors = self.objective.solve(self.host, patch.to(self.host.device), self.rows)
        if self.accelerator.is_main_process:
            out.rewind_log(-1)
            out.log({"step": 0, **errors})
        return patch

    def finish(self, patch: Patch, out: RunFolder) -> State:
        """Train `patch` to the last step, from the folder's checkpoint where there is one.

        Raises:
            Interrupted: on Ctrl-C, after a checkpoint was written.
        """
        state = self._begun(patch, out)
        writer = Writer(self, state, out)
        try:
            with ctrl_c_waits() as asked, _tensor_cores(self.host.device), patch.learning(self.host.unet):
                for losses in self.steps(state):
                    writer.note(losses, stop=asked())
                    if asked():
                        raise Interrupted(
                            f"stopped at step {state.step}; {out.checkpoint} is kept, run the same command to resume"
                        )
        finally:
            self.host.keep_activations()
            self.host.take_back()
        return state

    def _begun(self, patch: Patch, out: RunFolder) -> State:
        """The state before the next step."""
        patch.to(self.host.device).train()
        patch.gradient_checkpointing = self.options.gradient_checkpointing
        if self.options.gradient_checkpointing:
            self.host.save_memory(lambda: patch.recomputing(self.host.unet))
        players = self.objective.players(patch_player(patch, self.options), self.rows)
        for player in players:
            player.module.to(self.host.device)
        state = State(patch, fresh_average(patch, self.options.ema_decay), players, scaler=self.accelerator.scaler)
        if out.checkpoint.is_file():
            state.load(out.checkpoint)
        if self.accelerator.is_main_process:
            out.rewind_log(state.step)
        if self.host.device.type == "cuda" and self.show is None:
            self.host.put_aside(but=patch.component)
        return state

    def steps(self, state: State) -> Iterator[Mapping[str, Tensor]]:
        """Run the remaining optimizer steps; yields the losses of each, on the device, after counting it."""
        wrapped = self._wrapped(state)
        shown = {"desc": f"training {self.label}", "shown": self.accelerator.is_main_process}
        with bar(total=self.options.steps, initial=state.step, **shown) as progress:
            while state.step < self.options.steps:
                losses: dict[str, Tensor] = {}
                for player in state.players:
                    if not player.rides and state.step % player.every == 0:
                        losses |= self._move(player, state, wrapped)
                follow(state.average, self.accelerator.unwrap_model(wrapped["patch"]), self.options.ema_decay)
                state.step += 1
                progress.update()
                yield losses

    def _wrapped(self, state: State) -> dict[str, nn.Module]:
        """Each player's module as the accelerator runs it; their optimizers become its own."""
        wrapped = {}
        for player in state.players:
            if player.rides:
                wrapped[player.name] = player.module
            else:
                wrapped[player.name], player.optimizer = self.accelerator.prepare(player.module, player.optimizer)
        return wrapped

    def _move(self, player: Player, state: State, wrapped: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """One optimizer step of a player, and of those who ride on it if it is the patch."""
        riders = [other for other in state.players if other.rides and player.name == "patch"]
        for group in player.optimizer.param_groups:
            group["lr"] = group.get("multiple", 1.0) * learning_rate(self.options, state.step)
        losses = self._accumulate(player, state, wrapped)
        self.accelerator.clip_grad_norm_(wrapped[player.name].parameters(), self.options.max_grad_norm)
        for mover in (player, *riders):
            if mover.rides and self.accelerator.num_processes > 1:
                for parameter in mover.module.parameters():
                    parameter.grad = cast(Tensor, self.accelerator.reduce(parameter.grad))
            mover.optimizer.step()
            mover.optimizer.zero_grad(set_to_none=True)
        return losses

    def _accumulate(self, player: Player, state: State, wrapped: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Back-propagate the batches of one optimizer step; returns the mean of each loss part."""
        options, accelerator, totals = self.options, self.accelerator, dict[str, Tensor]()
        pieces = options.gradient_accumulation
        others = {name: module for name, module in wrapped.items() if name != "patch"}
        for piece in range(pieces):
            draw = (state.step * pieces + piece) * accelerator.num_processes + accelerator.process_index
            batch = self.rows.batch(draw, options.batch_size, options.seed).to(self.host.device)
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + draw + NOISE)
            turn = Turn(self.host, wrapped["patch"], self.instruction, batch, generator, others)
            with accelerator.autocast():
                losses = self.objective.loss(player, turn)
            accelerator.backward(losses["loss"] / pieces)
            for name, value in losses.items():
                name = name if player.name == "patch" else f"{player.name}.{name}"
                totals[name] = totals.get(name, 0.0) + value.detach() / pieces
        return totals

    def record(self, steps: int) -> dict[str, Any]:
        """What a file tells of the run; no clock, so that equal runs give equal files."""
        torch_version = torch.__version__.split("+")[0]
        return {"steps": steps, "processes": self.accelerator.num_processes, "torch": torch_version}


class Writer:
    """What a run leaves in its folder while it goes on; losses are fetched from the device when a line is due."""

    def __init__(self, run: Run, state: State, out: RunFolder) -> None:
        self.run, self.state, self.out = run, state, out
        self._losses: list[Mapping[str, Tensor]] = []

    def note(self, losses: Mapping[str, Tensor], stop: bool) -> None:
        """After a step: write what is due, and a checkpoint too if the run is to `stop`.

        Raises:
            SafepatchError: when something cannot be written; of this step, a checkpoint is, unless that cannot either.
        """
        if not self.run.accelerator.is_main_process:
            return
        self._losses.append(losses)
        try:
            self._write(stop)
        except OSError as error:
            self.state.save(self.out.checkpoint)
            raise unwritable(self.out.path, error) from error

    def _write(self, stop: bool) -> None:
        options, step = self.run.options, self.state.step
        is_checkpoint = stop or step % options.checkpoint_every == 0 or step == options.steps
        if is_checkpoint or step % options.log_every == 0:
            self._log(step)
        if is_checkpoint:
            self.state.save(self.out.checkpoint)
        if options.validate_every and self.run.show and step % options.validate_every == 0:
            self.run.show(self.state.averaged, self.out.path / f"step{step:06d}.png")

    def _log(self, step: int) -> None:
        names = list(dict.fromkeys(name for losses in self._losses for name in losses))
        means = torch.stack([torch.stack([of[n] for of in self._losses if n in of]).float().mean() for n in names])
        values, self._losses = dict(zip(names, means.tolist(), strict=True)), []
        self.out.log({"step": step, **values})
        self.run.accelerator.log(values, step=step)


def learning_rate(options: TrainingConfig, step: int) -> float:
    """AdamW's rate at `step` (from 0): linear warm-up, then a cosine down to a tenth of the peak."""
    peak = cast(float, options.learning_rate)
    if step < options.warmup:
        return peak * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def follow(average: AveragedModel, patch: nn.Module, decay: float) -> None:
    """What `average.update_parameters(patch)` does, without its upload of a counter, which waits for the device."""
    kept: list[Tensor] = [*average.parameters()]
    count, new = cast(Tensor, average.n_averaged), list[Tensor](patch.parameters())
    if count == 0:
        for own, theirs in zip(kept, new, strict=True):
            own.copy_(theirs)
    else:
        get_ema_multi_avg_fn(decay)(kept, new, count)
    for own, theirs in zip(average.module.buffers(), patch.buffers(), strict=True):
        own.copy_(theirs)
    count += 1


@contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """Within the block a GPU may multiply float32 on its tensor cores (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
