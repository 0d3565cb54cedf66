"""What this installation can do, on one screen: versions, devices, caches, extras, and which runs fit."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from safepatch.data.shards import usual_cache
from safepatch.training.memory import GIB, Plan, device_bytes

DISTRIBUTION = "safepatch-diffusion"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub")
USUAL = Plan("lora")
SPARING = replace(USUAL, mixed_precision="bf16", dtype=torch.bfloat16, gradient_checkpointing=True)
# GiB by family and plan, as `safepatch train --dry-run` predicts them: half a minute each, and the same everywhere.
NEEDED = {
    ("sd1", "as it is"): 19.5,
    ("sd1", "bf16, checkpointing"): 4.8,
    ("sdxl", "as it is"): 124.3,
    ("sdxl", "bf16, checkpointing"): 12.7,
}


def examined() -> Iterator[str]:
    """The screen, line by line; none of it asks the network."""
    yield _versions()
    yield f"devices     {'; '.join(_devices())}"
    yield from _caches()
    yield from _extras()
    yield from _fits()


def _versions() -> str:
    own = _version(DISTRIBUTION) or "from a checkout"
    rest = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    return f"versions    safepatch {own}, Python {platform.python_version()}, {rest}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    memory = psutil.virtual_memory()
    found = [f"cpu, {os.cpu_count()} cores, {memory.total / GIB:.1f} GiB ({memory.available / GIB:.1f} free)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index}, {properties.name}, {properties.total_memory / GIB:.1f} GiB")
    return [*found, *(["mps"] if torch.backends.mps.is_available() else [])]


def _caches() -> Iterator[str]:
    for title, path in {"latents": usual_cache(), "Hub": Path(HF_HUB_CACHE)}.items():
        size = f"{_size(path) / GIB:.2f} GiB" if path.is_dir() else "empty"
        yield f"cache       {title}: {path}, {size}"


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; what a link points to is counted where it lies."""
    total = 0
    for path, _, names in os.walk(folder):
        total += sum(os.lstat(os.path.join(path, name)).st_size for name in names)
    return total


def _extras() -> Iterator[str]:
    """Which extras the installed distribution names, and whether their packages are there."""
    needed: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires(DISTRIBUTION) or []:
        if extra := re.search(r"extra == ['\"]([\w.-]+)['\"]", requirement):
            needed.setdefault(extra[1], []).append(re.split(r"[^\w.-]", requirement)[0])
    missing = {extra: [name for name in names if _version(name) is None] for extra, names in sorted(needed.items())}
    there = [extra for extra, names in missing.items() if not names]
    yield f"extras      installed: {', '.join(there) or 'none'}"
    for extra, names in missing.items():
        if names:
            yield f"            {extra}: pip install {' '.join(names)}"


def _fits() -> Iterator[str]:
    """What training a lora patch needs, beside what the GPU has; without one, the memory that is free."""
    total, free = device_bytes(), psutil.virtual_memory().available
    where = "the GPU has" if total else "no GPU; free memory is"
    yield f"training    a lora patch, batches of {USUAL.batch_size}; {where} {(total or free) / GIB:.1f} GiB"
    for (name, plan), needed in NEEDED.items():
        verdict = "fits" if needed * GIB <= (total or free) else "does not fit"
        yield f"            {name}, {plan}: {needed:.1f} GiB, {verdict}"
