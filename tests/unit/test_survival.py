"""Work survives: kills, full disks, two runs in one folder, and models that are not all there."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safepatch.errors import ModelNotFound, SafepatchError, UnsupportedModel
from safepatch.files import LOCK, claimed, replacing, replacing_folder, require_writable, sweep, write_text
from safepatch.models import weights
from safepatch.models.load import load_pipeline
from safepatch.models.weights import PickledWeights, SafeWeights
from safepatch.runtime.check import check
from safepatch.runtime.fuse import fuse, fuse_model
from safepatch.training.config import load_train_config
from safepatch.training.folder import RunFolder
from safepatch.training.trainer import train
from tests.families import small_family_pipe, tokenizer_folder, write_original
from tests.small import new_artifact, new_small_pipe, small_artifact

ROOT = Path(__file__).parents[2]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refused(do: Callable[[], object], says: str, kind: type[SafepatchError] = SafepatchError) -> str:
    """The one line of the error that `do` raises."""
    with pytest.raises(kind, match=says) as caught:
        do()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- files that appear whole, and locks ------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from safepatch import files
with getattr(files, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(what: str, path: Path) -> Iterator[subprocess.Popen]:
    """Another process in the middle of `what`; killed as the kernel does it, unless it was."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, what, path], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "old")
    with suppress(KeyError), replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert (path.read_text(), names(tmp_path)) == ("old", ["x.json"])
    write_text(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("new", ["x.json"])  # control


def test_files_have_the_mode_that_any_file_has(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_pipe_or_a_folder_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        refused(lambda path=path: write_text(path, ""), "it is no regular file")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("what", ["replacing", "replacing_folder"])
def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path, what):
    (tmp_path / "mine.partial").write_text("of somebody else")
    with holder(what, tmp_path / "out") as process:
        sweep(tmp_path)
        assert len(names(tmp_path)) == 2  # control: it is at work
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(names(tmp_path)) == 2  # control: it could not tidy up
        write_text(tmp_path / "next", "")
    assert names(tmp_path) == ["mine.partial", "next"]


def test_a_folder_that_is_made_appears_whole_or_not_at_all(tmp_path):
    with suppress(KeyError), replacing_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("")
        raise KeyError
    assert names(tmp_path) == []
    with replacing_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("")
    assert names(tmp_path / "out") == ["a"]  # control


def test_a_folder_has_one_owner_until_that_ends_or_dies(tmp_path):
    with holder("claimed", tmp_path) as process:
        line = refused(lambda: claimed(tmp_path).__enter__(), "is in use by process")
        assert f"process {process.pid} on " in line
        assert " since 20" in line
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert names(tmp_path) == [LOCK]  # control: it could not tidy up
        with claimed(tmp_path):
            refused(lambda: claimed(tmp_path).__enter__(), f"process {os.getpid()}")
    with claimed(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_folder_that_may_not_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    require_writable(tmp_path / "new" / "folder" / "x.png")  # control
    assert names(tmp_path) == []
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused(lambda: require_writable(tmp_path / "x.png"), r"cannot write to .*x\.png \(Permission denied\)")


# ---- training --------------------------------------------------------------------------------------------------

WORDS = (
    "category=weapons", "model=tiny-sd", "training.steps=3", "training.batch_size=1", "training.log_every=1",
    "training.checkpoint_every=10", "data.pairs=2", "data.steps=1", "patch.gate=0", "patch.rank=2",
)  # fmt: skip


def run(out: Path, *words: str) -> Path:
    return train(new_small_pipe(), load_train_config(None, [*WORDS, f"output={out}", *words]))


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with holder("claimed", tmp_path):
        refused(lambda: run(tmp_path), "is in use by process")
        assert names(tmp_path) == [LOCK]  # and nothing of the other is touched
    assert run(tmp_path).is_file()  # control


def test_a_full_disk_is_one_line_and_the_work_until_then_is_kept(tmp_path, monkeypatch):
    log = RunFolder.log

    def failing(self: RunFolder, values: dict[str, Any]) -> None:
        if values["step"] == 2:
            raise FULL
        log(self, values)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", failing)
        refused(lambda: run(tmp_path), "the disk is full")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert run(tmp_path).read_bytes() == run(tmp_path / "whole").read_bytes()


def test_what_fails_after_the_last_step_costs_no_step(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("safepatch.training.trainer._packed", lambda *_: refused)
        with pytest.raises(AttributeError):
            run(tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    (tmp_path / "log.jsonl").write_text((tmp_path / "log.jsonl").read_text() + '{"step": 4, "lo')  # torn by a kill
    run(tmp_path)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert not (tmp_path / "checkpoint.pt").exists()


# ---- fuse ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path) -> Path:
    return small_artifact("lora").save(tmp_path / "lora.safetensors")


@pytest.fixture
def folder(tmp_path, small_pipe) -> Path:
    small_pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_full_disk_is_blamed_for_itself_and_leaves_nothing(folder, lora, tmp_path, monkeypatch):
    written = weights.raw_bytes

    def failing(tensor: torch.Tensor) -> memoryview:
        if tensor.numel() > 4000:
            raise FULL
        return written(tensor)

    before = names(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(weights, "raw_bytes", failing)
        line = refused(lambda: fuse_model(folder, lora, tmp_path / "safe"), "the disk is full: cannot write to")
        assert str(folder) not in line
    assert names(tmp_path) == before
    fuse_model(folder, lora, tmp_path / "safe")  # control


def test_whatever_holds_the_weights_is_fused_or_left_out_and_both_are_listed(tmp_path):
    """As the published folder of Stable Diffusion 1.5 has it."""
    pipe, model, told = small_family_pipe("sd1"), tmp_path / "model", []
    pipe.save_pretrained(model)
    whole = write_original(pipe, "sd1", model / "v1-5-pruned-emaonly.safetensors")
    torch.save({"state_dict": load_file(whole), "epoch": 3}, model / "v1-5-pruned.ckpt")
    torch.save(pipe.unet.state_dict(), model / "unet" / "diffusion_pytorch_model.bin")
    pipe.unet.save_pretrained(model / "unet", variant="fp16", max_shard_size="200KB")
    (model / "unet" / "diffusion_pytorch_model.msgpack").write_bytes(b"flax")
    (model / "unet" / "old.bin.index.json").write_text('{"weight_map": {"x": "gone.bin"}}')
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, model / "vae.safetensors")
    (model / ".git").mkdir()
    (model / ".git" / "blob").write_bytes(b"the unpatched model")
    (model / "README.md").write_text("theirs")
    patch = new_artifact(pipe.unet, "lora").save(tmp_path / "lora.safetensors")

    def listed(allow_pickle: bool) -> tuple[set[str], set[str]]:
        told.clear()
        fuse_model(model, patch, tmp_path / f"safe-{allow_pickle}", allow_pickle=allow_pickle, tell=told.append)
        fused, left = ({line.split()[n] for line in told if line.startswith(w)} for w, n in (("fused", 1), ("left", 2)))
        return fused, left

    safe = {"unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", whole.name}
    pickles = {"v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin"}
    never = {"unet/diffusion_pytorch_model.msgpack", "vae.safetensors", ".git/"}
    assert listed(False) == (safe, pickles | never)
    assert listed(True) == (safe | pickles, never)
    fuse(pipe, patch)
    out, wanted = tmp_path / "safe-True", pipe.unet.state_dict()
    places = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert not places & {*never, "unet/old.bin.index.json", ".git/blob"}
    assert (out / "README.md").read_text() == "theirs"
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o666 & ~umask()}
    pickled = torch.load(out / "unet" / "diffusion_pytorch_model.bin", weights_only=True)
    assert all(torch.equal(pickled[name], weight) for name, weight in wanted.items())
    whole_again = load_pipeline(out / whole.name, tokenizer=tokenizer_folder(tmp_path / "tokenizer")).unet.state_dict()
    assert all(torch.equal(whole_again[name], weight) for name, weight in wanted.items())
    content = torch.load(out / "v1-5-pruned.ckpt", weights_only=True)
    assert content["epoch"] == 3
    fused = load_file(out / whole.name)
    assert all(torch.equal(content["state_dict"][name], tensor) for name, tensor in fused.items())
    changed = [name for name, tensor in load_file(whole).items() if not torch.equal(tensor, fused[name])]
    assert len(changed) == len({name.rpartition(".")[0] for name in load_file(patch)})  # control: it is no copy


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_a_fused_embedded_model_can_be_read_by_everyone(tmp_path):
    patch = new_artifact(load_pipeline("tiny-sd").unet, "lora").save(tmp_path / "lora.safetensors")
    out = fuse_model("tiny-sd", patch, tmp_path / "safe")
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o666 & ~umask()}


def test_a_folder_is_never_fused_into_itself(folder, lora):
    refused(lambda: fuse_model(folder, lora, folder / "safe"), "is inside")


# ---- reading files a tensor at a time --------------------------------------------------------------------------


def test_a_file_of_weights_reads_and_writes_any_dtype(tmp_path):
    kept = {"a": torch.arange(6).reshape(2, 3), "b": torch.zeros(0), "c": torch.ones(2).to(torch.float8_e4m3fn)}
    kept |= {"d": torch.randn(3, dtype=torch.bfloat16), "e": torch.tensor(True)}
    save_file(kept, tmp_path / "x.safetensors", {"note": "theirs"})
    torch.save(kept, tmp_path / "x.bin")
    for file in (SafeWeights.open(tmp_path / "x.safetensors"), PickledWeights.open(tmp_path / "x.bin")):
        with (tmp_path / "y.safetensors").open("wb") as out:
            weights.write_changed(file, out, kept, {"d"}, lambda _, tensor: tensor + 1, {"note": "ours"})
        found = load_file(tmp_path / "y.safetensors")
        assert found.keys() == kept.keys()
        assert torch.equal(found["d"], kept["d"] + 1)
        assert all(torch.equal(found[n].view(torch.uint8), kept[n].view(torch.uint8)) for n in "abc")


def test_drift_reads_the_encoder_alone_one_weight_at_a_time(folder, tmp_path, monkeypatch):
    patch, read = new_artifact(new_small_pipe().unet).save(tmp_path / "patch.safetensors"), []
    raw = SafeWeights.raw
    monkeypatch.setattr(SafeWeights, "raw", lambda self, name: read.append(name) or raw(self, name))
    assert check(folder, patch).drift == 0
    assert read == sorted(read)
    assert not any(name.startswith(("up_blocks", "conv_out")) for name in read)
    assert len(read) == len(set(read)) > 50  # control


# ---- models that are not all there -----------------------------------------------------------------------------


def test_a_folder_with_one_variant_only_loads_as_float32(tmp_path, small_pipe, lora):
    wanted = {name: weight.half().float() for name, weight in small_pipe.unet.state_dict().items()}
    for part in ("unet", "vae", "text_encoder"):
        getattr(small_pipe, part).half()
    small_pipe.save_pretrained(tmp_path / "model", variant="fp16")
    assert not list((tmp_path / "model").rglob("*model.safetensors"))  # control
    pipe = load_pipeline(tmp_path / "model")
    assert all(torch.equal(weight, wanted[name]) for name, weight in pipe.unet.state_dict().items())
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert check(tmp_path / "model", lora).drift == pytest.approx(0, abs=0.01)
    assert load_pipeline(fuse_model(tmp_path / "model", lora, tmp_path / "safe")).unet.dtype == torch.float32


def without_shard(folder: Path) -> None:
    load_pipeline(folder).unet.save_pretrained(folder / "unet", max_shard_size="500KB")
    next((folder / "unet").glob("*-00002-of-*")).unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)


def without_words(folder: Path) -> None:
    for path in (folder / "tokenizer").iterdir():
        path.unlink()


LACKING: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard": (without_shard, r"unet lacks diffusion_pytorch_model-00002-of-00005.safetensors; fetch the model again"),
    "weights": (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae holds no weights"),
    "half": (lambda f: os.truncate(f / "unet" / "diffusion_pytorch_model.safetensors", 5000), "cannot be read"),
    "config": (lambda f: (f / "unet" / "config.json").unlink(), "cannot be read"),
    "words": (without_words, "no tokenizer at .*tokenizer, it has no word list"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", sorted(LACKING))
def test_a_folder_that_lacks_something_is_one_line_that_names_it(folder, what):
    load_pipeline(folder)  # control
    spoil, says = LACKING[what]
    spoil(folder)
    refused(lambda: load_pipeline(folder), says)


def test_an_empty_tokenizer_folder_is_one_line(tmp_path):
    path = write_original(small_family_pipe("sd1"), "sd1", tmp_path / "model.SAFETENSORS")
    (tmp_path / "empty").mkdir()
    refused(
        lambda: load_pipeline(path, tokenizer=tmp_path / "empty"),
        "no tokenizer, and there is none at .*empty",
        ModelNotFound,
    )
    pipe = load_pipeline(
        path, tokenizer=tokenizer_folder(tmp_path / "tokenizer")
    )  # control, whatever the suffix's case
    assert len(pipe.tokenizer) == 1209


def test_a_file_without_a_vae_says_so(tmp_path):
    path = write_original(small_family_pipe("sd1"), "sd1", tmp_path / "model.safetensors")
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("first_stage_model.")}
    save_file(tensors, path)
    refused(lambda: load_pipeline(path), "holds no VAE; use the whole checkpoint", UnsupportedModel)
    unet = {name.removeprefix(weights.UNET): tensor for name, tensor in tensors.items() if weights.UNET in name}
    save_file(unet, path)
    refused(lambda: load_pipeline(path), "holds a UNet alone; use the whole checkpoint", UnsupportedModel)


# ---- the whole, by force ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_kills_and_full_disks_break_nothing():
    """The short form of `python tests/stress/kills.py`."""
    words = [sys.executable, "-W", "ignore", ROOT / "tests" / "stress" / "kills.py", "--kills", "4"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "4 kills, " in done.stdout
    assert "0 faults" in done.stdout
