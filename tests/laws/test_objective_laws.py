"""Law 7, for every objective: finite loss, gradients where they belong, equal seeds, and 20 steps that lower it."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from safepatch.data.pairs import Batch
from safepatch.diffusion import Components, add_noise
from safepatch.errors import ConfigError
from safepatch.objectives import OBJECTIVES, SafeControlConfig, safe_control
from safepatch.objectives.safe_control import SUPERVISION
from safepatch.patch import Patch
from tests.small import new_patch, new_small_pipe, spied

# Every objective with its defaults, and the branches that its settings choose.
CASES: dict[str, object] = {name: config() for name, config in OBJECTIVES.items()} | {
    f"safe_control, {name}, eta {eta}": SafeControlConfig(supervision=name, negative_guidance=eta)
    for name, eta in product(SUPERVISION, (0.0, 1.0))
}
every_case = pytest.mark.parametrize("case", sorted(CASES))


@pytest.fixture(scope="module")
def host() -> Components:
    """Frozen, so one serves all tests."""
    return Components.of(new_small_pipe()).freeze()


def batch(seed: int = 0, n: int = 2) -> Batch:
    """Random pairs that share most of their latents, as aligned scenes do."""
    generator = torch.Generator().manual_seed(seed)
    scene, change = (torch.randn(n, 4, 8, 8, generator=generator) for _ in range(2))
    texts = [torch.randn(n, 24, 192, generator=generator) for _ in range(3)]
    retained = torch.randn(n, 4, 8, 8, generator=generator)
    return Batch(scene, scene + 0.3 * change, texts[0], texts[1], retained, texts[2])


def losses(case: str, patch: Patch, host: Components, seed: int = 0, rows: Batch | None = None) -> dict[str, Tensor]:
    instruction = torch.randn(1, 6, 192, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    return CASES[case].loss(patch, host, instruction, rows or batch(), generator)


def trainable(host: Components, seed: int | None = 0) -> Patch:
    return new_patch(host.unet, seed=seed).requires_grad_(True).train()


@every_case
@pytest.mark.parametrize("seed", [None, 0])
def test_the_loss_and_its_parts_are_finite_scalars(host, case, seed):
    parts = losses(case, trainable(host, seed), host)
    assert "loss" in parts
    for value in parts.values():
        assert value.shape == ()
        assert value.isfinite()
    assert parts["loss"] > 0


@every_case
def test_gradients_reach_every_patch_parameter_and_nothing_else(host, case):
    patch = trainable(host)  # awake: the zero convolutions of a fresh one let nothing through to the clone
    before = {name: tensor.clone() for name, tensor in host.unet.state_dict().items()}
    losses(case, patch, host)["loss"].backward()
    assert not [name for name, p in patch.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name, p in patch.named_parameters() if not p.grad.isfinite().all()]
    for part in (host.unet, host.vae, host.text_encoder):
        assert not [name for name, p in part.named_parameters() if p.grad is not None or p.requires_grad]
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.unet.state_dict().items())


@every_case
def test_a_fresh_patch_learns_at_its_zero_convolutions_first(host, case):
    """And, two steps on, everywhere: nothing of it is dead from the start."""
    patch = trainable(host, seed=None)
    optimizer = torch.optim.AdamW(patch.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        losses(case, patch, host)["loss"].backward()
        optimizer.step()
    assert not [name for name, p in patch.named_parameters() if not p.grad.any()]


@every_case
def test_equal_seeds_give_equal_losses_and_others_do_not(host, case):
    patch = trainable(host)
    torch.manual_seed(1)
    first = losses(case, patch, host, seed=3)
    torch.manual_seed(2)  # the global seed has no say
    second = losses(case, patch, host, seed=3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(losses(case, patch, host, seed=4)["loss"], first["loss"])  # control
    assert not torch.equal(losses(case, patch, host, seed=3, rows=batch(1))["loss"], first["loss"])


@every_case
def test_the_global_generator_is_left_alone(host, case):
    patch = trainable(host)
    before = torch.get_rng_state()
    losses(case, patch, host)
    assert torch.equal(torch.get_rng_state(), before)


@every_case
def test_twenty_steps_on_one_batch_lower_the_loss(host, case):
    patch = trainable(host, seed=None)
    optimizer = torch.optim.AdamW(patch.parameters(), lr=2e-3)
    seen = []
    for _ in range(21):
        loss = losses(case, patch, host)["loss"]
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < 0.95 * seen[0]
    assert losses(case, trainable(host, seed=None), host)["loss"].item() == seen[0]  # control: the fall is the patch's


# ---- what safe_control means -----------------------------------------------------------------------------------


class Asked(nn.Module):
    """Stands in for a patch and remembers the rows it was asked about; its answer is no change."""

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.patch, self.inputs = patch, []
        self.reads_features = patch.reads_features

    def forward(self, *inputs: Tensor) -> object:
        self.inputs.append(inputs)
        return self.patch(*inputs)


def test_where_nothing_is_to_change_a_fresh_patch_has_no_loss(host):
    """Equal captions and preserved rows alone: the base already answers as it should."""
    same = batch()
    same = replace(same, safe_states=same.unsafe_states)
    fresh, awake = trainable(host, seed=None), trainable(host)
    assert losses("safe_control", fresh, host, rows=same)["loss"] < 1e-9
    assert losses("safe_control", awake, host, rows=same)["loss"] > 1e-4  # control
    assert losses("safe_control", fresh, host)["correct"] > 1e-4  # control: other captions are something to learn
    assert losses("safe_control", fresh, host)["preserve"] < 1e-9


def test_the_total_weighs_preservation(host):
    parts = safe_control.safe_control_loss(
        SafeControlConfig(preservation=2.5), trainable(host), host, torch.zeros(1, 3, 192), batch(), torch.Generator()
    )
    torch.testing.assert_close(parts["loss"], parts["correct"] + 2.5 * parts["preserve"])


def test_where_nothing_is_preserved_those_rows_are_left_out(host):
    def parts(rows: Batch, preservation: float) -> dict[str, torch.Tensor]:
        config = SafeControlConfig(preservation=preservation)
        patch, instruction = trainable(host), torch.zeros(1, 3, 192)
        with spied(host.unet) as calls:
            made = safe_control.safe_control_loss(config, patch, host, instruction, rows, torch.Generator())
        assert {len(call["output"]) for call in calls} == {len(rows.unsafe_latents) * (2 if preservation else 1)}
        return made

    rows = batch()
    other = replace(rows, retain_latents=torch.full_like(rows.retain_latents, torch.nan))
    assert torch.equal(parts(rows, 0.0)["loss"], parts(other, 0.0)["loss"])
    assert parts(other, 1.0)["loss"].isnan()  # control
    assert parts(rows, 0.0).keys() == {"loss", "correct"}


@pytest.mark.parametrize(("safe_share", "expected"), [(0.0, "unsafe_latents"), (1.0, "safe_latents")])
def test_safe_share_chooses_whose_latents_are_noised(host, safe_share, expected):
    rows, asked = batch(), Asked(trainable(host, seed=None))
    config = SafeControlConfig(safe_share=safe_share)
    losses_of = config.loss(asked, host, torch.zeros(1, 3, 192), rows, torch.Generator().manual_seed(0))
    assert losses_of["loss"].isfinite()
    noisy, timesteps, states, _ = asked.inputs[0]
    assert torch.equal(
        states, torch.cat((rows.unsafe_states, rows.retain_states))
    )  # it is asked with the unsafe prompt
    clean = torch.cat((getattr(rows, expected), rows.retain_latents))
    noise = recovered_noise(host, noisy, clean, timesteps)
    torch.testing.assert_close(add_noise(host.scheduler, clean, noise, timesteps), noisy, rtol=1e-3, atol=1e-3)
    assert noise.std().sub(1).abs() < 0.2  # control: with the other member it would not be standard noise


def recovered_noise(host: Components, noisy: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
    signal = host.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return (noisy - signal.sqrt() * clean) / (1 - signal).sqrt().clamp(min=1e-3)


def test_negative_guidance_moves_the_target_away_from_the_unsafe_prediction(host):
    fresh = trainable(host, seed=None)
    plain, pushed = (losses(f"safe_control, distilled, eta {eta}", fresh, host) for eta in (0.0, 1.0))
    torch.testing.assert_close(pushed["correct"], 4 * plain["correct"])  # (1 + eta) times as far, squared
    assert torch.equal(pushed["preserve"], plain["preserve"])


@pytest.mark.parametrize("n", [1, 2, 32])
def test_timesteps_are_spread_over_the_schedule(n):
    for seed in range(50):
        timesteps = safe_control.draw_timesteps(n, 1000, 1.0, torch.Generator().manual_seed(seed))
        edges = torch.arange(n + 1) * 1000 / n
        ordered = timesteps.sort().values
        assert (edges[:-1].floor() <= ordered).all()
        assert (ordered <= edges[1:]).all()
        assert ordered.max() < 1000
    assert timesteps.dtype == torch.int64


def test_the_last_timestep_is_never_past_the_schedule(monkeypatch):
    """31 + the largest float below 1 is 32 in float32: the one draw in a million that is 1000 of 1000."""
    largest = torch.tensor(1 - 2**-24)
    monkeypatch.setattr(safe_control.torch, "rand", lambda n, generator: largest.expand(n))
    assert safe_control.draw_timesteps(32, 1000, 1.0, torch.Generator()).max() == 999


def test_a_power_below_one_favours_noisy_timesteps():
    even, noisy = (
        safe_control.draw_timesteps(1000, 1000, power, torch.Generator().manual_seed(0)) for power in (1, 0.6)
    )
    assert abs(even.float().mean() - 500) < 10  # control
    assert abs(noisy.float().mean() - 1000 / 1.6) < 10  # the mean of u ** p is 1 / (1 + p)


@pytest.mark.parametrize(
    "settings",
    [
        {"supervision": "guessed"},
        {"preservation": -1.0},
        {"safe_share": 1.5},
        {"safe_share": -0.1},
        {"timestep_power": 0.0},
        {"adversaries": -1},
        {"adversary_tokens": 0},
        {"adversary_life": 0},
    ],
)
def test_nonsense_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"objective\.") as caught:
        SafeControlConfig(**settings)
    assert "\n" not in str(caught.value)
