"""How far images of harmless prompts move with a patch: from the base's own, and from what they were asked to show.

Measures are as in `effects`.
"""

from dataclasses import replace

from torch.nn.functional import cosine_similarity

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import Round
from safepatch.data.corpus import Corpus, image_seed
from safepatch.evaluation.asked import prompts_of
from safepatch.evaluation.bench import Bench
from safepatch.evaluation.distances import Distance, fid, jackknifed, kid
from safepatch.evaluation.metrics import Estimate, benign_drift, mean, rate

FEWEST = 4  # images that a distance can be told of
APART = 9_011  # between the seed of what is measured and its reference's


def distance(bench: Bench, corpus: Corpus, patch: PatchArtifact | None, of: Distance = kid) -> Estimate | None:
    """How far images of benign prompts are from the base's own of other benign prompts and seeds.

    The base's images are the fixed reference, so its own figure is what chance makes of the distance. Of equal prompts
    the two sets would not be independent, and KID far below 0.
    """
    prompts = prompts_of(bench, corpus, "benign")
    if bench.detector is None or bench.detector.features is None or len(prompts) < FEWEST:
        return None
    seed = bench.protocol.seed + APART
    others = corpus.evaluation("benign", bench.protocol.n, seed)
    others = [replace(prompt, seed=image_seed(seed, i)) for i, prompt in enumerate(others)]  # files may name others
    bench.share([Round(tuple(others))], None, "benign, reference")
    reference = bench.detector.describe(bench.images(others, None, "benign, reference"))
    features = bench.detector.describe(bench.images(prompts, patch, "benign, patched" if patch else "benign"))
    return jackknifed(of, features, reference)


def frechet_distance(bench: Bench, corpus: Corpus, patch: PatchArtifact | None) -> Estimate | None:
    """The same by `fid`."""
    return distance(bench, corpus, patch, fid)


def clip_score(bench: Bench, corpus: Corpus, patch: PatchArtifact | None) -> Estimate | None:
    """Mean cosine, at least 0, of benign prompts and their images, by a detector that knows texts.

    Hessel et al., "CLIPScore", 2021, arXiv 2104.08718, without its factor of 2.5.
    """
    prompts = prompts_of(bench, corpus, "benign")
    if bench.detector is None or bench.detector.similarity is None or not prompts:
        return None
    images = bench.images(prompts, patch, "benign, patched" if patch else "benign")
    return mean(bench.detector.compare(images, [prompt.text for prompt in prompts]).clamp(min=0))


def perceptual_drift(
    bench: Bench, corpus: Corpus, patch: PatchArtifact | None, prompts: str = "benign"
) -> Estimate | None:
    """Mean distance, 1 - cosine, that the patch moves what a detector sees in images of a set of harmless prompts.

    As LPIPS (Zhang et al. 2018, arXiv 1801.03924) compares deep features, not pixels; here those of the last layer.
    """
    asked = prompts_of(bench, corpus, prompts) if patch else []
    if not asked or bench.detector is None or bench.detector.features is None:
        return None
    base, patched = (bench.detector.describe(bench.images(asked, each, prompts)) for each in (None, patch))
    return mean((1 - cosine_similarity(base, patched)).clamp(min=0))


def lookalike_perceptual_drift(bench: Bench, corpus: Corpus, patch: PatchArtifact | None) -> Estimate | None:
    """`perceptual_drift` of things that resemble the category."""
    return perceptual_drift(bench, corpus, patch, "lookalike")


def drift(bench: Bench, corpus: Corpus, patch: PatchArtifact | None, prompts: str = "benign") -> Estimate | None:
    """Mean absolute pixel change that the patch makes to images of a set of harmless prompts."""
    asked = prompts_of(bench, corpus, prompts) if patch else []
    if not asked:
        return None
    return benign_drift(bench.images(asked, None, prompts), bench.images(asked, patch, f"{prompts}, patched"))


def identical(bench: Bench, corpus: Corpus, patch: PatchArtifact | None, prompts: str = "benign") -> Estimate | None:
    """Share of images of a set of harmless prompts that the patch leaves as they were, bit for bit."""
    asked = prompts_of(bench, corpus, prompts) if patch else []
    if not asked:
        return None
    return rate((bench.bits(asked, None, prompts) == bench.bits(asked, patch, f"{prompts}, patched")).all(1))


def lookalike_drift(bench: Bench, corpus: Corpus, patch: PatchArtifact | None) -> Estimate | None:
    """`drift` of things that resemble the category."""
    return drift(bench, corpus, patch, "lookalike")


def lookalike_identical(bench: Bench, corpus: Corpus, patch: PatchArtifact | None) -> Estimate | None:
    """`identical` of things that resemble the category."""
    return identical(bench, corpus, patch, "lookalike")
