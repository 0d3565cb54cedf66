"""Pairs: one scene twice, one concept apart; what is preserved; and batches that a seed and a step stand for."""

import re
from collections import Counter
from dataclasses import fields

import pytest
import torch

from safepatch.data.pairs import (
    RETAIN_SHARES,
    Batch,
    Example,
    PairBank,
    PairsConfig,
    build_bank,
    pair_examples,
    retain_examples,
)
from safepatch.data.prompts import mentions_minors, unsafe_prompts
from safepatch.diffusion import Components, encode_prompts, generate_latents
from safepatch.errors import ConfigError, SafepatchError
from safepatch.taxonomy import CATEGORIES
from safepatch.tiny.scenes import draw, to_tensor
from safepatch.tiny.world import BENIGN, CONCEPTS, KNOWN, phrase

every_category = pytest.mark.parametrize("name", sorted(CATEGORIES))
BENIGN_NAMES = {concept.name for concept in BENIGN}
HELDOUT_NAMES = [noun for concept in CONCEPTS.values() for noun in concept.heldout]
N = 120


def wordings(example: Example) -> list[tuple[str, tuple[str, ...]]]:
    """Every (known template, nouns) that reads as this caption; held-out ones give none."""
    names = example.scene.concepts
    found = []
    for template in KNOWN.one if len(names) == 1 else KNOWN.two:
        for left in CONCEPTS[names[0]].known_names:
            for right in CONCEPTS[names[-1]].known_names:
                text = template.format(x=phrase(left), y=phrase(right), c=example.scene.color)
                found += [(template, (left, right))] if text == example.text else []
    return found


# ---- pairs -----------------------------------------------------------------------------------------------------


@every_category
def test_the_members_of_a_pair_differ_in_one_concept_alone(name):
    replacement = {concept.name: concept.replacement for concept in CATEGORIES[name].concepts}
    for unsafe, safe in pair_examples(CATEGORIES[name], N, seed=0):
        assert (unsafe.scene.color, unsafe.scene.shade) == (safe.scene.color, safe.scene.shade)
        layouts = [[(item.x, item.y, item.size) for item in e.scene.items] for e in (unsafe, safe)]
        assert layouts[0] == layouts[1]
        changed = [(a, b) for a, b in zip(unsafe.scene.concepts, safe.scene.concepts, strict=True) if a != b]
        assert len(changed) == 1  # control: there is a difference
        assert replacement[changed[0][0]] == changed[0][1]
        assert set(safe.scene.concepts) <= BENIGN_NAMES


@every_category
def test_the_captions_of_a_pair_share_template_and_companion(name):
    """Else a patch would learn the change of wording too."""
    for unsafe, safe in pair_examples(CATEGORIES[name], N, seed=0):
        kept = [i for i, concept in enumerate(unsafe.scene.concepts) if concept in safe.scene.concepts]
        first, second = (
            {(template, *(nouns[i] for i in kept)) for template, nouns in wordings(member)} for member in (unsafe, safe)
        )
        assert first & second, (unsafe.text, safe.text)
        assert unsafe.text != safe.text  # control


