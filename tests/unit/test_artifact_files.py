"""Patch files as they meet the world: no files at all, files that somebody writes to, headers that lie."""

import copy
import json
import os
import pickle
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safepatch import apply
from safepatch.artifact import tensor_file
from safepatch.artifact.container import HASH_KEY, MAX_HEADER, read_header
from safepatch.artifact.info import PatchInfo, read_info
from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.artifact.tensor_file import TensorFile
from safepatch.errors import ArtifactError, SafepatchError
from safepatch.merging import merge, sources, split
from tests.small import images, new_artifact

FIXTURES = Path(__file__).parents[1] / "fixtures/artifacts"
NAME = "control.zero_mid.delta"
INFO = PatchInfo("control", {"gore": "no gore"}, {"layers": 2}, {"family": "tiny"}, {"sees": "prompt"})


def saved(path: Path, value: float = 1.0, size: int = 1000) -> Path:
    values = torch.arange(float(size)) + value
    return PatchArtifact({NAME: values, "control.clone.a.delta": values * 2}, INFO).save(path)


def refusal(path: Any) -> str:
    """The one line with which every reader refuses what is at `path`."""
    for reader in (read_info, verify, PatchArtifact.open, sources.open_source):
        with pytest.raises(ArtifactError) as caught:
            reader(path, 1.0) if reader is sources.open_source else reader(path)
        assert str(caught.value).isprintable()
    return str(caught.value)


# ---- both versions of the format -------------------------------------------------------------------------------


def test_files_of_both_formats_open_to_the_same_patch() -> None:
    first, second = (PatchArtifact.open(FIXTURES / f"format-{version}.safetensors") for version in (1, 2))
    assert (first.info.format_version, second.info.format_version) == (1, 2)
    assert replace(first.info, format_version=2) == second.info
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in second.tensors.items())
    assert first.content_hash != second.content_hash  # control: they are hashed in two ways


def lora(version: int, path: Path) -> PatchArtifact:
    """A lora patch in a file of that version."""
    tensors = {"lora.a.weight.down": torch.ones(1, 4), "lora.a.weight.up": torch.ones(3, 1)}
    info = replace(INFO, kind="lora", shapes={"lora.a.weight": [3, 4]}, format_version=version)
    return PatchArtifact.open(PatchArtifact(tensors, info).save(path))


