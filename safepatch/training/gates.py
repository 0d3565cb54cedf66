"""Fit the gate of a trained patch: which rows is it for, told from the prompt and from what the host makes of it.

The host is frozen, so what the gate reads is computed once; fitting it then takes seconds. Every gate sees captions of
the user's words, of what must stay, and of a shipped vocabulary of common things, so that it has met more English than
the category's own; a gate that reads text alone needs no pictures, so it sees thousands. It learns to tell a caption
from any few words of it in a row as well, so that no words around them can close it. The threshold is set on examples
of another seed, so that no harmless one of them opens the gate at any step.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.artifact.patch_artifact import cast as converted
from safepatch.data.bank import DataConfig, PairBank, Retained, Texts, build_bank, build_retained
from safepatch.data.corpus import Corpus, common_words
from safepatch.data.prompts import Pair, Prompt
from safepatch.diffusion import Components, UNetHost, batched, moved
from safepatch.errors import ConfigError
from safepatch.patch import Features
from safepatch.patch.bags import Bags
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.gate import WIDEST, WINDOWS, TextGate
from safepatch.patch.host import answered
from safepatch.progress import bar

ROWS, CAPTIONS = 4096, 12_288  # to learn from: of a gate that reads features, and of one that reads text alone
BYTES = 1 << 30  # that what a gate learns from may take: of larger models it sees fewer rows
STEPS, BATCH = 600, 128
# Pairs, captions of common things beside them, and captions of a gate that reads text alone (those that were learned
# from are left out).
VALIDATION_PAIRS, VALIDATION_COMMON, UNSEEN = 120, 240, 4000
VALIDATION_STEPS = (0.999, 0.799, 0.549, 0.299, 0.049)  # shares of the schedule
SEEN, PICTURE_STEPS = (
    0.6,
    (0.549, 0.299, 0.049),
)  # a picture can be seen
VALIDATION_SEED = 7919  # is added to the seed, far from what anybody chooses for another run
FEW = 20  # unseen unsafe captions; with fewer, those that were learned from set the threshold
# Where the threshold is put on the way from the most suspicious harmless logit to the median of the unsafe ones: the
# worst of thousands of captions needs less of a margin than the worst of a hundred pictures. A single odd word must
# not close the gate ("trombone", which a tokenizer splits off "bone"): of thousands of captions, one in a thousand may
# open it, and of the common things that are read on pictures, one in a hundred.
MARGIN, TEXT_MARGIN = 0.25, 0.1
ODD, ODD_COMMON = 0.001, 0.01
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1: at 1, to which a sure gate's logits round, files are refused


_LITTLE = {"a", "an", "the", "of", "in", "on", "at", "and", "with", "to", "by", "for", "next", "some"}


class Rows(NamedTuple):
    """What a gate reads, N rows.

    Attributes:
        mid: what the host's mid block makes of them, (N, C, h, w), float16; None of a gate that reads text alone.
        timesteps: (N,).
        texts, numbers: what the host reads of each prompt.
        bags: the windows of each prompt, by the same numbers; None of a gate that reads whole prompts only.
        wanted: whether each is one the patch is for, (N,) float.
        said: whether its words are, (N,) float; a picture may be one the patch is for under harmless words.
    """

    mid: Tensor | None
    timesteps: Tensor
    texts: Texts
    numbers: Tensor
    bags: Bags | None
    wanted: Tensor
    said: Tensor

    def logits(self, gate: TextGate, index: Tensor, heard: Tensor | None = None) -> Tensor:
        """What the gate makes of some of the rows, (B,): pictures, whole prompts and what was `heard` of windows."""
        mid = None if self.mid is None else self.mid[index].float()
        states = self.texts[self.numbers[index]].states.float()
        return gate(mid, self.timesteps[index], states, None if heard is None else heard[:, None])[:, 0]

    def heard(self, gate: TextGate, index: Tensor) -> Tensor | None:
        """What it makes of the strongest window of each, (B,)."""
        return None if self.bags is None else self.bags.read(gate, self.numbers[index])


class Scores(NamedTuple):
    """Logits of rows at one step.

    Attributes:
        unsafe, harmless: of the rows that the gate is for, and of all others.
        heard: of the unsafe rows' windows alone, whatever the whole prompt and the picture add; None without windows.
    """

    unsafe: Tensor
    harmless: Tensor
    heard: Tensor | None


def fit_gate(
    gate: TextGate,
    host: UNetHost,
    corpus: Corpus,
    data: DataConfig,
    bank: PairBank | None = None,
    width: int = WINDOWS,
) -> dict[str, Any]:
    """Train `gate` in place and return its record: threshold on the probability, and its ROC on unseen examples.

    Args:
        gate: of one group.
        host: the frozen model.
        corpus: of the category the patch is for.
        data: how pictures are drawn; its seed is that of everything random, validation has another.
        bank: the pairs that the patch was trained on, if they are at hand.
        width: words of the widest window that it reads alone; 0 for whole prompts only.
    """
    generator, device = torch.Generator().manual_seed(data.seed), gate.bias.device
    gate.cpu()  # as small as it is
    reader = Reader(host, data, width)
    if gate.reads_features:
        bank = bank or build_bank(host, corpus, data, retain=False)
        kept = bank.retained or build_retained(host, corpus, min(data.pairs, 384), data)
        _train(gate, _training_rows(reader, corpus, bank, kept), generator)
        unseen = replace(data, pairs=VALIDATION_PAIRS, seed=data.seed + VALIDATION_SEED)
        validation = build_bank(host, corpus, unseen, safe_share=0)
        common, reader = common_captions(corpus, VALIDATION_COMMON, unseen.seed), Reader(host, unseen, width)
        scores = [_scores(gate, _rows_at(reader, validation, common, share)) for share in VALIDATION_STEPS]
        worst = _worst(scores)
        must_stay, odd = worst.split([len(worst) - len(common), len(common)])
        record = _record(scores, MARGIN, torch.maximum(must_stay.max(), torch.quantile(odd, 1 - ODD_COMMON)))
        opened = torch.stack([_shown(gate, reader, validation, share) for share in PICTURE_STEPS]).amax(0)
        record["picture_recall"] = _share(opened, torch.tensor(record["threshold"]).logit())
    else:
        unsafe, harmless = captions(corpus, reader.affordable(CAPTIONS), data.seed)
        _train(gate, reader.text_rows(unsafe, harmless), generator)
        unseen = _unseen(corpus, unsafe, harmless, data.seed + VALIDATION_SEED)
        scores = [_scores(gate, reader.text_rows(*unseen))]
        worst = _worst(scores)
        record = _record(scores, TEXT_MARGIN, worst.max() if len(worst) * ODD < 1 else torch.quantile(worst, 1 - ODD))
    gate.to(device)
    return record | ({"windows": width} if width else {})


def captions(corpus: Corpus, n: int, seed: int) -> tuple[list[str], list[str]]:
    """About `n` captions: a quarter for the category; their safe twins, what must stay, and common things."""
    part = max(1, n // 4)
    unsafe = [pair.unsafe.text for pair in corpus.pairs(part, seed)]
    twins = [] if corpus.rewrite.by == "guided" else [pair.safe.text for pair in corpus.pairs(part, seed)]
    kept = [prompt.text for prompt in corpus.retain(part, seed)]
    known = set(unsafe)
    return unsafe, [text for text in (*twins, *kept, *common_captions(corpus, part, seed)) if text not in known]


def common_captions(corpus: Corpus, n: int, seed: int) -> list[str]:
    """At most `n` captions of the shipped common things, each as often; those with a telling word are left out."""
    common, rng = common_words(), Random(f"common {seed}")
    telling = telling_words(corpus, corpus.pairs(n, seed), corpus.retain(n, seed))
    order = rng.sample(range(len(common.benign)), len(common.benign))
    things = [i for i in order if not telling & {word for name in common.benign[i] for word in _split(name)}]
    shown = [common.harmless(common.benign, things[i % len(things)], rng, i % 2 == 1).text for i in range(n)]
    return [text for text in shown if not telling & {*_split(text)}]  # a companion may be telling too


def telling_words(corpus: Corpus, pairs: Sequence[Pair], kept: Sequence[Prompt]) -> set[str]:
    """Words that the unsafe prompts have and nothing harmless has: a common thing of that name is not harmless here."""
    named = [name for concept in corpus.words.concepts for name in (*concept.known_names, *concept.heldout)]
    unsafe = {word for text in (*named, *(pair.unsafe.text for pair in pairs)) for word in _split(text)}
    twins = [] if corpus.rewrite.by == "guided" else [pair.safe.text for pair in pairs]
    return unsafe - {word for text in (*twins, *(prompt.text for prompt in kept)) for word in _split(text)} - _LITTLE


def _split(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())


def _unseen(corpus: Corpus, unsafe: Sequence[str], harmless: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Captions of another seed that were not learned from; of few prompts, those that were."""
    learned, fresh = {*unsafe, *harmless}, captions(corpus, UNSEEN, seed)
    new = [[text for text in some if text not in learned] for some in fresh]
    return (new[0] if len(new[0]) >= FEW else fresh[0]), (new[1] if len(new[1]) >= FEW else fresh[1])


