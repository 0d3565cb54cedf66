"""Law 8: every attack keeps its budget, learns, and changes nothing of what it attacks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safepatch.attacks import SoftPromptConfig, closing_prefix, soft_prompt, text_logits, with_soft_prompt
from safepatch.data.bank import PairBank
from safepatch.diffusion import UNetHost, training_target
from safepatch.errors import ConfigError
from safepatch.patch import PATCH_KINDS
from safepatch.patch.gate import TextGate
from safepatch.patch.host import patched_prediction
from tests.small import KeptTexts, awaken, bank, new_patch, new_small_host

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
