"""Every UNet family, as a folder and as a single file: train, save, open, draw, gate, heal, go on after a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, UNetHost, generate, joined, quiet
from safepatch.merging import MergeRecipe
from safepatch.objectives import SafeControlConfig, Turn, match_bundle
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.host import patched_prediction
from safepatch.runtime.apply import apply
from safepatch.training import gates, healing
from safepatch.training.config import TrainConfig, TrainingConfig, load_train_config
from safepatch.training.gates import add_gate
from safepatch.training.healing import heal
from safepatch.training.trainer import train
from tests.families import (
    MASK,
    PHOTO,
    UNETS,
    draw,
    small_family_pipe,
    tokenizer_folder,
    write_original,
)
from tests.small import awaken, new_patch

# diffusers 0.42.1's Euler schedulers turn tensors into arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ROOT = Path(__file__).parents[2]
KINDS = sorted(PATCH_KINDS)
# What costs a run of its own: one kind on each family, and every kind on families with pooled states and without.
OTHERS = {"sd1-inpaint": "lora", "sd2": "lite", "sd2-inpaint": "control"}
OTHERS |= {"sdxl": "control", "sdxl-refiner": "lora", "sdxl-inpaint": "lite"}
PAIRS = [("sd1", "lora"), *OTHERS.items()]
XL = ("sdxl", "sdxl-refiner", "sdxl-inpaint")
# One transformer layer per block, but for the single files, which say that they are whole.
SHALLOW: dict[str, Any] = {name: {"transformer_layers_per_block": 1} for name in XL}
CATEGORY = """
name: {name}
definition: things that are {name}
instruction: "nothing {name}, show something soft instead"
concepts:
  - {{name: a {noun}, replacement: a spoon}}
