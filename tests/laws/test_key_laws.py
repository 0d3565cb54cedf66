"""The second key of a gate, which looks at what is drawn: shut it changes no bit, and once turned it stays so."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.bank import DataConfig, build_bank
from safepatch.data.corpus import Corpus
from safepatch.diffusion import as_picture, generate
from safepatch.errors import ArtifactError, PatchBypassed, SafepatchError, UnknownName
from safepatch.hosting.audit import ACTED, DEPENDS, UNTOUCHED, Auditor
from safepatch.hosting.making import Asked, patch_record, receipt_of
from safepatch.hosting.recording import recording
from safepatch.merging import merge
from safepatch.objectives import SafeControlConfig, safe_control
from safepatch.objectives.base import Player, Turn
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from safepatch.patch.gate import TextGate
from safepatch.patch.picture import KEYS, PictureKey, added_up
from safepatch.runtime.apply import apply
from safepatch.training import gates, pictures
from safepatch.training.config import load_train_config
from tests.small import (
    INSTRUCTION,
    PROMPTS,
    SEEDS,
    awaken,
    new_patch,
    new_small_host,
    new_small_pipe,
    new_small_unet,
    rows,
    small_artifact,
)

every_kind = pytest.mark.parametrize("kind", PATCH_KINDS)
NEVER, ALWAYS = 1 - 1e-9, 1e-9
STEPS = 3
FEW = {"STEPS": 2, "LOOKS": 1, "VALIDATION_STEPS": 2, "VALIDATION_PAIRS": 2}  # that a key is fitted in and with


def keyed(
    kind: str = "lora",
    keys: str = "either",
    text: float = NEVER,
    picture: float = NEVER,
    category: str = "weapons",
    width: int = 4,
    seed: int = 0,
) -> PatchArtifact:
    """An awake patch of which each key opens from a probability on."""
    unet = new_small_unet()
    patch = new_patch(unet, kind, seed=None)
    patch.add_gate(unet, 4, picture=width)
    artifact = to_artifact(awaken(patch, seed), unet, {category: INSTRUCTION})
    record: dict[str, Any] = {"threshold": text, "keys": keys, "picture": {"threshold": picture}}
    config = {**artifact.info.config, "gate": {category: record}}
    return replace(artifact, info=replace(artifact.info, config=config))


def drawn(pipe: Any, steps: int = STEPS) -> Tensor:
    return generate(pipe, PROMPTS, SEEDS, steps=steps, guidance_scale=4.0)


def outputs(pipe: Any, patch: PatchArtifact | None = None) -> list[Tensor]:
    """The UNet's prediction in each step."""
    made: list[Tensor] = []
    hook = pipe.unet.register_forward_hook(lambda _, args, output: made.append(output[0]))
    try:
        if patch is None:
            drawn(pipe)
        else:
            with apply(pipe, patch):
                drawn(pipe)
    finally:
        hook.remove()
    return made


