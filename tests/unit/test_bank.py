"""What objectives learn from: pictures of the model's own, made once, and batches that a step and a seed stand for."""

from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from safepatch.data import shards
from safepatch.data.bank import Batch, DataConfig, Latents, PairBank, Retained, Texts, build_bank, build_retained
from safepatch.data.category import Rewrite
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.data.twins import Guide
from safepatch.diffusion import UNetHost
from safepatch.errors import ConfigError, PromptError, SafepatchError
from safepatch.taxonomy import Category
from tests.small import KeptTexts, new_small_host, new_small_pipe

MINE = Category("mine", "things of the test", "no knives")
TEXTS = [("a knife", "a spoon"), ("a knife next to a cat", "a spoon next to a cat"), ("an axe", "a hammer"), ("b", "c")]
CORPUS = Corpus(MINE, TEXTS)


@pytest.fixture(scope="module")
def host() -> UNetHost:
    """Frozen, so one serves all tests."""
    return new_small_host()


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Four pairs in two steps, in a cache of the test's own."""
    return DataConfig(pairs=4, steps=2, cache=str(tmp_path / "cache"))


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """The prompts that hosts have drawn since the test began."""
    seen, draw = [], UNetHost.draw

    def watched(self, prompts, *args, **kwargs) -> Tensor:
        seen.extend(prompts)
        return draw(self, prompts, *args, **kwargs)

    monkeypatch.setattr(UNetHost, "draw", watched)
    return seen


def everything(latents: Latents) -> Tensor:
    return latents[torch.arange(len(latents))]


def by_pipeline(texts: list[str], seeds: list[int], guidance: float = 1.5, negative: str | None = None) -> Tensor:
    """Latents that the pipeline itself draws, in two steps."""
    pipe = new_small_pipe()
    return pipe(
        texts,
        num_inference_steps=2,
        guidance_scale=guidance,
        negative_prompt=None if negative is None else [negative] * len(texts),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images


# ---- pictures --------------------------------------------------------------------------------------------------


def test_latents_are_those_that_the_pipeline_draws_of_one_member_of_each_pair(host, config):
    """Bit for bit, both members from the same noise."""
    bank, pairs = build_bank(host, CORPUS, replace(config, seed=5), retain=False), CORPUS.pairs(4, 5)
    texts = [(pair.safe if safe else pair.unsafe).text for pair, safe in zip(pairs, bank.is_safe.tolist(), strict=True)]
    seeds = [5 * 1_000_003 + i for i in range(4)]
    assert torch.equal(everything(bank.latents), by_pipeline(texts, seeds))
    assert not torch.equal(everything(bank.latents), by_pipeline(texts, seeds, guidance=2.0))  # control
    assert set(bank.is_safe.tolist()) == {True, False}
    assert everything(bank.latents).dtype == torch.float32


@pytest.mark.parametrize(("share", "member"), [(0.0, "unsafe"), (1.0, "safe")])
def test_safe_share_chooses_the_member(host, config, share, member):
    bank = build_bank(host, CORPUS, config, safe_share=share, retain=False)
    texts = [getattr(pair, member).text for pair in CORPUS.pairs(4, 0)]
    assert torch.equal(everything(bank.latents), by_pipeline(texts, list(range(4))))
    assert bank.is_safe.tolist() == [member == "safe"] * 4


def test_the_host_reads_what_the_pipeline_reads(host, config):
    bank, pairs = build_bank(host, CORPUS, config), CORPUS.pairs(4, 0)
    for numbers, member in ((bank.unsafe, "unsafe"), (bank.safe, "safe")):
        texts = [getattr(pair, member).text for pair in pairs]
        embeds, _ = new_small_pipe().encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)
        assert torch.equal(bank.texts[numbers].states, embeds)
        assert bank.texts.of(numbers) == texts
        assert torch.equal(bank.texts.numbers(texts), numbers)
    assert bank.texts[[0]].pooled is None
    assert not torch.equal(bank.texts[bank.unsafe].states, bank.texts[bank.safe].states)  # control


