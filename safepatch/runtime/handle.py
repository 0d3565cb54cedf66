"""One attachment of a patch to a pipeline: hooks that let it act in every UNet call, and notice when it cannot.

Hooks on the UNet tell when a call of it begins and ends; those inside it take its features and add what the patch makes
of them (`safepatch.patch.host`, `safepatch.patch.lora`). So a patch works in any pipeline that calls the same UNet, and
stacks with ControlNets and with other patches. Nothing is replaced. What belongs to a call is kept with the call, so
threads may share a UNet. What is said here of the UNet holds for the transformer of a pipeline that has one.
"""

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from safepatch.artifact.describe import weights_by_category
from safepatch.diffusion import (
    UNET,
    Components,
    calling_pipeline,
    denoiser,
    has_fused_projections,
    host_kind,
    is_compiled,
    threads_inside,
    uncompiled,
)
from safepatch.errors import ConfigError, PatchBypassed, UnknownWords, lookup
from safepatch.patch import Features, Residuals
from safepatch.patch.gate import READINGS
from safepatch.patch.hooks import Calls, Hooks, unpicklable
from safepatch.patch.host import HostHooks
from safepatch.patch.picture import TEXT
from safepatch.patch.places import PlaceHooks, Told
from safepatch.runtime.call import Begun, Call, Settings, Step
from safepatch.runtime.corrector import SPEEDS, Corrector, Stats
from safepatch.runtime.denoising import Denoising, Denoisings
from safepatch.runtime.drain import Drain, require_undisturbed
from safepatch.runtime.exchange import WORDLESS, Exchange
from safepatch.runtime.one_step import require_step
from safepatch.runtime.parts import ActivePart, Look, Scale, check_scale, check_window, gate_mode
from safepatch.runtime.residuals import with_residuals
from safepatch.runtime.sight import Sight
from safepatch.runtime.told import Telling
from safepatch.runtime.words import Words


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
        window: tuple[float, float] = (0.0, 1.0),
        gate: str | None = None,
        speed: str = "full",
        reads: str = "windows",
    ) -> None:
        refuse_compiled(pipe)
        components = Components.of(pipe)
        self._parts = tuple(parts)
        check_settings(parts, scale, window, gate, speed, reads)  # before anything hangs on the pipeline
        self._pipe = weakref.ref(pipe)
        self._unet: Any = components.unet
        self._kind = host_kind(self._unet)
        self._words = Words(components, parts)
        self._corrector = Corrector(parts, self._words)
        self._exchange = Exchange(components, self._kind, parts, self._corrector)
        self.categories = tuple(sorted({name for part in parts for name in part.categories}))
        self._denoisings = Denoisings(self._kind, components.scheduler, window)
        self.scale = scale
        self.window = window
        self.gate = gate
        self.speed = speed
        self.reads = reads
        self.on_step: Callable[[Step], object] | None = None
        self.only_step: int | None = None
        self.content_hash = ""
        self._fail_closed = fail_closed
        self._calls = Calls(Begun)
        self._drain = Drain(self._unet)
        self._earlier: set[int] | None = None  # threads in a call that began before the patch was here
        inner = [(part.patch.hooks_on(self._unet), part) for part in parts]
        self._layers = [(hooks, part) for hooks, part in inner if hooks is not None]
        computes = bool(self._corrector.parts) and self._kind is UNET
        self._host = HostHooks(self._unet, self._answer) if computes else None
        self._sight = Sight(self._unet, parts, self._under_way)
        self._telling = Telling(self._unet, self._kind, parts, self._under_way)
        self._hooks = Hooks()
        self._hooks.after(self._unet, self._end_call, always_call=True)
        self._hooks.before(self._unet, self._prepare, with_kwargs=True)
        self._earlier = threads_inside(self._unet)
        self._hooks.before(getattr(self._unet, self._kind.entry), self._count_call)
        if fail_closed:
            self._hooks.before(components.vae.decoder, self._check)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handle":
        """A copied pipeline carries a handle of its own, which watches the copy."""
        copied = memo[id(self)] = object.__new__(Handle)
        self._forget()  # what is kept belongs to this pipeline's denoising
        copied.__dict__.update((name, copy.deepcopy(value, memo)) for name, value in vars(self).items())
        if id(self._pipe()) in memo:
            copied._pipe = weakref.ref(memo[id(self._pipe())])
        return copied

    __reduce__ = unpicklable

    def remove(self) -> None:
        """Take the patch off, once the images that other threads are drawing with it are done; twice is harmless.

        Raises:
            ConfigError: in the midst of a denoising of this thread, of which the rest would be unpatched.
        """
        if not self._hooks:
            return
        with self._drain.drained():
            for hooks in self._all_hooks:
                hooks.remove()
            self._forget()

    def _forget(self) -> None:
        """Drop what was kept for later steps."""
        self._corrector.forget()
        self._exchange.forget()

    @property
    def _all_hooks(self) -> list[Hooks]:
        """Those that begin a call go first and come last."""
        looking = [each.hooks for each in (self._sight, self._telling) if each.hooks]
        return [self._hooks, *(inner.hooks for inner in self._inner), *looking, *self._listening]

    @property
    def _listening(self) -> list[Hooks]:
        """Those on text encoders, which a pipeline may have dropped once it had no more to encode."""
        return [*([self._words.hooks] if self._words.hooks else []), *self._exchange.hooks]

    @property
    def is_active(self) -> bool:
        """Whether the pipeline it was applied to draws its next image with it, see `acts_in`."""
        return self.acts_in(self._pipe())

    def acts_in(self, pipe: Any) -> bool:
        """Whether a pipeline runs the UNet this patch hangs on, and every hook of the patch hangs in it."""
        if pipe is None or uncompiled(denoiser(pipe)) is not self._unet or not self._all_hang:
            return False
        there = {id(module) for part in (self._unet, uncompiled(pipe.vae)) for module in part.modules()}
        needed = [hook for hooks in self._all_hooks if hooks not in self._listening for hook in hooks]
        return all(id(hook.module) in there for hook in needed) and self._exchange.listens_to(pipe)

    @property
    def _inner(self) -> list[PlaceHooks | HostHooks]:
        return [hooks for hooks, _ in self._layers] + ([self._host] if self._host else [])

    @property
    def _all_hang(self) -> bool:
        return all(hooks.all_hang for hooks in self._all_hooks)

    @property
    def weights(self) -> dict[str, float]:
        """What each category's corrections are multiplied by beside the scale, as the patch was merged."""
        return weights_by_category([(part.categories, part.weight) for part in self._parts])

    @property
    def thresholds(self) -> dict[str, float]:
        """From which probability on each category's gate opens, of those that have one."""
        gated = [part for part in self._parts if part.thresholds is not None]
        return {
            name: float(value)
            for part in gated
            for name, value in zip(part.gates, part.thresholds, strict=False)  # pyright: ignore[reportArgumentType]
        }

    @property
    def looks(self) -> dict[str, Look]:
        """How the gates of those categories open that look at pictures."""
        return {
            name: Look(keys, float(odds.double().sigmoid()))
            for part in self._parts
            if part.evidence is not None
            for name, keys, odds in zip(part.gates, part.keys, part.evidence, strict=True)
            if keys != TEXT
        }

    @property
    def stats(self) -> Stats:
        """Counters since attachment."""
        return self._corrector.stats

    @property
    def on_gate(self) -> Callable[[Any, Tensor], None] | None:
        """A function that is shown the timesteps and the gates' probabilities, (B, gates), when they judge; or None."""
        return self._corrector.on_gate

    @on_gate.setter
    def on_gate(self, watch: Callable[[Any, Tensor], None] | None) -> None:
        self._corrector.on_gate = watch

    @property
    def scale(self) -> Scale:
        """Run-time strength, one for all or by category; 0 is off and bit-identical. May be changed between calls."""
        return self._scale

    @scale.setter
    def scale(self, scale: Scale) -> None:
        self.require_scale(scale)
        self._scale = scale
        self._forget()

    def require_scale(self, scale: Scale) -> None:
        """Raise `ConfigError` or `UnknownName` for a scale that could not be set."""
        check_scale(self._parts, scale)

    @property
    def gate(self) -> str:
        """`hard`: a row is corrected or left alone, bit for bit; `soft`: in proportion; `off`: all are corrected.

        Where a layer runs on another number of rows than the UNet, as under PAG, a lora patch cannot tell rows apart:
        there one open row opens it for all.
        """
        return self._gate

    @gate.setter
    def gate(self, gate: str | None) -> None:
        self._gate = gate_mode(self._parts, gate)
        self._forget()

    @property
    def window(self) -> tuple[float, float]:
        """The part of the denoising in which the patch acts, from 0 (pure noise) to 1 (the image)."""
        return self._denoisings.window

    @window.setter
    def window(self, window: tuple[float, float]) -> None:
        check_window(window)
        self._denoisings.window = window

    @property
    def speed(self) -> str:
        """`full`: a patch runs at every step; `fast`: a control patch's residuals, and its gate's say, serve two."""
        return self._speed

    @speed.setter
    def speed(self, speed: str) -> None:
        lookup(SPEEDS, speed, what="speed")
        self._speed = speed
        self._forget()

    @property
    def reads(self) -> str:
        """`windows`: what a gate makes of any few words in a row counts, of one that was fitted so; or `prompt`."""
        return self._reads

    @reads.setter
    def reads(self, reads: str) -> None:
        lookup(dict.fromkeys(READINGS), reads, what="way of reading")
        self._reads = reads
        self._forget()

    @torch.compiler.disable()
    def _prepare(
        self, unet: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Before the UNet runs: correct what needs no features, and note down what the others will need."""
        denoising = self._denoisings.follow(self._is_on(self.scale))
        self._drain.pass_by(denoising.by)
        if kwargs is None or not self._hooks:  # another thread is attaching it, or has just taken it off
            return None
        if denoising.will_miss:
            denoising.will_miss, denoising.is_met = False, True  # it is said once
            self._say_missed()
        begun = self._begin(denoising, args, kwargs)
        if self.only_step is not None:
            require_step(begun, self.only_step)
        made = self._corrector.early(begun) if begun.call else None
        if made and self._host:
            self._host.add(made)
        for hooks, part in self._layers if begun.call else ():
            self._update(hooks, part, begun)
        exchanged = self._exchanged(begun, args, kwargs)
        self._telling.expect(begun, exchanged or self._kind.bind(args, kwargs))
        if self._fail_closed and not self._all_hang:
            self._bypassed("hooks inside it are lost; apply the patch again")
        begun.is_prepared = True  # only now: a call that failed above must not stand in for a bypassed one
        if exchanged:
            return (), exchanged
        if not made or self._host:
            return None
        changed, begun.handed = with_residuals(made, unet, args, kwargs)
        return (), changed

    def _begin(self, denoising: Denoising, args: tuple, kwargs: dict[str, Any]) -> Begun:
        begun = self._calls.begin()
        if self._earlier:
            self._earlier.discard(threading.get_ident())
        for inner in self._inner:
            inner.begin()
        begun.settings = Settings(self.scale, self.gate, self.speed, self.reads)
        begun.given = Call.of(self._kind, args, kwargs)
        begun.skipped = self._kind.bind(args, kwargs).get("skip_layers") or ()
        begun.seen, begun.is_followed = denoising.seen, denoising.by is not None
        begun.call = self._to_correct(begun.given, denoising, begun.settings)
        return begun

    def _update(self, hooks: PlaceHooks, part: ActivePart, begun: Begun) -> None:
        call, strength = begun.call, self._corrector.strength(part, begun)
        if call and strength is not None:
            hooks.tell(Told(call.row_timesteps, call.prompt_states[call.rows], part.instruction_states))
            hooks.update(call.rows, strength.to(call.sample.device, non_blocking=True), begun.skipped)

    def _exchanged(self, begun: Begun, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments with the text states that patched encoders make; None where those are the host's own."""
        if begun.call is None or not self._exchange.parts:
            return None
        arguments, lacking = self._exchange.arguments(begun, args, kwargs)
        if lacking and self._fail_closed:
            raise UnknownWords(WORDLESS.format(lacking))
        return arguments

    def _to_correct(self, call: Call, denoising: Denoising, settings: Settings) -> Call | None:
        """The call with the rows to correct, or None when the patch is off, outside its window, or for no row."""
        if not self._is_on(settings.scale) or not self._denoisings.meets(denoising, call):
            return None
        call = call._replace(rows=self._denoisings.rows(denoising, call))
        if call.rows.start == call.rows.stop:
            return None
        self.stats.count(patched_calls=1)
        return call

    @property
    def is_on(self) -> bool:
        """Whether some strength of it is not 0."""
        return self._is_on(self.scale)

    def _is_on(self, scale: Scale) -> bool:
        return any(part.scales(scale).any() for part in self._parts)

    def _under_way(self) -> Begun:
        return self._calls.now

    def _answer(self, features: Features) -> Residuals | None:
        """Once the encoder has run: the corrections of the parts that read its features."""
        begun = self._calls.now
        return self._corrector.late(begun, features) if begun.call else None

    @torch.compiler.disable()
    def _count_call(self, *_: object) -> None:
        """Inside the UNet, however it was called: the patch must have had its say."""
        self.stats.count(unet_calls=1)
        begun = self._calls.now
        if begun.has_entered or not begun.is_prepared:
            self._unprepared()
        begun.has_entered = begun.is_prepared

    @torch.compiler.disable()
    def _end_call(self, unet: nn.Module, args: tuple, output: object) -> None:
        begun = self._calls.end()
        if begun is None:
            return self._unprepared() if output is not None else None
        missed = (
            [what for inner in self._inner for what in inner.end()]
            + self._sight.missed(begun)
            + self._telling.missed(begun)
        )
        if begun.handed is not None and not begun.handed.is_done:
            missed.append(f"'{self._kind.residuals}' was not taken up")
        if output is None:
            return None
        if begun.call is not None:
            self._require_taken(begun, missed)
        if self.on_step:
            self.on_step(Step.of(begun))
        return None

    def _require_taken(self, begun: Begun, missed: Sequence[str]) -> None:
        """What was to be corrected must have been."""
        if self._fail_closed and not begun.has_entered:
            self._bypassed(f"its {self._kind.entry} was replaced or not called; apply the patch again")
        if self._fail_closed and missed:
            self._bypassed(f"{missed[0]}: hooks inside it are lost, or it was wrapped; apply the patch again")
        if begun.acted is not None and (rows := int(begun.acted.sum())):
            self.stats.count(acted_calls=1, acted_rows=rows)

    def _unprepared(self) -> None:
        """The UNet ran, and the patch was not asked: an error, unless it was not there when the call began."""
        thread, earlier = threading.get_ident(), self._earlier
        if not self._fail_closed or self._drain.is_over or earlier is None or thread in earlier:
            return
        name = self._kind.component
        self._bypassed(f"its hook is lost, or {name}.forward() was called; call {name}()")

    def _bypassed(self, why: str) -> NoReturn:
        raise PatchBypassed(f"the {self._kind.noun} ran without its patch: {why}")

    def _say_missed(self) -> None:
        """No step of a denoising is one in which the patch acts."""
        start, end = self.window
        text = f"no step of this denoising is within the patch's window, {start} to {end}; widen it, or take more steps"
        if self._fail_closed:
            raise PatchBypassed(text)
        warnings.warn(text, stacklevel=2)

    def _check(self, *_: object) -> None:
        """Before latents become an image: the UNet that drew them must be a patched one, and the patch have acted."""
        own, caller, drawn = self._pipe(), calling_pipeline(), self._denoisings.end()
        if drawn.by is not None:
            require_undisturbed(drawn.by)
        if own is not None and uncompiled(denoiser(own)) is not self._unet:
            raise PatchBypassed(
                f"pipe.{self._kind.component} was replaced after the patch was applied; apply the patch again"
            )
        drawn_with = None if caller is None else uncompiled(denoiser(caller))
        if drawn_with is not None and not attached(drawn_with):
            raise PatchBypassed(
                f"{type(caller).__name__} shares this VAE but its {host_kind(drawn_with).noun} carries no patch; apply "
                "the patch to it too"
            )
        if drawn.is_missed:
            self._say_missed()


def check_settings(
    parts: Sequence[ActivePart], scale: Scale, window: tuple[float, float], gate: str | None, speed: str, reads: str
) -> None:
    """Raise `ConfigError` or `UnknownName` for what could not be set."""
    check_scale(parts, scale)
    check_window(window)
    gate_mode(parts, gate)
    lookup(SPEEDS, speed, what="speed")
    lookup(dict.fromkeys(READINGS), reads, what="way of reading")


def refuse_compiled(pipe: Any) -> None:
    """Raise `ConfigError` if what denoises is compiled: what was traced without hooks may go on without them."""
    host = denoiser(pipe)
    if is_compiled(host):
        name = host_kind(uncompiled(host)).component
        raise ConfigError(f"pipe.{name} is compiled already; apply the patch to the pipeline first, then compile")


def refuse_fused_projections(host: nn.Module) -> None:
    """Raise `ConfigError` if attention runs on fused copies of the weights that patches are differences to."""
    if has_fused_projections(host):
        raise ConfigError("attention runs on fused projections; call unfuse_qkv_projections() first, fuse them never")


def attached(module: Any) -> list[Handle]:
    """The patches that hang on `module`, in the order they were attached."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Handle)]
