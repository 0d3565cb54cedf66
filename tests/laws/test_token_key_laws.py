"""The key that looks, on transformers: it is shown the image's tokens, the same in training as when it counts."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, Host, open_host
from safepatch.errors import PatchBypassed
from safepatch.merging import merge
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from safepatch.patch.looking import looked_at, middle, middle_channels
from safepatch.patch.picture import KEYS, PictureKey
from safepatch.runtime.apply import apply
from safepatch.training import gates, pictures
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train
from tests.families import draw, small_transformer_pipe
from tests.small import INSTRUCTION, LAYOUTS, awaken

NEVER, ALWAYS = 1 - 1e-9, 1e-9
STEPS = 3
FEW = {"STEPS": 2, "LOOKS": 1, "VALIDATION_STEPS": 2, "VALIDATION_PAIRS": 2}
every_host = pytest.mark.parametrize("name", ["sd3", "flux"])


@cache
def pipe_of(name: str) -> Any:
    return small_transformer_pipe(name)


def host_of(name: str) -> Host:
    return open_host(Components.of(pipe_of(name)), 64)


def keyed(
    name: str, kind: str = "lite", keys: str = "either", picture: float = NEVER, category: str = "weapons"
) -> PatchArtifact:
    """An awake patch whose text key never opens, and whose picture key does from a probability on."""
    host = pipe_of(name).transformer
    layout: dict[str, Any] = LAYOUTS.get(kind, {})
    patch = PATCH_KINDS[kind].from_unet(host, gate=4, picture=4, **layout)
    artifact = to_artifact(awaken(patch, size=0.1), host, {category: INSTRUCTION})
    record: dict[str, Any] = {"threshold": NEVER, "keys": keys, "picture": {"threshold": picture}}
    return replace(artifact, info=replace(artifact.info, config={**artifact.info.config, "gate": {category: record}}))


def outputs(name: str, patch: PatchArtifact | None = None, **options: Any) -> list[Tensor]:
    """The transformer's prediction in each call."""
    pipe, made = pipe_of(name), list[Tensor]()
    hook = pipe.transformer.register_forward_hook(lambda _, args, output: made.append(output[0]))
    try:
        if patch is None:
            draw(pipe, num_inference_steps=STEPS, **options)
        else:
            with apply(pipe, patch):
                draw(pipe, num_inference_steps=STEPS, **options)
    finally:
        hook.remove()
    return made


def looking(monkeypatch: pytest.MonkeyPatch, told: Callable[[Tensor, Tensor], Tensor]) -> None:
    monkeypatch.setattr(PictureKey, "forward", lambda self, mid, timesteps: told(mid, timesteps))


@pytest.mark.parametrize("kind", PATCH_KINDS)
@every_host
def test_what_is_drawn_opens_from_the_second_step_on_and_else_no_bit_changes(name, kind):
    base = outputs(name)
    for keys in KEYS:
        assert all(map(torch.equal, outputs(name, keyed(name, kind, keys)), base))
    opened = outputs(name, keyed(name, kind, picture=ALWAYS))
    assert torch.equal(opened[0], base[0])
    assert not torch.equal(opened[1], base[1])  # control
    with apply(pipe_of(name), keyed(name, kind, picture=ALWAYS)) as handle:
        draw(pipe_of(name), num_inference_steps=STEPS)
    assert (handle.stats.acted_calls, handle.stats.picture_rows) == (STEPS - 1, STEPS - 1)


@every_host
def test_a_key_is_shown_the_same_in_training_as_when_it_counts(name, monkeypatch):
    host, seen = host_of(name), list[tuple[Tensor, Tensor]]()
    noisy = torch.randn(2, *host.latent_shape, generator=torch.Generator().manual_seed(0))
    times, said = torch.tensor([100, 900]), host.encode(["a knife", "a dog"])
    looking(monkeypatch, lambda mid, t: seen.append((mid, t)) or torch.zeros(len(mid), 1))
    with torch.no_grad():
        with pictures.watched(host) as learned:
            host.predict(noisy, times, said)
        with apply(pipe_of(name), keyed(name), fail_closed=False):
            host.predict(noisy, times, said)
    ((mid, clock),) = seen
    assert torch.equal(mid, learned[0])
    assert mid.shape == (2, middle_channels(host.unet), 8, 8)
    torch.testing.assert_close(clock, host.clock(times), rtol=1e-4, atol=1e-2)
    assert clock[0] > 50  # control: counted in steps, by which a sinusoid tells them apart


