"""What a receipt says: put together before, while and after an image is drawn."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL import Image

from safepatch.diffusion import Components, denoiser, usual_guidance
from safepatch.guard.decide import Decision
from safepatch.hosting.hashes import component_hashes, json_hash, text_hash
from safepatch.hosting.receipt import pixels_hash
from safepatch.hosting.receipt_schema import VERSION
from safepatch.hosting.recording import Drawn
from safepatch.runtime.handle import Handle
from safepatch.runtime.parts import Look, Scale

LIBRARIES = {"safepatch": "safepatch-diffusion", **{name: name for name in ("torch", "diffusers", "transformers")}}


@dataclass(frozen=True)
class Asked:
    """What one image was asked for.

    Attributes:
        prompt, negative_prompt: of it; empty where there is none.
        seed: of the starting noise.
        steps: of denoising.
        guidance_scale: of classifier-free guidance.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float

    @classmethod
    def of(
        cls, pipe: Any, prompt: str, seed: int, steps: int, guidance_scale: float | None, negative_prompt: str | None
    ) -> "Asked":
        """With the guidance that is usual for the pipeline, where none is given."""
        guidance = usual_guidance(denoiser(pipe)) if guidance_scale is None else guidance_scale
        return cls(prompt, negative_prompt or "", seed, steps, float(guidance))


def model_record(pipe: Any) -> dict[str, Any]:
    """Which model draws, and on what: hashes of its parts, which takes some seconds for a large one."""
    components = Components.of(pipe)
    scheduler = components.scheduler
    return {
        "model": {
            "components": component_hashes(components),
            "dtype": str(components.compute_dtype).removeprefix("torch."),
            "device": components.unet.device.type,
        },
        "scheduler": {"class": type(scheduler).__name__, "config": json_hash(dict(scheduler.config))},
        "software": {"python": platform.python_version(), **{name: _version(of) for name, of in LIBRARIES.items()}},
    }


def patch_record(handle: Handle | None, scale: Scale | None = None) -> dict[str, Any] | None:
    """Which patch is on, by the hash of the file that was opened, and how; None without one.

    At another strength than it has now where one is given.
    """
    if handle is None:
        return None
    start, end = handle.window
    scale = handle.scale if scale is None else scale
    return {
        "hash": handle.content_hash,
        "categories": list(handle.categories),
        "scale": dict(scale) if isinstance(scale, Mapping) else scale,
        "gate": handle.gate,
        "thresholds": handle.thresholds,
        "reads": handle.reads,
        "speed": handle.speed,
        "window": [start, end],
        **({"looks": {name: list(look) for name, look in handle.looks.items()}} if handle.looks else {}),
    }


def guard_record(content_hash: str, action: str, decision: Decision) -> dict[str, Any]:
    """Which guard let a prompt pass and how it acts; of one that is drawn in other words, also what was asked."""
    asked = {"asked": {"sha256": text_hash(decision.prompt)}} if decision.is_rewritten else {}
    return {"hash": content_hash, "action": action, **asked}


def receipt_of(
    picture: Image.Image,
    asked: Asked,
    drawn: Drawn,
    patch: Mapping[str, Any] | None,
    model: Mapping[str, Any],
    with_prompt: bool = False,
    guard: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The receipt of one image.

    It is identical to the base's image, of the same batch on the same machine, where no row of it was acted on.

    Args:
        picture: as it is written.
        asked: what for.
        drawn: what the patch did.
        patch: of `patch_record`.
        model: of `model_record`.
        with_prompt: whether the prompts themselves stand in it, or only their hashes.
        guard: of `guard_record`; None without one.
    """
    is_known = patch is None or bool(drawn.timesteps)
    return {
        "version": VERSION,
        "pixels": pixels_hash(picture),
        "size": [picture.width, picture.height],
        "prompt": _prompt(asked.prompt, with_prompt),
        "negative_prompt": _prompt(asked.negative_prompt, with_prompt) if asked.negative_prompt else None,
        "seed": asked.seed,
        "steps": asked.steps,
        "guidance_scale": asked.guidance_scale,
        "patch": None if patch is None else dict(patch),
        "guard": None if guard is None else dict(guard),
        **model,
        "denoising": {
            "timesteps": drawn.timesteps,
            "gates": {name: [_rounded(p) for p in said] for name, said in drawn.gates.items()},
            "acted_on": drawn.acted,
            **(_pictured(drawn, patch) if patch and "looks" in patch else {}),
        },
        "identical_to_base": is_known and not drawn.acted,
    }


def _pictured(drawn: Drawn, patch: Mapping[str, Any]) -> dict[str, Any]:
    """What gates that look at pictures saw, and which keys opened each gate that opened."""
    looks = {name: Look(*look) for name, look in patch["looks"].items()}
    said = {name: [_rounded(p) for p in each] for name, each in drawn.pictures.items()}
    turned = drawn.turned(patch["thresholds"], looks)
    return {"pictures": said, "opened_by": {name: list(keys) for name, keys in turned.items()}}


def _prompt(text: str, with_text: bool) -> dict[str, str]:
    return {"sha256": text_hash(text), **({"text": text} if with_text else {})}


def _rounded(probability: float | None) -> float | None:
    return None if probability is None else round(probability, 6)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
