"""A guard and its file: one safetensors file with the heads, what they stand on, and what was measured; hashed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safepatch.artifact.acting import is_finite
from safepatch.artifact.container import GUARD_KEY, HASH_KEY, NO_HASH, Header, canonical_json, naming
from safepatch.artifact.tensor_file import TensorFile
from safepatch.artifact.writer import data_of, write_stream
from safepatch.data.category import Concept
from safepatch.data.words import replaced
from safepatch.errors import ArtifactError, BaseMismatch, lookup
from safepatch.guard.encoders import ENCODERS, Encoder
from safepatch.guard.heads import Heads
from safepatch.guard.mend import Mender, legible

VERSION_KEY, VERSION = "safepatch.guard_version", "1"
PROBE = "a quiet street with a red door"  # what an encoder makes of this tells whether it is the one
ALIKE = 0.99  # cosine of that, between the encoder and the one that the guard was trained on
READ = 256  # texts read at a time


@dataclass(frozen=True)
class GuardInfo:
    """What a guard is, without its tensors.

    Attributes:
        categories: by name, what each means, sorted by name.
        thresholds: by category, the probability from which a prompt is said to be for it, within (0, 1).
        encoder: what the heads read, a name in `ENCODERS`.
        rewrites: by category, its concepts as `asdict` writes them, with what takes their place.
        training: record: texts, labelers, seed.
        report: figures on prompts that it did not learn from.
        names: of what its categories are about; slips in them are mended before it reads.
        spared: words that are a slip away from such a name, and are none.
    """

    categories: dict[str, str]
    thresholds: dict[str, float]
    encoder: str
    rewrites: dict[str, list[dict]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what no guard could work with."""
        names, thresholds = set(self.categories), self.thresholds
        if list(self.categories) != sorted(names):
            raise ArtifactError("damaged: a guard's categories are not in order; train it again")
        if not names or set(thresholds) != names or not set(self.rewrites) <= names:
            raise ArtifactError("damaged: a guard's categories and thresholds disagree; train it again")
        if not all(isinstance(value, float) and 0 < value < 1 for value in thresholds.values()):
            raise ArtifactError("damaged: a guard's thresholds must be within (0, 1); train it again")
        lookup(ENCODERS, self.encoder, what="text encoder")
        if not all(isinstance(name, str) for name in (*self.names, *self.spared)):
            raise ArtifactError("damaged: a guard's names must be texts; train it again")
        for said in self.rewrites.values():
            for concept in said:
                Concept(**concept)


