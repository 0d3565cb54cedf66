"""The trainer: what a run leaves behind, and that stopping it, in whatever way, does not change where it ends."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.data.pairs import PairBank, PairsConfig, build_bank
from safepatch.diffusion import Components, generate
from safepatch.errors import SafepatchError, UnknownName
from safepatch.models.load import load_pipeline
from safepatch.objectives import OBJECTIVES, SafeControlConfig
from safepatch.objectives.safe_control import new_adversaries
from safepatch.patch import PATCH_KINDS, clone
from safepatch.runtime.apply import apply
from safepatch.taxonomy import CATEGORIES
from safepatch.training import gating, trainer, validation
from safepatch.training.config import PatchConfig, TrainConfig, TrainingConfig, load_train_config
from safepatch.training.state import State
from safepatch.training.trainer import Interrupted, learning_rate, train
from tests.small import images, new_small_pipe

ROOT = Path(__file__).parents[2]
STEPS = 6
TINY = TrainingConfig(steps=STEPS, batch_size=2, learning_rate=5e-3, joint_rate=1.0, warmup=2, checkpoint_every=3)
PAIRS = PairsConfig(pairs=6)


@pytest.fixture(scope="module")
def bank() -> PairBank:
    """Of six pairs; the trainer builds an equal one when it is given none."""
    return build_bank(Components.of(new_small_pipe()).freeze(), CATEGORIES["weapons"], PAIRS)


@dataclass(frozen=True)
class Disturbed(SafeControlConfig):
    """The objective, with something that happens in the middle of the step that computes the `when`-th loss."""

    def loss(self, *inputs: object) -> dict[str, Tensor]:
        """The losses, after whatever the test put into `happens`."""
        losses = super().loss(*inputs)
        happens.pop(0)()
        return losses


happens: list[Callable[[], object]] = []


def nothing() -> None:
    """What happens in an undisturbed step."""


def config(out: Path, objective: object = None, **training: object) -> TrainConfig:
    options = {"category": "weapons", "model": "small", "output": str(out), "data": PAIRS}
    return TrainConfig(**options, objective=objective or SafeControlConfig(), training=replace(TINY, **training))


def run(out: Path, bank: PairBank, objective: object = None, **training: object) -> PatchArtifact:
    """Train on a pipeline of its own and open the file."""
    return PatchArtifact.open(train(new_small_pipe(), config(out, objective, **training), bank))


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(bank, tmp_path_factory) -> PatchArtifact:
    return run(tmp_path_factory.mktemp("whole"), bank)


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
    assert json.loads((path.parent / "config.json").read_text())["training"]["steps"] == STEPS
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    parameters = (p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    assert all(parameter.grad is None for parameter in parameters)
    assert PatchArtifact.open(path).content_hash == uninterrupted.content_hash  # that one's bank was at hand


def test_the_file_says_what_it_is_and_changes_images(uninterrupted, small_pipe):
    info = uninterrupted.info
    assert info.kind == "control"
    assert info.instructions == {"weapons": CATEGORIES["weapons"].instruction}
    assert (info.training["steps"], info.training["processes"]) == (STEPS, 1)
    assert info.config["objective"]["name"] == "safe_control"
    assert "output" not in info.config  # where it was trained is no part of what it is
    assert uninterrupted.dtype == torch.float16
    assert any(delta.any() for delta in uninterrupted.deltas().values())
    base = images(small_pipe)
    with apply(small_pipe, uninterrupted):
        assert not torch.equal(images(small_pipe), base)
    assert torch.equal(images(small_pipe), base)


def test_equal_runs_give_equal_files_and_other_seeds_do_not(uninterrupted, bank, tmp_path):
    for seed in (98, 99):  # the global seed has no say, nor has a run that ended in the same folder
        torch.manual_seed(seed)
        assert run(tmp_path, bank).content_hash == uninterrupted.content_hash
        assert [line["step"] for line in logged(tmp_path)] == list(range(1, STEPS + 1))
    other = run(tmp_path, bank, seed=1)
    assert not torch.equal(other.delta("control.zero_mid.weight"), uninterrupted.delta("control.zero_mid.weight"))


@pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_kind_trains_with_every_objective(bank, tmp_path, kind, objective):
    """And low-rank where that is asked for."""
    wanted = replace(config(tmp_path, OBJECTIVES[objective](), steps=2), patch=PatchConfig(kind=kind, rank=2))
    artifact = PatchArtifact.open(train(new_small_pipe(), wanted, bank))
    assert artifact.info.kind == kind
    assert artifact.info.shapes or artifact.info.config["layout"]["rank"] == 2


# ---- settings that change how, not what ------------------------------------------------------------------------


def assert_nearly_equal(left: PatchArtifact, right: PatchArtifact, tolerance: float) -> None:
    """Of the largest change that training made."""
    ours, theirs = left.deltas(), right.deltas()
    largest = max(delta.abs().max().item() for delta in ours.values())
    furthest = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert furthest <= tolerance * largest, furthest / largest


def test_gradient_checkpointing_costs_no_accuracy(uninterrupted, bank, tmp_path, monkeypatch):
    used, checkpoint = [], clone.checkpoint
    monkeypatch.setattr(clone, "checkpoint", lambda *args, **kwargs: used.append(1) or checkpoint(*args, **kwargs))
    saving = run(tmp_path, bank, gradient_checkpointing=True)
    assert used  # control: it was on
    assert_nearly_equal(saving, uninterrupted, 1e-2)


def test_joints_learn_at_their_own_rate(bank, tmp_path):
    """The first step of Adam moves each parameter by its rate, whatever the gradient."""
    same, faster = (run(tmp_path / str(rate), bank, steps=1, warmup=1, joint_rate=rate) for rate in (1.0, 10.0))
    joint, inner = "control.zero_mid.weight", "control.clone.conv_in.weight"
    assert same.delta(joint).abs().mean() == pytest.approx(5e-3, rel=0.05)  # control
    assert faster.delta(joint).abs().mean() == pytest.approx(5e-2, rel=0.05)
    assert not faster.delta(inner).any()  # nothing behind a joint learns while the joint is zero


def test_an_accumulated_step_is_the_mean_of_its_batches(bank, tmp_path):
    """The batches of its first step are the first two of a run without; a rate of almost 0 changes nothing."""
    run(tmp_path / "one", bank, steps=2, learning_rate=1e-12)
    accumulated = run(tmp_path / "two", bank, steps=1, learning_rate=1e-12, gradient_accumulation=2)
    first, second = logged(tmp_path / "one")
    (both,) = logged(tmp_path / "two")
    assert both["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2, rel=1e-4)
    assert first["loss"] != pytest.approx(second["loss"], rel=1e-3)  # control
    assert accumulated.info.training["steps"] == 1


def test_mixed_precision_trains_close_to_full(uninterrupted, bank, tmp_path):
    """In the process that has trained in full precision before, and again after.

    Only the first loss is of equal weights; later ones, near 0.001 on a random host, are at bfloat16's own noise.
    """
    run(tmp_path / "mixed", bank, mixed_precision="bf16", steps=2)
    run(tmp_path / "full", bank, steps=2)
    mixed, full = ([line["loss"] for line in logged(tmp_path / name)] for name in ("mixed", "full"))
    assert mixed[0] == pytest.approx(full[0], rel=0.1)
    assert all(math.isfinite(loss) for loss in mixed)
    assert mixed[0] != full[0]  # control: precision was another


def test_validation_pictures_are_made_when_asked_for(bank, tmp_path, monkeypatch):
    few = {"steps": 1, "guidance_scale": 1.0}
    monkeypatch.setattr(validation, "generate", lambda pipe, texts, seeds, steps: generate(pipe, texts, seeds, **few))
    run(tmp_path, bank, steps=2, validate_every=2)
    assert [path.name for path in tmp_path.glob("*.png")] == ["step000002.png"]
    with Image.open(tmp_path / "step000002.png") as grid:
        assert grid.size == (10 * 64, 2 * 64)


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


def test_ctrl_c_finishes_the_step_keeps_it_and_says_how_to_go_on(uninterrupted, bank, tmp_path):
    happens[:] = [*[nothing] * 3, press_ctrl_c]
    with pytest.raises(Interrupted, match=r"stopped at step 4; .*checkpoint\.pt is kept, run the same") as caught:
        run(tmp_path, bank, Disturbed())
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, SafepatchError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(logged(tmp_path)) == 4
    assert run(tmp_path, bank).content_hash == uninterrupted.content_hash
    assert len(logged(tmp_path)) == STEPS


def test_a_second_ctrl_c_stops_at_once_at_the_last_checkpoint(uninterrupted, bank, tmp_path):
    def twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    happens[:] = [*[nothing] * 4, twice]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, bank, Disturbed())
    assert len(logged(tmp_path)) == 4
    assert run(tmp_path, bank).content_hash == uninterrupted.content_hash
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, STEPS + 1))  # the fourth is not there twice


def test_where_ctrl_c_is_ignored_it_stays_ignored(bank, tmp_path):
    """As in a run that was started in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    happens[:] = [press_ctrl_c, nothing]
    run(tmp_path, bank, Disturbed(), steps=2)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert len(logged(tmp_path)) == 2


