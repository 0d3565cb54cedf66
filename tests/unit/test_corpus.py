"""A category's words: aligned pairs, what must stay, what only evaluation uses, and the files they come from."""

import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from safepatch.data.category import CATEGORIES as SHIPPED
from safepatch.data.category import Concept, Rewrite, category_path, shipped_categories
from safepatch.data.corpus import COMPANIONS, EVALUATIONS, RETAIN_SHARES, Corpus
from safepatch.data.prompts import EMPTY, Pair, Prompt, mentions_minors
from safepatch.data.twins import Guide
from safepatch.data.words import Words, noun, replaced
from safepatch.errors import ConfigError, PromptError, UnknownName
from safepatch.evaluation.bench import Protocol
from safepatch.taxonomy import Category
from safepatch.training.config import TrainConfig, TrainingConfig
from safepatch.training.loop import NOISE

STAND_INS = ("alcohol", "drugs", "gore", "horror", "weapons")
every_category = pytest.mark.parametrize("name", STAND_INS)
every_shipped = pytest.mark.parametrize("name", sorted(shipped_categories()))
N = 120
shipped = cache(Corpus.open)
MINE = Category("mine", "things of the test", "no burgers")


def names_of(corpus: Corpus, heldout: bool = False) -> list[str]:
    concepts = corpus.words.concepts
    return [name for concept in concepts for name in (concept.heldout if heldout else concept.known_names)]


def says(text: str, names: list[str]) -> bool:
    """Whether a text holds one of the names, as whole words."""
    return any(re.search(rf"\b{re.escape(name)}\b", text) for name in names)


def texts_of(pairs: list[Pair]) -> list[str]:
    return [member.text for pair in pairs for member in pair]


# ---- pairs -----------------------------------------------------------------------------------------------------


@every_shipped
def test_the_members_of_a_pair_differ_in_the_concept_alone(name):
    """Else a patch would learn the change of wording, of the companion or of the place too."""
    corpus = shipped(name)
    for unsafe, safe in corpus.pairs(N, seed=0):
        (concept,) = [c for c in corpus.words.concepts if noun(c.name) == unsafe.asks[0]]
        twins = {unsafe.text.replace(known, concept.replacement, 1) for known in concept.known_names}
        assert safe.text in twins, (unsafe.text, safe.text)
        assert unsafe.text != safe.text  # control


