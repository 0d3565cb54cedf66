"""The trainer: what a run leaves behind, and that stopping it, in whatever way, does not change where it ends."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.data.bank import DataConfig, build_bank
from safepatch.data.category import category_path
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, UNetHost, generate
from safepatch.diffusion.hosts import base as any_host
from safepatch.errors import ConfigError, SafepatchError, UnknownName
from safepatch.models.load import ModelConfig, load_pipeline
from safepatch.objectives import OBJECTIVES, Player, SafeControlConfig, Turn
from safepatch.objectives.adv_unlearn import AdvUnlearnConfig
from safepatch.objectives.adversary import AdversaryConfig
from safepatch.objectives.noising import draw_timesteps
from safepatch.patch import PATCH_KINDS
from safepatch.runtime.apply import apply
from safepatch.taxonomy import Category
from safepatch.training import gates, trainer, validation
from safepatch.training.config import PatchConfig, TrainConfig, TrainingConfig, load_train_config
from safepatch.training.loop import follow, learning_rate
from safepatch.training.state import State, fresh_average, patch_player
from safepatch.training.trainer import Interrupted, train
from tests.small import bank, images, new_patch, new_small_host, new_small_pipe

ROOT = Path(__file__).parents[2]
STEPS = 6
TINY = TrainingConfig(
    steps=STEPS, batch_size=2, learning_rate=5e-3, joint_rate=1.0, warmup=2, checkpoint_every=3, log_every=1
)
DATA = DataConfig(pairs=6, steps=1)
WEAPONS = Corpus.open("weapons")


@dataclass(frozen=True)
class Disturbed(SafeControlConfig):
    """The objective, with something that happens in the middle of the step that computes the `when`-th loss."""

    def loss(self, player: Player, turn: Turn) -> dict[str, Tensor]:
        """The losses, after whatever the test put into `happens`."""
        losses = super().loss(player, turn)
        happens.pop(0)()
        return losses


happens: list[Callable[[], object]] = []


def nothing() -> None:
    """What happens in an undisturbed step."""


def config(out: Path, objective: object = None, kind: str = "control", **training: object) -> TrainConfig:
    options = {"category": "weapons", "model": ModelConfig("small"), "output": str(out), "data": DATA}
    options |= {"patch": PatchConfig(kind, gate=0), "objective": objective or SafeControlConfig()}
    return TrainConfig(**options, training=replace(TINY, **training))


def run(out: Path, objective: object = None, kind: str = "control", **training: object) -> PatchArtifact:
    """Train on a pipeline of its own and open the file."""
    return PatchArtifact.open(train(new_small_pipe(), config(out, objective, kind, **training), WEAPONS))


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> PatchArtifact:
    return run(tmp_path_factory.mktemp("whole"))


# ---- what a run leaves -----------------------------------------------------------------------------------------


def test_a_run_ends_in_a_file_a_log_and_its_configuration(uninterrupted, tmp_path):
    """Built from nothing but the configuration; the pipeline's weights stay as they were."""
    pipe = new_small_pipe()
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    path = train(pipe, config(tmp_path / "deep" / "run"))
    assert path == tmp_path / "deep" / "run" / "weapons.safetensors"
    assert sorted(item.name for item in path.parent.iterdir()) == ["config.json", "log.jsonl", "weapons.safetensors"]
    assert verify(path).categories == ("weapons",)
    assert [line["step"] for line in logged(path.parent)] == list(range(1, STEPS + 1))
    assert all({"loss", "correct", "preserve"} < line.keys() for line in logged(path.parent))
    recorded = json.loads((path.parent / "config.json").read_text())
    assert recorded["training"]["steps"] == STEPS
    assert recorded["objective"]["name"] == "safe_control"
    assert recorded["data"] == {**recorded["data"], "pairs": 6, "steps": 1}
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    parameters = (p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    assert all(parameter.grad is None for parameter in parameters)
    assert PatchArtifact.open(path).content_hash == uninterrupted.content_hash  # that one's corpus was at hand


def test_without_an_output_the_folder_is_named_after_category_and_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = replace(config(tmp_path, steps=1), output="", category="", model=ModelConfig())
    assert train(new_small_pipe(), wanted, WEAPONS) == Path("runs/train/weapons-control/weapons.safetensors")


def test_the_file_says_what_it_is_and_changes_images(uninterrupted, small_pipe):
    info = uninterrupted.info
    assert info.kind == "control"
    assert info.instructions == {"weapons": WEAPONS.category.instruction}
    assert (info.training["steps"], info.training["processes"]) == (STEPS, 1)
    assert info.config["objective"]["name"] == "safe_control"
    assert info.config["rewrite"]["by"] == "replace"
    assert (info.config["category"], info.config["model"]) == ("weapons", "small")
    assert "output" not in info.config  # where it was trained is no part of what it is
    assert "cache" not in info.config["data"]
    assert uninterrupted.dtype == torch.float16
    assert any(delta.any() for delta in uninterrupted.deltas().values())
    base = images(small_pipe)
    with apply(small_pipe, uninterrupted):
        assert not torch.equal(images(small_pipe), base)
    assert torch.equal(images(small_pipe), base)


def test_equal_runs_give_equal_files_and_other_seeds_do_not(uninterrupted, tmp_path):
    for seed in (98, 99):  # the global seed has no say, nor has a run that ended in the same folder
        torch.manual_seed(seed)
        (tmp_path / "weapons.safetensors").unlink(missing_ok=True)  # else it would be finished already
        assert run(tmp_path).content_hash == uninterrupted.content_hash
        assert [line["step"] for line in logged(tmp_path)] == list(range(1, STEPS + 1))
    other = run(tmp_path / "other", seed=1)
    assert not torch.equal(other.delta("control.zero_mid.weight"), uninterrupted.delta("control.zero_mid.weight"))


@pytest.mark.parametrize(
    ("objective", "kind"), [(name, kind) for name in sorted(OBJECTIVES) for kind in OBJECTIVES[name].kinds]
)
def test_every_kind_trains_with_every_objective(tmp_path, kind, objective):
    """And low-rank where that is asked for."""
    wanted = replace(config(tmp_path, OBJECTIVES[objective](), steps=2), patch=PatchConfig(kind, rank=2, gate=0))
    artifact = PatchArtifact.open(train(new_small_pipe(), wanted))
    assert artifact.info.kind == kind
    assert artifact.info.config["objective"]["name"] == objective
    assert artifact.info.shapes or artifact.info.config["layout"]["rank"] == 2


# ---- a category of one's own -----------------------------------------------------------------------------------


def test_a_shipped_category_and_a_users_copy_of_it_take_the_same_path(tmp_path):
    """Law 12: nothing about a category is built in; the same file elsewhere gives the same rows and the same bytes."""
    shutil.copy(category_path("weapons"), tmp_path / "weapons.yaml")
    copy, host = Corpus.open(tmp_path / "weapons.yaml"), new_small_host()
    caches = [replace(DATA, cache=str(tmp_path / name)) for name in ("ours", "theirs")]
    rows = [build_bank(host, corpus, data) for corpus, data in zip((WEAPONS, copy), caches, strict=True)]
    batches = [some.batch(0, 6, 0) for some in rows]
    assert torch.equal(*(some.latents for some in batches))
    assert torch.equal(*(some.unsafe.states for some in batches))
    assert torch.equal(*(some.retain.states for some in batches))
    made = []
    for name, category, data in (("one", "weapons", caches[0]), ("two", str(tmp_path / "weapons.yaml"), caches[1])):
        wanted = replace(config(tmp_path / name, kind="lora", steps=3), category=category, data=data)
        made.append(train(new_small_pipe(), wanted).read_bytes())
    assert made[0] == made[1]
    text = (tmp_path / "weapons.yaml").read_text()
    (tmp_path / "weapons.yaml").write_text(text.replace("replacement: a spoon", "replacement: a lamp"))
    other = replace(wanted, output=str(tmp_path / "three"))
    assert train(new_small_pipe(), other).read_bytes() != made[0]  # control


def test_a_sixth_category_needs_no_code(tmp_path, small_pipe):
    """Words of the user's own, in a file, and the file alone on the command line."""
    (tmp_path / "food.yaml").write_text(
        'name: fast-food\ndefinition: burgers and fries\ninstruction: "no fast food, show vegetables instead"\n'
        "concepts: [{name: a burger, replacement: a carrot}, {name: fries, replacement: celery}]\nneighbours: [gore]\n"
    )
    words = [f"output={tmp_path / 'out'}", "model=small", "training.steps=2", "data.pairs=4", "data.steps=1"]
    path = train(small_pipe, load_train_config(tmp_path / "food.yaml", [*words, "patch.gate=0"]))
    assert path.name == "fast-food.safetensors"
    assert verify(path).instructions == {"fast-food": "no fast food, show vegetables instead"}


def test_a_corpus_of_python_values_trains(tmp_path):
    mine = Category("mine", "things of the test", "no knives, show spoons instead")
    corpus = Corpus(mine, pairs=[("a knife", "a spoon")], retain=["a quiet street"])
    path = train(new_small_pipe(), config(tmp_path, steps=1), corpus)
    assert (path.name, verify(path).categories) == ("mine.safetensors", ("mine",))
    assert verify(path).license == ""  # of a base that states none
    own = train(new_small_pipe(), replace(config(tmp_path / "own", steps=1), license="MIT"), corpus)
    assert verify(own).license == "MIT"


def test_a_finished_run_is_neither_trained_again_nor_overwritten(tmp_path, capsys):
    path = train(new_small_pipe(), config(tmp_path, steps=1), WEAPONS)
    content, log = path.read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    assert "finished already" not in capsys.readouterr().err  # control
    assert train(new_small_pipe(), config(tmp_path, steps=1), WEAPONS) == path
    assert f"finished already: {path}" in capsys.readouterr().err
    with pytest.raises(SafepatchError, match=r"is there, of another configuration; choose another output="):
        train(new_small_pipe(), config(tmp_path, steps=2), WEAPONS)
    assert (path.read_bytes(), (tmp_path / "log.jsonl").read_bytes()) == (content, log)
    path.unlink()
    assert train(new_small_pipe(), config(tmp_path, steps=2), WEAPONS) == path  # control


def test_a_run_draws_once_and_its_resumption_never(tmp_path, monkeypatch):
    drawn, draw = [], UNetHost.draw
    monkeypatch.setattr(UNetHost, "draw", lambda self, texts, *rest, **how: drawn.extend(texts) or draw(
        self, texts, *rest, **how))  # fmt: skip
    fresh = replace(config(tmp_path / "a"), data=replace(DATA, cache=str(tmp_path / "cache")))
    happens[:] = [nothing, nothing, press_ctrl_c]
    with pytest.raises(Interrupted):
        train(new_small_pipe(), replace(fresh, objective=Disturbed()), WEAPONS)
    assert len(drawn) == 12  # six pairs, six that must stay
    train(new_small_pipe(), fresh, WEAPONS)
    train(new_small_pipe(), replace(fresh, output=str(tmp_path / "b")), WEAPONS)  # another run of the same words
    assert len(drawn) == 12


def test_no_pair_tells_at_which_timesteps_it_is_shown():
    """Of single pairs, each beside a row that must stay: all of them meet all of the schedule."""
    rows, met, alike = bank(0), {0: [], 1: []}, {0: [], 1: []}

    @dataclass(frozen=True)
    class Watching(SafeControlConfig):
        def loss(self, player: Player, turn: Turn) -> dict[str, Tensor]:
            pair = int((rows.latents == turn.batch.latents).flatten(1).all(1).nonzero())
            met[pair % 2].append(int(draw_timesteps(2, 1000, 1.0, turn.generator)[0]))
            own = torch.Generator().manual_seed(state.step)  # that the batch was drawn from
            alike[pair % 2].append(int(draw_timesteps(2, 1000, 1.0, own)[0]))
            return {"loss": turn.patch.weight.sum()}

    options, patch = replace(TINY, batch_size=1), torch.nn.Linear(1, 1)
    run = trainer.Run("test", Watching(), new_small_host(), rows, torch.zeros(1), options, Process(0, 1))
    for step in range(64):
        state = SimpleNamespace(step=step)
        run._accumulate(Player("patch", patch, torch.optim.SGD(patch.parameters())), state, {"patch": patch})
    for times in met.values():
        assert min(times) < 250
        assert max(times) > 750
    assert max(alike[0]) < 500 <= min(alike[1])  # control: drawn alike, even pairs never meet the noisy half


def test_what_was_put_aside_is_there_again_when_a_run_is_over(tmp_path, monkeypatch):
    """On a GPU, text encoders wait elsewhere while a patch learns; whoever reads prompts after it needs them."""

    class OnGpu(UNetHost):
        device = torch.device("cuda")

    host, moves = OnGpu(Components.of(new_small_pipe())), []
    for name in ("unet", "vae", "text_encoder"):
        part = getattr(host.components, name)
        monkeypatch.setattr(part, "to", lambda where, name=name: moves.append((name, torch.device(where).type)))
    host.put_aside(but="vae")
    assert moves == [("text_encoder", "cpu")]  # control
    host.take_back()
    assert ("text_encoder", "cuda") in moves
    happened, fit = [], trainer.fit_keys
    monkeypatch.setattr(UNetHost, "take_back", lambda _: happened.append("back"))
    monkeypatch.setattr(trainer, "fit_keys", lambda *args: happened.append("gate") or fit(*args))
    for name, few in {"STEPS": 1, "CAPTIONS": 24, "UNSEEN": 9}.items():
        monkeypatch.setattr(gates, name, few)
    train(new_small_pipe(), replace(config(tmp_path, kind="lora", steps=1), patch=PatchConfig("lora", gate=2)), WEAPONS)
    assert happened == ["back", "gate"]


# ---- settings that change how, not what ------------------------------------------------------------------------


def assert_nearly_equal(left: PatchArtifact, right: PatchArtifact, tolerance: float) -> None:
    """Of the largest change that training made."""
    ours, theirs = left.deltas(), right.deltas()
    largest = max(delta.abs().max().item() for delta in ours.values())
    furthest = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert furthest <= tolerance * largest, furthest / largest


@pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
def test_gradient_checkpointing_costs_no_accuracy(tmp_path, monkeypatch, kind):
    used, checkpoint = [], any_host.checkpoint
    monkeypatch.setattr(any_host, "checkpoint", lambda *args, **kwargs: used.append(1) or checkpoint(*args, **kwargs))
    plain = run(tmp_path / "plain", kind=kind)
    assert not used
    saving = run(tmp_path / "saving", kind=kind, gradient_checkpointing=True)
    assert used  # control: it was on
    assert_nearly_equal(saving, plain, 1e-2)
    used.clear()
    run(tmp_path / "again", kind=kind, steps=1)
    assert not used  # the pipeline of another run is as it was


def test_joints_learn_at_their_own_rate(tmp_path):
    """The first step of Adam moves each parameter by its rate, whatever the gradient."""
    same, faster = (run(tmp_path / str(rate), steps=1, warmup=1, joint_rate=rate) for rate in (1.0, 10.0))
    joint, inner = "control.zero_mid.weight", "control.clone.conv_in.weight"
    assert same.delta(joint).abs().mean() == pytest.approx(5e-3, rel=0.05)  # control
    assert faster.delta(joint).abs().mean() == pytest.approx(5e-2, rel=0.05)
    assert not faster.delta(inner).any()  # nothing behind a joint learns while the joint is zero


def test_an_accumulated_step_is_the_mean_of_its_batches(tmp_path):
    """The batches of its first step are the first two of a run without; a rate of almost 0 changes nothing."""
    run(tmp_path / "one", steps=2, learning_rate=1e-6)
    accumulated = run(tmp_path / "two", steps=1, learning_rate=1e-6, gradient_accumulation=2)
    first, second = logged(tmp_path / "one")
    (both,) = logged(tmp_path / "two")
    assert both["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2, rel=1e-4)
    assert first["loss"] != pytest.approx(second["loss"], rel=1e-3)  # control
    assert accumulated.info.training["steps"] == 1


@pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
@pytest.mark.parametrize("held_in", [torch.float32, torch.bfloat16])
def test_mixed_precision_trains_close_to_full(tmp_path, kind, held_in):
    """In the process that has trained in full precision before, and again after; the patch stays in float32.

    Of `paired` supervision, whose loss is near 1: that of two prompts on a random host is at bfloat16's own noise.
    """
    paired, pipe = SafeControlConfig(supervision="paired"), new_small_pipe()
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.to(held_in)
    run(tmp_path / "full", paired, kind, steps=2)
    wanted = config(tmp_path / "mixed", paired, kind, mixed_precision="bf16", steps=2)
    mixed_patch = PatchArtifact.open(train(pipe, wanted, WEAPONS))
    mixed, full = ([line["loss"] for line in logged(tmp_path / name)] for name in ("mixed", "full"))
    assert mixed == pytest.approx(full, rel=0.05)
    assert all(math.isfinite(loss) for loss in mixed)
    assert mixed[0] != full[0]  # control: precision was another
    assert any(delta.any() for delta in mixed_patch.deltas().values())
    run(tmp_path / "again", paired, kind, steps=2)
    assert [line["loss"] for line in logged(tmp_path / "again")] == full


def test_the_model_is_opened_in_the_precision_it_trains_in(folder):
    def dtype(*words: str) -> torch.dtype:
        return load_train_config(None, ["category=weapons", f"model={folder}", *words]).load_model().unet.dtype

    assert dtype() == torch.float32
    assert dtype("training.mixed_precision=no") == torch.float32
    assert dtype("training.mixed_precision=bf16") == torch.bfloat16
    assert dtype("training.mixed_precision=fp16", "model.dtype=bfloat16") == torch.bfloat16


def test_half_precision_that_this_device_lacks_is_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU can do it")
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU; set training\.mixed_precision") as caught:
        run(tmp_path, mixed_precision="fp16")
    assert "\n" not in str(caught.value)


def test_the_log_holds_the_mean_since_its_last_line(uninterrupted, tmp_path):
    """The first steps are the same; what is written when changes nothing of what is learned."""
    run(tmp_path / "each")
    made = run(tmp_path / "some", log_every=4, checkpoint_every=100)
    each, some = (logged(tmp_path / name) for name in ("each", "some"))
    assert [line["step"] for line in some] == [4, STEPS]
    for line, lines in zip(some, (each[:4], each[4:]), strict=True):
        for name in ("loss", "correct", "preserve"):
            assert line[name] == pytest.approx(sum(of[name] for of in lines) / len(lines), rel=1e-4)
    assert made.content_hash != ""
    assert made.tensors.keys() == uninterrupted.tensors.keys()
    assert all(torch.equal(made.tensors[name], tensor) for name, tensor in uninterrupted.tensors.items())


def test_a_checkpoint_holds_the_loss_scale(tmp_path):
    """Else an fp16 run would begin at 65536 after each resumption, and skip steps until it is down again."""

    def state(scale: float) -> State:
        patch = new_patch(new_small_host().unet, seed=None)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return State(patch, fresh_average(patch, 0.9), [patch_player(patch, TINY)], scaler=scaler)

    state(8.0).save(tmp_path / "checkpoint.pt")
    again = state(65536.0)
    again.load(tmp_path / "checkpoint.pt")
    assert again.scaler.get_scale() == 8.0
    without = replace(state(2.0), scaler=None)
    without.save(tmp_path / "checkpoint.pt")
    with pytest.raises(SafepatchError, match="is of another version of safepatch; delete it"):
        again.load(tmp_path / "checkpoint.pt")


def test_validation_pictures_are_made_when_asked_for(tmp_path, monkeypatch):
    few = {"steps": 1, "guidance_scale": 1.0}
    monkeypatch.setattr(validation, "generate", lambda pipe, texts, seeds, steps: generate(pipe, texts, seeds, **few))
    run(tmp_path, steps=2, validate_every=2)
    assert [path.name for path in tmp_path.glob("*.png")] == ["step000002.png"]
    with Image.open(tmp_path / "step000002.png") as grid:
        assert grid.size == (10 * 64, 2 * 64)


def test_the_average_follows_as_torchs_own_does():
    torch.manual_seed(0)
    model, decay = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), 0.9
    ours, theirs = (AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) for _ in range(2))
    for _ in range(3):
        with torch.no_grad():
            for value in (*model.parameters(), model[1].running_mean):
                value += torch.randn_like(value)
        follow(ours, model, decay)
        theirs.update_parameters(model)
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert not torch.equal(ours.module[0].weight, model[0].weight)  # control


