"""Which pictures a patch learns from may be a detector's choice: bounded, told, and not the judge's own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.bank import DataConfig, plain_drawing
from safepatch.data.corpus import Corpus
from safepatch.data.twin_pictures import build_twins
from safepatch.detectors.base import Detector
from safepatch.diffusion import UNetHost, decode_latents
from safepatch.errors import ConfigError, UnknownName
from safepatch.evaluation.matrix import Matrix, MergeEntry, PatchEntry
from safepatch.merging import MergeRecipe, merge
from safepatch.objectives import selection
from safepatch.objectives.duo import DUOConfig
from safepatch.objectives.safegen import SafeGenConfig
from safepatch.training.config import load_train_config
from tests.small import new_small_host, new_small_pipe, small_artifact

WEAPONS = Corpus.open("weapons")
Judge = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def host() -> UNetHost:
    return new_small_host()


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(pairs=6, steps=1, cache=str(tmp_path), select="embedded-second", tries=2)


def judged_by(monkeypatch: pytest.MonkeyPatch, judge: Judge) -> list[int]:
    """Put a detector of one label, by brightness for instance, in the place of any; how many pictures it has seen."""
    seen: list[int] = []

    def probabilities(images: Tensor) -> Tensor:
        seen.append(len(images))
        return judge(images)[:, None].float()

    def opened(*_: object) -> Detector:
        label = WEAPONS.category.labels["embedded"][0]
        return Detector("embedded-second", (label,), probabilities, shares="embedded")

    monkeypatch.setattr(selection, "open_detector", opened)
    return seen


def test_only_pairs_that_the_detector_agrees_of_are_learned_from(host, data, monkeypatch, capsys):
    calls: list[Tensor] = []

    def first_three(images: Tensor) -> Tensor:
        """Of the first try's unsafe pictures the first three show it, of its safe ones the first; then none."""
        calls.append(images)
        count = {1: 3, 2: 1}.get(len(calls), 0)
        return torch.arange(len(images)) < count

    judged_by(monkeypatch, first_three)
    rows = DUOConfig().prepare(host, WEAPONS, data)
    every = build_twins(host, WEAPONS, replace(data, select=None))
    assert (len(rows), len(every)) == (2, 6)
    kept = torch.tensor([1, 2])  # the first one's safe picture shows it too
    assert torch.equal(rows.unsafe[torch.arange(2)], every.unsafe[kept])
    assert torch.equal(rows.safe[torch.arange(2)], every.safe[kept])
    for side in (0, 1):
        read = [bank.texts.of(bank.prompts[side]) for bank in (rows, every)]
        assert read[0] == [read[1][i] for i in kept.tolist()]
    assert [len(images) for images in calls] == [6, 6, 4, 4]
    assert not torch.equal(calls[2], calls[0][[0, 3, 4, 5]])  # control: a second try is from other noise
    said = capsys.readouterr().err
    assert "embedded-second chose 2 of 6 pairs: of 10 pairs of pictures, 3 unsafe and 1 safe ones show weapons" in said


def test_no_more_pictures_are_in_memory_at_once_than_are_drawn_at_once(host, data, monkeypatch):
    vae, decoded = host.components.vae, list[int]()
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda latents: decoded.append(len(latents)) or decode(latents))
    seen = judged_by(monkeypatch, lambda images: torch.arange(len(images)) % 2 == len(seen) % 2)
    DUOConfig().prepare(host, WEAPONS, replace(data, batch_size=2, tries=1))
    assert seen == [2] * 6  # of both members of six pairs
    assert decoded == [1] * 12


def test_an_autoencoder_that_overflows_in_half_precision_is_asked_in_full():
    vae = new_small_pipe().vae
    with torch.no_grad():
        vae.post_quant_conv.weight.mul_(1e5)
    latents, vae = 50 * torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), vae.half()
    assert decode_latents(vae, latents).isfinite().all()
    assert vae.dtype == torch.float16
    vae.register_to_config(force_upcast=False)
    assert not decode_latents(vae, latents).isfinite().all()  # control


@pytest.mark.parametrize("objective", [DUOConfig(), SafeGenConfig()], ids=lambda each: each.name)
@pytest.mark.parametrize(("shown", "found"), [(False, "0 unsafe and 0 safe"), (True, "12 unsafe and 12 safe")])
def test_a_detector_that_never_agrees_stops_the_run_after_so_many_tries(
    host, data, monkeypatch, objective, shown, found
):
    seen = judged_by(monkeypatch, lambda images: torch.full((len(images),), shown))
    with pytest.raises(ConfigError, match=f"chose 0 of 6 pairs: of 12 pairs of pictures, {found} ones show") as told:
        objective.prepare(host, WEAPONS, data)
    assert sum(seen) == 24  # both members, two tries
    assert "\n" not in str(told.value)


