"""Law 3: a patch survives its file bit for bit, and no byte of the file can change unnoticed."""

from pathlib import Path

import pytest
import torch

from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.errors import ArtifactError

INFO = PatchInfo(
    kind="control",
    instructions={"weapons": "no weapons", "gore": "no gore"},
    fingerprint={"block_out_channels": [8, 16], "cross_attention_dim": 12},
    base={"family": "tiny", "hash": "0x12"},
    config={"sees": "instruction"},
    training={"date": "2025-01-02", "steps": 20},
    license="Apache-2.0",
)
SHAPES = {
    "control.zero_mid.weight": (6, 4, 3, 3),
    "control.clone.w": (6, 5),
    "control.zero_mid.bias": (6,),
    "text.s": (),
}


def build(dtype: torch.dtype = torch.float32, rank: int | None = None) -> PatchArtifact:
    generator = torch.Generator().manual_seed(0)
    deltas = {f"{n}.delta": torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    artifact = PatchArtifact(deltas, INFO)
    return artifact.compress(rank) if rank else artifact


def flipped(path: Path, position: int, mask: int) -> Path:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    copy = path.with_name("flipped.safetensors")
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_save_open_save_gives_identical_bytes(tmp_path: Path, dtype: torch.dtype, rank: int | None) -> None:
    artifact = build(dtype, rank)
    first = artifact.save(tmp_path / "a.safetensors").read_bytes()
    opened = PatchArtifact.open(tmp_path / "a.safetensors")
    assert opened.save(tmp_path / "b.safetensors").read_bytes() == first
    assert opened.info == artifact.info
    assert opened.content_hash == artifact.content_hash
    assert all(torch.equal(opened.tensors[name], tensor) for name, tensor in artifact.tensors.items())
    other = PatchArtifact({**artifact.tensors, "text.s.delta": torch.tensor(9.0).to(dtype)}, artifact.info)
    assert other.save(tmp_path / "b.safetensors").read_bytes() != first  # control: other values are other bytes


def test_bytes_do_not_depend_on_the_order_of_anything(tmp_path: Path) -> None:
    artifact = build()
    info = PatchInfo(**{**vars(INFO), "instructions": {"gore": "no gore", "weapons": "no weapons"}})
    shuffled = PatchArtifact(dict(reversed(artifact.tensors.items())), info)
    paths = artifact.save(tmp_path / "a.safetensors"), shuffled.save(tmp_path / "b.safetensors")
    assert paths[0].read_bytes() == paths[1].read_bytes()


TAB = 0x20 ^ 0x09  # turns a space into JSON's other space
REGIONS = ("length", "header", "hash", "padding", "tensors")


def region(data: bytes, name: str) -> range:
    """Positions of one region of the file, at most about 40 of them."""
    end = 8 + int.from_bytes(data[:8], "little")
    digits = data.index(b'"0x') + 1
    padding = len(data[:end].rstrip(b" "))
    bounds = {"length": (0, 8), "header": (8, padding), "hash": (digits, digits + 66), "padding": (padding, end)}
    start, stop = bounds.get(name, (end, len(data)))
    return range(start, stop, 1 + (stop - start) // 40)


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("mask", [0x01, TAB, 0xFF])
def test_a_flipped_byte_anywhere_fails_verify(tmp_path: Path, name: str, mask: int) -> None:
    path = build(torch.float16, rank=1).save(tmp_path / "a.safetensors")
    assert verify(path) == PatchArtifact.open(path).info  # control: the untouched file passes
    positions = region(path.read_bytes(), name)
    assert positions  # control: the region is there
    for position in positions:
        if name == "padding" and mask == TAB:  # what is no part of what the file says may differ
            assert verify(flipped(path, position, mask)) == verify(path)
            continue
        with pytest.raises(ArtifactError):
            verify(flipped(path, position, mask))


@pytest.mark.parametrize("keep", [0, 5, 8, 9, 100, -200, -1])
def test_truncated_file_is_a_clear_error(tmp_path: Path, keep: int) -> None:
    path = build().save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"a\.safetensors: (truncated|refused: not a safetensors file)"):
        verify(path)


def test_compress_reproduces_a_low_rank_delta_and_nothing_smaller_does() -> None:
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn(8, 3, generator=generator), torch.randn(3, 36, generator=generator)
    dense = PatchArtifact({"c.weight.delta": (up @ down).reshape(8, 4, 3, 3), "c.bias.delta": torch.ones(8)}, INFO)
    full, poor = dense.compress(3), dense.compress(1)
    assert set(full.tensors) == {"c.weight.up", "c.weight.down", "c.bias.delta"}
    torch.testing.assert_close(full.delta("c.weight"), dense.delta("c.weight"), rtol=1e-4, atol=1e-4)
    assert (poor.delta("c.weight") - dense.delta("c.weight")).norm() > 0.1 * dense.delta("c.weight").norm()  # control
    assert torch.equal(full.delta("c.bias"), dense.delta("c.bias"))
    assert full.info.config == dense.info.config


def test_compress_to_at_least_the_full_rank_changes_no_bit() -> None:
    artifact = build()
    same, smaller = artifact.compress(6), artifact.compress(2)
    assert same.content_hash == artifact.content_hash
    assert smaller.nbytes < artifact.nbytes  # control
    assert smaller.compress(2).content_hash == smaller.content_hash
