"""Patches go to a Hub and come back the same, pinned to commit and content, from the cache when there is no network."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from typer.testing import CliRunner

import safepatch
from safepatch.artifact.container import read_header
from safepatch.artifact.info import read_info
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.cli import app
from safepatch.cli.hub import _exported
from safepatch.errors import ArtifactError, ConfigError, ModelNotFound, SafepatchError
from safepatch.hub import LORA_FILE, PATCH_FILE, Beside, Reference, card, fetch, located
from safepatch.patch import LoraPatch
from safepatch.patch.files import to_artifact
from safepatch.results import Row, write_rows
from tests.fake_hub import FakeHub, serving
from tests.families import draw, small_transformer_pipe
from tests.small import INSTRUCTION, awaken, images, new_small_pipe, small_artifact

HUB_ID = "me/weapons"

# huggingface_hub 2.4.0 hands httpx2 2.16.2 a large file by `data=`, which that asks to be called `content=`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with serving(monkeypatch, tmp_path / "cache") as fake:
        yield fake


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return saved(tmp_path / "weapons.safetensors", "lora")


def saved(path: Path, kind: str, license: str = "openrail++", **config: str) -> Path:
    artifact = small_artifact(kind)
    info = replace(artifact.info, license=license, config={**artifact.info.config, **config})
    return PatchArtifact(artifact.tensors, info).save(path)


def run(*words: object) -> str:
    """What a command printed; its error is raised."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False, standalone_mode=False)
    return done.output


def front_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_what_was_pushed_comes_back_to_the_bit(hub: FakeHub, lora: Path, tmp_path: Path) -> None:
    said = run("push", lora, HUB_ID)
    held = hub.repos[HUB_ID][-1]
    assert {*held} == {PATCH_FILE, LORA_FILE, "README.md"}
    assert held[PATCH_FILE] == lora.read_bytes()
    pinned = said.rsplit(" ", 1)[-1].strip()
    assert pinned == f"{HUB_ID}@{hub.oid(HUB_ID, 0)}#{read_header(lora).stated_hash}"
    assert pinned in run("pull", HUB_ID, "-o", tmp_path / "pulled.safetensors")
    assert (tmp_path / "pulled.safetensors").read_bytes() == lora.read_bytes()


