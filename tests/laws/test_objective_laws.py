"""Laws 7 and 13, for every objective and every kind of patch: finite, gradients where they belong, and it learns."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

from safepatch.data.bank import Batch, DataConfig
from safepatch.data.category import Rewrite
from safepatch.data.concepts import distinct_concepts
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, Conditioning, UNetHost, training_target
from safepatch.diffusion.hosts import base as any_host
from safepatch.errors import ConfigError, PromptError
from safepatch.objectives import OBJECTIVES, Player, Rows, SafeControlConfig, Turn, noising, safegen
from safepatch.objectives.adv_unlearn import AdvUnlearnConfig, prefixed
from safepatch.objectives.adversary import ADVERSARY, AdversaryConfig, SoftPrompts, adversary
from safepatch.objectives.all_but_one import AllButOneConfig
from safepatch.objectives.closed_form import ClosedFormConfig, Edit, begin
from safepatch.objectives.duo import DUOConfig
from safepatch.objectives.esd import VARIANTS, ESDConfig, negatively_guided
from safepatch.objectives.leco import LECOConfig
from safepatch.objectives.noising import draw_timesteps
from safepatch.objectives.safe_control import SUPERVISION
from safepatch.objectives.safegen import SafeGenConfig, mosaic
from safepatch.objectives.sfd import SCORE, SFDConfig, identity_loss
from safepatch.patch import PATCH_KINDS, LoraPatch, Patch
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.host import patched_prediction
from safepatch.taxonomy import Category
from tests.families import small_family_pipe
from tests.small import INSTRUCTION, bank, batch, new_patch, new_small_host, spied

# Every objective with its defaults, and the branches that its settings choose.
CASES: dict[str, object] = {name: config() for name, config in OBJECTIVES.items() if config.has_steps} | {
    f"safe_control, {name}, eta {eta}": SafeControlConfig(supervision=name, negative_guidance=eta)
    for name, eta in product(SUPERVISION, (0.0, 1.0))
    if (name, eta) != ("distilled", 0.0)  # the defaults
}
CASES["safe_control, guided"] = SafeControlConfig()
CASES["leco"] = LECOConfig(denoising_steps=2)  # else each step takes 50
CASES["leco, enhance"] = LECOConfig(action="enhance", positive="a cat", neutral="a dog", denoising_steps=2)
CASES["duo, prompted"] = DUOConfig(prompted=True, below=1.0)
CASES["safegen, published"] = SafeGenConfig(target="published", mosaic=3)
CASES["adv_unlearn, standard"] = AdvUnlearnConfig(attack="standard", attack_steps=2, tokens=2)
CASES["esd, captions"] = ESDConfig(prompts="captions", negative_guidance=0.0)
CASES["sfd"] = SFDConfig(denoising_steps=2)
CASES["sfd, one step"] = SFDConfig(one_step=True, regression=0.5)
CASES["safe_control, attacked"] = SafeControlConfig(adversary=AdversaryConfig(count=2, tokens=3))
SIGNED = {"sfd", "sfd, one step"}  # the product of two differences


def kinds_of(case: str) -> tuple[str, ...]:
    return ("lora",) if case == "sfd, one step" else CASES[case].kinds


every_case = pytest.mark.parametrize("case", sorted(CASES))
every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
every_case_and_kind = pytest.mark.parametrize(
    ("case", "kind"), [(case, kind) for case in sorted(CASES) for kind in kinds_of(case)]
)

RATES = {"control": 2e-3, "lite": 5e-3, "lora": 5e-3}
SLOWER = {"duo": 0.05, "duo, prompted": 0.05}  # its authors' rate is half the trainer's, and falls as beta grows
FALL = {"duo": 0.995, "duo, prompted": 0.995}  # -log sigmoid starts at log 2, and is flat there


@pytest.fixture(scope="module")
def host() -> UNetHost:
    """Frozen, so one serves all tests."""
    return new_small_host()


@cache
def prepared(case: str, seed: int) -> Rows:
    """The rows that an objective makes itself."""
    data = DataConfig(pairs=4, steps=1, seed=seed)
    return CASES[case].prepare(new_small_host(), Corpus.open("weapons"), data)


def rows_of(case: str, seed: int = 0) -> Any:
    if case.startswith("safe_control"):
        return batch(seed, rewrite=Rewrite("guided") if case.endswith("guided") else None)
    return prepared(case, seed).batch(0, 2, 0)


def trainable(host: UNetHost, kind: str = "control", seed: int | None = 0, case: str = "safe_control") -> Patch:
    return CASES[case].suited(new_patch(host.unet, kind, seed=seed)).requires_grad_(True).train()


def played(objective: object, patch: nn.Module, host: UNetHost, rows: Batch, seed: int = 0) -> dict[str, Tensor]:
    """The losses of the patch, beside whoever plays with it, at its first step."""
    player = Player("patch", patch, torch.optim.SGD(patch.parameters()))
    players = objective.players(player, bank_of(objective))
    assert players[0] is player
    instruction = torch.randn(1, 6, 192, generator=torch.Generator().manual_seed(7))
    others = {other.name: other.module for other in players[1:]}
    turn = Turn(host, patch, instruction, rows, torch.Generator().manual_seed(seed), others)
    return objective.loss(player, turn)


def bank_of(objective: object) -> Any:
    """Rows of which nobody looks at more than the texts and the layers."""
    if objective.name != "sfd":
        return bank(0)
    return SFDConfig().prepare(new_small_host(), KEPT, DataConfig(pairs=2, steps=1))


def losses(case: str, patch: nn.Module, host: UNetHost, seed: int = 0, rows: Batch | None = None) -> dict[str, Tensor]:
    return played(CASES[case], patch, host, rows or rows_of(case), seed)


# ---- every objective, every kind -------------------------------------------------------------------------------


@every_case_and_kind
@pytest.mark.parametrize("seed", [None, 0])
def test_the_loss_and_its_parts_are_finite_scalars(host, case, kind, seed):
    parts = losses(case, trainable(host, kind, seed, case), host)
    assert "loss" in parts
    for value in parts.values():
        assert value.shape == ()
        assert value.isfinite()
    assert parts["loss"] > 0 or case in SIGNED


@every_case_and_kind
def test_gradients_reach_every_patch_parameter_and_nothing_else(host, case, kind):
    patch = trainable(
        host, kind, case=case
    )  # awake: the zero joints of a fresh one let nothing through to what is behind them
    before = {name: tensor.clone() for name, tensor in host.unet.state_dict().items()}
    losses(case, patch, host)["loss"].backward()
    assert not [name for name, p in patch.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name, p in patch.named_parameters() if not p.grad.isfinite().all()]
    for part in host.components.modules():
        assert not [name for name, p in part.named_parameters() if p.grad is not None or p.requires_grad]
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.unet.state_dict().items())
    assert not [module for module in host.unet.modules() if module._forward_hooks or module._forward_pre_hooks]


@every_case_and_kind
def test_a_fresh_patch_learns_at_its_joints_first(host, case, kind):
    """And, three steps on, everywhere: nothing of it is dead from the start."""
    patch = trainable(host, kind, seed=None, case=case)
    optimizer = torch.optim.AdamW(patch.parameters(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        losses(case, patch, host)["loss"].backward()
        if step == 0:
            assert all(joint.grad.any() for joint in patch.joints())
        optimizer.step()
    assert not [name for name, p in patch.named_parameters() if not p.grad.any()]


@every_case_and_kind
def test_equal_seeds_give_equal_losses_and_others_do_not(host, case, kind):
    patch = trainable(host, kind, case=case)
    torch.manual_seed(1)
    first = losses(case, patch, host, seed=3)
    torch.manual_seed(2)  # the global seed has no say
    second = losses(case, patch, host, seed=3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(losses(case, patch, host, seed=4)["loss"], first["loss"])  # control
    other = rows_of(case, seed=2)
    third = losses(case, patch, host, seed=3, rows=other)
    assert any(not torch.equal(third[name], first[name]) for name in first)  # the total may be lost in one part of it


@every_case
def test_the_global_generator_is_left_alone(host, case):
    rows_of(case)
    patch = trainable(host, kinds_of(case)[0], case=case)
    before = torch.get_rng_state()
    losses(case, patch, host)
    assert torch.equal(torch.get_rng_state(), before)


@every_case_and_kind
def test_twenty_steps_on_one_batch_lower_the_loss(host, case, kind):
    patch = trainable(host, kind, seed=None, case=case)
    optimizer = torch.optim.AdamW(patch.parameters(), lr=RATES[kind] * SLOWER.get(case, 1.0))
    seen = []
    for _ in range(21):
        loss = losses(case, patch, host)["loss"]
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < seen[0] - (1 - FALL.get(case, 0.95)) * abs(seen[0])
    fresh = losses(case, trainable(host, kind, seed=None, case=case), host)["loss"].item()
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


@every_case_and_kind
def test_recomputed_activations_give_the_same_gradients(host, case, kind, monkeypatch):
    patch, used, inner = trainable(host, kind, case=case), [], any_host.checkpoint
    monkeypatch.setattr(any_host, "checkpoint", lambda *args, **options: used.append(1) or inner(*args, **options))
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


@every_case_and_kind
def test_the_file_holds_what_was_trained(host, case, kind):
    """Of a lora patch, those layers alone; and it acts as the patch that was trained."""
    patch = trainable(host, kind, case=case).eval()
    made = to_artifact(patch, host.unet, {"weapons": INSTRUCTION})
    again = to_artifact(from_artifact(made, host.unet), host.unet, {"weapons": INSTRUCTION})
    assert made.tensors.keys() == again.tensors.keys()
    assert all(made.tensors[name].any() for name in made.tensors)  # control
    torch.testing.assert_close(dict(made.tensors), dict(again.tensors), rtol=0, atol=1e-6)


@every_case
def test_no_step_waits_for_the_device(host, case):
    """Where the values of a tensor are asked for, a GPU's queue runs dry."""
    patch = trainable(host, "lora", case=case)
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
        timesteps = draw_timesteps(n, 1000, 1.0, torch.Generator().manual_seed(seed))
        edges = torch.arange(n + 1) * 1000 / n
        ordered = timesteps.sort().values
        assert (edges[:-1].floor() <= ordered).all()
        assert (ordered <= edges[1:]).all()
        assert ordered.max() < 1000
    assert timesteps.dtype == torch.int64


