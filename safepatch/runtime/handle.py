"""One attachment of a patch to a pipeline: hooks that let it act in every UNet call, and notice when it cannot.

The patch enters through a forward pre-hook on the UNet that adds residuals to the ones already there, or, where it
reads the host's own features, through hooks on the UNet's blocks (`safepatch.patch.host`). So it works in any pipeline
that calls the same UNet, and stacks with ControlNets and with other patches. Nothing is replaced.
"""

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from safepatch.diffusion import Components, calling_pipeline, is_compiled, uncompiled
from safepatch.errors import ConfigError, PatchBypassed, lookup
from safepatch.patch import Features, Residuals
from safepatch.patch.gate import MODES, Gate
from safepatch.patch.host import HostHooks
from safepatch.runtime.parts import ActivePart, Scale
from safepatch.runtime.residuals import Cached, Call, bind, padded, plus, with_residuals

SPEEDS = {"full": 1, "fast": 2}  # denoising steps for which a control patch's residuals are used


@dataclass
class Stats:
    """What happened since the patch was attached.

    Attributes:
        unet_calls: times the UNet's first layer ran, however it was called.
        patched_calls: times the patch had its say.
        gated_rows: rows that a gate has judged, counted per step and category.
        open_rows: those of them for which it opened.
    """

    unet_calls: int = 0
    patched_calls: int = 0
    gated_rows: int = 0
    open_rows: int = 0


