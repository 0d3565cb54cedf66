"""Laws 7 and 13, for every objective and every kind of patch: finite, gradients where they belong, and it learns."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

from safepatch.data.bank import Batch, DataConfig
from safepatch.data.category import Rewrite
from safepatch.data.corpus import Corpus
from safepatch.diffusion import UNetHost, training_target
from safepatch.diffusion.hosts import unet as unet_host
from safepatch.errors import ConfigError
from safepatch.objectives import OBJECTIVES, Player, SafeControlConfig, Turn, safe_control
from safepatch.objectives.adversary import AdversaryConfig, SoftPrompts, adversary
from safepatch.objectives.safe_control import SUPERVISION
from safepatch.patch import PATCH_KINDS, Patch
from safepatch.patch.host import patched_prediction
from safepatch.taxonomy import Category
from tests.small import bank, batch, new_patch, new_small_host, spied

# Every objective with its defaults, and the branches that its settings choose.
CASES: dict[str, object] = {name: config() for name, config in OBJECTIVES.items()} | {
    f"safe_control, {name}, eta {eta}": SafeControlConfig(supervision=name, negative_guidance=eta)
    for name, eta in product(SUPERVISION, (0.0, 1.0))
    if (name, eta) != ("distilled", 0.0)  # the defaults
}
CASES["safe_control, guided"] = SafeControlConfig()
CASES["safe_control, attacked"] = SafeControlConfig(adversary=AdversaryConfig(count=2, tokens=3))
every_case = pytest.mark.parametrize("case", sorted(CASES))
every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))

RATES = {"control": 2e-3, "lite": 5e-3, "lora": 5e-3}


@pytest.fixture(scope="module")
def host() -> UNetHost:
    """Frozen, so one serves all tests."""
    return new_small_host()


def rows_of(case: str, seed: int = 0) -> Batch:
    return batch(seed, rewrite=Rewrite("guided") if case.endswith("guided") else None)


def trainable(host: UNetHost, kind: str = "control", seed: int | None = 0) -> Patch:
    return new_patch(host.unet, kind, seed=seed).requires_grad_(True).train()


def played(objective: object, patch: nn.Module, host: UNetHost, rows: Batch, seed: int = 0) -> dict[str, Tensor]:
    """The losses of the patch, beside whoever plays with it, at its first step."""
    player = Player("patch", patch, torch.optim.SGD(patch.parameters()))
    players = objective.players(player, bank(0))
    assert players[0] is player
    instruction = torch.randn(1, 6, 192, generator=torch.Generator().manual_seed(7))
    others = {other.name: other.module for other in players[1:]}
    turn = Turn(host, patch, instruction, rows, torch.Generator().manual_seed(seed), others)
    return objective.loss(player, turn)


def losses(case: str, patch: nn.Module, host: UNetHost, seed: int = 0, rows: Batch | None = None) -> dict[str, Tensor]:
    return played(CASES[case], patch, host, rows or rows_of(case), seed)


# ---- every objective, every kind -------------------------------------------------------------------------------


@every_kind
@every_case
@pytest.mark.parametrize("seed", [None, 0])
def test_the_loss_and_its_parts_are_finite_scalars(host, case, kind, seed):
    parts = losses(case, trainable(host, kind, seed), host)
    assert "loss" in parts
    for value in parts.values():
        assert value.shape == ()
        assert value.isfinite()
    assert parts["loss"] > 0


@every_kind
@every_case
def test_gradients_reach_every_patch_parameter_and_nothing_else(host, case, kind):
    patch = trainable(host, kind)  # awake: the zero joints of a fresh one let nothing through to what is behind them
    before = {name: tensor.clone() for name, tensor in host.unet.state_dict().items()}
    losses(case, patch, host)["loss"].backward()
    assert not [name for name, p in patch.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name, p in patch.named_parameters() if not p.grad.isfinite().all()]
    for part in host.components.modules():
        assert not [name for name, p in part.named_parameters() if p.grad is not None or p.requires_grad]
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.unet.state_dict().items())
    assert not [module for module in host.unet.modules() if module._forward_hooks or module._forward_pre_hooks]


@every_kind
@every_case
def test_a_fresh_patch_learns_at_its_joints_first(host, case, kind):
    """And, three steps on, everywhere: nothing of it is dead from the start."""
    patch = trainable(host, kind, seed=None)
    optimizer = torch.optim.AdamW(patch.parameters(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        losses(case, patch, host)["loss"].backward()
        if step == 0:
            assert all(joint.grad.any() for joint in patch.joints())
        optimizer.step()
    assert not [name for name, p in patch.named_parameters() if not p.grad.any()]


@every_kind
@every_case
def test_equal_seeds_give_equal_losses_and_others_do_not(host, case, kind):
    patch = trainable(host, kind)
    torch.manual_seed(1)
    first = losses(case, patch, host, seed=3)
    torch.manual_seed(2)  # the global seed has no say
    second = losses(case, patch, host, seed=3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(losses(case, patch, host, seed=4)["loss"], first["loss"])  # control
    other = rows_of(case, seed=1)
    assert not torch.equal(losses(case, patch, host, seed=3, rows=other)["loss"], first["loss"])


@every_case
def test_the_global_generator_is_left_alone(host, case):
    patch = trainable(host)
    before = torch.get_rng_state()
    losses(case, patch, host)
    assert torch.equal(torch.get_rng_state(), before)


@every_kind
@every_case
def test_twenty_steps_on_one_batch_lower_the_loss(host, case, kind):
    patch = trainable(host, kind, seed=None)
    optimizer = torch.optim.AdamW(patch.parameters(), lr=RATES[kind])
    seen = []
    for _ in range(21):
        loss = losses(case, patch, host)["loss"]
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < 0.95 * seen[0]
    fresh = losses(case, trainable(host, kind, seed=None), host)["loss"].item()
    assert fresh == seen[0]  # control: the fall is the patch's


# ---- memory and precision --------------------------------------------------------------------------------------


@contextmanager
def saving_memory(host: UNetHost, patch: Patch) -> Iterator[None]:
    """As the training loop does it."""
    patch.gradient_checkpointing = True
    host.save_memory(lambda: patch.recomputing(host.unet))
    try:
        yield
    finally:
        patch.gradient_checkpointing = False
        host.keep_activations()


@every_kind
@every_case
def test_recomputed_activations_give_the_same_gradients(host, case, kind, monkeypatch):
    patch, used, inner = trainable(host, kind), [], unet_host.checkpoint
    monkeypatch.setattr(unet_host, "checkpoint", lambda *args, **options: used.append(1) or inner(*args, **options))
    losses(case, patch, host)["loss"].backward()
    wanted = [parameter.grad.clone() for parameter in patch.parameters()]
    assert not used
    patch.zero_grad()
    with saving_memory(host, patch):
        losses(case, patch, host)["loss"].backward()
    assert used  # control: the host did recompute
    for parameter, gradient in zip(patch.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert not [module for module in host.unet.modules() if module._forward_hooks or module._forward_pre_hooks]
    used.clear()
    losses(case, patch, host)
    assert not used  # and no longer does


def test_without_its_updates_a_host_would_recompute_something_else(host):
    """Control of the law above: what a lora patch adds must hold in the second pass too, and torch notices."""
    patch = trainable(host, "lora")
    host.save_memory()
    try:
        loss = losses("safe_control", patch, host)["loss"]
        with pytest.raises(CheckpointError):
            loss.backward()
    finally:
        host.keep_activations()


@every_kind
@pytest.mark.parametrize("case", ["safe_control", "safe_control, attacked", "safe_control, guided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_host_trains_a_full_precision_patch(case, kind, dtype):
    host = new_small_host()
    for module in host.components.modules():
        module.to(dtype)
    patch = PATCH_KINDS[kind].from_unet(host.unet).requires_grad_(True).train()
    assert {parameter.dtype for parameter in patch.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(patch.parameters(), lr=1e-3)
    for _ in range(3):
        loss = losses(case, patch, host)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert not [name for name, p in patch.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        optimizer.step()
    assert loss.dtype == torch.float32
    assert not [name for name, p in patch.named_parameters() if not p.grad.any()]
    assert {parameter.dtype for parameter in host.unet.parameters()} == {dtype}


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
    same = replace(batch(), safe=batch().unsafe)
    fresh, awake = trainable(host, seed=None), trainable(host)
    assert losses("safe_control", fresh, host, rows=same)["loss"] < 1e-9
    assert losses("safe_control", awake, host, rows=same)["loss"] > 1e-4  # control
    assert losses("safe_control", fresh, host)["correct"] > 1e-4  # control: other captions are something to learn
    assert losses("safe_control", fresh, host)["preserve"] < 1e-9


def test_the_total_weighs_preservation(host):
    parts = played(SafeControlConfig(preservation=2.5), trainable(host), host, batch())
    torch.testing.assert_close(parts["loss"], parts["correct"] + 2.5 * parts["preserve"])


def test_where_nothing_is_preserved_those_rows_are_left_out(host):
    bare = replace(batch(), retain=None, retain_latents=None)
    for rows, n in ((batch(), 4), (bare, 2)):
        with spied(host.unet) as calls:
            parts = played(SafeControlConfig(), trainable(host), host, rows)
        assert {len(call["output"]) for call in calls} == {n}
        assert ("preserve" in parts) == (n == 4)
    assert torch.equal(parts["loss"], parts["correct"])


MINE = Category("mine", "things of the test", "no knives")
KEPT = Corpus(MINE, [("a knife", "a spoon"), ("an axe", "a hammer")], retain=["a street"])


@pytest.mark.parametrize(
    ("settings", "safe", "retained"),
    [
        ({}, {False, True}, True),
        ({"safe_share": 0.0}, {False}, True),
        ({"safe_share": 1.0, "preservation": 0.0}, {True}, False),
        ({"supervision": "paired", "safe_share": 0.0}, {True}, True),  # the true noise of the safe picture
    ],
)
def test_the_settings_choose_what_is_drawn(host, settings, safe, retained):
    rows = SafeControlConfig(**settings).prepare(host, KEPT, DataConfig(pairs=4, steps=1))
    assert set(rows.is_safe.tolist()) == safe
    assert (rows.retained is not None) == retained
    assert (rows.batch(0, 2, 0).retain is not None) == retained


def test_it_is_asked_with_the_unsafe_prompts(host):
    rows, asked = batch(), Asked(trainable(host, seed=None))
    assert played(SafeControlConfig(), asked, host, rows)["loss"].isfinite()
    noisy, timesteps, states, *_ = asked.inputs[0]
    assert torch.equal(states, torch.cat((rows.unsafe.states, rows.retain.states)))
    clean = torch.cat((rows.latents, rows.retain_latents))
    signal = host.components.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt().clamp(min=1e-3)
    torch.testing.assert_close(host.add_noise(clean, noise, timesteps), noisy, rtol=1e-3, atol=1e-3)
    assert noise.std().sub(1).abs() < 0.2  # control: with other latents it would not be standard noise


def answers(host: UNetHost, rows: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What the base makes of each prompt of the pairs, at what a patch of seed 0 is shown; noisy latents, timesteps."""
    asked = Asked(trainable(host, seed=None))
    played(SafeControlConfig(), asked, host, rows)
    n = len(rows.latents)
    noisy, timesteps = asked.inputs[0][0][:n], asked.inputs[0][1][:n]
    prompts = {"unsafe": rows.unsafe, "safe": rows.safe, "away": rows.away, "towards": rows.towards}
    with torch.no_grad():
        made = {
            name: host.predict(noisy, timesteps, prompt) for name, prompt in prompts.items() if prompt
        }  # fmt: skip
    return made, noisy, timesteps


