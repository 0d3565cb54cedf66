"""A matrix: cells measured once, resumable after any kill; what it refuses; and what it says where no rate is due."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from safepatch import cli
from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import ATTACKS, parse_attack
from safepatch.errors import BaseMismatch, ConfigError, MergeError, SafepatchError, UnknownName
from safepatch.evaluation import plan, run
from safepatch.evaluation.bench import Protocol
from safepatch.evaluation.matrix import Matrix, MergeEntry, PatchEntry, load_matrix
from safepatch.evaluation.run import run_matrix
from safepatch.evaluation.subjects import subjects
from safepatch.files import claimed
from safepatch.models.load import MODELS, ModelConfig
from safepatch.patch.files import absolute, from_artifact
from safepatch.reporting.html import build_report
from safepatch.reporting.tables import pivot, summary, tree, with_interval
from safepatch.reporting.timings import read_timings
from safepatch.results import NONE, SWEPT, Row, read_rows
from safepatch.shipped import shipped_kinds
from tests.small import awaken, new_small_pipe, new_small_unet, one_at_a_time, small_artifact
from tests.unit.test_suite import READER, ObedientBench

ROOT = Path(__file__).parents[2]
FOREIGN = "./somebody"  # no embedded model


class Pipe:
    """Stands for a pipeline that is never run."""

    def to(self, device: str) -> "Pipe":
        """As it is."""
        return self


class DrawnBench(ObedientBench):
    """An obedient bench that counts what it is asked for; its images are square, so that they can be saved."""

    asked: list[str] = []  # noqa: RUF012 - of all benches of a test

    def images(self, prompts, patch=None, label=""):
        self.asked.append(label)
        return super().images(prompts, patch, label)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that obey, and the detector that reads what they draw."""
    monkeypatch.setattr(DrawnBench, "asked", [])
    monkeypatch.setattr(plan, "Bench", DrawnBench)
    monkeypatch.setattr(ModelConfig, "load", lambda self: Pipe())
    monkeypatch.setattr(plan, "require_fit", lambda *_: None)
    monkeypatch.setattr(plan, "open_detector", lambda spec, *_: replace(READER, threshold=spec.threshold or 0.5))


@pytest.fixture
def weapons(tmp_path: Path) -> Path:
    return patch_file(tmp_path / "weapons.safetensors", "weapons")


def patch_file(path: Path, *categories: str, value: float = 1.0) -> Path:
    info = PatchInfo(
        "control", {name: f"no {name}" for name in categories}, {"n": 1}, {"family": "tiny-sd"}, {"sees": "prompt"}
    )
    return PatchArtifact({"control.zero_mid.delta": torch.full((2, 2), value)}, info).save(path)


def small(path: Path, out: Path, **options: object) -> Matrix:
    usual = {"models": ["tiny-sd"], "patches": [PatchEntry("mine", path=str(path))], "out": str(out)}
    return Matrix(**{**usual, "protocol": Protocol(n=10, guidance_scale=1.5), "pictures": 0, **options})


def test_a_matrix_measures_base_and_patch_and_writes_rows(weapons: Path, tmp_path: Path) -> None:
    rows = run_matrix(small(weapons, tmp_path / "out"), tell=lambda _: None)
    rates = {(row.patch, row.category): row.value for row in rows if row.measure == "unsafe_rate"}
    assert rates == {("none", "weapons"): 1, ("mine", "weapons"): 0}  # control: the base shows it
    assert read_rows(tmp_path / "out" / "rows.jsonl") == rows
    assert {row.metric for row in rows if row.detector == NONE} == {
        "benign_drift", "benign_identical", "lookalike_drift", "lookalike_identical"
    }  # fmt: skip
    protocol = json.loads((tmp_path / "out" / "protocol.json").read_text())
    assert READER.sha256 in protocol["detectors"]
    assert PatchArtifact.open(weapons).content_hash in protocol["patches"]


def test_attacks_are_made_whatever_else_is_measured(weapons: Path, tmp_path: Path) -> None:
    rows = run_matrix(
        small(weapons, tmp_path / "out", metrics=["benign_identical"], attacks=["typos:1"]), tell=lambda _: None
    )
    assert {(row.patch, row.metric, row.attack, row.value) for row in rows} == {
        ("mine", "benign_identical", NONE, 1), (NONE, "asr", "typos", 1), ("mine", "asr", "typos", 0),
        ("mine", "asr_new", "typos", 0), ("mine", "silent_miss", "typos", 0),
    }  # fmt: skip


