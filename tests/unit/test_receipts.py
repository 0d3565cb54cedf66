"""A receipt is of one image's pixels, says what the patch did to it, and cannot be altered once it is signed."""

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from safepatch.artifact.container import read_header
from safepatch.errors import ReceiptError
from safepatch.hosting import keys
from safepatch.hosting.making import Asked
from safepatch.hosting.receipt import KEYWORD, sealed, sidecar, verify_image
from safepatch.hosting.recording import recording
from safepatch.hosting.replay import replay
from safepatch.hosting.stamp import Stamp
from safepatch.patch import PATCH_KINDS
from safepatch.runtime.apply import apply
from tests.laws.test_window_laws import listening
from tests.small import new_small_pipe

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
OPENS, SHUT = "cat knife dog", "a red dog"


@pytest.fixture(scope="module")
def pipe():
    return new_small_pipe()


@pytest.fixture(scope="module")
def drawn(pipe, tmp_path_factory) -> Path:
    """A folder with keys, a patch, and an image with a receipt for which its gate opens, and one for which not."""
    folder = tmp_path_factory.mktemp("drawn")
    keys.keygen(folder / "key.pem")
    listening(pipe).save(folder / "patch.safetensors")
    stamp = Stamp.of(folder / "key.pem")
    for name, prompt in (("opens", OPENS), ("shut", SHUT)):
        draw(pipe, folder, name, prompt, stamp)
    return folder


def draw(pipe, folder: Path, name: str, prompt: str, stamp: Stamp, **options) -> Path:
    patch, out = folder / "patch.safetensors", folder / f"{name}.png"
    with apply(pipe, patch, **options) as handle:
        stamp.draw(pipe, handle, Asked.of(pipe, prompt, 7, 2, 4.0, None), out)
    return out


def altered(path: Path, out: Path, change=None, text: str | None = None) -> Path:
    """A copy with other pixels or another receipt."""
    with Image.open(path) as picture:
        picture.load()
        chunks = PngInfo()
        chunks.add_itxt(KEYWORD, text_of(picture) if text is None else text)
        copied = picture.copy()
    if change:
        change(copied)
    copied.save(out, "PNG", pnginfo=chunks)
    return out


def text_of(picture: Any) -> str:
    return picture.text[KEYWORD]


def flip(picture: Any) -> None:
    red, green, blue = picture.getpixel((3, 4))
    picture.putpixel((3, 4), (red ^ 1, green, blue))


def test_a_receipt_says_what_the_gate_and_the_patch_did(drawn):
    opens, shut = (verify_image(drawn / f"{name}.png", drawn / "key.pub.pem") for name in ("opens", "shut"))
    assert opens.is_vouched_for
    assert opens.key == keys.raw(keys.public_key(drawn / "key.pub.pem"))
    threshold = opens.receipt["patch"]["thresholds"]["weapons"]
    assert opens.receipt["denoising"]["acted_on"] == [0, 1]
    assert all(p >= threshold for p in opens.receipt["denoising"]["gates"]["weapons"])
    assert shut.receipt["denoising"]["acted_on"] == []
    assert all(p < threshold for p in shut.receipt["denoising"]["gates"]["weapons"])
    assert (opens.receipt["identical_to_base"], shut.receipt["identical_to_base"]) == (False, True)
    assert len(opens.receipt["denoising"]["timesteps"]) == opens.receipt["steps"] == 2
    assert OPENS not in json.dumps(opens.receipt)
    assert "acted in 2 of 2 steps" in opens.lines()[1]


def test_the_hash_is_of_the_patch_that_was_applied_whatever_lies_there_now(pipe, drawn, tmp_path):
    path, out = tmp_path / "patch.safetensors", tmp_path / "image.png"
    shutil.copy(drawn / "patch.safetensors", path)
    applied = read_header(path).stated_hash
    with apply(pipe, path) as handle:
        listening(pipe, category="gore").save(path)
        Stamp().draw(pipe, handle, Asked.of(pipe, SHUT, 7, 1, 4.0, None), out)
    assert read_header(path).stated_hash != applied  # control
    assert verify_image(out).receipt["patch"]["hash"] == applied