class Waits(TorchDispatchMode):
    """Notes what would make a GPU be waited for: values that Python asks for, and rows picked by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = "index" in func.__name__ and any(
            isinstance(one, Tensor) and one.dtype == torch.bool
            for some in args
            if isinstance(some, list)
            for one in some
        )
        if by_mask or func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "equal", "masked_select"):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@every_case
def test_no_step_waits_for_the_device(host, case):
    """Where the values of a tensor are asked for, a GPU's queue runs dry."""
    patch = trainable(host, "lora")
    losses(case, patch, host)["loss"]  # what is made once
    with Waits() as waits:
        losses(case, patch, host)["loss"].backward()
    assert waits.seen == []
    with Waits() as waits:  # control
        float(torch.ones(2)[torch.tensor([True, False])].sum())
    assert len(waits.seen) == 2


def test_distilled_regresses_on_the_bases_answer_to_the_safe_prompt(host):
    rows = batch()
    base, _, _ = answers(host, rows)
    parts = losses("safe_control", trainable(host, seed=None), host, rows=rows)
    torch.testing.assert_close(parts["correct"], mse_loss(base["unsafe"], base["safe"]))


def test_paired_regresses_on_the_true_noise(host):
    rows = batch()
    base, noisy, timesteps = answers(host, rows)
    scheduler = host.components.scheduler
    signal = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = (noisy - signal.sqrt() * rows.latents) / (1 - signal).sqrt()
    truth = training_target(scheduler, rows.latents, noise, timesteps)
    parts = losses("safe_control, paired, eta 0.0", trainable(host, seed=None), host, rows=rows)
    torch.testing.assert_close(parts["correct"], mse_loss(base["unsafe"], truth), rtol=1e-3, atol=1e-4)


