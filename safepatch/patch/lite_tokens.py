"""The lite patch of a transformer, as Stable Diffusion 3 and Flux have: a narrow branch behind each joint block.

A branch reads the block's image tokens, behind an affine-free layer norm, and adds its correction to them, as an
adapter does (Houlsby et al. 2019, arXiv 1902.00751); its maps are linear, for what is beside a token the host's own
attention sees. Unlike on a UNet a block reads what the branches before it have corrected, and no branch is told what
another has found. It acts from the first block on, so a gate in front of it judges by the prompt's text.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from safepatch.diffusion import host_kind, text_width
from safepatch.patch.draw import Draw
from safepatch.patch.gate import TextGate
from safepatch.patch.narrow import NarrowBranch, NarrowPatch
from safepatch.patch.places import Acting, PlaceHooks, Told, lent

JOINT_BLOCKS = "transformer_blocks"  # those with a stream of image tokens, by diffusers' name
PLAIN = "_safepatch_plain"  # attribute of image tokens to which something was added: as the block made them


class Read(NamedTuple):
    """What the branches read of a call.

    Attributes:
        condition: what modulates them, (B, groups, CONDITION_WIDTH).
        key, value: of the text, each (B, groups, tokens, rank).
    """

    condition: Tensor
    key: Tensor
    value: Tensor


class TokenLitePatch(NarrowPatch):
    """One narrow branch per joint block.

    Args:
        blocks: of the host, those with a stream of image tokens.
        channels: of a token.
        text_width: of the host's text states.
        timestep_unit: what the host's timesteps count for a step of the training schedule.
        sees: `instruction`, or `instruction+prompt`; the prompt also reaches the patch through the tokens.
        rank: channels of a branch and group.
        depth: linear maps per branch.
        groups: categories.
    """

    def __init__(
        self,
        blocks: int,
        channels: int,
        text_width: int,
        timestep_unit: float,
        sees: str,
        rank: int = 64,
        depth: int = 1,
        groups: int = 1,
    ) -> None:
        draw = Draw(seed=0)
        super().__init__(draw, text_width, sees, {"rank": rank, "depth": depth, "groups": groups})
        self.timestep_unit = timestep_unit
        self.branches = nn.ModuleList(_Branch(draw, channels, self.layout) for _ in range(blocks))
        self.hooks: TokenHooks | None = None  # while it learns
        self._under_way: Read | None = None  # of the prediction that it learns from

    @classmethod
    def ungated(cls, unet: Any, sees: str, empty: bool, **layout: Any) -> Self:
        """A fresh patch, whose random values are the same every time (a few MB, made even if `empty`)."""
        blocks, width = len(getattr(unet, JOINT_BLOCKS)), unet.config["joint_attention_dim"]
        return cls(blocks, unet.inner_dim, width, host_kind(unet).timestep_unit, sees, **layout)

    def new_gate(self, unet: Any, width: int, gates: int) -> TextGate:
        """Fresh gates that read the text."""
        return TextGate(text_width(unet), width, gates)

    def hooks_on(self, unet: Any) -> "TokenHooks":
        """Those on the joint blocks."""
        return TokenHooks(unet, self)

    def read(self, told: Told) -> Read:
        """What the branches read of a call, on its device, in the patch's own precision."""
        self.to(told.prompt_states.device)
        dtype = self.key.dtype
        states, instruction = told.prompt_states.to(dtype), told.instruction_states.to(told.prompt_states.device, dtype)
        condition = self.condition(told.timesteps.float() / self.timestep_unit, instruction)
        return Read(condition, *self.text(states, instruction))

    def forward(self, unet: Any, predict: Callable[[], Any], told: Told) -> Any:
        """What `predict`, which calls `unet` once, on rows that are told this, makes with the patch at scale 1."""
        self._under_way = self.read(told)
        try:
            with self._acting(unet, self._under_way):
                return predict()
        finally:
            self._under_way = None

    def learning(self, unet: Any) -> AbstractContextManager:
        """Hooks are put on the host's blocks once for all of the block."""
        return lent(self, TokenHooks(unet, self))

    def recomputing(self, unet: Any) -> AbstractContextManager:
        """The branches again, and what they have read; nothing of a prediction without the patch."""
        return nullcontext() if self._under_way is None else self._acting(unet, self._under_way)

    def joints(self) -> list[nn.Parameter]:
        """The branches' last maps."""
        return [cast(_Branch, branch).up for branch in self.branches]

    @contextmanager
    def _acting(self, unet: Any, read: Read) -> Iterator[None]:
        """Within the block, every call of `unet` is corrected at scale 1."""
        hooks = self.hooks or TokenHooks(unet, self)
        hooks.begin()
        hooks.update(slice(None))
        hooks.has_read(read)
        try:
            yield
        finally:
            hooks.end()
            if hooks is not self.hooks:
                hooks.hooks.remove()


class TokenHooks(PlaceHooks):
    """Hooks on a transformer's joint blocks that add what a patch's branches make of the image tokens.

    The tokens are read as the block made them, whatever other such hooks have added: several add up in any order.
    """

    def __init__(self, unet: Any, patch: TokenLitePatch) -> None:
        self._patch = patch
        self._branches = {f"{JOINT_BLOCKS}.{i}": branch for i, branch in enumerate(patch.branches)}
        super().__init__(unet, self._branches)

    def tell(self, told: Told) -> None:
        """What the rows of this call are told: it is read once for all branches."""
        self.has_read(self._patch.read(told))

    def has_read(self, read: Read) -> None:
        """This was read of the call."""
        self._calls.now.read = read

    @torch.compiler.disable()
    def _changed(
        self, place: str, module: nn.Module, now: Acting, args: tuple[Any, ...], output: tuple[Tensor, Tensor]
    ) -> Any:
        states, tokens = output
        rows = cast(slice, now.rows)
        if rows.stop not in (None, len(tokens)):  # whose they are cannot be told, so the call ends with this one `left`
            return None
        now.left.discard(place)
        read, start = cast(Read, now.read), rows.start or 0
        scales = None if now.scale is None else now.scale.to(tokens.device, read.key.dtype).reshape(-1, self._groups)
        plain = getattr(tokens, PLAIN, tokens)
        added = self._branches[place](plain[start:].to(read.key.dtype), *read, scales).to(tokens.dtype)
        changed = torch.cat((tokens[:start], tokens[start:] + added)) if start else tokens + added
        setattr(changed, PLAIN, plain)
        return states, changed

    @property
    def _groups(self) -> int:
        return self._patch.groups


class _Branch(NarrowBranch):
    """The correction of one block's image tokens, (B, tokens, channels) -> the same; all groups at once."""

    def forward(
        self, tokens: Tensor, condition: Tensor, key: Tensor, value: Tensor, scales: Tensor | None = None
    ) -> Tensor:
        hidden = torch.einsum("bpc,grc->bgpr", layer_norm(tokens, tokens.shape[-1:]), self.down)
        hidden = hidden + self.attend(hidden, key, value, to="bgps")
        scale, shift = self.modulation(condition)
        hidden = silu(hidden * (1 + scale[:, :, None]) + shift[:, :, None])
        for mix in self.mix:
            hidden = silu(torch.einsum("bgpr,gsr->bgps", hidden, mix))
        if scales is not None:
            hidden = hidden * scales[..., None, None]
        return torch.einsum("bgpr,gcr->bpc", hidden, self.up)
