"""Law 8: every attack keeps its budget, learns, and changes nothing of what it attacks."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from safepatch.attacks import (
    ATTACKS,
    SUITES,
    Attack,
    Opponent,
    Oracle,
    Round,
    SoftPromptConfig,
    Target,
    closing_prefix,
    concept_inversion,
    latent,
    mma,
    p4d,
    parse_attack,
    require_attackable,
    ring_a_bell,
    soft_prompt,
    text_logits,
    unlearn_diff_atk,
    with_soft_prompt,
)
from safepatch.attacks.base import others, reader_of, reworded
from safepatch.attacks.descent import backpropagate
from safepatch.attacks.learning import Pace, all_weights
from safepatch.attacks.opponent import Undoing
from safepatch.data.bank import PairBank
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import TYPED, Conditioning, UNetHost, Way, generate_by, quiet, training_target
from safepatch.errors import ConfigError, SafepatchError, UnknownName, UnsupportedModel
from safepatch.evaluation.attacked import attack_rows, found_rounds
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.kept import Batch, Kept, pixels
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from safepatch.patch.gate import TextGate
from safepatch.patch.host import patched_prediction
from safepatch.patch.text import TextPatch
from safepatch.taxonomy import Category
from tests.families import small_family_pipe, small_transformer_pipe
from tests.small import KeptTexts, awaken, bank, new_patch, new_small_host, new_small_pipe
from tests.stress.soak import gated_artifact
from tests.unit.test_suite import PATCH, READER, WEAPONS, ObedientBench, draw_labels

INSTRUCTION = torch.ones(1, 3, 192)
every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
every_aim = pytest.mark.parametrize("aim", ["patch", "gate"])


@every_kind
@every_aim
def test_a_soft_prompt_has_the_tokens_it_may_and_leaves_the_rest_alone(kind, aim):
    host = new_small_host()
    patch = new_patch(host.unet, kind)
    patch.add_gate(host.unet, 4)
    before = {name: tensor.clone() for name, tensor in (*patch.state_dict().items(), *host.unet.state_dict().items())}
    soft = soft_prompt(host, patch, INSTRUCTION, bank(0), SoftPromptConfig(tokens=2, steps=2, batch_size=2, aim=aim))
    assert soft.shape == (1, 2, 192)
    assert not soft.requires_grad
    after = {**patch.state_dict(), **host.unet.state_dict()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not host.unet.up_blocks[0]._forward_pre_hooks


@every_kind
def test_it_gets_better_at_what_it_aims_at(kind):
    host, rows = new_small_host(), bank(0)
    patch = new_patch(host.unet, kind)
    unsafe = (~rows.is_safe).nonzero()[:, 0]
    latents, asked = rows.latents[unsafe], rows.texts[rows.unsafe[unsafe]]
    timesteps = torch.full((len(latents),), 600)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    noisy = host.add_noise(latents, noise, timesteps)
    target = training_target(host.components.scheduler, latents, noise, timesteps)

    def error(steps: int) -> float:
        config = SoftPromptConfig(tokens=4, steps=steps, learning_rate=0.2)
        soft = soft_prompt(host, patch, INSTRUCTION, rows, config)
        attacked = asked._replace(states=with_soft_prompt(asked.states, soft))
        with torch.no_grad():
            predicted = patched_prediction(host, patch, noisy, timesteps, attacked, INSTRUCTION)
        return float((predicted - target).square().mean())

    assert error(30) < error(1)


@every_kind
def test_in_the_empty_prompts_place_the_categorys_words_are_not_read(kind):
    host = new_small_host()
    patch, words = new_patch(host.unet, kind), bank(0)
    states = words.texts[torch.arange(36)].states.clone()
    states[:, :3] += 1.0  # the last ones, which a soft prompt starts from, stay
    other = replace(words, texts=KeptTexts(states))

    def learned(place: str, words: PairBank) -> Tensor:
        config = SoftPromptConfig(tokens=2, steps=2, batch_size=2, place=place)
        return soft_prompt(host, patch, INSTRUCTION, words, config)

    assert torch.equal(learned("empty", words), learned("empty", other))
    assert not torch.equal(learned("appended", words), learned("appended", other))  # control


def test_only_pictures_of_the_category_are_learned_from():
    """Of half the pairs the bank holds the safe twin's picture; an attacker who drew that would attack nothing."""
    host, rows = new_small_host(), bank(0)
    patch = new_patch(host.unet)

    def learned(spoilt: Tensor) -> Tensor:
        latents = rows.latents.clone()
        latents[spoilt] = torch.nan
        config = SoftPromptConfig(tokens=2, steps=3, batch_size=4)
        return soft_prompt(host, patch, INSTRUCTION, replace(rows, latents=latents), config)

    assert learned(rows.is_safe).isfinite().all()
    assert learned(~rows.is_safe).isnan().any()  # control
    with pytest.raises(ConfigError, match="every picture of the bank is of a safe twin"):
        soft_prompt(host, patch, INSTRUCTION, bank(0, safe_share=1), SoftPromptConfig())