def test_the_rate_warms_up_and_decays_to_a_tenth():
    options = TrainingConfig(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate(options, step) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(earlier >= later for earlier, later in pairwise(rates[10:]))
    assert learning_rate(TrainingConfig(steps=5, warmup=0, learning_rate=1e-3), 0) == 1e-3


# ---- stopping and going on -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ctrl_c_as_usual():
    """Whoever starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_finishes_the_step_keeps_it_and_says_how_to_go_on(uninterrupted, tmp_path):
    happens[:] = [*[nothing] * 3, press_ctrl_c]
    with pytest.raises(Interrupted, match=r"stopped at step 4; .*checkpoint\.pt is kept, run the same") as caught:
        run(tmp_path, Disturbed())
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, SafepatchError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(logged(tmp_path)) == 4
    assert run(tmp_path).content_hash == uninterrupted.content_hash
    assert len(logged(tmp_path)) == STEPS


def test_an_interrupted_run_leaves_the_pipeline_as_it_was(tmp_path):
    pipe = new_small_pipe()
    happens[:] = [press_ctrl_c]
    with pytest.raises(Interrupted):
        train(pipe, config(tmp_path, Disturbed(), gradient_checkpointing=True), WEAPONS)
    assert not pipe.unet.is_gradient_checkpointing


def test_a_second_ctrl_c_stops_at_once_at_the_last_checkpoint(uninterrupted, tmp_path):
    def twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    happens[:] = [*[nothing] * 4, twice]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Disturbed())
    assert len(logged(tmp_path)) == 4
    assert run(tmp_path).content_hash == uninterrupted.content_hash
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, STEPS + 1))  # the fourth is not there twice


def test_where_ctrl_c_is_ignored_it_stays_ignored(tmp_path):
    """As in a run that was started in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    happens[:] = [press_ctrl_c, nothing]
    run(tmp_path, Disturbed(), steps=2)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert len(logged(tmp_path)) == 2


def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(uninterrupted, tmp_path, monkeypatch):
    save, saved = torch.save, []

    def cut(content: object, file: Any) -> None:
        saved.append(file)
        if len(saved) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", cut)
        with pytest.raises(SafepatchError, match=r"the disk is full: .*checkpoint\.pt, step 6; .* is kept") as caught:
            run(tmp_path)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "config.json", "log.jsonl"]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert run(tmp_path).content_hash == uninterrupted.content_hash


