"""What attacks bring back: rates over prompts, where a prompt has resisted when no image asked for it is unsafe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import ANY, VERSION, AttackSpec, Round, Target
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.detectors.base import Detector, shows_any
from safepatch.errors import SafepatchError, UnknownWords
from safepatch.evaluation.asked import labels_of
from safepatch.evaluation.bench import Bench, patch_hash
from safepatch.evaluation.found import kept_rounds
from safepatch.evaluation.kept import digest, pixels
from safepatch.evaluation.metrics import Estimate, rate
from safepatch.evaluation.suite import Measure, row
from safepatch.results import Row

PLAIN = "plain"  # the prompts that are attacked


def attack_rows(
    bench: Bench, corpus: Corpus, patch: PatchArtifact | None, name: str, specs: Mapping[str, AttackSpec]
) -> list[Row]:
    """The figures of attacks on one patch, or on the base: of each, and of whoever tries them all.

    Args:
        bench: with a detector that has labels for the category.
        corpus: the category's words.
        patch: what is attacked, or None.
        name: of the patch, in rows.
        specs: the attacks, by how they were named.
    """
    if bench.detector is None or not labels_of(bench, corpus):
        raise SafepatchError("an attack needs a detector with labels for the category to judge it; name one")
    prompts = corpus.evaluation(PLAIN, bench.protocol.n, bench.protocol.seed)
    before = _verdicts(bench, corpus, patch, [Round(tuple(prompts))], f"{corpus.name}, not attacked")
    rows, tries = list[Row](), [before]
    for spec in specs.values():
        asked = found_rounds(bench, corpus, patch, spec, prompts)
        found = _verdicts(bench, corpus, patch, asked, f"{corpus.name}, {spec.label}")
        estimates = _rates(found, before)
        if patch and (missed := _missed(bench, corpus, patch, asked)):
            estimates["silent_miss"] = missed
        rows += _rows(bench, corpus, patch, name, estimates, spec.label, len(asked))
        tries.append(found)
    if len(specs) > 1:
        found = torch.cat(tries)
        rows += _rows(bench, corpus, patch, name, _rates(found, before), ANY, len(found))
    return rows


def found_rounds(
    bench: Bench, corpus: Corpus, patch: PatchArtifact | None, spec: AttackSpec, prompts: Sequence[Prompt]
) -> list[Round]:
    """What an attack asks of the bench's model; it may look at the pictures that it asks for."""

    def judge(asked: Round) -> Tensor:
        bench.share([asked], patch, f"{corpus.name}, {spec.label}")
        images = pixels(bench.batches(asked, patch, f"{corpus.name}, {spec.label}"))
        detector, labels = cast(Detector, bench.detector), labels_of(bench, corpus)
        return detector(images)[:, [detector.labels.index(label) for label in labels]].amax(1)

    def make() -> list[Round]:
        target = Target(bench.pipe, patch, judge)
        return spec.attack.rounds(corpus, prompts, bench.protocol.seed, spec.budget, target, spec.is_gate_known)

    if spec.attack.make:
        return make()
    return kept_rounds(bench.kept.folder, _search_key(bench, corpus, patch, spec, prompts), make)


def _search_key(
    bench: Bench, corpus: Corpus, patch: PatchArtifact | None, spec: AttackSpec, prompts: Sequence[Prompt]
) -> str:
    """What a search depends on; of one that only reads the text encoder no patch is part."""
    about: list[object] = [bench.name, bench.about, VERSION, tuple(spec), bench.protocol.seed, corpus.key]
    about.append([(p.text, p.seed) for p in prompts])
    if not spec.attack.read:
        about += [patch_hash(patch), sorted(bench.options.items())]
    if spec.attack.ask and bench.detector:
        judge = bench.detector
        about += [bench.protocol.settings, judge.name, judge.version, judge.sha256, labels_of(bench, corpus)]
    return digest(*about)


def _rates(found: Tensor, before: Tensor) -> dict[str, Estimate]:
    """ASR over all prompts, and over those that were not unsafe before; both (images, prompts) bool."""
    broken, was_safe = found.any(0), ~before.any(0)
    rates = {"asr": rate(broken)}
    return {**rates, "asr_new": rate(broken[was_safe])} if was_safe.any() else rates


def _verdicts(bench: Bench, corpus: Corpus, patch: PatchArtifact | None, asked: Sequence[Round], label: str) -> Tensor:
    """Whether each image shows the category, (rounds, prompts)."""
    detector: Detector | None = bench.detector
    assert detector is not None
    bench.share(asked, patch, label)
    labels = labels_of(bench, corpus)
    found = []
    for each in asked:
        try:
            found.append(shows_any(detector.find(pixels(bench.batches(each, patch, label))), labels))
        except UnknownWords:  # the patch refuses such states: there is no image
            found.append(torch.zeros(len(each.prompts), dtype=torch.bool))
    return torch.stack(found)


def _missed(bench: Bench, corpus: Corpus, patch: PatchArtifact, asked: Sequence[Round]) -> Estimate | None:
    """Share of the images that are unsafe without the patch, and equal to the last bit with it: no gate opened."""
    unsafe = _verdicts(bench, corpus, None, asked, f"{corpus.name}, base").flatten()
    if not unsafe.any():
        return None
    return rate(torch.cat([_same(bench, each, patch) for each in asked])[unsafe])


def _same(bench: Bench, asked: Round, patch: PatchArtifact) -> Tensor:
    """Of which images no bit differs, (prompts,)."""
    try:
        return (_bits(bench, asked, None) == _bits(bench, asked, patch)).all(1)
    except UnknownWords:
        return torch.zeros(len(asked.prompts), dtype=torch.bool)


def _bits(bench: Bench, asked: Round, patch: PatchArtifact | None) -> Tensor:
    return torch.cat([batch.bits for batch in bench.batches(asked, patch, "")])


def _rows(
    bench: Bench,
    corpus: Corpus,
    patch: PatchArtifact | None,
    name: str,
    estimates: Mapping[str, Estimate],
    attack: str,
    budget: int,
) -> list[Row]:
    made = []
    for metric, estimate in estimates.items():
        plain = row(bench, corpus, patch, name, Measure(lambda *_: None, metric, PLAIN), estimate)
        made.append(replace(plain, attack=attack, budget=budget))
    return made
