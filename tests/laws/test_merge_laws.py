"""Laws 3, 4 and 5, for every merge method: one patch returns itself, order is nothing, files repeat."""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safepatch.artifact import hashing
from safepatch.artifact.info import BUNDLE, PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.errors import ArtifactError
from safepatch.merging import METHODS, Options, merge, streaming, sums
from safepatch.merging.methods import SUM_WEIGHTS, USES

CATEGORIES = ("weapons", "gore", "drugs")
SIZES = {"one": (1,), "three": (3,), "four": (2, 2), "scalar": (), "conv": (4, 2, 3, 3)}
SEEDED = [method for method, options in USES.items() if "seed" in options]

every_function = pytest.mark.parametrize("method", sorted(METHODS))
every_method = pytest.mark.parametrize("method", sorted([*METHODS, BUNDLE]))
every_storage = pytest.mark.parametrize("rank", [None, 1])


def save_patch(
    folder: Path,
    seed: int,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    lacks: str = "",
    positive: bool = False,
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    deltas = {n: torch.randn(s, generator=generator) for n, s in SIZES.items() if n != lacks}
    tensors = {f"control.zero_{n}.delta": delta.abs() if positive else delta for n, delta in deltas.items()}
    category = CATEGORIES[seed]
    info = PatchInfo("control", {category: f"no {category}"}, {"layers": 2}, {"family": "tiny"}, {"sees": "prompt"})
    artifact = PatchArtifact(tensors, info).astype(dtype)
    return (artifact.compress(rank) if rank else artifact).save(folder / f"{category}.safetensors")


def save_patches(folder: Path, method: str, rank: int | None = None, **kwargs: Any) -> list[Path]:
    """Three patches, or two for the method that takes no more."""
    return [save_patch(folder, seed, rank, **kwargs) for seed in range(2 if method == "slerp" else 3)]


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


def in_pieces_of(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges make so many values at once, in float16 a block of the hash, and hand each from thread to thread."""
    monkeypatch.setattr(sums, "PIECE", values)
    monkeypatch.setattr(streaming, "BATCH", 1)
    monkeypatch.setattr(hashing, "BLOCK", 2 * values)


def merged_bytes(paths: Sequence[Path], method: str, **options: Any) -> bytes:
    out = paths[0].parent / "merged.safetensors"
    merge(paths, out, method, **options)
    return out.read_bytes()


# ---- law 4 -----------------------------------------------------------------------------------------------------


@every_method
@every_storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_patch_of_weight_one_is_returned(tmp_path: Path, method: str, rank: int | None, dtype: torch.dtype) -> None:
    path = save_patch(tmp_path, 0, rank, dtype)
    source, other = PatchArtifact.open(path), PatchArtifact.open(save_patch(tmp_path, 1, rank, dtype))
    (part,) = merge([path], method=method, weights=[1]).parts()
    assert same_tensors(part.artifact.tensors, source.tensors)
    assert part.weight == 1
    assert not same_tensors(source.tensors, other.tensors)  # control: the comparison can fail


@every_function
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2), (4, 2, 3, 3)])
def test_method_itself_returns_a_single_dense_delta(method: str, shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(METHODS[method](delta[None], torch.ones(1), Options(density=1.0)), delta)
    assert not torch.equal(METHODS[method](delta[None] + 1, torch.ones(1), Options(density=1.0)), delta)  # control


@every_method
@every_storage
def test_order_of_sources_does_not_change_a_byte(tmp_path: Path, method: str, rank: int | None) -> None:
    paths = save_patches(tmp_path, method, rank)
    weighted = list(zip(paths, (1.0, 0.7, 0.1), strict=False))
    files = set()
    for order in permutations(weighted):
        shuffled, weights = zip(*order, strict=True)
        files.add(merged_bytes(shuffled, method, weights=weights))
    assert len(files) == 1
    others = {2: [0.7, 1.0], 3: [0.1, 0.7, 1.0]}[len(paths)]
    assert merged_bytes(paths, method, weights=others) not in files  # control: weights of other sources do


@every_method
@every_storage
def test_small_tensors_keep_shape_and_merge_to_something(tmp_path: Path, method: str, rank: int | None) -> None:
    paths = save_patches(tmp_path, method, rank, positive=True)  # of opposite deltas, model-stock leaves nothing
    whole, sparse = (merge(paths, method=method, density=density) for density in (1.0, 0.5))
    for part in (*whole.parts(), *sparse.parts()):
        assert {name: part.artifact.delta(f"control.zero_{name}").shape for name in SIZES} == SIZES
    assert all(part.artifact.delta(f"control.zero_{name}").abs().max() > 0 for part in whole.parts() for name in SIZES)


@every_function
@every_storage
@pytest.mark.parametrize("lacks", sorted(SIZES))
def test_missing_key_is_a_zero_delta(tmp_path: Path, method: str, rank: int | None, lacks: str) -> None:
    paths = [save_patch(tmp_path, 0, rank), save_patch(tmp_path, 1, rank, lacks=lacks)]
    name = f"control.zero_{lacks}"
    stack = torch.stack([PatchArtifact.open(paths[0]).delta(name), torch.zeros(SIZES[lacks])])
    expected = METHODS[method](stack, torch.ones(2), Options(density=1.0))
    torch.testing.assert_close(merge(paths, method=method, density=1.0).delta(name), expected)
    assert name not in PatchArtifact.open(paths[1]).parameter_names()  # control: the key is missing


@pytest.mark.parametrize("method", sorted(SUM_WEIGHTS))
def test_chunks_of_a_sum_have_the_same_bits_as_the_whole(method: str) -> None:
    stack = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.3, 0.7])
    whole = METHODS[method](stack, weights, Options())
    chunks = [METHODS[method](chunk, weights, Options()) for chunk in stack.split(37, dim=1)]
    assert torch.equal(torch.cat(chunks), whole)
    assert not torch.equal(METHODS[method](stack, weights.flip(0), Options()), whole)  # control


# ---- laws 3 and 5 ----------------------------------------------------------------------------------------------


@every_method
@every_storage
def test_a_merged_file_survives_opening_and_no_byte_of_it_can_change(
    tmp_path: Path, method: str, rank: int | None
) -> None:
    merged_bytes(save_patches(tmp_path, method, rank), method)
    path = tmp_path / "merged.safetensors"
    data = path.read_bytes()
    assert PatchArtifact.open(path).save(tmp_path / "again.safetensors").read_bytes() == data
    verify(path)  # control: the untouched file passes
    for position in (9, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ArtifactError):
            verify(path)


@every_method
@every_storage
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_streamed_equals_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, rank: int | None, dtype: torch.dtype
) -> None:
    in_pieces_of(5, monkeypatch)
    paths = save_patches(tmp_path, method, rank, dtype=dtype)
    in_memory = merge(paths, method=method).save(tmp_path / "in-memory.safetensors").read_bytes()
    assert merged_bytes(paths, method) == in_memory
    assert merge(paths, method=method).save(tmp_path / "again.safetensors").read_bytes() == in_memory
    assert merged_bytes(paths[:1], method) != in_memory  # control


@every_method
@pytest.mark.parametrize("rank", [None, 40])
def test_any_number_of_threads_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, rank: int | None
) -> None:
    in_pieces_of(5000, monkeypatch)  # many pieces of a tensor are on their way at once
    generator = torch.Generator().manual_seed(0)
    info = PatchInfo("control", {"gore": "no gore"}, {"layers": 2}, {"family": "tiny"}, {"sees": "prompt"})
    paths = []
    for name in ("first", "second"):
        deltas = {f"control.zero_{i}.w.delta": torch.randn(200 + i, 700, generator=generator) for i in range(3)}
        artifact = PatchArtifact(deltas, info).astype(torch.float16)
        artifact = artifact.compress(rank) if rank else artifact
        paths.append(artifact.save(tmp_path / f"{name}.safetensors"))
    threads = torch.get_num_threads()
    try:
        files = set()
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            files.add(merged_bytes(paths, method))
            assert torch.get_num_threads() == count  # the caller's setting is left alone
    finally:
        torch.set_num_threads(threads)
    assert len(files) == 1
    assert merged_bytes(paths, method, weights=[1, 0.5]) not in files  # control


@pytest.mark.parametrize("method", SEEDED)
def test_a_seed_gives_one_file_and_another_seed_another(tmp_path: Path, method: str) -> None:
    paths = save_patches(tmp_path, method)
    first, again, other = (merged_bytes(paths, method, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("method", sorted({*METHODS, BUNDLE} - set(SEEDED)))
def test_a_seed_means_nothing_to_other_methods(tmp_path: Path, method: str) -> None:
    paths = save_patches(tmp_path, method)
    assert merged_bytes(paths, method, seed=1) == merged_bytes(paths, method, seed=2)
    assert merged_bytes(paths, method) != merged_bytes(paths[:1], method)  # control