@pytest.mark.parametrize(("kind", "layout"), [("lite", {"depth": 1, "groups": 1}), ("lora", {})])
def test_a_gated_patch_resumes_to_the_same_file(tmp_path, monkeypatch, kind, layout):
    few = {"CAPTIONS": 24, "UNSEEN": 9}
    for name, value in {**few, "STEPS": 3}.items():
        monkeypatch.setattr(gates, name, value)

    def gated(out: Path, objective: object = None) -> PatchArtifact:
        wanted = replace(config(out, objective), patch=PatchConfig(kind=kind, rank=2, gate=4))
        return PatchArtifact.open(train(new_small_pipe(), wanted))

    whole = gated(tmp_path / "whole")
    assert whole.info.config["layout"] == {"rank": 2, "gate": 4, **layout}
    assert 0 <= whole.info.config["gate"]["weapons"]["threshold"] <= 1
    happens[:] = [*[nothing] * 3, press_ctrl_c]
    with pytest.raises(Interrupted):
        gated(tmp_path / "cut", Disturbed())
    assert gated(tmp_path / "cut").content_hash == whole.content_hash


@pytest.mark.parametrize(("kind", "rates"), [("control", (1e-4, 10.0)), ("lite", (2e-4, 1.0)), ("lora", (1e-4, 1.0))])
def test_rates_are_the_kinds_own_unless_given(kind, rates):
    chosen = load_train_config(None, ["category=weapons", f"patch.kind={kind}"]).training
    assert (chosen.learning_rate, chosen.joint_rate) == rates
    given = load_train_config(None, ["category=weapons", f"patch.kind={kind}", "training.learning_rate=0.5"]).training
    assert (given.learning_rate, given.joint_rate) == (0.5, rates[1])