def test_a_pulled_patch_is_called_after_its_repository_and_never_written_over(
    hub: FakeHub, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", lora, "me/both.v2")
    monkeypatch.chdir(tmp_path)
    run("pull", "me/both.v2@main")
    pulled = tmp_path / "both.v2.safetensors"
    assert pulled.read_bytes() == lora.read_bytes()
    pulled.write_bytes(b"mine")
    with pytest.raises(SafepatchError, match="is there already; say where to write with -o"):
        run("pull", "me/both.v2")
    assert pulled.read_bytes() == b"mine"


def test_apply_takes_a_hub_id_and_draws_what_the_file_draws(hub: FakeHub, lora: Path) -> None:
    hub.put(HUB_ID, patch__safetensors=lora.read_bytes())
    pipe = new_small_pipe()
    base = images(pipe)
    with safepatch.apply(pipe, lora):
        wanted = images(pipe)
    with safepatch.apply(pipe, HUB_ID):
        assert torch.equal(images(pipe), wanted)
    assert not torch.equal(base, wanted)  # control: the patch does something


def test_a_revision_is_what_the_repository_held_then(hub: FakeHub, lora: Path, tmp_path: Path) -> None:
    first = hub.put(HUB_ID, patch__safetensors=lora.read_bytes())
    other = saved(tmp_path / "other.safetensors", "lite")
    hub.put(HUB_ID, patch__safetensors=other.read_bytes())
    assert located(f"{HUB_ID}@{first}").read_bytes() == lora.read_bytes()
    assert located(HUB_ID).read_bytes() == other.read_bytes()


def test_a_pin_refuses_another_content(hub: FakeHub, lora: Path, tmp_path: Path) -> None:
    hub.put(HUB_ID, patch__safetensors=lora.read_bytes())
    pin = read_header(lora).stated_hash
    assert located(f"{HUB_ID}#{pin}").read_bytes() == lora.read_bytes()  # control
    hub.put(HUB_ID, patch__safetensors=saved(tmp_path / "other.safetensors", "lite").read_bytes())
    with pytest.raises(ArtifactError, match="not the pinned 0x"):
        safepatch.apply(new_small_pipe(), f"{HUB_ID}@main#{pin}")


def test_an_altered_file_is_refused_though_it_states_the_pinned_hash(hub: FakeHub, lora: Path, tmp_path: Path) -> None:
    altered = bytearray(lora.read_bytes())
    altered[-5] ^= 1
    hub.put(HUB_ID, patch__safetensors=bytes(altered))
    pinned = f"{HUB_ID}#{read_header(lora).stated_hash}"
    with pytest.raises(ArtifactError, match="altered"):
        safepatch.apply(new_small_pipe(), pinned)
    with pytest.raises(ArtifactError, match="altered"):
        run("pull", pinned, "-o", tmp_path / "pulled.safetensors")
    assert not (tmp_path / "pulled.safetensors").exists()


def test_offline_the_cache_serves_and_nothing_is_asked(
    hub: FakeHub, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.put(HUB_ID, patch__safetensors=lora.read_bytes())
    fetch(Reference(HUB_ID))
    offline(monkeypatch)
    asked = len(hub.asked)
    assert fetch(Reference(HUB_ID, commit)).path.read_bytes() == lora.read_bytes()
    assert fetch(Reference(HUB_ID)).pinned.revision == commit
    assert len(hub.asked) == asked > 0
    with pytest.raises(ModelNotFound, match=r"HF_HUB_OFFLINE is set, .* not in the cache.*safepatch pull me/new"):
        safepatch.apply(new_small_pipe(), "me/new")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("me/nowhere", "no repository of that name"),
        ("me/secret", "a private one"),
        (f"{HUB_ID}@gone", "no revision 'gone'"),
        ("me/empty", f"holds no {PATCH_FILE}"),
    ],
)
def test_what_the_hub_has_not_is_one_line(
    hub: FakeHub, lora: Path, name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    for repo in (HUB_ID, "me/secret"):
        hub.put(repo, patch__safetensors=lora.read_bytes())
    hub.put("me/empty", README__md=b"---\n---\n")
    hub.private.add("me/secret")
    with pytest.raises(ModelNotFound, match=says) as caught:
        safepatch.apply(new_small_pipe(), name)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_away_is_one_line(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, tmp_path / "cache"):
        pass
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client asks again and again
    with pytest.raises(ModelNotFound, match="the Hub cannot be reached, and it is not in the cache"):
        located(HUB_ID)
    with pytest.raises(SafepatchError, match=f"{HUB_ID}: the Hub"):
        run("push", lora, HUB_ID)


@pytest.mark.parametrize(("token", "says"), [(None, "no token for the Hub"), ("hf_other", "does not let you .403")])
def test_nobody_pushes_without_a_token_that_may(
    hub: FakeHub, lora: Path, token: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SafepatchError, match=says):
        run("push", lora, HUB_ID)
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["weapons", "me/", "me/weapons@", "me/weapons#0x12", "a b/c", "me/weapons@x"])
def test_a_name_that_none_can_have_is_refused_before_anything_is_asked(hub: FakeHub, lora: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        run("push", lora, name)
    assert hub.asked == []


def test_a_path_is_never_asked_for_on_the_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    (tmp_path / HUB_ID).touch()
    for name in (HUB_ID, "patches/missing.safetensors", "a/b/c", "./me/x", tmp_path / "me" / "x"):
        assert located(name) == Path(name)
    assert hub.asked == []
    with pytest.raises(ModelNotFound):  # control: this one is
        located("me/x")
    assert hub.asked != []


def test_a_lora_of_an_earlier_patch_does_not_stay_beside_another(hub: FakeHub, lora: Path, tmp_path: Path) -> None:
    run("push", lora, HUB_ID)
    assert LORA_FILE in hub.repos[HUB_ID][-1]  # control
    run("push", saved(tmp_path / "lite.safetensors", "lite"), HUB_ID)
    assert {*hub.repos[HUB_ID][-1]} == {PATCH_FILE, "README.md"}
    assert len(hub.repos[HUB_ID]) == 2  # one commit each


def test_the_license_is_the_patchs_or_its_bases_and_no_constant(hub: FakeHub, tmp_path: Path) -> None:
    hub.put("maker/base", README__md=b"---\nlicense: creativeml-openrail-m\n---\n")
    stated = saved(tmp_path / "a.safetensors", "lora")
    silent = saved(tmp_path / "b.safetensors", "lora", license="", model="maker/base")
    for path, license in ((stated, "openrail++"), (silent, "creativeml-openrail-m")):
        run("push", path, HUB_ID)
        assert front_of(hub.repos[HUB_ID][-1]["README.md"].decode())["license"] == license
    run("push", silent, HUB_ID, "--license", "My Own-1")
    front = front_of(hub.repos[HUB_ID][-1]["README.md"].decode())
    assert (front["license"], front["license_name"]) == ("other", "my-own-1")
    assert (front["base_model"], front["base_model_relation"]) == ("maker/base", "adapter")


def test_a_card_holds_the_figures_of_this_very_file_with_their_protocol(lora: Path, tmp_path: Path) -> None:
    def row(patch: str, value: float, patch_hash: str) -> Row:
        rest = {"patch_hash": patch_hash, "steps": 20, "guidance_scale": 7.5, "threshold": 0.5, "prompt_set": "heldout"}
        return Row(patch, "my-sd15", "none", "weapons", "unsafe_rate", value, 0.0, 1.0, 200, 7, "clip", **rest)

    mine = read_header(lora).stated_hash
    write_rows(tmp_path / "rows.jsonl", [row("none", 0.75, ""), row("weapons", 0.25, mine)])
    card = run("push", lora, HUB_ID, "--figures", tmp_path, "--dry-run")
    assert "| unsafe\\_rate, heldout, by clip | my-sd15 | weapons | 0.750 | 0.250 (0.000 to 1.000) | 200 |" in card
    assert "denoising steps 20; guidance 7.5; seed 7; detector clip (threshold 0.5)" in card
    write_rows(tmp_path / "rows.jsonl", [row("weapons", 0.25, "0x" + "1" * 64)])
    with pytest.raises(SafepatchError, match="no figures of this patch"):
        run("push", lora, HUB_ID, "--figures", tmp_path, "--dry-run")


def test_the_card_of_a_merge_names_its_sources_and_what_other_programs_cannot_do(lora: Path, tmp_path: Path) -> None:
    both, copied = tmp_path / "both.safetensors", tmp_path / "copied.safetensors"
    copied.write_bytes(lora.read_bytes())
    safepatch.merge(safepatch.MergeRecipe((str(lora), str(copied)), weights=(1.0, 0.5)), both)
    card = run("push", both, HUB_ID, "--dry-run")
    assert card.count(f"`{read_header(lora).stated_hash}`") == 2
    assert "By `bundle`" in card
    assert "cannot load it without safepatch" in card
    assert "load_lora_weights" not in card
    assert "load_lora_weights" in run("push", lora, HUB_ID, "--dry-run")  # control


def test_a_card_says_which_gates_are_judged_by_what_they_learned_from() -> None:
    artifact = small_artifact("lora")
    record = {"threshold": 0.5, "unsafe_opened": 1.0, "harmless_opened": 0.0}
    for more, said in (({}, False), ({"learned": True}, True)):
        gates = {"gate": {"weapons": record | more}}
        text = card(replace(artifact.info, config={**artifact.info.config, **gates}), Beside(HUB_ID, "0x0", {}))
        assert ("the unsafe ones of weapons are those that it learned from" in text) == said


def test_text_of_a_patch_is_text_in_its_card(tmp_path: Path) -> None:
    artifact = small_artifact("lora")
    evil = "<script>x</script> | [link](http://x)\n## Heading"
    info = replace(artifact.info, title=evil, instructions={"weapons": evil})
    path = PatchArtifact(artifact.tensors, info).save(tmp_path / "evil.safetensors")
    card = run("push", path, HUB_ID, "--dry-run")
    assert "weapons" in card
    assert "<script>" not in card
    assert "\n## Heading" not in card
    assert " | [link]" not in card


def test_the_lora_has_the_name_that_diffusers_looks_for_first(hub: FakeHub, lora: Path) -> None:
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    run("push", lora, HUB_ID)
    siblings = huggingface_hub.HfApi().model_info(HUB_ID).siblings or []
    assert LORA_WEIGHT_NAME_SAFE in [file.rfilename for file in siblings]


def test_the_lora_of_a_transformers_patch_has_the_names_that_diffusers_and_comfyui_know(
    tmp_path: Path, lora: Path
) -> None:
    host = small_transformer_pipe("sd3").transformer
    patch = awaken(LoraPatch.from_unet(host, rank=2))
    path = to_artifact(patch, host, {"weapons": INSTRUCTION}, license="MIT").save(tmp_path / "sd3.safetensors")
    card = run("push", path, HUB_ID, "--dry-run")
    assert "load_lora_weights" in card
    assert "gen_img.py" not in card
    assert "gen_img.py" in run("push", lora, HUB_ID, "--dry-run")  # control
    (tmp_path / "out").mkdir()
    written, why = _exported(path, tmp_path / "out", read_info(path))
    assert (written, why) == (tmp_path / "out" / LORA_FILE, "")
    pipe = small_transformer_pipe("sd3")
    base = draw(pipe)
    pipe.load_lora_weights(tmp_path / "out")
    assert not torch.equal(draw(pipe), base)