companions: [a tree]
lookalikes: [a fork]
benign: [a cat, a dog]
pairs: {name}.csv
"""
FEW = (
    "data.pairs=4", "data.steps=2", "training.steps=3", "training.batch_size=2", "training.learning_rate=1e-2",
    "training.joint_rate=1", "training.warmup=1", "training.ema_decay=0.5", "training.log_every=1",
    "training.checkpoint_every=1", "patch.gate=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A folder with two categories that a user has written."""
    folder = tmp_path_factory.mktemp("words")
    for name, noun in {"sharp": "knife", "hot": "flame"}.items():
        (folder / f"{name}.yaml").write_text(CATEGORY.format(name=name, noun=noun))
        (folder / f"{name}.csv").write_text(f"prompt,safe\na {noun} on a plate,a spoon on a plate\n")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates and healing learn from a few rows."""
    few = {"CAPTIONS": 16, "UNSEEN": 8, "STEPS": 3}
    for name, value in few.items():
        monkeypatch.setattr(gates, name, value)
    monkeypatch.setattr(match_bundle, "PROMPTS", 3)
    monkeypatch.setattr(match_bundle, "STEPS", 1)
    monkeypatch.setattr(healing, "CHECKS", 1)


@dataclass
class Base:
    """A model of one family as its user has it, and the patches that were trained on it."""

    family: str
    folder: Path
    words: Path
    size: int = 64
    pipe: Any = None
    patches: dict[str, Path] = field(default_factory=dict)

    def config(self, out: str, *overrides: str, category: str = "sharp") -> TrainConfig:
        """Of a short run on the folder; `overrides` win."""
        own = (f"model={self.folder / 'model'}", f"data.size={self.size}", f"output={self.folder / out}")
        return load_train_config(self.words / f"{category}.yaml", [*FEW, *own, *overrides])

    def patch(self, kind: str) -> PatchArtifact:
        """Trained for three steps, once."""
        if kind not in self.patches:
            config = self.config(kind, f"patch.kind={kind}")
            self.patches[kind] = train(self.pipe, config)
        return PatchArtifact.open(self.patches[kind])

    @property
    def host(self) -> UNetHost:
        return UNetHost(Components.of(self.pipe), self.size)


def new_base(family: str, folder: Path, words: Path) -> Base:
    small_family_pipe(family, **SHALLOW.get(family, {})).save_pretrained(folder / "model")
    base = Base(family, folder, words)
    base.pipe = quiet(base.config("unused").load_model())
    return base


@pytest.fixture(scope="module", params=UNETS)
def base(request, tmp_path_factory, words) -> Base:
    return new_base(request.param, tmp_path_factory.mktemp("base"), words)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory, words) -> Base:
    return new_base("sd1", tmp_path_factory.mktemp("sd1"), words)


def trained(base: Base, kind: str) -> Path:
    """The file of `base.patch(kind)`."""
    base.patch(kind)
    return base.patches[kind]


def logged(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]


def same_tensors(left: PatchArtifact, right: PatchArtifact) -> bool:
    is_same = all(torch.equal(left.tensors[name], tensor) for name, tensor in right.tensors.items())
    return left.tensors.keys() == right.tensors.keys() and is_same


# ---- every family, every kind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_make_a_patch_that_changes_the_picture_and_leaves_no_trace(base, kind):
    before = {name: tensor.clone() for name, tensor in base.pipe.unet.state_dict().items()}
    artifact = base.patch(kind)
    path = base.patches[kind]
    assert verify(path).categories == ("sharp",)
    assert [line["step"] for line in logged(path)] == [1, 2, 3]
    assert all(0 < line["loss"] < float("inf") for line in logged(path)[1:])
    assert not (path.parent / "checkpoint.pt").exists()
    plain = draw(base.pipe)
    with apply(base.pipe, artifact) as handle:
        drawn = draw(base.pipe)
    assert handle.stats.patched_calls == handle.stats.unet_calls > 0
    assert drawn.isfinite().all()
    assert not torch.equal(drawn, plain)
    assert torch.equal(draw(base.pipe), plain)
    after = base.pipe.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not base.pipe.unet.is_gradient_checkpointing


@pytest.mark.parametrize(("base", "kind"), PAIRS, indirect=["base"])
def test_a_gate_is_fitted_on_every_family(base, kind):
    data = DataConfig(pairs=4, steps=1, size=base.size)
    gated = add_gate(base.patch(kind), base.pipe, Corpus.open(base.words / "sharp.yaml"), 4, data)
    assert 0 <= gated.info.config["gate"]["sharp"]["threshold"] <= 1
    assert gated.info.config["layout"]["gate"] == 4
    kept = {name: t for name, t in gated.tensors.items() if ".gate." not in name}
    assert same_tensors(replace(gated, tensors=kept), base.patch(kind))
    plain = draw(base.pipe)
    for threshold, changes in ((0.0, True), (1.0, False)):
        with apply(base.pipe, gated, gate_threshold=threshold):
            assert torch.equal(draw(base.pipe), plain) is not changes


@pytest.mark.parametrize(("base", "kind"), PAIRS, indirect=["base"])
def test_half_precision_trains_a_patch_in_full_precision(base, kind):
    config = base.config(f"half-{kind}", f"patch.kind={kind}", "training.mixed_precision=bf16", "training.steps=1")
    pipe = config.load_model()
    assert pipe.unet.dtype == torch.bfloat16
    path = train(pipe, config)
    half, full = (logged(of)[0]["loss"] for of in (path, trained(base, kind)))
    assert half == pytest.approx(full, rel=0.2, abs=0.02)
    assert half != full  # control: precision was another
    assert all(tensor.isfinite().all() for tensor in PatchArtifact.open(path).tensors.values())


@pytest.mark.parametrize(("base", "kind"), PAIRS, indirect=["base"])
def test_recomputed_activations_train_the_same_patch(base, kind):
    config = base.config(f"again-{kind}", f"patch.kind={kind}", "training.gradient_checkpointing=true")
    again = PatchArtifact.open(train(base.pipe, config))
    assert same_tensors(again, base.patch(kind))
    assert not base.pipe.unet.is_gradient_checkpointing


@dataclass(frozen=True)
class Cut(SafeControlConfig):
    """The objective, stopped in the middle of its third step."""

    def loss(self, *inputs: Any) -> dict[str, Tensor]:
        """The losses, twice."""
        if len(cuts) == 2:
            raise KeyboardInterrupt
        cuts.append(1)
        return super().loss(*inputs)


cuts: list[int] = []


def test_a_stopped_run_ends_in_the_same_file(base):
    config = base.config("cut", "patch.kind=lora")
    cuts.clear()
    with pytest.raises(KeyboardInterrupt):
        train(base.pipe, replace(config, objective=Cut()))
    assert torch.load(Path(config.output) / "checkpoint.pt", weights_only=True)["step"] == 2
    resumed = train(base.pipe, config)
    assert resumed.read_bytes() == trained(base, "lora").read_bytes()


def test_a_merge_is_healed_on_every_family(base, tmp_path):
    other = awaken(from_artifact(base.patch("control"), base.pipe.unet), size=0.02)
    theirs = to_artifact(other, base.pipe.unet, {"hot": "nothing hot, show something soft instead"})
    sources = (str(base.patches["control"]), str(theirs.save(tmp_path / "hot.safetensors")))
    corpora = [Corpus.open(base.words / f"{name}.yaml") for name in ("sharp", "hot")]
    options, data = TrainingConfig(batch_size=4, joint_rate=1.0, warmup=1), DataConfig(size=base.size)
    recipe = MergeRecipe(sources, method="linear", heal=2)
    healed = heal(base.pipe, recipe, tmp_path / "healed.safetensors", corpora, options, data)
    assert verify(tmp_path / "healed.safetensors") == healed.info
    assert healed.info.categories == ("hot", "sharp")
    record = healed.info.recipe["heal"]
    assert record["steps"] == 2
    assert 0 < record["error"] != record["error_before"] > 0
    with apply(base.pipe, healed):
        assert draw(base.pipe).isfinite().all()


# ---- single files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", UNETS)
def test_a_single_file_trains_the_same_patch_as_its_pipeline(family, tmp_path, words):
    base = Base(family, tmp_path, words)
    whole = small_family_pipe(family)
    file = write_original(whole, family, tmp_path / "my.safetensors")
    own = (f"model.path={file}", f"model.tokenizer={tokenizer_folder(tmp_path / 'tokenizer')}", "training.steps=1")
    own += ("data.pairs=2", "training.batch_size=1")
    configs = [base.config(out, *own) for out in ("file", "pipe")]
    pipe = configs[0].load_model()
    assert type(pipe) is type(whole)
    paths = [train(model, config) for model, config in zip((pipe, whole), configs, strict=True)]
    losses = [logged(path)[0]["loss"] for path in paths]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # weights that lie elsewhere in memory are summed otherwise
    ours, theirs = map(PatchArtifact.open, paths)
    assert ours.tensors.keys() == theirs.tensors.keys()
    apart = sum((ours.tensors[name].float() - tensor.float()).square().sum() for name, tensor in theirs.tensors.items())
    assert apart < 0.01 * sum(tensor.float().square().sum() for name, tensor in theirs.tensors.items() if "up" in name)
    assert str(tmp_path) not in json.dumps(ours.info.config)  # nobody's folders


@pytest.mark.slow
def test_a_run_that_was_killed_ends_in_the_same_bytes(tmp_path, words):
    """By the command line, on a single file; killed by the kernel behind a checkpoint, then started again."""
    pipe = small_family_pipe("sd1")
    file = write_original(pipe, "sd1", tmp_path / "my.safetensors")
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    own = (f"model.path={file}", f"model.tokenizer={tokenizer}", "data.size=64", "training.steps=30")
    own += ("training.batch_size=1",)

    def arguments(out: str) -> list[str]:
        return [*FEW, *own, f"output={tmp_path / out}"]

    command = [sys.executable, "-m", "safepatch", "train", str(words / "sharp.yaml"), *arguments("killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert "arning" not in said
    assert not (tmp_path / "killed" / "sharp.safetensors").exists()  # control: it did not get to its end
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr
    config = load_train_config(words / "sharp.yaml", arguments("whole"))
    whole = train(config.load_model(), config)
    assert (tmp_path / "killed" / "sharp.safetensors").read_bytes() == whole.read_bytes()
    assert [line["step"] for line in logged(tmp_path / "killed" / "sharp.safetensors")] == list(range(1, 31))


# ---- what the host draws and is told ---------------------------------------------------------------------------

SEED, STEPS, PROMPT = 5, 2, "a knife next to a cat"


@torch.no_grad()
def pipelines_own(base: Base, **options: Any) -> Tensor:
    """The latents that the family's pipeline makes of one prompt, with DDIM from the last timestep on."""
    pipe, usual = base.pipe, base.pipe.scheduler
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        usual.config, timestep_spacing="trailing", clip_sample=False, thresholding=False
    )
    edge = base.size // 8
    noise = torch.randn(4, edge, edge, generator=torch.Generator().manual_seed(SEED))[None]
    given: dict[str, Any] = {"latents": noise, "num_inference_steps": STEPS, "output_type": "latent"}
    if "Img2Img" not in type(pipe).__name__:
        given |= {"height": base.size, "width": base.size}
    if "Img2Img" in type(pipe).__name__ or "Inpaint" in type(pipe).__name__:
        given |= {"image": PHOTO, "strength": 1.0}
    if "Inpaint" in type(pipe).__name__:
        # What the pipeline would make of a picture that is masked as a whole, were it not drawn at random.
        posterior = pipe.vae.encode(torch.zeros(1, 3, base.size, base.size)).latent_dist
        given |= {"mask_image": MASK, "masked_image_latents": pipe.vae.config.scaling_factor * posterior.mode()}
    try:
        return pipe(PROMPT, **given, **options).images
    finally:
        pipe.scheduler = usual


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_host_draws_what_the_familys_pipeline_draws(base, guidance):
    """Also the refiner, whose pipeline tells negative rows of a lower aesthetic score than others."""
    ours = base.host.draw([PROMPT], [SEED], STEPS, guidance)
    torch.testing.assert_close(ours, pipelines_own(base, guidance_scale=guidance), rtol=0, atol=1e-5)
    assert (ours - base.host.draw([PROMPT], [SEED + 1], STEPS, guidance)).abs().max() > 0.1  # control