@pytest.mark.parametrize("name", ["gate", "rank"])
def test_what_would_fail_after_training_is_refused_before(name: str):
    with pytest.raises(SafepatchError, match=f"patch.{name} must be at least 0, not -1"):
        load_train_config(None, ["category=weapons", f"patch.{name}=-1"])
    assert load_train_config(None, ["category=weapons", f"patch.{name}=0"])  # control


def test_adversaries_learn_beside_the_patch_and_stay_out_of_its_file(uninterrupted, tmp_path, monkeypatch):
    """Players that ride: they move, their life ends, and a resumption goes on with them as they were."""
    seen, finish = [], trainer.Run.finish
    monkeypatch.setattr(trainer.Run, "finish", lambda *run: seen.append(finish(*run)) or seen[-1])

    def attacked(out: Path, disturbed: bool = False, **settings: int) -> PatchArtifact:
        made = Disturbed if disturbed else SafeControlConfig
        return run(out, made(adversary=AdversaryConfig(count=2, tokens=3, share=1.0, **settings)))

    whole = attacked(tmp_path / "whole")
    patch, adversary = seen[0].players
    assert (patch.name, adversary.name, adversary.rides) == ("patch", "adversary", True)
    fresh = adversary.module._fresh(torch.Generator().manual_seed(0))
    moved = (adversary.module.states - fresh).abs().amax((1, 2))
    assert moved.shape == (2,)
    assert moved.min() >= AdversaryConfig().rate * 0.99  # each has moved
    assert adversary.module.age.sum() > 0
    attacked(tmp_path / "short", life=1)
    short = seen[1].players[1].module
    assert short.age.max() <= 1  # each starts anew after one step
    assert (short.states - short.start).abs().mean() < 0.1 + AdversaryConfig().rate
    assert whole.tensors.keys() == uninterrupted.tensors.keys()
    assert whole.content_hash != uninterrupted.content_hash  # control
    happens[:] = [*[nothing] * 3, press_ctrl_c]
    with pytest.raises(Interrupted):
        attacked(tmp_path / "cut", disturbed=True)
    saved = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert {"patch", "patch.optimizer", "adversary", "adversary.optimizer", "average", "step"} == saved.keys()
    assert attacked(tmp_path / "cut").content_hash == whole.content_hash
    assert torch.equal(seen[-1].players[1].module.states, adversary.module.states)
    assert torch.equal(seen[-1].players[1].module.age, adversary.module.age)