def _worst(scores: Sequence[Scores]) -> Tensor:
    """Of each harmless example the logit that counts: one step that opens the gate is enough to change the image."""
    return torch.stack([each.harmless for each in scores]).amax(0)


def _record(scores: Sequence[Scores], margin: float, level: Tensor) -> dict[str, Any]:
    """Threshold and ROC from the logits of unsafe and of harmless rows, at one or more steps.

    Args:
        scores: of unsafe and of harmless examples, at each step.
        margin: where the threshold lies between `level` and the median of the unsafe ones.
        level: up to which harmless examples go.
    """
    unsafe, worst, heard = torch.stack([each.unsafe for each in scores]), _worst(scores), scores[0].heard
    threshold = level + margin * (unsafe.median() - level).clamp(min=0)
    roc = [
        [round(float(t.sigmoid()), 6), round(float((worst >= t).float().mean()), 4), _share(unsafe, t)]
        for t in torch.quantile(torch.cat((unsafe.flatten(), worst)), torch.linspace(0, 1, 21))
    ]
    return {
        "threshold": min(float(threshold.sigmoid()), BELOW_ONE),
        "harmless_scenes_opened": round(float((worst >= threshold).float().mean()), 4),
        "unsafe_steps_opened": _share(unsafe, threshold),
        **(
            {} if heard is None else {"certified_recall": _share(heard, threshold)}
        ),  # no words around close it for them
        "roc": roc,  # threshold, share of harmless examples opened at some step, share of unsafe steps opened
    }