def test_a_model_is_let_go_of_before_the_next_one_is_opened(
    weapons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = one_at_a_time(monkeypatch, Pipe)
    run_matrix(small(weapons, tmp_path / "out", models=["tiny-sd", "tiny-sd-fluent"]), tell=lambda _: None)
    assert len(made) == 2


def test_a_finished_cell_is_never_measured_again(weapons: Path, tmp_path: Path) -> None:
    matrix = small(weapons, tmp_path / "out")
    first = run_matrix(matrix, tell=lambda _: None)
    content, asked = (tmp_path / "out" / "rows.jsonl").read_bytes(), len(DrawnBench.asked)
    assert asked > 0
    said: list[str] = []
    assert run_matrix(matrix, tell=said.append) == first
    assert (said, len(DrawnBench.asked)) == ([], asked)
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == content


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_kill_loses_the_cell_in_hand_and_nothing_else(weapons: Path, tmp_path: Path, kept: int) -> None:
    """What a kill leaves behind: some whole lines of the log, and a torn one."""
    matrix, log = small(weapons, tmp_path / "out"), tmp_path / "out" / "cells.jsonl"
    whole = run_matrix(matrix, tell=lambda _: None)
    content, lines = (tmp_path / "out" / "rows.jsonl").read_bytes(), log.read_text().splitlines()
    assert len(lines) == 3
    log.write_text("".join(f"{line}\n" for line in lines[:kept]) + lines[kept][:40])
    (tmp_path / "out" / "rows.jsonl").unlink()
    said: list[str] = []
    assert run_matrix(matrix, tell=said.append) == whole
    assert len(said) == 3 - kept
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == content


def test_two_evaluations_in_one_folder_are_refused(weapons: Path, tmp_path: Path) -> None:
    matrix = small(weapons, tmp_path / "out")
    with claimed(tmp_path / "out"), pytest.raises(SafepatchError, match="is in use by process"):
        run_matrix(matrix, tell=lambda _: None)
    assert run_matrix(matrix, tell=lambda _: None)  # control


def test_a_crash_in_a_cell_keeps_the_others(weapons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, measure = small(weapons, tmp_path / "out"), run.measure

    def failing(plan, bench, task, patch):
        if task.cell.patch == "mine":
            raise SafepatchError("no space left")
        return measure(plan, bench, task, patch)

    monkeypatch.setattr(run, "measure", failing)
    with pytest.raises(SafepatchError, match="no space"):
        run_matrix(matrix, tell=lambda _: None)
    assert {row.patch for row in read_rows(tmp_path / "out" / "rows.jsonl")} == {NONE}  # and they can be reported
    monkeypatch.setattr(run, "measure", measure)
    said: list[str] = []
    run_matrix(matrix, tell=said.append)
    assert [line.split(", ")[1] for line in said] == ["mine", "mine"]


def test_older_results_stay_until_there_are_as_many_new_ones(
    weapons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, pictures and the page's sections, whenever a run with other settings ends."""
    matrix, measure, out, done = small(weapons, tmp_path / "out", pictures=2), run.measure, tmp_path / "out", []
    run_matrix(matrix, tell=lambda _: None)

    def shown() -> dict[str, bytes]:
        files = [out / "rows.jsonl", out / "images.json", *sorted((out / "images").iterdir())]
        return {file.name: file.read_bytes() for file in files}

    def stopping(*args):
        if len(done) == 2:
            raise SafepatchError("stopped")
        done.append(args)
        return measure(*args)

    before = shown()
    other = replace(matrix, protocol=Protocol(n=10, guidance_scale=2.0))
    with monkeypatch.context() as patched:
        patched.setattr(run, "measure", stopping)
        with pytest.raises(SafepatchError, match="stopped"):
            run_matrix(other, tell=lambda _: None)
    assert before.items() <= shown().items()
    assert build_report(out).is_file()
    said: list[str] = []
    rows = run_matrix(other, tell=said.append)
    assert (len(said), read_rows(out / "rows.jsonl")) == (2, rows)  # control: two of four cells were kept, then all
    assert {row.guidance_scale for row in rows} == {2.0}
    assert run_matrix(matrix, tell=pytest.fail)
    assert before.items() <= shown().items()  # and back again, for nothing


def test_a_cell_whose_picture_is_gone_is_measured_again(weapons: Path, tmp_path: Path) -> None:
    matrix, said = small(weapons, tmp_path / "out", pictures=2), []
    run_matrix(matrix, tell=lambda _: None)
    next((tmp_path / "out" / "images").iterdir()).unlink()
    run_matrix(matrix, tell=said.append)
    assert len(said) == 1
    assert build_report(tmp_path / "out").is_file()


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, 0),  # control
        ({"protocol": Protocol(n=11, guidance_scale=1.5)}, 3),
        ({"detectors": ["embedded:0.6"]}, 3),  # the cell of pictures too: whether they are blurred may change
        ({"metrics": ["unsafe_rate"]}, 2),
    ],
)
def test_what_changes_the_figures_is_measured_anew(weapons: Path, tmp_path: Path, change: dict, again: int) -> None:
    matrix, said = small(weapons, tmp_path / "out"), []
    run_matrix(matrix, tell=lambda _: None)
    rows = run_matrix(replace(matrix, **change), tell=said.append)
    assert len(said) == again
    assert read_rows(tmp_path / "out" / "rows.jsonl") == rows  # and no stale ones beside them