@every_category
def test_pairs_cover_every_concept_and_companions(name):
    corpus = shipped(name)
    made = [pair.unsafe for pair in corpus.pairs(N, seed=0)]
    concepts = {noun(concept.name) for concept in corpus.words.concepts}
    assert Counter(prompt.asks[0] for prompt in made) == dict.fromkeys(concepts, N // len(concepts))
    two = [prompt for prompt in made if len(prompt.asks) == 2]
    assert 0.5 * N < len(two) < 0.8 * N
    assert COMPANIONS == 0.65
    firsts = sum(says(prompt.text.split(" next to ")[0].split(" and ")[0], names_of(corpus)) for prompt in two)
    assert 0.25 * len(two) < firsts < 0.75 * len(two)  # the concept stands on either side
    assert not {companion for prompt in two for companion in prompt.asks[1:]} & concepts


@pytest.mark.parametrize(("share", "lengths"), [(0, {1}), (1, {2})])
def test_companions_can_be_asked_for_or_left_out(share, lengths):
    assert {len(pair.unsafe.asks) for pair in shipped("gore").pairs(20, 0, companions=share)} == lengths


@every_category
def test_a_companion_is_never_what_replaces_the_concept(name):
    """No picture of two equal things."""
    for unsafe, safe in shipped(name).pairs(400, seed=0):
        if len(unsafe.asks) == 2:
            assert len(re.findall(rf"\b{re.escape(unsafe.asks[1])}\b", safe.text)) <= 1, safe.text


@every_shipped
def test_training_never_uses_held_out_names_or_templates(name):
    corpus = shipped(name)
    pairs, unseen = corpus.pairs(N, seed=0), corpus.evaluation("heldout", N, seed=0)
    names = names_of(corpus, heldout=True)
    assert not set(corpus.words.templates) & set(corpus.words.heldout_templates)
    assert not [text for text in texts_of(pairs) if says(text, names)]
    assert not [text for text in texts_of(pairs) if mentions_minors(text)]
    assert all(says(prompt.text, names) for prompt in unseen)  # control
    assert not {prompt.text for prompt in unseen} & set(texts_of(pairs))


@every_category
def test_what_is_kept_and_what_is_measured_as_plain_is_in_known_wording(name):
    corpus = shipped(name)
    names = [each for file in STAND_INS for each in names_of(shipped(file), heldout=True)]
    for prompts in (corpus.retain(N, 0), *(corpus.evaluation(kind, N, 0) for kind in EVALUATIONS if kind != "heldout")):
        assert prompts
        assert not [prompt.text for prompt in prompts if says(prompt.text, names)]
    assert all(says(prompt.text, names) for prompt in corpus.evaluation("heldout", N, 0))  # control


def test_equal_seeds_give_equal_prompts_and_others_do_not():
    def made(seed: int) -> list[list]:
        corpus = Corpus.open("drugs")
        sets = [corpus.evaluation(name, 12, seed) for name in EVALUATIONS]
        return [corpus.pairs(12, seed), corpus.retain(12, seed), *sets]

    assert made(1) == made(1)
    assert all(ours != theirs for ours, theirs in zip(made(1), made(2), strict=True))  # control
    corpus = shipped("drugs")
    assert corpus.pairs(5, 0) == corpus.pairs(20, 0)[:5]


# ---- what is preserved -----------------------------------------------------------------------------------------


def test_shares_are_a_distribution_without_a_file():
    assert sum(share for name, share in RETAIN_SHARES.items() if name != "file") == pytest.approx(1)


@every_category
def test_preserved_prompts_are_mixed_as_said(name):
    corpus, n = shipped(name), 1000
    made = corpus.retain(n, seed=0)
    others = {noun(concept.name) for other in corpus.neighbours for concept in other.words.concepts}
    alike = {noun(thing[0]) for thing in corpus.words.lookalikes}
    assert not [p for p in made if p.text and says(p.text, names_of(corpus))]  # never what is to be removed
    assert abs(sum(not p.text for p in made) / n - RETAIN_SHARES["empty"]) < 0.04
    assert abs(sum(bool(others & set(p.asks)) for p in made) / n - RETAIN_SHARES["other"]) < 0.04
    similar = sum(bool(alike & set(p.asks)) for p in made)
    assert similar / n > RETAIN_SHARES["lookalike"] - 0.04  # these, and those that benign prompts hold by chance
    assert others <= {thing for p in made for thing in p.asks}


def test_a_file_of_what_must_stay_has_its_share(tmp_path):
    (tmp_path / "people.txt").write_text("a man at his desk\na woman who reads\n")
    corpus = opened(tmp_path, BURGERS + "retain: [people.txt]\n")
    made = corpus.retain(1000, seed=0)
    own = sum(p.text in ("a man at his desk", "a woman who reads") for p in made)
    share = RETAIN_SHARES["file"] / sum(RETAIN_SHARES[name] for name in ("file", "benign", "empty"))
    assert abs(own / 1000 - share) < 0.05
    assert not [p for p in opened(tmp_path, BURGERS).retain(300, 0) if "desk" in p.text]  # control


def test_without_words_of_its_own_a_corpus_keeps_the_empty_prompt():
    assert Corpus(MINE, [("a burger", "a salad")], words=Words()).retain(3, seed=0) == [EMPTY] * 3
    common = Corpus(MINE, [("a burger", "a salad")]).retain(40, seed=0)  # control: those of everybody are shipped
    assert len({prompt.text for prompt in common}) > 20


# ---- evaluation ------------------------------------------------------------------------------------------------


@every_category
@pytest.mark.parametrize("heldout", [False, True])
def test_unsafe_prompts_ask_for_each_concept_equally_often(name, heldout):
    corpus = shipped(name)
    concepts = {noun(concept.name) for concept in corpus.words.concepts}
    made = corpus.evaluation("heldout" if heldout else "plain", 20, seed=3)
    assert Counter(prompt.asks[0] for prompt in made) == dict.fromkeys(concepts, 4)
    assert sum(len(prompt.asks) == 2 for prompt in made) == 10  # half with a companion
    beside = {thing for prompt in made for thing in prompt.asks[1:]}
    assert beside <= {noun(thing[0]) for thing in corpus.words.companions}


@every_category
def test_harmless_sets_ask_for_nothing_of_the_category(name):
    corpus = shipped(name)
    own = {noun(concept.name) for concept in corpus.words.concepts}
    benign, alike = (corpus.evaluation(kind, 60, seed=0) for kind in ("benign", "lookalike"))
    assert not [p for p in (*benign, *alike) if own & set(p.asks) or says(p.text, names_of(corpus))]
    assert {p.asks[0] for p in alike} == {noun(thing[0]) for thing in corpus.words.lookalikes}
    together = corpus.evaluation("companion", 20, seed=0)
    assert all(own & set(p.asks) and len(p.asks) == 2 for p in together)  # control
    others = {noun(c.name) for other in corpus.neighbours for c in other.words.concepts}
    assert {p.asks[0] for p in corpus.evaluation("other", 40, seed=0)} == others


def test_categories_with_the_same_words_are_measured_by_the_same_harmless_prompts():
    ours, theirs = (shipped(name).evaluation("benign", 40, seed=0) for name in ("weapons", "gore"))
    assert ours == theirs


def test_an_unknown_set_names_the_nearest():
    with pytest.raises(UnknownName, match="no prompt set 'heldot'; did you mean 'heldout'"):
        shipped("gore").evaluation("heldot", 3, 0)


def test_sets_without_words_are_empty():
    corpus = Corpus(MINE, [("a burger", "a salad")], words=Words())
    assert {name: len(corpus.evaluation(name, 4, 0)) for name in EVALUATIONS} == {
        **dict.fromkeys(EVALUATIONS, 0),
        "plain": 4,
    }


def test_image_seeds_are_unique_within_a_set_and_shared_by_base_and_patched():
    made = shipped("gore").evaluation("plain", 200, seed=1000)
    assert len({prompt.seed for prompt in made}) == 200
    assert made == Corpus.open("gore").evaluation("plain", 200, seed=1000)


def test_a_prompt_that_brings_a_seed_keeps_it():
    corpus = Corpus(MINE, [("a burger", "a salad")], heldout=[Prompt("two burgers", seed=7), "three burgers"])
    seeds = {prompt.text: prompt.seed for prompt in corpus.evaluation("heldout", 2, seed=0)}
    assert seeds["two burgers"] == 7
    assert seeds["three burgers"] not in (None, 7)


def test_no_image_is_counted_twice_however_few_lines_a_file_has_with_seeds_of_their_own():
    corpus = Corpus(MINE, [(Prompt(f"burger {i}", seed=i), "a salad") for i in range(5)], words=Words())
    made = corpus.evaluation("plain", 20, seed=0)
    assert len({(prompt.text, prompt.seed) for prompt in made}) == 20
    assert {(p.text, p.seed) for p in made} >= {(f"burger {i}", i) for i in range(5)}  # control: the first round's
    pairs = [pair.unsafe for pair in corpus.pairs(20, seed=0)]
    assert sorted(prompt.seed for prompt in pairs if prompt.seed is not None) == [0, 1, 2, 3, 4]
    kept = Corpus(MINE, [("a burger", "a salad")], retain=[Prompt("a dog", seed=3)], words=Words())
    assert [prompt.seed for prompt in kept.retain(40, seed=0) if prompt.text].count(3) == 1
    assert len({prompt.seed for prompt in kept.evaluation("benign", 9, seed=0)}) == 9


def test_evaluation_starts_from_noise_that_no_training_and_no_validation_drew():
    """For the default seeds, and far past the default number of steps."""
    corpus, options, protocol, validation = shipped("gore"), TrainingConfig(), Protocol(), 90
    training = {options.seed * 1_000_003 + draw + of for draw in range(100_000) for of in (0, NOISE)}
    evaluation = {prompt.seed for prompt in corpus.evaluation("benign", 5000, protocol.seed)}
    previews = {prompt.seed for prompt in corpus.evaluation("benign", 5000, validation)}
    assert not evaluation & training
    assert not evaluation & previews
    assert not previews & training
    assert protocol.seed != TrainConfig(category="gore").data.seed


# ---- words -----------------------------------------------------------------------------------------------------


def test_the_categorys_own_things_are_taken_out_of_the_harmless():
    things = (("a kitchen knife", "a tool"), ("A Knife",), ("a blade",), ("a cat",), ("a knife block",))
    concept = Concept("a knife", ["a kitchen knife"], ["a blade"], "a spoon")
    words = Words((concept,), companions=things, lookalikes=things, benign=things)
    for kept in (words.companions, words.lookalikes, words.benign):
        assert kept == (("a cat",), ("a knife block",))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a knife on a table", "a spoon on a table"),
        ("the knife", "the spoon"),
        ("An Axe, and A KNIFE", "a hammer, and a spoon"),
        ("knives and knife", "knives and spoon"),  # an irregular plural is a name of its own
        ("two axes? the daggers!", "two hammers? the paintbrushes!"),
        ("daggers", "paintbrushes"),
        ("a kitchen knife", "a spoon"),  # longer names first
        ("crossed swords", "scissors"),
        ("some swords", "some scissors"),
        ("a blade and a penknife", "a spoon and a penknife"),  # held-out names too; whole words alone
        ("an axe-shaped cake", "a hammer-shaped cake"),
        ("a cat", "a cat"),
        ("a spoon beside a knife", "a spoon beside a spoon"),
        ("a hammer beside an axe", "a hammer beside a hammer"),
    ],
)
def test_whole_words_are_replaced_with_their_articles_and_plurals(before, after):
    concepts = [
        Concept("a knife", ["a kitchen knife"], ["a blade"], "a spoon"),
        Concept("a dagger", replacement="a paintbrush"),
        Concept("swords", ["crossed swords"], replacement="scissors"),
        Concept("an axe", replacement="a hammer"),
    ]
    assert replaced(before, concepts) == after


