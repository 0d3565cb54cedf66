"""A patch that cannot act is said: by everything that opens one for use, in the same words."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from safepatch import apply, cli, fuse
from safepatch.artifact.acting import is_finite, peak
from safepatch.artifact.describe import described
from safepatch.artifact.info import BUNDLE, PatchInfo, read_info
from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.errors import ArtifactError, BaseMismatch, SafepatchError
from safepatch.merging import merge
from safepatch.models.load import license_of
from safepatch.patch.files import to_artifact
from tests.small import new_artifact, new_patch, new_small_unet, small_artifact

ROOT = Path(__file__).parents[2]
GATE = {"detect": (1, 4, 192), "detect_bias": (1, 4), "weigh": (1, 4), "bias": (1,)}


def gated(threshold: Any = 0.5, **changes: Any) -> PatchArtifact:
    """A lora patch with a gate, its config changed."""
    plain = small_artifact("lora")
    gate = {f"lora.gate.{name}.delta": 0.1 * torch.ones(shape) for name, shape in GATE.items()}
    layout = {**plain.info.config["layout"], "gate": 4, **changes}
    info = replace(
        plain.info, config={**plain.info.config, "layout": layout, "gate": {"weapons": {"threshold": threshold}}}
    )
    return PatchArtifact({**plain.tensors, **gate}, info)


def without(artifact: PatchArtifact, part: str) -> PatchArtifact:
    return replace(artifact, tensors={name: t for name, t in artifact.tensors.items() if part not in name})


def changed(artifact: PatchArtifact, part: str, change: Callable[[Tensor], Tensor]) -> PatchArtifact:
    """The patch with every tensor changed whose name has `part` in it."""
    assert any(part in name for name in artifact.tensors)
    return replace(artifact, tensors={n: change(t.clone()) if part in n else t for n, t in artifact.tensors.items()})


def one_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = math.nan
    return tensor


def laid_out(kind: str, **layout: int) -> PatchArtifact:
    artifact = small_artifact(kind)
    config = artifact.info.config
    return replace(
        artifact, info=replace(artifact.info, config={**config, "layout": {**config.get("layout", {}), **layout}})
    )


CANNOT: dict[str, tuple[Callable[[], PatchArtifact], str]] = {
    "fresh lora": (lambda: small_artifact("lora", None), "holds zeros where it would act"),
    "fresh lite": (lambda: small_artifact("lite", None), "holds zeros where it would act"),
    "fresh control": (lambda: small_artifact("control", None), "holds zeros where it would act"),
    "zero factor": (lambda: changed(small_artifact("lora"), ".down", torch.zeros_like), "holds zeros where it would"),
    "one nan": (lambda: changed(small_artifact("lora"), "to_q.weight.up", one_nan), "NaN or infinity"),
    "one infinity": (lambda: changed(small_artifact("control"), "conv_in.bias", lambda t: t / 0), "NaN or infinity"),
    "no joints": (lambda: without(small_artifact("control"), "control.zero_"), "lacks the parameters through which"),
    "no branch ends": (lambda: without(small_artifact("lite"), ".up."), "lacks the parameters through which"),
    "half a gate": (lambda: without(gated(), "gate.weigh"), "lacks 'weigh' of its gate"),
    "a gate that is not told of": (lambda: replace(gated(), info=small_artifact("lora").info), "of its gate"),
    "no gate but told of": (lambda: without(gated(), "lora.gate"), "its layout says gate 4, its tensors say None"),
    "a wider gate": (lambda: gated(gate=10**7), "its layout says gate 10000000, its tensors say 4"),
    "a huge lite": (lambda: laid_out("lite", rank=10**7), "its layout says rank 10000000, its tensors say 4"),
    "a deep lite": (lambda: laid_out("lite", depth=10**7), "its layout says depth 10000000, its tensors say 1"),
    "groups unlike categories": (lambda: laid_out("lite", groups=3), "its layout says groups 3, its tensors say 1"),
    "a huge lora": (lambda: laid_out("lora", rank=10**7), "its layout says rank 10000000"),
    "an unknown setting": (lambda: laid_out("control", width=3), "its layout says width 3, its tensors say None"),
    "no category": (lambda: relabeled(instructions={}), "does not name a category"),
    "blind": (lambda: relabeled(config={"layout": {"rank": 4}}), "does not name what it sees"),
    "a gate that never opens": (lambda: gated(1.0), "the gate for weapons opens above 1, which is never"),
    "another kind": (lambda: relabeled(kind="halo"), "of kind 'halo'"),
}
BY_VALUE = ("a gate that never opens", "fresh lora", "fresh lite", "fresh control", "zero factor")


def relabeled(**changes: Any) -> PatchArtifact:
    return replace(small_artifact("lora"), info=replace(small_artifact("lora").info, **changes))


@pytest.mark.parametrize("case", CANNOT)
def test_a_patch_that_cannot_act_is_refused_by_everything_that_uses_it(
    tmp_path: Path, small_pipe: Any, case: str
) -> None:
    make, says = CANNOT[case]
    path = make().save(tmp_path / "a.safetensors")
    users = {
        "verify": lambda: verify(path),
        "apply": lambda: apply(small_pipe, path),
        "fuse": lambda: fuse(small_pipe, path),
        "merge": lambda: merge([path], tmp_path / "merged.safetensors"),
    }
    for use in users.values():
        with pytest.raises(ArtifactError, match=says) as caught:
            use()
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).isprintable()
    if case in BY_VALUE:
        assert verify(path, allow_zero=True) == PatchArtifact.open(path, allow_zero=True).info
    else:
        with pytest.raises(ArtifactError, match=says):
            verify(path, allow_zero=True)


@pytest.mark.parametrize("kind", ["control", "lite", "lora"])
def test_control_a_patch_that_can_act_is_taken(tmp_path: Path, kind: str) -> None:
    artifact = small_artifact(kind)
    assert verify(artifact.save(tmp_path / "a.safetensors")) == artifact.info
    assert verify(gated().save(tmp_path / "a.safetensors")).config["gate"] == {"weapons": {"threshold": 0.5}}
    assert verify(artifact.compress(1).save(tmp_path / "a.safetensors")).kind == kind


@pytest.mark.parametrize("threshold", [-0.1, 2, math.nan, "0.5", None, True, [0.5]])
def test_a_threshold_at_which_no_gate_could_judge_cannot_be_written_down(threshold: Any) -> None:
    with pytest.raises(ArtifactError, match="patch info 'config"):
        gated(threshold)
    assert gated(0.0).info.config["gate"] == {"weapons": {"threshold": 0.0}}  # control


def test_a_threshold_that_is_missing_is_refused(tmp_path: Path) -> None:
    artifact = gated()
    config = {**artifact.info.config, "gate": {}}
    path = replace(artifact, info=replace(artifact.info, config=config)).save(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match="lacks 'weapons' of its gate"):
        verify(path)


@pytest.mark.parametrize("method", [BUNDLE, "cat"])
def test_a_weight_of_nothing_in_an_older_merge_is_said(tmp_path: Path, method: str) -> None:
    paths = [named(category).save(tmp_path / f"{category}.safetensors") for category in ("weapons", "drugs")]
    merged = merge(paths, method=method)
    sources = [{**source, "weight": 0.0 if "drugs" in source["categories"] else 1.0} for source in merged.info.sources]
    silent = replace(merged, info=replace(merged.info, recipe={**(merged.info.recipe or {}), "sources": sources}))
    path = silent.save(tmp_path / "merged.safetensors")
    with pytest.raises(ArtifactError, match="drugs has weight 0 in this merge, so it does not act"):
        verify(path)
    assert verify(path, allow_zero=True).categories == ("drugs", "weapons")
    assert verify(merged.save(path)).categories == ("drugs", "weapons")  # control


def named(category: str) -> PatchArtifact:
    info = replace(small_artifact("lora").info, instructions={category: f"no {category}"}, title="")
    return replace(small_artifact("lora"), info=info)


# ---- on a host --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "part"), [("control", "zero_mid.bias"), ("lite", "lite.time"), ("lite", "0.out")])
def test_a_parameter_that_is_no_copy_of_the_hosts_must_be_there(
    tmp_path: Path, small_pipe: Any, kind: str, part: str
) -> None:
    path = without(small_artifact(kind), part).save(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match=f"lacks '{kind}.*{part.split('.')[-1]}'"):
        apply(small_pipe, path)
    sparse = without(small_artifact("control"), "clone.conv_in")  # control: there the host's own weights are meant
    apply(small_pipe, sparse.save(path)).remove()


@pytest.mark.parametrize("kind", ["control", "lite", "lora"])
def test_a_parameter_of_another_shape_is_named(tmp_path: Path, small_pipe: Any, kind: str) -> None:
    other = new_artifact(new_small_unet(block_out_channels=(16, 32, 64)), kind)
    other = replace(other, info=replace(other.info, fingerprint=small_artifact(kind).info.fingerprint))
    with pytest.raises(BaseMismatch, match=rf"'{kind}\..*' is \[.*\] in this patch and \[.*\] on this model"):
        apply(small_pipe, other.save(tmp_path / "a.safetensors"))


# ---- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_peak_is_the_largest_magnitude(dtype: torch.dtype) -> None:
    values = torch.randn(3, 700_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert peak(values) == values.abs().max().item()
    assert peak(values.T) == peak(-values.abs()) == peak(values)
    assert peak(torch.tensor(-0.0, dtype=dtype)) == 0
    assert peak(torch.empty(0, 3, dtype=dtype)) == 0
    for value in (math.nan, -math.nan, math.inf, -math.inf):
        values[1, 5] = value
        assert not is_finite(values)
    assert is_finite(values[2])  # control


# ---- what is told -----------------------------------------------------------------------------------------------

FORGED = "a patch\nverified-by-safepatch yes\r\x1b[31m\u202egnp\u2066 \x9b"


def test_what_a_file_says_cannot_forge_a_line(tmp_path: Path) -> None:
    info = replace(small_artifact("lora").info, title=FORGED, license=FORGED, training={"note\x1b": FORGED})
    path = replace(small_artifact("lora"), info=info).save(tmp_path / "a.safetensors")
    assert read_info(path).title == FORGED  # control: it is in the file
    for words in (("inspect", path), ("inspect", path, "--json"), ("verify", path)):
        lines = CliRunner().invoke(cli.app, list(map(str, words)), catch_exceptions=False).stdout.split("\n")
        assert all(line.isprintable() for line in lines)
        assert not any(line.lstrip().startswith("verified-by") for line in lines)
    assert json.loads(json.dumps(described(read_info(path))))["title"] == FORGED


def test_errors_are_one_plain_line_whatever_they_quote() -> None:
    assert str(SafepatchError(f"no '{FORGED}'")).isprintable()
    assert str(SafepatchError("kept: 'ü' 東京 \U0001f52a")) == "kept: 'ü' 東京 \U0001f52a"  # control


def test_names_that_could_not_stand_on_a_line_are_refused() -> None:
    for name in ("", "a\nb", "\x1b[1m", "\u202e"):
        with pytest.raises(ArtifactError, match="a name of printable characters"):
            PatchInfo("lora", {name: "x"}, {}, {})
    assert PatchInfo("lora", {"fast-food": "x"}, {}, {}).categories == ("fast-food",)  # control


def test_weights_other_than_1_are_told(tmp_path: Path) -> None:
    paths = [named(category).save(tmp_path / f"{category}.safetensors") for category in ("weapons", "drugs")]
    out = tmp_path / "merged.safetensors"
    merge(paths, out, weights=[1, 0.25])
    printed = CliRunner().invoke(cli.app, ["inspect", str(out)], catch_exceptions=False).stdout
    assert 'weights         {"drugs": 0.25}' in printed
    merge(paths, out)
    assert described(read_info(out))["weights"] == {}  # control


def test_the_license_is_the_users(small_pipe: Any) -> None:
    patch = new_patch(small_pipe.unet, "lora")
    assert to_artifact(patch, small_pipe.unet, {"weapons": "x"}, license="MIT").info.license == "MIT"
    assert to_artifact(patch, small_pipe.unet, {"weapons": "x"}).info.license == ""  # control: none is made up


def test_the_bases_license_is_what_it_states(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert license_of(folder) == ""  # control: none is made up
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: creativeml-openrail-m\n---\nlicense: mit\n")
    save_file({"x": torch.zeros(1)}, tmp_path / "one.safetensors", {"modelspec.license": "CreativeML Open RAIL-M"})
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    assert license_of(folder) == "creativeml-openrail-m"
    assert license_of(tmp_path / "one.safetensors") == "CreativeML Open RAIL-M"
    assert license_of(tmp_path / "bare.safetensors") == ""
    assert license_of("tiny-sd") == verify(ROOT / "patches" / "lora" / "weapons.safetensors").license


LIES: list[tuple[str, Any]] = [
    ("shapes", {"lora.w": 3}),
    ("shapes", {"lora.w": [3, -1]}),
    ("shapes", {"lora.w": [3, 1.5]}),
    ("shapes", [1]),
    ("fingerprint", "sd1"),
    ("base", {"family": 3}),
    ("base", {"encoder_sketch": "1 2 three"}),
    ("base", {"encoder_sketch": "0 0"}),
    ("instructions", {"weapons": ["no"]}),
    ("instructions", {"weapons": "\ud800"}),
    ("instructions", None),
    ("config", {"layout": [1]}),
    ("config", {"layout": {"rank": -1}}),
    ("config", {"layout": {"rank": 1.0}}),
    ("config", {"layout": {"rank": 10**30}}),
    ("config", {"gate": {"weapons": 0.5}}),
    ("config", {"gate": {"weapons": {}}}),
    ("config", {"sees": 3}),
    ("training", {"\ud800": 1}),
    ("recipe", {"sources": []}),
    ("recipe", {"method": "linear", "sources": [{"hash": "0x"}]}),
    ("recipe", {"method": "linear", "sources": {"a": 1}}),
    ("recipe", {"method": "linear", "sources": [{"hash": "0x", "weight": "1", "categories": ["a"]}]}),
    ("recipe", {"method": "linear", "conflicts": [{"sources": [0, 1], "overall": {}, "blocks": {}}]}),
    ("recipe", "linear"),
    ("evaluation", {"a": json.loads("[" * 60 + "]" * 60)}),
]


@pytest.mark.parametrize(("field", "value"), LIES)
def test_what_the_schema_does_not_allow_cannot_be_said(field: str, value: Any) -> None:
    info = small_artifact("lora").info
    with pytest.raises(ArtifactError, match=f"patch info '{field}") as caught:
        replace(info, **{field: value})
    assert str(caught.value).isprintable()
    with pytest.raises(ArtifactError, match=f"patch info '{field}"):
        PatchInfo.from_metadata({**info.to_metadata(), f"safepatch.{field}": json.dumps(value)})
    assert PatchInfo.from_metadata(info.to_metadata()) == info  # control