def add_gate(
    artifact: PatchArtifact,
    pipe: Any,
    corpus: Corpus,
    width: int = 32,
    data: DataConfig | None = None,
    windows: int = WINDOWS,
) -> PatchArtifact:
    """The same patch with a gate fitted on `pipe`, the model it was trained on; an older gate is replaced.

    Args:
        artifact: a patch for one category, of any kind.
        pipe: its base model's pipeline.
        corpus: of its category.
        width: channels of the gate.
        data: how pictures are drawn for it, by default as for the patch; of one that reads text alone, the seed counts.
        windows: words of the widest window that it reads alone; 0 for whole prompts only, which words can close.

    Raises:
        ConfigError: for a merged patch, another category's corpus, a width below 1 or windows that are too wide.
        BaseMismatch: when the patch is for another architecture.
    """
    if artifact.info.is_bundle or len(artifact.info.categories) != 1:
        raise ConfigError(f"'{artifact.info.title}' is for several categories; fit a gate to each patch, then merge")
    if artifact.info.categories != (corpus.name,):
        raise ConfigError(f"this patch is for {artifact.info.categories[0]}, the words are for {corpus.name}")
    if not 0 <= windows <= WIDEST:
        raise ConfigError(f"windows must be of 0 to {WIDEST} words, not {windows}")
    data = data or as_trained(artifact)
    host = UNetHost(Components.of(pipe), data.size)
    patch = from_artifact(artifact, host.unet)
    patch.add_gate(host.unet, width)
    gates = {corpus.name: fit_gate(cast(TextGate, patch.gate), host, corpus, data, width=windows)}
    made = to_artifact(patch, host.unet, artifact.info.instructions)
    info = replace(artifact.info, config={**artifact.info.config, "layout": patch.layout, "gate": gates})
    names = [name for name in made.tensors if name.startswith(f"{patch.kind}.gate.")]
    gate = {name: converted(name, made.tensors[name], artifact.dtype) for name in names}
    return PatchArtifact({**artifact.tensors, **gate}, info)


def as_trained(artifact: PatchArtifact, seed: int = 0) -> DataConfig:
    """How pictures were drawn for a patch, as far as its record says so: those that are still cached serve again."""
    recorded = artifact.info.config.get("data", {})
    numbers = {name: recorded.get(name) for name in ("pairs", "companions", "steps", "guidance", "size", "batch_size")}
    known = {name: value for name, value in numbers.items() if type(value) in (int, float)}
    return DataConfig(**{**known, "seed": seed})


