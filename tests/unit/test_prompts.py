"""Prompt sets: what they ask for, what they never contain, and the filter nobody can turn off."""

import inspect
import re
from collections import Counter

import pytest
import torch

from safepatch.data import prompts
from safepatch.data.prompts import admit, benign_prompts, category, lookalike_prompts, mentions_minors, unsafe_prompts
from safepatch.diffusion import generate
from safepatch.errors import PromptError, UnknownName
from safepatch.evaluation.suite import Protocol
from safepatch.taxonomy import CATEGORIES
from safepatch.tiny.world import BENIGN, CONCEPTS, HELDOUT, KNOWN
from safepatch.training.config import TrainConfig, TrainingConfig

every_category = pytest.mark.parametrize("name", sorted(CATEGORIES))
HELDOUT_NAMES = {noun for concept in CONCEPTS.values() for noun in concept.heldout}
# What only the held-out templates say.
HELDOUT_WORDS = ("a drawing showing", "there is", "please draw", " scene with ", "i want to see", " beside ", " here")


def uses_heldout_wording(text: str) -> bool:
    """Whether a caption holds a noun or a phrase that patch training must never see."""
    spelled = f" {text} "
    nouns = any(re.search(rf"\b{re.escape(noun)}\b", text) for noun in HELDOUT_NAMES)
    return nouns or any(words in spelled for words in HELDOUT_WORDS)


# ---- what the sets ask for -------------------------------------------------------------------------------------


@every_category
@pytest.mark.parametrize("heldout", [False, True])
def test_unsafe_prompts_ask_for_each_concept_equally_often(name, heldout):
    concepts = {concept.name for concept in CATEGORIES[name].concepts}
    made = unsafe_prompts(CATEGORIES[name], 20, seed=3, heldout=heldout)
    asked = Counter(concept for prompt in made for concept in prompt.concepts if concept in concepts)
    assert asked == dict.fromkeys(concepts, 4)
    assert sum(len(prompt.concepts) == 2 for prompt in made) == 10  # half with a companion
    benign = {concept.name for concept in BENIGN}
    assert all(set(prompt.concepts) <= concepts | benign for prompt in made)


@pytest.mark.parametrize(("companion", "length"), [(True, 2), (False, 1)])
def test_a_companion_can_be_asked_for_or_left_out(companion, length):
    made = unsafe_prompts(CATEGORIES["gore"], 10, seed=0, companion=companion)
    assert {len(prompt.concepts) for prompt in made} == {length}


def test_concepts_are_named_left_to_right():
    for prompt in unsafe_prompts(CATEGORIES["weapons"], 40, seed=0, companion=True):
        left, right = (
            min(prompt.text.find(noun) for noun in CONCEPTS[name].known_names if noun in prompt.text)
            for name in prompt.concepts
        )
        assert 0 <= left < right, prompt


def test_benign_prompts_ask_for_nothing_unsafe():
    unsafe = {concept.name for other in CATEGORIES.values() for concept in other.concepts}
    made = benign_prompts(102, seed=0)
    assert not [prompt for prompt in made if set(prompt.concepts) & unsafe]
    assert {prompt.concepts[0] for prompt in made} | {prompt.concepts[-1] for prompt in made} == {
        concept.name for concept in BENIGN
    }
    assert set(unsafe_prompts(CATEGORIES["gore"], 5, seed=0)[0].concepts) & unsafe  # control


@every_category
def test_lookalike_prompts_ask_for_the_categorys_lookalikes(name):
    lookalikes = CATEGORIES[name].lookalikes
    made = lookalike_prompts(CATEGORIES[name], 2 * len(lookalikes), seed=0)
    assert Counter(prompt.concepts[0] for prompt in made) == dict.fromkeys(lookalikes, 2)


def test_equal_seeds_give_equal_sets_and_others_do_not():
    for make in (lambda seed: unsafe_prompts(CATEGORIES["drugs"], 12, seed), lambda seed: benign_prompts(12, seed)):
        assert make(1) == make(1)
        assert [prompt.text for prompt in make(1)] != [prompt.text for prompt in make(2)]  # control


def test_an_unknown_category_names_the_nearest():
    assert category("gore") is CATEGORIES["gore"]
    with pytest.raises(UnknownName, match="did you mean 'weapons'"):
        category("weapon")


# ---- held-out wording ------------------------------------------------------------------------------------------


@every_category
def test_heldout_prompts_use_heldout_templates_and_names_and_known_ones_never_do(name):
    known, heldout = (unsafe_prompts(CATEGORIES[name], 60, seed=5, heldout=flag) for flag in (False, True))
    assert not [prompt.text for prompt in known if uses_heldout_wording(prompt.text)]
    assert not [prompt.text for prompt in benign_prompts(60, seed=5) if uses_heldout_wording(prompt.text)]
    assert all(uses_heldout_wording(prompt.text) for prompt in heldout)  # control
    nouns = [noun for concept in CATEGORIES[name].concepts for noun in concept.heldout]
    assert all(any(noun in prompt.text for noun in nouns) for prompt in heldout)


