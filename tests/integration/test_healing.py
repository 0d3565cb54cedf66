"""Healing, on a small random model: it comes nearer to the bundle, repeats, and leaves the base alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safepatch.artifact.info import BUNDLE, PatchInfo
from safepatch.artifact.patch_artifact import Part, PatchArtifact, verify
from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import Components, Conditioning, UNetHost, noise_pred
from safepatch.errors import BaseMismatch, MergeError, SafepatchError
from safepatch.merging import MergeRecipe, merge, split
from safepatch.objectives import Player, Turn, match_bundle
from safepatch.objectives.match_bundle import MatchBatch, MatchBundle
from safepatch.patch import ControlPatch, Residuals
from safepatch.patch.base import plus
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.runtime.apply import activate, instruction_states
from safepatch.runtime.parts import ActivePart
from safepatch.training import healing, loop
from safepatch.training.healing import OPTIONS, heal
from tests.small import new_patch, new_small_host, new_small_pipe, new_small_unet, rows

NAMES = ("weapons", "gore")
RATE = 1e-3  # of a model this small


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # a run without a place of its own is under runs/
    monkeypatch.setattr(match_bundle, "PROMPTS", 4)
    monkeypatch.setattr(match_bundle, "STEPS", 1)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, ...]:
    """A patch per category, each with a random effect of its own."""
    unet = new_small_unet()
    patches = [new_patch(unet, seed=seed) for seed in range(len(NAMES))]
    made = [
        to_artifact(patch, unet, {name: Corpus.open(name).category.instruction})
        for name, patch in zip(NAMES, patches, strict=True)
    ]
    return tuple(str(a.save(tmp_path / f"{name}.safetensors")) for name, a in zip(NAMES, made, strict=True))


def predictions(components: Components, artifact: PatchArtifact | None) -> torch.Tensor:
    """The host's with the sum over the artifact's parts, on rows that are not healing's."""
    given, total = rows(8, seed=5), None
    for part in artifact.parts() if artifact else ():
        patch = from_artifact(part.artifact, components.unet)
        states = instruction_states(components, list(part.artifact.info.instructions.values()))
        with torch.no_grad():
            down, mid = patch(*given, states)
        made = Residuals(tuple(part.weight * r for r in down), part.weight * mid)
        total = plus(total, made) if total else made
    with torch.no_grad():
        return noise_pred(components.unet, *given, total)


def error(components: Components, made: PatchArtifact, target: PatchArtifact) -> float:
    """0 when both make the host predict the same, 1 when `made` does nothing."""
    m, t, plain = (predictions(components, artifact) for artifact in (made, target, None))
    return ((m - t).square().sum() / (t - plain).square().sum()).item()


def test_healing_comes_nearer_to_the_bundle(tmp_path: Path, pair: tuple[str, ...]) -> None:
    pipe, out = new_small_pipe(), tmp_path / "healed.safetensors"
    healed = heal(pipe, MergeRecipe(pair, (1.0, 0.5), "linear", heal=160, heal_rate=RATE), out)
    bundle, unhealed = (merge(pair, method=method, weights=(1.0, 0.5)) for method in (BUNDLE, "linear"))
    before, after = (error(Components.of(pipe), artifact, bundle) for artifact in (unhealed, healed))
    assert before > 0.05  # control: the merge alone is not the bundle
    assert after < before / 2
    record = healed.info.recipe["heal"]
    assert record["error"] < record["error_before"] / 2
    assert verify(out) == healed.info


def gated(path: str, threshold: float) -> str:
    """The patch with a fresh gate that opens from `threshold`, beside it."""
    artifact, unet = PatchArtifact.open(path), new_small_unet()
    patch = from_artifact(artifact, unet)
    patch.add_gate(unet, 4)
    made = to_artifact(patch, unet, artifact.info.instructions)
    gates = {name: {"threshold": threshold} for name in artifact.info.categories}
    made = replace(made, info=replace(made.info, config={**made.info.config, "gate": gates}))
    return str(made.save(path.replace(".safetensors", "-gated.safetensors")))


