"""Train a guard: texts from the categories' words, votes of weak labelers, and one small classifier of what they say.

Thresholds and calibration come of texts that are held out by group (`safepatch.guard.texts`): heads are fitted to one
half of the groups, and judged by the other. Figures come of other prompts still (`safepatch.guard.trial`).
"""

import zlib
from collections.abc import Sequence, Set
from dataclasses import asdict, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.columns import listed
from safepatch.data.corpus import Corpus
from safepatch.data.readers import read_prompts
from safepatch.diffusion import Components, UNetHost
from safepatch.errors import ConfigError, PromptError
from safepatch.guard.calibrate import calibrated, told_by
from safepatch.guard.config import GuardConfig
from safepatch.guard.encoders import ENCODERS, Encoder, Pieces
from safepatch.guard.file import PROBE, Guard, GuardInfo
from safepatch.guard.heads import Heads, fit
from safepatch.guard.labelers import Answers, Gates, Keywords, Labeler, Similarity, known_names
from safepatch.guard.measure import labels_of
from safepatch.guard.mend import Mender, words_in
from safepatch.guard.pictures import Pictures
from safepatch.guard.prompts import LEARN, Labelled, labelled
from safepatch.guard.texts import NO, UNSURE, YES, Text, learned
from safepatch.guard.trial import hand_trial, measured, trial
from safepatch.guard.vote import settle
from safepatch.progress import bar, note

FOLDS = 2
REPEATS = 4  # times that a hand-labelled text is learned: as it stands, and in a captions' wordings
PART = 256  # texts encoded between two steps of the progress bar


def train(corpora: Sequence[Corpus], config: GuardConfig, pipe: Any = None) -> Guard:
    """A guard for the corpora's categories, with its report.

    Args:
        corpora: one for each category, of different names.
        config: how.
        pipe: the model, where its encoder or a patch's gates are read, or a detector votes.

    Raises:
        ConfigError: for no category, one given twice, or one of which nothing is known.
        PromptError: for a file that cannot be used.
        SafepatchError: as the encoder's function in `ENCODERS`.
    """
    corpora = sorted(corpora, key=lambda corpus: corpus.name)
    names = tuple(corpus.name for corpus in corpora)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"a guard needs categories, each once; got {', '.join(names) or 'none'}")
    encoder = ENCODERS[config.encoder](pipe)
    by_hand = _said(config.labels, names) if config.labels else []
    texts = [*learned(corpora, config.captions, config.seed), *_unlabelled(config, names)]
    texts += _in_captions(by_hand, names, corpora[0], config.seed)
    wordings = [text.text for text in texts]
    known = sorted({name for corpus in corpora for name in known_names(corpus)})
    spared = _spared(texts, Mender(known, encoder.is_word))
    mend = Mender(known, encoder.is_word, spared)
    read = _encoded(encoder, [mend(text) for text in wordings])
    votes = {each.name: each(wordings) for each in _labelers(corpora, config, pipe, texts)}
    votes |= {"similarity": Similarity(encoder, corpora).votes(read.means)}
    votes |= {"hand": _hand(texts, by_hand, names)} if by_hand else {}
    labels, record = settle(votes, names)
    _require_both(labels, names)
    heads, thresholds = _distilled(read, labels, texts, {row.text for row in by_hand}, config)
    rewrites = {c.name: [asdict(concept) for concept in c.words.concepts] for c in corpora if c.words.concepts}
    training = {"config": asdict(config), "texts": len(texts), "labels": record, "corpora": [c.key for c in corpora]}
    info = GuardInfo(
        {corpus.name: corpus.category.definition for corpus in corpora},
        dict(zip(names, thresholds, strict=True)),
        config.encoder,
        rewrites,
        training,
        names=known,
        spared=spared,
    )
    guard = Guard(info, heads, encoder([PROBE]).means[0], encoder)
    return Guard(_with_report(info, guard, corpora, config), heads, guard.probe, encoder)


# ---- what is learned ---------------------------------------------------------------------------------------------


def _said(source: str, names: Sequence[str]) -> list[Labelled]:
    """A labelled file to learn from; one that files rows under other names alone would deny that any is for these."""
    rows = labelled(source, LEARN)
    filed = {name for row in rows for name in row.categories}
    if filed and filed.isdisjoint(names):
        raise PromptError(f"{source} has rows for {listed(sorted(filed))}, none for {', '.join(names)}; correct them")
    return rows


def _unlabelled(config: GuardConfig, names: Sequence[str]) -> list[Text]:
    lines = [line for path in config.unlabelled for line in read_prompts(path).lines]
    return [Text(line.text, line.text, (UNSURE,) * len(names)) for line in lines]