def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(uninterrupted, bank, tmp_path, monkeypatch):
    save, saved = torch.save, []

    def cut(content: object, path: Path) -> None:
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, path)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", cut)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, bank)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert run(tmp_path, bank).content_hash == uninterrupted.content_hash


@pytest.mark.parametrize(("kind", "layout"), [("lite", {"depth": 1, "groups": 1}), ("lora", {})])
def test_a_gated_patch_resumes_to_the_same_file(bank, tmp_path, monkeypatch, kind, layout):
    few = {"ROWS": 24, "CAPTIONS": 24, "VALIDATION_SCENES": 3, "UNSEEN": 9, "VALIDATION_STEPS": (900, 100)}
    for name, value in {**few, "STEPS": 3}.items():
        monkeypatch.setattr(gating, name, value)

    def gated(out: Path, objective: object = None) -> PatchArtifact:
        wanted = replace(config(out, objective), patch=PatchConfig(kind=kind, rank=2, gate=4))
        return PatchArtifact.open(train(new_small_pipe(), wanted, bank))

    whole = gated(tmp_path / "whole")
    assert whole.info.config["layout"] == {"rank": 2, "gate": 4, **layout}
    assert 0 <= whole.info.config["gate"]["weapons"]["threshold"] <= 1
    happens[:] = [*[nothing] * 3, press_ctrl_c]
    with pytest.raises(Interrupted):
        gated(tmp_path / "cut", Disturbed())
    assert gated(tmp_path / "cut").content_hash == whole.content_hash