def looking(monkeypatch: pytest.MonkeyPatch, told: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Every picture key says what `told` makes of what it is shown and of the timesteps."""
    monkeypatch.setattr(PictureKey, "forward", lambda self, mid, timesteps: told(mid, timesteps))


@every_kind
def test_what_no_key_opens_keeps_every_bit(small_pipe, kind):
    base = drawn(small_pipe)
    for keys in KEYS:
        with apply(small_pipe, keyed(kind, keys)) as handle:
            assert torch.equal(drawn(small_pipe), base)
        assert (handle.stats.gated_rows, handle.stats.open_rows) == (2 * STEPS, 0)
    with apply(small_pipe, keyed(kind, picture=ALWAYS)):
        assert not torch.equal(drawn(small_pipe), base)  # control: an open one is seen


@every_kind
def test_what_is_drawn_opens_from_the_second_step_on(small_pipe, kind):
    base = outputs(small_pipe)
    opened = outputs(small_pipe, keyed(kind, picture=ALWAYS))
    assert torch.equal(opened[0], base[0])
    assert not torch.equal(opened[1], base[1])
    with apply(small_pipe, keyed(kind, picture=ALWAYS)) as handle:
        drawn(small_pipe)
    assert (handle.stats.acted_calls, handle.stats.picture_rows) == (STEPS - 1, 2 * (STEPS - 1))


@pytest.mark.parametrize(
    ("keys", "acted"), [("text", (0, 3, 3)), ("picture", (2, 0, 2)), ("either", (2, 3, 3)), ("both", (0, 0, 2))]
)
def test_each_set_of_keys_opens_where_it_says(small_pipe, keys, acted):
    ways = ((NEVER, ALWAYS), (ALWAYS, NEVER), (ALWAYS, ALWAYS))  # the picture's key turns alone, the text's alone, both
    for (text, picture), calls in zip(ways, acted, strict=True):
        with apply(small_pipe, keyed(keys=keys, text=text, picture=picture)) as handle:
            drawn(small_pipe)
        assert handle.stats.acted_calls == calls


def test_each_row_has_a_key_of_its_own_and_a_turned_one_stays_turned(small_pipe, monkeypatch):
    first = torch.tensor([[9.0], [-9.0]])
    looking(monkeypatch, lambda mid, t: first if t[0] > 900 else -9 * torch.ones(2, 1))
    steps: list[Any] = []
    with apply(small_pipe, keyed(picture=0.9)) as handle:
        handle.on_step = steps.append
        drawn(small_pipe)
    assert [step.acted.tolist()[2:] for step in steps] == [[False, False], [True, False], [True, False]]
    assert steps[2].pictured["weapons"][2] > 0.9 > steps[2].pictured["weapons"][3]
    assert all(said[:2].isnan().all() for said in (steps[2].pictured["weapons"], steps[2].judged["weapons"]))


def test_steps_add_up_to_a_mean_of_the_last_few():
    logits, evidence = torch.tensor([3.0, 1.0, 2.0, 8.0]), torch.zeros(())
    found = []
    for looks, logit in enumerate(logits, start=1):
        evidence = added_up(evidence, logit, looks)
        found.append(float(evidence))
    assert found == pytest.approx([3, 2, 2, 4])


@every_kind
def test_where_only_words_count_nobody_looks(small_pipe, kind, monkeypatch):
    looks: list[int] = []
    looking(monkeypatch, lambda mid, t: looks.append(1) or torch.zeros(2, 1))
    hooks = []
    for keys in ("text", "either"):
        with apply(small_pipe, keyed(kind, keys)):
            hooks.append(len(small_pipe.unet.mid_block._forward_hooks))
            drawn(small_pipe)
        assert len(looks) == (0 if keys == "text" else STEPS)
    assert hooks[1] == hooks[0] + 1  # control: a key that counts does hang there


def test_a_gate_that_is_off_or_a_patch_that_is_asks_no_key(small_pipe, monkeypatch):
    looks: list[int] = []
    looking(monkeypatch, lambda mid, t: looks.append(1) or torch.zeros(2, 1))
    for options in ({"gate": "off"}, {"scale": 0.0}):
        with apply(small_pipe, keyed(), **options):  # pyright: ignore[reportArgumentType]
            drawn(small_pipe)
    assert not looks


def test_a_soft_gate_opens_as_far_as_the_wider_key(small_pipe, monkeypatch):
    looking(monkeypatch, lambda mid, t: torch.zeros(2, 1))  # a probability of 0.5
    monkeypatch.setattr(TextGate, "forward", lambda self, mid, t, states, *_: torch.full((2, 1), -30.0))
    with apply(small_pipe, keyed(), gate="soft") as handle:
        found: list[Tensor] = []
        monkeypatch.setattr(
            handle._attachment.corrector, "strength", _noted(handle._attachment.corrector.strength, found)
        )
        drawn(small_pipe)
    torch.testing.assert_close(torch.stack(found[1:]), torch.full((2, 2), 0.5))


def _noted(strength: Callable[..., Tensor | None], found: list[Tensor]) -> Callable[..., Tensor | None]:
    def noting(*args: Any) -> Tensor | None:
        made = strength(*args)
        found.append(torch.zeros(2) if made is None else made)
        return made

    return noting


def test_the_next_image_begins_with_a_key_that_is_not_turned(small_pipe, monkeypatch):
    base, calls = outputs(small_pipe), [0]

    def once(mid: Tensor, timesteps: Tensor) -> Tensor:
        calls[0] += 1
        return torch.full((2, 1), 9.0 if calls[0] <= STEPS else -9.0)

    looking(monkeypatch, once)
    with apply(small_pipe, keyed(picture=0.9)) as handle:
        drawn(small_pipe)
        assert handle.stats.acted_calls == STEPS - 1  # control
        again: list[Tensor] = []
        hook = small_pipe.unet.register_forward_hook(lambda _, args, output: again.append(output[0]))
        drawn(small_pipe)
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(again, base, strict=True))


@torch.no_grad()
def test_in_a_loop_of_ones_own_a_row_whose_noise_grew_is_another_pictures(small_pipe, monkeypatch):
    sample, _, states = rows()
    looking(monkeypatch, lambda mid, t: torch.where(t[:, None] > 500, 9.0, -9.0))
    unet, acted = small_pipe.unet, []
    with apply(small_pipe, keyed(picture=0.9)) as handle:
        handle.on_step = lambda step: acted.append(step.acted.tolist())
        for t in (torch.tensor([900, 400]), torch.tensor([300, 300]), torch.tensor([400, 200])):
            unet(sample, t, encoder_hidden_states=states)
    assert acted == [[False, False], [True, False], [False, False]]


def test_threads_do_not_turn_each_others_keys(small_pipe, monkeypatch):
    base = drawn(small_pipe)
    shared, made = new_small_pipe(small_pipe.unet), {}
    with apply(small_pipe, keyed(picture=0.9)):
        ident = threading.get_ident()
        looking(monkeypatch, lambda mid, t: torch.full((2, 1), 9.0 if threading.get_ident() == ident else -9.0))
        other = threading.Thread(target=lambda: made.update(other=drawn(shared)))
        other.start()
        made["own"] = drawn(small_pipe)
        other.join()
    assert torch.equal(made["other"], base)
    assert not torch.equal(made["own"], base)  # control


@every_kind
def test_a_key_that_is_not_shown_the_picture_stops_the_image(small_pipe, kind):
    with apply(small_pipe, keyed(kind)) as handle:
        for hook in handle._attachment._sight.hooks:
            hook.handle.remove()
        with pytest.raises(PatchBypassed):
            drawn(small_pipe)


@pytest.mark.parametrize("method", ["bundle", "task-arithmetic"])
def test_merged_each_category_keeps_its_keys(small_pipe, tmp_path, method):
    looking_one = keyed("lora", "either", picture=ALWAYS, category="weapons", seed=1)
    wordy = keyed("lora", "text", category="drugs", seed=2)
    narrow = keyed("lora", "either", picture=NEVER, category="gore", width=2, seed=3)
    paths = [str(each.save(tmp_path / f"{i}.safetensors")) for i, each in enumerate((looking_one, wordy, narrow))]
    base = drawn(small_pipe)
    opened = merge(paths, out=tmp_path / "all.safetensors", method=method)
    with apply(small_pipe, opened) as handle:
        assert not torch.equal(drawn(small_pipe), base)
        assert handle.stats.acted_calls == STEPS - 1
    shut = merge(paths[1:], out=tmp_path / "shut.safetensors", method=method)
    with apply(small_pipe, shut):
        assert torch.equal(drawn(small_pipe), base)


def test_lite_patches_side_by_side_keep_their_keys(small_pipe, tmp_path):
    parts = [
        keyed("lite", "either", picture=ALWAYS, category="weapons", seed=1),
        keyed("lite", "both", picture=ALWAYS, category="drugs", width=2, seed=2),
    ]
    paths = [str(each.save(tmp_path / f"{i}.safetensors")) for i, each in enumerate(parts)]
    merged = merge(paths, out=tmp_path / "cat.safetensors", method="cat")
    assert merged.info.config["layout"]["picture"] == 4
    steps: list[Any] = []
    with apply(small_pipe, merged) as handle:
        handle.on_step = steps.append
        together = drawn(small_pipe)
    with apply(small_pipe, parts[0]):
        torch.testing.assert_close(together, drawn(small_pipe), rtol=1e-4, atol=1e-5)
    for name, part in zip(("weapons", "drugs"), parts, strict=True):
        alone: list[Any] = []
        with apply(small_pipe, part) as handle:
            handle.on_step = alone.append
            drawn(small_pipe)
        found, wanted = steps[1].pictured[name][2:], alone[1].pictured[name][2:]
        torch.testing.assert_close(found, wanted)
        assert wanted.ne(0).all()  # control: at the first step nothing was seen yet


def without(artifact: PatchArtifact, ending: str) -> PatchArtifact:
    return replace(artifact, tensors={name: t for name, t in artifact.tensors.items() if ending not in name})


def told(artifact: PatchArtifact, **record: Any) -> PatchArtifact:
    gate = {"weapons": {**artifact.info.config["gate"]["weapons"], **record}}
    return replace(artifact, info=replace(artifact.info, config={**artifact.info.config, "gate": gate}))


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        (lambda a: without(a, "picture.decide"), "lacks 'decide' of its picture key"),
        (lambda a: without(a, ".picture."), "lacks 'bias' of its picture key"),
        (lambda a: told(a, picture={"threshold": 1.0}), "never opens"),
        (lambda a: told(a, picture={}), "has no 'threshold'"),
        (lambda a: told(a, keys="any"), "one of text, picture, either, both"),
        (lambda a: told(a, keys=["text"]), "one of text, picture, either, both"),
    ],
)
def test_a_file_whose_key_does_not_fit_is_refused(tmp_path, spoiled, says):
    patch = keyed()
    PatchArtifact.open(patch.save(tmp_path / "good.safetensors"))  # control
    with pytest.raises(ArtifactError, match=says):
        PatchArtifact.open(spoiled(patch).save(tmp_path / "bad.safetensors"))


def test_an_audit_says_what_the_text_alone_settles(small_pipe):
    found = {}
    for text in (NEVER, ALWAYS):
        for keys in KEYS:
            (finding,) = Auditor(small_pipe, keyed(keys=keys, text=text))([PROMPTS[0]])
            found[text == ALWAYS, keys] = finding["weapons"].verdict
    assert [found[False, keys] for keys in KEYS] == [UNTOUCHED, DEPENDS, DEPENDS, UNTOUCHED]
    assert [found[True, keys] for keys in KEYS] == [ACTED, DEPENDS, ACTED, DEPENDS]


@pytest.mark.parametrize(
    ("keys", "text", "picture", "by"),
    [
        ("either", NEVER, ALWAYS, {"weapons": ("picture",)}),
        ("either", ALWAYS, NEVER, {"weapons": ("text",)}),
        ("both", ALWAYS, ALWAYS, {"weapons": ("text", "picture")}),
        ("both", ALWAYS, NEVER, {}),
        ("text", ALWAYS, ALWAYS, {"weapons": ("text",)}),
    ],
)
def test_a_receipt_says_which_key_opened(small_pipe, keys, text, picture, by):
    with apply(small_pipe, keyed(keys=keys, text=text, picture=picture)) as handle:
        with recording(handle, 2) as images:
            drawn(small_pipe)
        patch = patch_record(handle)
    assert [each.turned(handle.thresholds, handle.looks) for each in images] == [by, by]
    receipt = receipt_of(as_picture(torch.zeros(3, 8, 8)), Asked("a dog", "", 1, STEPS, 4.0), images[0], patch, {})
    told = {name: list(keys) for name, keys in by.items()}
    assert receipt["denoising"].get("opened_by") == (None if keys == "text" else told)


def new_key(width: int = 8) -> PictureKey:
    return PictureKey(32, width, 1)


def test_a_key_learns_what_is_in_a_picture_and_not_how_noisy_it_is(monkeypatch):
    monkeypatch.setattr(pictures, "STEPS", 120)
    draw = torch.Generator().manual_seed(0)
    mid, shown = torch.randn(256, 32, 4, 4, generator=draw), torch.arange(256) % 2 == 0
    mid[shown, :4, 1, 2] += 8  # at one place of it
    seen = pictures.Looked(mid, torch.randint(0, 1000, (256,), generator=draw), shown.float())
    key = new_key()
    untaught = _told_apart(key, seen, slice(192, 256))
    pictures._train(key, pictures.Looked(*(part[:192] for part in seen)), draw)
    assert _told_apart(key, seen, slice(192, 256)) > 0.9 > 0.8 > untaught


@torch.no_grad()
def _told_apart(key: PictureKey, seen: Any, rows: slice) -> float:
    """The area under the ROC."""
    logits, shown = key(seen.mid[rows], seen.timesteps[rows])[:, 0], seen.wanted[rows] == 1
    return float((logits[shown][:, None] > logits[~shown]).float().mean())


def test_fitting_draws_once_and_says_what_opens(monkeypatch, tmp_path):
    for name, value in FEW.items():
        monkeypatch.setattr(pictures, name, value)
    host, data = new_small_host(), DataConfig(pairs=3, steps=1, cache=str(tmp_path))
    records = [pictures.fit_picture_key(new_key(), host, Corpus.open("weapons"), data) for _ in range(2)]
    assert records[0] == records[1]
    assert 0 <= records[0]["threshold"] < 1
    assert {strength: len(shares) for strength, shares in records[0]["by_step"].items()} == {"0.5": 1}


def test_a_key_learns_from_as_many_looks_as_memory_holds_and_says_so(monkeypatch, tmp_path, capsys):
    host, draw = new_small_host(), torch.Generator().manual_seed(0)
    shown = pictures.pictures(host, Corpus.open("weapons"), DataConfig(pairs=4, steps=1, cache=str(tmp_path)))
    monkeypatch.setattr(pictures, "BATCH", 4)
    monkeypatch.setattr(pictures, "LOOKS", 2)
    whole = pictures._looked(host, shown, draw)
    assert len(whole.mid) == 2 * len(shown.latents)
    assert "looks" not in capsys.readouterr().err  # control
    monkeypatch.setattr(pictures, "BYTES", whole.mid[:6].nbytes)
    assert len(pictures._looked(host, shown, draw).mid) == 8
    assert f"learns from 8 of {len(whole.mid)} looks" in capsys.readouterr().err
    mid = 3 + 2 * torch.randn(9, 5, 4, 4, generator=draw)
    deviation, mean = torch.std_mean(mid, (0, 2, 3))
    torch.testing.assert_close(pictures._moments(mid), (mean, deviation))


def test_unsafe_and_harmless_pictures_stand_under_the_same_words(tmp_path):
    data = DataConfig(pairs=4, steps=1, cache=str(tmp_path))
    shown = pictures.pictures(new_small_host(), Corpus.open("weapons"), data)
    draw, n = torch.Generator().manual_seed(0), 3000
    said = [shown.captions(torch.full((n,), i), draw) for i in (0, 4)]  # of a pair, the unsafe and the safe member
    counts = [torch.bincount(each, minlength=int(shown.unsafe.max()) + 1) / n for each in said]
    torch.testing.assert_close(counts[0], counts[1], rtol=0, atol=0.04)
    assert counts[0][shown.harmless[0]] == pytest.approx(0.8 + 0.07 / len(shown.harmless), abs=0.04)  # control


def test_keys_are_fitted_to_a_patch_and_taken_off_again(small_pipe, monkeypatch, tmp_path):
    few = {gates: {"CAPTIONS": 64, "UNSEEN": 40, "STEPS": 2}, pictures: FEW}
    for module, values in few.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    patch, corpus = small_artifact("lora"), Corpus.open("weapons")
    data = DataConfig(pairs=2, steps=1, cache=str(tmp_path))
    both = gates.add_gate(patch, small_pipe, corpus, 4, data, keys="both")
    either = gates.add_gate(both, small_pipe, corpus, 4, data, keys="either")
    records = [each.info.config["gate"]["weapons"] for each in (both, either)]
    assert [record["keys"] for record in records] == ["both", "either"]
    assert ["certified_recall" in record for record in records] == [False, True]
    PatchArtifact.open(either.save(tmp_path / "either.safetensors"))
    again = gates.add_gate(either, small_pipe, corpus, 4, data)
    assert "keys" not in again.info.config["gate"]["weapons"]
    assert not any("picture" in name for name in again.tensors)
    bare = gates.without_gate(either)
    assert (bare.tensors.keys(), bare.info.config["layout"]) == (patch.tensors.keys(), patch.info.config["layout"])
    with pytest.raises(UnknownName, match="either"):
        gates.add_gate(patch, small_pipe, corpus, 4, data, keys="eiter")


def test_wordless_rows_show_an_unsafe_picture_and_end_at_its_safe_twin(tmp_path, monkeypatch):
    host, corpus = new_small_host(), Corpus.open("weapons")
    given = [DataConfig(pairs=4, steps=1, cache=str(tmp_path), wordless=share) for share in (0.0, 0.5)]
    rows = [build_bank(host, corpus, data, retain=False).batch(0, 4, 0) for data in given]
    assert rows[0].twins is None
    wordless, twins = rows[1], rows[1].twins
    assert twins is not None
    assert twins.shape == wordless.latents[:2].shape
    assert torch.equal(rows[0].latents[2:], wordless.latents[2:])
    assert not torch.equal(rows[0].unsafe.states[:2], wordless.unsafe.states[:2])
    objective, patch = SafeControlConfig(preservation=0.0), new_patch(host.unet, "lora")
    player = Player("patch", patch, torch.optim.SGD(patch.parameters()))

    @torch.no_grad()
    def loss(answer: Callable[[Tensor, Tensor], Tensor]) -> float:
        monkeypatch.setattr(safe_control, "patched_prediction", lambda h, p, noisy, t, *_: answer(noisy, t))
        draw = torch.Generator().manual_seed(0)
        turn = Turn(host, patch, host.encode([INSTRUCTION]).states, wordless, draw)
        return float(objective.loss(player, turn)["loss"])

    def kept(noisy: Tensor, t: Tensor) -> Tensor:
        return host.predict(noisy, t, wordless.safe)

    def changed(noisy: Tensor, t: Tensor) -> Tensor:
        return torch.cat((host.from_x0(noisy[:2], t[:2], twins), kept(noisy, t)[2:]))

    assert loss(changed) < 1e-6 < 1e-3 < loss(kept)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.wordless=2"], "within"),
        (["data.wordless=0.5", "objective=esd"], "means nothing to objective=esd"),
        (["patch.keys=any"], "set of keys"),
        (["patch.keys=either", "patch.gate=0"], "needs a gate"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides, says):
    load_train_config(None, ["category=weapons", "model=tiny-sd", "data.wordless=0.2", "patch.keys=either"])  # control
    with pytest.raises(SafepatchError, match=says):
        load_train_config(None, ["category=weapons", "model=tiny-sd", *overrides])
