"""How far a host's encoder is from the one a patch was trained on, told without that base.

A patch file keeps 64 signed sums of its base's encoder weights. Equal random signs make the distance of two such
sketches an unbiased estimate of the distance of the weights, good to about 9 % (the AMS sketch: Alon, Matias and
Szegedy 1996, "The Space Complexity of Approximating the Frequency Moments", section 2.2).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from safepatch.diffusion import host_kind
from safepatch.errors import ArtifactError
from safepatch.patch.clone import latent_part

ENCODER = "encoder_sketch"  # the key in a patch's `base`
SUMS = 64
RUN = SUMS << 10  # weights that are summed at once: what fits a core's cache


@torch.no_grad()
def sketch(unet: Any, read: Callable[[str], Tensor] | None = None) -> str:
    """64 signed sums of the weights of the UNet's encoder and mid block, as text; a UNet of another size has others.

    LoRAs do not count, nor what an inpainting host reads beside the latents.

    Args:
        unet: what denoises.
        read: gives a weight by its name, where `unet` itself has none.
    """
    kind, own = host_kind(unet), plain_parameters(unet)
    names = sorted(name for name in own if name.split(".")[0] in kind.encoder)
    found = ((name, read(name) if read else own[name]) for name in names)
    return _sums(latent_part(weights, unet) if name == kind.entry_weight else weights for name, weights in found)


@torch.no_grad()
def text_sketch(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """The same of a text encoder's blocks; of tokens it may have learned more since.

    Args:
        names: of its weights.
        read: gives a weight by its name.
    """
    plain = {name.removeprefix("text_model."): name for name in names}
    return _sums(read(plain[name]) for name in sorted(plain) if name.startswith("encoder."))


def _sums(parts: Iterable[Tensor]) -> str:
    """`SUMS` signed sums of all values, one tensor after the other."""
    sums = torch.zeros(SUMS, dtype=torch.float64)
    for weights, signs in _signed(parts):
        for run, positive in zip(weights.split(RUN), signs.split(RUN), strict=True):
            signed = torch.nn.functional.pad(positive.float().mul_(2).sub_(1).mul_(run.float()), (0, -len(run) % SUMS))
            sums += signed.double().view(-1, SUMS).sum(0)
    return " ".join(f"{value:.6g}" for value in sums.tolist())


def _signed(parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Every tensor, flat, and which of its values count as they are; drawn while the one before is summed."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.bool).random_(generator=generator)

    with ThreadPoolExecutor(1) as beside:
        waiting: list[tuple[Tensor, Future[Tensor]]] = []
        for part in parts:
            weights = part.detach().cpu().flatten()
            waiting.append((weights, beside.submit(drawn, len(weights))))
            if len(waiting) > 1:
                weights, signs = waiting.pop(0)
                yield weights, signs.result()
        for weights, signs in waiting:
            yield weights, signs.result()


def drift(ours: str, theirs: str) -> float:
    """|host - base| / |base| of the encoder weights behind two sketches; 0 for equal weights.

    Raises:
        ArtifactError: when they are not of one length: the patch was made by a program that sums otherwise.
    """
    host, base = ([float(value) for value in text.split()] for text in (ours, theirs))
    if len(base) != len(host):
        raise ArtifactError(f"the patch keeps {len(base)} sums of its base's encoder, not {len(host)}; train it again")
    return math.dist(host, base) / math.hypot(*base)


def plain_parameters(unet: Any) -> dict[str, Tensor]:
    """By name, without LoRAs."""
    named = {name.replace(".base_layer.", "."): weights for name, weights in unet.named_parameters()}
    return {name: weights for name, weights in named.items() if ".lora_" not in name}
