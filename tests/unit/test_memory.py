"""What a run will take is told before it begins: against published figures, and against itself."""

import json
from dataclasses import replace
from functools import cache
from itertools import cycle

import pytest
import torch

from safepatch.data.bank import DataConfig
from safepatch.diffusion import Components, Conditioning, UNetHost
from safepatch.errors import ConfigError
from safepatch.models.checkpoint import CONFIGS
from safepatch.models.load import unet_config
from safepatch.patch import PATCH_KINDS
from safepatch.patch.host import patched_prediction
from safepatch.training.config import load_train_config
from safepatch.training.estimate import TOKENS, AsOnGpu, Tally, inputs, meta_host, step_bytes
from safepatch.training.memory import CONTEXT, FRAGMENTS, GIB, Plan, Prediction, predict, predict_run
from tests.families import FAMILIES, small_config, small_family_pipe

BF16 = {"dtype": torch.bfloat16, "mixed_precision": "bf16"}
LEAN = {**BF16, "gradient_checkpointing": True}
# Saved activations of one row, GiB in float32 with memory-efficient attention, at 512 and 1024 pixels.
FIGURES = {
    ("sd1", "lora"): 1.80,
    ("sd1", "lite"): 0.96,
    ("sd1", "control"): 1.60,
    ("sdxl", "lora"): 13.3,
    ("sdxl", "lite"): 5.7,
    ("sdxl", "control"): 11.7,
}


def real(family: str) -> dict:
    return json.loads((CONFIGS / f"{family}.json").read_text())["unet"]


def small(plan: Plan) -> Prediction:
    return predict(unet_config("tiny-sd"), plan)


@cache
def sd15(kind: str, is_lean: bool = True) -> Prediction:
    return predict(real("sd1"), Plan(kind, **(LEAN if is_lean else {})))


@pytest.mark.parametrize(("family", "kind"), FIGURES)
def test_saved_activations_are_what_was_measured(family: str, kind: str) -> None:
    config = real(family)
    host = meta_host(config, config["sample_size"], torch.float32)
    patch = PATCH_KINDS[kind].from_unet(host.unet, empty=True).to("meta")
    with AsOnGpu(None), Tally([*host.unet.parameters(), *patch.parameters()]) as tally:
        noisy, timesteps, conditioning = inputs(host, 1, TOKENS)
        predicted = patched_prediction(host, patch, noisy, timesteps, conditioning, conditioning.states)
        saved = tally.now
    assert predicted.requires_grad
    assert saved / GIB == pytest.approx(FIGURES[family, kind], rel=0.1)


@pytest.mark.parametrize(("kind", "gib"), [("lora", 8), ("lite", 8), ("control", 16)])
def test_sd15_fits_the_cards_people_have(kind: str, gib: int) -> None:
    found = sd15(kind)
    assert found.needed < gib * 1e9
    assert found.warning(gib * GIB) is None


@pytest.mark.parametrize("kind", PATCH_KINDS)
def test_saving_measures_save(kind: str) -> None:
    plain = small(Plan(kind))
    half, lean = small(Plan(kind, **BF16)), small(Plan(kind, **LEAN))
    assert lean.activations_per_row < half.activations_per_row < plain.activations_per_row
    assert half.weights == plain.weights // 2
    assert half.patch == plain.patch, "the patch stays in float32"
    assert half.disk < plain.disk
    assert small(Plan(kind, optimizer="adamw8bit")).optimizer == plain.optimizer // 4


def test_more_of_anything_takes_more() -> None:
    plan = Plan("lora", batch_size=2, data=DataConfig(pairs=8, steps=2, batch_size=2))
    base = small(plan)
    more = {
        "learning": replace(plan, batch_size=4),
        "drawing": replace(plan, data=replace(plan.data, batch_size=8)),
        "disk": replace(plan, data=replace(plan.data, pairs=9)),
        "patch": replace(plan, layout={"rank": 32}),
        "drawing_calls": replace(plan, data=replace(plan.data, steps=3)),
        "training_calls": replace(plan, steps=1201),
        "activations_per_row": replace(plan, data=replace(plan.data, size=128)),
    }
    for name, larger in more.items():
        assert getattr(small(larger), name) > getattr(base, name), name


def test_calls_are_arithmetic() -> None:
    found = small(Plan("lite", batch_size=4, steps=1200))
    assert found.drawing_calls == 2 * 768 * 10 * 2
    assert found.training_calls == 1200 * 8 * 3
    pushed = small(Plan("lite", batch_size=4, steps=1200, pushed=True))
    assert pushed.drawing_calls - found.drawing_calls == 768 // 2 * 10 * 2  # a guided teacher is two calls more
    assert pushed.training_calls - found.training_calls == 1200 * 4 * 2


@pytest.mark.parametrize(("name", "kind"), list(zip(FAMILIES, cycle(PATCH_KINDS), strict=False)))
def test_every_family_can_be_predicted(name: str, kind: str) -> None:
    found = predict(small_config(name)["unet"], Plan(kind, batch_size=1))
    assert min(found.weights, found.patch, found.activations_per_row, found.drawing, found.disk) > 0


