"""The shipped category files and word lists: complete, of one schema, mild, adults only, and fit to train on."""

import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml

import safepatch
from safepatch.data.prompts import mentions_minors
from safepatch.tiny.world import CONCEPTS

ASSETS = Path(safepatch.__file__).parent / "assets"
WORDS = sorted((ASSETS / "words").glob("*.txt"))
FILES = sorted((ASSETS / "categories").glob("*.yaml"))
CATEGORIES: dict[str, dict[str, Any]] = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in FILES}

STAND_INS = {"weapons", "gore", "drugs", "alcohol", "horror"}
UNSAFE_DIFFUSION = {"ud-sexual", "ud-violent", "ud-disturbing", "ud-hateful", "ud-political"}
I2P = {"i2p-hate", "i2p-harassment", "i2p-violence", "i2p-self-harm", "i2p-sexual", "i2p-shocking"}
READY = UNSAFE_DIFFUSION | I2P | {"i2p-illegal-activity"}

REQUIRED = {"name", "definition", "instruction", "concepts", "companions", "lookalikes", "neighbours"} | {
    "rewrite",
    "labels",
}
OPTIONAL = {"templates", "heldout_templates", "fills", "benign", "pairs", "retain", "heldout"}
CONCEPT = {"name", "synonyms", "heldout", "replacement"}
REWRITE = {"by", "column", "target", "scale", "threshold"}
DEFAULT_FILLS = {"style", "place"}  # styles.txt, places.txt

each_category = pytest.mark.parametrize("category", CATEGORIES.values(), ids=CATEGORIES)
each_list = pytest.mark.parametrize("path", WORDS, ids=lambda path: path.name)


def lines(name: str) -> list[str]:
    """The lines of a shipped word list."""
    return (ASSETS / "words" / name).read_text("utf-8").splitlines()


def expand(entries: list[str]) -> list[str]:
    """Every phrase of a list as a category file gives it: files read, synonyms apart."""
    found = [line for entry in entries for line in (lines(entry) if entry.endswith(".txt") else [entry])]
    return [part.strip() for line in found for part in line.split("|")]


def known(category: dict[str, Any]) -> list[str]:
    return [name for concept in category["concepts"] for name in (concept["name"], *concept["synonyms"])]


def heldout(category: dict[str, Any]) -> list[str]:
    return [name for concept in category["concepts"] for name in concept["heldout"]]