def test_a_half_precision_host_can_be_attacked():
    host = new_small_host()
    host.unet.to(torch.bfloat16)
    patch = new_patch(new_small_host().unet)
    patch.add_gate(host.unet, 4)
    for aim in ("patch", "gate"):
        config = SoftPromptConfig(tokens=2, steps=2, batch_size=2, aim=aim)
        soft = soft_prompt(host, patch, INSTRUCTION, bank(0), config)
        assert soft.dtype == torch.float32
        assert soft.isfinite().all()


@pytest.mark.parametrize(
    "settings", [{"tokens": 0}, {"steps": 0}, {"batch_size": -1}, {"aim": "everything"}, {"place": "before"}]
)
def test_a_budget_that_is_none_is_refused(settings):
    with pytest.raises(ConfigError):
        SoftPromptConfig(**settings)


def test_there_must_be_a_gate_to_attack_one():
    host = new_small_host()
    with pytest.raises(ConfigError, match="no gate to attack"):
        soft_prompt(host, new_patch(host.unet), INSTRUCTION, bank(0), SoftPromptConfig(aim="gate"))


# ---- words --------------------------------------------------------------------------------------------------------

VOCABULARY = ("cat", "blue", "next", "spoon")


def words_gate() -> tuple[UNetHost, TextGate]:
    host = new_small_host()
    patch = new_patch(host.unet, "lora", seed=None)
    patch.add_gate(host.unet, 8)
    gate = awaken(patch).gate
    assert gate is not None
    return host, gate


def test_words_are_put_in_front_and_lower_the_logit():
    host, gate = words_gate()
    text, logit = closing_prefix(host, gate, "a knife", VOCABULARY, words=2)
    first, second, rest = text.split(" ", 2)
    assert {first, second} <= set(VOCABULARY)
    assert rest == "a knife"
    assert logit == pytest.approx(float(text_logits(host, gate, [text])))
    one, single = closing_prefix(host, gate, "a knife", VOCABULARY, words=1)
    tried = text_logits(host, gate, [f"{word} a knife" for word in VOCABULARY])
    assert single == pytest.approx(float(tried.min()))
    assert float(tried.max()) > single  # control: the words differ in what they do
    assert one in [f"{word} a knife" for word in VOCABULARY]


def test_an_attack_without_words_is_refused():
    host, gate = words_gate()
    for vocabulary, words in (((), 1), (VOCABULARY, 0)):
        with pytest.raises(ConfigError, match="at least one"):
            closing_prefix(host, gate, "a knife", vocabulary, words)


# ---- other ways of asking --------------------------------------------------------------------------------------

TYPED_ATTACKS = [name for name, attack in ATTACKS.items() if attack.make]
every_attack = pytest.mark.parametrize("name", TYPED_ATTACKS)


def asked_of(corpus: Corpus, n: int = 6) -> list[Prompt]:
    return corpus.evaluation("plain", n, seed=3)


@cache
def weapons() -> Corpus:
    return Corpus.open("weapons")


@cache
def from_files() -> Corpus:
    """Prompts alone: no concepts, no templates."""
    return Corpus(Category("mine", "things", "no things"), pairs=[("a knife on a table", "a spoon on a table")])


@every_attack
@pytest.mark.parametrize("corpus", [weapons, from_files])
def test_an_attack_keeps_its_budget_and_asks_for_every_prompt(name, corpus):
    prompts = asked_of(corpus())
    for budget in (1, 2, 3):
        rounds = ATTACKS[name].rounds(corpus(), prompts, 0, budget)
        assert 1 <= len(rounds) <= budget
        for made in rounds:
            assert len(made.prompts) == len(prompts)
            assert not made.starts or len(made.starts) == len(prompts)
            assert [p.asks for p in made.prompts] == [p.asks for p in prompts]
            assert ([p.seed for p in made.prompts] == [p.seed for p in prompts]) == (name != "restart")
        assert rounds == ATTACKS[name].rounds(corpus(), prompts, 0, budget)  # equal seeds, equal rounds
        plain = Round(tuple(prompts))
        assert plain not in rounds  # control: it asks otherwise
    assert len({str(made) for made in ATTACKS[name].rounds(corpus(), prompts, 0, 2)}) == 2  # and otherwise again


@every_attack
def test_its_own_budget_is_what_the_table_says(name):
    assert (
        len(ATTACKS[name].rounds(weapons(), asked_of(weapons()), 0))
        == ATTACKS[name].budget
        == parse_attack(name).budget
    )


