"""Law 4, for every merge method: one patch returns itself, order is nothing, every shape and missing key works."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safepatch.artifact import PatchArtifact, PatchInfo
from safepatch.merging import METHODS, merge

CATEGORIES = ("weapons", "gore", "drugs")
SIZES = {"one": (1,), "three": (3,), "four": (2, 2), "scalar": (), "conv": (4, 2, 3, 3)}

every_method = pytest.mark.parametrize("method", sorted(METHODS))
every_storage = pytest.mark.parametrize("rank", [None, 1])


def save_patch(
    folder: Path, seed: int, rank: int | None = None, dtype: torch.dtype = torch.float32, lacks: str = ""
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"control.{n}.delta": torch.randn(s, generator=generator) for n, s in SIZES.items() if n != lacks}
    category = CATEGORIES[seed]
    info = PatchInfo("control", {category: f"no {category}"}, {"layers": 2}, {"family": "tiny"}, {"sees": "prompt"})
    artifact = PatchArtifact(tensors, info).astype(dtype)
    return (artifact.compress(rank) if rank else artifact).save(folder / f"{category}.safetensors")


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


@every_method
@every_storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_patch_of_weight_one_is_returned(tmp_path: Path, method: str, rank: int | None, dtype: torch.dtype) -> None:
    path = save_patch(tmp_path, 0, rank, dtype)
    source, other = PatchArtifact.open(path), PatchArtifact.open(save_patch(tmp_path, 1, rank, dtype))
    assert same_tensors(merge([path], method=method, weights=[1]).tensors, source.tensors)
    assert not same_tensors(source.tensors, other.tensors)  # control: the comparison can fail


@every_method
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2), (4, 2, 3, 3)])
def test_method_itself_returns_a_single_delta(method: str, shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(METHODS[method](delta[None], torch.ones(1)), delta)


@every_method
@every_storage
def test_order_of_sources_does_not_change_a_byte(tmp_path: Path, method: str, rank: int | None) -> None:
    weighted = [(save_patch(tmp_path, seed, rank), weight) for seed, weight in enumerate((1.0, 0.7, 0.1))]
    files = set()
    for order in permutations(weighted):
        paths, weights = zip(*order, strict=True)
        merge(paths, tmp_path / "merged.safetensors", method, weights)
        files.add((tmp_path / "merged.safetensors").read_bytes())
    assert len(files) == 1
    merge([path for path, _ in weighted], tmp_path / "merged.safetensors", method, [0.1, 0.7, 1.0])
    assert (tmp_path / "merged.safetensors").read_bytes() not in files  # control: weights of other sources do


@every_method
@every_storage
def test_small_tensors_keep_shape_and_merge_to_something(tmp_path: Path, method: str, rank: int | None) -> None:
    merged = merge([save_patch(tmp_path, seed, rank) for seed in range(3)], method=method)
    for name, shape in SIZES.items():
        assert merged.delta(f"control.{name}").shape == shape
        assert merged.delta(f"control.{name}").abs().max() > 0


@every_method
@every_storage
@pytest.mark.parametrize("lacks", sorted(SIZES))
def test_missing_key_is_a_zero_delta(tmp_path: Path, method: str, rank: int | None, lacks: str) -> None:
    paths = [save_patch(tmp_path, 0, rank), save_patch(tmp_path, 1, rank, lacks=lacks)]
    name = f"control.{lacks}"
    stack = torch.stack([PatchArtifact.open(paths[0]).delta(name), torch.zeros(SIZES[lacks])])
    expected = METHODS[method](stack, torch.ones(2))
    torch.testing.assert_close(merge(paths, method=method).delta(name), expected)
    assert name not in PatchArtifact.open(paths[1]).parameter_names()  # control: the key is missing


@every_method
def test_chunks_merge_to_the_same_bits_as_the_whole(method: str) -> None:
    stack = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.3, 0.7])
    whole = METHODS[method](stack, weights)
    chunks = [METHODS[method](chunk, weights) for chunk in stack.split(37, dim=1)]
    assert torch.equal(torch.cat(chunks), whole)
    assert not torch.equal(METHODS[method](stack, weights.flip(0)), whole)  # control
