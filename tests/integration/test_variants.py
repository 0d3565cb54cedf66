"""Variants of harmless subjects: what is asked, what is learned and put into a model, and what is told of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from safepatch import cli
from safepatch.attacks.learning import drawn_by, spoken, word
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, TokenReader, UNetHost, encode, teach
from safepatch.errors import ConfigError, UnknownName, UnsupportedModel
from safepatch.evaluation import plan
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.matrix import Matrix, PatchEntry
from safepatch.models.load import ModelConfig
from safepatch.reporting.html import build_report
from safepatch.results import NONE, read_rows
from safepatch.taxonomy import Category
from safepatch.variants import WAYS, Learning, run_variants, ways
from safepatch.variants.found import Found
from safepatch.variants.prompts import starts, usual_subjects, variants
from safepatch.variants.ways import WORD
from tests.families import small_family_pipe
from tests.small import new_small_pipe, one_at_a_time, small_artifact
from tests.unit.test_suite import NAMES, READER

# diffusers 0.42.1's Euler schedulers turn tensors into arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

EDITS = tuple(name for name in WAYS if name != NONE)
FEW = Learning(EDITS, ("a cat", "a dog"), pictures=2, steps=2, learning_rate=1e-2, rank=2)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small random model by the name of the embedded one, and a judge that sees something unsafe where it is dark."""
    judge = replace(
        READER,
        probabilities=lambda images: (
            (images.mean((1, 2, 3), keepdim=True) < 0.5).float()[:, 0, 0].expand(-1, len(NAMES))
        ),
    )
    monkeypatch.setattr(plan, "require_fit", lambda *_: None)
    monkeypatch.setattr(plan, "open_detector", lambda *_: judge)
    monkeypatch.setattr(ModelConfig, "load", lambda self: new_small_pipe())


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    mine = small_artifact("lora").save(tmp_path / "weapons.safetensors")
    protocol = Protocol(n=4, steps=2, guidance_scale=1.5)
    patches = [PatchEntry("mine", path=str(mine))]
    return Matrix(["tiny-sd"], patches=patches, categories=["weapons"], protocol=protocol, out=str(tmp_path / "out"))


# What is asked


def test_prompts_of_equal_number_differ_by_what_the_subject_is_called_alone() -> None:
    weapons = Corpus.open("weapons")
    plain, learned = (variants(weapons, "a cat", phrase, range(10), 0) for phrase in ("a cat", WORD))
    assert [p.text.replace(WORD, "a cat") for p in learned] == [p.text for p in plain]
    assert all(WORD in p.text and weapons.words.mentions(p.text) for p in learned)
    assert [(p.seed, p.asks) for p in plain] == [(p.seed, p.asks) for p in learned]
    assert {p.asks[1] for p in plain} == {"cat"}
    assert len({p.asks[0] for p in plain}) == 5  # every concept
    begun = starts(weapons, "a cat", range(10), 0)
    assert all("cat" in p.text and not weapons.words.mentions(p.text) for p in begun)
    assert not {p.seed for p in begun} & {p.seed for p in plain}


def test_a_subject_stands_in_the_prompts_of_a_category_without_concepts_too() -> None:
    mine = Corpus(Category("fast-food", "", ""), pairs=[("greasy fries", "a salad"), ("a big burger", "an apple")])
    made = variants(mine, "a dog", "a sks dog", range(3), 0)
    assert [p.text.split(", ")[0] for p in made] == ["a sks dog"] * 3
    assert {p.text.split(", ")[1] for p in made} == {"greasy fries", "a big burger"}


def test_usual_subjects_resemble_no_category() -> None:
    corpora = [Corpus.open(name) for name in ("weapons", "gore")]
    every = usual_subjects(corpora, 99, 0)
    assert "a cat" in every
    assert not {"a spoon", "a hammer", "a carrot", "a droplet"} & set(every)  # replacements and look-alikes
    assert "a spoon" in usual_subjects(corpora[1:], 99, 0)  # control
    assert usual_subjects(corpora, 3, 0) == usual_subjects(corpora, 3, 0) != usual_subjects(corpora, 3, 1)


# What is learned


def test_a_taught_word_is_read_where_it_is_typed_and_nothing_else_changes() -> None:
    pipe = new_small_pipe()
    components, tokenizer = Components.of(pipe), pipe.tokenizer
    reader, size = TokenReader(components), len(tokenizer)
    made = torch.randn(1, 1, reader.table.shape[1], generator=torch.Generator().manual_seed(0))
    texts = ["a picture of a knife", f"a picture of {WORD}"]
    before = encode(components, texts).states
    teach(pipe, WORD, made)
    known, learned = encode(Components.of(pipe), texts).states
    assert torch.equal(known, before[0])
    torch.testing.assert_close(learned[None], spoken(reader, made, 1), rtol=0, atol=1e-5)
    assert not torch.allclose(learned, before[1], atol=1e-2)  # control
    assert len(tokenizer) == size  # whoever shares the tokenizer


def test_a_word_is_learned_of_pictures() -> None:
    host = UNetHost(Components.of(new_small_pipe()))
    reader, loss = TokenReader(host.components), drawn_by(host)
    latents = torch.randn(2, *host.latent_shape, generator=torch.Generator().manual_seed(0))

    def error(steps: int) -> float:
        made = word(reader, host.device, loss, latents, steps, 0, "cat")
        read = host.encode([""])._replace(states=spoken(reader, made, 2).detach())
        with torch.no_grad():
            return sum(float(loss(latents, read, torch.Generator().manual_seed(i))) for i in range(8))

    assert error(40) < error(0)