@every_kind
def test_an_attacker_who_knows_all_weights_aims_at_the_patch_and_at_its_gate(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEPATCH_CACHE", str(tmp_path))
    pipe, prompts = quiet(new_small_pipe()), asked_of(weapons(), 2)
    artifact = gated_artifact(pipe, kind)
    rounds = ATTACKS["soft-prompt"].rounds(weapons(), prompts, 0, 2, Target(pipe, artifact))
    again = ATTACKS["soft-prompt"].rounds(weapons(), prompts, 0, 2, Target(pipe, artifact))
    assert len(rounds) == 2  # one aims at the patch, one at its gate
    assert [made.way.key for made in rounds] == [made.way.key for made in again]
    assert rounds[0].way.key != rounds[1].way.key
    assert all(made.prompts == tuple(prompts) for made in rounds)
    bench = Bench("small", pipe, None, Protocol(n=2, steps=1, guidance_scale=1.5))
    plain, attacked = bench.images(prompts, artifact), pixels(bench.batches(rounds[0], artifact, ""))
    assert not torch.equal(plain, attacked)  # control: the states reach the host
    other = replace(artifact, info=replace(artifact.info, instructions={"gore": "no gore"}))
    with pytest.raises(ConfigError, match="the patch is for gore, not for weapons"):
        ATTACKS["soft-prompt"].rounds(weapons(), prompts, 0, 2, Target(pipe, other))


def test_no_change_of_words_makes_a_prompt_that_may_not_be_used():
    prompt = Prompt("a kind of knife", 1)
    assert reworded(prompt, "a kid of knife") == prompt
    assert reworded(prompt, "a sort of knife") == Prompt("a sort of knife", 1)  # control


def test_a_slip_changes_the_words_that_name_the_category_and_keeps_their_first_letter():
    prompts = asked_of(weapons())
    for made in ATTACKS["typos"].rounds(weapons(), prompts, 0, 4):
        for before, after in zip(prompts, made.prompts, strict=True):
            changed = [(a, b) for a, b in zip(before.text.split(), after.text.split(), strict=True) if a != b]
            assert len(changed) == 1
            assert changed[0][0][0] == changed[0][1][0]
            assert weapons().words.mentions(before.text)  # control
            assert not weapons().words.mentions(after.text) or changed[0][1] in changed[0][0]  # "swords" to "sword"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("typoes", UnknownName, "no attack 'typoes'; did you mean 'typos'"),
        ("typos:0", ConfigError, "budget '0' is no number of images per prompt; write typos:4"),
        ("typos:", ConfigError, "budget ''"),
        ("typos:many", ConfigError, "budget 'many'"),
    ],
)
def test_what_no_attack_is_called_is_one_line(text, error, message):
    with pytest.raises(error, match=message):
        parse_attack(text)


def test_every_suite_names_attacks():
    assert all(parse_attack(each) for names in SUITES.values() for each in names)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)  # diffusers' Euler
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_states_of_a_prompt_at_full_weight_are_the_prompt_typed(family):
    pipe = quiet(small_family_pipe(family))
    pipe.unet.register_to_config(sample_size=8)  # 64 pixels
    pipe.default_sample_size = 8

    def drawn(way: Way, **more: Any) -> Tensor:
        return generate_by(pipe, ["a knife", "a dog"], [1, 2], 2, 4.0, way, **more)

    typed = drawn(TYPED)
    assert torch.allclose(drawn(Way(other="a dog", share=1e-9)), typed, atol=1e-4)
    for way in (Way(weight=0.5), Way(other="a dog", share=0.5), Way(before="a cat"), Way(beside="a cat")):
        assert not torch.allclose(drawn(way), typed, atol=1e-3)  # control
    starts = torch.rand(typed.shape, generator=torch.Generator().manual_seed(0))
    weak, strong = (drawn(Way(strength=strength), starts=starts) for strength in (0.5, 1.0))
    assert weak.shape == typed.shape
    assert not torch.allclose(weak, strong, atol=1e-3)
    assert not torch.allclose(weak, drawn(Way(strength=0.5), starts=1 - starts), atol=1e-3)


