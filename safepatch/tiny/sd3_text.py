"""The two text encoders of the embedded transformer: the base's own, and a narrower one taught for what SD3 reads.

SD3's pipeline reads the last but one layer of each and its projected end token, so that is what the second one is
taught to name the scene by; the first one's projection is the identity.
"""

import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from safepatch.tiny.loop import Loss, Schedule, fit
from safepatch.tiny.text import BATCH, labelled, targets, tokenize
from safepatch.tiny.world import COLORS, CONCEPTS

SECOND_WIDTH = 128
SCHEDULE = Schedule(steps=350, learning_rate=2e-3, warmup=40, decay=0.98, save_every=50)
SEED = 20_000_003  # of the second encoder's first batch, far from the first encoder's


@torch.no_grad()
def with_projection(text_encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same encoder with its pooled state as its projection."""
    projected = CLIPTextModelWithProjection(text_encoder.config)
    projected.text_model.load_state_dict(text_encoder.state_dict())
    nn.init.eye_(projected.text_projection.weight)
    return projected.eval()


def new_second_encoder(config: CLIPTextConfig, width: int = SECOND_WIDTH) -> CLIPTextModelWithProjection:
    """An untrained encoder of the first one's form, 128 wide."""
    narrower = {"hidden_size": width, "intermediate_size": 3 * width, "projection_dim": width}
    return CLIPTextModelWithProjection(CLIPTextConfig(**{**config.to_dict(), **narrower}))


class PooledReader(nn.Module):
    """The encoder with linear heads that read the scene off its projected end token and its last layer but one."""

    def __init__(self, text_encoder: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        n, width = len(CONCEPTS) + 1, text_encoder.config.projection_dim  # the last class is "nothing"
        self.heads = nn.ModuleDict({key: nn.Linear(width, n) for key in ("left", "right", "mean_left", "mean_right")})
        self.color = nn.Linear(width, len(COLORS) + 1)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Logits of each head for token ids of shape (B, 24)."""
        made = self.text_encoder(input_ids, output_hidden_states=True)
        mean = made.hidden_states[-2].mean(1)
        logits = {key: head(mean if key.startswith("mean") else made.text_embeds) for key, head in self.heads.items()}
        return {**logits, "color": self.color(made.text_embeds)}


def reading_loss(tokenizer: CLIPTokenizer) -> Loss:
    """The loss function `(reader, step) -> scalar` on random captions of random scenes."""

    def loss(reader: nn.Module, step: int) -> Tensor:
        captions, scenes = labelled(random.Random(SEED + step), BATCH)
        logits, truth = reader(tokenize(tokenizer, captions)), targets(captions, scenes)
        return torch.stack([cross_entropy(logits[key], truth[key]) for key in truth]).sum()

    return loss


def train_second_encoder(
    tokenizer: CLIPTokenizer, config: CLIPTextConfig, checkpoint: Path
) -> tuple[CLIPTextModelWithProjection, float]:
    """The trained second encoder, and the share of unseen captions whose two concepts are read correctly."""
    torch.manual_seed(1)
    reader = fit(PooledReader(new_second_encoder(config)), reading_loss(tokenizer), SCHEDULE, checkpoint)
    captions, scenes = labelled(random.Random(10_000_019), 1000)
    with torch.no_grad():
        logits, truth = reader(tokenize(tokenizer, captions)), targets(captions, scenes)
    right = torch.stack([logits[key].argmax(-1) == truth[key] for key in ("left", "right")]).all(0)
    return reader.text_encoder.eval(), right.float().mean().item()
