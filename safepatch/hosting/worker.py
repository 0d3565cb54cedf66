"""One thread draws for everybody: what waits and is of equal shape is drawn as one batch.

A pipeline holds one call's state, so no two threads may draw with it; this one is the only one that does. It fails
closed: before and after each batch the patch must hang on the pipeline, and it must have seen every image's steps.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from safepatch.diffusion import generate
from safepatch.errors import PatchBypassed, SafepatchError
from safepatch.hosting.recording import Drawn, recording
from safepatch.runtime.check import status
from safepatch.runtime.handle import Handle
from safepatch.runtime.parts import Scale


class Overloaded(SafepatchError):
    """More waits than may.

    Args:
        seconds: after which there may be room.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__("too many requests are waiting; try again later")
        self.seconds = max(1, round(seconds))


class Shape(NamedTuple):
    """What images of one batch have in common; their `scale` is the server's own where it is None."""

    steps: int
    guidance_scale: float
    width: int
    height: int
    has_negative: bool
    scale: Scale | None = None


class Answer(NamedTuple):
    """An image in [0, 1], (3, H, W), what the patch did to it, and at which strength."""

    image: Tensor
    drawn: Drawn
    scale: Scale


@dataclass
class Job:
    """One image to be drawn.

    Attributes:
        prompt, negative_prompt, seed: of it.
        shape: of it.
        deadline: by `time.monotonic`, after which nobody waits for it.
        answer: to come.
    """

    prompt: str
    negative_prompt: str
    seed: int
    shape: Shape
    deadline: float
    answer: "Future[Answer]" = field(default_factory=Future)


class Worker:
    """A pipeline, its patch, and the thread that draws with them; `with` starts and ends it.

    Args:
        pipe: nobody else may draw with it meanwhile.
        handle: of its patch.
        batch: images drawn at once.
        waiting: jobs that may wait.
        watch: is told of each batch, how many images and how many seconds.
    """

    def __init__(
        self,
        pipe: Any,
        handle: Handle,
        batch: int = 4,
        waiting: int = 64,
        watch: Callable[[int, float], object] | None = None,
    ) -> None:
        self.pipe, self.handle, self.batch, self.most_waiting, self.watch = pipe, handle, batch, waiting, watch
        self._jobs = deque[Job]()
        self._changed = threading.Condition()
        self._is_closed = False
        self._seconds = 1.0  # of a batch, lately
        self._thread = threading.Thread(target=self._run, name="safepatch-draws", daemon=True)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What waits is told so, and what is being drawn is finished."""
        with self._changed:
            self._is_closed = True
            left, self._jobs = list(self._jobs), deque()
            self._changed.notify_all()
        for job in left:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(Overloaded(self._seconds))
        if self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._jobs)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Line jobs up, all or none.

        Raises:
            Overloaded: when more would wait than may, or the worker has ended.
            PatchBypassed: when the pipeline has lost its patch.
        """
        self.require_patched()
        with self._changed:
            if self._is_closed or len(self._jobs) + len(jobs) > self.most_waiting:
                raise Overloaded(self._seconds * len(self._jobs) / self.batch)
            self._jobs.extend(jobs)
            self._changed.notify_all()

    def require_patched(self) -> None:
        """Raise `PatchBypassed` unless the pipeline's next image will be drawn with the patch."""
        if not any(each.handle is self.handle and each.active and each.handle.is_on for each in status(self.pipe)):
            raise PatchBypassed("the patch is not on the pipeline, or was switched off; restart the server")

    def _run(self) -> None:
        while jobs := self._next():
            wanted = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            late = [job for job in wanted if job.deadline < time.monotonic()]
            for job in late:
                job.answer.set_exception(TimeoutError())
            if due := [job for job in wanted if job not in late]:
                self._answer(due)

    def _next(self) -> list[Job]:
        """The longest waiting job with others of its shape; none once it is over."""
        with self._changed:
            while not self._jobs and not self._is_closed:
                self._changed.wait()
            if not self._jobs:
                return []
            alike = [job for job in self._jobs if job.shape == self._jobs[0].shape][: self.batch]
            self._jobs = deque(job for job in self._jobs if not any(job is one for one in alike))
            return alike

    def _answer(self, jobs: Sequence[Job]) -> None:
        started = time.monotonic()
        try:
            answers = self._draw(jobs)
        except Exception as error:  # whatever it was, it is theirs who asked, and the next batch is another
            for job in jobs:
                job.answer.set_exception(error)
            return
        self._seconds = time.monotonic() - started
        if self.watch:
            self.watch(len(jobs), self._seconds)
        for job, answer in zip(jobs, answers, strict=True):
            job.answer.set_result(answer)

    def _draw(self, jobs: Sequence[Job]) -> list[Answer]:
        self.require_patched()
        shape = jobs[0].shape
        negatives = [job.negative_prompt for job in jobs] if shape.has_negative else None
        size = {"height": shape.height, "width": shape.width}
        texts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
        with self._at(shape.scale) as scale, recording(self.handle, len(jobs)) as drawn:
            images = generate(self.pipe, texts, seeds, shape.steps, shape.guidance_scale, negatives, **size)
        self.require_patched()
        if len(images) != len(jobs) or not all(each.timesteps for each in drawn):
            raise PatchBypassed("an image was drawn and its patch saw none of it; restart the server")
        return [Answer(*pair, scale) for pair in zip(images, drawn, strict=True)]

    @contextmanager
    def _at(self, asked: Scale | None) -> Iterator[Scale]:
        """Within the block the patch has the strength that was asked for, or else its own; it is told which."""
        before = self.handle.scale
        if asked is None:
            yield before
            return
        self.handle.scale = asked
        try:
            yield asked
        finally:
            if self.handle.scale is asked:  # nobody has switched it off meanwhile
                self.handle.scale = before