def test_negative_guidance_moves_the_target_away_from_the_unsafe_prediction(host):
    fresh = trainable(host, seed=None)
    plain, pushed = (losses(case, fresh, host) for case in ("safe_control", "safe_control, distilled, eta 1.0"))
    torch.testing.assert_close(pushed["correct"], 4 * plain["correct"])  # (1 + eta) times as far, squared
    assert torch.equal(pushed["preserve"], plain["preserve"])


def test_a_guided_teacher_is_pushed_between_two_prompts(host):
    """(1 + scale) (away - towards) less than the base's answer to the unsafe prompt; small pushes are left out."""
    rows = batch(rewrite=Rewrite("guided"))
    base, _, _ = answers(host, rows)
    push = base["away"] - base["towards"]

    def correct(**settings: float) -> Tensor:
        changed = replace(rows, rewrite=Rewrite("guided", **settings))
        return played(SafeControlConfig(), trainable(host, seed=None), host, changed)["correct"]

    middle = push.abs().median().item()
    torch.testing.assert_close(correct(scale=0.0), push.square().mean())
    torch.testing.assert_close(correct(), 4 * push.square().mean())
    strong = torch.where(push.abs() < middle, 0, push).square().mean()
    torch.testing.assert_close(correct(scale=0.0, threshold=middle), strong)
    assert correct(threshold=1e6) < 1e-9  # control: nothing is left to learn
    assert torch.equal(correct(momentum=0.5), correct())  # one noisy picture has no earlier steps


