"""A patch under threads: what belongs to a call of the host stays with it, whoever else draws, attaches or removes."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from safepatch.diffusion import quiet
from safepatch.errors import ConfigError
from safepatch.patch import PATCH_KINDS
from safepatch.runtime.apply import apply
from tests.small import images, new_artifact, new_small_pipe, rows
from tests.stress.soak import PROMPTS, drawn_by, gated_artifact, sharing, soak

every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))


@every_kind
@pytest.mark.parametrize("gate", ["hard", "soft", "off"])
@pytest.mark.parametrize("threads", [2, 4, 8])
def test_threads_draw_what_one_thread_draws(kind, gate, threads):
    pipe = new_small_pipe()
    with apply(pipe, gated_artifact(pipe, kind), gate=gate) as handle:
        alone = [drawn_by(pipe, prompt) for prompt in PROMPTS]
        counted = handle.stats.acted_rows, handle.stats.unet_calls
        with ThreadPoolExecutor(threads) as pool:
            pipes = [sharing(pipe) for _ in PROMPTS]
            together = list(pool.map(drawn_by, pipes, PROMPTS))
        assert (handle.stats.acted_rows, handle.stats.unet_calls) == (2 * counted[0], 2 * counted[1])
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    base = [drawn_by(pipe, prompt) for prompt in PROMPTS]
    changed = [not torch.equal(a, b) for a, b in zip(alone, base, strict=True)]
    assert any(changed)  # control: the patch does something
    assert all(changed) == (gate != "hard")  # control: and a hard gate leaves some prompts alone


def test_a_bundle_with_gates_under_threads():
    found = soak(images=24, threads=4)
    assert found.right == found.drawn == 24
    assert 0 < found.changed < 24  # control: open gates and closed ones, mixed


def test_an_executor_of_asyncio_draws_what_one_thread_draws(small_pipe):
    async def draw() -> list[Tensor]:
        loop = asyncio.get_running_loop()
        calls = [partial(drawn_by, sharing(small_pipe), prompt) for prompt in PROMPTS]
        return await asyncio.gather(*(loop.run_in_executor(None, call) for call in calls))

    with apply(small_pipe, gated_artifact(small_pipe, "lora")):
        alone = [drawn_by(small_pipe, prompt) for prompt in PROMPTS]
        together = asyncio.run(draw())
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@every_kind
def test_a_call_within_a_call_disturbs_neither(small_pipe, kind):
    """Somebody's hook on the mid block calls the same UNet for other rows."""
    sample, timesteps, states = rows()
    inner: list[Tensor] = []

    def call_again(*_: object) -> None:
        if len(inner) == 0:
            inner.append(torch.empty(0))  # once only
            inner[0] = small_pipe.unet(sample[1:], timesteps[1:], states[1:]).sample

    with torch.no_grad(), apply(small_pipe, new_artifact(small_pipe.unet, kind)) as handle:
        outer = small_pipe.unet(sample[:1], timesteps[:1], states[:1]).sample
        other = small_pipe.unet(sample[1:], timesteps[1:], states[1:]).sample
        hook = small_pipe.unet.mid_block.register_forward_pre_hook(call_again)
        nested = small_pipe.unet(sample[:1], timesteps[:1], states[:1]).sample
        hook.remove()
        assert handle.stats.acted_calls == handle.stats.unet_calls == 4
    assert torch.equal(nested, outer)
    assert torch.equal(inner[0], other)


def step_then_wait(begun: threading.Event, go_on: threading.Event) -> Callable:
    """A callback that waits, once its step was taken, until it may go on."""

    def step(_: object, index: int, __: object, kwargs: dict) -> dict:
        begun.set()
        assert go_on.wait(60)
        return kwargs

    return step


def test_threads_that_share_one_pipeline_get_no_image(small_pipe):
    begun, go_on = threading.Event(), threading.Event()
    with apply(small_pipe, new_artifact(small_pipe.unet, "lora")) as handle, ThreadPoolExecutor(1) as pool:
        alone = drawn_by(small_pipe, PROMPTS[0])
        first = pool.submit(drawn_by, small_pipe, PROMPTS[0], 2, step_then_wait(begun, go_on))
        assert begun.wait(60)
        with pytest.raises(ConfigError, match=r"two threads draw with one pipeline.*of its own"):
            drawn_by(small_pipe, PROMPTS[1])
        assert torch.equal(drawn_by(sharing(small_pipe), PROMPTS[0]), alone)  # control: a pipeline of its own may
        go_on.set()
        with pytest.raises(ConfigError, match="two threads draw with one pipeline"):
            first.result()
        assert torch.equal(drawn_by(small_pipe, PROMPTS[0]), alone)  # and it draws again once one thread is alone
        assert handle.is_active


def test_threads_that_take_turns_may_share_one_pipeline(small_pipe):
    lock = threading.Lock()

    def in_turn(prompt: str) -> Tensor:
        with lock:
            return drawn_by(small_pipe, prompt)

    with apply(small_pipe, new_artifact(small_pipe.unet, "lora")), ThreadPoolExecutor(4) as pool:
        alone = [drawn_by(small_pipe, prompt) for prompt in PROMPTS]
        together = list(pool.map(in_turn, PROMPTS))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


# ---- attaching, changing and removing while others draw ---------------------------------------------------------


