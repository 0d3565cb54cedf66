"""What patch kinds have in common: they act row by row on a frozen host, and are stored as deltas."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import UNET, host_kind, text_width
from safepatch.errors import ConfigError
from safepatch.patch.deltas import Anchored, StoredPatch
from safepatch.patch.gate import Gate, TextGate
from safepatch.patch.looking import middle_channels
from safepatch.patch.picture import PictureKey
from safepatch.patch.places import PlaceHooks

GATE_LAYOUT = ("gate", "gates", "picture")  # what of a layout is its gate's


class Residuals(NamedTuple):
    """What a patch adds to the host's features.

    Attributes:
        down: one tensor per skip connection, in the order the encoder makes them, each (B, C_i, h_i, w_i).
        mid: for the mid block's output, (B, C, h, w).

    A transformer's are for its image tokens, each (B, tokens, width), `mid` being the last.
    """

    down: tuple[Tensor, ...]
    mid: Tensor


def plus(left: Residuals, right: Residuals) -> Residuals:
    """The sum of two patches' residuals."""
    return Residuals(tuple(a + b for a, b in zip(left.down, right.down, strict=True)), left.mid + right.mid)


class Features(NamedTuple):
    """What a frozen host made of its input, before anything is added to it; shaped as its `Residuals`.

    Attributes:
        down: one tensor per skip connection, in the order the encoder makes them, each (B, C_i, h_i, w_i).
        mid: the mid block's output, (B, C, h, w).
    """

    down: tuple[Tensor, ...]
    mid: Tensor

    def of_rows(self, rows: slice) -> "Features":
        """The features of some rows."""
        return Features(tuple(skip[rows] for skip in self.down), self.mid[rows])

    def to(self, dtype: torch.dtype) -> "Features":
        """The same features in another dtype."""
        return Features(tuple(skip.to(dtype) for skip in self.down), self.mid.to(dtype))


