"""Lite patches side by side: the merged file computes the sum, category by category, and gives every part back."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safepatch.artifact.info import BUNDLE
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.errors import ConfigError, MergeError
from safepatch.merging import merge, split
from safepatch.patch import Features, LitePatch, Residuals
from safepatch.patch.control import skip_channels
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.runtime.apply import apply
from tests.small import DOWN, MID, awaken, new_artifact, new_small_unet, rows, same_residuals, spied

INSTRUCTIONS = {"weapons": "no weapons, show tools", "gore": "no gore", "drugs": "no drugs, show sweets instead"}
RANKS = {"weapons": 4, "gore": 3, "drugs": 6}
UNET = new_small_unet()


def lite(category: str, rank: int | None = None, depth: int = 1) -> PatchArtifact:
    """An awake lite patch for one category, of a rank of its own."""
    seed = sorted(RANKS).index(category)
    patch = LitePatch.from_unet(UNET, rank=rank or RANKS[category], depth=depth)
    return to_artifact(awaken(patch, seed, 0.3), UNET, {category: INSTRUCTIONS[category]})


def saved(folder: Path, *categories: str) -> list[Path]:
    return [lite(category).save(folder / f"{category}.safetensors") for category in categories]


@torch.no_grad()
def residuals(pipe, patch: PatchArtifact | Path, **options) -> tuple[Tensor, ...]:
    """What the patch adds to the pipeline's UNet in one call."""
    sample, timesteps, states = rows()
    with apply(pipe, patch, **options), spied(pipe.unet) as calls:
        pipe.unet(sample, timesteps, encoder_hidden_states=states)
    return (*calls[0][DOWN], calls[0][MID])