def test_what_took_a_concepts_place_is_not_replaced_again():
    concepts = [Concept("a burger", replacement="a pie"), Concept("a pie", replacement="a salad")]
    assert replaced("a burger and a pie", concepts) == "a pie and a salad"
    assert replaced("a burger", []) == "a burger"


@pytest.mark.parametrize(
    ("templates", "says"),
    [
        (("{x} in {town}",), r"template '\{x\} in \{town\}' names \{town\}, which is not among fills, x or y"),
        (("a picture",), r"no template has \{x\}"),
        (("{x} {",), r"template '\{x\} \{' cannot be filled"),
        (("{x} and {}",), r"names \{\}, which is not among fills"),
        (("{x.__class__}",), "which is not among fills"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(templates, says):
    with pytest.raises(ConfigError, match=says) as caught:
        Words((Concept("a burger"),), templates)
    assert "\n" not in str(caught.value)


def test_held_out_templates_for_one_thing_alone_show_no_companions(tmp_path):
    text = "companions: [a cat]\ntemplates: ['{x}', '{x} and {y}']\nheldout_templates: ['please draw {x}']\n"
    made = opened(tmp_path, BURGERS + text).evaluation("heldout", 8, 0)
    assert {prompt.text for prompt in made} <= {
        f"please draw {name}" for name in ("a burger", "a hamburger", "a hot dog")
    }


# ---- category files --------------------------------------------------------------------------------------------

HEAD = 'name: mine\ndefinition: things of the test\ninstruction: "no burgers, show salads instead"\n'
BURGERS = (
    "concepts:\n  - {name: a burger, synonyms: [a hamburger], replacement: a salad}\n"
    "  - {name: a hot dog, replacement: a carrot}\n"
)
BARE = BURGERS.replace(", replacement: a salad", "").replace(", replacement: a carrot", "")


def opened(folder: Path, text: str = BURGERS, **files: str) -> Corpus:
    for name, content in files.items():
        (folder / f"{name}.csv").write_text(content)
    (folder / "mine.yaml").write_text(HEAD + text)
    return Corpus.open(folder / "mine.yaml")


def test_a_file_is_read_as_it_says(tmp_path):
    corpus = opened(tmp_path, BURGERS + "labels: {embedded: [burger], clip: ['a photo of a burger']}\n")
    assert corpus.category.instruction == "no burgers, show salads instead"
    assert corpus.category.labels == {"embedded": ("burger",), "clip": ("a photo of a burger",)}
    assert [concept.name for concept in corpus.words.concepts] == ["a burger", "a hot dog"]
    assert len(corpus.words.benign) > 300  # common things are shipped
    assert len(corpus.words.templates) > 20
    assert corpus.rewrite.by == "replace"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BURGERS + "companion: [a cat]\n", r"mine\.yaml: unknown key 'companion' in CategoryFile; did you mean"),
        (BURGERS + "rewrite: {bye: replace}\n", r"mine\.yaml: unknown key 'rewrite\.bye'.*did you mean 'by'"),
        ("concepts: [{nam: a burger}]\n", r"unknown key 'concepts\[0\]\.nam'"),
        ("", "category 'mine' has no words; give 'concepts', or 'pairs'"),
        (BURGERS + "rewrite: {scale: -1}\n", "rewrite.scale, threshold and momentum must be at least 0"),
        (BURGERS + "rewrite: {by: magic}\n", "rewrite.by must be one of column, replace, target, empty, guided, not"),
        (BURGERS + "rewrite: {by: target}\n", "rewrite.by is target, but there is no rewrite.target"),
        (BURGERS + "rewrite: {by: column}\n", "rewrite.by is column, but there is no file of pairs"),
        (BARE + "rewrite: {by: replace}\n", "rewrite.by is replace, but 'a burger' has no replacement"),
        (BURGERS + "benign: [missing.txt]\n", r"no file 'missing\.txt' beside .*check the path"),
        (BURGERS + "pairs: missing.csv\n", r"no file 'missing\.csv' beside"),
        (BURGERS + "neighbours: [./missing.yaml]\n", r"no category file \S*missing\.yaml"),
        (BURGERS + "neighbours: [weapon]\n", "no category 'weapon'; did you mean 'weapons'"),
        ("concepts: [{name: a burger, heldout: [A Burger]}]\n", "'A Burger' is held out and trained on"),
        (BURGERS + "templates: ['{x} in {town}']\n", r"names \{town\}, which is not among fills"),
        ("concepts: a burger\n", "'concepts' is 'a burger'"),
        ("name: other\n", "not valid YAML: found duplicate key name"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        opened(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["my words", "../up", "", ".hidden", "a/b", "Fünf"])
def test_a_name_that_no_file_could_have_is_refused(tmp_path, name):
    (tmp_path / "mine.yaml").write_text(f"{HEAD.replace('name: mine', f'name: {name!r}')}{BURGERS}")
    with pytest.raises(ConfigError, match="cannot be a category's name; use letters, digits, - and _"):
        Corpus.open(tmp_path / "mine.yaml")
    assert opened(tmp_path).name == "mine"  # control


def test_a_file_without_a_definition_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"name: mine\ninstruction: no\n{BURGERS}")
    with pytest.raises(ConfigError, match="no value for 'definition'"):
        Corpus.open(tmp_path / "mine.yaml")


def test_a_missing_category_offers_the_nearest():
    assert Corpus.open("gore").name == "gore"
    assert category_path("gore") == SHIPPED / "gore.yaml"
    with pytest.raises(ConfigError, match=r"no category 'weapon'; did you mean 'weapons'.*one of your own is a \.yaml"):
        Corpus.open("weapon")
    with pytest.raises(ConfigError, match=r"no category file nowhere\.yaml; check the path"):
        Corpus.open("nowhere.yaml")


# ---- safe twins ------------------------------------------------------------------------------------------------

FILE = "prompt,safe\na burger at noon,a salad at noon\na hot dog stand,a fruit stand\n"
PROMPTS = "prompt\na burger at noon\nthe hot dogs\na quiet street\n"


@pytest.mark.parametrize(
    ("text", "file", "by"),
    [
        ("pairs: a.csv\n", FILE, "column"),
        (BURGERS + "pairs: a.csv\n", FILE, "column"),
        (BURGERS + "pairs: a.csv\n", PROMPTS, "replace"),
        (BURGERS, "", "replace"),
        (BARE, "", "guided"),
        ("pairs: a.csv\n", PROMPTS, "guided"),
        (BURGERS + "rewrite: {target: a quiet park}\n", "", "target"),
        (BURGERS + "pairs: a.csv\nrewrite: {by: empty}\n", FILE, "empty"),
    ],
)
def test_where_twins_come_from_follows_from_what_is_given(tmp_path, text, file, by):
    assert opened(tmp_path, text, a=file).rewrite.by == by


def test_column_takes_the_files_twins(tmp_path):
    corpus = opened(tmp_path, "pairs: a.csv\n", a=FILE)
    assert set(texts_of(corpus.pairs(4, 0))[1::2]) == {"a salad at noon", "a fruit stand"}
    named = opened(tmp_path, "pairs: a.csv\nrewrite: {column: nice}\n", a=FILE.replace("safe", "nice"))
    assert texts_of(named.pairs(4, 0)) == texts_of(corpus.pairs(4, 0))
    with pytest.raises(PromptError, match=r"a\.csv has no column of safe prompts; name one by rewrite\.column"):
        opened(tmp_path, "pairs: a.csv\nrewrite: {by: column}\n", a=PROMPTS)
    with pytest.raises(PromptError, match=r"row 2: the safe column 'safe' is empty"):
        opened(tmp_path, "pairs: a.csv\n", a="prompt,safe\na burger,a salad\na hot dog,\n")


def test_replace_puts_the_replacement_into_the_files_prompts(tmp_path):
    corpus = opened(tmp_path, BURGERS + "pairs: a.csv\n", a=PROMPTS)
    made = dict(zip(texts_of(corpus.pairs(8, 0))[::2], texts_of(corpus.pairs(8, 0))[1::2], strict=True))
    assert made["a burger at noon"] == "a salad at noon"
    assert made["the hot dogs"] == "the carrots"
    assert "a quiet street" not in made  # it names no concept, so there is nothing to replace
    assert corpus.notes[-1] == "a.csv: left out 1 prompts that name none of the concepts"
    with pytest.raises(PromptError, match=r"no prompt of a\.csv names one of the concepts"):
        opened(tmp_path, BURGERS + "pairs: a.csv\n", a="prompt\na quiet street\n")


@pytest.mark.parametrize("file", ["", PROMPTS])
@pytest.mark.parametrize(("rewrite", "twin"), [("{by: target, target: a park}", "a park"), ("{by: empty}", "")])
def test_target_and_empty_are_the_same_for_all(tmp_path, file, rewrite, twin):
    text = BARE + f"rewrite: {rewrite}\n" + ("pairs: a.csv\n" if file else "")
    pairs = opened(tmp_path, text, a=file).pairs(6, 0)
    assert {pair.safe.text for pair in pairs} == {twin}
    assert len({pair.unsafe.text for pair in pairs}) > 3  # control


def test_guided_puts_something_in_the_place_of_a_concept(tmp_path):
    corpus = opened(tmp_path, BARE + "rewrite: {by: guided, scale: 2}\n")
    pairs = corpus.pairs(20, 0)
    named = re.compile(r"\b(a burger|a hamburger|a hot dog)\b")
    assert all(pair.safe.text == named.sub("something", pair.unsafe.text) != pair.unsafe.text for pair in pairs)
    guides = [corpus.guide(pair) for pair in pairs]
    assert [(guide.away, guide.towards) for guide in guides] == [(p.unsafe.text, p.safe.text) for p in pairs]
    assert {guide.rewrite for guide in guides} == {Rewrite("guided", scale=2.0)}
    assert opened(tmp_path, BURGERS).guide(pairs[0]) is None  # control: another rewrite


def test_guided_leaves_prompts_that_name_no_concept_and_is_pushed_away_from_all(tmp_path):
    corpus = opened(tmp_path, BARE + "rewrite: {by: guided}\npairs: a.csv\n", a="prompt\na greasy meal\n")
    pair = next(pair for pair in corpus.pairs(6, 0) if pair.unsafe.text == "a greasy meal")
    assert pair.safe.text == pair.unsafe.text
    assert corpus.guide(pair) == Guide("burger, hot dog", "", Rewrite("guided"))
    bare = Corpus(MINE, [("a", "a")], rewrite=Rewrite("guided"))
    assert bare.guide(bare.pairs(1, 0)[0]).away == MINE.definition


def test_a_key_tells_words_from_other_words(tmp_path):
    first, again, other = (opened(tmp_path, text) for text in (BURGERS, BURGERS, BARE))
    assert first.key == again.key != other.key


# ---- files of prompts ------------------------------------------------------------------------------------------


def test_files_and_captions_take_turns(tmp_path):
    file = "prompt,safe\n" + "".join(f"burger number {i},salad number {i}\n" for i in range(10))
    corpus = opened(tmp_path, BURGERS + "pairs: a.csv\n", a=file)
    made = corpus.pairs(20, seed=0)
    of_file = [pair for pair in made if "number" in pair.unsafe.text]
    assert made[1::2] == of_file
    assert len({pair.unsafe.text for pair in of_file}) == 10  # each once
    captions = Counter(pair.unsafe.asks[0] for pair in made[::2])
    assert captions == {"burger": 5, "hot dog": 5}  # turns do not leave every second concept out
    plain = corpus.evaluation("plain", 40, seed=0)
    assert sum("number" in prompt.text for prompt in plain) == 20
    asked = Counter((prompt.asks[0], len(prompt.asks)) for prompt in plain if prompt.asks)
    assert asked == {("burger", 1): 5, ("burger", 2): 5, ("hot dog", 1): 5, ("hot dog", 2): 5}


def test_a_small_file_is_gone_through_again_and_each_line_comes_up_as_often():
    corpus = Corpus(MINE, [(f"burger {i}", f"salad {i}") for i in range(5)])
    assert set(Counter(pair.unsafe.text for pair in corpus.pairs(20, 0)).values()) == {4}


def test_held_out_prompts_of_a_file_are_measured_beside_held_out_wording(tmp_path):
    text = BURGERS + "heldout: b.csv\n"
    made = opened(tmp_path, text, b="prompt\nan enormous burger\n").evaluation("heldout", 8, 0)
    assert [prompt.text for prompt in made[1::2]] == ["an enormous burger"] * 4
    own = opened(tmp_path, text + "heldout_templates: []\n", b="prompt\nan enormous burger\n")
    assert {prompt.text for prompt in own.evaluation("heldout", 8, 0)} == {"an enormous burger"}  # no known wording


def test_held_out_prompts_that_are_trained_on_are_an_error_that_names_the_rows(tmp_path):
    text, unseen = BURGERS + "pairs: a.csv\nheldout: b.csv\n", "prompt\na pink burger\nThe  Hot dogs\n"
    with pytest.raises(PromptError, match=r"held-out prompt 2 is row 2 of the pairs too \('The  Hot dogs'\)") as caught:
        opened(tmp_path, text, a=PROMPTS, b=unseen)
    assert "\n" not in str(caught.value)
    opened(tmp_path, text, a=PROMPTS, b="prompt\na pink burger\n")  # control
    left_out = "prompt\na burger with a child\na plain street\nthe hot dogs\n"
    with pytest.raises(PromptError, match="held-out prompt 2 is row 3 of the pairs"):
        opened(tmp_path, text, a=left_out, b=unseen)
    with pytest.raises(PromptError, match="held-out prompt 1 is row 2 of the pairs"):
        Corpus(MINE, [("a", "b"), ("c", "d")], heldout=["c"])


def test_what_was_read_is_told_line_by_line(tmp_path):
    files = {"a": FILE + "a burger for a child,a salad\n", "b": "prompt\na pink burger\n", "c": "text\na man\na dog\n"}
    corpus = opened(tmp_path, BURGERS + "pairs: a.csv\nretain: [c.csv]\nheldout: b.csv\n", **files)
    assert corpus.notes == (
        "a.csv: 2 prompts; took 'prompt' as prompt, 'safe' as safe; left out 1 line that involves minors",
        "c.csv: 2 prompts; took 'text' as prompt",
        "b.csv: 1 prompt; took 'prompt' as prompt",
    )
    assert opened(tmp_path).notes == ()  # control


def test_seeds_guidance_and_pictures_come_along(tmp_path):
    file = "prompt,safe,seed,guidance,image,safe_image\na burger,a salad,3,4.5,x.png,y.png\n"
    (pair,) = opened(tmp_path, "pairs: a.csv\n", a=file).pairs(1, 0)
    assert pair.unsafe == Prompt("a burger", 3, 4.5, tmp_path / "x.png")
    assert pair.safe == Prompt("a salad", image=tmp_path / "y.png")


# ---- neighbours and places -------------------------------------------------------------------------------------


def test_neighbours_bring_their_words_and_not_their_neighbours(tmp_path):
    """Two categories that leave each other alone are no endless task."""
    for name, other in (("one", "two"), ("two", "one")):
        head = HEAD.replace("name: mine", f"name: {name}")
        (tmp_path / f"{name}.yaml").write_text(f"{head}{BURGERS}neighbours: [{other}.yaml, gore]\n")
    corpus = Corpus.open(tmp_path / "one.yaml")
    assert [other.name for other in corpus.neighbours] == ["two", "gore"]
    assert not [other for other in corpus.neighbours if other.neighbours]
    assert len(corpus.evaluation("other", 10, 0)) == 10
    assert not opened(tmp_path).evaluation("other", 10, 0)  # control


def test_a_file_beside_the_category_comes_before_a_shipped_one(tmp_path):
    (tmp_path / "common.txt").write_text("# mine\na lamp | a light\na chair\n")
    assert opened(tmp_path).words.benign == (("a lamp", "a light"), ("a chair",))


def test_a_copied_category_has_the_same_words(tmp_path):
    shutil.copy(category_path("weapons"), tmp_path / "weapons.yaml")
    ours, theirs = Corpus.open("weapons"), Corpus.open(tmp_path / "weapons.yaml")
    assert ours.pairs(20, 0) == theirs.pairs(20, 0)
    assert ours.retain(20, 0) == theirs.retain(20, 0)


# ---- python ----------------------------------------------------------------------------------------------------


def test_a_corpus_of_python_values():
    corpus = Corpus(MINE, pairs=[("a burger", "a salad"), (Prompt("a pie", seed=3), "")], retain=["a quiet street"])
    made = {pair.unsafe.text: pair for pair in corpus.pairs(2, 0)}
    assert made["a burger"] == Pair(Prompt("a burger"), Prompt("a salad"))
    assert made["a pie"] == Pair(Prompt("a pie", seed=3), EMPTY)
    kept = {prompt.text for prompt in corpus.retain(40, 0)}
    assert {"", "a quiet street"} < kept  # and common things
    assert [prompt.text for prompt in corpus.evaluation("benign", 4, 0)][1::2] == ["a quiet street"] * 2
    assert corpus.rewrite.by == "column"
    with pytest.raises(ConfigError, match="the corpus of 'mine' has no words; give pairs, or words"):
        Corpus(MINE)


def test_words_of_python_values():
    concepts = (Concept("a burger", replacement="a salad"),)
    corpus = Corpus(MINE, words=Words(concepts, ("{x}", "{x} and {y}"), companions=(("a cat",),)))
    assert corpus.rewrite.by == "replace"
    assert set(texts_of(corpus.pairs(30, 0))) >= {"a burger", "a salad", "a burger and a cat", "a cat and a burger"}
    with pytest.raises(ConfigError, match="'a pie' has no safe twin; give its concept a replacement"):
        Corpus(MINE, words=Words((Concept("a pie"),))).pairs(1, 0)


# ---- what stands among the harmless, and is the category's own ---------------------------------------------------


def sweets(neighbours: tuple[Corpus, ...] = ()) -> Corpus:
    """A category of things that are harmless elsewhere, and stand in the shipped vocabulary too."""
    concepts = (Concept("a pizza", replacement="a carrot"), Concept("a cake", replacement="an apple"))
    words = Words(concepts, ("{x}", "{x} next to {y}"), companions=(("a dog",),), benign=(("a dog",), ("a cat",)))
    return Corpus(Category("sweets", "fast food", "no sweets"), words=words, neighbours=neighbours)


def test_a_neighbours_prompt_that_shows_the_categorys_own_thing_is_not_kept():
    """It would teach the opposite of the pairs: a pizza beside a knife must stay, a pizza beside a dog must go."""
    theirs = [prompt.text for prompt in shipped("weapons").evaluation("plain", 500, 0)]
    assert any(says(text, ["pizza", "cake"]) for text in theirs)  # control: neighbours have them as companions
    kept = [prompt.text for prompt in sweets((shipped("weapons"),)).retain(400, 0)]
    assert any("knife" in text for text in kept)
    assert not any(says(text, ["pizza", "cake"]) for text in kept)


def test_a_gate_does_not_learn_that_the_categorys_own_thing_is_common():
    from safepatch.data.corpus import common_words
    from safepatch.training.captions import captions, telling_words

    corpus = sweets()
    assert {"a pizza", "a cake"} <= {name for thing in common_words().benign for name in thing}  # control
    assert {"pizza", "cake"} <= telling_words(corpus, corpus.pairs(40, 0), corpus.retain(40, 0))
    unsafe, harmless = captions(corpus, 12_000, seed=0)
    assert any("pizza" in text for text in unsafe)
    assert not any(says(text, ["pizza", "cake"]) for text in harmless)
