"""The embedded model's tokenizer and CLIP text encoder.

The text encoder is taught first, by itself, to say what scene a caption describes: left concept, right
concept, colour. That takes minutes, needs no images, and lets the UNet start from text states that mean something
(joint training from scratch spends most of its samples on this).
"""

import random
import re
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from safepatch.tiny.loop import Schedule, fit
from safepatch.tiny.scenes import Scene, caption, sample_scene
from safepatch.tiny.world import COLORS, CONCEPTS, HELDOUT, INSTRUCTIONS, KNOWN

MAX_TOKENS = 24
WIDTH = 192
BATCH = 96
SCHEDULE = Schedule(steps=500, learning_rate=1.5e-3, decay=0.99)
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Every word that captions and instructions use, sorted."""
    names = [name for concept in CONCEPTS.values() for name in concept.all_names]
    templates = [t.format(x="a", y="an", c="red") for t in (*KNOWN.one, *KNOWN.two, *HELDOUT.one, *HELDOUT.two)]
    return sorted(set(re.findall(r"[a-z]+", " ".join((*names, *INSTRUCTIONS, *COLORS, *templates)))))


def new_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format in which each word of the world is one token.

    The merges are written down rather than learned, word by word from the left, so that every build gives the same ids
    (the tokenizers library's trainer breaks ties by hash order).
    """
    letters = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in words():
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = next((pair for pair in merges if pair in pairwise(pieces)), (pieces[0], pieces[1]))
            merges[pair] = None
            pieces = _apply(pair, pieces)
    tokens = [START, END, *letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=MAX_TOKENS)


def _apply(pair: tuple[str, str], pieces: list[str]) -> list[str]:
    merged, rest = [], pieces
    while rest:
        taken = 2 if tuple(rest[:2]) == pair else 1
        merged.append("".join(rest[:taken]))
        rest = rest[taken:]
    return merged


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained three-layer CLIP text encoder, 192 wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


class Reader(nn.Module):
    """The text encoder with linear heads that read the scene off its last token and off the mean token."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        n = len(CONCEPTS) + 1  # the last class is "nothing"
        self.heads = nn.ModuleDict({key: nn.Linear(WIDTH, n) for key in ("left", "right", "mean_left", "mean_right")})
        self.color = nn.Linear(WIDTH, len(COLORS) + 1)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Logits of each head for token ids of shape (B, 24)."""
        states = self.text_encoder(input_ids).last_hidden_state
        last, mean = states[:, -1], states.mean(1)
        logits = {key: head(mean if key.startswith("mean") else last) for key, head in self.heads.items()}
        return {**logits, "color": self.color(last)}


def labelled(rng: random.Random, n: int) -> tuple[list[str], list[Scene | None]]:
    """`n` captions with their scenes; one in twelve is the empty prompt, which describes nothing."""
    names, captions, scenes = list(CONCEPTS), [], []
    for _ in range(n):
        scene = None if rng.random() < 1 / 12 else sample_scene(rng, rng.sample(names, rng.choice((1, 2))))
        captions.append(caption(scene, rng) if scene else "")
        scenes.append(scene)
    return captions, scenes


def targets(captions: list[str], scenes: list[Scene | None]) -> dict[str, Tensor]:
    """Class indices of shape (B,) for each head of `Reader`."""
    index = {name: i for i, name in enumerate(CONCEPTS)}
    colors = {name: i for i, name in enumerate(COLORS)}
    left = [index[s.concepts[0]] if s else len(index) for s in scenes]
    right = [index[s.concepts[1]] if s and len(s.concepts) == 2 else len(index) for s in scenes]
    color = [
        colors[s.color] if s and s.color in c.split() else len(colors) for s, c in zip(scenes, captions, strict=True)
    ]
    classes = {"left": left, "right": right, "mean_left": left, "mean_right": right, "color": color}
    return {key: torch.tensor(value) for key, value in classes.items()}


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids, padded or cut to 24, shape (B, 24)."""
    options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
    return tokenizer(prompts, return_tensors="pt", **options).input_ids


def train_text_encoder(checkpoint: Path) -> tuple[CLIPTokenizer, CLIPTextModel, float]:
    """Tokenizer, trained text encoder, and the share of unseen captions whose two concepts are read correctly."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer()

    def loss(reader: nn.Module, step: int) -> Tensor:
        captions, scenes = labelled(random.Random(step), BATCH)
        logits, truth = reader(tokenize(tokenizer, captions)), targets(captions, scenes)
        return torch.stack([cross_entropy(logits[key], truth[key]) for key in truth]).sum()

    reader = fit(Reader(new_text_encoder(tokenizer)), loss, SCHEDULE, checkpoint)
    captions, scenes = labelled(random.Random(10_000_019), 1000)
    with torch.no_grad():
        logits, truth = reader(tokenize(tokenizer, captions)), targets(captions, scenes)
    right = torch.stack([logits[key].argmax(-1) == truth[key] for key in ("left", "right")]).all(0)
    return tokenizer, reader.text_encoder, right.float().mean().item()