class Patch(nn.Module, ABC):
    """A trainable module beside a frozen host.

    A patch acts on each row (sample, timestep, text states) on its own: it never looks at other rows and so never
    depends on how a pipeline lays out its batch. A fresh patch is an exact no-op.

    Attributes:
        kind: how the patch acts on the model.
        component: what of a pipeline it changes, `unet` for whatever denoises, or a text encoder by diffusers' name.
        learning_rate: to begin with on a model of Stable Diffusion's size; small models learn at ten times that.
        joint_rate: multiple of that for its `joints`.
        sees: what it reads of the text: `instruction`, `instruction+prompt` or `prompt`, of a lora what its host reads.
        layout: what `from_unet` must be told, beside `sees`, to build the same module again; plain JSON values.
        gate: decides for which rows the patch acts at all, if it has one.
    """

    kind: ClassVar[str]
    learning_rate: ClassVar[float]
    joint_rate: ClassVar[float]
    component: str = UNET.component
    sees: str
    layout: dict[str, Any]
    gradient_checkpointing: bool
    gate: TextGate | None

    def __init__(self) -> None:
        super().__init__()
        self.gate = None
        self.gradient_checkpointing = False

    @property
    def groups(self) -> int:
        """How many corrections, each with a scale of its own, the patch computes side by side."""
        return self.layout.get("groups", 1)

    def add_gate(self, unet: Any, width: int, gates: int = 0, picture: int = 0) -> None:
        """Give the patch a fresh gate of `width` channels, which opens for everything at a threshold of 0.5.

        Args:
            unet: the host.
            width: of the gate.
            gates: how many stand side by side, by default one for each group; a single group acts where any opens.
            picture: channels of a key that looks at what is drawn; 0 for none.

        Raises:
            ConfigError: for a width below 1.
        """
        self.gate = self.new_gate(unet, width, gates or self.groups)
        sizes = {"gate": width, **({"gates": gates} if gates else {}), **({"picture": picture} if picture else {})}
        self.layout = {name: size for name, size in self.layout.items() if name not in GATE_LAYOUT} | sizes
        if picture:
            self.gate.picture = PictureKey(middle_channels(unet), picture, gates or self.groups)

    @abstractmethod
    def new_gate(self, unet: Any, width: int, gates: int) -> TextGate:
        """Fresh gates that read what there is when the patch has to act."""

    @classmethod
    def from_unet(
        cls,
        unet: Any,
        sees: str = "instruction+prompt",
        gate: int = 0,
        gates: int = 0,
        picture: int = 0,
        empty: bool = False,
        **layout: Any,
    ) -> Self:
        """A fresh patch for `unet`, which is only read.

        Args:
            unet: the host.
            sees: what the patch reads of the text; a lora patch sees what its host does.
            gate: width of a fresh gate; 0 for none.
            gates, picture: how many stand side by side, and whether they look, see `add_gate`; as its layout says.
            empty: leave parameters that copy the host's on the meta device, for `load` to fill.
            layout: the kind's own settings.
        """
        patch = cls.ungated(unet, sees, empty, **layout)
        if gate:
            patch.add_gate(unet, gate, gates, picture)
        return patch

    @classmethod
    @abstractmethod
    def ungated(cls, unet: Any, sees: str, empty: bool, **layout: Any) -> Self:
        """What `from_unet` makes, but for the gate."""

    def keep_layers(self, pattern: str) -> None:
        """Change only those of the host's layers in whose names the regular expression `pattern` is found.

        Raises:
            ConfigError: when it changes none of them, or is of a kind that stands beside the host's layers.
        """
        raise ConfigError(f"a {self.kind} patch changes none of the host's own layers; set patch.kind=lora")

    def hooks_on(self, unet: Any) -> PlaceHooks | None:
        """Hooks by which it acts inside the host's own modules; None of one that computes what is added elsewhere."""
        return None

    def learning(self, unet: Any) -> AbstractContextManager:
        """What must hold on the host during a training run."""
        return nullcontext()

    def recomputing(self, unet: Any) -> AbstractContextManager:
        """What must hold while the host's blocks run once more in the backward pass, to save memory."""
        return nullcontext()

    @abstractmethod
    def joints(self) -> list[nn.Parameter]:
        """The zero-initialised parameters through which the patch enters the host; they may learn at their own rate."""

    @abstractmethod
    def stored(self, unet: Any) -> StoredPatch:
        """What a file keeps of the patch, float32; all zero has no effect."""

    @abstractmethod
    def load(self, unet: Any, artifact: PatchArtifact, dtype: torch.dtype = torch.float32) -> None:
        """Replace every parameter by what the file says it is on `unet`, rounded to `dtype`.

        What held the parameters before, an optimizer for instance, must be made anew.

        Raises:
            BaseMismatch: when something is for what this host lacks; dropping it would weaken the patch in silence.
        """


class ResidualPatch(Anchored, Patch):
    """A patch that computes residuals for the host's features.

    Attributes:
        reads_features: whether it must be shown the host's features, and so answers after the encoder has run.
    """

    reads_features: ClassVar[bool]

    def new_gate(self, unet: Any, width: int, gates: int) -> TextGate:
        """Fresh gates that read the text and, of a UNet, the mid block's output."""
        if host_kind(unet) is not UNET:
            return TextGate(text_width(unet), width, gates)
        sizes = (middle_channels(unet), text_width(unet), unet.config["norm_num_groups"])
        return Gate(*sizes, width, gates)

    @abstractmethod
    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        prompt_states: Tensor,
        instruction_states: Tensor,
        conditions: Mapping[str, Tensor] | None = None,
        features: Features | None = None,
        scales: Tensor | None = None,
    ) -> Residuals:
        """Residuals for the host.

        Args:
            sample: noisy latents, (B, >= 4, h, w); channels past the patch's own are ignored.
            timesteps: shape (B,) or a scalar.
            prompt_states: the rows' text states, (B, tokens, width).
            instruction_states: the safety instruction's text states, (1 or B, tokens, width).
            conditions: what else the host is told, by the names its `HostKind` gives, e.g. SDXL's `text_embeds`.
            features: the host's own, of the same rows; a patch with `reads_features` needs them.
            scales: strength of each group's correction, (groups,) or (B, groups); all 1 by default.
        """


def row_timesteps(timesteps: Any, sample: Tensor) -> Tensor:
    """`timesteps` given as int, float, 0-d or batched, as a tensor of shape (B,) on the sample's device."""
    tensor = torch.as_tensor(timesteps, device=sample.device)
    return tensor.reshape(-1).expand(sample.shape[0])
