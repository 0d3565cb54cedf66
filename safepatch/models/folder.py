"""What lies where in a diffusers folder: its configuration, its weights, and what is missing among them."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safepatch.errors import UnsupportedModel

SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
FORMATS = (".safetensors", ".bin")  # that are read, the first that is there
UNUSED = ("safety_checker", "image_encoder")  # components that are not loaded


def whole_name(path: Path) -> str:
    """The name of a file of weights without the number of its shard."""
    return SHARD.sub("", path.name)


def variant_of(path: Path) -> str:
    """`fp16` of `model.fp16.safetensors`; empty for plain weights."""
    return ".".join(whole_name(path).split(".")[1:-1])


def variants(component: Path, suffix: str = FORMATS[0]) -> dict[str, list[Path]]:
    """The files of each variant of a component's weights, plain ones first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(component.glob(f"*{suffix}"), key=lambda path: (variant_of(path), path.name)):
        found.setdefault(variant_of(path), []).append(path)
    return found


def chosen(component: Path) -> tuple[str, list[Path]]:
    """Which variant of a component's weights is read, empty for the plain one, and its files.

    Raises:
        UnsupportedModel: when there are none, or a shard of them is missing.
    """
    found = next(filter(None, (variants(component, suffix) for suffix in FORMATS)), None)
    if not found:
        raise UnsupportedModel(f"{component} holds no weights ({' or '.join(FORMATS)}); fetch them, or the model again")
    variant = "fp16" if "fp16" in found and "" not in found else next(iter(found))
    missing = _missing_shards(found[variant])
    if missing:
        raise UnsupportedModel(f"{component} lacks {missing[0]}{_more(missing)}; fetch the model again")
    return variant, found[variant]


def chosen_variant(folder: Path, index: Mapping[str, Any]) -> str | None:
    """The variant by which a folder has to be loaded, for want of plain weights; None where it has those.

    Args:
        folder: of the pipeline.
        index: its `model_index.json`.

    Raises:
        UnsupportedModel: as `chosen`, for some component.
    """
    parts = [
        folder / name for name, entry in index.items() if isinstance(entry, list) and entry[0] and name not in UNUSED
    ]
    needed = [chosen(part)[0] for part in parts if (part / "config.json").is_file()]
    return next(filter(None, needed), None)


def _missing_shards(files: Iterable[Path]) -> list[str]:
    names = {path.name for path in files}
    expected = {
        SHARD.sub(f"-{number:05d}-of-{found[2]}", name)
        for name in names
        if (found := SHARD.search(name))
        for number in range(1, int(found[2]) + 1)
    }
    return sorted(expected - names)


def _more(missing: list[str]) -> str:
    return f" and {len(missing) - 1} more" if len(missing) > 1 else ""


def write_config(config: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """Lay a pipeline's configuration, by component, out in `folder` as diffusers reads it; returns the folder."""
    for name, table in config.items():
        file = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
        path = folder / file.get(name, f"{name}/config.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table), encoding="utf-8")
    return folder
