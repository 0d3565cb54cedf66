"""Merging as a user meets it: recipes, exact forms and splitting, the conflict report, and every bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from safepatch import cli
from safepatch.artifact.info import BUNDLE, PatchInfo, read_info
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.cli import artifact as verbs
from safepatch.errors import ArtifactError, MergeError, SafepatchError, UnknownName
from safepatch.merging import METHODS, MergeRecipe, load_recipe, merge, split
from safepatch.merging.conflicts import block_of, compare

ROOT = Path(__file__).parents[2]
SIZES = {"control.clone.down_blocks.0.conv.weight": (6, 4, 3, 3), "control.zero_mid.bias": (5,)}
INFO = PatchInfo("control", {"gore": "no gore"}, {"layers": 2}, {"family": "tiny", "hash": "0x1"}, {"sees": "prompt"})


def build(seed: int, rank: int | None = 2, **changes: Any) -> PatchArtifact:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.delta": torch.randn(shape, generator=generator) for name, shape in SIZES.items()}
    artifact = PatchArtifact(tensors, replace(INFO, **changes)).astype(torch.float16)
    return artifact.compress(rank) if rank else artifact


def save(folder: Path, category: str, seed: int, rank: int | None = 2, **changes: Any) -> Path:
    training = {"date": "2025", "steps": seed}  # what a part says of itself comes back too
    artifact = build(seed, rank, instructions={category: f"no {category}"}, training=training, **changes)
    return artifact.save(folder / f"{category}.safetensors")


@pytest.fixture
def trio(tmp_path: Path) -> list[Path]:
    return [save(tmp_path, category, seed) for seed, category in enumerate(("weapons", "gore", "drugs"))]


# ---- exact forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cat", BUNDLE])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.8, 0.5)])
def test_a_part_comes_back_byte_for_byte(tmp_path: Path, trio: list[Path], method: str, weights: tuple) -> None:
    options = {"dtype": "float32"} if method == "cat" else {}
    merge(trio, tmp_path / "trio.safetensors", method, weights, **options)
    for path in trio:
        split(tmp_path / "trio.safetensors", path.stem, tmp_path / "part.safetensors")
        assert (tmp_path / "part.safetensors").read_bytes() == path.read_bytes()
    assert trio[0].read_bytes() != trio[1].read_bytes()  # control


@pytest.mark.parametrize("outer", ["cat", BUNDLE])
def test_a_part_of_a_part_comes_back_too(tmp_path: Path, trio: list[Path], outer: str) -> None:
    merge(trio[:2], tmp_path / "inner.safetensors", "cat")
    merged = merge([tmp_path / "inner.safetensors", trio[2]], method=outer)
    assert split(merged, "gore").content_hash == PatchArtifact.open(trio[1]).content_hash
    assert split(merged, "drugs").content_hash == PatchArtifact.open(trio[2]).content_hash


def test_cat_is_the_sum_with_the_ranks_side_by_side(trio: list[Path]) -> None:
    weights = (1.0, 0.5, 2.0)
    merged = merge(trio, method="cat", weights=weights, dtype="float32")
    sources = [PatchArtifact.open(path) for path in trio]
    for name in SIZES:
        expected = sum(w * source.delta(name) for w, source in zip(weights, sources, strict=True))
        torch.testing.assert_close(merged.delta(name), expected, rtol=1e-5, atol=1e-5)
        assert (expected - sources[0].delta(name)).norm() > 0.1  # control
    assert merged.factors("control.clone.down_blocks.0.conv.weight").up.shape == (6, 6)
    assert merged.factors("control.zero_mid.bias").up.shape == (5, 3)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("stored", [2, None])
def test_a_recompressed_sum_is_the_best_of_its_rank_and_says_how_good(
    tmp_path: Path, rank: int, stored: int | None
) -> None:
    paths = [save(tmp_path, category, seed, stored) for seed, category in enumerate(("weapons", "gore"))]
    merged = merge(paths, method="cat", rank=rank, dtype="float32")
    name = "control.clone.down_blocks.0.conv.weight"
    whole = sum(PatchArtifact.open(path).delta(name) for path in paths).flatten(1)
    missed = (merged.delta(name).flatten(1) - whole).norm() / whole.norm()
    singular = torch.linalg.svdvals(whole)
    torch.testing.assert_close(missed, singular[rank:].norm() / singular.norm(), rtol=1e-3, atol=1e-5)
    recorded = merged.info.recipe["rank_errors"].get(name, 0.0)
    assert recorded == pytest.approx(missed.item(), abs=1e-5)
    assert (missed > 0.1) == (rank == 1 or (rank == 3))  # control: two patches of rank 2 need more than 3
    with pytest.raises(MergeError, match=r"re-compressed to rank|cannot be split"):
        split(merged, "gore")


def test_a_bundle_keeps_parts_weights_and_instructions_apart(tmp_path: Path, trio: list[Path]) -> None:
    other = save(tmp_path, "gore", 9, config={"sees": "instruction"})  # another sight: apart, that is no matter
    merged = merge([trio[0], other], tmp_path / "both.safetensors", BUNDLE, [1, 0.5])
    parts = {part.artifact.info.categories: part for part in PatchArtifact.open(tmp_path / "both.safetensors").parts()}
    assert {categories: part.weight for categories, part in parts.items()} == {("weapons",): 1.0, ("gore",): 0.5}
    assert parts["gore",].artifact.info == PatchArtifact.open(other).info
    assert merged.info.categories == ("gore", "weapons")
    nested = merge([tmp_path / "both.safetensors", trio[2]], method=BUNDLE, weights=[0.5, 2])
    assert sorted(part.weight for part in nested.parts()) == [0.25, 0.5, 2.0]
    (alone,) = build(0).parts()  # control: a patch that is no bundle is its own only part
    assert alone.weight == 1


def test_a_merge_keeps_its_parts_apart_unless_told_otherwise(tmp_path: Path, trio: list[Path]) -> None:
    default = merge(trio, tmp_path / "default.safetensors")
    assert default.content_hash == merge(trio, method=BUNDLE).content_hash
    assert MergeRecipe(("a",)).method == BUNDLE
    assert "by bundle" in command("merge", *trio, "-o", tmp_path / "trio.safetensors")
    assert default.content_hash != merge(trio, method="linear").content_hash  # control


def test_a_bundle_with_a_stray_tensor_is_refused(trio: list[Path]) -> None:
    merged = merge(trio, method=BUNDLE)
    stray = replace(merged, tensors={**merged.tensors, "part7.control.w.delta": torch.ones(1)})
    with pytest.raises(ArtifactError, match="belong to none of its parts"):
        stray.parts()


@pytest.mark.parametrize(
    ("method", "options", "category", "says"),
    [
        ("ties", {}, "gore", "merged by ties, which mixes its parts"),
        ("cat", {}, "gorre", "did you mean 'gore'"),
        ("cat", {"weights": (0.3, 0.3, 0.3)}, "gore", "cannot be had back bit for bit"),
    ],
)
def test_what_cannot_be_split(trio: list[Path], method: str, options: dict, category: str, says: str) -> None:
    with pytest.raises(MergeError, match=says) as caught:
        split(merge(trio, method=method, **options), category)
    assert "\n" not in str(caught.value)


def test_a_sum_of_dense_deltas_and_a_single_patch_cannot_be_split(tmp_path: Path) -> None:
    paths = [save(tmp_path, category, seed, rank=None) for seed, category in enumerate(("weapons", "gore"))]
    with pytest.raises(MergeError, match="dense in the sources"):
        split(merge(paths, method="cat"), "gore")
    with pytest.raises(MergeError, match="one patch; only merges"):
        split(paths[1], "gore")
    assert split(merge(paths, method=BUNDLE), "gore").content_hash == PatchArtifact.open(paths[1]).content_hash


def test_two_parts_of_one_category_are_not_told_apart(tmp_path: Path, trio: list[Path]) -> None:
    (tmp_path / "more").mkdir()
    again = save(tmp_path / "more", "gore", 8)
    with pytest.raises(MergeError, match="2 parts are for 'gore'"):
        split(merge([*trio, again], method=BUNDLE), "gore")


# ---- recipes ---------------------------------------------------------------------------------------------------


def test_a_recipe_file_does_what_the_arguments_do(tmp_path: Path, trio: list[Path]) -> None:
    recipe = tmp_path / "trio.yaml"
    lines = ["sources:", *(f"  - {path}" for path in trio), "weights: [1, 1, 0.8]", "method: dare", "density: 0.3"]
    recipe.write_text("\n".join([*lines, "seed: 5", "dtype: float32", f"out: {tmp_path}/a.safetensors"]))
    merge(recipe)
    options = {"density": 0.3, "seed": 5, "dtype": "float32"}
    merge(trio, tmp_path / "b.safetensors", "dare", [1, 1, 0.8], **options)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    merge(replace(load_recipe(recipe), seed=6), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "b.safetensors").read_bytes()  # control


def test_a_recipe_records_what_its_method_reads_and_nothing_else(trio: list[Path]) -> None:
    recorded = {method: merge(trio, method=method).info.recipe for method in ("linear", "ties", "dare")}
    assert recorded["ties"]["density"] == 0.5
    assert "seed" not in recorded["ties"]
    assert recorded["dare"]["seed"] == 0
    assert "density" not in recorded["linear"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/merges").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_names_shipped_patches(path: Path) -> None:
    recipe = load_recipe(path)
    assert all((ROOT / source).is_file() for source in recipe.sources)
    assert recipe.out
    assert bool(recipe.heal) == (path.stem == "healed")


def test_mixed_dtypes_and_ranks_and_nested_merges(tmp_path: Path) -> None:
    dtypes, ranks = (torch.float16, torch.bfloat16, torch.float32), (1, 3, None)
    artifacts = [build(seed, None).astype(dtype) for seed, dtype in enumerate(dtypes)]
    artifacts = [a.compress(rank) if rank else a for a, rank in zip(artifacts, ranks, strict=True)]
    paths = [artifact.save(tmp_path / f"{i}.safetensors") for i, artifact in enumerate(artifacts)]
    inner = merge(paths[:2], tmp_path / "inner.safetensors", "task-arithmetic", dtype="float32")
    outer = merge([tmp_path / "inner.safetensors", paths[2]], method="task-arithmetic")
    assert (
        merge(paths[:2], method="linear", conflicts=False).dtype == torch.float32
    )  # neither 16-bit type holds the other
    assert outer.dtype == torch.float32
    assert inner.info.recipe in [source["recipe"] for source in outer.info.recipe["sources"]]
    for name in SIZES:
        torch.testing.assert_close(outer.delta(name), sum(artifact.delta(name) for artifact in artifacts))
    assert merge(paths, method="linear", dtype="bfloat16").dtype == torch.bfloat16


# ---- the command line ------------------------------------------------------------------------------------------


def command(*words: object) -> str:
    """What `safepatch words` prints; raises what it raises."""
    return CliRunner().invoke(cli.app, list(map(str, words)), catch_exceptions=False).stdout


def test_the_command_line_merges_inspects_and_splits(tmp_path: Path, trio: list[Path]) -> None:
    out, part = tmp_path / "trio.safetensors", tmp_path / "part.safetensors"
    words = ("--method", "dare", "--density", 0.3, "--weights", "1,1,0.8", "--seed", 4, "--dtype", "float32")
    printed = command("merge", *trio, "-o", out, *words)
    assert "merged drugs, gore, weapons by dare" in printed
    assert printed.count("cosine") == 3
    expected = merge(trio, method="dare", weights=(1, 1, 0.8), density=0.3, seed=4, dtype="float32")
    assert out.read_bytes() == expected.save(tmp_path / "b.safetensors").read_bytes()
    told = json.loads(command("inspect", out, "--json"))
    assert told["categories"] == ["drugs", "gore", "weapons"]
    assert sorted(told["source_hashes"]) == sorted(PatchArtifact.open(path).content_hash for path in trio)
    assert (told["kind"], told["recipe"]["method"], len(told["conflicts"])) == ("control", "dare", 3)
    command("merge", *trio, "-o", out, "--method", "cat", "--no-conflicts")
    assert json.loads(command("inspect", out, "--json"))["conflicts"] == []  # control
    assert "unchanged" in command("split", out, "gore", "-o", part)
    assert part.read_bytes() == trio[1].read_bytes()


def test_the_command_line_runs_a_recipe_and_overrides_it(tmp_path: Path, trio: list[Path]) -> None:
    recipe, out = tmp_path / "pair.yaml", tmp_path / "out.safetensors"
    recipe.write_text(f"sources: [{trio[0]}, {trio[1]}]\nmethod: cat\nout: {out}\n")
    assert "by cat" in command("merge", recipe)
    assert "relative error" in command("merge", recipe, "--rank", 1)
    assert "by linear" in command("merge", recipe, "--method", "linear")
    with pytest.raises(SafepatchError, match="one recipe, or patch files"):
        command("merge", recipe, trio[0])
    with pytest.raises(SafepatchError, match="nowhere to write"):
        command("merge", *trio)


def test_the_output_folder_is_made_where_that_is_possible(tmp_path: Path, trio: list[Path]) -> None:
    assert merge(trio, tmp_path / "new" / "folder" / "out.safetensors", "linear").info.categories
    assert (tmp_path / "new" / "folder" / "out.safetensors").is_file()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MergeError, match=r"cannot write .*; choose a writable folder"):
        merge(trio, tmp_path / "file" / "out.safetensors", "linear")


# ---- the conflict report ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    cosine: float
    sign_conflict: float
    norm_ratio: float


def overall(report: list[dict]) -> Pair:
    return Pair(**report[0]["overall"])


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([2.0, -4.0, 0.0], Pair(1.0, 0.0, 0.5)),
        ([-1.0, 2.0, 0.0], Pair(-1.0, 1.0, 1.0)),
        ([2.0, 1.0, 5.0], Pair(0.0, 0.5, round(math.sqrt(5 / 30), 4))),
    ],
)
def test_conflicts_of_known_deltas(second: list[float], expected: Pair) -> None:
    figures = Pair(**compare(torch.tensor([[1.0, -2.0, 0.0], second])).figures(0, 1))
    assert figures == pytest.approx(expected)


def test_a_source_without_values_has_no_conflict_figures() -> None:
    assert set(compare(torch.tensor([[1.0, 2.0], [0.0, 0.0]])).figures(0, 1).values()) == {None}


def test_a_merge_reports_every_pair_and_block(tmp_path: Path, trio: list[Path]) -> None:
    merge(trio, tmp_path / "trio.safetensors", "ties")
    recipe = read_info(tmp_path / "trio.safetensors").recipe
    assert [pair["sources"] for pair in recipe["conflicts"]] == [[0, 1], [0, 2], [1, 2]]
    assert set(recipe["conflicts"][0]["blocks"]) == {"control.clone.down_blocks.0", "control.zero_mid"}
    first, second = (PatchArtifact.open(p) for p in trio if read_info(p).categories in _pair_of(recipe))
    flat = [torch.cat([artifact.delta(name).flatten() for name in SIZES]) for artifact in (first, second)]
    cosine = torch.cosine_similarity(*flat, dim=0).item()
    assert overall(recipe["conflicts"]).cosine == pytest.approx(cosine, abs=1e-3)
    assert overall(recipe["conflicts"]).sign_conflict == pytest.approx(
        (flat[0] * flat[1] < 0).float().mean().item(), abs=1e-3
    )
    assert abs(cosine) < 0.9  # control: a figure that could be wrong
    assert "conflicts" not in merge(trio, conflicts=False).info.recipe


def _pair_of(recipe: dict) -> list[tuple[str, ...]]:
    return [tuple(recipe["sources"][index]["categories"]) for index in recipe["conflicts"][0]["sources"]]


def test_blocks() -> None:
    assert block_of("control.clone.down_blocks.0.resnets.1.conv1.weight") == "control.clone.down_blocks.0"
    assert block_of("control.clone.mid_block.attentions.0.norm.weight") == "control.clone.mid_block"
    assert block_of("control.zero_down.3.weight") == "control.zero_down.3"
    assert block_of("control.zero_mid.weight") == "control.zero_mid"
    assert block_of("w") == "w"


def test_the_conflicts_are_drawn(tmp_path: Path, trio: list[Path]) -> None:
    merge(trio, tmp_path / "trio.safetensors")
    verbs.inspect(tmp_path / "trio.safetensors", True, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SafepatchError, match="no conflicts are recorded"):
        verbs.inspect(trio[0], True, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# ---- bad input -------------------------------------------------------------------------------------------------


def damaged(path: Path, change: str) -> Path:
    data = path.read_bytes()
    changes = {
        "missing": None,
        "pickle": b"\x80\x04" + data,
        "truncated": data[:-3],
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "empty": b"",
    }
    if changes[change] is None:
        path.unlink()
    else:
        path.write_bytes(changes[change])
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", "no such file"),
        ("pickle", "not a safetensors file"),
        ("truncated", "truncated"),
        ("flipped", "altered"),
        ("empty", "not a safetensors file"),
    ],
)
def test_a_bad_source_is_one_line_and_the_old_output_stays(
    tmp_path: Path, trio: list[Path], change: str, says: str
) -> None:
    out = tmp_path / "out.safetensors"
    before = merge(trio, out) and out.read_bytes()
    damaged(trio[1], change)
    with pytest.raises(ArtifactError, match=rf"gore\.safetensors: .*{says}") as caught:
        merge(trio, out, "ties")
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("method", sorted([*METHODS, BUNDLE]))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("conflicts", [True, False])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, method: str, value: float, conflicts: bool) -> None:
    paths = [save(tmp_path, category, seed) for seed, category in enumerate(("weapons", "gore"))]
    bad = build(1, instructions={"gore": "no gore"})
    tensor = "control.zero_mid.bias.delta"
    changed = replace(bad, tensors={**bad.tensors, tensor: torch.tensor([0.0, value, 0, 0, 0], dtype=torch.float16)})
    changed.save(paths[1])
    with pytest.raises(ArtifactError, match=r"gore\.safetensors: tensor 'control\.zero_mid\.bias.* NaN or infinity"):
        merge(paths, tmp_path / "out.safetensors", method, conflicts=conflicts)
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        merge(paths[1:], tmp_path / "out.safetensors", method)
    assert not (tmp_path / "out.safetensors").exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_a_bundle_has_no_sum(tmp_path: Path, trio: list[Path]) -> None:
    merge(trio[:2], tmp_path / "both.safetensors", BUNDLE)
    with pytest.raises(MergeError, match=r"both\.safetensors is a bundle, whose parts have no sum"):
        merge([tmp_path / "both.safetensors", trio[2]], method="linear")


def test_no_patch_is_merged_twice_by_whatever_name(tmp_path: Path, trio: list[Path]) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(trio[0])
    for again in (trio[0], link):
        with pytest.raises(MergeError, match=r"is to be merged twice; give it once") as told:
            merge([trio[0], trio[1], again], tmp_path / "out.safetensors")
        assert "\n" not in str(told.value)
    assert not (tmp_path / "out.safetensors").exists()
    shutil.copy(trio[0], tmp_path / "copy.safetensors")
    merge([trio[0], tmp_path / "copy.safetensors"], tmp_path / "out.safetensors", "linear")  # control: another file


def test_the_output_may_not_be_a_source(tmp_path: Path, trio: list[Path]) -> None:
    before = trio[0].read_bytes()
    with pytest.raises(MergeError, match="is one of the patches to merge"):
        merge(trio, tmp_path / "x" / ".." / trio[0].name)
    assert trio[0].read_bytes() == before


def test_a_full_disk_is_noticed_before_the_first_byte(
    tmp_path: Path, trio: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    size = merge(trio, out) and out.stat().st_size
    before = out.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size, 0, size - 1))
    with pytest.raises(
        ArtifactError, match=rf"No space left on device, {size - 1} bytes are free; .* {size} bytes free"
    ):
        merge(trio, out)
    assert out.read_bytes() == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size, 0, size))
    merge(trio, out)  # control: one byte more is enough


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"method": "tise"}, UnknownName, "did you mean 'ties'"),
        ({"method": "bundel"}, UnknownName, "did you mean 'bundle'"),
        ({"density": 1.5}, MergeError, "density is 1.5; give a share from 0 to 1"),
        ({"density": math.nan}, MergeError, "density is nan"),
        ({"method": "slerp"}, MergeError, "slerp goes from one patch to another, not through 3"),
        ({"method": "bundle", "dtype": "float16"}, MergeError, "leave out dtype"),
        ({"method": "ties", "rank": 4}, MergeError, "a rank belongs to method cat"),
        ({"method": "cat", "rank": -1}, MergeError, "rank is -1"),
        ({"weights": (1.0,)}, MergeError, "1 weights for 3 patches"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_before_any_file_is_read(
    arguments: dict, error: type[SafepatchError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        MergeRecipe(("a", "b", "c"), **arguments)
    assert "\n" not in str(caught.value)


SLOW_MERGE = """
import sys, time
from safepatch.merging import merge, streaming
fast = streaming.raw_bytes
def slow(tensor):
    print("writing", flush=True)
    time.sleep(600 if slow.calls else 0)
    slow.calls += 1
    return fast(tensor)
slow.calls = 0
streaming.raw_bytes = slow
merge(sys.argv[2:], sys.argv[1])
"""


def test_killed_while_writing_the_old_output_is_intact(tmp_path: Path, trio: list[Path]) -> None:
    out = tmp_path / "out.safetensors"
    merge(trio[:2], out)
    before = out.read_bytes()
    command = [sys.executable, "-c", SLOW_MERGE, str(out), *map(str, trio)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert process.stdout is not None
    with process:
        assert [process.stdout.readline() for _ in range(2)] == ["writing\n"] * 2
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob(".*.partial"))  # control: it was in the middle of writing
    assert out.read_bytes() == before
    merge(trio, out)
    assert out.read_bytes() != before