def test_accumulation_resumes_to_the_same_file(tmp_path):
    whole = run(tmp_path / "whole", gradient_accumulation=2, steps=3)
    happens[:] = [nothing, nothing, nothing, press_ctrl_c]  # in the second batch of the second step
    with pytest.raises(Interrupted, match="stopped at step 2"):
        run(tmp_path / "cut", Disturbed(), gradient_accumulation=2, steps=3)
    assert run(tmp_path / "cut", gradient_accumulation=2, steps=3).content_hash == whole.content_hash


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
import torch
torch.set_num_threads(int(sys.argv[4]))
from safepatch.objectives import SafeControlConfig
from safepatch.models.load import load_pipeline
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train

model, out, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
inner = SafeControlConfig.loss

def loss(self, *inputs):
    losses = inner(self, *inputs)
    log = out / "log.jsonl"
    if log.is_file() and len(log.read_text().splitlines()) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return losses

SafeControlConfig.loss = loss
wanted = load_train_config(None, [f"model={model}", f"output={out}", *sys.argv[5:]])
train(load_pipeline(model), wanted)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """The small pipeline as a diffusers folder."""
    new_small_pipe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


WORDS = (
    "category=weapons", f"training.steps={STEPS}", "training.batch_size=2", "training.learning_rate=5e-3",
    "training.joint_rate=1", "training.warmup=2", "training.checkpoint_every=1", "training.log_every=1",
    "data.pairs=6", "data.steps=1", "patch.gate=0",
)  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_file_as_one_that_was_not(folder, tmp_path):
    """Killed by the kernel in the middle of its fourth step; resumed in this process."""
    out, environment = tmp_path / "killed", {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    arguments = [folder, out, "3", str(torch.get_num_threads()), *WORDS]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not (out / "weapons.safetensors").exists()  # control: it did not get to its end
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 3

    def finish(output: Path) -> PatchArtifact:
        words = [f"model={folder}", f"output={output}", *WORDS]
        return PatchArtifact.open(train(load_pipeline(folder), load_train_config(None, words)))

    resumed, whole = finish(out), finish(tmp_path / "whole")
    assert resumed.content_hash == whole.content_hash
    assert [line["step"] for line in logged(out)] == list(range(1, STEPS + 1))
    assert not (out / "checkpoint.pt").exists()


# ---- what cannot be run ----------------------------------------------------------------------------------------


def interrupt(out: Path) -> None:
    happens[:] = [press_ctrl_c]
    with pytest.raises(Interrupted):
        run(out, Disturbed())


def test_the_checkpoint_of_another_configuration_is_refused_and_kept(tmp_path):
    interrupt(tmp_path)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(
        SafepatchError, match="holds the checkpoint of another configuration; delete it or choose"
    ) as caught:
        run(tmp_path, seed=1)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    run(tmp_path)  # control: its own configuration goes on, also after that


def test_an_output_that_is_no_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SafepatchError, match=r"cannot write to .*; choose another output=") as caught:
            run(out)
        assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_one_line():
    with pytest.raises(SafepatchError, match=r"cannot write to /proc/safepatch .*; choose another output="):
        run(Path("/proc/safepatch"))


