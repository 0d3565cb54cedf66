"""Healing, on a small random model: it comes nearer to the bundle, repeats, and leaves the base alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safepatch.artifact.info import BUNDLE, PatchInfo
from safepatch.artifact.patch_artifact import Part, PatchArtifact, verify
from safepatch.diffusion import noise_pred
from safepatch.errors import BaseMismatch, MergeError
from safepatch.merging import MergeRecipe, merge, split
from safepatch.patch import ControlPatch, Residuals
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.runtime.apply import activate, instruction_states
from safepatch.runtime.residuals import plus
from safepatch.taxonomy import CATEGORIES
from safepatch.training import healing
from safepatch.training.healing import Components, Rows, draw_bank, heal, relative_error
from tests.small import new_patch, new_small_pipe, new_small_unet, rows

NAMES = ("weapons", "gore")


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "PROMPTS", 4)
    monkeypatch.setattr(healing, "TRAJECTORY", 1)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, ...]:
    """A patch per category, each with a random effect of its own."""
    unet = new_small_unet()
    patches = [new_patch(unet, seed=seed) for seed in range(len(NAMES))]
    made = [
        to_artifact(patch, unet, {name: CATEGORIES[name].instruction})
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
    healed = heal(pipe, MergeRecipe(pair, (1.0, 0.5), "linear", heal=160), out)
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
    sources = (gated(pair[0], threshold=0.0), gated(pair[1], threshold=1.0))  # gore's never opens
    healed = heal(pipe, MergeRecipe(sources, method="linear", heal=80))
    components, unhealed = Components.of(pipe), merge(sources, method="linear")
    missed = error(components, healed, weapons)
    assert missed < 0.6 * error(components, unhealed, weapons)
    for other in (merge(pair), gore):  # control: what both teach, and what the silent one does, is something else
        assert missed < 0.8 * error(components, healed, other)
    assert healed.info.config["gate"] == {"gore": {"threshold": 1.0}, "weapons": {"threshold": 0.0}}
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


def test_error_of_nothing_is_one_and_of_the_same_is_zero(pair: tuple[str, ...]) -> None:
    components = Components.of(new_small_pipe())
    source = activate(Part(1.0, PatchArtifact.open(pair[0])), components, dtype=torch.float32)
    silent = source._replace(patch=ControlPatch.from_unet(components.unet))
    given = Rows(*rows(4))
    assert relative_error(source, [source], components, given).item() == 0
    assert relative_error(silent, [source], components, given).item() == pytest.approx(1)


def test_healing_sees_what_the_bundle_makes_of_unsafe_prompts(pair: tuple[str, ...]) -> None:
    pipe, n = new_small_pipe(), len(NAMES) * healing.PROMPTS
    bank, idle = (draw_bank(pipe, merge(pair, weights=weights), seed=0) for weights in ((1, 1), (0, 0)))
    assert bank.corrected.shape == bank.latents[:n].shape
    assert not torch.equal(bank.corrected, bank.latents[:n])
    assert torch.equal(idle.corrected, idle.latents[:n])  # control: a bundle that does nothing
    assert torch.equal(idle.latents, bank.latents)


def test_gates_that_never_open_teach_nothing(pair: tuple[str, ...]) -> None:
    sources = tuple(gated(path, threshold=1.0) for path in pair)
    with pytest.raises(MergeError, match="gates open for none of their own prompts"):
        heal(new_small_pipe(), MergeRecipe(sources, method="linear", heal=2))


def test_a_recipes_own_place_gets_the_healed_patch(tmp_path: Path, pair: tuple[str, ...]) -> None:
    out = tmp_path / "new" / "healed.safetensors"
    healed = heal(new_small_pipe(), MergeRecipe(pair, method="linear", heal=1, out=str(out)))
    assert PatchArtifact.open(out).content_hash == healed.content_hash


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
    paths = [PatchArtifact({"a.delta": torch.ones(i)}, info).save(tmp_path / f"{i}.safetensors") for i in (1, 1)]
    with pytest.raises(MergeError, match="only control patches can be healed, these are lora"):
        heal(new_small_pipe(), MergeRecipe(tuple(map(str, paths)), method="linear", heal=5))


def test_another_architecture_and_a_bad_place_are_told_before_training(pair: tuple[str, ...]) -> None:
    other = new_small_pipe(new_small_unet(block_out_channels=(16, 32, 64)))
    with pytest.raises(BaseMismatch, match="block_out_channels"):
        heal(other, MergeRecipe(pair, method="linear", heal=10**9))
    with pytest.raises(MergeError, match="is one of the patches to merge"):
        heal(new_small_pipe(), MergeRecipe(pair, method="linear", heal=10**9), pair[0])