def test_behind_gates_a_prompts_teachers_are_those_that_open(pair: tuple[str, ...]) -> None:
    pipe, (weapons, gore) = new_small_pipe(), (PatchArtifact.open(path) for path in pair)
    sources = (gated(pair[0], threshold=0.0), gated(pair[1], threshold=0.999))  # gore's never opens
    healed = heal(pipe, MergeRecipe(sources, method="linear", heal=80, heal_rate=RATE))
    components, unhealed = Components.of(pipe), merge(sources, method="linear")
    missed = error(components, healed, weapons)
    assert missed < 0.6 * error(components, unhealed, weapons)
    for other in (merge(pair), gore):  # control: what both teach, and what the silent one does, is something else
        assert missed < 0.8 * error(components, healed, other)
    assert healed.info.config["gate"] == {"gore": {"threshold": 0.999}, "weapons": {"threshold": 0.0}}
    assert healed.info.config["layout"] == {"gate": 4, "gates": 2}


def test_a_narrower_dtype_leaves_the_gates_alone(pair: tuple[str, ...]) -> None:
    sources = tuple(gated(path, threshold=0.0) for path in pair)
    healed = heal(new_small_pipe(), MergeRecipe(sources, method="linear", dtype="bfloat16", heal=1))
    merged = merge(sources, method="linear", dtype="bfloat16")
    gates = [name for name in merged.tensors if ".gate." in name]
    assert gates
    assert all(torch.equal(healed.tensors[name], merged.tensors[name]) for name in gates)
    assert all(healed.tensors[name].dtype == tensor.dtype for name, tensor in merged.tensors.items())
    rounded = [merged.tensors[name].bfloat16().to(merged.tensors[name].dtype) for name in gates]
    assert not all(torch.equal(r, merged.tensors[name]) for r, name in zip(rounded, gates, strict=True))  # control


def test_low_rank_sources_heal_into_a_dense_patch(pair: tuple[str, ...]) -> None:
    for path in pair:
        PatchArtifact.open(path).compress(2).save(path)
    recipe = MergeRecipe(pair, method="linear", heal=1, dtype="float16")
    assert merge(replace(recipe, heal=0)).info.shapes  # control: the merge alone keeps factors
    healed = heal(new_small_pipe(), recipe)
    assert not healed.info.shapes
    assert {tensor.dtype for tensor in healed.tensors.values()} == {torch.float16}


def active(host: UNetHost, artifact: PatchArtifact) -> ActivePart:
    return activate(Part(1.0, artifact), host.components, dtype=torch.float32)


def test_error_of_nothing_is_one_and_of_the_same_is_zero(pair: tuple[str, ...]) -> None:
    host, (artifact, other) = new_small_host(), map(PatchArtifact.open, pair)
    source = active(host, artifact)
    objective = MatchBundle(source, [source], artifact.content_hash)
    latents, _, states = rows(4)
    batch = MatchBatch(latents, Conditioning(states))

    def loss(patch: torch.nn.Module) -> float:
        seeded = torch.Generator().manual_seed(0)
        turn = Turn(host, patch, source.instruction_states, batch, seeded)
        return objective.loss(Player("patch", patch, None), turn)["loss"].item()  # type: ignore[arg-type]

    assert loss(source.patch) == 0
    assert loss(ControlPatch.from_unet(host.unet)) == pytest.approx(1)
    assert loss(active(host, other).patch) > 0.1  # control


def test_healing_sees_what_the_bundle_makes_of_unsafe_prompts(pair: tuple[str, ...]) -> None:
    host, n = new_small_host(), len(NAMES) * match_bundle.PROMPTS
    corpora = [Corpus.open(name) for name in NAMES]

    def drawn(weight: float) -> match_bundle.MatchRows:
        bundle = merge(pair, weights=(weight, weight))
        sources = [activate(part, host.components, dtype=torch.float32) for part in bundle.parts()]
        return MatchBundle(sources[0], sources, bundle.content_hash).prepare(host, corpora, DataConfig())

    (bank, idle), unsafe = (drawn(weight) for weight in (1.0, 1e-9)), torch.arange(n)
    assert len(bank.corrected) == n
    assert len(bank.latents) == 2 * n  # there is no gate, so what must stay is there too
    assert not torch.equal(bank.corrected[unsafe], bank.latents[unsafe])
    torch.testing.assert_close(idle.corrected[unsafe], idle.latents[unsafe])  # control: a bundle that does nothing
    assert torch.equal(idle.latents[unsafe], bank.latents[unsafe])