def test_a_preference_set_of_one_is_refused(host, data, monkeypatch):
    with pytest.raises(ConfigError, match=r"a preference set of 1 pair is none; set data\.pairs to 2 or more"):
        DUOConfig().prepare(host, WEAPONS, replace(data, select=None, pairs=1))
    sides: list[int] = []

    def one(images: Tensor) -> Tensor:
        sides.append(1)
        return torch.arange(len(images)) < (len(sides) == 1)

    judged_by(monkeypatch, one)
    with pytest.raises(ConfigError, match="chose 1 of 6 pairs"):
        DUOConfig().prepare(host, WEAPONS, data)


def test_a_detector_that_there_is_not_and_an_objective_that_draws_no_pairs_are_one_line(host, data):
    with pytest.raises(UnknownName, match="no detector 'embeded'"):
        DUOConfig().prepare(host, WEAPONS, replace(data, select="embeded"))
    words = ["category=weapons", "data.select=q16"]
    with pytest.raises(ConfigError, match=r"data\.select chooses pairs of pictures, for objective=duo or safegen"):
        load_train_config(None, [*words, "objective=esd"])
    assert load_train_config(None, [*words, "objective=duo"]).data.select == "q16"  # control


def chosen_by(path: Path, select: str | None, seed: int = 0) -> str:
    """A patch file whose training's pictures that detector chose."""
    made = small_artifact("lora", seed)
    data = {"pairs": 6, **({"select": select} if select else {})}
    replace(made, info=replace(made.info, config={**made.info.config, "data": data})).save(path)
    return str(path)


def test_a_judge_that_chose_what_a_patch_learned_from_is_named_first(tmp_path):
    own = chosen_by(tmp_path / "own.safetensors", "embedded:0.7")
    other = chosen_by(tmp_path / "other.safetensors", "embedded-second")
    plain = chosen_by(tmp_path / "plain.safetensors", None, seed=1)
    merge(MergeRecipe((own, plain)), tmp_path / "both.safetensors")

    def notices(*detectors: str, **patches: str) -> list[str]:
        entries = [PatchEntry(name, path=path) for name, path in patches.items()]
        said = Matrix(["tiny-sd"], patches=entries, detectors=[*detectors]).notices()
        return [line for line in said if "learned from" in line]

    (line,) = notices(a=own)  # the embedded one judges by default
    assert line.startswith("a learned from pictures that embedded chose, which judges it too")
    assert len(notices("embedded", "embedded-second", a=own, b=other, c=plain)) == 2
    assert notices("embedded-second", a=own) == notices("embedded", b=other) == []  # control
    assert len(notices("embedded", both=str(tmp_path / "both.safetensors"))) == 1
    bundled = [PatchEntry("merged", merge=MergeEntry(sources=[own, plain]))]
    assert any("merged learned from" in line for line in Matrix(["tiny-sd"], patches=bundled).notices())
    assert json.loads(json.dumps(PatchArtifact.open(own).info.config["data"]))["select"] == "embedded:0.7"


def test_the_safe_picture_may_be_the_unsafe_one_drawn_again(host, data):
    plain = replace(data, select=None, steps=4)
    banks = [build_twins(host, WEAPONS, replace(plain, strength=strength)) for strength in (None, 0.25, 1.0)]
    rows = torch.arange(6)
    unsafe = banks[0].unsafe[rows]
    assert all(torch.equal(bank.unsafe[rows], unsafe) for bank in banks)
    from_noise, again, all_again = (bank.safe[rows] for bank in banks)
    assert not torch.equal(all_again, from_noise)  # guidance points away from the unsafe prompt
    texts = [banks[0].texts.of(banks[0].prompts[side]) for side in (1, 0)]
    pairs = WEAPONS.pairs(plain.pairs, plain.seed, plain.companions)
    seeds = [plain_drawing(pair.safe, i, plain, pair.unsafe.seed).seed for i, pair in enumerate(pairs)]
    assert torch.allclose(again, host.redraw(unsafe, *texts, seeds, 4, 0.25).cpu(), atol=1e-5)
    gray = torch.zeros_like(unsafe)
    assert not torch.allclose(again, host.redraw(gray, *texts, seeds, 4, 0.25).cpu(), atol=0.1)
    assert torch.allclose(all_again, host.redraw(gray, *texts, seeds, 4, 1.0).cpu(), atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_a_strength_that_is_none(strength):
    with pytest.raises(ConfigError, match=r"data\.strength must be above 0"):
        DataConfig(strength=strength)