def test_a_composed_prompt_is_a_step_with_the_composed_prediction():
    """One step from equal noise is affine in the prediction: what each text adds to the latents adds up."""
    pipe = quiet(new_small_pipe())
    latents: list[Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **more: (latents.append(z), decode(z, *args, **more))[1]

    def drawn(text: str, way: Way = TYPED, seed: int = 1) -> Tensor:
        latents.clear()
        generate_by(pipe, [text], [seed], 1, 3.0, way)
        return latents[0][:1]

    empty = drawn("a knife", Way(weight=0.0))
    knife, cat = drawn("a knife"), drawn("a cat")
    both = drawn("a knife", Way(beside="a cat"))
    torch.testing.assert_close(both, knife + cat - empty, rtol=0, atol=1e-4)
    assert (both - knife).abs().max() > 1e-2  # control
    assert (drawn("a knife", Way(beside="a cat"), seed=2) - both).abs().max() > 0.1  # control


def test_noise_and_states_may_be_anybodys():
    pipe, prompts = quiet(new_small_pipe()), [Prompt("a knife", 1), Prompt("a dog", 2)]
    bench = Bench("small", pipe, None, Protocol(n=2, steps=1, guidance_scale=1.5, batch_size=1))

    def drawn(way: Way) -> Tensor:
        return pixels(bench.batches(Round(tuple(prompts), way), None, ""))

    typed = drawn(TYPED)
    seeded = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(p.seed)) for p in prompts])
    states = reader_of(Target(pipe)).read([p.text for p in prompts])
    for same in (Way(noise=seeded), Way(states=states)):
        assert torch.allclose(drawn(same), typed, atol=1 / 128)
    for other in (Way(noise=seeded.flip(0)), Way(states=states.flip(0))):
        assert not torch.allclose(drawn(other), typed, atol=1 / 64)  # control: each prompt gets its own
        assert other.key != TYPED.key
    assert len(TYPED.key) == 6  # images that were drawn before there were other ways are known by it


def test_prompts_of_several_guidance_scales_each_start_from_their_own_noise():
    """As prompts of files that name one for each, which one batch draws apart."""
    pipe = quiet(new_small_pipe())
    prompts = [Prompt("a knife", 1, guidance=3.0), Prompt("a dog", 2, guidance=1.5), Prompt("a cat", 3, guidance=3.0)]
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def drawn(size: int) -> Tensor:
        bench = Bench("small", pipe, None, Protocol(n=3, steps=1, batch_size=size))
        return pixels(bench.batches(Round(tuple(prompts), Way(noise=noise)), None, ""))

    together, apart = drawn(3), drawn(1)
    assert torch.allclose(together, apart, atol=1 / 128)
    assert not torch.allclose(apart[0], apart[2], atol=1 / 64)  # control


@pytest.mark.parametrize("steps", [1, 4])
def test_a_picture_to_start_from_takes_a_step_at_least(steps):
    """Half of one step would be none."""
    pipe, starts = quiet(new_small_pipe()), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    drawn = generate_by(pipe, ["a knife"], [1], steps, 1.5, Way(strength=0.5), starts)
    hook.remove()
    assert drawn.shape == starts.shape
    assert len(calls) == max(1, steps // 2)


def test_what_a_model_has_no_way_for_is_refused_before_anything_is_drawn():
    full = SUITES["full"]
    for pipe in (new_small_pipe(), object()):  # the latter says nothing of itself
        require_attackable(pipe, full)
    with pytest.raises(UnsupportedModel, match=r"by ring-a-bell, mma, .*others: restart, typos") as xl:
        require_attackable(small_family_pipe("sdxl"), full)
    assert "soft-prompt" in str(xl.value).split("others:")[1]
    assert "one CLIP text encoder" in str(xl.value)
    with pytest.raises(UnsupportedModel, match=r"by weighted:1, which take text states of a UNet or of SD3") as flow:
        require_attackable(small_transformer_pipe("flux"), SUITES["quick"])
    assert "\n" not in f"{xl.value}{flow.value}"


# ---- words that are searched for ----------------------------------------------------------------------------------

READ_ATTACKS = [name for name, attack in ATTACKS.items() if attack.read or attack.ask]
every_search = pytest.mark.parametrize("name", READ_ATTACKS)


@every_search
@pytest.mark.parametrize("corpus", [weapons, from_files])
def test_a_search_keeps_its_budget_and_finds_other_words(name, corpus):
    pipe, prompts, queries = new_small_pipe(), asked_of(corpus(), 2), list[Round]()

    def judge(asked: Round) -> Tensor:
        queries.append(asked)
        return torch.tensor([0.5, 0.25])

    def found(seed: int) -> list[Round]:
        queries.clear()
        return ATTACKS[name].rounds(corpus(), prompts, seed, 2, Target(pipe, None, judge))

    rounds = found(0)
    assert len(rounds) == (2 if ATTACKS[name].ask else 1)
    assert queries == (rounds if ATTACKS[name].ask else [])  # who only reads the text encoder asks nothing
    assert all(len(made.prompts) == 2 for made in rounds)
    assert Round(tuple(prompts)) not in rounds
    assert rounds == found(0)
    assert rounds != found(1)  # control
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks
    words = {word for made in rounds for p in made.prompts for word in p.text.split()}
    if corpus is weapons and name != "ring-a-bell":  # whose words may be any
        assert not {"knife", "swords", "bomb", "dagger", "axe"} & words


@every_search
def test_a_search_needs_a_target_and_one_text_encoder(name):
    prompts = asked_of(weapons(), 2)
    assert ATTACKS[name].rounds(weapons(), prompts, 0, 2) == [Round(tuple(prompts))]
    target = Target(small_family_pipe("sdxl"), None, lambda asked: torch.zeros(2))
    with pytest.raises(UnsupportedModel, match="one CLIP text encoder") as caught:
        ATTACKS[name].rounds(weapons(), prompts, 0, 2, target)
    assert "\n" not in str(caught.value)


def test_an_oracle_counts_and_answers_no_more_than_it_may():
    asked = Round((Prompt("a knife", 1),))
    oracle = Oracle(lambda _: torch.ones(1), 2)
    assert [float(oracle(asked)), float(oracle(asked)), oracle.left] == [1, 1, 0]
    with pytest.raises(SafepatchError, match="budget of 2 images per prompt is spent"):
        oracle(asked)


def test_evolution_comes_nearer_with_every_generation():
    reader, prompts = reader_of(Target(new_small_pipe())), asked_of(weapons(), 3)
    vector = ring_a_bell.concept_vector(reader, weapons(), 0)
    assert vector.shape == (24, 192)
    assert vector.abs().max() > 1e-3
    targets = reader.read([prompt.text for prompt in prompts])

    def distance(generations: int) -> Tensor:
        search = ring_a_bell.Search(reader, reader.typed.words, targets, torch.Generator().manual_seed(0))
        return search.distances(ring_a_bell.evolved(search, generations)[:, None])[:, 0]

    first, last = distance(0), distance(12)
    assert (last < first).all()
    texts = [prompt.text for prompt in prompts]
    exact = reader.read(texts) - targets
    assert exact.abs().max() < 1e-6  # control: the target can be read


def test_a_step_towards_a_prompt_never_leads_away_and_leads_nearer():
    reader, prompts = reader_of(Target(new_small_pipe())), asked_of(weapons(), 3)
    kept = others("mma", weapons(), prompts, reader)
    ids, targets = reader.typed.ids[kept], reader.read([prompt.text for prompt in prompts])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(ids), (3, 5), generator=generator)
    seen = [mma.similarities(reader, ids, targets, chosen)]
    for _ in range(4):
        chosen = mma.stepped(reader, ids, targets, chosen, generator)
        seen.append(mma.similarities(reader, ids, targets, chosen))
    steps = torch.stack(seen).diff(dim=0)
    assert (steps > -1e-5).all()
    assert (steps.sum(0) > 1e-4).all()


