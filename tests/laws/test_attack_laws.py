"""Law 8: every attack keeps its budget, learns, and changes nothing of what it attacks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safepatch.attacks import SoftPromptConfig, closing_prefix, soft_prompt, text_logits, with_soft_prompt
from safepatch.data.pairs import PairBank
from safepatch.diffusion import Components, add_noise, training_target
from safepatch.errors import ConfigError
from safepatch.patch import PATCH_KINDS
from safepatch.patch.gate import TextGate
from safepatch.patch.host import patched_noise_pred
from tests.small import awaken, bank, new_patch, new_small_pipe

INSTRUCTION = torch.ones(1, 3, 192)
every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
every_aim = pytest.mark.parametrize("aim", ["patch", "gate"])


@every_kind
@every_aim
def test_a_soft_prompt_has_the_tokens_it_may_and_leaves_the_rest_alone(kind, aim):
    components = Components.of(new_small_pipe()).freeze()
    patch = new_patch(components.unet, kind)
    patch.add_gate(components.unet, 4)
    before = {
        name: tensor.clone() for name, tensor in (*patch.state_dict().items(), *components.unet.state_dict().items())
    }
    soft = soft_prompt(
        components, patch, INSTRUCTION, bank(0), SoftPromptConfig(tokens=2, steps=2, batch_size=2, aim=aim)
    )
    assert soft.shape == (1, 2, 192)
    assert not soft.requires_grad
    after = {**patch.state_dict(), **components.unet.state_dict()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not components.unet.up_blocks[0]._forward_pre_hooks


@every_kind
def test_it_gets_better_at_what_it_aims_at(kind):
    components = Components.of(new_small_pipe()).freeze()
    patch = new_patch(components.unet, kind)
    rows = bank(0).rows
    timesteps = torch.full((len(rows.unsafe_latents),), 600)
    noise = torch.randn(rows.unsafe_latents.shape, generator=torch.Generator().manual_seed(3))
    noisy = add_noise(components.scheduler, rows.unsafe_latents, noise, timesteps)
    target = training_target(components.scheduler, rows.unsafe_latents, noise, timesteps)

    def error(steps: int) -> float:
        config = SoftPromptConfig(tokens=4, steps=steps, learning_rate=0.2)
        soft = soft_prompt(components, patch, INSTRUCTION, bank(0), config)
        states = with_soft_prompt(rows.unsafe_states, soft)
        with torch.no_grad():
            predicted = patched_noise_pred(components.unet, patch, noisy, timesteps, states, INSTRUCTION)
        return float((predicted - target).square().mean())

    assert error(30) < error(1)


@every_kind
def test_in_the_empty_prompts_place_the_categorys_words_are_not_read(kind):
    components = Components.of(new_small_pipe()).freeze()
    patch, words = new_patch(components.unet, kind), bank(0)
    states = words.rows.unsafe_states.clone()
    states[:, :3] += 1.0  # the last ones, which a soft prompt starts from, stay
    other = PairBank(replace(words.rows, unsafe_states=states))

    def learned(place: str, words: PairBank) -> Tensor:
        config = SoftPromptConfig(tokens=2, steps=2, batch_size=2, place=place)
        return soft_prompt(components, patch, INSTRUCTION, words, config)

    assert torch.equal(learned("empty", words), learned("empty", other))
    assert not torch.equal(learned("appended", words), learned("appended", other))  # control


@pytest.mark.parametrize(
    "settings", [{"tokens": 0}, {"steps": 0}, {"batch_size": -1}, {"aim": "everything"}, {"place": "before"}]
)
def test_a_budget_that_is_none_is_refused(settings):
    with pytest.raises(ConfigError):
        SoftPromptConfig(**settings)


def test_there_must_be_a_gate_to_attack_one():
    components = Components.of(new_small_pipe()).freeze()
    with pytest.raises(ConfigError, match="no gate to attack"):
        soft_prompt(components, new_patch(components.unet), INSTRUCTION, bank(0), SoftPromptConfig(aim="gate"))


# ---- words --------------------------------------------------------------------------------------------------------

VOCABULARY = ("cat", "blue", "next", "spoon")


def words_gate() -> tuple[Components, TextGate]:
    components = Components.of(new_small_pipe()).freeze()
    patch = new_patch(components.unet, "lora", seed=None)
    patch.add_gate(components.unet, 8)
    gate = awaken(patch).gate
    assert gate is not None
    return components, gate


def test_words_are_put_in_front_and_lower_the_logit():
    components, gate = words_gate()
    text, logit = closing_prefix(components, gate, "a knife", VOCABULARY, words=2)
    first, second, rest = text.split(" ", 2)
    assert {first, second} <= set(VOCABULARY)
    assert rest == "a knife"
    assert logit == pytest.approx(float(text_logits(components, gate, [text])))
    one, single = closing_prefix(components, gate, "a knife", VOCABULARY, words=1)
    tried = text_logits(components, gate, [f"{word} a knife" for word in VOCABULARY])
    assert single == pytest.approx(float(tried.min()))
    assert float(tried.max()) > single  # control: the words differ in what they do
    assert one in [f"{word} a knife" for word in VOCABULARY]


def test_an_attack_without_words_is_refused():
    components, gate = words_gate()
    for vocabulary, words in (((), 1), (VOCABULARY, 0)):
        with pytest.raises(ConfigError, match="at least one"):
            closing_prefix(components, gate, "a knife", vocabulary, words)
