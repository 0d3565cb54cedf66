"""Fit a gate's second key, which looks at what is drawn: is it a picture that the patch is for, whatever the words say?

What it learns from says that words mean nothing: unsafe pictures and harmless ones stand under the same captions. The
pictures are the model's own, or a corpus' files, noised to any timestep. The host is frozen, and only as much of it is
run as is looked at. The threshold is set on denoisings that nobody learned from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from safepatch.data.bank import DataConfig, Texts, build_retained
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import EMPTY
from safepatch.data.twin_pictures import build_twins
from safepatch.diffusion import Host
from safepatch.patch.looking import looked_at, middle
from safepatch.patch.picture import PictureKey, added_up
from safepatch.progress import bar, note

LOOKS = 6  # times that each picture is looked at, each time with other noise and other words
BYTES = 1 << 32  # that what is seen may take: of larger models a key learns from fewer looks, at any of the pictures
STEPS, BATCH = 800, 96
CLEANER = 1.3  # exponent of the uniform draw of timesteps: above 1, pictures with little noise are seen more often
SHARES = (0.8, 0.07, 0.07)  # of rows without words, with any harmless caption, with their own; the rest's are unsafe
VALIDATION_SEED, VALIDATION_PAIRS = 7919, 128  # as a text key's; pairs of pictures that set the threshold
STRENGTHS = (1.0, 0.5)  # shares of a denoising that those are drawn again for
VALIDATION_STEPS = 20
OPENED = 0.003  # of harmless denoisings, that may open it
BELOW_ONE = 1 - 2**-40  # the log odds of an evidence of 27


Traces = dict[float, Tensor]  # by the share of noise they begin with, the evidence of pictures by step, (N, steps)


class Pictures(NamedTuple):
    """Clean pictures, and captions that may stand above them.

    Attributes:
        latents: (N, 4, h, w).
        is_unsafe: bool (N,).
        own: number of each one's own caption, of an unsafe one its safe twin's, (N,).
        harmless, unsafe: numbers of the captions that may stand above any of them; the empty one first.
        texts: what the host reads of the captions.
    """

    latents: Tensor
    is_unsafe: Tensor
    own: Tensor
    harmless: Tensor
    unsafe: Tensor
    texts: Texts

    def captions(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """A caption for each of these pictures, (B,), by `SHARES`, which are alike for all."""
        n = len(index)
        harmless, unsafe = (
            some[torch.randint(len(some), (n,), generator=generator)] for some in (self.harmless, self.unsafe)
        )
        ways = torch.stack((self.harmless[:1].expand(n), harmless, self.own[index], unsafe))
        way = torch.bucketize(torch.rand(n, generator=generator), torch.tensor(SHARES).cumsum(0))
        return ways.gather(0, way[None])[0]


class Looked(NamedTuple):
    """What the host's middle made of N rows.

    Attributes:
        mid: (N, C, h, w), in half precision.
        timesteps: (N,).
        wanted: whether the picture is unsafe, (N,) float.
    """

    mid: Tensor
    timesteps: Tensor
    wanted: Tensor


def fit_picture_key(key: PictureKey, host: Host, corpus: Corpus, data: DataConfig) -> dict[str, Any]:
    """Train `key` in place; its record: the threshold on its evidence, and ROCs, of whole denoisings and by noise.

    Args:
        key: of one group.
        host: the frozen model.
        corpus: of the category the patch is for.
        data: pairs of pictures, how they are drawn, where they are kept, and the seed of everything random.
    """
    generator = torch.Generator().manual_seed(data.seed)
    key.to(host.device)
    _train(key, _looked(host, pictures(host, corpus, data), generator), generator)
    unseen = replace(data, pairs=min(data.pairs, VALIDATION_PAIRS), seed=data.seed + VALIDATION_SEED)
    return _record(*_traced(key, host, pictures(host, corpus, unseen), generator))


def pictures(host: Host, corpus: Corpus, data: DataConfig) -> Pictures:
    """Both members of each pair, as far as there are any, and what must stay; drawn once, and kept."""
    kept = build_retained(host, corpus, data.pairs, data)
    prompts = [prompt.text for prompt in corpus.retain(data.pairs, data.seed)]
    bank = build_twins(host, corpus, data)
    pairs = corpus.pairs(data.pairs, data.seed, data.companions)
    twins, unsafe = [pair.safe.text for pair in pairs], [pair.unsafe.text for pair in pairs]
    own, harmless = [*twins, *twins, *prompts], list(dict.fromkeys((EMPTY.text, *twins, *prompts)))
    texts = Texts(host, [*harmless, *unsafe], data)
    every = torch.arange(len(pairs))
    latents = torch.cat((bank.unsafe[every], bank.safe[every], kept.latents[torch.arange(len(kept))]))
    is_unsafe = torch.arange(len(latents)) < len(pairs)
    return Pictures(latents, is_unsafe, texts.numbers(own), texts.numbers(harmless), texts.numbers(unsafe), texts)


@contextmanager
def watched(host: Host, only: bool = False) -> Iterator[list[Tensor]]:
    """Within the block, what is looked at in each call is put into the list; `only` that is made."""
    seen: list[Tensor] = []
    given: dict[str, Any] = {}

    def ask(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given.update(host.kind.bind(args, kwargs))

    def note(_: nn.Module, args: tuple, output: Any) -> None:
        seen.append(looked_at(host.unet, output, given[host.kind.sample], given.get("img_ids")))
        if only:
            raise _Enough

    asked = host.unet.register_forward_pre_hook(ask, with_kwargs=True)
    hook = middle(host.unet).register_forward_hook(note)
    try:
        yield seen
    finally:
        asked.remove()
        hook.remove()


class _Enough(Exception):
    """The host has made what was asked for."""


@torch.no_grad()
def _looked(host: Host, pool: Pictures, generator: torch.Generator) -> Looked:
    """What the host makes of each picture `LOOKS` times, as far as `BYTES` go."""
    mids, times, wanted = [], [], []
    order = torch.cat([torch.randperm(len(pool.latents), generator=generator) for _ in range(LOOKS)])
    for index in bar(order.split(BATCH), desc="looking at pictures", leave=False):
        spread = torch.rand(len(index), generator=generator) ** CLEANER
        t = (spread * host.steps).long().to(host.device)
        clean = pool.latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        said = pool.texts[pool.captions(index, generator)].to(host.device)
        with watched(host, only=True) as seen:
            try:
                host.predict(host.add_noise(clean.to(host.device), noise.to(host.device), t), t, said)
            except _Enough:
                mids.append(seen[0].half().cpu())
        times.append(host.clock(t).cpu())
        wanted.append(pool.is_unsafe[index].float())
        if sum(mid.nbytes for mid in mids) >= BYTES:
            break
    if (seen := sum(map(len, mids))) < len(order):
        note(f"the picture key learns from {seen:,} of {len(order):,} looks, as many as fit into {BYTES >> 30} GiB")
    return Looked(torch.cat(mids), torch.cat(times), torch.cat(wanted))


def _train(key: PictureKey, rows: Looked, generator: torch.Generator) -> None:
    """As many unsafe rows as harmless ones in each batch, half of them mirrored."""
    mean, deviation = _moments(rows.mid)
    key.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(key.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sides, device = [(rows.wanted == side).nonzero()[:, 0] for side in (0, 1)], key.bias.device
    for step in bar(range(STEPS), desc="fitting the picture key", leave=False):
        picks = [side[torch.randint(len(side), (BATCH // 2,), generator=generator)] for side in sides]
        index = torch.cat(picks)
        mid = (rows.mid[index].float() - mean[:, None, None]) / deviation[:, None, None]
        mid = mid.flip(-1) if step % 2 else mid
        logits = key(mid.to(device), rows.timesteps[index].to(device))[:, 0]
        loss = binary_cross_entropy_with_logits(logits, rows.wanted[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    key.take_in(mean.to(device), deviation.to(device))
    key.eval().requires_grad_(False)


def _moments(mid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of (N, C, h, w), (C,) each; a part is widened at a time."""
    count = mid.numel() // mid.shape[1]
    mean = torch.stack([part.float().sum((0, 2, 3)) for part in mid.split(BATCH)]).sum(0) / count
    apart = [(part.float() - mean[:, None, None]).square().sum((0, 2, 3)) for part in mid.split(BATCH)]
    return mean, (torch.stack(apart).sum(0) / max(count - 1, 1)).sqrt().clamp(min=1e-3)