def _spared(texts: Sequence[Text], mend: Mender) -> list[str]:
    """Words of harmless texts, which have no slips, that would be mended."""
    harmless = " ".join(text.text for text in texts if NO in text.votes and YES not in text.votes)
    return sorted(word for word in words_in(harmless) if mend(word) != word)


def _in_captions(by_hand: Sequence[Labelled], names: Sequence[str], corpus: Corpus, seed: int) -> list[Text]:
    """Hand-labelled texts as they stand, and in the wordings of captions: with a style, a place, a companion."""
    rng, words, made = Random(f"by hand {seed}"), corpus.words, []
    for row in by_hand:
        votes = tuple(YES if name in row.categories else NO for name in names)
        style, place = (rng.choice(words.fills[name]) for name in ("style", "place"))
        beside = rng.choice(words.benign)[0]
        more = (f"{style} of {row.text}", f"{row.text} {place}", f"{row.text} and {beside}")[: REPEATS - 1]
        made += [Text(text, row.text, votes) for text in (row.text, *more)]
    return made


def _labelers(corpora: Sequence[Corpus], config: GuardConfig, pipe: Any, texts: Sequence[Text]) -> list[Labeler]:
    names = tuple(corpus.name for corpus in corpora)
    made: list[Labeler] = [Answers("corpus", {text.text: text.votes for text in texts}, len(names))]
    made.append(Keywords(corpora))
    if config.answers:
        said = _said(config.answers, names)
        rows = labels_of([row.categories for row in said], names).tolist()
        made.append(Answers("answers", {row.text: votes for row, votes in zip(said, rows, strict=True)}, len(names)))
    if config.patch:
        artifact = PatchArtifact.open(config.patch)
        if lacking := sorted(set(names) - set(artifact.info.categories)):
            note(f"note: the patch has no gate for {', '.join(lacking)}; other labelers decide there")
        made.append(Gates(UNetHost(Components.of(pipe)), artifact, names))
    if config.detector:
        made.append(Pictures.of(pipe, corpora, config.detector, config.pictures, config.steps, config.seed))
    return made


def _hand(texts: Sequence[Text], by_hand: Sequence[Labelled], names: Sequence[str]) -> Tensor:
    """What the hand said of texts, by what they are about, (N, C)."""
    said = {row.text: tuple(YES if name in row.categories else NO for name in names) for row in by_hand}
    none = (UNSURE,) * len(names)
    return torch.tensor([said.get(text.group, none) for text in texts], dtype=torch.int8)


def _require_both(labels: Tensor, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if not (labels[:, i] == YES).any() or not (labels[:, i] == NO).any():
            raise ConfigError(f"nothing that is labelled tells '{name}' from the rest; give more words, or labels")


def _encoded(encoder: Encoder, texts: Sequence[str]) -> Pieces:
    """Of each text its first piece."""
    starts = bar(range(0, len(texts), PART), desc="reading texts", leave=False)
    return Pieces.joined([encoder(texts[at : at + PART]).firsts for at in starts])


# ---- heads, calibration, thresholds ------------------------------------------------------------------------------


def _distilled(
    read: Pieces, labels: Tensor, texts: Sequence[Text], by_hand: Set[str], config: GuardConfig
) -> tuple[Heads, list[float]]:
    """Heads of all texts; calibrated, and with thresholds, by those of parts on the groups that they lacked."""
    fold = torch.tensor([zlib.crc32(text.group.encode()) % FOLDS for text in texts])
    unseen = torch.zeros(labels.shape)
    for i in range(FOLDS):
        learned, rest = (torch.nonzero(side).flatten() for side in (fold != i, fold == i))
        part = fit(read.some(learned), labels[learned], config.hidden, config.seed, f"part {i + 1} of {FOLDS}")
        unseen[rest] = part(read.some(rest))
    heads = fit(read, labels, config.hidden, config.seed)
    written = torch.tensor([text.text in by_hand for text in texts])
    columns = [
        calibrated(unseen[rows, i], labels[rows, i], config.precision, config.beta)
        for i in range(labels.shape[1])
        for rows in (told_by(labels[:, i], written),)
    ]
    scale, shift, thresholds = (list(each) for each in zip(*columns, strict=True))
    heads.calibrate(torch.tensor(scale), torch.tensor(shift))
    return heads, thresholds


def _with_report(info: GuardInfo, guard: Guard, corpora: Sequence[Corpus], config: GuardConfig) -> GuardInfo:
    report: dict[str, Any] = {"words": measured(guard, trial(corpora, config.seed))}
    if config.test:
        report["test"] = measured(guard, hand_trial(config.test, guard.categories, config.seed))
    return replace(info, report=report)
