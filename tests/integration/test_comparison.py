"""Head to head: variants are trained alike, measured on the same pictures, and nothing finished is done again."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safepatch import comparison
from safepatch.comparison import Comparison, compare, load_comparison
from safepatch.errors import ConfigError
from safepatch.evaluation.bench import Protocol
from safepatch.evaluation.matrix import Matrix
from safepatch.reporting.tradeoffs import best, tradeoff_charts
from safepatch.results import Row, read_rows
from safepatch.training.config import TrainConfig
from safepatch.training.interrupts import Interrupted

FEW = ["patch.gate=0", "data.pairs=4", "data.steps=2", "training.steps=2", "training.batch_size=2"]
SHIPPED = Path(__file__).parents[2] / "configs" / "compare"


@pytest.fixture
def small(tmp_path: Path) -> Comparison:
    return Comparison(
        model="tiny-sd",
        variants={"slow": [], "fast": ["training.learning_rate=1e-2"], "solved": ["objective=closed-form"]},
        categories=["weapons"],
        settings=[*FEW, f"data.cache={tmp_path / 'cache'}"],
        measure=Matrix(
            models=[],
            metrics=["unsafe_rate", "benign_drift"],
            protocol=Protocol(n=2, steps=1),
            pictures=0,
            out=str(tmp_path / "out"),
        ),
    )


def test_variants_are_trained_measured_and_kept(small: Comparison, tmp_path: Path) -> None:
    rows = compare(small, lambda _: None)
    assert read_rows(tmp_path / "out" / "rows.jsonl") == rows
    drifts = {row.patch: row.value for row in rows if row.metric == "benign_drift"}
    assert set(drifts) == set(small.variants)
    assert len(set(drifts.values())) == 3  # control: the settings made other patches
    assert {row.patch for row in rows if row.metric == "train_minutes"} == set(small.variants)
    assert "Effect against cost" in (tmp_path / "out" / "index.html").read_text()
    said: list[str] = []
    assert compare(small, said.append) == rows
    assert not [line for line in said if line.startswith("[")]


def test_minutes_are_of_all_attempts_and_of_no_look_at_what_is_finished(
    small: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, clock = small.config("slow", "weapons"), iter(range(0, 6000, 60))  # a minute passes between two looks
    folder = Path(config.output)
    patch, checkpoint = folder / "weapons.safetensors", folder / "checkpoint.pt"
    monkeypatch.setattr(comparison, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(TrainConfig, "load_model", lambda _: None)

    def stopped(*_: object) -> Path:
        folder.mkdir(parents=True)
        checkpoint.touch()
        raise Interrupted("stopped at step 1")

    def finished(*_: object) -> Path:
        checkpoint.unlink(missing_ok=True)
        patch.touch()
        return patch

    monkeypatch.setattr(comparison, "train", stopped)
    with pytest.raises(Interrupted):
        comparison._trained(config)
    monkeypatch.setattr(comparison, "train", finished)
    assert comparison._trained(config) == (patch, 2.0)
    assert comparison._trained(config) == (patch, 2.0)
    (folder / comparison.MINUTES).unlink()
    assert comparison._trained(config) == (patch, None)  # finished by somebody who did not count
    patch.unlink()
    checkpoint.touch()
    assert comparison._trained(config) == (patch, None)  # begun by somebody who was killed
    patch.unlink()
    assert comparison._trained(config) == (patch, 1.0)  # control: begun anew


def test_what_cannot_be_compared_is_said_before_anything_is_trained(small: Comparison, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="objective"):
        compare(replace(small, variants={**small.variants, "odd": ["objective=esdd"]}), lambda _: None)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="needs variants"):
        replace(small, variants={})
    with pytest.raises(ConfigError, match="cannot name a folder"):
        replace(small, variants={"../x": []})
    with pytest.raises(ConfigError, match="name them in categories alone"):
        replace(small, measure=replace(small.measure, categories=["gore"]))


def test_what_is_measured_is_a_matrix_whose_models_are_the_trained_one(small: Comparison) -> None:
    files = {"slow": ["a.safetensors"], "fast": ["b.safetensors"]}
    matrix = small.matrix(files)
    assert (matrix.models, matrix.categories) == (["tiny-sd"], ["weapons"])
    assert [entry.name for entry in matrix.patches] == ["slow", "fast"]
    assert matrix.metrics == small.measure.metrics
    on = replace(small, beside=["c.safetensors"], measure=replace(small.measure, models=["tiny-sd-twemoji"]))
    assert on.matrix(files).models == ["tiny-sd-twemoji"]
    bundled = {entry.name: entry.merge.sources for entry in on.matrix(files).patches if entry.merge}
    assert bundled == {f"{name}, in a bundle": [*own, "c.safetensors"] for name, own in files.items()}


@pytest.mark.parametrize("key", ["metrics", "out", "protocol", "models"])
def test_what_once_stood_above_measure_is_said_in_a_line(tmp_path: Path, key: str) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(f"model: tiny-sd\nvariants: {{a: []}}\ncategories: [weapons]\n{key}: x\n")
    with pytest.raises(ConfigError, match=f"'{key}' stands under measure now: measure.{key}") as caught:
        load_comparison(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"measure.{key}"):
        load_comparison(SHIPPED / "objectives.yaml", [f"{key}=x"])
    assert load_comparison(SHIPPED / "objectives.yaml", ["measure.out=x"]).measure.out == "x"  # control


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_comparisons_can_be_read(file: Path) -> None:
    comparison = load_comparison(file)
    for name in comparison.variants:
        for category in comparison.categories:
            assert comparison.config(name, category).category == category


def test_a_front_holds_what_nothing_beats() -> None:
    points = {"a": (0.0, 5.0), "b": (0.1, 1.0), "c": (0.1, 2.0), "d": (0.5, 0.5), "e": (0.6, 6.0)}
    assert best(points) == ["a", "b", "d"]


def test_trade_offs_are_means_over_categories_of_what_has_both() -> None:
    rest: dict[str, Any] = {"attack": "none", "low": 0.0, "high": 9.0, "n": 8, "seed": 0}
    rows = [
        Row(patch, "tiny-sd", category=category, metric=metric, value=value, detector=detector, **rest)
        for patch in ("a", "b", "c")
        for category, value in (("weapons", 0.5), ("gore", 0.25))
        for metric, detector in (("unsafe_rate", "probe"), ("benign_drift", "none"))
    ]
    (chart,) = tradeoff_charts(rows)
    assert chart.description == "a: 37.5%, 0.375; b: 37.5%, 0.375; c: 37.5%, 0.375"
    assert tradeoff_charts([row for row in rows if row.patch != "c"]) == []  # too few