def test_what_must_stay_is_drawn_from_noise_of_its_own(host, config):
    corpus = Corpus(MINE, TEXTS, retain=["a quiet street", "a lamp"])
    kept = cast(Retained, build_bank(host, corpus, config).retained)
    texts, seeds = [prompt.text for prompt in corpus.retain(4, 0)], [4, 5, 6, 7]
    assert kept.texts.of(kept.numbers) == texts
    assert torch.equal(everything(kept.latents), by_pipeline(texts, seeds))
    assert build_bank(host, corpus, config, retain=False).retained is None


def test_seeds_and_guidance_of_a_file_are_kept(host, config):
    prompts = [Prompt("a knife", seed=11, guidance=3.0), Prompt("an axe", seed=12), Prompt("a bomb", guidance=1.0)]
    corpus = Corpus(MINE, [(prompt, "a spoon") for prompt in prompts])
    bank = build_bank(host, corpus, replace(config, pairs=3), safe_share=0, retain=False)
    made = {pair.unsafe.text: i for i, pair in enumerate(corpus.pairs(3, 0))}
    for text, seed, guidance in (("a knife", 11, 3.0), ("an axe", 12, 1.5), ("a bomb", made["a bomb"], 1.0)):
        alone = by_pipeline([text], [seed], guidance)
        torch.testing.assert_close(bank.latents[[made[text]]], alone, rtol=0, atol=1e-4)
    other = by_pipeline(["a knife"], [11], 1.5)  # control
    assert not torch.allclose(bank.latents[[made["a knife"]]], other, atol=1e-3)


