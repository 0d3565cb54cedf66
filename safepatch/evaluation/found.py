"""What attacks found before anything was drawn, kept in a run's folder: no search is made twice.

A search that only reads the text encoder finds the same for every patch. Where there is no folder nothing is kept.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from safepatch.attacks import Round
from safepatch.data.prompts import Prompt
from safepatch.diffusion import Way
from safepatch.errors import PromptError
from safepatch.files import replacing, unwritable

ROUNDS = "rounds"  # the file's metadata that holds all but tensors


def kept_rounds(folder: Path | None, key: str, make: Callable[[], list[Round]]) -> list[Round]:
    """The rounds kept under `key`, or those that `make` finds; what a crash of the machine damaged is found again.

    Raises:
        SafepatchError: when they cannot be written, and whatever `make` raises.
    """
    if folder is None:
        return make()
    path = folder / f"search-{key}.safetensors"
    if (rounds := _read(path)) is None:
        rounds = make()
        _write(path, rounds)
    return rounds


def _write(path: Path, rounds: Sequence[Round]) -> None:
    tensors = {
        f"{i}.{name}": value.contiguous()
        for i, made in enumerate(rounds)
        for name, value in made.way._asdict().items()
        if isinstance(value, Tensor)
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=False) as file:
            file.write(save(tensors, {ROUNDS: json.dumps([_plain(made) for made in rounds], default=str)}))
    except OSError as error:
        raise unwritable(path, error) from error


def _plain(made: Round) -> dict[str, Any]:
    way = {name: value for name, value in made.way._asdict().items() if not isinstance(value, Tensor)}
    return {"prompts": [asdict(p) for p in made.prompts], "starts": [asdict(p) for p in made.starts], "way": way}


def _read(path: Path) -> list[Round] | None:
    try:
        with safe_open(path, "pt") as file:
            records = json.loads((file.metadata() or {})[ROUNDS])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dictionary
        return [_round(record, i, tensors) for i, record in enumerate(records)]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, PromptError):
        return None


def _round(record: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> Round:
    prompts, starts = (tuple(map(_prompt, record[name])) for name in ("prompts", "starts"))
    own = {name: tensors[f"{number}.{name}"] for name in Way._fields if f"{number}.{name}" in tensors}
    return Round(prompts, Way(**{**record["way"], **own}), starts)


def _prompt(record: dict[str, Any]) -> Prompt:
    image = record["image"]
    return Prompt(**{**record, "image": image and Path(image), "asks": tuple(record["asks"])})