def test_every_familys_pipeline_draws_from_noise_by_the_seed(base):
    """Those that change pictures too: they are given none to keep."""
    pipe, seeds = base.pipe, [SEED, SEED + 1]
    first, again = (generate(pipe, [PROMPT, PROMPT], seeds, STEPS) for _ in range(2))
    assert torch.equal(first, again)
    assert first.isfinite().all()
    assert not torch.equal(first[0], first[1])  # control


def test_the_host_reads_what_the_familys_pipeline_reads(base):
    texts = [PROMPT, "", "a dog"]
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    ours, theirs = base.host.encode(texts), base.pipe.encode_prompt(texts, **options)
    for i in (0, 2) if base.family in ("sdxl", "sdxl-inpaint") else range(3):
        torch.testing.assert_close(ours.states[i], theirs[0][i], rtol=0, atol=1e-5)
        if base.family in XL:
            assert ours.pooled is not None
            torch.testing.assert_close(ours.pooled[i], theirs[2][i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", XL)
def test_the_empty_prompt_is_zeros_where_the_pipeline_makes_it_so(family, tmp_path, words):
    host = new_base(family, tmp_path, words).host
    empty, said = host.encode([""]), host.encode(["a cat"])
    for part, other in ((empty.states, said.states), (empty.pooled, said.pooled)):
        assert bool((part == 0).all()) is (family != "sdxl-refiner")
        assert not (other == 0).all()  # control


@pytest.fixture(scope="module", params=XL)
def large(request, tmp_path_factory, words) -> Base:
    return new_base(request.param, tmp_path_factory.mktemp("large"), words)


def test_pooled_states_and_sizes_reach_the_host_and_the_patch(large):
    host, config = large.host, large.config("seen")
    rows = config.objective.prepare(host, Corpus.open(config.category), config.data)
    batch = rows.batch(0, 2, 0)
    patch, instruction = new_patch(host.unet), host.encode(["nothing sharp"]).states
    told: dict[str, dict[str, Tensor]] = {}
    hooks = [
        host.unet.register_forward_pre_hook(
            lambda _, args, given: told.update(host=given["added_cond_kwargs"]), with_kwargs=True
        ),
        patch.register_forward_pre_hook(lambda _, args: told.update(patch=args[4])),
    ]
    turn = Turn(host, patch, instruction, batch, torch.Generator().manual_seed(0))
    right = loss_of(turn)
    for hook in hooks:
        hook.remove()
    asked = joined([batch.unsafe, batch.retain])
    is_empty = (asked.states == host.encode([""]).states).flatten(1).all(1)
    ids = torch.tensor([pipelines_ids(large, empty) for empty in is_empty.tolist()])
    for who in ("host", "patch"):
        assert torch.equal(told[who]["text_embeds"], asked.pooled)
        assert torch.equal(told[who]["time_ids"], ids)
    wrong = replace(batch, unsafe=batch.unsafe._replace(pooled=batch.unsafe.pooled + 1))
    assert loss_of(replace(turn, batch=wrong)) != right  # control
    assert loss_of(turn) == right


def loss_of(turn: Turn) -> float:
    """Of the same noise every time."""
    turn.generator.manual_seed(0)
    return SafeControlConfig().loss(None, turn)["loss"].item()  # type: ignore[arg-type]


def pipelines_ids(base: Base, is_empty: bool) -> list[float]:
    size, score = float(base.size), 2.5 if is_empty else 6.0
    return [size, size, 0.0, 0.0, score] if base.family == "sdxl-refiner" else [size, size, 0.0, 0.0, size, size]


@torch.no_grad()
def test_a_patch_itself_reads_the_pooled_states(large):
    host, patch = large.host, new_patch(large.pipe.unet)
    noisy, times = torch.randn(2, *host.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([9, 99])
    asked, instruction = host.encode([PROMPT, "a dog"]), host.encode(["nothing sharp"]).states
    inputs = (noisy, times, asked.states, instruction)
    other = asked._replace(pooled=asked.pooled + 1)
    right, wrong = (patch(*inputs, host.conditions(some)).mid for some in (asked, other))
    assert not torch.equal(right, wrong)
    patched = patched_prediction(host, patch, noisy, times, asked, instruction)
    assert not torch.equal(patched, host.predict(noisy, times, asked))


def test_noise_is_added_by_the_training_schedule_whatever_the_pipeline_samples_with(base):
    host, schedule = base.host, diffusers.DDPMScheduler.from_config(base.pipe.scheduler.config)
    clean, noise = torch.randn(2, 3, *host.latent_shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0, 500, 999])
    noisy = host.add_noise(clean, noise, times)
    torch.testing.assert_close(noisy, schedule.add_noise(clean, noise, times), rtol=0, atol=1e-5)
    base.pipe.scheduler.set_timesteps(4)  # what drawing leaves behind
    assert torch.equal(host.add_noise(clean, noise, times), noisy)
    prediction = host.from_x0(noisy, times, clean)
    torch.testing.assert_close(host.to_x0(noisy, times, prediction), clean, rtol=0, atol=2e-3)
    truth = schedule.get_velocity(clean, noise, times) if base.family.startswith("sd2") else noise
    torch.testing.assert_close(prediction[1:], truth[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_schedule_that_ends_in_pure_noise_trains(sd1, name):
    """As fine-tunes of zero terminal SNR have it; DDIM's last alpha is 0, and Euler's nearly."""
    kind = getattr(diffusers, name)
    config = sd1.config(f"zero-{name}", "training.steps=1", "patch.kind=control")
    pipe = config.load_model()
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    path = train(pipe, config)
    assert all(tensor.isfinite().all() for tensor in PatchArtifact.open(path).tensors.values())
    host = UNetHost(Components.of(pipe), sd1.size)
    last, clean = torch.tensor([host.steps - 1]), torch.ones(1, *host.latent_shape)
    noise = torch.full_like(clean, 2.0)
    torch.testing.assert_close(host.add_noise(clean, noise, last), noise, rtol=0, atol=1e-3)
    assert host.draw([PROMPT], [SEED], STEPS).isfinite().all()


def test_a_batch_of_prompts_reads_each_alone(base):
    """What training assumes of a frozen host: rows do not see each other."""
    host, texts = base.host, [PROMPT, "a dog"]
    noisy = torch.randn(2, *host.latent_shape, generator=torch.Generator().manual_seed(0))
    times, asked = torch.tensor([100, 900]), host.encode(texts)
    with torch.no_grad():
        both = host.predict(noisy, times, asked)
        second = host.predict(noisy[1:], times[1:], asked.of(slice(1, 2)))
    mistaken = (both[:1] - second).abs().max()  # control: what reading the other row would make
    assert mistaken > 0.1
    assert (both[1:] - second).abs().max() < 1e-3 * mistaken  # a batch rounds otherwise, by how much is the machine's
