"""Merging: the arithmetic, the provenance and the messages."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.errors import ArtifactError, BaseMismatch, MergeError, UnknownName
from safepatch.merging import METHODS, MergeRecipe, Options, combine, merge
from safepatch.merging.methods import SUM_WEIGHTS

INFO = PatchInfo(
    "control", {"gore": "no gore"}, {"layers": 2, "dim": 8}, {"family": "tiny", "hash": "0x1"}, {"sees": "prompt"}
)


def build(value: float, **changes: Any) -> PatchArtifact:
    return PatchArtifact({"control.zero_w.delta": torch.full((2, 3), value)}, replace(INFO, **changes))


def save(folder: Path, name: str, value: float, **changes: Any) -> Path:
    return build(value, **changes).save(folder / f"{name}.safetensors")


def low_rank(seed: int) -> PatchArtifact:
    delta = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    return PatchArtifact({"control.zero_w.delta": delta}, INFO).compress(2)


def test_known_sums() -> None:
    stack, weights = torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.tensor([1.0, 3.0])
    assert METHODS["task-arithmetic"](stack, weights, Options()).tolist() == [10.0, -4.0]
    assert METHODS["linear"](stack, weights, Options()).tolist() == [2.5, -1.0]


def test_sum_weights_belong_to_methods_and_say_the_same() -> None:
    stack, weights = torch.eye(3), torch.tensor([1.0, 2.0, 5.0])
    for method, weigh in SUM_WEIGHTS.items():
        assert torch.equal(METHODS[method](stack, weights, Options()), weigh(weights))


def test_merge_writes_a_verified_file_with_united_categories(tmp_path: Path) -> None:
    paths = [save(tmp_path, "w", 1.0, instructions={"weapons": "no weapons"}), save(tmp_path, "g", 2.0)]
    merged = merge(paths, tmp_path / "out.safetensors", "task-arithmetic", [1, 0.5])
    assert verify(tmp_path / "out.safetensors") == merged.info
    assert merged.info.instructions == {"gore": "no gore", "weapons": "no weapons"}
    assert list(merged.info.instructions) == ["gore", "weapons"]
    assert merged.delta("control.zero_w").unique().tolist() == [2.0]


def test_recipe_holds_source_hashes_and_nested_recipes(tmp_path: Path) -> None:
    first, second = save(tmp_path, "a", 1.0), save(tmp_path, "b", 2.0)
    inner = merge([first, second], tmp_path / "inner.safetensors", "linear")
    outer = merge([tmp_path / "inner.safetensors", first], method="linear")
    entries = {entry["hash"]: entry for entry in outer.info.recipe["sources"]}
    assert entries.keys() == {inner.content_hash, PatchArtifact.open(first).content_hash}
    assert entries[inner.content_hash]["recipe"] == inner.info.recipe
    assert str(tmp_path) not in str(outer.info)


def test_dtype_is_that_of_the_sources(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        paths = [build(value).astype(dtype).save(tmp_path / f"{value}.safetensors") for value in (1.0, 2.0)]
        merged = merge(paths, method="linear")
        assert merged.dtype == dtype
        assert merged.info.recipe["dtype"] == str(dtype).removeprefix("torch.")


def test_only_settings_that_agree_are_kept(tmp_path: Path) -> None:
    configs = ({"sees": "prompt", "seed": 1}, {"sees": "prompt", "seed": 2})
    paths = [save(tmp_path, str(i), i + 1.0, config=config, training={"n": 1}) for i, config in enumerate(configs)]
    merged = merge(paths, method="linear")
    assert merged.info.config == {"sees": "prompt"}
    assert merged.info.base == INFO.base
    assert merged.info.training == {}


@pytest.mark.parametrize("method", sorted(SUM_WEIGHTS))
def test_low_rank_sources_concatenate_to_the_same_delta_as_dense_ones(method: str) -> None:
    factored = [low_rank(seed) for seed in range(3)]
    dense = [PatchArtifact({"control.zero_w.delta": source.delta("control.zero_w")}, INFO) for source in factored]
    recipe = MergeRecipe(("a", "b", "c"), (1.0, 0.5, 2.0), method, "float32")
    merged = combine(factored, recipe)
    assert merged.factors("control.zero_w").up.shape == (6, 6)
    expected = combine(dense, recipe).delta("control.zero_w")
    torch.testing.assert_close(merged.delta("control.zero_w"), expected, rtol=1e-4, atol=1e-5)
    assert (expected - factored[0].delta("control.zero_w")).norm() > 0.1  # control: the merge is no source


def test_low_rank_with_dense_is_dense() -> None:
    factored = low_rank(0)
    dense = PatchArtifact({"control.zero_w.delta": low_rank(1).delta("control.zero_w")}, INFO)
    merged = combine([factored, dense], MergeRecipe(("a", "b"), (1.0, 1.0), "task-arithmetic", "float32"))
    assert set(merged.tensors) == {"control.zero_w.delta"}
    torch.testing.assert_close(
        merged.delta("control.zero_w"), factored.delta("control.zero_w") + dense.delta("control.zero_w")
    )


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"fingerprint": {"layers": 3, "dim": 8}}, BaseMismatch, r"architecture: {'layers': \d} and {'layers': \d};"),
        ({"base": {"family": "sdxl"}}, BaseMismatch, "base family"),
        ({"kind": "lora"}, MergeError, "kind"),
        ({"config": {"sees": "instruction"}}, MergeError, "'sees'"),
        ({"instructions": {"gore": "other"}}, MergeError, "instruct 'gore' differently"),
    ],
)
def test_patches_that_do_not_belong_together(tmp_path: Path, changes: dict, error: type, words: str) -> None:
    paths = [save(tmp_path, "first", 1.0), save(tmp_path, "second", 2.0, **changes)]
    with pytest.raises(error, match=words) as caught:
        merge(paths, method="linear")
    assert all(path.name in str(caught.value) for path in paths)
    assert "\n" not in str(caught.value)


def test_shapes_that_disagree_name_both_files(tmp_path: Path) -> None:
    other = PatchArtifact({"control.zero_w.delta": torch.ones(3, 3)}, INFO).save(tmp_path / "b.safetensors")
    with pytest.raises(MergeError, match=r"'control\.zero_w' is \[2, 3\] in .*a\.safetensors and \[3, 3\] in .*b\."):
        merge([save(tmp_path, "a", 1.0), other], method="linear")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sources": ()}, MergeError, "at least one patch"),
        ({"weights": (1.0,)}, MergeError, "1 weights for 2 patches"),
        ({"weights": (1.0, float("nan"))}, MergeError, "b has weight nan; give a number above 0"),
        ({"method": "liner"}, UnknownName, "no merge method 'liner'; did you mean 'linear'"),
        ({"dtype": "float15"}, UnknownName, "no dtype 'float15'; did you mean 'float16'"),
    ],
)
def test_recipes_that_cannot_run(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        MergeRecipe(**{"sources": ("a", "b"), "weights": (1.0, 1.0), **arguments})


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_source_whose_weight_would_silence_it_is_refused_by_name(tmp_path: Path, weight: float) -> None:
    paths = [save(tmp_path, "a", 1.0), save(tmp_path, "b", 2.0)]
    with pytest.raises(MergeError, match=rf"b\.safetensors has weight {weight:g}; give a number above 0, or leave it"):
        merge(paths, weights=[1, weight])
    assert merge(paths, weights=[1, 0.01]).info.categories  # control


def test_overflow_of_the_merged_dtype_is_refused() -> None:
    recipe = MergeRecipe(("a", "b"), (60000.0, 60000.0), "task-arithmetic", "float16")
    with pytest.raises(ArtifactError, match="overflows"):
        combine([build(1.0), build(2.0)], recipe)


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.safetensors: no such file"):
        merge([tmp_path / "gone.safetensors"])


def test_one_patch_keeps_the_dtype_of_each_tensor(tmp_path: Path) -> None:
    tensors = {"control.zero_a.delta": torch.ones(2, dtype=torch.float16), "control.zero_b.delta": torch.ones(2)}
    path = PatchArtifact(tensors, INFO).save(tmp_path / "mixed.safetensors")
    assert merge([path], method="linear").tensors["control.zero_a.delta"].dtype == torch.float16
    assert (
        merge([path, shutil.copy(path, tmp_path / "b.safetensors")], method="linear")
        .tensors["control.zero_a.delta"]
        .dtype
        == torch.float32
    )  # control: a real merge has one dtype
