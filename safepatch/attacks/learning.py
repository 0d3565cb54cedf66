"""What whoever holds a model's weights makes it learn of some pictures: a new word, a LoRA, or all of its weights.

A word: textual inversion (Gal et al. 2022, arXiv 2208.01618); a LoRA of a subject: DreamBooth (Ruiz et al. 2023, arXiv
2208.12242) with low-rank updates (Hu et al. 2022, arXiv 2106.09685), without prior preservation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks.descent import backpropagate
from safepatch.diffusion import Conditioning, TokenReader, UNetHost, moved, training_target
from safepatch.patch import LoraPatch
from safepatch.patch.files import to_artifact
from safepatch.patch.host import patched_prediction
from safepatch.progress import bar

FRONT = "a picture of"  # stands before the new word
RATE, TOGETHER = 1e-4, 4  # of a word: of Adam, and pictures in a step

WordLoss = Callable[[Tensor, Conditioning, torch.Generator], Tensor]  # clean latents, states of the word -> a loss
Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]


class Pictures(Protocol):
    """Clean latents by number, (B, 4, h, w)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Pace:
    """How far weights are trained: steps of AdamW at a rate, pictures in a step, and the seed of all that is drawn."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0


def lora(host: UNetHost, texts: Sequence[str], latents: Pictures, pace: Pace, rank: int) -> PatchArtifact:
    """A LoRA with which the host draws pictures of these latents for their prompts; the host stays as it is.

    Args:
        host: whose.
        texts: prompts.
        latents: clean ones, as many.
        pace: how far.
        rank: of the updates.
    """
    patch = LoraPatch.from_unet(host.unet, rank=rank).to(host.device).requires_grad_(True)
    nothing = host.encode([""]).states[:1]

    def predict(noisy: Tensor, times: Tensor, read: Conditioning) -> Tensor:
        return patched_prediction(host, patch, noisy, times, read, nothing)

    with patch.learning(host.unet):
        _fit(host, list(patch.parameters()), predict, texts, latents, pace)
    return to_artifact(patch.requires_grad_(False), host.unet, {"further": ""})


def all_weights(host: UNetHost, texts: Sequence[str], latents: Pictures, pace: Pace) -> None:
    """The same by all of the UNet's weights, in place; they end frozen. Arguments as of `lora`.

    Meanwhile they are float32, whatever they were and will be: in half precision most steps are too small to be taken.
    """
    unet, dtype = host.unet, host.unet.dtype
    unet.float().requires_grad_(True)
    _fit(host, list(unet.parameters()), host.predict, texts, latents, pace)
    unet.requires_grad_(False).type(dtype)


def _fit(
    host: UNetHost,
    weights: Iterable[nn.Parameter],
    predict: Predict,
    texts: Sequence[str],
    latents: Pictures,
    pace: Pace,
) -> None:
    """Regress `predict` on what stands for the latents, at random times and noise."""
    weights = list(weights)
    optimizer = torch.optim.AdamW(weights, lr=pace.learning_rate)
    generator = torch.Generator().manual_seed(pace.seed)
    for _ in bar(range(pace.steps), desc="training further", unit="step", leave=False):
        picks = torch.randint(len(latents), (pace.batch_size,), generator=generator)
        clean = latents[picks].to(host.device)
        noise = torch.randn(clean.shape, generator=generator).to(host.device)
        times = torch.randint(host.steps, (len(clean),), generator=generator).to(host.device)
        noisy, read = host.add_noise(clean, noise, times), host.encode([texts[i] for i in map(int, picks)])
        loss = mse_loss(predict(noisy, times, read), host.from_x0(noisy, times, clean))
        backpropagate(loss, optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


def word(
    reader: TokenReader, device: torch.device, loss: WordLoss, latents: Tensor, steps: int, seed: int, start: str
) -> Tensor:
    """The embedding of a new word, (1, 1, width).

    Args:
        reader: of the text encoder it is for.
        device: where the model is.
        loss: of pictures and what the word says; see `drawn_by`.
        latents: of the pictures, (N, 4, h, w).
        steps: of Adam.
        seed: of everything drawn.
        start: a word, whose first token's embedding it starts from: textual inversion's coarse class.
    """
    generator = torch.Generator().manual_seed(seed)
    made = reader.table[reader.ids([start])[0, 1]].clone().view(1, 1, -1).requires_grad_(True)
    optimizer = torch.optim.Adam([made], lr=RATE)
    for _ in bar(range(steps), desc="learning a word", unit="step", leave=False):
        picked = torch.randint(len(latents), (min(TOGETHER, len(latents)),), generator=generator)
        asked = Conditioning(spoken(reader, made, len(picked)))
        backpropagate(loss(moved(latents[picked], device), asked, generator), optimizer)
        optimizer.step()
    return made.detach()


def drawn_by(host: UNetHost) -> WordLoss:
    """How badly a host, as it is, predicts pictures by the word."""

    def loss(latents: Tensor, asked: Conditioning, generator: torch.Generator) -> Tensor:
        times = moved(torch.randint(host.steps, (len(latents),), generator=generator), host.device)
        noise = moved(torch.randn(latents.shape, generator=generator), host.device)
        target = training_target(host.components.scheduler, latents, noise, times)
        return mse_loss(host.predict(host.add_noise(latents, noise, times), times, asked), target)

    return loss


def spoken(reader: TokenReader, made: Tensor, n: int) -> Tensor:
    """States of the new word behind `FRONT`, n times, (n, length, width); differentiable by the word."""
    front, empty = reader.ids([FRONT, ""])
    place = int((front == empty[1]).nonzero()[0])  # where the end stands; what fills up may be another token
    rows = torch.cat((front[:place], front[1:2], front[place:-1]))  # any token keeps the new word's place
    return reader.states(rows.repeat(n, 1), made.expand(n, -1, -1), at=place)