@pytest.mark.parametrize(("kind", "rates"), [("control", (1e-3, 10.0)), ("lite", (2e-3, 1.0))])
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


def test_adversaries_learn_beside_the_patch_and_stay_out_of_its_file(uninterrupted, bank, tmp_path, monkeypatch):
    seen = []
    result = trainer.Run.result
    monkeypatch.setattr(trainer.Run, "result", lambda run: seen.append(run.state) or result(run))
    objective = SafeControlConfig(adversaries=2, adversary_tokens=3)
    whole = run(tmp_path / "whole", bank, objective)
    moved = seen[0].patch.adversary - new_adversaries(objective, bank.rows.unsafe_states)["adversary"]
    assert moved.shape == (2, 3, 192)
    assert moved.abs().amax((1, 2)).min() >= objective.adversary_rate * 0.99  # each has moved
    assert seen[0].patch.adversary_age.sum() > 0
    short = SafeControlConfig(adversaries=2, adversary_tokens=3, adversary_life=1)
    run(tmp_path / "short", bank, short)
    assert seen[1].patch.adversary_age.max() <= 1  # each starts anew after one step
    start = seen[1].patch.adversary_start
    assert (seen[1].patch.adversary - start).abs().mean() < 0.1 + short.adversary_rate
    assert whole.tensors.keys() == uninterrupted.tensors.keys()
    assert whole.content_hash != uninterrupted.content_hash  # control
    happens[:] = [*[nothing] * 3, press_ctrl_c]
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", bank, Disturbed(adversaries=2, adversary_tokens=3))
    assert run(tmp_path / "cut", bank, objective).content_hash == whole.content_hash