class Handle:
    """One attachment of a patch, or of all parts of a bundle; leaving the `with` block, or `remove()`, takes it off.

    Attributes:
        stats: counters since attachment.
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
        self.stats = Stats()
        self._pipe = weakref.ref(pipe)
        self._unet: Any = Components.of(pipe).unet
        self._train_timesteps: int = Components.of(pipe).scheduler.config.num_train_timesteps
        self._parts = tuple(parts)
        self.categories = tuple(sorted({name for part in parts for name in part.categories}))
        self._cache: dict[int, Cached] = {}  # by the part's identity
        self.scale = scale
        self.window = window
        self.gate = gate
        self.speed = speed
        self.on_gate: Callable[[Any, Tensor], None] | None = None  # shown the timesteps and probabilities (B, groups)
        self._fail_closed = fail_closed
        self._prepared = False  # whether the patch had its say in the UNet call that is under way
        self._call: Call | None = None  # the UNet call under way, while there is something to correct
        self._hooks: list[Any] = [
            self._unet.register_forward_pre_hook(self._prepare, with_kwargs=True),
            self._unet.register_forward_hook(self._end_call, always_call=True),
            self._unet.conv_in.register_forward_pre_hook(self._count_call),
        ]
        self._host = None
        if any(part.patch.reads_features or part.patch.gate for part in parts):
            self._host = HostHooks(self._unet, self._answer)
            self._hooks.append(self._host)
        if fail_closed:
            self._hooks.append(Components.of(pipe).vae.decoder.register_forward_pre_hook(self._check))

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handle":
        """A copied pipeline carries a handle of its own, which watches the copy."""
        copied = memo[id(self)] = object.__new__(Handle)
        kept = {name: value for name, value in vars(self).items() if name != "_cache"}
        copied.__dict__.update((name, copy.deepcopy(value, memo)) for name, value in kept.items())
        copied._cache = {}
        if id(self._pipe()) in memo:
            copied._pipe = weakref.ref(memo[id(self._pipe())])
        return copied

    def remove(self) -> None:
        """Take the patch off; calling it twice is harmless."""
        self._fail_closed = False  # compiled code may run the inner hook once more
        self._cache.clear()
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def is_active(self) -> bool:
        """Whether the pipeline still runs the UNet this patch hangs on, and the patch still hangs there."""
        pipe = self._pipe()
        return pipe is not None and uncompiled(pipe.unet) is self._unet and self in attached(self._unet)

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
        self._cache.clear()

    @property
    def gate(self) -> str:
        """`hard`: a row is corrected or left alone, bit for bit; `soft`: in proportion; `off`: all are corrected."""
        return self._gate

    @gate.setter
    def gate(self, gate: str | None) -> None:
        gated = any(part.patch.gate for part in self._parts)
        if gate is not None and gate not in MODES:
            raise ConfigError(f"gate must be one of {', '.join(MODES)}, not '{gate}'")
        if gate in ("hard", "soft") and not gated:
            raise ConfigError(f"this patch has no gate to be {gate}; fit one with `safepatch gate`, or leave gate out")
        self._gate = gate or ("hard" if gated else "off")
        self._cache.clear()

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
        """`full`: every patch runs at every step; `fast`: the residuals of a control patch without a gate serve two."""
        return self._speed

    @speed.setter
    def speed(self, speed: str) -> None:
        lookup(SPEEDS, speed, what="speed")
        self._speed = speed
        self._cache.clear()

    def _prepare(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the UNet runs: correct what needs no features, and note down what the others will need."""
        self._call = self._begun(args, kwargs)
        early = [part for part in self._parts if not self._is_late(part)]
        made = self._corrections(early, self._call) if self._call else None
        changed = made and (args, {**kwargs, **with_residuals(made, kwargs)})
        self.stats.patched_calls += 1
        self._prepared = True  # only now: a call that failed above must not stand in for a bypassed one
        return changed

    def _begun(self, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """The call, or None when the patch is off or outside its window."""
        sample, timesteps, states = bind(args, kwargs)
        if not any(part.scales(self.scale).any() for part in self._parts):
            return None
        added = kwargs.get("added_cond_kwargs") or {}
        call = Call(sample, timesteps, states, added, self._rows_to_correct(sample))
        return call if self._is_within(call) else None

    def _is_within(self, call: Call) -> bool:
        if self.window == (0.0, 1.0):
            return True
        return self.window[0] <= 1 - call.timestep / self._train_timesteps <= self.window[1]

    def _answer(self, features: Features) -> Residuals | None:
        """Once the encoder has run: the corrections of the parts that read its features."""
        if self._call is None:
            return None
        return self._corrections([part for part in self._parts if self._is_late(part)], self._call, features)

    def _is_late(self, part: ActivePart) -> bool:
        """Whether the part needs the host's features, for itself or for its gate."""
        return part.patch.reads_features or (part.patch.gate is not None and self.gate != "off")

    def _corrections(
        self, parts: Sequence[ActivePart], call: Call, features: Features | None = None
    ) -> Residuals | None:
        made = [self._recent(part, call, features) for part in parts]
        made = [residuals for residuals in made if residuals is not None]
        return reduce(plus, made) if made else None

    def _recent(self, part: ActivePart, call: Call, features: Features | None) -> Residuals | None:
        """The part's residuals, or those of the step before where `speed` allows."""
        if self.speed == "full" or self._is_late(part):
            return self._residuals(part, call, features)
        last = self._cache.get(id(part))
        if last and last.uses < SPEEDS[self.speed] and last.serves(call):
            self._cache[id(part)] = last._replace(timestep=call.timestep, uses=last.uses + 1)
            return last.residuals
        made = self._residuals(part, call, features)
        if made:
            tiled = last is not None and last.shows_tiles(call)
            cached = Cached(made, call.sample.shape, call.rows, call.prompt_states, call.timestep, is_tiled=tiled)
            self._cache[id(part)] = cached
        return made

    @torch.no_grad()
    def _residuals(self, part: ActivePart, call: Call, features: Features | None) -> Residuals | None:
        sample, rows = call.sample, call.rows
        patch = part.patch.to(sample.device)
        dtype = next(patch.parameters()).dtype
        times = torch.as_tensor(call.timesteps, device=sample.device).reshape(-1).expand(len(sample))[rows]
        added = {key: value[rows] for key, value in call.added_cond_kwargs.items() if isinstance(value, Tensor)}
        instruction = part.instruction_states.to(sample.device, dtype)
        shown = features and features.of_rows(rows).to(dtype)
        scales = part.scales(self.scale).to(sample.device, dtype)
        states = call.prompt_states[rows].to(dtype)
        if shown and patch.gate is not None and self.gate != "off":
            scales = scales * self._openings(part, shown, times, states)
            if not scales.any():
                return None
        made = patch(sample[rows].to(dtype), times, states, instruction, added, shown, scales)
        return Residuals(tuple(padded(r, rows, sample) for r in made.down), padded(made.mid, rows, sample))

    def _openings(self, part: ActivePart, features: Features, timesteps: Tensor, states: Tensor) -> Tensor:
        """How far the gate is open for each row and group, in [0, 1], (B, groups); 0 or 1 where it is hard."""
        gate, thresholds = cast(Gate, part.patch.gate), cast(Tensor, part.thresholds)
        probabilities = gate(features.mid.float(), timesteps, states.float()).sigmoid()  # a gate stays in float32
        is_open = probabilities >= thresholds.to(probabilities.device)
        self.stats.gated_rows += is_open.numel()
        self.stats.open_rows += int(is_open.sum())
        if self.on_gate:
            self.on_gate(timesteps, probabilities)
        return (probabilities if self.gate == "soft" else is_open).to(features.mid.dtype)

    def _rows_to_correct(self, sample: Tensor) -> slice:
        """Which rows carry the prompt: under guidance the first equal part is the negative prompt's.

        A negative prompt that names the unsafe concept pushes away from it; correcting its row would weaken that.
        """
        # A pipeline keeps its guidance after its call ends, and others may use the UNet, so its word is not enough:
        # the parts must also hold the same latents. In doubt every row is corrected.
        pipe, batch = self._pipe(), len(sample)
        parts = 3 if getattr(pipe, "do_perturbed_attention_guidance", False) else 2
        rows = batch // parts
        guided = getattr(pipe, "do_classifier_free_guidance", False) and rows * parts == batch
        return slice(rows if guided and torch.equal(sample[:-rows], sample[rows:]) else 0, batch)

    def _count_call(self, *_: object) -> None:
        """Inside the UNet, however it was called: the patch must have had its say."""
        self.stats.unet_calls += 1
        if self._fail_closed and not self._prepared:
            raise PatchBypassed(
                "the UNet ran without its patch: its hook is lost, or unet.forward() was called; call unet()"
            )

    def _end_call(self, unet: nn.Module, args: tuple, output: object) -> None:
        ended, self._call, self._prepared = self._call, None, False
        if ended and self._host and self._fail_closed and output is not None and not self._host.is_done:
            raise PatchBypassed("the UNet ran without its patch: hooks on its blocks are lost; apply the patch again")

    def _check(self, *_: object) -> None:
        """Before latents become an image: the UNet that drew them must be a patched one."""
        own, caller = self._pipe(), calling_pipeline()
        if own is not None and uncompiled(own.unet) is not self._unet:
            raise PatchBypassed("pipe.unet was replaced after the patch was applied; apply the patch again")
        if caller is not None and not attached(uncompiled(getattr(caller, "unet", self._unet))):
            raise PatchBypassed(
                f"{type(caller).__name__} shares this VAE but its UNet carries no patch; apply the patch to it too"
            )


def refuse_compiled(pipe: Any) -> None:
    """Raise `ConfigError` if the UNet is compiled: what was traced without hooks may go on without them."""
    if is_compiled(pipe.unet):
        raise ConfigError("pipe.unet is compiled already; apply the patch to the pipeline first, then compile")


def attached(module: Any) -> list[Handle]:
    """The patches that hang on `module`, in the order they were attached."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Handle)]
