"""What a model reads of prompts, made once and kept on disk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from safepatch.data.keys import digest
from safepatch.data.settings import DataConfig
from safepatch.data.shards import Shards
from safepatch.diffusion import Conditioning, Host, spared


class Texts:
    """What the host reads of each of some texts, on disk, each distinct text once.

    Args:
        host: who reads.
        texts: what.
        config: where it is kept.
        words: keep only the states by which gates go.
    """

    def __init__(self, host: Host, texts: Sequence[str], config: DataConfig, words: bool = False) -> None:
        self._numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        distinct, dtype = list(self._numbers), host.components.compute_dtype
        key = {"model": host.key, "texts": digest(distinct), "dtype": str(dtype), **spared(host.unet)}
        key["kept"] = "words" if words else "states, tokens"
        self._shards = Shards(config.folder / "texts" / digest(key)[:24], key, len(distinct))

        def make(rows: range) -> dict[str, Tensor]:
            read = host.encode([distinct[i] for i in rows])
            read = Conditioning(host.words(read)) if words else read
            return {name: part for name, part in read._asdict().items() if part is not None}

        self._shards.fill(make, "reading prompts")

    def of(self, numbers: Tensor) -> list[str]:
        """The texts of these numbers."""
        distinct = list(self._numbers)
        return [distinct[i] for i in numbers.tolist()]

    def numbers(self, texts: Sequence[str]) -> Tensor:
        """Under which number each text is kept, int64 (N,)."""
        return torch.tensor([self._numbers[text] for text in texts])

    def __getitem__(self, numbers: Sequence[int] | Tensor) -> Conditioning:
        """What the host reads of the texts of these numbers."""
        return Conditioning(**self._shards.rows(numbers))