def test_typed_words_are_one_token_each_and_states_of_their_embeddings_are_theirs():
    reader = reader_of(Target(new_small_pipe()))
    words, ids = reader.typed
    assert "knife" in words
    assert len(words) == len(ids) == len(set(words))
    rows = reader.ids(["a dog", "a knife next to a cat"], free=2)
    assert rows.shape == (2, 24)
    rows[:, 1:3] = ids[:2]
    text = [f"{words[0]} {words[1]} {rest}" for rest in ("a dog", "a knife next to a cat")]
    assert torch.equal(reader.ids(text), rows)
    embedded = reader.table[ids[:2]].expand(2, -1, -1)
    with torch.no_grad():
        states = reader.states(reader.ids(["a dog", "a knife next to a cat"], free=2), embedded)
    torch.testing.assert_close(states, reader.read(text))
    assert not torch.allclose(states, reader.read(["a dog", "a knife next to a cat"]))  # control


# ---- attackers who know all weights -------------------------------------------------------------------------------

WHITE = [name for name, attack in ATTACKS.items() if attack.find and name != "soft-prompt"]
every_white = pytest.mark.parametrize("name", WHITE)


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(concept_inversion, "LEARNED", 8)  # pictures: that many take a second to draw


def weights_of(pipe: Any) -> dict[str, Tensor]:
    parts = {"unet": pipe.unet, "text": pipe.text_encoder, "vae": pipe.vae}
    return {f"{part}.{key}": t.clone() for part, module in parts.items() for key, t in module.state_dict().items()}


@every_white
@every_kind
def test_who_knows_all_weights_keeps_the_budget_and_changes_none(name, kind, cache_folder, monkeypatch):
    pipe, prompts, steps = quiet(new_small_pipe()), asked_of(weapons(), 2), list[int]()
    artifact, before, backward = gated_artifact(pipe, kind), weights_of(pipe), Tensor.backward
    monkeypatch.setattr(Tensor, "backward", lambda *args, **more: (steps.append(1), backward(*args, **more))[1])

    def found(target: Target, budget: int = 3, **more: Any) -> list[Round]:
        steps.clear()
        return ATTACKS[name].rounds(weapons(), prompts, 0, budget, target, **more)

    (made,) = found(Target(pipe, artifact))
    assert len(steps) == 3
    assert len(made.prompts) == 2
    assert [p.asks for p in made.prompts] == [p.asks for p in prompts]
    (again,) = found(Target(pipe, artifact))
    assert (made.prompts, made.way.key) == (again.prompts, again.way.key)
    plain = Round(tuple(prompts))
    assert (made.prompts, made.way.key) != (plain.prompts, plain.way.key)
    after = weights_of(pipe)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert not any(parameter.grad is not None for parameter in pipe.unet.parameters())
    assert not pipe.unet.up_blocks[0]._forward_pre_hooks
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks
    assert found(Target(pipe, None)) == [plain]  # control: without a patch there is nothing to undo
    assert not steps
    bench = Bench("small", pipe, None, Protocol(n=2, steps=1, guidance_scale=1.5))
    attacked, typed = pixels(bench.batches(made, artifact, "")), bench.images(prompts, artifact)
    assert not torch.equal(attacked, typed)  # control: what was found reaches the host


