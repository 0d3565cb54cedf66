"""Every measure by its name, and rows of figures: what a patch stops, what it leaves alone, and what it costs."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import Round
from safepatch.data.corpus import Corpus
from safepatch.errors import lookup
from safepatch.evaluation.asked import hash_of, sets_of
from safepatch.evaluation.bench import Bench, patch_hash
from safepatch.evaluation.costs import extra_flops, megabytes
from safepatch.evaluation.drifts import (
    clip_score,
    distance,
    drift,
    frechet_distance,
    identical,
    lookalike_drift,
    lookalike_identical,
    lookalike_perceptual_drift,
    perceptual_drift,
)
from safepatch.evaluation.effects import (
    companion_kept,
    heldout_unsafe_rate,
    other_unsafe_rate,
    prompt_accuracy,
    safe_recognisable_rate,
    unsafe_change,
    unsafe_rate,
)
from safepatch.evaluation.metrics import Estimate
from safepatch.results import NONE, Row


class Measure(NamedTuple):
    """One entry of `MEASURES`.

    Attributes:
        run: measures it.
        metric: `metric` of its rows.
        prompt_set: `prompt_set` of its rows.
        judged: whether it takes a detector.
        usual: whether it is measured when none is named.
    """

    run: Callable[[Bench, Corpus, PatchArtifact | None], Estimate | None]
    metric: str
    prompt_set: str
    judged: bool = True
    usual: bool = True


MEASURES: dict[str, Measure] = {
    "unsafe_rate": Measure(unsafe_rate, "unsafe_rate", "plain"),
    "unsafe_rate_heldout": Measure(heldout_unsafe_rate, "unsafe_rate", "heldout"),
    "safe_recognisable_rate": Measure(safe_recognisable_rate, "safe_recognisable_rate", "plain"),
    "companion_kept": Measure(companion_kept, "companion_kept", "companion"),
    "prompt_accuracy": Measure(prompt_accuracy, "prompt_accuracy", "benign"),
    "other_unsafe_rate": Measure(other_unsafe_rate, "other_unsafe_rate", "other"),
    "benign_drift": Measure(drift, "benign_drift", "benign", judged=False),
    "benign_identical": Measure(identical, "benign_identical", "benign", judged=False),
    "lookalike_drift": Measure(lookalike_drift, "lookalike_drift", "lookalike", judged=False),
    "lookalike_identical": Measure(lookalike_identical, "lookalike_identical", "lookalike", judged=False),
    "extra_flops": Measure(extra_flops, "extra_flops", "", judged=False, usual=False),
    "megabytes": Measure(megabytes, "megabytes", "", judged=False, usual=False),
    "unsafe_change": Measure(unsafe_change, "unsafe_change", "plain", usual=False),
    "clip_score": Measure(clip_score, "clip_score", "benign", usual=False),
    "perceptual_drift": Measure(perceptual_drift, "perceptual_drift", "benign", usual=False),
    "lookalike_perceptual_drift": Measure(
        lookalike_perceptual_drift, "lookalike_perceptual_drift", "lookalike", usual=False
    ),
    "kid": Measure(distance, "kid", "benign", usual=False),
    "fid": Measure(frechet_distance, "fid", "benign", usual=False),
}
USUAL = tuple(name for name, measure in MEASURES.items() if measure.usual)


def evaluate(
    bench: Bench, corpus: Corpus, patch: PatchArtifact | None, name: str = NONE, measures: Iterable[str] = USUAL
) -> list[Row]:
    """The figures of one patch, called `name`, for one category; what cannot be measured is left out."""
    chosen = [lookup(MEASURES, measure, what="metric") for measure in measures]
    drawn = [measure for measure in chosen if patch or measure.judged]  # the others compare with the base
    for each in dict.fromkeys((None, patch)):
        bench.share(_asked(bench, corpus, each, drawn), each, corpus.name)
    return [row(bench, corpus, patch, name, m, found) for m in chosen if (found := m.run(bench, corpus, patch))]


def row(
    bench: Bench, corpus: Corpus, patch: PatchArtifact | None, name: str, measure: Measure, estimate: Estimate
) -> Row:
    """One measurement as a `Row`."""
    detector = bench.detector if measure.judged else None
    prompts = [prompt for some in sets_of(bench, corpus, patch, measure.prompt_set) for prompt in some]
    return Row(
        patch=name,
        base=bench.name,
        attack=NONE,
        category=corpus.name,
        metric=measure.metric,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        n=estimate.n,
        seed=bench.protocol.seed,
        detector=detector.name if detector else NONE,
        prompt_set=measure.prompt_set,
        kind=patch.info.kind if patch else "",
        patch_hash=patch_hash(patch) or "",
        steps=bench.steps(patch),
        guidance_scale=bench.guidance_of(prompts, patch),
        scheduler=type(getattr(bench.pipe, "scheduler", None)).__name__,
        threshold=detector.threshold if detector else 0.0,
        detector_version=detector.version if detector else "",
        detector_sha256=detector.sha256 if detector else "",
        prompts_sha256=hash_of(prompts),
        size=bench.size,
    )


def _asked(bench: Bench, corpus: Corpus, patch: PatchArtifact | None, measures: Iterable[Measure]) -> list[Round]:
    """What measures will ask for."""
    names = dict.fromkeys(measure.prompt_set for measure in measures)
    return [Round(tuple(some)) for name in names for some in sets_of(bench, corpus, patch, name) if some]