def test_the_last_timestep_is_never_past_the_schedule(monkeypatch):
    """31 + the largest float below 1 is 32 in float32: the one draw in a million that is 1000 of 1000."""
    largest = torch.tensor(1 - 2**-24)
    monkeypatch.setattr(noising.torch, "rand", lambda n, generator: largest.expand(n))
    assert draw_timesteps(32, 1000, 1.0, torch.Generator()).max() == 999


def test_a_power_below_one_favours_noisy_timesteps():
    even, noisy = (draw_timesteps(1000, 1000, power, torch.Generator().manual_seed(0)) for power in (1, 0.6))
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


@pytest.mark.parametrize("name", [name for name, schema in OBJECTIVES.items() if schema.has_steps])
def test_every_objective_that_takes_steps_can_have_an_adversary(host, name):
    """The backward pass that trains the patch reaches the soft prompts, and their steps make the loss larger."""
    attacker = AdversaryConfig(count=2, tokens=3, share=1.0, rate=0.2)
    objective, rows = replace(CASES[name], adversary=attacker), rows_of(name)
    patch = objective.suited(new_patch(host.unet, kinds_of(name)[-1])).requires_grad_(True).train()
    player = Player("patch", patch, torch.optim.SGD(patch.parameters()))
    assert [
        other.name for other in replace(objective, adversary=AdversaryConfig()).players(player, bank_of(objective))
    ][1:] == ([SCORE] if name == "sfd" else [])  # control: nobody plays unasked
    players = {other.name: other for other in objective.players(player, bank_of(objective))}
    rider, seen = players[ADVERSARY], []
    others = {other.name: other.module for other in players.values() if other is not player}
    for _ in range(4):
        turn = Turn(host, patch, torch.zeros(1, 3, 192), rows, torch.Generator().manual_seed(0), others)
        loss = objective.loss(player, turn)["loss"]
        seen.append(loss.item())
        loss.backward()
        assert rider.module.states.grad.any()
        rider.optimizer.step()
        rider.optimizer.zero_grad()
    assert all(parameter.grad.any() for parameter in patch.joints())
    assert seen[-1] > seen[0]


