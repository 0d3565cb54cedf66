"""What the control patches of UNets and of transformers share: a trainable clone of the host's first half.

Layout after ControlNet (Zhang et al. 2023, arXiv 2302.05543) without a hint image: what steers the clone is a textual
safety instruction that it reads, alone or together with the row's own prompt states. One that reads the prompt
alone has the instruction in its weights only, and is what other programs know as a ControlNet.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safepatch.diffusion import host_kind, without_image_prompts
from safepatch.errors import ConfigError
from safepatch.patch.base import ResidualPatch

SEES = ("instruction", "instruction+prompt", "prompt")


class ClonePatch(ResidualPatch):
    """A patch whose weights are the host's own plus a delta, behind zero-initialised joints.

    Args:
        clone: the copied parts by their name in the host.
        latent_channels: of what the host is given, the first ones, which the clone reads.
        sees: a member of `SEES`.
    """

    kind = "control"
    reads_features = False
    learning_rate = 1e-4
    joint_rate = 10.0

    def __init__(self, clone: Mapping[str, nn.Module], latent_channels: int, sees: str) -> None:
        super().__init__()
        if sees not in SEES:
            raise ConfigError(f"a control patch cannot see '{sees}'; choose one of: {', '.join(SEES)}")
        self.sees = sees
        self.layout = {}
        self.latent_channels = latent_channels
        self.clone = nn.ModuleDict(dict(clone))

    def anchors(self, unet: Any) -> dict[str, Tensor]:
        """The host's own weights for the clone, zeros for its joints."""
        host, entry = dict(unet.named_parameters()), host_kind(unet).entry_weight
        entry = entry if entry in host else entry.replace(".weight", ".base_layer.weight")  # it carries a LoRA
        host[entry] = latent_part(host[entry], unet)
        return {
            name: host[name.removeprefix("clone.")] if name.startswith("clone.") else torch.zeros_like(p)
            for name, p in self.named_parameters()
        }

    def context(self, prompt_states: Tensor, instruction_states: Tensor) -> Tensor:
        """The text states that the clone reads, (B, tokens, width)."""
        if self.sees == "prompt":
            return prompt_states
        instruction = instruction_states.expand(prompt_states.shape[0], -1, -1)
        return instruction if self.sees == "instruction" else torch.cat((instruction, prompt_states), dim=1)

    def pooled(self, states: Tensor) -> Tensor:
        """What the clone reads of the prompt's pooled states (B, width): nothing where it is not to see the prompt."""
        return torch.zeros_like(states) if self.sees == "instruction" else states

    def run(self, block: nn.Module, *inputs: Any, **options: Any) -> Any:
        """The output of `block`, recomputed in the backward pass if memory is to be saved."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, **options)
        return block(*inputs, **options)


def cloned(unet: Any, parts: Mapping[str, nn.Module], empty: bool) -> dict[str, nn.Module]:
    """Trainable float32 copies of `parts` of the host, reading of what it is given the latents only.

    The weights of `empty` copies stay on the meta device. An inpainting host is given more than latents, but only the
    latents are every host's.

    Raises:
        ConfigError: when the host's weights are quantized.
    """
    if not all(weight.is_floating_point() for part in parts.values() for weight in part.parameters()):
        raise ConfigError(
            f"the {host_kind(unet).noun}'s weights are quantized, and a control patch copies them; load it "
            "unquantized, or use a lora or lite patch"
        )
    copies = {name: _copy_without_hooks(part, empty).float().requires_grad_(True) for name, part in parts.items()}
    name, *path, _ = host_kind(unet).entry_weight.split(".")
    entry: Any = copies[name].get_submodule(".".join(path))
    entry = getattr(entry, "base_layer", entry)
    weight = latent_part(entry.weight.detach(), unet)
    if weight.shape != entry.weight.shape:
        setattr(entry, "in_features" if isinstance(entry, nn.Linear) else "in_channels", weight.shape[1])
        entry.weight = nn.Parameter(weight.clone())
    return copies


def latent_channels(unet: Any) -> int:
    """How many channels the host's latents have, as it is given them: for Flux those of packed tokens."""
    return unet.config.get("out_channels") or unet.config["in_channels"]


def latent_part(entry_weight: Tensor, unet: Any) -> Tensor:
    """The part of the host's first weight (out, in, ...) that reads the latents."""
    return entry_weight[:, : latent_channels(unet)]


def _copy_without_hooks(module: nn.Module, empty: bool) -> nn.Module:
    """A deep copy without the host's hooks and image prompts: the clone must run no other patch, and reads text."""
    tables = [getattr(part, name) for part in module.modules() for name in _HOOK_TABLES]
    replaced: dict[int, Any] = {id(table): OrderedDict() for table in tables}
    replaced |= {
        id(registry): None for part in module.modules() if (registry := getattr(part, "_diffusers_hook", None))
    }
    if empty:
        replaced |= {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in module.parameters()}
    copied = copy.deepcopy(module, replaced)
    for part in copied.modules():  # diffusers' own hooks (offloading, casting) stand in for a module's forward
        if vars(part).pop("_diffusers_hook", 0) is None:
            vars(part).pop("forward", None)
    return without_image_prompts(copied)


_HOOK_TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