def assert_close(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for left, right in zip(made, wanted, strict=True):
        assert (left - right).abs().max() <= 1e-5 * right.abs().max()


def total(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [sum(slots, torch.zeros(())) for slots in zip(*parts, strict=True)]


@pytest.mark.parametrize("categories", [("weapons", "gore"), ("weapons", "gore", "drugs")])
def test_cat_computes_the_sum_of_its_parts(tmp_path, small_pipe, categories):
    paths = saved(tmp_path, *categories)
    merged = merge(paths, tmp_path / "merged.safetensors", "cat")
    alone = [residuals(small_pipe, path) for path in paths]
    assert_close(residuals(small_pipe, merged), total(alone))
    assert all((left - right).abs().max() > 0.01 for left, right in zip(*alone[:2], strict=True))  # control
    assert merged.info.config["layout"] == {"rank": 6 if "drugs" in categories else 4, "depth": 1, "groups": len(paths)}
    assert len(merged.parts()) == 1  # one module, one pass


def test_a_source_may_lack_what_others_have(tmp_path, small_pipe):
    whole, other = lite("weapons"), lite("gore")
    kept = {name: tensor for name, tensor in other.tensors.items() if ".told." not in name}
    assert len(kept) < len(other.tensors)  # control
    paths = [patch.save(tmp_path / f"{i}.safetensors") for i, patch in enumerate((whole, replace(other, tensors=kept)))]
    alone = [residuals(small_pipe, path) for path in paths]
    assert_close(residuals(small_pipe, merge(paths, tmp_path / "both.safetensors", "cat")), total(alone))
    assert split(tmp_path / "both.safetensors", "gore").tensors.keys() == kept.keys()


def test_every_skip_is_told_what_the_mid_block_shows():
    patch, states = awaken(LitePatch.from_unet(UNET, rank=4), 0, 0.3), torch.randn(1, 5, 192)
    sample, timesteps, _ = rows(1)
    skips = tuple(torch.randn(1, width, 4, 4) for width in skip_channels(UNET))

    def made(mid: Tensor) -> Residuals:
        return patch(sample, timesteps, states, states, features=Features(skips[:-1], mid))

    with torch.no_grad():
        before, after = made(skips[-1]), made(skips[-1].flip(-1))
        for branch in patch.down_branches:
            branch.told.zero_()
        untold = made(skips[-1]), made(skips[-1].flip(-1))
    assert all(not torch.allclose(*pair, atol=1e-3) for pair in zip(before.down, after.down, strict=True))
    assert all(torch.equal(*pair) for pair in zip(untold[0].down, untold[1].down, strict=True))  # control


def test_weights_of_a_cat_are_those_of_the_sum(tmp_path, small_pipe):
    paths = saved(tmp_path, "weapons", "gore")
    merged = merge(paths, method="cat", weights=[0.5, 2.0])
    weapons, gore = (residuals(small_pipe, path) for path in paths)
    assert_close(residuals(small_pipe, merged), total([[0.5 * r for r in weapons], [2.0 * r for r in gore]]))


@pytest.mark.parametrize("method", ["cat", BUNDLE])
def test_each_category_keeps_a_scale_of_its_own(tmp_path, small_pipe, method):
    paths = saved(tmp_path, "weapons", "gore")
    merged = merge(paths, method=method)
    gore = residuals(small_pipe, paths[1])
    assert_close(residuals(small_pipe, merged, scale={"weapons": 0, "gore": 1}), gore)
    assert_close(residuals(small_pipe, merged, scale={"weapons": 0, "gore": 0.5}), [0.5 * r for r in gore])
    assert not torch.allclose(residuals(small_pipe, merged)[0], gore[0], atol=1e-2)  # control


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_every_part_comes_back_bit_for_bit(tmp_path, weight):
    paths = saved(tmp_path, *RANKS)
    merge(paths, tmp_path / "merged.safetensors", "cat", weights=[weight] * 3)
    for path in paths:
        part = split(tmp_path / "merged.safetensors", path.stem, tmp_path / "part.safetensors")
        assert (tmp_path / "part.safetensors").read_bytes() == path.read_bytes()
        assert part.info.categories == (path.stem,)


def test_what_was_merged_may_be_merged_again(tmp_path, small_pipe):
    first, last = saved(tmp_path, "weapons", "drugs"), saved(tmp_path, "gore")
    inner = tmp_path / "inner.safetensors"
    merge(first, inner, "cat")
    nested = merge([inner, *last], tmp_path / "nested.safetensors", "cat")
    flat = merge([*first, *last], method="cat")
    assert_close(residuals(small_pipe, nested), residuals(small_pipe, flat))
    gore, weapons = (split(tmp_path / "nested.safetensors", name) for name in ("gore", "weapons"))
    assert (gore.content_hash, weapons.content_hash) == (lite("gore").content_hash, lite("weapons").content_hash)


def test_order_of_the_sources_is_nothing(tmp_path):
    paths = saved(tmp_path, *RANKS)
    merge(paths, tmp_path / "a.safetensors", "cat")
    merge(paths[::-1], tmp_path / "b.safetensors", "cat")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_half_precision_parts_come_back_too(tmp_path):
    paths = [lite(name).astype(torch.float16).save(tmp_path / f"{name}.safetensors") for name in ("weapons", "gore")]
    merge(paths, tmp_path / "merged.safetensors", "cat")
    split(tmp_path / "merged.safetensors", "gore", tmp_path / "part.safetensors")
    assert (tmp_path / "part.safetensors").read_bytes() == paths[1].read_bytes()


def test_a_bundle_may_hold_both_kinds(tmp_path, small_pipe):
    control = replace(new_artifact(UNET), info=replace(new_artifact(UNET).info, instructions={"gore": "no gore"}))
    paths = [*saved(tmp_path, "weapons"), control.save(tmp_path / "gore.safetensors")]
    bundle = merge(paths, tmp_path / "both.safetensors", BUNDLE)
    assert bundle.info.kind == "control+lite"
    assert_close(residuals(small_pipe, bundle), total([residuals(small_pipe, path) for path in paths]))
    with pytest.raises(MergeError, match=r"differ in kind: .*or keep them apart by bundle"):
        merge(paths, method="cat")


def test_sums_are_of_one_depth(tmp_path):
    depths = {"gore": 1, "weapons": 2, "drugs": 1}
    paths = [lite(name, 4, depth).save(tmp_path / f"{name}.safetensors") for name, depth in depths.items()]
    with pytest.raises(MergeError, match="differ in depth; merge by bundle"):
        merge(paths[:2], method="linear")
    merge([paths[0], paths[2]], method="linear")  # control


BAD = {
    "two for one category": (lambda: [lite("gore"), lite("gore", rank=5)], {}, "more than one patch is for 'gore'"),
    "another depth": (lambda: [lite("gore"), lite("weapons", depth=2)], {}, "differ in depth or gate"),
    "a rank": (lambda: [lite("gore"), lite("weapons")], {"rank": 2}, "no sum to re-compress"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_what_cannot_stand_side_by_side_is_refused(tmp_path, case):
    make, options, message = BAD[case]
    paths = [artifact.save(tmp_path / f"{index}.safetensors") for index, artifact in enumerate(make())]
    with pytest.raises(MergeError, match=message) as caught:
        merge(paths, tmp_path / "merged.safetensors", "cat", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize("layout", [{"rank": 0}, {"depth": 0}, {"groups": 0}, {"rank": -3}])
def test_a_layout_below_one_is_refused(layout):
    with pytest.raises(ConfigError, match="of at least 1"):
        LitePatch.from_unet(UNET, **layout)


def test_a_lite_patch_without_features_says_so():
    patch = LitePatch.from_unet(UNET, rank=4)
    with pytest.raises(ConfigError, match="reads the host's features"):
        patch(*rows(), torch.zeros(1, 3, 192))


def test_a_file_remembers_rank_and_depth(tmp_path):
    path = lite("drugs", depth=2).save(tmp_path / "drugs.safetensors")
    opened = from_artifact(PatchArtifact.open(path), UNET)
    assert opened.layout == {"rank": 6, "depth": 2, "groups": 1}


def test_two_fresh_patches_are_equal():
    first, second = (LitePatch.from_unet(UNET, rank=4).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(7)
    third = LitePatch.from_unet(UNET, rank=4).state_dict()
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_the_hosts_features_are_its_own_whatever_else_is_attached(small_pipe, tmp_path):
    """Two lite patches see the same features, so that what they add does not depend on who came first."""
    paths = saved(tmp_path, "weapons", "gore")
    alone = [residuals(small_pipe, path) for path in paths]
    with apply(small_pipe, paths[0]):
        both = residuals(small_pipe, paths[1])
    assert_close(both, total(alone))
    assert not same_residuals((alone[0][:-1], alone[0][-1]), (alone[1][:-1], alone[1][-1]))  # control