def test_what_is_solved_in_one_go_has_no_adversary():
    with pytest.raises(TypeError, match="adversary"):
        ClosedFormConfig(adversary=AdversaryConfig(count=1))


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


# ---- esd and leco: a target made of the base's own predictions ---------------------------------------------------


def test_a_variant_chooses_a_lora_patchs_layers_and_no_other_kinds(host):
    def layers(variant: str | None) -> set[str]:
        return set(ESDConfig(variant=variant).suited(new_patch(host.unet, "lora")).layers)

    everything = layers("all")
    assert layers(None) == layers("x") == {name for name in everything if ".attn2." in name}
    assert layers("x-strict") == {name for name in everything if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert layers("u") == everything - layers("x")
    assert 0 < len(layers("x-strict")) < len(layers("x")) < len(everything)  # control
    for kind in ("control", "lite"):
        ESDConfig().suited(new_patch(host.unet, kind))
        for variant in sorted(VARIANTS.keys() - {"all"}):
            with pytest.raises(ConfigError, match=f"a {kind} patch changes none of the host's own layers; set"):
                ESDConfig(variant=variant).suited(new_patch(host.unet, kind))


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.0])
def test_esd_ends_in_the_negatively_guided_base(host, eta):
    """Its loss is that of the combination written out, at the same noisy latents."""
    rows, asked = rows_of("esd"), Asked(trainable(host, seed=None))
    loss = played(ESDConfig(negative_guidance=eta), asked, host, rows)["loss"]
    noisy, timesteps, states, *_ = asked.inputs[0]
    assert torch.equal(states, rows.unsafe.states)
    with torch.no_grad():
        concept, empty = (host.predict(noisy, timesteps, read) for read in (rows.unsafe, host.encode(["", ""])))
    torch.testing.assert_close(loss, mse_loss(concept, empty - eta * (concept - empty)))
    assert not torch.isclose(loss, mse_loss(concept, empty - (eta + 1) * (concept - empty)))  # control


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_combination_of_predictions_is_that_of_clean_latents(kind):
    """So that no objective needs to know what its model predicts."""
    host = new_small_host()
    host.components.scheduler.register_to_config(prediction_type=kind)
    noisy, concept, empty = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([10, 700])
    clean = [host.to_x0(noisy, timesteps, one) for one in (concept, empty)]
    made = host.to_x0(noisy, timesteps, negatively_guided(concept, empty, 2.0))
    torch.testing.assert_close(made, negatively_guided(*clean, 2.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made, clean[1])  # control


def test_leco_learns_where_the_patched_model_comes_to(host):
    """Another patch comes elsewhere; nobody has come anywhere in no step."""
    rows, places = rows_of("leco"), []
    for seed in (None, 0):
        asked = Asked(trainable(host, seed=seed))
        played(LECOConfig(denoising_steps=2), asked, host, rows)
        assert len(asked.inputs) == 2  # one step of two, and there
        assert [int(times[0]) for _, times, *_ in asked.inputs] == [999, 499]
        places.append(asked.inputs[-1][0])
        assert torch.equal(asked.inputs[0][2], rows.unsafe.states)
    assert not torch.equal(*places)


def test_leco_erases_and_enhances_in_opposite_directions(host):
    rows, found = rows_of("leco, enhance"), {}
    for action in ("erase", "enhance"):
        config = LECOConfig(action=action, denoising_steps=2)
        found[action] = played(config, trainable(host, "lora", seed=None), host, rows)["loss"]
    noisy, timesteps = last_noisy(host, LECOConfig(denoising_steps=2), rows)
    with torch.no_grad():
        made, neutral, plus, minus = (
            host.predict(noisy, timesteps, asked) for asked in (rows.unsafe, rows.safe, rows.away, rows.towards)
        )
    torch.testing.assert_close(found["erase"], mse_loss(made, neutral - (plus - minus)))
    torch.testing.assert_close(found["enhance"], mse_loss(made, neutral + (plus - minus)))
    assert not torch.isclose(found["erase"], found["enhance"])  # control


def last_noisy(host: UNetHost, config: object, rows: Any) -> tuple[Tensor, Tensor]:
    """The latents and timesteps that a fresh patch is shown last."""
    asked = Asked(trainable(host, seed=None))
    played(config, asked, host, rows)
    return asked.inputs[-1][:2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "y"}, "objective.variant must be one of x, x-strict, u, all, not 'y'"),
        ({"negative_guidance": -1.0}, "negative_guidance must be at least 0"),
        ({"prompts": "words"}, "objective.prompts must be one of concepts, captions, not 'words'"),
    ],
)
def test_esd_refuses_what_it_cannot_mean(settings, message):
    ESDConfig()  # control
    with pytest.raises(ConfigError, match=message):
        ESDConfig(**settings)


