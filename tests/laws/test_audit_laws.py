"""Law 18: an audit says of every prompt what the runtime's gates decide, and what it calls untouched is the base's."""

import random

import pytest
import torch

from safepatch.errors import ConfigError, UnknownName
from safepatch.hosting.audit import ACTED, DEPENDS, MANY, UNTOUCHED, WHOLE, Auditor, overall
from safepatch.merging import MergeRecipe, merge
from safepatch.patch import PATCH_KINDS
from safepatch.runtime.apply import apply
from safepatch.tiny.text import words as vocabulary
from tests.families import draw, small_family_pipe
from tests.laws.test_window_laws import KNIFE, closing, drowned, listening
from tests.small import new_small_pipe, small_artifact
from tests.stress.soak import PROMPTS, gated_artifact

every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def some(n: int, seed: int = 0) -> list[str]:
    """Random words, of which about half hold the word that gates here listen for."""
    chance, harmless = random.Random(seed), [word for word in vocabulary() if word != KNIFE]
    plain = [" ".join(chance.choices(harmless, k=chance.randint(1, 9))) for _ in range(n // 2)]
    return [*plain, *drowned(n - n // 2, seed)]


def opened(pipe, artifact, text: str, **options) -> int:
    """How many gates open for a prompt in a denoising of one step."""
    with apply(pipe, artifact, **options) as handle:
        pipe(text, num_inference_steps=1, height=64, width=64, guidance_scale=4.0, output_type="latent")
    return handle.stats.open_rows


def acted(finding) -> int:
    return sum(each.verdict == ACTED for each in finding.values())


@every_kind
@pytest.mark.parametrize("reads", ["windows", "prompt"])
def test_an_audit_says_what_the_runtime_decides(small_pipe, kind, reads):
    artifact, texts = listening(small_pipe, kind), [KNIFE, *some(6)]
    found = Auditor(small_pipe, artifact, reads=reads)(texts)
    opens = [opened(small_pipe, artifact, text, reads=reads) for text in texts]
    assert [acted(each) for each in found] == opens
    assert len(set(opens)) == 2  # control: some open it, some do not


def test_an_audit_of_a_bundle_says_which_category(small_pipe, tmp_path):
    artifacts = [listening(small_pipe), listening(small_pipe, category="gore", word="blood")]
    files = [str(each.save(tmp_path / f"{i}.safetensors")) for i, each in enumerate(artifacts)]
    texts = [*some(4), "cat blood dog", "a knife and red blood"]
    for method in ("bundle", "task-arithmetic"):
        merged = merge(MergeRecipe(tuple(files), method=method))
        found = Auditor(small_pipe, merged)(texts)
        assert [acted(each) for each in found] == [opened(small_pipe, merged, text) for text in texts]
        assert [found[-2][name].verdict for name in ("gore", "weapons")] == [ACTED, UNTOUCHED]
        assert {overall(each) for each in found} == {ACTED, UNTOUCHED}  # control


@every_kind
def test_what_is_untouched_is_the_bases_bit_for_bit(small_pipe, kind):
    artifact, texts = listening(small_pipe, kind), some(10, seed=3)
    for text, finding in zip(texts, Auditor(small_pipe, artifact)(texts), strict=True):
        base = drawn(small_pipe, text)
        with apply(small_pipe, artifact):
            assert torch.equal(drawn(small_pipe, text), base) == (overall(finding) == UNTOUCHED)


def drawn(pipe, text: str):
    chance = torch.Generator().manual_seed(0)
    return pipe(text, num_inference_steps=1, generator=chance, height=64, width=64, output_type="latent").images


def test_neither_batches_nor_what_was_asked_before_matter(small_pipe, monkeypatch):
    artifact, texts = listening(small_pipe), some(40, seed=5)
    monkeypatch.setattr("safepatch.hosting.audit.WINDOWS", 16)
    monkeypatch.setattr("safepatch.hosting.audit.PROMPTS", 3)
    at_once, one_by_one = Auditor(small_pipe, artifact)(texts), Auditor(small_pipe, artifact)
    for text, finding in zip([*texts, *texts[:5]], [*at_once, *at_once[:5]], strict=True):
        (again,) = one_by_one([text])
        assert again["weapons"].verdict == finding["weapons"].verdict
        assert again["weapons"].words == finding["weapons"].words
        assert again["weapons"].probability == pytest.approx(finding["weapons"].probability, abs=1e-5)
    assert len(one_by_one._memo) == 3
    assert len(one_by_one._windows.memo) == 16


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_an_audit_reads_as_every_familys_pipeline_does(family):
    pipe = small_family_pipe(family)
    artifact, texts = listening(pipe), some(2, seed=2)
    for text, finding in zip(texts, Auditor(pipe, artifact)(texts), strict=True):
        with apply(pipe, artifact) as handle:
            draw(pipe, prompt=text)
        assert (handle.stats.open_rows > 0) == acted(finding)
        assert handle.stats.open_rows in (0, handle.stats.gated_rows)


def test_a_gate_that_looks_at_pictures_leaves_open_what_they_would_do(small_pipe):
    artifact = gated_artifact(small_pipe, "control")
    seen = []
    with apply(small_pipe, artifact, gate_threshold=1e-3) as handle:
        handle.on_gate = lambda _, probabilities: seen.append(float(probabilities))
        for text in PROMPTS:
            drawn(small_pipe, text)
    found = [each["weapons"] for each in Auditor(small_pipe, artifact)(PROMPTS)]
    assert DEPENDS in {each.verdict for each in found}
    assert UNTOUCHED not in {each.verdict for each in found}
    assert all(p > each.probability for p, each in zip(seen, found, strict=True))  # a picture can only add
    blind = [each["weapons"] for each in Auditor(small_pipe, listening(small_pipe, "control"))(PROMPTS)]
    assert {each.verdict for each in blind} == {ACTED, UNTOUCHED}  # control: a blinded one


def test_without_a_gate_all_depends(small_pipe):
    found = Auditor(small_pipe, small_artifact("lora"))(["a dog", "a knife"])
    assert [overall(each) for each in found] == [DEPENDS, DEPENDS]
    assert found[0]["weapons"].probability is None


def test_the_words_named_are_the_fewest_that_open_the_gate(small_pipe):
    artifact = listening(small_pipe)
    found = [each["weapons"] for each in Auditor(small_pipe, artifact)([*drowned(20), "a dog"])]
    assert [each.words for each in found] == [KNIFE] * 20 + [""]
    whole = Auditor(small_pipe, artifact, reads="prompt")(["knife"])[0]["weapons"]
    assert (whole.verdict, whole.words) == (ACTED, WHOLE)
    text = closing(small_pipe, artifact, drowned(60, seed=2))[0]
    assert Auditor(small_pipe, artifact, reads="prompt")([text])[0]["weapons"].verdict == UNTOUCHED  # control
    assert Auditor(small_pipe, artifact)([text])[0]["weapons"].verdict == ACTED


def test_a_threshold_of_ones_own_counts_as_the_runtimes_does(small_pipe):
    artifact, texts = listening(small_pipe), some(6)
    for threshold in (0.0, 0.3, 1.0):
        found = Auditor(small_pipe, artifact, gate_threshold=threshold)(texts)
        assert [acted(each) for each in found] == [
            opened(small_pipe, artifact, text, gate_threshold=threshold) for text in texts
        ]


def test_a_threshold_that_is_no_probability_is_refused(small_pipe):
    with pytest.raises(ConfigError, match=r"within \[0, 1\], not 2"):
        Auditor(small_pipe, listening(small_pipe), gate_threshold=2)


def test_a_prompt_of_more_words_than_are_read_opens_the_gate(small_pipe, monkeypatch):
    for module in ("safepatch.runtime.heard", "safepatch.hosting.audit"):
        monkeypatch.setattr(f"{module}.MOST", 5)
    with pytest.warns(UserWarning, match="windows, more than 5"):
        found = Auditor(small_pipe, listening(small_pipe))(["a red dog on a big table"])
    assert found[0]["weapons"].words == MANY


def test_a_way_of_reading_that_there_is_not_is_named():
    with pytest.raises(UnknownName, match="did you mean 'windows'"):
        Auditor(new_small_pipe(), small_artifact("lora"), reads="window")