@every_category
def test_pairs_cover_every_concept_and_companions(name):
    made = pair_examples(CATEGORIES[name], N, seed=0)
    concepts = {concept.name for concept in CATEGORIES[name].concepts}
    seen = Counter(concept for unsafe, _ in made for concept in unsafe.scene.concepts if concept in concepts)
    assert seen == dict.fromkeys(concepts, N // len(concepts))
    two = sum(len(unsafe.scene.concepts) == 2 for unsafe, _ in made)
    assert 0.5 * N < two < 0.8 * N
    left = sum(unsafe.scene.concepts[0] in concepts for unsafe, _ in made if len(unsafe.scene.concepts) == 2)
    assert 0.25 * two < left < 0.75 * two  # on either side
    for unsafe, safe in made:
        assert len(set(safe.scene.concepts)) == len(safe.scene.concepts), unsafe  # no scene of two equal things


@every_category
def test_pictures_of_a_pair_are_equal_away_from_the_change(name):
    for unsafe, safe in pair_examples(CATEGORIES[name], 6, seed=0):
        pictures = to_tensor([draw(unsafe.scene), draw(safe.scene)])
        pairs = zip(unsafe.scene.items, safe.scene.items, strict=True)
        (item,) = [a for a, b in pairs if a.concept != b.concept]
        different = (pictures[0] != pictures[1]).any(0)
        ys, xs = different.nonzero(as_tuple=True)
        assert len(ys) > 50  # control
        reach = item.size / 2 + 1
        assert (ys - item.y).abs().max() <= reach
        assert (xs - item.x).abs().max() <= reach


@every_category
def test_training_captions_hold_no_heldout_wording_and_no_minors(name):
    pairs = [example for pair in pair_examples(CATEGORIES[name], N, seed=0) for example in pair]
    kept = [example for example in retain_examples(CATEGORIES[name], N, seed=0) if example.text]
    heldout = unsafe_prompts(CATEGORIES[name], 30, seed=0, heldout=True)
    nouns = re.compile(rf"\b({'|'.join(map(re.escape, HELDOUT_NAMES))})\b")
    for example in (*pairs, *kept):
        assert wordings(example), example.text  # a known template with known names, and so nothing else
        assert not nouns.search(example.text)
        assert not mentions_minors(example.text)
    assert all(nouns.search(prompt.text) for prompt in heldout)  # control


def test_equal_seeds_give_equal_examples_and_others_do_not():
    for make in (pair_examples, retain_examples):
        first, again, other = (make(CATEGORIES["gore"], 20, seed) for seed in (0, 0, 1))
        assert first == again
        assert first != other  # control
    assert pair_examples(CATEGORIES["gore"], 5, 0) == pair_examples(CATEGORIES["gore"], 20, 0)[:5]


# ---- what is preserved -----------------------------------------------------------------------------------------


def test_shares_are_a_distribution():
    assert sum(RETAIN_SHARES.values()) == pytest.approx(1)


@every_category
def test_preserved_examples_are_mixed_as_said(name):
    category, n = CATEGORIES[name], 1000
    made = retain_examples(category, n, seed=0)
    own = {concept.name for concept in category.concepts}
    others = {c.name for other in CATEGORIES.values() for c in other.concepts} - own
    assert not [example for example in made if own & set(example.scene.concepts)]  # never what is to be removed
    empty = sum(not example.text for example in made)
    other = sum(bool(others & set(example.scene.concepts)) for example in made)
    assert abs(empty / n - RETAIN_SHARES["empty"]) < 0.04
    assert abs(other / n - RETAIN_SHARES["other"]) < 0.04
    similar = [example for example in made if example.text and set(category.lookalikes) & set(example.scene.concepts)]
    assert len(similar) / n > RETAIN_SHARES["lookalike"]  # these, and those that benign scenes hold by chance
    assert others <= {concept for example in made for concept in example.scene.concepts}


# ---- the bank --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank() -> PairBank:
    """Rows whose every value is their number: pairs count from 0, preserved rows from 100."""
    shapes = {"latents": (4, 2, 2), "states": (3, 5)}
    rows = {}
    for name in (field.name for field in fields(Batch)):
        shape = shapes[name.rpartition("_")[2]]
        numbers = torch.arange(10.0) + (100 if name.startswith("retain") else 0)
        rows[name] = numbers.view(-1, *[1] * len(shape)).expand(10, *shape)
    return PairBank(Batch(**rows))


def rows_of(batch: Batch) -> dict[str, list[float]]:
    return {field.name: getattr(batch, field.name).flatten(1)[:, 0].tolist() for field in fields(Batch)}


def test_a_batch_keeps_the_members_of_each_pair_together(bank):
    assert len(bank) == 10
    rows = rows_of(bank.batch(step=0, size=6, seed=0))
    assert rows["unsafe_latents"] == rows["safe_latents"] == rows["unsafe_states"] == rows["safe_states"]
    assert rows["retain_latents"] == rows["retain_states"]
    assert all(row >= 100 for row in rows["retain_latents"])
    assert len(rows["unsafe_latents"]) == len(rows["retain_latents"]) == 6


def test_a_batch_is_a_function_of_step_and_seed(bank):
    first = rows_of(bank.batch(3, 6, 0))
    torch.manual_seed(1)
    assert rows_of(bank.batch(3, 6, 0)) == first
    assert rows_of(bank.batch(4, 6, 0)) != first  # control
    assert rows_of(bank.batch(3, 6, 1)) != first


def test_every_row_comes_up(bank):
    seen = {row for step in range(20) for rows in rows_of(bank.batch(step, 6, 0)).values() for row in rows}
    assert seen == {*range(10), *range(100, 110)}


def test_a_batch_may_be_larger_than_the_bank(bank):
    assert len(bank.batch(0, 25, 0).unsafe_latents) == 25


def test_a_bank_is_built_with_the_hosts_own_encoders(small_pipe):
    host, config = Components.of(small_pipe).freeze(), PairsConfig(pairs=3, vendor="twemoji")
    rows = build_bank(host, CATEGORIES["weapons"], config).rows
    assert rows.unsafe_latents.shape == rows.safe_latents.shape == rows.retain_latents.shape == (3, 4, 16, 16)
    assert rows.unsafe_states.shape == rows.safe_states.shape == rows.retain_states.shape == (3, 24, 192)
    texts = [unsafe.text for unsafe, _ in pair_examples(CATEGORIES["weapons"], 3, config.seed)]
    embeds, _ = small_pipe.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(rows.unsafe_states, embeds)  # the states that the pipeline itself would use
    assert torch.equal(rows.unsafe_states, encode_prompts(host, texts))
    assert not torch.equal(rows.safe_states, rows.unsafe_states)  # control
    other = build_bank(host, CATEGORIES["weapons"], PairsConfig(pairs=3)).rows
    assert not torch.equal(other.unsafe_latents, rows.unsafe_latents)  # control: another vendor's art
    assert torch.equal(other.unsafe_states, rows.unsafe_states)


@pytest.mark.parametrize("settings", [{"pairs": 0}, {"pairs": -3}, {"latents": "dreams"}])
def test_nonsense_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"data\.") as caught:
        PairsConfig(**settings)
    assert "\n" not in str(caught.value)


def test_an_unknown_vendor_is_one_line():
    (pair,) = pair_examples(CATEGORIES["gore"], 1, seed=0)
    with pytest.raises(SafepatchError, match="no sprite atlas") as caught:
        draw(pair[0].scene, "acme")
    assert "\n" not in str(caught.value)


def test_trajectories_are_the_models_own_latents_and_scenes_are_not(small_pipe):
    components = Components.of(small_pipe)
    banks = [
        build_bank(components, CATEGORIES["weapons"], PairsConfig(pairs=2, latents=x))
        for x in ("trajectories", "scenes")
    ]
    made = generate_latents(components, [pair_examples(CATEGORIES["weapons"], 2, 0)[0][0].text], [0])
    ours, drawn = (bank.rows.unsafe_latents[:1] for bank in banks)
    assert ours.shape == drawn.shape
    assert torch.allclose(ours, made, atol=1e-4)
    assert not torch.allclose(drawn, made, atol=1e-2)  # control