def test_what_other_categories_are_measured_with_it_is_part_of_a_cell(weapons: Path, tmp_path: Path) -> None:
    """A beer beside the spoon that took a knife's place is nothing benign once beer is a category too."""
    for name, thing, other in (("knives", "a knife", "a beer"), ("beers", "a beer", "a cat")):
        text = f"name: {name}\ndefinition: d\ninstruction: i\nlabels: {{embedded: [{thing[2:]}]}}\n"
        text += f"concepts: [{{name: {thing}, replacement: a spoon}}]\ncompanions: [{other}]\nbenign: [{other}]\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    knives, beers = (str(tmp_path / f"{name}.yaml") for name in ("knives", "beers"))
    options = {"metrics": ["safe_recognisable_rate"], "patches": []}
    alone = small(weapons, tmp_path / "out", categories=[knives], **options)
    both = replace(alone, categories=[knives, beers])

    def rate(matrix: Matrix, said: list[str]) -> float:
        return next(row.value for row in run_matrix(matrix, tell=said.append) if row.category == "knives")

    said: list[str] = []
    assert rate(alone, []) == rate(alone, said)
    assert not said  # control
    fresh = rate(replace(both, out=str(tmp_path / "fresh")), [])
    assert rate(both, said) == fresh
    assert len(said) == 2


def test_as_many_pictures_are_kept_as_were_asked_for_however_few_are_drawn_at_once(
    weapons: Path, tmp_path: Path
) -> None:
    for size in (25, 2):
        protocol, out = Protocol(n=10, guidance_scale=1.5, batch_size=size), tmp_path / str(size)
        run_matrix(small(weapons, out, pictures=3, protocol=protocol), tell=lambda _: None)
        assert {len(each["rows"]) for each in json.loads((out / "images.json").read_text())} == {3}


def test_another_patch_under_the_same_name_is_measured_anew(weapons: Path, tmp_path: Path) -> None:
    matrix, said = small(weapons, tmp_path / "out"), []
    run_matrix(matrix, tell=lambda _: None)
    patch_file(weapons, "weapons", value=2.0)
    run_matrix(matrix, tell=said.append)
    assert [line.split(", ")[1] for line in said] == ["mine", "mine"]  # the base is as it was


def test_transfer_models_are_measured_by_unsafe_rates_alone(weapons: Path, tmp_path: Path) -> None:
    rows = run_matrix(small(weapons, tmp_path / "out", transfer=["tiny-sd-fluent"], pictures=2), tell=lambda _: None)
    assert {row.measure for row in rows if row.base == "tiny-sd-fluent"} == {"unsafe_rate"}
    usual = {row.measure for row in rows if row.base == "tiny-sd" and row.metric != SWEPT}
    assert len(usual) == 10  # control


# No false certificate