def test_a_picture_is_looked_at_in_parts_of_it_whatever_its_shape():
    hosts = {name: pipe_of(name).transformer for name in ("sd3", "flux")}
    rows, columns, width = 24, 8, 32
    quarters = (torch.arange(rows)[:, None] // 12 * 2 + torch.arange(columns) // 4).flatten()
    tokens = torch.nn.functional.one_hot(quarters, width).float()[None]
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    ids = torch.cat((torch.zeros(len(places), 1), places), dim=1)
    made = {
        "sd3": looked_at(hosts["sd3"], (None, tokens), torch.zeros(1, 4, 2 * rows, 2 * columns)),
        "flux": looked_at(hosts["flux"], (None, tokens), torch.zeros(1, rows * columns, 16), ids),
    }
    for shown in made.values():
        assert shown.shape == (1, width, 8, 8)
        found = shown[0].argmax(0)
        assert torch.equal(found, (torch.arange(8)[:, None] // 4 * 2 + torch.arange(8) // 4))
    torch.testing.assert_close(made["sd3"], made["flux"])
    shuffled = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    again = looked_at(hosts["flux"], (None, tokens[:, shuffled]), torch.zeros(1, rows * columns, 16), ids[shuffled])
    torch.testing.assert_close(again, made["flux"])


def test_of_flux_the_last_block_is_looked_at_in_which_the_image_is_apart():
    deep = small_transformer_pipe("flux", num_layers=2, num_single_layers=6).transformer
    assert middle(deep) is deep.transformer_blocks[1]
    sd3 = pipe_of("sd3").transformer
    assert middle(sd3) is sd3.transformer_blocks[2]


@every_host
def test_a_key_that_is_not_shown_the_picture_stops_the_image(name):
    with apply(pipe_of(name), keyed(name)) as handle:
        draw(pipe_of(name))  # control
        for hook in handle._attachment._sight.hooks:
            hook.handle.remove()
        with pytest.raises(PatchBypassed):
            draw(pipe_of(name))


def test_a_call_without_some_blocks_is_not_looked_at(monkeypatch):
    """SD3's skip layer guidance calls once more in each step, here without the block that is looked at, or another."""
    looks: list[int] = []
    looking(monkeypatch, lambda mid, t: looks.append(len(mid)) or torch.full((len(mid), 1), -9.0))
    guided = {"skip_layer_guidance_stop": 1.0, "skip_layer_guidance_start": 0.0}
    for skipped in (2, 1):
        options = {**guided, "skip_guidance_layers": [skipped]}
        base = outputs("sd3", **options)
        looks.clear()
        made = outputs("sd3", keyed("sd3"), **options)
        assert len(made) > STEPS  # control: there were such calls
        assert looks == [1] * STEPS
        assert all(map(torch.equal, made, base))


def test_a_transformer_called_only_without_some_blocks_is_noticed():
    host = host_of("sd3")
    noisy, said = torch.zeros(1, *host.latent_shape), host.encode(["a dog"])
    given = {"encoder_hidden_states": said.states, "pooled_projections": said.pooled, "timestep": torch.tensor([5.0])}
    with apply(pipe_of("sd3"), keyed("sd3")), torch.no_grad():
        host.unet(noisy, **given)  # control
    with (
        apply(pipe_of("sd3"), keyed("sd3")),
        torch.no_grad(),
        pytest.raises(PatchBypassed, match="what its gate looks at was not shown"),
    ):
        host.unet(noisy, **given, skip_layers=[1])


@every_host
def test_fitting_draws_once_and_says_what_opens(name, monkeypatch, tmp_path):
    for key, value in FEW.items():
        monkeypatch.setattr(pictures, key, value)
    host, data = host_of(name), DataConfig(pairs=2, steps=1, size=64, cache=str(tmp_path))
    records = []
    for _ in range(2):
        key = PictureKey(middle_channels(host.unet), 4, 1)
        before = key.look.clone()
        records.append(pictures.fit_picture_key(key, host, Corpus.open("weapons"), data))
        assert not torch.equal(key.look, before)  # control: it did learn
    assert records[0] == records[1]
    assert 0 <= records[0]["threshold"] < 1


def test_a_patch_is_trained_with_both_keys_written_opened_and_merged(monkeypatch, tmp_path):
    for module, values in ((gates, {"CAPTIONS": 16, "UNSEEN": 16, "STEPS": 2}), (pictures, FEW)):
        for key, value in values.items():
            monkeypatch.setattr(module, key, value)
    own = ["category=weapons", "data.pairs=2", "data.steps=1", "data.size=64", "training.steps=2"]
    own += ["training.batch_size=1", "patch.kind=lite", "patch.rank=4", "patch.gate=4", "patch.keys=either"]
    pipe = small_transformer_pipe("sd3.5")
    path = train(pipe, load_train_config(None, [*own, f"output={tmp_path / 'run'}", f"data.cache={tmp_path}"]))
    artifact = PatchArtifact.open(path)
    assert artifact.info.config["gate"]["weapons"]["keys"] == "either"
    assert artifact.info.config["layout"] == {"rank": 4, "depth": 1, "groups": 1, "gate": 4, "picture": 32}
    with apply(pipe, path) as handle:
        draw(pipe)
        assert "weapons" in handle.looks
    other = keyed("sd3", category="gore").save(tmp_path / "gore.safetensors")
    first = keyed("sd3", picture=ALWAYS).save(tmp_path / "weapons.safetensors")
    merged = merge([str(first), str(other)], method="cat")
    base = outputs("sd3")
    opened = outputs("sd3", merged)
    assert torch.equal(opened[0], base[0])
    assert not torch.equal(opened[1], base[1])
