"""A patch on a ComfyUI model: what is done around each sampling, each guidance, and each call of the UNet.

All of it hangs in ComfyUI's wrappers, so nothing is left on the model when a node is taken out, and clones share
nothing. What a patch makes of a call is safepatch's own `Corrector`; here it is only told the call as ComfyUI has it.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from safepatch.errors import PatchBypassed
from safepatch.patch import LoraPatch
from safepatch.patch.lora import LayerHooks
from safepatch.runtime.call import Begun, Call
from safepatch.runtime.corrector import Corrector
from safepatch.runtime.parts import ActivePart
from safepatch.runtime.settings import WHOLE, Settings
from safepatch.runtime.words import Words

from .host import STEPS
from .rows import NEGATIVE, Rows, rows_to_correct, unrepeated
from .skips import Skips


class Attachment:
    """One patch on one model.

    Args:
        parts: of the patch; lora parts with their layers under ComfyUI's names.
        settings: as a `Handle` has them.
        words: what gates that read windows make of what was asked; nothing without CLIP.
        pooled: channels of SDXL's pooled text states in what ComfyUI calls `y`; behind them are the sizes, embedded.

    Attributes:
        parts: of the patch.
        calls: of the UNet that went through it.
    """

    def __init__(
        self,
        parts: Sequence[ActivePart],
        settings: Settings,
        words: Words,
        pooled: int,
    ) -> None:
        self.parts, self._settings, self._pooled = parts, settings, pooled
        self._corrector = Corrector(parts, words)
        self._layers = [part for part in parts if isinstance(part.patch, LoraPatch)]
        self.calls = 0

    def around_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's `OUTER_SAMPLE`: the UNet must have been called through `around_unet`; then say what happened."""
        calls, before = self.calls, dict(vars(self._corrector.stats))
        try:
            made = executor(*args, **kwargs)
        finally:
            for part in self.parts:
                part.patch.to("cpu")  # ComfyUI does not know of this memory
        sigmas = args[3] if len(args) > 3 else kwargs.get("sigmas", ())
        if self.calls == calls and len(sigmas) > 1:
            raise PatchBypassed("sampling went past the patch: another node stands in for the UNet; take it off")
        logging.info("safepatch: %s", self._said(before))
        return made

    def around_guidance(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: Mapping[str, Any], *rest: Any
    ) -> Tensor:
        """ComfyUI's `PREDICT_NOISE`: note down which conditionings are the negative prompt's."""
        negative = [each["uuid"] for each in executor.class_obj.conds.get("negative") or () if "uuid" in each]
        options = {**model_options.get("transformer_options", {}), NEGATIVE: frozenset(negative)}
        return executor(x, timestep, {**model_options, "transformer_options": options}, *rest)

    @torch.compiler.disable()
    def around_unet(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **more: Any,
    ) -> Tensor:
        """ComfyUI's `DIFFUSION_MODEL`: one call of the UNet, corrected.

        Args:
            executor: what calls the next wrapper, or the UNet; its `class_obj` is the UNet.
            x: noisy latents, (B, >= 4, h, w).
            timesteps: (B,), 0 to 999.
            context: text states, (B, 77 n, width).
            y: of SDXL, (B, pooled + sizes).
            control: ComfyUI's ControlNets' residuals, which are left alone.
            transformer_options: ComfyUI's.
            more: what other models are given.
        """
        options = {} if transformer_options is None else transformer_options
        self.calls += 1
        rows = rows_to_correct(options, len(x))
        if rows is None or not self._acts(timesteps):
            return executor(x, timesteps, context, y, control, options, **more)
        begun = Begun(call=self._call(x[rows], timesteps, context[rows], rows, y), settings=self._settings)
        self._corrector.stats.count(patched_calls=1)
        net = executor.class_obj
        with self._layers_updated(net, begun, rows, len(x)), self._skips_corrected(net, begun, rows, options):
            made = executor(x, timesteps, context, y, control, options, **more)
        if begun.acted is not None and (acted := int(begun.acted.sum())):
            self._corrector.stats.count(acted_calls=1, acted_rows=acted)
        return made

    def _acts(self, timesteps: Tensor) -> bool:
        """Whether the patch is on, and the step within its window."""
        if not any(part.scales(self._settings.scale).any() for part in self.parts):
            return False
        start, end = self._settings.window
        return (start, end) == WHOLE or start <= 1 - float(timesteps[0]) / STEPS <= end

    def _call(self, x: Tensor, timesteps: Tensor, context: Tensor, rows: Rows, y: Tensor | None) -> Call:
        """The call as a patch sees it, the rows to correct alone."""
        conditions = {}
        if y is not None:
            conditions = {"text_embeds": y[rows][:, : self._pooled], "time_ids": y[rows][:, self._pooled :]}
        times = timesteps.expand(len(x)) if timesteps.ndim == 0 else timesteps[rows]
        states = unrepeated(context)
        return Call(x, times, states, conditions, {}, slice(0, len(x)), states)

    @contextmanager
    def _layers_updated(self, net: Any, begun: Begun, rows: Rows, batch: int) -> Iterator[None]:
        """Within the block, the layers of `net` that lora parts are for are updated, each row by its own strength."""
        with ExitStack() as stack:
            updating = []
            for part in self._layers:
                strength = self._corrector.strength(part, begun)
                if strength is None:
                    continue
                hooks = LayerHooks(net, cast(LoraPatch, part.patch))
                stack.callback(hooks.hooks.remove)
                scale = torch.zeros(batch)
                scale[rows] = strength
                hooks.begin()
                hooks.update(slice(0, batch), scale.to(cast(Call, begun.call).sample.device, non_blocking=True))
                updating.append(hooks)
            yield
            for missed in (missed for hooks in updating for missed in hooks.end()):
                raise PatchBypassed(f"the UNet ran without its patch: {missed}; another node stands in for it")

    @contextmanager
    def _skips_corrected(self, net: Any, begun: Begun, rows: Rows, options: dict[str, Any]) -> Iterator[None]:
        """Within the block, the residuals of the other parts are added to what the decoder of `net` takes up."""
        if not self._corrector.parts:
            yield
            return
        skips, others = Skips(self._corrector, begun, rows), options.get("patches", {})
        hook = net.middle_block[-1].register_forward_hook(skips.ask)
        options["patches"] = skips.patches(others)
        try:
            yield
            skips.end()
        finally:
            options["patches"] = others
            hook.remove()

    def _said(self, before: Mapping[str, int]) -> str:
        """What happened since, in a line."""
        now = {name: value - before[name] for name, value in vars(self._corrector.stats).items()}
        names = ", ".join(name for part in self.parts for name in part.categories)
        said = f"{names}: acted in {now['acted_calls']} of {now['patched_calls']} calls"
        if now["wordless_rows"]:
            said += "; words unknown, its gate read states alone: encode prompts with the CLIP that this node gives out"
        return said
