"""Weights in files, read and copied one tensor at a time: memory holds one of them, never a model."""

import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safepatch.artifact.container import raw_bytes
from safepatch.diffusion import original_names
from safepatch.errors import UnsupportedModel

UNET = "model.diffusion_model."  # what names of a UNet's tensors begin with in the original (CompVis/LDM) layout
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class Stored(NamedTuple):
    """A tensor in a file: its dtype as safetensors calls it, its shape, and where its bytes are, if that is known."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Weights(ABC):
    """A file of tensors.

    Attributes:
        path: of the file.
        tensors: by name, in their order in the file.
        metadata: texts by key.
    """

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    @abstractmethod
    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor, flat."""

    def read(self, name: str) -> Tensor:
        """A tensor, as it is stored."""
        dtype, shape, *_ = self.tensors[name]
        return self.raw(name).view(DTYPES[dtype]).reshape(shape)


@dataclass(frozen=True)
class SafeWeights(Weights):
    """A safetensors file (https://github.com/huggingface/safetensors)."""

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> "SafeWeights":
        """Read the header; raises `UnsupportedModel` when the file is damaged."""
        try:
            with safe_open(path, "pt"):  # checks header and size
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries: dict[str, Any] = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise UnsupportedModel(f"{path} is damaged or not a safetensors file ({error}); fetch it again") from error
        metadata, start = entries.pop("__metadata__", None) or {}, 8 + length
        tensors = {
            name: Stored(entry["dtype"], tuple(entry["shape"]), *(start + place for place in entry["data_offsets"]))
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        }
        return cls(path, tensors, metadata)

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor, flat."""
        stored = self.tensors[name]
        data = torch.empty(stored.end - stored.begin, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(stored.begin)
            if file.readinto(data.numpy().data) != len(data):
                raise UnsupportedModel(f"{self.path} was cut short while it was read; fetch it again")
        return data


@dataclass(frozen=True)
class PickledWeights(Weights):
    """A file written by `torch.save`, opened with its restricted loader.

    Attributes:
        content: all that it holds, its tensors mapped where the format allows it.
    """

    path: Path
    tensors: Mapping[str, Stored]
    content: dict[str, Any]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> "PickledWeights":
        """Map the file; raises `UnsupportedModel` when it is damaged, or holds what could run as code."""
        content = load_pickle(path)
        held = {name: tensor for name, tensor in _state(content).items() if isinstance(tensor, Tensor)}
        tensors = {n: Stored(NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, t.nbytes) for n, t in held.items()}
        return cls(path, tensors, content, {"format": "pt"})

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor, flat."""
        return _state(self.content)[name].contiguous().reshape(-1).view(torch.uint8)


def load_pickle(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, mapped if it can be; raises `UnsupportedModel` for anything but a table of weights."""
    try:
        content = _loaded(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UnsupportedModel(f"{path} holds more than weights, or is damaged; convert it to .safetensors") from error
    if not isinstance(content, dict) or not isinstance(_state(content), dict):
        raise UnsupportedModel(f"{path} holds no table of weights; convert it to .safetensors")
    return content


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _state(content: dict[str, Any]) -> dict[str, Any]:
    return content.get("state_dict", content)


def open_weights(path: Path, allow_pickle: bool = False) -> Weights:
    """The tensors of a file.

    Raises:
        UnsupportedModel: when the file is damaged, in a format that is not read, or a pickle and none is allowed.
    """
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return SafeWeights.open(path)
    if suffix not in PICKLES:
        raise UnsupportedModel(f"{path} is in a format that is not read; convert it to .safetensors")
    if not allow_pickle:
        raise UnsupportedModel(
            f"{path} is a pickle, which can run code when opened; use a .safetensors file, or pass --allow-pickle "
            "(in Python allow_pickle=True) if you trust its source"
        )
    return PickledWeights.open(path)


def denoiser_weights(files: Sequence[Weights], config: Mapping[str, Any]) -> dict[str, tuple[Weights, str]]:
    """Where the weights of what denoises are: file and name there, by diffusers' name.

    Args:
        files: of one model, in diffusers' layout or in the original one.
        config: of what denoises.
    """
    places = {name: (file, name) for file in files for name in file.tensors}
    if "cross_attention_dim" not in config or not any(name.startswith(UNET) for name in places):
        return places
    stored: Mapping[str, Any] = {name: file.tensors[name] for name, (file, _) in places.items()}
    return {name: places[original] for name, original in original_names(stored, config).items()}


Change = Callable[[str, Tensor], Tensor]


def write_changed(
    file: Weights,
    out: BinaryIO,
    names: Collection[str],
    changed: Collection[str],
    change: Change,
    metadata: Mapping[str, str],
) -> None:
    """Write tensors of `file` as safetensors, one after the other.

    Args:
        file: read as it is written.
        out: an open file.
        names: which tensors.
        changed: which of them are passed through `change`, which keeps dtype and shape.
        change: what a named tensor becomes.
        metadata: of the new file.
    """
    kept = [name for name in file.tensors if name in names]
    out.write(_header(file, kept, metadata))
    for name in kept:
        out.write(raw_bytes(change(name, file.read(name)) if name in changed else file.raw(name)))


def write_pickle_changed(file: PickledWeights, out: BinaryIO, changed: Collection[str], change: Change) -> None:
    """Write what `file` holds as `torch.save` does, with tensors changed as in `write_changed`."""
    state = {name: change(name, each) if name in changed else each for name, each in _state(file.content).items()}
    torch.save({**file.content, "state_dict": state} if "state_dict" in file.content else state, out)


def _header(file: Weights, names: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape, *place = file.tensors[name]
        begin, end = end, end + place[1] - place[0]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