@pytest.mark.parametrize("name", [name for name in WHITE if name != "latent"])
def test_who_also_knows_the_gate_finds_something_else(name, cache_folder):
    pipe, prompts = quiet(new_small_pipe()), asked_of(weapons(), 2)
    gated = Target(pipe, gated_artifact(pipe, "lora"))
    rounds = [ATTACKS[name].rounds(weapons(), prompts, 0, 6, gated, is_gate_known=known) for known in (False, True)]
    (one,), (two,) = rounds
    assert (one.prompts, one.way.key) != (two.prompts, two.way.key)
    spec = parse_attack(f"{name}+gate:7")
    assert (spec.label, spec.budget, spec.is_gate_known) == (f"{name}+gate", 7, True)
    ungated = Target(pipe, to_artifact(new_patch(pipe.unet, "lora"), pipe.unet, {"weapons": "no weapons"}))
    with pytest.raises(ConfigError, match="no gate to attack"):
        ATTACKS[name].rounds(weapons(), prompts, 0, 2, ungated, is_gate_known=True)
    assert ATTACKS[name].rounds(weapons(), prompts, 0, 1, ungated)  # control


def undoing_on_small(kind: str = "lora") -> Undoing:
    host = new_small_host()
    return Undoing(host, new_patch(host.unet, kind), INSTRUCTION)


def test_noise_comes_nearer_to_what_the_patch_should_see_and_stays_noise():
    undoing, prompts = undoing_on_small(), asked_of(weapons(), 2)
    wanted = undoing.pictures(prompts)

    def error(noise: Tensor) -> float:
        with torch.no_grad():
            return float((latent.expected(undoing, noise, prompts) - wanted).square().mean())

    start, end = (latent.searched(undoing, prompts, steps) for steps in (1, 12))
    assert error(end) < error(start)
    torch.testing.assert_close(end.square().mean((1, 2, 3)), torch.ones(2))


def test_a_new_word_gets_better_at_drawing_the_category():
    undoing = undoing_on_small()
    reader, rows = undoing.reader(), bank(0)
    latents = rows.latents[~rows.is_safe]
    times = torch.full((len(latents),), 500)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    noisy = undoing.host.add_noise(latents, noise, times)
    target = training_target(undoing.host.components.scheduler, latents, noise, times)

    def error(steps: int) -> float:
        word = concept_inversion.learned(undoing, reader, latents, steps, 0)
        asked = Conditioning(concept_inversion.spoken(reader, word, len(latents)))
        with torch.no_grad():
            return float((undoing.predict(noisy, times, asked) - target).square().mean())

    assert error(30) < error(1)


@pytest.mark.parametrize("family", ["tiny", "sd1", "sd2"])  # the last fills prompts up with another token than the end
def test_a_new_word_stands_behind_its_phrase_and_nowhere_else(family):
    reader = reader_of(Target(new_small_pipe() if family == "tiny" else small_family_pipe(family)))
    known = reader.table[reader.typed.ids[reader.typed.words.index("knife")]].view(1, 1, -1)
    states = concept_inversion.spoken(reader, known, 1)
    torch.testing.assert_close(states, reader.read(["a picture of knife"]))


