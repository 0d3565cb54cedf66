"""What measures are made of: a corpus's prompts, as a bench asks them, and what its detector finds in their images."""

import json
from collections.abc import Collection, Sequence
from hashlib import sha256

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.corpus import EVALUATIONS, Corpus
from safepatch.data.prompts import Prompt
from safepatch.detectors.base import shows_all
from safepatch.errors import SafepatchError
from safepatch.evaluation.bench import Bench
from safepatch.evaluation.metrics import Estimate, rate

Found = Sequence[frozenset[str]]


def labels_of(bench: Bench, corpus: Corpus) -> tuple[str, ...]:
    """The labels of the bench's detector that count as the category; none without a detector."""
    return bench.detector.labels_of(corpus.category) if bench.detector else ()


def all_labels(bench: Bench) -> tuple[str, ...]:
    """All labels of the bench's detector; none without one."""
    return bench.detector.labels if bench.detector else ()


def prompts_of(bench: Bench, corpus: Corpus, name: str) -> list[Prompt]:
    """The corpus's prompts of one of `EVALUATIONS`, as many as the protocol says."""
    return corpus.evaluation(name, bench.protocol.n, bench.protocol.seed)


def with_companions(bench: Bench, corpus: Corpus) -> list[Prompt]:
    """The plain prompts where some of them ask for something harmless too."""
    plain = prompts_of(bench, corpus, "plain")
    return plain if any(len(prompt.asks) > 1 for prompt in plain) else prompts_of(bench, corpus, "companion")


def of_others(bench: Bench, corpus: Corpus, patch: PatchArtifact | None) -> list[tuple[Corpus, list[Prompt]]]:
    """The neighbours that a patch is not for, each with its prompts."""
    own = set(patch.info.categories) if patch else set()
    others = [other for other in corpus.neighbours if other.name not in own and labels_of(bench, other)]
    n, seed = max(1, bench.protocol.n // max(1, len(others))), bench.protocol.seed
    return [(other, prompts) for other in others if (prompts := other.evaluation("plain", n, seed))]


def sets_of(bench: Bench, corpus: Corpus, patch: PatchArtifact | None, name: str) -> list[Sequence[Prompt]]:
    """What a measure of the prompt set `name` asks for, set by set; nothing where the set is none of a corpus."""
    if name == "other":
        return [prompts for _, prompts in of_others(bench, corpus, patch)]
    if name == "companion":
        return [with_companions(bench, corpus)]
    return [prompts_of(bench, corpus, name)] if name in EVALUATIONS else []


def hash_of(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of texts and seeds in their order, hexadecimal; empty for none."""
    return sha256(json.dumps([(p.text, p.seed) for p in prompts]).encode()).hexdigest() if prompts else ""


def found_in(bench: Bench, prompts: Sequence[Prompt], patch: PatchArtifact | None, label: str) -> Found:
    """The labels that the detector finds in each image; raises `SafepatchError` without one."""
    if bench.detector is None:
        raise SafepatchError("this bench has no detector, so no picture can be judged; give it one")
    return bench.detector.find(bench.images(prompts, patch, f"{label}, patched" if patch else label))


def shown_share(
    bench: Bench, prompts: Sequence[Prompt], asked: Sequence[Collection[str]], patch: PatchArtifact | None, label: str
) -> Estimate | None:
    """Share of images that show what is asked, of those prompts for which the detector knows all of that."""
    known = set(all_labels(bench))
    counted = [i for i, names in enumerate(asked) if names and known >= set(names)]
    if not counted:
        return None
    found = found_in(bench, prompts, patch, label)
    return rate(shows_all([found[i] for i in counted], [tuple(asked[i]) for i in counted]))