def test_what_is_counted_is_what_is_alive() -> None:
    with Tally([]) as tally:
        kept = torch.empty(100, device="meta")
        view = kept[:50]
        gone = torch.empty(1000, device="meta")
        del gone
    assert (tally.now, tally.peak) == (400, 4400)
    assert view.shape == (50,)


@pytest.mark.parametrize("kind", PATCH_KINDS)
def test_meta_tensors_hold_what_real_ones_do(kind: str) -> None:
    """The same forward pass on real tensors, counted by the hooks that autograd offers."""
    host = UNetHost(Components.of(small_family_pipe("sd1")), 128)
    patch, rows = PATCH_KINDS[kind].from_unet(host.unet), 2
    known = {tensor.untyped_storage().data_ptr() for tensor in (*host.unet.parameters(), *patch.parameters())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    states = torch.zeros(rows, TOKENS, 768)
    given = (torch.zeros(rows, *host.latent_shape), torch.zeros(rows).long(), Conditioning(states))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        predicted = patched_prediction(host, patch, *given, states[:1])
    assert predicted.requires_grad
    counted = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in known)
    meta = meta_host(small_config("sd1")["unet"], 16, torch.float32)
    held = step_bytes(meta, PATCH_KINDS[kind].from_unet(meta.unet, empty=True).to("meta"), rows, TOKENS, None)
    assert held.saved == pytest.approx(counted, rel=0.05)


def test_a_run_is_predicted_from_its_configuration() -> None:
    config = load_train_config(None, ["category=weapons", "model=tiny-sd", "training.mixed_precision=bf16"])
    found = predict_run(config, unet_config("tiny-sd"))
    assert found.plan.dtype is torch.bfloat16
    assert found.plan.rows_per_pair == 2
    lines = found.lines(calls_per_second=100.0)
    assert len(lines) == 3
    assert "8 rows of" in lines[0]
    assert "minutes" in lines[-1]
    assert "minutes" not in found.lines()[-1]


@pytest.mark.parametrize(
    ("objective", "drawn", "trained"),
    [
        ("safe_control", 2, 6),
        ("safe_control objective.preservation=0", 1, 3),
        ("esd", 1, 4),
        ("leco objective.denoising_steps=20", 0, 25),  # 10 steps of two calls before, and two teachers more
        ("closed_form", 0, 0),
        ("duo", 2, 9),
        ("safegen", 3, 6),
        ("adv_unlearn", 2, 10),
    ],
)
def test_what_an_objective_draws_and_asks_is_foreseen(objective: str, drawn: int, trained: int) -> None:
    words = ["category=weapons", "model=tiny-sd", f"objective={objective.split()[0]}", *objective.split()[1:]]
    found = predict_run(load_train_config(None, words), unet_config("tiny-sd"))
    assert found.drawing_calls == drawn * 768 * 10 * 2
    assert found.training_calls == trained * 1200 * 4


@pytest.mark.parametrize(
    ("objective", "rows"), [("duo", 3), ("sfd", 6), ("sfd objective.guidance=2", 8), ("sfd objective.one_step=true", 8)]
)
def test_all_rows_through_which_gradients_go_are_held(objective: str, rows: int) -> None:
    """Of a generator two, and what two scores see in them."""
    words = ["category=weapons", "model=tiny-sd", f"objective={objective.split()[0]}", *objective.split()[1:]]
    found = predict_run(load_train_config(None, words), unet_config("tiny-sd"))
    assert found.plan.held == 4 * rows
    assert found.learning > small(Plan("lora")).learning  # control: that holds eight rows


def test_a_device_that_is_too_small_is_told_with_what_to_change() -> None:
    found = sd15("lora", is_lean=False)
    said = found.warning(8 * GIB)
    assert said is not None
    assert "\n" not in said
    for way in ("training.mixed_precision=bf16", "training.gradient_checkpointing=true", "training.batch_size="):
        assert way in said
    size = int(said.partition("training.batch_size=")[2].split(",")[0])
    assert predict(real("sd1"), replace(found.plan, batch_size=size)).learning < 8 * GIB
    assert found.warning(80 * GIB) is None


def test_where_drawing_takes_the_most_fewer_are_to_be_drawn_at_once() -> None:
    found = sd15("lite")
    assert found.drawing > found.learning
    enough_to_learn = int(found.learning * FRAGMENTS + CONTEXT) + 1
    assert "data.batch_size=8" in (found.warning(enough_to_learn) or "")


@pytest.mark.parametrize("size", [36, 50, 2])
def test_a_size_that_cannot_be_drawn_is_told_in_pixels(size: int) -> None:
    with pytest.raises(ConfigError, match=f"pictures of {size} pixels cannot be drawn .*use a multiple of 16"):
        small(Plan("lite", data=DataConfig(pairs=8, steps=2, size=size)))
    with pytest.raises(ConfigError, match=r"data.size must be at least 1 pixel"):
        DataConfig(size=0)
    assert small(Plan("lite", data=DataConfig(pairs=8, steps=2, size=48))).learning  # control