def test_identical_to_base_is_a_fact(pipe, drawn):
    for name, prompt in (("opens", OPENS), ("shut", SHUT)):
        base = drawn / f"{name}-base.png"
        Stamp().draw(pipe, None, Asked.of(pipe, prompt, 7, 2, 4.0, None), base)
        verified = verify_image(drawn / f"{name}.png")
        assert (verify_image(base).receipt["pixels"] == verified.receipt["pixels"]) == (name == "shut")
        assert verified.receipt["identical_to_base"] == (name == "shut")


@pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
def test_rows_of_a_batch_are_recorded_apart(pipe, kind):
    with apply(pipe, listening(pipe, kind)) as handle:
        with recording(handle, images=3) as images:
            call = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 4.0}
            pipe([SHUT, OPENS, SHUT], output_type="latent", **call)
        pipe([OPENS], num_inference_steps=1, height=64, width=64, output_type="latent")
        assert [each.acted for each in images] == [[], [0, 1], []]
        assert [each.opened(handle.thresholds) for each in images] == [(), ("weapons",), ()]
        assert [len(each.timesteps) for each in images] == [2, 2, 2]  # what came afterwards is not in it
        handle.scale = 0
        with recording(handle) as images:
            pipe([OPENS], num_inference_steps=1, height=64, width=64, output_type="latent")
        assert images[0].acted == []
        assert len(images[0].timesteps) == 1


def test_a_patch_that_acts_late_says_in_which_steps(pipe, drawn, tmp_path):
    (tmp_path / "patch.safetensors").write_bytes((drawn / "patch.safetensors").read_bytes())
    out = draw(pipe, tmp_path, "late", OPENS, Stamp(with_prompt=True), start=0.4)
    receipt = verify_image(out).receipt
    assert receipt["denoising"]["acted_on"] == [1]
    assert receipt["denoising"]["gates"]["weapons"][0] is None
    assert receipt["prompt"]["text"] == OPENS
    assert replay(out, verify_image(out), pipe, tmp_path / "patch.safetensors") == ["replayed: the same pixels"]


def test_a_changed_pixel_and_anothers_receipt_are_noticed(drawn, tmp_path):
    same = altered(drawn / "opens.png", tmp_path / "same.png")
    assert verify_image(same, drawn / "key.pub.pem")  # control: saved anew it is still its own
    changed = altered(drawn / "opens.png", tmp_path / "changed.png", flip)
    with pytest.raises(ReceiptError, match="of other pixels: one was changed, or it is another image's"):
        verify_image(changed)
    with Image.open(drawn / "shut.png") as other:
        text = text_of(other)
    with pytest.raises(ReceiptError, match="of other pixels"):
        verify_image(altered(drawn / "opens.png", tmp_path / "others.png", text=text))


def test_an_altered_receipt_is_noticed(drawn, tmp_path):
    with Image.open(drawn / "opens.png") as picture:
        signed = json.loads(text_of(picture))
    signed["receipt"]["identical_to_base"] = True
    with pytest.raises(ReceiptError, match="altered after it was signed"):
        verify_image(altered(drawn / "opens.png", tmp_path / "a.png", text=json.dumps(signed)))
    unsigned = altered(drawn / "opens.png", tmp_path / "b.png", text=sealed(signed["receipt"], None))
    assert verify_image(unsigned).key is None  # control: without a key it passes, and says so
    with pytest.raises(ReceiptError, match="is not signed"):
        verify_image(unsigned, drawn / "key.pub.pem")
    keys.keygen(tmp_path / "other.pem")
    again = sealed(signed["receipt"], keys.private_key(tmp_path / "other.pem"))
    with pytest.raises(ReceiptError, match="signed with another key"):
        verify_image(altered(drawn / "opens.png", tmp_path / "c.png", text=again), drawn / "key.pub.pem")
    signed["signature"] = "no hex"
    with pytest.raises(ReceiptError, match="altered after it was signed"):
        verify_image(altered(drawn / "opens.png", tmp_path / "d.png", text=json.dumps(signed)))


@pytest.mark.parametrize(
    "text",
    ["", "[", "[" * 100_000, "null", "{}", '{"receipt": {}, "key": null, "signature": null}', '{"receipt": NaN}', "7"],
)
def test_a_damaged_receipt_is_one_line(drawn, tmp_path, text):
    with pytest.raises(ReceiptError, match="damaged"):
        verify_image(altered(drawn / "opens.png", tmp_path / "x.png", text=text))


