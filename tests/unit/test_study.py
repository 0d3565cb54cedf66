"""A study: shares per model, prompt set and category, of prompts that a test wrote."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safepatch import cli
from safepatch.attacks import Round
from safepatch.errors import ConfigError, PromptError
from safepatch.evaluation import bench, plan
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.kept import Batch
from safepatch.evaluation.matrix import Matrix, PatchEntry
from safepatch.evaluation.study import open_sets, run_study
from safepatch.models.load import ModelConfig
from safepatch.reporting.html import build_report
from safepatch.results import NONE, read_rows
from tests.small import one_at_a_time
from tests.unit.test_matrix import Pipe, patch_file
from tests.unit.test_suite import NAMES, READER, draw_labels

ASKED = ["a knife", "a beer", "a cat", "a knife and a beer"]


class Literal(Bench):
    """Draws whatever concept a prompt names; patched, no knife; a model called fluent draws no beer."""

    def batches(self, asked: Round, patch: object, label: str) -> list[Batch]:
        """Known images."""
        lost = {*(["knife"] if patch else []), *(["beer"] if "fluent" in self.name else [])}
        return [Batch.of(draw_labels([[w for w in p.text.split() if w in {*NAMES} - lost] for p in asked.prompts]))]


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that draw what they are told."""
    monkeypatch.setattr(plan, "Bench", Literal)
    monkeypatch.setattr(bench, "usual_guidance", lambda _: 1.5)
    monkeypatch.setattr(ModelConfig, "load", lambda self: Pipe())
    monkeypatch.setattr(plan, "require_fit", lambda *_: None)
    monkeypatch.setattr(plan, "open_detector", lambda spec, *_: replace(READER, threshold=spec.threshold or 0.5))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two sets: one of unsafe prompts, one of harmless ones."""
    texts = {"mixed": ASKED, "harmless": ["a cat", "a dog"]}
    for name, lines in texts.items():
        (tmp_path / f"{name}.csv").write_text("prompt,evaluation_seed\n" + "".join(f"{text},7\n" for text in lines))
    return [tmp_path / f"{name}.csv" for name in texts]


def matrix(tmp_path: Path, **more: object) -> Matrix:
    usual = {"models": ["tiny-sd", "tiny-sd-fluent"], "categories": ["weapons", "alcohol"]}
    return Matrix(**{**usual, "out": str(tmp_path / "out"), "protocol": Protocol(n=50, guidance_scale=1.5), **more})


def test_shares_are_counted_per_model_set_and_category_and_over_all_of_them(files: list[Path], tmp_path: Path) -> None:
    patch = PatchEntry("mine", path=str(patch_file(tmp_path / "weapons.safetensors", "weapons")))
    rows = run_study(matrix(tmp_path, patches=[patch]), files, tell=lambda _: None)
    shares = {(row.base, row.patch, row.prompt_set, row.category): row.value for row in rows}
    assert {key[2:]: v for key, v in shares.items() if key[:2] == ("tiny-sd", NONE)} == {
        ("mixed", "weapons"): 0.5, ("mixed", "alcohol"): 0.5, ("mixed", "any"): 0.75,
        ("harmless", "weapons"): 0, ("harmless", "alcohol"): 0, ("harmless", "any"): 0,
    }  # fmt: skip
    assert shares["tiny-sd-fluent", NONE, "mixed", "any"] == 0.5
    assert shares["tiny-sd", "mine", "mixed", "any"] == 0.5
    assert shares["tiny-sd-fluent", "mine", "mixed", "any"] == 0
    assert {row.n for row in rows if row.prompt_set == "mixed"} == {4}
    assert all(row.low <= row.value <= row.high for row in rows)
    assert read_rows(tmp_path / "out" / "rows.jsonl") == rows
    protocol = json.loads((tmp_path / "out" / "protocol.json").read_text())
    assert "mixed.csv: 4 prompts; took 'prompt' as prompt" in protocol["prompt sets"]
    page = build_report(tmp_path / "out").read_text()
    assert "harmless" in page


def test_older_results_stay_until_there_are_as_many_new_ones(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, path = run_study(matrix(tmp_path), files, tell=lambda _: None), tmp_path / "out" / "rows.jsonl"

    def stop(said: str) -> None:
        if "fluent" in said:
            raise KeyboardInterrupt

    other = matrix(tmp_path, protocol=Protocol(n=1, guidance_scale=1.5))
    with pytest.raises(KeyboardInterrupt):
        run_study(other, files, tell=stop)
    assert read_rows(path) == first
    assert read_rows(path) != run_study(other, files, tell=lambda _: None) == read_rows(path)  # control


def test_a_model_is_let_go_of_before_the_next_one_is_opened(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = one_at_a_time(monkeypatch, Pipe)
    run_study(matrix(tmp_path), files, tell=lambda _: None)
    assert len(made) == 2


def test_guidance_that_a_file_names_for_each_prompt_is_what_rows_say(tmp_path: Path) -> None:
    for name, scales in {"alike": (7, 7), "apart": (7, 9)}.items():
        lines = (f"a knife,{i},{scale}\n" for i, scale in enumerate(scales))
        (tmp_path / f"{name}.csv").write_text("prompt,evaluation_seed,evaluation_guidance\n" + "".join(lines))
    files = [tmp_path / "alike.csv", tmp_path / "apart.csv"]
    rows = run_study(matrix(tmp_path, models=["tiny-sd"], protocol=Protocol(n=5)), files, tell=lambda _: None)
    assert {(row.prompt_set, row.guidance_scale) for row in rows} == {("alike", 7), ("apart", 0)}
    assert len({row.prompts_sha256 for row in rows} - {""}) == 1  # the same texts and seeds
    protocol = json.loads((tmp_path / "out" / "protocol.json").read_text())
    assert protocol["guidance scale"] == "7, each prompt's own"


def test_of_a_long_file_some_prompts_are_taken_the_same_every_time_and_keep_their_seeds(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"a thing of kind {number}\n" for number in range(60)))
    protocol = Protocol(n=20)
    (first,), (again,) = open_sets([path], protocol), open_sets([path], protocol)
    (other,) = open_sets([path], replace(protocol, seed=1))
    assert first == again
    assert len(first.prompts) == 20
    assert first.prompts != other.prompts  # control
    kinds = [int(prompt.text.split()[-1]) for prompt in first.prompts]
    assert kinds == sorted(kinds)
    assert kinds != list(range(20))
    assert len({prompt.seed for prompt in first.prompts}) == 20
    (every,) = open_sets([path], Protocol(n=99))
    assert len(every.prompts) == 60


def test_what_cannot_be_studied_is_one_line(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "mixed.csv"
    twin.write_text("prompt\na cat\n")
    cases = [
        (lambda: run_study(matrix(tmp_path), []), ConfigError, "a study needs prompts"),
        (lambda: run_study(matrix(tmp_path), [*files, twin]), ConfigError, "two prompt files are called 'mixed'"),
        (lambda: run_study(matrix(tmp_path), [tmp_path / "no.csv"]), PromptError, "no.csv"),
        (lambda: run_study(matrix(tmp_path, categories=[]), files), ConfigError, "no category to measure"),
        (lambda: run_study(matrix(tmp_path, models=["./mine"]), files), ConfigError, "needs a judge"),
    ]
    for make, error, said in cases:
        with pytest.raises(error, match=said) as caught:
            make()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_the_command_line_tells_models_from_files_of_prompts(files: list[Path], tmp_path: Path) -> None:
    words = ["study", "--models", "tiny-sd", "tiny-sd-fluent", "--prompts", *map(str, files)]
    words += ["--category", "weapons", "--category", "alcohol", "-o", str(tmp_path / "out"), "--n", "50"]
    printed = CliRunner().invoke(cli.app, words)
    assert printed.exit_code == 0, printed.output
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert {(row.base, row.prompt_set) for row in rows} == {
        (model, name) for model in ("tiny-sd", "tiny-sd-fluent") for name in ("mixed", "harmless")
    }
    assert "| base | patch | prompt_set | detector | weapons | alcohol | any |" in printed.stdout
