"""The table of what a merge did, on a bench whose images are known; which method is best; and one line per mistake."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from safepatch import cli, merge_table, regression
from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.errors import ConfigError, SafepatchError, UnknownName
from safepatch.evaluation.suite import Protocol
from safepatch.merge_table import MergeTable, to_table
from safepatch.regression import base_rows, by_category, evaluate_merge, merged_rows, to_markdown
from safepatch.results import NONE, Row
from tests.unit.test_suite import READER, ObedientBench

N = 20


@pytest.fixture
def bench() -> ObedientBench:
    return ObedientBench("obedient", None, READER, Protocol(n=N))


def patch(*categories: str) -> PatchArtifact:
    return PatchArtifact({}, PatchInfo("control", {name: f"no {name}" for name in categories}, {}, {}))


def row(label: str, category: str, metric: str, value: float) -> Row:
    return Row(label, "tiny-sd", NONE, category, metric, value, value, value, N, 0, "reader")


def method_rows(label: str, rate: float, accuracy: float, recognisable: float = 0.9) -> list[Row]:
    """A method with one unsafe rate, and one of recognisable images, for all its categories."""
    figures = {"prompt_accuracy": accuracy, "benign_drift": 0.01}
    shown = {"unsafe_rate": rate, "safe_recognisable_rate": recognisable}
    rates = [row(label, name, metric, value) for metric, value in shown.items() for name in ("weapons", "gore")]
    return rates + [row(label, "benign", metric, value) for metric, value in figures.items()]


BASE = [row(NONE, "benign", "prompt_accuracy", 0.9), row("single", "weapons", "unsafe_rate", 0.1)]


def test_the_table_compares_base_single_and_merged(bench: ObedientBench) -> None:
    singles = {"weapons": patch("weapons"), "gore": patch("gore")}
    lines = to_markdown([*base_rows(bench, singles), *merged_rows(bench, "merged", list(singles), patch("gore"))])
    head, _, none, single, merged = lines.splitlines()
    assert head == "| patch | weapons | gore | recognisable | benign accuracy | drift |"
    assert none.startswith("| no patch | 1.00 [0.84, 1.00] | 1.00")  # control: the base does show it
    assert single.startswith("| single patches | 0.00 [0.00, 0.16] | 1.00")  # this bench's patches replace weapons only
    assert none.split("|")[4].strip() == "0.00"
    assert single.split("|")[4].strip() == "0.50"
    assert single.endswith("|  |  |")
    assert merged.endswith("| 1.00 [0.84, 1.00] | 0.000 |")


def test_a_category_is_measured_with_its_own_patch() -> None:
    first, both = patch("gore"), patch("gore", "weapons")
    assert by_category([first, both]) == {"gore": first, "weapons": both}
    with pytest.raises(UnknownName, match="did you mean 'weapons'"):
        by_category([patch("weapon")])


def test_a_merge_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "Bench", ObedientBench)
    monkeypatch.setattr(regression, "embedded_detector", lambda: READER)
    sources = [patch(name).save(tmp_path / f"{name}.safetensors") for name in ("weapons", "gore")]
    picture = tmp_path / "merged.png"
    text = evaluate_merge("tiny-sd", None, sources, patch("gore", "weapons"), Protocol(n=N), picture)
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == ["no patch", "single patches", "merged"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SafepatchError, match="cannot write"):
        evaluate_merge("tiny-sd", None, sources, patch("gore"), Protocol(n=N), tmp_path / "nowhere" / "merged.png")


def test_the_best_method_is_one_that_leaves_benign_images_alone() -> None:
    destroys, keeps = method_rows("task-arithmetic", 0.0, 0.1), method_rows("bundle", 0.1, 0.85)
    weak = method_rows("linear", 1.0, 0.9)
    table = to_table([*BASE, *destroys, *weak, *keeps])
    assert table["best"] == {"method": "bundle", "single": {"weapons": 0.1}, "merged": {"weapons": 0.1, "gore": 0.1}}
    assert table["methods"]["task-arithmetic"] == {
        "merged": {"weapons": 0.0, "gore": 0.0},
        "safe_recognisable_rate": {"weapons": 0.9, "gore": 0.9},
        "prompt_accuracy": 0.1,
        "benign_drift": 0.01,
    }
    harmless = method_rows("task-arithmetic", 0.0, 0.85)
    assert to_table([*BASE, *harmless, *weak, *keeps])["best"]["method"] == "task-arithmetic"  # control
    smears = method_rows("task-arithmetic", 0.0, 0.85, recognisable=0.2)
    assert to_table([*BASE, *smears, *weak, *keeps])["best"]["method"] == "bundle"
    assert to_table([*BASE, *destroys])["best"] is None


def test_the_merge_table_measures_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healed = []
    monkeypatch.setattr(merge_table, "Bench", ObedientBench)
    monkeypatch.setattr(merge_table, "load_pipeline", lambda name: None)
    monkeypatch.setattr(merge_table, "embedded_detector", lambda: READER)
    monkeypatch.setattr(merge_table, "merge", lambda recipe, path: patch("gore"))
    monkeypatch.setattr(merge_table, "heal", lambda pipe, recipe, path: healed.append(recipe) or patch("gore"))
    text = merge_table.build_merge_table(tmp_path, MergeTable(("bundle", "ties"), 7, Protocol(n=N)))
    lines = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert lines == ["no patch", "single patches", "bundle", "ties", "linear, healed"]
    assert [recipe.heal for recipe in healed] == [7]
    assert (tmp_path / "table.json").is_file()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: MergeTable(("bundel",)), UnknownName, "no merge method 'bundel'; did you mean 'bundle'"),
        (lambda: Protocol(n=0), ConfigError, "n is 0; an evaluation needs at least 1"),
        (lambda: Protocol(steps=-1), ConfigError, "steps is -1"),
    ],
)
def test_what_cannot_be_measured_is_one_line(make, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_merge_that_cannot_be_evaluated_is_not_written(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    source = patch("gore").save(tmp_path / "gore.safetensors")
    for words, says in (
        (("--n", "0"), "n is 0"),
        (("--model", "tiny-sdd"), "tiny-sdd"),
        (("--heal", "-2"), "heal is -2"),
    ):
        command = ["merge", str(source), "-o", str(out), "--evaluate", *words]
        with pytest.raises(SafepatchError, match=says):
            CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert not out.exists()