def test_gates_that_never_open_teach_nothing(pair: tuple[str, ...]) -> None:
    sources = tuple(gated(path, threshold=0.999) for path in pair)
    with pytest.raises(MergeError, match="gates open for none of their own prompts"):
        heal(new_small_pipe(), MergeRecipe(sources, method="linear", heal=2))


def test_a_recipes_own_place_gets_the_healed_patch(tmp_path: Path, pair: tuple[str, ...]) -> None:
    out = tmp_path / "new" / "healed.safetensors"
    healed = heal(new_small_pipe(), MergeRecipe(pair, method="linear", heal=1, out=str(out)))
    assert PatchArtifact.open(out).content_hash == healed.content_hash


def test_without_a_place_every_healing_has_a_folder_of_its_own(tmp_path: Path, pair: tuple[str, ...]) -> None:
    for steps in (1, 2, 1):
        heal(new_small_pipe(), MergeRecipe(pair, method="linear", heal=steps))
    folders = sorted((tmp_path / "runs" / "heal").iterdir())
    assert len(folders) == 2
    kept = [json.loads((folder / "config.json").read_text())["recipe"]["heal"] for folder in folders]
    assert sorted(kept) == [1, 2]


def test_what_is_healed_is_one_patch_for_all_categories(pair: tuple[str, ...]) -> None:
    healed = heal(new_small_pipe(), MergeRecipe(pair, method="linear", dtype="float16", heal=1))
    unhealed = merge(pair, method="linear", dtype="float16")
    assert len(healed.parts()) == 1
    assert healed.info.categories == ("gore", "weapons")
    assert healed.tensors.keys() == unhealed.tensors.keys()
    assert healed.dtype == torch.float16
    assert {**healed.info.recipe, "heal": None} == {**unhealed.info.recipe, "heal": None}
    with pytest.raises(MergeError, match="mixes its parts"):
        split(healed, "gore")


