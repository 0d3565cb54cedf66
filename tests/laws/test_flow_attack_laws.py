"""A transformer's prompts asked by their states, and attacked by free ones: SD3 as a UNet is, Flux by text alone."""

from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from safepatch.attacks import ATTACKS, Round, Target, require_attackable
from safepatch.attacks.base import STATES
from safepatch.attacks.opponent import Noised, Undoing
from safepatch.attacks.soft_prompt import with_soft_prompt
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import TYPED, Components, Way, generate_by, open_host
from safepatch.errors import ConfigError, UnsupportedModel
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from tests.families import small_transformer_pipe
from tests.small import INSTRUCTION, LAYOUTS, awaken

PROMPTS = ["a knife", "a dog"]
WORDS = torch.ones(1, 3, 96)  # text states of an instruction, as wide as the small SD3's
every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))


@cache
def pipe_of(name: str) -> Any:
    """With latents of 8 x 8, so that what is drawn takes no time."""
    return small_transformer_pipe(name, **({"sample_size": 8} if name.startswith("sd3") else {}))


def patch_on(pipe: Any, kind: str) -> Any:
    layout: Any = LAYOUTS.get(kind, {})
    return awaken(PATCH_KINDS[kind].from_unet(pipe.transformer, gate=4, **layout), size=0.2)


def test_states_of_a_prompt_at_full_weight_are_the_prompt_typed() -> None:
    pipe = pipe_of("sd3.5")

    def drawn(way: Way, **more: Any) -> Tensor:
        return generate_by(pipe, PROMPTS, [1, 2], 2, 4.0, way, **more)

    typed = drawn(TYPED)
    torch.testing.assert_close(drawn(Way(other="a dog", share=1e-9)), typed, rtol=0, atol=1e-4)
    for way in (Way(weight=0.5), Way(other="a dog", share=0.5), Way(before="a cat"), Way(beside="a cat")):
        assert not torch.allclose(drawn(way), typed, atol=1e-3)  # control


@every_kind
@pytest.mark.parametrize("aim", ["patch", "gate"])
def test_a_free_state_learns_what_it_aims_at_and_leaves_all_weights(kind: str, aim: str) -> None:
    pipe = pipe_of("sd3")
    host, patch = open_host(Components.of(pipe).freeze()), patch_on(pipe, kind)
    undoing = Undoing(host, patch, WORDS).aimed(aim)
    before = {key: weight.clone() for key, weight in (*patch.state_dict().items(), *host.unet.state_dict().items())}
    generator = torch.Generator().manual_seed(0)
    asked = host.encode(PROMPTS).to(host.device, torch.float32)
    rows: Noised = undoing.noised(torch.randn(2, *host.latent_shape, generator=generator), asked, generator)
    free = torch.zeros(1, 2, 96, requires_grad=True)
    optimizer, losses = torch.optim.Adam([free], lr=0.1), list[float]()
    for _ in range(8):
        loss = undoing.loss(rows, asked._replace(states=with_soft_prompt(asked.states, free)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {**patch.state_dict(), **host.unet.state_dict()}
    assert all(torch.equal(after[key], weight) for key, weight in before.items())


def test_the_attack_asks_with_its_states_and_they_reach_the_host(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(
        import_module("safepatch.attacks.soft_prompt"), "LEARNED", 4
    )  # the package has a function so called
    pipe, prompts = pipe_of("sd3"), [Prompt(text, seed) for seed, text in enumerate(PROMPTS)]
    record = {"weapons": {"threshold": 0.5, "windows": 3}}
    artifact = to_artifact(patch_on(pipe, "lora"), pipe.transformer, {"weapons": INSTRUCTION}, {"gate": record})
    rounds = ATTACKS["soft-prompt"].rounds(Corpus.open("weapons"), prompts, 0, 2, Target(pipe, artifact))
    assert len(rounds) == 2  # one aims at the patch, one at its gate
    assert all(made.way.appended is not None and made.way.appended.shape == (1, 4, 96) for made in rounds)

    def drawn(made: Round) -> Tensor:
        return generate_by(pipe, PROMPTS, [0, 1], 1, 2.0, made.way)

    plain = drawn(Round(tuple(prompts)))
    assert all(not torch.equal(drawn(made), plain) for made in rounds)


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.takes == STATES])
def test_every_attack_by_states_or_noise_can_be_made_on_sd3(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(import_module("safepatch.attacks.soft_prompt"), "LEARNED", 4)
    pipe, prompts = pipe_of("sd3"), [Prompt(text, seed) for seed, text in enumerate(PROMPTS)]
    require_attackable(pipe, [name])
    with pytest.raises(UnsupportedModel, match=f"cannot be attacked by {name}"):  # control
        require_attackable(pipe_of("flux"), [name])
    artifact = to_artifact(patch_on(pipe, "lora"), pipe.transformer, {"weapons": INSTRUCTION})
    rounds = ATTACKS[name].rounds(Corpus.open("weapons"), prompts, 0, 1, Target(pipe, artifact))
    plain, asked = (generate_by(pipe, PROMPTS, [0, 1], 1, 2.0, way) for way in (TYPED, rounds[0].way))
    assert asked.isfinite().all()
    assert not torch.equal(asked, plain)


def test_what_flux_is_not_asked_by_is_one_line_before_anything_is_drawn() -> None:
    pipe = pipe_of("flux")
    artifact = to_artifact(patch_on(pipe, "lora"), pipe.transformer, {"weapons": INSTRUCTION})
    with pytest.raises(ConfigError, match="not supported yet: free text states of a FluxTransformer2DModel") as caught:
        ATTACKS["soft-prompt"].rounds(Corpus.open("weapons"), [Prompt("a knife", 1)], 0, 2, Target(pipe, artifact))
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedModel, match="ask it by text"):
        generate_by(pipe, PROMPTS, [0, 1], 1, 2.0, Way(weight=0.5))