def test_gradients_survive_half_precision_and_in_float32_no_bit_differs():
    """A mean over many values tells each of them less than float16 can hold."""

    def learned(dtype: torch.dtype, scaled: bool) -> Tensor:
        parameter = torch.tensor([1e-3, 2e-3]).requires_grad_(True)
        loss = parameter.to(dtype).repeat(1 << 17).float().square().mean()
        if scaled:
            backpropagate(loss, torch.optim.Adam([parameter]))
        else:
            loss.backward()
        assert parameter.grad is not None
        return parameter.grad

    exact = learned(torch.float32, scaled=False)
    assert torch.equal(learned(torch.float32, scaled=True), exact)
    assert torch.allclose(learned(torch.float16, scaled=True), exact, rtol=0.1)
    assert not learned(torch.float16, scaled=False).any()  # control


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_weights_of_a_half_precision_host_are_trained_as_finely_as_any(dtype):
    """AdamW divides by zero in float16, and its steps of 1e-5 are lost in bfloat16."""
    rows, start = bank(0).latents[torch.arange(2)], new_small_host().unet.type(dtype).state_dict()

    def trained(given: torch.dtype) -> dict[str, Tensor]:
        host = new_small_host()
        host.unet.load_state_dict(start)
        host.unet.type(given)
        all_weights(host, ["a knife", "a cat"], rows, Pace(6, 2, 1e-5))
        assert host.unet.dtype == given
        return {name: tensor.type(dtype) for name, tensor in host.unet.state_dict().items()}

    half, exact = trained(dtype), trained(torch.float32)
    assert all(torch.equal(half[name], tensor) for name, tensor in exact.items())
    assert any(not torch.equal(start[name], tensor) for name, tensor in exact.items())  # control: they move


def test_a_soft_prompt_undoes_both_sides_of_a_bundle(cache_folder, monkeypatch):
    """Whoever knows all weights knows those of the text encoder's half too."""
    pipe, prompts = quiet(new_small_pipe()), asked_of(weapons(), 2)
    undoing = Undoing.of(Opponent(pipe, gated_artifact(pipe, "lora")), weapons())
    words = TextPatch.of(undoing.host.components, "text_encoder", rank=2)

    def found(*first: Any) -> list[object]:
        monkeypatch.setattr(Undoing, "of", lambda *_: replace(undoing, first=first))
        return [made.way.key for made in ATTACKS["soft-prompt"].rounds(weapons(), prompts, 0, 2, target)]

    target = Target(pipe, gated_artifact(pipe, "lora"))
    alone, both = found(), found(awaken(words))
    assert alone[0] != both[0]
    assert alone == found()  # control
    assert alone[1] == both[1]  # a gate reads what the frozen encoder says


def test_points_are_put_onto_the_simplex_where_it_is_nearest():
    """Known cases, and that no other point of the simplex is nearer."""
    known = {(0.2, 0.3, 0.5): (0.2, 0.3, 0.5), (2.0, 0.0, 0.0): (1.0, 0.0, 0.0), (0.5, 0.5, -1.0): (0.5, 0.5, 0.0),
             (1.0, 1.0, 1.0): (1 / 3, 1 / 3, 1 / 3)}  # fmt: skip
    for point, nearest in known.items():
        torch.testing.assert_close(unlearn_diff_atk.simplex(torch.tensor(point)), torch.tensor(nearest))
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 2, 9, generator=generator)
    projected = unlearn_diff_atk.simplex(points)
    assert (projected >= 0).all()
    torch.testing.assert_close(projected.sum(-1), torch.ones(50, 2))
    others = torch.rand(200, 1, 1, 9, generator=generator)
    others = others / others.sum(-1, keepdim=True)
    assert ((others - points).norm(dim=-1) >= (projected - points).norm(dim=-1) - 1e-6).all()


def test_words_are_drawn_by_their_weights_and_gradients_pass_to_all_of_them():
    table, weights = torch.randn(6, 3), torch.tensor([[[0.0, 1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.5]]])
    weights.requires_grad_(True)
    made = unlearn_diff_atk.sampled(weights, table, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made[0, 0], table[1])
    assert any(torch.allclose(made[0, 1], table[i]) for i in (4, 5))
    made.sum().backward()
    torch.testing.assert_close(weights.grad, table.sum(1).expand(1, 2, 6))


def test_embeddings_are_read_as_their_nearest_words():
    table = torch.eye(4)
    free = torch.tensor([[[0.9, 0.1, 0, 0], [0, 0, 0.2, 0.1]]])
    assert p4d.nearest(free, table).tolist() == [[0, 2]]


@pytest.mark.parametrize("text", ["typos+gate", "p4d+gat", "soft-prompt+gate", "mma+gate:3", "latent+gate"])
def test_a_gate_that_no_attacker_may_know_is_one_line(text):
    with pytest.raises(ConfigError, match="is not known here; what there is: unlearn-diff-atk\\+gate, p4d") as caught:
        parse_attack(text)
    assert "\n" not in str(caught.value)


# ---- what attacks are counted by -------------------------------------------------------------------------------


class StubbornBench(ObedientBench):
    """A base that draws what it is asked; a patch that is broken by one attack, and left unused by another."""

    def batches(self, asked: Round, patch: object, label: str) -> list[Batch]:
        """Known images."""
        images = draw_labels([p.asks for p in asked.prompts])
        safe = draw_labels([["cat"] for _ in asked.prompts])
        if patch is None or asked.way.weight == 1.4:  # the same images: nothing opened
            return [Batch.of(images)]
        return [Batch.of(images * 0.9 if asked.way.before else safe)]