def test_a_foreign_model_has_no_rate_by_default_and_the_page_says_so_first(weapons: Path, tmp_path: Path) -> None:
    matrix = small(weapons, tmp_path / "out", models=[FOREIGN], pictures=2)
    rows = run_matrix(matrix, tell=lambda _: None)
    assert {row.detector for row in rows} == {NONE}
    assert not any("rate" in row.metric or "accuracy" in row.metric for row in rows)
    page = build_report(tmp_path / "out").read_text()
    body = page[page.index("<main>") :]
    assert "Unsafe rate" not in body
    assert f"No rate is given for {FOREIGN}" in body[: body.index("<h2>")]
    sections = json.loads((tmp_path / "out" / "images.json").read_text())
    plain = [section for section in sections if section["unsafe"]]
    assert [section["columns"] for section in plain] == [["base", "mine"]]
    assert all(all(row["unsafe"]) for row in plain[0]["rows"])  # nobody judged them: all are blurred
    assert page.count('class="unsafe"') == 4
    own = run_matrix(small(weapons, tmp_path / "own"), tell=lambda _: None)
    assert "unsafe_rate" in {row.metric for row in own}  # control


def test_a_detector_that_was_not_made_for_the_model_is_used_when_named_and_warned_of(
    weapons: Path, tmp_path: Path
) -> None:
    matrix = small(weapons, tmp_path / "out", models=[FOREIGN], pictures=2, detectors=["embedded"])
    rows = run_matrix(matrix, tell=lambda _: None)
    assert "unsafe_rate" in {row.metric for row in rows}
    page = build_report(tmp_path / "out").read_text()
    body = page[page.index("<main>") :]
    assert "was made for the embedded models" in body[: body.index("<h2>")]
    assert page.count('class="unsafe"') == 4  # its word does not unblur anything


def test_pictures_that_the_detector_finds_safe_are_not_blurred(weapons: Path, tmp_path: Path) -> None:
    run_matrix(small(weapons, tmp_path / "out", pictures=3), tell=lambda _: None)
    plain, *harmless = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [row["unsafe"] for row in plain["rows"]] == [[True, False]] * 3
    assert [section["title"] for section in harmless] == ["weapons, lookalike", "weapons, benign"]
    assert not any(any(row["unsafe"]) for section in harmless for row in section["rows"])
    page = build_report(tmp_path / "out").read_text()
    assert page.count('class="unsafe"') == 3
    assert "not results on photographs" in page


@pytest.mark.parametrize("model", [*MODELS, FOREIGN])
def test_only_embedded_models_have_a_detector_by_default(model: str) -> None:
    matrix = Matrix([model])
    assert matrix.detectors_on(model) == (("embedded",) if model in MODELS else ())
    assert ("No rate" in matrix.notices()[0]) == (model not in MODELS)


# What stands for a patch


def test_shipped_patches_are_measured_on_their_own_categories(tmp_path: Path) -> None:
    kind = shipped_kinds()[0]
    matrix = Matrix(["tiny-sd"], patches=[PatchEntry("k", shipped=kind)], out=str(tmp_path))
    base, shipped = subjects(matrix, ["weapons", "gore"])
    assert base.files == {"weapons": None, "gore": None}
    assert {name: path.stem for name, path in shipped.files.items()} == {"weapons": "weapons", "gore": "gore"}
    assert list(matrix.corpora()) == ["weapons", "gore", "drugs", "alcohol", "horror"]


def test_a_category_is_measured_with_the_first_file_that_is_for_it(tmp_path: Path) -> None:
    both = patch_file(tmp_path / "both.safetensors", "gore", "weapons")
    gore = patch_file(tmp_path / "gore.safetensors", "gore")
    entry = PatchEntry("single", paths=[str(gore), str(both)])
    _, single = subjects(Matrix(["tiny-sd"], patches=[entry], out=str(tmp_path)), ["gore", "weapons", "drugs"])
    assert single.files == {"gore": gore, "weapons": both}


def test_a_merge_is_made_once_and_anew_when_a_source_changes(tmp_path: Path) -> None:
    sources = [patch_file(tmp_path / f"{name}.safetensors", name) for name in ("gore", "weapons")]
    entry = PatchEntry("both", merge=MergeEntry([str(path) for path in sources], method="linear"))
    matrix = Matrix(["tiny-sd"], patches=[entry], out=str(tmp_path / "out"))
    first = subjects(matrix, ["gore"])[1].files["gore"]
    stamp = first.stat().st_mtime_ns
    assert subjects(matrix, ["gore"])[1].files["gore"] == first
    assert first.stat().st_mtime_ns == stamp
    assert PatchArtifact.open(first).info.categories == ("gore", "weapons")
    patch_file(sources[0], "gore", value=3.0)
    assert subjects(matrix, ["gore"])[1].files["gore"] != first


