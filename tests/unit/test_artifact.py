"""The artifact: what it refuses and what it says."""

import errno
import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from safepatch.artifact import writer
from safepatch.artifact.info import FORMAT_VERSION, PatchInfo, read_info
from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.errors import ArtifactError, UnknownName

INFO = PatchInfo("control", {"gore": "no gore"}, {"layers": 2}, {"family": "tiny", "hash": "0x1"}, {"sees": "prompt"})


def build(info: PatchInfo = INFO) -> PatchArtifact:
    return PatchArtifact({"control.zero_mid.weight.delta": torch.arange(12.0).reshape(3, 4)}, info)


def saved(folder: Path, info: PatchInfo = INFO) -> Path:
    return build(info).save(folder / "patch.safetensors")


def file_of(header: str, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def test_info_survives_metadata() -> None:
    info = PatchInfo(**{**vars(INFO), "recipe": {"method": "linear"}, "license": "MIT", "training": {"date": "2025"}})
    metadata = info.to_metadata()
    assert PatchInfo.from_metadata(metadata) == info
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.date"] == "2025"
    assert "modelspec.date" not in INFO.to_metadata()
    assert metadata["safepatch.instructions"] == '{"gore":"no gore"}'


def test_info_is_sorted_copied_and_titled() -> None:
    given = {"weapons": "w", "gore": "g"}
    info = PatchInfo("lite", given, {}, {})
    given["drugs"] = "d"
    assert info.categories == ("gore", "weapons")
    assert info.title == "lite patch: gore, weapons"


@pytest.mark.parametrize("evaluation", [{"asr": float("nan")}, {"path": Path()}, [1]])
def test_info_that_is_not_json_is_refused(evaluation: dict) -> None:
    with pytest.raises(ArtifactError, match="patch info 'evaluation'"):
        PatchInfo("control", {}, {}, {}, evaluation=evaluation)


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    with safe_open(saved(tmp_path), framework="pt") as file:
        assert torch.equal(file.get_tensor("control.zero_mid.weight.delta"), build().delta("control.zero_mid.weight"))
        assert file.metadata()["modelspec.architecture"] == "tiny/control"
        assert file.metadata()["safepatch.hash_sha256"] == build().content_hash


def test_read_info_reads_the_header_only(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_info(path) == INFO
    with pytest.raises(ArtifactError, match="altered"):  # control: the tensors are not what was saved
        PatchArtifact.open(path)


def test_low_rank_delta_is_up_times_down() -> None:
    up, down = torch.randn(4, 2), torch.randn(2, 27)
    info = PatchInfo(**{**vars(INFO), "shapes": {"control.w": [4, 3, 3, 3]}})
    artifact = PatchArtifact({"control.w.up": up, "control.w.down": down}, info)
    assert torch.equal(artifact.deltas()["control.w"], (up @ down).reshape(4, 3, 3, 3))
    assert artifact.nbytes == 4 * (8 + 54)
    assert artifact.parameter_names() == ("control.w",)


@pytest.mark.parametrize(
    ("tensors", "shapes"),
    [
        ({"a.weight": torch.ones(2)}, {}),
        ({"delta": torch.ones(2)}, {}),
        ({"a.up": torch.ones(2, 1)}, {"a": [2, 2]}),
        ({"a.up": torch.ones(2, 1), "a.down": torch.ones(1, 2)}, {}),
        ({"a.up": torch.ones(2, 1), "a.down": torch.ones(1, 2)}, {"a": [2, 3]}),
        ({"a.up": torch.ones(2, 1), "a.down": torch.ones(2, 2)}, {"a": [2, 2]}),
        ({"a.up": torch.ones(2, 1), "a.down": torch.ones(1, 2), "a.delta": torch.ones(2, 2)}, {"a": [2, 2]}),
        ({"a.delta": torch.ones(2)}, {"a": [2]}),
        ({"a.delta": torch.ones(2)}, {"b": [2, 2]}),
        ({"a.delta": torch.ones(2, dtype=torch.int64)}, {}),
    ],
)
def test_tensors_the_format_does_not_know_are_refused(tensors: dict, shapes: dict) -> None:
    with pytest.raises(ArtifactError, match=r"'(a|b||a\.delta)' (holds|is)"):
        PatchArtifact(tensors, PatchInfo(**{**vars(INFO), "shapes": shapes}))


def test_unknown_parameter_gives_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'control\.zero_mid\.weight\.delta'"):
        build().delta("control.zero_mid.wieght")


def test_astype_halves_the_bytes_and_refuses_overflow() -> None:
    assert build().astype(torch.float16).nbytes * 2 == build().nbytes
    with pytest.raises(ArtifactError, match="overflows"):
        PatchArtifact({"a.delta": torch.tensor([1e6])}, INFO).astype(torch.float16)


def test_compress_refuses_rank_zero() -> None:
    with pytest.raises(ArtifactError, match="at least 1"):
        build().compress(0)


def test_empty_and_strided_tensors_survive(tmp_path: Path) -> None:
    tensors = {"control.a.delta": torch.empty(0, 3), "control.zero_b.delta": torch.arange(6.0).reshape(2, 3).T}
    opened = PatchArtifact.open(PatchArtifact(tensors, INFO).save(tmp_path / "a.safetensors"))
    assert opened.tensors["control.a.delta"].shape == (0, 3)
    assert torch.equal(opened.tensors["control.zero_b.delta"], tensors["control.zero_b.delta"])


# ---- files -----------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.safetensors: no such file"):
        read_info(tmp_path / "gone.safetensors")


def test_folder_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="a folder, a device or a pipe"):
        read_info(tmp_path)


def test_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    path.write_bytes(pickle.dumps({"a": list(range(100))}))
    with pytest.raises(ArtifactError, match="refused: not a safetensors file"):
        PatchArtifact.open(path)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ArtifactError, match="refused: not a safetensors file"):
        read_info(path)


