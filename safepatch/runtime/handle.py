"""One attachment of a patch to a pipeline: hooks that let it act in every UNet call, and notice when it cannot.

The patch enters through a forward pre-hook on the UNet that adds residuals to the ones already there, or, where it
reads the host's own features, through hooks on the UNet's blocks (`safepatch.patch.host`). So it works in any pipeline
that calls the same UNet, and stacks with ControlNets and with other patches. Nothing is replaced. What is said here of
the UNet holds for the transformer of a pipeline that has one.
"""

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safepatch.diffusion import (
    Components,
    calling_pipeline,
    denoiser,
    has_fused_projections,
    host_kind,
    is_compiled,
    is_negative_prompt,
    uncompiled,
)
from safepatch.errors import ConfigError, PatchBypassed, lookup
from safepatch.patch import Features, Residuals
from safepatch.patch.gate import MODES
from safepatch.patch.host import HostHooks
from safepatch.patch.lora import LayerHooks, LoraPatch
from safepatch.runtime.corrector import SPEEDS, Corrector, Settings, Stats
from safepatch.runtime.parts import ActivePart, Scale
from safepatch.runtime.residuals import Call, with_residuals


class Handle:
    """One attachment of a patch, or of all parts of a bundle; leaving the `with` block, or `remove()`, takes it off.

    Attributes:
        categories: what the patch is for, where it came from a file.
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
    ) -> None:
        refuse_compiled(pipe)
        components = Components.of(pipe)
        self._pipe = weakref.ref(pipe)
        self._unet: Any = components.unet
        self._kind = host_kind(self._unet)
        self._full_timestep = components.scheduler.config.num_train_timesteps * self._kind.timestep_unit
        self._parts = tuple(parts)
        self._corrector = Corrector(parts)
        self.categories = tuple(sorted({name for part in parts for name in part.categories}))
        self.scale = scale
        self.window = window
        self.gate = gate
        self.speed = speed
        self._fail_closed = fail_closed
        self._prepared = False  # whether the patch had its say in the UNet call that is under way
        self._call: Call | None = None  # the UNet call under way, while there is something to correct
        self._hooks: list[Any] = [
            self._unet.register_forward_pre_hook(self._prepare, with_kwargs=True),
            self._unet.register_forward_hook(self._end_call, always_call=True),
            getattr(self._unet, self._kind.entry).register_forward_pre_hook(self._count_call),
        ]
        self._layers = [
            (LayerHooks(self._unet, part.patch), part) for part in parts if isinstance(part.patch, LoraPatch)
        ]
        self._hooks.extend(hooks for hooks, _ in self._layers)
        self._host = None
        if self._corrector.reads_features:
            self._host = HostHooks(self._unet, self._answer)
            self._hooks.append(self._host)
        if fail_closed:
            self._hooks.append(components.vae.decoder.register_forward_pre_hook(self._check))

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handle":
        """A copied pipeline carries a handle of its own, which watches the copy."""
        copied = memo[id(self)] = object.__new__(Handle)
        self._corrector.forget()  # what it keeps belongs to this pipeline's denoising
        copied.__dict__.update((name, copy.deepcopy(value, memo)) for name, value in vars(self).items())
        if id(self._pipe()) in memo:
            copied._pipe = weakref.ref(memo[id(self._pipe())])
        return copied

    def remove(self) -> None:
        """Take the patch off; calling it twice is harmless."""
        self._fail_closed = False  # compiled code may run the inner hook once more
        self._corrector.forget()
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def is_active(self) -> bool:
        """Whether the pipeline still runs the UNet this patch hangs on, and the patch still hangs there."""
        pipe = self._pipe()
        return pipe is not None and uncompiled(denoiser(pipe)) is self._unet and self in attached(self._unet)

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
        for value in scale.values() if isinstance(scale, Mapping) else [scale]:
            if not 0 <= value < math.inf:  # NaN too
                raise ConfigError(f"scale must be 0 (off) or more, not {value}")
        for name in scale if isinstance(scale, Mapping) else ():
            lookup(dict.fromkeys(self.categories), name, what="category of this patch")
        for part in self._parts:
            part.scales(scale)  # refuses what the part cannot tell apart
        self._scale = scale
        self._corrector.forget()

    @property
    def gate(self) -> str:
        """`hard`: a row is corrected or left alone, bit for bit; `soft`: in proportion; `off`: all are corrected.

        Where a layer runs on another number of rows than the UNet, as under PAG, a lora patch cannot tell rows apart:
        there one open row opens it for all.
        """
        return self._gate

    @gate.setter
    def gate(self, gate: str | None) -> None:
        gated = self._corrector.has_gate
        if gate is not None and gate not in MODES:
            raise ConfigError(f"gate must be one of {', '.join(MODES)}, not '{gate}'")
        if gate in ("hard", "soft") and not gated:
            raise ConfigError(f"this patch has no gate to be {gate}; fit one with `safepatch gate`, or leave gate out")
        self._gate = gate or ("hard" if gated else "off")
        self._corrector.forget()

    @property
    def window(self) -> tuple[float, float]:
        """The part of the denoising in which the patch acts, from 0 (pure noise) to 1 (the image)."""
        return self._window

    @window.setter
    def window(self, window: tuple[float, float]) -> None:
        start, end = window
        if not 0 <= start < end <= 1:
            raise ConfigError(f"start and end must be 0 <= start < end <= 1, not {start} and {end}")
        self._window = (start, end)

    @property
    def speed(self) -> str:
        """`full`: a patch runs at every step; `fast`: a control patch's residuals, and its gate's say, serve two."""
        return self._speed

    @speed.setter
    def speed(self, speed: str) -> None:
        lookup(SPEEDS, speed, what="speed")
        self._speed = speed
        self._corrector.forget()

    def _prepare(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the UNet runs: correct what needs no features, and note down what the others will need."""
        self._call = self._begun(args, kwargs)
        made = self._corrector.early(self._call, self._settings) if self._call else None
        for hooks, part in self._layers:
            if self._call:
                skipped = self._kind.bind(args, kwargs).get("skip_layers") or ()
                hooks.begin(self._call.rows, self._corrector.strength(part, self._call, self._settings), skipped)
            else:
                hooks.begin(None)
        changed = made and with_residuals(made, unet, args, kwargs)
        self.stats.patched_calls += 1
        self._prepared = True  # only now: a call that failed above must not stand in for a bypassed one
        return changed

    def _begun(self, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """The call, or None when the patch is off or outside its window."""
        if not any(part.scales(self.scale).any() for part in self._parts):
            return None
        call = Call.of(self._kind, args, kwargs)
        call = call._replace(rows=self._rows_to_correct(call))
        return call if self._is_within(call) and call.rows.start < call.rows.stop else None

    def _is_within(self, call: Call) -> bool:
        if self.window == (0.0, 1.0):
            return True
        return self.window[0] <= 1 - call.timestep / self._full_timestep <= self.window[1]

    def _answer(self, features: Features) -> Residuals | None:
        """Once the encoder has run: the corrections of the parts that read its features."""
        return self._corrector.late(self._call, self._settings, features) if self._call else None

    @property
    def _settings(self) -> Settings:
        return Settings(self.scale, self.gate, self.speed)

    def _rows_to_correct(self, call: Call) -> slice:
        """Which rows carry the prompt: under guidance the first equal part, or a whole call, is the negative one's.

        A negative prompt that names the unsafe concept pushes away from it; correcting its row would weaken that.
        """
        # A pipeline keeps its guidance after its call ends, and others may use the UNet, so its word is not enough:
        # the parts must also hold the same latents. In doubt every row is corrected.
        sample, pipe, batch = call.sample, self._pipe(), len(call.sample)
        if self._kind.calls_apart and is_negative_prompt(call.prompt_states):
            return slice(batch, batch)
        parts = 3 if getattr(pipe, "do_perturbed_attention_guidance", False) else 2
        rows = batch // parts
        guided = getattr(pipe, "do_classifier_free_guidance", False) and rows * parts == batch
        return slice(rows if guided and torch.equal(sample[:-rows], sample[rows:]) else 0, batch)

    def _count_call(self, *_: object) -> None:
        """Inside the UNet, however it was called: the patch must have had its say."""
        self.stats.unet_calls += 1
        if self._fail_closed and not self._prepared:
            name = self._kind.component
            raise PatchBypassed(
                f"the {self._kind.noun} ran without its patch: its hook is lost, or {name}.forward() was called; call "
                f"{name}()"
            )

    def _end_call(self, unet: nn.Module, args: tuple, output: object) -> None:
        ended, self._call, self._prepared = self._call, None, False
        done = [hooks.is_done for hooks, _ in self._layers] + [self._host is None or self._host.is_done]
        for hooks, _ in self._layers:
            hooks.begin(None)  # whoever calls the host's forward next does so without the patch
        if ended and self._fail_closed and output is not None and not all(done):
            raise PatchBypassed(
                f"the {self._kind.noun} ran without its patch: hooks inside it are lost; apply the patch again"
            )

    def _check(self, *_: object) -> None:
        """Before latents become an image: the UNet that drew them must be a patched one."""
        own, caller = self._pipe(), calling_pipeline()
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