def test_every_way_is_measured_with_the_patch_and_without_and_a_second_run_draws_and_learns_nothing(
    matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    rows = run_variants(matrix, FEW, said.append)
    assert [line.split(", ")[1:] for line in said] == [
        [subject, way] for subject in FEW.subjects for way in ("as it is", *EDITS)
    ]
    assert read_rows(tmp_path / "out" / "rows.jsonl") == rows
    found = {(row.metric, row.attack, row.patch) for row in rows}
    assert found == {
        (metric, way, patch)
        for metric in ("unsafe_rate", "companion_kept")
        for way in (NONE, *EDITS)
        for patch in (NONE, "mine")
    }
    assert {(row.n, row.prompt_set, row.category) for row in rows} == {(4, "companion", "weapons")}
    sections = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [(each["title"], each["columns"]) for each in sections] == [
        ("weapons, as it is", ["base", "mine"]),
        ("weapons, sdedit", ["the picture edited", "base", "mine"]),
        ("weapons, inversion", ["the subject", "base", "mine"]),
        ("weapons, dreambooth", ["the subject", "base", "mine"]),
    ]
    images = tmp_path / "out" / "images"
    of_base = [(images / each["rows"][0]["images"][-2]).read_bytes() for each in sections]
    assert len(set(of_base)) == 4  # each way changes what the base draws
    assert not any(row["unsafe"][0] for each in sections[1:] for row in each["rows"])
    assert "a sks cat" in json.dumps(sections)
    page = build_report(tmp_path / "out").read_text()
    assert "attack dreambooth" in page
    assert "a cat, a dog" in page
    for name in ("word", "lora"):
        monkeypatch.setattr(ways, name, pytest.fail)
    monkeypatch.setattr(Bench, "_draw", pytest.fail)
    assert run_variants(matrix, FEW, lambda _: None) == rows


def test_a_model_is_let_go_of_before_it_is_opened_again(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    made = one_at_a_time(monkeypatch, new_small_pipe)
    run_variants(replace(matrix, patches=[], pictures=0), replace(FEW, ways=("sdedit",)), lambda _: None)
    assert len(made) == 4


def test_pictures_of_ones_own_are_learned_of(matrix: Matrix, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (80, 60), color).save(own / f"{i}.png")
    learning = replace(FEW, ways=("dreambooth",), subjects=("a dog",), folder=own)
    run_variants(replace(matrix, patches=[], pictures=1), learning, lambda _: None)
    assert f"pictures in {own}" in json.loads((tmp_path / "out" / "protocol.json").read_text())["learned of"]
    kept = list((tmp_path / "out" / "drawn").glob("lora-*"))
    run_variants(replace(matrix, patches=[]), replace(learning, folder=None), lambda _: None)
    assert len(list((tmp_path / "out" / "drawn").glob("lora-*"))) == 2 > len(kept)  # control: others teach another


# What is refused


def test_what_cannot_be_asked_is_one_line(matrix: Matrix, tmp_path: Path) -> None:
    cases = [
        (lambda: Learning(ways=("dreamboth",)), UnknownName, "did you mean 'dreambooth'"),
        (lambda: Learning(steps=0), ConfigError, "at least 1"),
        (lambda: Learning(strength=1.5), ConfigError, "at most 1"),
        (lambda: Learning(folder=tmp_path), ConfigError, "say which: --subject"),
        (lambda: run_variants(matrix, replace(FEW, subjects=("a kitchen knife",))), ConfigError, "of category weapons"),
        (lambda: run_variants(matrix, replace(FEW, count=9, subjects=())), ConfigError, "4 images per rate for 9"),
        (lambda: run_variants(replace(matrix, models=["./mine"]), FEW), ConfigError, "need a judge"),
        (
            lambda: run_variants(matrix, replace(FEW, subjects=("a cat",), folder=tmp_path / "none")),
            ConfigError,
            "no pictures in",
        ),
    ]
    for make, error, said in cases:
        with pytest.raises(error, match=said) as caught:
            make()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    bench = Bench("m", small_family_pipe("sdxl", transformer_layers_per_block=1), None, Protocol(n=1))
    with pytest.raises(UnsupportedModel, match="one CLIP text encoder"):
        ways.inversion(bench, "a cat", FEW, [])


def test_the_verb_prints_a_table_and_names_its_page(matrix: Matrix, tmp_path: Path) -> None:
    words = ["variants", "--category", "weapons", "--patch", str(matrix.patches[0].path), "--subject", "a cat"]
    words += ["--way", "sdedit", "-n", "2", "--steps", "2", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "| metric | attack | base | patch | detector | weapons |" in done.stdout
    assert "| unsafe_rate | sdedit | tiny-sd | weapons | embedded |" in done.stdout
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_patch_that_was_trained_again_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    """In one process, as notebooks do; within a run each file is opened once."""
    path = tmp_path / "mine.safetensors"
    one, two = (small_artifact("lora", seed) for seed in (0, 1))
    one.save(path)
    first = Found()
    assert first.patch(path) is first.patch(path)
    two.save(path)
    found = [each.patch(path) for each in (first, Found())]
    assert [patch.content_hash for patch in found if patch] == [one.content_hash, two.content_hash]
    assert Found().patch(None) is None
