"""What a user holds of a patch that is on a pipeline: its settings, what it did, and how it comes off."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from safepatch.artifact.describe import weights_by_category
from safepatch.runtime.attachment import Attachment, attachments
from safepatch.runtime.call import Step
from safepatch.runtime.parts import ActivePart, Look, Scale, looks, thresholds
from safepatch.runtime.refusals import refuse_compiled
from safepatch.runtime.settings import WHOLE, Settings, check_scale
from safepatch.runtime.stats import Stats


class Handle:
    """One attachment of a patch, or of all parts of a bundle; leaving the `with` block, or `remove()`, takes it off.

    Threads may draw with one patch at the same time, each with a pipeline of its own that shares the UNet
    and has its own scheduler and tokenizer: both hold one call's state, with a patch or without.

    Attributes:
        categories: what the patch is for, where it came from a file.
        on_step: a function that is shown what the patch did in each call of the UNet, when it has ended; or None.
        only_step: the timestep at which a patch that draws in one step must be asked, and without guidance; or None.
        content_hash: of the file that it was opened from; empty for one from memory.
    """

    def __init__(
        self,
        pipe: Any,
        parts: Sequence[ActivePart],
        scale: Scale = 1.0,
        fail_closed: bool = True,
        window: tuple[float, float] = WHOLE,
        gate: str | None = None,
        speed: str = "full",
        reads: str = "windows",
    ) -> None:
        refuse_compiled(pipe)
        self._parts = tuple(parts)
        self._settings = Settings(scale, window, gate, speed, reads).checked(parts)  # before anything hangs on the pipe
        self.categories = tuple(sorted({name for part in parts for name in part.categories}))
        self.on_step: Callable[[Step], object] | None = None
        self.only_step: int | None = None
        self.content_hash = ""
        self._attachment = Attachment(self, pipe, parts, fail_closed)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the patch off, once the images that other threads are drawing with it are done; twice is harmless.

        Raises:
            ConfigError: in the midst of a denoising of this thread, of which the rest would be unpatched.
        """
        self._attachment.remove()

    @property
    def is_active(self) -> bool:
        """Whether the pipeline it was applied to draws its next image with it, see `acts_in`."""
        return self.acts_in(self._attachment.pipe)

    def acts_in(self, pipe: Any) -> bool:
        """Whether a pipeline runs the UNet this patch hangs on, and every hook of the patch hangs in it."""
        return self._attachment.acts_in(pipe)

    @property
    def is_on(self) -> bool:
        """Whether some strength of it is not 0."""
        return self._attachment.is_on(self._settings)

    @property
    def weights(self) -> dict[str, float]:
        """What each category's corrections are multiplied by beside the scale, as the patch was merged."""
        return weights_by_category([(part.categories, part.weight) for part in self._parts])

    @property
    def thresholds(self) -> dict[str, float]:
        """From which probability on each category's gate opens, of those that have one."""
        return thresholds(self._parts)

    @property
    def looks(self) -> dict[str, Look]:
        """How the gates of those categories open that look at pictures."""
        return looks(self._parts)

    @property
    def stats(self) -> Stats:
        """Counters since attachment."""
        return self._attachment.corrector.stats

    @property
    def on_gate(self) -> Callable[[Any, Tensor], None] | None:
        """A function that is shown the timesteps and the gates' probabilities, (B, gates), when they judge; or None."""
        return self._attachment.corrector.on_gate

    @on_gate.setter
    def on_gate(self, watch: Callable[[Any, Tensor], None] | None) -> None:
        self._attachment.corrector.on_gate = watch

    @property
    def settings(self) -> Settings:
        """All that is set, checked."""
        return self._settings

    @property
    def scale(self) -> Scale:
        """Run-time strength, one for all or by category; 0 is off and bit-identical. May be changed between calls."""
        return self._settings.scale

    @scale.setter
    def scale(self, scale: Scale) -> None:
        self._set(scale=scale)

    def require_scale(self, scale: Scale) -> None:
        """Raise `ConfigError` or `UnknownName` for a scale that could not be set."""
        check_scale(self._parts, scale)

    @property
    def gate(self) -> str:
        """`hard`: a row is corrected or left alone, bit for bit; `soft`: in proportion; `off`: all are corrected.

        Where a layer runs on another number of rows than the UNet, as under PAG, a lora patch cannot tell rows apart:
        there one open row opens it for all.
        """
        return self._settings.gate or "off"

    @gate.setter
    def gate(self, gate: str | None) -> None:
        self._set(gate=gate)

    @property
    def window(self) -> tuple[float, float]:
        """The part of the denoising in which the patch acts, from 0 (pure noise) to 1 (the image)."""
        return self._settings.window

    @window.setter
    def window(self, window: tuple[float, float]) -> None:
        self._settings = self._checked(window=window)

    @property
    def speed(self) -> str:
        """`full`: a patch runs at every step; `fast`: a control patch's residuals, and its gate's say, serve two."""
        return self._settings.speed

    @speed.setter
    def speed(self, speed: str) -> None:
        self._set(speed=speed)

    @property
    def reads(self) -> str:
        """`windows`: what a gate makes of any few words in a row counts, of one that was fitted so; or `prompt`."""
        return self._settings.reads

    @reads.setter
    def reads(self, reads: str) -> None:
        self._set(reads=reads)

    def _set(self, **asked: Any) -> None:
        """Set these from the next call on."""
        self._settings = self._checked(**asked)
        self._attachment.forget()

    def _checked(self, **asked: Any) -> Settings:
        return self._settings._replace(**asked).checked(self._parts)


def attached(module: Any) -> list[Handle]:
    """The patches that hang on `module`, in the order they were attached."""
    return [each.handle for each in attachments(module)]