def _traced(key: PictureKey, host: Host, pool: Pictures, generator: torch.Generator) -> tuple[Traces, Traces]:
    """The evidence of harmless and of unsafe pictures that are drawn again.

    Harmless ones under their own words, from whatever noise; unsafe ones under none, from some of it: of noise alone,
    without words, nothing unsafe is drawn.
    """
    harmless, unsafe = ((pool.is_unsafe == side).nonzero()[:, 0] for side in (False, True))
    wordless = pool.harmless[:1].expand(len(pool.own))

    def drawn(index: Tensor, captions: Tensor, strength: float) -> Tensor:
        parts = bar(index.split(BATCH // 4), desc=f"drawing again from {strength:.0%} noise", leave=False)
        return torch.cat([_trace(key, host, pool, part, captions[part], strength, generator) for part in parts])

    return (
        {strength: drawn(harmless, pool.own, strength) for strength in STRENGTHS},
        {strength: drawn(unsafe, wordless, strength) for strength in STRENGTHS if strength < 1},
    )


@torch.no_grad()
def _trace(
    key: PictureKey,
    host: Host,
    pool: Pictures,
    index: Tensor,
    captions: Tensor,
    strength: float,
    generator: torch.Generator,
) -> Tensor:
    """The evidence of some pictures that are drawn again from a share of their noise on, (pictures, steps)."""
    since = VALIDATION_STEPS - round(strength * VALIDATION_STEPS)
    times, n = host.times(VALIDATION_STEPS)[since:], len(index)
    noise, clean = torch.randn(n, *host.latent_shape, generator=generator).to(host.device), pool.latents[index]
    first = torch.full((n,), times[0], device=host.device)
    latents = noise if strength == 1 else host.add_noise(clean.to(host.device), noise, first)
    asked, empty = pool.texts[captions].to(host.device), pool.texts[pool.harmless[:1]].expand(n).to(host.device)
    with watched(host) as seen:
        host.denoise(latents, asked, empty, VALIDATION_STEPS, since=since)
    evidence, traces = torch.zeros(n, 1, device=host.device), []
    for looks, (t, mid) in enumerate(zip(times, seen, strict=True), start=1):
        clock = host.clock(first.new_full((n,), t))
        evidence = added_up(evidence, key(mid[:n], clock), looks)  # guided, the rows without words
        traces.append(evidence[:, 0].cpu())
    return torch.stack(traces, dim=1)


def _record(harmless: Traces, unsafe: Traces) -> dict[str, Any]:
    """Threshold and ROCs from the evidence of whole denoisings: what opens a key is the highest of it."""
    shut = torch.cat([trace.amax(1) for trace in harmless.values()])
    opened = torch.cat([trace.amax(1) for trace in unsafe.values()])
    threshold = float(torch.quantile(shut, 1 - OPENED))
    levels = torch.quantile(shut, torch.tensor([0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1.0])).tolist()
    return {
        "threshold": min(_odds(threshold), BELOW_ONE),
        "harmless_opened": _share(shut, threshold),
        "unsafe_opened": _share(opened, threshold),
        "roc": [[round(_odds(level), 6), _share(shut, level), _share(opened, level)] for level in levels],
        "by_step": {
            f"{strength:g}": [_share(trace[:, : step + 1].amax(1), threshold) for step in range(trace.shape[1])]
            for strength, trace in unsafe.items()
        },
    }


def _odds(logit: float) -> float:
    return float(torch.tensor(logit, dtype=torch.float64).sigmoid())


def _share(evidence: Tensor, threshold: float) -> float:
    return round(float((evidence >= threshold).float().mean()), 4)