def test_leco_refuses_what_it_cannot_mean():
    for settings, message in (({"action": "add"}, "one of erase, enhance"), ({"denoising_steps": 1}, "at least 2")):
        with pytest.raises(ConfigError, match=message):
            LECOConfig(**settings)
    with pytest.raises(PromptError, match="minors"):  # not even where the settings say so
        LECOConfig(target="a child").prepare(new_small_host(), KEPT, DataConfig(pairs=1))


# ---- closed_form: a least-squares problem, solved --------------------------------------------------------------

UCE = {"prompts": "concepts", "tokens": "last", "rank": 0}
SOLVED = [{}, UCE, UCE | {"rounds": 2}, {"prompts": "concepts"}, {"rank": 0}]


def solved(host: UNetHost, seed: int = 0, **settings: object) -> tuple[LoraPatch, Edit, dict[str, float]]:
    """The patch, the states it was solved for, and what is left."""
    objective = ClosedFormConfig(**{"preserve": 8, **settings})
    patch = cast(LoraPatch, objective.suited(new_patch(host.unet, "lora", seed=None)))
    rows = objective.prepare(host, Corpus.open("weapons"), DataConfig(pairs=6, seed=seed))
    return patch, rows, dict(objective.solve(host, patch, rows))


@pytest.mark.parametrize("settings", SOLVED, ids=str)
def test_what_is_solved_brings_concepts_nearer_than_what_must_stay_moves(host, settings):
    before = {name: tensor.clone() for name, tensor in host.unet.state_dict().items()}
    patch, _, left = solved(host, **settings)
    assert 0 <= left["preserve"] < left["erase"] < 1
    assert {layer.rpartition(".")[2] for layer in patch.layers} == {"to_k", "to_v"}
    assert all(update.up.any() and update.up.isfinite().all() for _, update in patch.each())
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.unet.state_dict().items())
    again, _, _ = solved(host, **settings)
    for one, other in zip(patch.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    other, _, _ = solved(host, seed=1, **settings)  # control
    assert not torch.equal(next(iter(other.parameters())), next(iter(patch.parameters())))


def states_of(host: UNetHost, side: str) -> Tensor:
    """The last words' states of the category's concepts, or of their replacements."""
    texts = [getattr(pair, side).text for pair in distinct_concepts(Corpus.open("weapons"))]
    return host.encode(texts).states[range(len(texts)), host.last_words(texts)].double()


def kept_states(host: UNetHost) -> Tensor:
    texts = [prompt.text for prompt in Corpus.open("weapons").retain(8, 0)]
    return host.encode(texts).states[range(len(texts)), host.last_words(texts)].double()


def test_the_solution_is_where_the_published_sum_is_least(host):
    """UCE, eq. 7: its gradient is zero at W + up down, and not at W, nor with a little more or less."""
    patch, edit, _ = solved(host, **UCE)
    layer, update = next(patch.each())
    weight = host.unet.get_submodule(layer).weight.detach().double()

    (c, s), p = (states_of(host, side) for side in ("unsafe", "safe")), kept_states(host)
    torch.testing.assert_close(edit.concepts, c.T @ c)

    def slope(times: float) -> float:
        new = (weight + times * (update.up @ update.down).detach()).requires_grad_(True)
        erased = (c @ new.T - s @ weight.T).square().sum()
        kept = (p @ (new - weight).T).square().sum()
        (gradient,) = torch.autograd.grad(erased + kept + 0.5 * (new - weight).square().sum(), new)
        return float(gradient.norm())

    assert slope(1.0) < 1e-3 * slope(0.0)
    assert min(slope(0.9), slope(1.1)) > 0.05 * slope(0.0)  # control


def test_its_factors_are_exact_at_the_number_of_edited_states(host):
    patch, edit, exact = solved(host, **UCE)
    names = [name for concept in Corpus.open("weapons").words.concepts for name in concept.known_names]
    assert patch.layout["rank"] == edit.count == len(names)
    _, _, higher = solved(host, **{**UCE, "rank": len(names) + 5})
    assert higher == pytest.approx(exact, rel=1e-6)
    cut, _, lower = solved(host, **{**UCE, "rank": 2})
    assert cut.layout["rank"] == 2
    assert lower["erase"] > exact["erase"] + 0.01  # control


def test_rounds_edit_the_states_that_bring_a_concept_back(host):
    """After UCE a state exists whose keys and values are the concept's; after a round, the same search finds less."""
    patch, edit, _ = solved(host, **UCE)
    weights, concepts = (
        [host.unet.get_submodule(layer).weight.double() for layer in patch.layers],
        states_of(host, "unsafe"),
    )
    gram, one = sum(weight.T @ weight for weight in weights), torch.eye(192).double()

    def missed(change: Tensor) -> float:
        """How far from the concepts' keys and values the nearest states, of a length that is paid for, stay."""
        seen = one + change
        found = torch.linalg.solve(seen.T @ gram @ seen + 0.1 * one, seen.T @ gram @ concepts.T)
        return sum(float((weight @ (seen @ found - concepts.T)).square().sum()) for weight in weights)

    once, thrice = (ClosedFormConfig(**UCE, rounds=rounds).change(edit, weights) for rounds in (0, 3))
    assert missed(thrice) > 1.05 * missed(once)
    assert missed(0 * once) < missed(once)  # control


def test_a_prompt_is_aligned_with_its_twin_from_the_last_word_backwards():
    """`crossed swords` and `scissors`: swords become scissors, and the padding behind stays behind."""
    unsafe, safe = (torch.arange(6).double()[:, None].clone() for _ in range(2))
    unsafe[1:] += 10
    safe[1:] += 20
    concepts, targets = ClosedFormConfig()._aligned(unsafe, safe, 2, 1)
    assert concepts[:, 0].tolist() == [12, 13, 14, 15]
    assert targets[:, 0].tolist() == [21, 22, 23, 24]
    concepts, targets = ClosedFormConfig()._aligned(safe, unsafe, 1, 2)
    assert concepts[:, 0].tolist() == [21, 22, 23, 24]
    assert [len(side) for side in ClosedFormConfig(tokens="last")._aligned(unsafe, safe, 2, 1)] == [1, 1]  # control
    assert len(ClosedFormConfig()._aligned(safe, safe, 1, 1)[0]) == 0


@pytest.mark.parametrize("kind", ["control", "lite"])
def test_an_objective_refuses_a_kind_it_cannot_train(host, kind):
    with pytest.raises(ConfigError, match=f"objective=closed_form cannot train a {kind} patch; set patch.kind=lora"):
        ClosedFormConfig().suited(new_patch(host.unet, kind))


# ---- all_but_one, duo, safegen, adv_unlearn: what each holds on to ---------------------------------------------


def test_all_but_one_has_nothing_to_learn_where_the_alternative_is_the_prompt(host):
    rows, config = rows_of("all_but_one"), AllButOneConfig(unconditional=2.0)
    same = replace(rows, safe=rows.unsafe)
    assert played(config, trainable(host, seed=None), host, same)["loss"] < 1e-9
    fresh, awake = (played(config, trainable(host, seed=seed), host, rows) for seed in (None, 0))
    assert fresh["unconditional"] == 0
    assert fresh["guidance"] > 1e-5  # control
    assert awake["unconditional"] > 1e-5
    torch.testing.assert_close(awake["loss"], awake["guidance"] + 2 * awake["unconditional"])


@pytest.mark.parametrize("case", ["duo", "duo, prompted"])
def test_duo_starts_undecided_and_prefers_the_safe_picture_when_it_has_learned(host, case):
    rows = rows_of(case)
    fresh = losses(case, trainable(host, "lora", seed=None, case=case), host, rows=rows)
    torch.testing.assert_close(fresh["preference"], torch.tensor(2.0).log(), rtol=1e-4, atol=0)  # the base is itself
    assert fresh["prior"] == 0
    assert fresh["margin"].abs() < 1e-6
    patch = trainable(host, "lora", seed=None, case=case)
    optimizer = torch.optim.AdamW(patch.parameters(), lr=2e-4)
    for _ in range(10):
        made = losses(case, patch, host, rows=rows)
        optimizer.zero_grad()
        made["loss"].backward()
        optimizer.step()
    assert made["margin"] > 1e-5
    assert made["prior"] > 0  # control: it did move
    assert len(patch.layers) == len([name for name in patch.layers if ".attn1." in name or case == "duo, prompted"])


def test_duo_and_safegen_read_no_prompt(host):
    rows = rows_of("duo")
    blind = replace(rows, unsafe_prompt=rows.empty, safe_prompt=rows.empty)
    for case, is_read in (("duo", False), ("duo, prompted", True)):
        patch = trainable(host, "lora", case=case)
        found = [losses(case, patch, host, rows=some)["loss"] for some in (rows, blind)]
        assert torch.equal(*found) != is_read
    seen = Asked(trainable(host, seed=None))
    played(SafeGenConfig(), seen, host, rows_of("safegen"))
    assert all(torch.equal(state, host.encode([""]).states[0]) for state in seen.inputs[0][2])


def test_safegens_targets_agree_where_signal_and_noise_are_equal(host):
    """The exact one has the factor that the published one lacks, which is 1 there."""
    scheduler = host.components.scheduler
    middle = int((scheduler.alphas_cumprod - 0.5).abs().argmin())
    rows, found = rows_of("safegen"), {}
    for at in (middle, 100):
        signal = float(scheduler.alphas_cumprod[at])
        shift = ((1 - signal) / signal) ** 0.5
        noise = torch.randn(rows.unsafe.shape, generator=torch.Generator().manual_seed(0))
        times = torch.full((len(noise),), at)
        noisy = host.add_noise(rows.unsafe, noise, times)
        exact = host.to_noise(noisy, times, host.from_x0(noisy, times, rows.safe))
        torch.testing.assert_close(exact, noise + (rows.unsafe - rows.safe) / shift, rtol=1e-3, atol=1e-3)
        found[at] = (exact - (noise + rows.unsafe - rows.safe)).abs().max()
    assert found[middle] < 0.02 * found[100]


def test_no_few_timesteps_are_all_that_safegens_exact_target_learns_from():
    """Of SD 1.5's schedule, with a patch that does nothing: how much of the loss is of the least noisy twentieth."""
    host = UNetHost(Components.of(small_family_pipe("sd1")))
    times = torch.arange(host.steps)
    picture, twin = torch.ones(2, len(times), 1, 1, 1).unbind()
    twin, noise = 2 * twin, torch.zeros_like(twin)
    noisy = host.add_noise(picture, noise, times)
    errors = (host.from_x0(noisy, times, twin) - host.from_x0(noisy, times, picture)).square()
    plain, weighed = (each[:50].sum() / each.sum() for each in (errors, noising.clean_weights(host, times) * errors))
    assert plain > 0.7  # control
    assert weighed < 0.15
    assert torch.equal(noising.clean_weights(host, times[-1:]), torch.ones(1, 1, 1, 1))


def test_safegen_weighs_the_errors_of_its_exact_target_alone(host, monkeypatch):
    rows, found = rows_of("safegen"), {}
    for weight in (1.0, 0.5):
        monkeypatch.setattr(safegen, "clean_weights", lambda _, times, w=weight: torch.full((len(times), 1, 1, 1), w))
        for target in ("exact", "published"):
            parts = played(SafeGenConfig(target=target), trainable(host, "lora", case="safegen"), host, rows)
            found[target, weight] = (parts["correct"].item(), parts["preserve"].item())
    assert found["exact", 0.5][0] == pytest.approx(found["exact", 1.0][0] / 2)
    assert found["exact", 0.5][1] == found["exact", 1.0][1]
    assert found["published", 0.5] == found["published", 1.0]


def test_a_mosaic_has_the_mean_of_each_block():
    latents = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    made = mosaic(latents, 3)
    assert made.shape == latents.shape
    torch.testing.assert_close(made[:, :, :3, :3], latents[:, :, :3, :3].mean((2, 3), keepdim=True).expand(2, 4, 3, 3))
    torch.testing.assert_close(made[:, :, 6:, 6:], latents[:, :, 6:, 6:].mean((2, 3), keepdim=True).expand(2, 4, 1, 2))
    assert torch.equal(mosaic(latents, 1), latents)
    assert not torch.allclose(made, latents)  # control


@pytest.mark.parametrize("attack", ["fast", "standard"])
def test_the_adversarys_prefix_brings_the_bases_answer_back(host, attack):
    """Closer than random prefixes do, on noise that the attack has not seen."""
    rows = rows_of("adv_unlearn")
    config = AdvUnlearnConfig(attack=attack, attack_steps=4 if attack == "standard" else 1, attack_rate=0.2, tokens=4)
    patch = trainable(host, "lora")
    with torch.no_grad():
        [update.up.mul_(3) for _, update in patch.each()]

    def missed(seed: int, attacked: bool) -> float:
        turn = Turn(host, patch, torch.zeros(1, 6, 192), rows, torch.Generator().manual_seed(seed))
        found = config if attacked else replace(config, attack_rate=1e-9)
        prefix = found._worst(turn)
        noisy, times, _ = noising.noised(replace(turn, generator=torch.Generator().manual_seed(9)), rows.latents)
        with torch.no_grad():
            asked = prefixed(rows.unsafe, prefix)
            made = patched_prediction(host, patch, noisy, times, asked, turn.instruction)
            return float(mse_loss(made, host.predict(noisy, times, rows.unsafe)))

    assert sum(missed(seed, True) for seed in range(3)) < 0.999 * sum(missed(seed, False) for seed in range(3))
    assert all(parameter.grad is None for parameter in patch.parameters())  # only the prefix has moved


def test_a_prefix_stands_behind_the_beginning():
    states, prefix = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    made = prefixed(Conditioning(states), prefix).states
    assert torch.equal(made[:, 0], states[:, 0])
    assert torch.equal(made[:, 1:4], prefix)
    assert torch.equal(made[:, 4:], states[:, 1:])


# ---- sfd: two players, and no pictures ---------------------------------------------------------------------------


def sfd_turn(host: UNetHost, rows: Any, seed: int = 0) -> tuple[Turn, Player, Player]:
    """A turn of a fresh patch, and both players."""
    patch = trainable(host, "lora", seed=None, case="sfd")
    player, score = CASES["sfd"].players(
        Player("patch", patch, torch.optim.SGD(patch.parameters())), bank_of(CASES["sfd"])
    )
    score.module.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(seed)
    return Turn(host, patch, torch.zeros(1, 3, 192), rows, generator, {SCORE: score.module}), player, score


def test_the_generators_loss_is_the_published_one():
    drawn, real, fake = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    apart, omega = real - fake, (drawn - real).abs().mean((1, 2, 3))
    product = (apart * (fake - drawn)).mean((1, 2, 3)) / omega
    torch.testing.assert_close(identity_loss(drawn, real, fake, 1.0), product)
    more = (apart * (real - drawn) - 1.2 * apart.square()).mean((1, 2, 3)) / omega
    torch.testing.assert_close(identity_loss(drawn, real, fake, 1.2), more)
    assert not torch.allclose(more, product)  # control
    assert not identity_loss(drawn, real, real, 1.0).any()


def test_where_both_scores_agree_there_is_nothing_to_learn(host):
    """A fresh fake score is the base's: of what must stay nothing is asked, nor of a prompt that is its own twin."""
    rows = rows_of("sfd")
    turn, player, _ = sfd_turn(host, rows)
    parts = CASES["sfd"].loss(player, turn)
    assert parts["remain"].abs() < 1e-7
    assert parts["forget"].abs() > 1e-5  # control
    turn, player, _ = sfd_turn(host, replace(rows, safe=rows.unsafe))
    assert CASES["sfd"].loss(player, turn)["forget"].abs() < 1e-7


@pytest.mark.parametrize("case", ["sfd", "sfd, one step"])
def test_each_player_moves_itself_alone(host, case):
    turn, player, score = sfd_turn(host, rows_of(case))
    for mover, other in ((player, score), (score, player)):
        CASES[case].loss(mover, turn)["loss"].backward()
        assert all(parameter.grad is None for parameter in other.module.parameters())
        assert any(parameter.grad is not None for parameter in mover.module.parameters())
        mover.module.zero_grad(set_to_none=True)
    assert all(parameter.requires_grad for parameter in score.module.parameters())  # though it was held still


def test_the_fake_score_learns_what_the_generator_draws(host):
    turn, _, score = sfd_turn(host, rows_of("sfd"))
    optimizer, seen = torch.optim.AdamW(score.module.parameters(), lr=5e-3), []
    for _ in range(10):
        loss = CASES["sfd"].loss(score, replace(turn, generator=torch.Generator().manual_seed(0)))["loss"]
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < 0.98 * seen[0]


def test_a_patch_needs_prompts_alone_and_one_step_what_the_base_draws(host, monkeypatch, tmp_path):
    data, drawn = DataConfig(pairs=2, steps=1, cache=str(tmp_path)), []
    inner = UNetHost.draw
    monkeypatch.setattr(UNetHost, "draw", lambda *args, **options: drawn.append(1) or inner(*args, **options))
    assert SFDConfig().prepare(host, KEPT, data).batch(0, 2, 0).noise is None
    assert not drawn
    rows = SFDConfig(one_step=True).prepare(host, KEPT, data).batch(0, 2, 0)
    assert drawn  # control
    for noise, asked, latents in (
        (rows.noise, rows.safe, rows.latents),
        (rows.retain_noise, rows.retain, rows.retain_latents),
    ):
        again = host.denoise(noise, asked, rows.empty, 1).latents
        torch.testing.assert_close(again, latents, rtol=1e-3, atol=1e-4)
    alone = SFDConfig(one_step=True, forget=0, remain=0)
    fresh = Player("patch", trainable(host, "lora"), torch.optim.SGD([torch.zeros(1)]))
    assert alone.players(fresh, None) == [fresh]  # nobody asks for scores


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forget": -1.0}, "forget, remain and regression must be at least 0"),
        ({"forget": 0.0, "remain": 0.0}, "nothing is learned: set objective.forget or remain"),
        ({"denoising_steps": 0}, "denoising_steps and score_rank must be at least 1"),
        ({"guidance": 0.5}, "guidance must be at least 1"),
    ],
)
def test_sfd_refuses_what_it_cannot_mean(settings, message):
    with pytest.raises(ConfigError, match=message):
        SFDConfig(**settings)