def test_of_a_concept_alone_the_guided_target_is_esds(host):
    """e(0) - eta (e(c) - e(0)), with the neutral prompt for the empty one; at scale 0 it is that prompt's answer."""
    rows = batch()
    rows = replace(rows, away=rows.unsafe, towards=rows.safe)
    base, noisy, timesteps = answers(host, rows)
    for eta in (0.0, 1.0, 2.5):
        target = SafeControlConfig()._target(
            host, replace(rows, rewrite=Rewrite("guided", scale=eta), retain=None), noisy, timesteps
        )
        torch.testing.assert_close(target, base["safe"] - eta * (base["unsafe"] - base["safe"]))


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
    ],
)
def test_nonsense_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"objective\.") as caught:
        SafeControlConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"count": -1}, {"tokens": 0}, {"life": 0}, {"share": 1.5}, {"share": -0.1}])
def test_an_adversary_that_cannot_be_is_refused(settings):
    with pytest.raises(ConfigError, match=r"adversary\.") as caught:
        AdversaryConfig(**settings)
    assert "\n" not in str(caught.value)


# ---- the adversary, a player that any objective can have -------------------------------------------------------


def soft_prompts(**settings: int) -> Player:
    return adversary(AdversaryConfig(**{"count": 3, "tokens": 2, **settings}), torch.zeros(1, 4, 192))


