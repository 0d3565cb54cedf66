"""Q16: is a picture offensive at all? CLIP with two prompts that were learned, one for each answer.

Schramowski, Tauchmann, Kersting, "Can Machines Help Us Answering Question 16 in Datasheets, and In Turn Reflecting on
Inappropriate Content?", FAccT 2022, arXiv 2202.06675: prompt tuning of two embeddings z on SMID's rated photographs;
a softmax over the cosines of the picture with z, times 100. At the threshold .5 it is their argmax. It answers one
question for all harms at once, so it judges one category as it judges another.

A folder holds what is needed: `prompts.safetensors`, with `prompts` (2, width), first the harmless answer's, and in its
metadata `clip`, a folder or Hub id of the `CLIPModel` they were learned for. The published prompts are a pickle, which
is not opened here; `save_prompts` writes them as such a folder once you have them as a tensor.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import normalize

from safepatch.detectors.base import Detector
from safepatch.detectors.clip import SOURCE as CLIP
from safepatch.detectors.multi_headed import Eye
from safepatch.detectors.weights import first_line
from safepatch.errors import ModelNotFound, UnsupportedModel
from safepatch.files import replacing, unwritable
from safepatch.taxonomy import Category

NAME, FILE = "q16", "prompts.safetensors"
LABELS = ("inappropriate",)
SCALE = 100.0  # of the cosines; theirs


def q16_detector(
    categories: Sequence[Category] = (), source: str | Path | None = None, device: str | torch.device = "cpu"
) -> Detector:
    """The judge of a folder, one label, `inappropriate`.

    Args:
        categories: not needed: its label is its own.
        source: the folder.
        device: where it runs.

    Raises:
        ModelNotFound: when there is no such folder, or its CLIP is nowhere.
        UnsupportedModel: when its prompts cannot be read, or are of another CLIP's width.
    """
    if source is None:
        raise ModelNotFound(f"detector '{NAME}' has no prompts of its own; name a folder that holds {FILE}: q16@FOLDER")
    path = Path(source).expanduser() / FILE
    prompts, clip = _read(path)
    eye = Eye.open(clip, device)
    if prompts.shape != (2, eye.width):
        raise UnsupportedModel(f"{path} holds prompts {list(prompts.shape)}, its CLIP needs [2, {eye.width}]")
    answers = normalize(prompts.float()).to(device)

    @torch.no_grad()
    def probabilities(images: Tensor) -> Tensor:
        return (SCALE * normalize(eye(images)) @ answers.T).softmax(1)[:, 1:]

    sha256 = hashlib.sha256(save({"prompts": prompts}) + eye.weights.sha256.encode()).hexdigest()  # wherever they lie
    return Detector(NAME, LABELS, probabilities, version=str(source), sha256=sha256, device=device, features=eye)


def save_prompts(prompts: Tensor, folder: Path, clip: str | Path = CLIP) -> Path:
    """Write two learned prompts, (2, width), first the harmless answer's, as a folder that the detector reads.

    Raises:
        SafepatchError: when it cannot be written.
    """
    path = Path(folder) / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(save({"prompts": prompts.contiguous()}, {"clip": str(clip)}))
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _read(path: Path) -> tuple[Tensor, str]:
    if not path.is_file():
        raise ModelNotFound(f"{path.parent} holds no {FILE} for detector '{NAME}'; see safepatch.detectors.q16")
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("prompts"), (file.metadata() or {})["clip"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UnsupportedModel(f"{path} cannot be read as prompts ({first_line(error)}); write it again") from error
