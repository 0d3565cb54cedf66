"""What each thread's denoising is like, as far as a patch must know: whose it is, its steps, its prompts' rows."""

from dataclasses import dataclass, field
from typing import Any

from safepatch.diffusion import Drawing, HostKind, drawing, is_negative_prompt, negative_rows, steps_ahead
from safepatch.patch.hooks import Calls
from safepatch.runtime.call import Call
from safepatch.runtime.known import Known
from safepatch.runtime.settings import WHOLE


@dataclass
class Denoising:
    """One thread's denoising so far.

    Attributes:
        by: the pipeline's call; None for a loop of one's own, which ends where it decodes an image.
        is_on: whether the patch was switched on in some call.
        is_met: whether some step of it is, or by what the pipeline says will be, within the patch's window.
        will_miss: whether by what the pipeline says none will be; until that was said.
        states: text states of the last call.
        negative: how many of its first rows carried the negative prompt.
        seen: what keys to pictures have seen of it, by the part's identity.
    """

    by: Drawing | None = None
    is_on: bool = False
    is_met: bool = False
    will_miss: bool = False
    states: Known | None = None
    negative: int = 0
    seen: dict[int, Any] = field(default_factory=dict)

    @property
    def is_missed(self) -> bool:
        """Whether the patch was on, and no step within its window."""
        return self.is_on and not self.is_met


class Denoisings:
    """The denoisings of all threads that draw with one patch.

    Args:
        kind: of the host.
        scheduler: the pipeline's; the length of its training schedule counts.
    """

    def __init__(self, kind: HostKind, scheduler: Any) -> None:
        self._kind = kind
        self._unit = kind.timestep_unit  # schedulers count steps as 1 whatever the host is told
        self._full_timestep = scheduler.config.num_train_timesteps * self._unit
        self._of_threads = Calls(Denoising)

    def follow(self, is_on: bool, window: tuple[float, float]) -> Denoising:
        """This thread's, in which the host is about to be called: another one, where a pipeline was called anew.

        Args:
            is_on: whether the patch is.
            window: the part of a denoising in which it acts, from 0 (pure noise) to 1 (the image).
        """
        now = self._of_threads.now
        if (by := drawing(now.by)) is not now.by:
            now = self._renew(Denoising(by))
            if steps := steps_ahead() if is_on and window != WHOLE else []:
                now.is_met = any(self._is_within(step * self._unit, window) for step in steps)
                now.will_miss = not now.is_met
        return now

    def end(self) -> Denoising:
        """This thread's, of which an image is about to be made; what follows is another one."""
        ended = Denoising(**vars(self._of_threads.now))
        self._renew(Denoising())
        return ended

    def meets(self, denoising: Denoising, call: Call, window: tuple[float, float]) -> bool:
        """Whether the patch, which is on, acts in this call as far as its window goes."""
        is_met = window == WHOLE or self._is_within(call.timestep, window)
        denoising.is_on, denoising.is_met = True, denoising.is_met or is_met
        return is_met

    def rows(self, denoising: Denoising, call: Call) -> slice:
        """Which rows carry the prompt: under guidance the first ones, or a whole call, may be the negative prompt's.

        A negative prompt that names the unsafe concept pushes away from it; correcting its row would weaken that.
        """
        batch, states = len(call.sample), call.prompt_states
        if self._kind.calls_apart and is_negative_prompt(states):
            return slice(batch, batch)
        if denoising.by is None:
            return slice(0, batch)
        if denoising.states is None or not denoising.states.is_still(states):
            denoising.states, denoising.negative = Known.of(states), negative_rows(states)
        return slice(denoising.negative, batch)

    def _renew(self, denoising: Denoising) -> Denoising:
        now = self._of_threads.now
        vars(now).update(vars(denoising))
        return now

    def _is_within(self, timestep: float, window: tuple[float, float]) -> bool:
        return window[0] <= 1 - timestep / self._full_timestep <= window[1]
