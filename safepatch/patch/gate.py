"""A gate decides, row by row and step by step, whether a patch acts at all; closed, the host's bits are untouched.

It counts evidence and knows none to the contrary: detectors read every text state of the prompt, the strongest answer
of each counts, and what the host makes of the prompt (the mid block's output) can only add to it. So states appended
behind a prompt's own cannot lower what its text says. Nor can words, of a gate that was fitted for windows: what it
reads of each few words alone counts too, whatever stands around them.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, relu, silu, softplus

from safepatch.errors import ConfigError
from safepatch.patch.draw import TIME_WIDTH, Draw, sinusoids
from safepatch.patch.picture import PictureKey

MODES = ("off", "soft", "hard")
READINGS = ("windows", "prompt")
NOTHING = 1e-2  # of a state's largest value: what is less than that beyond its width is nothing
WINDOWS, WIDEST = 3, 8  # words of the widest window that a gate reads alone, and how wide it may be


class TextGate(nn.Module):
    """The probability, per group, that a row is one the patch is for, by its text alone.

    For patches that must know before the host has made anything of the prompt.

    Args:
        text_width: of the host's text states.
        width: channels of the gate itself.
        groups: categories; the first dimension of every parameter.
        draw: what fresh weights come from.
    """

    reads_features: ClassVar[bool] = False

    def __init__(self, text_width: int, width: int, groups: int, draw: Draw | None = None) -> None:
        super().__init__()
        self.picture: PictureKey | None = None  # its second key, which is turned from step to step
        if width < 1:
            raise ConfigError(f"a gate needs a width of at least 1, not {width}")
        draw = draw or Draw(seed=1)
        self.detect = draw.normal(groups, width, text_width)
        self.detect_bias = nn.Parameter(torch.zeros(groups, width))
        self.weigh = nn.Parameter(torch.full((groups, width), -3.0))  # of each detector, before softplus
        self.bias = nn.Parameter(torch.zeros(groups))

    def forward(
        self, mid: Tensor | None, timesteps: Tensor, prompt_states: Tensor, heard: Tensor | None = None
    ) -> Tensor:
        """Logits (B, groups); each row's depend on that row alone.

        Args:
            mid: the host's mid block's output, (B, C, h, w), where the gate reads features.
            timesteps: (B,).
            prompt_states: (B, tokens, width).
            heard: what was read of the prompt's windows, (B, groups); the strongest counts.
        """
        read = self.read(prompt_states)
        return read if heard is None else torch.maximum(read, heard)

    @property
    def is_blind(self) -> Tensor:
        """Whether no picture makes a difference, (groups,) bool: what the text says is all that it says."""
        return torch.ones_like(self.bias, dtype=torch.bool)

    @property
    def least_seen(self) -> Tensor:
        """What the picture adds to the logits at least, (groups,); where a gate is blind it adds just that."""
        return torch.zeros_like(self.bias)

    def read(self, prompt_states: Tensor) -> Tensor:
        """What it makes of text states (B, tokens, width) alone: logits (B, groups); of wider ones, see `clips_own`."""
        states = clips_own(prompt_states, self.detect.shape[-1])
        detected = torch.einsum("btw,grw->bgrt", states, self.detect).amax(-1) + self.detect_bias
        return torch.einsum("bgr,gr->bg", relu(detected), softplus(self.weigh)) + self.bias


class Gate(TextGate):
    """The probability, per group, that a row is one the patch is for, by its text and what the host makes of it.

    Args:
        channels: of the mid block's output.
        text_width: of the host's text states.
        norm_groups: groups of the host's group norms.
        width: channels of the gate itself.
        groups: categories; the first dimension of every parameter.
    """

    reads_features: ClassVar[bool] = True

    def __init__(self, channels: int, text_width: int, norm_groups: int, width: int, groups: int) -> None:
        draw = Draw(seed=1)
        super().__init__(text_width, width, groups, draw)
        self.norm_groups = norm_groups
        self.look = draw.normal(groups, width, channels)
        self.time = draw.normal(groups, width, TIME_WIDTH)
        self.hidden = draw.normal(groups, width, 2 * width)
        self.decide = nn.Parameter(torch.zeros(groups, width))

    @torch.no_grad()
    def blind(self) -> None:
        """Let no picture make a difference: of a silent half a softplus is log 2, which is taken off the bias."""
        for parameter in (self.look, self.time, self.hidden, self.decide):
            parameter.zero_()
        self.bias -= math.log(2)

    @property
    def is_blind(self) -> Tensor:
        """As `blind` makes it: what is decided by nothing is the same for all pictures."""
        return (self.decide == 0).all(1)

    @property
    def least_seen(self) -> Tensor:
        """The softplus of nothing where it is blind; else 0, the least a softplus can be."""
        return softplus(torch.zeros_like(self.bias)) * self.is_blind

    def forward(
        self, mid: Tensor | None, timesteps: Tensor, prompt_states: Tensor, heard: Tensor | None = None
    ) -> Tensor:
        """Logits (B, groups); see `TextGate.forward`."""
        assert mid is not None, "this gate reads features"
        seen = silu(torch.einsum("bcp,grc->bgrp", group_norm(mid, self.norm_groups).flatten(2), self.look))
        time = torch.einsum("bt,grt->bgr", sinusoids(timesteps).to(self.time.dtype), self.time)
        read = torch.cat((seen.mean(-1), seen.amax(-1)), dim=-1)
        hidden = silu(torch.einsum("bgi,gri->bgr", read, self.hidden) + time)
        image = softplus(torch.einsum("bgr,gr->bg", hidden, self.decide))
        return super().forward(mid, timesteps, prompt_states, heard) + image


def clips_own(states: Tensor, width: int) -> Tensor:
    """Of states (B, tokens, width or more) those that CLIP's encoders made, (B, tokens, width).

    SD3 fills CLIP's states up with zeros to the width of T5's, which stand behind them. What is T5's, or zeros for a T5
    that is missing, is left out: the row's first state, which is the same for all prompts, takes its place.
    """
    own, beyond = states[..., :width], states[..., width:]
    is_clips = own.any(-1, keepdim=True)
    if beyond.shape[-1]:
        is_clips &= beyond.abs().amax(-1, keepdim=True) <= NOTHING * own.abs().amax(-1, keepdim=True)
    return torch.where(is_clips, own, own[:, :1])
