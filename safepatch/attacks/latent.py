"""Initial noise from which the patched model sees the unsafe picture: the prompt is as typed, the seed is not.

As direct optimization of a diffusion model's noise (Wallace et al., "End-to-End Diffusion Latent Optimization Improves
Classifier Guidance", ICCV 2023, arXiv 2303.13703) and adversarial latents against unlearning (Recall, 2025, arXiv
2507.07139), by one step: what the patched model, guided, expects of the noise at the last timestep comes nearer to the
base's own picture of the prompt. After each step the noise is put back to the length that noise has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from safepatch.attacks.base import Opponent, Round
from safepatch.attacks.descent import backpropagate
from safepatch.attacks.opponent import Undoing, together
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import Way, moved
from safepatch.progress import bar

RATE = 0.05  # of Adam


def find(target: Opponent, corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """One image of each prompt from the noise that `budget` steps came to.

    Raises:
        ConfigError: as `Undoing.of`.
    """
    undoing = Undoing.of(target, corpus)
    found = [searched(undoing, some, budget) for some in together(prompts)]
    return [Round(tuple(prompts), Way(noise=torch.cat(found).cpu()))]


def searched(undoing: Undoing, prompts: Sequence[Prompt], steps: int) -> Tensor:
    """Noise (B, 4, h, w) of variance 1, from what the prompts' seeds give."""
    host, wanted = undoing.host, undoing.pictures(prompts)
    seeded = [torch.randn(host.latent_shape, generator=torch.Generator().manual_seed(p.seed or 0)) for p in prompts]
    noise = moved(torch.stack(seeded), host.device).requires_grad_(True)
    optimizer = torch.optim.Adam([noise], lr=RATE)
    for _ in bar(range(steps), desc="latent", unit="step", leave=False):
        loss = mse_loss(expected(undoing, noise, prompts), wanted)
        backpropagate(loss, optimizer)
        optimizer.step()
        with torch.no_grad():
            noise.div_(noise.square().mean((1, 2, 3), keepdim=True).sqrt())
    return noise.detach()


def expected(undoing: Undoing, noise: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The clean latents that the patched model, guided, expects of noise at the last timestep, (B, 4, h, w)."""
    host, n = undoing.host, len(noise)
    times = torch.full((n,), host.steps - 1, device=host.device)
    asked = host.encode([p.text for p in prompts]).to(host.device, torch.float32)
    empty = host.encode([""]).to(host.device, torch.float32).expand(n)
    towards, base = undoing.predict(noise, times, asked), host.predict(noise, times, empty)
    return host.to_x0(noise, times, base + host.guidance * (towards - base))