def while_drawing(pipe: StableDiffusionPipeline, act: Callable[[], object], steps: int = 6) -> Tensor:
    """What another thread draws meanwhile: `act` is called, in this one, once it has taken a step."""
    begun = threading.Event()

    def step(_: object, index: int, __: object, kwargs: dict) -> dict:
        begun.set()
        time.sleep(0.05)
        return kwargs

    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(drawn_by, sharing(pipe), PROMPTS[0], steps, step)
        assert begun.wait(60)
        act()
        return drawn.result()


@every_kind
def test_removing_waits_for_the_image_under_way(small_pipe, kind):
    base = drawn_by(small_pipe, PROMPTS[0], 6)
    handle = apply(small_pipe, new_artifact(small_pipe.unet, kind))
    patched = drawn_by(small_pipe, PROMPTS[0], 6)
    assert not torch.equal(patched, base)  # control
    assert torch.equal(while_drawing(small_pipe, handle.remove), patched)
    assert torch.equal(drawn_by(small_pipe, PROMPTS[0], 6), base)


def test_removing_waits_for_a_call_of_a_loop_of_ones_own(small_pipe):
    sample, timesteps, states = rows()
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    @torch.no_grad()
    def call() -> Tensor:
        return small_pipe.unet(sample, timesteps, states).sample

    handle = apply(small_pipe, new_artifact(small_pipe.unet, "lora"))
    patched, hook = call(), small_pipe.unet.mid_block.register_forward_pre_hook(pause)
    with ThreadPoolExecutor(2) as pool:
        called = pool.submit(call)
        assert inside.wait(60)
        removed = pool.submit(handle.remove)
        time.sleep(0.1)
        assert not removed.done()  # control: it waits
        go_on.set()
        assert torch.equal(called.result(), patched)
        removed.result(60)
    hook.remove()
    assert not torch.equal(call(), patched)


def test_removing_in_the_midst_of_ones_own_denoising_is_refused(small_pipe):
    def remove(*_: object) -> dict:
        handle.remove()
        return {}

    handle = apply(small_pipe, new_artifact(small_pipe.unet))
    with pytest.raises(ConfigError, match="a denoising is under way in this thread"):
        drawn_by(small_pipe, PROMPTS[0], 3, remove)
    assert handle.is_active
    handle.remove()  # control: once it has ended, it comes off
    assert not handle.is_active


def test_a_pipeline_may_patch_itself_around_its_own_call(small_pipe):
    """Its frame is on the stack when the patch comes off, and draws no more."""

    class Patching(StableDiffusionPipeline):
        def __call__(self, *args: object, **kwargs: object) -> object:
            with apply(self, artifact):
                return super().__call__(*args, **kwargs)

    artifact = new_artifact(small_pipe.unet)
    pipe = quiet(Patching(**small_pipe.components, requires_safety_checker=False))
    with apply(small_pipe, artifact):
        patched = images(small_pipe)
    assert torch.equal(images(pipe), patched)


def test_a_patch_that_is_attached_in_mid_call_fails_nobodys_image(small_pipe):
    handles = []
    drawn = while_drawing(small_pipe, lambda: handles.append(apply(small_pipe, new_artifact(small_pipe.unet))))
    assert drawn.isfinite().all()
    handles[0].remove()


def test_a_scale_that_is_changed_in_mid_denoising_counts_from_the_next_call(small_pipe):
    def switch_off(_: object, index: int, __: object, kwargs: dict) -> dict:
        if index == 1:
            handle.scale = 0
        return kwargs

    with apply(small_pipe, new_artifact(small_pipe.unet)) as handle:
        drawn_by(small_pipe, PROMPTS[0], 4, switch_off)
        assert handle.stats.unet_calls == 4
        assert handle.stats.acted_calls == 2


def test_threads_that_come_and_go_while_patches_do_too(small_pipe):
    """Each image is the base's or the patch's, never half of each; and nothing hangs."""
    artifact = new_artifact(small_pipe.unet, "lora")
    base = drawn_by(small_pipe, PROMPTS[0])
    with apply(small_pipe, artifact):
        patched = drawn_by(small_pipe, PROMPTS[0])
    pipes, stop, seen = [sharing(small_pipe) for _ in range(3)], threading.Event(), []

    def keep_drawing(pipe: StableDiffusionPipeline) -> None:
        while not stop.is_set():
            seen.append(drawn_by(pipe, PROMPTS[0]))

    def come_and_go(times: int) -> None:
        for _ in range(times):
            handle = apply(small_pipe, artifact)
            time.sleep(0.05)
            handle.remove()

    with ThreadPoolExecutor(4) as pool:
        drawing = [pool.submit(keep_drawing, pipe) for pipe in pipes]
        pool.submit(come_and_go, 6).result(120)
        stop.set()
        for one in drawing:
            one.result(120)
    mixed = [image for image in seen if not (torch.equal(image, base) or torch.equal(image, patched))]
    assert len(mixed) <= 6 * len(pipes)  # at most those that were under way when a patch was attached
    assert any(torch.equal(image, patched) for image in seen) or any(torch.equal(image, base) for image in seen)


def test_two_patches_under_threads_are_each_right():
    pipe = new_small_pipe()
    first, second = gated_artifact(pipe, "lora"), new_artifact(pipe.unet, "control")
    with apply(pipe, first), apply(pipe, second):
        alone = [drawn_by(pipe, prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(drawn_by, [sharing(pipe) for _ in PROMPTS], PROMPTS))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(alone[0], drawn_by(pipe, PROMPTS[0]))  # control
