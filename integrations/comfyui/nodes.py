"""The two nodes: one that reads a patch, one that puts it on a model."""

import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import folder_paths  # type: ignore[import-not-found]
import torch
from comfy.patcher_extension import WrappersMP  # type: ignore[import-not-found]
from torch import nn

from safepatch.artifact.info import EXPORTED
from safepatch.artifact.patch_artifact import Part, PatchArtifact
from safepatch.diffusion import family
from safepatch.errors import ConfigError
from safepatch.export import import_lora
from safepatch.export.names import original_path
from safepatch.models.weights import open_weights
from safepatch.patch import ControlPatch, LoraPatch
from safepatch.patch.files import from_artifact
from safepatch.runtime.apply import instruction_states, ready
from safepatch.runtime.parts import ActivePart, Scale
from safepatch.runtime.settings import Settings, check_window
from safepatch.runtime.words import Words

from .attachment import Attachment
from .host import compute_dtype, host_of
from .text import ComfyText, text_of

FOLDER, KEY = "safepatch", "safepatch"  # under ComfyUI's `models`; of its wrappers
WRAPPERS = ("OUTER_SAMPLE", "PREDICT_NOISE", "DIFFUSION_MODEL")
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


class SafepatchLoader:
    """Reads a patch from `models/safepatch`: a patch file, or a LoRA that `safepatch export` wrote."""

    CATEGORY, FUNCTION = "loaders", "load"
    RETURN_TYPES, RETURN_NAMES = ("SAFEPATCH",), ("patch",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node is given."""
        return {"required": {"patch": (_files(),)}}

    @classmethod
    def IS_CHANGED(cls, patch: str) -> float:
        """A file that was written again is read again."""
        return os.path.getmtime(folder_paths.get_full_path_or_raise(FOLDER, patch))

    def load(self, patch: str) -> tuple[PatchArtifact]:
        """The patch; raises an `ArtifactError` for a file that is none, or was altered."""
        return (open_patch(Path(folder_paths.get_full_path_or_raise(FOLDER, patch))),)


class SafepatchApply:
    """Puts a patch on a model. Prompts that are encoded with the CLIP that it gives out are read word by word."""

    CATEGORY, FUNCTION = "loaders", "apply"
    RETURN_TYPES: ClassVar = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES: ClassVar = ("model", "clip", "says")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node is given."""
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        named = "weapons=0.5, drugs=0; for categories that are not named, the strength above"
        return {
            "required": {
                "model": ("MODEL",),
                "patch": ("SAFEPATCH",),
                "gate": (["hard", "soft", "off"],),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05}),
                "start": ("FLOAT", {"default": 0.0, **share}),
                "end": ("FLOAT", {"default": 1.0, **share}),
            },
            "optional": {"clip": ("CLIP",), "by_category": ("STRING", {"default": "", "tooltip": named})},
        }

    def apply(
        self,
        model: Any,
        patch: PatchArtifact,
        gate: str,
        strength: float,
        start: float,
        end: float,
        clip: Any = None,
        by_category: str = "",
    ) -> tuple[Any, Any, str]:
        """The model with the patch, the CLIP as it came, and what is to be known.

        Raises:
            SafepatchError: for a patch of another family, settings out of range, and what cannot be done here.
        """
        if lacking := [name for name in WRAPPERS if not hasattr(WrappersMP, name)]:
            raise ConfigError(f"this ComfyUI has no wrapper {lacking[0]}; update it, patches act through it")
        attachment, words = _attached(model, patch, gate, scale_of(strength, by_category, patch), (start, end), clip)
        patched = model.clone()
        around = (attachment.around_sampling, attachment.around_guidance, attachment.around_unet)
        for name, wrapper in zip(WRAPPERS, around, strict=True):
            patched.add_wrapper_with_key(getattr(WrappersMP, name), KEY, wrapper)
        weakref.finalize(attachment, words.hooks.remove)  # once no model carries it, CLIP is listened to no longer
        said = _says(attachment.parts, gate, clip)
        logging.info("safepatch: %s", said)
        return patched, clip, said


def open_patch(path: Path) -> PatchArtifact:
    """The patch in a file, or in a LoRA that `safepatch export` wrote; raises `SafepatchError`."""
    is_exported = EXPORTED in open_weights(path).metadata
    return import_lora(path) if is_exported else PatchArtifact.open(path)


def scale_of(strength: float, by_category: str, patch: PatchArtifact) -> Scale:
    """The scale that `weapons=0.5, drugs=0` and one strength for all others say; raises `ConfigError`."""
    named: dict[str, float] = {}
    for entry in by_category.replace(",", " ").split():
        name, _, value = entry.partition("=")
        try:
            named[name] = float(value)
        except ValueError:
            raise ConfigError(f"'{entry}' is no strength of a category; write for instance weapons=0.5") from None
    return {**dict.fromkeys(patch.info.categories, strength), **named} if named else strength


def _files() -> Sequence[str]:
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")]


def _attached(
    model: Any, patch: PatchArtifact, gate: str, scale: Scale, window: tuple[float, float], clip: Any
) -> tuple[Attachment, Words]:
    """The patch, ready to act on the model, and what it hears of CLIP."""
    check_window(window)
    host = host_of(model, with_encoder=any(part.artifact.info.kind == "control" for part in patch.parts()))
    if clip is None and any(part.artifact.info.config["sees"] != "prompt" for part in patch.parts()):
        raise ConfigError(f"a {patch.info.kind} patch reads its instruction; connect the model's CLIP")
    text = None if clip is None else text_of(clip, host)
    active = [_active(part, host, text, compute_dtype(model)) for part in patch.parts()]
    settings = Settings(scale, window, gate).checked(active)
    words = Words(cast(Any, text), active if text else ())
    return Attachment(active, settings, words, _pooled(host)), words


def _active(part: Part, host: Any, text: ComfyText | None, dtype: torch.dtype) -> ActivePart:
    """A part on the host, as ComfyUI's UNet calls its layers and is told of sizes."""
    module, states = from_artifact(part.artifact, host, dtype), torch.empty(1, 0, 0)
    if isinstance(module, LoraPatch):  # reads no instruction
        module.layers = tuple(original_path(layer, host.config) for layer in module.layers)
    elif text is not None:
        states = instruction_states(text, list(part.artifact.info.instructions.values()))
    if isinstance(module, ControlPatch) and "add_time_proj" in module.clone:
        module.clone["add_time_proj"] = nn.Identity()  # ComfyUI has embedded the sizes already
    active = ready(part, module, states)
    if active.looks:  # what it has seen of a denoising is kept by hooks that ComfyUI's clones have not
        raise ConfigError(
            f"not supported yet in ComfyUI: the gate for {', '.join(active.categories)} looks at pictures; fit it with "
            "safepatch gate --keys text"
        )
    return active


def _pooled(host: Any) -> int:
    """Channels of SDXL's pooled text states, in front of its sizes; 0 where there are none."""
    sizes = 5 if family(host.config) == "sdxl-refiner" else 6
    told = host.config.get("projection_class_embeddings_input_dim")
    return told - sizes * host.config["addition_time_embed_dim"] if told else 0


def _says(parts: Sequence[ActivePart], mode: str, clip: Any) -> str:
    """What is to be known of a patch that was put on."""
    said = f"{', '.join(name for part in parts for name in part.categories)}, gate {mode}"
    if mode == "off" or not any(part.reads_windows for part in parts):
        return said
    if clip is None:
        return f"{said}; no CLIP is connected, so it reads the prompt's states only, and other words can close it"
    return f"{said}; it reads the words of prompts that are encoded with the CLIP that this node gives out"
