"""One patch on one pipeline: hooks that let it act in every call of the UNet, and notice when it cannot.

Hooks on the UNet tell when a call of it begins and ends; those inside it take its features and add what the patch makes
of them (`safepatch.patch.host`, `safepatch.patch.lora`). So a patch works in any pipeline that calls the same UNet, and
stacks with ControlNets and with other patches. Nothing is replaced. What belongs to a call is kept with the call, so
threads may share a UNet. What is said here of the UNet holds for the transformer of a pipeline that has one.
"""

import copy
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from safepatch.diffusion import UNET, Components, calling_pipeline, denoiser, host_kind, uncompiled
from safepatch.errors import UnknownWords
from safepatch.patch import Features, Residuals
from safepatch.patch.hooks import Calls, Hooks, unpicklable
from safepatch.patch.host import HostHooks
from safepatch.patch.places import PlaceHooks, Told
from safepatch.runtime.call import Begun, Call, Step
from safepatch.runtime.corrector import Corrector
from safepatch.runtime.denoising import Denoising, Denoisings
from safepatch.runtime.drain import Drain, require_undisturbed
from safepatch.runtime.exchange import WORDLESS, Exchange
from safepatch.runtime.one_step import require_step
from safepatch.runtime.parts import ActivePart
from safepatch.runtime.residuals import with_residuals
from safepatch.runtime.settings import Settings
from safepatch.runtime.sight import Sight
from safepatch.runtime.told import Telling
from safepatch.runtime.watch import Watch
from safepatch.runtime.words import Words

if TYPE_CHECKING:
    from safepatch.runtime.handle import Handle


