"""A prompt as a value: what it never contains, wherever its text comes from, and the filter nobody can turn off."""

import inspect

import pytest
import torch

from safepatch.data import prompts
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import EMPTY, Prompt, admit, mentions_minors
from safepatch.data.readers import read_prompts
from safepatch.diffusion import generate
from safepatch.errors import PromptError
from safepatch.taxonomy import Category

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
    "little_girl",
    "1girl, beach",
    "a b\u200boy",
    "a \uff47\uff49\uff52\uff4c",
    "a 7_year_old",
    "a woman, aged 12",
    "age: 9",
    "twelve years of age",
    "15 y.o.",
    "under age",
    "lolicon",
    "middle schoolers",
    "in a kindergarten",
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
    "a twenty-one year old woman",
    "a thirty-five-year-old",
    "a woman, aged 34",
    "villagers aged 120",
    "an old_school",
    "v10 yolk",
]


@pytest.mark.parametrize("text", MINORS)
def test_whoever_is_or_may_be_under_age_is_dropped(text):
    assert mentions_minors(text)
    assert admit([text, "a cat"]) == ["a cat"]
    with pytest.raises(PromptError, match="minors are never used") as caught:
        Prompt(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ADULTS)
def test_the_filter_is_not_a_filter_of_everything(text):
    assert not mentions_minors(text)
    assert admit([text]) == [text]
    assert Prompt(text).text == text


def test_when_no_prompt_is_left_the_error_says_why():
    with pytest.raises(PromptError, match="minors are never used") as caught:
        admit(MINORS)
    assert "\n" not in str(caught.value)


def test_the_filter_cannot_be_turned_off(monkeypatch):
    """It has no switch: no parameter, and no environment variable is read."""
    assert list(inspect.signature(admit).parameters) == ["prompts"]
    assert list(inspect.signature(mentions_minors).parameters) == ["text"]
    assert list(inspect.signature(Prompt).parameters) == ["text", "seed", "guidance", "image", "asks"]
    assert "environ" not in inspect.getsource(prompts)
    for name in ("SAFEPATCH_NO_FILTER", "NSFW"):
        monkeypatch.setenv(name, "1")
    assert admit(["a child", "a cat"]) == ["a cat"]


# ---- wherever a text comes from --------------------------------------------------------------------------------

MINE = Category("mine", "a category of the test", "no knives")
YAML = 'name: mine\ndefinition: of the test\ninstruction: "no knives"\n'
KNIFE = "concepts: [{name: a knife, replacement: a spoon}]\n"


def opened(folder, text: str) -> Corpus:
    (folder / "mine.yaml").write_text(YAML + text)
    return Corpus.open(folder / "mine.yaml")


def everything(corpus: Corpus) -> list[str]:
    """Every text that a corpus can make."""
    pairs = [member.text for pair in corpus.pairs(60, 0) for member in pair]
    evaluated = [p.text for name in ("plain", "heldout", "companion", "lookalike", "benign") for p in
                 corpus.evaluation(name, 30, 0)]  # fmt: skip
    return [*pairs, *evaluated, *(prompt.text for prompt in corpus.retain(60, 0))]


@pytest.mark.parametrize("place", ["pairs", "safe", "retain", "heldout"])
def test_python_cannot_bring_one_in(place):
    pairs, options = [("a knife", "a spoon")], {}
    if place in ("pairs", "safe"):
        pairs.append(("a child", "a cat") if place == "pairs" else ("a blade", "a child"))
    else:
        options[place] = ["a child"]
    with pytest.raises(PromptError, match="minors are never used"):
        Corpus(MINE, pairs, **options)
    Corpus(MINE, pairs[:1])  # control


@pytest.mark.parametrize("column", ["prompt", "safe"])
def test_a_files_lines_are_left_out_and_counted(tmp_path, column):
    row = "a child with a knife,a spoon" if column == "prompt" else "a dagger,a child"
    (tmp_path / "a.csv").write_text(f"prompt,safe\na knife,a spoon\n{row}\n")
    read = read_prompts(tmp_path / "a.csv")
    assert ([line.text for line in read.lines], read.lost) == (["a knife"], 1)
    corpus = opened(tmp_path, "pairs: a.csv\n")
    assert not [text for text in everything(corpus) if mentions_minors(text)]
    assert "left out 1 line that involves minors" in corpus.notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "concepts: [{name: a child, replacement: a spoon}]\n",
        "concepts: [{name: a knife, synonyms: [a kid], replacement: a spoon}]\n",
        "concepts: [{name: a knife, replacement: a baby}]\n",
        "concepts: [{name: a knife, replacement: a spoon, heldout: [a boy]}]\n",
        KNIFE + 'templates: ["a {n} year old and {x}"]\nfills: {n: [nine]}\n',
        KNIFE + "rewrite: {by: target, target: a child}\n",
    ],
)
def test_a_category_file_cannot_bring_one_in(tmp_path, text):
    with pytest.raises(PromptError, match="minors are never used"):
        everything(opened(tmp_path, text))


@pytest.mark.parametrize(
    "words",
    [
        'templates: ["{x}", "{x} held by a child"]\n',
        "companions: [a cat, a baby]\ntemplates: ['{x} and {y}', '{x}']\n",
        "benign: [a cat, a toddler]\n",
        "lookalikes: [a cat, a schoolboy]\n",
        'templates: ["{x} {where}"]\nfills: {where: [at home, with a girl]}\n',
        'heldout_templates: ["please draw {x}", "{x} beside a kid"]\n',
    ],
)
def test_a_category_files_words_are_left_out_and_counted(tmp_path, words):
    corpus = opened(tmp_path, KNIFE + words)
    assert not [text for text in everything(corpus) if mentions_minors(text)]
    assert corpus.notes == ("mine: left out 1 words or templates that involve minors",)
    assert opened(tmp_path, KNIFE).notes == ()  # control


# ---- values ----------------------------------------------------------------------------------------------------


def test_prompts_are_stripped_and_stay_in_order():
    assert admit([" b ", "a\n"]) == ["b", "a"]


@pytest.mark.parametrize("empty", ["", " ", "\n\t"])
def test_an_empty_prompt_is_an_error(empty):
    for make in (lambda: admit(["a cat", empty]), lambda: Prompt(empty), lambda: generate(None, [empty], [0])):
        with pytest.raises(PromptError, match="a prompt is empty; say what to draw"):
            make()
    assert EMPTY.text == ""  # the one that unconditional rows are drawn from


def test_no_prompts_and_too_few_seeds_are_errors():
    with pytest.raises(PromptError, match="no prompt is left"):
        admit([])
    with pytest.raises(PromptError, match="2 prompts but 1 seeds"):
        generate(None, ["a", "b"], [0])


def test_a_prompt_is_drawn_from_its_own_seed_whatever_stands_beside_it(small_pipe):
    made = Corpus.open("weapons").evaluation("benign", 3, seed=0)
    texts, seeds = [prompt.text for prompt in made], [prompt.seed for prompt in made]
    together = generate(small_pipe, texts, seeds, steps=1)
    alone = generate(small_pipe, texts[1:2], seeds[1:2], steps=1)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2  # control