class Guard:
    """A classifier of prompts on a frozen text encoder.

    Args:
        info: what it is.
        heads: of its categories, in order of `info.categories`.
        probe: what the encoder made of `PROBE` when it was trained, its mean, (means,).
        encoder: that it reads with; None until `bind`.

    Attributes:
        content_hash: of the file that it was opened from; empty for one from memory.
    """

    def __init__(self, info: GuardInfo, heads: Heads, probe: Tensor, encoder: Encoder | None = None) -> None:
        self.info, self.heads, self.probe = info, heads.eval().requires_grad_(False), probe
        self.content_hash = ""
        self._use(encoder)

    def _use(self, encoder: Encoder | None) -> None:
        self._encoder = encoder
        self._mend = None if encoder is None else Mender(self.info.names, encoder.is_word, self.info.spared)

    @property
    def categories(self) -> tuple[str, ...]:
        """Names, in the order of probabilities."""
        return tuple(self.info.categories)

    @property
    def thresholds(self) -> Tensor:
        """By category, (C,)."""
        return torch.tensor([self.info.thresholds[name] for name in self.categories])

    def bind(self, pipe: Any = None) -> "Guard":
        """Give it its encoder, `clip`'s being the first text encoder of `pipe`; returns itself.

        Raises:
            BaseMismatch: when the pipeline's encoder is not the one that it was trained on.
            SafepatchError: as the encoder's function in `ENCODERS`.
        """
        encoder = ENCODERS[self.info.encoder](pipe)
        made = encoder([PROBE]).means[0]
        if made.shape != self.probe.shape or _cosine(made, self.probe) < ALIKE:
            raise BaseMismatch(
                "this guard was trained on another text encoder than the model's; train one on it, or use minilm"
            )
        self._use(encoder)
        return self

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Probabilities (N, C): of the piece of each text that is most suspicious of a category.

        Raises:
            PromptError: for a text that is too long.
        """
        if self._encoder is None:
            raise BaseMismatch("this guard has no text encoder yet; call bind(), with the pipeline where it reads clip")
        parts = [self._read(texts[at : at + READ]) for at in range(0, len(texts), READ)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.categories))

    def _read(self, texts: Sequence[str]) -> Tensor:
        assert self._encoder is not None, "bound"
        assert self._mend is not None, "with an encoder"
        pieces = self._encoder([self._mend(legible(text)) for text in texts])
        chances = self.heads(pieces).sigmoid()
        where = pieces.rows[:, None].expand_as(chances)
        return torch.zeros(len(texts), chances.shape[1]).scatter_reduce(0, where, chances, "amax")

    def flags(self, chances: Tensor) -> Tensor:
        """Which probabilities (N, C) reach their category's threshold, (N, C) bool."""
        return chances >= self.thresholds

    def rewritten(self, text: str, category: str) -> str:
        """The text with every concept of a category by its replacement; as it was where it names none."""
        concepts = [Concept(**said) for said in self.info.rewrites.get(category, []) if said["replacement"]]
        return replaced(text, concepts)

    def save(self, path: str | Path) -> str:
        """Write the file, all or nothing; returns its hash."""
        tensors = _tensors(self.heads, self.probe)
        metadata = {HASH_KEY: NO_HASH, VERSION_KEY: VERSION, GUARD_KEY: canonical_json(asdict(self.info))}
        metadata |= {"modelspec.title": f"prompt guard: {', '.join(self.categories)}"}
        write_stream(Path(path), dict(sorted(metadata.items())), tensors, data_of(tensors, tensors))
        return TensorFile.open(Path(path)).header.stated_hash

    @classmethod
    def open(cls, path: str | Path) -> "Guard":
        """Read a guard, its hash checked; `bind` it before it reads.

        Raises:
            ArtifactError: when it is missing, damaged, altered, or no guard.
        """
        file = TensorFile.open(Path(path))
        with naming(file.path):
            info = _info(file.header)
        tensors = file.load()
        with naming(file.path):
            guard = _assembled(info, tensors)
        guard.content_hash = file.header.stated_hash
        return guard


def stated_hash(path: str | Path) -> str:
    """The content hash that a file states."""
    return TensorFile.open(Path(path)).header.stated_hash


def _info(header: Header) -> GuardInfo:
    metadata = header.metadata
    if GUARD_KEY not in metadata:
        raise ArtifactError("is no guard: a safetensors file of another kind; make one with `safepatch guard train`")
    if metadata.get(VERSION_KEY) != VERSION:
        raise ArtifactError(
            f"is a guard of format {metadata.get(VERSION_KEY)}, this safepatch reads {VERSION}; upgrade"
        )
    try:
        return GuardInfo(**json.loads(metadata[GUARD_KEY]))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"damaged: its description cannot be read ({error}); fetch the file again") from error


def _assembled(info: GuardInfo, tensors: Mapping[str, Tensor]) -> Guard:
    names = {name.removeprefix("heads.") for name in tensors if name.startswith("heads.")}
    detect, probe = (tensors.get(name, torch.empty(0)) for name in ("heads.detect", "probe"))
    if detect.ndim != 3 or len(detect) != len(info.categories) or probe.ndim != 1 or not len(probe):
        raise ArtifactError("damaged: its heads are not those of its categories; fetch the file again")
    heads = Heads(detect.shape[2], len(probe), detect.shape[1], detect.shape[0])
    wanted = {name: tensor.shape for name, tensor in heads.state_dict().items()}
    found = {name: tensors[f"heads.{name}"] for name in names}
    if {name: tensor.shape for name, tensor in found.items()} != wanted:
        raise ArtifactError("damaged: its heads have other shapes than a guard's; fetch the file again")
    if not all(is_finite(tensor) for tensor in tensors.values()):
        raise ArtifactError("damaged: it holds values that are not finite; fetch the file again")
    heads.load_state_dict({name: tensor.float() for name, tensor in found.items()})
    return Guard(info, heads, probe.float())


def _tensors(heads: Heads, probe: Tensor) -> dict[str, Tensor]:
    held = {f"heads.{name}": tensor.detach().float().contiguous() for name, tensor in heads.state_dict().items()}
    return held | {"probe": probe.float().contiguous()}


def _cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))
