"""The files of a multi-headed classifier's heads: ours, and Unsafe Diffusion's as they were published.

Ours is one `heads.safetensors`, which names its CLIP. Theirs are one pickle for each head, `violent.pt`, the state of
five layers in a row; torch's restricted loader reads them, which makes nothing but tensors. They say nothing of their
CLIP, which is OpenAI's ViT-L/14; another is read from the sub-folder `clip`, if there is one.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from safepatch.detectors.weights import first_line
from safepatch.errors import ModelNotFound, UnsupportedModel

FILE = "heads.safetensors"
PICKLED = ".pt"
ENDING = "_head"  # which their own program looks for, and their files lack
FIRST = "0.weight"  # of a head's layers


class Heads(NamedTuple):
    """What a folder holds.

    Attributes:
        path: of the file, or the folder of files.
        tensors: by label: of the head's layers in a row, by name.
        clip: folder or Hub id of the CLIP that they read; None for the usual one.
        clip_sha256: of its weights; None where nobody says.
    """

    path: Path
    tensors: Mapping[str, Mapping[str, Tensor]]
    clip: str | None
    clip_sha256: str | None

    @property
    def content(self) -> bytes:
        """What tells them from others, wherever they lie."""
        return save(
            {f"{name}.layers.{key}": t.contiguous() for name, own in self.tensors.items() for key, t in own.items()}
        )


def read_heads(folder: Path, detector: str) -> Heads:
    """The heads in a folder; ours where it holds both.

    Raises:
        ModelNotFound: when it holds none.
        UnsupportedModel: when a file cannot be read, or holds anything but a head's tensors.
    """
    path = folder / FILE
    if path.is_file():
        return _ours(path, detector)
    files = sorted(file for file in folder.glob(f"*{PICKLED}") if file.is_file())
    if not files:
        raise ModelNotFound(
            f"{folder} holds no {FILE} for detector '{detector}', which safepatch detector train writes, and no "
            f"published heads, such as violent{PICKLED}"
        )
    clip = folder / "clip"
    tensors = {file.stem.removesuffix(ENDING): _published(file) for file in files}
    if len(tensors) < len(files):
        raise UnsupportedModel(f"{folder} holds two heads of one label, with {ENDING} and without; take one away")
    return Heads(folder, tensors, str(clip) if clip.is_dir() else None, None)


def _ours(path: Path, detector: str) -> Heads:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[detector])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dictionary
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UnsupportedModel(f"{path} cannot be read as heads ({first_line(error)}); train it again") from error
    fields = {"labels": list, "clip": str, "clip_sha256": str}
    if not isinstance(about, dict) or not all(isinstance(about.get(key), kind) for key, kind in fields.items()):
        raise UnsupportedModel(f"{path} does not say its labels and its CLIP; train it again")
    heads = {name: _below(tensors, f"{name}.layers.") for name in about["labels"]}
    return Heads(path, heads, about["clip"], about["clip_sha256"])


def _published(path: Path) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UnsupportedModel(
            f"{path} cannot be read as a head ({first_line(error)}); only a state of tensors is opened, as "
            "torch.save(head.state_dict(), ...) writes it"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UnsupportedModel(f"{path} holds no tensors by name; only the state of a head is opened")
    front = next((name.removesuffix(FIRST) for name in state if name.endswith(FIRST)), "")
    return _below(state, front)


def _below(tensors: Mapping[str, Tensor], front: str) -> dict[str, Tensor]:
    return {name.removeprefix(front): t for name, t in tensors.items() if name.startswith(front)}
