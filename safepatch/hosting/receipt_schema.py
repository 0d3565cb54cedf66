"""What a receipt holds: what must be there, and of which kinds."""

from typing import Any

VERSION = 1

# What a receipt holds, by name the type or what is in it.
NUMBER = int | float
_PROMPT = {"sha256": str}
SCHEMA: dict[str, Any] = {
    "version": int,
    "pixels": str,
    "size": [int, int],
    "prompt": _PROMPT,
    "seed": int,
    "steps": int,
    "guidance_scale": NUMBER,
    "model": {"components": dict, "dtype": str, "device": str},
    "scheduler": {"class": str, "config": str},
    "software": dict,
    "denoising": {"timesteps": list, "gates": dict, "acted_on": list},
    "identical_to_base": bool,
}
_PATCH = {"hash": str, "scale": NUMBER | dict, "thresholds": dict, "window": [NUMBER, NUMBER]}
_PATCH |= dict.fromkeys(("gate", "reads", "speed"), str)
_GUARD = dict.fromkeys(("hash", "action"), str)
OPTIONAL: dict[str, Any] = {"negative_prompt": _PROMPT, "patch": _PATCH, "guard": _GUARD}  # None where there is none


def is_whole(signed: Any) -> bool:
    """Whether all that a receipt must have is there, of the right kinds; who signed it answers for the rest."""
    if not isinstance(signed, dict) or signed.keys() != {"receipt", "key", "signature"}:
        return False
    receipt = signed["receipt"]
    if not _fits(receipt, SCHEMA) or receipt["version"] != VERSION:
        return False
    turned = receipt["denoising"].get("opened_by", {})  # of gates that look at pictures
    if not isinstance(turned, dict) or not all(map(_are_names, turned.values())):
        return False
    return all(receipt.get(name) is None or _fits(receipt[name], shape) for name, shape in OPTIONAL.items())


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and _fits(value, [str] * len(value))


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_fits(value.get(name), each) for name, each in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and len(value) == len(shape) and all(map(_fits, value, shape))
    return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