def test_a_seed_gives_one_file_and_another_seed_another(pair: tuple[str, ...]) -> None:
    pipe = new_small_pipe()
    first, again, other = (
        heal(pipe, MergeRecipe(pair, method="linear", seed=seed, heal=2)).content_hash for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_base_is_left_as_it_was(pair: tuple[str, ...]) -> None:
    pipe = new_small_pipe()
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    heal(pipe, MergeRecipe(pair, method="linear", heal=2))
    after = pipe.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not pipe.unet._forward_pre_hooks


# ---- a run like every other --------------------------------------------------------------------------------------


def test_a_run_is_logged_beside_the_patch(tmp_path: Path, pair: tuple[str, ...]) -> None:
    out = tmp_path / "healed.safetensors"
    heal(new_small_pipe(), MergeRecipe(pair, method="linear", heal=3), out, options=replace(OPTIONS, log_every=1))
    lines = [json.loads(line) for line in (tmp_path / "healed.heal" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 for line in lines)
    assert json.loads((tmp_path / "healed.heal" / "config.json").read_text())["recipe"]["heal"] == 3
    assert not (tmp_path / "healed.heal" / "checkpoint.pt").exists()


def test_an_interrupted_healing_ends_in_the_same_file(
    tmp_path: Path, pair: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, recipe = replace(OPTIONS, checkpoint_every=1), MergeRecipe(pair, method="linear", heal=4)
    whole = heal(new_small_pipe(), recipe, tmp_path / "whole.safetensors", options=options)
    note = loop.Writer.note

    def cut(writer: loop.Writer, losses: dict, stop: bool) -> None:
        note(writer, losses, stop)
        if writer.state.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop.Writer, "note", cut)
        with pytest.raises(KeyboardInterrupt):
            heal(new_small_pipe(), recipe, tmp_path / "cut.safetensors", options=options)
    assert torch.load(tmp_path / "cut.heal" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "cut.safetensors").exists()  # control: it did not get to its end
    resumed = heal(new_small_pipe(), recipe, tmp_path / "cut.safetensors", options=options)
    assert resumed.content_hash == whole.content_hash
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_checkpoint_of_other_sources_or_another_model_or_words_is_refused(
    tmp_path: Path, pair: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "healed.safetensors", replace(OPTIONS, checkpoint_every=1)
    recipe = MergeRecipe(pair, method="linear", heal=2)
    with monkeypatch.context() as patched:
        patched.setattr(healing, "_packed", lambda *_: pytest.fail("as if killed here"))
        with pytest.raises(pytest.fail.Exception):
            heal(new_small_pipe(), recipe, out, options=options)

    def refused(recipe: MergeRecipe, pipe: Any = None, corpora: Sequence[Corpus] = ()) -> None:
        with pytest.raises(SafepatchError, match="holds the checkpoint of another configuration"):
            heal(pipe or new_small_pipe(), recipe, out, corpora, options)

    refused(replace(recipe, weights=(1.0, 0.5)))
    another = new_small_pipe()
    with torch.no_grad():
        another.unet.conv_in.bias += 0.1
    refused(recipe, another)
    refused(recipe, corpora=[Corpus(Corpus.open(name).category, [("a", "b")]) for name in NAMES])
    own = Path(pair[0]).read_bytes()
    PatchArtifact.open(pair[0]).astype(torch.bfloat16).save(pair[0])  # another patch in the old one's place
    refused(recipe)
    Path(pair[0]).write_bytes(own)
    heal(new_small_pipe(), recipe, out, options=options)  # control: its own goes on


@pytest.mark.parametrize("is_gated", [False, True])
def test_a_model_in_half_precision_is_healed_too(tmp_path: Path, pair: tuple[str, ...], is_gated: bool) -> None:
    sources = tuple(gated(path, threshold=0.0) for path in pair) if is_gated else pair
    pipe = new_small_pipe().to(torch.bfloat16)
    recipe = MergeRecipe(sources, method="linear", heal=2)
    half = heal(pipe, recipe, tmp_path / "h.safetensors", options=replace(OPTIONS, mixed_precision="bf16"))
    full = heal(new_small_pipe(), recipe, tmp_path / "f.safetensors")
    assert half.dtype == full.dtype
    assert half.info.recipe["heal"]["error_before"] == pytest.approx(full.info.recipe["heal"]["error_before"], rel=0.2)
    assert half.content_hash != full.content_hash  # control: precision was another


def test_words_of_ones_own_and_pictures_of_ones_own_size(tmp_path: Path, pair: tuple[str, ...]) -> None:
    corpora = [
        Corpus(Corpus.open(name).category, pairs=[(Prompt(f"something {name}"), Prompt("a cat"))]) for name in NAMES
    ]
    pipe, seen = new_small_pipe(), []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    heal(
        pipe, MergeRecipe(pair, method="linear", heal=1), tmp_path / "h.safetensors", corpora, data=DataConfig(size=32)
    )
    hook.remove()
    assert set(seen) == {(8, 8)}


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "bundle", "heal": 5}, "bundle loses nothing that could be healed"),
        ({"method": "cat", "heal": 5}, "cat loses nothing that could be healed"),
        ({"method": "linear", "heal": -1}, "heal is -1; give a number of training steps"),
    ],
)
def test_a_recipe_that_cannot_be_healed(options: dict, says: str) -> None:
    with pytest.raises(MergeError, match=says) as caught:
        MergeRecipe(("a", "b"), **options)
    assert "\n" not in str(caught.value)


def test_merging_alone_says_what_healing_needs(pair: tuple[str, ...]) -> None:
    with pytest.raises(MergeError, match=r"needs the base model; call safepatch\.heal"):
        merge(pair, method="linear", heal=5)


def test_only_control_patches_are_healed(tmp_path: Path) -> None:
    info = PatchInfo("lora", {"gore": "no gore"}, {"layers": 2}, {"family": "tiny"}, {"sees": "prompt"})
    paths = [
        PatchArtifact({"a.delta": torch.tensor([i])}, info).save(tmp_path / f"{i}.safetensors") for i in (1.0, 2.0)
    ]
    with pytest.raises(MergeError, match="only control patches can be healed, these are lora"):
        heal(new_small_pipe(), MergeRecipe(tuple(map(str, paths)), method="linear", heal=5))


def test_another_architecture_and_a_bad_place_are_told_before_training(pair: tuple[str, ...]) -> None:
    other = new_small_pipe(new_small_unet(block_out_channels=(16, 32, 64)))
    with pytest.raises(BaseMismatch, match="block_out_channels"):
        heal(other, MergeRecipe(pair, method="linear", heal=10**9))
    with pytest.raises(MergeError, match="is one of the patches to merge"):
        heal(new_small_pipe(), MergeRecipe(pair, method="linear", heal=10**9), pair[0])