class Attachment:
    """A patch, or all parts of a bundle, on a pipeline.

    Args:
        handle: whoever holds it; tells what is set when a call begins.
        pipe: the pipeline.
        parts: of the patch.
        fail_closed: see `Watch`.

    Attributes:
        handle: as it was given.
        corrector: what the parts do.
    """

    def __init__(self, handle: "Handle", pipe: Any, parts: Sequence[ActivePart], fail_closed: bool) -> None:
        components = Components.of(pipe)
        self.handle = handle
        self._parts = tuple(parts)
        self._pipe = weakref.ref(pipe)
        self._unet: Any = components.unet
        self._kind = host_kind(self._unet)
        self._words = Words(components, parts)
        self.corrector = Corrector(parts, self._words)
        self._exchange = Exchange(components, self._kind, parts, self.corrector)
        self._denoisings = Denoisings(self._kind, components.scheduler)
        self._calls = Calls(Begun)
        self._drain = Drain(self._unet)
        self._watch = Watch(self._unet, self._kind, self._drain, fail_closed)
        inner = [(part.patch.hooks_on(self._unet), part) for part in parts]
        self._layers = [(hooks, part) for hooks, part in inner if hooks is not None]
        computes = bool(self.corrector.parts) and self._kind is UNET
        self._host = HostHooks(self._unet, self._answer) if computes else None
        self._sight = Sight(self._unet, parts, self._under_way)
        self._telling = Telling(self._unet, self._kind, parts, self._under_way)
        self._hooks = Hooks()
        self._hooks.after(self._unet, self._end_call, always_call=True)
        self._hooks.before(self._unet, self._prepare, with_kwargs=True)
        self._watch.begin()
        self._hooks.before(getattr(self._unet, self._kind.entry), self._count_call)
        if fail_closed:
            self._hooks.before(components.vae.decoder, self._check)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        """A copied pipeline carries an attachment of its own, which watches the copy."""
        copied = memo[id(self)] = object.__new__(Attachment)
        self.forget()  # what is kept belongs to this pipeline's denoising
        copied.__dict__.update((name, copy.deepcopy(value, memo)) for name, value in vars(self).items())
        if id(self._pipe()) in memo:
            copied._pipe = weakref.ref(memo[id(self._pipe())])
        return copied

    __reduce__ = unpicklable

    def remove(self) -> None:
        """Take the patch off; see `Handle.remove`."""
        if not self._hooks:
            return
        with self._drain.drained():
            for hooks in self._all_hooks:
                hooks.remove()
            self.forget()

    def forget(self) -> None:
        """Drop what was kept for later steps."""
        self.corrector.forget()
        self._exchange.forget()

    @property
    def pipe(self) -> Any:
        """The pipeline that it was made for; None when it is gone."""
        return self._pipe()

    def acts_in(self, pipe: Any) -> bool:
        """Whether a pipeline runs the UNet this patch hangs on, and every hook of the patch hangs in it."""
        if pipe is None or uncompiled(denoiser(pipe)) is not self._unet or not self._all_hang:
            return False
        there = {id(module) for part in (self._unet, uncompiled(pipe.vae)) for module in part.modules()}
        needed = [hook for hooks in self._all_hooks if hooks not in self._listening for hook in hooks]
        return all(id(hook.module) in there for hook in needed) and self._exchange.listens_to(pipe)

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
    def _inner(self) -> list[PlaceHooks | HostHooks]:
        return [hooks for hooks, _ in self._layers] + ([self._host] if self._host else [])

    @property
    def _all_hang(self) -> bool:
        return all(hooks.all_hang for hooks in self._all_hooks)

    @torch.compiler.disable()
    def _prepare(
        self, unet: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Before the UNet runs: correct what needs no features, and note down what the others will need."""
        settings = self.handle.settings
        denoising = self._denoisings.follow(self.is_on(settings), settings.window)
        self._drain.pass_by(denoising.by)
        if kwargs is None or not self._hooks:  # another thread is attaching it, or has just taken it off
            return None
        self._watch.require_met(denoising, settings.window)
        begun = self._begin(denoising, args, kwargs)
        if self.handle.only_step is not None:
            require_step(begun, self.handle.only_step)
        made = self.corrector.early(begun) if begun.call else None
        if made and self._host:
            self._host.add(made)
        for hooks, part in self._layers if begun.call else ():
            self._update(hooks, part, begun)
        exchanged = self._exchanged(begun, args, kwargs)
        self._telling.expect(begun, exchanged or self._kind.bind(args, kwargs))
        self._watch.require_hanging(self._all_hang)
        begun.is_prepared = True  # only now: a call that failed above must not stand in for a bypassed one
        if exchanged:
            return (), exchanged
        if not made or self._host:
            return None
        changed, begun.handed = with_residuals(made, unet, args, kwargs)
        return (), changed

    def _begin(self, denoising: Denoising, args: tuple, kwargs: dict[str, Any]) -> Begun:
        begun = self._calls.begin()
        self._watch.let_in()
        for inner in self._inner:
            inner.begin()
        begun.settings = self.handle.settings
        begun.given = Call.of(self._kind, args, kwargs)
        begun.skipped = self._kind.bind(args, kwargs).get("skip_layers") or ()
        begun.seen, begun.is_followed = denoising.seen, denoising.by is not None
        begun.call = self._to_correct(begun.given, denoising, begun.settings)
        return begun

    def _to_correct(self, call: Call, denoising: Denoising, settings: Settings) -> Call | None:
        """The call with the rows to correct, or None when the patch is off, outside its window, or for no row."""
        if not self.is_on(settings) or not self._denoisings.meets(denoising, call, settings.window):
            return None
        call = call._replace(rows=self._denoisings.rows(denoising, call))
        if call.rows.start == call.rows.stop:
            return None
        self.corrector.stats.count(patched_calls=1)
        return call

    def is_on(self, settings: Settings) -> bool:
        """Whether some strength of it is not 0."""
        return any(part.scales(settings.scale).any() for part in self._parts)

    def _update(self, hooks: PlaceHooks, part: ActivePart, begun: Begun) -> None:
        call, strength = begun.call, self.corrector.strength(part, begun)
        if call and strength is not None:
            hooks.tell(Told(call.row_timesteps, call.prompt_states[call.rows], part.instruction_states))
            hooks.update(call.rows, strength.to(call.sample.device, non_blocking=True), begun.skipped)

    def _exchanged(self, begun: Begun, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments with the text states that patched encoders make; None where those are the host's own."""
        if begun.call is None or not self._exchange.parts:
            return None
        arguments, lacking = self._exchange.arguments(begun, args, kwargs)
        if lacking and self._watch.fail_closed:
            raise UnknownWords(WORDLESS.format(lacking))
        return arguments

    def _under_way(self) -> Begun:
        return self._calls.now

    def _answer(self, features: Features) -> Residuals | None:
        """Once the encoder has run: the corrections of the parts that read its features."""
        begun = self._calls.now
        return self.corrector.late(begun, features) if begun.call else None

    @torch.compiler.disable()
    def _count_call(self, *_: object) -> None:
        """Inside the UNet, however it was called."""
        self.corrector.stats.count(unet_calls=1)
        self._watch.enter(self._calls.now)

    @torch.compiler.disable()
    def _end_call(self, unet: nn.Module, args: tuple, output: object) -> None:
        begun = self._calls.end()
        if begun is None:
            return self._watch.require_earlier() if output is not None else None
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
            self._watch.require_taken(begun, missed)
            self._count_acted(begun)
        if self.handle.on_step:
            self.handle.on_step(Step.of(begun))
        return None

    def _count_acted(self, begun: Begun) -> None:
        if begun.acted is not None and (rows := int(begun.acted.sum())):
            self.corrector.stats.count(acted_calls=1, acted_rows=rows)

    def _check(self, *_: object) -> None:
        """Before latents become an image: the UNet that drew them must be a patched one, and the patch have acted."""
        caller, drawn = calling_pipeline(), self._denoisings.end()
        if drawn.by is not None:
            require_undisturbed(drawn.by)
        self._watch.require_same(self.pipe)
        drawn_with = None if caller is None else uncompiled(denoiser(caller))
        if drawn_with is not None and not attachments(drawn_with):
            self._watch.refuse_unpatched(caller)
        self._watch.require_acted(drawn, self.handle.window)


def attachments(module: Any) -> list[Attachment]:
    """Those that hang on `module`, in the order they were made."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Attachment)]