def test_another_programs_safetensors_is_not_a_patch(tmp_path: Path) -> None:
    save_file({"a.delta": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ArtifactError, match="no safepatch metadata"):
        read_info(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0])
def test_unknown_format_version(tmp_path: Path, version: int) -> None:
    path = saved(tmp_path, PatchInfo(**{**vars(INFO), "format_version": version}))
    with pytest.raises(ArtifactError, match=f"has format {version}, .* upgrade safepatch"):
        verify(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a.delta":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a.delta":{}}', "a key twice"),
        ('{"a.delta":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"dtype":"F16"}}', "a key twice"),
        ('{"a.delta":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "disagree"),
        ('{"a.delta":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}', "bad header entry"),
        ('{"a.delta":{"shape":[1],"data_offsets":[0,4]}}', "bad header entry"),
        ('{"a.delta":7}', "bad header entry"),
        ('{"a.delta":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}', "starts at byte 2"),
        ('{"a.delta":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "truncated"),
        ("{}", "damaged"),
        ('{"a":', "not JSON"),
        ('{"__metadata__":{"a":1}}', "metadata"),
        ('{"a":' * 100_000, "not JSON"),
    ],
)
def test_crafted_headers_are_refused(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "crafted.safetensors"
    path.write_bytes(file_of(header, bytes(4)))
    with pytest.raises(ArtifactError, match=message) as caught:
        verify(path)
    assert "\n" not in str(caught.value)


def test_huge_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes((10**12).to_bytes(8, "little") + b"{}")
    with pytest.raises(ArtifactError, match="refused"):
        read_info(path)


def test_bad_metadata_json_names_the_problem() -> None:
    metadata = INFO.to_metadata()
    with pytest.raises(ArtifactError, match=r"safepatch\.config"):
        PatchInfo.from_metadata({key: metadata[key] for key in metadata.keys() - {"safepatch.config"}})
    with pytest.raises(ArtifactError, match="give a dict"):
        PatchInfo.from_metadata({**metadata, "safepatch.config": json.dumps([1])})


@pytest.mark.parametrize("folder", ["missing", "file.txt"])
def test_unwritable_folder(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file.txt").write_text("not a folder")
    with pytest.raises(ArtifactError, match=r"cannot write .*; choose a writable folder"):
        build().save(tmp_path / folder / "a.safetensors")


@pytest.mark.parametrize(("code", "reason"), [(errno.ENOSPC, "No space left"), (errno.EIO, "Input/output")])
def test_full_disk_leaves_the_old_file_and_no_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    before = saved(tmp_path).read_bytes()

    def fail(_: int) -> None:
        assert list(tmp_path.glob("*.partial")) or list(tmp_path.glob(".*.partial"))  # control: it was being written
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    other = PatchArtifact({"b.delta": torch.ones(3)}, INFO)
    with pytest.raises(ArtifactError, match=f"cannot write .*{reason}"):
        other.save(tmp_path / "patch.safetensors")
    assert os.listdir(tmp_path) == ["patch.safetensors"]
    assert (tmp_path / "patch.safetensors").read_bytes() == before


def test_a_disk_that_fails_while_there_is_more_to_write_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written so far is put on the disk beside other work, and the disk tells of a failure only once."""
    monkeypatch.setattr(writer, "RUN", 8)
    calls: list[str] = []

    def fail_once(_: int) -> None:
        calls.append(threading.current_thread().name)
        if len(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail_once)
    patch = PatchArtifact({"a.delta": torch.ones(3), "b.delta": torch.ones(3)}, INFO)
    failing = 0
    patch.save(tmp_path / "a.safetensors")  # control
    assert len({*calls}) == 2  # at the end too
    calls.clear()
    failing = 1
    with pytest.raises(ArtifactError, match=r"cannot write .*Input/output"):
        patch.save(tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]