def test_one_step_is_for_lora_patches_and_within_the_schedule(host):
    for kind in ("control", "lite"):
        with pytest.raises(ConfigError, match=f"one_step cannot train a {kind} patch; set patch.kind=lora"):
            SFDConfig(one_step=True).suited(new_patch(host.unet, kind))
    with pytest.raises(ConfigError, match="timestep must be below the model's 1000, not 1000"):
        SFDConfig(one_step=True, timestep=1000).prepare(host, KEPT, DataConfig(pairs=2))
    assert SFDConfig(one_step=True).recorded(host) == {"one_step": {"timestep": 999}}  # of a v-prediction
    assert SFDConfig(one_step=True, timestep=500).recorded(host) == {"one_step": {"timestep": 500}}
    assert SFDConfig().recorded(host) == {}
    with pytest.raises(ConfigError, match=r"one step of a transformer; set objective\.one_step=false"):
        SFDConfig(one_step=True).recorded(cast(Any, SimpleNamespace(predicts="flow", steps=1000)))
    host = new_small_host()
    host.components.scheduler.register_to_config(prediction_type="epsilon")
    assert SFDConfig(one_step=True).recorded(host) == {"one_step": {"timestep": 625}}


def test_pictures_of_pairs_are_drawn_of_both_members_from_the_same_noise(host):
    rows = DUOConfig().prepare(host, KEPT, DataConfig(pairs=2, steps=1))
    twins = rows.batch(0, 2, 0)
    assert not torch.equal(twins.unsafe, twins.safe)
    same = Corpus(MINE, [("a knife", "a knife")])
    alike = DUOConfig().prepare(host, same, DataConfig(pairs=2, steps=1)).batch(0, 2, 0)
    assert torch.equal(alike.unsafe, alike.safe)
    assert twins.retain is None
    assert SafeGenConfig().prepare(host, KEPT, DataConfig(pairs=2, steps=1)).batch(0, 2, 0).retain.shape[0] == 2
    guided = Corpus(MINE, [("a knife", "a knife")], rewrite=Rewrite("guided"))
    with pytest.raises(ConfigError, match=r"set another rewrite\.by"):
        DUOConfig().prepare(host, guided, DataConfig(pairs=2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AllButOneConfig(unconditional=-1), "unconditional must be at least 0"),
        (lambda: DUOConfig(beta=0), "beta must be above 0"),
        (lambda: SafeGenConfig(target="none"), "target must be one of exact, published, not 'none'"),
        (lambda: AdvUnlearnConfig(attack="slow"), "attack must be one of fast, standard, not 'slow'"),
        (lambda: ClosedFormConfig(tokens="first"), "tokens must be one of last, rest, not 'first'"),
        (lambda: ClosedFormConfig(regularization=0), "above 0"),
    ],
)
def test_settings_without_meaning_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_lora_patch_may_begin_as_the_solution(host):
    """In the closed form's layers, at the rank it has; and nearer to what it learns than a fresh one."""
    corpus, data = Corpus.open("weapons"), DataConfig(pairs=6, steps=1)
    config = SafeControlConfig(start="closed_form", preservation=0.0)
    fresh = config.suited(new_patch(host.unet, "lora", seed=None)).requires_grad_(True).train()
    begun = copy.deepcopy(fresh)
    begin(host, begun, corpus, data)
    solution, _, _ = solved(host, rank=4, preserve=128)
    made, wanted = dict(begun.each()), dict(solution.each())
    for layer, update in made.items():
        added = update.up @ update.down
        if layer in wanted:
            torch.testing.assert_close(added, wanted[layer].up @ wanted[layer].down, rtol=1e-3, atol=1e-5)
            assert added.any()  # control
        else:
            assert not added.any()
    rows = config.prepare(host, corpus, data).batch(0, 6, 0)
    assert played(config, begun, host, rows)["loss"] < 0.95 * played(config, fresh, host, rows)["loss"]