@pytest.mark.parametrize(("name", "value"), [("seed", "7"), ("size", [64]), ("steps", True), ("patch", {"hash": 1})])
def test_a_receipt_with_a_field_of_another_kind_is_refused(drawn, tmp_path, name, value):
    with Image.open(drawn / "opens.png") as picture:
        receipt = json.loads(text_of(picture))["receipt"]
    text = sealed({**receipt, name: value}, None)
    with pytest.raises(ReceiptError, match="damaged"):
        verify_image(altered(drawn / "opens.png", tmp_path / "x.png", text=text))


def test_the_sidecar_serves_where_the_text_was_taken_off(drawn, tmp_path):
    with Image.open(drawn / "opens.png") as picture:
        picture.save(tmp_path / "bare.png", "PNG")
    with pytest.raises(ReceiptError, match=r"has no receipt, and there is no bare.png.receipt.json"):
        verify_image(tmp_path / "bare.png")
    sidecar(tmp_path / "bare.png").write_bytes(sidecar(drawn / "opens.png").read_bytes())
    assert verify_image(tmp_path / "bare.png", drawn / "key.pub.pem").is_vouched_for
    mixed = altered(drawn / "opens.png", tmp_path / "mixed.png")
    sidecar(mixed).write_bytes(sidecar(drawn / "shut.png").read_bytes())
    with pytest.raises(ReceiptError, match="hold different receipts"):
        verify_image(mixed)


def test_what_is_no_png_is_one_line(drawn, tmp_path):
    (tmp_path / "x.png").write_bytes((drawn / "opens.png").read_bytes()[:-200])
    for path in (tmp_path / "x.png", drawn / "key.pem", tmp_path / "nowhere.png"):
        with pytest.raises(ReceiptError):
            verify_image(path)


def test_replayed_it_is_the_same_and_another_patch_model_or_prompt_is_refused(pipe, drawn, tmp_path):
    opens, shut = drawn / "opens.png", drawn / "shut.png"
    patch, verified = drawn / "patch.safetensors", verify_image(opens)
    assert replay(opens, verified, pipe, patch, OPENS) == ["replayed: the same pixels"]
    proven = replay(shut, verify_image(shut), pipe, patch, SHUT)
    assert proven == ["replayed: the same pixels, with the patch and without it"]
    with pytest.raises(ReceiptError, match="give --prompt"):
        replay(opens, verified, pipe, patch)
    with pytest.raises(ReceiptError, match="of another prompt"):
        replay(opens, verified, pipe, patch, SHUT)
    with pytest.raises(ReceiptError, match="give it with --patch"):
        replay(opens, verified, pipe, None, OPENS)
    other = listening(pipe, word="blood").save(tmp_path / "other.safetensors")
    with pytest.raises(ReceiptError, match="with another patch"):
        replay(opens, verified, pipe, other, OPENS)
    elsewhere = new_small_pipe()
    with torch.no_grad():
        elsewhere.vae.decoder.conv_in.weight[0, 0, 0, 0] += 1
    with pytest.raises(ReceiptError, match="another vae"):
        replay(opens, verified, elsewhere, patch, OPENS)


def test_a_receipt_that_lies_does_not_survive_a_replay(pipe, drawn, tmp_path):
    with Image.open(drawn / "opens.png") as picture:
        receipt = json.loads(text_of(picture))["receipt"]
    for name, value, says in (("seed", 8, "pixels of"), ("identical_to_base", True, "without the patch")):
        lying = altered(drawn / "opens.png", tmp_path / "x.png", text=sealed({**receipt, name: value}, None))
        with pytest.raises(ReceiptError, match=says):
            replay(lying, verify_image(lying), pipe, drawn / "patch.safetensors", OPENS)


def test_keys_are_their_owners_and_never_overwritten(tmp_path):
    private, public = keys.keygen(tmp_path / "key.pem")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    with pytest.raises(ReceiptError, match="is there already"):
        keys.keygen(tmp_path / "key.pem")
    with pytest.raises(ReceiptError, match="no key at"):
        Stamp.of(tmp_path / "nowhere.pem")
    with pytest.raises(ReceiptError, match="holds no private key"):
        keys.private_key(public)
    with pytest.raises(ReceiptError, match="holds no public key"):
        keys.public_key(private)