def test_an_adversary_rides_on_the_patch_and_climbs():
    """In the pass that trains the patch, each value in use takes a step up the loss."""
    player = soft_prompts(rate=0.2)
    assert player.rides
    prompts = player.module
    before = prompts.states.detach().clone()
    (prompts.states[0].sum() - 2 * prompts.states[1].sum()).backward()
    player.optimizer.step()
    torch.testing.assert_close(prompts.states[0], before[0] + 0.2)
    torch.testing.assert_close(prompts.states[1], before[1] - 0.2)
    assert torch.equal(prompts.states[2], before[2])  # control: nobody used it
    prompts.states.grad.fill_(torch.nan)  # where fp16 overflowed
    player.optimizer.step()
    assert prompts.states.isfinite().all()


def test_soft_prompts_start_anew_when_their_life_is_over():
    prompts = soft_prompts(life=6).module
    assert isinstance(prompts, SoftPrompts)
    assert prompts.age.tolist() == [0, 2, 4]  # all at different ages
    with torch.no_grad():
        prompts.states += 100.0
    prompts.age += 3
    states, generator = torch.zeros(8, 5, 192), torch.Generator().manual_seed(0)
    made = prompts.appended(states, generator)
    assert made.shape == (8, 7, 192)
    assert prompts.age.tolist() == [3, 5, 0]
    assert prompts.states[2].abs().max() < 2
    assert (prompts.states[:2] > 50).all()  # control


def test_a_share_of_the_rows_is_attacked_and_the_others_are_padded():
    prompts = soft_prompts(share=0.5).module
    with torch.no_grad():
        prompts.states += 100.0
    states = torch.randn(400, 5, 192)
    made = prompts.appended(states, torch.Generator().manual_seed(0))
    assert torch.equal(made[:, :5], states)
    attacked = (made[:, 5:] > 50).all((1, 2))
    assert 150 < attacked.sum() < 250
    assert torch.equal(made[~attacked][:, 5:], states[~attacked][:, -1:].expand(-1, 2, -1))
    assert (prompts.appended(states, torch.Generator().manual_seed(0)) == made).all()


def test_an_adversary_makes_the_loss_larger(host):
    """What it is for; with the patch held still."""
    objective, patch = SafeControlConfig(adversary=AdversaryConfig(count=2, tokens=3, share=1.0)), trainable(host)
    player = Player("patch", patch, torch.optim.SGD(patch.parameters()))
    player, rider = objective.players(player, bank(0))
    instruction = torch.zeros(1, 3, 192)
    seen = []
    for _ in range(12):
        turn = Turn(host, patch, instruction, batch(), torch.Generator().manual_seed(0), {rider.name: rider.module})
        loss = objective.loss(player, turn)["correct"]
        seen.append(loss.item())
        loss.backward()
        rider.optimizer.step()
        rider.optimizer.zero_grad()
    assert seen[-1] > seen[0]


def test_a_wrapped_patch_is_the_patch(host):
    """A distributed trainer's wrapper has it as `module`."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: object, **kwargs: object) -> object:
            return self.module(*args, **kwargs)

    rows = batch()
    for kind in sorted(PATCH_KINDS):
        patch = trainable(host, kind)
        inputs = (rows.latents, torch.tensor([10, 900]), rows.unsafe, torch.zeros(1, 3, 192))
        assert torch.equal(*(patched_prediction(host, each, *inputs) for each in (patch, Wrapper(patch))))