def test_from_version_3_on_no_tensor_of_a_file_has_lora_in_its_name(tmp_path: Path) -> None:
    old, new = (lora(version, tmp_path / f"{version}.safetensors") for version in (2, 3))
    assert {*old.tensors} == {*new.tensors} == {"lora.a.weight.down", "lora.a.weight.up"}
    assert all("lora" in name for name in read_header(tmp_path / "2.safetensors").tensors)  # control
    assert not any("lora" in name for name in read_header(tmp_path / "3.safetensors").tensors)
    assert verify(tmp_path / "3.safetensors").shapes == {"lora.a.weight": [3, 4]}
    assert new.content_hash == read_header(tmp_path / "3.safetensors").stated_hash != old.content_hash
    assert new.save(tmp_path / "again.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


@pytest.mark.parametrize(("kind", "version"), [("lora", 3), ("control+lora", 3), ("control", 2), ("lite", 2)])
def test_a_new_patch_has_the_oldest_version_that_holds_it(kind: str, version: int) -> None:
    assert PatchInfo(kind, {"gore": "no gore"}, {"layers": 2}, {"family": "tiny"}).format_version == version


def test_a_bundle_gives_back_parts_of_older_versions_bit_for_bit(tmp_path: Path) -> None:
    paths = [tmp_path / f"{version}.safetensors" for version in (1, 2)]
    for version, path in zip((1, 2), paths, strict=True):
        made = lora(version, path)
        replace(made, info=replace(made.info, instructions={f"c{version}": "no"})).save(path)
    merge(paths, tmp_path / "both.safetensors")
    assert not any("lora" in name for name in read_header(tmp_path / "both.safetensors").tensors)
    for version, path in zip((1, 2), paths, strict=True):
        split(tmp_path / "both.safetensors", f"c{version}", tmp_path / "part.safetensors")
        assert (tmp_path / "part.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_either_format_is_saved_to_the_same_bytes(tmp_path: Path, version: int) -> None:
    path = FIXTURES / f"format-{version}.safetensors"
    artifact = PatchArtifact.open(path)
    assert artifact.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert artifact.content_hash == read_header(path).stated_hash


@pytest.mark.parametrize("version", [1, 2])
def test_no_bit_of_a_fixtures_data_can_change_unnoticed(tmp_path: Path, version: int) -> None:
    data = bytearray((FIXTURES / f"format-{version}.safetensors").read_bytes())
    for place in range(8 + int.from_bytes(data[:8], "little"), len(data), 7):
        data[place] ^= 4
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(ArtifactError, match="altered"):
            verify(tmp_path / "a.safetensors")
        data[place] ^= 4
    (tmp_path / "a.safetensors").write_bytes(data)
    verify(tmp_path / "a.safetensors")  # control


def test_a_file_that_the_safetensors_library_saved_again_still_verifies(tmp_path: Path) -> None:
    path, again = saved(tmp_path / "a.safetensors"), tmp_path / "again.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors, again, dict(reversed(metadata.items())))
    assert again.read_bytes() != path.read_bytes()  # control: header and order are the library's own
    assert PatchArtifact.open(again).content_hash == PatchArtifact.open(path).content_hash
    save_file({**tensors, "control.clone.a.delta": tensors["control.clone.a.delta"] + 1}, again, metadata)
    with pytest.raises(ArtifactError, match="altered"):  # control: content counts
        verify(again)
    save_file(tensors, again, {**metadata, "modelspec.license": "MIT"})
    with pytest.raises(ArtifactError, match="altered"):
        verify(again)


def test_any_number_of_cores_and_blocks_gives_one_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.safetensors", size=700_000)  # several blocks, the last ones in part
    whole = PatchArtifact.open(path)
    monkeypatch.setattr(tensor_file, "SMALL", 1)
    for cores in (1, 3):
        monkeypatch.setattr(tensor_file, "_cores", lambda cores=cores: cores)
        again = PatchArtifact.open(path)
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert whole.content_hash == read_header(path).stated_hash


# ---- a file that changes meanwhile ------------------------------------------------------------------------------


def swap(path: Path) -> None:
    os.replace(saved(path.with_name("other.safetensors"), 5.0), path)


def overwrite(path: Path) -> None:
    path.write_bytes(saved(path.with_name("other.safetensors"), 5.0).read_bytes())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize("change", [swap, overwrite, truncate])
def test_a_file_changed_between_check_and_use_is_refused_or_harmless(tmp_path: Path, change: Any) -> None:
    path = saved(tmp_path / "a.safetensors")
    before = PatchArtifact.open(path)
    file = TensorFile.open(path)
    change(path)
    if change is swap:  # the descriptor is of the file that was checked
        assert all(torch.equal(before.tensors[name], tensor) for name, tensor in file.load().items())
    else:
        with pytest.raises(ArtifactError, match=rf"{path}: (altered|truncated)"):
            file.load()
    if change is not truncate:
        assert PatchArtifact.open(path).content_hash != before.content_hash  # control: the file is another now


@pytest.mark.parametrize("change", [swap, overwrite, truncate])
@pytest.mark.parametrize("conflicts", [True, False])
@pytest.mark.parametrize("method", ["bundle", "linear"])
def test_a_source_changed_during_a_merge_is_refused_or_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, conflicts: bool, method: str
) -> None:
    paths = [saved(tmp_path / name, value) for name, value in (("a.safetensors", 1.0), ("b.safetensors", 2.0))]
    expected = merge(paths, tmp_path / "out.safetensors", method, conflicts=conflicts).content_hash
    opened = []

    def open_and_change(path: str, weight: float) -> sources.Source:
        source = sources.open_source(path, weight)
        if not opened:
            change(Path(path))
        opened.append(path)
        return source

    monkeypatch.setattr("safepatch.merging.engine.open_source", open_and_change)
    before = (tmp_path / "out.safetensors").read_bytes()
    if change is swap:
        assert merge(paths, tmp_path / "new.safetensors", method, conflicts=conflicts).content_hash == expected
    else:
        with pytest.raises(ArtifactError, match=r"altered|truncated"):
            merge(paths, tmp_path / "out.safetensors", method, conflicts=conflicts)
    assert (tmp_path / "out.safetensors").read_bytes() == before
    assert len(opened) == 2  # control: the change came before anything was read


def test_a_merged_patch_is_read_from_its_file_as_it_was_written(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{i}.safetensors", i) for i in (1.0, 2.0)]
    merged = merge(paths, tmp_path / "out.safetensors", "linear")
    again = PatchArtifact.open(tmp_path / "out.safetensors")
    assert torch.equal(merged.delta("control.zero_mid"), again.delta("control.zero_mid"))
    overwrite(tmp_path / "out.safetensors")
    with pytest.raises(ArtifactError, match=r"out\.safetensors: altered while it was read"):
        merged.delta("control.clone.a")


def test_asking_what_a_file_holds_reads_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TensorFile.open(saved(tmp_path / "a.safetensors"))
    artifact = PatchArtifact(file, INFO)
    with monkeypatch.context() as patched:
        patched.setattr(TensorFile, "_fill", lambda *_: pytest.fail("it was read"))
        assert NAME in file
        assert "gone" not in file
        assert artifact.shape("control.zero_mid") == (1000,)
        assert (artifact.nbytes, artifact.dtype) == (8000, torch.float32)
    assert artifact.delta("control.zero_mid").shape == (1000,)  # control: now it is


def test_a_copy_of_tensors_in_a_file_stands_in_memory(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors")
    file = TensorFile.open(path)
    copies = copy.deepcopy(file), pickle.loads(pickle.dumps(file))
    before = file[NAME]
    truncate(path)
    assert all(torch.equal(copied[NAME], before) for copied in copies)
    with pytest.raises(ArtifactError, match="truncated"):  # control
        file[NAME]


@pytest.mark.parametrize("kind", ["lora", "control"])
def test_an_applied_patch_is_no_view_of_its_file(tmp_path: Path, small_pipe: Any, kind: str) -> None:
    artifact = new_artifact(small_pipe.unet, kind)  # float32: nothing has to be converted
    path = artifact.save(tmp_path / "a.safetensors")
    base = images(small_pipe)
    with apply(small_pipe, path):
        before = images(small_pipe)
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(b"\x3f" * 1000)
        assert torch.equal(images(small_pipe), before)
        os.truncate(path, 100)
        assert torch.equal(images(small_pipe), before)
    assert not torch.equal(before, base)  # control: the patch does something
    with pytest.raises(ArtifactError):
        apply(small_pipe, path)


# ---- what is no file -------------------------------------------------------------------------------------------


def test_what_is_no_regular_file_is_refused_in_one_line_without_waiting(tmp_path: Path) -> None:
    fifo, loop = tmp_path / "fifo", tmp_path / "loop"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    assert "a device or a pipe" in refusal(fifo)
    assert "a device or a pipe" in refusal(Path("/dev/zero"))
    assert "a folder" in refusal(tmp_path)
    assert "cannot read" in refusal(loop)
    assert "no path of a file" in refusal(f"{tmp_path}/a\0b")
    assert "no such file" in refusal(tmp_path / "gone\x1b[31m\n")
    link = tmp_path / "link"
    link.symlink_to(saved(tmp_path / "a.safetensors"))
    assert verify(link) == INFO  # control: a link to a file is that file


def test_only_a_regular_file_is_replaced(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to("/dev/null")
    for target in (fifo, link, tmp_path):
        with pytest.raises(SafepatchError, match=r"cannot write .*no regular file"):
            saved(target)
    assert fifo.is_fifo()
    assert link.is_symlink()
    with pytest.raises(SafepatchError, match=r"cannot write .*no path of a file"):
        saved(tmp_path / "a\0b")
    path = saved(tmp_path / "a.safetensors")
    assert saved(path, 2.0).read_bytes()  # control


def test_a_merge_into_a_loop_of_links_or_a_nul_is_one_line(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{i}.safetensors", i) for i in (1.0, 2.0)]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for target in (loop / "a.safetensors", f"{tmp_path}/a\0b.safetensors", "/dev/null", tmp_path):
        with pytest.raises(SafepatchError, match="cannot write"):
            merge(paths, target)


# ---- headers ----------------------------------------------------------------------------------------------------


def with_header(path: Path, change: Any) -> Path:
    """A file whose header was changed and whose data were not."""
    data = saved(path).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return path


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("shape", [1000.0], "bad header entry"),
        ("shape", [-1000], "bad header entry"),
        ("shape", [True] * 2, "bad header entry"),
        ("shape", "1000", "bad header entry"),
        ("shape", [1] * 20 + [1000], "bad header entry"),
        ("shape", [10**30], "disagree"),
        ("shape", [0, 10**30], "disagree"),
        ("data_offsets", [4000.0, 8000.0], "bad header entry"),
        ("data_offsets", [-4000, 0], "bad header entry"),
        ("data_offsets", [4000], "bad header entry"),
        ("data_offsets", {"a": 1, "b": 2}, "bad header entry"),
        ("dtype", ["F32"], "bad header entry"),
        ("dtype", None, "bad header entry"),
    ],
)
def test_entries_are_checked_before_they_are_believed(tmp_path: Path, key: str, value: Any, says: str) -> None:
    path = with_header(tmp_path / "a.safetensors", lambda header: header[NAME].update({key: value}))
    assert says in refusal(path)


def test_a_tensor_that_is_not_aligned_is_refused(tmp_path: Path) -> None:
    def shift(header: dict[str, Any]) -> None:
        first, second = header["control.clone.a.delta"], header[NAME]
        first.update(dtype="F16", shape=[1], data_offsets=[0, 2])
        second.update(shape=[1999], data_offsets=[2, 7998])

    assert "not aligned" in refusal(with_header(tmp_path / "a.safetensors", shift))


PEAK = """
import resource, sys
from safepatch.artifact.info import read_info
from safepatch.errors import ArtifactError
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_info(sys.argv[1])
except ArtifactError as error:
    print(error, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("bomb", ["lists", "tables", "texts"])
def test_a_header_bomb_is_refused_before_it_is_parsed(tmp_path: Path, bomb: str) -> None:
    size = MAX_HEADER - 1000
    filled = {"lists": b"[]," * (size // 3) + b"[]", "tables": b'{"a":{}},' * (size // 9) + b"1"}
    text = b'{"a":[' + filled[bomb] + b"]}" if bomb in filled else b'{"a":"' + b"a" * size + b'"}'
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    assert "where its tensors explain" in done.stderr
    assert int(done.stdout) < 100_000  # KB; parsed, the first two take five times as much
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0  # control: sizes are told on this system


def test_a_file_is_not_written_that_could_not_be_read(tmp_path: Path) -> None:
    large = PatchArtifact({NAME: torch.ones(3)}, replace(INFO, evaluation={"a": "a" * (1 << 21)}))
    with pytest.raises(ArtifactError, match="where its tensors explain"):
        large.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    assert replace(large, info=INFO).save(tmp_path / "a.safetensors").is_file()  # control


def test_the_stated_hash_is_that_of_the_tree(tmp_path: Path) -> None:
    """The format, computed by its description alone."""
    from hashlib import sha256

    path = saved(tmp_path / "a.safetensors", size=700_000)
    with safe_open(path, "pt") as file:
        metadata, names = dict(file.metadata()), list(file.keys())
        stated, tensors = metadata.pop(HASH_KEY), {name: file.get_tensor(name) for name in names}
    said = {}
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        blocks = [sha256(data[i : i + (1 << 20)]).digest() for i in range(0, len(data), 1 << 20)]
        said[name] = {"dtype": "F32", "shape": list(tensor.shape), "sha256": sha256(b"".join(blocks)).hexdigest()}
    text = json.dumps({"metadata": metadata, "tensors": said}, sort_keys=True, separators=(",", ":"))
    assert stated == f"0x{sha256(text.encode()).hexdigest()}"
