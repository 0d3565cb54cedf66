"""Training a patch of a text encoder: by objectives that know nothing of it, on a model that stays as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import safepatch
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, UNetHost
from safepatch.diffusion.conditioning import Conditioning
from safepatch.errors import BaseMismatch, ConfigError, UnknownName
from safepatch.models.load import ModelConfig
from safepatch.objectives import OBJECTIVES, Player, Turn
from safepatch.objectives.adv_unlearn import AdvUnlearnConfig
from safepatch.objectives.adversary import padding
from safepatch.patch.host import patched_prediction
from safepatch.patch.text import TextPatch, patched_conditioning, room_for
from safepatch.training.config import PatchConfig, TrainConfig, TrainingConfig, load_train_config
from safepatch.training.trainer import train
from tests.families import small_family_pipe
from tests.small import awaken, images, new_small_pipe

WEAPONS = Corpus.open("weapons")
DATA = DataConfig(pairs=4, steps=1)
TRAINING = TrainingConfig(steps=2, batch_size=2, learning_rate=5e-3, warmup=1, checkpoint_every=2, log_every=1)


def config(folder: Path, objective: Any, component: str = "text_encoder", **patch: Any) -> TrainConfig:
    chosen = PatchConfig("lora", component, **{"gate": 0, "rank": 4} | patch)
    where = {"output": str(folder / "run"), "data": replace(DATA, cache=str(folder / "cache"))}
    return TrainConfig("weapons", ModelConfig("small"), patch=chosen, objective=objective, training=TRAINING, **where)


@pytest.mark.parametrize("name", ["adv_unlearn", "safe_control"])
def test_it_trains_and_is_applied_and_the_model_stays_as_it_was(tmp_path: Path, name: str):
    pipe = new_small_pipe()
    modules = (pipe.unet, pipe.text_encoder)
    before = [{key: tensor.clone() for key, tensor in module.state_dict().items()} for module in modules]
    path = train(pipe, config(tmp_path, OBJECTIVES[name]()), WEAPONS)
    made = PatchArtifact.open(path)
    assert made.info.component == "text_encoder"
    assert made.info.title == "safepatch weapons (text_encoder)"
    assert all(made.stored(each)["up"].any() for each in made.parameter_names())  # every layer has learned
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())
    drawn = images(pipe)
    with safepatch.apply(pipe, path):
        assert not torch.equal(images(pipe), drawn)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_sdxls_encoders_learn_one_by_one(component: str):
    """Pooled states too; what is read of the other encoder stays."""
    host = UNetHost(Components.of(small_family_pipe("sdxl")), 64)
    patch, asked = TextPatch.of(host.components, component, rank=2), host.encode(["a knife", ""])
    fresh = patched_conditioning(host.components, patch, asked)
    assert torch.allclose(fresh.states, asked.states, atol=1e-5)  # a fresh patch does nothing
    made = patched_conditioning(host.components, awaken(patch), asked)
    first = host.components.text_encoder.config.hidden_size
    own, other = (slice(0, first), slice(first, None))[:: 1 if component == "text_encoder" else -1]
    assert torch.equal(made.states[..., other], asked.states[..., other])
    assert not torch.allclose(made.states[0, :, own], asked.states[0, :, own], atol=1e-3)
    assert asked.pooled is not None
    assert made.pooled is not None
    assert torch.equal(made.pooled[0], asked.pooled[0]) == (component == "text_encoder")
    assert not made.states[1].any()
    assert not made.pooled[1].any()


def test_the_frozen_reading_teaches_and_the_patched_one_learns():
    host = UNetHost(Components.of(new_small_pipe()))
    patch, asked = (
        awaken(TextPatch.of(host.components, "text_encoder", rank=2)).requires_grad_(True),
        host.encode(["a knife"]),
    )
    noisy, times = torch.zeros(1, 4, 16, 16), torch.tensor([500])
    taught = host.predict(noisy, times, asked)
    made = patched_prediction(host, patch, noisy, times, asked, asked.states)
    assert not torch.allclose(made, taught, atol=1e-4)
    assert torch.equal(host.predict(noisy, times, asked), taught)
    made.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in patch.parameters())
    assert all(parameter.grad is None for parameter in host.components.text_encoder.parameters())


def test_soft_prompts_behind_the_words_stay_where_they_are():
    host = UNetHost(Components.of(new_small_pipe()))
    patch, asked = awaken(TextPatch.of(host.components, "text_encoder", rank=2)), host.encode(["a knife"])
    longer = asked._replace(states=torch.cat((asked.states, padding(asked.states, 3) + 1), dim=1))
    made = patched_conditioning(host.components, patch, longer).states
    assert torch.equal(made[:, -3:], longer.states[:, -3:])
    assert torch.equal(made[:, :-3], patched_conditioning(host.components, patch, asked).states)


def test_an_adversarys_prefix_is_embeddings_that_the_encoder_reads():
    """As if those were the embeddings of tokens between the first and the prompt's; and it is found by gradients."""
    host = UNetHost(Components.of(new_small_pipe()))
    patch = awaken(TextPatch.of(host.components, "text_encoder", rank=2))
    asked, tokenizer = host.encode(["a knife"]), host.components.tokenizer
    table = host.components.text_encoder.get_input_embeddings().weight
    word = tokenizer("red", add_special_tokens=False).input_ids
    spaced = asked._replace(tokens=room_for(asked.tokens, len(word)), prefix=table[word][None])
    made = patched_conditioning(host.components, patch, spaced).states
    said = patched_conditioning(host.components, patch, host.encode(["red a knife"])).states
    assert torch.allclose(made, said, atol=1e-4)
    assert not torch.allclose(made, patched_conditioning(host.components, patch, asked).states, atol=1e-2)  # control


