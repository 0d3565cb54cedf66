"""The multi-headed classifier: what CLIP sees, frozen, and one small head for each category.

Qu et al., "Unsafe Diffusion: On the Generation of Unsafe Images and Hateful Memes From Text-To-Image Models", CCS 2023,
arXiv 2305.13873, section 4: a head is two linear layers with a batch norm between, of the image embedding that is *not*
brought to unit length, trained by binary cross-entropy on a class-balanced sampler. A picture is unsafe when any head
says so.

Theirs cannot be shipped (no license): a user trains one of labelled pictures (`safepatch detector train`), or names the
folder of their published heads. Unlike their published evaluation, ours reads every picture as a whole, never a random
crop of it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import CLIPModel

from safepatch.detectors.base import Detector
from safepatch.detectors.clip import SOURCE as CLIP
from safepatch.detectors.clip import clip_pixels
from safepatch.detectors.head_files import FILE, read_heads
from safepatch.detectors.weights import Weights, find_weights, first_line, load_model
from safepatch.errors import ConfigError, ModelNotFound, UnsupportedModel
from safepatch.files import replacing, unwritable
from safepatch.progress import bar
from safepatch.taxonomy import Category

NAME = "multi-headed"
HIDDEN, DROPPED = 384, 0.5
RATE, BATCH, EPOCHS = 2e-4, 64, 31  # theirs
FEWEST = 300  # steps, of however few pictures


class Head(nn.Module):
    """P(category) of CLIP's image embeddings, (B, width), as a logit, (B,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [
            nn.Linear(width, HIDDEN),
            nn.ReLU(),
            nn.Dropout(DROPPED),
            nn.BatchNorm1d(HIDDEN),
            nn.Linear(HIDDEN, 1),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, width) to (B,)."""
        return self.layers(embeddings)[:, 0]


@dataclass(frozen=True)
class Eye:
    """CLIP's image encoder.

    Attributes:
        model: frozen.
        weights: where it came from.
    """

    model: Any
    weights: Weights

    @classmethod
    def open(cls, source: str | Path | None, device: str | torch.device = "cpu") -> "Eye":
        """Of a folder or Hub id; raises as `find_weights` and `load_model`."""
        weights = find_weights(source or CLIP, NAME)
        return cls(load_model(CLIPModel, weights, device), weights)

    @property
    def width(self) -> int:
        """Of embeddings."""
        return self.model.config.projection_dim

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings, not of unit length, (B, width), of images in [0, 1], (B, 3, H, W)."""
        pixels = clip_pixels(images.to(self.model.device, torch.float32), self.model.config.vision_config.image_size)
        return self.model.get_image_features(pixels).pooler_output


def multi_headed_detector(
    categories: Sequence[Category], source: str | Path | None = None, device: str | torch.device = "cpu"
) -> Detector:
    """The classifier in a folder that `safepatch detector train` wrote, or of published heads; a label for each head.

    Args:
        categories: not needed: its labels are its own.
        source: that folder.
        device: where it runs.

    Raises:
        ModelNotFound: when there is no such folder, or its CLIP is nowhere.
        UnsupportedModel: when its heads cannot be read, or are of another CLIP.
    """
    if source is None:
        raise ModelNotFound(
            f"detector '{NAME}' has no weights of its own; train one (safepatch detector train), and name its folder: "
            f"{NAME}@FOLDER"
        )
    read = read_heads(Path(source).expanduser(), NAME)
    eye = Eye.open(read.clip, device)
    if read.clip_sha256 and eye.weights.sha256 != read.clip_sha256:
        raise UnsupportedModel(f"{read.path} was trained on another CLIP than {eye.weights.version}; train it again")
    heads = {name: _head(name, own, eye.width, read.path).to(device) for name, own in read.tensors.items()}

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return eye(images)

    @torch.no_grad()
    def probabilities(images: Tensor) -> Tensor:
        seen = eye(images)
        return torch.sigmoid(torch.stack([head(seen) for head in heads.values()], dim=1))

    content = read.content + eye.weights.sha256.encode()
    sha256 = hashlib.sha256(content).hexdigest()
    return Detector(
        NAME, tuple(heads), probabilities, version=str(source), sha256=sha256, device=device, features=features
    )


def train_heads(embeddings: Mapping[str, Tensor], safe: Tensor, seed: int = 0, epochs: int = EPOCHS) -> dict[str, Head]:
    """A head for each label.

    Args:
        embeddings: of pictures of each label, (N, width).
        safe: of harmless pictures, (M, width); pictures of the other labels are not negatives: some show both.
        seed: of weights, order and dropout.
        epochs: passes over as many pictures as there are, and at least `FEWEST` steps.

    Raises:
        ConfigError: for a label, or harmless pictures, fewer than two of which there are.
    """
    few = next((name for name, rows in {**embeddings, "safe": safe}.items() if len(rows) < 2), None)
    if few or not embeddings:
        raise ConfigError(f"a head needs at least two pictures of '{few or 'a label'}', and of safe ones; add some")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {name: _trained(rows, safe, epochs, name) for name, rows in embeddings.items()}


def _trained(unsafe: Tensor, safe: Tensor, epochs: int, name: str) -> Head:
    rows, truth = torch.cat((unsafe, safe)), torch.cat((torch.ones(len(unsafe)), torch.zeros(len(safe))))
    share = torch.where(truth == 1, 1 / len(unsafe), 1 / len(safe))  # each class equally often
    head, size = Head(rows.shape[1]).train(), min(BATCH, len(rows))
    optimizer = torch.optim.Adam(head.parameters(), lr=RATE)
    for _ in bar(range(max(FEWEST, epochs * (len(rows) // size))), desc=f"training {name}", unit="step", leave=False):
        picked = torch.multinomial(share, size, replacement=True)
        loss = binary_cross_entropy_with_logits(head(rows[picked]), truth[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval().requires_grad_(False)


def save_heads(heads: Mapping[str, Head], eye: Eye, clip: str | Path | None, folder: Path) -> Path:
    """Write the heads into a folder, all or nothing; raises `SafepatchError` when that cannot be."""
    tensors = {f"{name}.{key}": t.contiguous() for name, head in heads.items() for key, t in head.state_dict().items()}
    about = {"labels": list(heads), "clip": str(clip or CLIP), "clip_sha256": eye.weights.sha256}
    path = Path(folder) / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(save(tensors, {NAME: json.dumps(about)}))
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _head(name: str, own: Mapping[str, Tensor], width: int, path: Path) -> Head:
    head = Head(width)
    try:
        head.layers.load_state_dict(own)
    except RuntimeError as error:
        raise UnsupportedModel(f"{path}: head '{name}' does not fit ({first_line(error)}); train it again") from error
    return head.eval().requires_grad_(False)