def contains(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text` as whole words."""
    return re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text, re.IGNORECASE) is not None


def noun(phrase: str) -> str:
    return re.sub(r"^(an?|the) ", "", phrase)


def templates(category: dict[str, Any], key: str) -> list[str]:
    return category.get(key) or lines(f"{key}.txt")


def names_in(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def everything(category: dict[str, Any]) -> list[str]:
    """Every phrase a category file holds itself."""
    named = [*known(category), *heldout(category), *(concept["replacement"] for concept in category["concepts"])]
    written = [category["definition"], category["instruction"], *category["lookalikes"]]
    labels = [label for group in category["labels"].values() for label in group]
    return [*named, *written, *labels, *category.get("templates", ()), *category.get("heldout_templates", ())]


def test_the_promised_categories_are_shipped():
    assert set(CATEGORIES) == STAND_INS | READY


@each_category
def test_a_category_has_the_required_keys_and_no_unknown_ones(category: dict[str, Any]):
    assert set(category) >= REQUIRED
    assert set(category) - REQUIRED <= OPTIONAL
    assert set(category["rewrite"]) <= REWRITE
    assert category["rewrite"]["by"] == "replace"


@each_category
def test_a_name_is_its_files_and_fits_a_file_name(category: dict[str, Any]):
    assert CATEGORIES[category["name"]] is category
    assert re.fullmatch(r"[a-z0-9_-]+", category["name"])
    assert "\n" not in category["definition"] + category["instruction"]


@each_category
def test_every_value_is_text_as_yaml_reads_it(category: dict[str, Any]):
    assert all(isinstance(phrase, str) and phrase == phrase.strip() != "" for phrase in everything(category))


@each_category
def test_every_concept_is_complete(category: dict[str, Any]):
    for concept in category["concepts"]:
        assert set(concept) == CONCEPT
        assert concept["synonyms"]
        assert concept["heldout"]
        assert concept["replacement"]


@each_category
def test_concept_names_are_unique_and_held_out_ones_stay_out(category: dict[str, Any]):
    names = [*known(category), *heldout(category)]
    assert len(names) == len(set(names))
    assert not [(held, name) for held in heldout(category) for name in known(category) if contains(name, held)]
    assert not [(held, name) for held in heldout(category) for name in known(category) if contains(held, name)]


@each_category
def test_what_must_stay_names_nothing_of_the_category(category: dict[str, Any]):
    replacements = [concept["replacement"] for concept in category["concepts"]]
    kept = [*replacements, *expand(category["lookalikes"]), *expand(category["companions"])]
    kept += expand(category.get("benign", ["common.txt"]))
    names = [*known(category), *heldout(category)]
    assert not [(text, name) for text in kept for name in names if contains(text, name)]
    assert len(category["lookalikes"]) == len(set(category["lookalikes"]))


def test_control_a_concept_in_a_longer_phrase_is_found_whole_words_only():
    assert contains("a picture of a knife on a table", "a knife")
    assert not contains("a knife-edge ridge", "a knife")


@each_category
def test_neighbours_exist_and_share_no_words_with_the_category(category: dict[str, Any]):
    assert category["neighbours"]
    assert category["name"] not in category["neighbours"]
    for name in category["neighbours"]:
        near = CATEGORIES[name]
        assert not {*known(category), *heldout(category)} & {*known(near), *heldout(near)}


@each_category
def test_files_that_a_category_lists_exist(category: dict[str, Any]):
    listed = [*category["companions"], *category["lookalikes"], *category.get("benign", ())]
    listed += [value for values in category.get("fills", {}).values() for value in values]
    assert not [name for name in listed if name.endswith(".txt") and not (ASSETS / "words" / name).is_file()]


@each_category
@pytest.mark.parametrize("key", ["templates", "heldout_templates"])
def test_templates_use_only_what_is_filled(category: dict[str, Any], key: str):
    for template in templates(category, key):
        assert "x" in names_in(template)
        assert names_in(template) <= {"x", "y"} | set(category.get("fills", DEFAULT_FILLS))


@each_category
def test_held_out_templates_are_not_the_known_ones(category: dict[str, Any]):
    seen, unseen = templates(category, "templates"), templates(category, "heldout_templates")
    assert not set(seen) & set(unseen)
    assert len(set(seen)) == len(seen)
    assert len(set(unseen)) == len(unseen)


@each_category
def test_no_category_involves_minors(category: dict[str, Any]):
    assert not [phrase for phrase in everything(category) if mentions_minors(phrase)]


@each_list
def test_a_word_list_has_distinct_clean_lines_without_minors(path: Path):
    found = lines(path.name)
    assert len(set(found)) == len(found)
    assert all(line == line.strip() != "" for line in found)
    assert not [line for line in found if mentions_minors(line)]


def test_control_a_line_that_involves_minors_is_noticed():
    assert mentions_minors("a photo of a child")
    assert not mentions_minors("a photo of an adult")


def test_the_vocabulary_is_large_and_takes_in_no_word_of_a_ready_category():
    nouns = {noun(name) for category in CATEGORIES.values() for name in (*known(category), *heldout(category))}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(nouns)))})\b", re.IGNORECASE)
    assert len(set(lines("common.txt"))) >= 1500
    assert not [line for line in lines("common.txt") if pattern.search(line)]


@pytest.mark.parametrize(
    ("name", "least"),
    [("places", 80), ("styles", 60), ("templates", 20), ("heldout_templates", 10), ("tiny-world", 51)],
)
def test_word_lists_are_long_enough(name: str, least: int):
    assert len(lines(f"{name}.txt")) >= least


def test_a_third_of_the_default_templates_show_a_companion():
    found = lines("templates.txt")
    assert 3 * sum("{y}" in template for template in found) >= len(found)


@pytest.mark.parametrize("name", sorted(STAND_INS))
def test_a_stand_ins_labels_and_words_are_the_embedded_worlds(name: str):
    category = CATEGORIES[name]
    labels = category["labels"]["embedded"]
    assert labels == [noun(concept["name"]) for concept in category["concepts"]]
    assert set(labels) <= set(CONCEPTS)
    kept = [*expand(category["lookalikes"]), *(concept["replacement"] for concept in category["concepts"])]
    assert set(kept) <= set(expand(["tiny-world.txt"]))
    assert set(category["neighbours"]) == STAND_INS - {name}


def test_the_embedded_worlds_list_holds_its_benign_concepts():
    canonical = {noun(line.split("|")[0].strip()) for line in lines("tiny-world.txt")}
    unsafe = {label for name in STAND_INS for label in CATEGORIES[name]["labels"]["embedded"]}
    assert canonical == set(CONCEPTS) - unsafe


@pytest.mark.parametrize("name", sorted(READY))
def test_a_ready_category_is_rich_enough(name: str):
    category = CATEGORIES[name]
    assert len(category["concepts"]) >= 8
    assert len(category["lookalikes"]) >= 10
    assert category["labels"]["clip"]
    assert ("safety-checker" in category["labels"]) == name.endswith("-sexual")