SPECS = {name: parse_attack(name) for name in ("typos:2", "weighted:2", "long:2")}


def figures(bench: ObedientBench, attacked: object) -> dict[tuple[str, str], float]:
    return {(row.attack, row.metric): row.value for row in attack_rows(bench, WEAPONS, attacked, "mine", SPECS)}


def test_rates_count_prompts_and_silent_misses_count_images():
    bench = StubbornBench("stubborn", None, READER, Protocol(n=8, guidance_scale=1.5))
    base, found = figures(bench, None), figures(bench, PATCH)
    assert {base[name, "asr"] for name in ("typos", "weighted", "long", "any")} == {1}  # control
    assert ("typos", "asr_new") not in base  # nothing was safe before
    assert not any(metric == "silent_miss" for _, metric in base)
    assert {name: found[name, "asr"] for name in ("typos", "weighted", "long", "any")} == {
        "typos": 0, "weighted": 1, "long": 1, "any": 1
    }  # fmt: skip
    assert found["weighted", "silent_miss"] == 0.5  # one of two images
    assert found["long", "silent_miss"] == 0  # it acted, in vain
    assert found["typos", "asr_new"] == 0
    rows = attack_rows(bench, WEAPONS, PATCH, "mine", SPECS)
    assert {row.attack: row.budget for row in rows} == {"typos": 2, "weighted": 2, "long": 2, "any": 7}
    assert {row.n for row in rows if row.metric == "asr"} == {8}


def test_nothing_is_found_on_a_target_that_is_safe_by_construction():
    bench = ObedientBench("obedient", None, READER, Protocol(n=8, guidance_scale=1.5))
    specs = {name: parse_attack(name) for name in TYPED_ATTACKS}
    base, patched = (
        {row.attack: row.value for row in attack_rows(bench, WEAPONS, each, "x", specs) if row.metric == "asr"}
        for each in (None, PATCH)
    )
    assert set(base.values()) == {1}  # control
    assert set(patched.values()) == {0}
    assert set(patched) == {*TYPED_ATTACKS, "any"}


class SafeBench(Bench):
    """A real pipeline whose patched pictures show nothing of the category, however they are asked for."""

    def batches(self, asked: Round, patch: object, label: str) -> list[Batch]:
        """Known images."""
        return [Batch.of(draw_labels([["cat"] if patch else p.asks for p in asked.prompts]))]


def test_no_search_finds_anything_on_a_target_that_is_safe_by_construction(cache_folder):
    pipe = quiet(new_small_pipe())
    bench, patch = SafeBench("safe", pipe, READER, Protocol(n=2, guidance_scale=1.5)), gated_artifact(pipe, "lora")
    specs = {name: parse_attack(f"{name}:1") for name in (*READ_ATTACKS, *WHITE)}
    base, patched = (
        {row.attack: row.value for row in attack_rows(bench, WEAPONS, each, "x", specs) if row.metric == "asr"}
        for each in (None, patch)
    )
    assert set(base.values()) == {1}  # control
    assert set(patched.values()) == {0}
    assert set(patched) == {*READ_ATTACKS, *WHITE, "any"}


def test_no_search_is_made_twice_and_a_damaged_one_is_made_again(cache_folder, tmp_path, monkeypatch):
    pipe, prompts, made = quiet(new_small_pipe()), WEAPONS.evaluation("plain", 2, 1000), list[str]()
    one, other = gated_artifact(pipe, "lora"), gated_artifact(pipe, "lora", seed=1)
    searched = Attack.rounds
    monkeypatch.setattr(Attack, "rounds", lambda self, *args: (made.append(self.meaning), searched(self, *args))[1])

    def found(name: str, patch: Any, seed: int = 1000) -> list[Round]:
        bench = SafeBench("safe", pipe, READER, Protocol(n=2, seed=seed), kept=Kept(tmp_path / "drawn"))
        made.clear()
        return found_rounds(bench, WEAPONS, patch, parse_attack(f"{name}:1"), prompts)

    for name in ("mma", "sneaky-prompt", "latent"):  # each knows something else
        first = found(name, one)
        assert made
        again = found(name, one)
        assert not made
        assert [(r.prompts, r.starts, r.way.key) for r in again] == [(r.prompts, r.starts, r.way.key) for r in first]
        found(name, other)
        assert bool(made) == (name != "mma")  # who reads the text encoder only finds the same for any patch
        found(name, one, seed=1001)
        assert made  # control
    for path in (tmp_path / "drawn").glob("search-*"):
        path.write_bytes(path.read_bytes()[:99])
    found("mma", one)
    assert made


def test_an_attack_without_a_judge_is_refused():
    with pytest.raises(SafepatchError, match="needs a detector"):
        attack_rows(ObedientBench("x", None, None, Protocol(n=2)), WEAPONS, None, "none", SPECS)