def test_only_a_lora_patch_with_cross_attention_begins_so(host):
    for kind in ("control", "lite"):
        with pytest.raises(
            ConfigError, match=r"objective\.start=closed_form is for lora patches; set patch\.kind=lora"
        ):
            SafeControlConfig(start="closed_form").suited(new_patch(host.unet, kind))
    with pytest.raises(ConfigError, match="start must be one of zero, closed_form, not 'one'"):
        SafeControlConfig(start="one").suited(new_patch(host.unet, "lora"))
    blind = DUOConfig(start="closed_form").suited(new_patch(host.unet, "lora"))
    with pytest.raises(ConfigError, match="trains no keys and values of cross-attention"):
        begin(host, blind, Corpus.open("weapons"), DataConfig(pairs=2))


def test_every_objective_works_on_another_family():
    """SD 2's layout: through the host alone."""
    host, corpus, data = UNetHost(Components.of(small_family_pipe("sd2")), 64), Corpus.open("weapons"), DataConfig(2)
    data = replace(data, steps=1)
    for name in OBJECTIVES:
        objective = CASES.get(name, OBJECTIVES[name]())
        patch = objective.suited(PATCH_KINDS["lora"].from_unet(host.unet)).requires_grad_(True)
        rows = objective.prepare(host, corpus, data)
        if not objective.has_steps:
            assert objective.solve(host, patch, rows)["erase"] < 1
            continue
        player = Player("patch", patch, torch.optim.SGD(patch.parameters()))
        others = {each.name: each.module for each in objective.players(player, rows) if each is not player}
        generator = torch.Generator().manual_seed(0)
        turn = Turn(host, patch, host.encode(["x"]).states, rows.batch(0, 2, 0), generator, others)
        loss = objective.loss(player, turn)["loss"]
        loss.backward()
        assert loss.isfinite()
        assert all(joint.grad.isfinite().all() and joint.grad.any() for joint in patch.joints())