def teachers_own(host: UNetHost, guides: list[Guide], texts: list[str], seeds: list[int]) -> Tensor:
    """Latents drawn, in two steps, by a pipeline whose UNet is the teacher's formula written out."""
    read = {name: host.encode(some).states for name, some in (
        ("asked", texts), ("away", [guide.away for guide in guides]), ("towards", [guide.towards for guide in guides])
    )}  # fmt: skip
    pipe, mean = new_small_pipe(), torch.zeros(())
    forward, settings = pipe.unet.forward, guides[0].rewrite

    def pushed(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        nonlocal mean
        noisy, n = sample[len(texts) :], len(texts)
        empty, *made = (
            forward(noisy, timestep, encoder_hidden_states=states).sample
            for states in (encoder_hidden_states[:n], *read.values())
        )
        push = (1 + settings.scale) * (made[1] - made[2]) + settings.momentum * mean
        mean = 0.4 * mean + 0.6 * push
        return (torch.cat((empty, made[0] - push)),)

    pipe.unet.forward = pushed
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        texts, num_inference_steps=2, guidance_scale=1.5, generator=generators, output_type="latent"
    ).images  # fmt: skip


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_what_guided_calls_safe_is_what_its_teacher_draws(host, config, momentum):
    corpus = Corpus(MINE, TEXTS, rewrite=Rewrite("guided", momentum=momentum))
    bank, pairs = build_bank(host, corpus, config, safe_share=1, retain=False), corpus.pairs(4, 0)
    texts, guides = [pair.unsafe.text for pair in pairs], [corpus.guide(pair) for pair in pairs]
    wanted = teachers_own(host, guides, texts, list(range(4)))
    torch.testing.assert_close(everything(bank.latents), wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(everything(bank.latents), by_pipeline(texts, list(range(4))), atol=1e-2)  # control


def test_a_batch_has_the_prompts_that_a_guided_teacher_is_pushed_between(host, config):
    corpus = Corpus(MINE, TEXTS, rewrite=Rewrite("guided"))
    batch = build_bank(host, corpus, config).batch(0, 3, 0)
    assert torch.equal(batch.away.states, batch.unsafe.states)
    assert torch.equal(batch.towards.states, batch.safe.states)
    assert not torch.equal(batch.away.states, batch.towards.states)  # control
    alike = Corpus(MINE, [(prompt, prompt) for prompt, _ in TEXTS], rewrite=Rewrite("guided"))
    batch = build_bank(host, alike, config).batch(0, 3, 0)
    assert torch.equal(batch.away.states, host.encode([MINE.definition] * 3).states)
    assert torch.equal(batch.towards.states, host.encode([""] * 3).states)
    assert build_bank(host, CORPUS, config).batch(0, 2, 0).away is None


# ---- pictures of files -----------------------------------------------------------------------------------------


def picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Path:
    image = Image.new("RGB", size, color)
    image.paste((255 - color[0], 20, 90), (size[0] // 2 - 8, size[1] // 2 - 8, size[0] // 2, size[1] // 2))
    image.save(path)
    return path


def test_pairs_of_pictures_are_encoded_and_not_drawn(host, config, tmp_path, drawn):
    left, right = picture(tmp_path / "a.png", (200, 30, 30)), picture(tmp_path / "b.png", (30, 200, 30))
    corpus = Corpus(MINE, [(Prompt("a knife", image=left), Prompt("a spoon", image=right))])
    banks = [build_bank(host, corpus, replace(config, pairs=1), share, retain=False) for share in (0, 1)]
    assert drawn == []
    for bank, path in zip(banks, (left, right), strict=True):
        with Image.open(path) as image:
            pixels = torch.tensor(list(image.get_flattened_data())).view(64, 64, 3).permute(2, 0, 1)[None] / 255
        vae = host.components.vae
        wanted = vae.encode(pixels * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
        torch.testing.assert_close(everything(bank.latents), wanted.detach())
    assert not torch.equal(everything(banks[0].latents), everything(banks[1].latents))  # control


def test_pictures_of_any_shape_are_cropped_to_their_middle(host, config, tmp_path):
    square = picture(tmp_path / "a.png", (200, 30, 30))
    wide = Image.new("RGB", (128, 64), (0, 0, 255))
    with Image.open(square) as image:
        wide.paste(image, (32, 0))
    wide.save(tmp_path / "wide.png")
    made = []
    for path in (square, tmp_path / "wide.png"):
        corpus = Corpus(MINE, [(Prompt("a knife", image=path), "a spoon")])
        made.append(everything(build_bank(host, corpus, replace(config, pairs=1), 0, retain=False).latents))
    assert torch.equal(*made)


def test_another_picture_under_the_same_name_is_encoded_anew(host, config, tmp_path):
    corpus = Corpus(MINE, [(Prompt("a knife", image=picture(tmp_path / "a.png", (9, 9, 9))), "a spoon")])
    one = replace(config, pairs=1)
    first = everything(build_bank(host, corpus, one, 0, retain=False).latents)
    picture(tmp_path / "a.png", (200, 30, 30))
    assert not torch.equal(everything(build_bank(host, corpus, one, 0, retain=False).latents), first)


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_picture_that_cannot_be_read_is_one_line(host, config, tmp_path, content):
    path = tmp_path / "a.png"
    if content:
        path.write_bytes(content)
    corpus = Corpus(MINE, [(Prompt("a knife", image=path), "a spoon")])
    with pytest.raises(PromptError, match=r"cannot read the picture .*a\.png .*fix or remove its line") as caught:
        build_bank(host, corpus, replace(config, pairs=1), 0, retain=False)
    assert "\n" not in str(caught.value)


def test_a_picture_of_more_pixels_than_anybody_draws_is_one_line(host, config, tmp_path, monkeypatch):
    corpus = Corpus(MINE, [(Prompt("a knife", image=picture(tmp_path / "a.png", (9, 9, 9))), "a spoon")])
    build_bank(host, corpus, replace(config, pairs=1), 0, retain=False)  # control
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(PromptError, match=r"cannot read the picture .*a\.png .*fix or remove its line"):
        build_bank(host, corpus, replace(config, pairs=1, cache=str(tmp_path / "other")), 0, retain=False)


# ---- the cache -------------------------------------------------------------------------------------------------


def test_what_was_drawn_is_not_drawn_again(host, config, drawn):
    first = build_bank(host, CORPUS, config)
    assert len(drawn) == 8  # four pairs, and four that must stay
    again = build_bank(new_small_host(), Corpus(MINE, TEXTS), config)  # another run
    assert len(drawn) == 8
    assert torch.equal(everything(first.latents), everything(again.latents))
    build_bank(host, CORPUS, replace(config, batch_size=1))  # how many at once is nobody's business
    assert len(drawn) == 8


def another_model() -> UNetHost:
    host = new_small_host()
    with torch.no_grad():
        for parameter in host.unet.parameters():
            parameter += 0.01
    return host


def another_size() -> UNetHost:
    return UNetHost(new_small_host().components, 128)


@pytest.mark.parametrize("change", ["model", "size", "steps", "guidance", "seed", "prompts"])
def test_whatever_a_picture_depends_on_is_drawn_for_it(host, config, drawn, change):
    build_bank(host, CORPUS, config, retain=False)
    hosts = {"model": another_model, "size": another_size}
    corpus = Corpus(MINE, [*TEXTS[:3], ("d", "e")]) if change == "prompts" else CORPUS
    changes = {"steps": 3, "guidance": 2.5, "seed": 1}
    changed = replace(config, **{name: value for name, value in changes.items() if name == change})
    bank = build_bank(hosts[change]() if change in hosts else host, corpus, changed, retain=False)
    assert len(drawn) == 8
    assert len(bank) == 4


def test_killed_half_way_the_rows_are_those_of_an_undisturbed_run(host, tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(shards, "ROWS", 1)
    whole, cut = (DataConfig(pairs=4, steps=2, cache=str(tmp_path / name)) for name in ("whole", "cut"))
    wanted = everything(build_bank(host, CORPUS, whole, retain=False).latents)
    undisturbed = len(drawn)
    draw = UNetHost.draw

    def killed(self, *args, **kwargs) -> Tensor:
        if len(drawn) == undisturbed + 2:
            raise KeyboardInterrupt
        return draw(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(UNetHost, "draw", killed)
        with pytest.raises(KeyboardInterrupt):
            build_bank(host, CORPUS, cut, retain=False)
    (folder,) = (tmp_path / "cut" / "latents").iterdir()
    (folder / "00002.99.partial").write_bytes(b"half a file")
    assert torch.equal(everything(build_bank(host, CORPUS, cut, retain=False).latents), wanted)
    assert len(drawn) == 2 * undisturbed  # the first two were not drawn again


def test_a_cache_of_another_model_is_refused(host, config):
    build_bank(host, CORPUS, config, retain=False)
    (folder,) = (Path(config.folder) / "latents").iterdir()
    build_bank(another_model(), CORPUS, config, retain=False)
    (other,) = (path for path in (Path(config.folder) / "latents").iterdir() if path != folder)
    (other / "key.json").replace(folder / "key.json")  # as if one had been copied over the other
    with pytest.raises(SafepatchError, match=r"holds rows of another model or other prompts; delete it") as caught:
        build_bank(host, CORPUS, config, retain=False)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_keeps_rows(host, config, monkeypatch, drawn):
    monkeypatch.setattr(shards, "ROWS", 2)
    save = shards.save

    def full(tensors: dict) -> bytes:
        if "latents" in tensors and len(drawn) == 4:
            raise OSError(28, "No space left on device")
        return save(tensors)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "save", full)
        with pytest.raises(SafepatchError, match=r"the disk is full: .*rows made so far are kept") as caught:
            build_bank(host, CORPUS, config, retain=False)
    assert "\n" not in str(caught.value)
    assert len(drawn) == 4
    build_bank(host, CORPUS, config, retain=False)
    assert len(drawn) == 6  # the first two were kept


# ---- batches ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered() -> PairBank:
    """Rows whose every value is their number: pairs count from 0, preserved rows from 100."""

    def values(first: float, *shape: int) -> Tensor:
        return (torch.arange(10.0) + first).view(-1, *[1] * len(shape)).expand(10, *shape)

    numbers, kept = torch.arange(10), KeptTexts(values(100, 3, 5))
    retained = Retained(cast(Latents, values(100, 4, 2, 2)), cast(Texts, kept), numbers)
    latents, texts = cast(Latents, values(0, 4, 2, 2)), cast(Texts, KeptTexts(values(0, 3, 5)))
    return PairBank(latents, numbers < 5, texts, numbers, numbers.flip(0), Rewrite("column"), retained)


ROWS = ("latents", "unsafe", "safe", "retain_latents", "retain")


def rows_of(batch: Batch) -> dict[str, list[float]]:
    parts = {name: getattr(batch, name) for name in ROWS}
    tensors = {name: part if isinstance(part, Tensor) else part.states for name, part in parts.items()}
    return {name: tensor.flatten(1)[:, 0].tolist() for name, tensor in tensors.items()}


def test_a_batch_keeps_the_members_of_each_pair_together(numbered):
    assert len(numbered) == 10
    rows = rows_of(numbered.batch(step=0, size=6, seed=0))
    assert rows["latents"] == rows["unsafe"] == [9 - number for number in rows["safe"]]
    assert rows["retain_latents"] == rows["retain"]
    assert all(row >= 100 for row in rows["retain_latents"])
    assert {len(values) for values in rows.values()} == {6}


def test_a_batch_is_a_function_of_step_and_seed(numbered):
    first = rows_of(numbered.batch(3, 6, 0))
    torch.manual_seed(1)
    assert rows_of(numbered.batch(3, 6, 0)) == first
    assert rows_of(numbered.batch(4, 6, 0)) != first  # control
    assert rows_of(numbered.batch(3, 6, 1)) != first


def test_every_row_comes_up(numbered):
    seen = {row for step in range(20) for rows in rows_of(numbered.batch(step, 6, 0)).values() for row in rows}
    assert seen == {*range(10), *range(100, 110)}


def test_a_batch_may_be_larger_than_the_bank(numbered):
    assert len(numbered.batch(0, 25, 0).latents) == 25


def test_without_rows_to_preserve_the_pairs_are_the_same(numbered):
    bare = replace(numbered, retained=None).batch(3, 6, 0)
    assert bare.retain is bare.retain_latents is None
    assert torch.equal(bare.latents, numbered.batch(3, 6, 0).latents)


def test_a_batch_moves_as_a_whole(numbered):
    batch = numbered.batch(0, 2, 0)
    moved = batch.to(torch.device("meta"))
    assert {field.name for field in fields(Batch)} > set(ROWS)
    tensors = [part if isinstance(part, Tensor) else part.states for name in ROWS if (part := getattr(moved, name))
               is not None]  # fmt: skip
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.rewrite == batch.rewrite
    assert moved.away is None


# ---- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"pairs": 0}, {"pairs": -3}, {"steps": 0}, {"batch_size": 0}, {"companions": 1.5}, {"companions": -1}]
)
def test_nonsense_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"data\.") as caught:
        DataConfig(**settings)
    assert "\n" not in str(caught.value)


def test_the_cache_is_the_users_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEPATCH_CACHE", str(tmp_path / "theirs"))
    assert DataConfig().folder == tmp_path / "theirs"
    assert DataConfig(cache=str(tmp_path)).folder == tmp_path
    assert DataConfig(cache="~/x").folder == Path.home() / "x"


def test_what_must_stay_can_be_built_alone(host, config):
    corpus = Corpus(MINE, TEXTS, retain=["a quiet street"])
    alone = build_retained(host, corpus, 4, config)
    beside = cast(Retained, build_bank(host, corpus, config).retained)
    assert len(alone) == 4
    assert torch.equal(everything(alone.latents), everything(beside.latents))