def test_wordings_share_no_template_and_concepts_share_no_name():
    assert not {*KNOWN.one, *KNOWN.two} & {*HELDOUT.one, *HELDOUT.two}
    names = [noun for concept in CONCEPTS.values() for noun in concept.all_names]
    assert [noun for noun, count in Counter(names).items() if count > 1] == []


# ---- seeds -----------------------------------------------------------------------------------------------------


def test_image_seeds_are_unique_within_a_set_and_shared_by_base_and_patched():
    made = unsafe_prompts(CATEGORIES["gore"], 200, seed=1000)
    assert len({prompt.seed for prompt in made}) == 200
    assert made == unsafe_prompts(CATEGORIES["gore"], 200, seed=1000)


def test_evaluation_starts_from_noise_that_no_training_and_no_validation_drew():
    """For the default seeds, and far past the default number of steps."""
    options, protocol, validation = TrainingConfig(), Protocol(), 90
    training = {options.seed * 1_000_003 + draw for draw in range(100_000)}
    evaluation = {prompt.seed for prompt in benign_prompts(5000, protocol.seed)}
    previews = {prompt.seed for prompt in benign_prompts(5000, validation)}
    assert not evaluation & training
    assert not evaluation & previews
    assert not previews & training
    assert protocol.seed != TrainConfig(category="gore").data.seed


# ---- the filter ------------------------------------------------------------------------------------------------

MINORS = [
    "a child with a knife",
    "two Children",
    "KIDS playing",
    "a kid",
    "a minor",
    "an underage person",
    "an under-aged drinker",
    "an infant",
    "a baby",
    "babies",
    "a toddler",
    "a teen",
    "teenage drinkers",
    "a teenager",
    "preteens",
    "a pre-teen",
    "a boy",
    "girls",
    "a schoolboy",
    "two schoolgirls",
    "schoolchildren",
    "a juvenile",
    "an adolescent",
    "a loli",
    "a lolita",
    "shota",
    "newborn",
    "a 13-year-old",
    "a 9 year old with a beer",
    "17yo",
    "16 y/o",
    "a twelve year old",
    "seven-year-olds",
]
ADULTS = [
    "a knife next to a cat",
    "a woman of 30",
    "a 40-year-old",
    "an 18 year old",
    "a man drinking beer",
    "kidney beans",
    "a 21 years old whisky",
    "boycott",
    "a minority report",
    "lollipop",
    "childcare is not asked for",
    "a 117 year old tree",
    "canteen",
]


@pytest.mark.parametrize("text", MINORS)
def test_whoever_is_or_may_be_under_age_is_dropped(text):
    assert mentions_minors(text)
    assert admit([text, "a cat"]) == ["a cat"]


@pytest.mark.parametrize("text", ADULTS)
def test_the_filter_is_not_a_filter_of_everything(text):
    assert not mentions_minors(text)
    assert admit([text]) == [text]


def test_when_no_prompt_is_left_the_error_says_why():
    with pytest.raises(PromptError, match="minors are never used") as caught:
        admit(MINORS)
    assert "\n" not in str(caught.value)


def test_the_filter_cannot_be_turned_off(monkeypatch):
    """It has no switch: no parameter, and no environment variable is read."""
    assert list(inspect.signature(admit).parameters) == ["prompts"]
    assert list(inspect.signature(mentions_minors).parameters) == ["text"]
    assert "environ" not in inspect.getsource(prompts)
    for name in ("SAFEPATCH_NO_FILTER", "NSFW"):
        monkeypatch.setenv(name, "1")
    assert admit(["a child", "a cat"]) == ["a cat"]


@every_category
def test_every_set_passes_the_filter_whole(name):
    sets = [unsafe_prompts(CATEGORIES[name], 60, 1, heldout) for heldout in (False, True)]
    texts = [prompt.text for made in (*sets, benign_prompts(60, 1)) for prompt in made]
    assert admit(texts) == texts


def test_prompts_are_stripped_and_stay_in_order():
    assert admit([" b ", "a\n"]) == ["b", "a"]


@pytest.mark.parametrize("empty", ["", " ", "\n\t"])
def test_an_empty_prompt_is_an_error(empty):
    with pytest.raises(PromptError, match="a prompt is empty; say what to draw"):
        admit(["a cat", empty])
    with pytest.raises(PromptError, match="a prompt is empty; say what to draw"):
        generate(None, [empty], [0])


def test_no_prompts_and_too_few_seeds_are_errors():
    with pytest.raises(PromptError, match="no prompt is left"):
        admit([])
    with pytest.raises(PromptError, match="2 prompts but 1 seeds"):
        generate(None, ["a", "b"], [0])


def test_a_prompt_is_drawn_from_its_own_seed_whatever_stands_beside_it(small_pipe):
    made = benign_prompts(3, seed=0)
    texts, seeds = [prompt.text for prompt in made], [prompt.seed for prompt in made]
    together = generate(small_pipe, texts, seeds, steps=1)
    alone = generate(small_pipe, texts[1:2], seeds[1:2], steps=1)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2  # control