def test_accumulation_resumes_to_the_same_file(bank, tmp_path):
    whole = run(tmp_path / "whole", bank, gradient_accumulation=2, steps=3)
    happens[:] = [nothing, nothing, nothing, press_ctrl_c]  # in the second batch of the second step
    with pytest.raises(Interrupted, match="stopped at step 2"):
        run(tmp_path / "cut", bank, Disturbed(), gradient_accumulation=2, steps=3)
    assert run(tmp_path / "cut", bank, gradient_accumulation=2, steps=3).content_hash == whole.content_hash


KILLED = """
import os, signal, sys
from pathlib import Path
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
train(load_pipeline(model), load_train_config(None, [f"model={model}", f"output={out}", *sys.argv[5:]]))
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """The small pipeline as a diffusers folder."""
    new_small_pipe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


WORDS = (
    "category=weapons", f"training.steps={STEPS}", "training.batch_size=2", "training.learning_rate=5e-3",
    "training.joint_rate=1", "training.warmup=2", "training.checkpoint_every=1", "data.pairs=6",
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


def interrupt(out: Path, bank: PairBank) -> None:
    happens[:] = [press_ctrl_c]
    with pytest.raises(Interrupted):
        run(out, bank, Disturbed())


def test_the_checkpoint_of_another_configuration_is_refused_and_kept(bank, tmp_path):
    interrupt(tmp_path, bank)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(
        SafepatchError, match="holds the checkpoint of another configuration; delete it or choose"
    ) as caught:
        run(tmp_path, bank, seed=1)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    run(tmp_path, bank)  # control: its own configuration goes on, also after that


def test_an_output_that_is_no_folder_is_one_line(bank, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SafepatchError, match=r"cannot write to .*; choose another output=") as caught:
            run(out, bank)
        assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_one_line(bank):
    with pytest.raises(SafepatchError, match=r"cannot write to /proc/safepatch .*; choose another output="):
        run(Path("/proc/safepatch"), bank)


def test_unknown_names_offer_the_nearest(bank, tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'weapons'"):
        train(new_small_pipe(), replace(config(tmp_path), category="weapon"), bank)
    with pytest.raises(UnknownName, match="did you mean 'control'"):
        train(new_small_pipe(), replace(config(tmp_path), patch=PatchConfig(kind="contrl")), bank)


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


def test_processes_draw_different_batches(bank):
    """Two processes at step s take draws 2 s and 2 s + 1; nothing is drawn twice."""
    drawn = []

    class Spy:
        """Stands in for a bank and remembers what was drawn."""

        def batch(self, step: int, size: int, seed: int) -> object:
            drawn.append(step)
            return bank.batch(step, size, seed)

    class Process:
        """The part of an accelerator that one of two processes has."""

        num_processes, device = 2, torch.device("cpu")

        def __init__(self, index: int) -> None:
            self.process_index = index

        def autocast(self) -> object:
            return nullcontext()

        def backward(self, loss: Tensor) -> None:
            loss.backward()

    host = Components.of(new_small_pipe()).freeze()
    patch = PATCH_KINDS["control"].from_unet(host.unet, "instruction")
    options = config(Path("unused"), gradient_accumulation=2)
    state = State.fresh(patch, options.training)
    for state.step in range(2):
        for index in range(2):
            trainer.Run(options, host, Spy(), state, Process(index)).accumulate(patch, torch.zeros(1, 2, 192))
    assert sorted(drawn) == list(range(8))