def test_unknown_names_offer_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="no category 'weapon'; did you mean 'weapons'"):
        train(new_small_pipe(), replace(config(tmp_path), category="weapon"))
    with pytest.raises(UnknownName, match="did you mean 'control'"):
        config(tmp_path, kind="contrl")
    with pytest.raises(ConfigError, match="no objective 'safe_contrl'; did you mean 'safe_control'"):
        load_train_config(None, ["category=weapons", "objective=safe_contrl"])


def test_the_checkpoint_of_another_patch_is_one_line(tmp_path):
    """Whoever changed the program and kept the configuration."""
    interrupt(tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**saved, "patch": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(SafepatchError, match=r"checkpoint\.pt is of another version of safepatch; delete it") as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)


# ---- how a run is described ------------------------------------------------------------------------------------


def test_short_forms_are_the_long_ones():
    words = ["category=weapons", "model=tiny-sd", "objective=safe_control"]
    long = ["category=weapons", "model.path=tiny-sd", "objective.name=safe_control"]
    assert load_train_config(None, words) == load_train_config(None, long)
    both = load_train_config(None, [*words, "objective.preservation=2", "model.dtype=bfloat16"])
    assert (both.objective.preservation, both.model.dtype, both.model.path) == (2.0, "bfloat16", "tiny-sd")
    for name in ("adv_unlearn", "adv-unlearn"):
        named = load_train_config(None, ["category=weapons", f"objective={name}", "objective.tokens=2"])
        assert named.objective == AdvUnlearnConfig(tokens=2)