def without_gate(artifact: PatchArtifact) -> PatchArtifact:
    """The same patch without its gate, if it has one: it acts on every row, and can be merged by cat.

    Raises:
        ConfigError: for a merged patch, whose recipe tells of its sources' gates.
    """
    if artifact.info.recipe:
        raise ConfigError(f"'{artifact.info.title}' is merged; take the gates off its sources and merge again")
    kept = {name: t for name, t in artifact.tensors.items() if not name.startswith(f"{artifact.info.kind}.gate.")}
    config = {key: value for key, value in artifact.info.config.items() if key not in ("gate", "layout")}
    layout = {key: value for key, value in artifact.info.config.get("layout", {}).items() if key != "gate"}
    return PatchArtifact(kept, replace(artifact.info, config={**config, **({"layout": layout} if layout else {})}))


def _share(scores: Tensor, threshold: Tensor) -> float:
    return round(float((scores >= threshold).float().mean()), 4)


def _affordable(rows: int, one: Tensor) -> int:
    """How many of `rows` fit into `BYTES`, each as large as `one`."""
    return max(64, min(rows, BYTES // (one.numel() * one.element_size())))


def _train(gate: TextGate, rows: Rows, generator: torch.Generator) -> None:
    """Every reading must tell: the whole prompt with its picture, and its strongest window alone."""
    gate.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in bar(range(STEPS), desc="fitting the gate", leave=False):
        pick = torch.randint(len(rows.wanted), (BATCH,), generator=generator)
        loss = binary_cross_entropy_with_logits(rows.logits(gate, pick), rows.wanted[pick])
        heard = rows.heard(gate, pick)
        if heard is not None:
            loss = loss + binary_cross_entropy_with_logits(heard, rows.said[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gate.eval().requires_grad_(False)


@torch.no_grad()
def _scores(gate: TextGate, rows: Rows) -> Scores:
    """Logits of the unsafe and of the harmless rows."""
    parts = [torch.arange(part.start, part.stop) for part in batched(len(rows.wanted), BATCH)]
    heard = [rows.heard(gate, part) for part in parts]
    logits = torch.cat([rows.logits(gate, part, alone) for part, alone in zip(parts, heard, strict=True)])
    is_unsafe = rows.wanted == 1
    alone = None if heard[0] is None else torch.cat(cast(list[Tensor], heard))[is_unsafe]
    return Scores(logits[is_unsafe], logits[~is_unsafe], alone)


class Reader:
    """What a gate reads of captions, and of pictures.

    Args:
        host: the frozen model.
        data: where what is read of captions is kept, and the seed of noise.
        width: words of the widest window; 0 for none.
    """

    def __init__(self, host: UNetHost, data: DataConfig, width: int) -> None:
        self.host, self.data, self.width = host, data, width
        self._bags: dict[tuple[str, ...], Bags] = {}

    def affordable(self, captions: int) -> int:
        """How many captions, whole, fit into what a gate may learn from."""
        return _affordable(captions, self.host.encode([""]).states)

    def text_rows(self, unsafe: Sequence[str], harmless: Sequence[str]) -> Rows:
        """Captions, as a gate that reads text alone sees them."""
        texts = [*unsafe, *harmless]
        wanted = (torch.arange(len(texts)) < len(unsafe)).float()
        return Rows(None, torch.zeros(len(texts)), *self._read(texts), wanted, wanted)

    @torch.no_grad()
    def feature_rows(
        self, latents: Tensor, timesteps: Tensor, texts: Sequence[str], wanted: Tensor, said: Tensor
    ) -> Rows:
        """What the host's mid block makes of noised latents, under each prompt."""
        generator, mids = torch.Generator().manual_seed(self.data.seed + int(timesteps[0])), list[Tensor]()
        kept, numbers, bags = self._read(texts)
        host = self.host
        with answered(host.unet, lambda features: mids.append(cast(Features, features).mid.half().cpu())):
            for part in bar([*batched(len(texts), self.data.batch_size)], desc="reading features", leave=False):
                rows = slice(part.start, part.stop)
                clean, times = moved(latents[rows], host.device), moved(timesteps[rows], host.device)
                noise = moved(torch.randn(clean.shape, generator=generator), host.device)
                host.predict(host.add_noise(clean, noise, times), times, kept[numbers[rows]].to(host.device))
        return Rows(torch.cat(mids), timesteps, kept, numbers, bags, wanted, said)

    def _read(self, texts: Sequence[str]) -> tuple[Texts, Tensor, Bags | None]:
        """What is read of texts, each text's number in it, and their windows."""
        kept, distinct = Texts(self.host, texts, self.data), tuple(dict.fromkeys(texts))
        if self.width and distinct not in self._bags:
            self._bags = {distinct: Bags(self.host, distinct, self.width)}
        return kept, kept.numbers(texts), self._bags.get(distinct)


def _training_rows(reader: Reader, corpus: Corpus, bank: PairBank, kept: Retained) -> Rows:
    """Unsafe prompts on unsafe or already corrected pictures, safe twins on safe ones, what must stay on its own.

    Common things are read on pictures of what must stay: theirs are not drawn. So that the picture tells where words do
    not, unsafe pictures are read under no words, and under those of what must stay, at times at which a picture can be
    seen; so are pictures of what must stay, and safe ones.
    """
    generator = torch.Generator().manual_seed(reader.data.seed)
    channels, height, width = _mid_shape(reader.host)
    part = _affordable(ROWS, torch.empty(channels, height, width, dtype=torch.float16)) // 6
    pairs, others = (torch.randint(len(some), (part,), generator=generator) for some in (bank, kept))
    common = common_captions(corpus, part, reader.data.seed)
    latents = [bank.latents[pairs], kept.latents[others], kept.latents[others.flip(0)[: len(common)]]]
    texts = [*bank.texts.of(bank.unsafe[pairs]), *kept.texts.of(kept.numbers[others]), *common]
    safe, unsafe = bank.is_safe.nonzero()[:, 0], (~bank.is_safe).nonzero()[:, 0]
    if len(safe) and corpus.rewrite.by != "guided":  # else the twin has no words of its own
        twins = safe[torch.randint(len(safe), (part,), generator=generator)]
        latents.append(bank.latents[twins])
        texts += bank.texts.of(bank.safe[twins])
    timesteps = [torch.randint(0, reader.host.steps, (len(texts),), generator=generator)]
    wanted, said = [(torch.arange(len(texts)) < part).float()], [(torch.arange(len(texts)) < part).float()]
    for some, is_unsafe in ((bank.latents, 1.0), (kept.latents, 0.0), (bank.latents, 0.0)):
        among = torch.arange(len(some)) if some is kept.latents else unsafe if is_unsafe else safe
        if len(among):
            shown = among[torch.randint(len(among), (part,), generator=generator)]
            asked = kept.numbers[torch.randint(len(kept), (part,), generator=generator)]
            latents.append(some[shown])
            texts += [text if i % 2 else "" for i, text in enumerate(kept.texts.of(asked))]
            timesteps.append(torch.randint(0, int(SEEN * reader.host.steps), (part,), generator=generator))
            wanted.append(torch.full((part,), is_unsafe))
            said.append(torch.zeros(part))
    return reader.feature_rows(torch.cat(latents), torch.cat(timesteps), texts, torch.cat(wanted), torch.cat(said))


def _rows_at(reader: Reader, bank: PairBank, common: Sequence[str], share: float) -> Rows:
    """All unsafe and all preserved rows, and common things on preserved pictures, at one share of the schedule."""
    kept = cast(Retained, bank.retained)
    texts = [*bank.texts.of(bank.unsafe), *kept.texts.of(kept.numbers), *common]
    shown = torch.arange(len(common)) % len(kept)
    latents = torch.cat(
        [bank.latents[torch.arange(len(bank))], kept.latents[torch.arange(len(kept))], kept.latents[shown]]
    )
    wanted = (torch.arange(len(texts)) < len(bank)).float()
    return reader.feature_rows(
        latents, torch.full((len(texts),), int(share * reader.host.steps)), texts, wanted, wanted
    )


def _shown(gate: TextGate, reader: Reader, bank: PairBank, share: float) -> Tensor:
    """What the gate makes of unsafe pictures under no words at all, at one share of the schedule: logits (N,)."""
    times, ones = torch.full((len(bank),), int(share * reader.host.steps)), torch.ones(len(bank))
    rows = reader.feature_rows(bank.latents[torch.arange(len(bank))], times, [""] * len(bank), ones, 0 * ones)
    return _scores(gate, rows).unsafe


def _mid_shape(host: UNetHost) -> tuple[int, int, int]:
    """Of the mid block's output for one row."""
    _, height, width = host.latent_shape
    widths = host.unet.config.block_out_channels
    shrink = 2 ** (len(widths) - 1)
    return (widths[-1], height // shrink, width // shrink)