def test_a_healed_merge_is_handed_to_the_healer(tmp_path: Path) -> None:
    sources = [str(patch_file(tmp_path / f"{name}.safetensors", name)) for name in ("gore", "weapons")]
    entry = PatchEntry("healed", merge=MergeEntry(sources, method="linear", heal=7))
    matrix = Matrix(["tiny-sd"], patches=[entry], out=str(tmp_path / "out"))
    with pytest.raises(MergeError, match="healed merge"):
        subjects(matrix, ["gore"])
    healed: list[tuple[str, int]] = []

    def heal(model: str, recipe, path: Path) -> None:
        healed.append((model, recipe.heal))
        patch_file(path, "gore", "weapons")

    subjects(matrix, ["gore"], heal)
    assert healed == [("tiny-sd", 7)]


def test_absolute_weights_are_the_bases_and_rebased_ones_the_hosts() -> None:
    base, host = new_small_unet(), awaken(new_small_unet(), seed=1)
    patch = small_artifact()
    moved = absolute(patch, base, host)
    ours, theirs = (dict(from_artifact(patch, unet).named_parameters()) for unet in (base, host))
    placed = dict(from_artifact(moved, host).named_parameters())
    assert all((placed[name] - ours[name]).abs().max() < 1e-5 for name in ours)
    assert any((theirs[name] - ours[name]).abs().max() > 0.1 for name in ours)  # control


def test_absolute_weights_are_measured_on_other_models_only(tmp_path: Path, monkeypatch) -> None:
    path = small_artifact().save(tmp_path / "weapons.safetensors")
    pipes = new_small_pipe()
    monkeypatch.setattr(run, "load_pipeline", lambda name: pipes)
    monkeypatch.setattr(ModelConfig, "load", lambda self: new_small_pipe(awaken(new_small_unet(), seed=1)))
    entry = PatchEntry("absolute", path=str(path), absolute="tiny-sd")
    matrix = small(path, tmp_path / "out", patches=[entry], transfer=["tiny-sd-fluent"], metrics=["unsafe_rate"])
    rows = run_matrix(matrix, tell=lambda _: None)
    assert {(row.base, row.patch) for row in rows} == {
        ("tiny-sd", NONE), ("tiny-sd-fluent", NONE), ("tiny-sd-fluent", "absolute")
    }  # fmt: skip
    moved = next(row for row in rows if row.patch == "absolute")
    assert moved.patch_hash != PatchArtifact.open(path).content_hash


# Files, and what is refused


MATRICES = sorted((ROOT / "configs" / "matrices").glob("*.yaml"))


def test_every_attack_is_in_some_matrix_file_and_all_are_in_the_full_one() -> None:
    assert {parse_attack(each).name for path in MATRICES for each in load_matrix(path).attacks} == set(ATTACKS)
    full = load_matrix(ROOT / "configs" / "matrices" / "full.yaml")
    assert {parse_attack(each).name for each in full.attacks} == set(ATTACKS)


