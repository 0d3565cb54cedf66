"""Where a detector's weights come from: a folder, or a Hub id, whose local cache is asked before the network."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from safepatch.errors import ModelNotFound, UnsupportedModel

SAFE = ("model.safetensors", "model-*-of-*.safetensors")
PICKLED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")  # older repositories; torch's restricted loader reads them
TABLES = ("config.json", "*.index.json", "tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Weights:
    """A detector's weights on disk.

    Attributes:
        folder: as `save_pretrained` writes it.
        version: what they are, for people: the folder as it was given, or the Hub id and the commit.
        sha256: of the weights' file; of all files one after the other, by name, where there are several.
    """

    folder: Path
    version: str
    sha256: str


def find_weights(source: str | Path, detector: str, part: str = "") -> Weights:
    """The weights that `source` stands for.

    Args:
        source: a folder, or a Hub id.
        detector: whose they are, for messages.
        part: name of the sub-folder that holds them where `source` is the folder of a pipeline.

    Raises:
        ModelNotFound: when neither disk nor Hub has them.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        folder = folder / part if part and (folder / part).is_dir() else folder
        return Weights(folder, str(source), sha256_of(_present(folder, detector)))
    if str(source).startswith((".", "/", "~")):
        raise ModelNotFound(f"{source} is no folder; give the weights of detector '{detector}': {detector}@FOLDER")
    folder = _from_hub(str(source), detector)
    return Weights(folder, f"{source} ({folder.name[:12]})", sha256_of(weight_files(folder)))


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that transformers would read in `folder`; empty when there are none."""
    found = (sorted(folder.glob(pattern)) for pattern in (*SAFE, *PICKLED))
    return next((files for files in found if files), [])


def sha256_of(paths: list[Path]) -> str:
    """The SHA-256 of the files' bytes, one file after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def load_model(kind: Any, weights: Weights, device: str | torch.device) -> Any:
    """The model of the transformers class `kind`, frozen, float32, on `device`.

    Raises:
        UnsupportedModel: when the folder holds another model, or not all of its weights: none is left random.
    """
    try:
        model, info = kind.from_pretrained(
            weights.folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UnsupportedModel(
            f"{weights.version} cannot be read as {kind.__name__} ({first_line(error)}); fetch it again"
        ) from error
    if absent := sorted(info["missing_keys"]):
        raise UnsupportedModel(
            f"{weights.version} is no {kind.__name__}: it lacks {len(absent)} weights, e.g. '{absent[0]}'"
        )
    return model.eval().requires_grad_(False).to(device)


def first_line(error: Exception) -> str:
    """What an error says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _present(folder: Path, detector: str) -> list[Path]:
    files = weight_files(folder)
    if not files or not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"{folder} holds no weights for detector '{detector}': it needs config.json and {SAFE[0]}, "
            "as `save_pretrained` writes them"
        )
    return files


def _from_hub(name: str, detector: str) -> Path:
    """The snapshot of `name` that holds weights; pickled ones only where the repository has no others."""
    why = ""
    for patterns, offline in (((*SAFE, *PICKLED), True), (SAFE, False), (PICKLED, False)):
        try:
            folder = Path(snapshot_download(name, allow_patterns=[*TABLES, *patterns], local_files_only=offline))
        except (OSError, ValueError) as error:
            why = first_line(error)
            continue
        if weight_files(folder):
            return folder
    raise ModelNotFound(
        f"no weights of detector '{detector}' at '{name}', no folder and not on the Hub ({why or 'none there'}); "
        f"give a folder, {detector}@FOLDER, or download them to the Hub cache once: hf download {name}"
    )