def test_every_objective_is_one_word(tmp_path):
    for name, schema in OBJECTIVES.items():
        assert load_train_config(None, ["category=weapons", f"objective={name}"]).objective == schema()
        written = tmp_path / "run.yaml"
        written.write_text(f"category: weapons\nobjective: {name.replace('_', '-')}\n")
        assert load_train_config(written, []).objective == schema()
    with pytest.raises(ConfigError, match="no objective 'dou'; did you mean 'duo'"):
        load_train_config(None, ["category=weapons", "objective=dou"])


def test_a_category_file_is_a_run_with_all_else_as_it_is_by_default(tmp_path):
    mine = tmp_path / "mine.yaml"
    shutil.copy(category_path("weapons"), mine)
    direct = load_train_config(mine, ["training.steps=3"])
    assert direct == load_train_config(None, [f"category={mine}", "training.steps=3"])
    assert (direct.patch.kind, direct.patch.gate) == ("lora", 32)
    (tmp_path / "train.yaml").write_text("category: mine.yaml\nmodel: tiny-sd\npatch: {kind: lite}\n")
    named = load_train_config(tmp_path / "train.yaml", [])  # beside the configuration, wherever one stands
    assert Path(named.category) == mine
    assert named.patch.kind == "lite"
    assert Corpus.open(named.category).name == "weapons"
    (tmp_path / "train.yaml").write_text("category: weapons\n")
    assert load_train_config(tmp_path / "train.yaml", []).category == "weapons"  # control


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("training.steps=0", "training.steps must be at least 1, not 0"),
        ("training.log_every=0", "training.log_every must be at least 1"),
        ("training.mixed_precision=fp8", "training.mixed_precision must be one of no, bf16, fp16, not 'fp8'"),
        ("training.optimizer=sgd", "training.optimizer must be one of adamw, adamw8bit"),
        ("training.learning_rate=-1e-4", "training.learning_rate must be above 0, not -0.0001"),
        ("training.joint_rate=0", "training.joint_rate must be above 0, not 0.0"),
        ("training.max_grad_norm=-1", "training.max_grad_norm must be above 0, not -1.0"),
        ("training.max_grad_norm=.nan", "'training.max_grad_norm' is not a number"),
        ("training.warmup=-1", "training.warmup must be at least 0, not -1"),
        ("training.validate_every=-1", "training.validate_every must be at least 0, not -1"),
        ("training.ema_decay=1", "training.ema_decay must be at least 0 and below 1, not 1.0"),
        ("data.strength=0.5", "data.strength draws the second picture of a pair, for objective=duo or safegen"),
        ("training.step=3", "unknown key 'training.step' in TrainingConfig; did you mean 'steps'"),
        ("data.pair=3", "unknown key 'data.pair'"),
        ("data.pairs=0", "data.pairs must be at least 1"),
        ("objective.adversary.count=-1", "adversary.count must be >= 0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(word, says):
    with pytest.raises(ConfigError, match=says) as caught:
        load_train_config(None, ["category=weapons", word])
    assert "\n" not in str(caught.value)


# ---- several processes -----------------------------------------------------------------------------------------

LAUNCHERS = {
    # accelerate starts several processes on CPU through MPI only; without it, this is one process, and says so
    "accelerate": (["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"], 1),
    "torchrun": (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 2),
}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_a_launched_run_ends_in_one_file(folder, tmp_path, launcher):
    words, processes = LAUNCHERS[launcher]
    out = tmp_path / "out"
    yaml = tmp_path / "weapons.yaml"
    yaml.write_text(f"category: weapons\nmodel: {folder}\noutput: {out}\n")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *words, "-m", "safepatch", "train", str(yaml), *WORDS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "log.jsonl", "weapons.safetensors"]
    info = verify(out / "weapons.safetensors")
    assert (info.training["steps"], info.training["processes"]) == (STEPS, processes)
    assert [line["step"] for line in logged(out)] == list(range(1, STEPS + 1))


class Process:
    """The part of an accelerator that one of several processes has."""

    device = torch.device("cpu")

    def __init__(self, index: int, processes: int) -> None:
        self.process_index, self.num_processes = index, processes

    def autocast(self) -> object:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def test_processes_draw_different_batches():
    """Two processes at step s take draws 2 s and 2 s + 1; nothing is drawn twice."""
    drawn, rows = [], bank(0)

    class Spy:
        """Stands in for a bank and remembers what was drawn."""

        def batch(self, step: int, size: int, seed: int) -> object:
            drawn.append(step)
            return rows.batch(step, size, seed)

    host, options = new_small_host(), replace(TINY, gradient_accumulation=2)
    patch = PATCH_KINDS["control"].from_unet(host.unet, "instruction")
    player, instruction = patch_player(patch, options), torch.zeros(1, 2, 192)
    state = State(patch, fresh_average(patch, 0.9), [player])
    for state.step in range(2):
        for index in range(2):
            run = trainer.Run("test", SafeControlConfig(), host, Spy(), instruction, options, Process(index, 2))
            run._accumulate(player, state, {"patch": patch})
    assert sorted(drawn) == list(range(8))