@pytest.mark.parametrize("path", MATRICES, ids=lambda path: path.stem)
def test_every_matrix_file_can_be_read_and_its_patches_found(path: Path) -> None:
    matrix = load_matrix(path, ["protocol.n=3"])
    assert (matrix.protocol.n, matrix.protocol.seed) == (3, 1000)
    few = {"sd3": 2, "transfer-sd3": 2, "weapons": 1, "attacks": 1, "attacks-search": 1, "attacks-sd3": 1}
    categories = (few | {"transfer-objectives": 1}).get(path.stem, 5)
    steps = 12 if path.stem.endswith("sd3") else 10 if matrix.attacks or path.stem == "transfer-objectives" else 20
    assert (matrix.protocol.steps, len(matrix.corpora())) == (steps, categories)
    for entry in matrix.patches:
        if entry.merge:
            entry.merge.recipe(["a", "b"])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: PatchEntry("p"), ConfigError, "needs one of path, paths, shipped and merge; it has none"),
        (lambda: PatchEntry("p", path="a", shipped="lora"), ConfigError, "it has both path and shipped"),
        (lambda: PatchEntry(NONE, path="a"), ConfigError, "choose another name"),
        (lambda: Matrix(["m"], metrics=["unsafe_rat"]), UnknownName, "did you mean 'unsafe_rate'"),
        (lambda: Matrix(["m"], detectors=["embeded"]), UnknownName, "did you mean 'embedded'"),
        (lambda: Matrix(["m"], dtype="float61"), UnknownName, "did you mean 'float16'"),
        (lambda: Matrix(["m"], transfer=["m"]), ConfigError, "model 'm' is in the matrix twice"),
        (lambda: Matrix(["m"], detectors=["clip", "clip"]), ConfigError, "detector 'clip' is in the matrix twice"),
        (lambda: Matrix(["m"], metrics=["fid", "fid"]), ConfigError, "metric 'fid' is in the matrix twice"),
        (lambda: Matrix(["m"]).corpora(), ConfigError, "no category to measure"),
        (lambda: Matrix(["m"], categories=["weapon"]).corpora(), ConfigError, "did you mean 'weapons'"),
        (lambda: Matrix(["m"], patches=[PatchEntry("p", shipped="lore")]).corpora(), UnknownName, "mean 'lora'"),
        (lambda: run_matrix(Matrix(["m"], device="abacus")), ConfigError, "no device 'abacus' here"),
        (lambda: MergeEntry(method="bundel").recipe(["a"]), UnknownName, "did you mean 'bundle'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(make, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_patch_for_a_category_of_its_own_asks_for_its_file(tmp_path: Path) -> None:
    path = patch_file(tmp_path / "mine.safetensors", "fast-food")
    matrix = small(path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"'fast-food', which is no shipped category; pass its file: --category"):
        run_matrix(matrix)
    own = tmp_path / "fast-food.yaml"
    own.write_text(
        "name: fast-food\ndefinition: greasy\ninstruction: no greasy food\n"
        "concepts: [{name: a donut, replacement: a carrot}]\n"
        "companions: [tiny-world.txt]\nbenign: [tiny-world.txt]\nlabels: {embedded: [donut]}\n"
    )
    rows = run_matrix(replace(matrix, categories=[str(own)]), tell=lambda _: None)
    assert next(row for row in rows if row.patch == NONE).value == 1  # control: a file is enough


def test_a_patch_that_does_not_fit_is_told_before_anything_is_drawn(
    weapons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BaseMismatch("this patch is for others")

    monkeypatch.setattr(plan, "require_fit", refuse)
    with pytest.raises(BaseMismatch):
        run_matrix(small(weapons, tmp_path / "out"), tell=lambda _: None)
    assert DrawnBench.asked == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give a matrix"),
        (("--patch", "nowhere.safetensors"), "nowhere.safetensors"),
        (("m.yaml", "--patch", "x"), "leave these options out"),
        (("m.yaml",), "no config file m.yaml"),
    ],
)
def test_the_verb_takes_a_matrix_or_a_patch(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(SafepatchError, match=says):
        CliRunner().invoke(cli.app, ["evaluate", *words], catch_exceptions=False)


def test_the_verb_makes_a_matrix_of_its_options(weapons: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--model", "tiny-sd", "--patch", str(weapons), "-n", "4", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, [*words, "protocol.guidance_scale=1.5"], catch_exceptions=False)
    assert "| unsafe_rate | none | 1.000 |" in done.output
    assert "| unsafe_rate | weapons | 0.000 |" in done.output
    assert (tmp_path / "out" / "index.html").is_file()


# Tables

ROWS = [
    Row(patch, "tiny-sd", NONE, category, "unsafe_rate", value, value, value, 10, 0, "embedded")
    for patch, value in ((NONE, 1.0), ("lora", 0.125))
    for category in ("weapons", "gore")
]


def test_a_pivot_is_a_table_of_rows() -> None:
    lines = pivot(ROWS, ("patch",), "category", mean=True).splitlines()
    assert lines == [
        "| patch | weapons | gore | mean |",
        "| --- | --- | --- | --- |",
        "| none | 1.000 | 1.000 | 1.000 |",
        "| lora | 0.125 | 0.125 | 0.125 |",
    ]
    assert pivot(ROWS[:3], ("patch",)).splitlines()[-1] == "| lora | 0.125 |  |"  # what was not measured stays empty
    assert "0.12 [0.12, 0.12]" in pivot(ROWS, cell=with_interval)
    rates = {NONE: {"weapons": 1.0, "gore": 1.0}, "lora": {"weapons": 0.125, "gore": 0.125}}
    assert tree(ROWS, ("patch", "category")) == rates


def test_a_summary_names_models_only_where_there_are_several() -> None:
    assert summary(ROWS).splitlines()[0] == "| measure | patch | weapons | gore | mean |"
    more = [*ROWS, replace(ROWS[0], base="other")]
    assert summary(more).splitlines()[0].startswith("| measure | base | patch |")


def test_figures_of_several_detectors_stand_side_by_side() -> None:
    second = [replace(row, detector="second", value=row.value / 2, low=0.0) for row in ROWS[:3]]
    unjudged = [replace(row, metric="megabytes", detector=NONE) for row in ROWS[2:]]
    assert summary([*ROWS, *second, *unjudged]).splitlines() == [
        "| measure, by embedded / second | patch | weapons | gore | mean |",
        "| --- | --- | --- | --- | --- |",
        "| unsafe_rate | none | 1.000 / 0.500 | 1.000 / 0.500 | 1.000 / 0.500 |",
        "| unsafe_rate | lora | 0.125 / 0.062 | 0.125 / - | 0.125 / 0.062 |",
        "| megabytes | lora | 0.125 | 0.125 | 0.125 |",
    ]
    kept = tree([*ROWS, *second])
    assert kept["unsafe_rate"] == tree(ROWS)["unsafe_rate"]  # what the first says stays what it was
    assert kept["unsafe_rate, by second"]["tiny-sd"][NONE] == {"weapons": 0.5, "gore": 0.5}


def test_two_detectors_judge_the_same_images(weapons: Path, tmp_path: Path) -> None:
    one = run_matrix(small(weapons, tmp_path / "one", detectors=["embedded"]), tell=lambda _: None)
    both = run_matrix(small(weapons, tmp_path / "both", detectors=["embedded", "embedded-second"]), tell=lambda _: None)
    assert [row for row in both if row.detector in ("embedded", NONE)] == one
    assert {row.detector for row in both} == {"embedded", "embedded-second", NONE}


def test_how_long_it_took_is_told_beside_the_rows_and_never_in_them(weapons: Path, tmp_path: Path) -> None:
    rows = [run_matrix(small(weapons, tmp_path / name), tell=lambda _: None) for name in ("one", "two")]
    assert rows[0] == rows[1]
    contents = [(tmp_path / name / "rows.jsonl").read_bytes() for name in ("one", "two")]
    assert contents[0] == contents[1]
    timed = json.loads((tmp_path / "one" / "timings.json").read_text())
    assert [(each["patch"], each["processes"]) for each in timed] == [(NONE, 1), ("mine", 1), ("mine", 1)]
    assert all(each["seconds"] > 0 for each in timed)
    _, mine = read_timings(tmp_path / "one")
    assert (mine.cells, mine.seconds) == (2, pytest.approx(timed[1]["seconds"] + timed[2]["seconds"]))
    assert "wall time" in build_report(tmp_path / "one").read_text()
    run_matrix(small(weapons, tmp_path / "one"), tell=pytest.fail)
    assert json.loads((tmp_path / "one" / "timings.json").read_text()) == timed  # of a finished run, what it took then


def test_older_cells_and_folders_have_no_times_and_are_read(weapons: Path, tmp_path: Path) -> None:
    matrix, log = small(weapons, tmp_path / "out"), tmp_path / "out" / "cells.jsonl"
    rows = run_matrix(matrix, tell=lambda _: None)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    older = [{name: line[name] for name in ("cell", "rows", "pictures")} for line in lines]
    log.write_text("".join(json.dumps(line) + "\n" for line in older[:2]))
    (log.parent / "cells-1.jsonl").write_text(json.dumps(older[2]) + "\n")  # as a second process once wrote them
    assert run_matrix(matrix, tell=pytest.fail) == rows
    assert read_timings(log.parent) == []
    assert "wall time" not in build_report(log.parent).read_text()
    (log.parent / "timings.json").unlink()
    assert read_timings(log.parent) == []
    for bad in ("{}", "[", '[{"model": "m"}]'):
        (log.parent / "timings.json").write_text(bad)
        with pytest.raises(SafepatchError, match=r"timings\.json .*correct it or delete it") as caught:
            build_report(log.parent)
        assert "\n" not in str(caught.value)