def test_an_attack_on_words_makes_the_loss_larger_than_none(tmp_path: Path):
    host = UNetHost(Components.of(new_small_pipe()))
    patch = awaken(TextPatch.of(host.components, "text_encoder", rank=2)).requires_grad_(True)
    player = Player("patch", patch, torch.optim.SGD(patch.parameters(), lr=0.0))
    weak, strong = (AdvUnlearnConfig(attack="standard", attack_steps=4, attack_rate=rate) for rate in (1e-9, 0.5))
    rows = weak.prepare(host, WEAPONS, replace(DATA, cache=str(tmp_path)))
    instruction, found = host.encode(["no"]).states, []
    for objective in (weak, strong):
        turn = Turn(host, patch, instruction, rows.batch(0, 4, 0), torch.Generator().manual_seed(0))
        prefix = objective._worst(turn)
        assert prefix.shape == (4, 1, 192)
        batch = turn.batch
        noisy, times = batch.latents, torch.full((4,), 500)
        attacked = batch.unsafe._replace(tokens=room_for(batch.unsafe.tokens, 1), prefix=prefix)
        with torch.no_grad():
            made = patched_prediction(host, patch, noisy, times, attacked, instruction)
            found.append((made - host.predict(noisy, times, batch.unsafe)).square().mean())
        assert objective.loss(player, turn)["loss"].requires_grad
    assert found[1] < found[0]  # nearer to what the base predicts: the concept comes back


def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path):
    pipe = new_small_pipe()
    for name in ("closed_form", "safegen"):
        with pytest.raises(ConfigError, match=r"set patch\.component=unet"):
            train(pipe, config(tmp_path, OBJECTIVES[name]()), WEAPONS)
    with pytest.raises(ConfigError, match=r"set objective\.start=zero"):
        train(pipe, config(tmp_path, OBJECTIVES["esd"](start="closed_form")), WEAPONS)
    with pytest.raises(ConfigError, match=r"objective\.prompted=true"):
        train(pipe, config(tmp_path, OBJECTIVES["duo"]()), WEAPONS)
    with pytest.raises(BaseMismatch, match="this model has no text_encoder_2"):
        train(pipe, config(tmp_path, AdvUnlearnConfig(), "text_encoder_2"), WEAPONS)
    with pytest.raises(ConfigError, match="a lite patch cannot change the text_encoder"):
        load_train_config(None, ["category=weapons", "patch.kind=lite", "patch.component=text_encoder"])
    with pytest.raises(UnknownName, match="did you mean 'text_encoder'"):
        load_train_config(None, ["category=weapons", "patch.component=text_encodr"])
    assert not (tmp_path / "run").exists()
    patch, foreign = TextPatch.of(Components.of(pipe), "text_encoder"), Conditioning(torch.zeros(1, 32, 192))
    with pytest.raises(ConfigError, match="reads words"):
        patched_conditioning(Components.of(pipe), patch, foreign)
